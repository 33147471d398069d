"""Opens a folder by its path or URL."""

from __future__ import annotations

import re
from pathlib import Path

from rayexpand.storage.files import Files, LocalFiles

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://(.*)$")


def is_url(folder: str | Path) -> bool:
    """Whether a run folder is the URL of an object store and not a path."""
    return isinstance(folder, str) and _URL.match(folder) is not None


def open_files(folder: str | Path, *, single_writer: bool = False) -> Files:
    """The files of a run folder: a local path, s3://bucket/prefix or gs://bucket/prefix. Nothing is asked yet.

    Raises StorageError for any other URL, and where the package of the store is not installed.
    """
    if not is_url(folder):
        return LocalFiles(folder, single_writer=single_writer)
    from rayexpand.storage.objects import ObjectFiles

    return ObjectFiles.of(str(folder), single_writer=single_writer)
