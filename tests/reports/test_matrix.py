"""The same seeds by several runs: joined by seed and copy, with what tells the runs apart and why a cell is empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayexpand.contract.errors import UsageError
from rayexpand.reports.matrix import write_matrix
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from tests.conftest import complete, hashes
from tests.reports.test_run import Page, visible


def made(out: Path, name: str, per_class: int = 2, **method: object) -> runs.Run:
    config = parse({"name": name, "out": str(out), "data": {"source": "digits", "per_class": per_class},
                    "method": {"name": "classical", "ratio": 2, **method}, "sampler": {"shard_images": 10}})
    return complete(config)[0]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[runs.Run]:
    out = tmp_path_factory.mktemp("matrix")
    return [made(out, "randaugment", policy="randaugment"), made(out, "cutout", policy="cutout", ratio=1),
            made(out, "one-each", policy="cutout", per_class=1)]


def folders(several: list[runs.Run]) -> list[str]:
    return [str(run.folder) for run in several]


def test_every_number_is_that_of_the_runs(several: list[runs.Run], tmp_path: Path) -> None:
    page = write_matrix(folders(several)[:2], str(tmp_path), rows=5, copies=2)
    numbers = read_json(open_files(tmp_path), "figures/matrix.json")
    committed = [hashes(run) for run in several]

    assert numbers is not None
    assert len(numbers["rows"]) == 5
    assert len({row["class"] for row in numbers["rows"]}) == 5, "classes in turn"
    for row in numbers["rows"]:
        (seed_id,) = row["seed_ids"]
        first, second = row["cells"]
        assert [one["sample_id"] for one in first] == [f"{seed_id}/0", f"{seed_id}/1"]
        assert all(committed[0][one["sample_id"]] == one["sample_sha256"] for one in first)
        assert committed[1][f"{seed_id}/0"] == second[0]["sample_sha256"]
        assert second[1]["absent"] == "not planned", "one copy was asked for"
    text = Path(page).read_text()
    assert Page(text).open == []
    assert text.count("<img") == 5 * (1 + 2 + 1)
    assert text.count("no picture") == 5
    assert "not planned (5)" in visible(text)
    assert "policy cutout" in visible(text)
    assert "http" not in text


def test_an_altered_page_of_numbers_is_seen(several: list[runs.Run], tmp_path: Path) -> None:
    write_matrix(folders(several)[:2], str(tmp_path), rows=2)
    file = tmp_path / "figures/matrix.json"
    found = json.loads(file.read_text())
    found["rows"][0]["cells"][0][0]["strength"] = 0.123
    file.write_text(json.dumps(found))

    with pytest.raises(Exception, match="does not match its seal"):
        read_json(open_files(tmp_path), "figures/matrix.json")


def test_seeds_that_all_runs_share_come_before_others(several: list[runs.Run], tmp_path: Path) -> None:
    write_matrix(folders(several), str(tmp_path), rows=10)
    numbers = read_json(open_files(tmp_path), "figures/matrix.json") or {}
    own = set(several[2].plan.index.seed_ids)

    assert {row["seed_ids"][0] for row in numbers["rows"]} == own


def test_a_sheet_has_a_row_for_each_class(several: list[runs.Run], tmp_path: Path) -> None:
    page = write_matrix(folders(several)[:2], str(tmp_path), name="sheet", rows=10, copies=2, by_class=True)
    numbers = read_json(open_files(tmp_path), "figures/sheet.json") or {}

    assert [row["label"] for row in numbers["rows"]] == list(range(10))
    assert all(len(row["seed_ids"]) == 2 and [len(cell) for cell in row["cells"]] == [2, 2]
               for row in numbers["rows"])
    assert Path(page).read_text().count("<img") == 10 * (2 + 4)


def test_runs_that_cannot_stand_side_by_side_are_refused(several: list[runs.Run], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"room for 16.*name fewer"):
        write_matrix(folders(several)[:1] * 17, str(tmp_path))
    with pytest.raises(UsageError, match="pictures are more than"):
        write_matrix(folders(several), str(tmp_path), rows=400)
    assert not (tmp_path / "figures").exists()
