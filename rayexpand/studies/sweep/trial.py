"""One trial of a sweep, all of it in this process: expand the pilot, train the arm for every seed, score it.

The seeds train side by side, epoch by epoch, so that a score is a mean over seeds from the first epoch on and a trial
that is stopped was judged by all of them; it costs the memory of as many classifiers. Nothing in a trial asks the
cluster for anything, so trials cannot wait for each other's resources.

A killed trial goes on from its checkpoints, one for each seed, at most one epoch back; its first epochs are then read
instead of trained, and reported again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from rayexpand.contract.errors import Diverged
from rayexpand.contract.metrics import record_start
from rayexpand.contract.settings import digest
from rayexpand.data.seeds import DataConfig
from rayexpand.data.subsets import ids_file, ids_hash
from rayexpand.runs.config import RunConfig, semantic
from rayexpand.runs.driving import Here
from rayexpand.storage.files import Files
from rayexpand.storage.tables import healthy_json, replace_json, sealed
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.extra_tests import ExtraTest
from rayexpand.studies.parts import Study, Trial, read_result
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.selections import make_selections
from rayexpand.studies.study import prepare_study
from rayexpand.studies.sweep.proxies import measure_proxies
from rayexpand.studies.sweep.sweep import Candidate, Sweep, fresh_seeds, read_test
from rayexpand.studies.trial import (
    TrainingCurve,
    also_answers,
    answers_of,
    fit,
    keeper,
    make_classifier,
    open_work,
    restore,
    write_result,
)
from rayexpand.studies.trials import make_trials

Progress = Callable[[str, int, int], None]

CHOSEN_BY = "chosen-by"  # how the images that the best was chosen by are called, where it is trained again
WORST = 0.0  # of every metric of a sweep: a share of the images


def run_candidate(sweep: Sweep, candidate: Candidate, *, gpus: float = 0.0,
                  on_epoch: Callable[[int, float], None] = lambda epoch, score: None,
                  on_proxies: Callable[[dict[str, float]], None] = lambda proxies: None,
                  leaving: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Runs a trial to its end and writes its result before `on_epoch` hears of the last epoch. `on_proxies` hears what
    its samples are worth, where the sweep measures that, before it trains. Either may raise to stop it.

    A training that diverges has the worst score. Raises Interrupted where another attempt may succeed, any other
    RayexpandError where the configuration cannot work. `leaving`: see studies.trial.run_trial.
    """
    started = time.time()
    study = _with_pilots(sweep, prepare_study(candidate.study))
    curve: list[dict[str, float]] = []
    pilots = sorted({Path(one if isinstance(one, str) else one.folder).name for one in study.expansions.values()})
    found = {"key": candidate.key, "digest": candidate.digest, "number": candidate.number, "values": candidate.values,
             "pilots": pilots, "started": started, "pid": os.getpid()}

    def ended(state: str, scores: list[float], epoch: int, epochs: int) -> None:
        found.update(state=state, score=curve[-1]["score"], scores=scores, curve=curve, epochs=epoch, of_epochs=epochs,
                     seconds=time.time() - started, ended=time.time())
        write(sweep.files, found)

    try:
        found["rows_made"], found["expanding_seconds"] = _expand(study)
        trials = make_trials(study)
        if sweep.config.proxies is not None and all(trial.run for trial in trials):  # none has samples of several
            begun = time.time()
            proxies = measure_proxies(sweep.files, sweep.config.proxies, study, trials)
            found |= {"proxies": proxies, "measuring_seconds": time.time() - begun}
            on_proxies(proxies)
        expanded = time.time()
        for epoch, epochs, scores in train_together(study, trials, sweep.config.metric, gpus, leaving):
            curve.append({"epoch": epoch, "score": sum(scores) / len(scores)})
            if epoch == epochs:
                found["training_seconds"] = time.time() - expanded
                ended("finished", scores, epoch, epochs)
            on_epoch(epoch, curve[-1]["score"])
    except Diverged as error:
        done, last = len(curve), sweep.config.epochs
        found["problem"] = str(error)
        curve.append({"epoch": last, "score": WORST})
        ended("diverged", [WORST] * len(study.config.seeds), done, last)
        on_epoch(last, WORST)
    return found


