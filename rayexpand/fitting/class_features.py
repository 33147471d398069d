"""Visual conditions of Real-Fake: the CLIP features of images, and their mean over each class.

    fit:
      class_features: {images: 64}      # or null: all images of a class
      image_features: {}                # float16, one row for each seed

A generator with two text encoders reads two features side by side, of the image towers that go with them:

    guide: {weights: ViT-L-14, checkpoint: ...}
    fit:
      class_features: {guide_2: {weights: ViT-bigG-14, checkpoint: ...}}     # Stable Diffusion XL: 768 + 1280

    paper    here              meaning, feature units
    f_i      features_ND       projected CLIP embedding of image i, as the model gives it
    S_k      `images` of k     images drawn from class k without replacement
    v_k      features_KD       mean of f over S_k

Features keep their length: a mean of features of unit length is another, shorter vector, and what a generator was
fine-tuned with must be what it is sampled with. seed_columns.py says how both lie on disk.
"""

# N images, K classes, D features

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayexpand.artifacts.columns import write_class_features, write_image_features
from rayexpand.artifacts.store import publish
from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Later, Section
from rayexpand.data.batches import Resize
from rayexpand.fitting.costs import features_pass
from rayexpand.fitting.features import Block, Intake, by_class, gathered
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.models.guide_files import CLASSIFIER, check_guide, features_of, kind_of, present_guide
from rayexpand.models.guides import guide_hash
from rayexpand.runs.config import GuideConfig, RunConfig, unnamed
from rayexpand.runs.stages import PlanStage, Sizes

VERSION = 1  # raised when the code below makes something else of the same configuration
_CHUNK = 1 << 14  # rows copied at once
SHOWN = 20  # refused images named in artifact.json


class ImageFeaturesFit(Section):
    guide: Annotated[GuideConfig | None, Later(None)] = Field(None, description="a guide of any kind that compares "
                                                              "samples with these images (accept); null: the CLIP "
                                                              "model that guide of the file names")
    batch: int = Field(64, ge=1, description="images of one guide call; features may depend on it in the last digit")
    resize: Resize = Field("crop", description="crop: shorter side, then the middle (CLIP's own); squash: both sides")
    guide_2: Annotated[GuideConfig | None, Later(None)] = Field(
        None, description="a second CLIP model, whose features stand behind those of guide; for generators with two "
        "text encoders, such as Stable Diffusion XL")

    @property
    def intake(self) -> Intake:
        return Intake(self.batch, self.resize)


class ClassFeaturesFit(ImageFeaturesFit):
    images: int | None = Field(64, ge=1, description="images drawn of each class, all where it has fewer; null: all "
                               "(Real-Fake averages drawn images and does not say how many; 64 is ours)")


def width_by(section: ImageFeaturesFit, config: FitBase) -> int | None:
    """Numbers of each feature; None where a guide is not on this machine yet."""
    widths = [features_of(guide.weights, guide.checkpoint) for guide in guides_of(section, config)]
    return None if None in widths else sum(one for one in widths if one is not None)


def guides_of(section: ImageFeaturesFit, config: FitBase) -> list[GuideConfig]:
    """Those whose features stand side by side."""
    return [section.guide or config.guide, *([section.guide_2] if section.guide_2 is not None else [])]


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


