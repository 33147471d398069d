"""Study lists: which images an arm of a study trains on, as columns of numbers, without a pixel.

A list has parts: seeds, and the kept samples of runs. Its rows are the *items*, numbered through all parts with the
seeds first, so that a real image has one number, and hence one stream of augmentations, with and without synthetic rows
beside it. A *chunk* is what storage reads at once: a row group of a Parquet file, else one image; the rows of a chunk
are neighbours.

    column      meaning
    chunk       number of the chunk, rising over the whole list
    row         seeds: row of the seed index; samples: row in the row group
    label       class the row is trained as
    source      class of the image it was made from
    strength    share of the schedule that was run (what soft labels depend on)

14 million rows are 280 MB, mapped from the file and shared by all processes of a machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.errors import ConfigError, UsageError
from rayexpand.export import Selection, read_selection
from rayexpand.files import each
from rayexpand.rng import PlanRng, generator, row_key
from rayexpand.run import Run, open_run
from rayexpand.schema import ClassTable, Receipt, SeedIndex
from rayexpand.seeds import DataConfig
from rayexpand.subsets import ids_hash, inverse_frequency, sound_rows

_COLUMNS = pa.schema([("chunk", pa.int32()), ("row", pa.int32()), ("label", pa.int32()), ("source", pa.int32()),
                      ("strength", pa.float32())])
_READ = ["label", "copy", "source_label", "strength"]  # of a data file

Mode = Literal["union", "replace"]
Draw = Literal["uniform", "inverse_freq"]


@dataclass(frozen=True)
class Rows:
    """Where rows come from: seeds as (index, configuration), or a run folder with what is taken of it.

    `copies`: the first so many of each seed; `selection`: name of a decision in selections/; `limit`: so many rows of
    each class, int (K,), of those that are left; `weight`: how often each row is used per epoch.
    """

    seeds: tuple[SeedIndex, DataConfig] | None = None
    run: str | None = None
    copies: int | None = None
    selection: str | None = None
    limit: np.ndarray | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Part:
    """What a list knows about one part; plain values only."""

    first: int  # items first..stop-1
    stop: int
    chunk: int  # number of its first chunk
    weight: float
    ids_sha256: str  # of the seeds it holds or was made from
    rows_sha256: str  # identity of its rows
    data: dict[str, Any] = field(default_factory=dict)  # seeds: their configuration
    run: str = ""  # folder of the run
    chunks: tuple[tuple[str, int], ...] = ()  # run: data file and row group of each chunk
    method: dict[str, Any] = field(default_factory=dict)  # run: name and fields

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def is_real(self) -> bool:
        return not self.run


@dataclass(frozen=True, eq=False)
class StudyList:
    """All rows of an arm. Two lists with equal digests train the same classifier."""

    table: pa.Table  # _COLUMNS
    indexes: tuple[pa.Table, ...]  # seed indexes of the real parts, in their order
    parts: tuple[Part, ...]
    classes: ClassTable
    mode: Mode = "union"
    p: float = 0.0
    draw: Draw = "uniform"
    soft_label: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(cls, parts: Sequence[Rows], mode: Mode = "union", p: float = 0.0,
              soft_label: Mapping[str, float] | None = None, draw: Draw = "uniform") -> StudyList:
        """List of `parts`. Mode union: an epoch uses each row `weight` times. Mode replace (Diff-Mix): an epoch is one
        pass over the real rows, each replaced with probability `p` by a synthetic row; `draw` uniform takes any of
        them, inverse_freq first a class with probability proportional to 1 / (real rows of the class + 1).

        Seeds that the index refuses are left out. Raises ConfigError with everything that does not fit together
        (classes, modes, weights), UsageError for a run that is not complete or an unknown selection.
        """
        parts = sorted(parts, key=lambda one: one.seeds is None)
        if problems := _problems(parts, mode, p):
            raise ConfigError("study list", problems)
        opened = [None if one.run is None else open_run(one.run) for one in parts]
        tables = [one.seeds[0].classes if one.seeds else run.plan.index.classes  # type: ignore[union-attr]
                  for one, run in zip(parts, opened, strict=True)]
        if problems := _class_problems(parts, tables) + _pending_problems(opened):
            raise ConfigError("study list", problems)
        blocks, made, first, chunk = [], [], 0, 0
        for one, run in zip(parts, opened, strict=True):
            block, part = _seed_rows(one) if run is None else _sample_rows(one, run)
            if not len(block["row"]):
                raise UsageError(f"study list: {_name(one)} gives no row; check its copies, selection and data.ids")
            block["chunk"] += np.int32(chunk)
            made.append(replace(part, first=first, stop=first + len(block["row"]), chunk=chunk))
            first, chunk = made[-1].stop, int(block["chunk"][-1]) + 1
            blocks.append(pa.table(block, _COLUMNS))
        built = cls(pa.concat_tables(blocks).combine_chunks(), tuple(one.seeds[0].table for one in parts if one.seeds),
                    tuple(made), tables[0], mode, p, draw, dict(soft_label or {}))
        if not built.epoch_rows:
            shown = " and ".join(f"{part.weight:g} x {len(part):,}" for part in made)
            raise UsageError(f"study list: an epoch has no row, because {shown} rows round to 0; raise the weights")
        return built

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def n_real(self) -> int:
        return sum(len(part) for part in self.parts if part.is_real)

    @property
    def epoch_rows(self) -> int:
        """Images of one epoch, the same in every epoch."""
        if self.mode == "replace":
            return self.n_real
        return sum(times * len(part) + extra for part in self.parts for times, extra in [_repeats(part)])

    @property
    def digest(self) -> str:
        """sha256 of what decides the training: rows by identity, weights, mode, labels."""
        parts = [[part.rows_sha256, part.weight, part.method] for part in self.parts]
        facts = [parts, self.classes.key, self.mode, self.p, self.draw, self.soft_label]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def column(self, name: str) -> np.ndarray:
        """A column of the list, not copied."""
        column = self.table[name]
        return column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()

    def counts(self) -> np.ndarray:
        """int64[K]: rows of each class."""
        return np.bincount(self.column("label"), minlength=self.n_classes)

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """int64[epoch_rows]: the items of an epoch. Union: ascending; the part of a weight behind the point adds that
        share of the rows, others in each epoch. Replace: position i is what is shown for real item i.

        Item i draws from position i of streams keyed by (seed, epoch), so nothing depends on workers or order.
        """
        if self.mode == "replace":
            return self._replaced(seed, epoch)
        pieces = []
        for number, part in enumerate(self.parts):
            items, (times, extra) = np.arange(part.first, part.stop), _repeats(part)
            if extra:
                each_times = np.full(len(part), times)
                drawn = _stream(seed, epoch, f"repeat/{number}").random(len(part))
                each_times[np.argpartition(drawn, extra)[:extra]] += 1
                items = np.repeat(items, each_times)
            elif times != 1:
                items = np.repeat(items, times)
            pieces.append(items)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _replaced(self, seed: int, epoch: int) -> np.ndarray:
        n_real = self.n_real
        taken = _stream(seed, epoch, "replace").random(n_real) < self.p
        items, where = np.arange(n_real), np.flatnonzero(taken)
        if not len(where):
            return items
        share = _stream(seed, epoch, "synthetic").random(n_real)[where]
        if self.draw == "uniform":
            items[where] = n_real + (share * (len(self) - n_real)).astype(np.int64)
            return items
        labels = self.column("label")
        order = np.argsort(labels[n_real:], kind="stable")
        have = np.bincount(labels[n_real:], minlength=self.n_classes)
        q = inverse_frequency(np.bincount(labels[:n_real], minlength=self.n_classes)) * (have > 0)
        edges = np.cumsum(q) / q.sum()
        chosen = np.searchsorted(edges, _stream(seed, epoch, "class").random(n_real)[where], side="right")
        first = np.cumsum(have) - have
        items[where] = n_real + order[first[chosen] + (share * have[chosen]).astype(np.int64)]
        return items

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        self._write(sink)
        return sink.getvalue()

    def save(self, path: str | Path) -> None:
        with Path(path).open("wb") as sink:
            self._write(sink)

    def _write(self, sink: IO[bytes]) -> None:
        """Arrow IPC streams one behind the other: the list, then the seed index of every real part."""
        facts = {"parts": [asdict(part) for part in self.parts], "mode": self.mode, "p": self.p, "draw": self.draw,
                 "soft_label": self.soft_label, "classes": asdict(self.classes)}
        table = self.table.replace_schema_metadata({b"study": json.dumps(facts).encode()})
        for one in (table, *self.indexes):
            with pa.ipc.new_stream(sink, one.schema) as writer:
                writer.write_table(one)

    @classmethod
    def load(cls, path: str | Path) -> StudyList:
        """The list in a file, mapped and not read. Raises UsageError where it is not one."""
        try:
            with pa.memory_map(str(path)) as source:
                tables = [pa.ipc.open_stream(source).read_all()]
                facts = json.loads((tables[0].schema.metadata or {})[b"study"])
                parts = tuple(Part(**{**one, "chunks": tuple((name, group) for name, group in one["chunks"])})
                              for one in facts.pop("parts"))
                tables += [pa.ipc.open_stream(source).read_all() for part in parts if part.is_real]
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise UsageError(f"{path}: is no study list ({error!r}); delete it and run `rayexpand train` again") \
                from error
        classes = ClassTable(**{name: tuple(values) for name, values in facts.pop("classes").items()})
        return cls(tables[0], tuple(tables[1:]), parts, classes, **facts)


def _stream(seed: int, epoch: int, name: str) -> np.random.Generator:
    return generator(row_key(seed, "study", "", epoch, 0, name))


def _repeats(part: Part) -> tuple[int, int]:
    """How often each row is used per epoch, and how many rows once more."""
    whole = int(part.weight + 1e-9)
    carry, extra = divmod(round(max(0.0, part.weight - whole) * len(part)), len(part))
    return whole + carry, extra


def _name(rows: Rows) -> str:
    return f"run {rows.run}" if rows.run is not None else "the seeds"


def _problems(parts: Sequence[Rows], mode: str, p: float) -> list[str]:
    found = [f"{_name(one)}: give either seeds or a run" for one in parts if (one.seeds is None) == (one.run is None)]
    found += [f"{_name(one)}: weight is {one.weight:g}; a row is used more than 0 times per epoch, or left out"
              for one in parts if not one.weight > 0]
    found += [f"{_name(one)}: copies, selection and limit are about runs; take them out" for one in parts
              if one.seeds is not None and any(value is not None for value in (one.copies, one.selection, one.limit))]
    if not parts:
        found.append("no rows at all; give seeds, a run, or both")
    if not 0 <= p <= 1:
        found.append(f"p is {p:g}; a probability lies between 0 and 1")
    if mode == "replace":
        if not any(one.seeds is not None for one in parts):
            found.append("mode replace needs seeds, whose images are replaced")
        if p > 0 and not any(one.run is not None for one in parts):
            found.append("mode replace with p > 0 needs a run to take samples from")
        if any(one.weight != 1 for one in parts):
            found.append("mode replace: an epoch is one pass over the real rows, so weights have no effect; leave them "
                         "at 1")
    elif p:
        found.append(f"p = {p:g} has no effect in mode {mode}; set mode replace")
    return found


def _class_problems(parts: Sequence[Rows], tables: Sequence[ClassTable]) -> list[str]:
    def few(keys: Sequence[str]) -> str:
        return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"

    return [f"{_name(one)}: its classes {few(table.key)} are not those of {_name(parts[0])}, {few(tables[0].key)}, so "
            "labels would mean two things; use runs and seeds of one dataset"
            for one, table in zip(parts, tables, strict=True) if table.key != tables[0].key]


def _pending_problems(opened: Sequence[Run | None]) -> list[str]:
    return [f"run {run.folder}: {pending:,} of {run.plan.planned:,} samples are pending; finish it first with "
            "`rayexpand expand`" for run in opened if run is not None and (pending := run.totals().pending)]


def _seed_rows(rows: Rows) -> tuple[dict[str, np.ndarray], Part]:
    assert rows.seeds is not None
    index, data = rows.seeds
    sound = sound_rows(index)
    labels = index.labels[sound].astype(np.int32)
    chunk = np.arange(len(sound), dtype=np.int32)
    if data.source == "parquet":
        file, group = (index.table[name].to_numpy()[sound] for name in ("file", "group"))
        chunk = np.cumsum(np.r_[False, (np.diff(file) != 0) | (np.diff(group) != 0)]).astype(np.int32)[:len(sound)]
    ids = index.table["seed_id"].take(pa.array(sound)).to_pylist()
    identity = hashlib.sha256(ids_hash(ids).encode())
    identity.update(labels[np.argsort(np.array(ids, dtype=object), kind="stable")].tobytes())
    part = Part(0, 0, 0, rows.weight, ids_hash(index.seed_ids), identity.hexdigest(),
                data=data.model_dump(mode="json"))
    return {"chunk": chunk, "row": sound.astype(np.int32), "label": labels, "source": labels,
            "strength": np.zeros(len(sound), np.float32)}, part


@dataclass(frozen=True)
class _Block:
    """The rows of one data file that are taken."""

    columns: dict[str, np.ndarray]  # row, label, source, strength
    group: np.ndarray  # row group of each
    ids: list[str]  # sample ids, where they decide
    identity: bytes


def _sample_rows(rows: Rows, run: Run) -> tuple[dict[str, np.ndarray], Part]:
    chosen = read_selection(run, rows.selection) if rows.selection else None
    receipts = [receipt for receipt in run.store.receipts() if receipt.kept]
    block = {name: np.empty(sum(receipt.kept for receipt in receipts), _COLUMNS.field(name).type.to_pandas_dtype())
             for name in _COLUMNS.names}
    identity, filled, ids = hashlib.sha256(), 0, list[str]()
    chunks: list[tuple[str, int]] = []
    for receipt, found in zip(receipts, _blocks(run, receipts, rows, chosen), strict=True):
        size = len(found.group)
        identity.update(found.identity)
        ids += found.ids
        if not size:
            continue
        used, number = np.unique(found.group, return_inverse=True)
        block["chunk"][filled:filled + size] = number + len(chunks)
        for name, values in found.columns.items():
            block[name][filled:filled + size] = values
        chunks += [(receipt.data_file, int(group)) for group in used]
        filled += size
    block = {name: values[:filled] for name, values in block.items()}
    if rows.limit is not None:
        kept = _first_of_each_class(block["label"], ids, rows.limit, run)
        identity.update(np.packbits(kept).tobytes())
        block = {name: values[kept] for name, values in block.items()}
    method = run.config.method
    part = Part(0, 0, 0, rows.weight, ids_hash(run.plan.index.seed_ids), identity.hexdigest(), run=str(run.folder),
                chunks=tuple(chunks), method={**method.model_dump(mode="json"), "name": method.name})
    return block, part


def _first_of_each_class(labels: np.ndarray, ids: Sequence[str], limit: np.ndarray, run: Run) -> np.ndarray:
    """bool (n,): the first limit[c] rows of each class in an order that the sample ids alone decide, so that a smaller
    limit keeps a part of what a larger one keeps. Raises UsageError where a class has fewer."""
    have = np.bincount(labels, minlength=len(limit))
    if len(short := np.flatnonzero(have < limit)):
        names = run.plan.index.classes.name
        few = ", ".join(f"{names[c]} has {have[c]:,} of {limit[c]:,}" for c in short[:3])
        raise UsageError(f"fill: {len(short)} classes have fewer samples in {run.folder} than bring them to the size "
                         f"of the largest ({few}{', ...' if len(short) > 3 else ''}); make more copies of each seed, "
                         "or draw target classes uniformly")
    order = np.lexsort((PlanRng(0, "study").per_seed("fill", ids), labels))
    ordered = labels[order]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    return rank < limit[labels]


def _blocks(run: Run, receipts: Sequence[Receipt], rows: Rows, chosen: Selection | None) -> Iterator[_Block]:
    named = ["sample_id"] if chosen is not None or rows.limit is not None else []

    def block(receipt: Receipt) -> _Block:
        with run.store.files.open(f"data/{receipt.data_file}") as reader:
            file = pq.ParquetFile(reader, pre_buffer=False)
            table = file.read(_READ + named, use_threads=False)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        keep = np.ones(len(table), bool) if rows.copies is None else table["copy"].to_numpy() < rows.copies
        if chosen is not None:
            keep &= chosen.keeps(table["sample_id"].to_pylist()).to_numpy(zero_copy_only=False)
        identity = receipt.content_sha256.encode() + (b"" if keep.all() else np.packbits(keep).tobytes())
        columns = {"row": np.concatenate([np.arange(size) for size in sizes] or [np.arange(0)])[keep],
                   "label": table["label"].to_numpy()[keep], "source": table["source_label"].to_numpy()[keep],
                   "strength": table["strength"].to_numpy()[keep]}
        ids = table["sample_id"].filter(pa.array(keep)).to_pylist() if rows.limit is not None else []
        return _Block(columns, np.repeat(np.arange(len(sizes)), sizes)[keep], ids, identity if keep.any() else b"")

    return each(run.store.files, block, receipts)
