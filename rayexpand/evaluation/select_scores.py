"""What a guide says about the samples of a run, for the verb `select`; kept, so that a threshold moves for nothing.

    here              meaning, unit
    clip_confidence   softmax over the logits of all class prompts, at the sample's own class
    clip_entropy      entropy of that softmax, nats
    clip_top          class with the largest logit
    clip_contrast     softmax over two captions, one with the class's metaclass and one without (Diff-Mix): the first
    anchor            clip_top of the sample's seed; anchor_entropy its entropy

The work is cut into chunks, a data file or neighbouring seeds, and chunks into calls of one shape, so a number depends
on the image, the guide and that shape alone. Images are brought to the guide's size as for `evaluate`.

    <run>/scores/guide-<digest8>/part-0007.parquet    chunks that are done, by guide, prompts and call size

Parts are written as chunks come in: a stopped `select` continues, and one after a `retry` scores the new file only.
"""

# N images of a chunk, B of a call, K classes, P captions, D features

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import ModelError, RowFault, UsageError
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import Receipt, data_place
from rayexpand.contract.settings import digest
from rayexpand.data.pixels import decode, prepare
from rayexpand.data.seeds import SeedReader
from rayexpand.evaluation.chunk_columns import ChunkColumns
from rayexpand.evaluation.feature_file import FeatureFile
from rayexpand.evaluation.select_rules import CONFIDENCE, CONTRAST, ENTROPY, FEATURES, TOP
from rayexpand.models.guide_files import guide_folder, kind_of
from rayexpand.models.scores import confidence, log_probabilities
from rayexpand.runs.config import GuideConfig
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.storage.tables import parquet_bytes, read_table

SEEDS = 2048  # of one chunk
PART_ROWS, PART_S = 50_000, 300.0  # a part is written when it holds so many rows, or is so old
VERSION = 2  # raised when the code below makes other numbers of the same images
RESIZE = "shorter side to size, by the guide's own filter, antialiased (Pillow), middle square"

OnRows = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScoreJob:
    """What a process must know to score chunks of a run."""

    run: str  # folder
    guide: GuideConfig
    sha256: str  # content hash of the guide
    prompts: tuple[str, ...]  # of the K classes
    captions: tuple[str, ...]  # with, without, for each kind of subject; empty where no contrast is asked for
    caption_of: tuple[int, ...]  # which pair each class has
    features: bool  # whether features are asked for too
    batch: int
    device: str
    torch_threads: int
    io_threads: int

    @property
    def folder(self) -> str:
        """Where scores with these settings are kept, in the run folder."""
        made_from = {"version": VERSION, "guide": self.sha256, "prompts": self.prompts, "captions": self.captions,
                     "caption_of": self.caption_of, "features": self.features, "batch": self.batch, "resize": RESIZE}
        return f"scores/guide-{digest(made_from)[:8]}"


class Chunk(NamedTuple):
    """Samples of one data file, or seeds `start` to `stop` of the index."""

    key: str  # changes with the images
    file: str  # "" for seeds
    start: int
    stop: int


# (job, chunks) -> number of a chunk and its scores, in any order
Score = Callable[[ScoreJob, Sequence[Chunk]], Iterator[tuple[int, pa.Table]]]


def sample_chunks(receipts: Iterable[Receipt]) -> list[Chunk]:
    return [Chunk(f"{one.data_file} {one.content_sha256}", one.data_file, 0, one.kept) for one in receipts if one.kept]


def seed_chunks(run: Run) -> list[Chunk]:
    count, name = len(run.plan.index), run.facts["plan_digest"]
    return [Chunk(f"seeds {name} {start}", "", start, min(start + SEEDS, count)) for start in range(0, count, SEEDS)]


