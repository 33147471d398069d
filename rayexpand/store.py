"""The run folder: what is committed, how a shard becomes visible exactly once, and how to check it.

    run.json                      resolved config and digests; created once, never changed
    attempts/0007.json            one per start
    plan/<digest8>/               see plan.py
    data/train-000123.parquet     the only commit point; generation 1 of a retry is train-000123.r1.parquet
    rejected/000123-<hash8>.parquet   refused rows; counts only if the footer of a data file names it
    receipts/000123.json          a cache of that footer, plus seconds by phase
    selections/                   later decisions; data files are never rewritten
    blame/                        markers of sampler calls in flight (blame.py)

Publishing: temporary file on the same filesystem, fsync, link without overwrite, fsync of the folder. The order of a
commit is side file, data file, receipt. Whoever links the data file first has committed the shard; a later writer
adopts that file if it belongs to the same run digest.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.errors import DigestMismatch, EnvironmentFault, StorageError, UsageError
from rayexpand.schema import (
    DATA_SCHEMA,
    REFUSED_SCHEMA,
    ClassTable,
    Receipt,
    Sample,
    Status,
    huggingface_metadata,
    samples_to_arrow,
)

FOOTER = b"rayexpand"
_DATA_NAME = re.compile(r"^train-(\d{6,})(?:\.r(\d+))?\.parquet$")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_ROW_GROUP = 500  # images; viewers and readers load one row group at a time


def data_name(shard_id: int, generation: int = 0) -> str:
    suffix = f".r{generation}" if generation else ""
    return f"train-{shard_id:06d}{suffix}.parquet"


def parse_data_name(name: str) -> tuple[int, int] | None:
    """(shard id, generation) of a data file name, None for any other file."""
    match = _DATA_NAME.match(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def failpoint(point: str, shard: int | None = None) -> None:
    """Acts when RAYEXPAND_FAILPOINT is `<point>[@shard=N]:kill|stop|full`; for tests of every crash window.

    kill sends SIGKILL to this process, stop SIGSTOP, full raises the error of a full disk.
    """
    setting = os.environ.get("RAYEXPAND_FAILPOINT")
    if not setting:
        return
    where, _, action = setting.rpartition(":")
    wanted, _, only = where.partition("@shard=")
    if wanted != point or (only and int(only) != shard):
        return
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


class LocalFiles:
    """Files below one folder of a filesystem with hard links. `system` is the os module, replaced in crash tests."""

    def __init__(self, root: str | Path, *, single_writer: bool = False, system: Any = os) -> None:
        self.root, self.single_writer, self.system = Path(root), single_writer, system

    def probe(self) -> None:
        """Writes one name twice; the second must be refused. Raises StorageError with the remedy."""
        name = f".tmp/probe-{uuid.uuid4().hex}"
        try:
            for folder in ("data", "rejected", "receipts", "attempts", "plan", "blame", ".tmp"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            won = [self.publish(name, b"probe"), self.publish(name, b"probe")]
        except EnvironmentFault:
            raise
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise StorageError(f"{self.root}: this filesystem has no hard links ({error.strerror}), so two writers "
                                   "could replace each other's files. Use another folder, or set "
                                   "store.single_writer: true and never run two drivers at once.") from error
            raise StorageError(f"{self.root}: cannot be written ({error.strerror}). Choose another `out`, or give "
                               "this user the right to write there.") from error
        self.delete(name)
        if won != [True, False]:
            raise StorageError(f"{self.root}: writing a name twice was not refused (got {won}); exactly-once output "
                               "cannot be kept on this storage")

    def publish(self, name: str, content: bytes, step: str = "file", shard: int | None = None) -> bool:
        """Makes `content` visible under `name`, durable and whole; False if the name is taken.

        `step` names the failpoints before_<step>, after_<step>_write, after_<step>_link and after_<step>.
        Raises EnvironmentFault when the storage is full or broken.
        """
        target = self.root / name
        temporary = self.root / ".tmp" / f"{process_token()}-{uuid.uuid4().hex[:12]}"
        try:
            failpoint(f"before_{step}", shard)
            self._write(temporary, content)
            failpoint(f"after_{step}_write", shard)
            won = self._link(temporary, target)
            failpoint(f"after_{step}_link", shard)
            self._sync_folder(target.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE):
                raise EnvironmentFault(f"{target}: {error.strerror}. Free space or repair the storage, then run the "
                                       "same command again; nothing committed is lost.") from error
            raise
        finally:
            self._discard(temporary)
        failpoint(f"after_{step}", shard)
        return won

    def replace(self, name: str, content: bytes, step: str, shard: int | None = None) -> None:
        """Writes or overwrites a cache file, whole at every instant. Never for a commit."""
        temporary = self.root / ".tmp" / f"{process_token()}-{uuid.uuid4().hex[:12]}"
        failpoint(f"before_{step}", shard)
        try:
            self._write(temporary, content)
            self.system.rename(temporary, self.root / name)
        finally:
            self._discard(temporary)
        failpoint(f"after_{step}", shard)

    def _write(self, path: Path, content: bytes) -> None:
        descriptor = self.system.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            view = memoryview(content)
            while view:
                view = view[self.system.write(descriptor, view):]
            self.system.fsync(descriptor)
        finally:
            self.system.close(descriptor)

    def _link(self, temporary: Path, target: Path) -> bool:
        if self.single_writer:
            if target.exists():
                return False
            self.system.rename(temporary, target)
            return True
        try:
            self.system.link(temporary, target)
        except FileExistsError:
            return False
        return True

    def _sync_folder(self, folder: Path) -> None:
        descriptor = self.system.open(folder, os.O_RDONLY)
        try:
            self.system.fsync(descriptor)
        finally:
            self.system.close(descriptor)

    def _discard(self, path: Path) -> None:
        try:
            self.system.unlink(path)
        except OSError:
            return  # already renamed away, or a leftover that `sweep` removes later

    def sweep(self) -> int:
        """Removes temporary files of processes that are dead on this host; returns how many."""
        stale = [path for path in (self.root / ".tmp").glob("*") if not token_alive(path.name.rpartition("-")[0])]
        for path in stale:
            self._discard(path)
        return len(stale)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """A seekable reader, so that a footer is read without its images."""
        return (self.root / name).open("rb")

    def list(self, folder: str) -> list[str]:
        """Names in a folder, unsorted; empty if it is not there."""
        try:
            return os.listdir(self.root / folder)
        except FileNotFoundError:
            return []

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


def process_token() -> str:
    """Names this process for good: host, pid and its start time, so that a reused pid is another token."""
    return f"{socket.gethostname()}~{os.getpid()}~{_start_time(os.getpid())}"


def token_alive(token: str) -> bool:
    """Whether the process of a token may still run. A process of another host counts as alive."""
    try:
        host, pid, started = token.rsplit("~", 2)
    except ValueError:
        return False
    if host != socket.gethostname():
        return True
    return _start_time(int(pid)) == started


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot, "" if there is none. Without /proc: "0" while it runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        if Path("/proc/self").exists():
            return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "0"


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of a run or of one shard; planned = kept + rejected + failed + pending."""

    planned: int = 0
    kept: int = 0
    rejected: int = 0
    failed: int = 0
    shards: int = 0  # committed

    @property
    def pending(self) -> int:
        return self.planned - self.kept - self.rejected - self.failed


