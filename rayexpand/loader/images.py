"""The encoded and decoded images of a training set, and their labels.

Two ways to hold what was read. `ImageReader` itself keeps whole chunks (what storage reads at once) until `cache_bytes`
are full; then the chunk that was not used for longest goes. `Windowed` knows the order of an epoch and holds a row from
the first use of its chunk to its own last use, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow.compute as pc

from rayexpand.contract.errors import RowFault, UsageError
from rayexpand.contract.schema import SeedIndex, data_place
from rayexpand.data import pixels
from rayexpand.data.seeds import DataConfig, SeedReader
from rayexpand.loader.training_set import SetPart, TrainingSet
from rayexpand.methods import load_method
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import open_parquet, reading

CACHE_BYTES = 4 << 30  # encoded images one process keeps
_PIECE = 1024  # rows read between two looks at how much is held


class ImageReader:
    """Encoded images and labels of a list's items. Chunks that were read are kept, up to `cache_bytes`."""

    def __init__(self, rows: TrainingSet, cache_bytes: int = CACHE_BYTES) -> None:
        self._rows, self._limit, self._held = rows, cache_bytes, 0
        self._chunk, self._row = rows.column("chunk"), rows.column("row")
        self._stops = np.array([part.stop for part in rows.parts])
        real = iter(rows.indexes)
        self._sources: list[_SeedSource | _RunSource] = [
            _SeedSource(SeedIndex(next(real), rows.classes), part) if part.is_real else _RunSource(part)
            for part in rows.parts]
        self._methods = [None if part.is_real else load_method(part.method["name"], {
            key: value for key, value in part.method.items() if key != "name"}) for part in rows.parts]
        self._cache: OrderedDict[int, tuple[int, list[bytes]]] = OrderedDict()  # chunk -> its first item, images

    def decoded(self, items: np.ndarray) -> list[np.ndarray]:
        """uint8 (H, W, 3) images. Raises UsageError naming an image that cannot be read or decoded."""
        return list(self.decode(items, self.encoded(items)))

    def decode(self, items: np.ndarray, encoded: Sequence[bytes]) -> Iterator[np.ndarray]:
        """As `decoded`, of images that were read already, each when it is asked for: a batch of photos is large."""
        parts = np.searchsorted(self._stops, items, side="right")
        for item, part, image in zip(items, parts, encoded, strict=True):
            source = self._sources[part]
            try:
                yield pixels.decode(image, min_side=source.min_side, max_pixels=source.max_pixels)[0]
            except RowFault as fault:
                raise source.refusal(int(self._row[item]), int(self._chunk[item]), fault) from fault

    def encoded(self, items: np.ndarray) -> list[bytes]:
        chunks = self._chunk[items]
        wanted = dict.fromkeys(chunks.tolist())
        self._load([chunk for chunk in wanted if chunk not in self._cache])
        found = []
        for item, chunk in zip(items.tolist(), chunks.tolist(), strict=True):
            first, images = self._cache[chunk]
            found.append(images[item - first])
        for chunk in wanted:
            self._cache.move_to_end(chunk)
        while self._held > self._limit and len(self._cache) > 1:
            _, (_, images) = self._cache.popitem(last=False)
            self._held -= sum(map(len, images))
        return found

    def targets(self, items: np.ndarray) -> np.ndarray:
        """float32 (B, K)."""
        rows, k = self._rows, self._rows.n_classes
        labels, source, strength = (rows.column(name)[items] for name in ("label", "source", "strength"))
        y_BK = np.zeros((len(items), k), np.float32)
        y_BK[np.arange(len(items)), labels] = 1
        parts = np.searchsorted(self._stops, items, side="right")
        for number in np.unique(parts):
            if (method := self._methods[number]) is not None:
                at = parts == number
                y_BK[at] = method.soft_label(source[at], labels[at], strength[at], k, **rows.soft_label)
        return y_BK

    def chunks(self, items: np.ndarray) -> np.ndarray:
        """int32: the chunk of each item."""
        return self._chunk[items]

    def span(self, chunk: int) -> tuple[int, int]:
        """First item of a chunk, and the first behind it."""
        low, high = np.searchsorted(self._chunk, np.array([chunk, chunk + 1], np.int32)).tolist()
        return low, high

    def fetch(self, items: np.ndarray) -> list[bytes]:
        """Encoded images of ascending items, read from storage whatever is kept here."""
        found: list[bytes] = []
        parts = np.searchsorted(self._stops, items, side="right")
        for number in np.unique(parts):
            mine = items[parts == number]
            chunks, first = np.unique(self._chunk[mine], return_index=True)
            for images in self._sources[number].read(chunks.tolist(), np.split(self._row[mine], first[1:])):
                found += images
        return found

    def _load(self, chunks: Sequence[int]) -> None:
        if not chunks:
            return
        chunks = sorted(chunks)
        spans = [self.span(chunk) for chunk in chunks]
        images = self.fetch(np.concatenate([np.arange(*span) for span in spans]))
        ends = np.cumsum([0, *(stop - first for first, stop in spans)]).tolist()
        for chunk, (first, _), (low, high) in zip(chunks, spans, pairwise(ends), strict=True):
            self._cache[chunk] = (first, images[low:high])
            self._held += sum(map(len, images[low:high]))


