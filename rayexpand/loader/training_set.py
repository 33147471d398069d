"""Training sets: which images a classifier is trained on, as columns of numbers, without a pixel.

A set has parts: seeds, and the kept samples of runs. Its rows are the *items*, numbered through all parts with the
seeds first, so that a real image has one number, and hence one stream of augmentations, with and without synthetic rows
beside it. A *chunk* is what storage reads at once: a row group of a Parquet file, else one image; the rows of a chunk
are neighbours.

    column      meaning
    chunk       number of the chunk, rising over the whole set
    row         seeds: row of the seed index; samples: row in the row group
    label       class the row is trained as
    source      class of the image it was made from
    strength    share of the schedule that was run (what soft labels depend on)
    seed        item of the real image it was made from, itself for a real one; only where rows are mixed with it, or
                replaced by samples of their own

A part of weight 0 is in no epoch: real images that samples are mixed with where no real row is trained.

14 million rows are 280 MB, mapped from the file and shared by all processes of a machine.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa

from rayexpand.classifier.seed_mixing import SeedMix
from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.data.seeds import DataConfig
from rayexpand.data.subsets import ids_hash, inverse_frequency, sound_rows

COLUMNS = pa.schema([("chunk", pa.int32()), ("row", pa.int32()), ("label", pa.int32()), ("source", pa.int32()),
                      ("strength", pa.float32())])
_WITH_SEED = COLUMNS.append(pa.field("seed", pa.int32()))

Mode = Literal["union", "replace"]
DrawRule = Literal["uniform", "inverse_freq", "own"]


@dataclass(frozen=True)
class RowSource:
    """Where rows come from: seeds as (index, configuration), or a run folder with what is taken of it.

    `copies`: the first so many of each seed, with a fraction one more of that share of each class, or of each its
    own number, (N,) over the seed index of the run; `selection`: name of a decision in selections/; `limit`: so
    many rows of each class, int (K,), of those that are left; `only`: seeds whose own rows, or samples, are taken,
    bool (N,) over the seed index, or that of the run; `weight`: how often each row is used per epoch.
    """

    seeds: tuple[SeedIndex, DataConfig] | None = None
    run: str | None = None
    copies: int | float | np.ndarray | None = None
    selection: str | None = None
    limit: np.ndarray | None = None
    only: np.ndarray | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        return f"run {self.run}" if self.run is not None else "the seeds"


@dataclass(frozen=True)
class SetPart:
    """What a set knows about one part; plain values only."""

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
class TrainingSet:
    """All rows a classifier is trained on. Two sets with equal digests train the same classifier."""

    table: pa.Table  # COLUMNS
    indexes: tuple[pa.Table, ...]  # seed indexes of the real parts, in their order
    parts: tuple[SetPart, ...]
    classes: ClassTable
    mode: Mode = "union"
    p: float = 0.0
    draw: DrawRule = "uniform"
    soft_label: dict[str, float] = field(default_factory=dict)
    mix: SeedMix | None = None

    @classmethod
    def of_seeds(cls, index: SeedIndex, data: DataConfig, weight: float = 1.0) -> TrainingSet:
        """The sound images of a dataset, each used `weight` times per epoch. Raises UsageError where there is none."""
        return cls.join([(rows := RowSource(seeds=(index, data), weight=weight), *seed_rows(rows))], index.classes)

    @classmethod
    def join(cls, blocks: Sequence[tuple[RowSource, dict[str, np.ndarray], SetPart]], classes: ClassTable, *,
             mode: Mode = "union", p: float = 0.0, soft_label: Mapping[str, float] | None = None,
             draw: DrawRule = "uniform", mix: SeedMix | None = None) -> TrainingSet:
        """Rows of several parts in one set, those of seeds first: (where they come from, columns, what is known).
        Raises UsageError for a part or an epoch without a row."""
        tables, made, first, chunk = [], list[SetPart](), 0, 0
        for rows, block, part in blocks:
            if not len(block["row"]):
                raise UsageError(f"training set: {rows.name} gives no row; check its copies, selection and data.ids")
            block["chunk"] += np.int32(chunk)
            made.append(replace(part, first=first, stop=first + len(block["row"]), chunk=chunk))
            first, chunk = made[-1].stop, int(block["chunk"][-1]) + 1
            tables.append(pa.table(block, _WITH_SEED if "seed" in block else COLUMNS))
        built = cls(pa.concat_tables(tables).combine_chunks(),
                    tuple(rows.seeds[0].table for rows, _, _ in blocks if rows.seeds), tuple(made), classes, mode, p,
                    draw, dict(soft_label or {}), mix)
        if not built.epoch_rows:
            shown = " and ".join(f"{part.weight:g} x {len(part):,}" for part in made)
            raise UsageError(f"training set: an epoch has no row, because {shown} rows round to 0; raise the weights")
        return built

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def n_real(self) -> int:
        """Real rows that are trained."""
        return sum(len(part) for part in self.parts if part.is_real and part.weight)

    @property
    def n_seeds(self) -> int:
        """Real rows, also those that are only mixed with; items 0..n_seeds-1."""
        return sum(len(part) for part in self.parts if part.is_real)

    @property
    def n_synthetic(self) -> int:
        return len(self) - self.n_seeds

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
        facts = [parts, self.classes.key, self.mode, self.p, self.draw, self.soft_label, *self._mix_facts().values()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _mix_facts(self) -> dict[str, Any]:
        return {} if self.mix is None else {"mix": self.mix.model_dump(mode="json")}

    def column(self, name: str) -> np.ndarray:
        """A column of the set, not copied."""
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
        if self.draw == "own":
            order, first, have = _grouped(self.column("seed")[n_real:], n_real)
            where, share = where[own := have[where] > 0], share[own]
            items[where] = n_real + order[first[where] + (share * have[where]).astype(np.int64)]
            return items
        labels = self.column("label")
        order, first, have = _grouped(labels[n_real:], self.n_classes)
        q = inverse_frequency(np.bincount(labels[:n_real], minlength=self.n_classes)) * (have > 0)
        edges = np.cumsum(q) / q.sum()
        chosen = np.searchsorted(edges, _stream(seed, epoch, "class").random(n_real)[where], side="right")
        items[where] = n_real + order[first[chosen] + (share * have[chosen]).astype(np.int64)]
        return items

    def to_bytes(self) -> bytes:
        """What `load` reads, with its hash at the end."""
        sink = io.BytesIO()
        self._write(sink)
        sink.write(hashlib.sha256(sink.getbuffer()).digest())
        return sink.getvalue()

    def _write(self, sink: IO[bytes]) -> None:
        """Arrow IPC streams one behind the other: the table, then the seed index of every real part."""
        facts = {"parts": [asdict(part) for part in self.parts], "mode": self.mode, "p": self.p, "draw": self.draw,
                 "soft_label": self.soft_label, "classes": asdict(self.classes), **self._mix_facts()}
        table = self.table.replace_schema_metadata({b"study": json.dumps(facts).encode()})
        for one in (table, *self.indexes):
            with pa.ipc.new_stream(sink, one.schema) as writer:
                writer.write_table(one)

    @classmethod
    def load(cls, path: str | Path) -> TrainingSet:
        """The set in a file, mapped. Raises DamagedFile where it does not hold what was written."""
        try:
            with pa.memory_map(str(path)) as source:
                if (content := source.read_buffer()) and hashlib.sha256(content[:-32]).digest() != content[-32:]:
                    raise ValueError("its content does not match its hash")
                source.seek(0)
                tables = [pa.ipc.open_stream(source).read_all()]
                facts = json.loads((tables[0].schema.metadata or {})[b"study"])
                parts = tuple(SetPart(**{**one, "chunks": tuple((name, group) for name, group in one["chunks"])})
                              for one in facts.pop("parts"))
                tables += [pa.ipc.open_stream(source).read_all() for part in parts if part.is_real]
        except (pa.ArrowInvalid, KeyError, OSError, ValueError) as error:
            raise DamagedFile(f"{path}: is no training set, or damaged ({error}). Run `rayexpand train` again, which "
                              "writes it anew") from error
        classes = ClassTable(**{name: tuple(values) for name, values in facts.pop("classes").items()})
        mix = facts.pop("mix", None)
        return cls(tables[0], tuple(tables[1:]), parts, classes, mix=mix and SeedMix(**mix), **facts)


def _stream(seed: int, epoch: int, name: str) -> np.random.Generator:
    return generator(row_key(seed, "study", "", epoch, 0, name))


def _grouped(key: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of a column of 0..n-1 by their value and then their place; where each value begins among them, and how
    often it is there."""
    have = np.bincount(key, minlength=n)
    return np.argsort(key, kind="stable"), np.cumsum(have) - have, have


