"""Intervals, families and what a study can see, against numbers that were computed elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from rayexpand.classifier.statistics import (
    Noise,
    correlations,
    crossed,
    detectable,
    expected_maximum,
    holm,
    images_for,
    max_t,
    noise_of,
    resampled,
    seeds_for,
)
from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key

# Of an arm on an image in all seeds, and of a trial alone, beside the image's own difficulty 1: two trials disagree on
# a fifth of the images, for half of these in every seed; or on an eighth, by chance alone.
REPEATS, CHANCE = (0.5, 0.3), (0.0, 0.36)


def rng_of(number: int, what: str = "answers") -> np.random.Generator:
    return generator(row_key(number, "test", "", 0, 0, what))


def equal_arms(number: int, arms: int, seeds: int, images: int, seed_sd: float = 0.0,
               weights: tuple[float, float] = REPEATS) -> np.ndarray:
    """bool (A, S, N): right answers of arms that differ in nothing but chance; the difference of two arms varies by
    `seed_sd` over seeds."""
    rng = rng_of(number)
    hard_N, own_AN = rng.normal(size=images), rng.normal(size=(arms, 1, images))
    own, chance = weights
    score_ASN = hard_N + own * own_AN + chance * rng.normal(size=(arms, seeds, images))
    shift_AS1 = rng.normal(size=(arms, seeds, 1)) * seed_sd / 2 ** 0.5
    return score_ASN < norm.ppf(0.7 + shift_AS1) * (1 + own ** 2 + chance ** 2) ** 0.5


# ------------------------------------------------------------------------------------------------------- one difference


def test_the_crossed_interval_by_hand() -> None:
    found = crossed(np.array([[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]]))

    assert (found.mean, found.se, found.df) == pytest.approx((0.416667, 0.159571, 1.8615), abs=5e-6, rel=1e-4)
    low, high = found.interval()
    assert (low + high) / 2 == pytest.approx(found.mean)
    assert (low < 0 < high) == (found.p > 0.05), "an interval holds 0 where p is above 5 %"


def test_one_seed_is_images_alone_and_one_image_seeds_alone() -> None:
    d_N = rng_of(1).integers(-1, 2, 400)
    found = crossed(d_N)

    assert (found.se, found.df) == pytest.approx((d_N.std(ddof=1) / 20, 399))
    assert crossed(d_N[:, None]) == found
    with pytest.raises(UsageError, match="no interval"):
        crossed(np.ones((1, 1)))


def test_answers_that_never_differ_are_certain() -> None:
    assert (crossed(np.zeros((3, 9))).p, crossed(np.zeros((3, 9))).interval()) == (1.0, (0.0, 0.0))
    assert (crossed(np.ones((3, 9))).p, crossed(np.ones((3, 9))).interval()) == (0.0, (1.0, 1.0))


def test_the_interval_is_as_wide_as_what_varies() -> None:
    """Seeds that disagree: a t interval over seeds. Seeds that agree: one over images."""
    images = rng_of(2).integers(0, 2, 4000)
    agree = crossed(np.stack([images] * 3))
    disagree = crossed(np.stack([rng_of(n).random(4000) < share for n, share in enumerate((0.1, 0.3, 0.5))]))

    assert agree.se == pytest.approx(images.std(ddof=1) / 4000 ** 0.5)
    assert agree.df == pytest.approx(3999, rel=0.01)
    assert disagree.se == pytest.approx(0.2 / 3 ** 0.5, rel=0.1)
    assert disagree.df == pytest.approx(2, abs=0.1)


# --------------------------------------------------------------------------------------------------------- many of them


def test_holm_by_hand() -> None:
    assert holm([0.02, 0.001, 0.04, 0.012]) == pytest.approx([0.04, 0.004, 0.04, 0.036])
    assert holm([0.7, 0.9]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("correlation", "critical"), [(0.0, 2.39), (0.8, 2.26), (1.0, 1.96)])
def test_critical_values_of_three_comparisons(correlation: float, critical: float) -> None:
    r_CC = np.full((3, 3), correlation) + (1 - correlation) * np.eye(3)
    p = [0.004, 0.03, 0.5]
    adjusted, level = max_t(p, r_CC)

    assert norm.isf((1 - level) / 2) == pytest.approx(critical, abs=0.01)
    assert p <= adjusted <= holm(p)
    assert adjusted[2] == pytest.approx(0.5), "the last one stands alone"


def test_one_comparison_is_not_adjusted() -> None:
    adjusted, level = max_t([0.03], np.eye(1))
    assert (adjusted, level) == ([0.03], pytest.approx(0.95))


def test_resamples_have_the_error_of_the_interval_and_go_together() -> None:
    """Two arms against one baseline that changes its mind: what is common to them is found."""
    correct = equal_arms(3, 3, 10, 1000)
    found_DA = resampled(correct, 4000)
    d_DC = found_DA[:, 1:] - found_DA[:, :1]
    one = crossed(correct[1].astype(int) - correct[0])

    assert found_DA.mean(axis=0) == pytest.approx(correct.mean(axis=(1, 2)), abs=0.002)
    assert d_DC[:, 0].std() == pytest.approx(one.se, rel=0.25)
    assert correlations(d_DC)[0, 1] == pytest.approx(0.5, abs=0.12)
    assert correlations(np.zeros((9, 2))).tolist() == [[1, 0], [0, 1]]
    assert np.array_equal(found_DA, resampled(correct, 4000))
    assert not np.array_equal(found_DA, resampled(correct, 4000, seed=1))


@pytest.mark.parametrize(("count", "above"), [(3, 0.85), (5, 1.18), (10, 1.54), (20, 1.86), (30, 2.05), (100, 2.50)])
def test_the_best_of_equal_ones_looks_better(count: int, above: float) -> None:
    assert expected_maximum(count) == pytest.approx(above, abs=0.02)


# ------------------------------------------------------------------------------------------------- what a study can see


@pytest.mark.parametrize(("images", "disagree", "points"), [
    (500, 0.12, ((3.7, 3.7, 3.9), (3.4, 3.4, 3.5), (3.2, 3.2, 3.3))),
    (2000, 0.15, ((2.0, 2.1, 2.4), (1.9, 1.9, 2.1), (1.8, 1.8, 1.9))),
    (10_000, 0.20, ((1.1, 1.2, 1.7), (1.0, 1.1, 1.3), (0.9, 1.0, 1.1))),
    (50_000, 0.15, ((0.4, 0.8, 1.7), (0.4, 0.6, 1.0), (0.4, 0.5, 0.7)))])
def test_the_smallest_difference_that_is_seen(images: int, disagree: float, points: tuple[tuple[float, ...]]) -> None:
    for seeds, line in zip((3, 5, 10), points, strict=True):
        found = [100 * detectable(Noise(disagree, 0.5, sd), images, seeds) for sd in (0.0, 0.003, 0.006)]
        assert found == pytest.approx(line, abs=0.051), seeds


@pytest.mark.parametrize(("images", "seed_sd", "seeds"), [
    (10_000, 0.003, 8), (10_000, 0.006, 18), (50_000, 0.003, 3), (50_000, 0.006, 6), (2000, 0.003, None)])
def test_seeds_for_one_point(images: int, seed_sd: float, seeds: int | None) -> None:
    noise = Noise(seed_sd=seed_sd)
    assert seeds_for(0.01, noise, images) == seeds
    assert seeds is None or (found := images_for(0.01, noise, seeds)) is None or found <= images
    assert images_for(0.001, Noise(seed_sd=0.1), 3) is None


def test_parts_are_found_again() -> None:
    pairs = [equal_arms(n, 2, 10, 2000, seed_sd=0.02).astype(int) for n in range(12)]
    found = noise_of([pair[0] - pair[1] for pair in pairs])

    assert found.disagree == pytest.approx(np.mean([(pair[0] != pair[1]).mean() for pair in pairs]), abs=0.01)
    assert found.repeats == pytest.approx(0.5, abs=0.1)
    assert found.seed_sd == pytest.approx(0.02, abs=0.004)


# ------------------------------------------------------------------------------------------------------------ simulated


def covered(seeds: int, seed_sd: float, weights: tuple[float, float], repetitions: int,
            images: int = 2000) -> tuple[float, float, float, float]:
    """Shares of 95 % intervals that hold the true difference 0, and their mean widths in points: joint bootstrap,
    crossed t."""
    held, width = np.zeros(2), np.zeros(2)
    for number in range(repetitions):
        a, b = equal_arms(number, 2, seeds, images, seed_sd, weights)
        means_DA = resampled(np.stack([a, b]), 1000, seed=number)
        for n, (low, high) in enumerate((np.quantile(means_DA[:, 0] - means_DA[:, 1], (0.025, 0.975)),
                                         crossed(a.astype(int) - b).interval())):
            held[n] += low <= 0 <= high
            width[n] += 100 * (high - low)
    return (*(held / repetitions), *(width / repetitions))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = sum(low <= 0 <= high for low, high in (
        crossed(a.astype(int) - b).interval() for a, b in (equal_arms(n, 2, 3, 300, 0.02) for n in range(300))))
    assert 0.92 <= held / 300 <= 0.995


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("weights", [REPEATS, CHANCE], ids=["half repeats", "chance alone"])
def test_coverage_over_images_and_seeds(weights: tuple[float, float], seeds: int) -> None:
    """The table of coverage: `python -m pytest -m slow -s tests/classifier/test_statistics.py -k coverage`."""
    for seed_sd in (0.0, 0.003, 0.01, 0.014):
        found = covered(seeds, seed_sd, weights, 400)
        print("{} S {} sd {:.1f}: bootstrap {:.3f}, crossed t {:.3f}; widths {:.1f} {:.1f}".format(
            weights, seeds, 100 * seed_sd, *found))
        assert found[1] >= 0.95 - 2 * (0.95 * 0.05 / 400) ** 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_family_of_equal_arms_is_wrong_in_one_of_twenty() -> None:
    """1,000 sets of six equal arms against one baseline:
    `python -m pytest -m slow -s tests/classifier/test_statistics.py -k family`."""
    sets = 1000
    for seeds, seed_sd in ((3, 0.0), (3, 0.01), (5, 0.003)):
        wrong = np.zeros(4)
        for number in range(sets):
            correct = equal_arms(number, 7, seeds, 500, seed_sd)
            p = [crossed(correct[arm].astype(int) - correct[0]).p for arm in range(1, 7)]
            means_DA = resampled(correct, 500, seed=number)
            adjusted, level = max_t(p, correlations(means_DA[:, 1:] - means_DA[:, :1]), seed=number)
            wrong += [min(p) < 0.05, min(holm(p)) < 0.05, min(adjusted) < 0.05, min(p) < 1 - level]
        shares = wrong / sets
        print(f"S {seeds} sd {100 * seed_sd:.1f}: some raw p < 5 % in {100 * shares[0]:.1f} %, Holm "
              f"{100 * shares[1]:.1f} %, max-t {100 * shares[2]:.1f} %, intervals {100 * shares[3]:.1f} %")
        assert shares[2:].max() <= 0.05 + 2 * (0.05 * 0.95 / sets) ** 0.5
