"""MedMNIST-style .npz: arrays `<split>_images` and `<split>_labels`. No pickle is ever loaded.

In the index, offset is the row of the array.
"""

from __future__ import annotations

import posixpath
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import EnvironmentFault, SeedDataError, few, looked_at
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.labels import encode_labels
from rayexpand.data.seeds.listing import Listing, Read, blanks, encode_png, fault_code
from rayexpand.data.seeds.places import Place, blaming, place
from rayexpand.data.seeds.source import DataConfig

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_DAMAGE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, KeyError)


def root(data: DataConfig) -> Place:
    assert data.path is not None
    return place("data.path", data.path).parent()


def check(data: DataConfig) -> int:
    """Number of images; looks at the headers of the arrays only. Raises SeedDataError."""
    with _opened(data) as archive:
        there = _splits(archive)
        if data.split is None:
            raise SeedDataError(f"data.split: missing, choose one of the splits of '{data.path}': {few(there)}")
        if absent := [name for name in (f"{data.split}_images", f"{data.split}_labels")
                      if f"{name}.npy" not in archive.namelist()]:
            raise SeedDataError(f"data.split: no array {few(absent)} in '{data.path}'; it has splits {few(there)}")
        images, kind = _head(archive, f"{data.split}_images")
        labels, label_kind = _head(archive, f"{data.split}_labels")
    name = f"data.path: {data.split}_images of '{data.path}'"
    if kind != np.uint8:
        raise SeedDataError(f"{name} is {kind}; images are uint8, scale them to 0..255 and save them again")
    if len(images) not in (3, 4) or (len(images) == 4 and images[3] not in (1, 3)):
        raise SeedDataError(f"{name} has shape {images}; images are (N, H, W) or (N, H, W, 1 or 3)")
    if labels not in ((images[0],), (images[0], 1)) or label_kind.kind not in "iu":
        raise SeedDataError(f"data.path: {data.split}_labels of '{data.path}' is {label_kind} of shape {labels}; "
                            f"labels are one integer for each of the {images[0]} images")
    return images[0]


def splits(data: DataConfig) -> list[str]:
    with _opened(data) as archive:
        return _splits(archive)


def _splits(archive: zipfile.ZipFile) -> list[str]:
    return sorted(name.removesuffix("_images.npy") for name in archive.namelist() if name.endswith("_images.npy"))


@contextmanager
def _opened(data: DataConfig) -> Iterator[zipfile.ZipFile]:
    assert data.path is not None
    where = place("data.path", data.path)
    with blaming("data.path", data.path, where):
        if (kind := where.kind()) != "file":
            what = "is a folder; name the .npz file in it" if kind else (
                f"does not exist{looked_at(data.path)}; correct the path")
            raise SeedDataError(f"data.path: '{data.path}' {what}")
        try:
            with where.open() as raw, zipfile.ZipFile(raw) as archive:
                yield archive
        except _DAMAGE as error:
            raise SeedDataError(f"data.path: '{data.path}' cannot be read as .npz ({error}); write it with numpy.savez "
                                "from plain arrays") from error


def _head(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"array format {version}")
        shape, _, kind = _HEADERS[version](file)
        return shape, kind


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def list_seeds(data: DataConfig) -> Listing:
    """Reads the labels only. Ids are `<file stem>/<split>/<row>`."""
    count = check(data)
    with _opened(data) as archive:
        values = _array(archive, f"{data.split}_labels").reshape(count).astype(np.int64)
    encoded = encode_labels(pa.chunked_array([pa.array(values)]), data)
    labels, keys = encoded.codes, encoded.keys
    stem = posixpath.splitext(posixpath.basename(str(data.path)))[0]
    faults = np.where(labels < 0, fault_code(Reason.BAD_LABEL), 0).astype(np.int8)
    return Listing(pa.array([f"{stem}/{data.split}/{row}" for row in range(count)], pa.string()), labels, faults, keys,
                   keys, [posixpath.basename(str(data.path))], np.zeros(count, np.int32), blanks(count),
                   np.full(count, -1, np.int32), np.arange(count, dtype=np.int32), encoded.named)


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    """Loads the images of the split at the first row and keeps them."""
    loaded: list[np.ndarray] = []

    def read(row: dict[str, Any]) -> bytes:
        if not loaded:
            try:
                check(data)
                with _opened(data) as archive:
                    images = _array(archive, f"{data.split}_images")
            except SeedDataError as error:  # all rows lie in this one file: no row is to blame
                raise EnvironmentFault(f"{error}, then run the same command again") from error
            loaded.append(images[:, :, :, 0] if images.ndim == 4 and images.shape[3] == 1 else images)
        if row["offset"] >= len(loaded[0]):
            raise EnvironmentFault(f"data.path: '{data.path}' has {len(loaded[0])} images, fewer than when it was "
                                   "listed; put the old file back, then run the same command again")
        return encode_png(loaded[0][row["offset"]])

    return read
