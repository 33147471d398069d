"""A run folder in an object store: S3 and what speaks its protocol, or Google Cloud Storage.

Publishing is one conditional request: the store itself refuses a name that is taken (S3 `If-None-Match: *`, on
PutObject and on CompleteMultipartUpload; GCS `ifGenerationMatch=0`). Looking first and writing then would let two
writers through. Every publication carries a tag of its own in the object's metadata: when the store says "taken", the
tag of what is there tells a lost reply of this very request (we won) from another writer (they won).
"""

from __future__ import annotations

import io
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import IO, Any

from rayexpand.contract.errors import EnvironmentFault, StorageError
from rayexpand.storage.buckets import BUCKETS, PARALLEL, Bucket
from rayexpand.storage.files import Entry, StorageDenied, failpoint

CONFLICTS = 8  # "taken", yet nothing is there: another writer's request is under way
TAIL_BYTES = 1 << 16  # the end of a file, read when it is opened: a Parquet footer
BLOCK_BYTES = 1 << 18  # smallest other read

_NAME = re.compile(r"^(s3|gs|gcs)://([A-Za-z0-9][A-Za-z0-9._-]*)(?:/(.*))?$")
_PACKAGES = {"s3": ("botocore", "rayexpand[s3]"), "gs": ("google.cloud.storage", "rayexpand[gcs]")}
_CREDENTIALS = re.compile(r"//[^/@\s]*@")


