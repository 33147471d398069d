"""From the folder of an official layout to the files that `data` of a job reads."""

from __future__ import annotations

import csv
import io
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.contract.errors import DigestMismatch, RayexpandError, SeedDataError, UsageError, few, looked_at
from rayexpand.data import seeds
from rayexpand.data.published.divisions import Division, counted, divided
from rayexpand.data.published.found import FoundSet
from rayexpand.data.published.sets import SETS, PublishedSet
from rayexpand.data.seeds.labels import with_class_names
from rayexpand.data.seeds.places import inside
from rayexpand.data.seeds.source import class_mapping


@dataclass(frozen=True)
class Prepared:
    """What was found, and the files that say it."""

    name: str
    split: str
    label: str
    classes: int
    images: Mapping[str, int]  # by part
    published: Mapping[str, int]
    sections: Mapping[str, Mapping[str, Any]]  # part -> section `data`
    files: Mapping[str, bool]  # path -> whether this call wrote it
    groups: str | None  # file of the groups of a test set
    notes: Sequence[str]  # what differs from what was published, and what is ours


def prepare(name: str, folder: str, split: str = "official", label: str = "", allow_counts: bool = False) -> Prepared:
    """Reads the official layout of a set in `folder` and writes its manifest and class words beside the images.

    The second time nothing is written. Raises UsageError for a name that is none; SeedDataError for missing parts,
    images and labels that cannot be read, and counts other than those published (all of them at once), unless
    `allow_counts`; DigestMismatch where the files are there with another content.
    """
    chosen, by, label = _chosen(name, split, label)
    split = "official" if by == chosen.divisions["official"] else split
    base = _base(name, chosen, folder)
    with _reading(name, base):
        everything = chosen.read(base, label)
        there, absent = _there(name, base, everything)
        found = divided(there, by)
    wrong = _wrong(by, found, absent, chosen.classes.get(label, by.classes))
    if wrong and not allow_counts:
        raise SeedDataError("\n  ".join([
            f"{name}: what is in '{base}' is not what was published", *wrong,
            f"unpack the published files again ({_archives(chosen)}), or take the set as it is with --allow-counts"]))
    stem = "-".join([name, *([label] if label != chosen.labels[0] else []), *([split] if split != "official" else [])])
    images = {part: counted(some, by, part) for part, some in found.parts.items()}
    notes = [*wrong, *([by.about] if by.about else []), *found.notes]
    return _written(Prepared(name, split, label, len(found.classes), images, by.counts, {}, {}, None, notes),
                    base / stem, found, chosen, by)


def _chosen(name: str, split: str, label: str) -> tuple[PublishedSet, Division, str]:
    if name not in SETS:
        raise UsageError(_no_such("set", name, SETS) + "; `rayexpand data ls` lists them")
    chosen = SETS[name]
    if split not in chosen.divisions:
        raise UsageError(f"--split: {_no_such('split', split, chosen.divisions)}; {name} has "
                         f"{few([*chosen.divisions], 9)}")
    label = label or chosen.labels[0]
    if label not in chosen.labels:
        has = few(chosen.labels, 9) if any(chosen.labels) else "one kind of labels, leave it out"
        raise UsageError(f"--label: {_no_such('label', label, chosen.labels)}; {name} has {has}")
    return chosen, chosen.divisions[split], label


