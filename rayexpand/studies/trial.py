"""One trial: train its classifier, test it, and leave a result. In this process; on_ray/train.py spreads the same loop.

The loop asks three things of where it runs: batches from a step on, answers for the test images, and a place for a
checkpoint. Everything a resumed trial needs to give the same curve is in the checkpoint: model, optimiser, step, and
the part of the history already written.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from rayexpand.classifier.accuracy import Answers, answer, frequency_groups, scores_of, softmax
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import (
    ConfigError,
    EnvironmentFault,
    Interrupted,
    Preempted,
    RayexpandError,
    UsageError,
)
from rayexpand.contract.metrics import TRAINING_ACCURACY, record, record_start, record_training
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.loader.config import TrainingConfig
from rayexpand.loader.loader import Loader, TestSet
from rayexpand.loader.training_set import TrainingSet
from rayexpand.storage.files import Files
from rayexpand.storage.places import is_url
from rayexpand.storage.tables import NAMED, parquet_bytes, replace_json
from rayexpand.studies import extra_tests
from rayexpand.studies.baselines import note_of
from rayexpand.studies.class_maps import OpenedTest
from rayexpand.studies.extra_tests import ExtraTest
from rayexpand.studies.guides import guide_scores
from rayexpand.studies.parts import Trial
from rayexpand.studies.weights import keep_weights

if TYPE_CHECKING:
    from rayexpand.classifier.classifier import Classifier, TrainBatch

log = logging.getLogger(__name__)

TEST_BATCH = 256
_ZIP = b"PK"  # how a file of torch.save begins


class Answering(Protocol):
    """What is tested: a classifier, or a baseline."""

    def logits(self, x_BHWC: np.ndarray) -> np.ndarray: ...


@dataclass
class TrainingCurve:
    """What a trial has seen so far; part of its checkpoint."""

    history: list[dict[str, float]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_steps: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    starts: list[int] = field(default_factory=list)  # the step of each start: 0, then where a checkpoint led back to
    right: list[int] = field(default_factory=list)  # evaluations that were right, by test image; of a tracked trial


@dataclass
class TrialWork:
    """A trial made ready: its rows as they will be fed, and the classifier at its first step."""

    trial: Trial
    feed: Loader
    recipe: Recipe
    n_classes: int

    tested: dict[tuple[int, int], TestSet] = field(default_factory=dict)

    def test_set(self, rank: int = 0, world: int = 1) -> TestSet:
        """A worker's share of the test images, listed once and kept decoded where they fit."""
        if (rank, world) not in self.tested:
            data = DataConfig(**self.trial.test)
            section = "data" if self.trial.track else "test"  # a fold is asked for seeds
            self.tested[rank, world] = TestSet(seeds.build_index(data), data, self.recipe, rank, world, TEST_BATCH,
                                               section=section)
        return self.tested[rank, world]

    @cached_property
    def also(self) -> dict[str, tuple[ExtraTest, OpenedTest]]:
        """The further test sets, their labels in the numbering of the training classes."""
        tests = {name: ExtraTest(**{key: value for key, value in one.items() if key != "sha256"})
                 for name, one in self.trial.also.items()}
        return {name: (one, extra_tests.open_test(one, self.feed.rows.classes)) for name, one in tests.items()}

    @property
    def ends(self) -> list[int]:
        """Steps after which an epoch of the schedule ends; with fewer steps than epochs some end together."""
        ends = {round(self.feed.total_steps * (n + 1) / self.recipe.epochs) for n in range(self.recipe.epochs)}
        return sorted(ends - {0})

    def is_saved_after(self, step: int, every: int | None) -> bool:
        """Whether a checkpoint follows step number `step` (1-based); the same on every worker."""
        if step == self.feed.total_steps:
            return False
        return step % every == 0 if every else step in self.ends


def check_recipes(trials: Iterable[Trial], n_classes: int) -> None:
    """Trains and tests every recipe on two images. Raises ConfigError or ModelError, naming the arm."""
    from rayexpand.classifier.classifier import try_recipe

    own = [one for one in trials if one.is_trained and one.baseline.get("kind") != "clip_finetune"]
    for trial in {json.dumps(one.recipe, sort_keys=True): one for one in own}.values():
        try:
            try_recipe(Recipe(**trial.recipe), n_classes, trial.trained_by)
        except UsageError as error:
            where = f"arms.{trial.arm}" if trial.arm else trial.name
            raise type(error)(where, error.problems) if isinstance(error, ConfigError) else \
                type(error)(f"{where}: {error}") from error