class ObjectFiles:
    """Files below a prefix of a bucket. `bucket` makes a Bucket; each process makes its own."""

    parallel = PARALLEL

    def __init__(self, root: str, prefix: str, bucket: Callable[[], Bucket], *, single_writer: bool = False) -> None:
        self._root, self._prefix, self._make = root, prefix, bucket
        self.single_writer = single_writer
        self._made: tuple[int, Bucket] | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, url: str, *, single_writer: bool = False) -> ObjectFiles:
        """Files below s3://bucket/prefix or gs://bucket/prefix. Raises StorageError."""
        match = _NAME.match(url)
        if match is None:
            raise StorageError(f"{_hidden(url)}: a run can lie in a local folder, s3://bucket/prefix or "
                               "gs://bucket/prefix. Credentials do not belong into the URL: they come from the "
                               "environment, the profile of this user or the machine's role.")
        scheme, name, prefix = "s3" if match[1] == "s3" else "gs", match[2], match[3]
        package, extra = _PACKAGES[scheme]
        if not _installed(package):
            raise StorageError(f"{url}: needs the package {package.split('.')[0]}; pip install '{extra}'")
        prefix = (prefix or "").strip("/")
        root = "/".join(filter(None, [f"{scheme}://{name}", prefix]))
        return cls(root, f"{prefix}/" if prefix else "", lambda: BUCKETS[scheme](name), single_writer=single_writer)

    @property
    def root(self) -> str:
        return self._root

    def at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def probe(self) -> None:
        """Writes one name twice; the second must be refused. Raises StorageError with the remedy."""
        name = f".tmp/probe-{uuid.uuid4().hex}"
        try:
            won = [self.publish(name, b"probe"), self.publish(name, b"probe")]
            self.delete(name)
        except StorageDenied as error:
            raise StorageError(str(error)) from error
        if won != [True, False]:
            raise StorageError(
                f"{self._root}: this store lets a second writer replace an object (If-None-Match or ifGenerationMatch "
                f"has no effect, got {won}), so exactly-once output cannot be kept. Use a store that honours "
                "conditional writes, or set store.single_writer: true and never run two drivers at once.")

    def publish(self, name: str, content: bytes, step: str = "file", shard: int | None = None) -> bool:
        """Creates an object; False if another writer has.

        `step` names the failpoints before_<step>, after_<step>_write (multipart uploads only: all parts are there,
        the name is not), after_<step>_link and after_<step>. Raises EnvironmentFault.
        """
        key, tag = self._prefix + name, uuid.uuid4().hex
        failpoint(f"before_{step}", shard)
        with self._asking(name) as bucket:
            if self.single_writer:
                won = bucket.head(key) is None
                if won:
                    bucket.put(key, content, tag)
            else:
                won = self._create(bucket, key, content, tag, lambda: failpoint(f"after_{step}_write", shard))
        failpoint(f"after_{step}_link", shard)
        failpoint(f"after_{step}", shard)
        return won

    def _create(self, bucket: Bucket, key: str, content: bytes, tag: str, written: Callable[[], None]) -> bool:
        for attempt in range(CONFLICTS):
            if bucket.create(key, content, tag, written):
                return True
            if winner := bucket.head(key):
                return winner.tag == tag
            time.sleep(0.1 * 2**attempt)
        raise EnvironmentFault(f"{self._root}: another writer holds {key} and never finishes. Run the same command "
                               "again.")

    def replace(self, name: str, content: bytes, step: str = "file", shard: int | None = None) -> None:
        """Writes or overwrites a cache file, whole at every instant. Never for a commit."""
        failpoint(f"before_{step}", shard)
        with self._asking(name) as bucket:
            bucket.put(self._prefix + name, content)
        failpoint(f"after_{step}", shard)

    def mark(self, name: str) -> None:
        self.replace(name, b"", "mark")

    def read(self, name: str) -> bytes | None:
        with self._asking(name) as bucket:
            return bucket.get(self._prefix + name)

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader by range requests; the first brings the last 64 KiB. Raises FileNotFoundError."""
        key = self._prefix + name
        with self._asking(name) as bucket:
            found = bucket.tail(key, TAIL_BYTES)
        if found is None:
            raise FileNotFoundError(f"{self.at(name)}: no such object")

        def get(start: int, stop: int) -> bytes:
            with self._asking(name) as bucket:
                content = bucket.get(key, start, stop)
            if content is None:
                raise FileNotFoundError(f"{self.at(name)}: no such object")
            return content

        return RangeReader(get, *found)  # type: ignore[return-value]

    def list(self, folder: str, prefix: str = "") -> list[str]:
        return list(self._entries(folder, prefix))

    def entries(self, folder: str) -> dict[str, Entry]:
        return self._entries(folder, "")

    def _entries(self, folder: str, prefix: str) -> dict[str, Entry]:
        with self._asking(f"{folder}/") as bucket:
            below = f"{self._prefix}{folder}/" if folder else self._prefix
            return {key.removeprefix(below): entry for key, entry in bucket.entries(below + prefix) if key != below}

    def delete(self, *names: str) -> None:
        with self._asking(names[0] if names else "") as bucket:
            keys = [self._prefix + name for name in names]
            if len(keys) <= 1:
                for key in keys:
                    bucket.delete(key)
                return
            with ThreadPoolExecutor(PARALLEL) as pool:
                list(pool.map(bucket.delete, keys))

    def sweep(self) -> int:
        """Aborts multipart uploads that a dead writer left, a day old or more; returns how many."""
        try:
            with self._asking("") as bucket:
                return bucket.sweep(self._prefix)
        except StorageDenied:
            return 0  # listing uploads is a right of its own, and a lifecycle rule does the same

    def make_folder(self, name: str) -> None:
        """Object stores have no folders."""

    @contextmanager
    def _asking(self, name: str) -> Iterator[Bucket]:
        """A Bucket of this process; its errors become StorageDenied or EnvironmentFault."""
        bucket: Bucket | None = None
        try:
            with self._lock:  # a forked child must not share the connections of its parent
                if self._made is None or self._made[0] != os.getpid():
                    self._made = (os.getpid(), self._make())
                bucket = self._made[1]
            yield bucket
        except Exception as error:
            told = (bucket or BUCKETS[self._root.partition("://")[0]]).fault(error)
            if told is None and bucket is None and isinstance(error, ValueError):
                told = f"the settings of the store cannot be used ({error})", (
                    "Correct the endpoint (AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST: with http:// or https://), region "
                    "or profile, then run the same command again.")
            if told is None:
                raise
            wrong, then = told
            if wrong:
                raise StorageDenied(f"{self.at(name)}: {_hidden(wrong)}. {then}") from error
            raise EnvironmentFault(f"{self.at(name)}: {_hidden(then)}. Check the store, the network and its endpoint, "
                                   "then run the same command again; nothing committed is lost.") from error


class RangeReader(io.RawIOBase):
    """A seekable reader over `get(start, stop)` that begins with the last bytes in hand."""

    def __init__(self, get: Callable[[int, int], bytes], tail: bytes, size: int) -> None:
        self._get, self._size, self._at = get, size, 0
        self._block, self._block_start = tail, size - len(tail)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        start = self._at
        if stop <= start:
            return b""
        if not self._block_start <= start <= stop <= self._block_start + len(self._block):
            self._block = self._get(start, min(self._size, max(stop, start + BLOCK_BYTES)))
            self._block_start = start
        self._at = stop
        return self._block[start - self._block_start:stop - self._block_start]

    def readall(self) -> bytes:
        return self.read(-1)

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[:len(content)] = content
        return len(content)


def _hidden(text: str) -> str:
    """`text` without a user name and password in front of a host."""
    return _CREDENTIALS.sub("//...@", text)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
