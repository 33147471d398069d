"""Membership inference by likelihood ratios (LiRA: Carlini et al. 2022), as scores of numbers that are given.

    paper           here         meaning, unit
    S, N, Q         S, N, Q      shadows, audited examples, queries of each (the image, its flip)
    phi(x, y)       phi_SNQ      what a shadow says of an example: z_y - logsumexp of the other logits, natural log
    in, out         member_SN    whether the example is a member of the shadow
    mu_in, mu_out   mean_N       mean phi of an example over shadows that have it, that do not
    sigma           sd           of phi about the mean of its example; pooled: one number for all examples
    Lambda          score_SN     larger: rather a member

Each shadow is the target once, and all others are its shadows. Where the paper has thousands of scores to a Gaussian,
there are few here, which asks for two corrections. The variance is pooled *within* examples, with as many degrees of
freedom as scores less examples. And a target lacks its own score on the side to which it belongs, so that distances are
divided by sqrt(1 + 1/n), n scores behind a mean: without this, memberships that mean nothing give an AUC of 0.473 with
8 shadows and 0.492 with 16 (simulated). `reference` gives what the released code computes instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import logsumexp
from scipy.stats import norm

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import PlanRng

Variance = Literal["pooled", "per_example"]
PER_EXAMPLE_FROM = 32  # shadows; with fewer the TPR at FPR 0.1 % is a sixth of that of one variance for all, or less
_TINY = 1e-30


def log_odds(logits_BK: np.ndarray, labels_B: np.ndarray) -> np.ndarray:
    """float64 (B,): phi = log(p_y / (1 - p_y)), which does not saturate where p_y is 1 in floating point."""
    z_BK = np.array(logits_BK, np.float64)
    rows = np.arange(len(z_BK))
    own_B = z_BK[rows, labels_B]
    z_BK[rows, labels_B] = -np.inf
    return own_B - logsumexp(z_BK, axis=1)


def memberships(ids: Sequence[str], shadows: int, seed: int, labels: np.ndarray | None = None,
                stream: str = "members") -> np.ndarray:
    """bool (S, N): each example is a member of exactly half of the shadows. Keyed by its id, so that adding an image
    moves no other one.

    `labels`: with these, images of a class are paired, and each shadow has one of every pair, so that no shadow lacks a
    small class of two or more.
    """
    rng = PlanRng(seed, "membership")
    chance_SN = np.stack([rng.per_seed(f"{stream}/{shadow}", ids) for shadow in range(shadows)])
    member_SN = chance_SN.argsort(axis=0).argsort(axis=0) < shadows // 2
    if labels is None:
        return member_SN
    order = np.lexsort((rng.per_seed(f"{stream}/pairs", ids), labels))
    for label in np.unique(labels):
        first, second = (order[labels[order] == label][start::2] for start in (0, 1))
        member_SN[:, second] = ~member_SN[:, first[:len(second)]]
    return member_SN


class Gaussian(NamedTuple):
    """phi of each example on one side of the likelihood ratio."""

    mean_N: np.ndarray
    sd: np.ndarray | np.floating  # (N,), or one number
    width_N: np.ndarray  # sqrt(1 + 1/n)

    def z(self, x_N: np.ndarray) -> np.ndarray:
        return (x_N - self.mean_N) / (self.sd * self.width_N)


def lira(phi_SNQ: np.ndarray, member_SN: np.ndarray, *, online: bool = True, variance: Variance = "pooled",
         reference: bool = False) -> np.ndarray:
    """float64 (S, N): the likelihood ratio of every shadow as the target among the others.

    `online`: ln N(phi; in) - ln N(phi; out); else only shadows without the example are used, -ln P(out > phi).
    `reference`: medians for means, one standard deviation of all scores without subtracting the centre of each example,
    that of members for both sides, the two-sided density offline, and queries scored one by one (released code).
    Raises UsageError for fewer than four shadows.
    """
    if len(phi_SNQ) < 4:
        raise UsageError(f"{len(phi_SNQ)} shadows leave a side without two scores; audit with 4 or more")
    phi_SNQ = np.asarray(phi_SNQ, np.float64)
    if not reference:
        phi_SNQ = phi_SNQ.mean(axis=2, keepdims=True)
    score = _released if reference else _ratio
    others = ~np.eye(len(phi_SNQ), dtype=bool)
    return np.stack([np.mean([score(phi_SNQ[t, :, q], phi_SNQ[others[t], :, q], member_SN[others[t]], online, variance)
                              for q in range(phi_SNQ.shape[2])], axis=0) for t in range(len(phi_SNQ))])


def _ratio(x_N: np.ndarray, phi_SN: np.ndarray, member_SN: np.ndarray, online: bool, variance: Variance) -> np.ndarray:
    """Score of a target `x_N` by its shadows."""
    out = side(phi_SN, ~member_SN, variance)
    if not online:
        return -norm.logsf(out.z(x_N))
    own = side(phi_SN, member_SN, variance)
    return (out.z(x_N)**2 - own.z(x_N)**2) / 2 - np.log(own.sd / out.sd)


def _released(x_N: np.ndarray, phi_SN: np.ndarray, member_SN: np.ndarray, online: bool, variance: Variance
              ) -> np.ndarray:
    """The same as released with the paper (`ours_online`, `ours_offline`, `fix_variance`)."""
    own, out = (released_side(phi_SN, one, variance) for one in (member_SN, ~member_SN))
    if not online:
        return -norm.logpdf(x_N, out.mean_N, out.sd)
    return norm.logpdf(x_N, own.mean_N, own.sd) - norm.logpdf(
        x_N, out.mean_N, own.sd if variance == "pooled" else out.sd)


def side(phi_SN: np.ndarray, mask_SN: np.ndarray, variance: Variance) -> Gaussian:
    """phi of each example over the shadows of `mask_SN`, bool (S, N), at least one for each example."""
    n_N = mask_SN.sum(axis=0)
    mean_N = np.where(mask_SN, phi_SN, 0).sum(axis=0) / n_N
    squares_N = np.where(mask_SN, (phi_SN - mean_N)**2, 0).sum(axis=0)
    if variance == "pooled":
        sd = np.sqrt(squares_N.sum() / (n_N.sum() - len(n_N)))
    else:
        sd = np.sqrt(squares_N / np.maximum(n_N - 1, 1))
    return Gaussian(mean_N, sd + _TINY, np.sqrt(1 + 1 / n_N))


def released_side(phi_SN: np.ndarray, mask_SN: np.ndarray, variance: Variance) -> Gaussian:
    """`side` of the released code: its fixed variance does not subtract the centres of the examples."""
    chosen_SN = np.where(mask_SN, phi_SN, np.nan)
    sd = np.nanstd(chosen_SN, axis=None if variance == "pooled" else 0)
    return Gaussian(np.nanmedian(chosen_SN, axis=0), sd + _TINY, np.ones(phi_SN.shape[1]))
