"""Seeds in: the built-in digits, image folders and Hugging Face parquet become one index and a reader.

`build_index` lists a dataset once, in a fixed order, without touching an image; `SeedReader` brings the encoded bytes
of chosen rows. A fault of one image is a RowFault with its reason, a fault of the dataset a SeedDataError, a fault of
the place it lies in an EnvironmentFault (try again later).
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from rayexpand.errors import EnvironmentFault, RayexpandError, RowFault, SeedDataError, UsageError
from rayexpand.pixels import PILLOW_PIXELS
from rayexpand.rng import PlanRng
from rayexpand.schema import SEED_INDEX, ClassTable, Reason, Seed, SeedIndex

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test"})
_DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MISSING_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
_UNREADABLE_ERRNOS = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENXIO})
_INDEX_FAULTS = ("", Reason.BAD_LABEL, Reason.DUPLICATE_ID, Reason.MISSING, Reason.UNSAFE_PATH, Reason.UNREADABLE)
_WHY = {Reason.BAD_LABEL: "its label is null or not a label of the dataset",
        Reason.DUPLICATE_ID: "its id was already taken by an earlier row",
        Reason.MISSING: "it is a link to nothing",
        Reason.UNSAFE_PATH: "it is a link that leaves the dataset folder",
        Reason.UNREADABLE: "it is not a regular file, or its name is not valid UTF-8"}


class DataConfig(BaseModel):
    """Which seeds a run starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["digits", "imagefolder", "parquet"] = Field(
        description="digits: built in; imagefolder: one folder per class; parquet: Hugging Face layout")
    path: str | None = Field(default=None, description=(
        "dataset folder or fsspec URL, or one parquet file; relative paths start at the working directory"))
    split: str | None = Field(default=None, description=(
        "imagefolder: sub-folder ('train'); parquet: prefix of the file names ('train-*.parquet'), also looked for in "
        "data/ and <split>/"))
    classes: str | None = Field(default=None, description=(
        "file that maps class ids to names: JSON object, CSV with columns key,name[,metaclass,noun], or lines "
        "'n01440764 tench, Tinca tinca'"))
    image_column: str = Field(default="image", description="parquet: struct{bytes,path} or binary column")
    label_column: str = Field(default="label", description="parquet: integer, ClassLabel or string column")
    id_column: str | None = Field(default=None, description=(
        "parquet: column of unique seed ids; without it ids are <file stem>/<row>"))
    ids: str | None = Field(default=None, description=(
        "file of the seed ids to use: text lines, CSV or parquet with a column seed_id, or a JSON list"))
    per_class: int | None = Field(default=None, ge=1, description=(
        "seeds taken of each class; a smaller set lies inside a larger one"))
    subset_seed: int = Field(default=0, description="which random subset per_class takes")
    min_side: int = Field(default=8, ge=1, description="images with a shorter side, in pixels, are refused (too_small)")
    max_pixels: int = Field(default=PILLOW_PIXELS, ge=1, le=2 * PILLOW_PIXELS,
                            description="images with more pixels are refused unread (too_large)")
    digits_split: int = Field(default=0, ge=0, description="digits: number of the random pool/test/seeds split")


# ---------------------------------------------------------------------------------------------- where datasets lie


@dataclass(frozen=True, slots=True)
class _Place:
    """A file or folder, local (`fs` None) or behind fsspec."""

    root: str
    fs: Any = None

    def at(self, *parts: str) -> _Place:
        return _Place("/".join([self.root, *filter(None, parts)]), self.fs)

    def kind(self) -> str:
        """"file", "folder" or "" when there is nothing."""
        if self.fs is None:
            try:
                return "folder" if stat.S_ISDIR(os.stat(self.root).st_mode) else "file"
            except (FileNotFoundError, NotADirectoryError):
                return ""
        return "folder" if self.fs.isdir(self.root) else "file" if self.fs.isfile(self.root) else ""

    def names(self) -> tuple[list[str], list[str]]:
        """Visible folders and files right below, sorted."""
        if self.fs is None:
            with os.scandir(self.root) as entries:
                found = [(entry.name, _is_folder(entry)) for entry in entries]
        else:
            found = [(posixpath.basename(entry["name"].rstrip("/")), entry["type"] == "directory")
                     for entry in self.fs.ls(self.root, detail=True)]
        seen = sorted((name, is_folder) for name, is_folder in found if name and not name.startswith("."))
        return [name for name, is_folder in seen if is_folder], [name for name, is_folder in seen if not is_folder]

    def open(self) -> IO[bytes]:
        return open(self.root, "rb") if self.fs is None else self.fs.open(self.root, "rb")

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()