def open_work(files: Files, trial: Trial, training: TrainingConfig) -> TrialWork:
    """Reads the training set of a trial (copied here once where it lies in an object store)."""
    rows = TrainingSet.load(_local(files, trial.rows))
    recipe = Recipe(**trial.recipe)
    loader = Loader(rows, recipe, trial.trained_by, shuffle_rows=training.shuffle_rows, streams=training.streams)
    return TrialWork(trial, loader, recipe, rows.n_classes)


def make_classifier(work: TrialWork, device: str, wrap: Callable[[Any], Any] = lambda model: model,
                    rank: int = 0, world: int = 1, mean: Callable[[Any], Any] = lambda value: value) -> Classifier:
    from rayexpand.classifier.classifier import Classifier
    from rayexpand.studies import baseline_models

    baseline, module, teacher = work.trial.baseline, None, None
    if baseline.get("kind") == "clip_finetune":
        module = baseline_models.ClipNetwork(baseline_models.guide_of(baseline, work.feed.rows.classes, device),
                                             work.recipe)
    if baseline.get("kind") == "clip_distill":
        teacher = baseline_models.teacher(baseline, work.feed, device, rank, world)
    return Classifier(work.recipe, work.n_classes, work.trial.trained_by, work.feed.total_steps, device=device,
                      wrap=wrap, world=world, class_counts=_real_counts(work.feed.rows), mean=mean, module=module,
                      teacher=teacher)


def fit(work: TrialWork, classifier: Classifier, curve: TrainingCurve, batches: Iterable[TrainBatch], *,
        evaluate: Callable[[], Answers], save: Callable[[], None], every: int | None = None,
        mean: Callable[[float], float] = lambda value: value,
        on_epoch: Callable[[dict[str, float]], None] = lambda point: None,
        warned: Callable[[], bool] = lambda: False) -> Answers:
    """Trains to the last step and returns the answers of the finished classifier.

    `mean` averages a number over workers; `save` keeps a checkpoint of classifier and curve, also where `warned` says
    after a step that workers will be taken away.
    """
    begun, cpu = time.perf_counter() - curve.seconds, time.process_time() - curve.cpu_seconds
    ends, answers = set(work.ends), None
    for batch in batches:
        loss = classifier.update(batch)
        record_training("classifier", len(batch.x_BHWC), classifier.step, loss)
        curve.loss_sum += loss
        curve.loss_steps += 1
        if classifier.step in ends:
            answers = evaluate()
            found = scores_of(answers, work.n_classes)
            curve.history.append({"epoch": len(curve.history) + 1, "step": classifier.step,
                                  "loss": mean(curve.loss_sum / curve.loss_steps), **found})
            if work.trial.track:
                now = (answers.rank < 1)[np.argsort(answers.item)]
                curve.right = (np.asarray(curve.right or [0], np.int64) + now).tolist()
            curve.loss_sum, curve.loss_steps = 0.0, 0
            record(TRAINING_ACCURACY, found["top1"], model="classifier")
            on_epoch(curve.history[-1])
        curve.seconds, curve.cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
        if warned() or work.is_saved_after(classifier.step, every):
            curve.loss_sum = mean(curve.loss_sum)  # all workers resume from one file
            save()
    return answers if answers is not None else evaluate()


