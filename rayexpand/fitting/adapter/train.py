"""The loop of a fine-tuning: models at the last checkpoint, steps, and what is left in the folder of the work.

    finetune.safetensors    weights, optimiser, and the position as metadata: everything a resumed attempt needs to give
                            the same bytes, in one file that rank 0 replaces whole
    sheets/ tensorboard/    a picture of samples with each checkpoint; curves
    result/                 what was trained, once the last step is done
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayexpand.artifacts.columns import encoders_of, feature_facts
from rayexpand.contract.errors import Interrupted, ModelError, Preempted
from rayexpand.contract.metrics import TRAINING_LOSS, record, record_start, record_training
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import ClassTable
from rayexpand.fitting.adapter.config import AdapterFit
from rayexpand.fitting.adapter.loader import LatentLoader, LatentRows, Sources
from rayexpand.fitting.adapter.recipe import TARGETS
from rayexpand.fitting.adapter.sample_grid import draw_sheet
from rayexpand.models.folders import loaded_files, quiet_libraries
from rayexpand.models.prior import load_prior, sources_of
from rayexpand.storage.position import Position

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rayexpand.fitting.adapter.finetuner import Finetuner, LatentBatch
    from rayexpand.models.latent import StableDiffusionPrior
    from rayexpand.models.unclip import UnclipPrior

STAGE = "finetune"  # name of the checkpoint file
TRAINING = "training.json"  # how it went, until it is part of artifact.json
SUMMARY = 100  # points of the loss curve in artifact.json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Base:
    """The generator that is fine-tuned, and where it computes."""

    weights: str
    sha256: str
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class TuneJob:
    """What a process needs to take part in one fine-tuning."""

    made: AdapterFit
    classes: ClassTable
    seed: int
    base: Base
    sources: Sources
    sources_sha256: dict[str, str]  # of each folder of `sources`; the digest of the latents
    digest: str  # of the artifact this becomes
    folder: str  # of the unfinished work
    world: int


@dataclass
class LossCurve:
    """What a fine-tuning has seen so far; part of its checkpoint."""

    history: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)  # of the steps since the last point
    steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    starts: list[int] = field(default_factory=list)  # the step of each start: 0, then where a checkpoint led back to


@dataclass
class Tuning:
    """A fine-tuning under way in this process."""

    job: TuneJob
    prior: Any  # StableDiffusionPrior or UnclipPrior; its UNet and text encoders are the ones in training
    tuner: Finetuner
    feed: LatentLoader
    curve: LossCurve

    @property
    def steps(self) -> int:
        return self.job.made.finetune.steps

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint follows step number `step` (1-based); the same on every worker."""
        return step % self.job.made.checkpoint_every == 0 or step == self.steps


def open_tuning(job: TuneJob, *, device: str | None = None,
                wrap: Callable[[Any], Any] = lambda module: module) -> Tuning:
    """The models at the last checkpoint of the job, or at their start. Raises ModelError, ConfigError, UsageError."""
    from rayexpand.fitting.adapter.finetuner import Finetuner
    from rayexpand.storage.checkpoints import Checkpoints

    recipe = job.made.finetune
    # the Finetuner casts what may be less than float32; 3.5 GB for a moment with Stable Diffusion 1.5, 14 GB
    # with XL
    prior = load_prior(job.base.weights, dtype="float32", device=device or job.base.device)
    model = prior if prior.decode_needs_grad else prior.decoder
    feed = LatentLoader(job.sources, recipe, job.classes, job.seed, model.scheduler.config.num_train_timesteps)
    if feed.latents.classes != job.classes.key:
        raise ModelError(f"latents {job.sources.latents} are of other classes than the dataset has; move the folder "
                         "away, and `rayexpand fit` makes it again")
    tuner = Finetuner(model.unet, model.texts, model.scheduler, recipe, len(job.classes), job.seed,
                      vae_factor=model.vae_factor, device=model.device, wrap=wrap, world=job.world,
                      labels=None if model is prior else partial(told_labels, prior))
    curve = LossCurve()
    if (found := Checkpoints(Path(job.folder), job.made.checkpoint_every).load(STAGE)) is not None:
        tensors, state = found
        tuner.restore(tensors)
        curve = LossCurve(**state)
    curve.starts.append(tuner.step)
    record_start(tuner.step)
    return Tuning(job, prior, tuner, feed, curve)


