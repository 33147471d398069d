from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import DigestMismatch, EnvironmentFault, StorageError, UsageError
from rayexpand.contract.schema import ClassTable, Draw, Reason, Receipt, Sample, Status, sample_sha256
from rayexpand.runs import store as stores
from rayexpand.runs.store import (
    Store,
    content_sha256,
    data_name,
    new_attempt,
    parse_data_name,
    totals,
)
from rayexpand.storage.files import LocalFiles, process_token, token_alive
from rayexpand.storage.tables import find_rows, sealed
from tests.runfolder import Builder

CLASSES = ClassTable.of(["ant", "bee"])


def sample(i: int, reason: Reason | None = None, mark: int = 0) -> Sample:
    draw = Draw(f"s{i}/0", f"s{i}", 0, i % 2, i % 2, "", "", "image", 0.0, 0, 0, i, 0)
    pixels = np.full((4, 4, 3), i + mark, np.uint8)
    status = reason.status if reason else Status.KEPT
    return Sample(draw, "fake", status, b"png", f"{i}.png", reason, "", "", {"p": 0.5},
                  "" if reason else sample_sha256(pixels, draw))


def receipt(shard: int, samples: list[Sample], generation: int = 0) -> Receipt:
    count = [sum(s.status is status for s in samples) for status in Status]
    return Receipt(shard, generation, "", "", len(samples), *count, {}, [4], "", 1, "")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    files = LocalFiles(tmp_path)
    files.probe()
    return Store(files, "digest")


def test_a_commit_reads_back(store: Store) -> None:
    samples = [sample(0), sample(1, Reason.NAN_LATENT), sample(2, Reason.BELOW_THRESHOLD), sample(3)]
    committed = store.commit(receipt(5, samples), samples, CLASSES)

    assert (committed.kept, committed.rejected, committed.failed) == (2, 1, 1)
    assert store.data(committed)["sample_id"].to_pylist() == ["s0/0", "s3/0"]
    assert store.refused(committed)["reason"].to_pylist() == ["nan_latent", "below_threshold"]
    assert store.find(5) == replace(committed, seconds={}) or store.find(5) == committed
    assert list(store.receipts()) == [committed]
    assert store.pending(7) == [0, 1, 2, 3, 4, 6]


def test_a_shard_with_no_kept_row_commits(store: Store) -> None:
    samples = [sample(0, Reason.NAN_LATENT)]
    store.commit(receipt(0, samples), samples, CLASSES)

    assert store.pending(1) == []
    assert totals(1, store.receipts()).failed == 1
    assert pq.read_table(store.files.root / "data" / data_name(0)).num_rows == 0


def test_the_first_writer_wins_and_the_second_adopts(store: Store) -> None:
    first = store.commit(receipt(0, [sample(0)]), [sample(0)], CLASSES)
    content = (store.files.root / "data" / data_name(0)).read_bytes()
    second = Store(store.files, "digest").commit(receipt(0, [sample(0, mark=9)]), [sample(0, mark=9)], CLASSES)

    assert second.content_sha256 == first.content_sha256
    assert (store.files.root / "data" / data_name(0)).read_bytes() == content


def test_another_run_in_the_folder_is_refused(store: Store) -> None:
    store.commit(receipt(0, [sample(0)]), [sample(0)], CLASSES)

    with pytest.raises(DigestMismatch, match="written by run digest"):
        Store(store.files, "another").commit(receipt(0, [sample(0)]), [sample(0)], CLASSES)


def test_a_row_decided_differently_after_a_crash_is_in_one_place(store: Store) -> None:
    """Side file published, process dead; the next attempt keeps that row."""
    refused = [sample(0, Reason.TIMEOUT), sample(1)]
    files = store.files
    publish = files.publish

    def dies(name: str, content: bytes, step: str = "file", shard: int | None = None) -> bool:
        if step == "data":
            raise KeyboardInterrupt
        return publish(name, content, step, shard)

    files.publish = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        store.commit(receipt(0, refused), refused, CLASSES)
    files.publish = publish  # type: ignore[method-assign]
    committed = store.commit(receipt(0, [sample(0), sample(1)]), [sample(0), sample(1)], CLASSES)

    assert len(files.list("rejected")) == 1, "garbage of the dead attempt"
    assert committed.side_file == ""
    assert store.data(committed)["sample_id"].to_pylist() == ["s0/0", "s1/0"]
    assert store.refused(committed).num_rows == 0
    assert totals(2, store.receipts()).pending == 0


