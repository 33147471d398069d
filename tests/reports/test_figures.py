"""Figures: one colour for a line wherever it is drawn, letters that can be read, standard errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexpand.contract.errors import DamagedFile
from rayexpand.reports import figures
from rayexpand.reports.drawing import FigurePoint
from rayexpand.reports.figure import Figure, read_figure, write_figures
from rayexpand.reports.figures import FigureCurve
from rayexpand.reports.lines import Line, Panel, crossover, lines
from rayexpand.storage.files import LocalFiles

PHONE = 400 - 2 * (6 + 12 + 1)  # pixels left for a figure on a screen of 400: main, section and its border
NAME = "expansion with quite a long name 5x"


def point(name: str, mean: float, x: float, series: int | None = 0) -> FigurePoint:
    return FigurePoint(name, mean, 1.5, x, series, (mean - 2.0, mean + 2.0), emphasised=True)


POINTS = [point("original", 60.0, 5.0, None), point(NAME, 70.0, 30.0), point("b 5x", 71.0, 60.0, 3)]
PANEL = Panel("a set", "top-1 (%)", (
    Line("a", (point("a 1x", 50.0, 1.0), point("a 5x", 60.0, 5.0)), 0),
    Line("b", (point("b 1x", 55.0, 1.0), point("b 5x", 61.0, 5.0)), 3)), POINTS[0])
DRAWN: dict[str, Callable[[], Figure]] = {
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
def test_letters_are_ten_pixels_on_a_screen_of_400(kind: str) -> None:
    svg = DRAWN[kind]().svg
    (width,) = re.findall(r'viewBox="0 0 (\d+)', svg)
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert sizes
    assert min(sizes) * min(1.0, PHONE / int(width)) >= 10


@pytest.mark.parametrize("kind", DRAWN)
def test_figures_know_no_colour_but_those_of_the_page(kind: str) -> None:
    svg = DRAWN[kind]().svg
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {
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
