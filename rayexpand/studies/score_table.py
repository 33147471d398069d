"""Samples beside real images, read and put into one table with what they did for the classifier and what they cost.

A number that is not there is said to be missing, and why, as far as the files tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from rayexpand.contract.errors import DamagedFile
from rayexpand.evaluation.features import with_current_names
from rayexpand.storage.files import Files
from rayexpand.storage.tables import unsealed
from rayexpand.studies.spreads import plus_minus, points, spread

LEAST_ARMS = 4  # that are ranked
ROUNDING = 1e-9  # of a mean: the error of equal numbers, summed in floating point
FIRST = ("coverage", "density", "recall", "precision")  # scores by the beginning of their names; then the others
NO_SAMPLES, NO_CLASSIFIER, NOT_MEASURED, NO_NUMBER = "no samples", "no classifier", "not measured", "not known"

Result = Mapping[str, Any]


# Reading -------------------------------------------------------------------------------------------------------------


def read_scores(files: Files, config: Mapping[str, Any], results: Sequence[Result],
                problems: list[str]) -> dict[str, Result]:
    """Scores of the samples of trials by trial, and of other real images as real/<images>-<seed>; those that cannot be
    used or are of something else than the results leave a line in `problems`."""
    if (asked := config.get("samples")) is None:
        return {}
    lists = {str(one["trial"]): one.get("list_sha256") for one in results}
    there = {name.removesuffix(".json") for name in files.list("scores") if name.endswith(".json")} & lists.keys()
    real = {f"real/{name.removesuffix('.json')}" for name in files.list("scores/real") if name.endswith(".json")}
    found: dict[str, Result] = {}
    for name in sorted(there) + sorted(real):
        place = f"scores/{name}.json"
        try:
            one = unsealed(place, files.read(place) or b"", "")
        except DamagedFile as error:
            problems.append(f"{place}{error}, so these scores are left out; `rayexpand train` measures them again.")
            continue
        if one.get("settings") != asked or (name in lists and one.get("list_sha256") != lists[name]):
            problems.append(f"{place} was measured with other samples or settings than the study has now; it is left "
                            "out until `rayexpand train` measures it again.")
        else:
            found[name] = with_current_names(one)
    return found


# Summary -------------------------------------------------------------------------------------------------------------


def compared_with(config: Mapping[str, Any], scores: Mapping[str, Result]) -> dict[str, Any] | None:
    """What all samples were compared with, by what; scores of other real images by their number; warnings. None for a
    study that does not ask for it."""
    if config.get("samples") is None:
        return None
    if not scores:
        return {"extractor": None, "features": None, "size": None, "reference": None, "real": [],
                "warnings": ["no samples were compared yet; `rayexpand train` does"]}
    first = next(iter(scores.values()))
    real: dict[int, list[Result]] = {}
    for name, one in scores.items():
        if name.startswith("real/"):
            real.setdefault(one["images"], []).append(one)
    warnings = dict.fromkeys(line for one in scores.values() for line in one.get("warnings") or ())
    if any(one.get("filled") for one in scores.values()):
        warnings["arms with fill: all samples that they draw from are compared, not those alone that they take"] = None
    compared = {one["n_samples"] for name, one in scores.items() if not name.startswith("real/")}
    if config["samples"].get("real") and (lacking := sorted(compared - real.keys())):
        numbers = ", ".join(map(str, lacking))
        warnings[f"samples.real: no line says what {numbers} real images reach; where the study is done, there are not "
                 "as many: name more, or set samples.images"] = None
    return {"extractor": first["extractor"]["name"], "features": first["features"], "size": first["size"],
            "reference": first["n_reference"], "warnings": list(warnings),
            "real": [{"images": images, **of_samples(found)} for images, found in sorted(real.items())]}


def of_samples(found: Sequence[Result]) -> dict[str, Any]:
    """Spreads over repetitions: how many images were compared, and their scores."""
    names = dict.fromkeys(name for one in found for name in one["scores"])
    return {"images_compared": spread(one["n_samples"] for one in found),
            "gflop_per_image": spread(one.get("gflop_per_image") for one in found),
            "scores": {name: spread(one["scores"].get(name, {}).get("value") for one in found) for name in names},
            "floors": {name: floor for name in names if (floor := spread(
                one["scores"].get(name, {}).get("floor") for one in found)) is not None}}


def go_with_top1(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Do arms whose samples score higher teach better? Spearman's rank correlation of each score with top-1 over arms,
    in each repetition, for arms with real images and for samples alone; none for fewer than LEAST_ARMS. Arms that share
    a generator are no independent cases, so it describes these arms and tests nothing."""
    found = []
    for words, alone in (("with real images", False), ("samples alone", True)):
        own = [arm for arm in arms if arm["samples"]["scores"]
               and alone == (not (arm["real_rows"] or {"mean": 0})["mean"])]
        names = _ordered({name for arm in own for name in arm["samples"]["scores"]})
        whole = [arm for arm in own if arm["seeds"] == own[0]["seeds"] and all(
            (arm["samples"]["scores"].get(name) or {"n": 0})["n"] == len(arm["seeds"]) for name in names)]
        if len(whole) >= LEAST_ARMS:
            top1_AS = np.array([arm["last"]["top1"]["values"] for arm in whole])
            scores = {name: np.array([arm["samples"]["scores"][name]["values"] for arm in whole]) for name in names}
            found.append({"arms": words, "n": len(whole), "scores": {
                name: spread(_spearman(x, y) for x, y in zip(top1_AS.T, score_AS.T, strict=True))
                for name, score_AS in scores.items()}})
    return found


