"""Scores of a classifier against numbers worked out by hand and those of the papers' tables."""

from __future__ import annotations

import numpy as np
import pytest

from rayexpand.classifier.accuracy import (
    FLOWER_LT,
    Answers,
    answer,
    calibration_error,
    class_accuracies,
    frequency_groups,
    group_accuracy,
    restrict,
    scores_of,
    softmax,
    summarise,
    weighted_mean,
)
from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key

WATERBIRD = {"water on water": 642, "water on land": 642, "land on land": 2255, "land on water": 2255}


def scores(p_NK: np.ndarray, y_N: np.ndarray) -> dict[str, float]:
    return scores_of(answer(np.arange(len(y_N)), p_NK, y_N), p_NK.shape[1])


def answers(seed: int, shares: float | list[float], n: int) -> np.ndarray:
    rng = generator(row_key(seed, "test", "", 0, 0, "answers"))
    return np.stack([rng.random(n) < share for share in np.atleast_1d(shares)])


def test_ranks_classes_and_calibration_by_hand() -> None:
    p_NK = np.array([[.40, .20, .14, .10, .09, .07],    # label 0: rank 0
                     [.40, .20, .14, .10, .09, .07],    # label 4: rank 4, the last of the top five
                     [.40, .20, .14, .10, .09, .07],    # label 5: rank 5
                     [.02, .90, .02, .02, .02, .02]])   # label 1: rank 0
    found = scores(p_NK, np.array([0, 4, 5, 1]))

    assert found["top1"] == 0.5
    assert found["top5"] == 0.75
    assert found["per_class"] == 0.5, "classes 0 and 1 right, 4 and 5 wrong, 2 and 3 without images"
    # bin (.333, .4] holds three images: accuracy 1/3, confidence .4; bin (.867, .933] holds one: 1 against .9
    assert found["ece"] == pytest.approx(0.75 * (0.4 - 1 / 3) + 0.25 * 0.1)


def test_equal_probabilities_rank_as_argmax_does() -> None:
    p_NK = np.full((10, 10), 0.1)
    found = scores(p_NK, np.arange(10))

    assert found["top1"] == 0.1, "a model that knows nothing must not look perfect"
    assert found["top5"] == 0.5
    assert found["top1"] == (p_NK.argmax(axis=1) == np.arange(10)).mean()


def test_scores_agree_with_scikit_learn_and_torchmetrics() -> None:
    import torch
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = generator(row_key(3, "test", "", 0, 0, "scores"))
    p_NK, y_N = softmax(2 * rng.standard_normal((500, 12))), rng.integers(0, 12, 500)
    found = scores(p_NK, y_N)

    assert found["top1"] == top_k_accuracy_score(y_N, p_NK, k=1)
    assert found["top5"] == top_k_accuracy_score(y_N, p_NK, k=5)
    assert found["per_class"] == pytest.approx(balanced_accuracy_score(y_N, p_NK.argmax(axis=1)))
    reference = multiclass_calibration_error(torch.from_numpy(p_NK), torch.from_numpy(y_N), 12, n_bins=15)
    assert found["ece"] == pytest.approx(float(reference), abs=1e-6)


def test_calibration_counts_the_edges_of_bins() -> None:
    found = calibration_error(np.array([0.9, 0.5]), np.array([True, False]), bins=2)

    assert found == pytest.approx((0.1 + 0.5) / 2), "0.5 lies in the lower bin; in one bin they would give 0.2"
    assert calibration_error(np.array([1.0]), np.array([False])) == 1.0


