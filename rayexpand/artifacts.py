"""Artifacts: what `rayexpand fit` makes from a dataset, as folders that are found again by what they were made from.

    <out>/prototypes-1f0c9a3e/artifact.json             what it was made from, and what that cost
                              prototypes.safetensors
    <out>/classifier-07d2b4aa/guide.json, ...           a guide (guide_files.py), with its artifact.json

A folder is made under another name and renamed when it is whole: a killed fit leaves nothing that looks finished. What
a run depends on is the content of an artifact, not where it lies.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rayexpand import __version__
from rayexpand.config import RunConfig, digest
from rayexpand.core.prototypes import Prototypes, load_prototypes
from rayexpand.errors import ModelError, StorageError
from rayexpand.guide_files import check_guide, class_difference, class_problem, guide_classes, present_guide
from rayexpand.guides import guide_hash
from rayexpand.priors import MAKING_OF, folder_hash
from rayexpand.store import is_url

PROTOTYPES = "prototypes.safetensors"


def publish(out: str, kind: str, made_from: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Path:
    """The folder of the artifact that follows from `made_from`; `make(folder)` fills it where there is none yet and
    returns facts for its artifact.json. Of many processes that ask at once, one makes it. Raises StorageError."""
    from filelock import FileLock

    if is_url(out):
        raise StorageError(f"out: {out} is an object store; artifacts are read as files, so give a folder. A cluster's "
                           "nodes get copies of them.")
    root, identity = Path(out), digest({"kind": kind, **made_from})
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
        try:
            facts = {"kind": kind, "digest": identity, "made_from": made_from, **_timed(make, partial)}
            with _writing(folder):
                (partial / MAKING_OF).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
                os.rename(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"out: {folder} cannot be written ({error}); free space, or choose another `out`") from error


def _timed(make: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Facts of the making with what it cost; those of `make` may hold the CPU and GPU seconds of other processes."""
    wall, cpu = time.perf_counter(), time.process_time()
    facts = make(folder)
    seconds = time.perf_counter() - wall
    facts["cpu_seconds"] = time.process_time() - cpu + facts.get("cpu_seconds", 0.0)
    facts.setdefault("gpu_seconds", seconds if facts.get("device") == "cuda" else 0.0)
    return {**facts, "seconds": seconds, "created": time.time(), "version": __version__, "host": socket.gethostname()}


def _known(folder: Path, identity: str) -> Path:
    if read_facts(folder).get("digest") != identity:
        raise StorageError(f"out: {folder} holds another artifact whose digest begins alike, or was changed by hand; "
                           "move it away and run the same command again")
    return folder


def read_facts(folder: Path | str) -> dict[str, Any]:
    """artifact.json of a folder, {} where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((Path(folder) / MAKING_OF).read_text()))
    return {}


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


# ---------------------------------------------------------------------------------------------------- of a run's config


def artifact_hashes(config: RunConfig) -> dict[str, str]:
    """Content hashes of the artifacts the method uses. Raises ModelError."""
    if "prototypes" not in config.method.needs():
        return {}
    return {"prototypes": prototypes_hash(_prototypes_folder(config))}


def prototypes_hash(folder: Path) -> str:
    """Content hash of a folder of prototypes. Raises ModelError."""
    if not (folder / PROTOTYPES).is_file():
        raise ModelError(f"artifacts.prototypes: {folder} has no {PROTOTYPES}; give a folder that `rayexpand fit` made")
    return folder_hash(folder)


def prototypes_of(config: RunConfig, class_keys: Sequence[str], guide: str | None = None) -> Prototypes:
    """The prototypes of a run, for its guide (content hash, if known) and classes. Raises ModelError."""
    if guide is None:
        guide = guide_hash(config.guide.weights, config.guide.checkpoint)
    return load_prototypes(_prototypes_folder(config) / PROTOTYPES, guide_hash=guide, class_keys=class_keys)


def check_artifacts(config: RunConfig) -> list[str]:
    """What is wrong with guide and prototypes of a run as far as files on this machine say, one line each; nothing is
    loaded, trained or downloaded, and no dataset is listed."""
    needs = config.method.needs()
    problems = []
    if "guide" in needs:
        problems += [f"guide.weights: {one}" for one in check_guide(config.guide.weights, config.guide.checkpoint)]
    if "prototypes" in needs:
        problems += _prototypes_problems(config, guide_is_sound=not problems)
    return problems


def _prototypes_problems(config: RunConfig, *, guide_is_sound: bool) -> list[str]:
    if config.artifacts.prototypes is None:
        return [f"artifacts.prototypes: {config.method.name} needs prototypes of the training images and none are "
                "named; make them with `rayexpand fit` and this same file, and set artifacts.prototypes to the folder "
                "it prints"]
    folder = _prototypes_folder(config)
    if not (folder / PROTOTYPES).is_file():
        return [f"artifacts.prototypes: {folder} has no {PROTOTYPES}; make it with `rayexpand fit` and this same file, "
                "or give a folder that it made"]
    made_with = read_facts(folder).get("made_from", {}).get("guide_sha256")
    here = present_guide(config.guide.weights)
    if not made_with or here is None or not guide_is_sound or (own := folder_hash(here)) == made_with:
        return []
    return [f"artifacts.prototypes: {folder} holds features of guide {made_with[:12]}, but guide.weights "
            f"{config.guide.weights} is guide {own[:12]}; features of two guides cannot be compared: name the guide "
            "they were made with, or make them again with `rayexpand fit` and this same file"]


def names_classes(config: RunConfig) -> bool:
    """Whether guide or prototypes say for which classes they were made, so that a list of those is worth making."""
    return bool(_declared(config))


def check_classes(config: RunConfig, class_keys: Sequence[str]) -> list[str]:
    """Where guide or prototypes were made for other classes than the dataset's, one line each."""
    problems = []
    for field, (folder, own) in _declared(config).items():
        if field == "guide.weights":
            problems += [f"{field}: {problem}"] if (problem := class_problem(folder, class_keys)) else []
        elif difference := class_difference(own, class_keys):
            problems.append(f"{field}: {folder} was made for other classes than the dataset has: {difference}. Make "
                            "them on this dataset with `rayexpand fit` and this same file")
    return problems


def _declared(config: RunConfig) -> dict[str, tuple[Path, Sequence[str]]]:
    """(folder, class keys) by the field that names it, for what declares its classes."""
    needs, found = config.method.needs(), dict[str, tuple[Path, Sequence[str]]]()
    with contextlib.suppress(ModelError):
        if "guide" in needs and (folder := present_guide(config.guide.weights)) and (own := guide_classes(folder)):
            found["guide.weights"] = (folder, own)
    if "prototypes" in needs and config.artifacts.prototypes is not None:
        folder = _prototypes_folder(config)
        if own := read_facts(folder).get("made_from", {}).get("data", {}).get("classes"):
            found["artifacts.prototypes"] = (folder, own)
    return found


def _prototypes_folder(config: RunConfig) -> Path:
    if config.artifacts.prototypes is None:
        raise ModelError(f"artifacts.prototypes: is not set, and {config.method.name} needs prototypes; make them with "
                         "`rayexpand fit`")
    return Path(config.artifacts.prototypes).expanduser()
