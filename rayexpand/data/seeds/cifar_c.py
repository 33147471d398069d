"""CIFAR-10-C and CIFAR-100-C as published: one array of uint8 (5 N, 32, 32, 3) for each corruption, severity s in rows
N (s - 1) to N s - 1, and labels.npy. Arrays are mapped into memory, never loaded whole; no pickle is read.

In the index, offset is the row of the array. Ids are `<type>/<severity>/<image>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import EnvironmentFault, SeedDataError, few, looked_at
from rayexpand.contract.schema import Reason
from rayexpand.data.corruptions.tables import COMMON, EXTRA, SEVERITIES
from rayexpand.data.seeds.labels import encode_labels
from rayexpand.data.seeds.listing import Listing, Read, blanks, encode_png, fault_code
from rayexpand.data.seeds.places import Place, blaming, place
from rayexpand.data.seeds.source import DataConfig

AGAIN = "download the archive again"


def root(data: DataConfig) -> Place:
    assert data.path is not None
    return place("data.path", data.path)


def check(data: DataConfig) -> list[tuple[str, int]]:
    """Type and severity of every part the split names; looks at the headers of the arrays only. Raises
    SeedDataError."""
    top = root(data)
    if top.fs is not None:
        raise SeedDataError(f"data.path: '{data.path}' is not local, and arrays are mapped into memory; copy the "
                            "folder to a disk")
    with blaming("data.path", str(data.path), top):
        if (kind := top.kind()) != "folder":
            what = "is a file; unpack it and name the folder" if kind else (
                f"does not exist{looked_at(str(data.path))}; correct the path")
            raise SeedDataError(f"data.path: '{data.path}' {what}")
        parts = _parts(data, [name.removesuffix(".npy") for name in top.names()[1] if name.endswith(".npy")])
        count = len(_labels(data))
        for name in dict.fromkeys(name for name, _ in parts):
            images = _mapped(data, name)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != count:
                raise SeedDataError(f"data.path: '{name}.npy' of '{data.path}' is {images.dtype} of shape "
                                    f"{images.shape}; expected uint8 ({count}, 32, 32, 3), as many as labels; {AGAIN}")
    return parts


def splits(data: DataConfig) -> list[str]:
    return [*COMMON, *map(str, SEVERITIES)]


def _parts(data: DataConfig, there: list[str]) -> list[tuple[str, int]]:
    """`<type>`, `<severity>`, `<type>/<severity>`, or null for all types of the benchmark in all severities."""
    words = [] if data.split is None else data.split.split("/")
    severities = [int(one) for one in words if one in map(str, SEVERITIES)]
    names = [one for one in words if one in (*COMMON, *EXTRA)]
    if len(severities) + len(names) < len(words) or len(severities) > 1 or len(names) > 1:
        raise SeedDataError(f"data.split: '{data.split}' is no part of CIFAR-C; give a corruption such as fog, a "
                            "severity of 1 to 5 in quotes, or both as fog/3")
    wanted = names or list(COMMON)
    if absent := [f"{name}.npy" for name in [*wanted, "labels"] if name not in there]:
        raise SeedDataError(f"data.path: no file {few(absent)} in '{data.path}'; name the folder of the arrays, or "
                            f"{AGAIN}")
    return [(name, severity) for name in wanted for severity in severities or SEVERITIES]


def _mapped(data: DataConfig, name: str) -> np.ndarray:
    """Raises SeedDataError."""
    try:
        return np.load(Path(root(data).root, f"{name}.npy"), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SeedDataError(f"data.path: '{name}.npy' of '{data.path}' is no plain array ({error}); {AGAIN}") from error


def _labels(data: DataConfig) -> np.ndarray:
    found = _mapped(data, "labels")
    if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found) or len(found) % len(SEVERITIES):
        raise SeedDataError(f"data.path: 'labels.npy' of '{data.path}' is {found.dtype} of shape {found.shape}; "
                            f"expected whole numbers, as many for each of the {len(SEVERITIES)} severities; {AGAIN}")
    return np.asarray(found, np.int64)


def list_seeds(data: DataConfig) -> Listing:
    """Reads the labels only."""
    parts, values = check(data), _labels(data)
    size = len(values) // len(SEVERITIES)
    files = list(dict.fromkeys(f"{name}.npy" for name, _ in parts))
    rows = [np.arange(size * (severity - 1), size * severity, dtype=np.int32) for _, severity in parts]
    offset = np.concatenate(rows)
    encoded = encode_labels(pa.chunked_array([pa.array(values[offset])]), data)
    ids = pa.array([f"{name}/{severity}/{row}" for name, severity in parts for row in range(size)], pa.string())
    faults = np.where(encoded.codes < 0, fault_code(Reason.BAD_LABEL), 0).astype(np.int8)
    number = np.repeat([files.index(f"{name}.npy") for name, _ in parts], size).astype(np.int32)
    return Listing(ids, encoded.codes, faults, encoded.keys, encoded.keys, files, number, blanks(len(ids)),
                   np.full(len(ids), -1, np.int32), offset, encoded.named)


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    """Keeps the arrays that were mapped."""
    mapped: dict[int, np.ndarray] = {}

    def read(row: dict[str, Any]) -> bytes:
        if row["file"] not in mapped:
            try:
                mapped[row["file"]] = _mapped(data, files[row["file"]].removesuffix(".npy"))
            except (SeedDataError, FileNotFoundError) as error:  # all rows lie in these files: no row is to blame
                raise EnvironmentFault(f"{error}; then run the same command again") from error
        images = mapped[row["file"]]
        if row["offset"] >= len(images):
            raise EnvironmentFault(f"data.path: '{files[row['file']]}' has {len(images)} images, fewer than when it "
                                   "was listed; put the old file back, then run the same command again")
        return encode_png(images[row["offset"]])

    return read
