"""Chunks of images -> the seeds nearest to each, in one process. See copies.py.

    here       meaning, unit
    h_MD       float32 features of the seeds as the extractor gives them, in the order of the index
    own        similarity of a sample, or of a known copy, to the seed it was made from
    class      similarity to the nearest other seed of its class; all: to the nearest other seed of all
    top        similarities of the nearest seeds, its own among them

Seeds with the same pixels and the same class count as one, and a seed with the same pixels as the own one is no other
seed, whatever its class.
"""

# N images of a chunk, B of a call, M seeds, D features

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import RowFault, UsageError
from rayexpand.contract.schema import ClassTable, SeedIndex, data_place
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader
from rayexpand.evaluation import copy_extractor as extractors
from rayexpand.evaluation.copies_config import CopiesConfig
from rayexpand.evaluation.feature_file import FeatureFile
from rayexpand.evaluation.known_copies import EDITS, drawing, edited, redrawn
from rayexpand.evaluation.search import References, similarities, unit_rows
from rayexpand.models.prior import inspect_prior
from rayexpand.runs.config import RuntimeConfig
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.runs.tools import load_tools
from rayexpand.storage.tables import read_table

_ROWS = 2048  # of features, copied at once
CLASSES_HELD = 64  # whose seeds are ready to be searched: samples come in the order of their classes

OnRows = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CopyJob:
    """What a process must know to work on chunks."""

    run: str  # folder
    config: CopiesConfig
    extractor_sha256: str
    runtime: RuntimeConfig


class CompareChunk(NamedTuple):
    """Images to compare: a data file of the run, seeds by their positions in the index, or rows of another index."""

    kind: str  # samples, seeds, held_out, or a kind of known copies
    key: str  # changes with the images
    rows: int
    file: str = ""
    positions: tuple[int, ...] = ()
    table: pa.Table | None = None
    keys: tuple[str, ...] = ()  # of held-out images: the classes of that table


# (job, chunks, features of the seeds or None) -> number of a chunk and its table, in any order
Work = Callable[[CopyJob, Sequence[CompareChunk], "ComparedSeeds | None"], Iterator[tuple[int, pa.Table]]]


def held_out_chunk(index: SeedIndex, rows: np.ndarray) -> CompareChunk:
    """Some rows of an index of real images, with only the file names they need."""
    table, files = index.table.take(pa.array(rows)), json.loads(index.table.schema.metadata[b"files"])
    used, file = np.unique(table["file"].to_numpy(), return_inverse=True)
    column = table.schema.get_field_index("file")
    metadata = {**table.schema.metadata, b"files": json.dumps([files[i] for i in used]).encode()}
    table = table.set_column(column, table.schema.field(column), pa.array(file, pa.int32()))
    return CompareChunk("held_out", f"held_out {rows[0]}", len(rows), table=table.replace_schema_metadata(metadata),
                 keys=index.classes.key)


@dataclass(frozen=True, eq=False)
class ComparedSeeds:
    """Features of all seeds of a run, in the order of its index."""

    h_MD: np.ndarray | FeatureFile  # float32; zeros where a seed cannot be read. Of a driver they are in a file
    sound_M: np.ndarray  # bool
    pixels_M: np.ndarray  # uint64: hash of the decoded pixels
    label_M: np.ndarray  # int32

    @classmethod
    def of(cls, tables: Iterable[tuple[int, pa.Table]], labels: np.ndarray, file: FeatureFile) -> ComparedSeeds:
        """Of tables by the position of their first seed, as they come; their features go to `file`."""
        sound_M, pixels_M = np.zeros(len(labels), bool), np.zeros(len(labels), np.uint64)
        for start, table in tables:
            rows = slice(start, start + table.num_rows)
            file.write(start, table["features"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1))
            sound_M[rows] = table["sound"].to_numpy(zero_copy_only=False)
            pixels_M[rows] = table["pixels"].to_numpy()
        return cls(file, sound_M, pixels_M, labels)

    @property
    def width(self) -> int:
        """D."""
        return self.h_MD.width if isinstance(self.h_MD, FeatureFile) else self.h_MD.shape[1]

    def loaded(self) -> ComparedSeeds:
        """With the features in memory, as a search needs them."""
        return replace(self, h_MD=self._features(0, len(self.label_M)))

    def _features(self, start: int, stop: int) -> np.ndarray:
        return self.h_MD.read(start, stop) if isinstance(self.h_MD, FeatureFile) else self.h_MD[start:stop]

    @cached_property
    def same_M(self) -> np.ndarray:
        """int64: position of the first sound seed with the same pixels and class."""
        same_M, at = np.arange(len(self.sound_M)), np.flatnonzero(self.sound_M)
        key = np.stack([self.pixels_M, self.label_M.astype(np.uint64)], axis=1)[at]
        _, first, inverse = np.unique(key, axis=0, return_index=True, return_inverse=True)
        same_M[at] = at[first[inverse.ravel()]]
        return same_M

    @property
    def sha256(self) -> str:
        hasher = hashlib.sha256()
        for start in range(0, len(self.label_M), _ROWS):
            hasher.update(self._features(start, min(start + _ROWS, len(self.label_M))).tobytes())
        for one in (self.sound_M, self.pixels_M, self.label_M):
            hasher.update(one.tobytes())
        return hasher.hexdigest()


