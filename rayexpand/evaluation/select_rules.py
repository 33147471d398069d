"""Rules of the verb `select`: which samples of a run stay, decided from numbers known of every one of them.

    kind              keeps                                                              source
    clip_confidence   samples whose own class a guide finds likely enough                LECF; Real-Filtering (Diff-Mix)
    quantile          all but the worst share by a score                                 Diff-Mix, CLIP cleaning
    best              the best few of each seed, of each class, or of all                ours
    random            some of each seed, class, or of all, by a key                      the control of every other rule
    selective         copies in which a guide sees the seed's class, but is less sure    GIF, section 3.2
    near_copies       the first of samples that a guide cannot tell apart                ours
    seed_copies       samples that an audit does not call copies of a seed               ours

A rule sees the whole run at once and knows no file and no model. Equal scores are ordered by a key of the sample id, so
a decision depends on neither the order of files nor the number of processes.
"""

# N samples in the order of the plan, K classes, D features

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.settings import Section
from rayexpand.evaluation.copy_statistics import judged_by

CONFIDENCE, CONTRAST, ENTROPY, TOP = "clip_confidence", "clip_contrast", "clip_entropy", "clip_top"
FEATURES = "features"
ANCHOR, ANCHOR_ENTROPY = "anchor", "anchor_entropy"  # of the seed of a sample, as it is
BY_GUIDE = frozenset({CONFIDENCE, CONTRAST, ENTROPY, TOP, FEATURES, ANCHOR, ANCHOR_ENTROPY})
COPIES = {scope: f"copies_{scope}" for scope in ("own", "class", "all")}  # similarities that an audit found

KEPT, BELOW, WRONG, COPY, OVER, UNSCORED = range(6)
REASONS = ("", "below_threshold", "wrong_class", "near_copy", "not_chosen", "no_score")

Group = Literal["seed", "class", "all"]
_BLOCK = 1024  # rows of one matrix product when copies are looked for


@dataclass(frozen=True, eq=False)
class ScoredSamples:
    """What is known of the kept samples of a run, in the order of the plan."""

    sample_ids: Sequence[str]
    label: np.ndarray  # int (N,): the class a sample is to be
    seed: np.ndarray  # int (N,): position of its seed in the seed index
    seeds_K: np.ndarray  # int (K,): seeds of each class
    scores: dict[str, Any]  # float (N,), not a number where a sample has none; `features`: rows (N, D) of length 1,
    # an array or a FeatureFile

    def groups(self, per: Group) -> np.ndarray:
        return {"seed": self.seed, "class": self.label}.get(per, np.zeros(len(self.label), np.int64))


@dataclass(frozen=True, eq=False)
class Decision:
    code_N: np.ndarray  # int8: position in REASONS, 0 where kept
    score_N: np.ndarray  # float64: what was compared, not a number where nothing was
    facts: dict[str, Any] = field(default_factory=dict)  # thresholds that followed from the data


class Rule(Section, ABC):
    """One way to choose. `wants` names the scores it looks at."""

    kind: str

    def wants(self) -> frozenset[str]:
        return frozenset()

    @abstractmethod
    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision: ...


class ClipConfidence(Rule):
    """A sample stays if the softmax over all class prompts gives its own class at least `threshold`.

    LECF's paper gives no threshold. Real-Filtering keeps what is strictly likelier than chance, 1/K; where a count is
    wanted it takes as many at random from those, or the most confident ones of a class in which too few pass.
    """

    kind: Literal["clip_confidence"] = "clip_confidence"
    threshold: float | Literal["chance"] = Field("chance", description="probability a sample must reach, or chance: "
                                                 "1 / classes (Real-Filtering)")
    strict: bool | None = Field(None, description="whether it must be exceeded; null: for chance only (Real-Filtering)")
    per_class: int | None = Field(None, ge=1, description="samples wanted of each class (Real-Filtering); null: all "
                                  "that pass")

    def wants(self) -> frozenset[str]:
        return frozenset({CONFIDENCE})

    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision:
        score_N = rows.scores[CONFIDENCE]
        is_chance = self.threshold == "chance"
        least = 1 / len(rows.seeds_K) if self.threshold == "chance" else float(self.threshold)
        passes_N = score_N > least if (is_chance if self.strict is None else self.strict) else score_N >= least
        code_N = np.where(passes_N, KEPT, BELOW).astype(np.int8)
        if self.per_class is not None:
            key_N = rng.per_seed("random", rows.sample_ids)
            # Those that pass in random order, then the others from the most confident on.
            place_N = rank_in(rows.label, ~passes_N, np.where(passes_N, key_N, -score_N), key_N)
            code_N[place_N < self.per_class] = KEPT
            code_N[passes_N & (place_N >= self.per_class)] = OVER
        return _unscored(Decision(code_N, score_N, {"threshold": least}))