def _place(field: str, path: str) -> _Place:
    if "://" not in path:
        return _Place(os.path.abspath(os.path.expanduser(path)))
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise SeedDataError(f"{field}: '{path}' cannot be opened ({error}); install the storage package it names, for "
                            "example rayexpand[s3], or correct the URL") from error
    return _Place(root.rstrip("/"), None if "file" in np.atleast_1d(fs.protocol) else fs)


def _reason_of(error: Exception, remote: bool) -> Reason | None:
    """What a failed read says about its file; None where it says something about the storage instead."""
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError) or number in _MISSING_ERRNOS:
        return Reason.MISSING
    if isinstance(error, TimeoutError | ConnectionError):
        return None
    if number in _UNREADABLE_ERRNOS or isinstance(error, PermissionError | IsADirectoryError):
        return None if remote and not isinstance(error, IsADirectoryError) else Reason.UNREADABLE
    if isinstance(error, pa.ArrowException) or (isinstance(error, OSError) and number is None and not remote):
        return Reason.UNREADABLE  # pyarrow reports damaged files as plain OSError
    return None


@contextmanager
def _blaming(field: str, path: str, place: _Place) -> Iterator[None]:
    """Turns what goes wrong while the dataset itself is opened or listed into an error for people."""
    try:
        yield
    except RayexpandError:
        raise
    except Exception as error:
        if not (isinstance(error, OSError | pa.ArrowException) or place.fs is not None):
            raise
        reason = _reason_of(error, place.fs is not None)
        if reason is None:
            raise EnvironmentFault(f"{field}: '{path}' cannot be reached now: {error!r}; check storage and "
                                   "credentials, then run the same command again") from error
        what = "does not exist" if reason is Reason.MISSING else f"cannot be read ({error})"
        raise SeedDataError(f"{field}: '{path}' {what}; correct the path or its permissions") from error


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# ------------------------------------------------------------------------------------------------------- mistakes


def check(data: DataConfig) -> list[str]:
    """What is wrong with `data` as far as can be known without listing everything: `field: what, why, next step`.

    Raises EnvironmentFault when the storage does not answer.
    """
    problems = []
    if data.source == "digits" and data.path is not None:
        problems.append(f"data.path: '{data.path}' has no effect, the digits are built in; remove it or name a source")
    if data.source != "digits" and data.path is None:
        problems.append(f"data.path: missing, source '{data.source}' needs a folder or URL; set data.path")
    if data.source != "parquet" and data.id_column is not None:
        problems.append(f"data.id_column: has no effect on source '{data.source}'; remove it")
    tests: dict[str, Callable[[DataConfig], Any]] = {"imagefolder": _folder, "parquet": _parquet_head}
    for test in (_mapping, _wanted_ids, tests.get(data.source) if data.path is not None else None):
        try:
            if test is not None:
                test(data)
        except SeedDataError as problem:
            problems.append(str(problem))
    return problems


def _mapping(data: DataConfig) -> dict[str, dict[str, str]] | None:
    """Class key -> {name, metaclass, noun} of the file data.classes."""
    if data.classes is None:
        return None
    text = _text("data.classes", data.classes)
    suffix = posixpath.splitext(data.classes)[1].lower()
    try:
        if suffix == ".json":
            entries = {key: value if isinstance(value, dict) else {"name": value}
                       for key, value in json.loads(text).items()}
        elif suffix == ".csv":
            entries = {row["key"]: row for row in csv.DictReader(io.StringIO(text))}
        else:
            lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
            entries = {key: {"name": rest.split(",")[0].strip()} for key, rest in lines}
        table = {key: {part: entry.get(part) or "" for part in ("name", "metaclass", "noun")}
                 for key, entry in entries.items()}
        if not table or not all(isinstance(part, str) for entry in table.values() for part in entry.values()) \
                or not all(entry["name"] for entry in table.values()):
            raise ValueError("an entry without a name")
    except (ValueError, KeyError, AttributeError, TypeError, csv.Error) as error:
        raise SeedDataError(f"data.classes: '{data.classes}' is not a class mapping ({error!r}); give a JSON object "
                            "{id: name}, a CSV with columns key,name, or lines 'id name'") from error
    return table


