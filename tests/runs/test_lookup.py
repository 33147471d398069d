"""Rows by their seeds: the right ones, why others are not there, and no image of any other row group is read."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.runs.lookup import keyed_seeds, rows_of, seed_table
from rayexpand.runs.status import view_run
from tests.conftest import complete


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """Twenty digits with two copies, four seeds to a shard."""
    config = parse({"name": "plain", "out": str(tmp_path_factory.mktemp("lookup")), "method": {
        "name": "classical", "policy": "randaugment", "ratio": 2}, "data": {"source": "digits", "per_class": 2},
        "sampler": {"shard_images": 8}})
    return complete(config)[0]


def table_of(*rows: tuple[str, int, int]) -> pa.Table:
    """(seed id, label, copies)."""
    ids, labels, copies = zip(*rows, strict=True)
    return pa.table({"seed_id": ids, "label": labels, "copies": copies, "shard": [0] * len(rows)})


def test_the_rows_of_seeds_are_those_of_the_data_files(made: runs.Run) -> None:
    view = view_run(str(made.folder))
    table = seed_table(view)
    ids = table["seed_id"].to_pylist()[3:7]
    found = rows_of(view, table, [*ids, "stranger"], copies=1)

    assert sorted(found.kept) == sorted((seed_id, 0) for seed_id in ids)
    whole = {row["sample_id"]: row for receipt in view.receipts for row in view.store.data(receipt).to_pylist()}
    assert all(row == whole[row["sample_id"]] for row in found.kept.values())
    assert found.absence((ids[0], 2)) == "not planned"
    assert found.absence(("stranger", 0)) == "not a seed of this run"


def test_only_the_row_groups_of_the_seeds_are_read_whole(made: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_run(str(made.folder))
    table, read, original = seed_table(view), list[bool](), pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, columns: list[str] | None = None, **options: bool) -> pa.Table:
        read.append(columns is None)
        return original(self, group, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    rows_of(view, table, [table["seed_id"][0].as_py()])

    assert read == [False, True], "the one shard of the seed, its ids first"


def test_a_row_that_was_lost_with_its_file_is_pending(made: runs.Run) -> None:
    view = view_run(str(made.folder))
    table = seed_table(view)
    seed_id = table["seed_id"][0].as_py()
    without = type(view)(view.run, view.receipts[1:], view.committed, view.store)

    assert rows_of(without, table, [seed_id]).absence((seed_id, 0)) == "pending"


def test_seeds_are_those_most_runs_share_and_a_smaller_choice_lies_inside_a_larger() -> None:
    first = table_of(*((f"a{i}", 0, 1) for i in range(9)), *((f"b{i}", 1, 1) for i in range(9)))
    second = table_of(*((f"a{i}", 0, 1) for i in range(4, 9)), ("a0", 0, 0), *((f"b{i}", 1, 1) for i in range(9)))
    few, many = keyed_seeds([first, second], 2), keyed_seeds([first, second], 4)

    assert set(many[0]) <= {f"a{i}" for i in range(4, 9)}, "a0 has no copy in the second run"
    assert {label: ids[:2] for label, ids in many.items()} == few
    assert keyed_seeds([second, first], 4) == many, "the order of runs does not matter"
    assert list(keyed_seeds([first], 1, classes=1)) == [0]
    assert keyed_seeds([table_of(("a", 0, 0))], 3) == {}
