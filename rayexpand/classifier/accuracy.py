"""Scores of a classifier on a test set.

    here              meaning, unit
    N                 test images
    K                 classes
    probabilities_NK  rows that sum to 1

Every accuracy is a share in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from rayexpand.contract.errors import Diverged, UsageError

_WHOLE = ("item", "label", "rank", "predicted")  # fields of Answers that are whole numbers
ECE_BINS = 15  # Guo et al. 2017, section 5
CUB_LT = (5, 20)  # few < 5 <= medium <= 20 < many: thresholds of Diff-Mix, table 2
FLOWER_LT = (10, 30)


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    """float64 (N, K) probabilities."""
    z_NK = np.asarray(logits_NK, np.float64)
    e_NK = np.exp(z_NK - z_NK.max(axis=1, keepdims=True))
    return e_NK / e_NK.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Answers:
    """What a classifier said to each test image; small enough to gather from all workers. `rank` is the place of the
    true class, 0 for the top; equal probabilities rank by class number, as argmax does."""

    item: np.ndarray  # int64 (N,) number of the image in its test set
    label: np.ndarray  # int64
    rank: np.ndarray  # int64
    predicted: np.ndarray  # int64
    confidence: np.ndarray  # float64, probability of the predicted class
    p_label: np.ndarray  # float64, probability of the true class
    margin: np.ndarray  # float64, p_label minus the highest probability of another class
    entropy: np.ndarray  # float64, of the probabilities, nats

    @classmethod
    def concatenate(cls, parts: Sequence[Answers]) -> Answers:
        """All answers one behind the other; of no parts, no answers."""
        return cls(*(np.concatenate([np.zeros(0, np.int64 if one.name in _WHOLE else np.float64),
                                     *(getattr(part, one.name) for part in parts)]) for one in fields(cls)))


def answer(items_N: np.ndarray, probabilities_NK: np.ndarray, labels_N: np.ndarray) -> Answers:
    """Answers of probabilities. Raises UsageError for what are no probabilities: a diverged training gives NaN, and
    NaN has no rank."""
    p_NK, y_N = _checked(probabilities_NK, labels_N)
    p_N1 = np.take_along_axis(p_NK, y_N[:, None], axis=1)
    before_NK = np.arange(p_NK.shape[1]) < y_N[:, None]
    rank_N = ((p_NK > p_N1) | ((p_NK == p_N1) & before_NK)).sum(axis=1)
    others_NK = np.where(np.arange(p_NK.shape[1]) == y_N[:, None], -np.inf, p_NK)
    p_N, best_N = p_N1[:, 0], others_NK.max(axis=1) if p_NK.shape[1] > 1 else 0.0
    entropy_N = -(p_NK * np.log(np.where(p_NK > 0, p_NK, 1.0))).sum(axis=1)
    return Answers(np.asarray(items_N, np.int64), y_N, rank_N, p_NK.argmax(axis=1), p_NK.max(axis=1), p_N,
                   p_N - best_N, entropy_N)


def scores_of(answers: Answers, n_classes: int) -> dict[str, float]:
    """`top1`, `top5` (1 where there are at most five classes), `ece` and `per_class`, the mean over the tested classes
    of their accuracies. Raises UsageError for no answers."""
    if not len(answers.item):
        raise UsageError("there is no answer to score: the test set has no image that can be used; check the test "
                         "section of the study (path, split, ids)")
    correct_N = answers.rank < 1
    return {"top1": float(correct_N.mean()), "top5": float((answers.rank < 5).mean()),
            "ece": calibration_error(answers.confidence, correct_N),
            "per_class": float(np.nanmean(class_accuracies(correct_N, answers.label, n_classes)))}


def calibration_error(confidence_N: np.ndarray, correct_N: np.ndarray, bins: int = ECE_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): mean over images of |accuracy - confidence| of their
    bin; `bins` equal bins of confidence, each open below and closed above."""
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_N, correct_N, bins) - np.bincount(bin_N, confidence_N, bins)
    return float(np.abs(gaps).sum() / len(confidence_N))


def class_accuracies(correct_N: np.ndarray, labels_N: np.ndarray, n_classes: int) -> np.ndarray:
    """float64 (K,): share of right answers among the images of each class, NaN for a class without images."""
    images_K = np.bincount(labels_N, minlength=n_classes)
    right_K = np.bincount(labels_N, np.asarray(correct_N, np.float64), n_classes)
    return np.divide(right_K, images_K, out=np.full(n_classes, np.nan), where=images_K > 0)


