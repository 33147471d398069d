"""Training what has no result yet of a set of trials: those of a study, or the folds of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from rayexpand.runs.driving import Listener
from rayexpand.studies.parts import Train, Trial, TrialFolder
from rayexpand.studies.trial import check_recipes, run_trials
from rayexpand.studies.trials import pending_trials


class Runner(Protocol):
    """What trains trials, here or on a cluster, and returns one line for each that failed. `on_start` and `on_done`
    hear how many are under way, `on_done` also why one failed, "" where it did not."""

    def __call__(self, folder: TrialFolder, trials: Sequence[Trial], *, on_start: Callable[[int], None],
                 on_done: Callable[[int, str], None]) -> list[str]: ...


def run_here(folder: TrialFolder, trials: Sequence[Trial], *, on_start: Callable[[int], None],
             on_done: Callable[[int, str], None]) -> list[str]:
    """One after the other in this process."""
    failed = []
    for trial, problem in run_trials(folder.files, trials, folder.training, lambda trial: on_start(1)):
        failed += [f"{trial.name}: {problem}"] if problem else []
        on_done(0, problem)
    return failed


def train_with(progress: Listener, run: Runner = run_here) -> Train:
    """What trains trials that have no result for exactly what they would train now."""
    return partial(_train, progress, run)


def _train(progress: Listener, run: Runner, folder: TrialFolder, trials: Sequence[Trial]) -> list[str]:
    todo = pending_trials(folder, trials)
    done, failed = len(trials) - len(todo), 0
    if not todo:
        return []
    check_recipes(todo, folder.n_classes)

    def show(running: int) -> None:
        progress(f"training {folder.name}", done + failed, len(trials),
                 {"running": running, **({"failed": failed} if failed else {})})

    def ended(running: int, problem: str) -> None:
        nonlocal done, failed
        done, failed = done + (not problem), failed + bool(problem)
        show(running)

    return run(folder, todo, on_start=show, on_done=ended)
