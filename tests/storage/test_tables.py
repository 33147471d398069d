"""JSON and Parquet files of ours: a damaged byte, a copy and an older file."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import DamagedFile
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import (
    NAMED,
    batches,
    open_parquet,
    parquet_bytes,
    read_columns,
    read_table,
    sealed,
    unsealed,
)

TABLE = pa.table({"id": [f"row {i}" for i in range(300)], "number": range(300), "image": [bytes([i % 256]) * 40
                                                                                         for i in range(300)]})


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path)


def test_json_is_read_back_and_another_name_is_another_file() -> None:
    content = {"a": [1, 2.5, None], "b": {"c": "ä", 3: float("inf")}}
    text = sealed("trials/x.json", content)

    assert unsealed("trials/x.json", text, "x") == json.loads(json.dumps(content))
    with pytest.raises(DamagedFile, match=r"/y\.json: is damaged, .* or is a copy of another file"):
        unsealed("trials/y.json", text, "/y.json")
    assert unsealed("x", b'{"a": 1}', "x") == {"a": 1}, "a file of an older version has no seal"


def test_every_flipped_bit_of_a_json_file_is_noticed_or_harmless() -> None:
    content = {"score": 0.5, "names": ["ant", "bee"], "seed": 3}
    text = sealed("x.json", content)
    for place in range(8 * len(text)):
        damaged = bytearray(text)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = unsealed("x.json", bytes(damaged), "x.json")
        except DamagedFile:
            continue
        assert {name: found.get(name) for name in content} == content, bytes(damaged)


@pytest.mark.parametrize("columns", [None, ["id", "number", "image"]])
def test_every_flipped_byte_of_a_parquet_file_is_noticed_or_harmless(files: LocalFiles, tmp_path: Path,
                                                                     columns: list[str] | None) -> None:
    content = parquet_bytes(TABLE, {b"x": b"y"}, row_group=100)
    noticed = 0
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            assert read_table(files, "a.parquet", columns).equals(TABLE)
        except DamagedFile as error:
            noticed += "a.parquet: is damaged" in str(error)
    assert noticed > 0.9 * len(content) / 7


def test_other_readers_read_what_is_sealed(tmp_path: Path) -> None:
    from datasets import Dataset

    file = tmp_path / "a.parquet"
    file.write_bytes(parquet_bytes(TABLE, {}))
    assert pq.read_table(file).equals(TABLE)
    assert Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")).num_rows == 300


def test_a_copy_under_another_name_is_noticed(files: LocalFiles, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(TABLE, {NAMED: b"a.parquet"}))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())

    assert read_table(files, "a.parquet").num_rows == 300
    for columns in (None, ["id"]):
        with pytest.raises(DamagedFile, match=r"b\.parquet: is damaged \(it is a copy of a\.parquet\)"):
            read_table(files, "b.parquet", columns)


@pytest.mark.parametrize(("metadata", "default"), [({}, None), ({"default": "0.5"}, 0.5)])
def test_a_column_that_came_later_is_filled(metadata: dict[str, str], default: Any) -> None:
    schema = pa.schema([*TABLE.schema, pa.field("later", pa.float64(), metadata=metadata)])
    table = read_columns(open_parquet(io.BytesIO(parquet_bytes(TABLE, {}))), "x", ["later", "number"], schema)

    assert table["later"].to_pylist() == [default] * 300
    whole = pa.concat_tables(batches(open_parquet(io.BytesIO(parquet_bytes(TABLE, {}))), "x", 70, schema))
    assert whole.schema.names == schema.names
    assert whole["later"].to_pylist() == [default] * 300
    with pytest.raises(DamagedFile, match="it has no column other"):
        read_columns(open_parquet(io.BytesIO(parquet_bytes(TABLE, {}))), "x", ["other"], schema)


def test_a_file_is_written_without_holding_its_content_twice() -> None:
    table = pa.table({"image": [os.urandom(1 << 20) for _ in range(8)]})
    tracemalloc.start()
    content = parquet_bytes(table, {}, row_group=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(content) <= peak < 1.5 * len(content)
    assert open_parquet(io.BytesIO(content)).read().equals(table)