class Windowed:
    """Encoded images of one worker in a windowed epoch, step after step.

    A stream reads a chunk once, at its first use, keeps the rows it still needs, and drops each after its last use.
    Steps may be left out, but do not go back.

    peak_rows    the most rows held at once, if no step is left out
    mean_bytes   of an image held now
    limit        bytes held; `refusal` makes the error for what goes beyond
    """

    def __init__(self, images: ImageReader, items_SC: np.ndarray, stream_C: np.ndarray, limit: float,
                 refusal: Callable[[Windowed], Exception]) -> None:
        self.step, self.limit = 0, limit
        self._images, self._items_SC, self._streams, self._refusal = images, items_SC, stream_C.tolist(), refusal
        self._needed: list[tuple[np.ndarray, np.ndarray]] = []  # of each stream: items ascending, steps of last use
        self._held: dict[tuple[int, int], bytes] = {}  # (stream, item)
        self._due: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # step of last use -> what to drop
        self._bytes = 0
        change_S = np.zeros(len(items_SC) + 1, np.int64)  # in rows held
        for stream in range(int(stream_C.max()) + 1):
            items, first, last = _uses(items_SC[:, stream_C == stream])
            starts = np.flatnonzero(np.r_[True, np.diff(images.chunks(items)) != 0])
            np.add.at(change_S, np.minimum.reduceat(first, starts), np.diff(np.r_[starts, len(items)]))
            np.subtract.at(change_S, last + 1, 1)
            self._needed.append((items, last))
        self.peak_rows = int(np.cumsum(change_S).max())

    @property
    def mean_bytes(self) -> float:
        return self._bytes / max(1, len(self._held))

    def encoded(self, step: int) -> list[bytes]:
        """Images of a step, in the order of its slots. Raises what `refusal` makes where they need too much memory."""
        assert step >= self.step
        for done in range(self.step, step):
            for key in self._due.pop(done, ()):
                self._bytes -= len(self._held.pop(key))
        self.step = step
        items = self._items_SC[step]
        keys = list(zip(self._streams, items.tolist(), strict=True))
        self._load(dict.fromkeys((key[0], chunk) for key, chunk in zip(
            keys, self._images.chunks(items).tolist(), strict=True) if key not in self._held))
        return [self._held[key] for key in keys]

    def _load(self, wanted: dict[tuple[int, int], None]) -> None:
        """Reads chunks of streams, a piece at a time."""
        piece: list[tuple[int, np.ndarray, np.ndarray]] = []
        for number, (stream, chunk) in enumerate(wanted, 1):
            items, last = self._needed[stream]
            low, high = np.searchsorted(items, self._images.span(chunk)).tolist()
            ahead = last[low:high] >= self.step
            piece.append((stream, items[low:high][ahead], last[low:high][ahead]))
            if number == len(wanted) or sum(len(one) for _, one, _ in piece) >= _PIECE:
                self._keep(piece)
                piece = []

    def _keep(self, piece: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> None:
        unique, where = np.unique(np.concatenate([items for _, items, _ in piece]), return_inverse=True)
        images = self._images.fetch(unique)
        found = iter(where.tolist())
        for stream, items, last in piece:
            for item, step in zip(items.tolist(), last.tolist(), strict=True):
                image = images[next(found)]
                self._held[stream, item] = image
                self._due[step].append((stream, item))
                self._bytes += len(image)
        if self._bytes > self.limit:
            raise self._refusal(self)


def _uses(items_SC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of (steps, columns), ascending, and the steps of their first and last use."""
    flat = items_SC.ravel()
    order = np.argsort(flat, kind="stable")
    edges = np.diff(flat[order]) != 0
    first, last = order[np.r_[True, edges]], order[np.r_[edges, True]]
    return flat[first], first // items_SC.shape[1], last // items_SC.shape[1]


class _SeedSource:
    """Images of a part that is seeds."""

    def __init__(self, index: SeedIndex, part: SetPart) -> None:
        self._index, self._data = index, DataConfig(**part.data)
        self._reader: SeedReader | None = None
        self.min_side, self.max_pixels = self._data.min_side, self._data.max_pixels

    def read(self, chunks: Sequence[int], rows: Sequence[np.ndarray]) -> list[list[bytes]]:
        """Encoded images of `rows` of each chunk."""
        if self._reader is None:
            self._reader = SeedReader(self._index, self._data)
        wanted, found = np.concatenate(rows).tolist(), []
        for row, seed in zip(wanted, self._reader.read(wanted), strict=True):
            if isinstance(seed, RowFault):
                raise self.refusal(row, 0, seed) from seed
            found.append(seed.image)
        return [found[low:high] for low, high in pairwise(np.cumsum([0, *map(len, rows)]).tolist())]

    def refusal(self, row: int, chunk: int, fault: RowFault) -> UsageError:
        seed_id = self._index.table["seed_id"][row].as_py()
        return UsageError(f"seed '{seed_id}' of {self._data.path or self._data.source} cannot be trained on ({fault}); "
                          "repair it, or name the other seeds in a file and give it as data.ids")


class _RunSource:
    """Images of a part that is the samples of a run."""

    min_side, max_pixels = 1, pixels.PILLOW_PIXELS

    def __init__(self, part: SetPart) -> None:
        self._part = part
        self._opened: Files | None = None

    def read(self, chunks: Sequence[int], rows: Sequence[np.ndarray]) -> list[list[bytes]]:
        """Encoded images of `rows` of each chunk. Raises UsageError for a data file that is gone."""
        return [self._group(*self._part.chunks[chunk - self._part.chunk], wanted)
                for chunk, wanted in zip(chunks, rows, strict=True)]

    @property
    def _files(self) -> Files:
        if self._opened is None:
            self._opened = open_files(self._part.run)
        return self._opened

    def _group(self, name: str, group: int, rows: np.ndarray) -> list[bytes]:
        where = self._files.at(data_place(name))
        try:
            with self._files.open(data_place(name)) as reader:
                file = open_parquet(reader, where)
                with reading(where):
                    table = file.read_row_group(group, columns=["image.bytes"], use_threads=False)
        except FileNotFoundError as error:
            raise UsageError(f"{where} is gone, but the training set was made with it; "
                             "restore it, or run `rayexpand expand` and start the study again") from error
        return pc.struct_field(table["image"], "bytes").take(rows).to_pylist()

    def refusal(self, row: int, chunk: int, fault: RowFault) -> UsageError:
        name, group = self._part.chunks[chunk - self._part.chunk]
        return UsageError(f"{self._files.at(data_place(name))}: row {row} of row group {group} cannot be trained on "
                          f"({fault}); `rayexpand verify {self._part.run}` says what is damaged")