def _spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """None where all values of a side are equal."""
    return None if np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearmanr(x, y).statistic)


# Table ---------------------------------------------------------------------------------------------------------------


def score_table(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Heads and lines of a summary: accuracy, coverage, distance and cost of each arm, mean ± standard error over
    repetitions; None for a study that does not ask for it. Controls have no samples and stand in the other table."""
    if (shared := found["samples"]) is None:
        return None
    names = _ordered({name for arm in found["arms"] for name in arm["samples"]["scores"]})
    against = {one["arm"]: points(one["mean"]) + (
        "" if one["low"] is None else f" [{points(one['low'])}, {points(one['high'])}]")
        for one in found["comparisons"] if one["kind"] == "baseline" and one["mean"] is not None}
    lines: list[tuple[str, ...]] = []
    for arm in found["arms"]:
        if arm["control_of"]:
            continue
        top1 = arm["last"]["top1"]
        lines.append((arm["arm"], str(top1["n"]), plus_minus(top1),
                      against.get(arm["arm"], "baseline" if arm["arm"] == found["baseline"] else NO_NUMBER),
                      *_cells(arm, names)))
    for one in shared["real"]:
        scores = tuple(_number(one["scores"].get(name)) for name in names)
        lines.append((f"{one['images']:,} other real images", str(one["images_compared"]["n"]), NO_CLASSIFIER,
                      NO_CLASSIFIER, *scores, _number(one["images_compared"]), *(NO_SAMPLES,) * 3))
    return ("arm", "n", "top-1 %", "against baseline", *names, "images", "GFLOP/image", "s/image", "s fitting"), lines


def said_of_top1(found: Mapping[str, Any]) -> list[str]:
    """The rank correlations of a summary in words, one line for each kind of arms."""
    return [f"rank correlation with top-1 over {one['n']} arms, {one['arms']}: " + ", ".join(
        f"{name} {_number(value, missing='none, all are equal')}" for name, value in one["scores"].items())
        for one in (found["samples"] or {"with_top1": ()})["with_top1"]]


def said_of_samples_alone(found: Mapping[str, Any]) -> list[str]:
    """The classifier accuracy score (Ravuri and Vinyals 2019) of each arm of samples alone, with its gap to real images
    alone at the same updates, which is its control."""
    gaps = {one["arm"]: one for one in found["comparisons"] if one["kind"] == "control" and one["mean"] is not None}
    lines = []
    for arm in found["arms"]:
        if not (arm["synthetic_rows"] or {"mean": 0})["mean"] or (arm["real_rows"] or {"mean": 1})["mean"]:
            continue
        gap = gaps.get(arm["arm"])
        beside = "no arm of real images alone has as many updates" if gap is None else (
            f"{points(gap['mean'])} points to {gap['against']}, real images alone at the same updates" + (
                "" if gap["low"] is None else f" (95 % interval {points(gap['low'])} to {points(gap['high'])})"))
        lines.append(f"Classifier accuracy score of {arm['arm']}, samples alone: {plus_minus(arm['last']['top1'])} %; "
                     f"{beside}.")
    return lines


def _cells(arm: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """Scores, images compared, arithmetic and seconds of one image, seconds of what was fitted."""
    if not (arm["synthetic_rows"] or {"mean": 0})["mean"]:
        return (NO_SAMPLES,) * (len(names) + 4)
    own, repetitions = arm["samples"], len(arm["seeds"])
    cells = [_number(own["scores"].get(name), repetitions) + _floor(own, name) for name in names]
    return (*cells, _number(own["images_compared"], repetitions),
            _number(own["gflop_per_image"], missing=NO_NUMBER),
            _number(arm["seconds_per_image"], missing=NO_NUMBER), _number(arm["cost"]["fitting"], missing=NO_NUMBER))


def _floor(own: Mapping[str, Any], name: str) -> str:
    """The same statistic between halves of the reference, beside a distance."""
    floor = own.get("floors", {}).get(name)
    return "" if floor is None else f", floor {floor['mean']:,.3g}"


def _number(found: Mapping[str, Any] | None, repetitions: int | None = None, missing: str = NOT_MEASURED) -> str:
    """Mean ± standard error, whose first digit is the last one of both; with how many values, where that is less than
    `repetitions`."""
    if found is None:
        return missing
    error = found["se"]
    if error and error > ROUNDING * abs(found["mean"]):
        places = max(0, -math.floor(math.log10(error)))
        text = f"{found['mean']:,.{places}f} ± {error:,.{places}f}"
    else:
        text = f"{found['mean']:,.4g}"
    return text if repetitions is None or found["n"] == repetitions else f"{text} (n = {found['n']})"


def _ordered(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (next((place for place, first in enumerate(FIRST) if name.startswith(first)),
                                                len(FIRST)), name))
