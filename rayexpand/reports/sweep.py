"""The summary and the page of a sweep: the best configuration, every trial, and the score against each swept field.

Both are written from the files of the sweep; the page has no script, loads nothing, and escapes what comes from files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student

from rayexpand.classifier.accuracy import paired_bootstrap, summarise
from rayexpand.contract.errors import UsageError
from rayexpand.reports import figures
from rayexpand.reports.drawing import FigurePoint
from rayexpand.reports.figure import write_figures
from rayexpand.reports.templates import render, settings_of
from rayexpand.studies.results import Predicted, StudyView, read_study
from rayexpand.studies.spreads import plus_minus, points, spread
from rayexpand.studies.sweep.search import describe, short
from rayexpand.studies.sweep.sweep import Sweep, best_of, read_results, read_test, without_result, write_best

NO_TEST = ("There is no test.json: the score on the test images was not taken yet, or the file is gone. The same "
           "command takes it.")
SELECTED = ("chosen by the test images: the best of several looks better there than it will be on new images; sweep "
            "with validation images for a score that can be published")


def write_sweep_report(sweep: Sweep, failed: Sequence[str] = ()) -> dict[str, Any]:
    """Writes best.yaml, final.yaml, summary.json, figures/ and report.html; returns the summary.

    `failed` says which trials did and why. Raises EnvironmentFault if the folder cannot be written.
    """
    results = read_results(sweep.files)
    best = best_of(results)
    if best is not None:
        write_best(sweep, best)
    found = _summary(sweep, list(results.values()), best, failed, read_test(sweep, best))
    sweep.files.replace("summary.json", json.dumps(found, indent=1).encode())
    drawn = _figures(sweep, results, best)
    write_figures(sweep.files, [one["figure"] for one in drawn])
    page = render("sweep.html.j2", {"plus_minus": lambda one: plus_minus(one, 2), "points": points},
        found=found, best=best, noise=within_noise(found), ranked=_ranked(found["trials"]),
        settings=_settings(sweep), fields=_fields(sweep),
        figures=drawn, written=datetime.now(UTC), selected=SELECTED,
        config=yaml.safe_dump(sweep.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    sweep.files.replace("report.html", page.encode())
    return found


def _summary(sweep: Sweep, trials: list[dict[str, Any]], best: dict[str, Any] | None, failed: Sequence[str],
             test: Mapping[str, Any] | None) -> dict[str, Any]:
    """`spread`, `test_spread`: mean, se, n of the winner; `interval`: of its score, 95 %. Each trial has its `spread`
    and, if finished, `against_best`: how much lower it is, with a 95 % interval and whether that holds 0."""
    config, commands = sweep.config, []
    if best is not None:
        commands = [f"rayexpand train {shlex.quote(str(sweep.files.at(name)))}" for name in ("best.yaml", "final.yaml")]
    answers = {one["key"]: _answers(sweep, one["key"]) for one in trials if one["state"] == "finished"} \
        if config.metric == "top1" else {}
    lines = [{**one, "spread": spread(one.get("scores") or [one["score"]]),
              "against_best": None if best is None or one["state"] != "finished" or one["key"] == best["key"]
              else _difference(one, best, answers)} for one in trials]
    found = {"sweep": config.name, "folder": str(sweep.files.root), "arm": config.arm, "metric": config.metric,
             "score_on": config.score_on, "best": best and best["key"], "values": best and best["values"],
             "score": best and best["score"], "scores": best and best["scores"],
             "spread": best and spread(best["scores"]), "interval": best and _interval(best, answers),
             "test_score": test and test["score"], "test_scores": test and test["scores"],
             "test_spread": test and spread(test["scores"]),
             "compared": sum(bool(one["against_best"]) for one in lines),
             "within_noise": [one["key"] for one in lines if (one["against_best"] or {}).get("within_noise")],
             "trials": lines, "failed": list(failed),
             "without_result": without_result(sweep, trials),
             "test_note": NO_TEST if best is not None and test is None and config.score_on != "test" else "",
             "commands": commands,
             "report": str(sweep.files.at("report.html"))}
    return {**found, "words": _words(found)}


def _answers(sweep: Sweep, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Items (N,) and right answers (S, N) of a trial, seeds by rising number; None where they cannot be read."""
    try:
        study: StudyView = read_study(f"{sweep.files.root}/studies/{key}")
    except UsageError:
        return None
    found = [study.predicted(result["trial"]) for result in sorted(study.results, key=lambda one: one["seed"])]
    sides = [one for one in found if isinstance(one, Predicted)]
    if not sides or len(sides) < len(found) or any(not np.array_equal(one.items, sides[0].items) for one in sides):
        return None
    return sides[0].items, np.stack([one.correct for one in sides])


