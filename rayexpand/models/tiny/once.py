"""Training once what all processes of this machine use: in a folder that appears whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Progress


def trained_once(folder: Path, train: Callable[[Path], None], report: Progress) -> Path:
    """The folder, which `train` fills (under another name) if it is not there.

    Of many processes that ask at once one trains and the others wait. The folder appears by one rename, so a killed
    training leaves nothing that looks finished. Raises ModelError where nothing can be written.
    """
    if folder.is_dir():
        return folder
    _prepare(folder.parent)
    with _locked(folder.with_name(f"{folder.name}.lock"), report):
        if folder.is_dir():
            return folder
        for stale in folder.parent.glob(f"{folder.name}.partial-*"):
            shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
        train(partial)
        os.rename(partial, folder)
    return folder


def _prepare(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise ModelError(f"the embedded models are kept in {root}, which cannot be written; set the environment "
                         "variable RAYEXPAND_CACHE to a folder that can")


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that trains the digits models", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
