"""Neighbours, diversity and alignment of sets that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rayexpand.contract.errors import UsageError
from rayexpand.evaluation.diversity import alignment, vendi
from rayexpand.evaluation.neighbours import authenticity, cover, density_coverage, precision_recall
from tests.evaluation.test_distance import normals


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None]


@pytest.mark.parametrize(("samples", "reference", "expected"), [
    # radius 1 around 0 1 2 3; of the samples .5 is in two balls, 4 is on the edge of one, 9 and 10 in none
    (column(0.5, 4, 9, 10), column(0, 1, 2, 3), {"precision": 2 / 4, "density": 3 / 4, "coverage": 3 / 4}),
    # radii of these samples: 3.5, 3.5, 1, 1 -> [-3, 4], [.5, 7.5], [8, 10], [9, 11]
    (column(0.5, 4, 9, 10), column(0, 1, 2, 30), {"recall": 3 / 4}),
    # a sample set that collapsed on one mode: all inside, most of the reference not covered
    (column(0, 0.1, 0.2, 0.3), column(0, 1, 2, 3), {"precision": 1.0, "recall": 1 / 4, "coverage": 2 / 4}),
    # far apart
    (column(100, 101, 102), column(0, 1, 2), {"precision": 0.0, "recall": 0.0, "density": 0.0, "coverage": 0.0}),
    # the same set
    (column(0, 1, 2, 3), column(0, 1, 2, 3), {"precision": 1.0, "recall": 1.0, "density": 10 / 4, "coverage": 1.0}),
])
def test_neighbours_counted_by_hand(samples: np.ndarray, reference: np.ndarray, expected: dict[str, float]) -> None:
    found = dict(zip(("precision", "recall"), precision_recall(samples, reference, k=1), strict=True))
    found |= dict(zip(("density", "coverage"), density_coverage(samples, reference, k=1), strict=True))

    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_an_outlier_in_the_reference_costs_density_less_than_precision() -> None:
    """Naeem et al., figure 2: one far reference image makes a huge ball that hides wrong samples from precision."""
    reference = np.concatenate([normals(200, 2), np.array([[40.0, 0.0]])])
    wrong = np.array([20.0, 0.0]) + normals(200, 2, 1)

    assert precision_recall(wrong, reference)[0] == 1.0
    assert density_coverage(wrong, reference)[0] <= 0.2


def test_equal_distributions_reach_their_expectation() -> None:
    """Naeem et al., lemma 2: coverage of equal distributions is 1 - (M-1)...(M-k) / ((N+M-1)...(N+M-k)), density 1."""
    n, k = 400, 5
    found = np.mean([density_coverage(normals(n, 5, 2 * i), normals(n, 5, 2 * i + 1)) for i in range(5)], axis=0)
    expected = 1 - np.prod([(n - j) / (2 * n - j) for j in range(1, k + 1)])

    assert found[0] == pytest.approx(1, abs=0.1)
    assert found[1] == pytest.approx(expected, abs=0.02)


def test_copies_are_inside_balls_of_radius_zero() -> None:
    """A set that repeats each image has balls of radius 0, and inner products in float64 round."""
    reference = 1000 + 300 * normals(60, 64)

    assert precision_recall(np.repeat(reference, 5, axis=0), reference) == (1.0, 1.0)


def test_the_oracle_of_the_specification() -> None:
    reals, samples = column(0, 1, 2, 3), column(0.5, 5)

    assert precision_recall(samples, reals, k=1) == (0.5, 1.0)
    assert density_coverage(samples, reals, k=1) == (1.0, 0.5)
    with pytest.raises(UsageError, match="nearest neighbour number 3"):
        precision_recall(normals(3, 3), normals(3, 3))


def test_authenticity() -> None:
    assert authenticity(column(0.4, 2.5, 9), column(0, 1, 5)) == pytest.approx(1 / 3)
    assert authenticity(column(0, 1, 5), column(0, 1, 5)) == 0.0
    assert authenticity(1000 + 300 * np.repeat(normals(9, 64), 2, axis=0), 1000 + 300 * normals(9, 64)) == 0.0


@pytest.mark.parametrize(("training", "expected"), [
    ((0, 2), (8, 0.125, 2.25)), ((0, 2, 9), (1, 1, 0.5)), ((0, 0, 2, 2, 2), (8, 0.125, 2.25)),
    ((0, 1, 2, 10), (0, None, 0))])
def test_cover_by_hand(training: tuple[float, ...], expected: tuple[float, float | None, float]) -> None:
    found = cover(column(0, 1, 2, 10), column(*training))

    assert (found["delta"], found["div"], found["mean"]) == expected
    assert (found["q50"], found["q95"]) == tuple(np.quantile(
        np.abs(column(0, 1, 2, 10) - np.array(training)).min(axis=1), (0.5, 0.95)))


def test_more_images_never_cover_worse_and_copies_change_nothing() -> None:
    for key in range(20):
        s, e = normals(40, 6, 3 * key), normals(30, 6, 3 * key + 1)
        before = cover(s, e)
        more = cover(s, np.concatenate([e, normals(9, 6, 3 * key + 2)]))
        assert all(more[name] <= before[name] + 1e-9 for name in ("delta", "q50", "q95", "mean"))  # type: ignore
        again = cover(s, np.concatenate([e, e[:7], e[:7]]))
        assert [again[name] for name in again] == pytest.approx([before[name] for name in again], abs=1e-9)


# ----------------------------------------------------------------------------------------------- diversity, alignment


@pytest.mark.parametrize(("rows", "expected"), [
    (np.repeat([[3.0, 4.0]], 7, axis=0), 1.0), (np.eye(6), 6.0), (np.eye(6)[:, :6].repeat(3, axis=0), 6.0),
    (np.array([[1.0, 0], [2, 0], [3, 0], [0, 1]]), 1.754765)])
def test_vendi_by_hand(rows: np.ndarray, expected: float) -> None:
    assert vendi(rows) == pytest.approx(expected, abs=1e-6)


def test_vendi_is_the_same_by_rows_and_by_features() -> None:
    x = normals(40, 40)

    assert vendi(x[:, :39]) == pytest.approx(vendi(np.pad(x[:, :39], ((0, 0), (0, 60)))), rel=1e-9)
    assert vendi(x) < 40


def test_a_collapse_that_cmmd_hardly_sees() -> None:
    """1500 samples of 25 different images: the distance of means is small, the diversity falls to below 25."""
    x = normals(25, 200)[np.arange(1500) % 25]

    assert vendi(x) < 25 < 100 < vendi(normals(1500, 200, 1))


def test_alignment_by_hand() -> None:
    """cos 0.31 gives 31.0 and 0.775; one below 0 counts as 0; ties go to the first class."""
    texts = np.eye(3)[:2]
    near = np.array([[0.31, 0.2, np.sqrt(1 - 0.31 ** 2 - 0.2 ** 2)]])

    assert alignment(near, np.array([0]), texts) == pytest.approx({"clip_score": 31.0, "clip_s": 0.775, "clip_top1": 1})
    both = alignment(np.concatenate([5 * near, [[-1.0, 0, 0]]]), np.array([0, 0]), texts)
    assert both == pytest.approx({"clip_score": 15.5, "clip_s": 0.3875, "clip_top1": 0.5})