def _wanted_ids(data: DataConfig) -> list[str] | None:
    """Seed ids of the file data.ids, in its order, each once."""
    if data.ids is None:
        return None
    suffix = posixpath.splitext(data.ids)[1].lower()
    try:
        if suffix == ".parquet":
            found = pq.read_table(io.BytesIO(_bytes("data.ids", data.ids)), columns=["seed_id"])["seed_id"].to_pylist()
        elif suffix == ".json":
            found = json.loads(_text("data.ids", data.ids))
        elif suffix == ".csv":
            found = [row["seed_id"] for row in csv.DictReader(io.StringIO(_text("data.ids", data.ids)))]
        else:
            found = [line for line in _text("data.ids", data.ids).split("\n") if line]
        if not found or not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError("no list of names")
    except (ValueError, KeyError, csv.Error) as error:
        raise SeedDataError(f"data.ids: '{data.ids}' holds no seed ids ({error!r}); give one id per line, a JSON list, "
                            "or a CSV or parquet file with a column seed_id") from error
    return list(dict.fromkeys(found))


def _bytes(field: str, path: str) -> bytes:
    place = _place(field, path)
    with _blaming(field, path, place):
        return place.read()


def _text(field: str, path: str) -> str:
    try:
        return _bytes(field, path).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SeedDataError(f"{field}: '{path}' is not UTF-8 text ({error}); save it as UTF-8") from error


# ---------------------------------------------------------------------------------------------------------- index


def build_index(data: DataConfig) -> SeedIndex:
    """Lists the dataset once: seeds in a fixed order (class, then path; or file, then row) with stable, unique ids.

    No image is opened. An image with a known fault keeps its row; a row with a bad label has label 0, so that labels
    can be counted, and is not in ClassTable.count. Schema metadata: b"files" (JSON, relative to data.path) and
    b"layout" (the source). Paths are kept as they are, without Unicode normalisation.
    Raises SeedDataError (all problems of `check`, empty classes, unknown ids), EnvironmentFault.
    """
    if problems := check(data):
        raise SeedDataError("\n  ".join([f"seeds ({data.source}): {len(problems)} problem(s)", *problems]))
    listing = {"digits": _list_digits, "imagefolder": _list_folder, "parquet": _list_parquet}[data.source](data)
    if data.ids is None or data.source == "imagefolder":
        _refuse_empty_classes(listing)
    rows = _selected(listing, data)
    counts = np.bincount(listing.labels[rows][~listing.bad_label[rows]], minlength=len(listing.keys))
    table = pa.table({"seed_id": listing.ids, "label": listing.labels, "file": listing.file, "member": listing.member,
                      "group": listing.group, "offset": listing.offset,
                      "fault": pa.DictionaryArray.from_arrays(listing.faults, list(map(str, _INDEX_FAULTS))).cast(
                          pa.string())}).cast(SEED_INDEX)
    if len(rows) < len(table):
        table = table.take(pa.array(rows))
    metadata = {b"files": json.dumps(listing.files).encode(), b"layout": data.source.encode()}
    return SeedIndex(table.replace_schema_metadata(metadata), _class_table(listing, _mapping(data), counts))


@dataclass(slots=True)
class _Listing:
    """All seeds of a dataset before selection; arrays have one entry per seed."""

    ids: pa.Array
    labels: np.ndarray  # int32, 0 where bad
    faults: np.ndarray  # int8, number in _INDEX_FAULTS
    keys: list[str]
    names: Sequence[str]
    files: list[str]
    file: np.ndarray
    member: pa.Array
    group: np.ndarray
    offset: np.ndarray

    @property
    def bad_label(self) -> np.ndarray:
        return self.faults == _INDEX_FAULTS.index(Reason.BAD_LABEL)


