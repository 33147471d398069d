"""One folder per class, images at any depth below it. Seed ids are paths, kept without Unicode normalisation.

Links of the dataset are followed, also out of it, as torchvision and timm do. In the index, offset is FOLLOWED for a
row that a link leads out of the dataset: a link that was made later is not followed.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import SeedDataError, few, looked_at
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.listing import (
    EXTENSIONS,
    SPLIT_NAMES,
    Listing,
    Read,
    Skipped,
    fault_code,
    split_words,
    unique_ids,
)
from rayexpand.data.seeds.places import Place, blaming, inside, is_folder, place, read_below
from rayexpand.data.seeds.source import DataConfig

FOLLOWED = 1


@dataclass(frozen=True, slots=True)
class _Found:
    path: str  # below the folder of the class folders
    fault: str = ""
    followed: bool = False


def check(data: DataConfig) -> tuple[Place, list[str]]:
    """The folder of the class folders, and their names in label order. Raises SeedDataError."""
    assert data.path is not None
    top = root(data)
    with blaming("data.path", data.path, top):
        if (kind := top.kind()) != "folder":
            what = "is a file, not a folder of class folders; unpack it" if kind else (
                f"does not exist{looked_at(data.path)}; correct the path")
            raise SeedDataError(f"data.path: '{data.path}' {what}")
        folder = top.at(data.split or "")
        if data.split and folder.kind() != "folder":
            raise SeedDataError(f"data.split: no folder '{data.split}' in '{data.path}'; it has {few(top.names()[0])}")
        folders, others = folder.names()
        if folder.fs is None:
            _refuse_lost([name for name in others if _is_lost(os.path.join(folder.root, name), dots=True)], folder.root)
    if not folders:
        raise SeedDataError(f"data.path: no class folder in '{folder.root}'; put images into <class>/<image>")
    if not data.split and set(map(str.lower, folders)) <= SPLIT_NAMES:
        raise SeedDataError(f"data.split: missing, the folders of '{data.path}' are splits, not classes; set "
                            f"data.split to one of {few(folders)}")
    if not data.split:
        with blaming("data.path", data.path, folder):
            _refuse_splits(data, folder, [name for name in folders if split_words(name)])
    return folder, folders


def _refuse_splits(data: DataConfig, folder: Place, named: list[str]) -> None:
    """`named` are called like splits. They are splits, whatever lies beside them, where they hold folders rather than
    images; a class may be called `test tube`."""
    if len({split_words(name) for name in named}) < 2:
        return
    content = {name: folder.at(name).names() for name in named}
    splits = [name for name, (folders, files) in content.items()
              if folders and not any(file.lower().endswith(EXTENSIONS) for file in files)]
    if len({split_words(name) for name in splits}) > 1:
        raise SeedDataError(f"data.split: missing, {few(splits)} in '{data.path}' are splits, not classes; set "
                            "data.split to one of them")


def root(data: DataConfig) -> Place:
    assert data.path is not None
    return place("data.path", data.path)


def list_seeds(data: DataConfig) -> Listing:
    assert data.path is not None
    folder, classes = check(data)
    skipped = Skipped()
    with blaming("data.path", data.path, folder):
        if folder.fs is None:
            boundary = os.path.realpath(root(data).root)
            above = frozenset([os.path.realpath(folder.root)])
            found = {name: sorted(_walk(folder.root, name, boundary, above, skipped),
                                  key=lambda one: (one.path, one.fault)) for name in classes}
        else:
            found = _find_remote(folder, classes, skipped)
        skipped.add(folder.names()[1])
    rows = [one for name in classes for one in found[name]]
    paths = [one.path for one in rows]
    faults = np.fromiter((fault_code(one.fault) for one in rows), np.int8)
    offset = np.fromiter((FOLLOWED if one.followed else -1 for one in rows), np.int32)
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
                   nowhere, offset, skipped=skipped)


def splits(data: DataConfig) -> list[str]:
    """Folders that data.split may name; none where the classes lie at the top."""
    return root(data).names()[0] if data.split else []


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    def read(row: dict[str, Any]) -> bytes:
        path = posixpath.join(files[row["file"]], row["member"])
        return folder.at(path).read() if row["offset"] == FOLLOWED else read_below(folder, path, row["seed_id"])

    return read


def _walk(top: str, folder: str, boundary: str, above: frozenset[str], skipped: Skipped) -> Iterator[_Found]:
    """The images in `folder`, any depth. `above` are the real folders it lies in: one of them is not entered again, and
    a link to a folder that holds one of them is one refused seed."""
    real = os.path.realpath(os.path.join(top, folder))
    if real in above:
        return
    if any(inside(one, real) for one in above):
        yield _Found(folder, Reason.UNSAFE_PATH)
        return
    outside = not inside(real, boundary)
    with os.scandir(os.path.join(top, folder)) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                yield from _walk(top, path, boundary, above | {real}, skipped)
            elif entry.name.lower().endswith(EXTENSIONS):
                leads_out = entry.is_symlink() and not inside(os.path.realpath(entry.path), boundary)
                yield _Found(path, _file_fault(entry), outside or leads_out)
            elif entry.is_symlink() and _is_lost(entry.path):
                _refuse_lost([entry.name], os.path.join(top, folder))
            else:
                skipped.add([path])


def _is_lost(path: str, dots: bool = False) -> bool:
    """Whether it is a link to nothing whose name is no file's: a folder that is not mounted, or was moved. `dots`: the
    name of a class folder may have some, only that of an image is a file's."""
    name = os.path.basename(path).lower()
    is_file = name.endswith(EXTENSIONS) if dots else "." in name
    return not is_file and os.path.islink(path) and not os.path.exists(path)


def _refuse_lost(names: list[str], folder: str) -> None:
    if names:
        raise SeedDataError(f"data.path: {len(names)} links in '{folder}' lead to nothing ({few(names)}); mount or "
                            "restore the folders they name, or remove the links")


def _file_fault(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink() and not os.path.exists(entry.path):
        return Reason.MISSING
    return "" if entry.is_file() else Reason.UNREADABLE


def _find_remote(folder: Place, classes: list[str], skipped: Skipped) -> dict[str, list[_Found]]:
    found: dict[str, list[_Found]] = {name: [] for name in classes}
    for path in sorted(folder.fs.find(folder.root)):
        relative = folder.relative(path)
        parts = relative.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if len(parts) < 2 or parts[0] not in found or hidden:
            continue
        if relative.lower().endswith(EXTENSIONS):
            found[parts[0]].append(_Found(relative))
        else:
            skipped.add([relative])
    return found