def told_labels(prior: UnclipPrior, told_BD: Tensor) -> Tensor:
    """What the network is told, of what a feed tells of images (`draw_told`)."""
    D = prior.features
    return prior.labels(told_BD[:, :D], told_BD[:, D:2 * D], told_BD[:, 2 * D].long())


def tune(tuning: Tuning, batches: Iterable[LatentRows], *, save: Callable[[], None],
         mean: Callable[[list[float]], list[float]] = lambda values: values,
         on_point: Callable[[dict[str, float]], None] = lambda point: None,
         elsewhere: Callable[[], float] = lambda: 0.0, warned: Callable[[], bool] = lambda: False) -> None:
    """Trains to the last step. `mean` averages numbers over workers; `save` keeps a checkpoint, also where `warned`
    says after a step that workers will be taken away; `elsewhere`: CPU seconds that other processes have spent for this
    one since the start."""
    tuner, curve, made = tuning.tuner, tuning.curve, tuning.job.made
    begun, cpu = time.perf_counter() - curve.seconds, time.process_time() - curve.cpu_seconds
    for visits in batches:
        assert visits.step == tuner.step, "the feed and the weights are at different steps"
        tuner.update(as_batch(visits))
        record_training("adapter", len(visits.z0_BCHW), tuner.step)
        for name, value in measured(tuner).items():
            curve.sums[name] = curve.sums.get(name, 0.0) + value
        curve.steps += 1
        logs = tuner.step % made.log_every == 0 or tuner.step == tuning.steps
        saves = warned() or tuning.saves_after(tuner.step)
        if logs or saves:  # all workers resume from one file, so sums become those of all
            curve.sums = dict(zip(curve.sums, mean(list(curve.sums.values())), strict=True))
        if logs:
            point = {name: value / curve.steps for name, value in curve.sums.items()}
            curve.history.append({"step": tuner.step, **point})
            curve.sums, curve.steps = {}, 0
        curve.seconds, curve.cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu + elsewhere()
        if logs:
            record(TRAINING_LOSS, curve.history[-1]["loss"], model="adapter")
            on_point(curve.history[-1])
        if saves:
            save()


def measured(tuner: Finetuner) -> dict[str, float]:
    """Numbers of the last step that are worth a curve."""
    losses = tuner.losses
    left_out = tuner.config.precision == "fp16" and not math.isfinite(losses.grad_norm)  # by GradScaler
    norm = 0.0 if left_out else losses.grad_norm
    found = {"loss": losses.total, "l_simple": losses.simple, "grad_norm": norm}
    return {**found, "l_mmd": losses.mmd} if tuner.config.mmd_gamma else found


def as_batch(visits: LatentRows) -> LatentBatch:
    import torch

    from rayexpand.fitting.adapter.finetuner import LatentBatch

    z0, noise, t, dropped = (torch.from_numpy(value) for value in visits[:4])
    visual = None if visits.visual_BD is None else torch.from_numpy(visits.visual_BD)
    return LatentBatch(z0, noise, t, visits.texts, visual, dropped if bool(dropped.any()) else None)


def train_here(job: TuneJob, progress: Progress, leaving: Callable[[], bool] = lambda: False) -> float:
    """Trains in this process to the end and leaves `result/` in the job's folder; the CPU seconds of that. Raises
    Preempted, behind a checkpoint, where `leaving` says after a step that this machine will be taken away."""
    tuning = open_tuning(job)
    before = tuning.curve.cpu_seconds
    with RunLogger(tuning) as notebook:
        def save() -> None:
            notebook.save()
            if leaving():
                raise Preempted(f"a fine-tuning left a machine that will be taken away, after step {tuning.tuner.step}")

        tune(tuning, tuning.feed.batches(tuning.tuner.step, tuning.steps), save=save, warned=leaving,
             on_point=lambda point: notebook.log(point, progress))
        notebook.finish(gpus=float(tuning.prior.device.type == "cuda"), workers=0)
    return tuning.curve.cpu_seconds - before


