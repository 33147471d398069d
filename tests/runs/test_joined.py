from __future__ import annotations

import csv
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from rayexpand.api.pages import pictures
from rayexpand.api.runs import LoopFolder, RunFolder
from rayexpand.contract.errors import ConfigError, DamagedFile, UsageError
from rayexpand.evaluation.select import parse, select
from rayexpand.evaluation.sides import EVERY_ROW, samples_of
from rayexpand.loader.training_set import RowSource
from rayexpand.reports.run import contact_sheet
from rayexpand.runs import run as runs
from rayexpand.runs.export import export, stated_license
from rayexpand.runs.joined import open_samples, view_samples
from rayexpand.runs.status import read_classes
from rayexpand.storage.places import open_files
from rayexpand.studies.cross_fit import _made_with
from rayexpand.studies.records import _run as known_run
from rayexpand.studies.rounds.config import LoopConfig, RoundsConfig
from rayexpand.studies.rounds.loop import open_loop
from rayexpand.studies.run_folders import run_folders
from rayexpand.studies.samples import training_set
from tests.conftest import small_run
from tests.studies.rounds.conftest import finished, in_this_process


@pytest.fixture(scope="module")
def finished_ones(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop of three uneven rounds, and the run in one go."""
    out = tmp_path_factory.mktemp("joined")
    config = LoopConfig(run=small_run(image_folder, out, "Fake", name="loop", ratio=6),
                        rounds=RoundsConfig(count=3, shares=[1, 3, 2]))
    finished(config)
    in_this_process(runs.prepare(config.run.model_copy(update={"name": "whole"})))
    return out


@pytest.fixture
def made(finished_ones: Path, tmp_path: Path) -> tuple[str, str]:
    """Their folders, to change."""
    shutil.copytree(finished_ones, tmp_path / "out")
    return str(tmp_path / "out/loop"), str(tmp_path / "out/whole")


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


def test_every_layout_says_which_round_made_a_sample(made: tuple[str, str], tmp_path: Path) -> None:
    for layout in ("webdataset", "imagefolder", "huggingface"):
        export(made[0], str(tmp_path / layout), layout)
    table = pq.read_table(tmp_path / "huggingface/data")
    by_round = dict(zip(table["sample_id"].to_pylist(), table["round"].to_pylist(), strict=True))
    assert sorted(by_round.values()) == [1] * 20 + [2] * 60 + [3] * 40
    assert by_round.keys() == {one["sample_id"] for run in run_folders(made[0]) for one in RunFolder(run).samples()}
    with (tmp_path / "imagefolder/train/metadata.csv").open(newline="") as file:
        assert {one["sample_id"]: int(one["round"]) for one in csv.DictReader(file)} == by_round
    found = dict[str, int]()
    with tarfile.open(tmp_path / "webdataset/train/000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                said = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                found[said["sample_id"]] = said["round"]
    assert found == by_round
    assert "3 rounds of 20, 60, 40 samples" in (tmp_path / "webdataset/README.md").read_text()


def test_a_selection_of_a_loop_is_one_decision_over_all_rounds(made: tuple[str, str], tmp_path: Path) -> None:
    raw = {"name": "some", "run": made[0], "rule": {"kind": "random", "n": 3}}
    decided, whole = select(parse(raw)), select(parse({**raw, "run": made[1]}))
    assert (decided["planned"], decided["kept"]) == (120, whole["kept"])
    assert 0 < decided["kept"] < 120
    chosen = [{one["sample_id"] for one in pq.read_table(f"{folder}/selections/some.parquet").to_pylist()
               if one["keep"]} for folder in made]
    assert chosen[0] == chosen[1], "by keys of sample ids, whatever round they are of"
    assert export(made[0], str(tmp_path / "x"), "huggingface", selection="some").count == len(chosen[0])
    side = samples_of(open_samples(made[0]), EVERY_ROW, "some", 4)
    assert len(side) == sum(int(one.rpartition("/")[2]) < 4 for one in chosen[0])
    images = [image for chunk in side.chunks for image in side.read(chunk).images]
    assert len(images) == len(side)


def test_a_loop_folder_makes_a_sample_again_by_its_round(made: tuple[str, str]) -> None:
    loop = LoopFolder(made[0])
    third = next(one for one in loop.samples() if one["round"] == 3)
    found = loop.regen(third["sample_id"])
    assert (found["round"], found["equal"]) == (3, True)
    with pytest.raises(UsageError, match="is not in this plan"):
        loop.regen("ant/1.png/900")


def test_the_card_of_a_loop_points_at_all_its_rounds(made: tuple[str, str]) -> None:
    text = Path(LoopFolder(made[0]).card("cc0-1.0")).read_text()
    matter = yaml.safe_load(text.split("---")[1])
    assert matter["configs"][0]["data_files"][0]["path"] == "rounds/*/data/*.parquet"
    assert "Copies made in rounds: 3 rounds of 20, 60, 40 samples" in text
    assert "120 synthetic images" in text
    assert stated_license(open_files(made[0])) == "cc0-1.0"


def test_the_same_seeds_stand_beside_each_other_by_round(made: tuple[str, str]) -> None:
    pictures("matrix", made[0], rows=4)
    found = json.loads(Path(made[0], "figures/matrix.json").read_text())
    shown = [one for row in found["rows"] for cell in row["cells"] for one in cell]
    assert len(shown) == 12
    assert {one["sample_id"].rpartition("/")[2] for one in shown if "absent" not in one} == {"0", "1", "4"}


@pytest.mark.slow
def test_a_loop_in_an_object_store_is_read_like_one_on_a_disk(image_folder: Path, tmp_path: Path,
                                                              object_stores: object) -> None:
    config = LoopConfig(run=small_run(image_folder, Path(), "Fake", name="loop", ratio=3,
                                      sections={"out": "s3://runs/loops"}), rounds=RoundsConfig(count=2))
    finished(config)
    folder = LoopFolder(config.folder)
    assert folder.export(tmp_path / "x", "huggingface").count == 60
    assert select(parse({"name": "some", "run": config.folder, "rule": {"kind": "random", "n": 2}}))["samples"] == 60
    assert folder.card() == "s3://runs/loops/loop/README.md"
    assert folder.report() == folder.page == "s3://runs/loops/loop/report.html"
    second = next(one for one in folder.samples() if one["round"] == 2)
    assert folder.regen(second["sample_id"])["equal"]


def test_pages_and_tables_of_studies_know_a_loop_by_its_folder(made: tuple[str, str]) -> None:
    view, found = view_samples(made[0]), known_run(made[0], ())
    assert found is not None
    assert (found.digest, found.classes, found.discarded_share) == (view.run["run_digest"], 4, 0.0)
    assert found.config["method"] == view.run["config"]["method"]
    rows = contact_sheet(view, read_classes(view))
    assert len(rows) == 4
    assert all(one.uri for row in rows for one in (row.seed, *row.samples))
    assert _made_with([RowSource(run=made[0])]) == []
