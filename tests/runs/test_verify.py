from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.runs import run as runs
from rayexpand.runs.store import FOOTER, data_name
from rayexpand.runs.verify import verify
from tests.conftest import MakeConfig, complete, hashes

ROW = "bee/2.png/1"
Change = Callable[[pa.Table], pa.Table]


def rewrite(path: Path, change: Change) -> None:
    """Writes a changed table under the metadata of the old one, except what the change itself replaced."""
    before = pq.read_table(path)
    after = change(before)
    metadata = {**(before.schema.metadata or {}), **(after.schema.metadata or {})}
    pq.write_table(after.replace_schema_metadata(metadata), path)


def swapped(table: pa.Table, column: str) -> pa.Table:
    """The first two values of a column in each other's place."""
    values = table[column].to_pylist()
    values[:2] = values[1::-1]
    position = table.schema.get_field_index(column)
    field = table.schema.field(position)
    return table.set_column(position, field, pa.array(values, field.type))


def miscounted(table: pa.Table) -> pa.Table:
    """One more kept row in the footer than there are."""
    footer = json.loads(table.schema.metadata[FOOTER])
    footer["receipt"]["kept"] += 1
    return table.replace_schema_metadata({FOOTER: json.dumps(footer).encode()})


@pytest.mark.parametrize(("file", "change", "words"), [
    ("data", lambda table: table.slice(1), "does not decide what was planned"),
    ("data", lambda table: pa.concat_tables([table, table.slice(0, 1)]), "holds a sample twice"),
    ("data", lambda table: swapped(table, "sample_sha256"), "content hash"),
    ("data", lambda table: swapped(table, "image"), "images that do not match"),
    ("data", miscounted, "counts of its footer"),
    ("rejected", lambda table: table.replace_schema_metadata({b"a": b"b"}), "is damaged, and")],
    ids=["lost", "twice", "hashes", "pixels", "counts", "refused"])
def test_every_kind_of_damage_is_named(make_config: MakeConfig, file: str, change: Change, words: str) -> None:
    run, _ = complete(make_config("Failing", ratio=2, nan=ROW))
    assert verify(run, pixels=True).problems == []
    shard = run.plan.find(ROW)
    (side,) = Path(run.folder, "rejected").iterdir()
    rewrite(side if file == "rejected" else Path(run.folder, "data", data_name(shard)), change)
    (problem,) = verify(run, pixels=True).problems

    assert words in problem
    assert problem.startswith(f"data/{data_name(shard)}")


def test_following_its_advice_mends_a_retried_shard(make_config: MakeConfig, image_folder: Path,
                                                    tmp_path: Path) -> None:
    """Every file that it says to delete is deleted; `expand` makes all of it again."""
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    (broken / "bee/2.png").write_bytes(b"")
    config = make_config("Fake", ratio=3, data={"source": "imagefolder", "path": str(broken)})
    run, _ = complete(config)
    shutil.copy(image_folder / "bee/2.png", broken / "bee/2.png")
    runs.drive(run, runs.in_process(runs.start(run)), runs.retry_jobs(run), to_the_end=True)
    reference = hashes(run)
    shard = run.plan.find(ROW)
    rewrite(Path(run.folder, "data", data_name(shard)), lambda table: table.slice(1))
    problems = verify(run).problems
    assert len(problems) == 2
    assert all("Delete it" in problem for problem in problems)
    for problem in problems:
        Path(run.folder, problem.split(":")[0]).unlink()
    run, totals = complete(config)

    assert (totals.kept, totals.pending) == (60, 0)
    assert hashes(run) == reference
    assert verify(run).problems == []


def test_a_file_that_cannot_be_read_is_not_said_to_be_damaged(make_config: MakeConfig) -> None:
    run, _ = complete(make_config("Fake"))
    file = Path(run.folder, "data", data_name(0))
    file.rename(file.with_suffix(".kept"))
    file.mkdir()  # as a file that this user may not read, whoever he is
    (problem,) = verify(run).problems

    assert "cannot be read" in problem
    assert "keep it" in problem
    assert "elete" not in problem


def test_an_unwritable_cache_blames_no_data(make_config: MakeConfig) -> None:
    """A copy of a run may lack .tmp, where files are written first; a full disk does the same."""
    run, totals = complete(make_config("Fake"))
    for path in Path(run.folder, "receipts").iterdir():
        path.unlink()
    Path(run.folder, ".tmp").rmdir()
    findings = verify(run)

    assert findings.problems == []
    assert findings.totals == totals


def test_an_image_that_cannot_be_decoded_is_damage(make_config: MakeConfig) -> None:
    """In a file of an older version, whose pages say nothing of themselves."""
    run, _ = complete(make_config("Fake"))

    def cut(table: pa.Table) -> pa.Table:
        images = table["image"].to_pylist()
        images[0]["bytes"] = images[0]["bytes"][:40]
        return table.set_column(0, table.schema.field(0), pa.array(images, table.schema.field(0).type))

    rewrite(Path(run.folder, "data", data_name(0)), cut)
    (problem,) = verify(run, pixels=True).problems
    assert "images that do not match" in problem
    assert "Delete it" in problem


def test_planned_ids_are_columns_and_no_draws(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 13 million rows, a draw each is minutes; ids are those of the draws."""
    run, _ = complete(make_config("Failing", ratio=2.5, nan=ROW))
    for shard in range(run.plan.n_shards):
        assert run.plan.sample_ids(shard).to_pylist() == [
            draw.sample_id for unit in run.plan.units(shard) for draw in unit]
    monkeypatch.setattr(type(run.plan), "_draw", None)

    assert verify(run).problems == []
