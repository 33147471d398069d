"""What all pages have in common: colours that everybody can tell apart, words instead of hovering, settings."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.reports.run import write_report
from rayexpand.reports.study import write_study_report
from rayexpand.reports.templates import settings_of
from tests.runfolder import sample_run
from tests.studyfolder import grid

# Machado, Oliveira, Fernandes 2009, severity 1.0: on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                            [0.004733, 0.691367, 0.303900]])}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                [0.0193339, 0.1191920, 0.9503041]])  # of linear sRGB, white D65
BESIDE = {  # what can stand side by side
    "rows": ("kept", "rejected", "failed", "pending"), "verdicts": ("gain", "few", "loss", "open"),
    "arms": ("s0", "s1", "s2", "s3", "s4", "s5", "grey"),
    "phases and classes": ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "grey")}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("pages")
    study = grid(out / "study", expansions=("a", "b"), ratios=(1, 5), seeds=(0, 1, 2), images=20)
    return {"run": Path(write_report(sample_run(out / "half").folder)).read_text(),
            "study": Path(write_study_report(study.finish())).read_text()}


def linear(colour: str) -> np.ndarray:
    c_3 = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c_3 <= 0.04045, c_3 / 12.92, ((c_3 + 0.055) / 1.055) ** 2.4)


def lab(linear_3: np.ndarray) -> np.ndarray:
    t_3 = XYZ @ np.clip(linear_3, 0, 1) / XYZ.sum(1)
    f_3 = np.where(t_3 > (6 / 29) ** 3, np.cbrt(t_3), t_3 / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f_3[1] - 16, 500 * (f_3[0] - f_3[1]), 200 * (f_3[1] - f_3[2])])


def delta_e(a: np.ndarray, b: np.ndarray) -> float:
    """CIEDE2000 of two colours in CIE Lab."""
    chroma = (np.hypot(*a[1:]) + np.hypot(*b[1:])) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25**7))
    c, h = zip(*((np.hypot(stretch * one[1], one[2]), np.degrees(np.arctan2(one[2], stretch * one[1])) % 360)
                 for one in (a, b)), strict=True)
    turn = (h[1] - h[0] + 180) % 360 - 180 if c[0] * c[1] else 0.0
    hue = h[0] + turn / 2 if c[0] * c[1] else h[0] + h[1]
    light, mean_c = (a[0] + b[0]) / 2, (c[0] + c[1]) / 2

    def cos(degrees: float) -> float:
        return float(np.cos(np.radians(degrees)))

    t = 1 - 0.17 * cos(hue - 30) + 0.24 * cos(2 * hue) + 0.32 * cos(3 * hue + 6) - 0.2 * cos(4 * hue - 63)
    parts = ((b[0] - a[0]) / (1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2)),
             (c[1] - c[0]) / (1 + 0.045 * mean_c),
             2 * np.sqrt(c[0] * c[1]) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * mean_c * t))
    rotation = -2 * np.sqrt(mean_c**7 / (mean_c**7 + 25**7)) * np.sin(
        np.radians(60 * np.exp(-(((hue % 360) - 275) / 25) ** 2)))
    return float(np.sqrt(sum(part**2 for part in parts) + rotation * parts[1] * parts[2]))


def marks(page: str, mode: str) -> dict[str, str]:
    """Colour of every class whose rule sets a background alone, in a mode."""
    style = page.split("<style>")[1].split("</style>")[0]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    values = dict(re.findall(r"--(\w+): (#\w+)", light.partition("* {")[0]))
    if mode == "dark":
        values |= dict(re.findall(r"--(\w+): (#\w+)", dark.partition("* {")[0]))
    rules = re.findall(r"([^{}]+)\{ background: var\(--(\w+)\);? \}", style)
    found = {name: values[value] for selectors, value in rules for name in re.findall(r"\.(\w+)(?=,|\s*$)", selectors)}
    return {**found, "card": values["card"]}


@pytest.mark.parametrize(("a", "b", "expected"), [  # Sharma, Wu, Dalal 2005, table 1
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425), ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
    ((50, 2.5, 0), (73, 25, -18), 27.1492), ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373)])
def test_the_measure_is_the_published_one(a: Any, b: Any, expected: float) -> None:
    assert delta_e(np.array(a), np.array(b)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("group", BESIDE)
@pytest.mark.parametrize("name", ["run", "study"])
@pytest.mark.fast_cases(4)
def test_colours_side_by_side_differ_for_everybody(pages: dict[str, str], name: str, group: str, mode: str) -> None:
    found = {one: linear(colour) for one, colour in marks(pages[name], mode).items()}
    close = [(a, b, deficiency) for a, b in combinations(BESIDE[group], 2) for deficiency, matrix in
             DEFICIENCIES.items() if delta_e(lab(matrix @ found[a]), lab(matrix @ found[b])) < 15]
    assert close == []
    light = {one: XYZ[1] @ found[one] + 0.05 for one in (*BESIDE[group], "card")}
    faint = [one for one in BESIDE[group] if max(light[one] / light["card"], light["card"] / light[one]) < 3]
    assert faint == [], "contrast to the card (WCAG 2.1, 1.4.11)"


def test_nothing_is_said_to_a_pointer_alone(pages: dict[str, str]) -> None:
    for page in pages.values():
        body = page.partition("<body>")[2]
        assert not re.search(r"<[^>]* title=", body)
        assert "<title>" not in body
        assert not re.search(r"[Hh]over", body)


def test_pages_have_rules_for_print_and_for_narrow_screens(pages: dict[str, str]) -> None:
    for page in pages.values():
        style = page.split("<style>")[1].split("</style>")[0]
        print_rules = style.split("@media print")[-1]
        assert "@media screen and (prefers-color-scheme: dark)" in style, "paper is white"
        assert "@media (max-width: 640px)" in style
        assert "print-color-adjust: exact" in print_rules, "bars are backgrounds, which printers leave out"
        assert ".scroll, pre { overflow: visible; }" in print_rules
        assert "section { break-inside: avoid" not in style, "a long section would leave most of a sheet empty"


def test_settings_are_lines_by_section() -> None:
    found = settings_of({"name": "a", "seeds": [0, 1], "empty": {"no": None},
                         "data": {"path": "x", "ids": None, "crop": {"side": 3, "on": True}},
                         "arms": [{"name": "one", "use": None}, {"name": "two", "ratio": [1, 2]}],
                         "expansions": {"e": {"run": None, "config": {"method": {"name": "m", "strength": 0.5}}}}})
    assert found == {"general": [("name", "a"), ("seeds", "0, 1")],
                     "data": [("path", "x"), ("crop.side", "3"), ("crop.on", "true")],
                     "arms": [("one", ""), ("two", "ratio 1, 2")],
                     "expansion e": [("method.name", "m"), ("method.strength", "0.5")]}


@pytest.mark.parametrize(("name", "lines"), [
    ("run", ("<td><code>strength</code></td><td class=\"any\">0.6</td>", "<h3>method</h3>")),
    ("study", ("<h3>arms</h3>", "<td><code>a</code></td><td class=\"any\">use a, ratio 1, 5</td>"))])
def test_a_page_has_a_table_of_settings(pages: dict[str, str], name: str, lines: tuple[str, ...]) -> None:
    for line in lines:
        assert line in pages[name]
