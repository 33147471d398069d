"""What a sweep tries next, and what came of it: suggestions and results, in memory and in the sweep's files."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from rayexpand.contract.errors import ConfigError, Interrupted, RayexpandError
from rayexpand.storage.tables import healthy_json, read_json, replace_json
from rayexpand.studies.sweep.halving import Halving
from rayexpand.studies.sweep.proxies import is_poor
from rayexpand.studies.sweep.space import n_suggestions, suggest
from rayexpand.studies.sweep.sweep import (
    Candidate,
    Sweep,
    best_of,
    candidate,
    read_results,
    read_suggestions,
    read_test,
    scores_again,
)
from rayexpand.studies.sweep.trial import run_candidate, score_again, write


class Search:
    """The suggestions of a sweep, in order: first those that an earlier start left unfinished, then new ones."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, config = sweep, sweep.config
        self.total = n_suggestions(sweep.space, config.search, config.samples)
        self.results = read_results(sweep.files)
        self.failed: list[str] = []
        self.running: dict[str, Candidate] = {}  # by key
        asha = config.scheduler
        self._halving = Halving(asha, config.epochs) if asha is not None else None
        for key, result in self.results.items():  # a resumed sweep stops what it would have stopped
            for point in result["curve"]:
                self.goes_on(key, int(point["epoch"]), point["score"])
        self._proxies = {key: one["proxies"] for key, one in self.results.items() if "proxies" in one}
        self._dropped: set[str] = set()
        self._curves: dict[str, list[dict[str, float]]] = {}
        self._started: dict[str, float] = {}  # when the process that reported last began
        self._known = {one["number"]: one for one in read_suggestions(sweep.files) if one["number"] < self.total}
        todo = [n for n, known in self._known.items() if known["key"] not in self.results]
        self._todo = deque([*todo, *(n for n in range(self.total) if n not in self._known)])

    @property
    def decided(self) -> int:
        """Suggestions that need no more work."""
        return self.total - len(self._todo) - len(self.running)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do, the score on the test images included."""
        best = best_of(self.results)
        is_scored = not scores_again(self.sweep) or read_test(self.sweep, best) is not None
        return self.decided == self.total and best is not None and is_scored

    def next(self) -> Candidate | None:
        """A configuration to try now, or None where no untried one is left. Equal ones are tried once."""
        while self._todo:
            number = self._todo.popleft()
            known = self._known.get(number)
            values = known["values"] if known else self._suggested(number)
            try:
                found = candidate(self.sweep, number, values)
            except ConfigError as error:
                self.failed.append(f"{describe(values)}: {'; '.join(error.problems)}")
                self._note(number, values, None)
                continue
            self._note(number, values, found.key)
            if found.key not in self.results and found.key not in self.running:
                self.running[found.key] = found
                return found
        return None

    def _note(self, number: int, values: dict[str, Any], key: str | None) -> None:
        """Writes a suggestion before it is tried."""
        if (written := {"number": number, "values": values, "key": key}) != self._known.get(number):
            self._known[number] = written
            replace_json(self.sweep.files, f"suggestions/{number:04d}.json", written)

    def heard(self, key: str, epoch: int, score: float, started: float = 0.0) -> None:
        """A running trial scored an epoch; a trial that was restarted reports its first ones again."""
        curve = self._curves.setdefault(key, [])
        self._started[key] = started
        curve[:] = [*(point for point in curve if point["epoch"] < epoch), {"epoch": epoch, "score": score}]

    def goes_on(self, key: str, epoch: int, score: float) -> bool:
        """Whether a trial is trained beyond this epoch."""
        return self._halving is None or self._halving.goes_on(key, epoch, score)

    def measured(self, key: str, proxies: dict[str, float], started: float = 0.0) -> bool:
        """A running trial has measured its samples; whether it is trained."""
        before = [one for other, one in self._proxies.items() if other != key]
        self._proxies[key], self._started[key] = proxies, started
        if is_poor(self.sweep.config.early, proxies, before):
            self._dropped.add(key)
        return key not in self._dropped

    def ended(self, key: str, problem: str = "") -> dict[str, Any] | None:
        """A trial is over: with a result of its own, with a problem, or else stopped before its last epoch."""
        found = self.running.pop(key)
        written = healthy_json(self.sweep.files, f"trials/{key}.json")
        if written is None and problem:
            self.failed.append(f"{describe(found.values)}: {problem}")
            return None
        if written is None:
            curve = self._curves.get(key, [])
            if not curve and key not in self._dropped:
                self.failed.append(f"{describe(found.values)}: ended without a score")
                return None
            now = time.time()
            write(self.sweep.files, {
                "key": key, "digest": found.digest, "number": found.number, "values": found.values,
                "state": "stopped" if curve else "dropped", "score": curve[-1]["score"] if curve else None,
                "curve": curve, "epochs": curve[-1]["epoch"] if curve else 0,
                "of_epochs": self.sweep.config.epochs, "started": self._started[key], "ended": now,
                "seconds": now - self._started[key],
                **({"proxies": self._proxies[key]} if key in self._proxies else {})})
            written = read_json(self.sweep.files, f"trials/{key}.json")
            assert written is not None
            kept = f"studies/{key}/checkpoints"
            self.sweep.files.delete(*(f"{kept}/{name}" for name in self.sweep.files.list(kept)))
        self.results[key] = written
        return self.results[key]

    def best(self) -> Candidate | None:
        """The configuration of the finished trial with the highest score."""
        found = best_of(self.results)
        return None if found is None else candidate(self.sweep, found["number"], found["values"])

    def _suggested(self, number: int) -> dict[str, Any]:
        config = self.sweep.config
        seen = {one["number"]: (one["values"], one["curve"], one["state"]) for one in self.results.values()}
        seen |= {one.number: (one.values, self._curves.get(one.key, []), "running") for one in self.running.values()}
        return suggest(self.sweep.space, config.search, config.seed, number, [
            (values, [(int(point["epoch"]), point["score"]) for point in curve], state)
            for _, (values, curve, state) in sorted(seen.items())], self.total)  # in whatever order they ended


def run_here(search: Search, on_change: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
    """Runs what is left of a sweep one after the other in this process; returns the score of the best trained again,
    None where that was not asked for."""
    while (found := search.next()) is not None:
        problem = ""
        on_change()
        try:
            _run(search, found)
        except Interrupted:
            raise
        except RayexpandError as error:
            problem = str(error)
        search.ended(found.key, problem)
        on_change()
    best = search.best()
    return score_again(search.sweep, best) if best is not None and scores_again(search.sweep) else None


class _Stopped(Exception):
    """A trial is not trained on."""


def _run(search: Search, found: Candidate) -> None:
    """Runs a trial, to its end or until the search stops it."""
    started = time.time()

    def on_epoch(epoch: int, score: float) -> None:
        search.heard(found.key, epoch, score, started)
        if not search.goes_on(found.key, epoch, score):
            raise _Stopped

    def on_proxies(proxies: dict[str, float]) -> None:
        if not search.measured(found.key, proxies, started):
            raise _Stopped

    with contextlib.suppress(_Stopped):
        run_candidate(search.sweep, found, on_epoch=on_epoch, on_proxies=on_proxies)


def describe(values: dict[str, Any]) -> str:
    """`strength=0.7, guidance_scale=2`."""
    return ", ".join(f"{name}={value}" for name, value in zip(short(values), values.values(), strict=True))


def short(fields: Iterable[str]) -> list[str]:
    """Each field by its last name, where that is unique."""
    fields = list(fields)
    leaves = [field.rpartition(".")[2] for field in fields]
    return [leaf if leaves.count(leaf) == 1 else field for leaf, field in zip(leaves, fields, strict=True)]
