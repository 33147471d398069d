"""Notes that may be lost: damaged ones count as none, writers do not disturb each other."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayexpand.storage.notes import keep_note, read_note


def test_a_note_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "some/where/a.json"
    assert read_note(file) is None
    for content in ({"a": 1}, {"b": [1.5, "x"]}):
        keep_note(file, content)
        assert read_note(file) == content
    assert [one.name for one in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: text.replace("17", "18"), lambda text: "",
                                    lambda text: "[1]", lambda text: "\0" * 40])
def test_a_damaged_note_is_none(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    keep_note(file := tmp_path / "a.json", {"a": 17})
    file.write_text(damage(file.read_text()))
    assert read_note(file) is None


def test_a_note_under_another_name_is_none(tmp_path: Path) -> None:
    keep_note(tmp_path / "a.json", {"a": 17})
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    assert read_note(tmp_path / "b.json") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep_note(tmp_path / "file/a.json", {"a": 1})  # no folder
    (tmp_path / "a.json").mkdir()
    keep_note(tmp_path / "a.json", {"a": 1})  # a folder in its place
    assert read_note(tmp_path / "a.json") is None
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.json", "file"]


def test_many_writers_leave_one_whole_note(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: keep_note(file, {"a": i, "long": "x" * 5000}), range(64)))
    assert set(json.loads(file.read_text())) > {"a", "long"}
    assert (read_note(file) or {})["a"] in range(64)
