"""Fine-tuning a generator on a dataset: latents once, then steps with checkpoints, then an adapter. In this process;
on_ray/finetune.py makes the latents with a pool of actors and spreads the same loop over Ray Train workers.

    <out>/latents-1f0c9a3e/            posteriors (latents.py), shared by every recipe on these images
          .adapter-5b2e07c1.work/      an unfinished fine-tuning (run.py); the same command goes on from it
          adapter-5b2e07c1/            adapter.json, pytorch_lora_weights.safetensors, tokens.safetensors (an adapter),
                                       or a whole pipeline (strategy full, then called generator-...), with
                                       artifact.json, sheets/, tensorboard/
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexpand.artifacts.columns import columns_hash, features_width, width_problem
from rayexpand.artifacts.store import artifact_digest, publish, read_facts
from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import ClassTable, SeedIndex
from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.adapter.config import AdapterFit, adapter_problems, word_problems
from rayexpand.fitting.adapter.latents import VERSION as LATENTS_VERSION
from rayexpand.fitting.adapter.latents import (
    LatentMaker,
    LatentPart,
    finish,
    make_here,
    missing_spans,
    part_file,
    spans,
    write_part,
)
from rayexpand.fitting.adapter.loader import Sources
from rayexpand.fitting.adapter.train import TRAINING, Base, TuneJob, train_here
from rayexpand.fitting.class_features import ImageFeaturesFit, width_by
from rayexpand.fitting.costs import tuned, unit_on
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.models.cost import cost_of
from rayexpand.models.folders import EMBEDDED
from rayexpand.models.prior import check_size, inspect_prior, load_prior, prior_hash
from rayexpand.runs.config import RuntimeConfig
from rayexpand.runs.fleet_hours import GPU
from rayexpand.runs.stages import PlanStage, Sizes, unknown

if TYPE_CHECKING:
    from rayexpand.fitting.adapter.latents import Views

VERSION = 1  # raised when the code below trains something else from the same configuration
LATENT_CHANNELS, LATENT_FACTOR = 4, 8  # of the generators that models.cost knows
KINDS = {"full": "generator"}  # artifact by strategy; the others make an adapter


@dataclass(frozen=True, slots=True)
class Data:
    """The images to train on, listed."""

    config: DataConfig
    index: SeedIndex
    facts: dict[str, Any]  # what an artifact depends on


@dataclass(frozen=True, slots=True)
class LatentTask:
    """What a process needs to make latents."""

    base: Base
    views: Views
    data: DataConfig
    io_threads: int


@dataclass(frozen=True, slots=True)
class TuneEngine:
    """Where the work is done; with as many workers the numbers do not depend on it.

    `parts(task, index, spans, costs)` makes latents, in any order, and leaves seconds of other processes in `costs`;
    `train(job, progress)` leaves `result/` in the folder of the job, and returns the CPU seconds that this process
    spent on it. `spreads`: whether it uses workers.
    """

    parts: Callable[[LatentTask, SeedIndex, list[range], dict[str, Any]], Iterator[LatentPart]]
    train: Callable[[TuneJob, Progress], float]
    spreads: bool = False


def fit_adapter(made: AdapterFit, data: Data, *, out: str, weights: str, seed: int, device: str,
                runtime: RuntimeConfig, here: Mapping[str, Path], progress: Progress, engine: TuneEngine) -> Path:
    """The folder of the adapter (strategy full: of the generator) that follows from these; what is missing is made.

    `here`: artifacts that the same file made, by kind. Raises ModelError, UsageError, StorageError, and RayexpandError
    where training diverges.
    """
    job, kind, made_from = prepare_job(made, data, out=out, weights=weights, seed=seed, device=device,
                                       runtime=runtime, here=here, progress=progress, engine=engine)
    work = Path(job.folder)

    def make(folder: Path) -> dict[str, Any]:
        work.mkdir(exist_ok=True)
        spent = 0.0 if (work / "result").is_dir() else engine.train(job, progress)
        shutil.copytree(work / "result", folder, dirs_exist_ok=True)
        for name in ("sheets", "tensorboard"):
            if (work / name).is_dir():
                shutil.copytree(work / name, folder / name)
        facts = json.loads((folder / TRAINING).read_text())
        (folder / TRAINING).unlink()
        seen = {name: one for name, one in read_facts(job.sources.latents).items() if name.startswith("refused")}
        return {**facts, **seen, "cpu_seconds": facts["training_cpu_seconds"] - spent}  # `publish` counts this process

    found = publish(out, kind, made_from, make)
    shutil.rmtree(work, ignore_errors=True)
    return found


def prepare_job(made: AdapterFit, data: Data, *, out: str, weights: str, seed: int, device: str,
                runtime: RuntimeConfig, here: Mapping[str, Path], progress: Progress,
                engine: TuneEngine) -> tuple[TuneJob, str, dict[str, Any]]:
    """(the fine-tuning, with its latents made; the kind of artifact it becomes; what that follows from)."""
    base = Base(weights, prior_hash(weights, progress), device, runtime.torch_threads)
    features = _folder(made.features, here, made.features_kind)
    _check_width(made, features, weights)
    latents = _fit_latents(made, data, base, seed, out, runtime.io_threads, progress, engine)
    sources = Sources(str(latents.absolute()), _folder(made.captions, here, made.captions_kind), features)
    hashes = {"latents": str(read_facts(latents)["digest"])}
    for source, of in (("captions", made.captions_kind), ("features", made.features_kind)):
        if of is not None:
            hashes[source] = columns_hash(getattr(sources, source), of)
    classes, world = data.index.classes, max(1, made.workers) if engine.spreads else 1
    made_from: dict[str, Any] = {
        "version": VERSION, "seed": seed, "data": data.facts, "base_sha256": base.sha256, "world": world,
        "metaclasses": list(classes.metaclass), "nouns": list(classes.noun),
        "recipe": made.finetune.identity(world), **hashes}
    kind = KINDS.get(made.finetune.strategy, "adapter")
    identity = artifact_digest(kind, made_from)
    work = Path(out, f".{kind}-{identity[:8]}.work")
    return TuneJob(made, classes, seed, base, sources, hashes, identity, str(work.absolute()), world), kind, made_from


def _check_width(made: AdapterFit, features: str | None, weights: str) -> None:
    """Raises ModelError for features of another width than the hidden states have, where neither was known when the
    plan was checked."""
    if (kind := made.features_kind) is None or features is None:
        return
    if problem := width_problem(features_width(features, kind), inspect_prior(weights).text_width):
        raise ModelError(f"fit.adapter.features: {features} {problem}")


def _folder(named: str | None, here: Mapping[str, Path], kind: str | None) -> str | None:
    if kind is None:
        return None
    return str(Path(named).expanduser().absolute()) if named is not None else str(here[kind].absolute())


# -------------------------------------------------------------------------------------------------------------- latents


def _fit_latents(made: AdapterFit, data: Data, base: Base, seed: int, out: str, io_threads: int, progress: Progress,
                 engine: TuneEngine) -> Path:
    facts = inspect_prior(base.weights)
    views = made.views(facts, seed)
    check_size(facts, views.resolution)  # again, for a generator that was not there when the plan was checked
    side = views.resolution // facts.vae_factor
    parts = spans(len(data.index), views, (facts.latent_channels, side, side))
    made_from = {"version": LATENTS_VERSION, "data": data.facts, "base_sha256": base.sha256, **asdict(views)}
    work = Path(out, f".latents-{artifact_digest('latents', made_from)[:8]}.work")

    def make(folder: Path) -> dict[str, Any]:
        work.mkdir(exist_ok=True)
        wanted, costs = missing_spans(work, parts), dict[str, Any]()
        done = len(data.index) - sum(map(len, wanted))
        if wanted:
            task = LatentTask(base, views, data.config, io_threads)
            sizes = {span.start: len(span) for span in wanted}
            for part in engine.parts(task, data.index, wanted, costs):
                write_part(work, part)
                done += sizes[part.first]
                progress("latents", done, len(data.index))
        for span in parts:
            _share(part_file(work, span), folder)
        return {**costs, **finish(folder, data.index, views, parts)}

    found = publish(out, "latents", made_from, make)
    shutil.rmtree(work, ignore_errors=True)
    return found


def _share(file: Path, folder: Path) -> None:
    """Makes `file` also appear in `folder`; it stays where it is until the whole artifact is there."""
    try:
        os.link(file, folder / file.name)
    except OSError:  # a file system without links
        shutil.copyfile(file, folder / file.name)


def parts_here(task: LatentTask, index: SeedIndex, wanted: list[range], costs: dict[str, Any]) -> Iterator[LatentPart]:
    """Latents, made in this process."""
    started = time.perf_counter()
    maker = open_maker(task, index)
    try:
        yield from make_here(maker, wanted)
    finally:
        device = maker.device
        costs |= {"device": device, "gpu_seconds": (time.perf_counter() - started) * (device == "cuda")}


def open_maker(task: LatentTask, index: SeedIndex) -> LatentMaker:
    prior = load_prior(task.base.weights, dtype="float32", device=task.base.device)
    return LatentMaker(index, task.data, prior, task.views, task.io_threads)


TUNE_HERE = TuneEngine(parts_here, train_here)


class AdapterMaker(Maker):
    kind = "adapter"
    text = "fine-tune the generator"
    section = AdapterFit

    def make(self, section: AdapterFit, config: FitBase, world: World) -> Path:
        data = Data(config.data, world.index, data_facts(config, world.index))
        return fit_adapter(section, data, out=config.out, weights=config.prior.weights, seed=config.seed,
                           device=config.device, runtime=config.runtime, here=world.made, progress=world.progress,
                           engine=world.engine.tuning)

    def stages(self, section: AdapterFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        recipe, name, weights = section.finetune, "fit adapter", config.prior.weights
        what, unit = f"{recipe.steps:,} steps of {recipe.batch} images", unit_on(config.device, weights in EMBEDDED)
        cost = None if weights in EMBEDDED else cost_of(weights)
        side = section.resolution or (cost.side if cost is not None else None)
        if unit != GPU or cost is None or side is None:
            return [unknown(name, what, "arithmetic says little of a CPU" if unit != GPU else (
                "the networks of prior.weights are none of those known; `rayexpand bench` with a run that names them "
                "counts them on this machine" if cost is None else "set fit.adapter.resolution"), unit)]
        views = section.crops * (1 + section.flips)
        row = 2 * LATENT_CHANNELS * (side // LATENT_FACTOR) ** 2 * np.dtype(section.latents.dtype).itemsize
        return tuned(name, recipe, cost, side, sizes.images, views, section.workers,
                     -(-recipe.steps // section.checkpoint_every), sizes.images * views * row, config.estimate)

    def problems(self, section: AdapterFit, config: FitBase, *, on_ray: bool) -> list[str]:
        here = {name: width_by(one, config) if isinstance(one, ImageFeaturesFit) else None
                for name, one in config.fit if one is not None}
        weights = None if "pretrain" in here else config.prior.weights
        return adapter_problems(section, weights, config.device, here, on_ray=on_ray)

    def class_problems(self, section: AdapterFit, classes: ClassTable) -> list[str]:
        return word_problems(section, classes)

    def is_here(self, section: AdapterFit) -> bool:
        return not section.workers

    def role(self, section: AdapterFit) -> str:
        return "generator" if section.finetune.strategy == "full" else "adapter"