class Scored(Rule):
    """Rules that order samples by one score."""

    score: str = Field(min_length=1, description="a score of the run, such as energy_after, or clip_confidence, "
                       "clip_contrast or clip_entropy, which a guide gives")
    best: Literal["high", "low"] = Field("high", description="whether a high or a low score is good")

    @field_validator("score")
    @classmethod
    def _can_be_ordered(cls, score: str) -> str:
        if score in BY_GUIDE - {CONFIDENCE, CONTRAST, ENTROPY}:
            raise ValueError(f"{score} has no order; of what a guide gives use {CONFIDENCE}, {CONTRAST} or {ENTROPY}")
        return score

    def wants(self) -> frozenset[str]:
        return frozenset({self.score})

    def rising(self, rows: ScoredSamples) -> np.ndarray:
        """float64 (N,): the score, turned round where low is good."""
        return rows.scores[self.score] * (1.0 if self.best == "high" else -1.0)


class Quantile(Scored):
    """Drops the worst share. The threshold is the linearly interpolated quantile, and what equals it stays (Diff-Mix:
    one threshold for the whole set, which may take much from one class or strength and nothing from another)."""

    kind: Literal["quantile"] = "quantile"
    drop: float = Field(0.1, ge=0, lt=1, description="share to drop (Diff-Mix: 0.1)")
    within: Literal["all", "class"] = Field("all", description="one threshold for all samples (Diff-Mix), or for each "
                                            "class its own")
    floor: int = Field(0, ge=0, description="the best so many of each class always stay (ours; 0: none)")

    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision:
        rising_N, group_N = self.rising(rows), rows.groups(self.within)
        least_N = np.full(len(rising_N), np.nan)
        limits: dict[str, float] = {}
        for members in _members(group_N):
            scored = members[~np.isnan(rising_N[members])]
            if len(scored):
                least = float(np.quantile(rising_N[scored], self.drop))
                least_N[scored] = least
                limits[str(group_N[members[0]])] = least if self.best == "high" else -least
        code_N = np.where(rising_N >= least_N, KEPT, BELOW).astype(np.int8)
        if self.floor:
            place_N = rank_in(rows.label, -rising_N, rng.per_seed("ties", rows.sample_ids))
            code_N[place_N < self.floor] = KEPT
        facts: dict[str, Any] = {"threshold": limits.get("0")} if self.within == "all" else {"thresholds": limits}
        return _unscored(Decision(code_N, rows.scores[self.score], facts))


class Best(Scored):
    """The best `n` of each seed, of each class (a cap), or of all."""

    kind: Literal["best"] = "best"
    n: int | tuple[int, ...] = Field(description="samples that stay of each group; per class also a list, one number "
                                     "for each class")
    per: Group = Field("class", description="seed: of each seed's copies; class: over all copies of a class; all")

    @field_validator("n", mode="before")
    @classmethod
    def _are_amounts(cls, n: Any) -> Any:
        amounts, least = (n, 0) if isinstance(n, list | tuple) else ([n], 1)
        if not amounts or any(type(one) is not int or one < least for one in amounts):
            raise ValueError("must be a whole number from 1 on, or a list of whole numbers, one for each class")
        return n

    @model_validator(mode="after")
    def _of_classes(self) -> Best:
        if isinstance(self.n, tuple) and self.per != "class":
            raise ValueError("n: a list is of classes; set per: class, or give one number")
        return self

    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision:
        if isinstance(self.n, tuple) and len(self.n) != len(rows.seeds_K):
            raise UsageError(f"rule.n: has {len(self.n)} numbers for {len(rows.seeds_K)} classes; give one for each")
        most_N = np.array(self.n)[rows.label] if isinstance(self.n, tuple) else self.n
        place_N = rank_in(rows.groups(self.per), -self.rising(rows), rng.per_seed("ties", rows.sample_ids))
        code_N = np.where(place_N < most_N, KEPT, OVER).astype(np.int8)
        return _unscored(Decision(code_N, rows.scores[self.score]))


