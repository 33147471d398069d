"""What one sample of a study is worth in real images, from finished trials: the curve, its checks, prices, sentences.

    n0          real images at hand
    m           samples that an arm adds
    k           new real images that one sample is worth: (n_eq - n0) / m
    k_alone     the same of an arm without real images: n_eq / m
    marginal    k of the samples between two ratios alone
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayexpand.classifier.equivalence import (
    bounds,
    equivalent,
    holds,
    isotonic,
    power_law,
    range_of_fits,
    worth,
)
from rayexpand.classifier.statistics import crossed, resampled
from rayexpand.contract.errors import few
from rayexpand.studies.comparisons import MIN_SEEDS, joint_answers
from rayexpand.studies.results import StudyView, is_valued, number
from rayexpand.studies.spreads import plain, points

ENOUGH_IMAGES = 1000  # test images; below, intervals are too wide to say much
CHECKED = 0.99  # level of the intervals of the checks
FEWEST_FITTED = 4  # ratios, for laws of three numbers
ORDINALS = {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth", 9: "ninth",
            10: "tenth", 11: "eleventh"}


@dataclass(frozen=True)
class _Curve:
    """The real-only arms; row 0 of what is resampled is the data itself."""

    sizes: list[float]
    rising_DP: np.ndarray
    n0: float
    means_DA: np.ndarray
    column: Mapping[str, int]  # arm -> column of means_DA
    answers_ASN: np.ndarray

    def equivalent(self, arm: str) -> np.ndarray:
        return equivalent(self.sizes, self.rising_DP, self.means_DA[:, self.column[arm]], self.n0)

    def ends(self, less: float, m: float) -> tuple[float, float]:
        """k of the smallest and the largest size."""
        return (self.sizes[0] - less) / m, (self.sizes[-1] - less) / m

    def difference(self, arm: str, other: str) -> dict[str, float]:
        found = crossed(self.answers_ASN[self.column[arm]].astype(np.int8) - self.answers_ASN[self.column[other]])
        low, high = found.interval()
        return {"mean": found.mean, "low": low, "high": high}


def value_of(study: StudyView) -> dict[str, Any] | None:
    """None for a study that does not ask. `first`: the first sentence of the page; `problem` where nothing else can be
    said yet. `curve`: points of real-only accuracy and a power law beside; `flat`; `checks`; `arms`, one of each ratio
    and expansion, with k, its interval (None: open), case, marginal value and price; `crossovers` of samples alone."""
    if not isinstance(study.config.get("value"), Mapping):
        return None
    facts = {arm: first["value"] for arm, (first, *_) in study.arms.items() if is_valued(first)}
    reals = sorted((one["size"], arm) for arm, one in facts.items() if one["role"] == "real")
    if (problem := _unfinished(study, [size for size, _ in reals])) is not None:
        return {"problem": problem, "first": f"What one sample is worth is not known yet: {problem}."}
    answers = joint_answers(study, list(facts))
    if not isinstance(answers, str) and answers[0].size < 2:
        answers = "one test image and one seed say nothing of what varies"
    if isinstance(answers, str):
        return {"problem": answers, "first": f"What one sample is worth is not known: {answers}."}
    curve = _curve(study, facts, [arm for _, arm in reals], answers)
    base, twice = (next(arm for size, arm in reals if size == wanted) for wanted in (
        1, min(size for size, _ in reals if size >= 2)))
    means = curve.means_DA[0]
    law = power_law(curve.sizes, [float(means[curve.column[arm]]) for _, arm in reals]) if len(reals) > 3 else None
    found: dict[str, Any] = {
        "problem": "", "n0": curve.n0, "images": answers.shape[2], "seeds": answers.shape[1],
        "curve": [{"arm": arm, "size": size, "images": images, "top1": float(means[curve.column[arm]]),
                   "rising": float(curve.rising_DP[0, place])} for place, (images, (size, arm)) in enumerate(
                       zip(curve.sizes, reals, strict=True))],
        "law": law and {"a": law.a, "b": law.b, "c": law.c}, "doubling": curve.difference(twice, base),
        "checks": [_check(curve, arm, one["role"]) for arm, one in facts.items() if one["role"] in (
            "held out", "repeated")]}
    found["flat"] = found["doubling"]["low"] <= 0
    failed = [one for one in found["checks"] if not one["passed"]]
    found["arms"] = [] if failed and not found["flat"] else _arms(study, facts, curve, base, found["flat"])
    found["crossovers"] = [] if failed or found["flat"] else _crossovers(facts, curve, base)
    unpriced = "" if failed or found["flat"] else _unpriced(study, found["arms"])
    return {**found, "unpriced": unpriced, "first": _first(found, failed) + (f" {unpriced}." if unpriced else "")}


def _unfinished(study: StudyView, sizes: Sequence[float]) -> str | None:
    """What keeps a curve from being drawn."""
    waiting = [name for name in (*study.missing, *study.failed)
               if (study.planned.get(name) or {}).get("value")]
    if waiting:
        return f"{len(waiting)} of its trainings are not finished ({few(waiting)})"
    return None if 1 in sizes and max(sizes, default=0) >= 2 else "there is no finished training of its real images"


def _curve(study: StudyView, facts: Mapping[str, Any], reals: Sequence[str], answers: np.ndarray) -> _Curve:
    column = {arm: place for place, arm in enumerate(facts)}
    means_DA = np.concatenate([answers.mean(axis=(1, 2))[None], resampled(answers)])
    sizes = [float(np.mean([r["real_rows"] for r in study.arms[arm]])) for arm in reals]
    n0 = next(size for size, arm in zip(sizes, reals, strict=True) if facts[arm]["size"] == 1)
    return _Curve(sizes, isotonic(means_DA[:, [column[arm] for arm in reals]]), n0, means_DA, column, answers)


def _check(curve: _Curve, arm: str, role: str) -> dict[str, Any]:
    """As many real images again, held out or the same ones repeated: worth 1 and 0."""
    k_D = worth(curve.equivalent(arm), curve.n0, curve.n0)
    ends = curve.ends(curve.n0, curve.n0)
    low, high = bounds(k_D[1:], CHECKED, ends)
    expected = 1.0 if role == "held out" else 0.0
    return {"arm": arm, "role": role, "k": _finite(k_D[0]), **_case(k_D[0], ends), "low": low, "high": high,
            "expected": expected, "passed": holds((low, high), expected)}


# Arms ----------------------------------------------------------------------------------------------------------------


def _arms(study: StudyView, facts: Mapping[str, Any], curve: _Curve, base: str, flat: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    before: dict[tuple[str, str], tuple[float, np.ndarray]] = {}  # (role, expansion) -> m, n_eq of the ratio before
    for arm, one in sorted(((arm, one) for arm, one in facts.items() if one["role"] in ("samples", "alone")),
                           key=lambda pair: (pair[1]["role"] == "alone", pair[1]["use"], pair[1]["ratio"])):
        m = float(np.mean([r["synthetic_rows"] for r in study.arms[arm]]))
        line = {"arm": arm, **one, "samples": m, "difference": curve.difference(arm, base), "price": None}
        if not flat:
            n_eq_D, less = curve.equivalent(arm), 0.0 if one["role"] == "alone" else curve.n0
            k_D, ends = worth(n_eq_D, less, m), curve.ends(less, m)
            low, high = bounds(k_D[1:], ends=ends)
            line |= {"n_eq": _finite(n_eq_D[0]), **_case(k_D[0], ends), "low": low, "high": high,
                     "k": _finite(k_D[0]), "marginal": _marginal(before.get((one["role"], one["use"])), m, n_eq_D),
                     "price": _price(study, arm, m, _finite(k_D[0]), low, high)}
            before[one["role"], one["use"]] = m, n_eq_D
        found.append({**line, "sentence": _sentence(line, curve, flat)})
    return found


def _case(k: float, ends: tuple[float, float]) -> dict[str, Any]:
    """Where an arm lies, and the end of the curve beyond which k is not known."""
    if np.isfinite(k):
        return {"case": "inside", "bound": None}
    return {"case": "above", "bound": ends[1]} if k > 0 else {"case": "below", "bound": ends[0]}


def _marginal(before: tuple[float, np.ndarray] | None, m: float, n_eq_D: np.ndarray) -> dict[str, Any] | None:
    """k of the samples that a ratio adds to the one before; NaN where both are outside the curve."""
    if before is None:
        return None
    with np.errstate(invalid="ignore"):
        k_D = (n_eq_D - before[1]) / (m - before[0])
    low, high = bounds(k_D[1:])
    return {"k": _finite(k_D[0]), "low": low, "high": high}


def _price(study: StudyView, arm: str, m: float, k: float | None, low: float | None,
           high: float | None) -> dict[str, Any] | None:
    """`sample`: what one costs, with its share of what was fitted; `equivalent`: what as much as one real image costs,
    with the interval of k turned over; `break_even`: the k at which samples cost as much as real images. None without
    prices, or where seconds are not known."""
    prices = study.config.get("price") or {}
    results, unit = study.arms[arm], _unit(study, arm)
    hour = prices.get(f"{unit.lower()}_hour")
    seconds = [(number(r, "expansion_seconds") or 0.0) + (number(r, "fitting_seconds") or 0.0) for r in results]
    if hour is None or not sum(seconds):
        return None
    sample = float(np.mean(seconds)) / 3600 * hour / m
    real = prices.get("real_image")
    return {"sample": sample, "unit": unit,
            "equivalent": sample / k if k is not None and k > 0 else None,
            "low": sample / high if high is not None and high > 0 else None,
            "high": sample / low if low is not None and low > 0 else None,
            "real": real, "break_even": None if real is None else sample / real}


def _unit(study: StudyView, arm: str) -> str:
    """GPU or CPU: what an hour of a process is of."""
    return "GPU" if any(str(r.get("device", "")).startswith("cuda") for r in study.arms[arm]) else "CPU"


def _unpriced(study: StudyView, arms: Sequence[Mapping[str, Any]]) -> str:
    """Why prices that are given say nothing of some arms; empty where they do."""
    if not study.config.get("price") or all(one["price"] for one in arms):
        return ""
    unit = next(_unit(study, one["arm"]) for one in arms if not one["price"])
    if study.config["price"].get(f"{unit.lower()}_hour") is None:
        return f"No cost is printed: trials ran on a {unit}, and price.{unit.lower()}_hour is not given"
    return "No cost is printed: how long the samples took is not known"


def _crossovers(facts: Mapping[str, Any], curve: _Curve, base: str) -> list[dict[str, Any]]:
    """How many samples alone reach the real images at hand, by expansion: interpolated in log m, or, where they do not
    reach them, the best, its gap, and what laws that the data do not tell apart would say."""
    found = []
    for use in dict.fromkeys(one["use"] for one in facts.values() if one["role"] == "alone"):
        arms = sorted((one["ratio"], arm) for arm, one in facts.items() if (one["role"], one["use"]) == ("alone", use))
        if len(arms) < 2:
            continue
        means_DM = curve.means_DA[:, [curve.column[arm] for _, arm in arms]]
        target_D, m = curve.means_DA[:, curve.column[base]], [ratio * curve.n0 for ratio, _ in arms]
        at_D = equivalent(m, isotonic(means_DM), target_D, m[0])
        at_D = np.where(at_D == -np.inf, m[0], at_D)  # the first one reaches them already
        best = int(means_DM[0].argmax())
        low, high = bounds(at_D[1:], ends=(m[0], m[-1]))
        found.append({"use": use, "target": float(target_D[0]), "samples": m, "top1": means_DM[0].tolist(),
                      "crossover": _finite(at_D[0]), "low": low, "high": high, "at_first": bool(at_D[0] == m[0]),
                      "best": m[best], "gap": float(target_D[0] - means_DM[0, best]),
                      "fits": [one._asdict() for one in range_of_fits(m, means_DM[0].tolist(), float(target_D[0]))]
                      if len(m) >= FEWEST_FITTED and at_D[0] == np.inf else []})
        found[-1]["sentence"] = _crossing(found[-1], curve.n0)
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# Sentences -----------------------------------------------------------------------------------------------------------


def _first(found: Mapping[str, Any], failed: Sequence[Mapping[str, Any]]) -> str:
    """One for each expansion, at its largest ratio, with what is to be known before it is believed."""
    if found["flat"] or failed:
        lines = [_flat(found["doubling"])] if found["flat"] else [
            f"No worth is printed: {_called(one, found['n0'])} worth {_interval(one)} real images each, which must "
            f"hold {one['expected']:g}, so this curve does not measure what real images do here" for one in failed]
    else:
        lines = []
        for use in dict.fromkeys(one["use"] for one in found["arms"]):
            one = [line for line in found["arms"] if line["use"] == use and line["role"] == "samples"][-1]
            lines.append(f"{one['sentence']}{_further(one)}{_pays(one)}")
    short = [f"{found['images']:,} test images, fewer than {ENOUGH_IMAGES:,}"] * (found["images"] < ENOUGH_IMAGES)
    short += [f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}, fewer than {MIN_SEEDS}"] * (
        found["seeds"] < MIN_SEEDS)
    caution = f" ({'; '.join(short)}: expect wide intervals)" if short else ""
    unchecked = "" if found["checks"] or found["flat"] else " (value.checks is off, so whether this curve measures " \
        "what real images do here is not known)"
    return f"{'. '.join(lines)}{caution}{unchecked}."


def _called(one: Mapping[str, Any], n0: float) -> str:
    return f"{n0:,.0f} held-out real images are" if one["role"] == "held out" else \
        f"the {n0:,.0f} real images, repeated, are"


def _flat(doubling: Mapping[str, float]) -> str:
    return ("Flat: more real images do not measurably help this recipe either (twice as many: "
            f"{points(doubling['mean'])} points [{points(doubling['low'])}, {points(doubling['high'])}]); worth is not "
            "defined")


def _sentence(one: Mapping[str, Any], curve: _Curve, flat: bool) -> str:
    place = f"at {one['ratio']:g}x" + (f" on top of {curve.n0:,.0f}" if one["role"] == "samples" else " alone")
    if flat:
        gap = one["difference"]
        return (f"{one['use']} {place}: difference in points {points(gap['mean'])} "
                f"[{points(gap['low'])}, {points(gap['high'])}]")
    sides = f"[{_side(one['low'])}, {_side(one['high'])}]"
    who = f"One sample of {one['use']}"
    if one["case"] == "above":
        return f"{who} is worth more than {one['bound']:.2g} real images {sides} {place}"
    if one["case"] == "below":
        return f"{who} is harmful, worth less than {one['bound']:.2g} real images {sides} {place}" if (
            one["role"] == "samples") else f"{who} is worth less than {one['bound']:.2g} real images {sides} {place}"
    return f"{who} is worth {two_digits(one['k'])} real images {sides} {place}"


def _interval(one: Mapping[str, Any]) -> str:
    k = two_digits(one["k"]) if one["k"] is not None else \
        f"{'more' if one['case'] == 'above' else 'less'} than {two_digits(one['bound'])}"
    return f"{k} [{_side(one['low'])}, {_side(one['high'])}]"


def _side(value: float | None) -> str:
    return "open" if value is None else two_digits(value)


def two_digits(value: float) -> str:
    """Two decimals; no sign of what rounds to zero."""
    return f"{value:.2f}".replace("-0.00", "0.00")


def _further(one: Mapping[str, Any]) -> str:
    """What one more sample of each image is worth at most, by the samples between the last two ratios."""
    if (marginal := one["marginal"]) is None:
        return ""
    after = int(one["ratio"]) + 1 if float(one["ratio"]).is_integer() else None
    name = f"the {ORDINALS.get(after, f'{after}th')}" if after is not None else "one more"
    return f"; {name} is worth less than {marginal['high']:.2f}" if marginal["high"] is not None else \
        f"; what {name} is worth is not bounded"


def _pays(one: Mapping[str, Any]) -> str:
    even = (one["price"] or {}).get("break_even")
    return "" if even is None else f"; at your prices samples pay off above {plain(even, 2)}"


def _crossing(one: Mapping[str, Any], n0: float) -> str:
    if one["crossover"] is not None:
        early = "at most " if one["at_first"] else ""
        return (f"{one['use']} alone reaches {n0:,.0f} real images with {early}{one['crossover']:,.0f} samples "
                f"[{_count(one['low'])}, {_count(one['high'])}]")
    reach = [fit["crossover"] for fit in one["fits"]]
    known = [value for value in reach if value is not None]
    laws = "" if not reach else (
        f"; laws that fit as well say {min(known):,.0f} to {max(known):,.0f} samples{' or never' * (None in reach)}"
        if known else "; laws that fit as well say never")
    return (f"{one['use']} alone does not reach {n0:,.0f} real images: best with {one['best']:,.0f} samples, "
            f"{100 * one['gap']:.1f} points below{laws}")


def _count(value: float | None) -> str:
    return "open" if value is None else f"{value:,.0f}"