@pytest.mark.parametrize(("p_NK", "labels", "words"), [
    ([[np.nan, 0.5]], [0], "diverged"),
    ([[2.0, 1.0]], [0], "softmax"),
    ([[1.5, -0.5]], [0], "softmax"),
    ([[0.5, 0.5]], [2], "2 classes"),
    ([[0.5, 0.5]], [0, 1], "one row"),
    (np.empty((0, 2)), [], "at least one"),
])
def test_refuses_what_are_no_probabilities(p_NK: list, labels: list, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        scores(np.array(p_NK), np.array(labels, int))


def test_a_worker_without_test_images_adds_nothing_and_no_answers_have_no_score() -> None:
    none, some = Answers.concatenate([]), answer(np.arange(2), np.eye(2), np.array([0, 1]))
    whole = Answers.concatenate([none, some, Answers.concatenate([])])

    assert all(len(value) == 0 for value in vars(none).values())
    for name, value in vars(whole).items():
        assert value.tolist() == getattr(some, name).tolist()
        assert value.dtype == getattr(none, name).dtype == getattr(some, name).dtype
    with pytest.raises(UsageError, match="no answer to score: the test set has no image"):
        scores_of(none, 2)


def test_softmax_of_large_logits() -> None:
    assert softmax(np.array([[1e4, 1e4 - np.log(3)]]))[0] == pytest.approx([0.75, 0.25])


def test_restricted_logits_of_real_fake() -> None:
    """Logits (5,1,4,3), ids (1,2,3), label 2: wrong among four classes, right (position 1) among three."""
    z_NK, y_N = np.array([[5.0, 1.0, 4.0, 3.0]]), np.array([2])
    z_NJ, position_N = restrict(z_NK, y_N, [1, 2, 3])

    assert scores(softmax(z_NK), y_N)["top1"] == 0
    assert position_N.tolist() == [1]
    assert z_NJ.tolist() == [[1.0, 4.0, 3.0]]
    assert scores(softmax(z_NJ), position_N)["top1"] == 1


@pytest.mark.parametrize(("ids", "words"), [([2, 1], "ascend"), ([1, 1, 2], "ascend"), ([2, 4], "ascend"),
                                           ([], "ascend"), ([0, 1], "label 2")])
def test_restrict_refuses(ids: list[int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        restrict(np.zeros((1, 4)), np.array([2]), ids)


@pytest.mark.parametrize(("accuracies", "printed"), [
    ([63.83, 63.24, 75.64, 74.36], 72.46),  # Diff-Mix, oracle 30 (the paper prints 72.47)
    ([59.50, 56.70, 73.48, 73.97], 70.26),  # baseline: 0.07 from the printed 70.19, as known
])
def test_waterbird_average_is_by_images(accuracies: list[float], printed: float) -> None:
    assert round(weighted_mean(accuracies, list(WATERBIRD.values())), 2) == printed
    assert round(float(np.mean([63.83, 63.24, 75.64, 74.36])), 2) == 69.27, "the plain mean is another number"


def test_group_accuracy_from_answers() -> None:
    right = {"water on water": 410, "water on land": 406, "land on land": 1706, "land on water": 1677}
    correct = np.concatenate([np.arange(n) < right[name] for name, n in WATERBIRD.items()])
    found = group_accuracy(correct, np.repeat(list(WATERBIRD), list(WATERBIRD.values())))

    assert found["counts"] == WATERBIRD
    assert found["groups"]["land on land"] == 1706 / 2255
    assert found["average"] == pytest.approx(4199 / 5794)
    assert found["mean"] == pytest.approx(np.mean([right[g] / n for g, n in WATERBIRD.items()]))
    assert found["worst"] == 406 / 642
    with pytest.raises(UsageError, match="one group for each"):
        group_accuracy(correct, ["a"])


@pytest.mark.parametrize(("thresholds", "expected"), [
    ((5, 20), {"many": 1.0, "medium": (0.5 + 0.0 + 1.0) / 3, "few": 0.25}),
    (FLOWER_LT, {"many": None, "medium": (1.0 + 0.5) / 2, "few": (0.0 + 1.0 + 0.25) / 3}),
])
def test_frequency_groups(thresholds: tuple[int, int], expected: dict) -> None:
    """Classes of 21, 20, 5, 6 and 4 training images, and one of 3 without test images: 20 and 5 are medium on CUB."""
    labels = np.repeat([0, 1, 2, 3, 4], [2, 2, 1, 1, 4])
    correct = np.array([1, 1, 1, 0, 0, 1, 1, 0, 0, 0], bool)
    said = Answers(np.arange(10), labels, (~correct).astype(int), np.where(correct, labels, 5),
                   *np.full((4, 10), 0.5))
    found = frequency_groups(said, [21, 20, 5, 6, 4, 3], thresholds)

    assert found == {**{name: pytest.approx(value) if value is not None else None
                        for name, value in expected.items()}, "all": 0.5}


def test_probability_margin_and_entropy_of_a_label() -> None:
    said = answer(np.arange(3), np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.0, 1.0, 0.0]]), np.array([0, 2, 1]))

    np.testing.assert_allclose(said.p_label, [0.5, 0.2, 1.0])
    np.testing.assert_allclose(said.margin, [0.2, -0.3, 1.0])
    np.testing.assert_allclose(said.entropy, [1.0296530140645737, 1.0296530140645737, 0.0], atol=1e-15)


def test_class_without_images_is_not_zero() -> None:
    assert np.isnan(class_accuracies(np.array([True]), np.array([1]), 3)).tolist() == [True, False, True]


def test_spread_of_real_fakes_table() -> None:
    """90.5, 91.2, 90.7 are printed as 90.8 +- 0.29: the population deviation; the sample deviation is 0.361."""
    printed, ours = summarise([90.5, 91.2, 90.7], ddof=0), summarise([90.5, 91.2, 90.7])

    assert printed.mean == pytest.approx(90.8)
    assert printed.std == pytest.approx(0.294, abs=5e-4)
    assert ours.std == pytest.approx(0.361, abs=5e-4)
    assert printed.se == ours.se == pytest.approx(0.361 / 3 ** 0.5, abs=5e-4)
    assert summarise([0.5]) == (1, 0.5, None, 1, None)
    with pytest.raises(UsageError, match="no value"):
        summarise([])
