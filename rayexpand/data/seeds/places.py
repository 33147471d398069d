"""Where seeds lie: a file or folder, local or behind fsspec, and what a failed read says about it."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import EnvironmentFault, RayexpandError, RowFault, SeedDataError, looked_at
from rayexpand.contract.schema import Reason

_MISSING_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_UNREADABLE_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO})


class NotRegular(OSError):
    """A pipe, socket or device, which would wait for a writer, or never end."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.ENXIO, "a pipe, socket or device, not a regular file", path)


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder, local (`fs` None) or behind fsspec."""

    root: str
    fs: Any = None

    def at(self, *parts: str) -> Place:
        """A root of "" is that of an archive, whose names begin without a slash."""
        above = [self.root.rstrip("/") if any(parts) else self.root] if self.root else []
        return Place("/".join([*above, *filter(None, parts)]), self.fs)

    def parent(self) -> Place:
        return Place(self.root.rpartition("/")[0] or ("/" if self.fs is None else ""), self.fs)

    def relative(self, path: str) -> str:
        """A path that the file system lists below this folder, from here; a zip has no slash before its names."""
        return path.lstrip("/").removeprefix(f"{self.root.strip('/')}/" if self.root.strip("/") else "")

    def kind(self) -> str:
        """"file", "folder" or "" when there is nothing."""
        if self.fs is None:
            try:
                return "folder" if stat.S_ISDIR(os.stat(self.root).st_mode) else "file"
            except (FileNotFoundError, NotADirectoryError):
                return ""
        return "folder" if self.fs.isdir(self.root) else "file" if self.fs.isfile(self.root) else ""

    def names(self) -> tuple[list[str], list[str]]:
        """Visible folders and files right below, sorted."""
        if self.fs is None:
            with os.scandir(self.root) as entries:
                found = [(entry.name, is_folder(entry)) for entry in entries]
        else:
            found = [(posixpath.basename(entry["name"].rstrip("/")), entry["type"] == "directory")
                     for entry in self.fs.ls(self.root, detail=True)]
        seen = sorted((name, is_dir) for name, is_dir in found if name and not name.startswith("."))
        return [name for name, is_dir in seen if is_dir], [name for name, is_dir in seen if not is_dir]

    def open(self) -> IO[bytes]:
        """Raises NotRegular at once for a local file that cannot be read to its end."""
        return _open_regular(self.root) if self.fs is None else self.fs.open(self.root, "rb")

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()

    def read_range(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`, fewer where the file ends before; one request on an object store."""
        if self.fs is not None:
            return self.fs.cat_file(self.root, start=start, end=start + size)
        with self.open() as file:
            file.seek(start)
            return file.read(size)


def place(field: str, path: str) -> Place:
    """The place a path or URL names. Raises SeedDataError naming `field` for a URL that no storage package serves."""
    if "://" not in path:
        return Place(os.path.abspath(os.path.expanduser(path)))
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise SeedDataError(f"{field}: '{path}' cannot be opened ({error}); install the storage package it names, for "
                            "example rayexpand[s3], or correct the URL") from error
    except FileNotFoundError as error:
        raise SeedDataError(f"{field}: '{path}' does not exist, or cannot be reached ({error.__cause__ or error}); "
                            "correct the path") from error
    except OSError as error:
        raise EnvironmentFault(f"{field}: '{path}' cannot be reached now: {error!r}; check storage and credentials, "
                               "then run the same command again") from error
    if "file" in np.atleast_1d(fs.protocol):
        return Place(root.rstrip("/") or "/")
    return Place(root.rstrip("/"), fs)


def _open_regular(path: str) -> IO[bytes]:
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK a pipe waits for a writer
    mode = os.fstat(file).st_mode
    if stat.S_ISREG(mode):
        return open(file, "rb")
    os.close(file)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path) if stat.S_ISDIR(mode) else NotRegular(path)


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def inside(real: str, boundary: str) -> bool:
    return real == boundary or real.startswith(boundary.rstrip("/") + "/")


def read_below(folder: Place, path: str, seed_id: str) -> bytes:
    """Bytes of a file below `folder`. Raises RowFault(unsafe_path) where links lead elsewhere."""
    file = folder.at(path)
    if file.fs is None and not inside(os.path.realpath(file.root), os.path.realpath(folder.root)):
        raise RowFault(Reason.UNSAFE_PATH, f"{seed_id}: '{path}' leaves the dataset folder; copy the image into it")
    return file.read()


def reason_of(error: Exception, remote: bool) -> Reason | None:
    """What a failed read says about its file; None where it says something about the storage instead."""
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError) or number in _MISSING_ERRNOS:
        return Reason.MISSING
    if isinstance(error, TimeoutError | ConnectionError):
        return None
    if number in _UNREADABLE_ERRNOS or isinstance(error, PermissionError | IsADirectoryError):
        return None if remote and not isinstance(error, IsADirectoryError) else Reason.UNREADABLE
    if isinstance(error, pa.ArrowException) or (isinstance(error, OSError) and number is None and not remote):
        return Reason.UNREADABLE  # pyarrow reports damaged files as plain OSError
    return None


@contextmanager
def blaming(field: str, path: str, where: Place) -> Iterator[None]:
    """Turns what goes wrong while the dataset itself is opened or listed into an error for people."""
    try:
        yield
    except RayexpandError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError | pa.ArrowException) or where.fs is not None):
            raise
        reason = reason_of(error, where.fs is not None)
        if reason is None:
            raise EnvironmentFault(f"{field}: '{path}' cannot be reached now: {error!r}; check storage and "
                                   "credentials, then run the same command again") from error
        what = f"does not exist{looked_at(path)}" if reason is Reason.MISSING else f"cannot be read ({error})"
        raise SeedDataError(f"{field}: '{path}' {what}; correct the path or its permissions") from error


def read_bytes(field: str, path: str) -> bytes:
    """Content of a file the user names in `field`. Raises SeedDataError, EnvironmentFault."""
    where = place(field, path)
    with blaming(field, path, where):
        return where.read()


def read_text(field: str, path: str) -> str:
    """UTF-8 text of a file the user names in `field`. Raises SeedDataError, EnvironmentFault."""
    try:
        return read_bytes(field, path).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SeedDataError(f"{field}: '{path}' is not UTF-8 text ({error}); save it as UTF-8") from error
