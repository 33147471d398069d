"""Latents of a dataset, made once for all steps of a fine-tuning: an artifact of VAE posteriors by seed and view.

    latents-1f0c9a3e/part-000000000.safetensors   mean, std  float16 or float32 (n, V, C, h, w), already scaled
                                                  row        int64 (n,) of the seed index; reasons of refused ones
                                                  embedding  float32 (n, V, D), of a decoder of image embeddings
                     ids.parquet                  seed_id, label, part, place of each seed, in the order of the index
                     facts.json                   what a reader has to know

A view is one crop, and its mirror image where flips are on: the shorter side is brought to the resolution (bilinear),
a square is cut at a keyed place along the longer one, as Diff-Mix and Real-Fake crop. Square images have one crop.
Posteriors rather than samples are kept, because training draws a new sample at each visit.

A part is as many neighbours as fill about a quarter of a gigabyte; finished parts survive a killed making.
"""

# n seeds of a part, V views, C latent channels, h w latent sides, D features, B images of a call

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from rayexpand.contract.errors import ModelError
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.data import pixels
from rayexpand.data.batches import SeedBatches
from rayexpand.data.seeds import DataConfig
from rayexpand.diffusion.sampling import in_chunks, to_tensor

if TYPE_CHECKING:
    import torch

VERSION = 1  # raised when the code below makes other numbers
PART_BYTES = 256 << 20
PART_SEEDS = 2048  # at most; short enough to show progress
_FACTS, _IDS = "facts.json", "ids.parquet"
_SCHEMA = pa.schema([("seed_id", pa.string()), ("label", pa.int32()), ("part", pa.int32()), ("place", pa.int32())])


class LatentsConfig(Section):
    batch: int = Field(8, ge=1, description="images of one call of the autoencoder; latents may depend on it in the "
                       "last digit")
    dtype: Literal["float16", "float32"] = Field("float16", description="of the kept posteriors: 64 KiB a view at 512 "
                                                 "pixels in float16")


@dataclass(frozen=True, slots=True)
class Views:
    """What decides the latents of a seed, besides its image and the autoencoder."""

    resolution: int  # pixels
    crops: int
    flips: bool
    batch: int
    dtype: str
    seed: int

    @property
    def count(self) -> int:
        return self.crops * (1 + self.flips)


@dataclass(frozen=True, slots=True, eq=False)
class LatentPart:
    """Posteriors of neighbouring rows of a seed index."""

    first: int  # its first row, refused or not
    rows: np.ndarray  # int64 (n,): those that could be read
    mean: np.ndarray  # (n, V, C, h, w), scaled
    std: np.ndarray
    refused: dict[str, str]  # the others: reason by seed id
    embedding: np.ndarray | None = None  # float32 (n, V, D): what a decoder of image embeddings is told of each view


