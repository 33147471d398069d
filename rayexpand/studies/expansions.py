"""The runs and loops a study still has to make, each with what it needs fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rayexpand.contract.protocols import Progress
from rayexpand.fitting.config import FitConfig, fit_config
from rayexpand.fitting.fit import fit as fit_here
from rayexpand.fitting.fit import with_artifacts
from rayexpand.fitting.maker import ARTIFACTS
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.storage.places import is_url
from rayexpand.studies.artifact_copies import bring, keep
from rayexpand.studies.config import first_run
from rayexpand.studies.parts import Study
from rayexpand.studies.priors import prior_task, with_prior
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.loop import Loop, open_loop

Fit = Callable[[FitConfig, Progress], dict[str, Path]]  # makes artifacts, here or on a cluster: folders by role


def pending_runs(study: Study, progress: Progress = lambda *_: None, fit: Fit = fit_here, *,
                 device_here: bool = True) -> Iterator[runs.Run]:
    """The expansions that have shards to make, each once, ready to be driven. `fit` makes what they need fitted;
    `device_here`: they are sampled in this process, so their devices must be here."""
    each = {one.folder: (name, one) for (name, _), one in study.expansions.items() if isinstance(one, RunConfig)}
    fits = _Fits(study, progress, fit)
    for name, made in each.values():
        made = fits(name, made)
        run = runs.prepare(made, progress, device_here=device_here, where=f"expansions.{made.name}")
        if runs.pending_jobs(run):
            yield run


def pending_loops(study: Study, progress: Progress = lambda *_: None, fit: Fit = fit_here, *,
                  device_here: bool = True) -> Iterator[Loop]:
    """The expansions in rounds that have not ended, each once, as `pending_runs`."""
    each = {one.folder: (name, one) for (name, _), one in study.expansions.items() if isinstance(one, LoopConfig)}
    fits = _Fits(study, progress, fit)
    for name, made in each.values():
        loop = open_loop(made.model_copy(update={"run": fits(name, made.run, first_run(made))}), progress,
                         device_here=device_here)
        if not loop.is_over():
            yield loop


@dataclass(frozen=True)
class _Fits:
    """Gives a run what its expansion has fitted."""

    study: Study
    progress: Progress
    fit: Fit

    def __post_init__(self) -> None:
        if is_url(self.study.config.folder):
            bring(self.study.files, ARTIFACTS)

    def __call__(self, name: str, made: RunConfig, needed_by: RunConfig | None = None) -> RunConfig:
        """`needed_by`: what says what is needed, where that is not the run itself."""
        wanted = self.study.config.expansions[name].fit if name in self.study.config.expansions else None
        if wanted is None:
            return made
        out = ARTIFACTS if is_url(made.out) else f"{made.out.rpartition('/')[0]}/{ARTIFACTS}"
        if wanted.pretrain is not None:
            made = with_prior(made, self._fitted(prior_task(made, wanted.pretrain, out))["prior"])
        asks = made if needed_by is None else made.model_copy(update={"method": needed_by.method})
        task = fit_config(asks, wanted.guide, wanted.adapter, wanted.captions, groups=wanted.groups, out=out)
        return made if task is None else with_artifacts(made, self._fitted(task))

    def _fitted(self, task: FitConfig) -> dict[str, Path]:
        found = self.fit(task, self.progress)
        if is_url(self.study.config.folder):
            keep(self.study.files, found.values())
        return found
