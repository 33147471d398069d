"""Names beside points, where they cover neither a point nor another name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rayexpand.reports.drawing import INK, SOFT, FigurePoint, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def label_points(figure: Figure, axes: Axes, chosen: Sequence[FigurePoint], points: Sequence[FigurePoint],
                 across: Sequence[float | None] = ()) -> list[str]:
    """Writes names beside points where they cover neither a point nor another name; returns those without room.
    `across`: the errors of the points in x."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    dots = [axes.transData.transform((point.x, point.mean)) for point in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    for point, (x, _) in zip(points, dots, strict=True):
        low, high = (axes.transData.transform((point.x, point.mean + sign * (point.se or 0)))[1] for sign in (-1, 1))
        taken.append((x - 2, low, x + 2, high))
    for point, (_, y), error in zip(points, dots, across, strict=False):
        left, right = (axes.transData.transform((point.x + sign * (error or 0), point.mean))[0] for sign in (-1, 1))
        taken.append((left, y - 2, right, y + 2))
    room = axes.get_window_extent()
    without = []
    for point in sorted(chosen, key=lambda p: not p.emphasised):
        x, y = axes.transData.transform((point.x, point.mean))
        name = axes.annotate(short(point.name), (point.x, point.mean), (0, 0), textcoords="offset pixels",
                             color=INK, ha="left", va="center",
                             arrowprops={"arrowstyle": "-", "color": SOFT, "lw": 0.5, "shrinkA": 0, "shrinkB": 3})
        size = name.get_window_extent()
        for right, up in _places(size.width):
            box = (x + right, y + up - size.height / 2, x + right + size.width, y + up + size.height / 2)
            inside = room.x0 < box[0] and box[2] < room.x1 and room.y0 < box[1] and box[3] < room.y1
            if inside and not any(_overlap(box, other) for other in taken):
                name.set_position((right, up))
                taken.append(box)
                break
        else:
            name.remove()
            without.append(point.name)
    return without


def _places(width: float) -> list[tuple[float, float]]:
    """Offsets of the left middle of a label from its point, near ones first."""
    rings = []
    for far in (9, 18, 30, 44, 60, 80):
        rings += [(far, 0.0), (-far - width, 0.0)]
        rings += [(-width / 2 + side * width / 2 + side * far / 2, sign * far) for sign in (1, -1)
                  for side in (0, 1, -1)]
    return rings


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