def spans(count: int, views: Views, latent_shape: tuple[int, int, int]) -> list[range]:
    """Rows of each part; a function of the configuration alone, so that a later attempt finds the same parts."""
    row_bytes = 2 * views.count * int(np.prod(latent_shape)) * np.dtype(views.dtype).itemsize
    size = min(PART_SEEDS, max(1, PART_BYTES // row_bytes))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


class LatentMaker:
    """Reads, decodes, cuts and encodes rows of a seed index. Every call has one shape, so a latent depends on its
    image, the autoencoder and that shape alone."""

    def __init__(self, index: SeedIndex, data: DataConfig, prior: Any, views: Views,
                 io_threads: int = 1) -> None:
        """`prior`: StableDiffusionPrior or UnclipPrior."""
        self._prior, self._views = prior, views
        self._images = SeedBatches(index, data, max(1, views.batch // views.count), io_threads,
                                   lambda image, seed_id: view_pictures(image, seed_id, views))

    def __call__(self, rows: range) -> LatentPart:
        """The part of `rows`; the images of the next call are decoded meanwhile."""
        views = self._views
        shape = (views.count, *self._prior.latent_shape(views.resolution, views.resolution))
        sound, refused = [np.zeros(0, np.int64)], dict[str, str]()
        means, stds = [np.zeros((0, *shape), views.dtype)], [np.zeros((0, *shape), views.dtype)]
        embeds = not self._prior.decode_needs_grad
        told = [np.zeros((0, views.count, self._prior.features), np.float32)] if embeds else []
        for good, pictures, bad in self._images(rows):
            refused |= bad
            sound.append(good)
            if pictures:
                squares = [view for one in pictures for view in one]
                mean, std = self._encode(squares)
                means.append(mean.reshape(len(good), *shape))
                stds.append(std.reshape(len(good), *shape))
                if embeds:
                    told.append(self._called(self._prior.encode, squares).reshape(len(good), views.count, -1))
        return LatentPart(rows.start, np.concatenate(sound), np.concatenate(means), np.concatenate(stds), refused,
                          np.concatenate(told) if embeds else None)

    @property
    def device(self) -> str:
        return str(self._prior.device.type)

    def close(self) -> None:
        self._images.close()

    def _encode(self, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Scaled posterior means and deviations (B, C, h, w) of pictures of one size."""
        import torch

        found = self._called(lambda x_BCHW: torch.stack(self._prior.posterior(x_BCHW), dim=1), images)
        return found[:, 0].astype(self._views.dtype), found[:, 1].astype(self._views.dtype)

    def _called(self, function: Callable[[torch.Tensor], torch.Tensor], images: list[np.ndarray]) -> np.ndarray:
        """What a network says of pictures of one size, so many at once."""
        import torch

        def call(chosen: list[int]) -> torch.Tensor:
            return function(to_tensor([images[i] for i in chosen]))

        with torch.no_grad():
            return in_chunks(call, len(images), self._views.batch).cpu().numpy()


def view_pictures(image: np.ndarray, seed_id: str, views: Views) -> list[np.ndarray]:
    """uint8 squares of all views: each crop, followed by its mirror image."""
    found = []
    for crop in range(views.crops):
        # a crop's place is a stream of the seed, so its number stands in the name
        square = pixels.prepare(image, views.resolution, "crop", RowRng(views.seed, f"finetune/{crop}", seed_id, 0))
        found += [square, np.ascontiguousarray(square[:, ::-1])] if views.flips else [square]
    return found


# ---------------------------------------------------------------------------------------------------------------- files


def missing_spans(folder: Path, wanted: Iterable[range]) -> list[range]:
    """Those whose part is not in `folder` yet."""
    return [span for span in wanted if not part_file(folder, span).is_file()]


def part_file(folder: Path, span: range) -> Path:
    return folder / _name(span.start)


def write_part(folder: Path, part: LatentPart) -> None:
    """Whole or not at all."""
    from safetensors.numpy import save_file

    path = folder / _name(part.first)
    partial = path.with_suffix(".partial")
    told = {} if part.embedding is None else {"embedding": part.embedding}
    save_file({"mean": part.mean, "std": part.std, "row": part.rows, **told}, partial,
              metadata={"refused": json.dumps(part.refused)})
    os.replace(partial, path)


def finish(folder: Path, index: SeedIndex, views: Views, parts: list[range]) -> dict[str, Any]:
    """Writes the lists of a folder that holds all parts; facts for its artifact.json. Raises ModelError where no image
    could be read."""
    from safetensors import safe_open

    rows, numbers, places, refused = [], [], [], dict[str, str]()
    for number, span in enumerate(parts):
        with safe_open(folder / _name(span.start), "np") as file:
            found = file.get_tensor("row")
            refused |= json.loads(file.metadata()["refused"])
        rows.append(found)
        numbers.append(np.full(len(found), number, np.int32))
        places.append(np.arange(len(found), dtype=np.int32))
    kept = np.concatenate(rows)
    if not len(kept):
        raise ModelError(f"none of {len(index)} images can be used for fine-tuning; the first is refused for: "
                         f"{next(iter(refused.items()), '')}")
    picked = index.table.take(pa.array(kept))
    table = pa.table({"seed_id": picked["seed_id"], "label": picked["label"],
                      "part": np.concatenate(numbers), "place": np.concatenate(places)}, schema=_SCHEMA)
    pq.write_table(table, folder / _IDS, compression="zstd")
    facts = {"resolution": views.resolution, "crops": views.crops, "flips": views.flips,
             "parts": [_name(span.start) for span in parts], "classes": list(index.classes.key)}
    (folder / _FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"images": len(kept), "views": views.count, "refused": len(refused),
            "refused_examples": dict(list(refused.items())[:20])}


def _name(first: int) -> str:
    return f"part-{first:09d}.safetensors"


class Latents:
    """The cached posteriors of a folder, read view by view; nothing is held but the list of seeds."""

    def __init__(self, folder: Path | str) -> None:
        """Raises ModelError for a folder that is not complete."""
        self.folder = Path(folder)
        try:
            facts = json.loads((self.folder / _FACTS).read_text(encoding="utf-8"))
            with pq.ParquetFile(self.folder / _IDS) as file:
                table = file.read(use_threads=False)
            self._parts = [str(name) for name in facts["parts"]]
            self.views = int(facts["crops"]) * (1 + bool(facts["flips"]))
            self.classes: tuple[str, ...] = tuple(facts["classes"])
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise ModelError(f"latents {self.folder} cannot be read ({error}); move the folder away, and `rayexpand "
                             "fit` makes it again") from error
        self._ids = table["seed_id"].combine_chunks()
        self.labels: np.ndarray = table["label"].to_numpy()  # int32 (n,)
        self._part, self._place = table["part"].to_numpy(), table["place"].to_numpy()
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def seed_id(self, item: int) -> str:
        return str(self._ids[item].as_py())

    @property
    def seed_ids(self) -> pa.Array:
        return self._ids

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return tuple(self._slice(int(self._part[0]), "mean").get_shape()[2:])

    def posterior(self, item: int, view: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 (C, h, w) mean and standard deviation of the scaled latent of one view of one seed."""
        part, place = int(self._part[item]), int(self._place[item])
        mean, std = (self._slice(part, name)[place, view].astype(np.float32) for name in ("mean", "std"))
        return mean, std

    @cached_property
    def embeds(self) -> bool:
        """Whether there is an image embedding of each view."""
        return "embedding" in self._file(int(self._part[0]))

    def embedding(self, item: int, view: int) -> np.ndarray:
        """float32 (D,) image embedding of one view of one seed."""
        found: np.ndarray = self._slice(int(self._part[item]), "embedding")[int(self._place[item]), view]
        return found

    def _slice(self, part: int, name: str) -> Any:
        return self._file(part)[name]

    def _file(self, part: int) -> dict[str, Any]:
        """Its tensors by name, to be read in pieces."""
        from safetensors import SafetensorError, safe_open

        if part not in self._open:
            try:
                file = safe_open(self.folder / self._parts[part], "np")
                self._open[part] = {key: file.get_slice(key) for key in file.keys()} | {"file": file}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ModelError(f"latents {self.folder / self._parts[part]} cannot be read ({error}); move the folder "
                                 "away, and `rayexpand fit` makes it again") from error
        found: dict[str, Any] = self._open[part]
        return found


def make_here(maker: LatentMaker, wanted: Iterable[range]) -> Iterator[LatentPart]:
    """Parts, made in this process."""
    try:
        for span in wanted:
            yield maker(span)
    finally:
        maker.close()
