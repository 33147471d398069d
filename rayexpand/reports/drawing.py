"""What every figure is drawn with: inline SVG whose colours follow the page, light, dark, or as the reader prefers.

matplotlib draws in placeholder colours that become CSS variables (--ink, --soft, --line, --grey, --s0, --s1, ...), and
text stays text. A figure is WIDTH units wide, as much as a screen of 400 pixels has room for, so that no letter is
smaller there than it is drawn. A colour belongs to a line, the arms that differ in their ratio only, wherever it is
drawn; grey is real images only. Nothing is said by colour alone: lines have markers and dashes, bars hatches or names.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayexpand.reports.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360  # of a figure; CSS pixels at its natural size
LETTERS = 10.5  # size of text
KEY_ROW = 15  # height of a line of the key
COLOURS = 6
MAX_NAME = 30  # letters of an arm's name in a figure
DASHES = ("", "6 2.5", "1.5 2", "8 2 1.5 2", "3 1.5", "10 4")  # of the arms of a line, as CSS writes them
MARKERS = "o^Dv*P"
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----")
INK, SOFT, LINE, CARD, GREY = "#010203", "#010204", "#010205", "#010206", "#010207"
SERIES = tuple(f"#0103{i:02x}" for i in range(COLOURS))
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", CARD: "card", GREY: "grey",
              **{colour: f"s{i}" for i, colour in enumerate(SERIES)}}


@dataclass(frozen=True, slots=True)
class FigurePoint:
    """A mean over seeds, in the unit of its figure, with the standard error of the mean, if any."""

    name: str
    mean: float
    se: float | None = None
    x: float = 0.0  # where it stands
    series: int | None = None  # colour; None: grey
    values: tuple[float, ...] = ()  # one per seed
    emphasised: bool = False

    def numbers(self) -> dict[str, Any]:
        """As a figure stores them."""
        return {"name": self.name, "mean": self.mean, "se": self.se, "n": len(self.values), "values": list(self.values)}


def colour_of(series: int | None) -> str:
    return GREY if series is None else SERIES[series % COLOURS]


def marker_of(series: int | None) -> str:
    """A square is real images only."""
    return "s" if series is None else MARKERS[series % len(MARKERS)]


def error_bar(axes: Axes, x: float, point: FigurePoint, colour: str) -> None:
    if point.se is not None:
        axes.errorbar(x, point.mean, yerr=point.se, color=colour, capsize=2, lw=1)


def key_rows(names: Sequence[str]) -> tuple[int, int]:
    """Columns and lines that a key of these names takes below a figure."""
    columns = 2 if max(map(len, names), default=0) <= MAX_NAME - 8 else 1
    return columns, math.ceil(len(names) / columns)


def key(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """What marks mean, below the figure; `key_rows` says how high it is."""
    if names:
        figure.legend(handles, [short(name, 48) for name in names], loc="outside lower left", frameon=False,
                      ncols=key_rows(names)[0], fontsize=LETTERS, labelcolor=INK, handlelength=2.6, borderpad=0,
                      borderaxespad=0.2, columnspacing=1.2, labelspacing=0.35)


def axes_of(figure: Figure, x: str, y: str) -> Axes:
    axes = figure.add_subplot()
    dress(axes, x, y)
    return axes


def dress(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" or (side == "left" and y != ""))


def svg(size: tuple[int, int], draw: Callable[[Figure], None], label: str) -> str:
    """An <svg> element of `size` units, without anything that depends on the time or refers to another place."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False, "font.family": ["DejaVu Sans"],
        "font.size": LETTERS, "axes.labelsize": LETTERS, "xtick.labelsize": LETTERS, "ytick.labelsize": LETTERS,
        "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT,
        "text.color": INK, "axes.linewidth": 0.8, "axes.formatter.useoffset": False, "xtick.major.size": 3,
        "ytick.major.size": 0}
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        warnings.simplefilter("ignore")  # letters its own font lacks are still letters for the browser
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)  # measures text in the units of the picture
        draw(figure)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", transparent=True)
    return _inlined(sink.getvalue(), size, label)


def _inlined(svg: str, size: tuple[int, int], label: str) -> str:
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.S)
    body = re.sub(r"<svg[^>]*>", f'<svg class="plot" viewBox="0 0 {size[0]} {size[1]}" role="img" '
                                 f'aria-label="{html.escape(label)}">', body, count=1)
    body = re.sub(r"<g id=\"[^\"]*\"", "<g", body.replace("xlink:href", "href"))
    body = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", body)
    body = re.sub(r'fill="(#0[0-9a-f]{5})"', r'style="fill: \1"', body)  # of the ground of a hatch
    return re.sub(r"(fill|stroke): (#0[0-9a-f]{5})", lambda m: f"{m[1]}: var(--{_VARIABLES[m[2]]})", body)


def standalone(svg: str) -> str:
    """The same figure as a file of its own: light colours as numbers, on white, for programs that know no variables."""
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0]
    body = re.sub(r"var\(--(\w+)\)", lambda m: LIGHT[m[1]], svg)
    return body.replace('<svg class="plot"', f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
                        f'height="{height}" style="background: {LIGHT["card"]}"', 1)


def plus_minus(point: FigurePoint) -> str:
    return f"{point.mean:.1f}" + (f" ± {point.se:.1f}" if point.se is not None else "")


def short(name: str, most: int = MAX_NAME) -> str:
    """A long name without its middle: ratios stand at the end."""
    return name if len(name) <= most else f"{name[:most - 12]}…{name[-11:]}"
