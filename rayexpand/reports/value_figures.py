"""Figures of what a sample is worth: the curve that is read backwards, and how many samples alone reach real images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexpand.classifier.equivalence import PowerLaw
from rayexpand.reports.drawing import GREY, INK, MARKERS, SERIES, WIDTH, axes_of, key, key_rows, svg
from rayexpand.reports.figure import Figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

HEIGHT, KEY_LINE = 280, 15


def value_figures(worth: Mapping[str, Any] | None) -> list[Figure]:
    """None where there is no curve yet, or nothing but why is said."""
    if worth is None or worth["problem"] or not worth["arms"]:
        return []
    return [_curve(worth), *(_crossover(one, place) for place, one in enumerate(worth["crossovers"]))]


def _curve(worth: Mapping[str, Any]) -> Figure:
    """Real-only accuracy against real images, with each arm where the curve has its accuracy."""
    points = [{"images": one["images"], "top1": 100 * one["top1"], "rising": 100 * one["rising"]}
              for one in worth["curve"]]
    base = next(100 * one["top1"] for one in worth["curve"] if one["images"] == worth["n0"])
    arms = [{"name": f"{one['use']} {one['ratio']:g}x", "top1": base + 100 * one["difference"]["mean"],
             "n_eq": one.get("n_eq"), "k": one.get("k"), "low": one.get("low"), "high": one.get("high")}
            for one in worth["arms"] if one["role"] == "samples"]
    numbers = {"title": "Accuracy with real images alone, and where samples lie on it", "n0": worth["n0"],
               "curve, images and top-1 in %": points, "power law, drawn only": worth["law"],
               "arms, top-1 in %, n_eq and k in real images": arms}
    return Figure("value", _draw(points, arms, worth["law"], worth["n0"]), numbers)


def _draw(points: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]], law: Mapping[str, float] | None,
          n0: float) -> str:
    names = ["real images alone", *(["power law, drawn only"] if law else []), *(
        f"{one['name']}: k {one['k']:.2f}" if one["k"] is not None else f"{one['name']}: no k" for one in arms)]

    def draw(figure: Drawing) -> None:
        axes = axes_of(figure, "real images", "top-1, last epoch (%)")
        axes.set_xscale("log")
        sizes = np.array([one["images"] for one in points])
        handles: list[Any] = axes.plot(sizes, [one["rising"] for one in points], "-", color=INK, lw=1.6)
        axes.plot(sizes, [one["top1"] for one in points], "o", color=INK, markersize=4.5)
        if law:
            n = np.geomspace(sizes[0], sizes[-1], 60)
            handles += axes.plot(n, 100 * PowerLaw(law["a"], law["b"], law["c"], 0.0)(n), "--", color=GREY, lw=1.2)
        for place, one in enumerate(arms):
            x, colour = one["n_eq"] or n0, SERIES[place % len(SERIES)]
            handles += axes.plot([x], [one["top1"]], MARKERS[place % len(MARKERS)], color=colour, markersize=8)
            axes.plot([n0, x], [one["top1"]] * 2, ":", color=colour, lw=1.2)
        axes.axvline(n0, color=GREY, lw=1)
        axes.minorticks_off()
        axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
        key(figure, handles, names)
    return svg((WIDTH, HEIGHT + KEY_LINE * key_rows(names)[1]), draw, "Real-equivalent ratio")


def _crossover(one: Mapping[str, Any], place: int) -> Figure:
    """Accuracy of samples alone against their number, beside that of the real images."""
    numbers = {"title": f"{one['use']} alone against the real images", **{
        name: one[name] for name in ("samples", "crossover", "low", "high", "fits")},
        "top-1 in %": [100 * value for value in one["top1"]], "real images, top-1 in %": 100 * one["target"]}
    names = ["samples alone", "the real images", *(["crossover"] if one["crossover"] is not None else [])]

    def draw(figure: Drawing) -> None:
        axes = axes_of(figure, "samples", "top-1, last epoch (%)")
        axes.set_xscale("log")
        handles: list[Any] = axes.plot(one["samples"], [100 * value for value in one["top1"]], "-o", color=SERIES[0],
                                       lw=1.6, markersize=4.5)
        handles.append(axes.axhline(100 * one["target"], color=GREY, lw=1.4, ls="--"))
        if one["crossover"] is not None:
            handles += axes.plot([one["crossover"]], [100 * one["target"]], "*", color=SERIES[1], markersize=13)
        axes.minorticks_off()
        axes.set_xticks(one["samples"], [f"{size:,.0f}" for size in one["samples"]])
        key(figure, handles, names)
    return Figure(f"crossover-{place}", svg((WIDTH, HEIGHT + KEY_LINE * key_rows(names)[1]), draw,
                                            f"Samples alone: {one['use']}"), numbers)
