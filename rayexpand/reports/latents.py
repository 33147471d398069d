"""Figures of what methods change in the latents of their seeds: both profiles of several runs as histograms, and the
spreads of single samples (GIF, figures 10 and 11). Drawn from figures/<name>.json, filled by evaluation/latents.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexpand.evaluation.latents import latent_changes
from rayexpand.reports import drawing
from rayexpand.reports.figure import Figure, write_figures
from rayexpand.reports.templates import render
from rayexpand.runs.differences import short_names
from rayexpand.runs.status import view_run, write_page
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json, replace_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

PROFILES = {"token": "token profile", "channel": "channel profile"}
ROW = 118  # height of the panels of a run


def write_latents_page(folders: Sequence[str], out: str, *, name: str = "latents", images: int = 64) -> Path | str:
    """Computes and keeps the latent changes of some runs below `out`, and draws them; returns where the page is."""
    files = open_files(out)
    names = short_names([view_run(folder).run["config"] for folder in folders])
    runs = [{**latent_changes(folder, images), "name": one} for folder, one in zip(folders, names, strict=True)]
    for where in ("figures", ".tmp"):
        files.make_folder(where)
    replace_json(files, f"figures/{name}.json", {"runs": runs})
    stored = read_json(files, f"figures/{name}.json")
    assert stored is not None
    figures = (histograms(stored, name), spreads(stored, name))
    write_figures(files, figures)
    page = render("latents.html.j2", {}, runs=stored["runs"], figures=figures, lines=_lines(stored),
                  file=f"{name}.json", written=datetime.now(UTC))
    return write_page(files, f"figures/{name}.html", page)


def histograms(found: Mapping[str, Any], name: str) -> Figure:
    """A row for each run: how often which change, averaged over channels at a token, and over tokens in a channel."""
    runs = found["runs"]

    def draw(canvas: Canvas) -> None:
        panels = canvas.subplots(len(runs), 2, squeeze=False)
        for number, (run, pair) in enumerate(zip(runs, panels, strict=True)):
            reach = max(abs(edge) for one in PROFILES for edge in run[one]["edges"])
            for axes, (key, words) in zip(pair, PROFILES.items(), strict=True):
                drawing.dress(axes, f"{words}, latent units" if number == len(runs) - 1 else "", "")
                axes.stairs(run[key]["counts"], run[key]["edges"], fill=True, color=drawing.colour_of(number))
                axes.set(xlim=(-1.05 * reach or 1, 1.05 * reach or 1), yticks=[])
                axes.axvline(0, color=drawing.INK, lw=0.8)
            pair[0].set_title(drawing.short(run["name"], 40), fontsize=drawing.LETTERS, loc="left", color=drawing.INK)

    label = "Histograms of the token and the channel profile of the latent change of each run"
    return Figure(f"{name}-histograms", drawing.svg((drawing.WIDTH, ROW * len(runs) + 24), draw, label), {
        "runs": [{"name": run["name"], **{key: run[key] for key in PROFILES}} for run in runs]})


def spreads(found: Mapping[str, Any], name: str) -> Figure:
    """Each sample by the spreads of its two profiles; on the line both are equal."""
    runs = found["runs"]
    _, lines = drawing.key_rows([run["name"] for run in runs])

    def draw(canvas: Canvas) -> None:
        axes = drawing.axes_of(canvas, "spread of the token profile, latent units", "spread of the channel profile")
        handles = [axes.scatter([one["token_spread"] for one in run["samples"]],
                                [one["channel_spread"] for one in run["samples"]], s=16, linewidths=0.9,
                                marker=drawing.MARKERS[number % len(drawing.MARKERS)],
                                edgecolors=drawing.colour_of(number),
                                facecolors=drawing.colour_of(number) if number % 2 else "none")
                   for number, run in enumerate(runs)]
        top = max(max(one["token_spread"], one["channel_spread"]) for run in runs for one in run["samples"]) or 1.0
        axes.plot([0, top], [0, top], color=drawing.SOFT, lw=0.9, ls="--")
        axes.set(xlim=(-0.03 * top, 1.06 * top), ylim=(-0.03 * top, 1.06 * top))
        drawing.key(canvas, handles, [run["name"] for run in runs])

    label = "Spread of the token profile against spread of the channel profile, a point for each sample"
    svg = drawing.svg((drawing.WIDTH, 320 + drawing.KEY_ROW * lines), draw, label)
    return Figure(f"{name}-spreads", svg, {"runs": [{"name": run["name"], "samples": run["samples"]} for run in runs]})


def _lines(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**run, **{key: float(np.mean([one[f"{key}_spread"] for one in run["samples"]])) for key in PROFILES},
             "n": len(run["samples"])} for run in found["runs"]]
