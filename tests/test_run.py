from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from rayexpand import run as runs
from rayexpand.config import RunConfig, parse
from rayexpand.errors import ConfigError, DigestMismatch, EnvironmentFault, OverBudget, UsageError
from rayexpand.schema import Receipt
from rayexpand.store import Tally, Totals, data_name
from rayexpand.verify import verify
from tests.conftest import MakeConfig, complete, hashes
from tests.tiny import tiny_pipeline


@pytest.fixture
def broken(image_folder: Path, tmp_path: Path) -> Path:
    """The image folder with two images that cannot be read."""
    folder = tmp_path / "broken"
    shutil.copytree(image_folder, folder)
    for name in ("bee/1.png", "bee/2.png"):
        (folder / name).write_bytes(b"")
    return folder


def repair(broken: Path, image_folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(image_folder / name, broken / name)


def of(folder: Path) -> dict[str, str]:
    return {"source": "imagefolder", "path": str(folder)}


def retried(run: runs.Run) -> tuple[runs.Run, Totals]:
    """What `rayexpand retry` does."""
    again = runs.open_run(str(run.folder), check_models=True)
    expander = runs.start(again)
    try:
        return again, runs.drive(again, runs.in_process(expander), runs.retry_jobs(again), to_the_end=True)
    finally:
        expander.close()


def test_another_configuration_or_model_in_the_folder_is_refused(make_config: MakeConfig,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    complete(make_config("Fake", ratio=2))
    with pytest.raises(DigestMismatch, match=r"seed: 3 -> 4"):
        runs.prepare(make_config("Fake", ratio=2, sections={"seed": 4}))
    monkeypatch.setattr(runs, "model_hashes", lambda *args: {"prior": "other"})
    with pytest.raises(DigestMismatch, match=r"models\.prior"):
        runs.prepare(make_config("Fake", ratio=2))


def test_files_of_another_run_are_never_counted(make_config: MakeConfig) -> None:
    """Its run.json is gone, its data and receipts are still there."""
    run, _ = complete(make_config("Fake", ratio=2))
    Path(run.folder, "run.json").unlink()

    with pytest.raises(DigestMismatch):
        complete(make_config("Fake", ratio=2, sections={"seed": 99}))


def test_a_retry_refuses_other_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    weights = tiny_pipeline(tmp_path / "weights")
    sections = {"prior": {"weights": str(weights)}, "image": {"size": 16}}
    run = runs.prepare(make_config("img2img", ratio=1, steps=4, sections=sections))
    (unet,) = (weights / "unet").glob("*.safetensors")
    unet.write_bytes(unet.read_bytes()[:-1] + b"\x01")

    with pytest.raises(DigestMismatch, match=r"models\.prior"):
        runs.open_run(str(run.folder), check_models=True)
    assert runs.open_run(str(run.folder)).totals().pending == 20, "a status needs no model"


def test_an_empty_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="out"):
        parse({"name": "run", "out": "", "data": {"source": "digits"}, "method": {"name": "classical"}})


def test_a_copy_without_its_empty_folders_can_be_retried(make_config: MakeConfig, broken: Path,
                                                         image_folder: Path) -> None:
    run, _ = complete(make_config("Fake", data=of(broken)))
    repair(broken, image_folder, "bee/1.png", "bee/2.png")
    for name in (".tmp", "blame"):
        Path(run.folder, name).rmdir()

    assert retried(run)[1].kept == 40


def test_a_lost_first_file_of_a_retried_shard_is_noticed(make_config: MakeConfig, broken: Path,
                                                         image_folder: Path) -> None:
    config = make_config("Fake", ratio=3, data=of(broken))
    run, _ = complete(config)
    repair(broken, image_folder, "bee/1.png", "bee/2.png")
    run, totals = retried(run)
    assert totals.kept == 60
    reference = hashes(run)
    shard = next(shard for shard, generation in run.store.committed().items() if generation)
    Path(run.folder, "data", data_name(shard)).unlink()
    with pytest.raises(UsageError, match=rf"Delete what is left of them \(data/train-{shard:06d}"):
        complete(config)
    Path(run.folder, "data", data_name(shard, 1)).unlink()

    assert hashes(complete(config)[0]) == reference


def test_a_lost_middle_generation_is_noticed(make_config: MakeConfig, broken: Path, image_folder: Path) -> None:
    config = make_config("Fake", ratio=2, shard_images=100, data=of(broken))
    run, _ = complete(config)
    for name in ("bee/2.png", "bee/1.png"):
        repair(broken, image_folder, name)
        run, totals = retried(run)
    assert (totals.kept, totals.failed, totals.pending) == (40, 0, 0)
    assert verify(run).problems == []
    Path(run.folder, "data", data_name(0, 1)).unlink()

    with pytest.raises(UsageError, match="an earlier file of 1 retried shard"):
        complete(config)


def test_retries_of_retries_make_only_what_failed_last(make_config: MakeConfig,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> RunConfig:
        return make_config("RejectsAndFails", ratio=2, share=0.3, shard_images=100, name=name)

    reference = hashes(complete(config("clean"))[0])
    one, two = list(reference)[:2]
    monkeypatch.setenv("FAILS", f"{one} {two}")
    run, first = complete(config("run"))
    assert first.failed == 2
    assert first.rejected > 0
    monkeypatch.setenv("FAILS", one)
    run, second = retried(run)
    monkeypatch.setenv("FAILS", "")
    run, third = retried(run)

    assert [receipt.planned for receipt in run.store.receipts()] == [40, 2, 1]
    assert second.failed == 1
    assert (third.failed, third.pending, third.rejected) == (0, 0, first.rejected)
    assert hashes(run) == reference
    assert verify(run, pixels=True).problems == []


def test_rejected_rows_cost_no_budget(make_config: MakeConfig) -> None:
    sections = {"limits": {"max_failed": 0.0}}
    _, totals = complete(make_config("RejectsAndFails", ratio=2, share=0.3, sections=sections))

    assert totals.rejected > 0


def test_the_budget_stops_at_once_and_lets_a_retry_end(make_config: MakeConfig,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "ant/0.png/0 dog/4.png/1")
    config = make_config("RejectsAndFails", ratio=2, share=0.0, sections={"limits": {"max_failed": 0.0}})
    with pytest.raises(OverBudget):
        complete(config)
    assert runs.open_run(config.folder).totals().shards == 1, "stopped right after the shard that broke it"
    loose = runs.open_run(config.folder, ["limits.max_failed=1"])
    runs.drive(loose, runs.in_process(runs.start(loose)), lambda: runs.pending_jobs(loose))
    monkeypatch.setenv("FAILS", "")

    assert retried(loose)[1].failed == 0, "starts over its budget, ends under it"


def test_the_budget_names_reasons_of_failures_only(make_config: MakeConfig) -> None:
    run = runs.prepare(make_config("Redraws", ratio=2, share=0.9, last=0, sections={"limits": {"max_failed": 0.0}}))
    receipt = runs.start(run)(0)
    assert "exhausted" in receipt.reasons
    failed = replace(receipt, failed=1, reasons={**receipt.reasons, "sampler_error": 1})

    with pytest.raises(OverBudget, match="sampler_error 1") as caught:
        runs.check_budget(run, Tally(run.plan.planned, [failed]))
    assert "exhausted" not in str(caught.value)


@pytest.mark.parametrize(("works", "asked"), [(False, 3), (True, 10)])
def test_three_faults_in_a_row_end_a_wave(make_config: MakeConfig, works: bool, asked: int) -> None:
    run = runs.prepare(make_config("Fake"))
    receipt = runs.start(run)(0)
    shards: list[int] = []

    def expander(shard_id: int, generation: int) -> Receipt:
        shards.append(shard_id)
        if works and shard_id % 3 == 2:
            return receipt
        raise EnvironmentFault("the storage hiccups")

    outcomes = list(runs.in_process(expander)([(shard, 0) for shard in range(10)]))  # type: ignore[arg-type]

    assert shards == list(range(asked))
    assert len(outcomes) == asked


def test_totals_hold_what_another_driver_committed(make_config: MakeConfig) -> None:
    run = runs.prepare(make_config("Fake"))
    mine, other = runs.start(run), runs.start(run)

    def wave(jobs: Sequence[runs.Job]) -> Iterator[Receipt | EnvironmentFault]:
        for job in jobs:
            if job == (1, 0):
                other(*job)
                yield EnvironmentFault("the storage hiccups")
            else:
                yield from runs.in_process(mine)([job])

    totals = runs.drive(run, wave, lambda: runs.pending_jobs(run))

    assert totals == run.totals()
    assert totals.pending == 0