class Random(Rule):
    """Some of each group, whatever they look like. A smaller choice lies inside a larger one."""

    kind: Literal["random"] = "random"
    n: int | None = Field(None, ge=1, description="samples that stay of each group; give n or share")
    share: float | None = Field(None, gt=0, le=1, description="share of each group that stays, rounded")
    per: Group = Field("seed", description="seed, class, or all")

    @model_validator(mode="after")
    def _one_amount(self) -> Random:
        if (self.n is None) == (self.share is None):
            raise ValueError("needs either n or share")
        return self

    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision:
        group_N, key_N = rows.groups(self.per), rng.per_seed("random", rows.sample_ids)
        amount = np.full(len(group_N), self.n or 0) if self.share is None else np.rint(
            self.share * np.bincount(group_N))[group_N]
        return Decision(np.where(rank_in(group_N, key_N) < amount, KEPT, OVER).astype(np.int8), key_N)


class Selective(Rule):
    """Selective expansion: a copy passes if the guide's first class is the one it sees in the seed itself, and its
    entropy is above the seed's. `sample_wise` takes the first `n` of each seed that pass, in the order in which copies
    were made. `pooled` takes as many of the whole set as `n` for each seed would be, by entropy gain, whatever seed and
    class they come from (GIF's sample-agnostic selection, appendix B.1): it leaves seeds out and unbalances classes."""

    kind: Literal["selective"] = "selective"
    n: int = Field(ge=1, description="copies wanted of each seed")
    pool: Literal["sample_wise", "pooled"] = Field("sample_wise", description="sample_wise (GIF), or pooled over "
                                                   "the whole set (its ablation)")

    def wants(self) -> frozenset[str]:
        return frozenset({TOP, ENTROPY, ANCHOR, ANCHOR_ENTROPY})

    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision:
        gain_N = rows.scores[ENTROPY] - rows.scores[ANCHOR_ENTROPY]
        same_N = rows.scores[TOP] == rows.scores[ANCHOR]
        passes_N = same_N & (gain_N > 0)
        if self.pool == "sample_wise":
            place_N, allowed = rank_in(rows.seed, ~passes_N, np.arange(len(gain_N))), self.n
        else:
            place_N = rank_in(rows.groups("all"), ~passes_N, -gain_N, rng.per_seed("ties", rows.sample_ids))
            allowed = self.n * int(rows.seeds_K.sum())
        code_N = np.where(place_N < allowed, KEPT, OVER)
        code_N = np.where(passes_N, code_N, np.where(same_N, BELOW, WRONG)).astype(np.int8)
        return _unscored(Decision(code_N, gain_N))


class NearCopies(Rule):
    """Of samples whose guide features have a cosine above `threshold`, the first in the order of the plan stays. The
    score of a sample is its largest cosine with one that stayed before it."""

    kind: Literal["near_copies"] = "near_copies"
    threshold: float = Field(0.99, gt=-1, le=1, description="cosine above which two samples count as one (ours)")
    within: Literal["seed", "class"] = Field("class", description="which samples are compared: those of a class, or "
                                             "of a seed only")

    def wants(self) -> frozenset[str]:
        return frozenset({FEATURES})

    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision:
        h_ND, group_N = rows.scores[FEATURES], rows.groups(self.within)
        nearest_N, code_N = np.full(len(h_ND), np.nan), np.full(len(h_ND), KEPT, np.int8)
        for members in _members(group_N):
            nearest_N[members] = nearest_before(h_ND[members], self.threshold)
        code_N[nearest_N > self.threshold] = COPY
        return Decision(code_N, nearest_N)


