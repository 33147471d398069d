"""The trials of a sweep under Ray Tune: each is one process with its own share of CPUs and GPUs.

Tune starts trials, hears their scores, stops them and restarts what dies. What is tried, what is stopped, and what is
known already, is the Search's, so a sweep goes on from its own files after any death. A trial asks Ray for nothing, so
as many run as their shares fit into the cluster, and none waits for another.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayexpand.contract.errors import Interrupted, RayexpandError
from rayexpand.on_ray.pool import cause_of, connected, enter, error_of, gpus_each, room_for
from rayexpand.on_ray.preemption import Deaths, Leaving, lasting
from rayexpand.storage.places import open_files
from rayexpand.studies.config import parse_study
from rayexpand.studies.sweep.config import SweepConfig
from rayexpand.studies.sweep.search import Search
from rayexpand.studies.sweep.sweep import Candidate, Sweep, best_of, candidate, read_test, scores_again
from rayexpand.studies.sweep.trial import run_candidate, score_again

RESTARTS = 3  # failures of a trial before it counts as failed; nodes taken away do not count
GIVEN_UP = "given_up"  # in the configuration of a trial: why it is not tried again
STOP_S = 10  # a stopped trial that has not ended by then is killed; Tune waits ten minutes


def run_sweep(search: Search, on_change: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
    """Runs what is left of a sweep; returns the score of the best trained again, None where that was not asked for.

    Raises UsageError when the cluster cannot hold one trial.
    """
    config = search.sweep.config
    if search.is_over:
        return read_test(search.sweep, best_of(search.results))
    with connected(config.cluster):
        share = _share(config)
        room = _room(share, config)
        if search.decided < search.total:
            _tune(search, share, room, on_change)
        return _test(search, share)


def _tune(search: Search, share: dict[str, float], room: int, on_change: Callable[[], None]) -> None:
    config = search.sweep.config
    os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"] = str(STOP_S)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would lose our exit code
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # tables, whatever its verbosity
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"  # a traceback for each restart
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trial = partial(_trial, sweep=_packed(search.sweep), gpus=share.get("gpu", 0.0))
    with tempfile.TemporaryDirectory(prefix="rx-tune-") as scratch:  # Tune's own state, which nothing reads again
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_named(trial)), share),
            tune_config=tune.TuneConfig(search_alg=_Suggestions(search, on_change), num_samples=search.total,
                                        max_concurrent_trials=room, scheduler=_AsTheSearchSays(search)),
            run_config=tune.RunConfig(name=config.name, storage_path=scratch, verbose=0,
                                      callbacks=[_Failures()],
                                      failure_config=tune.FailureConfig(max_failures=-1))).fit()


def _named(trial: Callable[..., None]) -> Callable[[dict[str, Any]], None]:
    def rayexpand_trial(config: dict[str, Any]) -> None:
        trial(config)

    return rayexpand_trial


def _trial(config: dict[str, Any], sweep: dict[str, Any], gpus: float) -> None:
    """What the process of a trial does."""
    if GIVEN_UP in config:
        tune.report({"epoch": 0, "score": -1.0, "problem": config[GIVEN_UP]})
        return
    started = time.time()
    enter(sweep["cwd"])
    opened = _unpacked(sweep)
    found = candidate(opened, config["number"], config["values"])
    try:
        run_candidate(
            opened, found, gpus=gpus, leaving=Leaving(),
            on_epoch=lambda epoch, score: tune.report({"epoch": epoch, "score": score, "started": started}),
            on_proxies=lambda proxies: tune.report(  # as text, for Tune flattens what is nested
                {"epoch": 0, "score": -1.0, "started": started, "proxies": json.dumps(proxies)}))
    except Interrupted:
        raise  # Tune starts it again
    except RayexpandError as error:
        tune.report({"epoch": 0, "score": -1.0, "problem": str(error)})


class _Suggestions(Searcher):
    """Tune's way to ask a Search."""

    def __init__(self, search: Search, on_change: Callable[[], None]) -> None:
        super().__init__(metric="score", mode="max")
        self._search, self._on_change = search, on_change
        self._keys: dict[str, str] = {}  # of Tune's trials

    def suggest(self, trial_id: str) -> Any:
        found = self._search.next()
        if found is None:
            return self.FINISHED
        self._keys[trial_id] = found.key
        self._on_change()
        return {"number": found.number, "values": found.values, "key": found.key}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not {"problem", "proxies"} & result.keys():
            self._search.heard(self._keys[trial_id], result["epoch"], result["score"], result["started"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        result = result or {}
        if "epoch" in result:
            self.on_trial_result(trial_id, result)
        self._search.ended(self._keys.pop(trial_id), result.get("problem", ""))
        self._on_change()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its settings down before it starts; a heartbeat has a lock

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()  # the sweep's own files are its state

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep goes on from its own files")


class _Failures(tune.Callback):
    """Counts failures of trials, for Tune would count lost nodes, too. Tune restarts a trial always; one that failed
    too often is told to say so."""

    def __init__(self) -> None:
        self._deaths: defaultdict[str, Deaths] = defaultdict(partial(Deaths, RESTARTS, raised=True))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = _error_of(trial)
        if not self._deaths[trial.trial_id].forgives(error):
            trial.config[GIVEN_UP] = f"failed {RESTARTS + 1} times, at last with {cause_of(error)}"


def _error_of(trial: Any) -> Exception:
    """What ended a trial just now. `get_pickled_error` of Tune looks where the file of this process is copied later."""
    place = trial.pickled_error_file
    if place is None or not os.path.exists(place):
        return tune.TuneError("Tune cannot work with what the trial said")
    with open(place, "rb") as file:
        if os.fstat(file.fileno()).st_uid != os.getuid():  # Ray's folder of a cluster may be open to other users
            return tune.TuneError(f"{place} was not written by this user, so what ended the trial is not known")
        found: Exception = ray.cloudpickle.load(file)
    os.remove(place)  # it is of this failure only
    return found


class _AsTheSearchSays(FIFOScheduler):
    """Stops what the search stops. Tune hands a trial the next step only after the answer."""

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        key = trial.config["key"]
        if "proxies" in result:
            goes_on = self._search.measured(key, json.loads(result["proxies"]), result["started"])
        else:
            goes_on = "problem" in result or self._search.goes_on(key, result["epoch"], result["score"])
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


def _share(config: SweepConfig) -> dict[str, float]:
    """CPUs and GPUs of one trial."""
    device = parse_study({**config.study, "name": "trial"}).training.device if config.gpus_per_trial is None else "cpu"
    gpus = gpus_each(config.gpus_per_trial, device, "gpus_per_trial")
    return {"cpu": config.cpus_per_trial, **({"gpu": gpus} if gpus else {})}


def _room(share: dict[str, float], config: SweepConfig) -> int:
    """Trials at once: `cluster.actors`, for which an autoscaler is asked, else what the cluster holds; at most
    `max_concurrent`. Raises UsageError where it cannot hold one."""
    room = room_for({name.upper(): amount for name, amount in share.items()}, config.cluster.actors,
                    "cpus_per_trial, gpus_per_trial", "Lower them")
    return room if config.max_concurrent is None else min(room, config.max_concurrent)


def _test(search: Search, share: dict[str, float]) -> dict[str, Any] | None:
    """Trains and scores the best configuration again, in a process like a trial's."""
    best = search.best()
    if best is None or not scores_again(search.sweep):
        return None
    task = ray.remote(_score).options(num_cpus=share["cpu"], num_gpus=share.get("gpu", 0.0), max_retries=0)
    try:
        return lasting(lambda: ray.get(task.remote(_packed(search.sweep), best.number, best.values,
                                                   share.get("gpu", 0.0))), RESTARTS)
    except ray.exceptions.RayError as error:
        raise error_of(error, "scoring on the test images ended: {}. The same command tries again") from error


def _score(sweep: dict[str, Any], number: int, values: dict[str, Any], gpus: float) -> dict[str, Any]:
    enter(sweep["cwd"])
    opened = _unpacked(sweep)
    best: Candidate = candidate(opened, number, values)
    return score_again(opened, best, gpus=gpus, leaving=Leaving())


def _packed(sweep: Sweep) -> dict[str, Any]:
    """A sweep as plain values, for processes elsewhere."""
    return {"config": sweep.config.model_dump(mode="json"), "base": sweep.base, "cwd": os.getcwd()}


def _unpacked(packed: dict[str, Any]) -> Sweep:
    config = SweepConfig(**packed["config"])
    return Sweep(config, open_files(config.folder), packed["base"], ())
