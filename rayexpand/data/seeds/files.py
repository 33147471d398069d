"""Datasets that are a set of files, parquet or tar: one file, a folder, or a pattern, narrowed by data.split."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rayexpand.contract.errors import SeedDataError, few, looked_at
from rayexpand.data.seeds.listing import is_hidden, split_words
from rayexpand.data.seeds.places import Place, blaming, place
from rayexpand.data.seeds.source import DataConfig

_MAGIC = re.compile(r"[*?\[]")


def root(data: DataConfig) -> Place:
    """The folder that file names are relative to."""
    assert data.path is not None
    top = place("data.path", data.path)
    with blaming("data.path", data.path, top):
        if (kind := top.kind()) == "file":
            return top.parent()
        if not kind and _MAGIC.search(top.root):
            parts = top.root.split("/")
            fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
            return Place("/".join(parts[:fixed]), top.fs)
    return top


@dataclass(frozen=True, slots=True)
class DatasetFiles:
    folder: Place  # `root`
    names: list[str]  # of the dataset, relative to it, sorted
    splits: list[str]  # that the file names speak of
    others: list[str]  # beside them, of other kinds

    def left_out(self, data: DataConfig, extension: str) -> list[str]:
        """Files with `extension` at any depth below `folder` that are not of the dataset, but for those whose path
        says another split than data.split."""
        if place("data.path", str(data.path)).kind() != "folder":
            return []
        with blaming("data.path", str(data.path), self.folder):
            found = {name for name in _below(self.folder) if name.endswith(extension)} - {*self.names}
        wanted = {str(data.split).lower()}
        return sorted(name for name in found if data.split is None or not split_words(name) or
                      split_words(name) & wanted)


def _below(folder: Place) -> Iterator[str]:
    """All files at any depth, relative, but hidden ones; links to folders are not followed."""
    if folder.fs is None:
        paths = (os.path.relpath(os.path.join(top, name), folder.root) for top, _, names in os.walk(folder.root)
                 for name in names)
    else:
        paths = (folder.relative(path) for path in folder.fs.find(folder.root))
    return (path for path in paths if not is_hidden(path))


def dataset_files(data: DataConfig, *extensions: str) -> DatasetFiles:
    """The files with one of `extensions` that belong to data.split. A file data.path names itself is taken whatever its
    name. Raises SeedDataError."""
    assert data.path is not None
    folder, top = root(data), place("data.path", data.path)
    with blaming("data.path", data.path, top):
        kind = top.kind()
        if kind == "file":
            return DatasetFiles(folder, [posixpath.basename(top.root)], [], [])
        if kind == "folder":
            folders, top_names = top.names()
            found = {sub: top.at(sub).names()[1] for sub in ("data", data.split) if sub and sub in folders}
            places = [("", top_names), *found.items()]
        elif _MAGIC.search(top.root):
            paths = sorted(glob.glob(top.root) if top.fs is None else top.fs.glob(top.root))
            places = [("", [folder.relative(path) for path in paths])]
        else:
            hint = "braces are not expanded, use a pattern with *" if "{" in data.path else "correct the path"
            raise SeedDataError(f"data.path: '{data.path}' does not exist{looked_at(data.path)}; {hint}")
    return _of_split(data, folder, places, extensions, folders if kind == "folder" else [])


def _of_split(data: DataConfig, folder: Place, places: list[tuple[str, list[str]]], extensions: tuple[str, ...],
              folders: list[str]) -> DatasetFiles:
    """The files of the first of `places` (sub-folder, names) that has any. Without files called `<split>-*` or
    `<split>`, those with the word in their name, such as set-train-0 or Train_0."""
    def stem(name: str) -> str:
        return next(name.removesuffix(extension) for extension in extensions if name.endswith(extension))

    def begins(sub: str, name: str) -> bool:
        base = posixpath.basename(stem(name))
        return data.split is None or sub == data.split or base == data.split or fnmatchcase(base, f"{data.split}-*")

    def says(sub: str, name: str) -> bool:
        return said[sub][name] == str(data.split).lower()

    right = {sub: [name for name in names if name.endswith(extensions)] for sub, names in places}
    said = {sub: dict(zip(names, _splits(map(stem, names)), strict=True)) for sub, names in right.items()}
    for belongs in (begins, says):
        for sub, names in places:
            if found := [name for name in right[sub] if belongs(sub, name)]:
                splits = sorted({*said[sub].values()} - {""})
                if data.split is None and len(splits) > 1:
                    raise SeedDataError(f"data.split: missing, '{data.path}' holds several splits; set it to one of "
                                        f"{few(splits)}")
                return DatasetFiles(folder, [posixpath.join(sub, name) for name in found], splits,
                             [posixpath.join(sub, name) for name in names if not name.endswith(extensions)])
    wanted = f"{data.split}-*{extensions[0]}" if data.split else f"*{extensions[0]}"
    seen = [*folders, *(posixpath.join(sub, name) for sub, names in places for name in names)]
    raise SeedDataError(f"data.path: no file {wanted} in '{data.path}'" + (f" (it has {few(seen)})" if seen else "") +
                        "; correct data.path or data.split")


def _splits(stems: Iterable[str]) -> list[str]:
    """The split that each name says, "" where it says none; a word that all of them have says nothing."""
    said = [split_words(stem) for stem in stems]
    some = [words for words in said if words]
    common = frozenset.intersection(*some) if len({*some}) > 1 else frozenset()
    return [" ".join(sorted(words - common or words)) for words in said]
