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
    is_hidden,
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
    """`named` are called like splits. They are splits, whatever lies beside them, where they hold more folders than
    images; a class may be called `test tube`."""
    if len({split_words(name) for name in named}) < 2:
        return
    content = {name: folder.at(name).names() for name in named}
    splits = [name for name, (folders, files) in content.items()
              if len(folders) > sum(file.lower().endswith(EXTENSIONS) for file in files)]
    if len({split_words(name) for name in splits}) > 1:
        raise SeedDataError(f"data.split: missing, {few(splits)} in '{data.path}' are splits, not classes; set "
                            "data.split to one of them")


def _refuse_lost_splits(data: DataConfig, paths: list[str]) -> None:
    """Raises SeedDataError for a split folder beside others, for splits inside of the class folders, and where most
    images have a split in their names: all would be one dataset."""
    alone = [top for top, (images, folders) in _within(paths).items()
             if top.lower() in SPLIT_NAMES and images < len(folders)]
    if alone and any(path.split("/")[0] not in alone for path in paths):
        raise SeedDataError(f"data.split: missing, {few(alone)} in '{data.path}' holds folders rather than images, so "
                            f"it is a split, not a class; set data.split to {few(alone)}, or put the images of a "
                            "class of that name right into its folder")
    inner = {part for path in paths for part in path.split("/")[1:-1] if part.lower() in SPLIT_NAMES}
    if len({part.lower() for part in inner}) > 1:
        raise SeedDataError(f"data.split: {few(sorted(inner))} lie inside of the class folders of '{data.path}'; "
                            "arrange them as <split>/<class>/<image> (links will do) and name one, or list the seeds "
                            "of one in data.ids")
    said: dict[str, set[frozenset[str]]] = {}
    saying = 0
    for path in paths:
        words = split_words(posixpath.splitext(posixpath.basename(path))[0])
        said.setdefault(path.partition("/")[0], set()).add(words)
        saying += bool(words)
    mixed = sorted({word for of_class in said.values() if len(of_class - {frozenset()}) > 1
                    for words in of_class for word in words})
    if mixed and 2 * saying > len(paths):  # in one class: those of a class may be called like it
        raise SeedDataError(f"data.split: the names of {saying} of {len(paths)} images in '{data.path}' say one of "
                            f"{few(mixed)}; arrange them as <split>/<class>/<image> (links will do) and name one, or "
                            "list the seeds of one in data.ids")


def _refuse_one_above(data: DataConfig, paths: list[str]) -> None:
    """Raises SeedDataError where the one class folder holds folders rather than images, so that data.path is too high.
    data.classes may name it a class."""
    above: list[str] = []
    while True:
        deeper = [path for path in paths if "/" in path]
        tops = sorted({path.partition("/")[0] for path in deeper})
        if len(tops) != 1:
            break
        above += tops
        paths = [path.partition("/")[2] for path in deeper] + [""] * (len(paths) - len(deeper))
    if above and data.classes is None and len(tops) > len(paths) - len(deeper):
        below = "this folder" if data.split or "::" in str(data.path) else posixpath.join(str(data.path), *above)
        raise SeedDataError(f"data.path: '{data.path}' holds one folder, '{'/'.join(above)}', and that holds folders "
                            f"rather than images ({few(tops)}), so all would be of one class; set data.path to {below}"
                            ", or name the class in data.classes if it is one")


def _within(paths: list[str]) -> dict[str, tuple[int, list[str]]]:
    """Top folder -> number of the images right in it, and the folders in it that have images."""
    found: dict[str, list[str]] = {}
    for path in paths:
        top, _, below = path.partition("/")
        found.setdefault(top, []).append(below.rpartition("/")[0].partition("/")[0])
    return {top: (inner.count(""), sorted({*inner} - {""})) for top, inner in found.items()}


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
            with os.scandir(folder.root) as entries:
                for entry in entries:
                    skipped.add(_hidden_images(entry, entry.name))
        else:
            found = _find_remote(folder, classes, skipped)
        skipped.add(folder.names()[1])
    rows = [one for name in classes for one in found[name]]
    paths = [one.path for one in rows]
    if data.ids is None and data.split is None:
        _refuse_lost_splits(data, paths)
    _refuse_one_above(data, paths)
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
                skipped.add(_hidden_images(entry, path))
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


def _hidden_images(entry: os.DirEntry[str], path: str) -> Iterator[str]:
    """Paths of the images that a hidden file or folder is or holds; links to folders are not followed."""
    if entry.name.startswith("."):
        names = [path] if not entry.is_dir(follow_symlinks=False) else [
            posixpath.join(path, os.path.relpath(os.path.join(folder, name), entry.path))
            for folder, _, names in os.walk(entry.path) for name in names]
        yield from (name for name in names if name.lower().endswith(EXTENSIONS))


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
        top, _, below = relative.partition("/")
        is_image = relative.lower().endswith(EXTENSIONS)
        if is_hidden(relative):
            skipped.add([relative] if is_image else [])
        elif not below or top not in found:
            continue
        elif is_image:
            found[top].append(_Found(relative))
        else:
            skipped.add([relative])
    return found
