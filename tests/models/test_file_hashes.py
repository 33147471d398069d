"""Hashes of large model files are remembered, and never those of another content."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexpand.artifacts.store import MAKING_OF, file_sha256
from rayexpand.models import file_hashes
from rayexpand.models.file_hashes import LEAST, remembered_sha256
from rayexpand.models.folders import cache_root, folder_hash
from rayexpand.storage.tables import sealed
from tests.commands import ROOT


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read; a file counts as settled at once."""
    read: list[Path] = []
    monkeypatch.setattr(file_hashes, "SETTLED", -1.0)
    monkeypatch.setattr(file_hashes, "file_sha256", lambda file: (read.append(file), file_sha256(file))[1])
    return read


def large(file: Path, content: int) -> Path:
    file.write_bytes(bytes([content]) * LEAST)
    return file


def tick(file: Path) -> None:
    """Waits until the clock of the file system has moved on since this file was written."""
    other = file.with_name("clock")
    while not other.exists() or other.stat().st_mtime_ns <= file.stat().st_mtime_ns:
        other.write_bytes(b"")
        time.sleep(0.001)


def test_a_file_is_read_once(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file = large(tmp_path / "a", 1)
    found = [remembered_sha256(file, tmp_path / "notes") for _ in range(3)]
    assert set(found) == {file_sha256(file)}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(file)
    assert {remembered_sha256(Path(name), tmp_path / "notes") for name in ("a", "link")} == set(found)
    assert reads == [file]


def rewritten(file: Path) -> None:
    large(file, 2)


def replaced_with_the_old_time(file: Path) -> None:
    seen = file.stat()
    large(file.with_name("new"), 2).rename(file)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def rewritten_with_the_old_time(file: Path) -> None:
    """As `rsync --times --inplace` does: only ctime tells."""
    seen = file.stat()
    large(file, 2)
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def one_byte_changed(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(LEAST // 2)
        stream.write(b"\x09")


@pytest.mark.parametrize("change", [rewritten, replaced_with_the_old_time, rewritten_with_the_old_time,
                                    one_byte_changed])
def test_a_file_that_changed_at_equal_size_is_read_again(tmp_path: Path, reads: list[Path],
                                                        change: Callable[[Path], None]) -> None:
    file = large(tmp_path / "a", 1)
    before = remembered_sha256(file, tmp_path / "notes")
    tick(file)
    change(file)
    after = remembered_sha256(file, tmp_path / "notes")

    assert file.stat().st_size == LEAST
    assert after == file_sha256(file) != before
    assert remembered_sha256(file, tmp_path / "notes") == after
    assert len(reads) == 2


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    file = large(tmp_path / "a", 1)
    remembered_sha256(file, tmp_path / "notes")
    assert not (tmp_path / "notes").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path: Path, reads: list[Path],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    file = large(tmp_path / "a", 1)
    tick(file)
    monkeypatch.setattr(file_hashes, "file_sha256", lambda one: (file_sha256(one), large(one, 2))[0])
    remembered_sha256(file, tmp_path / "notes")
    assert not (tmp_path / "notes").exists()


def test_a_small_file_is_read_every_time(tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "a").write_bytes(b"x" * (LEAST - 1))
    for _ in range(2):
        assert remembered_sha256(tmp_path / "a", tmp_path / "notes") == file_sha256(tmp_path / "a")
    assert len(reads) == 2
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:60], lambda text: text.replace('"sha256": "', '"sha256": "0'),
    lambda text: text.replace('"seal"', '"sea1"'), lambda text: "[]", lambda text: "{}",
    lambda text: '{"sha256": "0"}'])
def test_a_damaged_note_is_ignored_and_made_again(tmp_path: Path, reads: list[Path],
                                                  damage: Callable[[str], str]) -> None:
    file = large(tmp_path / "a", 1)
    remembered_sha256(file, tmp_path / "notes")
    (note,) = (tmp_path / "notes").iterdir()
    note.write_text(damage(note.read_text()))

    assert remembered_sha256(file, tmp_path / "notes") == file_sha256(file)
    assert len(reads) == 2
    assert remembered_sha256(file, tmp_path / "notes") == file_sha256(file)
    assert len(reads) == 2


def test_the_note_of_another_file_is_none(tmp_path: Path, reads: list[Path]) -> None:
    files = [large(tmp_path / name, i) for i, name in enumerate("ab")]
    for file in files:
        remembered_sha256(file, tmp_path / "notes")
    first, second = (tmp_path / "notes").iterdir()
    shutil.copy(first, second)
    assert [remembered_sha256(file, tmp_path / "notes") for file in files] == [file_sha256(file) for file in files]


WORKER = """
import sys
from pathlib import Path
from rayexpand.models import file_hashes
file_hashes.SETTLED = -1.0
for _ in range(40):
    print(file_hashes.remembered_sha256(Path(sys.argv[1]), Path(sys.argv[2])), flush=True)
"""


@pytest.mark.chaos
def test_processes_that_hash_while_a_file_is_replaced(tmp_path: Path) -> None:
    """Three of them, at once, with one folder of notes: each hash is that of a content the file had."""
    file = large(tmp_path / "a", 0)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, file, tmp_path / "notes"], text=True,
                                stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    contents, last = {hashlib.sha256(bytes(LEAST)).hexdigest()}, 0
    while any(worker.poll() is None for worker in workers):
        last = (last + 1) % 256
        contents.add(hashlib.sha256(bytes([last]) * LEAST).hexdigest())
        large(tmp_path / "next", last).rename(file)
        time.sleep(0.01)
    said = {line for worker in workers for line in worker.communicate()[0].split()}

    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert said <= contents
    assert remembered_sha256(file, tmp_path / "notes") == hashlib.sha256(bytes([last]) * LEAST).hexdigest()
    assert len(list((tmp_path / "notes").iterdir())) == 1


def test_a_model_folder_is_hashed_as_without_notes(tmp_path: Path, reads: list[Path],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """And what `rayexpand fit` made is read every time."""
    monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    large(folder / "model.safetensors", 1)
    (folder / "config.json").write_text("{}")
    plain = hashlib.sha256("".join(f"{name}\0{file_sha256(folder / name)}\n" for name in (
        "config.json", "model.safetensors")).encode()).hexdigest()

    assert [folder_hash(folder), folder_hash(folder)] == [plain] * 2
    assert reads.count(folder / "model.safetensors") == 1
    assert len(list((cache_root() / "hashes").iterdir())) == 1
    (folder / MAKING_OF).write_bytes(sealed(MAKING_OF, {"files": {}}))
    reads.clear()
    seen = (folder / "model.safetensors").stat()
    assert folder_hash(folder) == plain
    assert (folder / "model.safetensors").stat().st_mtime_ns == seen.st_mtime_ns
    assert reads == []  # not by way of the notes


def test_damage_to_a_made_artifact_that_no_time_tells_is_noticed(tmp_path: Path, reads: list[Path],
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "_state", lambda file: {"path": str(file), "size": LEAST, "modified": 0,
                                                             "changed": 0})  # a disk that rots
    folder = tmp_path / "made"
    folder.mkdir()
    large(folder / "model.safetensors", 1)
    before = folder_hash(folder)
    (folder / MAKING_OF).write_bytes(sealed(MAKING_OF, {"files": {}}))
    one_byte_changed(folder / "model.safetensors")
    assert folder_hash(folder) != before
    (folder / "pipeline").mkdir()
    large(folder / "pipeline/model.safetensors", 1)
    before = folder_hash(folder / "pipeline")
    one_byte_changed(folder / "pipeline/model.safetensors")
    assert folder_hash(folder / "pipeline") != before
