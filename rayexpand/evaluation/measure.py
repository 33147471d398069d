"""Every metric that `evaluate` may be asked for, by name, with what its value depends on.

A distance stands beside its floor: the same statistic between two disjoint halves of the reference, of as many images
as there are samples where the reference has them. Below it nothing can be read. Both counts stand with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation import diversity, neighbours
from rayexpand.evaluation.distance import (
    CMMD_SIGMA,
    KID_SUBSET,
    LEAST_INFINITY,
    MEDIAN_ROWS,
    checked,
    cmmd,
    fd,
    fd_infinity,
    kd,
    median_distance,
    mmd2_linear,
    mmd2_rbf,
)
from rayexpand.evaluation.extraction import Found
from rayexpand.evaluation.moments import FittedGaussian, frechet
from rayexpand.evaluation.neighbours import CLOSED, COVERAGE_K, PRECISION_K
from rayexpand.models.guide_files import CLASS_PROMPT

WORST = 10  # classes that are listed

Result = dict[str, Any]
Statistic = Callable[[np.ndarray, np.ndarray], float]


class Comparison:
    """Samples and reference images, by their features in float64 and, where there is one, the class of each.

    `key` names a statistic (features.key_of); `known` keeps floors for comparisons with the same reference."""

    def __init__(self, samples: Found, reference: Found, *, seed: int = 0, key: Callable[[str], str] = str,
                 training: Found | None = None, texts: Mapping[str, np.ndarray] | None = None,
                 known: dict[Any, Any] | None = None) -> None:
        self.samples, self.reference, self.training, self.texts = samples, reference, training, texts
        self.x_ND, self.y_MD = checked(samples.features_ND, reference.features_ND)
        self.n, self.m = samples.images, reference.images
        self.seed, self.key, self._known = seed, key, {} if known is None else known
        self.trained_on = 0  # reference images with the very features of a training image, once cover has looked

    def chosen(self, rows: int, of: int, stream: str) -> np.ndarray:
        """Keyed choice of `rows` of `of` places, in order."""
        return np.sort(generator(row_key(self.seed, "distance", "", 0, 0, stream)).permutation(of)[:rows])

    def halves(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Two disjoint sets of `rows` reference images, or of as many as there are."""
        half_M = self.reference.half_M
        if half_M is None:
            order = generator(row_key(self.seed, "distance", "", 0, 0, "halves")).permutation(len(self.y_MD))
            half_M = np.zeros(len(self.y_MD), np.int8)
            half_M[order[:len(order) // 2]], half_M[order[len(order) // 2:len(order) // 2 * 2]] = 1, 2
        first, second = (np.flatnonzero(half_M == half) for half in (1, 2))
        rows = min(rows, len(first), len(second))
        return (self.y_MD[first[self.chosen(rows, len(first), "first half")]],
                self.y_MD[second[self.chosen(rows, len(second), "second half")]])

    def floor(self, name: str, statistic: Statistic) -> Result:
        """What `statistic` is between halves of the reference of as many rows as there are samples."""
        rows = min(len(self.x_ND), len(self.y_MD) // 2)
        if rows < 2:
            return {"floor": None, "floor_images": rows}
        if (name, rows) not in self._known:
            first, second = self.halves(rows)
            self._known[name, rows] = {"floor": statistic(first, second), "floor_images": len(first)}
        return dict(self._known[name, rows])

    def distance(self, name: str, statistic: Statistic, **facts: Any) -> Result:
        """A statistic of the rows at hand, by its name with this extractor."""
        return {name: {"value": statistic(self.x_ND, self.y_MD), **self.floor(name, statistic),
                       "n_samples": len(self.x_ND), "n_reference": len(self.y_MD), **facts}}


def measure(metrics: Sequence[str], samples: Found, reference: Found, **given: Any) -> Result:
    """`scores`: name -> {"value", what it depends on} of each of `metrics` (keys of METRICS); one may give several
    names, and a name states extractor, kernel, bandwidth rule or k. `warnings` lists why a value is not to be trusted
    or compared; `classes` is the table of the worst ones. `given`: as Comparison takes it.

    Raises UsageError for features that are not finite, differ in width, or are fewer than the metric needs.
    """
    pair = Comparison(samples, reference, **given)
    scores: Result = {}
    for metric in metrics:
        scores |= METRICS[metric](pair)
    found = {"scores": scores, "warnings": _warnings(pair, metrics), "n_samples": pair.n, "n_reference": pair.m,
             "features": pair.x_ND.shape[1]}
    if "classes" in metrics and (table := worst_classes(pair)):
        found["classes"] = table
    return found


def _warnings(pair: Comparison, metrics: Sequence[str]) -> list[str]:
    lines, width = [], pair.x_ND.shape[1]
    if pair.n != pair.m:
        lines.append(f"{pair.n} samples against {pair.m} reference images: these values, Frechet distances above all, "
                     "compare only with values at the same two numbers; set `images` to take as many of both")
    least = min(pair.n, pair.m)
    if "fd_infinity" in metrics and least < LEAST_INFINITY:
        lines.append(f"fd_infinity: {least} images are too few for a line over sizes; take {LEAST_INFINITY} or more")
    if {"fd", "fid", "fid_clean", "fd_dinov2"} & set(metrics) and least <= width:
        lines.append(f"{least} images are few for {width} features: most of a Frechet distance is then its bias; read "
                     "value - floor, fd_infinity or kd, or take more images of both")
    if pair.trained_on:
        lines.append(f"cover: {pair.trained_on:,} of {pair.m:,} reference images have the very features of a training "
                     "image, so they are at distance 0 with any samples; give held-out images")
    if "classes" in metrics and not _shared_classes(pair):
        lines.append("classes: samples and reference have no class of the same key, so no class is compared")
    return lines


# -------------------------------------------------------------------------------------------------------- named results


def _fd(pair: Comparison) -> Result:
    """Of all images: of their rows where all are at hand, else of their sums."""
    name = pair.key("fd")
    x, y = (FittedGaussian.of_rows(rows) if side.sums is None or len(rows) == side.images
            else FittedGaussian.of(side.sums.total)
            for rows, side in ((pair.x_ND, pair.samples), (pair.y_MD, pair.reference)))
    return {name: {"value": frechet(x, y), **_fd_floor(pair, name), "n_samples": pair.n, "n_reference": pair.m}}


def _fd_floor(pair: Comparison, name: str) -> Result:
    """Of the rows at hand where they are enough, else of the sums over the whole halves."""
    sums = pair.reference.sums
    wanted, at_hand = min(pair.n, pair.m // 2), min(len(pair.x_ND), len(pair.y_MD) // 2)
    if sums is None or at_hand >= wanted or min(sums.first.n, sums.second.n) < 2:
        return pair.floor(name, fd)
    return {"floor": frechet(FittedGaussian.of(sums.first), FittedGaussian.of(sums.second)),
            "floor_images": sums.second.n}


def _fd_infinity(pair: Comparison) -> Result:
    if min(len(pair.x_ND), len(pair.y_MD)) < LEAST_INFINITY:
        return {}
    value, sizes = fd_infinity(pair.x_ND, pair.y_MD, pair.seed)
    return {f"{pair.key('fd')}_infinity": {"value": value, "n_samples": sizes[-1][0], "n_reference": sizes[-1][1],
                                           "from_samples": sizes[0][0], "sizes": len(sizes)}}


def _kd(pair: Comparison) -> Result:
    value, std, subsets, rows = kd(pair.x_ND, pair.y_MD, pair.seed)
    name = pair.key("kd") if rows == KID_SUBSET or pair.key("kd") != "kid" else "kd_inception2015"  # not as published
    floor = pair.floor(name, lambda a, b: kd(a, b, pair.seed)[0])
    return {name: {"value": value, **floor, "std": std, "subsets": subsets, "subset_rows": rows,
                   "kernel": "(x.y / D + 1)^3, unbiased", "n_samples": len(pair.x_ND), "n_reference": len(pair.y_MD)}}


def _kid(pair: Comparison) -> Result:
    if (rows := min(len(pair.x_ND), len(pair.y_MD))) < KID_SUBSET:
        raise UsageError(f"kid: {rows} images are fewer than the {KID_SUBSET} of a published subset; take more, or ask "
                         "for kd, which is called kd_inception2015 then")
    return _kd(pair)


def _mmd2_linear(pair: Comparison) -> Result:
    return pair.distance(pair.key("mmd2_linear_biased"), mmd2_linear, kernel="x.y / D")


def _mmd2_rbf(pair: Comparison) -> Result:
    sigma = median_distance(pair.y_MD, pair.seed)
    return pair.distance(pair.key("mmd2_rbf_median_unbiased"), lambda a, b: mmd2_rbf(a, b, sigma), sigma=sigma,
                         kernel="exp(-|x - y|^2 / (2 sigma^2))",
                         bandwidth=f"median distance within the reference (at most {MEDIAN_ROWS} rows)")


def _mmd2_rbf10(pair: Comparison) -> Result:
    return pair.distance(pair.key("mmd2_rbf10"), cmmd, kernel="1000 x biased, exp(-|x - y|^2 / (2 sigma^2)), unit "
                         "length", sigma=CMMD_SIGMA)


def _precision_recall(pair: Comparison) -> Result:
    precision, recall = neighbours.precision_recall(pair.x_ND, pair.y_MD)
    return _by_neighbours(pair, PRECISION_K, precision=precision, recall=recall)


def _density_coverage(pair: Comparison) -> Result:
    density, coverage = neighbours.density_coverage(pair.x_ND, pair.y_MD)
    return _by_neighbours(pair, COVERAGE_K, density=density, coverage=coverage)


def _by_neighbours(pair: Comparison, k: int, **values: float) -> Result:
    return {f"{name}_k{k}": {"value": value, "k": k, "balls": CLOSED, "n_samples": len(pair.x_ND),
                             "n_reference": len(pair.y_MD)} for name, value in values.items()}


def _authenticity(pair: Comparison) -> Result:
    return {"authenticity": {"value": neighbours.authenticity(pair.x_ND, pair.y_MD), "n_samples": len(pair.x_ND),
                             "n_reference": len(pair.y_MD), "note": "finds no copies of outliers"}}


def _vendi(pair: Comparison) -> Result:
    """Of samples and reference at the same number of images, and the mean over their shared classes."""
    rows = min(len(pair.x_ND), len(pair.y_MD))
    x, y = (side[pair.chosen(rows, len(side), "vendi")] for side in (pair.x_ND, pair.y_MD))
    both = {"at_most": min(rows, x.shape[1]), "n_samples": rows, "n_reference": rows}
    found: Result = {"vendi": {"value": diversity.vendi(x), "reference": diversity.vendi(y), **both}}
    of_classes = [(diversity.vendi(x[:n]), diversity.vendi(y[:n])) for _, x, y in _class_rows(pair)
                  if (n := min(len(x), len(y)))]
    if of_classes:
        own, real = np.mean(of_classes, axis=0)
        found["vendi_class_mean"] = {"value": float(own), "reference": float(real), "classes": len(of_classes)}
    return found


def _class_energy(pair: Comparison) -> Result:
    """How far samples are from the mean reference image of their class: DistDiff's D_c with the extractor as guide.
    `reference`: the same of real images, each left out of the mean of its class."""
    own, real = [], []
    for _, x_ND, y_MD in _class_rows(pair):
        own.append(np.linalg.norm(x_ND - y_MD.mean(axis=0), axis=1))
        if (m := len(y_MD)) > 1:
            real.append(np.linalg.norm(y_MD - y_MD.mean(axis=0), axis=1) * m / (m - 1))
    if not own:
        raise UsageError("class_energy: samples and reference have no class of the same key; give a reference with the "
                         "classes of the samples")
    return {pair.key("class_energy"): {
        "value": float(np.concatenate(own).mean()), "reference": float(np.concatenate(real).mean()) if real else None,
        "classes": len(own), "n_samples": sum(map(len, own)), "n_reference": len(pair.y_MD)}}


def _cover(pair: Comparison) -> Result:
    """How far held-out images are from the training images, and from those and the samples."""
    if pair.training is None:
        raise UsageError("cover: the training images are not given; compare by another metric")
    e_ED = np.asarray(pair.training.features_ND, np.float64)
    real = neighbours.cover(pair.y_MD, e_ED)
    both = neighbours.cover(pair.y_MD, np.concatenate([e_ED, pair.x_ND]))
    counts = {"n_samples": len(pair.x_ND), "n_reference": len(pair.y_MD), "n_training": len(e_ED)}
    pair.trained_on = int(real.pop("same") or 0)
    return {f"cover_{name}": {"value": both[name], "training_alone": value, **counts} for name, value in real.items()}


def _alignment(pair: Comparison) -> Result:
    """Of the samples, with what real images reach beside it."""
    own, real = _aligned(pair, pair.samples), _aligned(pair, pair.reference)
    if own is None:
        raise UsageError("alignment: the samples have no class that the guide was asked about")
    return {name: {"value": value, "reference": None if real is None else real[name], "text": CLASS_PROMPT}
            for name, value in own.items()}


def _aligned(pair: Comparison, side: Found) -> dict[str, float] | None:
    if pair.texts is None or (classes_N := side.classes) is None:
        return None
    place = {key: i for i, key in enumerate(pair.texts)}
    labels_N = np.asarray([place.get(key, -1) for key in classes_N])
    known = labels_N >= 0
    if not known.any():
        return None
    return diversity.alignment(side.features_ND[known], labels_N[known], np.stack(list(pair.texts.values())))


METRICS: dict[str, Callable[[Comparison], Result]] = {
    "fd": _fd, "fd_infinity": _fd_infinity, "kd": _kd, "mmd2_linear": _mmd2_linear, "mmd2_rbf": _mmd2_rbf,
    "mmd2_rbf10": _mmd2_rbf10, "precision_recall": _precision_recall, "density_coverage": _density_coverage,
    "authenticity": _authenticity, "vendi": _vendi, "classes": lambda pair: {}, "cover": _cover,
    "alignment": _alignment, "class_energy": _class_energy,
    "fid": _fd, "fid_clean": _fd, "fd_dinov2": _fd, "kid": _kid, "cmmd": _mmd2_rbf10}


# -------------------------------------------------------------------------------------------------------------- classes


def worst_classes(pair: Comparison) -> Result | None:
    """The classes whose reference images are covered least. In each, half of its reference images are the centres; as
    many samples as other reference images are asked how many of the balls they reach, so that `real` says what is
    possible at that number. None where no class has enough images of both."""
    lines, left_out = [], []
    for key, x_ND, y_MD in _class_rows(pair):
        centres, others = y_MD[1::2], y_MD[::2]
        rows = min(len(x_ND), len(others))
        if rows < 1 or len(centres) <= COVERAGE_K:
            left_out.append(key)
            continue
        own, real = (neighbours.density_coverage(side[:rows], centres)[1] for side in (x_ND, others))
        lines.append({"class": key, "coverage": own, "real": real, "generated_minus_real": own - real,
                      "images": rows, "centres": len(centres)})
    if not lines and not left_out:
        return None
    lines.sort(key=lambda line: (line["coverage"], line["generated_minus_real"], line["class"]))
    return {"k": COVERAGE_K, "balls": CLOSED, "worst": lines[:WORST], "compared": len(lines),
            "left_out": len(left_out)}


def _shared_classes(pair: Comparison) -> list[str]:
    own, real = pair.samples.classes, pair.reference.classes
    return [] if own is None or real is None else sorted({*own.tolist()} & {*real.tolist()})


def _class_rows(pair: Comparison) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(class, samples, reference images) of each shared class, both in a keyed order; those of one class are copied at
    once."""
    if shared := _shared_classes(pair):
        own, real = (_by_class(side.classes, pair.seed) for side in (pair.samples, pair.reference))
        for key in shared:
            yield key, pair.x_ND[own[key]], pair.y_MD[real[key]]


def _by_class(classes_N: np.ndarray | None, seed: int) -> dict[str, np.ndarray]:
    assert classes_N is not None
    order = generator(row_key(seed, "distance", "", 0, 0, "classes")).permutation(len(classes_N))
    keys, inverse = np.unique(classes_N[order], return_inverse=True)
    return {str(key): order[inverse == i] for i, key in enumerate(keys)}