def guide_scores(run: Run, job: ScoreJob, chunks: Sequence[Chunk], score: Score,
                 on_rows: OnRows) -> dict[str, np.ndarray | FeatureFile]:
    """Columns of all chunks, one after the other, from what is kept and from `score`."""
    found = ChunkColumns({chunk.key: chunk.stop - chunk.start for chunk in chunks})
    _add_known(run, job, found)
    todo = [chunk for chunk in chunks if chunk.key not in found]
    total = sum(one.stop - one.start for one in chunks)
    done = total - sum(one.stop - one.start for one in todo)
    waiting: list[tuple[str, pa.Table]] = []
    since = time.monotonic()
    try:
        for number, table in score(job, todo) if todo else ():
            waiting.append((todo[number].key, table))
            found.add(todo[number].key, table)
            done += table.num_rows
            on_rows("scores by the guide", done, total)
            if sum(one.num_rows for _, one in waiting) >= PART_ROWS or time.monotonic() - since > PART_S:
                _keep(run, job, waiting)
                waiting, since = [], time.monotonic()
    finally:
        if waiting:
            _keep(run, job, waiting)
    assert not found.missing
    return found.columns


def in_process(job: ScoreJob, chunks: Sequence[Chunk]) -> Iterator[tuple[int, pa.Table]]:
    """Scores by this process."""
    from rayexpand.contract.device import torch_threads

    with torch_threads(job.torch_threads):
        scorer = Scorer(job)
        for number, chunk in enumerate(chunks):
            yield number, scorer(chunk)


# -------------------------------------------------------------------------------------------------------------- scoring


class Scorer:
    """Chunks -> table: row, CONFIDENCE, ENTROPY, TOP, and CONTRAST and FEATURES where they are asked for."""

    def __init__(self, job: ScoreJob) -> None:
        self._job, self._run = job, open_samples(job.run)
        self._guide = load(job, self._run)
        height, width = self._guide.size
        if height != width:
            raise ModelError(f"guide: {job.guide.weights} takes images of {height} x {width} pixels; give one with a "
                             "square input")
        data = self._run.config.data
        self._size, self._limits = height, {"min_side": data.min_side, "max_pixels": data.max_pixels}
        self._pool = ThreadPoolExecutor(job.io_threads, thread_name_prefix="io")

    def __call__(self, chunk: Chunk) -> pa.Table:
        """Raises UsageError for a sample that cannot be decoded; a seed that cannot has no scores."""
        images, row_N, label_N = self._sample_images(chunk) if chunk.file else self._seed_images(chunk)
        parts, size = [], self._job.batch
        ahead = self._decoding(images[:size])
        for start in range(0, len(images), size):
            pixels = [one.result() for one in ahead]
            ahead = self._decoding(images[start + size:start + 2 * size])
            bad = [one for one in pixels if isinstance(one, RowFault)]
            if bad and chunk.file:
                raise UsageError(f"{data_place(chunk.file)}: a sample cannot be decoded ({bad[0]}); `rayexpand verify "
                                 f"--pixels {self._job.run}` names it")
            parts.append(self._call(pixels, label_N[start:start + size]))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return pa.table({"row": row_N, **{name: _arrow(values) for name, values in columns.items()}})

    def _call(self, pixels: Sequence[Any], label_B: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        x_BHWC = np.zeros((self._job.batch, self._size, self._size, 3), np.uint8)  # a short call is filled with black
        sound_B = np.array([not isinstance(one, RowFault) for one in pixels])
        for i in np.flatnonzero(sound_B).tolist():
            x_BHWC[i] = pixels[i]
        with torch.inference_mode():
            h_BD = self._guide.features(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2) / 255)
            logits_BP = self._guide.head(h_BD).double().cpu().numpy()[:len(pixels)]
            h_BD = torch.nn.functional.normalize(h_BD, dim=-1).float().cpu().numpy()[:len(pixels)]
        classes = len(self._job.prompts)
        found = scores_of(logits_BP[:, :classes], label_B)
        if self._job.captions:
            pair_B = classes + 2 * np.array(self._job.caption_of)[label_B]
            rows = np.arange(len(pixels))
            found[CONTRAST] = contrast(logits_BP[rows, pair_B], logits_BP[rows, pair_B + 1])
        if self._job.features:
            found[FEATURES] = h_BD
        for values in found.values():
            values[~sound_B] = np.nan
        return found

    def _decoding(self, images: Sequence[bytes | RowFault]) -> list[Future]:
        return [self._pool.submit(self._pixels, image) for image in images]

    def _pixels(self, image: bytes | RowFault) -> np.ndarray | RowFault:
        try:
            if isinstance(image, RowFault):
                return image
            return prepare(decode(image, **self._limits)[0], self._size, "center", _NO_CHANCE,
                           cut_by=self._guide.filter)
        except RowFault as fault:
            return fault

    def _sample_images(self, chunk: Chunk) -> tuple[list[bytes | RowFault], np.ndarray, np.ndarray]:
        table = read_table(self._run.files, data_place(chunk.file), ["image", "row", "label"])
        return ([one["bytes"] for one in table["image"].to_pylist()],
                table["row"].to_numpy() + self._run.store.first_row(chunk.file), table["label"].to_numpy())

    def _seed_images(self, chunk: Chunk) -> tuple[list[bytes | RowFault], np.ndarray, np.ndarray]:
        index, rows = self._run.plan.index, range(chunk.start, chunk.stop)
        found = SeedReader(index, self._run.config.data).read(rows)
        label_N = np.maximum(index.labels[chunk.start:chunk.stop], 0)  # a seed with a bad label has none
        return [one if isinstance(one, RowFault) else one.image for one in found], np.array(rows), label_N


