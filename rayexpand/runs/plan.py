"""The plan: how many copies of every seed, in which shard, in which sampler call and slot.

The plan on disk holds the seeds, their copies and their shards. The draws of a shard are a pure function of those and
of keyed streams, so they are derived when a shard runs: 13 million draws are planned in seconds and never stored.

    plan/<digest8>/seeds.parquet     the seed index with two more columns, copies and shard, and a third, caption,
                                     where prompts have captions
    plan/<digest8>/classes.parquet   the class table
    plan/<digest8>/plan.json         counts; written last, so its presence means the plan is whole
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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


@dataclass(frozen=True)
class Plan:
    index: SeedIndex
    method: Method
    run_seed: int
    batch: int
    copies: np.ndarray  # uint16[n]
    shard: np.ndarray  # int32[n]: shard of each seed, non-decreasing
    captions: pa.ChunkedArray | None = None  # string[n], "" where none could be made; None for prompts without

    first_row: np.ndarray = field(init=False)  # int64[n + 1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_row", np.concatenate([[0], np.cumsum(self.copies, dtype=np.int64)]))

    @property
    def planned(self) -> int:
        return int(self.first_row[-1])

    @property
    def n_shards(self) -> int:
        return int(self.shard[-1]) + 1

    def seeds_of(self, shard_id: int) -> range:
        """Positions of the seeds of a shard in the index."""
        return range(*(int(i) for i in np.searchsorted(self.shard, [shard_id, shard_id + 1])))

    def shard_rows(self, shard_id: int) -> int:
        seeds = self.seeds_of(shard_id)
        return int(self.first_row[seeds.stop] - self.first_row[seeds.start])

    def units(self, shard_id: int) -> list[Unit]:
        """The draws of a shard in planned order, in units that share a call."""
        seeds = self.seeds_of(shard_id)
        ids = self.index.table["seed_id"].slice(seeds.start, len(seeds)).to_pylist()
        labels = self.index.labels[seeds.start:seeds.stop]
        captions = [""] * len(seeds) if self.captions is None else self.captions.slice(seeds.start,
                                                                                       len(seeds)).to_pylist()
        units: list[Unit] = []
        for position, seed_id, label, caption in zip(seeds, ids, labels, captions, strict=True):
            row, copies = int(self.first_row[position]), int(self.copies[position])
            draws = [self._draw(seed_id, int(label), copy, row + copy, caption) for copy in range(copies)]
            units += _grouped(draws, self.method.group(copies) if copies else 1)
        return units

    def draws_of(self, position: int) -> list[Draw]:
        """The draws of one seed, by its position in the index."""
        seed_id, label = self.index.table["seed_id"][position].as_py(), int(self.index.labels[position])
        caption = "" if self.captions is None else self.captions[position].as_py()
        row = int(self.first_row[position])
        return [self._draw(seed_id, label, copy, row + copy, caption) for copy in range(int(self.copies[position]))]

    def calls(self, shard_id: int) -> list[Call]:
        return pack(self.units(shard_id), self.method, self.batch)

    def find(self, sample_id: str) -> int:
        """Shard of a sample. Raises UsageError if the plan has no such sample."""
        seed_id, _, copy = sample_id.rpartition("/")
        position = pc.index(self.index.table["seed_id"], pa.scalar(seed_id)).as_py()
        if position < 0 or copy not in map(str, range(int(self.copies[position]))):
            raise UsageError(f"{sample_id!r} is not in this plan. Sample ids are <seed id>/<copy>; the sample_id "
                             "column of data/*.parquet and rejected/*.parquet lists them.")
        return int(self.shard[position])

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
        position = int(self.position(np.array(row)))
        draw = self.draws_of(position)[row - int(self.first_row[position])]
        for _ in range(number):
            draw = self.redraw(draw)
        return draw

    def first_copies(self, copies: float | None) -> np.ndarray:
        """uint16[n]: how many of the planned copies of each seed are the first `copies`. A fraction f takes one more of
        floor(f * n_c) seeds of each class c, those that a run of this ratio would have given one more; None: all."""
        if copies is None or copies == int(copies):
            return self.copies if copies is None else np.minimum(self.copies, min(int(copies), MAX_COPIES))
        wanted = ratio_copies(self.index, copies, PlanRng(self.run_seed, self.method.name), down=True)
        return np.minimum(self.copies, wanted)

    def position(self, row: np.ndarray) -> np.ndarray:
        """int64: positions in the index of the seeds of rows."""
        return np.searchsorted(self.first_row, row, side="right") - 1

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
        for position, seed_id in zip(self._blank().tolist(), self.blank_seeds(), strict=True):
            for copy in range(int(self.copies[position])):
                draw = self._draw(seed_id, int(self.index.labels[position]), copy, int(self.first_row[position]) + copy,
                                  "")
                if CAPTION_SLOT in draw.prompt:
                    yield draw

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


def _grouped(draws: Sequence[Draw], size: int) -> list[Unit]:
    """Groups of `size` copies; a shorter tail joins the last group (5 by 2 is 2 + 3)."""
    if size <= 1:
        return [(draw,) for draw in draws]
    starts = list(range(0, max(len(draws) - size + 1, 1), size))
    ends = [*starts[1:], len(draws)]
    return [tuple(replace(draw, group=number) for draw in draws[start:end])
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))]


def make_plan(index: SeedIndex, config: RunConfig) -> Plan:
    """Plan of a run. Raises UsageError for an empty plan, too many shards or seeds that are in no list of captions."""
    copies = config.method.copies(index, PlanRng(config.seed, config.method.name))
    assert copies.dtype == np.uint16
    assert len(copies) == len(index)
    first_row = np.cumsum(copies, dtype=np.int64) - copies
    total = int(copies.sum(dtype=np.int64))
    if total == 0:
        raise UsageError(f"the plan is empty: {len(index)} seeds with 0 copies each. Raise method.ratio, or check "
                         "data.path and data.per_class.")
    for position in np.unique(index.labels, return_index=True)[1]:  # a prompt that a class cannot fill shows here
        config.method.draw(index.table["seed_id"][int(position)].as_py(), int(index.labels[position]), 0, 0,
                           index.classes, RowRng(config.seed, config.method.name, "", 0))
    block = np.minimum(first_row, total - 1) // config.sampler.shard_images
    shard = np.unique(block, return_inverse=True)[1].astype(np.int32)
    if (n_shards := int(shard[-1]) + 1) > MAX_SHARDS:
        enough = -(-total // MAX_SHARDS)
        raise UsageError(f"{total:,} rows make {n_shards:,} shards, more than {MAX_SHARDS:,}. "
                         f"Set sampler.shard_images to at least {enough}.")
    captions = _captions(index, config) if "captions" in config.needs else None
    return Plan(index, config.method, config.seed, config.sampler.batch, copies, shard, captions)


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
    fields."""
    hasher = hashlib.sha256()
    captions = [] if plan.captions is None else [plan.captions]
    for column in [*(plan.index.table[name] for name in SEED_INDEX.names), pa.chunked_array([plan.shard]), *captions]:
        values = column.combine_chunks()
        if pa.types.is_string(values.type):
            lengths = pc.binary_length(values).to_numpy(zero_copy_only=False)
            hasher.update(lengths.tobytes())
            if total := int(lengths.sum()):
                start = int(np.frombuffer(values.buffers()[1], np.int32)[values.offset])
                hasher.update(memoryview(values.buffers()[2])[start:start + total])
        else:
            hasher.update(values.to_numpy(zero_copy_only=False).tobytes())
    hasher.update(plan.copies.tobytes())
    facts = [plan.index.classes.key, plan.index.classes.name, plan.index.classes.metaclass, plan.index.classes.noun,
             plan.method.model_dump(mode="json"), plan.run_seed, plan.batch]  # type: ignore[attr-defined]
    hasher.update(digest(facts).encode())
    return hasher.hexdigest()


