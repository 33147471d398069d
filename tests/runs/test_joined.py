from __future__ import annotations

from pathlib import Path

import pytest

from rayexpand.contract.errors import ConfigError, DamagedFile, UsageError
from rayexpand.loader.training_set import RowSource
from rayexpand.runs import run as runs
from rayexpand.runs.joined import open_samples, view_samples
from rayexpand.studies.rounds.config import LoopConfig, RoundsConfig
from rayexpand.studies.rounds.loop import open_loop
from rayexpand.studies.run_folders import run_folders
from rayexpand.studies.samples import training_set
from tests.conftest import small_run
from tests.studies.rounds.conftest import finished, in_this_process


@pytest.fixture
def made(image_folder: Path, tmp_path: Path) -> tuple[str, str]:
    """A loop of three uneven rounds, and the run in one go."""
    config = LoopConfig(run=small_run(image_folder, tmp_path / "out", "Fake", name="loop", ratio=6),
                        rounds=RoundsConfig(count=3, shares=[1, 3, 2]))
    whole = config.run.model_copy(update={"name": "whole"})
    finished(config)
    in_this_process(runs.prepare(whole))
    return config.folder, whole.folder


def test_rows_and_shards_of_all_rounds_are_those_of_one_plan(made: tuple[str, str]) -> None:
    run, whole = (open_samples(folder) for folder in made)
    assert run.totals().kept == run.totals().planned == whole.totals().planned
    assert run.plan.copies.tolist() == whole.plan.copies.tolist()
    seen = list[int]()
    for receipt in run.store.receipts():
        table = run.store.data(receipt, ["row", "seed_id", "sample_id"])
        row_N = table["row"].to_numpy() + run.store.first_row(receipt.data_file)
        assert run.plan.ids_of(row_N).to_pylist() == table["sample_id"].to_pylist()
        assert run.plan.index.table["seed_id"].take(run.plan.position(row_N)).equals(table["seed_id"])
        assert {run.plan.find(one) for one in table["sample_id"].to_pylist()} == {receipt.shard_id}
        seen += row_N.tolist()
    assert sorted(seen) == list(range(run.plan.planned))
    assert view_samples(made[0]).totals.shards == run.plan.n_shards


def test_a_training_set_takes_the_copies_it_would_take_of_the_run_in_one_go(made: tuple[str, str]) -> None:
    def taken(folder: str, copies: float | None) -> list[str]:
        run, found = open_samples(folder), list[str]()
        rows = training_set([RowSource(run=folder, copies=copies)])
        for (name, group), chunk in zip(rows.parts[0].chunks, range(len(rows.parts[0].chunks)), strict=True):
            receipt = next(one for one in run.store.receipts() if one.data_file == name)
            with run.store.open(receipt) as file:
                ids = file.read_row_group(group, ["sample_id"])["sample_id"].to_pylist()
            found += [ids[i] for i in rows.column("row")[rows.column("chunk") == chunk]]
        return sorted(found)

    for copies in (None, 3, 2.5):
        assert taken(made[0], copies) == taken(made[1], copies) != []


def test_rounds_to_come_are_pending_and_what_a_loop_left_unspent_is_not(image_folder: Path, tmp_path: Path) -> None:
    run = small_run(image_folder, tmp_path / "out", "Fake", name="loop", ratio=6)
    config = LoopConfig(run=run, rounds=RoundsConfig(count=2, shares=[1, 1, 1]))
    loop = open_loop(config)
    with pytest.raises(UsageError, match="no round yet"):
        open_samples(config.folder)
    with pytest.raises(UsageError, match="no run of it"):
        run_folders(config.folder)
    finished(config)
    totals = open_samples(config.folder).totals()
    assert (totals.planned, totals.pending) == (80, 0)
    assert run_folders(config.folder) == [f"{config.folder}/rounds/0001", f"{config.folder}/rounds/0002"]

    loop.files.delete("decisions/0003.json", "decisions/0002.json", "rounds/0002/run.json")
    assert view_samples(config.folder).totals.pending == 40
    with pytest.raises(ConfigError, match="40 of 80 samples are pending"):
        training_set([RowSource(run=config.folder)])


def test_a_damaged_data_file_is_named_by_its_round(made: tuple[str, str]) -> None:
    file = Path(made[0], "rounds/0002/data/train-000000.parquet")
    content = bytearray(file.read_bytes())
    content[100:200] = bytes(100)
    file.write_bytes(content)
    run = open_samples(made[0])
    damaged = next(one for one in run.store.receipts() if one.data_file == "rounds/0002/data/train-000000.parquet")
    with pytest.raises(DamagedFile, match=r"rounds/0002/data/train-000000\.parquet"):
        run.store.data(damaged)