class Store:
    """Committed shards of one run folder."""

    def __init__(self, files: LocalFiles, run_digest: str, token: str | None = None) -> None:
        self.files, self.run_digest, self.token = files, run_digest, token or process_token()

    def committed(self) -> dict[int, int]:
        """Committed shards with their latest generation. One listing, no file is read."""
        latest: dict[int, int] = {}
        for name in self.files.list("data"):
            if parsed := parse_data_name(name):
                latest[parsed[0]] = max(parsed[1], latest.get(parsed[0], 0))
        return latest

    def pending(self, n_shards: int) -> list[int]:
        """Planned shards 0..n_shards-1 without a data file, in order."""
        done = self.committed()
        return [shard for shard in range(n_shards) if shard not in done]

    def find(self, shard_id: int, generation: int = 0) -> Receipt | None:
        """Receipt rebuilt from the footer of a committed data file; None if there is none.

        Raises DigestMismatch if the file belongs to another run.
        """
        name = data_name(shard_id, generation)
        try:
            with self.files.open(f"data/{name}") as reader:
                footer = _footer(pq.read_schema(reader), name)
        except FileNotFoundError:
            return None
        if footer["run_digest"] != self.run_digest:
            raise DigestMismatch(f"data/{name} was written by run digest {footer['run_digest'][:8]}, this run is "
                                 f"{self.run_digest[:8]}. Use another `name`, or move that folder away.")
        return Receipt(**{**footer["receipt"], "data_file": name, "side_file": footer["side_file"],
                          "content_sha256": footer["content_sha256"], "run_digest": footer["run_digest"]})

    def commit(self, receipt: Receipt, samples: Sequence[Sample], classes: ClassTable) -> Receipt:
        """Publishes a shard: refused rows, then data, then receipt. Returns the receipt of whoever won the shard."""
        started = time.perf_counter()
        kept = [s for s in samples if s.status is Status.KEPT]
        refused = [s for s in samples if s.status is not Status.KEPT]
        assert receipt.planned == len(samples) == len({s.draw.sample_id for s in samples})
        shard = receipt.shard_id
        side_file, side_sha256 = "", ""
        if refused:
            content = parquet_bytes(samples_to_arrow(refused, REFUSED_SCHEMA), {})
            side_sha256 = hashlib.sha256(content).hexdigest()
            side_file = f"{shard:06d}-{side_sha256[:16]}.parquet"
            self.files.publish(f"rejected/{side_file}", content, "side", shard)
        receipt = replace(receipt, data_file=data_name(shard, receipt.generation), side_file=side_file,
                          content_sha256=content_sha256((s.draw.sample_id, s.sample_sha256) for s in kept),
                          run_digest=self.run_digest)
        footer = {"shard_id": shard, "generation": receipt.generation, "run_digest": self.run_digest,
                  "writer": self.token, "side_file": side_file, "side_sha256": side_sha256,
                  "content_sha256": receipt.content_sha256, "receipt": json.loads(receipt.to_json())}
        content = parquet_bytes(samples_to_arrow(kept, DATA_SCHEMA),
                                {**huggingface_metadata(classes.name), FOOTER: json.dumps(footer).encode()})
        if not self.files.publish(f"data/{receipt.data_file}", content, "data", shard):
            winner = self.find(shard, receipt.generation)
            assert winner is not None
            receipt = winner
        else:
            receipt = replace(receipt, seconds={"commit": time.perf_counter() - started, **receipt.seconds})
        self.cache(receipt)
        return receipt

    def cache(self, receipt: Receipt) -> None:
        """Writes the receipt of a committed file; a lost or stale one costs a footer read, never a count."""
        self.files.replace(receipt_name(receipt), receipt.to_json().encode(), "receipt", receipt.shard_id)

    def receipts(self) -> Iterator[Receipt]:
        """One receipt per committed file, in shard order: from the cache, or from the footer where that is gone."""
        cached = set(self.files.list("receipts"))
        files = sorted(parsed for name in self.files.list("data") if (parsed := parse_data_name(name)))
        for shard_id, generation in files:
            name = f"receipts/{data_name(shard_id, generation).removeprefix('train-').removesuffix('.parquet')}.json"
            text = self.files.read(name) if name.removeprefix("receipts/") in cached else None
            receipt = Receipt.from_json(text.decode()) if text else self.find(shard_id, generation)
            if receipt is not None:
                yield receipt

    def data(self, receipt: Receipt, columns: list[str] | None = None) -> pa.Table:
        """Kept rows of a committed file (DATA_SCHEMA), or some of their columns."""
        with self.files.open(f"data/{receipt.data_file}") as reader:
            return pq.read_table(reader, columns=columns)

    def refused(self, receipt: Receipt) -> pa.Table:
        """Refused rows of a committed file (REFUSED_SCHEMA); no rows where it names no side file."""
        if not receipt.side_file:
            return REFUSED_SCHEMA.empty_table()
        with self.files.open(f"rejected/{receipt.side_file}") as reader:
            return pq.read_table(reader)


