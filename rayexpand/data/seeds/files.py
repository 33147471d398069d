"""Datasets that are a set of files, parquet or tar: one file, a folder, or a pattern, narrowed by data.split."""

from __future__ import annotations

import glob
import posixpath
import re
from fnmatch import fnmatchcase

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.data.seeds.listing import SPLIT_NAMES
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


def dataset_files(data: DataConfig, *extensions: str) -> tuple[Place, list[str]]:
    """`root` and the files with one of `extensions` that belong to data.split, relative to it, sorted.

    A file data.path names itself is taken whatever its name. Raises SeedDataError.
    """
    assert data.path is not None
    folder, top = root(data), place("data.path", data.path)
    with blaming("data.path", data.path, top):
        kind = top.kind()
        if kind == "file":
            return folder, [posixpath.basename(top.root)]
        if kind == "folder":
            folders, top_names = top.names()
            found = {sub: top.at(sub).names()[1] for sub in ("data", data.split) if sub and sub in folders}
            places = [("", top_names), *found.items()]
        elif _MAGIC.search(top.root):
            paths = sorted(glob.glob(top.root) if top.fs is None else top.fs.glob(top.root))
            places = [("", [folder.relative(path) for path in paths])]
        else:
            hint = "braces are not expanded, use a pattern with *" if "{" in data.path else "correct the path"
            raise SeedDataError(f"data.path: '{data.path}' does not exist; {hint}")
    return folder, _of_split(data, places, extensions)


def _of_split(data: DataConfig, places: list[tuple[str, list[str]]], extensions: tuple[str, ...]) -> list[str]:
    """The files of the first of `places` (sub-folder, names) that has any."""
    def stem(name: str) -> str:
        base = posixpath.basename(name)
        return next(base.removesuffix(extension) for extension in extensions if base.endswith(extension))

    for sub, names in places:
        found = [name for name in names if name.endswith(extensions) and (
            data.split is None or sub == data.split or fnmatchcase(stem(name), f"{data.split}-*") or
            stem(name) == data.split)]
        splits = sorted({re.sub(r"-\d.*$", "", stem(name)) for name in found} & SPLIT_NAMES)
        if data.split is None and len(splits) > 1:
            raise SeedDataError(f"data.split: missing, '{data.path}' holds several splits; set it to one of "
                                f"{few(splits)}")
        if found:
            return [posixpath.join(sub, name) for name in found]
    wanted = f"{data.split}-*{extensions[0]}" if data.split else f"*{extensions[0]}"
    seen = [posixpath.join(sub, name) for sub, names in places for name in names]
    raise SeedDataError(f"data.path: no file {wanted} in '{data.path}'" + (f" (it has {few(seen)})" if seen else "") +
                        "; correct data.path or data.split")