def test_lost_receipts_change_no_count(store: Store) -> None:
    for shard in range(3):
        samples = [sample(2 * shard), sample(2 * shard + 1, Reason.NAN_LATENT)]
        store.commit(receipt(shard, samples), samples, CLASSES)
    before = totals(6, store.receipts())
    for name in store.files.list("receipts"):
        store.files.delete(f"receipts/{name}")

    assert totals(6, store.receipts()) == before
    assert (before.kept, before.failed, before.pending) == (3, 3, 0)


def _commit(store: Store, *shards: int) -> None:
    for shard in shards:
        samples = [sample(2 * shard), sample(2 * shard + 1, Reason.NAN_LATENT)]
        store.commit(replace(receipt(shard, samples), attempt=2, host="here", seconds={"total": 1.5}), samples, CLASSES)


def test_a_roll_up_holds_what_the_receipts_said(store: Store) -> None:
    _commit(store, 0, 1, 2)
    before = list(store.receipts())
    assert store.roll_up() == 3
    assert store.files.list("receipts") == ["rollup-0002-1.json"]
    assert list(store.receipts()) == before
    assert store.roll_up() == 0
    _commit(store, 3)
    assert store.roll_up(at_least=2) == 0
    assert store.roll_up() == 1
    assert store.files.list("receipts") == ["rollup-0002-2.json"], "a small roll-up is folded into the next"
    assert list(store.receipts())[:3] == before
    assert len(list(store.receipts())) == 4


def test_a_full_roll_up_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_FULL_ROLL_UP", 2)
    for shard in range(5):
        _commit(store, shard)
        store.roll_up()
    assert sorted(store.files.list("receipts")) == ["rollup-0002-2.json", "rollup-0002-4.json", "rollup-0002-5.json"]
    assert totals(10, store.receipts()).shards == 5


def test_a_single_receipt_is_newer_than_a_roll_up(store: Store) -> None:
    """A data file was deleted and its shard made again: the roll-up still tells of the old one."""
    _commit(store, 0, 1)
    store.roll_up()
    store.files.delete(f"data/{data_name(1)}")
    assert [r.shard_id for r in store.receipts()] == [0], "a receipt without its data file counts for nothing"
    again = [sample(2), sample(3)]
    store.commit(receipt(1, again), again, CLASSES)
    assert [r.failed for r in store.receipts()] == [1, 0]
    store.roll_up()
    assert [r.failed for r in store.receipts()] == [1, 0]


@pytest.mark.parametrize("content", [b"", b"{", b"[{}]", b"[1]", b"null", b"\xff"])
def test_a_damaged_cache_is_no_cache(store: Store, content: bytes) -> None:
    _commit(store, 0, 1)
    before = totals(4, store.receipts())
    store.roll_up()
    store.files.replace("receipts/rollup-0002-1.json", content, "receipt")
    assert totals(4, store.receipts()) == before
    _commit(store, 2)
    store.roll_up()
    assert totals(6, store.receipts()).shards == 3