def _repeats(part: SetPart) -> tuple[int, int]:
    """How often each row is used per epoch, and how many rows once more."""
    whole = int(part.weight + 1e-9)
    carry, extra = divmod(round(max(0.0, part.weight - whole) * len(part)), len(part))
    return whole + carry, extra


def seed_rows(rows: RowSource) -> tuple[dict[str, np.ndarray], SetPart]:
    """Columns of the sound rows of a dataset, and what is known of them."""
    assert rows.seeds is not None
    index, data = rows.seeds
    sound = sound_rows(index)
    labels = index.labels[sound].astype(np.int32)
    chunk = np.arange(len(sound), dtype=np.int32)
    if data.source == "parquet":
        file, group = (index.table[name].to_numpy()[sound] for name in ("file", "group"))
        chunk = np.cumsum(np.r_[False, (np.diff(file) != 0) | (np.diff(group) != 0)]).astype(np.int32)[:len(sound)]
    ids = index.table["seed_id"].take(pa.array(sound)).to_pylist()
    ids_sha256 = ids_hash(ids)
    identity = hashlib.sha256(ids_sha256.encode())
    identity.update(labels[np.argsort(np.array(ids, dtype=object), kind="stable")].tobytes())
    whole_sha256 = ids_sha256 if len(ids) == len(index) else ids_hash(index.seed_ids)
    part = SetPart(0, 0, 0, rows.weight, whole_sha256, identity.hexdigest(),
                   data=data.model_dump(mode="json"))
    return {"chunk": chunk, "row": sound.astype(np.int32), "label": labels, "source": labels,
            "strength": np.zeros(len(sound), np.float32)}, part
