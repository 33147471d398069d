"""What a study found: spreads over seeds, differences with their intervals, and what keeps them from being trusted.

    baseline    the arm every other one is measured against
    control     real images alone, repeated to as many rows: what more rows by themselves would do
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import EnvironmentFault
from rayexpand.storage.files import Files
from rayexpand.storage.tables import csv_cell
from rayexpand.studies.comparisons import MIN_SEEDS, best_minus_last, comparisons
from rayexpand.studies.foresight import sight_of
from rayexpand.studies.results import (
    Result,
    StudyView,
    controlled,
    is_valued,
    note_of,
    number,
    read_study,
    replaces,
    runs_of,
)
from rayexpand.studies.robustness_table import mean_head, of_corrupted, tests_of
from rayexpand.studies.round_table import in_rounds, said_of_rounds
from rayexpand.studies.score_table import compared_with, go_with_top1, of_samples
from rayexpand.studies.spreads import plus_minus, points, spread
from rayexpand.studies.value import value_of

COUNTS = ("rows", "real_rows", "synthetic_rows", "updates", "samples_seen", "workers")
SCORES = ("top1", "top5", "ece", "per_class")
FREQUENCIES = ("many", "medium", "few", "all")

# Summary -------------------------------------------------------------------------------------------------------------


def summary(folder: str | Path) -> dict[str, Any]:
    """Every number of the page as one mapping, also written as summary.json and summary.csv into the study folder.

    `trials` (done, expected, missing, failed), `baseline`, `arms` (one each, with spreads {mean, se (standard error of
    the mean), std (ddof 1), n, values}, shares in [0, 1], seconds), `comparisons` (comparisons.py), `sees` (the
    smallest difference it can show), `samples` (what they were compared with; None for a study that does not ask),
    `warnings`. Raises UsageError if there is no study, EnvironmentFault if the folder cannot be written. """
    study = read_study(folder)
    found = summarised(study)
    write_numbers(study.files, found)
    return found


def write_numbers(files: Files, found: Mapping[str, Any]) -> None:
    """Writes a summary as summary.json, and its arms as summary.csv: mean, standard error, standard deviation and n of
    every number."""
    write(files, "summary.json", as_json(found))
    lines = [{"arm": arm["arm"], "group": arm["group"], "control_of": arm["control_of"] or "",
              "seeds": len(arm["seeds"]), **_flat("", arm), **({"note": arm["note"]} if "note" in arm else {})}
             for arm in found["arms"]]
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    table.writeheader()
    table.writerows({name: csv_cell(value) for name, value in line.items()} for line in lines)
    write(files, "summary.csv", text.getvalue())


def frequencies(found: Mapping[str, Any]) -> list[str]:
    """The groups of classes by their real images that have classes, and `all`; none where all are in one group."""
    names = [name for name in FREQUENCIES if any(arm["by_frequency"][name] for arm in found["arms"])]
    return names if len(names) > 2 else []


def further_scores(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Heads and lines of a table: accuracy by frequency, on further test sets and in their worst group, mean ± standard
    error over n seeds in percent; None where there is none of that."""
    tests = dict.fromkeys(name for arm in found["arms"] for name in arm["also"])
    places: list[tuple[str, tuple[str, ...]]] = [(name, ("by_frequency", name)) for name in frequencies(found)[:-1]]
    places += [(f"{name}{words}", ("also", name, score)) for name in tests for words, score in (
        ("", "top1"), (", worst group", "worst"))]
    places += [(f"{test} {one['name']}, {words}", ("robustness", test, score)) for test, one in tests_of(found).items()
               for words, score in ((mean_head(one), "mean"), ("mCE", "mce"))]
    columns = [(head, [_percent(arm, place) for arm in found["arms"]]) for head, place in places]
    columns = [(head, cells) for head, cells in columns if any(cells)]
    if not columns:
        return None
    names, counts = zip(*((arm["arm"], str(len(arm["seeds"]))) for arm in found["arms"]), strict=True)
    rows = zip(names, counts, *(cells for _, cells in columns), strict=True)
    return ("arm", "n", *(f"{head} %" for head, _ in columns)), list(rows)


def _percent(arm: Mapping[str, Any], place: Sequence[str]) -> str:
    """A spread in a summary's arm; empty where it has none."""
    value: Any = arm
    for name in place:
        value = (value or {}).get(name)
    return "" if value is None else plus_minus(value)