def make_class_features(folder: Path, blocks: Sequence[Iterable[Block]], index: SeedIndex, made: ClassFeaturesFit,
                        encoders_sha256: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Writes the means of the features of `index` (see `drawn`), which one or two encoders give; returns facts. Raises
    UsageError for a class without an image, or features that are not finite."""
    scratch = folder / "features.tmp"
    features_ND, sound_N, refused = _side_by_side(blocks, len(index), scratch, progress)
    means = [found_ND.mean(axis=0, dtype=np.float64)
             for found_ND in by_class(features_ND, sound_N, index, "mean feature")]
    del features_ND
    scratch.unlink()
    write_class_features(folder, np.stack(means).astype(np.float32), class_keys=index.classes.key,
                         images_per_class=made.images, **_encoders(encoders_sha256))
    counts = np.bincount(index.labels[sound_N], minlength=len(index.classes))
    return {"images": int(counts.sum()), "fewest_of_a_class": int(counts.min()), **_refusals(refused)}


def make_image_features(folder: Path, blocks: Sequence[Iterable[Block]], index: SeedIndex,
                        encoders_sha256: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Writes the features of every seed that can be read, which one or two encoders give; returns facts. Raises
    UsageError where none can, and ModelError for features that are not finite."""
    scratch = folder / "features.tmp"
    features_ND, sound_N, refused = _side_by_side(blocks, len(index), scratch, progress)
    rows = np.flatnonzero(sound_N)
    if not len(rows):
        raise UsageError("none of the images of this dataset can be read, so there are no features; the first: "
                         f"{next(iter(refused.values()))}")
    ids = index.table["seed_id"].take(pa.array(rows)).to_pylist()
    write_image_features(folder, ids, features_ND, rows, **_encoders(encoders_sha256))
    del features_ND
    scratch.unlink()
    return {"images": len(rows), **_refusals(refused)}


def _side_by_side(blocks: Sequence[Iterable[Block]], count: int, scratch: Path, progress: Progress,
                  ) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """What `gathered` gives, of the features of all encoders in their order; `scratch` is a file that goes when the
    features do."""
    if len(blocks) == 1:
        return gathered(blocks[0], count, scratch, progress)
    files = [scratch.with_name(f"{scratch.name}.{place}") for place in range(len(blocks))]
    parts = [gathered(one, count, file, progress) for one, file in zip(blocks, files, strict=True)]
    shape = (count, sum(features_ND.shape[1] for features_ND, _, _ in parts))
    whole_ND = np.memmap(scratch, np.float32, "w+", shape=shape)
    sound_N, refused, start = np.ones(count, bool), dict[str, str](), 0
    for features_ND, sound, reasons in parts:
        for row in range(0, count, _CHUNK):
            whole_ND[row:row + _CHUNK, start:start + features_ND.shape[1]] = features_ND[row:row + _CHUNK]
        sound_N, refused, start = sound_N & sound, refused | reasons, start + features_ND.shape[1]
    for file in files:
        file.unlink()
    return whole_ND, sound_N, refused


def _encoders(hashes: Sequence[str]) -> dict[str, str]:
    return dict(zip(("encoder_sha256", "encoder_2_sha256"), hashes, strict=False))


def _refusals(refused: dict[str, str]) -> dict[str, Any]:
    return {"refused": len(refused), "refused_examples": dict(list(refused.items())[:SHOWN])}


class ImageFeaturesMaker(Maker):
    kind = "image_features"
    text = "CLIP feature of each image"
    section: ClassVar[type[ImageFeaturesFit]] = ImageFeaturesFit
    by_guide = True

    def for_run(self, config: RunConfig) -> ImageFeaturesFit:
        judge = None if config.accept is None or self.kind in config.method.needs() else config.accept.guide
        return self.section(guide=judge)

    def stages(self, section: ImageFeaturesFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        names = [one.weights for one in guides_of(section, config)]
        most = getattr(section, "images", None)  # of a class
        images = sizes.images if most is None else min(sizes.images, most * sizes.classes)
        return [features_pass(f"fit {self.kind}", images, names, config.device, config.estimate,
                              config.runtime.io_threads)]

    def make(self, section: ImageFeaturesFit, config: FitBase, world: World) -> Path:
        guides = guides_of(section, config)
        hashes = [guide_hash(one.weights, one.checkpoint, world.progress) for one in guides]
        made_from = {"version": VERSION, "data": data_facts(config, world.index), "guide_sha256": hashes[0],
                     **section.model_dump(exclude={"guide", "guide_2"}), **self._drawn_from(section, config),
                     **({"guide_2_sha256": hashes[1]} if section.guide_2 is not None else {})}
        index = self._used(section, config, world)

        def make(folder: Path) -> dict[str, Any]:
            costs: list[dict[str, Any]] = [{} for _ in guides]
            blocks = [world.engine.blocks(config.model_copy(update={"guide": guide}), sha256, index, section.intake,
                                          cost) for guide, sha256, cost in zip(guides, hashes, costs, strict=True)]
            facts = self._write(folder, blocks, index, section, hashes, world.progress)
            named = dict(zip(("guide", "guide_2"), (one.model_dump(mode="json") for one in guides), strict=False))
            return {**_summed(costs), **facts, **named}

        return publish(config.out, self.kind, made_from, make)

    def problems(self, section: ImageFeaturesFit, config: FitBase, *, on_ray: bool) -> list[str]:
        adapter = config.fit.adapter
        told = self.kind == "class_features" or (adapter is not None and adapter.features_kind == self.kind)
        if told and section.guide is not None and _is_classifier(section.guide):
            return [_no_tower(f"fit.{self.kind}.guide.weights", section.guide)]
        if (guide := section.guide_2) is None:
            return []
        field = f"fit.{self.kind}.guide_2.weights"
        if found := unnamed(field, guide, config.data):
            return found
        if found := check_guide(guide.weights, guide.checkpoint):
            return [f"{field}: {one}" for one in found]
        return [_no_tower(field, guide)] if _is_classifier(guide) else []

    def _drawn_from(self, section: Any, config: FitBase) -> dict[str, Any]:
        return {}

    def _used(self, section: Any, config: FitBase, world: World) -> SeedIndex:
        return world.index

    def _write(self, folder: Path, blocks: Sequence[Iterable[Block]], index: SeedIndex, section: Any,
               hashes: Sequence[str], progress: Progress) -> dict[str, Any]:
        return make_image_features(folder, blocks, index, hashes, progress)


def _is_classifier(guide: GuideConfig) -> bool:
    folder = present_guide(guide.weights)
    return folder is not None and kind_of(folder) == CLASSIFIER


def _no_tower(field: str, guide: GuideConfig) -> str:
    return f"{field}: {guide.weights} is a classifier; features beside a text need the image tower of a CLIP model"


def _summed(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of all encoders; what is no sum is that of the last one."""
    total: dict[str, Any] = {}
    for name, one in ((name, one) for cost in costs for name, one in cost.items()):
        total[name] = total.get(name, 0.0) + one if name.endswith("_seconds") else one
    return total


class ClassFeaturesMaker(ImageFeaturesMaker):
    kind = "class_features"
    text = "mean CLIP feature of each class"
    section = ClassFeaturesFit

    def _drawn_from(self, section: ClassFeaturesFit, config: FitBase) -> dict[str, Any]:
        return {"seed": None if section.images is None else config.seed}

    def _used(self, section: ClassFeaturesFit, config: FitBase, world: World) -> SeedIndex:
        return drawn(world.index, section.images, config.seed)

    def _write(self, folder: Path, blocks: Sequence[Iterable[Block]], index: SeedIndex, section: ClassFeaturesFit,
               hashes: Sequence[str], progress: Progress) -> dict[str, Any]:
        return make_class_features(folder, blocks, index, section, hashes, progress)
