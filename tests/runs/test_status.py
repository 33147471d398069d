from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayexpand.contract.errors import DigestMismatch, EnvironmentFault, UsageError
from rayexpand.contract.schema import Reason
from rayexpand.runs import status
from rayexpand.runs.blame import trace_folder
from rayexpand.storage.files import LocalFiles, process_token
from tests.commands import rewrite_json
from tests.runfolder import RUN_DIGEST, Builder, sample_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return sample_run(tmp_path_factory.mktemp("status") / "half")


def test_counts_add_up_and_a_retried_row_counts_once(run: Builder) -> None:
    seen = status.read_status(run.folder)
    assert (seen.planned, seen.kept, seen.rejected, seen.failed, seen.pending) == (180, 117, 2, 1, 60)
    assert (seen.shards_done, seen.shards, seen.attempts) == (4, 6, 2)
    assert seen.reasons == {"wrong_class": 1, "below_threshold": 1, "decode_error": 1}
    assert seen.mixed_stacks
    assert not seen.complete


def test_receipts_are_only_a_cache(run: Builder, tmp_path: Path) -> None:
    copy = shutil.copytree(run.folder, tmp_path / "half", copy_function=shutil.copy2)
    before = status.read_status(copy, clock=lambda: 2e9)
    shutil.rmtree(copy / "receipts")
    assert status.read_status(copy, clock=lambda: 2e9) == before


def test_json_is_plain(run: Builder) -> None:
    seen = json.loads(json.dumps(status.read_status(run.folder).to_json()))
    assert seen["name"] == "half"
    assert seen["complete"] is False


def test_table_says_the_same(run: Builder) -> None:
    lines = dict(status.read_status(run.folder).table())
    assert lines["pending"] == "60 (66.7 % decided)"
    assert lines["  wrong_class"] == "1"
    assert "mixed" in lines["stacks"]
    assert lines["last commit"].endswith("ago")


def _times(run: Builder, ends: list[float], seconds: float) -> dict[str, float]:
    return {run.commit(i, seconds={"sample": seconds, "commit": 0.0}).data_file: end for i, end in enumerate(ends)}


@pytest.mark.parametrize(("ends", "rate", "concurrency"), [
    ([10, 20, 30, 40, 50, 60, 70, 80], 2.0, 1.0),  # one process: 20 rows each 10 s
    ([10, 10, 20, 20, 30, 30, 40, 40], 4.0, 2.0),  # two processes
    ([10, 20, 30, 4040, 4050, 4060, 4070, 4080], 2.0, 1.0),  # a night without a driver
    ([10, 20], 2.0, 1.0),  # a run younger than the window
])
def test_rate_and_concurrency(tmp_path: Path, ends: list[float], rate: float, concurrency: float) -> None:
    run = Builder(tmp_path / "run", names=("a",), shards=8, seeds_per_shard=4, copies=5, side=8).start()
    committed = _times(run, ends, 10.0)
    seen = status.Rate(status.shard_spans(status.view_run(run.folder).receipts, committed))
    assert (seen.images_per_second, seen.concurrency) == pytest.approx((rate, concurrency))


def test_a_retry_is_no_measure_of_the_rate(tmp_path: Path) -> None:
    run = Builder(tmp_path / "run", names=("a",), shards=3, seeds_per_shard=4, copies=5, side=8).start()
    committed = _times(run, [10, 20], 10.0)
    again = run.commit(0, run.samples(0)[:1], generation=1, seconds={"load": 1.0, "sample": 0.85})
    receipts = status.view_run(run.folder).receipts
    assert len(receipts) == 3
    seen = status.Rate(status.shard_spans(receipts, {**committed, again.data_file: 500.0}))
    assert (seen.images_per_second, seen.concurrency) == pytest.approx((2.0, 1.0))


def test_a_long_shard_closes_the_gaps_before_it() -> None:
    seen = status.Rate([(10, 10, 30), (30, 10, 30), (40, 35, 20)])
    assert seen.images_per_second == pytest.approx(80 / 40)
    assert seen.concurrency == pytest.approx(55 / 40)


