"""The section `corrupt` of a further test set."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from rayexpand.contract.errors import few, looked_at
from rayexpand.contract.settings import Section
from rayexpand.data.corruptions.tables import COMMON, EXTRA, FROST

# Of the six published pictures the released code draws from the first five. Beginning of the sha256 of each file.
FROST_SHA256 = ("ff9f9078", "fe211a89", "2d0d50b4", "3f8b91ca", "5fc6a19d")
WITHOUT_FROST = "14 types, without frost"


class Corrupt(Section):
    """Corruptions made in memory, of the square that a classifier sees. They are not the published files: results are
    called corrupted-v1."""

    table: Literal["imagenet", "cifar"] = Field(description="parameters for images of 224 or of 32 pixels; lengths are "
                                                "pixels and are not scaled")
    types: Literal["common", "extra"] | list[str] = Field("common", description="common: all fifteen, without frost "
                                                          "where `frost` names no pictures; or names")
    severities: list[Literal[1, 2, 3, 4, 5]] = Field([1, 2, 3, 4, 5], min_length=1, description="of 1 to 5")
    store_jpeg: int | None = Field(None, ge=1, le=95, description="quality of a JPEG file that every image passes "
                                   "through; 85: as the published files of ImageNet-C; null: none")
    frost: str | None = Field(None, description="local folder of the published pictures of frost, found by their "
                              "sha256")
    exchange: Literal["copy", "swap"] = Field("copy", description="glass blur. copy: a pixel is written over another "
                                              "one, as the released code does; swap: both change places")

    @property
    def names(self) -> tuple[str, ...]:
        """Types in the order of the benchmark. Extra types are refused by `problems`."""
        asked = COMMON if self.types == "common" else EXTRA if self.types == "extra" else tuple(self.types)
        return tuple(name for name in (*COMMON, *EXTRA) if name in asked and (
            name != FROST or self.frost is not None or self.types != "common"))

    @property
    def note(self) -> str:
        """What must be said beside every mean over types."""
        return WITHOUT_FROST if self.types == "common" and self.frost is None else ""

    def problems(self) -> list[str]:
        """What is wrong, one line each: `field: what, why, next step`."""
        asked, found = list(self.names) if isinstance(self.types, str) else self.types, list[str]()
        if unknown := [name for name in asked if name not in (*COMMON, *EXTRA)]:
            found.append(f"types: {few(unknown)}: no corruption of this name; choose among {', '.join(COMMON)}")
        if extra := [name for name in asked if name in EXTRA]:
            found.append(f"types: {few(extra)} have no parameters in these tables; choose among the fifteen common "
                         "types, or give published files")
        if not asked:
            found.append("types: an empty list corrupts nothing; name types, or write common")
        for name in ("types", "severities"):
            if len(set(given := getattr(self, name))) < len(given) and not isinstance(given, str):
                found.append(f"{name}: {given} has one twice; give each once")
        if FROST in asked and self.frost is None:
            found.append("frost: missing, and `types` names frost; give the folder of the published pictures")
        if self.frost is not None and FROST in asked:
            found += frost_problems(self.frost)
        return found


def frost_files(folder: str) -> dict[str, Path]:
    """The pictures of frost in a folder, by the beginning of their sha256."""
    place = Path(folder).expanduser()
    files = sorted(one for one in place.iterdir() if one.suffix.lower() in (".png", ".jpg", ".jpeg")) \
        if place.is_dir() else []
    named = {hashlib.sha256(one.read_bytes()).hexdigest()[:8]: one for one in files}
    return {one: named[one] for one in FROST_SHA256 if one in named}


def frost_problems(folder: str) -> list[str]:
    if not Path(folder).expanduser().is_dir():
        return [f"frost: there is no folder {folder}{looked_at(folder)}; correct it, or leave frost out"]
    absent = [one for one in FROST_SHA256 if one not in frost_files(folder)]
    return [f"frost: {folder} lacks {len(absent)} of the {len(FROST_SHA256)} published pictures (sha256 "
            f"{', '.join(absent)}...); put the files there unchanged, or leave frost out"] if absent else []