def scores_of(logits_BK: np.ndarray, label_B: np.ndarray) -> dict[str, np.ndarray]:
    """CONFIDENCE, ENTROPY and TOP, float64 (B,), of class logits and the classes the rows are to be."""
    log_p_BK = log_probabilities(logits_BK)
    return {CONFIDENCE: confidence(logits_BK, label_B), ENTROPY: -(np.exp(log_p_BK) * log_p_BK).sum(axis=1),
            TOP: logits_BK.argmax(axis=1).astype(np.float64)}


def contrast(with_B: np.ndarray, without_B: np.ndarray) -> np.ndarray:
    """Softmax over two logits, at the first."""
    return 1 / (1 + np.exp(without_B - with_B))


def load(job: ScoreJob, run: Run) -> Any:
    """The guide, asked about the job's prompts where it is a CLIP without a head of its own. Raises ModelError."""
    from rayexpand.models.guides import ClipGuide, load_guide

    if knows_classes(job.guide):
        if job.captions:
            raise ModelError(f"guide: {job.guide.weights} has classes of its own and cannot judge captions; "
                             f"{CONTRAST} takes a plain CLIP guide")
        classes = run.plan.index.classes
        return load_guide(job.guide.weights, job.guide.checkpoint, classes.asked, device=job.device,
                          class_keys=classes.key)
    return ClipGuide.load(job.guide.weights, job.guide.checkpoint, [*job.prompts, *job.captions], job.device)


def knows_classes(guide: GuideConfig) -> bool:
    """Whether a guide was trained on classes, so that prompts have no effect."""
    folder = guide_folder(guide.weights)
    return folder is not None and kind_of(folder) != "clip"


_NO_CHANCE = RowRng(0, "select", "", 0)  # "center" draws nothing
_CHUNKS = b"chunks"  # schema metadata of a part: key and rows of each chunk in it


# --------------------------------------------------------------------------------------------------------- what is kept


def _add_known(run: Run, job: ScoreJob, found: ChunkColumns) -> None:
    """Adds the chunks that are wanted and kept."""
    missing = found.missing
    for name in sorted(run.files.list(job.folder)):
        table = read_table(run.files, f"{job.folder}/{name}")
        start = 0
        for key, rows in json.loads(table.schema.metadata[_CHUNKS]):
            if key in missing:
                found.add(key, table.slice(start, rows))
            start += rows


def _keep(run: Run, job: ScoreJob, tables: Sequence[tuple[str, pa.Table]]) -> None:
    held = json.dumps([(key, table.num_rows) for key, table in tables]).encode()
    content = parquet_bytes(pa.concat_tables([table for _, table in tables]), {_CHUNKS: held}, row_group=PART_ROWS)
    for folder in (job.folder, ".tmp"):
        run.files.make_folder(folder)
    number = 1 + len(run.files.list(job.folder))
    while not run.files.publish(f"{job.folder}/part-{number:04d}.parquet", content):
        number += 1


def _arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
