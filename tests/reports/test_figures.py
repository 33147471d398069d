"""Figures: one colour for a line wherever it is drawn, letters that can be read, standard errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexpand.contract.errors import DamagedFile
from rayexpand.reports import figures
from rayexpand.reports.drawing import FigurePoint
from rayexpand.reports.figure import Figure, read_figure, write_figures
from rayexpand.reports.figures import FigureCurve
from rayexpand.reports.grids import grouped_bars, heat, made
from rayexpand.reports.kept import kept_per_seed
from rayexpand.reports.lines import Line, Panel, crossover, lines
from rayexpand.reports.scatter import rank_correlation, said_of, scatter
from rayexpand.storage.files import LocalFiles
from rayexpand.studies.measures import measure
from rayexpand.studies.pivot import ALL, Pivot, cell_of

PHONE = 400 - 2 * (6 + 12 + 1)  # pixels left for a figure on a screen of 400: main, section and its border
NAME = "expansion with quite a long name 5x"


def point(name: str, mean: float, x: float, series: int | None = 0) -> FigurePoint:
    return FigurePoint(name, mean, 1.5, x, series, (mean - 2.0, mean + 2.0), emphasised=True)


POINTS = [point("original", 60.0, 5.0, None), point(NAME, 70.0, 30.0), point("b 5x", 71.0, 60.0, 3)]
PANEL = Panel("a set", "top-1 (%)", (
    Line("a", (point("a 1x", 50.0, 1.0), point("a 5x", 60.0, 5.0)), 0),
    Line("b", (point("b 1x", 55.0, 1.0), point("b 5x", 61.0, 5.0)), 3)), POINTS[0])


def grid(*rows: str, gains: bool = False, measures: tuple[str, ...] = ("top1",)) -> Pivot:
    """Two columns of three trials each, rising along the rows."""
    cells = {(ALL, row, column, name): cell_of([i + column, i + column + 1.0, i + column + 3.0], 1)
             for i, row in enumerate(rows) for column in (1.0, 5.0) for name in measures}
    return Pivot((ALL,), rows, (1.0, 5.0), tuple(measure(name) for name in measures), cells, cells if gains else {}, {})


DRAWN: dict[str, Callable[[], Figure]] = {
    "groups": lambda: grouped_bars("g", grid("a", NAME), str, [None, 1], "groups"),
    "many bars": lambda: grouped_bars("m", grid(*(f"{NAME}{i}" for i in range(8))), str, list(range(8)), "many"),
    "heat": lambda: heat("h", grid("a", "b"), str, ("gamma", "strength"), "heat"),
    "gains": lambda: heat("h", grid("a", "b", gains=True), str, ("gamma", "strength"), "gains"),
    "made": lambda: made("d", grid("a", measures=("images", "discarded", "hours")), str, "share", "made"),
    "few points": lambda: scatter("f", [(one, one) for one in POINTS], ("fid", "top-1 (%)"), "few"),
    "many points": lambda: scatter("p", [(point(f"arm {i}", i % 5, 0, i), point(f"arm {i}", i, 0, i))
                                         for i in range(12)], ("fid", "top-1 (%)"), "many points"),
    "kept": lambda: kept_per_seed("k", "third", {0: 3, 1: 5, 2: 1}),
    "bars": lambda: figures.bars(POINTS, "bars"),
    "lines": lambda: lines("ratio", [PANEL], "ratio", "ratios"),
    "panels": lambda: lines("ratio", [PANEL, PANEL], "ratio", "ratios"),
    "costs": lambda: figures.costs(POINTS, "CPU", "costs")[0],
    "curves": lambda: figures.curves("curves-1", [FigureCurve("b 5x", 3, "6 2.5", ((1, 2.0), (2, 1.0)),
                                                              ((1, 50.0), (2, 60.0)))], "curves"),
    "scores": lambda: figures.scores("s", [("best", [point("a", 80.0, 0.001)]), ("stopped", [point("b", 60.0, 0.1)])],
                                     [], "lr", "s", log=True),
    "names": lambda: figures.scores("n", [("best", [point("a", 80.0, 0)]), ("finished", [point("b", 60.0, 1)])],
                                    ["a" * 20, "b" * 20], "x", "n")}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.fast_cases(5)
def test_letters_are_ten_pixels_on_a_screen_of_400(kind: str) -> None:
    svg = DRAWN[kind]().svg
    (width,) = re.findall(r'viewBox="0 0 (\d+)', svg)
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert sizes
    assert min(sizes) * min(1.0, PHONE / int(width)) >= 10


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.fast_cases(5)
def test_figures_know_no_colour_but_those_of_the_page(kind: str) -> None:
    svg = DRAWN[kind]().svg
    assert {one for one in re.findall(r"(?:fill|stroke): ([^;\"]+)", svg) if not one.startswith("url(#")} <= {
        "none", *(f"var(--{name})" for name in ("ink", "soft", "line", "card", "grey", *(f"s{i}" for i in range(6))))}
    assert "mathdefault" not in svg
    assert "$" not in svg


def test_an_arm_has_one_colour_in_bars_and_curves_and_is_not_mixed_with_the_page() -> None:
    bars, curve = DRAWN["bars"]().svg, DRAWN["curves"]().svg
    for colour in ("var(--grey)", "var(--s0)", "var(--s3)"):
        assert f"fill: {colour}" in bars
    assert "opacity" not in bars, "a mixed colour is not the one of the legend"
    assert set(re.findall(r"stroke: var\(--(s\d)\)", curve)) == {"s3"}
    assert "stroke-dasharray: 6" in curve


def test_error_bars_are_the_standard_errors_given() -> None:
    assert "70.0 ± 1.5" in DRAWN["bars"]().svg


@pytest.mark.parametrize(("means", "expected"), [
    ((50.0, 70.0), 5 ** 0.5), ((50.0, 60.0), 5.0), ((60.0, 70.0), None), ((50.0, 59.0), None)])
def test_a_line_crosses_the_baseline_between_two_points_in_log_x(means: tuple[float, float],
                                                                 expected: float | None) -> None:
    points = [point("a", mean, x) for mean, x in zip(means, (1.0, 5.0), strict=True)]
    assert crossover(points, 60.0) == (None if expected is None else pytest.approx(expected))


def test_a_figure_keeps_its_numbers_and_knows_when_they_are_not_its_own(tmp_path: Path) -> None:
    files, made = LocalFiles(tmp_path), DRAWN["lines"]()
    write_figures(files, [made])
    stored = read_figure(files, "ratio")
    assert stored == json.loads(json.dumps(made.numbers))
    (panel,) = stored["panels"]
    assert [one["crossover"] for one in panel["lines"]] == [pytest.approx(5.0), pytest.approx(5 ** (5 / 6))]
    assert panel["lines"][1]["points"][0] == {"name": "b 1x", "mean": 55.0, "se": 1.5, "n": 2, "values": [53.0, 57.0],
                                              "x": 1.0}
    picture = (tmp_path / "figures/ratio.svg").read_text()
    assert 'xmlns="http://www.w3.org/2000/svg"' in picture
    assert "var(" not in picture, "a file of its own has its own colours"
    for name, old, new in (("ratio.json", "53.0", "54.0"), ("ratio.svg", ">ratio<", ">retio<")):
        whole = (tmp_path / "figures" / name).read_text()
        assert old in whole
        (tmp_path / "figures" / name).write_text(whole.replace(old, new, 1))
        with pytest.raises(DamagedFile):
            read_figure(files, "ratio")
        (tmp_path / "figures" / name).write_text(whole)
    assert read_figure(files, "ratio") == stored


def test_a_rank_correlation_has_the_interval_of_bonett_and_wright() -> None:
    x = list(range(10))
    y = [0, 3, 1, 6, 2, 9, 4, 5, 8, 7]  # sum of squared rank differences 46: r = 1 - 6 * 46 / 990
    found, interval = rank_correlation(x, y)
    assert found == pytest.approx(0.7212121)
    reach = 1.959964 * ((1 + 0.7212121 ** 2 / 2) / 7) ** 0.5
    assert interval == pytest.approx((math.tanh(math.atanh(0.7212121) - reach), math.tanh(
        math.atanh(0.7212121) + reach)))
    assert rank_correlation(x[:4], y[:4])[1] is None
    assert rank_correlation(x, x) == (pytest.approx(1), None)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == (None, None)


@pytest.mark.parametrize(("kind", "words"), [
    ("few points", "No rank correlation: 3 points, or all of one value"),
    ("many points", "95 % interval")])
def test_a_scatter_says_how_sure_its_correlation_is(kind: str, words: str) -> None:
    figure = DRAWN[kind]()
    assert words in said_of(figure) or figure.numbers["rank_correlation"] == pytest.approx(1)


def test_many_points_have_numbers_and_a_key() -> None:
    svg = DRAWN["many points"]().svg
    assert all(f">{i} arm {i - 1}</text>" in svg for i in range(1, 13))


def test_a_heat_map_has_its_numbers_in_the_cells() -> None:
    gains, plain = DRAWN["gains"]().svg, DRAWN["heat"]().svg
    assert ">+2.3</text>" in gains
    assert ">2.3</text>" in plain
    assert "gain, points" in gains


def test_numbers_of_a_heat_map_stay_in_their_cells() -> None:
    """Of twelve columns each is narrower than its numbers are long, which then stand upright."""
    def upright(columns: int) -> bool:
        cells = {(ALL, "a", float(i), "top1"): cell_of([83.0, 84.0, 82.0 + i], 1) for i in range(columns)}
        found = Pivot((ALL,), ("a",), tuple(map(float, range(columns))), (measure("top1"),), cells, {}, {})
        return heat("h", found, str, ("gamma", "strength"), "heat").svg.count("rotate(-90") > 1  # of the name of rows

    assert [upright(columns) for columns in (2, 7, 12)] == [False, False, True]


def test_bars_of_one_colour_are_told_apart_without_it() -> None:
    assert DRAWN["groups"]().svg.count("<pattern") == 1, "grey is plain, the other has a hatch"
    many = DRAWN["many bars"]().svg
    assert many.count(f">{NAME[:18]}") == 16, "more rows than colours have their names at their bars"
