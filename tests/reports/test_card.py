from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds import DataConfig
from rayexpand.reports.card import PROMISE, write_card
from rayexpand.reports.licenses import license_identifier
from rayexpand.reports.run import write_report
from rayexpand.runs.export import export, markdown_cell, size_category
from rayexpand.runs.status import view_run
from tests.commands import rewrite_json
from tests.conftest import MakeConfig, complete
from tests.runfolder import Builder, sample_run

LOAD = """
import sys
from datasets import load_dataset
rows = load_dataset(sys.argv[1], split="train")
print(len(rows), rows.features["image"].__class__.__name__, rows.features["label"].names[3], rows[0]["image"].size[0],
      sorted(rows["sample_id"])[0], sep="|")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    run = sample_run(tmp_path_factory.mktemp("card") / "half")
    write_card(run.folder)
    return run


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_front_matter(run: Builder) -> None:
    matter = front_matter((run.folder / "README.md").read_text())
    (files,) = matter["configs"]
    assert files["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert "synthetic" in matter["tags"]
    assert matter["task_categories"] == ["image-classification"]
    assert matter["annotations_creators"] == ["machine-generated"]
    assert matter["size_categories"] == ["n<1K"]
    assert "license" not in matter


def test_body_says_what_it_must(run: Builder) -> None:
    text = (run.folder / "README.md").read_text()
    for piece in ("117 synthetic images of 10 classes", "not finished", "60 of 180", "| 180 | 117 | 2 | 1 | 60 |",
                  "| wrong\\_class | rejected | 1 |", "| 7 | seven | 7 | 3 | 11 |", PROMISE, "`" + "ab12" * 16 + "`",
                  "c0ffee" * 10 + "beef", "Unknown: none was given", "load_dataset", "ray.data.read_parquet",
                  "pq.read_table", "Known failure modes", "Mixed stacks", "| strength | 0.6 |"):
        assert piece in text, piece


def test_the_promise_is_not_reworded() -> None:
    assert hashlib.sha256(PROMISE.encode()).hexdigest().startswith("e113ace40bedf3d6")


def test_license_only_if_given(run: Builder) -> None:
    text = write_card(run.folder, license_id="cc-by-4.0").read_text()
    assert front_matter(text)["license"] == "cc-by-4.0"
    assert "Unknown: none was given" not in text
    write_card(run.folder)


@pytest.mark.parametrize(("given", "stated"), [("CC-BY-4.0", "cc-by-4.0"), ("ODbL-1.0", "odbl"),
                                               ("GPL-3.0-or-later", "gpl-3.0"), ("creativeml-openrail-m",) * 2])
def test_licenses_by_any_spelling(given: str, stated: str) -> None:
    assert license_identifier(given) == stated


@pytest.mark.parametrize(("given", "says"), [("nonsense", "give an SPDX identifier"), ("cc-by-4", "cc-by-4.0"),
                                             ("apache 2.0", "did you mean apache-2.0")])
def test_an_unknown_license_is_refused(run: Builder, given: str, says: str) -> None:
    before = (run.folder / "README.md").read_text()
    with pytest.raises(UsageError, match=re.escape(says)):
        write_card(run.folder, license_id=given)
    assert (run.folder / "README.md").read_text() == before


def test_a_license_stays_and_goes_into_exports(make_config: MakeConfig, tmp_path: Path) -> None:
    run, _ = complete(make_config("Fake", ratio=1))
    write_card(run.folder, license_id="MIT")
    assert "license: mit" in write_card(run.folder).read_text()
    export(str(run.folder), str(tmp_path / "new"), "imagefolder")
    assert "license: mit" in (tmp_path / "new/README.md").read_text()


def test_no_path_of_this_machine(tmp_path: Path) -> None:
    data = DataConfig(source="imagefolder", path="/home/somebody/birds")
    run = Builder(tmp_path / "run", shards=1).start()
    rewrite_json(run.folder / "run.json", lambda facts: facts["config"].update(
        data=data.model_dump(mode="json"), prior={"weights": "/home/somebody/models/sd15"}))
    text = write_card(run.folder).read_text()
    assert "somebody" not in text
    assert "&lt;path&gt;/birds" in text
    assert "&lt;path&gt;/sd15" in text


@pytest.mark.parametrize(("method", "mixed"), [
    ({"name": "diffmix"}, True), ({"name": "diffmix", "variant": "real_mix"}, True),
    ({"name": "diffmix", "variant": "diff_aug"}, False), ({"name": "diffmix", "strengths": [1.0]}, False),
    ({"name": "diffmix", "targets": "reference"}, False), ({"name": "img2img"}, False),
    ({"name": "no.such.Method"}, False), ({"name": "diffmix", "old": 1}, False)])
def test_mixed_labels_are_explained(method: dict, mixed: bool, tmp_path: Path) -> None:
    run = Builder(tmp_path / "run", shards=1).start()
    rewrite_json(run.folder / "run.json", lambda facts: facts["config"].update(method=method))
    for text in (write_card(run.folder).read_text(), write_report(run.folder).read_text()):
        assert ("s^gamma" in text and "gamma = 0.5" in text and "soft_label" in text) == mixed


def test_datasets_reads_the_data_files_only(run: Builder, tmp_path: Path) -> None:
    run = replace(run, folder=shutil.copytree(run.folder, tmp_path / "run"))
    run.commit(4, run.samples(4, dict.fromkeys(range(30), (Reason.NAN_LATENT, ""))))  # a data file without rows
    write_card(run.folder)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", LOAD, str(run.folder)], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, image, name, side, first = done.stdout.strip().split("|")
    kept = [i for r in view_run(run.folder).receipts for i in run.store.data(r, ["sample_id"])["sample_id"].to_pylist()]
    assert (int(rows), image, name, side) == (117, "Image", "three", "16")
    assert first == sorted(kept)[0]
    assert pq.read_table(run.folder / "data").num_rows == 117


def test_hostile_names_stay_in_their_cells(tmp_path: Path) -> None:
    names = ("a|b\n# c", "<img src=x>", "`d` [e](f)")
    run = Builder(tmp_path / "evil", names=names, shards=1, seeds_per_shard=3, side=8).start()
    run.commit(0)
    lines = write_card(run.folder).read_text().splitlines()
    assert "<img" not in "\n".join(lines).split("<details>")[0]
    (row,) = [line for line in lines if line.startswith("| 0 |")]
    assert row == "| 0 | a\\|b \\# c | a\\|b \\# c | 1 | 6 |"
    assert markdown_cell("`d` [e](f)") == "\\`d\\` \\[e\\](f)"


def test_many_classes_show_the_lowest(tmp_path: Path) -> None:
    names = tuple(f"class {i:03d}" for i in range(120))
    run = Builder(tmp_path / "many", names=names, shards=1, seeds_per_shard=120, copies=2, side=8).start()
    run.commit(0, run.samples(0, {6: (Reason.NEAR_COPY, "")}))
    text = write_card(run.folder).read_text()
    assert "120 classes with 1 to 2 kept samples each" in text
    assert len(re.findall(r"^\| \d+ \| class ", text, re.M)) == 25
    assert "| 3 | class 003 | class 003 | 1 | 1 |" in text


def test_card_of_a_run_without_samples(tmp_path: Path) -> None:
    run = Builder(tmp_path / "none", shards=1).start(models={})
    text = write_card(run.folder).read_text()
    assert "0 synthetic images" in text
    assert "No row was refused." in text


@pytest.mark.parametrize(("rows", "name"), [(0, "n<1K"), (1_000, "1K<n<10K"), (12_811_670, "10M<n<100M"),
                                            (2_000_000_000, "n>1B")])
def test_size_category(rows: int, name: str) -> None:
    assert size_category(rows) == name