def _refuse_empty_classes(listing: _Listing) -> None:
    counts = np.bincount(listing.labels[~listing.bad_label], minlength=len(listing.keys))
    if empty := [listing.keys[c] for c in np.flatnonzero(counts == 0)]:
        bad = int(listing.bad_label.sum())
        also = f"; {bad} rows have a null or out-of-range label" if bad else ""
        raise SeedDataError(f"data.path: {len(empty)} of {len(listing.keys)} classes have no image ({_few(empty)})"
                            f"{also}; remove these classes, or add images to them")


def _selected(listing: _Listing, data: DataConfig) -> np.ndarray:
    """int64 rows that data.ids and data.per_class leave, ascending."""
    rows = np.arange(len(listing.ids))
    if (wanted := _wanted_ids(data)) is not None:
        where = pc.index_in(pa.array(wanted, pa.string()), value_set=listing.ids)
        if where.null_count:
            unknown = [wanted[i] for i in np.flatnonzero(where.is_null().to_numpy(zero_copy_only=False))]
            raise SeedDataError(f"data.ids: {len(unknown)} of {len(wanted)} ids of '{data.ids}' are not in the dataset "
                                f"({_few(unknown)}); ids look like '{listing.ids[0]}'")
        rows = np.sort(where.to_numpy())
    if data.per_class is None:
        return rows
    present = np.unique(listing.labels[rows][~listing.bad_label[rows]])
    rows = rows[listing.faults[rows] == 0]
    counts = np.bincount(listing.labels[rows], minlength=len(listing.keys))
    if short := [f"{listing.keys[c]} ({counts[c]})" for c in present if counts[c] < data.per_class]:
        raise SeedDataError(f"data.per_class: {data.per_class} seeds asked of each class, but {len(short)} classes "
                            f"have fewer sound ones ({_few(short)}); lower data.per_class or list seeds in data.ids")
    ids = listing.ids.take(pa.array(rows)).to_pylist()
    order = np.lexsort((PlanRng(data.subset_seed, "subset").per_seed("subset", ids), listing.labels[rows]))
    sorted_labels = listing.labels[rows][order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_labels, sorted_labels, side="left")
    return np.sort(rows[order[rank < data.per_class]])


def _class_table(listing: _Listing, mapping: Mapping[str, Mapping[str, str]] | None, counts: np.ndarray) -> ClassTable:
    if mapping is None:
        return ClassTable.of(listing.keys, listing.names, counts.tolist())
    if absent := [key for key in listing.keys if key not in mapping]:
        raise SeedDataError(f"data.classes: {len(absent)} of {len(listing.keys)} classes have no entry ({_few(absent)})"
                            "; add them to the mapping")
    name, metaclass, noun = ([mapping[key][part] for key in listing.keys] for part in ("name", "metaclass", "noun"))
    return ClassTable.of(listing.keys, name, counts.tolist(), metaclass, noun)


def _unique_ids(ids: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Ids made unique with suffixes #2, #3, ..., and a mask of the rows that needed one. The first row keeps its id."""
    codes = ids.dictionary_encode().indices.to_numpy()
    repeat = np.ones(len(ids), bool)
    repeat[np.unique(codes, return_index=True)[1]] = False
    if not repeat.any():
        return ids, repeat
    names = ids.to_pylist()
    taken, last = set(names), dict.fromkeys(names, 1)
    for row in np.flatnonzero(repeat):
        name = names[row]
        while (fresh := f"{name}#{last[name] + 1}") in taken:
            last[name] += 1
        last[name] += 1
        taken.add(fresh)
        names[row] = fresh
    return pa.array(names, pa.string()), repeat


# --------------------------------------------------------------------------------------------------------- digits


def digits_split(split: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits as uint8 (n, 16, 16, 3) images and int labels, in three parts that share no image:
    `pool` (1000, trains the tiny prior and guide), `test` (500) and `seeds` (297).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    small = (data.images / 16 * 255).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC).convert("RGB"))
                       for image in small])
    return {name: (images[rows], data.target[rows]) for name, rows in _digit_rows(len(images), split).items()}


