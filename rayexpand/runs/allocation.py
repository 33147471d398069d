"""Copies dealt out by weights: which seeds of a run get how many.

    symbol   here     meaning
    T        total    copies in all
    w_i      weight   copies of seed i that the method plans, times the weight that a rule gives the seed
    q_i      q        rint(2^20 w_i / max w), an integer; all 1 where all weights are 0
    F        floor    copies that each class gets before weights count
    p_i      p_label  probability that a classifier gives the label of seed i, which it was not trained on
    e_c, n_c          (wrong_c + 1) / (n_c + 2): smoothed error of class c with n_c scored seeds

Dealing is integer arithmetic, so `verify` repeats it on any machine from the weights in the plan. Weights may come from
logarithms, which differ in the last digit between machines; that is why they are in the plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from rayexpand.contract.errors import DamagedFile, EnvironmentFault, SeedDataError, UsageError, few
from rayexpand.contract.protocols import Method
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.data.seeds.places import read_bytes
from rayexpand.methods._copies import MAX_COPIES, rank_in_class
from rayexpand.storage.tables import table_of

Rule = Literal["uniform", "equal", "weight", "loss", "confidence", "entropy", "margin", "slow", "class"]

READS: Mapping[Rule, tuple[str, ...]] = {  # columns of the scores that a rule needs
    "uniform": (), "equal": (), "weight": ("weight",), "loss": ("p_label",), "confidence": ("p_label",),
    "entropy": ("entropy",), "margin": ("margin",), "slow": ("speed", "p_label"), "class": ("margin",)}
RANGES = {"weight": (0.0, 1e100), "p_label": (0.0, 1.0), "entropy": (0.0, np.inf), "margin": (-1.0, 1.0),
          "speed": (0.0, 1.0)}
SHARES = ("margin", "slow")  # rules that take a share of the seeds and leave out the others
OF_CLASSES = ("equal", "class")  # rules that weigh classes: dealt over these, then evenly in each
LEVELS = 1 << 20
LEAST_P = 1e-6  # least probability that a loss is the logarithm of
FILE = "scores.parquet"
_IDS_ARE_TEXT = pyarrow.csv.ConvertOptions(column_types={"seed_id": pa.string()})  # also 007
FACTS = b"scores"  # schema metadata of scores that `rayexpand fit` made: what they are of, as JSON


class Allocate(Section):
    """Which seeds get how many copies. Without it each gets what the method plans."""

    rule: Rule = Field(description="weight of a seed. uniform: 1; equal: the same for each class; weight: a column of "
                       "your own; loss: -ln p_label; confidence: 1 - p_label; entropy: that of the prediction; margin: "
                       "1 for the share with the smallest p_label - highest other probability (GenDataAgent); slow: 1 "
                       "for the share learned last (TADA); class: the error of its class over its seeds (ours)")
    scores: str | None = Field(None, description="table with seed_id and the columns of the rule, one row for each "
                               f"seed: .parquet, .csv, or a folder with {FILE}. Columns: p_label, entropy, margin, "
                               "speed (share of the evaluations that were right while it trained), weight")
    share: float | None = Field(None, gt=0, le=1, description="with margin and slow: of the seeds (TADA: 0.3 to 0.4)")
    per: Literal["class", "all"] = Field("class", description="take the share in each class, or in all seeds at once, "
                                         "which may leave classes out")
    total: Literal["same", "scaled"] = Field("same", description="with margin and slow. same: as many samples as "
                                             "without; scaled: the copies of the chosen seeds alone, which costs less")
    floor: float = Field(0.0, ge=0, le=1, description="part of all copies that is dealt evenly over classes first")
    cap: int = Field(MAX_COPIES, ge=1, le=MAX_COPIES, description="most copies of one seed")
    permuted: bool = Field(False, description="control: the weights of the rule, handed to other seeds by a key (with "
                           "per: class to seeds of the same class)")

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Allocate:
        if READS[self.rule] and self.scores is None:
            raise ValueError(f"scores: is missing; rule {self.rule} reads {', '.join(READS[self.rule])} of each seed")
        unused = {"scores": self.scores is not None and not READS[self.rule],
                  "share": self.share is not None and self.rule not in SHARES,
                  "total": self.total == "scaled" and self.rule not in SHARES,
                  "permuted": self.permuted and not READS[self.rule],
                  "per": self.per == "all" and self.rule not in SHARES and not self.permuted}
        for field, is_unused in unused.items():
            if is_unused:
                raise ValueError(f"{field}: has no effect with rule {self.rule}; take it out")
        if self.permuted and self.rule == "class" and self.per == "class":
            raise ValueError("permuted: has no effect, for rule class weighs all seeds of a class alike; set per: all")
        if self.rule in SHARES and self.share is None:
            raise ValueError(f"share: is missing; rule {self.rule} takes a share of the seeds, such as 0.35")
        return self


def deal(weight_N: np.ndarray, total: int, key_N: np.ndarray, floor_N: np.ndarray | None = None,
         cap_N: np.ndarray | None = None) -> np.ndarray:
    """int64 (N,): `total` copies by largest remainders, each seed at least its floor and at most its cap.

    Ties go to the smaller key, then to the earlier seed; what a cap refuses is dealt again among those with room.
    Raises UsageError where floors are more than `total`, or caps less.
    """
    weight_N = np.asarray(weight_N, np.float64)
    found_N = np.zeros(len(weight_N), np.int64) if floor_N is None else np.asarray(floor_N, np.int64).copy()
    room_N = (np.full(len(weight_N), MAX_COPIES) if cap_N is None else np.asarray(cap_N, np.int64)) - found_N
    if (left := total - int(found_N.sum())) < 0 or left > int(room_N.sum()):
        raise UsageError(f"allocate: {total:,} copies cannot be dealt, for floors take {int(found_N.sum()):,} and caps "
                         f"leave room for {int(room_N.sum()):,} more; lower allocate.floor, or raise allocate.cap")
    top = weight_N.max(initial=0.0)
    q_N = np.rint(LEVELS * (weight_N / top)).astype(np.int64) if top > 0 else np.ones(len(weight_N), np.int64)
    while left:
        open_N = np.flatnonzero(room_N > 0)
        q = q_N[open_N] if q_N[open_N].any() else np.ones(len(open_N), np.int64)
        share, rest = np.divmod(left * q, int(q.sum()))
        order = np.lexsort((open_N, key_N[open_N], -rest))
        given = np.minimum(share, room_N[open_N])
        able = order[given[order] < room_N[open_N][order]][:left - int(share.sum())]
        given[able] += rest[able] > 0
        found_N[open_N] += given
        room_N[open_N] -= given
        left -= int(given.sum())
    return found_N


def allocated(allocate: Allocate, index: SeedIndex, base_N: np.ndarray, weight_N: np.ndarray, rng: PlanRng,
              total: int | None = None, first_N: np.ndarray | None = None) -> np.ndarray:
    """uint16 (N,): copies of each seed. `base_N`: those that the method plans; a seed without any gets none.
    `weight_N`: of the rule, times `base_N`. In a round of a loop, `total` copies beside `first_N` (N,) that the seeds
    have from earlier ones."""
    key_N, able_N = rng.per_seed("allocate", index.seed_ids), base_N > 0
    if total is None:
        counted = weight_N > 0 if allocate.total == "scaled" else able_N
        total = int(base_N[counted].sum(dtype=np.int64))
    if READS[allocate.rule]:
        able_N &= (weight_N > 0) | _sound(index)
    cap_N = np.where(able_N, allocate.cap - (0 if first_N is None else first_N.astype(np.int64)), 0)
    floor_N = _floors(allocate, index, able_N, total, key_N, cap_N)
    if allocate.rule not in OF_CLASSES or allocate.permuted:
        return deal(weight_N, total, key_N, floor_N, cap_N).astype(np.uint16)
    found_N, key_K = np.zeros(len(index), np.uint16), rng.per_seed("allocate", index.classes.key)
    weight_K, floor_K, cap_K = (np.bincount(index.labels, one, len(index.classes))
                                for one in (weight_N, floor_N, cap_N))
    total_K = deal(weight_K, total, key_K, floor_K, cap_K)
    order = np.argsort(index.labels, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(index.labels[order])) + 1):
        of_class = int(total_K[index.labels[mine[0]]])
        found_N[mine] = deal(base_N[mine], of_class, key_N[mine], None, cap_N[mine])
    return found_N


def _floors(allocate: Allocate, index: SeedIndex, able_N: np.ndarray, total: int, key_N: np.ndarray,
            cap_N: np.ndarray) -> np.ndarray:
    """int64 (N,): the same for each class, spread evenly over its seeds, no more than the cap of each."""
    n_K = np.bincount(index.labels[able_N], minlength=len(index.classes))
    of_class = int(allocate.floor * total + 1e-6) // max(int(np.count_nonzero(n_K)), 1)
    each_K, rest_K = np.divmod(of_class, np.maximum(n_K, 1))
    rank_N = rank_in_class(index.labels, np.where(able_N, key_N, 2.0))
    floor_N = each_K[index.labels] + (rank_N < rest_K[index.labels])
    return np.where(able_N, np.minimum(floor_N, cap_N), 0)


def weights_of(allocate: Allocate, index: SeedIndex, base_N: np.ndarray, rng: PlanRng,
               table: pa.Table | None = None) -> np.ndarray:
    """float64 (N,): what the rule gives each seed, times `base_N`. `table`: the scores, where they have been read.
    Raises UsageError with what is wrong with them."""
    scores = _aligned(allocate, index, base_N > 0, table) if allocate.scores is not None else {}
    rule_N = _rule(allocate, index, base_N, scores, rng)
    if allocate.permuted:
        able = np.flatnonzero((base_N > 0) & (_sound(index) | scores["known"]))
        group = index.labels[able] if allocate.per == "class" else np.zeros(len(able), np.int64)
        key = rng.per_seed("permute", index.table["seed_id"].take(pa.array(able)).to_pylist())
        rule_N[able[np.lexsort((key, group))]] = rule_N[able[np.argsort(group, kind="stable")]]
    return rule_N * base_N


def _rule(allocate: Allocate, index: SeedIndex, base_N: np.ndarray, scores: Mapping[str, np.ndarray],
          rng: PlanRng) -> np.ndarray:
    """float64 (N,). A seed without scores that is known to be faulty gets 0, any other the mean of those with scores: a
    class with one seed leaves none to be trained on."""
    labels, rule = index.labels, allocate.rule
    if not READS[rule]:
        return np.ones(len(labels)) if rule == "uniform" else (1 / _per_class(labels, base_N, index))[labels]
    known = scores["known"]
    column = {name: values[known] for name, values in scores.items()}
    if rule in SHARES:
        found = _of_share(allocate, labels[known], column, rng.per_seed("allocate", _ids(index, known)))
    elif rule == "class":
        n_K, wrong_K = (np.bincount(labels[known], counted, len(index.classes))
                        for counted in (None, column["margin"] < 0))
        e_K = np.where(n_K > 0, (wrong_K + 1) / (n_K + 2), np.nan)
        e_K = np.where(n_K > 0, e_K, np.nanmean(e_K))
        return np.where(known | _sound(index), (e_K / _per_class(labels, base_N, index))[labels], 0.0)
    else:
        found = {"weight": lambda: column["weight"], "entropy": lambda: column["entropy"],
                 "confidence": lambda: 1 - column["p_label"],
                 "loss": lambda: -np.log(np.maximum(column["p_label"], LEAST_P))}[rule]()
    weight_N = np.where(_sound(index), found.mean(), 0.0)
    weight_N[known] = found
    return weight_N


def _of_share(allocate: Allocate, labels: np.ndarray, column: Mapping[str, np.ndarray],
              key: np.ndarray) -> np.ndarray:
    """float64: 1 for the share with the smallest value, 0 for the rest; of a class, or of all, at least one."""
    assert allocate.share is not None
    value, then = (column["margin"], key) if allocate.rule == "margin" else (column["speed"], column["p_label"])
    group = labels if allocate.per == "class" else np.zeros(len(labels), np.int64)
    most = np.maximum(np.rint(allocate.share * np.bincount(group)), 1)
    place = np.empty(len(group), np.int64)
    place[np.lexsort((key, then, value))] = np.arange(len(group))
    return (rank_in_class(group, place) < most[group]).astype(np.float64)


def _per_class(labels: np.ndarray, base_N: np.ndarray, index: SeedIndex) -> np.ndarray:
    """float64 (K,): copies that the method plans for each class, at least 1."""
    return np.maximum(np.bincount(labels, base_N, len(index.classes)), 1.0)


def _sound(index: SeedIndex) -> np.ndarray:
    return pc.equal(index.table["fault"], "").to_numpy()


def _ids(index: SeedIndex, chosen: np.ndarray) -> list[str]:
    return index.table["seed_id"].filter(pa.array(chosen)).to_pylist()


def scores_sha256(allocate: Allocate | None) -> str | None:
    """Hash of the file of scores; None where no rule reads one, or it is not there (any more)."""
    if allocate is None or allocate.scores is None:
        return None
    try:
        return hashlib.sha256(read_bytes("allocate.scores", _place(allocate))).hexdigest()
    except (SeedDataError, EnvironmentFault):
        return None


def _place(allocate: Allocate) -> str:
    path = os.path.expanduser(allocate.scores or "")
    return f"{path}/{FILE}" if os.path.isdir(path) else path


def read_scores(allocate: Allocate) -> pa.Table:
    """seed_id and the columns of the rule, from the file of scores. Raises UsageError with every mistake."""
    path = _place(allocate)
    try:
        content = read_bytes("allocate.scores", path)
        table = pyarrow.csv.read_csv(pa.BufferReader(content), convert_options=_IDS_ARE_TEXT) if path.endswith(
            ".csv") else table_of(content, path)
    except (pa.ArrowException, DamagedFile, SeedDataError) as error:
        raise UsageError(f"allocate.scores: {path} cannot be read ({error}); give a .parquet or .csv table, or a "
                         f"folder with {FILE}, which `rayexpand fit` makes with fit: {{scores: {{}}}}") from error
    return _checked(allocate, table)


def _checked(allocate: Allocate, table: pa.Table) -> pa.Table:
    """seed_id and the columns of the rule. Raises UsageError with every mistake."""
    path = _place(allocate)
    wanted = ("seed_id", *READS[allocate.rule])
    if lacking := [name for name in wanted if name not in table.column_names]:
        raise UsageError(f"allocate.scores: {path} has no column {', '.join(lacking)}, and rule {allocate.rule} reads "
                         f"{', '.join(READS[allocate.rule])} of each seed_id; it has {', '.join(table.column_names)}")
    try:
        ids = table["seed_id"].cast(pa.string()).combine_chunks()
        columns = {name: table[name].cast(pa.float64()).to_numpy() for name in wanted[1:]}
    except pa.ArrowException as error:
        raise UsageError(f"allocate.scores: {path} has a column of another kind ({error}); seed_id is text, scores are "
                         "numbers") from error
    problems = []
    counted = ids.value_counts()
    if len(twice := counted.field("values").filter(pc.greater(counted.field("counts"), 1))):
        problems.append(f"seeds are there twice ({few(twice.to_pylist())}); give one row for each")
    for name, values in columns.items():
        low, high = RANGES[name]
        if len(bad := np.flatnonzero(~(np.isfinite(values) & (values >= low) & (values <= high)))):
            problems.append(f"{name} of {len(bad):,} seeds is no number from {low:g} to {high:g} "
                            f"({few(ids.take(pa.array(bad)).to_pylist())}); mend them, or leave these seeds out")
    if problems:
        raise UsageError("\n  ".join(f"allocate.scores: {path}: {problem}" for problem in problems))
    return pa.table({"seed_id": ids, **columns})


def _aligned(allocate: Allocate, index: SeedIndex, able_N: np.ndarray,
             table: pa.Table | None) -> dict[str, np.ndarray]:
    """The columns by seed, and `known`: bool (N,), of which seeds there are scores. Raises UsageError where scores of a
    file lack sound seeds in a class that has more than one; a loop has scored all that it could read."""
    is_whole, table = table is not None, read_scores(allocate) if table is None else _checked(allocate, table)
    place = pc.index_in(index.table["seed_id"].combine_chunks(), table["seed_id"].combine_chunks())
    known = place.is_valid().to_numpy(zero_copy_only=False)
    lacks = ~known & able_N & _sound(index)
    several = np.bincount(index.labels[_sound(index)], minlength=len(index.classes))[index.labels] > 1
    if not known.any() or ((lacks & several).any() and not is_whole):
        raise UsageError(f"allocate.scores: {allocate.scores} says nothing of {int(lacks.sum()):,} of {len(index):,} "
                         f"seeds ({few(_ids(index, lacks))}); score every seed of this dataset, or leave them out with "
                         "data.ids")
    at = place.fill_null(0).to_numpy()
    return {"known": known, **{name: table[name].to_numpy()[at] for name in table.column_names[1:]}}


def allocation_problems(allocate: Allocate, method: Method) -> list[str]:
    """What is wrong before the seeds are listed."""
    problems = []
    if why := getattr(method, "no_allocation", lambda: "")():
        problems.append(f"allocate: {method.name} {why}; take the section out")
    if allocate.scores is not None:
        try:
            read_scores(allocate)
        except (UsageError, SeedDataError, EnvironmentFault) as error:
            problems += str(error).split("\n  ")
    return problems


def _are_in_sample(allocate: Allocate) -> bool:
    """Whether the scores say that they are of classifiers that were trained on the seeds they score."""
    if allocate.scores is None or _place(allocate).endswith(".csv"):
        return False
    try:
        return said_in_sample(pq.read_schema(pa.BufferReader(read_bytes("allocate.scores", _place(allocate)))))
    except (pa.ArrowException, SeedDataError, EnvironmentFault):
        return False  # a run that has begun needs them no more


def said_in_sample(scores: pa.Schema) -> bool:
    """Whether scores with this schema say that they are in sample."""
    return bool(json.loads((scores.metadata or {}).get(FACTS, b"{}")).get("in_sample"))


def dealt_facts(allocate: Allocate, index: SeedIndex, copies_N: np.ndarray,
                scores: pa.Table | None = None) -> dict[str, Any]:
    """What was dealt, for run.json. `scores`: those of the round of a loop, which lie in no file that `allocate`
    names."""
    of_K = np.bincount(index.labels, copies_N, len(index.classes)).astype(int)
    of_K = of_K[np.bincount(index.labels, minlength=len(of_K)) > 0]
    return {"rule": allocate.rule, "permuted": allocate.permuted, "seeds": len(index),
            "without": int((copies_N == 0).sum()), "least": int(copies_N.min()), "most": int(copies_N.max()),
            "class_least": int(of_K.min()), "class_most": int(of_K.max()),
            **({"in_sample": True} if (_are_in_sample(allocate) if scores is None else said_in_sample(scores.schema))
               else {})}


def dealt_words(facts: Mapping[str, Any]) -> str:
    """'by rule slow: 0 to 12 copies of a seed, none of 31 of 150 seeds; 40 to 90 of a class'"""
    rule = f"rule {facts['rule']}" + (", weights permuted" if facts["permuted"] else "") + (
        ", scores in sample" if facts.get("in_sample") else "")
    none = f", none of {facts['without']:,} of {facts['seeds']:,} seeds" if facts["without"] else ""
    return (f"by {rule}: {facts['least']:,} to {facts['most']:,} copies of a seed{none}; "
            f"{facts['class_least']:,} to {facts['class_most']:,} of a class")
