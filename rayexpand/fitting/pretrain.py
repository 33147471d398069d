"""A small generator and its guide, trained from nothing on a dataset of any layout.

    data: {source: parquet, path: data/cifar10, split: train}
    fit:
      pretrain:
        size: 32
        augment: photos
        captions: ["a photo of a {name}", "a blurry photo of a {name}"]
        vae: {channels: [32, 64], latent_channels: 4, steps: 1000}
        gate: {test: {source: parquet, path: data/cifar10, split: test}, max_loss: 1.0}

The artifact is a folder of kind `prior`:

    prior-1f0c9a3e/pipeline/           the generator in diffusers' layout, for prior.weights
                   guide/              CLIP in open_clip's layout, for guide.weights
                   measured.json       quality, seconds, and what the gate says (prior_quality.py)
                   sheet.png           real images, their reconstructions, samples

The embedded digits are one setting of it (jobs/digits/pretrain.yaml): the same weights, to the bit. Everything runs in
one process on one device, with the images in memory: a generator that needs more is fine-tuned, not pretrained.
Checkpoints lie in <out>/.prior-<digest>.steps until the artifact is whole, so a killed fit loses at most
`checkpoint_steps` steps.
"""

# n images, K classes, N captions

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, field_validator

from rayexpand.artifacts.store import neighbours, publish
from rayexpand.classifier.recipe import Recipe, make_recipe
from rayexpand.contract.errors import UsageError, few
from rayexpand.contract.prompts import Template, format_prompt
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section, digest
from rayexpand.data import seeds
from rayexpand.data.batches import SeedBatches, resized
from rayexpand.data.seeds import DataConfig
from rayexpand.data.subsets import ids_hash, shared_images
from rayexpand.fitting.costs import unit_on
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.models.tiny.setting import Setting
from rayexpand.models.tiny.setting import problems as setting_problems
from rayexpand.runs.config import GuideConfig
from rayexpand.runs.stages import PlanStage, Sizes, unknown

if TYPE_CHECKING:
    from rayexpand.models.tiny.pretrain import Trained, TrainingImages

KIND = "prior"
VERSION = 1  # raised when the code below makes something else of the same configuration
ASKED = "a photo of a {name}"  # of a guide about a class, in every run
READ = 1024  # images read and decoded at once
MEMORY = 16 << 30  # bytes of uint8 pixels that are held
SMALL = 32  # pixels: images of this side and below are made for CPUs
SHOWN = 2000  # about so many training images are measured on where no test images are named


class GateFit(Section):
    """Is the autoencoder good enough? A classifier of the real images says what its reconstructions have lost."""

    test: DataConfig = Field(description="real images of the same classes that are not trained on")
    recipe: dict[str, Any] = Field({}, description="preset and fields of the classifier's training recipe")
    max_loss: float = Field(1.0, ge=0, description="points of accuracy that may be lost on reconstructions")

    @field_validator("recipe")
    @classmethod
    def _is_a_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        make_recipe(recipe)
        return recipe


class PretrainFit(Setting):
    captions: tuple[Template, ...] = Field((ASKED, "a {name}", "a picture of a {name}"), min_length=1, description=(
        "templates with {name}, {metaclass}, {noun}; their words and the class names become the tokenizer's"))
    checkpoint_steps: int = Field(200, ge=1, description="training steps between two checkpoints")
    gate: GateFit | None = Field(None, description="measure on these test images; null: on the training images")


@dataclass(frozen=True)
class Pictures:
    """Decoded images of a dataset."""

    x_nHWC: np.ndarray  # uint8
    labels: np.ndarray  # int64 (n,)
    refused: int = 0


@dataclass(frozen=True)
class PretrainJob:
    """A pretraining: the section, and what it is given by the rest of its file."""

    made: PretrainFit
    seed: int
    data: DataConfig
    index: SeedIndex
    facts: Mapping[str, Any]  # of the training images, for identity
    out: str
    device: str
    threads: int = 1
    io_threads: int = 1

    @property
    def training(self) -> dict[str, Any]:
        """What the weights depend on."""
        classes = self.index.classes
        return {"version": VERSION, "seed": self.seed, "data": dict(self.facts),
                "words": [list(classes.metaclass), list(classes.noun)],
                **self.made.model_dump(mode="json", include=set(Setting.model_fields) - _MEASURING | {"captions"})}

    @property
    def steps(self) -> Path:
        """Folder of its checkpoints."""
        return Path(self.out) / f".{KIND}-{digest(self.training)[:8]}.steps"

    def made_from(self, test: SeedIndex | None) -> dict[str, Any]:
        """What the artifact depends on: the training, and how it is measured."""
        found = {**self.training, **self.made.model_dump(mode="json", include=_MEASURING | {"gate"})}
        if test is not None:
            found["test_sha256"] = ids_hash(test.seed_ids)
        return found