def _digit_rows(count: int, split: int) -> dict[str, np.ndarray]:
    order = np.random.Generator(np.random.Philox(key=split)).permutation(count)
    return {"pool": order[:1000], "test": order[1000:1500], "seeds": order[1500:]}


def _list_digits(data: DataConfig) -> _Listing:
    """Ids are `digits/<number in scikit-learn's set>`, so a digit has one id in every split."""
    labels = digits_split(data.digits_split)["seeds"][1].astype(np.int32)
    count = len(labels)
    numbers = _digit_rows(1500 + count, data.digits_split)["seeds"]
    blank = pa.array([""] * count, pa.string())
    return _Listing(pa.array([f"digits/{number:04d}" for number in numbers]), labels, np.zeros(count, np.int8),
                    [str(digit) for digit in range(10)], _DIGIT_NAMES, [""], np.zeros(count, np.int32), blank,
                    np.full(count, -1, np.int32), np.arange(count, dtype=np.int32))


# --------------------------------------------------------------------------------------------------- image folder


def _folder(data: DataConfig) -> tuple[_Place, list[str]]:
    """The folder of the class folders, and their names in label order."""
    assert data.path is not None
    top = _place("data.path", data.path)
    with _blaming("data.path", data.path, top):
        if (kind := top.kind()) != "folder":
            what = "is a file, not a folder of class folders; unpack it" if kind else "does not exist; correct the path"
            raise SeedDataError(f"data.path: '{data.path}' {what}")
        folder = top.at(data.split or "")
        if data.split and folder.kind() != "folder":
            raise SeedDataError(f"data.split: no folder '{data.split}' in '{data.path}'; it has {_few(top.names()[0])}")
        folders = folder.names()[0]
    if not folders:
        raise SeedDataError(f"data.path: no class folder in '{folder.root}'; put images into <class>/<image>")
    if not data.split and set(map(str.lower, folders)) <= _SPLIT_NAMES:
        raise SeedDataError(f"data.split: missing, the folders of '{data.path}' are splits, not classes; set "
                            f"data.split to one of {_few(folders)}")
    return folder, folders


def _list_folder(data: DataConfig) -> _Listing:
    assert data.path is not None
    folder, classes = _folder(data)
    with _blaming("data.path", data.path, folder):
        if folder.fs is None:
            boundary = os.path.realpath(_place("data.path", data.path).root)
            found = {name: sorted(_walk(folder.root, name, boundary, frozenset())) for name in classes}
        else:
            found = _find_remote(folder, classes)
    paths = [path for name in classes for path, _ in found[name]]
    faults = np.fromiter((_INDEX_FAULTS.index(fault) for name in classes for _, fault in found[name]), np.int8)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(found[name]) for name in classes])
    try:
        members = ids = pa.array(paths, pa.string())
    except UnicodeEncodeError:
        readable = [os.fsencode(path).decode(errors="backslashreplace") for path in paths]
        odd = np.fromiter((a != b for a, b in zip(paths, readable, strict=True)), bool)
        faults[odd & (faults == 0)] = _INDEX_FAULTS.index(Reason.UNREADABLE)
        members = ids = _unique_ids(pa.array(readable, pa.string()))[0]
        classes = [os.fsencode(name).decode(errors="backslashreplace") for name in classes]
    nowhere = np.full(len(paths), -1, np.int32)
    return _Listing(ids, labels, faults, classes, classes, [data.split or ""], np.zeros(len(paths), np.int32), members,
                    nowhere, nowhere)