class RunLogger:
    """What rank 0 writes into the folder of a job: checkpoints, sheets, TensorBoard events and, at last, the result."""

    def __init__(self, tuning: Tuning) -> None:
        from rayexpand.storage.checkpoints import Checkpoints

        self._tuning, self._folder = tuning, Path(tuning.job.folder)
        self._checkpoints = Checkpoints(self._folder, tuning.job.made.checkpoint_every)
        self._events: Any = None
        self._position = Position(self._folder)

    def __enter__(self) -> RunLogger:
        if self._tuning.job.made.tensorboard:
            from tensorboardX import SummaryWriter

            step = self._tuning.tuner.step
            self._events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1 if step else None)
        return self

    def __exit__(self, *error: object) -> None:
        if self._events is not None:
            self._events.close()

    def log(self, point: dict[str, float], progress: Progress = lambda *_: None) -> None:
        """One point of the curves."""
        tuning, step = self._tuning, int(point["step"])
        progress("fine-tuning", step, tuning.steps)
        self._position("fine-tuning", step, tuning.steps, lambda: {k: v for k, v in point.items() if k != "step"})
        if self._events is None:
            return
        recipe = tuning.job.made.finetune
        rates = {"lr": recipe.lr, "token_lr": recipe.token_lr}
        speed = {"images_per_second": recipe.batch * (step - tuning.curve.starts[0]) / max(tuning.curve.seconds, 1e-9)}
        for name, value in {**point, **rates, **speed}.items():
            if name != "step":
                self._events.add_scalar(name, value, step)

    def save(self) -> None:
        """A checkpoint, and the contact sheet that shows it; no fault of the sheet costs the checkpoint."""
        tuning, step = self._tuning, self._tuning.tuner.step
        if self._events is not None:
            self._events.flush()
        self._checkpoints.save(STAGE, tuning.tuner.state(), asdict(tuning.curve))
        try:
            self._draw(self._folder / "sheets" / f"step-{step:06d}.png")
        except Interrupted:
            raise
        except Exception as error:
            log.warning("fit.adapter.sheet: no picture of step %d could be drawn (%s: %s); training goes on. Lower "
                        "sheet.classes, or set sheet: null", step, type(error).__name__, error)

    def _draw(self, path: Path) -> None:
        tuning, sheet = self._tuning, self._tuning.job.made.sheet
        if sheet is None:
            return
        path.parent.mkdir(exist_ok=True)
        with self._precision():
            draw_sheet(sheet, tuning.prior, tuning.tuner, tuning.feed, tuning.job.seed).save(path)

    def finish(self, *, gpus: float, workers: int, cpu_seconds: float | None = None) -> None:
        """Writes `result/`: the adapter or the generator, and how the training went."""
        tuning, curve = self._tuning, self._tuning.curve
        partial = self._folder / "result.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_trained(tuning, partial)
        recipe = tuning.job.made.finetune
        facts = {"device": tuning.prior.device.type, "workers": workers, "steps": recipe.steps, "starts": curve.starts,
                 "images": len(tuning.feed.rows), "blank_captions": len(tuning.feed.latents) - len(tuning.feed.rows),
                 "mmd_images": recipe.images_per_term,
                 "images_per_second": recipe.batch * recipe.steps / max(curve.seconds, 1e-9),
                 "training_seconds": curve.seconds, "process_seconds": curve.seconds * max(1, workers),
                 "gpu_seconds": curve.seconds * gpus * max(1, workers),
                 "training_cpu_seconds": curve.cpu_seconds if cpu_seconds is None else cpu_seconds,
                 "curve": thinned(curve.history)}
        (partial / TRAINING).write_text(json.dumps(facts))
        os.rename(partial, self._folder / "result")

    def _precision(self) -> Any:
        import torch

        from rayexpand.fitting.adapter.finetuner import DTYPES

        precision = self._tuning.job.made.finetune.precision
        if precision == "fp32":
            return nullcontext()
        return torch.autocast(self._tuning.prior.device.type, DTYPES[precision])


