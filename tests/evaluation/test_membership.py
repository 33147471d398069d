"""LiRA: memberships, likelihood ratios, and what they are worth by the number of shadows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation.membership import Variance, lira, log_odds, memberships, released_side, side
from rayexpand.evaluation.roc import ranked

IDS = [f"image/{n}" for n in range(200)]


def chance(name: str) -> np.random.Generator:
    return generator(row_key(0, "test", name, 0, 0, "phi"))


# phi -----------------------------------------------------------------------------------------------------------------


def test_phi_is_the_log_odds_of_the_true_class() -> None:
    logits = np.array([[2.0, 1.0, -1.0], [0.0, 3.0, 0.5]])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    assert log_odds(logits, np.array([0, 2])) == pytest.approx([np.log(p[0, 0] / (1 - p[0, 0])),
                                                                np.log(p[1, 2] / (1 - p[1, 2]))])


def test_phi_does_not_saturate_where_the_probability_is_one() -> None:
    assert expit(60.0) == 1.0
    assert log_odds(np.array([[60.0, 0.0]], np.float32), np.array([0])) == pytest.approx([60.0])


# memberships ---------------------------------------------------------------------------------------------------------


def test_every_example_is_in_exactly_half_of_the_shadows_and_shadows_differ_in_size() -> None:
    member_SN = memberships(IDS, 8, 0)

    assert (member_SN.sum(axis=0) == 4).all()
    assert len(set(member_SN.sum(axis=1))) > 1
    assert abs(member_SN.mean() - 0.5) < 1e-12


def test_memberships_are_keyed_by_the_image() -> None:
    more = memberships(["new", *IDS], 8, 0)

    assert (more[:, 1:] == memberships(IDS, 8, 0)).all()
    assert (memberships(IDS, 8, 1) != memberships(IDS, 8, 0)).any()


def test_stratified_memberships_halve_every_class_in_every_shadow() -> None:
    labels = np.arange(200) % 40  # five images of each class
    member_SN = memberships(IDS, 8, 0, labels)

    held = np.stack([np.bincount(labels[row], minlength=40) for row in member_SN])
    assert held.min() == 2
    assert held.max() == 3
    assert (member_SN.sum(axis=0) == 4).all()
    plain = memberships(IDS, 8, 0)
    assert np.stack([np.bincount(labels[row], minlength=40) for row in plain]).min() == 0


# likelihood ratios ---------------------------------------------------------------------------------------------------

TOY = np.array([[3.0, 13.0], [5.0, 15.0]])  # two scores of two examples


def test_the_pooled_variance_is_within_examples() -> None:
    found = side(TOY, np.ones_like(TOY, bool), "pooled")

    assert found.mean_N.tolist() == [4, 14]
    assert found.sd**2 == pytest.approx(2.0)  # 4 over four scores less two examples
    assert found.sd * np.sqrt((4 - 2) / 4) == pytest.approx(1.0)  # of the scores themselves


def test_the_released_variance_counts_the_distance_between_examples() -> None:
    found = released_side(TOY, np.ones_like(TOY, bool), "pooled")

    assert found.sd == pytest.approx(5.0990, abs=1e-4)


def test_the_released_code_takes_medians() -> None:
    phi = np.array([[0.0], [1.0], [8.0]])

    assert released_side(phi, np.ones_like(phi, bool), "pooled").mean_N.tolist() == [1]
    assert side(phi, np.ones_like(phi, bool), "pooled").mean_N.tolist() == [3]


def simulated(shadows: int, shape: float | None, examples: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """phi and memberships: unit noise about a centre for each example, members higher by a Gamma of mean 1."""
    member_SN = memberships([str(n) for n in range(examples)], shadows, 0)
    rng = chance(f"{shadows}/{shape}")
    phi_SN = rng.standard_normal((shadows, examples)) + rng.normal(0, 3, examples)
    if shape is not None:
        phi_SN = phi_SN + member_SN * rng.gamma(shape, 1 / shape, examples)
    return phi_SN[:, :, None], member_SN


def auc_and_tpr(scores: np.ndarray, member_SN: np.ndarray) -> tuple[float, float]:
    curve = ranked(scores.ravel(), member_SN.ravel()).curve()
    return curve.auc(), float(curve.tpr[curve.at(0.001)])


def test_the_online_score_is_the_ratio_of_two_normals() -> None:
    phi, member = simulated(8, 2.0, 30)
    target, others = phi[0, :, 0], phi[1:, :, 0]
    own, out = side(others, member[1:], "pooled"), side(others, ~member[1:], "pooled")
    ratio = norm.logpdf(target, own.mean_N, own.sd * own.width_N) - norm.logpdf(target, out.mean_N,
                                                                               out.sd * out.width_N)

    assert lira(phi, member)[0] == pytest.approx(ratio + np.log(own.width_N / out.width_N))


def test_the_offline_score_is_one_sided_and_does_not_saturate() -> None:
    phi, member = simulated(8, 2.0, 30)
    phi[0, 0], phi[0, 1] = 500.0, -500.0
    scores = lira(phi, member, online=False)[0]
    two_sided = lira(phi, member, online=False, reference=True)[0]

    assert np.isfinite(scores).all()
    assert scores.argmax() == 0
    assert scores.argmin() == 1
    assert set(np.argsort(two_sided)[-2:]) == {0, 1}  # the released density calls both members


def test_queries_are_averaged_before_the_ratio() -> None:
    phi, member = simulated(8, 2.0, 30)
    both = np.concatenate([phi + 1, phi - 1], axis=2)

    assert lira(both, member) == pytest.approx(lira(phi, member))


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("shadows", [4, 8])
def test_memberships_that_mean_nothing_give_half(shadows: int, online: bool) -> None:
    phi, member = simulated(shadows, None)
    auc, _ = auc_and_tpr(lira(phi, member, online=online), member)

    assert auc == pytest.approx(0.5, abs=0.012)
    if online:  # without the correction for the target's own score
        plain = auc_and_tpr(lira(phi, member, reference=True), member)[0]
        assert plain < 0.485


def test_fewer_than_four_shadows_are_refused() -> None:
    with pytest.raises(UsageError, match="4 or more"):
        lira(np.zeros((2, 3, 1)), np.zeros((2, 3), bool))


@pytest.mark.slow
@pytest.mark.parametrize(("shadows", "online", "variance", "published"), [
    (8, True, "per_example", .000), (8, True, "pooled", .032), (8, False, "per_example", .001),
    (8, False, "pooled", .033), (16, True, "per_example", .007), (16, True, "pooled", .048),
    (16, False, "per_example", .010), (16, False, "pooled", .038), (32, True, "per_example", .031),
    (32, True, "pooled", .062), (64, True, "per_example", .046), (64, True, "pooled", .065),
    (64, False, "per_example", .035), (64, False, "pooled", .045)])
def test_hits_by_shadows_and_variance(shadows: int, online: bool, variance: Variance, published: float) -> None:
    """TPR at FPR 0.1 % of 4,000 examples, members shifted by a Gamma of mean 1 and shape 2."""
    phi, member = simulated(shadows, 2.0)
    _, tpr = auc_and_tpr(lira(phi, member, online=online, variance=variance), member)

    assert tpr == pytest.approx(published, rel=0.35, abs=0.004)


@pytest.mark.slow
def test_one_threshold_for_all_examples_is_far_weaker() -> None:
    phi, member = simulated(16, 2.0)

    assert auc_and_tpr(phi[:, :, 0], member)[1] < 0.01
    assert auc_and_tpr(lira(phi, member), member)[1] > 0.04
