"""The folder of a cluster of our own: only for this user, and gone when its process is."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

import pytest

from rayexpand.on_ray import pool
from rayexpand.storage.files import process_token


def test_folders_of_dead_processes_are_swept_and_none_is_open_to_others(tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    host, pid, _ = process_token().rsplit("~", 2)
    for name, owner in (("rx-dead", f"{host}~{pid}~1"), ("rx-here", process_token()), ("rx-far", "elsewhere~1~1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "owner").write_text(owner)
    (tmp_path / "rx-other").mkdir()
    made = Path(pool._own_folder())

    assert {one.name for one in tmp_path.iterdir()} == {"rx-here", "rx-far", "rx-other", made.name}
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert (made / "owner").read_text() == process_token()