def _interval(best: Mapping[str, Any], answers: Mapping[str, Any]) -> list[float] | None:
    """95 % of the score: over images and seeds from the answers, else over seeds; None for one seed without answers."""
    if (mine := answers.get(best["key"])) is not None:
        found = paired_bootstrap(mine[1], np.zeros_like(mine[1]))
        return [found.low, found.high]
    return _over_seeds(best["scores"])


def _difference(one: Mapping[str, Any], best: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, Any]:
    """A finished trial minus the best, paired over images and seeds where the answers of both are there, else over
    seeds. Without an interval, for one seed of a score that is no share of images, nothing shows it worse."""
    mine, theirs = answers.get(one["key"]), answers.get(best["key"])
    interval: list[float] | None
    if mine is not None and theirs is not None and mine[1].shape == theirs[1].shape \
            and np.array_equal(mine[0], theirs[0]):
        found = paired_bootstrap(mine[1], theirs[1])
        interval = [found.low, found.high]
    else:
        interval = _over_seeds(np.subtract(one["scores"], best["scores"]).tolist())
    return {"mean": one["score"] - best["score"], "interval": interval,
            "within_noise": interval is None or interval[0] <= 0 <= interval[1]}


def _over_seeds(values: Sequence[float]) -> list[float] | None:
    """95 % interval of a mean by Student's t; None for one value."""
    found = summarise(values)
    if found.se is None:
        return None
    reach = float(student.ppf(0.975, found.n - 1)) * found.se
    return [found.mean - reach, found.mean + reach]


def _words(found: Mapping[str, Any]) -> list[str]:
    """The outcome in lines for people."""
    lines = ["no trial finished, so there is no best configuration"]
    if found["best"] is not None:
        images = found["score_on"]
        lines = [f"best: {describe(found['values'])}: {found['metric']} {_score(found['spread'])} on the {images} "
                 f"images{_between(found['interval'])}",
                 *([within_noise(found)] if found["compared"] else []),
                 SELECTED if images == "test" else "not yet scored on the test images" if found["test_score"] is None
                 else f"on the test images, scored once: {_score(found['test_spread'])}",
                 f"the same score again: {found['commands'][0]}",
                 f"all arms with these values, on the test images: {found['commands'][1]}"]
    return [*lines, f"report: {found['report']}"]


def _score(one: Mapping[str, Any]) -> str:
    return f"{plus_minus(one, 2)} % (n = {one['n']})"


def _between(interval: Sequence[float] | None) -> str:
    return ", no interval" if interval is None else ", 95 % interval {:.2f} to {:.2f} %".format(
        *(100 * one for one in interval))


def within_noise(found: Mapping[str, Any]) -> str:
    """How many finished configurations the best one was not shown to beat."""
    count, others = len(found["within_noise"]), found["compared"]
    if not count:
        return f"better than each of the {others} other finished configurations by more than the noise"
    return (f"within noise: {count} of the {others} other finished configurations {'is' if count == 1 else 'are'} not "
            "shown to be worse, the 95 % interval of the difference holds 0")


def _settings(sweep: Sweep) -> dict[str, list[tuple[str, str]]]:
    """Those of the sweep, then those of its study."""
    config = sweep.config.model_dump(mode="json")
    study = settings_of(config.pop("study"))
    return {**settings_of(config), **{f"study: {name}": lines for name, lines in study.items()}}


def _ranked(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Finished trials before stopped ones, which had fewer epochs; then by score."""
    return sorted(trials, key=lambda one: (one["state"] != "finished", -one["epochs"], -one["score"]))


def _fields(sweep: Sweep) -> dict[str, str]:
    """Swept fields with their short names."""
    fields = [one.field for one in sweep.space]
    return dict(zip(fields, short(fields), strict=True))


def _figures(sweep: Sweep, results: Mapping[str, dict[str, Any]], best: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One figure for each swept field."""
    drawn: list[dict[str, Any]] = []
    for dimension in sweep.space if results else ():
        field = dimension.field
        numbers = [one["values"][field] for one in results.values()]
        numbers = [*numbers, *dimension.values]
        is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers)
        names = [] if is_number else [str(value) for value in dimension.values]
        groups: dict[str, list[FigurePoint]] = {"stopped": [], "finished": [], "best": []}
        for one in results.values():
            value = one["values"][field]
            state = "best" if best is not None and one["key"] == best["key"] else one["state"]
            groups[state].append(_point(one, value if is_number else names.index(str(value))))
        made = figures.scores(f"score-{len(drawn) + 1}", [(state, own) for state, own in groups.items() if own], names,
                              _fields(sweep)[field], f"Score against {field}", log=dimension.kind == "loguniform")
        drawn.append({"field": field, "figure": made})
    return drawn


def _point(trial: Mapping[str, Any], x: float) -> FigurePoint:
    """The score of a trial in percent over its repetitions."""
    values = [100 * score for score in trial.get("scores") or [trial["score"]]]
    return FigurePoint(trial["key"], 100 * trial["score"], summarise(values).se, x, values=tuple(values))