def in_process(job: CopyJob, chunks: Sequence[CompareChunk],
               found: ComparedSeeds | None) -> Iterator[tuple[int, pa.Table]]:
    """Tables by this process."""
    from rayexpand.contract.device import torch_threads

    with torch_threads(job.runtime.torch_threads):
        finder = CopyFinder(job, open_samples(job.run), None if found is None else found.loaded())
        for number, chunk in enumerate(chunks):
            yield number, finder(chunk)


class CopyFinder:
    """Chunks -> tables. `found` is loaded. `run` and the extractor of `job` name models where this process finds
    them."""

    def __init__(self, job: CopyJob, run: Run, found: ComparedSeeds | None) -> None:
        self._job, self._run = job, run
        self._extractor = extractors.load(job.config.extractor)
        self._pool = ThreadPoolExecutor(job.runtime.io_threads, thread_name_prefix="io")
        self._searcher = None if found is None else Searcher(found, job.config, self._extractor.device)

    def __call__(self, chunk: CompareChunk) -> pa.Table:
        """Raises UsageError for a sample that cannot be decoded; of other images such a one has no row."""
        if chunk.kind == "seeds":
            return self._seeds(chunk)
        if chunk.kind == "samples":
            return self._samples(chunk)
        return self._held_out(chunk) if chunk.kind == "held_out" else self._known(chunk)

    def _seeds(self, chunk: CompareChunk) -> pa.Table:
        h_ND, sound_N, pixels_N = self._features(self._decoded(self._seed_images(chunk.positions)))
        return pa.table({"features": pa.FixedSizeListArray.from_arrays(pa.array(h_ND.reshape(-1)), h_ND.shape[1]),
                         "sound": sound_N, "pixels": pixels_N})

    def _samples(self, chunk: CompareChunk) -> pa.Table:
        columns = ["image", "sample_id", "seed_id", "row", "label", "strength"]
        table = read_table(self._run.files, data_place(chunk.file), columns)
        images = self._decoded([one["bytes"] for one in table["image"].to_pylist()])
        h_ND, sound_N, _ = self._features(images)
        if not sound_N.all():
            raise UsageError(f"{data_place(chunk.file)}: {int((~sound_N).sum())} samples cannot be decoded; "
                             f"`rayexpand verify --pixels {self._job.run}` names them")
        own_N = self._run.plan.position(table["row"].to_numpy() + self._run.store.first_row(chunk.file))
        return self._rows(h_ND, table["label"].to_numpy(), own_N, {
            "sample_id": table["sample_id"], "file": pa.array([chunk.file] * table.num_rows), "label": table["label"],
            "strength": table["strength"], "own_id": table["seed_id"]})

    def _held_out(self, chunk: CompareChunk) -> pa.Table:
        """Images that are seeds themselves are left out."""
        assert chunk.table is not None
        assert self._searcher is not None
        data, index = self._job.config.held_out, SeedIndex(chunk.table, ClassTable.of(chunk.keys))
        h_ND, sound_N, pixels_N = self._features(self._decoded(_read(index, data, range(chunk.rows))))
        use = np.flatnonzero(sound_N & ~self._searcher.are_seeds(pixels_N))
        label_of = {key: label for label, key in enumerate(self._run.plan.index.classes.key)}
        to_run_K = np.array([label_of.get(key, -1) for key in chunk.keys])
        label_N = to_run_K[index.labels[use]]
        ids = chunk.table["seed_id"].take(pa.array(use))
        return self._rows(h_ND[use], label_N, np.full(len(use), -1), {"kind": ["held_out"] * len(use), "id": ids})

    def _known(self, chunk: CompareChunk) -> pa.Table:
        images, at = self._decoded(self._seed_images(chunk.positions)), np.array(chunk.positions)
        at = at[[one is not None for one in images]]
        sound = [one for one in images if one is not None]
        is_edit = chunk.kind in EDITS
        copies = [edited(chunk.kind, one) for one in sound] if is_edit else self._redrawn(chunk.kind, sound, at)
        h_ND, sound_N, _ = self._features(copies)
        at = at[sound_N]
        ids = self._run.plan.index.table["seed_id"].take(pa.array(at))
        return self._rows(h_ND[sound_N], self._run.plan.index.labels[at], at, {
            "kind": [chunk.kind] * len(at), "id": ids})

    def _redrawn(self, kind: str, images: Sequence[np.ndarray], at: np.ndarray) -> list[np.ndarray | None]:
        index, config = self._run.plan.index, self._run.config
        ids = index.table["seed_id"].take(pa.array(at)).to_pylist()
        size = config.image.size or inspect_prior(config.prior).image_size
        return redrawn(kind, images, ids, index.labels[at].tolist(), self._tools, config, size)

    @cached_property
    def _tools(self) -> Any:
        return load_tools(drawing(self._run), self._run.plan.index.classes)

    def _rows(self, h_ND: np.ndarray, label_N: np.ndarray, own_N: np.ndarray, first: dict[str, Any]) -> pa.Table:
        assert self._searcher is not None
        ids, found = self._run.plan.index.table["seed_id"].combine_chunks(), self._searcher(h_ND, label_N, own_N)
        named: dict[str, Any] = {}
        for scope in ("class", "all"):
            at_N = found[f"{scope}_at"]
            named |= {f"{scope}_id": ids.take(pa.array(at_N, mask=at_N < 0)), scope: found[scope]}
        top_NT = found["top_at"]
        ends = pa.array(np.concatenate([[0], np.cumsum((top_NT >= 0).sum(1))]).astype(np.int32))
        kept = top_NT >= 0
        return pa.table({**first, "own": found["own"], **named,
                         "top_id": pa.ListArray.from_arrays(ends, ids.take(pa.array(top_NT[kept]))),
                         "top": pa.ListArray.from_arrays(ends, pa.array(found["top"][kept]))})

    def _seed_images(self, positions: Sequence[int]) -> list[bytes | RowFault]:
        return _read(self._run.plan.index, self._run.config.data, positions)

    def _decoded(self, images: Sequence[bytes | RowFault]) -> list[np.ndarray | None]:
        data = self._run.config.data

        def one(image: bytes | RowFault) -> np.ndarray | None:
            try:
                return None if isinstance(image, RowFault) else decode(image, min_side=1, max_pixels=data.max_pixels)[0]
            except RowFault:
                return None

        return list(self._pool.map(one, images))

    def _features(self, images: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32 (N, D) features, bool (N,) whether there is an image, uint64 (N,) hashes of its pixels."""
        size, batch = self._extractor.size, self._job.config.batch
        parts = []
        for start in range(0, len(images), batch):
            # A short call is filled with black.
            x_BHWC: np.ndarray = np.zeros((batch, size, size, 3), self._extractor.intake.dtype)
            for slot, image in enumerate(images[start:start + batch]):
                if image is not None:
                    x_BHWC[slot] = self._extractor.intake(image, size)
            parts.append(self._extractor(x_BHWC)[:len(images) - start])
        sound_N = np.array([one is not None for one in images], bool)
        h_ND = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
        h_ND[~sound_N] = 0
        return h_ND, sound_N, np.array([0 if one is None else _pixel_hash(one) for one in images], np.uint64)


class Searcher:
    """Images by their features -> nearest seeds."""

    def __init__(self, found: ComparedSeeds, config: CopiesConfig, device: Any) -> None:
        assert isinstance(found.h_MD, np.ndarray)
        self._found, self._config, self._device = found, config, device
        self._at = np.flatnonzero(found.sound_M & (found.same_M == np.arange(len(found.same_M))))
        self._centre = _mean(found.h_MD, self._at) if config.centre else None
        self._class = lru_cache(CLASSES_HELD)(self._of_class)
        self._pixels, times = np.unique(found.pixels_M[self._at], return_counts=True)
        self._wanted = config.top + int(times.max(initial=1))  # the own pixels may be listed under several classes

    @cached_property
    def _all(self) -> References:
        return self._references(self._at)

    def _references(self, at: np.ndarray) -> References:
        return References(unit_rows(self._found.h_MD[at], self._centre), self._device)

    def are_seeds(self, pixels_N: np.ndarray) -> np.ndarray:
        """bool (N,): whether a seed has these pixels."""
        return np.isin(pixels_N, self._pixels)

    def __call__(self, h_ND: np.ndarray, label_N: np.ndarray, own_N: np.ndarray) -> dict[str, np.ndarray]:
        """`own_N`: position of the own seed, -1 for none. Similarities are float32, not a number where there is none;
        positions in the index of seeds are -1 there."""
        q_ND, count = unit_rows(h_ND, self._centre), len(h_ND)
        has_own = (own_N >= 0) & self._found.sound_M[own_N]
        own = np.full(count, np.nan, np.float32)
        seeds_OD = unit_rows(self._found.h_MD[own_N[has_own]], self._centre)
        own[has_own] = similarities(q_ND[has_own], seeds_OD, np.arange(len(seeds_OD))[:, None])[:, 0]
        found: dict[str, np.ndarray] = {"own": own}
        wanted = self._wanted
        in_class = np.full((count, wanted), -np.inf, np.float32), np.full((count, wanted), -1)
        for label in np.unique(label_N[label_N >= 0]).tolist():
            rows, (at, references) = label_N == label, self._class(label)
            s, i = references.nearest(q_ND[rows], wanted)
            in_class[0][rows], in_class[1][rows] = s, np.where(i < 0, -1, at[i])
        found["class"], found["class_at"] = self._other(*in_class, own_N)
        if self._config.within == "class":
            of_all = in_class
            found |= {"all": np.full(count, np.nan, np.float32), "all_at": np.full(count, -1)}
        else:
            s, i = self._all.nearest(q_ND, wanted)
            of_all = s, np.where(i < 0, -1, self._at[i])
            found["all"], found["all_at"] = self._other(*of_all, own_N)
        found["top"], found["top_at"] = (one[:, :self._config.top] for one in of_all)
        return found

    def _of_class(self, label: int) -> tuple[np.ndarray, References]:
        at = self._at[self._found.label_M[self._at] == label]
        return at, self._references(at)

    def _other(self, s_NT: np.ndarray, at_NT: np.ndarray, own_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first that has not the pixels of the own seed."""
        pixels = self._found.pixels_M
        is_own_NT = (own_N[:, None] >= 0) & (at_NT >= 0) & (pixels[at_NT] == pixels[own_N][:, None])
        first_N = np.argmax(~is_own_NT, axis=1)
        rows = np.arange(len(own_N))
        at_N = at_NT[rows, first_N]
        return np.where(at_N < 0, np.nan, s_NT[rows, first_N]).astype(np.float32), at_N


def _mean(h_MD: np.ndarray, at: np.ndarray) -> np.ndarray:
    """float64 (D,): mean of some rows, few of which are copied at once; the bits are those of one sum."""
    total_D = np.zeros(h_MD.shape[1])
    for start in range(0, len(at), _ROWS):
        total_D = np.concatenate([total_D[None], h_MD[at[start:start + _ROWS]]]).sum(axis=0)
    return total_D / len(at)


def _read(index: SeedIndex, data: DataConfig, rows: Sequence[int]) -> list[bytes | RowFault]:
    return [one if isinstance(one, RowFault) else one.image for one in SeedReader(index, data).read(rows)]


def _pixel_hash(image: np.ndarray) -> int:
    hasher = hashlib.blake2b(str(image.shape).encode(), digest_size=8)
    hasher.update(image.tobytes())
    return int.from_bytes(hasher.digest(), "little")
