"""What a classifier is fed: the order of an epoch, and batches of decoded, augmented images with their labels.

The order is a function of (seed, epoch) and the list alone, so any number of workers sees the same global batches. An
image's augmentation is a function of (seed, item, epoch, occurrence), the last counting repeats of an item within an
epoch. Up to `shuffle_rows` images an epoch is one permutation. A longer one is a windowed shuffle: chunks of storage in
a random order, cut into `streams` equal streams that each give the same share of every batch and are permuted window by
window, shuffle_rows / streams rows at a time. A worker owns whole streams, and a stream reads a chunk once (a chunk in
which a stream begins is read by two). A batch then sees the chunks that the windows hold: 65,536 rows of 500-row chunks
are 131 of them, so where storage is sorted by class, as the samples of a run are, a batch has no more classes than that
and `shuffle_rows` should grow with the classes.

It is also the one dial for memory. A process that feeds a worker holds the encoded images of the worker's windows,
shuffle_rows x mean bytes of an image / W, and of each stream the rest of a chunk that reaches into the next window:
65,536 images of 110 kB are 7.2 GB over all workers. What does not fit in `cache_bytes` is refused, with the value of
shuffle_rows that fits; it is never chosen by the machine, since the order depends on it.

Rows that are mixed with a real image (`mix` of an arm) need that image too. In a windowed epoch those of the next
shuffle_rows rows are read at once and held beside the window, up to `cache_bytes` more, else of fewer rows at a time.
Samples of neighbouring seeds lie together, so their seeds are in few row groups; other images of a class are anywhere.
CMO pastes boxes of images that are not mixed.

Where the recipe asks for CMO, a step may have a second batch: real rows drawn with weight 1 / n_c ** power, keyed by
(seed, step), of whose images one box is pasted onto the first batch, the same box on all. In an epoch that replaces
real rows, a drawn row shows what replaced it. Image i of a global batch always meets image i of the second one.

    B, W, V     images of a global batch, workers, streams
    slice       positions rB/2W.. and their mirror images B-1-i, which MixUp and CutMix pair with them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rayexpand.classifier.recipe import Recipe, gridmask_probability
from rayexpand.classifier.transforms import augmix_views, cropped, finished, test_transform
from rayexpand.contract.errors import RowFault, UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.contract.schema import SeedIndex
from rayexpand.data import pixels
from rayexpand.data.seeds import DataConfig, SeedReader
from rayexpand.data.subsets import sound_rows
from rayexpand.loader.images import CACHE_BYTES, ImageReader, Windowed
from rayexpand.loader.row_mixing import RowMixer, RowMixes
from rayexpand.loader.training_set import RowSource, TrainingSet

if TYPE_CHECKING:
    from rayexpand.classifier.classifier import TrainBatch

__all__ = ["Loader", "RowSource", "Slots", "TestBatch", "TestSet", "TrainingSet"]

TEST_CACHE_BYTES = 1 << 30  # transformed test images one worker keeps
_SLACK = 1.25  # of cache_bytes, once the first window fitted: later windows may hold larger images
_MARGIN = 0.9  # of cache_bytes that a suggested shuffle_rows fills


class Slots(NamedTuple):
    """Which image stands where; both of one shape."""

    items: np.ndarray  # int64
    occurrence: np.ndarray  # uint32


_COUNTED = 10_000  # rows of an epoch that say what mixing does
_UNMIXED = RowMixes(np.zeros(0, np.int64), np.zeros(0, np.int64), [])


class TestBatch(NamedTuple):
    x_BHWC: np.ndarray  # uint8
    labels: np.ndarray  # int32[B]
    items: np.ndarray  # int64[B], rows of the test index


class Loader:
    """A training set seen through a recipe.

    batch         images of a global batch: the recipe's, or the rows of an epoch where they are fewer
    epoch_steps   steps of one pass over the list; what is left over is dropped, other images in each epoch
    total_steps   of the training: the recipe's updates, or its epochs times epoch_steps
    """

    def __init__(self, rows: TrainingSet, recipe: Recipe, seed: int, *, shuffle_rows: int = 65_536, streams: int = 8,
                 cache_bytes: int = CACHE_BYTES) -> None:
        self.rows, self.recipe, self.seed, self.shuffle_rows = rows, recipe, seed, shuffle_rows
        size = rows.epoch_rows
        self.batch = min(recipe.batch, size)
        self.epoch_steps = size // self.batch
        self.total_steps = recipe.updates or recipe.epochs * self.epoch_steps
        self.is_windowed = size > shuffle_rows
        self.streams = next(v for v in range(streams, 0, -1) if v == 1 or self.batch % (2 * v) == 0)
        self.cache_bytes = cache_bytes
        self._images = ImageReader(rows, cache_bytes)
        self._window: tuple[tuple[int, int, int], Windowed] | None = None  # of (epoch, rank, world)
        self._fits = False
        self._kept: dict[tuple[int, int, int], Slots] = {}
        self._partners: tuple[tuple[int, int, int], range, dict[int, bytes]] = ((-1, 0, 1), range(0), {})
        self._partner_bytes = 0.0  # of a real image, as they were last read
        self._mixer = None if rows.mix is None else RowMixer(rows, recipe.size)
        self._shown: dict[int, np.ndarray] = {}  # of one epoch that replaces rows: what is shown for each real row
        if recipe.cmo and not rows.n_real:
            raise UsageError("recipe.cmo: boxes are cut from real images, and this list has none; give it real rows, "
                             "or set cmo: 0")

    def order(self, epoch: int) -> np.ndarray:
        """int64 (steps, B): the items of an epoch's global batches."""
        return self.slots(epoch).items

    def slots(self, epoch: int, rank: int = 0, world: int = 1) -> Slots:
        """(steps, B / world) slots of a worker for an epoch; kept until another epoch is asked for.

        Raises UsageError where the batch cannot be cut into equal slices of mirrored pairs.
        """
        if (epoch, rank, world) not in self._kept:
            self.check_world(world)
            items, occurrence = _counted(np.sort(self.rows.epoch(self.seed, epoch)))
            if self.is_windowed:
                found = self._windowed(epoch, items, range(rank * self.streams // world,
                                                           (rank + 1) * self.streams // world))
            else:
                found = self._permuted(epoch, len(items), rank, world)
            self._kept = {(epoch, rank, world): Slots(items[found], occurrence[found])}
        return self._kept[epoch, rank, world]

    def batches(self, start: int, stop: int, rank: int = 0, world: int = 1) -> Iterator[TrainBatch]:
        """A worker's slices of the steps start..stop-1, whatever epochs they lie in."""
        from rayexpand.classifier.mixing import worker_rows

        for step in range(start, stop):
            epoch, within = divmod(step, self.epoch_steps)
            slots = self.slots(epoch, rank, world)
            encoded = self._windowed_images(epoch, within, rank, world) if self.is_windowed else None
            held = self._windowed_partners(epoch, within, rank, world) if self.is_windowed and self._mixer else None
            yield self._pasted(self.make(step, Slots(slots.items[within], slots.occurrence[within]), encoded, held),
                               worker_rows(self.batch, rank, world))

    def part(self, step: int, images: int) -> tuple[TrainBatch, Slots, RowMixes]:
        """About so many images of the global batch of a step, each with its partner in it, as `batches` gives them, and
        how they are mixed with real images. Nothing but these is read."""
        epoch, within = divmod(step, self.epoch_steps)
        half = max(1, images // 2)
        at = np.arange(self.batch) if 2 * half >= self.batch else np.r_[:half, self.batch - half:self.batch]
        whole = self.slots(epoch)
        slots = Slots(whole.items[within][at], whole.occurrence[within][at])
        mixes = _UNMIXED if self._mixer is None else self._mixer.draw(*slots, _Streams(self.seed, epoch, "mix").at)
        return self._pasted(self.make(step, slots), at), slots, mixes

    def make(self, step: int, slots: Slots, encoded: Sequence[bytes] | None = None,
             held: Mapping[int, bytes] | None = None) -> TrainBatch:
        """The images and labels of some slots of a step; `encoded`, where the images were read already, and `held` with
        the real images that they are mixed with."""
        from rayexpand.classifier.classifier import TrainBatch

        epoch = step // self.epoch_steps
        encoded = self._images.encoded(slots.items) if encoded is None else encoded
        y_BK, mixes, partners = self.targets(slots.items), _UNMIXED, list[bytes]()
        if self._mixer is not None:
            mixes = self._mixer.draw(*slots, _Streams(self.seed, epoch, "mix").at)
            y_BK = self._mixer.labels(y_BK, slots.items, mixes)
            partners = self._images.encoded(mixes.partners) if held is None else [
                held[item] for item in mixes.partners.tolist()]
        x_BHWC, views_BVHWC = self._augmented(slots, encoded, (epoch, "augment"), step, mixes, partners)
        return TrainBatch(x_BHWC, y_BK, step, views_BVHWC, self._image_mixes(slots, epoch))

    def _augmented(self, slots: Slots, encoded: Sequence[bytes], key: tuple[int, str], step: int,
                   mixes: RowMixes = _UNMIXED, partners: Sequence[bytes] = ()) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 images of some slots, and where the recipe compares them two views of each. A real image that is mixed
        in is cropped with the draws of its row."""
        recipe, size = self.recipe, self.recipe.size
        x_BHWC = np.empty((len(slots.items), size, size, 3), np.uint8)
        views_BVHWC = np.empty((len(slots.items), 2, size, size, 3), np.uint8) if recipe.jsd else None
        streams, same = _Streams(self.seed, *key), _Streams(self.seed, *key)
        real = self._images.decode(mixes.partners, partners)
        mixtures = dict(zip(mixes.at.tolist(), mixes.mixtures, strict=True))
        grid = gridmask_probability(recipe, step, self.total_steps)
        decoded = self._images.decode(slots.items, encoded)
        for i, (item, repeat, image) in enumerate(zip(slots.items, slots.occurrence, decoded, strict=True)):
            rng = streams.at(item, repeat)
            image = cropped(image, rng, recipe)
            if (mixture := mixtures.get(i)) is not None:
                image = mixture.of(image, cropped(next(real), same.at(item, repeat), recipe))
            x_BHWC[i] = finished(image, rng, recipe, grid)
            if views_BVHWC is not None:
                views_BVHWC[i] = augmix_views(x_BHWC[i], rng)
        return x_BHWC, views_BVHWC

    def _image_mixes(self, slots: Slots, epoch: int) -> np.ndarray | None:
        """float32 (B, 5): how each image is mixed with its partner of the batch, where the recipe draws that for each
        image."""
        from rayexpand.classifier.mixing import draw_image_mix

        if self.recipe.mix_per == "batch":
            return None
        streams = _Streams(self.seed, epoch, "image mix")
        return np.array([draw_image_mix(self.recipe, streams.at(item, repeat), self.recipe.size)
                         for item, repeat in zip(slots.items, slots.occurrence, strict=True)], np.float32)

    def _pasted(self, batch: TrainBatch, at: np.ndarray) -> TrainBatch:
        """A slice with the boxes of CMO, where its step has some. `at`: its positions in the global batch."""
        from rayexpand.classifier.mixing import draw_paste

        mix = draw_paste(self.recipe, self.seed, batch.step, self.total_steps, self.recipe.size)
        if mix is None or mix.box is None:
            return batch
        items = self.tail_items(batch.step)[at]
        if self.is_windowed:  # nothing of it is kept: the window fills the memory
            unique, where = np.unique(items, return_inverse=True)
            found = self._images.fetch(unique)
            encoded = [found[i] for i in where]
        else:
            encoded = self._images.encoded(items)
        tail_BHWC, _ = self._augmented(Slots(items, at.astype(np.uint32)), encoded, (batch.step, "augment tail"),
                                       batch.step)
        top, bottom, left, right = mix.box
        batch.x_BHWC[:, top:bottom, left:right] = tail_BHWC[:, top:bottom, left:right]
        lam = np.float32(mix.lam)
        return batch._replace(y_BK=lam * batch.y_BK + (1 - lam) * self.targets(items))

    def mixing(self) -> dict[str, float] | None:
        """What is mixed with real images in the first epoch, by its first rows: share of the rows that are mixed; of
        these, share of pixel mixes, of rows that are the only image of their class and mixed with themselves, and mean
        share of real pixels. None where the set says nothing of mixing."""
        if self._mixer is None:
            return None
        slots = self.slots(0)
        items, occurrence = slots.items.ravel()[:_COUNTED], slots.occurrence.ravel()[:_COUNTED]
        drawn = self._mixer.draw(items, occurrence, _Streams(self.seed, 0, "mix").at)
        found, alone = drawn.mixtures, int((items[drawn.at] == drawn.partners).sum())
        return {"rows": len(items), "mixed": len(found) / len(items), "alone": alone / max(1, len(found)),
                "pixel": sum(one.box is None for one in found) / max(1, len(found)),
                "real_pixels": sum(one.lam for one in found) / max(1, len(found))}

    def tail_items(self, step: int) -> np.ndarray:
        """int64 (B,): the items of the second, tail-weighted batch of a step."""
        drawn = np.searchsorted(self._tail_edges, _stream(self.seed, step, "tail").random(self.batch), side="right")
        if self.rows.mode == "union":
            return drawn
        epoch = step // self.epoch_steps
        if epoch not in self._shown:
            self._shown = {epoch: self.rows.epoch(self.seed, epoch)}
        return self._shown[epoch][drawn]

    @cached_property
    def _tail_edges(self) -> np.ndarray:
        """float64 (real rows,): cumulated probabilities of the second batch."""
        labels = self.rows.column("label")[:self.rows.n_real]
        edges = np.cumsum(np.bincount(labels).astype(np.float64)[labels] ** -self.recipe.cmo_power)
        return edges / edges[-1]

    def targets(self, items: np.ndarray) -> np.ndarray:
        """float32 (B, K): one-hot for seeds, the method's soft label for samples."""
        return self._images.targets(items)

    def check_world(self, world: int) -> None:
        if world > 1 and self.batch % (2 * world):
            raise UsageError(f"recipe.batch: {self.batch} images cannot be cut into {world} equal slices of pairs (a "
                             "batch is never larger than the training set); use a multiple of "
                             f"{2 * world}, or fewer training.workers")
        if self.is_windowed and self.streams % world:
            raise UsageError(f"training.streams: {self.streams} streams cannot be dealt to {world} workers equally; "
                             f"set it to a multiple of {world}, and recipe.batch to a multiple of twice as many")

    def _windowed_images(self, epoch: int, within: int, rank: int, world: int) -> list[bytes]:
        """Encoded images of a worker's slots of a step. Raises UsageError where a window is larger than the cache."""
        key = (epoch, rank, world)
        if self._window is None or self._window[0] != key or within < self._window[1].step:
            self._window = None  # free it first
            limit = self.cache_bytes * (_SLACK if self._fits else 1)
            self._window = key, Windowed(self._images, self.slots(*key).items, self._column_lanes(world), limit,
                                         lambda window: self._too_large(window, key))
        window = self._window[1]
        found = window.encoded(within)
        if not self._fits:
            if window.peak_rows * window.mean_bytes > self.cache_bytes:
                raise self._too_large(window, key)
            self._fits, window.limit = True, self.cache_bytes * _SLACK
        return found

    def _windowed_partners(self, epoch: int, within: int, rank: int, world: int) -> Mapping[int, bytes]:
        """Encoded real images by item, all that a worker's slots of a step are mixed with; those of later steps too."""
        assert self._window is not None
        assert self._mixer is not None
        key, (of, steps, found) = (epoch, rank, world), self._partners
        if of != key or within not in steps:
            self._partners = (key, range(0), {})  # free them first
            items, occurrence = self.slots(*key)
            room = self.cache_bytes / max(1.0, self._window[1].mean_bytes, self._partner_bytes)
            count = max(1, min(self.shuffle_rows // self.batch, int(room) // items.shape[1]))
            while True:
                steps = range(within, min(within + count, len(items)))
                needed = np.unique(self._mixer.draw(
                    items[within:steps.stop].ravel(), occurrence[within:steps.stop].ravel(),
                    _Streams(self.seed, epoch, "mix").at).partners)
                found = dict(zip(needed.tolist(), self._images.fetch(needed), strict=True))
                held = sum(map(len, found.values()))
                self._partner_bytes = held / max(1, len(found))
                if held <= self.cache_bytes * _SLACK or len(steps) == 1:
                    break
                count, found = max(1, int(len(steps) * self.cache_bytes / held)), {}
            self._partners = (key, steps, found)
        return found

    def _column_lanes(self, world: int) -> np.ndarray:
        """int64[B / world]: which of its streams a worker's slots belong to, in the layout of `_windowed`."""
        width, streams = self.batch // self.streams, np.arange(self.streams // world)
        return np.r_[np.repeat(streams, width // 2), np.repeat(streams[::-1], width - width // 2)]

    def _too_large(self, window: Windowed, key: tuple[int, int, int]) -> UsageError:
        """Why a window is refused, with the largest shuffle_rows found (in steps of a fifth) whose windows fit."""
        mean = window.mean_bytes
        needed, world = window.peak_rows * mean, key[2]
        rows = int(min(1.0, self.cache_bytes / needed) * self.shuffle_rows)
        while rows >= self.streams:
            other = Loader(self.rows, self.recipe, self.seed, shuffle_rows=rows, streams=self.streams)
            if Windowed(self._images, other.slots(*key).items, self._column_lanes(world), 0,
                        lambda _: AssertionError()).peak_rows * mean <= _MARGIN * self.cache_bytes:
                advice = f"set training.shuffle_rows to {rows} or less, or use more training.workers"
                break
            rows = rows * 4 // 5
        else:
            advice = ("no smaller value fits, because the row groups of the data are too large: store fewer rows in "
                      "each, lower training.streams, or use more training.workers")
        return UsageError(f"training.shuffle_rows: a worker's share of {self.shuffle_rows} rows is up to "
                          f"{window.peak_rows} images of {mean:,.0f} bytes at once, {needed:,.0f} bytes, and "
                          f"{self.cache_bytes:,} may be held; {advice}")

    def _permuted(self, epoch: int, count: int, rank: int, world: int) -> np.ndarray:
        """(steps, B / world) positions in the sorted items."""
        from rayexpand.classifier.mixing import worker_rows

        order = _stream(self.seed, epoch, "order").permutation(count)[:self.epoch_steps * self.batch]
        order = order.reshape(self.epoch_steps, self.batch)
        return order[:, worker_rows(self.batch, rank, world)]

    def _windowed(self, epoch: int, items: np.ndarray, streams: range) -> np.ndarray:
        """(steps, B * len(streams) / V) positions in the sorted items, read stream by stream."""
        edges = np.flatnonzero(np.diff(self.rows.column("chunk")[items])) + 1
        first, stop = np.r_[0, edges], np.r_[edges, len(items)]
        chunks = _stream(self.seed, epoch, "chunks").permutation(len(first))
        ends = np.cumsum((stop - first)[chunks])
        width = self.batch // self.streams
        made = [self._one_stream(epoch, stream, _cut(first[chunks], ends, stream * self.epoch_steps * width,
                                             (stream + 1) * self.epoch_steps * width)).reshape(-1, width)
                for stream in streams]
        return np.hstack([*(one[:, :width // 2] for one in made), *(one[:, width // 2:] for one in reversed(made))])

    def _one_stream(self, epoch: int, stream: int, positions: np.ndarray) -> np.ndarray:
        window = max(1, self.shuffle_rows // self.streams)
        for number, start in enumerate(range(0, len(positions), window)):
            part = positions[start:start + window]
            part[:] = part[_stream(self.seed, epoch, f"lane/{stream}/{number}").permutation(len(part))]
        return positions


def _cut(first: np.ndarray, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
    """int64: entries start..stop-1 of runs of numbers laid end to end; run i begins at first[i], and ends[i] is where
    it ends in the row."""
    if start == stop:
        return np.zeros(0, np.int64)
    low, high = np.searchsorted(ends, [start, stop - 1], side="right")
    begins = np.r_[0, ends][low:high + 1]
    sizes = np.minimum(ends[low:high + 1], stop) - np.maximum(begins, start)
    shift = first[low:high + 1] - begins
    return np.arange(start, stop) + np.repeat(shift, sizes)


def _counted(items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted items, and for each how many equal ones come before it."""
    edges = np.flatnonzero(np.diff(items)) + 1
    if len(edges) == len(items) - 1:
        return items, np.zeros(len(items), np.uint32)
    first = np.r_[0, edges]
    return items, (np.arange(len(items)) - np.repeat(first, np.diff(np.r_[first, len(items)]))).astype(np.uint32)


def _stream(seed: int, epoch: int, name: str) -> np.random.Generator:
    return generator(row_key(seed, "feed", "", epoch, 0, name))


class _Streams:
    """One generator, moved to the stream of any image of an epoch: 1 us where a new generator costs 11 (measured).

    The key is that of (seed, number of the epoch, name); item and occurrence are the two middle words of Philox's
    256-bit counter, so each image has 2 ** 64 blocks of its own.
    """

    def __init__(self, seed: int, number: int, name: str) -> None:
        self._bits = np.random.Philox(key=np.frombuffer(row_key(seed, "feed", "", number, 0, name), "<u8"))
        self._generator, self._state = np.random.Generator(self._bits), self._bits.state
        self._counter = self._state["state"]["counter"]

    def at(self, item: int, occurrence: int) -> np.random.Generator:
        """The generator of an image, good until the next call."""
        self._counter[:] = 0, item, occurrence, 0
        self._bits.state = self._state
        return self._generator


class TestSet:
    """The share of the test images of one worker; over all workers every image once, but those the index refuses.

    Batches of `size` that fit into `cache_bytes` are decoded once and handed out again; nobody may write into them.
    """

    __test__ = False  # for pytest: no test case

    def __init__(self, index: SeedIndex, data: DataConfig, recipe: Recipe, rank: int, world: int, size: int, *,
                 cache_bytes: int = TEST_CACHE_BYTES, section: str = "test", crop_border: int = 0) -> None:
        rows = sound_rows(index)
        self._rows = rows[rank * len(rows) // world:(rank + 1) * len(rows) // world]
        self._index, self._data, self._recipe, self._size, self._section = index, data, recipe, size, section
        self._border = crop_border
        self._reader: SeedReader | None = None
        self._room, self._kept = cache_bytes, dict[int, TestBatch]()

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self) -> Iterator[TestBatch]:
        """All of them, in order; none for a worker without test images. Raises UsageError naming an image that cannot
        be read or decoded."""
        for start in range(0, len(self._rows), self._size):
            if start in self._kept:
                yield self._kept[start]
                continue
            made = self.at(self._rows[start:start + self._size])
            if made.x_BHWC.nbytes <= self._room:
                self._room -= made.x_BHWC.nbytes
                self._kept[start] = made
            yield made

    def at(self, rows: np.ndarray) -> TestBatch:
        """Rows of the index, read and decoded. Raises UsageError."""
        if self._reader is None:
            self._reader = SeedReader(self._index, self._data)
        data, images = self._data, []
        for row, seed in zip(rows.tolist(), self._reader.read(rows.tolist()), strict=True):
            try:
                if isinstance(seed, RowFault):
                    raise seed
                image, _ = pixels.decode(seed.image, min_side=data.min_side, max_pixels=data.max_pixels)
            except RowFault as fault:
                seed_id = self._index.table["seed_id"][row].as_py()
                raise UsageError(f"test image '{seed_id}' of {data.path or data.source} cannot be used ({fault}); "
                                 f"repair it, or name the others in a file and give it as {self._section}.ids"
                                 ) from fault
            images.append(test_transform(self._inside(image, seed.seed_id), self._recipe))
        return TestBatch(np.stack(images), self._index.labels[rows], rows)

    def _inside(self, image: np.ndarray, seed_id: str) -> np.ndarray:
        """An image without its border. Raises UsageError where nothing is left."""
        height, width = (side - 2 * self._border for side in image.shape[:2])
        if min(height, width) < 1:
            raise UsageError(f"test image '{seed_id}' of {self._data.path or self._data.source} has {image.shape[1]} x "
                             f"{image.shape[0]} pixels, and crop_border {self._border} leaves nothing of it; lower it")
        return np.ascontiguousarray(image[self._border:self._border + height, self._border:self._border + width])
