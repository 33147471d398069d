"""The summary and the page of a sweep: the best configuration, every trial, and the score against each swept field.

Both are written from the files of the sweep; the page has no script, loads nothing, and escapes what comes from files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml
from markupsafe import Markup

from rayexpand.reports import figures
from rayexpand.reports.templates import render
from rayexpand.studies.sweep.search import describe, short
from rayexpand.studies.sweep.sweep import Sweep, best_of, read_results, read_test, write_best

SELECTED = ("chosen by the test images: the best of several looks better there than it will be on new images; sweep "
            "with validation images for a score that can be published")


def write_sweep_report(sweep: Sweep, failed: Sequence[str] = ()) -> dict[str, Any]:
    """Writes best.yaml, final.yaml, summary.json and report.html; returns the summary.

    `failed` says which trials did and why. Raises EnvironmentFault if the folder cannot be written.
    """
    results = read_results(sweep.files)
    best = best_of(results)
    if best is not None:
        write_best(sweep, best)
    found = _summary(sweep, list(results.values()), best, failed, read_test(sweep, best))
    sweep.files.replace("summary.json", json.dumps(found, indent=1).encode())
    page = render("sweep.html.j2", {},
        found=found, best=best, ranked=_ranked(results), fields=_fields(sweep),
        figures=_figures(sweep, results, best), written=datetime.now(UTC), selected=SELECTED,
        config=yaml.safe_dump(sweep.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    sweep.files.replace("report.html", page.encode())
    return found


def _summary(sweep: Sweep, trials: list[dict[str, Any]], best: dict[str, Any] | None, failed: Sequence[str],
             test: Mapping[str, Any] | None) -> dict[str, Any]:
    config, commands = sweep.config, []
    if best is not None:
        commands = [f"rayexpand train {shlex.quote(str(sweep.files.at(name)))}" for name in ("best.yaml", "final.yaml")]
    found = {"sweep": config.name, "folder": str(sweep.files.root), "arm": config.arm, "metric": config.metric,
             "score_on": config.score_on, "best": best and best["key"], "values": best and best["values"],
             "score": best and best["score"], "scores": best and best["scores"],
             "test_score": test and test["score"], "test_scores": test and test["scores"],
             "trials": trials, "failed": list(failed), "commands": commands,
             "report": str(sweep.files.at("report.html"))}
    return {**found, "words": _words(found)}


def _words(found: Mapping[str, Any]) -> list[str]:
    """The outcome in lines for people."""
    lines = ["no trial finished, so there is no best configuration"]
    if found["best"] is not None:
        n, images = len(found["scores"]), found["score_on"]
        lines = [f"best: {describe(found['values'])}: {found['metric']} {100 * found['score']:.2f} % on the {images} "
                 f"images, mean of {n} seed{'s' if n != 1 else ''}",
                 SELECTED if images == "test" else "not yet scored on the test images" if found["test_score"] is None
                 else f"on the test images, scored once: {100 * found['test_score']:.2f} %",
                 f"the same score again: {found['commands'][0]}",
                 f"all arms with these values, on the test images: {found['commands'][1]}"]
    return [*lines, f"report: {found['report']}"]


def _ranked(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Finished trials before stopped ones, which had fewer epochs; then by score."""
    return sorted(results.values(), key=lambda one: (one["state"] != "finished", -one["epochs"], -one["score"]))


def _fields(sweep: Sweep) -> dict[str, str]:
    """Swept fields with their short names."""
    fields = [one.field for one in sweep.space]
    return dict(zip(fields, short(fields), strict=True))


def _figures(sweep: Sweep, results: Mapping[str, dict[str, Any]], best: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One figure for each swept field."""
    drawn = []
    for dimension in sweep.space if results else ():
        field = dimension.field
        numbers = [one["values"][field] for one in results.values()]
        numbers = [*numbers, *dimension.values]
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
        names = [] if is_number else [str(value) for value in dimension.values]
        groups: dict[str, list[tuple[float, float]]] = {"stopped": [], "finished": [], "best": []}
        for one in results.values():
            value = one["values"][field]
            state = "best" if best is not None and one["key"] == best["key"] else one["state"]
            groups[state].append((value if is_number else names.index(str(value)), 100 * one["score"]))
        svg = figures.scores([(state, places) for state, places in groups.items() if places], names,
                             _fields(sweep)[field], f"Score against {field}", log=dimension.kind == "loguniform")
        drawn.append({"field": field, "svg": Markup(svg)})  # noqa: S704  (escaped where it is drawn)
    return drawn
