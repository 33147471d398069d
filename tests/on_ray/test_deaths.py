"""What the loss of a node costs, decided without one: budgets, notices, and whether a shard is finished."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import ray.tune
from ray.exceptions import ActorUnavailableError, NodeDiedError, RayTaskError, WorkerCrashedError

from rayexpand.contract.errors import Interrupted, Preempted
from rayexpand.on_ray import expand, preemption, sweep, train, workers
from rayexpand.on_ray.preemption import LOST_NODES, Deaths, is_lost, lasting
from rayexpand.runs.config import ClusterConfig
from rayexpand.storage.files import LocalFiles
from rayexpand.studies import trial as training

GONE = (NodeDiedError("gone"), ActorUnavailableError("gone", None), RayTaskError("f", "lines", Preempted("left")))
CRASHED, RAISED = WorkerCrashedError(), RayTaskError("f", "lines", ValueError("wrong"))


def test_nodes_are_forgiven_and_deaths_are_counted() -> None:
    deaths = Deaths(1)
    assert all(deaths.forgives(one) for one in GONE * 9)
    assert not deaths.forgives(RAISED)
    assert [deaths.forgives(CRASHED) for _ in range(2)] == [True, False]
    assert [Deaths(1, raised=True).forgives(RAISED), Deaths(0, raised=True).forgives(RAISED)] == [True, False]


def test_whoever_takes_its_nodes_down_ends() -> None:
    deaths = Deaths(0)
    assert [deaths.forgives(GONE[0]) for _ in range(LOST_NODES + 1)] == [True] * LOST_NODES + [False]


@pytest.mark.parametrize(("ends", "attempts", "result"), [
    ([GONE[0]] * 5, 6, "made"), ([CRASHED, GONE[0], CRASHED], 4, "made"), ([CRASHED] * 3, 3, WorkerCrashedError),
    ([RAISED], 1, RayTaskError)])
def test_a_task_lasts_through_lost_nodes(ends: list[Exception], attempts: int, result: Any) -> None:
    sent: list[int] = []

    def attempt() -> str:
        sent.append(len(sent))
        if sent[-1] < len(ends):
            raise ends[sent[-1]]
        return "made"

    if isinstance(result, str):
        assert lasting(attempt, 2) == result
    else:
        with pytest.raises(result):
            lasting(attempt, 2)
    assert len(sent) == attempts


@pytest.mark.parametrize(("ends", "attempts", "failed"), [
    ({"a": [GONE[0]] * 4 + [GONE[2]] * 4}, {"a": 9, "b": 1}, []),
    ({"a": [CRASHED] * 2, "b": [GONE[0]]}, {"a": 2, "b": 2}, ["a: WorkerCrashedError"]),
    ({"b": [RAISED]}, {"a": 1, "b": 1}, ["b: ValueError: wrong"])])
def test_trials_of_a_study(ends: dict[str, list[Exception]], attempts: dict[str, int], failed: list[str],
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """One retry: more nodes than that may go, and more deaths may not be."""
    sent = {"a": 0, "b": 0}

    def submit(folder: Any, trial: Any, config: Any) -> tuple[str, int]:
        sent[trial.name] += 1
        return trial.name, sent[trial.name] - 1

    def get(task: tuple[str, int]) -> None:
        if task[1] < len(found := ends.get(task[0], [])):
            raise found[task[1]]

    monkeypatch.setattr(train, "TASK_RETRIES", 1)
    monkeypatch.setattr(train, "_submit", submit)
    monkeypatch.setattr(train, "sized", lambda config: config)
    monkeypatch.setattr(train, "_room", lambda *_: 2)
    monkeypatch.setattr(train, "connected", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(ray, "wait", lambda tasks, **_: ([tasks[0]], tasks[1:]))
    monkeypatch.setattr(ray, "get", get)
    folder: Any = SimpleNamespace(cluster=ClusterConfig(), training=SimpleNamespace(workers=0))
    heard: list[str] = []
    trials: Any = [SimpleNamespace(name="a"), SimpleNamespace(name="b")]
    said = train.train_trials(folder, trials, on_done=lambda _, problem: heard.append(problem))

    assert sent == attempts
    assert [line[:len(want)] for line, want in zip(said, failed, strict=True)] == failed
    assert len(heard) == 2, "each trial is done once"


def test_a_trial_of_a_sweep_is_given_up_for_its_own_failures_only(tmp_path: Path) -> None:
    failures, file = sweep._Failures(), tmp_path / "error.pkl"  # where Tune writes how a trial ended
    trial = SimpleNamespace(trial_id="t", config={}, pickled_error_file=str(file))
    for error in [*GONE * 3, CRASHED, RAISED, GONE[0], CRASHED]:
        file.write_bytes(ray.cloudpickle.dumps(error))
        failures.on_trial_recover(1, [], trial)
    assert trial.config == {}
    assert not file.exists(), "the next failure is not judged by this one"
    assert type(sweep._error_of(trial)) is ray.tune.TuneError
    file.write_bytes(ray.cloudpickle.dumps(RAISED))
    failures.on_trial_recover(1, [], trial)

    assert trial.config == {sweep.GIVEN_UP: "failed 4 times, at last with ValueError: wrong"}


@pytest.mark.parametrize(("failures", "there", "lost"), [
    ([GONE[1]], {"a", "b"}, True), ([ValueError("connection closed by peer")], {"a"}, True),
    ([ValueError("wrong")], {"a", "b"}, False)])
def test_whose_fault_the_end_of_workers_was(failures: list[Exception], there: set[str], lost: bool,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DEATH_S", 0.0)
    monkeypatch.setattr(preemption, "staying_nodes", lambda: there)
    monkeypatch.setattr(ray, "get", lambda found: found)
    nodes: Any = SimpleNamespace(all=SimpleNamespace(remote=lambda: ["a", "b"]))
    error: Any = SimpleNamespace(worker_failures=dict(enumerate(failures)))
    assert workers._lost_a_node(error, nodes) == lost


def test_a_training_keeps_a_checkpoint_at_a_notice_and_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], dict[float, Any]()
    clock = SimpleNamespace(time=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(workers, "time", clock)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(
        (told[at] for at in sorted(told, reverse=True) if at <= now[0]), None))
    told |= {10.2: SimpleNamespace(deadline_ms=40_000), 60.0: SimpleNamespace(deadline_ms=None)}
    notices, kept = workers.Notices("cpu"), []
    for step in range(200):
        now[0] = 0.5 * (step + 1)
        if notices():
            kept.append(now[0])

    assert len(kept) == 3
    assert 10.2 <= kept[0] <= 10.2 + 2 * preemption.NOTICE_S
    assert 40 - workers.LAST_S <= kept[1] < 40
    assert 60 <= kept[2] <= 60 + 2 * preemption.NOTICE_S


@pytest.mark.parametrize(("rows", "seconds_left", "finishes"), [
    (None, 60, False), (0, 1, True), (4, 1, True), (12, 60, True), (12, 7, False), (12, 0, True)])
def test_a_shard_is_finished_if_there_is_time(rows: int | None, seconds_left: float, finishes: bool,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """20 rows, four a call of 4 s. No shard in work: the actor ends; no pace known yet, or no deadline: it works on."""
    now = [100.0]
    monkeypatch.setattr(expand, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0]))
    actor = expand.ExpandActor.__new__(expand.ExpandActor)
    actor._rows, actor._work = 0, None if rows is None else expand._Work(3)
    plan = SimpleNamespace(units=lambda shard: [(1, 2)] * 10)
    actor._expander = SimpleNamespace(plan=plan)  # type: ignore[assignment]
    for _ in range((rows or 0) // 4):
        now[0] += 4
        actor._heard_of(4)
    assert actor._finishes(now[0] + seconds_left if seconds_left else 0) == finishes


def test_a_trial_leaves_behind_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "checkpoint", lambda *_: b"kept")
    files, trial = LocalFiles(tmp_path), SimpleNamespace(name="t")
    for folder in (".tmp", "checkpoints"):
        files.make_folder(folder)

    def keep(leaving: bool) -> Callable[[], None]:
        return training.keeper(files, trial, SimpleNamespace(step=7), None, lambda: leaving)  # type: ignore[arg-type]

    keep(False)()
    with pytest.raises(Preempted, match="after step 7") as caught:
        keep(True)()
    assert files.read("checkpoints/t.pt") == b"kept"
    assert isinstance(caught.value, Interrupted)
    assert is_lost(RayTaskError("f", "lines", caught.value))


def test_a_notice_is_looked_for_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def draining() -> dict[str, int]:
        looks.append(time.monotonic())
        return {"here": 5000, "elsewhere": 0}

    monkeypatch.setattr(preemption, "draining_nodes", draining)
    for node, deadline in (("here", 5.0), ("elsewhere", 0.0), ("staying", None)):
        monkeypatch.setattr(ray, "get_runtime_context", lambda node=node: SimpleNamespace(get_node_id=lambda: node))
        leaving = preemption.Leaving()
        assert [leaving.deadline() for _ in range(100)] == [deadline] * 100
        assert leaving() == (deadline is not None)
    assert len(looks) == 3