def test_the_time_left_follows_from_the_last_shards(tmp_path: Path) -> None:
    run = Builder(tmp_path / "run", names=("a",), shards=12, seeds_per_shard=4, copies=5, side=8).start()
    slow = _times(run, [100, 200, 300], 100.0)
    fast = {run.commit(3 + i, seconds={"total": 10.0}).data_file: 310.0 + 10 * i for i in range(9)}
    spans = status.shard_spans(status.view_run(run.folder).receipts, slow | fast)
    assert status.Rate(status.latest(spans)).images_per_second == pytest.approx(2.0)
    assert status.Rate(spans).images_per_second == pytest.approx(240 / 390)


def test_eta_and_age_follow_the_clock(tmp_path: Path) -> None:
    run = Builder(tmp_path / "run", shards=4, seeds_per_shard=2, copies=5, side=8).start()
    empty = status.read_status(run.folder)
    assert (empty.images_per_second, empty.eta_seconds, empty.last_commit_age_seconds) == (None, None, None)
    for shard, end in ((0, 1000.0), (1, 1005.0)):
        receipt = run.commit(shard, seconds={"total": 5.0})
        os.utime(run.folder / "data" / receipt.data_file, (end, end))
    seen = status.read_status(run.folder, clock=lambda: 1065.0)
    assert seen.images_per_second == pytest.approx(2.0)
    assert seen.eta_seconds == pytest.approx(10.0)
    assert seen.last_commit_age_seconds == pytest.approx(60.0)
    for shard in (2, 3):
        run.commit(shard)
    assert status.read_status(run.folder).eta_seconds == 0.0


def test_processes_are_those_alive(run: Builder) -> None:
    folder = trace_folder(run.store.files)
    mine, dead = folder / f"{process_token()}.trace", folder / f"{process_token()[:-1]}x.trace"
    for path in (mine, dead):
        path.touch()
    assert status.read_status(run.folder).processes == 1
    mine.unlink()
    assert status.read_status(run.folder).processes == 0


def test_reasons_of_a_second_failure_replace_the_first(tmp_path: Path) -> None:
    run = Builder(tmp_path / "run", shards=1, seeds_per_shard=2, copies=2, side=8).start()
    run.commit(0, run.samples(0, {0: (Reason.NAN_LATENT, ""), 1: (Reason.NEAR_COPY, "")}))
    run.commit(0, run.samples(0, {0: (Reason.TIMEOUT, "")})[:1], generation=1)
    assert status.view_run(run.folder).reasons == {"near_copy": 1, "timeout": 1}


def test_class_counts(run: Builder) -> None:
    view = status.view_run(run.folder)
    counts = status.class_counts(view)
    kept = pa.concat_tables([run.store.data(receipt, ["label"]) for receipt in view.receipts])
    assert counts.tolist() == [kept["label"].to_pylist().count(label) for label in range(10)]
    assert counts.sum() == 117
    assert counts.dtype == np.int64


@pytest.mark.parametrize("content", [None, "{half"])
def test_no_run_here_says_what_to_do(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match=r"run\.json"):
        status.read_status(tmp_path)


def test_a_file_of_another_run_is_refused(run: Builder, tmp_path: Path) -> None:
    copy = shutil.copytree(run.folder, tmp_path / "half")
    rewrite_json(copy / "run.json", lambda facts: facts.update(run_digest=RUN_DIGEST[::-1]))
    shutil.rmtree(copy / "receipts")
    with pytest.raises(DigestMismatch):
        status.read_status(copy)


def test_a_page_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    (tmp_path / ".tmp").mkdir()
    with pytest.raises(EnvironmentFault, match=r"report\.html"):
        status.write_page(LocalFiles(tmp_path), "report.html", "x")
    assert [p.name for p in tmp_path.iterdir() if p.name != ".tmp"] == ["report.html"]
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize(("seconds", "text"), [(None, "unknown"), (4.25, "4.2 s"), (600, "10 min"),
                                               (3 * 3600 + 125, "3 h 02 min"), (5 * 86400, "5 d 0 h")])
def test_duration(seconds: float | None, text: str) -> None:
    assert status.duration(seconds) == text
