"""WebDataset: tar shards whose samples are neighbouring files with one key, `<key>.jpg` and `<key>.cls` or `.json`.

Nothing is ever extracted: the index keeps where an image lies in its tar, so a read is one seek (one ranged request on
an object store). In the index, group is the number of the 512-byte block the image starts at, which reaches 1 TiB,
offset its size in bytes, member its name.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import RowFault, SeedDataError, few
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds.files import DatasetFiles, dataset_files, root
from rayexpand.data.seeds.labels import encode_labels, parsed_labels
from rayexpand.data.seeds.listing import COMMON, EXTENSIONS, Listing, Read, Skipped, fault_code, unique_ids
from rayexpand.data.seeds.places import Place, blaming
from rayexpand.data.seeds.source import DataConfig
from rayexpand.data.seeds.tarscan import BLOCK, DamagedTar, Member, header_size, members

__all__ = ["check", "list_seeds", "reader", "root", "splits"]

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LABEL_BYTES = {"cls": 1 << 12, "json": 1 << 20}  # longer files are no labels
_INT32 = 2**31


@dataclass(slots=True)
class _Sample:
    key: str
    suffixes: set[str] = field(default_factory=set)
    image: Member | None = None
    images: list[tuple[str, str]] = field(default_factory=list)  # part of `compound` and name of each
    rank: int = 0  # of the image: a common extension goes before others, then one alone before one behind a part
    label: str | None = None
    unsafe: bool = False
    compound: dict[str, set[str]] = field(default_factory=dict)  # what lies between key and last suffix -> kinds
    image_part: str = ""  # of the image: its part of `compound`, "" for an exact one
    collided: bool = False  # this is one of the `collisions` of a sample

    def collisions(self) -> list[_Sample]:
        """Samples whose names go on after the first dot, where a key ends, so that they fell to the key of this one:
        images with a label file of their own. Beside a label of `mask`, `mask.seg.png` and `mask.seg.json` are none."""
        own = {"cls"} if self.suffixes & {"cls", "json"} else {"cls", "json"}
        return [_Sample(f"{self.key}.{part}", collided=True, unsafe=self.unsafe) for part, kinds in
                self.compound.items() if part != self.image_part and "image" in kinds and kinds & own]

    def unused(self) -> list[str]:
        """Images that no row stands for, and all files of what is no seed."""
        if not self.is_seed():
            return [f"{self.key}.{suffix}" for suffix in sorted(self.suffixes)]
        rows = {one.key.removeprefix(f"{self.key}.") for one in self.collisions()}
        return [name for part, name in self.images if part not in rows and self.image and name != self.image.name]

    def fault(self) -> str:
        if self.unsafe:
            return Reason.UNSAFE_PATH
        if self.collided:
            return Reason.DUPLICATE_ID
        if self.image is None:
            return Reason.MISSING
        if not self.image.is_file:
            return Reason.UNREADABLE
        return Reason.TOO_LARGE if max(self.image.size, self.image.block) >= _INT32 else ""

    def is_seed(self) -> bool:
        """Files such as a README or a lone caption are not."""
        return self.image is not None or self.label is not None or "cls" in self.suffixes


@dataclass(slots=True)
class _Shard:
    """The samples of one tar, or what is wrong with it."""

    keys: pa.Array
    labels: list[str | None]
    faults: np.ndarray
    names: pa.Array
    blocks: np.ndarray
    sizes: np.ndarray
    skipped: list[str]  # members that belong to no seed, and further images of one


def check(data: DataConfig) -> DatasetFiles:
    """The tar files, the first of which begins like one. Raises SeedDataError."""
    found = dataset_files(data, ".tar", *_PACKED)
    place, files = found.folder, found.names
    if packed := [name for name in files if name.endswith(_PACKED)]:
        raise SeedDataError(f"data.path: {len(packed)} of {len(files)} tar files are compressed ({few(packed)}), so "
                            "single images cannot be read from them; uncompress them, for example with gunzip")
    with blaming("data.path", files[0], place), place.at(files[0]).open() as file:
        try:
            next(members(file), None)
        except DamagedTar as error:
            raise SeedDataError(f"data.path: '{files[0]}' {error}; copy it again, or leave it out") from error
    return found


def splits(data: DataConfig) -> list[str]:
    return dataset_files(data, ".tar", *_PACKED).splits


def list_seeds(data: DataConfig) -> Listing:
    """Reads headers and label files only, several tars at a time. Ids are `<tar stem>/<key>`."""
    listed = check(data)
    place, files = listed.folder, listed.names
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: _scan(data, place, name), files))
    if damaged := [shard for shard in found if isinstance(shard, str)]:
        raise SeedDataError(f"data.path: {len(damaged)} of {len(files)} tar files cannot be listed: "
                            f"{'; '.join(damaged[:5])}; copy them again, or leave them out")
    shards = [shard for shard in found if not isinstance(shard, str)]
    skipped = Skipped()
    skipped.add(listed.others)
    for name, shard in zip(files, shards, strict=True):
        skipped.add(f"{name}/{member}" for member in shard.skipped)
    stems = [posixpath.basename(name).removesuffix(".tar") for name in files]
    if len(set(stems)) < len(stems):
        stems = [name.removesuffix(".tar") for name in files]
    ids, repeated = unique_ids(pa.array([f"{stem}/{key}" for stem, shard in zip(stems, shards, strict=True)
                                         for key in shard.keys.to_pylist()], pa.string()))
    encoded = encode_labels(parsed_labels([text for shard in shards for text in shard.labels], data), data)
    labels, classes = encoded.codes, encoded.keys
    faults = np.concatenate([shard.faults for shard in shards])
    faults[(faults == 0) & (labels < 0)] = fault_code(Reason.BAD_LABEL)
    faults[repeated & (faults != fault_code(Reason.UNSAFE_PATH))] = fault_code(Reason.DUPLICATE_ID)
    number = np.repeat(np.arange(len(files), dtype=np.int32), [len(shard.labels) for shard in shards])
    return Listing(ids, labels, faults, classes, classes, files, number,
                   pa.concat_arrays([shard.names for shard in shards]),
                   np.concatenate([shard.blocks for shard in shards]),
                   np.concatenate([shard.sizes for shard in shards]), encoded.named, skipped,
                   left_out=lambda: listed.left_out(data, ".tar"))


def _scan(data: DataConfig, place: Place, name: str) -> _Shard | str:
    """The samples of one tar, or a text that names it and says what is wrong."""
    try:
        with blaming("data.path", name, place), place.at(name).open() as file:
            skipped: list[str] = []
            everything = [*_samples(file, data.label_column, skipped)]
            samples = [one for sample in everything if sample.is_seed() for one in (sample, *sample.collisions())]
            skipped += [name for sample in everything for name in sample.unused()]
    except DamagedTar as error:
        return f"'{name}' {error}"
    images = [sample.image if sample.image and not sample.fault() else None for sample in samples]
    return _Shard(pa.array([sample.key for sample in samples], pa.string()), [sample.label for sample in samples],
                  np.fromiter((fault_code(sample.fault()) for sample in samples), np.int8),
                  pa.array([sample.image.name if sample.image else "" for sample in samples], pa.string()),
                  np.fromiter((image.block if image else -1 for image in images), np.int32),
                  np.fromiter((image.size if image else -1 for image in images), np.int32), skipped)


def _samples(file: IO[bytes], label_field: str, skipped: list[str]) -> Iterator[_Sample]:
    """Runs of members with one key. A key that comes back, or repeats a suffix, starts another sample. Files without a
    key go to `skipped`."""
    sample: _Sample | None = None
    for member in members(file):
        folder, _, base = re.sub(r"^(\./+)+", "", member.name).rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not stem or not dot or member.name.endswith("/"):  # folders, hidden files, files without a suffix
            if member.is_file and (not dot if stem else base.lower().endswith(EXTENSIONS)):
                skipped.append(member.name)
            continue
        key, suffix = f"{folder}/{stem}" if folder or member.name.startswith("/") else stem, suffix.lower()
        if sample is None or sample.key != key or suffix in sample.suffixes:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        sample.suffixes.add(suffix)
        sample.unsafe |= _leaves(member.name)
        part, _, last = suffix.rpartition(".")
        kind = "image" if f".{last}" in EXTENSIONS else last
        if part and kind in ("image", "cls", "json"):
            sample.compound.setdefault(part, set()).add(kind)
        rank = 2 * (f".{last}" in COMMON) + (not part) + 1 if kind == "image" else 0
        if rank:
            sample.images.append((part, member.name))
        if rank > sample.rank:
            sample.image, sample.rank, sample.image_part = member, rank, part
        elif suffix == "cls" or (suffix == "json" and "cls" not in sample.suffixes):
            sample.label = _label(file, member, suffix, label_field)
    if sample is not None:
        yield sample


def _leaves(name: str) -> bool:
    return re.match(r"/|\\\\|[A-Za-z]:[/\\]", name) is not None or ".." in re.split(r"[/\\]", name)


def _label(file: IO[bytes], member: Member, suffix: str, label_field: str) -> str | None:
    """Label text of a .cls or .json member, None where it holds none."""
    if not member.is_file or member.size > _LABEL_BYTES[suffix]:
        return None
    file.seek(member.block * BLOCK)
    content = file.read(member.size)
    try:
        value = content.decode() if suffix == "cls" else json.loads(content)[label_field]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    def read(row: dict[str, Any]) -> bytes:
        start, size = (row["group"] - 1) * BLOCK, BLOCK + row["offset"]
        content = folder.at(files[row["file"]]).read_range(start, size)
        if len(content) < size or header_size(content[:BLOCK]) != row["offset"]:
            raise RowFault(Reason.UNREADABLE, f"{row['seed_id']}: '{files[row['file']]}' is not what it was when the "
                           "dataset was listed; put the old file back, or start under another name")
        return content[BLOCK:]

    return read
