"""Nodes that are taken away, with a notice and without: nothing is lost, it is no failure, and what it costs is printed
(`-s` shows it)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from rayexpand.on_ray import sweep, train
from rayexpand.on_ray.loaders import LoaderTime, loaded_steps, timed_steps
from rayexpand.on_ray.workers import Notices, train_on_workers
from rayexpand.runs import run as runs
from rayexpand.studies.sweep.config import parse_sweep
from rayexpand.studies.sweep.search import Search
from rayexpand.studies.sweep.sweep import open_sweep
from tests.conftest import MakeConfig, complete, hashes
from tests.on_ray.conftest import ensure_token
from tests.on_ray.test_nodes import add, expand_with, on
from tests.on_ray.test_sweep import raw as raw_sweep
from tests.on_ray.test_train import results, study_of

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
STEPS = 2400  # of a trial
NOWHERE: dict[str, Any] = {"resources": {}, "label_selector": {}}
ONE = {"backbone_args": {"width": 4}}


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """One head without room for the tests of this file, which are connected to it. Ray gives a node 30 s to start, and
    a busy machine may need that more than once."""
    ensure_token()
    for left in reversed(range(5)):
        try:
            made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False,
                                                                 "object_store_memory": 150_000_000})
            break
        except Exception:
            if not left:
                raise
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def cluster(head: Cluster) -> Iterator[Cluster]:
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node, allow_graceful=False)


def drain(cluster: Cluster, node: Any, seconds: float) -> None:
    """What an autoscaler says to Ray when its cloud takes a spot node away in so many seconds."""
    GcsClient(address=cluster.address).drain_node(
        node.node_id, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot",
        int(1000 * (time.time() + seconds)))


def workers(node: Any, title: str) -> list[psutil.Process]:
    """Processes of Ray on a node that say they are at such work."""
    found = []
    for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        try:
            found += [process] if title in " ".join(process.cmdline()) else []
        except psutil.Error:
            continue
    return found


def at_work(cluster: Cluster, title: str) -> Any:
    """The node where such work is, once it is somewhere."""
    return until(lambda: next((node for node in cluster.worker_nodes if workers(node, title)), None))


def until(done: Callable[[], Any], seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.3)
    return found


NOTICE_S, EACH_S, ROWS = 25.0, 0.25, 300


@pytest.mark.parametrize("how", ["enough notice", "short notice", "no notice"])
def test_expand(cluster: Cluster, make_config: MakeConfig, tmp_path: Path, how: str) -> None:
    """Shards of 5 s on two nodes. With enough notice the shard in work is finished and nothing is made twice, the actor
    leaves before the node does, and another node is asked for meanwhile; with a short notice what cannot be finished is
    left at once."""
    reference = hashes(complete(make_config("Logged", ratio=15, seconds=0.0, log=os.devnull, shard_images=20))[0])
    going = add(cluster, resources={"sampler": 1})
    add(cluster, resources={"sampler": 1})
    cluster.wait_for_nodes()
    config = make_config("Logged", ratio=15, seconds=EACH_S, log=str(tmp_path / "calls"), name="spot", shard_images=20,
                         batch=4, sections=on(cluster, actors=2, cpus_per_actor=0.5, resources={"sampler": 1}))
    run, told, ended = runs.prepare(config, device_here=False), time.monotonic(), 0.0

    def take() -> None:
        nonlocal told, ended
        until(lambda: len(run.files.list("data")) >= 4 and workers(going, "MapWorker"))
        told = time.monotonic()
        if how == "no notice":
            cluster.remove_node(going, allow_graceful=False)
        else:
            drain(cluster, going, seconds := NOTICE_S if how == "enough notice" else 3.0)
            until(lambda: not workers(going, "MapWorker"), 60)
            ended = time.monotonic() - told
            assert ended < max(seconds, 15)
            cluster.remove_node(going, allow_graceful=False)
        add(cluster, resources={"sampler": 1})

    totals = expand_with(run, meanwhile=take)
    seconds = time.monotonic() - told
    sampled = sum(int(line.split()[1]) for line in (tmp_path / "calls").read_text().splitlines())

    print(f"\n{how}: {sampled - ROWS} of {ROWS} rows were made twice; {2 * seconds:.0f} actor-seconds from then to the "
          f"end; the actor left after {ended:.1f} s")
    assert (totals.kept, totals.pending) == (ROWS, 0)
    assert hashes(run) == reference
    assert sampled - ROWS <= (0 if how == "enough notice" else 20)
    assert not run.files.list("blame")


def long_trial(out: Path, workers: int = 0) -> Any:
    """A trial that trains for some seconds, with a checkpoint after each quarter."""
    return study_of(out, workers, [{"name": "original"}], changes={"expansions": {}, "training": {
        "workers": workers, "cpus_per_worker": 1.0, "device": "cpu"}}, updates=STEPS, epochs=4, **ONE)


@pytest.mark.parametrize("notice", [True, False])
def test_a_trial_keeps_what_it_has(cluster: Cluster, tmp_path: Path, notice: bool,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on elsewhere from the step it had; a node without notice costs at most an epoch. Neither is a failure."""
    monkeypatch.setattr(train, "TASK_RETRIES", 0)
    study, trials = long_trial(tmp_path)
    for _ in range(3):
        add(cluster)
    cluster.wait_for_nodes()
    failed: list[str] = []
    thread = threading.Thread(target=lambda: failed.extend(train.train_trials(study.trial_folder, trials)))
    thread.start()
    kept = tmp_path / "small/checkpoints/original-s0.pt"
    for _ in range(2):
        node, before = at_work(cluster, "_train_alone"), kept.stat().st_mtime_ns if kept.exists() else 0
        until(lambda: kept.exists() and kept.stat().st_mtime_ns > before)  # noqa: B023
        if notice:
            drain(cluster, node, 60)
            until(lambda: not workers(node, "_train_alone"))  # noqa: B023
        cluster.remove_node(node, allow_graceful=False)
    thread.join()
    starts = results(study, trials)["original"]["starts"]

    print(f"\n{'with' if notice else 'without'} a notice the trial went on from steps {starts[1:]} of {STEPS}")
    assert failed == []
    assert len(starts) == 3
    assert [step % (STEPS // 4) == 0 for step in starts[1:]] == [not notice] * 2


def test_a_trial_whose_process_dies_still_ends(cluster: Cluster, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TASK_RETRIES", 1)
    study, trials = long_trial(tmp_path)
    node = add(cluster)
    cluster.wait_for_nodes()
    failed: list[str] = []
    thread = threading.Thread(target=lambda: failed.extend(train.train_trials(study.trial_folder, trials)))
    thread.start()
    for _ in range(2):
        found = until(lambda: workers(node, "_train_alone"))
        os.kill(found[0].pid, signal.SIGKILL)
        until(lambda: not found[0].is_running())  # noqa: B023
    thread.join()

    assert len(failed) == 1
    assert failed[0].startswith("original-s0: ")


def test_a_trial_of_a_sweep_is_restarted_for_every_lost_node(cluster: Cluster, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A node without a notice and one with one, and no restart is used up."""
    monkeypatch.setattr(sweep, "RESTARTS", 0)
    config = raw_sweep(tmp_path, samples=1, fresh_seeds=0, cluster={"address": cluster.address})
    config["study"] |= {"recipe": {"updates": STEPS, "epochs": 6, "backbone_args": {"width": 4}},
                        "training": {"device": "cpu"}}
    search = Search(open_sweep(parse_sweep(config), lambda *_: None))
    for _ in range(3):
        add(cluster)
    cluster.wait_for_nodes()
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(sweep._tune(search, {"cpu": 1.0}, 1, lambda: None)))
    thread.start()
    for notice in (False, True):
        node = at_work(cluster, "ImplicitFunc")
        until(lambda: list(tmp_path.rglob("checkpoints/*.pt")))
        if notice:
            drain(cluster, node, 60)
            until(lambda: not workers(node, "ImplicitFunc"))  # noqa: B023
        cluster.remove_node(node, allow_graceful=False)
    thread.join()

    assert not search.failed
    assert [one["state"] for one in search.results.values()] == ["finished"]


def waiting(config: dict[str, Any]) -> None:
    """A training that is over when its folder says so, and shows where it is."""
    Path(config["folder"], f"at-{ray.get_runtime_context().get_node_id()}").touch()
    while not Path(config["folder"], "over").exists():
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["node", "process"])
def test_workers_are_started_again_for_a_lost_node_only(cluster: Cluster, tmp_path: Path,
                                                        how: str) -> None:
    node = add(cluster)
    cluster.wait_for_nodes()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            train_on_workers(waiting, {"folder": str(tmp_path)}, workers=1, cpus=1.0, gpus=0.0, where=NOWHERE, name="t",
                             place=str(tmp_path), most=0, is_refused=lambda: False)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until((tmp_path / f"at-{node.node_id}").exists)
    if how == "process":
        os.kill(workers(node, "RayTrainWorker")[0].pid, signal.SIGKILL)
        thread.join()
        assert len(raised) == 1
        return
    another = add(cluster)
    cluster.remove_node(node, allow_graceful=False)
    until((tmp_path / f"at-{another.node_id}").exists)
    (tmp_path / "over").touch()
    thread.join()
    assert raised == []


class Numbers:
    """A loader of rows that say their step."""

    def __call__(self, batch: dict[str, Any]) -> Any:
        import numpy as np

        return timed_steps(batch, lambda first, stop: ((step, {"x": np.zeros(1)}) for step in range(first, stop)))


def loading(config: dict[str, Any]) -> None:
    """A training fed by a loader, which writes down when it is told to keep a checkpoint."""
    notices, folder = Notices("cpu"), Path(config["folder"])
    spans = [(step, step + 1) for step in range(4000)]
    for batch in loaded_steps(Numbers, {}, spans, processes=1, rows=1, spent=LoaderTime()):
        time.sleep(0.3)
        if notices():
            with open(folder / "told", "a") as file:
                file.write(f"{time.time()}\n")
        (folder / "step").write_text(f"{int(batch['step'][0])} {time.time()}")
        if (folder / "over").exists():
            return


def test_workers_train_to_the_end_of_their_node(cluster: Cluster, tmp_path: Path) -> None:
    """A checkpoint at the notice and one shortly before the node goes; between them the loaders feed them on."""
    node = add(cluster)
    cluster.wait_for_nodes()
    thread = threading.Thread(target=lambda: train_on_workers(
        loading, {"folder": str(tmp_path)}, workers=1, cpus=1.0, gpus=0.0, where=NOWHERE, name="t",
        place=str(tmp_path), most=0, is_refused=lambda: False))
    thread.start()
    until((tmp_path / "step").exists)
    began, goes = time.time(), time.time() + 40
    drain(cluster, node, 40)
    until(lambda: time.time() > goes - 1)
    step, at = (tmp_path / "step").read_text().split()
    (tmp_path / "over").touch()
    another = add(cluster)
    thread.join()
    told = [float(line) for line in (tmp_path / "told").read_text().split()]

    print(f"\nnotice of 40 s: checkpoints {told[0] - began:.1f} s after it and {goes - told[-1]:.1f} s before the "
          f"end; the last step seen was {step}, {goes - float(at):.1f} s before the end")
    assert len(told) == 2
    assert told[0] - began < 10
    assert 0 < goes - told[1] < 9
    assert goes - float(at) < 5
    assert another is not None