def score_again(sweep: Sweep, best: Candidate, *, gpus: float = 0.0,
                leaving: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Trains the best configuration once more and scores its last epoch on the test images, with `fresh_seeds` seeds
    that it was not chosen by; these classifiers are also scored on the images it was chosen by (`chosen_by`), so that
    what the choice added is seen. Written to test.json; returned from there where it is for this configuration and
    these seeds."""
    if (found := read_test(sweep, {"key": best.key})) is not None:
        return found
    seeds, test = fresh_seeds(sweep), DataConfig(**sweep.base["test"])
    config = best.study.model_copy(update={"name": f"{best.key}-test", "test": test,
                                           "seeds": seeds or best.study.seeds})
    if seeds and sweep.config.score_on != "test":
        config = config.model_copy(update={"extra_tests": {CHOSEN_BY: ExtraTest(data=best.study.test)}})
    study = _with_pilots(sweep, prepare_study(config))
    _expand(study)
    trials, metric = make_trials(study), sweep.config.metric
    *_, (_, _, scores) = train_together(study, trials, metric, gpus, leaving)
    found = {"key": best.key, "score": sum(scores) / len(scores), "scores": scores, "seeds": seeds}
    if seeds:
        results = [read_result(study.files, trial.name) or {} for trial in trials]
        found["chosen_by"] = [one["also"][CHOSEN_BY][metric] for one in results] if config.extra_tests else scores
    replace_json(sweep.files, "test.json", found)
    return found


def write(files: Files, result: dict[str, Any]) -> None:
    """Writes the result of a trial, once: what ended first counts, unless it is damaged."""
    name = f"trials/{result['key']}.json"
    if not files.publish(name, sealed(name, result), "trial") and healthy_json(files, name) is None:
        replace_json(files, name, result)


def train_together(study: Study, trials: list[Trial], metric: str, gpus: float,
                   leaving: Callable[[], bool] = lambda: False) -> Iterator[tuple[int, int, list[float]]]:
    """Trains the seeds of an arm epoch by epoch; yields epoch, epochs in all, and the score of each seed."""
    from rayexpand.contract.device import torch_threads

    with torch_threads(study.config.training.threads):
        members = [_Member(study, trial, gpus, leaving) for trial in trials]
        epochs = max(member.epochs for member in members)
        for epoch in range(epochs):
            for member in members:
                member.advance(epoch)
            yield epoch + 1, epochs, [member.history[min(epoch, member.epochs - 1)][metric] for member in members]


class _Member:
    """One seed of a configuration in training."""

    def __init__(self, study: Study, trial: Trial, gpus: float, leaving: Callable[[], bool]) -> None:
        from rayexpand.contract.device import choose_device

        self._files, self._trial, self._gpus, self._leaving = study.files, trial, gpus, leaving
        self._training = study.config.training
        self._device = choose_device(self._training.device)
        self._checkpoint = f"checkpoints/{trial.name}.pt"
        found = read_result(study.files, trial.name)
        self._is_done = found is not None and found["digest"] == trial.digest
        self._curve = TrainingCurve(history=found["history"] if found is not None and self._is_done else [])
        if self._is_done:
            self.epochs = len(self.history)
            return
        self._work = open_work(study.files, trial, self._training)
        self._classifier = make_classifier(self._work, str(self._device))
        self._ends = self._work.ends
        self.epochs = len(self._ends)
        if (saved := study.files.read(self._checkpoint)) is not None:
            self._curve = restore(saved, trial, self._classifier) or self._curve
        self._curve.starts.append(self._classifier.step)
        record_start(self._classifier.step)

    @property
    def history(self) -> list[dict[str, float]]:
        return self._curve.history

    def advance(self, epoch: int) -> None:
        """Trains to the end of an epoch (0-based); after the last one writes the result of this seed."""
        if self._is_done or epoch >= self.epochs or (len(self.history) > epoch and epoch < self.epochs - 1):
            return
        work, classifier = self._work, self._classifier
        answers = fit(work, classifier, self._curve, work.feed.batches(classifier.step, self._ends[epoch]),
                      evaluate=lambda: answers_of(work, classifier),
                      every=self._training.checkpoint_steps, warned=self._leaving,
                      save=keeper(self._files, self._trial, classifier, self._curve, self._leaving))
        if epoch == self.epochs - 1:
            also = {name: also_answers(work, classifier, name) for name in work.also}
            write_result(self._files, work, self._curve, answers, also, device=str(self._device), workers=0,
                         gpus=self._gpus if self._device.type == "cuda" else 0.0)
            self._files.delete(self._checkpoint)
            self._is_done = True


def _with_pilots(sweep: Sweep, study: Study) -> Study:
    """The study with its expansions in pilots/, under a digest of what they hold. The id lists they read are named
    after their content too, since the path is part of what a run is."""
    expansions: dict[tuple[str, int], RunConfig | LoopConfig | str] = {}
    for (name, seed), one in study.expansions.items():
        assert not isinstance(one, LoopConfig)  # refused with the file
        if isinstance(one, str):
            expansions[name, seed] = one
            continue
        data, index = next((data, index) for data, index in study.subsets.values() if data == one.data)
        ids = ids_hash(index.seed_ids)
        if data.ids is not None:
            path = f"ids/{ids[:8]}.txt"
            listed = index.table["seed_id"].to_pylist()
            if sweep.files.read(path) is None:
                sweep.files.replace(path, ids_file(listed))
            data = data.model_copy(update={"ids": str(sweep.files.at(path))})
        same = one.model_copy(update={"data": data.model_copy(update={"ids": ids})})
        wanted = study.config.expansions[name].fit
        fitted = {"fit": wanted.model_dump(mode="json")} if wanted is not None else {}
        expansions[name, seed] = one.model_copy(update={
            "name": digest(semantic(same) | fitted)[:8], "out": f"{sweep.config.folder}/pilots", "data": data})
    return replace(study, expansions=expansions)


def _expand(study: Study) -> tuple[int, float]:
    """Makes what is pending of the pilots; returns rows made here and seconds."""
    begun, rows, drive = time.perf_counter(), 0, Here()
    pilots = {one.folder: (key, one) for key, one in study.expansions.items() if isinstance(one, RunConfig)}
    for key, pilot in pilots.values():
        with _alone(pilot):  # of the trials of this machine, one makes a pilot while the others wait for it
            for run in pending_runs(replace(study, expansions={key: pilot})):
                before = run.totals()
                rows += before.pending - drive(run, lambda *_: None).pending
    make_selections(study)
    return rows, time.perf_counter() - begun


@contextlib.contextmanager
def _alone(pilot: RunConfig) -> Iterator[None]:
    """Holds the lock of a pilot on this machine, if it can be had in the time one call may take. The lock saves work
    and nothing else: it ends with its owner, and without it two trials commit the same pilot side by side."""
    folder = Path(tempfile.gettempdir()) / f"rayexpand-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = filelock.FileLock(folder / f"pilot-{digest(os.path.abspath(pilot.folder))[:16]}.lock")
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=pilot.limits.first_deadline_s)
    try:
        yield
    finally:
        lock.release()
