"""Differences between the arms of a study: intervals, two families, and whether the last epoch says what the best says.

    baseline    the arm every other one is measured against
    control     real images alone, repeated to as many rows: what more rows by themselves would do
    family      comparisons that are judged together: all arms against the baseline, each against its control, and
                all loops against theirs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayexpand.classifier.statistics import (
    FOR_CORRELATIONS,
    LEVEL,
    MeanError,
    correlations,
    crossed,
    expected_maximum,
    holm,
    max_t,
    resampled,
)
from rayexpand.studies.results import Predicted, Result, StudyView, controlled, is_valued, number
from rayexpand.studies.spreads import points, spread, within

MIN_SEEDS = 3  # below this no spread over seeds is worth printing as an error bar
VERDICTS = {"gain": "a gain", "loss": "a loss", "open": "no difference is shown, the interval holds 0",
            "few": f"with fewer than {MIN_SEEDS} seeds neither gain nor loss is claimed"}


def comparisons(study: StudyView) -> list[dict[str, Any]]:
    """Every arm against the baseline and against its control, arms with loops also against what stands beside these
    (`kind` rounds, `stands_for` which control). `mean`, `low`, `high`, `p` stand alone; `adjusted` has p
    and a simultaneous interval of the family, by which `verdict` and `sentence` go."""
    found = []
    for arm, (first, *_) in study.arms.items():
        if is_valued(first):
            continue
        if study.baseline and arm != study.baseline:
            found.append(_compare(study, arm, study.baseline, "control to baseline" if controlled(first)
                                  else "baseline"))
        if control := study.controls.get(arm):
            found.append(_compare(study, arm, control, "control"))
        found += [{**_compare(study, arm, control, "rounds"), "stands_for": kind}
                  for kind, control in study.rounds_of(first).get("controls", {}).items() if control in study.arms]
    for kinds in (("baseline", "control to baseline"), ("control",), ("rounds",)):
        _adjust(study, [one for one in found if one["kind"] in kinds])
    for one in found:
        one["verdict"] = _verdict(one)
        one["sentence"] = _sentence(one)
    return found


def _compare(study: StudyView, arm: str, against: str, kind: str) -> dict[str, Any]:
    """Top-1 of one arm minus another, last epoch, over the seeds both have (shares in [0, 1]): mean with the crossed t
    interval over test images and seeds. Without predictions there is a mean but no interval; without a common seed
    there is neither. `best` is the same mean of the best epochs."""
    mine, theirs = ({r["seed"]: r for r in study.arms[name]} for name in (arm, against))
    seeds = sorted(mine.keys() & theirs.keys())
    found: dict[str, Any] = {"arm": arm, "against": against, "kind": kind, "seeds": seeds, "images": None,
                             "mean": None, "low": None, "high": None, "p": None, "se": None, "df": None,
                             "adjusted": None, "best": None, "flips": False, "why": "",
                             "left_out_seeds": sorted(mine.keys() ^ theirs.keys())}
    if not seeds:
        return {**found, "why": "no seed in common, so nothing is compared"}
    pairs = [(mine[seed], theirs[seed]) for seed in seeds]
    found["mean"] = float(np.mean([a["last"]["top1"] - b["last"]["top1"] for a, b in pairs]))
    best = [(number(a, "best.top1"), number(b, "best.top1")) for a, b in pairs]
    if all(a is not None and b is not None for a, b in best):
        found["best"] = float(np.mean([(a or 0.0) - (b or 0.0) for a, b in best]))
        found["flips"] = found["best"] * found["mean"] < 0
    difference_SN = _difference(study, pairs)
    if isinstance(difference_SN, str):
        return {**found, "why": f"no interval, {difference_SN}"}
    one = crossed(difference_SN)
    low, high = within(one.interval(), -1.0, 1.0)
    return {**found, "mean": one.mean, "low": low, "high": high, "p": one.p, "se": one.se, "df": one.df,
            "images": difference_SN.shape[1]}


def _difference(study: StudyView, pairs: Sequence[tuple[Result, Result]]) -> np.ndarray | str:
    """(S, N): right answers of one arm minus those of another over the same test images, or why there are none."""
    found = _answers(study, [result for pair in pairs for result in pair])
    if isinstance(found, str):
        return found
    if found.size < 4:
        return "one test image and one seed say nothing of what varies"
    right = found.astype(np.int8)
    return right[0::2] - right[1::2]


def _answers(study: StudyView, results: Sequence[Result]) -> np.ndarray | str:
    """bool (trials, N): right answers of trials, or why they cannot be paired."""
    sides: list[np.ndarray] = []
    first: Predicted | None = None
    for result in results:
        answers = study.predicted(result["trial"])
        if isinstance(answers, str):
            return answers
        first = first or answers
        if not np.array_equal(first.items, answers.items) or not np.array_equal(first.labels, answers.labels):
            return f"predictions/{result['trial']}.parquet has other test images than {results[0]['trial']}"
        if abs(answers.correct.mean() - result["last"]["top1"]) > 0.5 / len(answers.items) + 1e-6:
            return (f"predictions/{result['trial']}.parquet is right on {answers.correct.mean():.4f}, but its "
                    f"result says {result['last']['top1']:.4f}")
        sides.append(answers.correct)
    return np.stack(sides)


def joint_answers(study: StudyView, arms: Sequence[str]) -> np.ndarray | str:
    """bool (A, S, N): right answers of arms over the same seeds and test images, or why there are none."""
    seeds = sorted({r["seed"] for arm in arms for r in study.arms[arm]})
    if any(len(study.arms[arm]) < len(seeds) for arm in arms):
        return "some arms lack seeds that others have"
    found = _answers(study, [result for arm in arms for result in study.arms[arm]])
    return found if isinstance(found, str) else found.reshape(len(arms), len(seeds), -1)


# Families ------------------------------------------------------------------------------------------------------------


def _adjust(study: StudyView, family: list[dict[str, Any]]) -> None:
    """Puts `adjusted` into the comparisons of a family that have a p: step-down max-t over one joint resampling of all
    its arms; Holm, in which those without one count as the largest, where these have not all the same predictions."""
    known = [one for one in family if one["p"] is not None]
    if not known:
        return
    arms = list(dict.fromkeys(name for one in family for name in (one["against"], one["arm"])))
    answers = joint_answers(study, arms) if len(known) == len(family) > 1 else "alone"
    if isinstance(answers, str):
        p = holm([1.0 if one["p"] is None else one["p"] for one in (*known, *(o for o in family if o["p"] is None))])
        level, rule = 1 - (1 - LEVEL) / len(family), "Holm"
    else:
        means_DA = resampled(answers, FOR_CORRELATIONS)
        at = {name: column for column, name in enumerate(arms)}
        p, level = max_t([one["p"] for one in family], correlations(np.stack(
            [means_DA[:, at[one["arm"]]] - means_DA[:, at[one["against"]]] for one in family], axis=1)))
        rule = "max-t"
    for one, adjusted in zip(known, p, strict=False):
        low, high = within(MeanError(one["mean"], one["se"], one["df"]).interval(level), -1.0, 1.0)
        if adjusted < 1 - LEVEL:  # the step-down p may show a sign that intervals of one width for all do not
            low, high = (max(low, 0.0), high) if one["mean"] > 0 else (low, min(high, 0.0))
        one["adjusted"] = {"p": adjusted, "low": low, "high": high, "of": len(family),
                           "by": rule if len(family) > 1 else ""}


def _verdict(found: Mapping[str, Any]) -> str:
    if found["adjusted"] is None:
        return "none"
    if len(found["seeds"]) < MIN_SEEDS:
        return "few"
    if found["adjusted"]["p"] >= 1 - LEVEL:
        return "open"
    return "gain" if found["mean"] > 0 else "loss"


def _sentence(found: Mapping[str, Any]) -> str:
    beside = f"{found['arm']} against {'its control ' if found['kind'] == 'control' else ''}{found['against']}"
    if found["mean"] is None:
        return f"{beside}: {found['why']}."
    seeds = f"{len(found['seeds'])} seed{'s' if len(found['seeds']) != 1 else ''}"
    if (adjusted := found["adjusted"]) is None:
        return f"{beside}: {points(found['mean'])} points, {seeds}; {found['why']}."
    together = f" (one of {adjusted['of']}, p {adjusted['p']:.2g})" if adjusted["of"] > 1 else ""
    return (f"{beside}: {points(found['mean'])} points, 95 % interval {points(adjusted['low'])} to "
            f"{points(adjusted['high'])}{together}, {seeds}, {found['images']:,} test images: "
            f"{VERDICTS[found['verdict']]}.")


# Best and last -------------------------------------------------------------------------------------------------------


def best_minus_last(trials: Sequence[Result]) -> dict[str, Any] | None:
    """Of an arm: spread over seeds of the best accuracy over epochs minus the last, its 95 % interval, the mean epoch
    of the best, and `noise`: what the best of as many tests that differ by chance alone would have over one of them, by
    the standard deviation of the later half of the tests. None where no trial was tested twice."""
    pairs = [(best - last, number(r, "best.epoch")) for r in trials
             if (best := number(r, "best.top1")) is not None and (last := number(r, "last.top1")) is not None]
    curves = [[point for one in r.get("history") or () if (point := number(one, "top1")) is not None] for r in trials]
    late = [curve[len(curve) // 2:] for curve in curves if len(curve) >= 4]
    if not pairs or max(map(len, curves), default=0) < 2:
        return None
    values = [gap for gap, _ in pairs]
    interval = None if len(values) < 2 else list(crossed(np.array(values)).interval())
    tests = round(float(np.mean([len(curve) for curve in curves])))
    deviation = float(np.sqrt(np.mean([np.var(one, ddof=1) for one in late]))) if late else None
    return {**(spread(values) or {}), "interval": interval, "tests": tests,
            "epoch": spread(epoch for _, epoch in pairs),
            "noise": None if deviation is None else expected_maximum(tests) * deviation}