def _flat(place: str, value: Any) -> dict[str, float]:
    """Spreads anywhere below a mapping, as <dotted place>, and .se, .std and .n of it."""
    if not isinstance(value, Mapping):
        return {}
    if {"mean", "std", "values"} <= value.keys():
        return {place: value["mean"], **{f"{place}.{name}": value[name] for name in ("se", "std", "n")
                                         if value[name] is not None}}
    return {name: one for key, inner in value.items() for name, one in _flat(f"{place}.{key}".lstrip("."),
                                                                             inner).items()}


def summarised(study: StudyView) -> dict[str, Any]:
    arms = [_arm(study, arm, trials) for arm, trials in study.arms.items()]
    samples = compared_with(study.config, study.scores)
    value = value_of(study)
    found = {"study": study.name, **({} if value is None else {"value": value}),
             "trials": {"done": len(study.results), "expected": len(study.planned) or None,
                        "missing": study.missing, "failed": study.failed},
             "baseline": study.baseline, "arms": arms, "comparisons": comparisons(study), "sees": sight_of(study),
             "samples": None if samples is None else {**samples, "with_top1": go_with_top1(arms)}}
    notes = [*_notes(found), *_varied(study), *said_of_rounds(arms)]
    return {**found, **({"notes": notes} if notes else {}), "warnings": _warnings(study, found)}


def _varied(study: StudyView) -> list[str]:
    """What ± shows: in what the repetitions differ, and in what not."""
    results = [result for result in study.results if not is_valued(result)]
    by_seed = {result["seed"]: result for result in results}
    if len(by_seed) < 2:
        return []
    made = [[tuple(runs) for result in trials if (runs := runs_of(result))] for trials in study.arms.values()]
    differ = {"real images": len({result.get("ids_sha256") for result in results}) > 1,
              **({"samples": any(len(set(runs)) > 1 for runs in made)} if any(made) else {}),
              "classifier seed": len({result.get("classifier_seed", seed) for seed, result in by_seed.items()}) > 1}
    shown, same = ([name for name in differ if differ[name] == value] for value in (True, False))
    return [f"± is over repetitions that differ in {_joined(shown) or 'nothing'}" + (
        f"; {_joined(same)}: the same in all, so ± does not show what others would change." if same else ".")]