_MEASURING = {"samples", "sample_steps", "guidance_scale"}


def check_pretrain(made: PretrainFit) -> list[str]:
    """What is wrong with a section as far as it and files on this machine say, one line each: `field: why`."""
    problems = setting_problems(made)
    if ASKED not in made.captions:
        problems.append(f"captions: {ASKED!r} is not among them, but it is what a guide is asked in every run; add it")
    for one in made.captions:
        if "{" not in one.replace("{{", ""):
            problems.append(f"captions: {one!r} names no class; write {{name}} where its name belongs")
    if made.gate is None:
        return problems
    problems += [f"gate.test.{line}" for line in (re.sub(r"^data\.", "", one) for one in seeds.check(made.gate.test))]
    given = made.gate.recipe
    problems += [f"gate.recipe.{name}: {given[name]} px, but the images have {made.size}; take it out"
                 for name in ("size", "test_size") if given.get(name) not in (None, made.size)]
    if given.get("checkpoint") is not None:
        problems.append("gate.recipe.checkpoint: the gate's classifier is trained on these images alone; take it out")
    return problems


def open_test(job: PretrainJob) -> SeedIndex | None:
    """The index of the gate's test images. Raises SeedDataError, and UsageError where they are of other classes than
    the training images, or the same images."""
    if job.made.gate is None:
        return None
    data = job.made.gate.test
    test = seeds.build_index(data)
    if test.classes.key != job.index.classes.key:
        raise UsageError(f"fit.pretrain.gate.test: its classes {few(test.classes.key)} are not those of data "
                         f"{few(job.index.classes.key)}; give the test part of the same dataset")
    if shared := shared_images((job.index, job.data), (test, data)):
        raise UsageError(f"fit.pretrain.gate.test: {len(shared):,} of its images are training images "
                         f"({few(shared)}); choose another part with gate.test.split or gate.test.ids")
    return test


