"""Artifact folders: written once under the hash of what they were made from, found by it again."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rayexpand import __version__
from rayexpand.contract.errors import DamagedFile, StorageError
from rayexpand.contract.settings import differences, digest
from rayexpand.storage.places import is_url
from rayexpand.storage.tables import sealed, unsealed

log = logging.getLogger(__name__)

LENGTH = re.compile(r"(^|[._])(steps|epochs|updates)$")  # fields that say how long a training is
MAKING_OF = "artifact.json"  # how `rayexpand fit` made a folder, seconds among it: no part of the model


AGAIN = "Restore it from a copy, or move the folder away: `rayexpand fit` makes the same one again"


def content_files(folder: Path) -> list[str]:
    """Names of the files of a folder that count as its content: not how it was made."""
    return sorted(file.name for file in folder.iterdir()
                  if file.suffix in (".json", ".txt", ".safetensors") and file.name != MAKING_OF)


def file_sha256(file: Path) -> str:
    """sha256 of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_hash(folder: Path, names: Iterable[str], sha256: Callable[[Path], str] = file_sha256) -> str:
    """sha256 over (name, sha256) of these files, in this order; `sha256` gives that of each. Raises DamagedFile where
    the artifact.json beside them says that one is not what was written."""
    hasher, stated = hashlib.sha256(), read_facts(folder).get("files", {})
    for name in names:
        found = sha256(folder / name)
        if stated.get(name, found) != found:
            raise DamagedFile(f"{folder / name}: is damaged, or was changed by hand. {AGAIN}")
        hasher.update(f"{name}\0{found}\n".encode())
    return hasher.hexdigest()


def named_hash(files: Mapping[str, Path], sha256: Callable[[Path], str] = file_sha256) -> str:
    """sha256 over the sorted (name, sha256) of files that lie in several places."""
    hasher = hashlib.sha256()
    for name, file in sorted(files.items()):
        hasher.update(f"{name}\0{sha256(file)}\n".encode())
    return hasher.hexdigest()


def publish(out: str, kind: str, made_from: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder of the artifact that follows from `made_from`; `make(folder)` fills it where there is none yet and
    returns facts for its artifact.json. Of many processes that ask at once, one makes it. Raises StorageError."""
    from filelock import FileLock

    if is_url(out):
        raise StorageError(f"out: {out} is an object store; artifacts are read as files, so give a folder. A cluster's "
                           "nodes get copies of them.")
    root, identity = Path(out), artifact_digest(kind, made_from)
    folder = root / f"{kind}-{identity[:8]}"
    if folder.is_dir():
        return _known(folder, identity)
    with _writing(folder):
        root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        if folder.is_dir():
            return _known(folder, identity)
        with _writing(folder):
            for stale in root.glob(f".{folder.name}.partial-*"):
                shutil.rmtree(stale)
            partial = root / f".{folder.name}.partial-{secrets.token_hex(4)}"
            partial.mkdir()
        _say_what_is_not_continued(folder, kind, made_from)
        try:
            facts = {"kind": kind, "digest": identity, "made_from": made_from, **_timed(make, partial)}
            with _writing(folder):
                facts["files"] = {str(file.relative_to(partial)): file_sha256(file)
                                  for file in sorted(partial.rglob("*")) if file.is_file()}
                (partial / MAKING_OF).write_bytes(sealed(MAKING_OF, facts))
                os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _say_what_is_not_continued(folder: Path, kind: str, made_from: dict[str, Any]) -> None:
    """Names a finished training that differs in its length alone: the rates of a training follow from all its steps, so
    a longer one is another one."""
    for other, facts in neighbours(folder.parent, kind):
        changed = differences(facts.get("made_from", {}), made_from)
        if changed and all(LENGTH.search(line.partition(":")[0]) for line in changed):
            log.warning("%s is trained from its beginning: a training is planned over all its steps, so nothing is "
                        "continued of %s (%s), which stays", folder.name, other.name, ", ".join(changed))


def neighbours(out: Path, kind: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Artifacts of a kind with their facts. One that is damaged, or of somebody else, says nothing and ends nothing."""
    for folder in sorted(out.glob(f"{kind}-*")):
        with contextlib.suppress(StorageError):
            yield folder, read_facts(folder)


def artifact_digest(kind: str, made_from: dict[str, Any]) -> str:
    """What tells an artifact from every other one; its first eight digits are in the name of its folder."""
    return digest({"kind": kind, **made_from})


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"out: {folder} cannot be written ({error}); free space, or choose another `out`") from error


def _timed(make: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Facts of the making with what it cost; those of `make` may hold the CPU, GPU and process seconds of other
    processes."""
    wall, cpu = time.perf_counter(), time.process_time()
    facts = make(folder)
    seconds = time.perf_counter() - wall
    facts["cpu_seconds"] = time.process_time() - cpu + facts.get("cpu_seconds", 0.0)
    facts.setdefault("process_seconds", seconds)
    facts.setdefault("gpu_seconds", seconds if facts.get("device") == "cuda" else 0.0)
    return {**facts, "seconds": seconds, "created": time.time(), "version": __version__, "host": socket.gethostname()}


def _known(folder: Path, identity: str) -> Path:
    facts = read_facts(folder)
    if facts.get("digest") != identity:
        raise StorageError(f"out: {folder} holds another artifact whose digest begins alike, or its artifact.json was "
                           "changed by hand; move the folder away and run the same command again")
    if gone := [name for name in facts.get("files", {}) if not (folder / name).is_file()]:
        raise DamagedFile(f"{folder / gone[0]}: is gone. {AGAIN}")
    files_hash(folder, facts.get("files", {}))
    return folder


def read_facts(folder: Path | str) -> dict[str, Any]:
    """artifact.json of a folder, {} where there is none. Raises DamagedFile where it is not what was written."""
    file = Path(folder) / MAKING_OF
    try:
        return unsealed(MAKING_OF, file.read_bytes(), file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except DamagedFile as error:
        raise DamagedFile(f"{error}. {AGAIN}") from error
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror or error}); give this user the right to read it") \
            from error


def process_seconds(folder: Path | str) -> float:
    """Seconds of every process that made an artifact, summed; 0 for a folder that `fit` did not make."""
    facts = read_facts(folder)
    before = facts.get("training_seconds", facts.get("seconds", 0.0)) * max(1, facts.get("workers") or 1)
    return float(facts.get("process_seconds", before))  # a folder of an earlier version


def point(out: str, name: str, folder: Path) -> Path:
    """Makes <out>/<name> a link to an artifact, in place of an older link. Raises StorageError."""
    link, partial = Path(out) / name, Path(out) / f".{name}.{secrets.token_hex(4)}"
    try:
        partial.symlink_to(folder.name)
        os.replace(partial, link)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"out: {link} cannot become a link to {folder.name} ({error}); move away what is there, or "
                           "choose another `name`") from error
    return link