def _walk(root: str, folder: str, boundary: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(path below root, fault) of the images in `folder`, any depth. A link out of the dataset is one refused seed and
    is not followed; a folder that contains itself through links is entered once."""
    real = os.path.realpath(os.path.join(root, folder))
    if not _inside(real, boundary):
        yield folder, Reason.UNSAFE_PATH
        return
    if real in above:
        return
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from _walk(root, path, boundary, above | {real})
            elif entry.name.lower().endswith(EXTENSIONS):
                yield path, _file_fault(entry, boundary)


def _file_fault(entry: os.DirEntry[str], boundary: str) -> str:
    if entry.is_symlink() and not _inside(os.path.realpath(entry.path), boundary):
        return Reason.UNSAFE_PATH
    if entry.is_symlink() and not os.path.exists(entry.path):
        return Reason.MISSING
    return "" if entry.is_file() else Reason.UNREADABLE


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _inside(real: str, boundary: str) -> bool:
    return real == boundary or real.startswith(boundary.rstrip("/") + "/")


def _find_remote(folder: _Place, classes: list[str]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in classes}
    for path in sorted(folder.fs.find(folder.root)):
        relative = path[len(folder.root) + 1:]
        parts = relative.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if len(parts) > 1 and parts[0] in found and not hidden and relative.lower().endswith(EXTENSIONS):
            found[parts[0]].append((relative, ""))
    return found


# -------------------------------------------------------------------------------------------------------- parquet


def _parquet_files(data: DataConfig) -> tuple[_Place, list[str]]:
    """The dataset folder and its parquet files of data.split, relative to it, sorted."""
    assert data.path is not None
    top = _place("data.path", data.path)
    with _blaming("data.path", data.path, top):
        if not (kind := top.kind()):
            raise SeedDataError(f"data.path: '{data.path}' does not exist; correct the path")
        if kind == "file":
            parent, _, name = top.root.rpartition("/")
            return _Place(parent, top.fs), [name]
        folders, top_files = top.names()
        inner = {sub: top.at(sub).names()[1] for sub in ("data", data.split) if sub and sub in folders}
    places = [("", top_files), *inner.items()]
    for sub, names in places:
        found = [name for name in names if name.endswith(".parquet") and (
            data.split is None or sub == data.split or fnmatchcase(name, f"{data.split}-*") or
            name == f"{data.split}.parquet")]
        splits = sorted({re.sub(r"(-\d.*)?\.parquet$", "", name) for name in found} & _SPLIT_NAMES)
        if data.split is None and len(splits) > 1:
            raise SeedDataError(f"data.split: missing, '{data.path}' holds several splits; set it to one of "
                                f"{_few(splits)}")
        if found:
            return top, [posixpath.join(sub, name) for name in found]
    wanted = f"{data.split}-*.parquet" if data.split else "*.parquet"
    seen = [posixpath.join(sub, name) for sub, names in places for name in names]
    raise SeedDataError(f"data.path: no file {wanted} in '{data.path}'" + (f" (it has {_few(seen)})" if seen else "") +
                        "; correct data.path or data.split")


def _parquet_head(data: DataConfig) -> tuple[_Place, list[str], pa.Schema]:
    """Folder, files and the schema of the first file, whose columns are checked."""
    place, files = _parquet_files(data)
    with _blaming("data.path", files[0], place), place.at(files[0]).open() as file:
        schema = pq.read_schema(file)
    for field in ("image_column", "label_column", "id_column"):
        if (column := getattr(data, field)) is not None and column not in schema.names:
            near = get_close_matches(column, schema.names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "name the right one"
            raise SeedDataError(f"data.{field}: no column '{column}' in '{files[0]}', which has {_few(schema.names)}; "
                                f"{hint}")
    label, image = schema.field(data.label_column).type, schema.field(data.image_column).type
    if not (pa.types.is_integer(label) or _is_text(label)):
        raise SeedDataError(f"data.label_column: '{data.label_column}' is {label}; a label is an integer or a string")
    if not (_is_binary(image) or (pa.types.is_struct(image) and image.get_field_index("bytes") >= 0)):
        raise SeedDataError(f"data.image_column: '{data.image_column}' is {image}; images are struct{{bytes,path}} or "
                            "binary")
    return place, files, schema


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _list_parquet(data: DataConfig) -> _Listing:
    """Reads footers, labels and ids only, never image bytes."""
    place, files, schema = _parquet_head(data)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda name: _list_file(data, place, name, schema), files))
    label_parts, id_parts, groups = zip(*parts, strict=True)
    sizes = [len(part) for part in id_parts]
    labels, keys = _encode_labels(pa.chunked_array(label_parts), data, schema)
    ids = pa.chunked_array(id_parts).combine_chunks()
    ids, repeated = _unique_ids(ids) if data.id_column else (ids, np.zeros(len(ids), bool))
    faults = np.zeros(len(ids), np.int8)
    faults[repeated] = _INDEX_FAULTS.index(Reason.DUPLICATE_ID)
    faults[labels < 0] = _INDEX_FAULTS.index(Reason.BAD_LABEL)
    group = [np.repeat(np.arange(len(rows), dtype=np.int32), rows) for rows in groups]
    offset = [np.arange(count, dtype=np.int32) for rows in groups for count in rows]
    return _Listing(ids, np.maximum(labels, 0), faults, keys, keys, files,
                    np.repeat(np.arange(len(files), dtype=np.int32), sizes), pa.array([""]).take(pa.array(
                        np.zeros(len(ids), np.int8))), np.concatenate(group), np.concatenate(offset))


def _list_file(data: DataConfig, place: _Place, name: str, schema: pa.Schema) -> tuple[pa.Array, pa.Array, list[int]]:
    """Labels, ids and row-group sizes of one file."""
    columns = [data.label_column] + ([data.id_column] if data.id_column else [])
    with _blaming("data.path", name, place), place.at(name).open() as raw, pq.ParquetFile(raw) as file:
        if absent := [c for c in columns if c not in file.schema_arrow.names]:
            raise SeedDataError(f"data.path: '{name}' has no column {_few(absent)}, unlike the first file; remove it "
                                "or narrow data.split")
        table = file.read(columns=columns)
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    numbers = pa.array(np.arange(len(table))).cast(pa.string())
    ids = pc.binary_join_element_wise(posixpath.splitext(posixpath.basename(name))[0], numbers, "/")
    if data.id_column:
        given = table[data.id_column].cast(pa.string()).combine_chunks()
        ids = pc.coalesce(given, ids)
    label_type = schema.field(data.label_column).type
    text = _is_text(label_type)
    return table[data.label_column].cast(pa.string() if text else pa.int64(), safe=False).combine_chunks(), ids, sizes


def _encode_labels(labels: pa.ChunkedArray, data: DataConfig, schema: pa.Schema) -> tuple[np.ndarray, list[str]]:
    """int32 labels (-1 where bad) and class keys."""
    if pa.types.is_string(labels.type):
        keys = sorted(pc.unique(labels).drop_null().to_pylist())
        codes = pc.index_in(labels, value_set=pa.array(keys, pa.string()))
        return pc.fill_null(codes, -1).to_numpy().astype(np.int32), keys
    values = pc.fill_null(labels, -1).to_numpy()
    names = _class_label_names(schema, data.label_column)
    if names is None:
        mapping = _mapping(data)
        count = len(mapping) if mapping and all(map(str.isdecimal, mapping)) else int(values.max(initial=-1)) + 1
        if count > max(len(values), len(mapping or ())):
            raise SeedDataError(f"data.label_column: labels reach {count - 1} in {len(values)} rows, so they are not "
                                "0..K-1; give data.classes, or store them as strings")
        names = [str(label) for label in range(count)]
    return np.where((values >= 0) & (values < len(names)), values, -1).astype(np.int32), names


def _class_label_names(schema: pa.Schema, column: str) -> list[str] | None:
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None


# -------------------------------------------------------------------------------------------------------- reading


class SeedReader:
    """Encoded images of index rows. A parquet row group is read once per call, and the last one is kept."""

    def __init__(self, index: SeedIndex, data: DataConfig) -> None:
        metadata = index.table.schema.metadata or {}
        if (layout := metadata.get(b"layout", b"").decode()) != data.source:
            raise UsageError(f"the seed index was made from source '{layout}', not '{data.source}'; plan again")
        self._table, self._data = index.table, data
        self._files: list[str] = json.loads(metadata[b"files"])
        self._place = _Place("") if data.path is None else _place("data.path", data.path)
        self._group: tuple[tuple[int, int], Any] | None = None
        self._digits: np.ndarray | None = None
        with _blaming("data.path", data.path or "", self._place):
            is_file = data.source == "parquet" and self._place.kind() == "file"
        if is_file:
            self._place = _Place(posixpath.dirname(self._place.root), self._place.fs)
        self._boundary = os.path.realpath(self._place.root)

    def read(self, rows: Sequence[int]) -> list[Seed | RowFault]:
        """Seeds of `rows`, in their order; a RowFault stands for an image that is missing, unreadable or refused by
        the index. Raises EnvironmentFault when the storage fails rather than the image."""
        picked = self._table.take(pa.array(rows, pa.int64())).to_pylist()
        found: list[Any] = [None] * len(picked)
        for i in sorted(range(len(picked)), key=lambda i: (picked[i]["file"], picked[i]["group"])):
            found[i] = self._one(picked[i])
        return found

    def _one(self, row: dict[str, Any]) -> Seed | RowFault:
        if row["fault"]:
            return RowFault(row["fault"], f"{row['seed_id']}: {_WHY[Reason(row['fault'])]}")
        read = {"digits": self._digit, "imagefolder": self._file, "parquet": self._cell}[self._data.source]
        try:
            return Seed(row["seed_id"], row["label"], read(row))
        except RowFault as fault:
            return fault
        except Exception as error:
            return self._refused(error, row["seed_id"])

    def _refused(self, error: Exception, seed_id: str) -> RowFault:
        remote = self._place.fs is not None
        if isinstance(error, MemoryError) or not (remote or isinstance(error, OSError | pa.ArrowException)):
            raise error
        reason = _reason_of(error, remote)
        if reason is None or (not remote and not os.path.isdir(self._place.root)):
            raise EnvironmentFault(f"data.path: reading seed '{seed_id}' from '{self._data.path}' failed: {error!r}; "
                                   "check that the storage is mounted and reachable, then run the same command again"
                                   ) from error
        what = "the file is gone" if reason is Reason.MISSING else f"cannot be read ({type(error).__name__})"
        return RowFault(reason, f"{seed_id}: {what}")

    def _digit(self, row: dict[str, Any]) -> bytes:
        if self._digits is None:
            self._digits = digits_split(self._data.digits_split)["seeds"][0]
        buffer = io.BytesIO()
        Image.fromarray(self._digits[row["offset"]]).save(buffer, "PNG")
        return buffer.getvalue()

    def _file(self, row: dict[str, Any]) -> bytes:
        return self._safely(posixpath.join(self._files[row["file"]], row["member"]), row["seed_id"])

    def _safely(self, path: str, seed_id: str) -> bytes:
        """Bytes of a file below the dataset folder. Raises RowFault(unsafe_path) for one that is elsewhere."""
        file = self._place.at(path)
        if file.fs is None and not _inside(os.path.realpath(file.root), self._boundary):
            raise RowFault(Reason.UNSAFE_PATH, f"{seed_id}: '{path}' leaves the dataset folder; copy the image into it")
        return file.read()

    def _cell(self, row: dict[str, Any]) -> bytes:
        value = self._row_group(row["file"], row["group"])[row["offset"]].as_py()
        image, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if image is not None:
            return bytes(image)
        if not path:
            raise RowFault(Reason.MISSING, f"{row['seed_id']}: the row has neither image bytes nor a path")
        if re.match(r"[/\\~]|[A-Za-z]:|\w+://", path) or ".." in re.split(r"[/\\]", path):
            raise RowFault(Reason.UNSAFE_PATH, f"{row['seed_id']}: path '{path}' leaves the dataset folder; store "
                           "image bytes or paths below it")
        return self._safely(path, row["seed_id"])

    def _row_group(self, file: int, group: int) -> Any:
        cached = self._group
        if cached is None or cached[0] != (file, group):
            with self._place.at(self._files[file]).open() as raw, pq.ParquetFile(raw) as parquet:
                column = parquet.read_row_group(group, columns=[self._data.image_column]).column(0)
            self._group = cached = ((file, group), column)
        return cached[1]