class SeedCopies(Rule):
    """A sample stays unless its similarity to a seed, as an audit of the run found it, is above `threshold`. Where
    there is no such seed it stays too."""

    kind: Literal["seed_copies"] = "seed_copies"
    audit: str = Field("audit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of an audit of the run with "
                       "section copies")
    against: Literal["own", "class", "all"] = Field("all", description="own: the seed it was made from; class: the "
                                                    "nearest other seed of its class; all: the nearest other seed")
    threshold: Annotated[float, Field(ge=-1, le=1)] | Literal["calibrated"] = Field(
        "calibrated", description="similarity above which a sample is dropped, or calibrated: the audit's own tau_copy")

    def wants(self) -> frozenset[str]:
        return frozenset({COPIES[self.against]})

    def calibrated(self, found: Mapping[str, Any]) -> SeedCopies:
        """With the threshold of an audit's entry `copies`. Raises UsageError where that audit cannot see copies, or did
        not look there."""
        if self.against == "all" and found["within"] == "class":
            raise UsageError(f"rule.against: the audit {self.audit!r} compared samples with seeds of their class alone"
                             "; take class, or audit within: all")
        if self.threshold != "calibrated":
            return self
        if not found["sees_copies"]:
            raise UsageError(f"rule.audit: the audit {self.audit!r} knows no threshold, for {found['words']}. Or give "
                             "rule.threshold a number")
        if (scope := judged_by(self.against, found["tau_copy"])) not in found["tau_copy"]:
            raise UsageError(f"rule.against: the audit {self.audit!r} has no threshold of {scope}; it has "
                             f"{', '.join(found['tau_copy'])}")
        return self.model_copy(update={"threshold": found["tau_copy"][scope]})

    def decide(self, rows: ScoredSamples, rng: PlanRng) -> Decision:
        score_N = rows.scores[COPIES[self.against]]
        return Decision(np.where(score_N > self.threshold, COPY, KEPT).astype(np.int8), score_N,
                        {"threshold": self.threshold})


def nearest_before(h_ND: np.ndarray, threshold: float) -> np.ndarray:
    """float64 (N,): largest cosine of each row with an earlier one that stayed (is above `threshold` with none before
    it); not a number where there is none. Rows have length 1."""
    nearest_N, stayed = np.full(len(h_ND), -np.inf), np.zeros(len(h_ND), bool)
    for start in range(0, len(h_ND), _BLOCK):
        block = h_ND[start:start + _BLOCK]
        before = h_ND[:start][stayed[:start]]
        if len(before):
            nearest_N[start:start + len(block)] = (block @ before.T).max(axis=1)
        among = block @ block.T
        for i in range(len(block)):  # within a block one row after the other: each depends on who stayed
            mine = stayed[start:start + i]
            if mine.any():
                nearest_N[start + i] = max(nearest_N[start + i], among[i, :i][mine].max())
            stayed[start + i] = nearest_N[start + i] <= threshold
    return np.where(np.isneginf(nearest_N), np.nan, nearest_N)


def rank_in(group_N: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """int64 (N,): position of each row in its group, ordered by the first key, then the next; not a number comes
    last."""
    order = np.lexsort((*reversed(keys), group_N))
    ordered = group_N[order]
    rank_N = np.empty(len(order), np.int64)
    rank_N[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return rank_N


def _members(group_N: np.ndarray) -> list[np.ndarray]:
    """The rows of each group, in order."""
    order = np.argsort(group_N, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(group_N[order])) + 1) if len(order) else []


def _unscored(decision: Decision) -> Decision:
    """A sample without a score is never kept for it."""
    decision.code_N[np.isnan(decision.score_N)] = UNSCORED
    return decision


RULES: dict[str, type[Rule]] = {one.model_fields["kind"].default: one for one in (
    ClipConfidence, Quantile, Best, Random, Selective, NearCopies, SeedCopies)}
