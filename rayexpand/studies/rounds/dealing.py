"""Who gets the samples of a round: integers that follow from the decisions before and from scores.

    symbol   here      meaning
    T        planned   copies that the method plans in all: the budget
    b_r      parts     rows of round r, by largest remainder of the shares
    m_i      base_N    copies that the method plans for seed i
    f_i      first_N   copies that seed i has from earlier rounds
    w_i      weight_N  what round r is dealt by

Rules without scores (uniform, equal) say what a run in one go would give each seed, and each round deals what is still
owed of that: after the last one every seed has exactly its copies of the run in one go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.runs.allocation import READS, Allocate, allocated, deal, weights_of
from rayexpand.studies.rounds.config import RoundsConfig


def parts_of(rounds: RoundsConfig, planned: int) -> list[int]:
    """Rows of each round; more than `count` of them where shares are left unspent."""
    shares = np.array(rounds.shares or [1.0] * rounds.count)
    return deal(shares, planned, np.arange(len(shares)), None, np.full(len(shares), planned)).tolist()


def weigh(rounds: RoundsConfig, index: SeedIndex, base_N: np.ndarray, first_N: np.ndarray, rng: PlanRng,
          scores: pa.Table | None) -> np.ndarray:
    """float64 (N,): what a round is dealt by. `scores`: seed_id and the columns of the rule, None in round 1."""
    allocate = allocate_of(rounds, scored=scores is not None)
    weight_N = weights_of(allocate, index, base_N, rng, scores)
    if READS[rounds.rule]:
        return weight_N
    return allocated(allocate, index, base_N, weight_N, rng).astype(np.float64) - first_N


def deal_round(rounds: RoundsConfig, index: SeedIndex, base_N: np.ndarray, first_N: np.ndarray, weight_N: np.ndarray,
               rows: int, rng: PlanRng, *, scored: bool) -> np.ndarray:
    """uint16 (N,): copies of each seed in a round of `rows`."""
    if READS[rounds.rule]:
        return allocated(allocate_of(rounds, scored=scored), index, base_N, weight_N, rng, rows, first_N)
    key_N = rng.per_seed("allocate", index.seed_ids)
    return deal(weight_N, rows, key_N, None, weight_N.astype(np.int64)).astype(np.uint16)


def allocate_of(rounds: RoundsConfig, *, scored: bool) -> Allocate:
    """Round 1 of a rule that reads scores is uniform."""
    allocate = rounds.allocate
    if not READS[rounds.rule] or scored:
        return allocate
    return Allocate(rule="uniform", cap=allocate.cap)


def room_problem(rounds: RoundsConfig, base_N: np.ndarray, parts: Sequence[int]) -> str:
    """Why the rounds cannot be dealt, "" where they can."""
    planned, able = int(base_N.sum(dtype=np.int64)), int(np.count_nonzero(base_N))
    if empty := [number for number, rows in enumerate(parts[:rounds.count], 1) if not rows]:
        field = "count" if rounds.shares is None else "shares"
        return (f"rounds.{field}: round {empty[0]} would have no sample of {planned:,}; raise the method's ratio, or "
                "make fewer rounds")
    if rounds.cap is not None and rounds.cap * able < planned:
        return (f"rounds.cap: {able:,} seeds with at most {rounds.cap:,} samples each leave no room for {planned:,}; "
                "raise it, or lower the method's ratio")
    return ""
