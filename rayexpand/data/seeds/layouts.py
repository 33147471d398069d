"""Which module reads which source. All have the same five functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from rayexpand.data.seeds import cifar, cifar_c, digits, folder, manifest, npz, parquet, tars
from rayexpand.data.seeds.listing import Listing, Read
from rayexpand.data.seeds.places import Place
from rayexpand.data.seeds.source import DataConfig


class Layout(Protocol):
    def check(self, data: DataConfig) -> object:
        """Raises SeedDataError for what can be known without listing everything."""

    def root(self, data: DataConfig) -> Place:
        """The folder that nothing may leave; its absence is a fault of the storage, not of a row."""

    def list_seeds(self, data: DataConfig) -> Listing: ...

    def splits(self, data: DataConfig) -> list[str]:
        """What data.split may be; none where the dataset is not divided."""

    def reader(self, folder: Place, files: list[str], data: DataConfig) -> Read:
        """How to read rows of an index; `folder` is `root`, `files` those of the listing."""


LAYOUTS: Mapping[str, Layout] = {"digits": digits, "imagefolder": folder, "parquet": parquet, "webdataset": tars,
                                 "manifest": manifest, "npz": npz, "cifar": cifar, "cifar_c": cifar_c}
