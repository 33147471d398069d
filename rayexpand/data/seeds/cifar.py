"""CIFAR-10 and CIFAR-100 as their python batches: pickles of arrays, read as data (pickles.py), never run.

In the index, offset is the row of the batch. CIFAR-100 has its hundred fine classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import EnvironmentFault, SeedDataError, few, looked_at
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.labels import encode_labels, with_class_names
from rayexpand.data.seeds.listing import Listing, Read, blanks, encode_png, fault_code
from rayexpand.data.seeds.pickles import Plain, read_plain_pickle
from rayexpand.data.seeds.places import Place, blaming, place
from rayexpand.data.seeds.source import DataConfig

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class _Release:
    meta: str  # file of the class names
    names: str  # their key in it
    labels: str  # key of the labels in a batch
    batches: dict[str, tuple[str, ...]]


RELEASES = (_Release("batches.meta", "label_names", "labels",
                     {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}),
            _Release("meta", "fine_label_names", "fine_labels", {"train": ("train",), "test": ("test",)}))


def root(data: DataConfig) -> Place:
    assert data.path is not None
    return place("data.path", data.path)


def _release(data: DataConfig) -> _Release:
    """Which of the two lies in the folder. Raises SeedDataError."""
    top = root(data)
    with blaming("data.path", str(data.path), top):
        if (kind := top.kind()) != "folder":
            what = "is a file; unpack it and name the folder of the batches" if kind else (
                f"does not exist{looked_at(str(data.path))}; correct the path")
            raise SeedDataError(f"data.path: '{data.path}' {what}")
        names = top.names()[1]
    found = next((one for one in RELEASES if one.meta in names), None)
    if found is None:
        raise SeedDataError(f"data.path: '{data.path}' has neither 'batches.meta' (CIFAR-10) nor 'meta' (CIFAR-100); "
                            "name the folder that the python version unpacks to, cifar-10-batches-py or "
                            "cifar-100-python")
    if data.split is None:
        raise SeedDataError(f"data.split: missing, choose one of the splits of '{data.path}': {few([*found.batches])}")
    if data.split not in found.batches:
        raise SeedDataError(f"data.split: no '{data.split}' in '{data.path}'; it has {few([*found.batches])}")
    if absent := [name for name in found.batches[data.split] if name not in names]:
        raise SeedDataError(f"data.path: no file {few(absent)} in '{data.path}'; unpack the archive again")
    return found


def check(data: DataConfig) -> tuple[_Release, list[str]]:
    """Which release it is, and its class names. Raises SeedDataError."""
    release = _release(data)
    names = _read(data, release.meta).get(release.names)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SeedDataError(f"data.path: '{release.meta}' of '{data.path}' has no list '{release.names}' of class "
                            "names; unpack the archive again")
    return release, names


def splits(data: DataConfig) -> list[str]:
    return [*_release(data).batches]


def _read(data: DataConfig, name: str) -> dict[str, Plain]:
    where = root(data).at(name)
    with blaming("data.path", f"{data.path}/{name}", where):
        content = where.read()
    try:
        return read_plain_pickle(content)
    except ValueError as error:
        raise SeedDataError(f"data.path: '{name}' of '{data.path}' {error}") from error


def _batch(data: DataConfig, release: _Release, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (N, 3072), int64 labels) of a batch. Raises SeedDataError."""
    found = _read(data, name)
    pixels, labels = found.get("data"), found.get(release.labels)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (int(np.prod(SHAPE)),):
        raise SeedDataError(f"data.path: '{name}' of '{data.path}' has no images, an array 'data' of uint8 (N, 3072); "
                            "unpack the archive again")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(one) is int for one in labels):
        raise SeedDataError(f"data.path: '{name}' of '{data.path}' has no list '{release.labels}' of one number for "
                            f"each of its {len(pixels):,} images; unpack the archive again")
    return pixels, np.array(labels, np.int64)


def list_seeds(data: DataConfig) -> Listing:
    """Reads the batches of the split, one after the other. Ids are `<batch>/<row>`."""
    release, names = check(data)
    files = [*release.batches[str(data.split)]]
    by_file = [_batch(data, release, name)[1] for name in files]
    values, sizes = np.concatenate(by_file), [len(labels) for labels in by_file]
    schema = with_class_names(pa.schema([(data.label_column, pa.int64())]), data.label_column, names)
    encoded = encode_labels(pa.chunked_array([pa.array(values)]), data, schema)
    rows = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    number = np.repeat(np.arange(len(files), dtype=np.int32), sizes)
    ids = pa.array([f"{file}/{row}" for file, size in zip(files, sizes, strict=True) for row in range(size)],
                   pa.string())
    faults = np.where(encoded.codes < 0, fault_code(Reason.BAD_LABEL), 0).astype(np.int8)
    return Listing(ids, encoded.codes, faults, encoded.keys, encoded.keys, files, number, blanks(len(ids)),
                   np.full(len(ids), -1, np.int32), rows, encoded.named)


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    """Keeps the batches that were read."""
    loaded: dict[int, np.ndarray] = {}

    def read(row: dict[str, Any]) -> bytes:
        if row["file"] not in loaded:
            try:
                loaded[row["file"]] = _batch(data, _release(data), files[row["file"]])[0]
            except SeedDataError as error:  # all rows lie in these files: no row is to blame
                raise EnvironmentFault(f"{error}, then run the same command again") from error
        batch = loaded[row["file"]]
        if row["offset"] >= len(batch):
            raise EnvironmentFault(f"data.path: '{files[row['file']]}' has {len(batch)} images, fewer than when it was "
                                   "listed; put the old file back, then run the same command again")
        return encode_png(batch[row["offset"]].reshape(SHAPE).transpose(1, 2, 0))

    return read
