"""The two ways methods count copies of a seed."""

from __future__ import annotations

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex

MAX_COPIES = np.iinfo(np.uint16).max


def ratio_copies(index: SeedIndex, ratio: float, rng: PlanRng, *, down: bool = False) -> np.ndarray:
    """uint16[n]: `ratio` copies of every seed. A fraction f adds one copy to round(f * n_c) seeds of each class c, to
    floor(f * n_c) with `down`.

    The chosen seeds of a smaller fraction are chosen for every larger one too, so 2.3x lies inside 2.5x inside 3x.
    """
    if not 0 < ratio <= MAX_COPIES:
        raise UsageError(f"copies per seed must be in (0, {MAX_COPIES}], got {ratio}")
    whole = int(ratio)
    copies = np.full(len(index), whole, np.uint16)
    if fraction := ratio - whole:
        rank = rank_in_class(index.labels, rng.per_seed("copies", index.seed_ids))
        counts = np.bincount(index.labels, minlength=len(index.classes))
        more = np.floor(fraction * counts + 1e-6) if down else np.rint(fraction * counts)
        copies += (rank < more[index.labels]).astype(np.uint16)
    return copies


def quota_copies(index: SeedIndex, quota: np.ndarray, rng: PlanRng) -> np.ndarray:
    """uint16[n]: exactly `quota[c]` copies for class c, spread evenly over its seeds; the remainder goes to seeds in
    a random order. Raises UsageError when a class with a quota has no seeds."""
    counts = np.bincount(index.labels, minlength=len(index.classes))
    empty = [index.classes.display[c] for c in np.flatnonzero((counts == 0) & (quota > 0))]
    if empty:
        raise UsageError(f"classes without seeds cannot be given copies: {', '.join(empty)}")
    each, rest = np.divmod(quota, np.maximum(counts, 1))
    rank = rank_in_class(index.labels, rng.per_seed("copies", index.seed_ids))
    copies = each[index.labels] + (rank < rest[index.labels])
    if copies.max(initial=0) > MAX_COPIES:
        raise UsageError(f"at most {MAX_COPIES} copies of one seed can be planned, got {copies.max()}")
    return copies.astype(np.uint16)


def rank_in_class(labels: np.ndarray, key: np.ndarray) -> np.ndarray:
    """int64[n]: position of each seed among the seeds of its class, ordered by `key`."""
    order = np.lexsort((key, labels))
    first = np.searchsorted(labels[order], labels[order], side="left")
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first
    return rank
