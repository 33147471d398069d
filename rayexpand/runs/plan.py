"""The plan: how many copies of every seed, in which shard, in which sampler call and slot.

The plan on disk holds the seeds, their copies and their shards. The draws of a shard are a pure function of those and
of keyed streams, so they are derived when a shard runs: 13 million draws are planned in seconds and never stored.

    plan/<digest8>/seeds.parquet     the seed index with two more columns, copies and shard; and where they are used
                                     first (the number of the first copy), weight (by which copies were dealt), caption
    plan/<digest8>/parts.parquet     of a run that has grown: which copies of which seed are in which shard
    plan/<digest8>/classes.parquet   the class table
    plan/<digest8>/plan.json         counts; written last, so its presence means the plan is whole
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.artifacts.columns import captions_for
from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.contract.protocols import Method
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ASKED, CAPTION_SLOT, SEED_INDEX, ClassTable, Draw, SeedIndex
from rayexpand.contract.settings import digest
from rayexpand.methods._copies import MAX_COPIES, ratio_copies
from rayexpand.runs.allocation import allocated, dealt_facts, dealt_words, weights_of
from rayexpand.runs.config import RunConfig
from rayexpand.storage.files import Files
from rayexpand.storage.tables import parquet_bytes, read_json, reading, sealed, table_of

MAX_SHARDS = 50_000  # more small files than this make listing and the Ray driver slow

Unit = tuple[Draw, ...]  # the rows that must share a call: one row, or one group of copies


@dataclass(frozen=True, slots=True)
class Call:
    """One sampler call: a fixed number of slots in units of `unit` rows; None is a filler."""

    number: int
    slots: tuple[Draw | None, ...]
    unit: int

    @property
    def is_full(self) -> bool:
        return None not in self.slots

    @property
    def units(self) -> list[Unit]:
        """Those that are no fillers."""
        parts = (self.slots[i:i + self.unit] for i in range(0, len(self.slots), self.unit))
        return [tuple(draw for draw in part if draw) for part in parts if any(part)]

    def only(self, sample_ids: Collection[str]) -> Call:
        """The same call with every unit that holds none of `sample_ids` replaced by fillers."""
        slots: list[Draw | None] = []
        for i in range(0, len(self.slots), self.unit):
            unit = self.slots[i:i + self.unit]
            wanted = any(draw is not None and draw.sample_id in sample_ids for draw in unit)
            slots += unit if wanted else [None] * self.unit
        return replace(self, slots=tuple(slots))


class Portions(NamedTuple):
    """Copies of seeds in the order of their rows. A run that never grew has one part for each seed."""

    seed: np.ndarray  # int64[m]: position of the seed in the index
    first: np.ndarray  # uint16[m]: number of the first of these copies
    copies: np.ndarray  # uint16[m]
    shard: np.ndarray  # int32[m], non-decreasing


@dataclass(frozen=True)
class Plan:
    index: SeedIndex
    method: Method
    run_seed: int
    batch: int
    copies: np.ndarray  # uint16[n]: all copies of each seed
    shard: np.ndarray  # int32[n]: shard of the first copies of each seed; non-decreasing in a run that never grew
    captions: pa.ChunkedArray | None = None  # string[n], "" where none could be made; None for prompts without
    first: np.ndarray = None  # type: ignore[assignment]  # uint16[n]: number of the first copy; None: 0
    weight: np.ndarray | None = None  # float64[n], by which copies were dealt; None where no section `allocate` is
    grown: Portions | None = None

    parts: Portions = field(init=False)
    first_row: np.ndarray = field(init=False)  # int64[m + 1]: row of the first copy of each part, and their number

    def __post_init__(self) -> None:
        if self.first is None:
            object.__setattr__(self, "first", np.zeros(len(self.copies), np.uint16))
        parts = self.grown or Portions(np.arange(len(self.copies)), self.first, self.copies, self.shard)
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "first_row", np.concatenate([[0], np.cumsum(parts.copies, dtype=np.int64)]))

    @property
    def planned(self) -> int:
        return int(self.first_row[-1])

    @property
    def n_shards(self) -> int:
        return int(self.parts.shard[-1]) + 1

    def seeds_of(self, shard_id: int) -> np.ndarray:
        """int64: positions in the index of the seeds of a shard, each once."""
        parts = self._parts_of(shard_id)
        return self.parts.seed[parts.start:parts.stop]

    def shard_rows(self, shard_id: int) -> int:
        parts = self._parts_of(shard_id)
        return int(self.first_row[parts.stop] - self.first_row[parts.start])

    def units(self, shard_id: int) -> list[Unit]:
        """The draws of a shard in planned order, in units that share a call."""
        parts, seeds = self._parts_of(shard_id), self.seeds_of(shard_id)
        units: list[Unit] = []
        for part, draws in zip(parts, self._draws(parts, seeds), strict=True):
            copies = int(self.parts.first[part]) + len(draws)
            units += _grouped(draws, self.method.group(copies) if draws else 1)
        return units

    def sample_ids(self, shard_id: int) -> pa.Array:
        """string: of the draws of a shard, by seed and copy."""
        parts = self._parts_of(shard_id)
        return self.ids_of(np.arange(self.first_row[parts.start], self.first_row[parts.stop]))

    def ids_of(self, row: np.ndarray) -> pa.Array:
        """string: sample ids of rows, <seed id>/<copy>."""
        part = np.searchsorted(self.first_row, row, side="right") - 1
        position, copy = self.parts.seed[part], self.parts.first[part] + row - self.first_row[part]
        first, stop = (int(position.min()), int(position.max()) + 1) if len(row) else (0, 0)
        seed_ids = self.index.table["seed_id"].slice(first, stop - first).combine_chunks()
        return pc.binary_join_element_wise(seed_ids.take(pa.array(position - first)), pa.array(copy).cast(pa.string()),
                                           "/")

    def draws_of(self, position: int) -> list[Draw]:
        """The draws of one seed, by its position in the index."""
        parts = self._parts_with(position)
        return [draw for draws in self._draws(parts, np.full(len(parts), position)) for draw in draws]

    def calls(self, shard_id: int) -> list[Call]:
        return pack(self.units(shard_id), self.method, self.batch)

    def find(self, sample_id: str) -> int:
        """Shard of a sample. Raises UsageError if the plan has no such sample."""
        seed_id, _, copy = sample_id.rpartition("/")
        position = pc.index(self.index.table["seed_id"], pa.scalar(seed_id)).as_py()
        for part in self._parts_with(position) if position >= 0 else ():
            first = int(self.parts.first[part])
            if copy in map(str, range(first, first + int(self.parts.copies[part]))):
                return int(self.parts.shard[part])
        raise UsageError(f"{sample_id!r} is not in this plan. Sample ids are <seed id>/<copy>; the sample_id "
                         "column of data/*.parquet and rejected/*.parquet lists them.")

    def rng(self, draw: Draw) -> RowRng:
        return RowRng(self.run_seed, self.method.name, draw.seed_id, draw.copy, draw.attempt)

    def redraw(self, draw: Draw) -> Draw:
        """The next attempt of a row: its prompt and negative prompt are drawn anew, and its noise follows from the
        attempt; all else is kept. So is the prompt where another class would be drawn with a new one."""
        position, attempt = self._position(draw), draw.attempt + 1
        caption = "" if self.captions is None else self.captions[position].as_py()
        new = self._draw(draw.seed_id, int(self.index.labels[position]), draw.copy, draw.row, caption, attempt)
        asked = new if new.target_label == draw.target_label else draw
        return replace(draw, attempt=attempt, prompt=asked.prompt, negative=asked.negative)

    def attempt(self, row: int, number: int) -> Draw:
        """The draw of a row at its attempt of this number."""
        draw = next(draw for draw in self.draws_of(int(self.position(np.array(row)))) if draw.row == row)
        for _ in range(number):
            draw = self.redraw(draw)
        return draw

    def first_copies(self, copies: float | None) -> np.ndarray:
        """uint16[n]: how many of the planned copies of each seed have a number below `copies`. A fraction f takes one
        more of floor(f * n_c) seeds of each class c, those that a run of this ratio would have given one more; None:
        all."""
        if copies is None:
            return self.copies
        wanted = np.uint16(min(int(copies), MAX_COPIES)) if copies == int(copies) else ratio_copies(
            self.index, copies, PlanRng(self.run_seed, self.method.name), down=True)
        return np.minimum(self.copies, wanted - np.minimum(wanted, self.first))

    def position(self, row: np.ndarray) -> np.ndarray:
        """int64: positions in the index of the seeds of rows."""
        return self.parts.seed[np.searchsorted(self.first_row, row, side="right") - 1]

    def lacks_caption(self, draw: Draw) -> bool:
        """Whether the prompt of a draw asks for a caption that could not be made."""
        if self.captions is None or CAPTION_SLOT not in draw.prompt:
            return False
        return not self.captions[self._position(draw)].as_py()  # a caption may hold the words of the slot

    def blank_seeds(self) -> list[str]:
        """Seeds that can be read and have an empty caption."""
        return self.index.table["seed_id"].take(pa.array(self._blank())).to_pylist()

    def uncaptioned(self) -> Iterator[Draw]:
        """The draws of these seeds whose prompt asks for a caption."""
        for position in self._blank().tolist():
            yield from (draw for draw in self.draws_of(position) if CAPTION_SLOT in draw.prompt)

    def _parts_of(self, shard_id: int) -> range:
        """Those of a shard."""
        return range(*(int(i) for i in np.searchsorted(self.parts.shard, [shard_id, shard_id + 1])))

    def _parts_with(self, position: int) -> list[int]:
        """Those of a seed, by its position in the index."""
        if self.grown is None:
            return [position]
        order = self._by_seed
        return order[slice(*np.searchsorted(self.grown.seed[order], [position, position + 1]))].tolist()

    @cached_property
    def _by_seed(self) -> np.ndarray:
        """int64[m]: the parts of the first seed, then those of the second, ..."""
        return np.argsort(self.parts.seed, kind="stable")

    def _draws(self, parts: Sequence[int], seeds: np.ndarray) -> Iterator[list[Draw]]:
        """The draws of parts, whose seeds lie at these positions."""
        ids, labels = at(self.index.table["seed_id"], seeds).to_pylist(), self.index.labels[seeds].tolist()
        captions = [""] * len(ids) if self.captions is None else at(self.captions, seeds).to_pylist()
        for part, seed_id, label, caption in zip(parts, ids, labels, captions, strict=True):
            first, row = int(self.parts.first[part]), int(self.first_row[part])
            yield [self._draw(seed_id, label, first + i, row + i, caption) for i in range(int(self.parts.copies[part]))]

    def _position(self, draw: Draw) -> int:
        """Of the seed of a draw in the index."""
        return int(self.position(np.array(draw.row)))

    def _blank(self) -> np.ndarray:
        if self.captions is None:
            return np.zeros(0, np.int64)
        sound = pc.equal(self.index.table["fault"], "")
        return np.flatnonzero(pc.and_(sound, pc.equal(self.captions, "")).to_numpy())

    def _draw(self, seed_id: str, label: int, copy: int, row: int, caption: str, attempt: int = 0) -> Draw:
        rng = RowRng(self.run_seed, self.method.name, seed_id, copy, attempt)
        draw = self.method.draw(seed_id, label, copy, row, self.index.classes, rng)
        return replace(draw, prompt=draw.prompt.replace(CAPTION_SLOT, caption)) if caption else draw


def pack(units: Iterable[Unit], method: Method, batch: int) -> list[Call]:
    """Sampler calls over `units`: bucketed by batch key and unit size, each of a full planned shape."""
    buckets: dict[tuple, list[Unit]] = {}
    for unit in units:
        buckets.setdefault((method.batch_key(unit[0]), len(unit)), []).append(unit)
    calls: list[Call] = []
    for (_, size), members in buckets.items():
        per_call = max(1, batch // size)
        for i in range(0, len(members), per_call):
            slots: list[Draw | None] = [draw for unit in members[i:i + per_call] for draw in unit]
            slots += [None] * (per_call * size - len(slots))
            calls.append(Call(len(calls), tuple(slots), size))
    return calls


def at(values: Any, positions: np.ndarray) -> Any:
    """Rows of a long table or column at ascending positions that lie close together."""
    if not len(positions):
        return values.slice(0, 0)
    start = int(positions[0])
    return values.slice(start, int(positions[-1]) - start + 1).take(pa.array(positions - start))


def groups_of(copies: int, size: int) -> list[range]:
    """`copies` copies of a seed in groups of `size`; a shorter tail joins the last group (5 by 2 is 2 + 3)."""
    starts = list(range(0, max(copies - size + 1, 1), max(size, 1)))
    return list(map(range, starts, [*starts[1:], copies]))


def _grouped(draws: Sequence[Draw], size: int) -> list[Unit]:
    """Consecutive copies of a seed in the groups that all its copies up to the last of these make."""
    if size <= 1:
        return [(draw,) for draw in draws]
    first, groups = draws[0].copy, list[Unit]()
    for number, copies in enumerate(groups_of(first + len(draws), size)):
        if members := draws[max(copies.start - first, 0):max(copies.stop - first, 0)]:
            groups.append(tuple(replace(draw, group=number) for draw in members))
    return groups


def planned_copies(index: SeedIndex, config: RunConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """uint16[n]: copies of each seed; and float64[n], the weights they were dealt by, None without `allocate`. Raises
    UsageError."""
    rng = PlanRng(config.seed, config.method.name)
    base = config.method.copies(index, rng)
    assert base.dtype == np.uint16
    assert len(base) == len(index)
    if config.allocate is None:
        return base, None
    weight = weights_of(config.allocate, index, base, rng)
    return allocated(config.allocate, index, base, weight, rng), weight


def dealing_of(index: SeedIndex, config: RunConfig) -> list[str]:
    """What a section `allocate` deals, one line; none without one. Raises UsageError."""
    if config.allocate is None:
        return []
    copies, _ = planned_copies(index, config)
    return [f"allocate: copies are dealt {dealt_words(dealt_facts(config.allocate, index, copies))}"]


def make_plan(index: SeedIndex, config: RunConfig, first: np.ndarray | None = None,
              copies: np.ndarray | None = None) -> Plan:
    """Plan of a run. `first`: uint16[n], where the copies of each seed begin to count; `copies`: uint16[n], instead of
    those that method and `allocate` give. Raises UsageError for an empty plan, too many shards or copies, seeds that
    are in no list of captions, and scores that do not say enough."""
    copies, weight = planned_copies(index, config) if copies is None else (copies, None)
    first = np.zeros(len(index), np.uint16) if first is None else first
    if (first.astype(np.int64) + copies).max(initial=0) > MAX_COPIES:
        raise UsageError(f"at most {MAX_COPIES} copies of one seed can be planned, those of earlier runs included")
    total = int(copies.sum(dtype=np.int64))
    if total == 0:
        raise UsageError(f"the plan is empty: {len(index)} seeds with 0 copies each. Raise method.ratio, or check "
                         "data.path and data.per_class.")
    for position in np.unique(index.labels, return_index=True)[1]:  # a prompt that a class cannot fill shows here
        config.method.draw(index.table["seed_id"][int(position)].as_py(), int(index.labels[position]), 0, 0,
                           index.classes, RowRng(config.seed, config.method.name, "", 0))
    shard = shards_of(copies, config.sampler.shard_images)
    if (n_shards := int(shard[-1]) + 1) > MAX_SHARDS:
        enough = -(-total // MAX_SHARDS)
        raise UsageError(f"{total:,} rows make {n_shards:,} shards, more than {MAX_SHARDS:,}. "
                         f"Set sampler.shard_images to at least {enough}.")
    captions = _captions(index, config) if "captions" in config.needs else None
    return Plan(index, config.method, config.seed, config.sampler.batch, copies, shard, captions, first, weight)


def shards_of(copies: np.ndarray, shard_images: int) -> np.ndarray:
    """int32[n], from 0: shards of whole seeds with about `shard_images` rows each."""
    first_row = np.cumsum(copies, dtype=np.int64) - copies
    block = np.minimum(first_row, int(copies.sum(dtype=np.int64)) - 1) // shard_images
    return np.unique(block, return_inverse=True)[1].astype(np.int32)


def _captions(index: SeedIndex, config: RunConfig) -> pa.ChunkedArray:
    """The caption of every seed, "" where the list has an empty one: rows that ask for it are refused one by one."""
    if config.artifacts.get("captions") is None:
        raise UsageError(f"artifacts.captions: is not set, and {config.method.name} needs captions; make them with "
                         "`rayexpand fit`")
    folder, seed_ids = Path(config.artifacts["captions"]).expanduser(), index.table["seed_id"].combine_chunks()
    found = captions_for(folder, seed_ids)
    sound = pc.equal(index.table["fault"].combine_chunks(), "")
    if absent := seed_ids.filter(pc.and_(sound, found.is_null())).to_pylist():
        raise UsageError(f"artifacts.captions: {folder} has no captions of {len(absent):,} of {len(index):,} seeds "
                         f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); make captions of this very "
                         "dataset with `rayexpand fit`, or leave these seeds out with data.ids")
    return pa.chunked_array([pc.fill_null(found, "")])


def plan_digest(plan: Plan) -> str:
    """sha256 over everything that decides the draws: seeds, labels, copies, shards, captions, classes and method
    fields. What came later counts only where it is used."""
    hasher = hashlib.sha256()
    captions = [] if plan.captions is None else [plan.captions]
    for column in [*(plan.index.table[name] for name in SEED_INDEX.names), pa.chunked_array([plan.shard]), *captions]:
        hash_column(hasher, column)
    hasher.update(plan.copies.tobytes())
    for name, values in [*_later(plan).items(), *(plan.grown._asdict().items() if plan.grown else ())]:
        hasher.update(name.encode() + values.tobytes())
    facts = [plan.index.classes.key, plan.index.classes.name, plan.index.classes.metaclass, plan.index.classes.noun,
             plan.method.model_dump(mode="json"), plan.run_seed, plan.batch]  # type: ignore[attr-defined]
    hasher.update(digest(facts).encode())
    return hasher.hexdigest()


def hash_column(hasher: hashlib._Hash, column: pa.ChunkedArray) -> None:
    """Adds the values of a column of texts or numbers."""
    values = column.combine_chunks()
    if pa.types.is_string(values.type):
        lengths = pc.binary_length(values).to_numpy(zero_copy_only=False)
        hasher.update(lengths.tobytes())
        if total := int(lengths.sum()):
            start = int(np.frombuffer(values.buffers()[1], np.int32)[values.offset])
            hasher.update(memoryview(values.buffers()[2])[start:start + total])
    else:
        hasher.update(values.to_numpy(zero_copy_only=False).tobytes())


def _later(plan: Plan) -> dict[str, np.ndarray]:
    """Columns of the seeds that are written only where they are used."""
    return {**({"first": plan.first} if plan.first.any() else {}),
            **({} if plan.weight is None else {"weight": plan.weight})}


def write_plan(plan: Plan, files: Files, folder: str) -> None:
    """Publishes a plan below `folder`; two writers of one plan write the same things. What is there already and does
    not hold this plan is replaced."""
    files.make_folder(folder)
    table = plan.index.table.append_column("copies", pa.array(plan.copies)).append_column("shard", pa.array(plan.shard))
    for name, values in _later(plan).items():
        table = table.append_column(name, pa.array(values))
    if plan.captions is not None:
        table = table.append_column("caption", plan.captions)
    contents = {"seeds.parquet": parquet_bytes(table, plan.index.table.schema.metadata or {}, row_group=1 << 18),
                "classes.parquet": parquet_bytes(plan.index.classes.to_arrow(), ASKED)}
    if plan.grown is not None:
        contents["parts.parquet"] = parquet_bytes(pa.table(plan.grown._asdict()), {}, row_group=1 << 18)
    counts = {"planned": plan.planned, "shards": plan.n_shards, "seeds": len(plan.index),
              "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}}
    contents["plan.json"] = sealed(f"{folder}/plan.json", counts)
    steps = {"seeds.parquet": "index", "classes.parquet": "classes", "parts.parquet": "parts", "plan.json": "plan"}
    for name, content in contents.items():
        if not files.publish(f"{folder}/{name}", content, steps[name]) and files.read(f"{folder}/{name}") != content:
            files.replace(f"{folder}/{name}", content)


def read_plan(config: RunConfig, files: Files, folder: str, plan_sha256: str) -> Plan | None:
    """The plan below `folder`, None where it was never finished. `plan_sha256`: its digest, as run.json has it. Raises
    DamagedFile where a file is not what was written."""
    if (counts := read_json(files, f"{folder}/plan.json")) is None:
        return None
    stated, tables = counts.get("files", {}), {}
    for name in stated or ("seeds.parquet", "classes.parquet"):
        content, where = files.read(f"{folder}/{name}"), files.at(f"{folder}/{name}")
        if content is None:
            raise DamagedFile(f"{where}: is gone")
        if stated and hashlib.sha256(content).hexdigest() != stated.get(name):
            raise DamagedFile(f"{where}: is damaged")
        tables[name] = table_of(content, where)
    with reading(files.at(folder)):
        table, classes = tables["seeds.parquet"], ClassTable.from_arrow(tables["classes.parquet"])
        index = SeedIndex(table.select(SEED_INDEX.names), classes)
        later = {name: table[name].to_numpy() for name in ("first", "weight") if name in table.column_names}
        grown = tables.get("parts.parquet")
        plan = Plan(index, config.method, config.seed, config.sampler.batch, table["copies"].to_numpy(),
                    table["shard"].to_numpy(), table["caption"] if "caption" in table.column_names else None, **later,
                    grown=None if grown is None else Portions(*(grown[name].to_numpy() for name in Portions._fields)))
    if counts.get("planned") != plan.planned or not (stated or plan_digest(plan) == plan_sha256):
        raise DamagedFile(f"{files.at(folder)}: is damaged, or was changed by hand: seeds.parquet and classes.parquet "
                          "do not hold the plan that run.json names")
    return plan
