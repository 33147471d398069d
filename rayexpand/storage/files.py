"""Where a run folder lies: the small interface every place has, and the one with hard links.

A `Files` holds named contents below one root. `publish` is the only way to commit: it never overwrites, and says
whether the name was free. objects.py has the same interface for object stores; store.py chooses (`open_files`).

Publishing on a filesystem: temporary file on the same filesystem, fsync, link without overwrite, fsync of the folder.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from rayexpand.contract.errors import EnvironmentFault, StorageError

FOLDERS = ("data", "rejected", "receipts", "attempts", "plan", "blame", ".tmp")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}

A = TypeVar("A")
B = TypeVar("B")


class StorageDenied(EnvironmentFault):
    """The storage answers, but refuses this user, or does not know the place or the request."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a listing."""

    size: int  # bytes
    modified: float  # unix seconds


class Files(Protocol):
    """Named contents below one root. Names are relative paths with `/`."""

    parallel: int  # requests worth having under way at once

    @property
    def root(self) -> Path | str:
        """The folder, or its URL."""

    def probe(self) -> None:
        """Makes the place ready and shows that a name cannot be written twice. Raises StorageError."""

    def publish(self, name: str, content: bytes, step: str = "file", shard: int | None = None) -> bool:
        """Makes `content` visible under `name`, durable and whole; False if the name is taken by another writer."""

    def replace(self, name: str, content: bytes, step: str = "file", shard: int | None = None) -> None:
        """Writes or overwrites a cache file, whole at every instant. Never for a commit."""

    def mark(self, name: str) -> None:
        """Leaves an empty file, as cheaply as the death of this process allows."""

    def read(self, name: str) -> bytes | None: ...

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader, so that a footer is read without its images. Raises FileNotFoundError."""

    def list(self, folder: str, prefix: str = "") -> list[str]:
        """Names in a folder that start with `prefix`, unsorted; empty if it is not there."""

    def entries(self, folder: str) -> dict[str, Entry]:
        """Files in a folder by name; empty if it is not there."""

    def delete(self, *names: str) -> None: ...

    def sweep(self) -> int:
        """Removes what writers left that are dead; returns how many."""

    def make_folder(self, name: str) -> None:
        """Makes `name` ready to take files."""

    def at(self, name: str) -> Path | str:
        """The path or URL of a file, for people and for tools that open it themselves."""


def each(files: Files, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` in order, with as many calls under way as suit the storage."""
    if files.parallel == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(files.parallel) as pool:
        yield from pool.map(function, items)


def failpoint(point: str, shard: int | None = None) -> None:
    """Acts when RAYEXPAND_FAILPOINT is `<point>[@shard=N]:kill|stop|full`; for tests of every crash window.

    kill sends SIGKILL to this process, stop SIGSTOP, full raises the error of a full disk. With a file name in
    RAYEXPAND_FAILPOINT_ONCE only the first process to create that file acts.
    """
    setting = os.environ.get("RAYEXPAND_FAILPOINT")
    if not setting:
        return
    where, _, action = setting.rpartition(":")
    wanted, _, only = where.partition("@shard=")
    if wanted != point or (only and int(only) != shard):
        return
    if once := os.environ.get("RAYEXPAND_FAILPOINT_ONCE"):
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


class LocalFiles:
    """Files below one folder of a filesystem with hard links. `system` is the os module, replaced in crash tests."""

    parallel = 1

    def __init__(self, root: str | Path, *, single_writer: bool = False, system: Any = os) -> None:
        self.root, self.single_writer, self.system = Path(root), single_writer, system

    def probe(self) -> None:
        """Writes one name twice; the second must be refused. Raises StorageError with the remedy."""
        name = f".tmp/{process_token()}-{uuid.uuid4().hex}"  # the sweep of another driver spares the living
        try:
            for folder in FOLDERS:
                self.make_folder(folder)
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
            raise _named(error, target) from error
        finally:
            self._discard(temporary)
        failpoint(f"after_{step}", shard)
        return won

    def replace(self, name: str, content: bytes, step: str = "file", shard: int | None = None) -> None:
        """Writes or overwrites a cache file, whole at every instant. Never for a commit."""
        temporary = self.root / ".tmp" / f"{process_token()}-{uuid.uuid4().hex[:12]}"
        try:
            failpoint(f"before_{step}", shard)
            self._write(temporary, content)
            self.system.rename(temporary, self.root / name)
        except OSError as error:
            raise _named(error, self.root / name) from error
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
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> IO[bytes]:
        """A seekable reader, so that a footer is read without its images. Raises FileNotFoundError."""
        return (self.root / name).open("rb")

    def list(self, folder: str, prefix: str = "") -> list[str]:
        """Names in a folder that start with `prefix`, unsorted; empty if it is not there."""
        try:
            return [name for name in os.listdir(self.root / folder) if name.startswith(prefix)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def entries(self, folder: str) -> dict[str, Entry]:
        """Files in a folder by name; empty if it is not there."""
        try:
            with os.scandir(self.root / folder) as found:
                return {entry.name: Entry(entry.stat().st_size, entry.stat().st_mtime) for entry in found}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def mark(self, name: str) -> None:
        """Leaves an empty file. It survives this process, not a power cut."""
        try:
            (self.root / name).touch()
        except OSError as error:
            raise _named(error, self.root / name) from error

    def delete(self, *names: str) -> None:
        for name in names:
            (self.root / name).unlink(missing_ok=True)

    def make_folder(self, name: str) -> None:
        folder = self.root / name
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            self._sync_folder(path.parent)

    def at(self, name: str) -> Path:
        return self.root / name


def _named(error: OSError, path: Path) -> OSError | EnvironmentFault:
    """The error as a fault of the environment, if it is one."""
    if error.errno not in _BROKEN:
        return error
    return EnvironmentFault(f"{path}: {error.strerror}. Free space or repair the storage, then run the same command "
                            "again; nothing committed is lost.")


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
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # a zombie is dead, only its parent has not looked yet
    except OSError:
        if Path("/proc/self").exists():
            return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "0"
