"""What a study says of its loops: each beside its controls, with intervals and in words; what they spent, and cost.

    alone       the difference to one control, with its 95 % interval over test images and seeds
    together    the interval that holds for all of these comparisons at once, by which the words go
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayexpand.studies.results import StudyView
from rayexpand.studies.rounds.controls import KINDS
from rayexpand.studies.spreads import plain, plus_minus, points, spread

HEADS = ("arm", "top-1 %", "beside", "top-1 %", "difference, alone", "together", "so")
COST_HEADS = ("arm", "rounds", "samples spent of planned", "trained on", "sampling", "scoring", "guides and other fits",
              "training")
WORDS = {"gain": "better", "loss": "worse", "open": "no difference", "few": "too few seeds to say"}

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def in_rounds(study: StudyView, arm: str) -> dict[str, Any]:
    """Of an arm with loops, spreads over its trials: `rounds`, `of` (at most), `spent` and `planned` (samples, all of
    them; the latter if no loop had stopped), `kept`, `scoring` and `guide` (process-seconds), `stopped` (seeds of loops
    that ended early), `ended` (why), `controls` by kind, and `same`, kinds of controls whose samples would be its own.
    Of a control `stands_for`, and `words`."""
    facts = [study.rounds_of(result) for result in study.arms[arm]]
    found = facts[0]
    if "stands_for" in found:
        return {"stands_for": found["stands_for"], "words": KINDS[found["stands_for"]]}
    counts = {name: spread(sum(one[name] for one in each["loops"]) for each in facts)
              for name in ("rounds", "of", "spent", "planned", "kept")}
    seconds = {name: spread(each[f"{name}_seconds"] for each in facts) for name in ("scoring", "guide")}
    seeds = [result["seed"] for result in study.arms[arm]]
    return {**counts, **seconds, "controls": found.get("controls", {}), "same": found.get("same", []),
            "stopped": [seed for seed, each in zip(seeds, facts, strict=True)
                        if any(one["stopped"] and one["ended"] for one in each["loops"])],
            "ended": [one["ended"] for each in facts for one in each["loops"]]}


def said_of_rounds(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be said of loops: that one left some of its budget, that a control would be the loop itself."""
    same = [f"{arm['arm']}: {' and '.join(KINDS[kind] for kind in one['same'])} would be its own samples, so there is "
            "no such control." for arm in arms if (one := arm.get("rounds", {})).get("same")]
    return same + [f"{arm['arm']}: the loop ended early in {len(one['stopped'])} of {len(arm['seeds'])} seeds, so "
            f"{one['spent']['mean']:,.0f} of {one['planned']['mean']:,.0f} samples were spent in the mean. It is "
            "compared with as many samples made otherwise" + (
                f", and with the whole budget ({one['controls']['whole']})." if "whole" in one["controls"] else ".")
            for arm in arms if (one := arm.get("rounds", {})).get("stopped")]


def round_table(found: Mapping[str, Any]) -> Table | None:
    """Heads and lines: every arm with loops beside each of its controls, the real images repeated last. None of a study
    without."""
    arms = {arm["arm"]: arm for arm in found["arms"]}
    beside = [one for one in found["comparisons"] if one["kind"] in ("rounds", "control")
              and "controls" in arms[one["arm"]].get("rounds", {})]
    if not beside:
        return None
    order = {name: number for number, name in enumerate(arms)}
    beside.sort(key=lambda one: (order[one["arm"]], one["kind"] == "control"))
    return HEADS, [(one["arm"], _top1(arms[one["arm"]]), one["against"], _top1(arms[one["against"]]),
                    *_difference(one)) for one in beside]


def cost_table(found: Mapping[str, Any]) -> Table | None:
    """Heads and lines: what arms with loops, and their controls, spent: samples, and process-seconds of one seed."""
    lines = list[tuple[str, ...]]()
    for arm in found["arms"]:
        if not (one := arm.get("rounds")):
            continue
        cost = arm["cost"]
        fitted = (cost["fitting"] or {"mean": 0.0})["mean"]
        scoring = (one.get("scoring") or {"mean": 0.0})["mean"]
        sampling = (cost["expansion"] or {"mean": 0.0})["mean"] - fitted
        budget = ("", "", _mean(arm["synthetic_rows"])) if "stands_for" in one else (
            f"{_mean(one['rounds'])} of {_mean(one['of'])}", f"{_mean(one['spent'])} of {_mean(one['planned'])}",
            _mean(one["kept"]))
        lines.append((arm["arm"], *budget, plain(sampling), plain(scoring), plain(fitted - scoring),
                      "" if cost["training"] is None else plain(cost["training"]["mean"])))
    return (COST_HEADS, lines) if lines else None


def _top1(arm: Mapping[str, Any]) -> str:
    return plus_minus(arm["last"]["top1"])


def _mean(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['mean']:,.4g}"


def _difference(one: Mapping[str, Any]) -> tuple[str, str, str]:
    """Alone, together, in words."""
    if one["mean"] is None or one["adjusted"] is None:
        return ("" if one["mean"] is None else points(one["mean"])), "", one["why"]
    both = one["adjusted"]
    return (f"{points(one['mean'])} [{points(one['low'])}, {points(one['high'])}]",
            f"[{points(both['low'])}, {points(both['high'])}]", WORDS[one["verdict"]])
