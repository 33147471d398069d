"""One folder per class, images at any depth below it. Seed ids are paths, kept without Unicode normalisation."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.listing import EXTENSIONS, SPLIT_NAMES, Listing, Read, fault_code, unique_ids
from rayexpand.data.seeds.places import Place, blaming, inside, is_folder, place, read_below
from rayexpand.data.seeds.source import DataConfig


def check(data: DataConfig) -> tuple[Place, list[str]]:
    """The folder of the class folders, and their names in label order. Raises SeedDataError."""
    assert data.path is not None
    top = root(data)
    with blaming("data.path", data.path, top):
        if (kind := top.kind()) != "folder":
            what = "is a file, not a folder of class folders; unpack it" if kind else "does not exist; correct the path"
            raise SeedDataError(f"data.path: '{data.path}' {what}")
        folder = top.at(data.split or "")
        if data.split and folder.kind() != "folder":
            raise SeedDataError(f"data.split: no folder '{data.split}' in '{data.path}'; it has {few(top.names()[0])}")
        folders = folder.names()[0]
    if not folders:
        raise SeedDataError(f"data.path: no class folder in '{folder.root}'; put images into <class>/<image>")
    if not data.split and set(map(str.lower, folders)) <= SPLIT_NAMES:
        raise SeedDataError(f"data.split: missing, the folders of '{data.path}' are splits, not classes; set "
                            f"data.split to one of {few(folders)}")
    return folder, folders


def root(data: DataConfig) -> Place:
    assert data.path is not None
    return place("data.path", data.path)


def list_seeds(data: DataConfig) -> Listing:
    assert data.path is not None
    folder, classes = check(data)
    with blaming("data.path", data.path, folder):
        if folder.fs is None:
            boundary = os.path.realpath(root(data).root)
            found = {name: sorted(_walk(folder.root, name, boundary, frozenset())) for name in classes}
        else:
            found = _find_remote(folder, classes)
    paths = [path for name in classes for path, _ in found[name]]
    faults = np.fromiter((fault_code(fault) for name in classes for _, fault in found[name]), np.int8)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found[name]) for name in classes])
    try:
        members = ids = pa.array(paths, pa.string())
    except UnicodeEncodeError:
        readable = [os.fsencode(path).decode(errors="backslashreplace") for path in paths]
        odd = np.fromiter((a != b for a, b in zip(paths, readable, strict=True)), bool)
        faults[odd & (faults == 0)] = fault_code(Reason.UNREADABLE)
        members = ids = unique_ids(pa.array(readable, pa.string()))[0]
        classes = [os.fsencode(name).decode(errors="backslashreplace") for name in classes]
    nowhere = np.full(len(paths), -1, np.int32)
    return Listing(ids, labels, faults, classes, classes, [data.split or ""], np.zeros(len(paths), np.int32), members,
                   nowhere, nowhere)


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    def read(row: dict[str, Any]) -> bytes:
        return read_below(folder, posixpath.join(files[row["file"]], row["member"]), row["seed_id"])

    return read


def _walk(top: str, folder: str, boundary: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(path below top, fault) of the images in `folder`, any depth. A link out of the dataset is one refused seed and
    is not followed; a folder that contains itself through links is entered once."""
    real = os.path.realpath(os.path.join(top, folder))
    if not inside(real, boundary):
        yield folder, Reason.UNSAFE_PATH
        return
    if real in above:
        return
    with os.scandir(os.path.join(top, folder)) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                yield from _walk(top, path, boundary, above | {real})
            elif entry.name.lower().endswith(EXTENSIONS):
                yield path, _file_fault(entry, boundary)


def _file_fault(entry: os.DirEntry[str], boundary: str) -> str:
    if entry.is_symlink() and not inside(os.path.realpath(entry.path), boundary):
        return Reason.UNSAFE_PATH
    if entry.is_symlink() and not os.path.exists(entry.path):
        return Reason.MISSING
    return "" if entry.is_file() else Reason.UNREADABLE


def _find_remote(folder: Place, classes: list[str]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in classes}
    for path in sorted(folder.fs.find(folder.root)):
        relative = path[len(folder.root) + 1:]
        parts = relative.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if len(parts) > 1 and parts[0] in found and not hidden and relative.lower().endswith(EXTENSIONS):
            found[parts[0]].append((relative, ""))
    return found