def write_plan(plan: Plan, files: Files, folder: str) -> None:
    """Publishes a plan below `folder`; two writers of one plan write the same things. What is there already and does
    not hold this plan is replaced."""
    files.make_folder(folder)
    table = plan.index.table.append_column("copies", pa.array(plan.copies)).append_column("shard", pa.array(plan.shard))
    if plan.captions is not None:
        table = table.append_column("caption", plan.captions)
    contents = {"seeds.parquet": parquet_bytes(table, plan.index.table.schema.metadata or {}, row_group=1 << 18),
                "classes.parquet": parquet_bytes(plan.index.classes.to_arrow(), ASKED)}
    counts = {"planned": plan.planned, "shards": plan.n_shards, "seeds": len(plan.index),
              "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}}
    contents["plan.json"] = sealed(f"{folder}/plan.json", counts)
    for (name, content), step in zip(contents.items(), ("index", "classes", "plan"), strict=True):
        if not files.publish(f"{folder}/{name}", content, step) and files.read(f"{folder}/{name}") != content:
            files.replace(f"{folder}/{name}", content)


def read_plan(config: RunConfig, files: Files, folder: str, plan_sha256: str) -> Plan | None:
    """The plan below `folder`, None where it was never finished. `plan_sha256`: its digest, as run.json has it. Raises
    DamagedFile where a file is not what was written."""
    if (counts := read_json(files, f"{folder}/plan.json")) is None:
        return None
    stated, tables = counts.get("files", {}), []
    for name in ("seeds.parquet", "classes.parquet"):
        content, where = files.read(f"{folder}/{name}"), files.at(f"{folder}/{name}")
        if content is None:
            raise DamagedFile(f"{where}: is gone")
        if stated and hashlib.sha256(content).hexdigest() != stated.get(name):
            raise DamagedFile(f"{where}: is damaged")
        tables.append(table_of(content, where))
    with reading(files.at(folder)):
        table, classes = tables[0], ClassTable.from_arrow(tables[1])
        index = SeedIndex(table.select(SEED_INDEX.names), classes)
        plan = Plan(index, config.method, config.seed, config.sampler.batch, table["copies"].to_numpy(),
                    table["shard"].to_numpy(), table["caption"] if "caption" in table.column_names else None)
    if counts.get("planned") != plan.planned or not (stated or plan_digest(plan) == plan_sha256):
        raise DamagedFile(f"{files.at(folder)}: is damaged, or was changed by hand: seeds.parquet and classes.parquet "
                          "do not hold the plan that run.json names")
    return plan