def test_a_roll_up_that_vanishes_while_it_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver folded it into the next one between the listing and the read."""
    _commit(store, 0, 1)
    store.roll_up()
    before, read = list(store.receipts()), store.files.read
    reads: list[str] = []

    def vanishes(name: str) -> bytes | None:
        reads.append(name)
        if len(reads) == 1:
            other = "receipts/rollup-0002-2.json"
            store.files.publish(other, sealed(other, json.loads(read(name) or b"")))
            store.files.delete(name)
        return read(name)

    monkeypatch.setattr(store.files, "read", vanishes)
    monkeypatch.setattr(store, "find", None)
    assert list(store.receipts()) == before


def test_many_drivers_roll_up_at_once(store: Store) -> None:
    _commit(store, *range(12))
    threads = [threading.Thread(target=store.roll_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    _commit(store, *range(12, 16))
    for thread in threads:
        thread.join()
    store.roll_up()
    assert totals(32, store.receipts()).shards == 16
    assert not [name for name in store.files.list("receipts") if not name.startswith("rollup-")]


def test_a_process_that_reads_and_ends_does_not_abort(store: Store) -> None:
    """Arrow's threads hold no Python file any more when a read returns (six in ten such processes died of it)."""
    _commit(store, 0)
    code = ("import sys; from rayexpand.runs.store import Store; from rayexpand.storage.places import open_files\n"
            "s = Store(open_files(sys.argv[1]), 'digest')\n"
            "s.data(s.find(0), ['sample_id', 'label'])")
    codes = [subprocess.run([sys.executable, "-c", code, store.files.root]).returncode for _ in range(6)]
    assert codes == [0] * 6


def test_rows_are_found_by_a_value(store: Store) -> None:
    samples = [sample(i) for i in range(7)]
    committed = store.commit(receipt(0, samples), samples, CLASSES)
    name = f"data/{committed.data_file}"
    assert find_rows(store.files, name, "seed_id", "s3").equals(store.data(committed).slice(3, 1))
    assert find_rows(store.files, name, "seed_id", "none").num_rows == 0


def test_a_retry_counts_rows_once(store: Store) -> None:
    first = [sample(0), sample(1, Reason.NAN_LATENT), sample(2, Reason.NAN_LATENT)]
    second = [sample(1), sample(2, Reason.NAN_LATENT)]
    store.commit(receipt(0, first), first, CLASSES)
    store.commit(receipt(0, second, generation=1), second, CLASSES)
    found = totals(3, store.receipts())

    assert (found.kept, found.failed, found.pending, found.shards) == (2, 1, 0, 1)
    assert store.committed() == {0: 1}


def test_attempts_are_numbered_without_gaps_or_doubles(store: Store) -> None:
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(new_attempt(store.files, {}))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(numbers) == list(range(1, 9))


def test_the_content_hash_is_of_pairs_in_any_order() -> None:
    rows = [("b", "2"), ("a", "1")]
    assert content_sha256(rows) == content_sha256(rows[::-1])
    assert content_sha256(rows) != content_sha256([("b", "1"), ("a", "2")])


def test_names_are_parsed_strictly() -> None:
    assert parse_data_name("train-000123.parquet") == (123, 0)
    assert parse_data_name("train-1000123.r2.parquet") == (1000123, 2)
    for other in ("train-000123.parquet.tmp", "train-12.parquet", "x.parquet", ".train-000001.parquet"):
        assert parse_data_name(other) is None


def test_a_token_lives_as_long_as_its_process() -> None:
    assert token_alive(process_token())
    host, pid, started = process_token().split("~")
    assert not token_alive(f"{host}~{pid}~{int(started) - 1}"), "a reused pid is another process"
    assert not token_alive(f"{host}~999999999~1")
    assert token_alive("other-host~1~1")