def make_prior(job: PretrainJob, test: SeedIndex | None, progress: Progress, folder: Path) -> dict[str, Any]:
    """Fills the folder of an artifact; facts for its artifact.json. Raises ModelError, UsageError."""
    from rayexpand.contract.device import choose_device
    from rayexpand.fitting import prior_quality
    from rayexpand.models.tiny import pretrain

    device, classes = choose_device(job.device), job.index.classes
    known = read_pictures(job.index, job.data, job.made.size, job.io_threads, progress)
    with pretrain.settled(job.threads):
        trained = _trained(job, _images(job, known, device), folder, progress)
        step = max(1, len(known.labels) // SHOWN)
        shown = Pictures(known.x_nHWC[::step], known.labels[::step])
        if test is not None and job.made.gate is not None:
            shown = read_pictures(test, job.made.gate.test, job.made.size, job.io_threads, progress)
        quality = prior_quality.measure(trained, shown.x_nHWC, shown.labels, classes.asked, job.seed, progress)
        measured = {"measured_on": "training images" if test is None else "test images", **quality.numbers,
                    "seconds": {stage: {kind: round(one, 1) for kind, one in spent.items()}
                                for stage, spent in trained.seconds.items()}}
        if job.made.gate is not None:
            measured |= prior_quality.gate(quality, known.x_nHWC, known.labels, gate_recipe(job.made),
                                           job.made.gate.max_loss, job.seed, device, progress)
    verdict = prior_quality.verdict(measured)
    (folder / "measured.json").write_text(json.dumps({**measured, "verdict": verdict}, indent=1, ensure_ascii=False)
                                         + "\n", encoding="utf-8")
    prior_quality.sheet(quality, classes.asked, str(measured["measured_on"])).save(folder / "sheet.png")
    return {"device": device.type, "training_sha256": digest(job.training), "refused": known.refused,
            "gate_passed": measured.get("gate_passed"), "measured": measured,
            "summary": [*prior_quality.summary(measured), verdict]}


def gate_recipe(made: PretrainFit) -> Recipe:
    """The gate's recipe at the size of the images."""
    assert made.gate is not None
    return make_recipe({**made.gate.recipe, "size": made.size, "test_size": None})


def read_pictures(index: SeedIndex, data: DataConfig, size: int, io_threads: int, progress: Progress) -> Pictures:
    """All images that can be read, the middle square of each brought to `size` (bicubic, antialiased). Raises
    UsageError for a class without any, and where they would not fit into memory."""
    if (needed := len(index) * size * size * 3) > MEMORY:
        raise UsageError(f"fit.pretrain: {len(index):,} images of {size} px are {needed:,} bytes, and {MEMORY:,} may "
                         "be held; take fewer with data.per_class, or a smaller size")
    x_nHWC, refused, rows = np.empty((len(index), size, size, 3), np.uint8), 0, list[int]()
    batches = SeedBatches(index, data, READ, io_threads, lambda pixels, _: resized(pixels, (size, size), "crop"))
    try:
        for sound, images, bad in batches(range(len(index))):
            if images:
                x_nHWC[len(rows):len(rows) + len(images)] = images
            rows.extend(sound.tolist())
            refused += len(bad)
            progress("reading images", len(rows) + refused, len(index))
    finally:
        batches.close()
    labels = index.labels[rows].astype(np.int64)
    if absent := [index.classes.key[k] for k in np.flatnonzero(np.bincount(labels, minlength=len(index.classes)) == 0)]:
        raise UsageError(f"fit.pretrain: no image can be read of {len(absent)} classes ({few(absent)}) of "
                         f"{data.path or data.source}; add images to them, or leave them out of the dataset")
    return Pictures(x_nHWC[:len(rows)], labels, refused)


def _images(job: PretrainJob, known: Pictures, device: Any) -> TrainingImages:
    import torch

    from rayexpand.models.tiny import pretrain

    captions = tuple(tuple(format_prompt(one, label, job.index.classes) for one in job.made.captions)
                     for label in range(len(job.index.classes)))
    return pretrain.TrainingImages(pretrain.to_bytes(known.x_nHWC).to(device), torch.from_numpy(known.labels), captions)


def _trained(job: PretrainJob, images: TrainingImages, folder: Path, progress: Progress) -> Trained:
    """Trained models, also written to `folder`: trained now, or those of an artifact that was measured otherwise."""
    from rayexpand.models.tiny import pretrain
    from rayexpand.storage.checkpoints import Checkpoints

    for other, facts in neighbours(Path(job.out), KIND):
        if facts.get("training_sha256") == digest(job.training):
            for part in ("pipeline", "guide"):
                shutil.copytree(other / part, folder / part)
            return pretrain.load(folder, job.made, facts["measured"]["seconds"], images.x_n3HW.device)
    trained = pretrain.train(pretrain.PretrainStage(images, job.made, job.seed, progress,
                                                    Checkpoints(job.steps, job.made.checkpoint_steps)))
    trained.save(folder)
    return trained


class PretrainMaker(Maker):
    kind = "pretrain"
    text = "a small generator with its guide, trained from nothing; its guide serves the other sections"
    section = PretrainFit

    def stages(self, section: PretrainFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        what = f"{section.guide.steps:,} + {section.vae.steps:,} + {section.unet.steps:,} steps"
        return [unknown("fit pretrain", what, "small networks trained in one process are not counted; the first fit "
                        "says how long they take", unit_on(config.device, section.size <= SMALL))]

    def make(self, section: PretrainFit, config: FitBase, world: World) -> Path:
        job = PretrainJob(section, config.seed, config.data, world.index, data_facts(config, world.index), config.out,
                          config.device, config.runtime.torch_threads, config.runtime.io_threads)
        test = open_test(job)
        folder = publish(config.out, KIND, job.made_from(test),
                         lambda folder: world.engine.alone(partial(make_prior, job, test), world.progress, folder))
        shutil.rmtree(job.steps, ignore_errors=True)
        return folder

    def problems(self, section: PretrainFit, config: FitBase, *, on_ray: bool) -> list[str]:
        return [f"fit.pretrain.{one}" for one in check_pretrain(section)]

    def is_here(self, section: PretrainFit) -> bool:
        return True

    def role(self, section: PretrainFit) -> str:
        return "prior"

    def applied(self, config: FitBase, folder: Path) -> FitBase:
        return config.model_copy(update={
            "guide": GuideConfig(weights=str(folder / "guide")),
            "prior": config.prior.model_copy(update={"weights": str(folder / "pipeline")})})
