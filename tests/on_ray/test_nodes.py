"""Nodes that come, die and lack things: several raylets on this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
import yaml
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.data.exceptions import ExecutionTimeoutError

from rayexpand.models import folders
from rayexpand.models.folders import folder_hash
from rayexpand.models.prior import prior_hash, resolve
from rayexpand.on_ray import expand as on_ray
from rayexpand.on_ray import pool, stage
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.storage.position import POSITION
from tests.conftest import MakeConfig, complete, hashes
from tests.on_ray.conftest import ROOT
from tests.on_ray.test_finetune import driver, kept, raw, wait_for
from tests.tiny import tiny_adapter, tiny_pipeline

pytestmark = pytest.mark.cluster


def add(cluster: Cluster, **arguments: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=80_000_000, **arguments)


def on(cluster: Cluster, **section: Any) -> dict[str, Any]:
    return {"cluster": {"address": cluster.address, **section}}


def expand_with(run: runs.Run, jobs: Callable[[], list[runs.Job]] | None = None,
                meanwhile: Callable[[], None] = lambda: None, **options: Any) -> Any:
    """Expands in a thread, because Ray adds and removes nodes in the main thread only: `meanwhile` runs there."""
    with on_ray.connected(run.config.cluster), ThreadPoolExecutor(1) as pool:
        done = pool.submit(on_ray.expand, run, jobs or (lambda: runs.pending_jobs(run)), **options)
        meanwhile()
        return done.result()


@pytest.mark.parametrize(("seen", "again"), [("blame", False), ("data", True), ("receipts", False)],
                         ids=["before publish", "after data, with a replacement", "after a receipt"])
def test_a_node_killed_loses_nothing(cluster: Cluster, make_config: MakeConfig, seen: str, again: bool) -> None:
    reference = hashes(complete(make_config("Sleeping", ratio=3, seconds=0.0))[0])
    lost = add(cluster, resources={"sampler": 1})
    add(cluster, resources={"sampler": 1})
    cluster.wait_for_nodes()
    # The pause is a field of the method and so of the plan, but no pixel depends on it.
    config = make_config("Sleeping", ratio=3, seconds=0.08, name="killed", shard_images=6,
                         sections=on(cluster, actors=2, cpus_per_actor=0.5, resources={"sampler": 1}))
    run = runs.prepare(config, device_here=False)

    def kill() -> None:
        _until(lambda: bool(run.files.list(seen)))
        cluster.remove_node(lost, allow_graceful=False)
        if again:
            add(cluster, resources={"sampler": 1})

    totals = expand_with(run, meanwhile=kill)

    assert (totals.kept, totals.pending) == (60, 0)
    assert hashes(run) == reference


def test_a_notice_that_a_node_goes_saves_a_checkpoint(cluster: Cluster, image_folder: Path, tmp_path: Path) -> None:
    """Ray's autoscaler says the same way that a spot node will be taken away."""
    node = cluster.add_node(num_cpus=6, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    tiny_pipeline(tmp_path / "pipeline")
    config = {**raw("diffmix", tmp_path, image_folder, tmp_path, cpus_per_worker=2, checkpoint_every=10**6, sheet=None),
              **on(cluster)}
    config["fit"]["adapter"]["recipe"] = {**config["fit"]["adapter"]["recipe"], "steps": 50_000}
    process = driver(config, tmp_path)
    try:
        (work,) = wait_for(lambda: [one.parent for one in tmp_path.glob(f".adapter-*.work/{POSITION}")], process)
        assert kept(work) == (0, 0)
        GcsClient(address=cluster.address).drain_node(
            node.node_id, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot",
            (time.time_ns() // 10**6) + 60_000)
        wait_for(lambda: kept(work)[0], process)
    finally:
        process.kill()
        process.wait()


def test_a_model_larger_than_the_object_store_passes_through_it(cluster: Cluster, tmp_path: Path) -> None:
    """300 MB to two nodes at once, through stores of 150 and 80 MB: little is kept there and nothing is spilled."""
    large = tmp_path / "model"
    large.mkdir()
    (large / "config.json").write_text("{}")
    with open(large / "model.safetensors", "wb") as file:
        for number in range(30):
            file.write(bytes([number]) * 10_000_000)
    caches = [tmp_path / f"node{i}" for i in range(2)]
    for i, cache in enumerate(caches):
        add(cluster, resources={f"node{i}": 1}, env_vars={"RAYEXPAND_CACHE": str(cache)})
        (cache / "staged").mkdir(parents=True)
        (cache / "staged" / f"{folder_hash(large)[:16]}.partial-killed").mkdir()
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    sha256, most = folder_hash(large), 0
    server = stage.open_model_server({sha256: folders.folder_model(large)})

    @ray.remote(num_cpus=0)
    def fetch() -> str:
        away = replace(folders.folder_model(large), present=lambda: None)
        return str(stage.local(away, sha256, server))

    running = [fetch.options(resources={f"node{i}": 1}).remote() for i in range(2)]
    while running:
        done, running = ray.wait(running, timeout=0.02)
        seen = get_memory_info_reply(get_state_from_address(cluster.address)).store_stats
        most = max(most, seen.object_store_bytes_primary_copy)  # others may go at any time
        assert {*ray.get(done)} <= {str(cache / "staged" / sha256[:16]) for cache in caches}
    print("most bytes kept in the object stores:", most, "of 300,000,000; spilled:", seen.spilled_bytes_total)

    assert seen.spilled_bytes_total == 0
    assert 0 < most <= 2 * stage.AHEAD * stage.CHUNK + 1000 * 2 * stage.AHEAD  # for two nodes, with their headers
    for cache in caches:
        assert folder_hash(cache / "staged" / sha256[:16]) == sha256
        assert [one.name for one in (cache / "staged").iterdir() if one.is_dir()] == [sha256[:16]]


def test_nodes_with_empty_caches_get_model_and_adapter_once(cluster: Cluster, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver has the embedded default and, in its home, an adapter of it; three nodes have nothing and train
    nothing."""
    monkeypatch.setenv("RAYEXPAND_CACHE", str(folders.cache_root()))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(Path.home() / ".ray/auth_token"))
    monkeypatch.setenv("HOME", str(tmp_path / "driver"))
    adapter = tiny_adapter(tmp_path / "driver/adapter", resolve("digits"), [str(digit) for digit in range(10)])
    expected = {"prior": prior_hash("digits"), "adapter": folder_hash(adapter)}
    caches = [tmp_path / f"node{i}" for i in range(3)]
    for cache in caches:
        add(cluster, resources={"sampler": 1}, env_vars={"RAYEXPAND_CACHE": str(cache), "HOME": str(cache)})
    cluster.wait_for_nodes()
    raw = yaml.safe_load((ROOT / "jobs/digits/expand-img2img.yaml").read_text())
    raw |= {"out": str(tmp_path / "out"), "sampler": {"batch": 10, "shard_images": 10},
            "method": {"name": "diffmix", "ratio": 5, "steps": 10, "strengths": [0.5], "guidance_scale": 2.0,
                       "prompt": "a photo of a {token}"}, "artifacts": {"adapter": "~/adapter"},
            **on(cluster, actors=3, cpus_per_actor=0.5, resources={"sampler": 1})}
    run = runs.prepare(parse(raw), device_here=False)
    totals = expand_with(run)
    local, _ = complete(parse({**raw, "name": "local"}))

    assert totals.kept == 100
    assert run.facts["models"] == expected
    assert hashes(run) == hashes(local)
    filled = [cache for cache in caches if cache.exists()]
    assert len(filled) >= 2
    for cache in filled:
        assert {path.name for path in cache.iterdir() if path.is_dir()} - {"hashes"} == {"staged"}
        staged = {path.name for path in (cache / "staged").iterdir() if path.is_dir()}
        assert staged == {sha256[:16] for sha256 in expected.values()}
    assert folders.cache_root() not in caches


@pytest.mark.parametrize("told_to_wait", [True, False], ids=["ours", "Ray's own limit"])
def test_without_a_gpu_the_run_waits_and_goes_on_when_one_comes(
        cluster: Cluster, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, told_to_wait: bool) -> None:
    """The limit that ends a run, shortened to five seconds, ends one that does not switch it off."""
    config = make_config("Fake", ratio=1, sections=on(cluster, actors=1, gpus_per_actor=1, cpus_per_actor=0))
    run = runs.prepare(config, device_here=False)
    monkeypatch.setattr(on_ray, "WAITING_S", 3.0)
    monkeypatch.setattr(pool, "NO_PROGRESS_S", pool.NO_PROGRESS_S if told_to_wait else 5)
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = 5
    said: list[str] = []

    def one_comes() -> None:
        time.sleep(12)  # past the limit, which a run that keeps it does not survive
        add(cluster, num_gpus=1)

    if not told_to_wait:
        with pytest.raises(ExecutionTimeoutError):
            expand_with(run)
        return
    totals = expand_with(run, meanwhile=one_comes, say=said.append)

    assert totals.pending == 0
    assert any(line.startswith("waiting for capacity") for line in said)


def test_many_shards_are_as_many_tasks_and_the_first_receipt_comes_early(cluster: Cluster, make_config: MakeConfig,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """300 shards of one image, 2 actors: the first receipt is there long before the last."""
    add(cluster, resources={"sampler": 2})
    cluster.wait_for_nodes()
    config = make_config("Sleeping", ratio=15, seconds=0.02, batch=1, shard_images=1,
                         sections=on(cluster, actors=2, cpus_per_actor=0.5, resources={"sampler": 1}))
    run = runs.prepare(config, device_here=False)
    waves: list[int] = []
    monkeypatch.setattr(runs, "WAVE", 12)
    at: list[float] = []

    def jobs() -> list[runs.Job]:
        todo = runs.pending_jobs(run)
        waves.append(len(todo))
        return todo

    def watch() -> None:
        _until(lambda: bool(run.store.committed()))
        at.append(len(run.store.committed()))

    thread = threading.Thread(target=watch)
    thread.start()
    totals = expand_with(run, jobs)
    thread.join()

    assert run.plan.n_shards == 20
    assert waves == [20, 8, 0], "each wave asks again what is pending"
    assert at[0] < 12, "the first receipt does not wait for the wave"
    assert (totals.pending, totals.shards) == (0, 20)


def _until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.02)
