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

from rayexpand.classifier.statistics import MeanError, crossed, expected_maximum
from rayexpand.contract.errors import UsageError
from rayexpand.reports.figure import write_figures
from rayexpand.reports.sweep_figures import proxy_figures, sweep_figures
from rayexpand.reports.templates import render, settings_of
from rayexpand.studies.results import Predicted, StudyView, read_study
from rayexpand.studies.spreads import plus_minus, points, spread, within
from rayexpand.studies.sweep import signals as signalling
from rayexpand.studies.sweep.search import describe, short
from rayexpand.studies.sweep.signals import signals
from rayexpand.studies.sweep.space import n_suggestions
from rayexpand.studies.sweep.sweep import (
    Sweep,
    best_of,
    read_results,
    read_suggestions,
    read_test,
    scores_again,
    without_result,
    write_best,
)

NO_TEST = ("There is no test.json: the best configuration was not trained and scored again yet, or the file is gone. "
           "The same command does it.")
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
    drawn = sweep_figures(sweep.space, _fields(sweep), results, best)
    early = [] if found["proxies"] is None else proxy_figures(
        found["proxies"], list(results.values()), found["metric"], found["best"])
    write_figures(sweep.files, [*(one["figure"] for one in drawn), *early])
    page = render("sweep.html.j2", {"plus_minus": lambda one: plus_minus(one, 2), "points": points},
        found=found, best=best, between=_between(found["interval"]), noise=within_noise(found),
        inflation=inflated(found) if found["inflation"] else "",
        fresh=retrained(found) if found["fresh"] else "", ranked=_ranked(found["trials"]),
        settings=_settings(sweep), fields=_fields(sweep), counted=counted(found["counts"]),
        signals=found["proxies"] and {**found["proxies"], "notes": signalling.notes(found["proxies"]), "said": [
            (signalling.verdict(one), signalling.said_of_best(one)) for one in found["proxies"]["proxies"]]},
        early=early, figures=drawn, written=datetime.now(UTC), selected=SELECTED,
        config=yaml.safe_dump(sweep.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    sweep.files.replace("report.html", page.encode())
    return found


def _summary(sweep: Sweep, trials: list[dict[str, Any]], best: dict[str, Any] | None, failed: Sequence[str],
             test: Mapping[str, Any] | None) -> dict[str, Any]:
    """`spread`, `test_spread`: mean, se, n of the winner; `interval`: of its score, 95 %; `inflation`: what being the
    best of so many adds where all are equal; `fresh`: its score with seeds it was not chosen by, on the images it was
    chosen by. Each trial has its `spread` and, if finished, `against_best`: how much lower it is, with a 95 % interval
    and whether that holds 0."""
    config, commands, suggested = sweep.config, [], read_suggestions(sweep.files)
    if best is not None:
        commands = [f"rayexpand train {shlex.quote(str(sweep.files.at(name)))}" for name in ("best.yaml", "final.yaml")]
    answers = {one["key"]: _answers(sweep, one["key"]) for one in trials if one["state"] == "finished"} \
        if config.metric == "top1" else {}
    lines = [{**one, "spread": None if one["score"] is None else spread(one.get("scores") or [one["score"]]),
              "against_best": None if best is None or one["state"] != "finished" or one["key"] == best["key"]
              else _difference(one, best, answers)} for one in trials]
    found = {"sweep": config.name, "folder": str(sweep.files.root), "arm": config.arm, "metric": config.metric,
             "score_on": config.score_on, "best": best and best["key"], "values": best and best["values"],
             "score": best and best["score"], "scores": best and best["scores"],
             "spread": best and spread(best["scores"]), "interval": best and _interval(best, answers),
             **_again(config.score_on, test), "inflation": _inflation([one["against_best"] for one in lines]),
             "compared": sum(bool(one["against_best"]) for one in lines),
             "within_noise": [one["key"] for one in lines if (one["against_best"] or {}).get("within_noise")],
             "trials": lines, "failed": list(failed), "counts": counts(sweep, suggested, trials),
             "proxies": signals(trials, config.early, config.seed),
             "without_result": without_result(suggested, trials),
             "test_note": NO_TEST if best is not None and test is None and scores_again(sweep) else "",
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
        return list(crossed(mine[1]).interval())
    return _interval_of(_over_seeds(best["scores"]))


def _difference(one: Mapping[str, Any], best: Mapping[str, Any], answers: Mapping[str, Any]) -> dict[str, Any]:
    """A finished trial minus the best, paired over images and seeds where the answers of both are there, else over
    seeds. Without an interval, for one seed of a score that is no share of images, nothing shows it worse."""
    mine, theirs = answers.get(one["key"]), answers.get(best["key"])
    if mine is not None and theirs is not None and mine[1].shape == theirs[1].shape \
            and np.array_equal(mine[0], theirs[0]):
        found: MeanError | None = crossed(mine[1].astype(np.int8) - theirs[1])
    else:
        found = _over_seeds(np.subtract(one["scores"], best["scores"]))
    interval = _interval_of(found)
    return {"mean": one["score"] - best["score"], "interval": interval, "se": found and found.se,
            "within_noise": interval is None or interval[0] <= 0 <= interval[1]}


def _over_seeds(values: Sequence[float] | np.ndarray) -> MeanError | None:
    """A mean over seeds; None for one value."""
    return crossed(np.asarray(values)) if len(values) > 1 else None


def _interval_of(found: MeanError | None) -> list[float] | None:
    return None if found is None else list(found.interval())


def _again(score_on: str, test: Mapping[str, Any] | None) -> dict[str, Any]:
    """Scores of the best configuration trained once more."""
    images = None if test is None or score_on == "test" else test
    fresh = None if test is None or not test.get("seeds") else {
        "seeds": test["seeds"], "scores": test["chosen_by"], "spread": spread(test["chosen_by"])}
    return {"test_score": images and images["score"], "test_scores": images and images["scores"],
            "test_spread": images and spread(images["scores"]), "fresh": fresh}


def _inflation(differences: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """By how many standard errors of one score, and by which share, the best of so many finished configurations looks
    better where all are equal; None for one. The error is that of a difference to the best over the root of two."""
    known = [one for one in differences if one is not None]
    if not known:
        return None
    errors = [one["se"] for one in known if one["se"] is not None]
    factor = expected_maximum(len(known) + 1)
    se = float(np.sqrt(np.mean(np.square(errors)) / 2)) if errors else None
    return {"configurations": len(known) + 1, "factor": factor, "se": se, "share": None if se is None else factor * se}


def _words(found: Mapping[str, Any]) -> list[str]:
    """The outcome in lines for people."""
    lines = ["no trial finished, so there is no best configuration"]
    if found["best"] is not None:
        images = found["score_on"]
        lines = [f"best: {describe(found['values'])}: {found['metric']} {_score(found['spread'])} on the {images} "
                 f"images{_between(found['interval'])}",
                 *([within_noise(found), inflated(found)] if found["compared"] else []),
                 *([] if found["fresh"] is None else [retrained(found)]),
                 SELECTED if images == "test" else "not yet scored on the test images" if found["test_score"] is None
                 else f"on the test images{' with these seeds' if found['fresh'] else ''}, scored once: "
                      f"{_score(found['test_spread'])}",
                 f"the same score again: {found['commands'][0]}",
                 f"all arms with these values, on the test images: {found['commands'][1]}"]
    return [counted(found["counts"]), *lines, *(() if found["proxies"] is None else signalling.said(found["proxies"])),
            f"report: {found['report']}"]


def counts(sweep: Sweep, known: Sequence[Mapping[str, Any]], trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What became of every suggestion, those written down `known`; the numbers of all but `suggested` add up to it."""
    keys = {one["key"] for one in known} - {None}
    suggested = max(n_suggestions(sweep.space, sweep.config.search, sweep.config.samples), len(known))
    states = [str(one["state"]) for one in trials if one["key"] in keys]
    refused = sum(one["key"] is None for one in known)
    found = {state: states.count(state) for state in ("finished", "stopped", "dropped", "diverged")}
    return {"suggested": suggested, **found, "without a result": len(keys) - len(states), "cannot be": refused,
            "equal to another": len(known) - refused - len(keys), "not tried yet": suggested - len(known)}


def counted(found: Mapping[str, int]) -> str:
    """The counts in words, without what is none."""
    parts = [f"{number:,} {name}" for name, number in found.items() if number and name != "suggested"]
    return f"{found['suggested']:,} configurations suggested: {', '.join(parts) or 'none tried'}"


def _score(one: Mapping[str, Any]) -> str:
    return f"{plus_minus(one, 2)} % (n = {one['n']})"


def _between(interval: Sequence[float] | None) -> str:
    """A score is a share of images, so what is printed of its interval ends at 0 and 100 %."""
    if interval is None:
        return ", no interval"
    low, high = within(interval, 0.0, 1.0)
    cut = "" if (low, high) == tuple(interval) else " (cut at 0 and 100 %)"
    return f", 95 % interval {100 * low:.2f} to {100 * high:.2f} %{cut}"


def within_noise(found: Mapping[str, Any]) -> str:
    """How many finished configurations the best one was not shown to beat."""
    count, others = len(found["within_noise"]), found["compared"]
    if not count:
        return f"better than each of the {others} other finished configurations by more than the noise"
    return (f"within noise: {count} of the {others} other finished configurations {'is' if count == 1 else 'are'} not "
            "shown to be worse, the 95 % interval of the difference holds 0")


def inflated(found: Mapping[str, Any]) -> str:
    """What the choice alone adds to the score of the best."""
    one = found["inflation"]
    points_of = "" if one["share"] is None else (
        f", here {100 * one['share']:.2f} points: one is {100 * one['se']:.2f}, as the differences to the best "
        "have it")
    return (f"winner's inflation: of {one['configurations']} equal configurations the best looks {one['factor']:.2f} "
            f"standard errors better than it is{points_of}")


def retrained(found: Mapping[str, Any]) -> str:
    """The score of the best with seeds that it was not chosen by."""
    fresh = found["fresh"]
    return (f"trained again with fresh seeds {', '.join(map(str, fresh['seeds']))}: {_score(fresh['spread'])} on the "
            f"{found['score_on']} images it was chosen by, {points(fresh['spread']['mean'] - found['score'])} points")


def _settings(sweep: Sweep) -> dict[str, list[tuple[str, str]]]:
    """Those of the sweep, then those of its study."""
    config = sweep.config.model_dump(mode="json")
    study = settings_of(config.pop("study"))
    return {**settings_of(config), **{f"study: {name}": lines for name, lines in study.items()}}


def _ranked(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Finished trials before stopped ones, which had fewer epochs; then by score."""
    return sorted(trials, key=lambda one: (one["state"] != "finished", -one["epochs"], -(one["score"] or 0.0)))


def _fields(sweep: Sweep) -> dict[str, str]:
    """Swept fields with their short names."""
    fields = [one.field for one in sweep.space]
    return dict(zip(fields, short(fields), strict=True))
