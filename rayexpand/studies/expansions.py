"""The runs a study still has to make, each with what it needs fitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from rayexpand.studies.parts import Study
from rayexpand.studies.priors import prior_task, with_prior

Fit = Callable[[FitConfig, Progress], dict[str, Path]]  # makes artifacts, here or on a cluster: folders by role


def pending_runs(study: Study, progress: Progress = lambda *_: None, fit: Fit = fit_here, *,
                 device_here: bool = True) -> Iterator[runs.Run]:
    """The expansions that have shards to make, each once, ready to be driven. `fit` makes what they need fitted;
    `device_here`: they are sampled in this process, so their devices must be here."""
    each = {one.folder: (name, one) for (name, _), one in study.expansions.items() if isinstance(one, RunConfig)}
    is_remote = is_url(study.config.folder)
    if is_remote:
        bring(study.files, ARTIFACTS)

    def fitted(task: FitConfig) -> dict[str, Path]:
        found = fit(task, progress)
        if is_remote:
            keep(study.files, found.values())
        return found

    for name, made in each.values():
        wanted = study.config.expansions[name].fit if name in study.config.expansions else None
        out = ARTIFACTS if is_url(made.out) else f"{made.out.rpartition('/')[0]}/{ARTIFACTS}"
        if wanted is not None and wanted.pretrain is not None:
            made = with_prior(made, fitted(prior_task(made, wanted.pretrain, out))["prior"])
        if wanted is not None:
            task = fit_config(made, wanted.guide, wanted.adapter, wanted.captions, groups=wanted.groups, out=out)
            made = made if task is None else with_artifacts(made, fitted(task))
        run = runs.prepare(made, progress, device_here=device_here, where=f"expansions.{made.name}")
        if runs.pending_jobs(run):
            yield run
