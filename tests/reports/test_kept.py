"""Copies that a selection keeps of each seed, counted a few rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from rayexpand.reports import kept
from rayexpand.runs.status import RunView
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import parquet_bytes


class View:
    """What is asked of a run."""

    def __init__(self, folder: Path, seeds: int) -> None:
        self.files, self.run = LocalFiles(folder), {"seeds": seeds}


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_counts_do_not_depend_on_how_many_rows_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        rows: int) -> None:
    monkeypatch.setattr(kept, "_ROWS", rows)
    held, summed = list[int](), kept._summed

    def counted(table: pa.Table) -> pa.Table:
        held.append(table.num_rows)
        return summed(table)

    monkeypatch.setattr(kept, "_summed", counted)
    view = cast(Any, View(tmp_path, 5))
    (tmp_path / "selections").mkdir()
    keep = {"a/b/0": True, "a/b/1": True, "a/b/2": True, "c/0": False, "c/1": True, "d/0": False, "c/2": True}
    (tmp_path / "selections/one.parquet").write_bytes(parquet_bytes(pa.table({
        "sample_id": list(keep), "keep": list(keep.values())}), {}))

    assert kept.copies_kept(cast(RunView, view), "one") == {0: 3, 1: 0, 2: 1, 3: 1}
    assert max(held[:-1]) <= rows
