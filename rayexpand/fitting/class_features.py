"""Visual conditions of Real-Fake: the CLIP features of images, and their mean over each class.

    fit:
      class_features: {images: 64}      # or null: all images of a class
      image_features: {}                # float16, one row for each seed

    paper    here              meaning, feature units
    f_i      features_ND       projected CLIP embedding of image i, as the model gives it
    S_k      `images` of k     images drawn from class k without replacement
    v_k      features_KD       mean of f over S_k

Features keep their length: a mean of features of unit length is another, shorter vector, and what a generator was
fine-tuned with must be what it is sampled with. seed_columns.py says how both lie on disk.
"""

# N images, K classes, D features

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayexpand.artifacts.columns import write_class_features, write_image_features
from rayexpand.artifacts.store import publish
from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.data.batches import Resize
from rayexpand.fitting.features import Block, Intake, by_class, gathered
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.models.guides import guide_hash

VERSION = 1  # raised when the code below makes something else of the same configuration
SHOWN = 20  # refused images named in artifact.json


class ImageFeaturesFit(Section):
    batch: int = Field(64, ge=1, description="images of one guide call; features may depend on it in the last digit")
    resize: Resize = Field("crop", description="crop: shorter side, then the middle (CLIP's own); squash: both sides")

    @property
    def intake(self) -> Intake:
        return Intake(self.batch, self.resize)


class ClassFeaturesFit(ImageFeaturesFit):
    images: int | None = Field(64, ge=1, description="images drawn of each class, all where it has fewer; null: all "
                               "(Real-Fake averages drawn images and does not say how many; 64 is ours)")


def drawn(index: SeedIndex, images: int | None, seed: int) -> SeedIndex:
    """The rows that the mean of each class is taken over, in the order of the index: `images` of each class, drawn
    without replacement among those that have no known fault. Fewer images are the first of more."""
    sound = np.array([not fault for fault in index.table["fault"].to_pylist()], bool)
    if images is not None:
        number = PlanRng(seed, "class_features").per_seed("images", index.seed_ids)
        order = np.lexsort((number, ~sound, index.labels))
        labels = index.labels[order]
        rank = np.arange(len(order)) - np.searchsorted(labels, labels, side="left")
        sound[order[rank >= images]] = False
    return SeedIndex(index.table.take(pa.array(np.flatnonzero(sound))), index.classes)


def make_class_features(folder: Path, blocks: Iterable[Block], index: SeedIndex, made: ClassFeaturesFit,
                        encoder_sha256: str, progress: Progress) -> dict[str, Any]:
    """Writes the means of the features of `index` (see `drawn`); returns facts. Raises UsageError for a class without
    an image, or features that are not finite."""
    scratch = folder / "features.tmp"
    features_ND, sound_N, refused = gathered(blocks, len(index), scratch, progress)
    means = [found_ND.mean(axis=0, dtype=np.float64)
             for found_ND in by_class(features_ND, sound_N, index, "mean feature")]
    del features_ND
    scratch.unlink()
    write_class_features(folder, np.stack(means).astype(np.float32), class_keys=index.classes.key,
                         encoder_sha256=encoder_sha256, images_per_class=made.images)
    counts = np.bincount(index.labels[sound_N], minlength=len(index.classes))
    return {"images": int(counts.sum()), "fewest_of_a_class": int(counts.min()), **_refusals(refused)}


def make_image_features(folder: Path, blocks: Iterable[Block], index: SeedIndex, encoder_sha256: str,
                        progress: Progress) -> dict[str, Any]:
    """Writes the features of every seed that can be read; returns facts. Raises UsageError where none can, and
    ModelError for features that are not finite."""
    scratch = folder / "features.tmp"
    features_ND, sound_N, refused = gathered(blocks, len(index), scratch, progress)
    rows = np.flatnonzero(sound_N)
    if not len(rows):
        raise UsageError("none of the images of this dataset can be read, so there are no features; the first: "
                         f"{next(iter(refused.values()))}")
    ids = index.table["seed_id"].take(pa.array(rows)).to_pylist()
    write_image_features(folder, ids, features_ND, rows, encoder_sha256=encoder_sha256)
    del features_ND
    scratch.unlink()
    return {"images": len(rows), **_refusals(refused)}


def _refusals(refused: dict[str, str]) -> dict[str, Any]:
    return {"refused": len(refused), "refused_examples": dict(list(refused.items())[:SHOWN])}


class ImageFeaturesMaker(Maker):
    kind = "image_features"
    text = "CLIP feature of each image"
    section: ClassVar[type[ImageFeaturesFit]] = ImageFeaturesFit

    def for_run(self) -> ImageFeaturesFit:
        return self.section()

    def make(self, section: ImageFeaturesFit, config: FitBase, world: World) -> Path:
        guide = guide_hash(config.guide.weights, config.guide.checkpoint, world.progress)
        made_from = {"version": VERSION, "data": data_facts(config, world.index), "guide_sha256": guide,
                     **section.model_dump(), **self._drawn_from(section, config)}
        index = self._used(section, config, world)

        def make(folder: Path) -> dict[str, Any]:
            costs: dict[str, Any] = {}
            blocks = world.engine.blocks(config, guide, index, section.intake, costs)
            facts = self._write(folder, blocks, index, section, guide, world.progress)
            return {**costs, **facts, "guide": config.guide.model_dump(mode="json")}

        return publish(config.out, self.kind, made_from, make)

    def _drawn_from(self, section: Any, config: FitBase) -> dict[str, Any]:
        return {}

    def _used(self, section: Any, config: FitBase, world: World) -> SeedIndex:
        return world.index

    def _write(self, folder: Path, blocks: Iterable[Block], index: SeedIndex, section: Any, guide: str,
               progress: Progress) -> dict[str, Any]:
        return make_image_features(folder, blocks, index, guide, progress)


class ClassFeaturesMaker(ImageFeaturesMaker):
    kind = "class_features"
    text = "mean CLIP feature of each class"
    section = ClassFeaturesFit

    def _drawn_from(self, section: ClassFeaturesFit, config: FitBase) -> dict[str, Any]:
        return {"seed": None if section.images is None else config.seed}

    def _used(self, section: ClassFeaturesFit, config: FitBase, world: World) -> SeedIndex:
        return drawn(world.index, section.images, config.seed)

    def _write(self, folder: Path, blocks: Iterable[Block], index: SeedIndex, section: ClassFeaturesFit, guide: str,
               progress: Progress) -> dict[str, Any]:
        return make_class_features(folder, blocks, index, section, guide, progress)