def run_trial(files: Files, trial: Trial, training: TrainingConfig, *, gpus: float = 1.0,
              on_epoch: Callable[[dict[str, float]], None] = lambda point: None,
              leaving: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Trains one trial in this process, from its last checkpoint if there is one, and writes its result. `gpus`: the
    share of a GPU it holds, where it is on one. Raises Preempted, behind a checkpoint, where `leaving` says after a
    step that this machine will be taken away."""
    from rayexpand.contract.device import choose_device, torch_threads

    with torch_threads(training.threads):
        work = open_work(files, trial, training)
        device = choose_device(training.device)
        share = gpus if device.type == "cuda" else 0.0
        if not trial.is_trained:
            return _answer(files, work, str(device), share)
        classifier, curve = make_classifier(work, str(device)), TrainingCurve()
        name = f"checkpoints/{trial.name}.pt"
        if (saved := files.read(name)) is not None:
            curve = restore(saved, trial, classifier) or curve
        curve.starts.append(classifier.step)
        record_start(classifier.step)
        answers = fit(work, classifier, curve, work.feed.batches(classifier.step, work.feed.total_steps),
                      evaluate=lambda: answers_of(work, classifier), every=training.checkpoint_steps,
                      save=keeper(files, trial, classifier, curve, leaving), on_epoch=on_epoch, warned=leaving)
        result = write_result(files, work, curve, answers, {name: also_answers(work, classifier, name)
                                                            for name in work.also}, device=str(device), workers=0,
                              gpus=share, weights=kept(files, trial, training, classifier))
        files.delete(name)
        return result


def _answer(files: Files, work: TrialWork, device: str, gpus: float) -> dict[str, Any]:
    """The result of a baseline in which no network is trained step by step."""
    from rayexpand.studies.baseline_models import frozen

    begun, cpu = time.perf_counter(), time.process_time()
    classifier = frozen(work.trial.baseline, work.feed, device)
    work.recipe = classifier.view
    answers = answers_of(work, classifier)
    also = {name: also_answers(work, classifier, name) for name in work.also}
    curve = TrainingCurve([{"epoch": 1, "step": 0, **scores_of(answers, work.n_classes)}], starts=[0],
                          seconds=time.perf_counter() - begun, cpu_seconds=time.process_time() - cpu)
    return write_result(files, work, curve, answers, also, device=device, workers=0, gpus=gpus, facts=classifier.facts)


def answers_of(work: TrialWork, classifier: Answering, rank: int = 0, world: int = 1) -> Answers:
    """Answers for this worker's share of the test images."""
    return Answers.concatenate([answer(items, softmax(classifier.logits(x_BHWC)), labels)
                                for x_BHWC, labels, items in work.test_set(rank, world).batches()])


def also_answers(work: TrialWork, classifier: Answering, name: str, rank: int = 0, world: int = 1) -> Answers:
    """Answers for this worker's share of a further test set."""
    test, opened = work.also[name]
    among = extra_tests.classes_among(test, opened)
    share = TestSet(opened.index, test.data, work.recipe, rank, world, TEST_BATCH, cache_bytes=0,
                    section=f"extra_tests.{name}.data", crop_border=test.crop_border)
    return Answers.concatenate([extra_tests.answer_among(items, classifier.logits(x_BHWC), labels, among,
                                                         opened.accepted(items))
                                for x_BHWC, labels, items in share.batches()])


def checkpoint(trial: Trial, classifier: Classifier, curve: TrainingCurve) -> bytes:
    """A checkpoint: what `torch.load(weights_only=True)` reads, behind the hash of it."""
    import torch

    buffer = io.BytesIO()
    torch.save({"digest": trial.digest, "classifier": classifier.state(), "curve": asdict(curve)}, buffer)
    return hashlib.sha256(buffer.getbuffer()).hexdigest().encode() + buffer.getvalue()


def keeper(files: Files, trial: Trial, classifier: Classifier, curve: TrainingCurve,
           leaving: Callable[[], bool]) -> Callable[[], None]:
    """What keeps a checkpoint of a training in one process, and raises Preempted behind it where the machine will be
    taken away: another one goes on at once."""
    def keep() -> None:
        files.replace(f"checkpoints/{trial.name}.pt", checkpoint(trial, classifier, curve))
        if leaving():
            raise Preempted(f"trial {trial.name} left a machine that will be taken away, after step {classifier.step}")

    return keep


def restore(saved: bytes, trial: Trial, classifier: Classifier) -> TrainingCurve | None:
    """Puts the classifier where a checkpoint left it; None where that was of another trial under this name, or is
    damaged: then training begins anew, and says so."""
    import torch

    if not saved.startswith(_ZIP):  # one of a version that wrote no hash
        sha256, saved = saved[:64], saved[64:]
        if hashlib.sha256(saved).hexdigest().encode() != sha256:
            log.warning("the checkpoint of trial %s is damaged and counts as none; it is trained from the start",
                        trial.name)
            return None
    found = torch.load(io.BytesIO(saved), weights_only=True, map_location="cpu")
    if found["digest"] != trial.digest:
        return None
    classifier.load(found["classifier"])
    return TrainingCurve(**found["curve"])


def kept(files: Files, trial: Trial, training: TrainingConfig, classifier: Classifier) -> dict[str, Any] | None:
    """What the result says of the weights, where they are kept."""
    return keep_weights(files, trial, classifier) if training.keep == "weights" else None


def write_result(files: Files, work: TrialWork, curve: TrainingCurve, answers: Answers, also: Mapping[str, Answers], *,
                 device: str,
                 workers: int, gpus: float, cpu_seconds: float | None = None,
                 facts: Mapping[str, Any] | None = None, weights: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes predictions, then the result, which makes the trial done. `also`: answers for the further test sets;
    `cpu_seconds`: of all workers and loaders, None where this process did everything; `facts`: of a baseline;
    `weights`: what `keep_weights` says."""
    trial, low_high = work.trial, (work.trial.frequency[0], work.trial.frequency[1])
    _write_predictions(files, trial.name, answers, curve.right)
    for name, one in also.items():
        _write_predictions(files, f"{trial.name}.{name}", one)
    best = max(curve.history, key=lambda point: point["top1"])
    rows, steps = work.feed.rows, work.feed.total_steps if trial.is_trained else 0
    result = {
        "trial": trial.name, "arm": trial.arm, "seed": trial.seed, "digest": trial.digest, "group": trial.group,
        "control_of": trial.control_of or None, "ratio": trial.ratio, "augment": trial.augment, "run": trial.run,
        "rows": rows.n_real + rows.n_synthetic, "real_rows": rows.n_real, "synthetic_rows": rows.n_synthetic,
        "updates": steps, "samples_seen": steps * work.feed.batch,
        "history": curve.history, "last": scores_of(answers, work.n_classes),
        "by_frequency": frequency_groups(answers, _real_counts(rows), low_high),
        "also": {name: _also_scores(work, name, one) for name, one in also.items()},
        "best": {"top1": best["top1"], "epoch": best["epoch"]}, "starts": curve.starts, "seconds": curve.seconds,
        "cpu_seconds": curve.cpu_seconds if cpu_seconds is None else cpu_seconds,
        "gpu_seconds": curve.seconds * gpus * max(workers, 1),
        "expansion_seconds": trial.expansion_seconds, "fitting_seconds": trial.fitting_seconds,
        "device": device, "workers": workers,
        **({} if (mixing := work.feed.mixing()) is None else {"mixing": mixing}),
        **({"runs": trial.runs} if trial.runs else {}), **({} if weights is None else {"weights": weights}),
        "ids_sha256": trial.ids_sha256, "list_sha256": trial.list_sha256, "recipe": trial.recipe, "stack": _stack()}
    if trial.classifier_seed is not None:
        result |= {"classifier_seed": trial.classifier_seed, "data_seed": trial.data_seed}
    result |= {name: one for name in ("value", "rounds") if (one := getattr(trial, name))}
    if (guide := guide_scores(files, trial, work.feed.rows.classes, device)) is not None:
        result["guide"] = guide
    if trial.baseline:
        result["baseline"] = {**trial.baseline, **(facts or {}), "note": note_of(trial.baseline["kind"])}
    replace_json(files, f"results/{trial.name}.json", result)
    return result


def _write_predictions(files: Files, name: str, answers: Answers, right: Sequence[int] = ()) -> None:
    """`right`: evaluations on the way that were right, of each image in order; none where they were not counted."""
    order = np.argsort(answers.item)
    columns = ("item", "label", "predicted", "confidence", "p_label", "margin", "entropy")
    table = pa.table({**{name: getattr(answers, name)[order] for name in columns},
                      **({"right": np.array(right, np.int32)} if right else {})})
    place = f"predictions/{name}.parquet"
    files.replace(place, parquet_bytes(table, {NAMED: place.encode()}))


def _also_scores(work: TrialWork, name: str, answers: Answers) -> dict[str, Any]:
    test, opened = work.also[name]
    return extra_tests.scores(answers, test, extra_tests.groups_of(test, opened.index), work.n_classes, opened)


def _real_counts(rows: TrainingSet) -> np.ndarray:
    """int64 (K,): real training images of each class."""
    return np.bincount(rows.column("label")[:rows.n_real], minlength=rows.n_classes)


def _stack() -> dict[str, str]:
    import timm
    import torch
    import torchvision

    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability()}


def _local(files: Files, name: str) -> Path:
    """A path of a file of the study on this machine; from an object store, a copy that this process removes."""
    where = files.at(name)
    if not is_url(where):
        return Path(where)
    content = files.read(name)
    if content is None:
        raise EnvironmentFault(f"{where} is gone; run `rayexpand train` again")
    folder = Path(tempfile.mkdtemp(prefix="rayexpand-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "list.arrow").write_bytes(content)
    return folder / "list.arrow"


def run_trials(files: Files, trials: Iterable[Trial], training: TrainingConfig,
               on_trial: Callable[[Trial], None] = lambda trial: None) -> Iterator[tuple[Trial, str]]:
    """Runs trials one after the other in this process; yields each with "" or why it failed."""
    for trial in trials:
        on_trial(trial)
        try:
            run_trial(files, trial, training)
        except Interrupted:
            raise
        except RayexpandError as error:
            yield trial, str(error)
        except (RuntimeError, ValueError, MemoryError) as error:  # torch's and the backbone's; the others go on
            yield trial, f"{type(error).__name__}: {error}"
        else:
            yield trial, ""