def _no_such(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = get_close_matches(name, [*known], n=1)
    return f"there is no {what} '{name}'" + (f", did you mean '{near[0]}'?" if near and near[0] else "")


def _archives(chosen: PublishedSet) -> str:
    return ", ".join(dict.fromkeys(chosen.files.values()))


def _base(name: str, chosen: PublishedSet, folder: str) -> Path:
    """The folder of the set: that which is given, or where its archive or torchvision put it. Raises SeedDataError."""
    top = Path(folder).expanduser()
    if not top.is_dir():
        what = "is not on a disk here" if "://" in folder else f"is no folder{looked_at(folder)}"
        raise SeedDataError(f"{name}: '{folder}' {what}; unpack {_archives(chosen)} and name the folder")
    bases = [top / home for home in chosen.homes]
    absent = [[part for part in chosen.files if not (base / part).exists()] for base in bases]
    best = min(range(len(bases)), key=lambda n: len(absent[n]))
    if absent[best]:
        parts = "; ".join(f"{few([part for part in absent[best] if chosen.files[part] == archive])} of {archive}"
                          for archive in dict.fromkeys(chosen.files[part] for part in absent[best]))
        raise SeedDataError(f"{name}: '{bases[best]}'{looked_at(folder)} lacks {parts}. Get what is missing from the "
                            f"official page of {chosen.title} and unpack it there")
    return bases[best]


@contextmanager
def _reading(name: str, base: Path) -> Iterator[None]:
    """Whatever a parser makes of a damaged file, as an error for people."""
    try:
        yield
    except RayexpandError as error:
        raise error if str(error).startswith(f"{name}:") else SeedDataError(f"{name}: {error}") from error
    except Exception as error:
        raise SeedDataError(f"{name}: '{base}' is not the official layout ({type(error).__name__}: {error}); unpack "
                            f"{_archives(SETS[name])} again") from error


def _there(name: str, base: Path, found: FoundSet) -> tuple[FoundSet, dict[str, list[str]]]:
    """What is on the disk, and by official part the paths that the lists name and nobody has. Raises SeedDataError for
    what a manifest could not read."""
    if found.arrays is not None:
        return found, {}
    paths = [path for part in found.parts.values() for path in part.paths]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise SeedDataError(f"{name}: {len(twice)} images are listed twice ({few(twice)}); unpack the lists again")
    if odd := [path for path in paths if not _is_text(path)]:
        raise SeedDataError(f"{name}: {len(odd)} file names are not UTF-8 ({few([ascii(path) for path in odd])}); "
                            "rename the files")
    boundary = os.path.realpath(base)
    names = {folder: _names(base / folder, boundary) for folder in {os.path.dirname(path) for path in paths}}
    if outside := sorted(folder for folder, seen in names.items() if seen is None):
        raise SeedDataError(f"{name}: links lead out of '{base}' ({few(outside)}), and a manifest reads nothing there; "
                            "put the images themselves below it, or hard links")
    has = {path for path in paths if os.path.basename(path) in (names[os.path.dirname(path)] or ())}
    parts = {part: images.rows([row for row, path in enumerate(images.paths) if path in has])
             for part, images in found.parts.items()}
    return replace(found, parts=parts), {part: [path for path in images.paths if path not in has]
                                         for part, images in found.parts.items()}


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names(folder: Path, boundary: str) -> set[str] | None:
    """Files in a folder; None where it, or one of them, leads out of the set by a link."""
    if not folder.is_dir():
        return set()
    if not inside(os.path.realpath(folder), boundary):
        return None
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.is_file()]
    if any(entry.is_symlink() and not inside(os.path.realpath(entry.path), boundary) for entry in files):
        return None
    return {entry.name for entry in files}


def _wrong(by: Division, found: FoundSet, absent: Mapping[str, Sequence[str]], classes: int) -> list[str]:
    """What differs from what was published, one line each."""
    lines = [f"{part}: {len(paths):,} images that the lists name are not there ({few(paths, 3)})"
             for part, paths in absent.items() if paths]
    have = {part: counted(images, by, part) for part, images in found.parts.items()}
    if have != by.counts and have != by.also:
        lines += [f"{part}: {have[part]:,} images, published are {count:,}" + (
            f" (or {by.also[part]:,})" if by.also and by.also[part] != count else "")
            for part, count in by.counts.items() if have[part] != count]
    if len(found.classes) != classes:
        lines.append(f"{len(found.classes):,} classes, published are {classes:,}")
    return lines


