"""What the engine would see of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from rayexpand.contract.errors import RowFault
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, SeedReader


def outcomes(index: SeedIndex, data: DataConfig) -> dict[str, tuple[str, str]]:
    """(reason, note) of every seed of the index; reason "" for a good image."""
    found = {}
    for seed_id, seed in zip(index.seed_ids, SeedReader(index, data).read(range(len(index))), strict=True):
        try:
            if isinstance(seed, RowFault):
                raise seed
            assert seed.seed_id == seed_id
            found[seed_id] = ("", decode(seed.image)[1])
        except RowFault as fault:
            found[seed_id] = (str(fault.reason), "")
    return found


def reasons(index: SeedIndex, data: DataConfig) -> dict[str, str]:
    return {seed_id: reason for seed_id, (reason, _) in outcomes(index, data).items()}


@contextmanager
def in_memory(folder: Path) -> Iterator[str]:
    """A copy of `folder` in fsspec's memory file system, as a URL."""
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/far", recursive=True)
    try:
        yield "memory://far"
    finally:
        memory.rm("/far", recursive=True)