def test_a_zombie_is_dead() -> None:
    """Its parent has not looked yet, but it holds nothing and writes nothing any more."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        fields: list[str] = []
        while not fields or fields[0] != "Z":
            time.sleep(0.001)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        assert not token_alive("~".join([process_token().split("~")[0], str(pid), fields[19]]))
    finally:
        os.waitpid(pid, 0)


def test_leftovers_of_dead_processes_are_swept(store: Store) -> None:
    host = process_token().split("~")[0]
    (store.files.root / ".tmp" / f"{host}~999999999~1-abc").write_bytes(b"torn")
    (store.files.root / ".tmp" / f"{process_token()}-abc").write_bytes(b"mine")

    assert store.files.sweep() == 1
    assert len(store.files.list(".tmp")) == 1


def test_a_probe_survives_the_sweep_of_another_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(tmp_path)
    publish = files.publish

    def swept(name: str, content: bytes) -> bool:
        won = publish(name, content)
        LocalFiles(tmp_path).sweep()
        return won

    monkeypatch.setattr(files, "publish", swept)
    files.probe()


class _Refusing:
    """The os module with one call that fails."""

    def __init__(self, call: str, code: int) -> None:
        self._call, self._code = call, code

    def __getattr__(self, name: str) -> Any:
        if name == self._call:
            return self._raise
        return getattr(os, name)

    def _raise(self, *args: Any) -> None:
        raise OSError(self._code, os.strerror(self._code))


def test_storage_without_links_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no hard links.*store\.single_writer: true"):
        LocalFiles(tmp_path, system=_Refusing("link", errno.EPERM)).probe()

    LocalFiles(tmp_path, single_writer=True, system=_Refusing("link", errno.EPERM)).probe()


def test_storage_that_lets_a_second_writer_through_is_refused(tmp_path: Path) -> None:
    class Overwrites(_Refusing):
        def _raise(self, *args: Any) -> None:
            os.replace(args[0], args[1])

    with pytest.raises(StorageError, match="twice was not refused"):
        LocalFiles(tmp_path, system=Overwrites("link", 0)).probe()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")

    with pytest.raises(StorageError, match=r"file/run: cannot be written"):
        LocalFiles(blocked / "run").probe()


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_a_full_disk_commits_nothing_and_says_where(tmp_path: Path, call: str) -> None:
    LocalFiles(tmp_path).probe()
    full = Store(LocalFiles(tmp_path, system=_Refusing(call, errno.ENOSPC)), "digest")

    with pytest.raises(EnvironmentFault, match=r"data/train-000000\.parquet: No space left"):
        full.commit(receipt(0, [sample(0)]), [sample(0)], CLASSES)
    assert full.pending(1) == [0]
    assert full.files.list(".tmp") == []


def test_a_foreign_file_in_data_is_named(store: Store) -> None:
    pq.write_table(store.commit(receipt(0, [sample(0)]), [sample(0)], CLASSES) and store.data(next(store.receipts()))
                   .replace_schema_metadata({}), store.files.root / "data" / data_name(1))

    with pytest.raises(UsageError, match=r"data/train-000001\.parquet is not a file of this package"):
        store.find(1)


class CrashDisk:
    """The os module over a disk that keeps only what was fsynced, folder entries included.

    Calls go through to the real filesystem; `survivors()` tells what a power cut after the last call would leave.
    """

    def __init__(self, *, sync_files: bool = True, sync_folders: bool = True) -> None:
        self.sync_files, self.sync_folders = sync_files, sync_folders
        self.calls, self.stop_after = 0, 10**9
        self._open: dict[int, Path] = {}
        self._inode: dict[Path, int] = {}  # volatile entries
        self._durable_entry: dict[Path, int] = {}
        self._durable_content: dict[int, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _tick(self) -> None:
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt("power cut")

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self._tick()
        descriptor = os.open(path, flags, mode)
        self._open[descriptor] = Path(path)
        if flags & os.O_CREAT:
            self._inode[Path(path)] = os.fstat(descriptor).st_ino
        return descriptor

    def write(self, descriptor: int, content: memoryview) -> int:
        self._tick()
        return os.write(descriptor, content[:max(1, len(content) // 2)])

    def fsync(self, descriptor: int) -> None:
        self._tick()
        path = self._open[descriptor]
        if path.is_dir():
            if self.sync_folders:
                entries = {p: i for p, i in self._inode.items() if p.parent == path}
                self._durable_entry = {p: i for p, i in self._durable_entry.items() if p.parent != path} | entries
        elif self.sync_files:
            self._durable_content[os.fstat(descriptor).st_ino] = path.read_bytes()

    def link(self, source: Path, target: Path) -> None:
        self._tick()
        os.link(source, target)
        self._inode[Path(target)] = self._inode[Path(source)]

    def rename(self, source: Path, target: Path) -> None:
        self._tick()
        os.rename(source, target)
        self._inode[Path(target)] = self._inode.pop(Path(source))

    def unlink(self, path: Path) -> None:
        os.unlink(path)
        self._inode.pop(Path(path), None)

    def survivors(self, *, entries: str) -> dict[str, bytes]:
        """Content by name in the worst cases: folder entries not yet synced are lost, or all are there."""
        table = self._durable_entry if entries == "synced" else self._inode
        return {f"{path.parent.name}/{path.name}": self._durable_content.get(inode, b"")
                for path, inode in table.items()}


def test_new_folders_survive_a_power_cut(tmp_path: Path) -> None:
    crash = CrashDisk()
    synced: list[Path] = []
    plain = crash.fsync

    def fsync(descriptor: int) -> None:
        synced.append(crash._open[descriptor])
        plain(descriptor)

    crash.fsync = fsync  # type: ignore[method-assign]
    LocalFiles(tmp_path / "out" / "run", system=crash).make_folder("plan/x")
    assert {tmp_path, tmp_path / "out", tmp_path / "out/run", tmp_path / "out/run/plan"} <= set(synced)


def _crash_everywhere(tmp_path: Path, check: Callable[[CrashDisk, bool], None], **disk: bool) -> int:
    """Commits a shard with refused rows, cut off after each system call in turn; returns the number of cuts."""
    samples = [sample(0), sample(1, Reason.NAN_LATENT)]
    cut = 0
    while True:
        root = tmp_path / str(cut)
        LocalFiles(root).probe()
        crash = CrashDisk(**disk)
        crash.stop_after = cut
        finished = False
        try:
            Store(LocalFiles(root, system=crash), "digest").commit(receipt(0, samples), samples, CLASSES)
            finished = True
        except KeyboardInterrupt:
            pass
        check(crash, finished)
        if finished:
            return cut
        cut += 1


def _is_whole(crash: CrashDisk, finished: bool) -> None:
    import io
    import json

    for entries in ("synced", "all"):
        left = crash.survivors(entries=entries)
        name = f"data/{data_name(0)}"
        if finished:
            assert name in left, "a commit that was reported is lost"
        if name in left:
            footer = json.loads(pq.read_schema(io.BytesIO(left[name])).metadata[b"rayexpand"])
            side = left.get(f"rejected/{footer['side_file']}")
            assert side is not None, "the data file names refused rows that are lost"
            assert pq.read_table(io.BytesIO(side)).num_rows == 1


def test_a_power_cut_at_any_call_leaves_all_or_nothing(tmp_path: Path) -> None:
    assert _crash_everywhere(tmp_path, _is_whole) > 10


@pytest.mark.parametrize("missing", ["sync_files", "sync_folders"])
def test_without_either_fsync_a_power_cut_is_noticed(tmp_path: Path, missing: str) -> None:
    """The test above can fail: a disk that ignores one kind of fsync breaks the promise."""
    with pytest.raises((AssertionError, pa.ArrowException)):
        _crash_everywhere(tmp_path, _is_whole, **{missing: False})


def test_row_groups_of_large_images_end_at_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Builder(tmp_path / "run", shards=1, seeds_per_shard=4, copies=5).start()
    samples = [replace(one, image=bytes(1000 + 100 * i)) for i, one in enumerate(run.samples(0))]
    monkeypatch.setattr(stores, "_GROUP_BYTES", 5000)
    run.commit(0, samples)

    file = pq.ParquetFile(tmp_path / "run/data/train-000000.parquet")
    sizes = [[len(row["bytes"]) for row in file.read_row_group(group)["image"].to_pylist()]
             for group in range(file.num_row_groups)]
    assert [size for group in sizes for size in group] == [1000 + 100 * i for i in range(20)]
    assert all(sum(group) <= 5000 for group in sizes)
    assert len(sizes) < 12
