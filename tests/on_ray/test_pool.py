"""The folder of a cluster of our own: only for this user, and gone when its process is."""

from __future__ import annotations

import gc
import stat
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rayexpand.contract.errors import (
    ConfigError,
    DigestMismatch,
    EnvironmentFault,
    ModelError,
    OverBudget,
    ProgramFault,
    RayexpandError,
    UsageError,
    packed,
)
from rayexpand.on_ray import expand, pool
from rayexpand.runs import run as runs
from rayexpand.runs.config import ClusterConfig
from rayexpand.storage.files import process_token
from tests.conftest import MakeConfig


def test_folders_of_dead_processes_are_swept_and_none_is_open_to_others(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    host, pid, _ = process_token().rsplit("~", 2)
    for name, owner in (("rx-dead", f"{host}~{pid}~1"), ("rx-here", process_token()), ("rx-far", "elsewhere~1~1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner").write_text(owner)
    (tmp_path / "rx-other").mkdir()
    made = Path(pool._own_folder())

    assert {one.name for one in tmp_path.iterdir()} == {"rx-here", "rx-far", "rx-other", made.name}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert (made / "owner").read_text() == process_token()


@pytest.mark.parametrize(("cause", "expected", "exit_code"), [
    (ModelError("broken"), ModelError, 2), (ConfigError("x", ["a: wrong"]), ConfigError, 2),
    (OverBudget("many"), OverBudget, 3), (DigestMismatch("other"), DigestMismatch, 4),
    (KeyError("broken"), ProgramFault, 70), (OSError("disk full"), EnvironmentFault, 75), (None, EnvironmentFault, 75)])
def test_what_a_task_raised_is_raised_here_with_its_class(cause: Exception | None, expected: type[RayexpandError],
                                                          exit_code: int) -> None:
    failure = ray.exceptions.WorkerCrashedError() if cause is None else ray.exceptions.RayTaskError("f", "lines", cause)
    found = pool.error_of(failure, "a task of fit ended: {}. Again")
    assert (type(found), found.exit_code) == (expected, exit_code)
    if isinstance(cause, RayexpandError):
        assert str(found) == str(cause)
    elif expected is EnvironmentFault:
        assert str(found).startswith("a task of fit ended: ")


@pytest.mark.parametrize(("error", "raised"), [(ModelError("half"), ModelError), (KeyError("half"), ProgramFault)])
def test_what_an_actor_of_an_expansion_cannot_mend_ends_the_wave(error: Exception,
                                                                 raised: type[RayexpandError]) -> None:
    rows = [{"shard": 0, "receipt": "", "fault": packed(one)} for one in (OSError("full"), error)]
    there: Any = SimpleNamespace(actors=1, map=lambda *_, **__: SimpleNamespace(iter_rows=lambda: iter(rows)))
    wave = expand.RayWave(SimpleNamespace(folder="run"), 0, None, None, there)([(0, 0), (1, 0)])
    assert type(next(wave)) is EnvironmentFault
    with pytest.raises(raised, match="half"):
        next(wave)


@pytest.mark.cluster
def test_code_that_the_workers_of_a_connected_ray_do_not_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pool.TRUSTED, raising=False)
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        with pool.connected(ClusterConfig()):
            pass
        monkeypatch.setenv(pool.TRUSTED, "mine.methods")
        with pytest.raises(UsageError, match=r"before mine\.methods was trusted"), pool.connected(ClusterConfig()):
            pass
    finally:
        ray.shutdown()


@pytest.mark.cluster
def test_what_starts_does_not_wait_for_capacity() -> None:
    @ray.remote
    class Slow:
        def __init__(self) -> None:
            time.sleep(60)

    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    try:
        waiting = Slow.options(num_gpus=1).remote()
        time.sleep(1)
        assert not pool.any_starting()
        starting = Slow.options(num_cpus=1).remote()
        until = time.monotonic() + 60
        while not pool.any_starting():
            assert time.monotonic() < until
            time.sleep(0.1)
        del waiting, starting
    finally:
        ray.shutdown()


@pytest.mark.cluster
def test_nothing_of_an_expansion_is_left_beside_its_driver(make_config: MakeConfig) -> None:
    from ray._private.state import actors

    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    gc.disable()  # which ends, at some time, what nobody ended
    try:
        run = runs.prepare(make_config("Sleeping", ratio=1, seconds=0.0), device_here=False)
        assert expand.expand(run, lambda: runs.pending_jobs(run)).kept == 20
        until, ours = time.monotonic() + 30, {"Heartbeats", "ModelServer"}
        while ours & {one["ActorClassName"] for one in actors(actor_state_name="ALIVE").values()}:
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        gc.enable()
        ray.shutdown()


@pytest.mark.parametrize("is_connected", [True, False])
def test_what_is_beside_the_driver_ends_with_its_block(is_connected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, which is then gone already, nothing starts it again."""
    killed: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: is_connected)
    monkeypatch.setattr(ray, "kill", killed.append)
    with pytest.raises(ModelError), pool.ending("actor"):
        raise ModelError("half")
    assert killed == ["actor"] * is_connected


@pytest.mark.parametrize(("nodes", "device", "said", "gpus"), [
    ({"CPU": 4.0, "GPU": 2.0}, "auto", None, 1.0), ({"CPU": 4.0}, "auto", None, 0.0),
    ({"CPU": 4.0, "GPU": 2.0}, "cpu", None, 0.0), ({}, "cuda", None, 1.0), ({}, "cpu", None, 0.0),
    ({}, "auto", "1", 1.0), ({}, "auto", "0", 0.0), ({"CPU": 4.0}, "auto", "1", 0.0)])
def test_a_process_takes_a_gpu_where_nodes_have_or_will_have_any(
        nodes: dict[str, float], device: str, said: str | None, gpus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.ray, "cluster_resources", lambda: nodes)
    monkeypatch.delenv(pool.NODE_GPUS, raising=False)
    if said is not None:
        monkeypatch.setenv(pool.NODE_GPUS, said)

    assert pool.gpus_each(None, device, "cluster.gpus_per_actor") == gpus
    assert pool.gpus_each(0.25, device, "cluster.gpus_per_actor") == 0.25


def test_a_cluster_without_nodes_is_not_taken_for_one_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.ray, "cluster_resources", dict)
    monkeypatch.delenv(pool.NODE_GPUS, raising=False)
    with pytest.raises(UsageError, match=r"--set training.gpus_per_worker=1"):
        pool.gpus_each(None, "auto", "training.gpus_per_worker")


def test_a_stage_changes_what_it_says_and_nothing_else() -> None:
    cluster = ClusterConfig(actors=8, resources={"big": 1}, stages={"fit": {"actors": 2, "resources": {}}})  # type: ignore[dict-item]

    assert cluster.at("expand") == ClusterConfig(actors=8, resources={"big": 1})
    assert cluster.at("fit") == ClusterConfig(actors=2)
    with pytest.raises(ValueError, match="a study says this itself"):
        ClusterConfig(stages={"train": {"gpus_per_actor": 1}})  # type: ignore[dict-item]
