"""A run that becomes a larger one in its folder: more copies of its seeds, more seeds, more classes.

    run.json               as it began; never changed
    grown/0001.json        the same facts of the larger run, and the content hashes of the data files it adopted;
                           published without overwriting, so it is the one point at which a run grows
    plan/<digest8>/        its plan: the portions of the smaller run as they were, then those that are to be made

What is committed stays as it is, byte for byte: shards keep their numbers, rows theirs. That holds a promise only where
every sample of the smaller run is a sample of the larger one, and `growth_problems` says where it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.errors import UsageError, few
from rayexpand.contract.schema import Draw
from rayexpand.contract.settings import differences
from rayexpand.runs.plan import MAX_SHARDS, Plan, Portions, groups_of, shards_of

GROWS = ("method.ratio", "method.quota", "data.ids", "data.per_class", "data.classes", "sampler.shard_images",
         "allocate")  # what says how many samples there are, and not what they are
COMPARED = 2_000  # seeds whose draws are compared one by one


def grown_plan(before: Plan, wanted: Plan, shard_images: int) -> Plan:
    """`wanted` with the shards and rows of `before` as they are, and the rest in shards behind them."""
    seed, had = _places(before, wanted), _had(before, wanted)
    rest = wanted.copies - had
    more = np.flatnonzero(rest > 0)
    old = Portions(*(values[before.parts.copies > 0] for values in before.parts))
    new = Portions(more, had[more].astype(np.uint16), rest[more].astype(np.uint16),
                   before.n_shards + shards_of(rest[more], shard_images))
    parts = Portions(np.concatenate([seed[old.seed], new.seed]), *(
        np.concatenate([getattr(old, name), getattr(new, name)]) for name in Portions._fields[1:]))
    if int(parts.shard[-1]) >= MAX_SHARDS:
        raise UsageError(f"the run would have {int(parts.shard[-1]) + 1:,} shards, more than {MAX_SHARDS:,}. Raise "
                         "sampler.shard_images")
    shard = np.zeros(len(had), np.int32)
    shard[parts.seed[::-1]] = parts.shard[::-1]  # of the first copies of each
    return replace(wanted, shard=shard, grown=parts)


def adds(before: Plan, wanted: Plan) -> bool:
    """Whether a plan has a sample that a smaller one has not."""
    return bool((wanted.copies > _had(before, wanted)).any())


def _had(before: Plan, wanted: Plan) -> np.ndarray:
    """int64: copies that the seeds of `wanted` have in `before`."""
    place, had = _places(before, wanted), np.zeros(len(wanted.index), np.int64)
    had[place[place >= 0]] = before.copies[place >= 0]
    return had


def growth_problems(before: Plan, wanted: Plan, then: Mapping[str, Any], now: Mapping[str, Any],
                    needs: frozenset[str]) -> list[str]:
    """Why the samples of a run are not all samples of a larger one. `then`, `now`: the fields and models of both."""
    problems = [f"{line} (a change of what samples are)" for line in differences(_fixed(then), _fixed(now))]
    problems += _class_problems(before, wanted, needs) or _seed_problems(before, wanted)
    return problems or _draw_problems(before, wanted)


def _fixed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what may change while a run grows."""
    left = {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
    for dotted in GROWS:
        section, _, leaf = dotted.partition(".")
        if leaf:
            left[section].pop(leaf, None)
        else:
            left.pop(section, None)
    return left


def _places(before: Plan, wanted: Plan) -> np.ndarray:
    """int64: where the seeds of `before` are in `wanted`, -1 for those that are not."""
    found = pc.index_in(before.index.table["seed_id"].combine_chunks(), wanted.index.table["seed_id"].combine_chunks())
    return found.fill_null(-1).to_numpy().astype(np.int64)


def _class_problems(before: Plan, wanted: Plan, needs: frozenset[str]) -> list[str]:
    old, new = before.index.classes, wanted.index.classes
    for name in ("key", "name", "metaclass", "noun", "asked"):
        then, now = getattr(old, name), getattr(new, name)
        if then != now[:len(then)]:
            at = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), len(now))
            return [f"data: label {at} ({then[at]}) would be gone" if at == len(now) else
                    f"data: the {name} of label {at} would be {now[at]!r} instead of {then[at]!r}" + (
                        "; new classes must come after those that are there" if name == "key" else "")]
    if len(new) > len(old) and (asked := sorted(needs & {"guide", "judge"})):
        return [f"data: {len(new) - len(old)} classes are new ({few(new.key[len(old):])}), and the {asked[0]} weighs "
                "all classes against each other, so that samples of the others would be other ones"]
    return []