def receipt_name(receipt: Receipt) -> str:
    return f"receipts/{receipt.data_file.removeprefix('train-').removesuffix('.parquet')}.json"


def totals(planned: int, receipts: Iterator[Receipt] | Sequence[Receipt]) -> Totals:
    """Counts over generations: a retried row leaves `failed` of the generation before it."""
    kept = rejected = shards = 0
    failed: dict[int, int] = {}
    for receipt in receipts:
        kept, rejected = kept + receipt.kept, rejected + receipt.rejected
        shards += receipt.generation == 0
        failed[receipt.shard_id] = receipt.failed  # receipts come by generation, the last one holds
    return Totals(planned, kept, rejected, sum(failed.values()), shards)


def content_sha256(rows: Any) -> str:
    """Hash over sorted (sample_id, sample_sha256)."""
    return hashlib.sha256("\n".join(f"{i} {s}" for i, s in sorted(rows)).encode()).hexdigest()


def parquet_bytes(table: pa.Table, metadata: dict[bytes, bytes], row_group: int = _ROW_GROUP) -> bytes:
    sink = io.BytesIO()
    table = table.replace_schema_metadata(metadata)
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        if table.num_rows:  # `datasets` cannot read a row group of no rows
            writer.write_table(table, row_group)
    return sink.getvalue()


def _footer(schema: pa.Schema, name: str) -> dict[str, Any]:
    raw = (schema.metadata or {}).get(FOOTER)
    if raw is None:
        raise UsageError(f"data/{name} is not a file of this package (no footer). Move it out of data/ and run again.")
    return json.loads(raw)


def create_once(files: LocalFiles, name: str, content: dict[str, Any], step: str) -> dict[str, Any]:
    """Publishes JSON under `name`, or returns what is there already."""
    files.publish(name, json.dumps(content, indent=1, sort_keys=True).encode(), step)
    found = files.read(name)
    assert found is not None
    return json.loads(found)


def new_attempt(files: LocalFiles, facts: dict[str, Any], clock: Callable[[], float] = time.time) -> int:
    """Registers a start as attempts/NNNN.json and returns its number, from 1."""
    number = 1 + max((int(name[:-5]) for name in files.list("attempts") if name.endswith(".json")), default=0)
    while not files.publish(f"attempts/{number:04d}.json",
                            json.dumps({"attempt": number, "started": clock(), **facts}, indent=1).encode(), "attempt"):
        number += 1
    return number
