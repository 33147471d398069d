"""Figures: one colour for a line wherever it is drawn, letters that can be read, standard errors."""

from __future__ import annotations

import re

import pytest

from rayexpand.reports import figures
from rayexpand.reports.figures import FigureCurve, FigurePoint, Line

PHONE = 400 - 2 * (6 + 12 + 1)  # pixels left for a figure on a screen of 400: main, section and its border
NAME = "expansion with quite a long name 5x"


def point(name: str, mean: float, x: float, series: int | None = 0) -> FigurePoint:
    return FigurePoint(name, mean, 1.5, x, series, (mean - 2.0, mean + 2.0), emphasised=True)


POINTS = [point("original", 60.0, 5.0, None), point(NAME, 70.0, 30.0), point("b 5x", 71.0, 60.0, 3)]
DRAWN = {
    "bars": lambda: figures.bars(POINTS, "bars"),
    "ratios": lambda: figures.ratios([Line("a", (point("a 1x", 50.0, 1.0), point("a 5x", 60.0, 5.0)), 0),
                                      Line("b", (point("b 1x", 55.0, 1.0), point("b 5x", 61.0, 5.0)), 3)],
                                     POINTS[0], "ratios"),
    "costs": lambda: figures.costs(POINTS, "CPU", "costs")[0],
    "curves": lambda: figures.curves([FigureCurve("b 5x", 3, "6 2.5", ((1, 2.0), (2, 1.0)), ((1, 50.0), (2, 60.0)))],
                                     "curves"),
    "scores": lambda: figures.scores([("best", [(0.001, 80.0)]), ("stopped", [(0.1, 60.0)])], [], "lr", "s", log=True),
    "names": lambda: figures.scores([("best", [(0, 80.0)]), ("finished", [(1, 60.0)])], ["a" * 20, "b" * 20], "x", "n")}


@pytest.mark.parametrize("kind", DRAWN)
def test_letters_are_ten_pixels_on_a_screen_of_400(kind: str) -> None:
    svg = DRAWN[kind]()
    (width,) = re.findall(r'viewBox="0 0 (\d+)', svg)
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert sizes
    assert min(sizes) * min(1.0, PHONE / int(width)) >= 10


@pytest.mark.parametrize("kind", DRAWN)
def test_figures_know_no_colour_but_those_of_the_page(kind: str) -> None:
    svg = DRAWN[kind]()
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {
        "none", *(f"var(--{name})" for name in ("ink", "soft", "line", "card", "grey", *(f"s{i}" for i in range(6))))}
    assert "mathdefault" not in svg
    assert "$" not in svg


def test_an_arm_has_one_colour_in_bars_and_curves_and_is_not_mixed_with_the_page() -> None:
    bars, curve = DRAWN["bars"](), DRAWN["curves"]()
    for colour in ("var(--grey)", "var(--s0)", "var(--s3)"):
        assert f"fill: {colour}" in bars
    assert "opacity" not in bars, "a mixed colour is not the one of the legend"
    assert set(re.findall(r"stroke: var\(--(s\d)\)", curve)) == {"s3"}
    assert "stroke-dasharray: 6" in curve


def test_error_bars_are_the_standard_errors_given() -> None:
    assert "70.0 ± 1.5" in DRAWN["bars"]()
