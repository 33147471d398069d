"""Says what a folder of samples holds, from the files alone: no peer is asked what it did.

A plan is a multiset of *slots*: what the peer's own naming tells samples apart by, mostly one slot for each copy of
each seed. Every readable image is a sample of a slot. What is counted:

    lost        planned, and neither a readable sample nor a torn one is there
    duplicate   more samples of a slot than are planned, or of a slot that nobody planned
    torn        a file, or an image in one, that cannot be decoded to the end
    orphan      a file in the output folder that no sample is read from and that an undisturbed run does not need
    changed     a sample whose pixels the undisturbed run of the same peer did not have in this slot
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Slots = Counter[str]


@dataclass
class Output:
    """What was found."""

    samples: list[tuple[str, str]] = field(default_factory=list)  # slot, hash of the pixels
    torn: list[str] = field(default_factory=list)  # slots, or names of files whose slots nobody can tell
    orphans: list[str] = field(default_factory=list)  # paths in the output folder

    def take(self, slot: str, content: bytes) -> None:
        pixels = pixel_hash(content)
        if pixels is None:
            self.torn.append(slot)
        else:
            self.samples.append((slot, pixels))


@dataclass(frozen=True)
class Verdict:
    planned: int
    samples: int
    lost: int
    duplicate: int
    torn: int
    orphan: int
    changed: int | None  # None: there was nothing to compare with

    def row(self) -> dict[str, Any]:
        return asdict(self)


def judge(planned: Slots, found: Output, reference: Output | None = None) -> Verdict:
    """What is wrong with an output. `reference` is the output of an undisturbed run of the same peer."""
    good = Counter(slot for slot, _ in found.samples)
    there = good + Counter(found.torn)
    changed = None
    if reference is not None:
        known = set(reference.samples)
        changed = sum(sample not in known for sample in found.samples)
    return Verdict(planned.total(), good.total(), (planned - there).total(), (good - planned).total(), len(found.torn),
                   len(found.orphans), changed)


def pixel_hash(content: bytes) -> str | None:
    """Of size and RGB pixels; None where the image cannot be decoded to the end."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


# Readers: one for each way to keep samples --------------------------------------------------------------------------


def read_images(out: Path, slot_of: Callable[[str], str | None], keeps: Sequence[str] = ()) -> Output:
    """A folder of image files. `slot_of` says of a path below `out` whose sample it is, None if nobody's; files that
    match `keeps` are the peer's own."""
    found = Output()
    for name in _files(out):
        slot = slot_of(name)
        if slot is not None:
            found.take(slot, (out / name).read_bytes())
        elif not _matches(name, keeps):
            found.orphans.append(name)
    return found


def read_parquet(out: Path, pattern: str, slot_of: Callable[[dict[str, Any]], str], image: str,
                 keeps: Sequence[str] = ()) -> Output:
    """Parquet files with one sample a row. `image` is its column of encoded bytes, or `column.field`."""
    found, (column, _, part) = Output(), image.partition(".")
    for name in _files(out):
        if not fnmatch(name, pattern):
            if not _matches(name, keeps):
                found.orphans.append(name)
            continue
        try:
            rows = pq.read_table(out / name).to_pylist()
        except (OSError, pa.ArrowException):
            found.torn.append(name)
            continue
        for row in rows:
            found.take(slot_of(row), row[column][part] if part else row[column])
    return found


def read_listed(out: Path, listing: str, images: str, slot_of: Callable[[str], str | None],
                keeps: Sequence[str] = ()) -> Output:
    """Image files that a file of JSON lines names, below the field `images`. Files it does not name are orphans."""
    found, named = Output(), set[Path]()
    for line in (out / listing).read_text().splitlines() if (out / listing).exists() else ():
        for path in map(Path, json.loads(line)[images]):
            named.add(path.resolve())
            slot = slot_of(path.name)
            if slot is None:
                continue
            if path.exists():
                found.take(slot, path.read_bytes())
            else:
                found.torn.append(slot)
    found.orphans = [name for name in _files(out) if name != listing and not _matches(name, keeps)
                     and (out / name).resolve() not in named]
    return found


def _files(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