def restrict(logits_NK: np.ndarray, labels_N: np.ndarray, class_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(logits of the classes `class_ids`, labels as positions among them): a test set with fewer classes than the
    model has (ImageNet-R, ImageNet-A). Restrict logits, then take `softmax`: restricted probabilities sum to less
    than 1. Raises UsageError for class ids that do not ascend or do not exist, and for a label that is not among them.
    """
    ids, y_N = np.asarray(class_ids, np.int64), np.asarray(labels_N, np.int64)
    n_classes = logits_NK.shape[1]
    if not len(ids) or (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= n_classes:
        raise UsageError(f"class ids must ascend within 0..{n_classes - 1} without repeats; got {class_ids!r:.200}")
    if len(strange := np.setdiff1d(y_N, ids)):
        raise UsageError(f"label {strange[0]} is not among the {len(ids)} class ids the logits are restricted to; give "
                         "the labels in the numbering of the model's own classes")
    return logits_NK[:, ids], np.searchsorted(ids, y_N)


# --------------------------------------------------------------------------------------------------------------- groups


def weighted_mean(values: Sequence[float], counts: Sequence[int]) -> float:
    """Mean of group accuracies by their numbers of images (the "Avg." of Diff-Mix's Waterbird table)."""
    return float(np.average(values, weights=counts))


def group_accuracy(correct_N: np.ndarray, groups_N: Sequence[str] | np.ndarray) -> dict[str, Any]:
    """Accuracy inside each named group of test images: `groups` (name -> accuracy), `counts` (name -> images),
    `average` (by images), `mean` (of the groups) and `worst`. Raises UsageError where lengths differ."""
    names, group_N, counts = np.unique(np.asarray(groups_N, str), return_inverse=True, return_counts=True)
    if len(group_N) != len(correct_N) or not len(group_N):
        raise UsageError(f"{len(correct_N)} answers and {len(group_N)} groups; give one group for each test image")
    shares = class_accuracies(correct_N, group_N, len(names))
    return {"groups": dict(zip(names.tolist(), shares.tolist(), strict=True)),
            "counts": dict(zip(names.tolist(), counts.tolist(), strict=True)),
            "average": weighted_mean(shares.tolist(), counts.tolist()), "mean": float(shares.mean()),
            "worst": float(shares.min())}


def frequency_groups(answers: Answers, train_counts_K: Sequence[int] | np.ndarray,
                     thresholds: tuple[int, int] = CUB_LT) -> dict[str, float | None]:
    """`many`, `medium` and `few`: mean of per-class accuracies over classes with more than thresholds[1], between, and
    fewer than thresholds[0] real training images; None for a group without tested classes. `all` is plain top-1
    (Diff-Mix, table 2)."""
    low, high = thresholds
    counts_K = np.asarray(train_counts_K)
    correct_N = answers.rank < 1
    shares_K = class_accuracies(correct_N, answers.label, len(counts_K))
    found: dict[str, float | None] = {}
    for name, chosen_K in (("many", counts_K > high), ("medium", (counts_K >= low) & (counts_K <= high)),
                           ("few", counts_K < low)):
        tested = shares_K[chosen_K & ~np.isnan(shares_K)]
        found[name] = float(tested.mean()) if len(tested) else None
    return {**found, "all": float(np.mean(correct_N))}


# --------------------------------------------------------------------------------------------------------------- spread


class Summary(NamedTuple):
    """Of n values: `std` divides by n - `ddof`; `se`, the standard error of the mean, is always the sample standard
    deviation (ddof 1) over sqrt(n). Both are None where n is too small for them."""

    n: int
    mean: float
    std: float | None
    ddof: int
    se: float | None


def summarise(values: Sequence[float] | np.ndarray, ddof: int = 1) -> Summary:
    """Mean and spread over seeds. `ddof` 0 is the spread that Real-Fake's table 9 prints. Raises UsageError for no
    values."""
    x = np.asarray(values, np.float64)
    if not x.size:
        raise UsageError("there is no value to take a mean of; finish at least one trial")
    std = float(x.std(ddof=ddof)) if x.size > ddof else None
    return Summary(x.size, float(x.mean()), std, ddof, float(x.std(ddof=1) / x.size ** 0.5) if x.size > 1 else None)


def _checked(probabilities_NK: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p_NK, y_N = np.asarray(probabilities_NK, np.float64), np.asarray(labels_N, np.int64)
    if p_NK.ndim != 2 or y_N.shape != (len(p_NK),) or not len(p_NK):
        raise UsageError(f"probabilities of shape {p_NK.shape} and labels of shape {y_N.shape}; give one row of class "
                         "probabilities for each label, and at least one")
    if y_N.min() < 0 or y_N.max() >= p_NK.shape[1]:
        raise UsageError(f"labels reach from {y_N.min()} to {y_N.max()}, but there are {p_NK.shape[1]} classes")
    if not np.isfinite(p_NK).all():
        raise Diverged(f"{int((~np.isfinite(p_NK)).any(axis=1).sum())} of {len(p_NK)} rows are not finite: the "
                       "classifier diverged; lower its learning rate")
    if (p_NK < 0).any() or not np.allclose(p_NK.sum(axis=1), 1, atol=1e-3):
        raise UsageError("rows do not sum to 1, so they are no probabilities; give softmax(logits)")
    return p_NK, y_N