def _written(so_far: Prepared, stem: Path, found: FoundSet, chosen: PublishedSet, by: Division) -> Prepared:
    """Writes the files that are not there, the manifest last."""
    words = [(one.key, one.name, one.metaclass or chosen.metaclass, one.noun or chosen.noun) for one in found.classes]
    classes, manifest = stem.with_name(f"{stem.name}-classes.csv"), stem.with_name(f"{stem.name}.parquet")
    files, notes = {}, list(so_far.notes)
    files[str(classes)] = _write(classes, _csv(("key", "name", "metaclass", "noun"), words))
    if not files[str(classes)] and classes.read_bytes() != _csv(("key", "name", "metaclass", "noun"), words):
        _check_words(classes, [key for key, *_ in words])
        notes.append(f"'{classes}' has words of your own and stays")
    groups = stem.with_name(f"{stem.name}-groups.csv") if found.groups else None
    if groups is not None:
        files[str(groups)] = _write(groups, content := _csv(("seed_id", "group"), sorted(found.groups.items())))
        _same(groups, groups.read_bytes() == content)
    if found.arrays is None:
        table = _table(found, {"set": so_far.name, "split": so_far.split, "label": so_far.label,
                               "notes": [note for note in so_far.notes if note not in found.notes]})
        sink = io.BytesIO()
        pq.write_table(table, sink)
        files[str(manifest)] = _write(manifest, sink.getvalue())
        _same(manifest, files[str(manifest)] or _holds(manifest, table))
    sections = {part: _section(part, found, manifest, classes, by) for part, some in found.parts.items() if len(some)}
    for section in sections.values():
        if problems := seeds.check(seeds.DataConfig(**section)):
            raise SeedDataError("\n  ".join([f"{so_far.name}: the files that were written cannot be read", *problems]))
    return replace(so_far, sections=sections, files=files, groups=str(groups) if groups else None, notes=notes)


def _section(part: str, found: FoundSet, manifest: Path, classes: Path, by: Division) -> dict[str, Any]:
    if found.arrays is None:
        where = {"source": "manifest", "path": str(manifest), "split": part}
    else:
        (split,) = by.of.get(part, (part,))
        source = "npz" if found.arrays.endswith(".npz") else "cifar"
        path = manifest.with_name(found.arrays) if source == "npz" else manifest.parent
        where = {"source": source, "path": str(path), "split": split}
    return {**where, "classes": str(classes), **({"per_class": by.per_class[part]} if part in by.per_class else {})}


def _table(found: FoundSet, facts: Mapping[str, Any]) -> pa.Table:
    columns = {"path": pa.array([path for one in found.parts.values() for path in one.paths], pa.string()),
               "label": pa.array([label for one in found.parts.values() for label in one.labels], pa.int64()),
               "split": pa.array([part for part, one in found.parts.items() for _ in range(len(one))], pa.string())}
    table = pa.table(columns)
    schema = with_class_names(table.schema, "label", [one.key for one in found.classes])
    return table.replace_schema_metadata({**(schema.metadata or {}), b"rayexpand": json.dumps(facts).encode()})


def _csv(head: Sequence[str], rows: Sequence[Sequence[str]]) -> bytes:
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows([head, *rows])
    return sink.getvalue().encode()


def _write(file: Path, content: bytes) -> bool:
    """Makes a file that appears whole; False where there is one of that name. Raises SeedDataError."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}")
    try:
        if file.exists():
            return False
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SeedDataError(f"'{file}' cannot be written ({error.strerror}); a manifest lies in the folder of its "
                            "images, so this user needs the right to write there") from error
    return True


def _same(file: Path, is_same: bool) -> None:
    if not is_same:
        raise DigestMismatch(f"'{file}' is there and holds something else: the dataset or its split is not what it "
                             "was; put the old one back, or remove this file and run the same command again")


def _holds(file: Path, table: pa.Table) -> bool:
    try:
        return pq.read_table(file).equals(table, check_metadata=True)
    except (pa.ArrowException, OSError):
        return False


def _check_words(file: Path, keys: Sequence[str]) -> None:
    words = class_mapping(seeds.DataConfig(source="manifest", classes=str(file))) or {}
    if absent := [key for key in keys if key not in words]:
        raise SeedDataError(f"'{file}' is there and does not name {len(absent)} of {len(keys)} classes "
                            f"({few(absent)}); remove it, and it is written again")