def thinned(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most SUMMARY points of a curve, each the mean of the neighbours it stands for, with the last one's step."""
    size = math.ceil(len(history) / SUMMARY) or 1
    groups = [history[i:i + size] for i in range(0, len(history), size)]
    return [{name: group[-1]["step"] if name == "step" else sum(point[name] for point in group) / len(group)
             for name in group[0]} for group in groups]


def write_trained(tuning: Tuning, folder: Path) -> None:
    """The adapter, or for strategy full a complete pipeline."""
    from rayexpand.artifacts.adapter import AdapterFacts, write_adapter

    job, prior, tuner = tuning.job, tuning.prior, tuning.tuner
    recipe = job.made.finetune
    if recipe.strategy == "full":
        if prior.decode_needs_grad:
            write_pipeline(prior, folder)
        else:
            write_decoder(prior, sources_of(job.base.weights).folder, folder)
        return
    has_lora, encoders = recipe.has_lora, _encoders(job)
    write_adapter(folder, AdapterFacts(
        base_sha256=job.base.sha256, strategy=recipe.strategy, classes=job.classes.key, names=job.classes.name,
        metaclasses=job.classes.metaclass, prompt=recipe.template,
        tokenizer_length=tuner.words[0], tokenizer_2_length=tuner.words[1] if len(tuner.words) > 1 else None,
        prediction_type=tuner.prediction, rank=recipe.rank if has_lora else None,
        alpha=float(recipe.rank) if has_lora else None,  # `trained` has the scale in B already
        targets=tuple(TARGETS[recipe.targets]) if has_lora else (), init_token_id=tuner.init_token,
        visual_token=recipe.visual_token, encoder_sha256="".join(encoders[:1]),
        encoder_2_sha256="".join(encoders[1:])), *tuner.trained())


def _encoders(job: TuneJob) -> tuple[str, ...]:
    """Of the visual tokens: the hash of each image encoder; none without them."""
    kind = job.made.features_kind
    return () if kind is None or job.sources.features is None else encoders_of(
        feature_facts(job.sources.features, kind))


def write_pipeline(prior: StableDiffusionPrior, folder: Path) -> None:
    """A complete folder in diffusers' layout, safetensors only. Raises ModelError where weights are not finite."""
    from diffusers import StableDiffusionPipeline

    _refuse_infinite(prior.unet, prior.text_encoder)
    with quiet_libraries():
        StableDiffusionPipeline(
            vae=prior.vae, text_encoder=prior.text_encoder, tokenizer=prior.tokenizer, unet=prior.unet,
            scheduler=prior.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        ).save_pretrained(folder, safe_serialization=True)


def write_decoder(prior: UnclipPrior, base: Path, folder: Path) -> None:
    """The folder of a decoder of image embeddings with another UNet; its other parts stay the files that they are, so
    that the guide that went with it still does. Raises ModelError where weights are not finite."""
    _refuse_infinite(prior.decoder.unet)
    for name in (one for one in loaded_files(base) if not one.startswith("unet/")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, folder / name)
    unet = prior.decoder.unet
    unet.register_to_config(_name_or_path="")  # else the folder it was read from, which would be in every hash
    with quiet_libraries():
        unet.save_pretrained(folder / "unet", safe_serialization=True)


def _refuse_infinite(*models: nn.Module) -> None:
    import torch

    for model in models:
        if bad := [name for name, one in model.named_parameters() if not torch.isfinite(one).all()]:
            raise ModelError(f"the trained numbers of {bad[0]} are not finite: training diverged. Lower the learning "
                             "rate")
