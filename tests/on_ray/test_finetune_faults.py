"""Faults of fitting on a cluster, decided without one: what is tried again, what is refused, with which exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from rayexpand.contract.errors import (
    ConfigError,
    EnvironmentFault,
    Interrupted,
    ModelError,
    OverBudget,
    RayexpandError,
    StorageError,
    UsageError,
    packed,
)
from rayexpand.fitting.adapter import train as finetune_run
from rayexpand.on_ray import finetune as spread
from rayexpand.on_ray import spans as spans_on_ray
from rayexpand.on_ray.features import FeatureActor
from rayexpand.on_ray.loaders import LoaderTime, loaded_steps
from rayexpand.on_ray.pool import NO_PROGRESS_S, Pool
from rayexpand.runs.config import ClusterConfig


def test_loaders_wait_for_a_slow_step_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is a process of its own, where Ray's half hour holds."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 1800)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: (_ for _ in ()).throw(LookupError("no cluster")))
    with pytest.raises(LookupError):
        next(loaded_steps(spread.LatentLoaderActor, {}, [(0, 1)], processes=1, rows=1, spent=LoaderTime()))
    assert ray.data.DataContext.get_current().execution_no_progress_timeout_s == NO_PROGRESS_S


class Gone(ray.exceptions.RayError):
    """A run of workers that ended, with what each of them said."""

    def __init__(self, *said: Exception) -> None:
        super().__init__("the workers ended")
        self.cause = SimpleNamespace(worker_failures=dict(enumerate(said)))


@pytest.mark.parametrize(("written", "failure", "expected", "exit_code"), [
    (ConfigError("x", ["batch: too small"]), None, ConfigError, 2),
    (ModelError("batch: too small"), Gone(Interrupted("killed")), ModelError, 2),
    (StorageError("batch: too small"), None, StorageError, 2), (OverBudget("batch: too small"), None, OverBudget, 3),
    (RayexpandError("batch: too small"), None, RayexpandError, 1),
    (None, Gone(RuntimeError("x"), UsageError("batch: too small")), UsageError, 2),
    (None, Gone(Interrupted("killed")), EnvironmentFault, 75),
    (None, ray.exceptions.WorkerCrashedError(), EnvironmentFault, 75)])
def test_what_ends_a_fine_tuning_says_whether_to_go_on(written: RayexpandError | None, failure: Exception | None,
                                                       expected: type[RayexpandError], exit_code: int, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_: Any) -> None:
        if written is not None:
            spread._replace(tmp_path / spread.REFUSED, packed(written))
        if failure is not None:
            raise failure

    for name in ("_gpus", "at_driver", "_check_device", "_check_room", "open_model_server"):
        monkeypatch.setattr(spread, name, lambda *_: None)
    monkeypatch.setattr(spread, "_parts", lambda job: {})
    drive = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: "run"))
    monkeypatch.setattr(spread, "_drive", drive)
    monkeypatch.setattr(ray, "wait", lambda *_, **__: (["run"], []))
    monkeypatch.setattr(ray, "get", ended)
    job: Any = SimpleNamespace(folder=str(tmp_path))
    with pytest.raises(RayexpandError) as caught:
        spread.train_spread(job, lambda *_: None, ClusterConfig())
    assert type(caught.value) is expected
    assert caught.value.exit_code == exit_code
    assert ("batch: too small" in str(caught.value)) == (exit_code != 75)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("device", "asked", "there", "remedy"), [
    ("cuda", None, 0, "join a cluster with GPUs"), ("cuda:0", 0.0, 8, r"gpus_per_worker to 1 or leave it out"),
    ("cpu", 1.0, 8, "gpus_per_worker: 0, or device: auto"), ("cuda", None, 8, None), ("cpu", None, 8, None),
    ("auto", None, 0, None), ("auto", 0.0, 8, None), ("cuda", 0.5, 8, None)])
def test_workers_train_where_the_file_says(device: str, asked: float | None, there: int, remedy: str | None,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8, "GPU": there})
    job: Any = SimpleNamespace(base=SimpleNamespace(device=device), made=SimpleNamespace(gpus_per_worker=asked))
    if remedy is None:
        spread._check_device(job, spread._gpus(job))
        return
    with pytest.raises(UsageError, match=rf"device: {device} asked for.*{remedy}"):
        spread._check_device(job, spread._gpus(job))


def test_workers_go_on_from_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_other(step: int) -> Callable[..., None]:
        return lambda values, op: values.copy_(torch.minimum(values, torch.tensor([step, -step])))

    spread.check_step(3, "cpu")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for own, other in ((3, 3), (3, 0), (0, 3)):
        monkeypatch.setattr(torch.distributed, "all_reduce", with_other(other))
        if own == other:
            spread.check_step(own, "cpu")
            continue
        with pytest.raises(Interrupted, match="checkpoints of steps 0 and 3"):
            spread.check_step(own, "cpu")
    tuning: Any = SimpleNamespace(tuner=SimpleNamespace(step=3), curve=finetune_run.LossCurve(),
                                  job=SimpleNamespace(made=None))
    with pytest.raises(AssertionError, match="different steps"):
        finetune_run.tune(tuning, [SimpleNamespace(step=0)], save=lambda: None)  # type: ignore[list-item]


@pytest.mark.parametrize(("faults", "expected"), [
    ([{2: "disk"}, {}], [0, 4, 2]), ([{2: "disk"}, {2: "disk"}], EnvironmentFault),
    ([{0: "disk", 2: "disk", 4: "disk"}], EnvironmentFault), ([{2: "model"}], ModelError), ([{}], [0, 2, 4])])
def test_a_span_that_a_node_spoils_is_made_once_more(faults: list[dict[int, str]], expected: Any,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    passes = iter(faults)

    class Rows:
        """What a pool makes, or not."""

        def __init__(self, spans: list[dict[str, int]]) -> None:
            self.spans = spans

        def iter_rows(self) -> Iterator[dict[str, Any]]:
            bad = next(passes)
            for span in self.spans:
                kind = {"disk": EnvironmentFault, "model": ModelError}.get(bad.get(span["first"], ""))
                yield {"span_start": span["first"], "span_stop": span["stop"], "cpu_seconds": 1.0, "seconds": 1.0,
                       "fault": packed(kind("spoilt")) if kind else "", "device": "" if kind else "cpu"}

    class TwoActors(Pool):
        def map(self, items: Any, actor: Any, arguments: Any, **options: Any) -> Any:
            return Rows(items)

    monkeypatch.setattr(spans_on_ray, "choose_pool", lambda *_, **__: TwoActors(2, 1.0, 0.0, {}, {}))
    monkeypatch.setattr(spans_on_ray, "open_model_server", lambda *_, **__: None)
    costs: dict[str, Any] = {}
    config: Any = SimpleNamespace(cluster=ClusterConfig(), device="cpu")
    index: Any = range(6)
    found = spans_on_ray.over_spans(FeatureActor, {}, config, {}, index, 2, costs,
                                  [range(2), range(2, 4), range(4, 6)])
    if isinstance(expected, type):
        with pytest.raises(expected):
            list(found)
        return
    assert [row["span_start"] for row in found] == expected
    assert costs["cpu_seconds"] == 3.0 + sum(map(len, faults))
    assert costs["device"] == "cpu"