def _seed_problems(before: Plan, wanted: Plan) -> list[str]:
    ids, place = before.index.table["seed_id"], _places(before, wanted)
    planned = before.copies > 0
    problems = []
    if (gone := np.flatnonzero((place < 0) & planned)).size:
        problems.append(f"data: {len(gone):,} of its seeds are not in the dataset any more "
                        f"({few(ids.take(pa.array(gone)).to_pylist())})")
    there = np.flatnonzero((place >= 0) & planned)
    now = place[there]
    for words, differs in (
            ("have another label", before.index.labels[there] != wanted.index.labels[now]),
            ("would have fewer samples than they have", before.copies[there] > wanted.copies[now]),
            ("have another caption", _captions_differ(before, wanted, there, now))):
        if (wrong := there[differs]).size:
            problems.append(f"{len(wrong):,} seeds {words} ({few(ids.take(pa.array(wrong)).to_pylist())})")
    return problems


def _captions_differ(before: Plan, wanted: Plan, there: np.ndarray, now: np.ndarray) -> np.ndarray:
    if before.captions is None or wanted.captions is None:
        return np.zeros(len(there), bool)
    return pc.not_equal(before.captions.take(pa.array(there)).combine_chunks(),
                        wanted.captions.take(pa.array(now)).combine_chunks()).to_numpy(zero_copy_only=False)


def _draw_problems(before: Plan, wanted: Plan) -> list[str]:
    """Draws of a run, of the grown one and of one that had the larger plan from the beginning, one by one, of COMPARED
    seeds."""
    method = wanted.method
    if why := getattr(method, "no_growth", lambda _: "")(before.method):
        return [f"method: {why}"]
    place = _places(before, wanted)
    planned = np.flatnonzero(before.copies > 0)
    for had, has in np.unique(np.stack([before.copies[planned], wanted.copies[place[planned]]]), axis=1).T.tolist():
        then = groups_of(had, before.method.group(had))
        if method.group(has) > 1 and then != groups_of(has, method.group(has))[:len(then)]:
            return [f"method: {method.name} makes the samples of a seed in groups, whose members depend on each other: "
                    f"{_sizes(then)} of {had} samples, but {_sizes(groups_of(has, method.group(has)))} of {has}"]
    grown = grown_plan(before, wanted, 1 << 30)
    chosen = planned[np.unique(np.linspace(0, len(planned) - 1, COMPARED).astype(int))] if len(planned) else planned
    for position in chosen.tolist():
        old, now = before.draws_of(position), grown.draws_of(int(place[position]))
        whole = wanted.draws_of(int(place[position]))
        for draw, other in [*zip(old, now, strict=False),
                            *zip(map(_numberless, now), map(_numberless, whole), strict=True)]:
            if draw != other:
                name = next(name for name in Draw.__slots__ if getattr(draw, name) != getattr(other, name))
                return [f"method: sample {draw.sample_id} has {name} {getattr(draw, name)!r}, and would have "
                        f"{getattr(other, name)!r} in a run that was as large from the beginning: {method.name} draws "
                        "it by the number of the row, or by those of the classes"]
    return []


def _numberless(draw: Draw) -> Draw:
    """Without the numbers that a row has within its run."""
    return replace(draw, row=0, group=0)


def _sizes(groups: list[range]) -> str:
    return " + ".join(str(len(one)) for one in groups)


def portion_problems(plan: Plan, before: Plan) -> list[str]:
    """What is wrong with the portions of a run that has grown from `before`."""
    parts, problems = plan.parts, []
    order = np.argsort(parts.seed, kind="stable")
    seed, first = parts.seed[order], parts.first[order].astype(np.int64)
    follows = np.where(np.diff(seed, prepend=-1) == 0, np.roll(first + parts.copies[order], 1), 0)
    if (first != follows).any() or (np.bincount(parts.seed, parts.copies, len(plan.index)) != plan.copies).any():
        problems.append("the copies of a seed do not follow each other")
    old = grown_plan(before, replace(plan, grown=None), 1 << 30).parts
    count = int((before.parts.copies > 0).sum())
    if any((one[:count] != other[:count]).any() for one, other in zip(old, parts, strict=True)):
        problems.append("it has not the shards and rows of the smaller run")
    return problems


def grown_words(facts: Mapping[str, Any]) -> str:
    """'from 50 to 100 to 200 samples'"""
    sizes = [*(step["planned"] for step in facts["grown"]), facts["planned"]]
    return "from " + " to ".join(f"{size:,}" for size in sizes) + " samples; what was made before is as it was"
