"""Where runs are driven, artifacts fitted and trials trained: on this machine, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rayexpand.api.results import Event
from rayexpand.contract.errors import OverBudget
from rayexpand.contract.metrics import Meter

if TYPE_CHECKING:
    from rayexpand.evaluation.copy_search import Work
    from rayexpand.evaluation.evaluate import Extract
    from rayexpand.evaluation.select_scores import Score
    from rayexpand.runs.config import ClusterConfig
    from rayexpand.runs.driving import Driver, Listener
    from rayexpand.runs.run import Run
    from rayexpand.storage.heartbeats import Heartbeat
    from rayexpand.studies.attacks import Ask, Machines
    from rayexpand.studies.expansions import Fit
    from rayexpand.studies.parts import Train
    from rayexpand.studies.robustness import Show
    from rayexpand.studies.rounds.decisions import RoundDecision
    from rayexpand.studies.rounds.loop import Loop


class Relay:
    """Hands progress to `on`. What `on` raises in another thread is raised here at the next word of this one."""

    def __init__(self, on: Callable[[Event], None] | None) -> None:
        self._on, self._thread = on, threading.get_ident()
        self._raised: BaseException | None = None
        self.hearers: list[Listener] = []  # that hear everything, and raise nothing

    def __call__(self, task: str, done: int, total: int, facts: Mapping[str, int] | None = None,
                 rate: float | None = None) -> None:
        for hearer in list(self.hearers):
            hearer(task, done, total, facts, rate)
        here = threading.get_ident() == self._thread
        if here and self._raised is not None:
            raise self._raised
        if self._on is None or self._raised is not None:
            return
        try:
            self._on(Event(task, done, total, dict(facts or {}), rate))
        except BaseException as error:
            if here:
                raise
            self._raised = error


@contextlib.contextmanager
def alive(progress: Relay, folder: str, verb: str, name: str, *, attempt: int | None = None,
          lazily: bool = False) -> Iterator[Heartbeat]:
    """This process says in a folder that it drives a verb there, and how far it is; see storage.heartbeats."""
    from rayexpand.storage.heartbeats import Heartbeat
    from rayexpand.storage.places import open_files

    with Heartbeat(open_files(folder), verb, name, attempt=attempt, lazily=lazily) as heartbeat:
        own = (heartbeat.say, Meter(verb))
        progress.hearers += own
        try:
            yield heartbeat
        finally:
            progress.hearers = [one for one in progress.hearers if one not in own]


def address_override(ray: bool | str) -> list[str]:
    return [f"cluster.address={ray}"] if isinstance(ray, str) else []


def at(config: Any, ray: bool | str) -> Any:
    """The configuration with the address that `ray` gives."""
    if not isinstance(ray, str):
        return config
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": ray})})


@contextlib.contextmanager
def driver(ray: bool | str, cluster: ClusterConfig, *, same_process: bool) -> Iterator[Driver]:
    """What drives runs, with one cluster, or one set of loaded models, for all of them."""
    if ray:
        from rayexpand.on_ray.expand import drive_on_ray
        from rayexpand.on_ray.pool import connected

        with connected(cluster):
            yield drive_on_ray
        return
    from rayexpand.runs.driving import Child, Here

    if same_process:
        yield Here()
        return
    with Child() as child:
        yield child


def fit_with(ray: bool | str, *, on_workers: bool = False) -> Fit:
    """What makes artifacts. `on_workers`: what trains in one process does so on a worker of the cluster, too."""
    if ray:
        from rayexpand.on_ray.fit import fit as fit_on_ray

        return partial(fit_on_ray, on_workers=on_workers)
    from rayexpand.fitting.fit import HERE, fit
    from rayexpand.studies.cross_fit import score_artifact
    from rayexpand.studies.train import run_here

    return partial(fit, engine=replace(HERE, scores=partial(score_artifact, run_here)))


def extract_with(ray: bool | str) -> Extract:
    """What turns images into features."""
    if ray:
        from rayexpand.on_ray.evaluate import extract

        return extract
    from rayexpand.evaluation.evaluate import in_process

    return in_process


def score_with(ray: bool | str, cluster: ClusterConfig) -> Score:
    """What has samples judged by a guide."""
    if ray:
        from rayexpand.on_ray.select import score

        return partial(score, cluster=cluster)
    from rayexpand.evaluation.select_scores import in_process

    return in_process


def find_with(ray: bool | str, cluster: ClusterConfig) -> Work:
    """What compares images with seeds."""
    if ray:
        from rayexpand.on_ray.audit import find

        return partial(find, cluster=cluster)
    from rayexpand.evaluation.copy_search import in_process

    return in_process


def machines_with(ray: bool | str, cluster: ClusterConfig, drive: Driver, progress: Relay) -> Machines:
    """What makes shadow pipelines, and asks them."""
    from rayexpand.studies.attacks import Machines, ask_here

    ask: Ask = ask_here
    if ray:
        from rayexpand.on_ray.membership import ask
    return Machines(drive, fit_with(ray, on_workers=True), score_with(ray, cluster), extract_with(ray),
                    train_by(ray, progress), ask, not ray)


def show_with(ray: bool | str) -> Show:
    """What shows corrupted images to finished classifiers."""
    if ray:
        from rayexpand.on_ray.robustness import show

        return show
    from rayexpand.studies.robustness import in_process

    return in_process


def drive_run(run: Run, progress: Relay, *, ray: bool | str, same_process: bool, retry: bool = False,
              ) -> dict[str, float]:
    """Drives a run to its end, and writes page and card whatever the end; rows made and seconds of this call, and the
    images/s of the run."""
    from rayexpand.reports.card import write_card
    from rayexpand.reports.run import write_report
    from rayexpand.runs.driving import jobs_of, rate_of
    from rayexpand.runs.run import begun, check_budget, tally_of

    started, before = time.perf_counter(), run.totals()
    folder = str(run.folder)
    try:
        if todo := jobs_of(run, retry=retry)():
            with driver(ray, run.config.cluster, same_process=same_process) as drive:
                run = begun(run)
                with alive(progress, folder, "retry" if retry else "expand", run.config.name, attempt=run.attempt):
                    drive(run, progress, retry=retry)
        else:
            check_budget(run, tally_of(run))
    except OverBudget:
        write_card(folder)
        write_report(folder)
        raise
    after, seconds = run.totals(), time.perf_counter() - started
    made = before.failed * bool(todo) if retry else before.pending - after.pending
    write_card(folder)
    write_report(folder)
    return {"made": made, "seconds": round(seconds, 3),
            "images_per_second": rate_of([run]).images_per_second or 0.0}


def drive_rounds(loop: Loop, progress: Relay, *, ray: bool | str, same_process: bool) -> RoundDecision:
    """Makes what is left of a loop."""
    config = loop.config
    with (alive(progress, config.folder, "expand", config.name) as heartbeat,
          driver(ray, config.cluster, same_process=same_process) as drive):
        return drive_rounds_with(loop, drive, heartbeat, progress, ray=ray)


def drive_rounds_with(loop: Loop, drive: Driver, heartbeat: Heartbeat, progress: Relay, *,
                      ray: bool | str) -> RoundDecision:
    """The same by a driver that is there; pages and cards of each round and of the loop are written when it ends,
    whatever the end."""
    from rayexpand.reports.card import write_card
    from rayexpand.reports.run import write_report
    from rayexpand.runs.run import begun, check_budget, pending_jobs, tally_of
    from rayexpand.studies.rounds.learning import Learning
    from rayexpand.studies.rounds.loop import drive_loop

    def pages(run: Run) -> None:
        write_card(str(run.folder))
        write_report(str(run.folder))
        write_loop_pages(loop.config.folder)

    def made(run: Run) -> None:
        if not pending_jobs(run):
            check_budget(run, tally_of(run))
            return
        try:
            with heartbeat.also_in(run.files):
                drive(begun(run), progress)
        except OverBudget:
            pages(run)
            raise
        pages(run)

    end = drive_loop(loop, Learning(train_by(ray, progress)), made, progress, device_here=not ray)
    write_loop_pages(loop.config.folder)
    return end


def write_loop_pages(folder: str) -> None:
    """Card and page of a loop."""
    from rayexpand.reports.card import write_card
    from rayexpand.reports.loop import write_loop_report

    write_card(folder)
    write_loop_report(folder)


def train_by(ray: bool | str, progress: Relay) -> Train:
    """What trains the trials of a folder that have no result yet."""
    from rayexpand.studies.train import run_here, train_with

    if ray:
        from rayexpand.on_ray.train import train_trials

        return train_with(progress, train_trials)
    return train_with(progress, run_here)