def _joined(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _notes(found: Mapping[str, Any]) -> list[str]:
    """What must be said below every table."""
    return [f"{arm['arm']} {arm['note']}." for arm in found["arms"] if "note" in arm]


def _arm(study: StudyView, arm: str, trials: Sequence[Result]) -> dict[str, Any]:
    first = trials[0]
    return {"arm": arm, "group": str(first.get("group") or ""), "ratio": number(first, "ratio"),
            "augment": str(first.get("augment") or ""), "control_of": controlled(first) or None,
            "control": study.controls.get(arm), "value": first.get("value") or None,
            "trials": [r["trial"] for r in trials],
            "seeds": [r["seed"] for r in trials],
            **{name: spread(number(r, name) for r in trials) for name in COUNTS},
            "last": {name: spread(number(r, f"last.{name}") for r in trials) for name in SCORES},
            "best": {"top1": spread(number(r, "best.top1") for r in trials), "minus_last": best_minus_last(trials)},
            "by_frequency": {name: spread(number(r, f"by_frequency.{name}") for r in trials) for name in FREQUENCIES},
            "also": {name: _also([r["also"][name] for r in trials if name in (r.get("also") or {})])
                     for name in dict.fromkeys(name for r in trials for name in r.get("also") or {})},
            **({"robustness": of_corrupted(study.corrupted, [r["trial"] for r in trials])} if study.corrupted else {}),
            "samples": of_samples([study.scores[r["trial"]] for r in trials if r["trial"] in study.scores]),
            "seconds_per_image": spread(_seconds_per_image(r) for r in trials), "cost": _cost(trials),
            **({"rounds": in_rounds(study, arm)} if study.rounds_of(first) else {}),
            **({"note": note} if (note := note_of(first)) else {})}


def _seconds_per_image(result: Result) -> float | None:
    """Process-seconds of the expansion over the synthetic rows, so that what was rejected is paid for by what stays."""
    spent, rows = number(result, "expansion_seconds"), number(result, "synthetic_rows")
    return spent / rows if spent and rows else None


def _also(results: Sequence[Result]) -> dict[str, Any]:
    """A further test set over the trials of an arm: spreads of its scores and of the accuracy in each of its groups."""
    first = results[0]
    counts = (first.get("by_group") or {}).get("counts", {})
    groups = {group: spread((r.get("by_group") or {}).get("groups", {}).get(group) for r in results)
              for group in counts}
    return {**{name: first.get(name) for name in ("images", "classes", "restricted")}, "counts": counts,
            **{name: spread(number(r, name) for r in results) for name in SCORES}, "groups": groups,
            **{name: spread(number(r, f"by_group.{name}") for r in results) for name in ("average", "mean", "worst")}}


def _cost(trials: Sequence[Result]) -> dict[str, Any]:
    """Seconds of one trial, mean over trials, in one unit: seconds of each process that worked, summed. `expansion`
    has what was fitted for it in it, which `fitting` says alone (None for trials of before it was kept)."""
    on_gpu = any(str(r.get("device", "")).startswith("cuda") or number(r, "gpu_seconds") for r in trials)
    fitting = [number(r, "fitting_seconds") if r.get("group") else 0.0 for r in trials]
    expansion = [number(r, "expansion_seconds") for r in trials]
    return {"unit": "GPU process" if on_gpu else "CPU process",
            "training": spread(None if (wall := number(r, "seconds")) is None else wall * max(1, int(
                number(r, "workers") or 1)) for r in trials),
            "expansion": spread(None if made is None else made + (fitted or 0.0)
                                for made, fitted in zip(expansion, fitting, strict=True)),
            "fitting": spread(fitting), "wall": spread(number(r, "seconds") for r in trials)}


def _warnings(study: StudyView, found: Mapping[str, Any]) -> list[str]:
    lines = list(study.problems)
    if not study.arms:
        lines.append("No trial has finished, so there is nothing to compare yet.")
    elif not study.baseline:
        lines.append("The baseline has no finished trial, so nothing is measured against it.")
    if few := [arm["arm"] for arm in found["arms"] if len(arm["seeds"]) < MIN_SEEDS]:
        lines.append(f"Fewer than {MIN_SEEDS} seeds, so no error bar is trustworthy: {', '.join(few)}.")
    if bare := [arm for arm, (first, *_) in study.arms.items() if first.get("synthetic_rows")
                and arm not in study.controls and not replaces(study, arm) and not is_valued(first)
                and not controlled(first)]:
        lines.append("No control with the real images repeated, so a difference may come from the number of rows "
                     f"alone: {', '.join(bare)}.")
    lines += [f"{c['arm']} against {c['against']}: seed{'s' if len(c['left_out_seeds']) > 1 else ''} "
              f"{', '.join(map(str, c['left_out_seeds']))} left out, not finished in both."
              for c in found["comparisons"] if c["left_out_seeds"] and c["kind"] != "control to baseline"]
    lines += [f"{c['arm']} against {c['against']}: {points(c['mean'])} points after the last epoch and "
              f"{points(c['best'])} in the best one, so the sign depends on the epoch that is read."
              for c in found["comparisons"] if c["flips"] and c["kind"] != "control to baseline"]
    if len(units := {arm["cost"]["unit"] for arm in found["arms"] if arm["cost"]["training"]}) > 1:
        lines.append(f"Costs are in different units ({', '.join(sorted(units))} seconds) and cannot be compared.")
    if unknown := [arm["arm"] for arm in found["arms"] if arm["cost"]["fitting"] is None]:
        lines.append(f"What was fitted for the samples is not in the costs of {', '.join(unknown)}, whose trials "
                     "are of an earlier version.")
    return lines


def as_json(found: Mapping[str, Any]) -> str:
    return json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)


def write(files: Files, name: str, text: str) -> Path | str:
    """Replaces a file of the study folder in one step. Raises EnvironmentFault if the folder takes no more files."""
    try:
        files.make_folder(".tmp")
        files.replace(name, text.encode(), "page")
    except OSError as error:
        raise EnvironmentFault(f"{files.at(name)}: {error.strerror}. Free space or allow writing there, then run the "
                               "same command again; no result is touched.") from error
    return files.at(name)
