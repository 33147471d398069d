"""Run folders in object stores, against S3 and GCS servers on a socket. Faults happen on the wire (s3server.py)."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import EnvironmentFault, StorageError, UsageError
from rayexpand.reports.run import write_report
from rayexpand.runs import run as runs
from rayexpand.runs.status import read_status
from rayexpand.runs.store import Store, data_name, new_attempt
from rayexpand.runs.verify import verify
from rayexpand.storage import buckets, objects
from rayexpand.storage.files import Files, LocalFiles, StorageDenied
from rayexpand.storage.places import open_files
from tests.conftest import MakeConfig, complete, hashes, refused
from tests.runs.test_store import CLASSES, receipt, sample
from tests.s3server import Server

UPLOAD = {"s3": "PUT", "gs": "POST"}


@pytest.fixture(params=["s3", "gs"])
def remote(request: pytest.FixtureRequest, object_stores: Server) -> Files:
    return open_files(f"{request.param}://runs/{uuid.uuid4().hex[:8]}/r")


@pytest.fixture(params=["local", "s3", "gs"])
def files(request: pytest.FixtureRequest, object_stores: Server, tmp_path: Path) -> Files:
    place = tmp_path if request.param == "local" else f"{request.param}://runs/{uuid.uuid4().hex[:8]}/r"
    files = open_files(place)
    files.probe()
    return files


@pytest.fixture
def s3(object_stores: Server) -> Files:
    return open_files(f"s3://runs/{uuid.uuid4().hex[:8]}")


# One interface ---------------------------------------------------------------------------------------------------


def test_every_place_behaves_alike(files: Files) -> None:
    assert files.publish("data/a", b"first")
    assert not files.publish("data/a", b"second")
    assert not files.publish("data/a", b"first"), "equal bytes of another writer are another writer's"
    assert files.read("data/a") == b"first"
    assert files.read("data/gone") is None
    files.replace("data/ab", b"")
    files.replace("data/ab", b"12345")
    files.make_folder("data/below")
    files.publish("data/below/c", b"x")
    files.mark("blame/m")
    assert sorted(name for name in files.list("data") if name != "below") == ["a", "ab"]
    assert files.list("data", "ab") == ["ab"]
    assert files.list("nowhere") == []
    assert files.entries("nowhere") == {}
    assert files.entries("data")["ab"].size == 5
    assert files.entries("data")["ab"].modified > 1e9
    assert files.list("blame") == ["m"]
    files.delete("data/a", "data/ab", "data/gone", "blame/m")
    assert files.list("data", "a") == files.list("blame") == files.list(".tmp") == []
    assert str(files.at("data/a")) == f"{files.root}/data/a"


def test_readers_seek_and_agree_with_the_content(files: Files) -> None:
    content = np.random.Generator(np.random.Philox(key=1)).bytes(700_000)
    files.publish("data/a", content)
    files.publish("data/empty", b"")
    rng = np.random.Generator(np.random.Philox(key=2))
    with files.open("data/a") as reader:
        assert reader.seek(0, io.SEEK_END) == len(content)
        for start, length in zip(rng.integers(0, len(content), 20), rng.integers(1, 300_000, 20), strict=True):
            reader.seek(int(start))
            assert reader.read(int(length)) == content[start:start + length]
        reader.seek(-3, io.SEEK_END)
        assert reader.read() == content[-3:]
        assert reader.read() == b""
    with files.open("data/empty") as reader:
        assert reader.read() == b""
    with pytest.raises(FileNotFoundError):
        files.open("data/gone")


def test_of_many_writers_one_wins(files: Files) -> None:
    won: list[int] = []

    def write(i: int) -> None:
        if files.publish("data/a", bytes([i])):
            won.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert files.read("data/a") == bytes(won)


def test_one_request_publishes_and_a_footer_costs_one(s3: Files, object_stores: Server) -> None:
    store = Store(s3, "digest")
    kept = [sample(i) for i in range(4)]
    object_stores.reset()
    store.commit(receipt(0, kept), kept, CLASSES)
    assert [line.split("/")[0] + line.rpartition("/")[2] for line in object_stores.requests()] == [
        f"PUT {data_name(0)}", "PUT 000000.json"]
    object_stores.reset()
    assert store.find(0) is not None
    assert len(object_stores.requests()) == 1


@pytest.mark.parametrize(("url", "said"), [
    ("s3://user:hunter2@bucket/x", "Credentials do not belong"), ("hdfs://a/b", "a run can lie in"),
    ("s3:///x", "a run can lie in"), ("file:///x", "a run can lie in"), ("gs://", "a run can lie in")])
def test_other_urls_are_refused_without_repeating_a_password(url: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        open_files(url)
    assert "hunter2" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "find_spec", lambda name: None)
    with pytest.raises(StorageError, match=r"rayexpand\[gcs\]"):
        open_files("gs://bucket/x")


def test_urls_are_one_place(object_stores: Server) -> None:
    assert open_files("gcs://runs/a/").root == open_files("gs://runs/a").root == "gs://runs/a"
    assert open_files("s3://runs").root == "s3://runs"
    assert isinstance(open_files("runs/a"), LocalFiles)


def test_a_forked_child_has_connections_of_its_own(s3: Files) -> None:
    s3.publish("data/a", b"1")
    mine = s3._made[1]  # type: ignore[attr-defined]

    def reads() -> None:
        os._exit(0 if s3.read("data/a") == b"1" and s3._made[1] is not mine else 1)  # type: ignore[attr-defined]

    child = multiprocessing.get_context("fork").Process(target=reads)
    child.start()
    child.join(60)
    assert child.exitcode == 0


# Stores that fail ------------------------------------------------------------------------------------------------


def test_a_lost_reply_is_our_own_win(remote: Files, object_stores: Server) -> None:
    scheme = remote.root[:2]  # type: ignore[index]
    object_stores.reset((UPLOAD[scheme], "attempts", 1, "lose"))
    if scheme == "gs":
        object_stores.reset(("POST", "upload", 1, "lose"))
    assert new_attempt(remote, {}) == 1, "the repeated request met its own object"
    assert len(remote.list("attempts")) == 1
    assert new_attempt(remote, {}) == 2


def test_a_dropped_connection_is_tried_again(remote: Files, object_stores: Server) -> None:
    remote.publish("data/a", b"1")
    object_stores.reset(("", "", 1, "drop"))
    assert remote.read("data/a") == b"1"


def test_a_busy_store_is_tried_again(remote: Files, object_stores: Server) -> None:
    object_stores.reset((UPLOAD[remote.root[:2]], "", 2, 503), code="SlowDown")  # type: ignore[index]
    assert remote.publish("data/a", b"1")
    assert sum(line.startswith(UPLOAD[remote.root[:2]]) for line in object_stores.requests()) == 3  # type: ignore[index]


def test_a_broken_store_is_an_environment_fault(remote: Files, object_stores: Server,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "TRIES", 2)
    monkeypatch.setattr(buckets, "GCS_TRYING_S", 1.0)
    object_stores.reset(("", "", -1, 503), code="InternalError")
    with pytest.raises(EnvironmentFault, match=r"^\w\w://runs/\w+/r/data/a: .*run the same command again") as caught:
        remote.publish("data/a", b"1")
    assert not isinstance(caught.value, StorageDenied)


def test_an_unreachable_store_is_an_environment_fault(monkeypatch: pytest.MonkeyPatch, object_stores: Server) -> None:
    monkeypatch.setattr(buckets, "TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="cannot be reached") as caught:
        open_files("s3://runs/x").probe()
    assert "hunter2" not in str(caught.value)


def test_a_refusal_is_a_usage_error_at_the_start_and_resumable_later(remote: Files, object_stores: Server) -> None:
    object_stores.reset((UPLOAD[remote.root[:2]], "", -1, 403), code="AccessDenied")  # type: ignore[index]
    with pytest.raises(StorageError, match="refused"):
        remote.probe()
    with pytest.raises(EnvironmentFault, match="refused"):
        remote.publish("data/a", b"")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there_is_named(object_stores: Server, scheme: str) -> None:
    with pytest.raises(StorageError, match="the bucket does not exist"):
        open_files(f"{scheme}://no-such-bucket/x").probe()


def test_without_credentials_the_chain_is_named(s3: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"no usable credentials.*AWS_PROFILE"):
        s3.probe()
    with pytest.raises(StorageError, match="no usable credentials"):
        runs.open_run(str(s3.root))


def test_a_store_that_ignores_the_condition_is_refused(remote: Files, object_stores: Server) -> None:
    object_stores.reset((UPLOAD[remote.root[:2]], "", -1, "ignore"))  # type: ignore[index]
    with pytest.raises(StorageError, match=r"lets a second writer.*single_writer: true"):
        remote.probe()
    assert remote.list(".tmp") == []
    alone = open_files(remote.root, single_writer=True)
    alone.probe()
    assert alone.publish("data/a", b"1")
    assert not alone.publish("data/a", b"2")


def test_a_store_without_conditions_is_refused(s3: Files, object_stores: Server) -> None:
    object_stores.reset(("PUT", "", -1, 501), code="NotImplemented")
    with pytest.raises(StorageError, match=r"does not know conditional writes.*single_writer: true"):
        s3.probe()


def test_a_conflict_is_not_a_win_of_the_other(s3: Files, object_stores: Server) -> None:
    """409: another conditional write was under way. It may have failed, so ask again."""
    object_stores.reset(("PUT", "", 2, 409), code="ConditionalRequestConflict")
    assert s3.publish("data/a", b"1")
    assert s3.read("data/a") == b"1"
    object_stores.reset(("PUT", "", 1, 409), code="ConditionalRequestConflict")
    assert not s3.publish("data/a", b"2")


def test_a_conflict_without_end_is_an_environment_fault(s3: Files, object_stores: Server,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "CONFLICTS", 2)
    object_stores.reset(("PUT", "", -1, 409), code="ConditionalRequestConflict")
    with pytest.raises(EnvironmentFault, match="never finishes"):
        s3.publish("data/a", b"1")


# Above the size of a single put ----------------------------------------------------------------------------------


BIG, OTHER = bytes(range(250)) * 10, bytes(range(250, 0, -1)) * 10


@pytest.fixture
def parts(s3: Files, monkeypatch: pytest.MonkeyPatch) -> Files:
    """S3 with a limit of 2,000 bytes and parts of 1,000."""
    monkeypatch.setattr(buckets, "SINGLE_PUT_BYTES", 2000)
    monkeypatch.setattr(buckets, "PART_BYTES", 1000)
    return s3


def _unfinished(files: Files) -> int:
    client = buckets.S3Bucket("runs")._client
    return len(client.list_multipart_uploads(Bucket="runs", Prefix=files._prefix)  # type: ignore[attr-defined]
               .get("Uploads", []))


def test_a_large_file_written_twice_is_refused_the_second_time(parts: Files, object_stores: Server) -> None:
    assert parts.publish("data/a", BIG)
    assert sum("partNumber=" in line for line in object_stores.requests()) == 1 + 3, "the probe of parts, then 3 parts"
    assert not parts.publish("data/a", OTHER)
    assert parts.read("data/a") == BIG
    assert _unfinished(parts) == 0
    assert parts.list("data") == ["a"]


def test_a_lost_reply_to_the_last_part_is_our_own_win(parts: Files, object_stores: Server) -> None:
    assert parts.publish("data/a", BIG)
    object_stores.reset(("POST", "uploadId=", 1, "lose"))
    assert parts.publish("data/b", OTHER)
    assert parts.read("data/b") == OTHER
    object_stores.reset(("POST", "uploadId=", 1, "late"), code="NoSuchUpload")
    assert parts.publish("data/c", OTHER), "some stores forget an upload once it is complete"


def test_a_store_that_ignores_the_condition_on_parts_is_refused(parts: Files, object_stores: Server) -> None:
    parts.probe()
    object_stores.reset(("POST", "uploadId=", -1, "ignore"))
    with pytest.raises(StorageDenied, match=r"multipart.*sampler\.shard_images"):
        parts.publish("data/a", BIG)
    assert parts.list("data") == []


def test_a_large_file_is_invisible_until_it_is_whole(parts: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[Any] = []
    monkeypatch.setattr(objects, "failpoint", lambda point, shard=None: reached.append((point, parts.list("data"))))
    assert parts.publish("data/a", BIG, "data", 3)
    assert reached == [("before_data", []), ("after_data_write", []), ("after_data_link", ["a"]), ("after_data", ["a"])]


def test_unfinished_uploads_of_the_dead_are_swept_a_day_later(parts: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    client = buckets.S3Bucket("runs")._client
    client.create_multipart_upload(Bucket="runs", Key=parts._prefix + "data/a")  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:  # this server dates every upload 2010
        patch.setattr(buckets, "STALE_UPLOAD_S", 10**10)
        assert parts.sweep() == 0
    assert parts.sweep() == 1
    assert _unfinished(parts) == 0


def test_a_large_file_on_gcs(object_stores: Server) -> None:
    files, content = open_files("gs://runs/large"), os.urandom(9 << 20)
    assert files.publish("data/a", content), "above 8 MiB the client uploads in two requests"
    assert not files.publish("data/a", content[::-1])
    assert files.read("data/a") == content


# Whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_in_an_object_store_is_the_run_of_a_folder(make_config: MakeConfig, remote: Files,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(remote.root)
    local, _ = complete(make_config("Failing", ratio=2, nan="bee/2.png/1"))
    run, totals = complete(make_config("Failing", ratio=2, nan="bee/2.png/1", sections={"out": url}))
    assert (totals.kept, totals.failed, totals.pending) == (39, 1, 0)
    assert (hashes(run), refused(run)) == (hashes(local), refused(local))
    assert verify(run, pixels=True).problems == []
    folder = f"{url}/run"
    assert run.files.list("blame") == []
    assert len(run.files.list("receipts")) == 1, "rolled up at the end"
    seen = read_status(folder)
    assert (seen.kept, seen.failed, seen.pending, seen.attempts) == (39, 1, 0, 1)
    assert seen.images_per_second
    assert write_report(folder) == f"{folder}/report.html"
    page = (run.files.read("report.html") or b"").decode()
    assert "nan_latent" in page
    assert page.count("data:image/png") > 8
    again = runs.open_run(folder)
    assert runs.pending_jobs(again) == []
    expander = runs.start(again)
    assert runs.drive(again, runs.in_process(expander), runs.retry_jobs(again), to_the_end=True).failed == 1
    expander.close()
    assert read_status(folder).attempts == 2
    assert verify(again).problems == []
    assert b"not-a-secret" not in (run.files.read("run.json") or b"")


@pytest.mark.chaos
def test_a_lost_reply_at_every_put_changes_nothing(make_config: MakeConfig, s3: Files, object_stores: Server) -> None:
    reference = hashes(complete(make_config(ratio=2, name="local"))[0])
    url = str(s3.root)
    object_stores.reset(*[("PUT", f"{folder}/", 1, "lose") for folder in ("data", "attempts", "plan", "receipts")],
                        ("PUT", "run.json", 1, "lose"), ("PUT", "probe", 1, "lose"))
    run, totals = complete(make_config(ratio=2, sections={"out": url}))
    assert totals.pending == 0
    assert hashes(run) == reference
    assert run.files.list("attempts") == ["0001.json"]


def test_a_run_that_cannot_start_says_why(make_config: MakeConfig, object_stores: Server) -> None:
    config = make_config(sections={"out": "s3://no-such-bucket/x"})
    with pytest.raises(StorageError, match="the bucket does not exist"):
        runs.prepare(config)
    with pytest.raises(StorageError, match="the bucket does not exist"):
        read_status(config.folder)


def test_what_is_wrong_with_out_is_said_before_anything_runs(make_config: MakeConfig) -> None:
    config = make_config(sections={"out": "abfs://container/x"})
    (problem,) = runs.preflight(config)
    assert problem.startswith("out: abfs://container/x/run: a run can lie in")


def test_no_run_at_a_url(s3: Files) -> None:
    with pytest.raises(UsageError, match=r"no run\.json"):
        read_status(str(s3.root))


def thirteen_thousand(object_stores: Server, n: int) -> None:
    """A status of `n` shards costs a request per 1,000 files and per 5,000 receipts, and a few more."""
    root = f"thirteen/{uuid.uuid4().hex[:8]}"
    files = open_files(f"s3://runs/{root}")
    files.publish("run.json", json.dumps({
        "name": "r", "planned": 2 * n, "shards": n, "run_digest": "d", "plan_digest": "p", "plan": "plan/p",
        "config": {}, "models": {}}).encode())
    fields = json.loads(receipt(0, [sample(0), sample(1)]).to_json()) | {"run_digest": "d"}
    lines = [{**fields, "shard_id": i, "data_file": data_name(i)} for i in range(n)]
    rolled = [(f"{root}/receipts/rollup-0001-{k}.json", json.dumps(lines[i:i + 5000]))
              for k, i in enumerate(range(0, n, 5000))]
    object_stores.reset(objects=[*rolled, *((f"{root}/data/{data_name(i)}", "") for i in range(n))])
    seen = read_status(str(files.root))
    requests = object_stores.requests()
    assert (seen.kept, seen.shards_done, seen.pending) == (2 * n, n, 0)
    n_lists, n_pages, n_facts = 4, -(-n // 1000), 1  # grown, receipts, attempts, heartbeats; of data; run.json
    assert len(requests) == n_lists + n_pages + n_facts + len(rolled), requests


def test_a_status_reads_roll_ups_and_not_receipts(object_stores: Server) -> None:
    thirteen_thousand(object_stores, 1_100)


def test_pyarrow_opens_a_run_by_its_url(make_config: MakeConfig, s3: Files) -> None:
    run, _ = complete(make_config(ratio=1, sections={"out": str(s3.root)}))
    import s3fs

    name = sorted(run.files.list("data"))[0]
    assert pq.read_table(f"{run.folder}/data/{name}".removeprefix("s3://"),
                         filesystem=s3fs.S3FileSystem()).num_rows == 8


SeedUrl = Callable[[str], dict[str, Any]]


def put_seeds(image_folder: Path, source: str) -> dict[str, Any]:
    """Copies the seeds to S3; returns the data section."""
    import pyarrow as pa

    files = open_files(f"s3://runs/seeds-{uuid.uuid4().hex[:8]}")
    paths = sorted(image_folder.rglob("*.png"))
    if source == "imagefolder":
        for path in paths:
            files.publish(str(path.relative_to(image_folder)), path.read_bytes())
    else:
        table = pa.table({"image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
                          "label": [path.parent.name for path in paths]})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        files.publish("train.parquet", sink.getvalue())
    return {"source": source, "path": str(files.root)}


@pytest.mark.parametrize("source", ["imagefolder", "parquet"])
def test_seeds_and_output_in_s3(make_config: MakeConfig, image_folder: Path, s3: Files, tmp_path: Path,
                                source: str) -> None:
    data = put_seeds(image_folder, source)
    here = tmp_path / "seeds"
    here.mkdir()
    if source == "parquet":
        content = open_files(data["path"]).read("train.parquet")
        (here / "train.parquet").write_bytes(content or b"")
    local = data | {"path": str(here if source == "parquet" else image_folder)}
    run, totals = complete(make_config("classical", ratio=1, data=data, sections={"out": str(s3.root)}))
    assert (totals.kept, totals.pending) == (20, 0)
    assert hashes(run) == hashes(complete(make_config("classical", ratio=1, data=local))[0])
