"""Artifacts of a study in an object store: fits work on files, so each lies on the driver's disk while the study runs,
and as one object, `artifacts/<kind>-<digest>.tar`, for a driver on another machine.
"""

from __future__ import annotations

import io
import secrets
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

from rayexpand.contract.errors import DamagedFile
from rayexpand.fitting.maker import ARTIFACTS
from rayexpand.storage.files import Files

SUFFIX = ".tar"


def bring(files: Files, out: str) -> None:
    """Unpacks below `out` what is kept and not there. Raises DamagedFile."""
    for name in files.list(ARTIFACTS):
        folder = Path(out, name.removesuffix(SUFFIX))
        if not name.endswith(SUFFIX) or folder.is_dir():
            continue
        partial = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(4)}")
        try:
            with tarfile.open(fileobj=io.BytesIO(files.read(f"{ARTIFACTS}/{name}") or b""), mode="r:") as archive:
                archive.extractall(partial, filter="data")
            partial.rename(folder)
        except tarfile.TarError as error:
            raise DamagedFile(f"{files.at(f'{ARTIFACTS}/{name}')}: is damaged ({error}). Delete it; the same command "
                              "makes it again") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def keep(files: Files, folders: Iterable[Path]) -> None:
    """Stores what is not stored yet, each as a whole."""
    known = set(files.list(ARTIFACTS))
    for folder in folders:
        if (name := f"{folder.resolve().name}{SUFFIX}") not in known:
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as archive:
                archive.add(folder.resolve(), arcname=".")
            files.publish(f"{ARTIFACTS}/{name}", content.getvalue())
