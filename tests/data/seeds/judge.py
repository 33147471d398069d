"""What rayexpand and other libraries make of one dataset, and whether they differ without a word."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from rayexpand.contract.errors import RowFault, SeedDataError
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import EXTENSIONS, DataConfig, SeedReader, build_index, survey
from rayexpand.data.seeds.listing import split_words
from tests.data.seeds.odd import FOLDERS, SPLITS, Case, Made

LIBRARIES = ("torchvision", "datasets", "webdataset")


@dataclass(frozen=True)
class Seen:
    digest: str
    label: str | None
    split: str = ""


@dataclass
class Reading:
    """What a reader makes of a dataset."""

    refused: str = ""
    images: list[Seen] = field(default_factory=list)
    classes: list[str] | None = None  # in the order of their labels
    rows_refused: Counter[str] = field(default_factory=Counter)  # by reason
    skipped: Counter[str] = field(default_factory=Counter)  # files by suffix


@dataclass
class Verdict:
    outcome: str
    silent: list[str]
    libraries: dict[str, str]  # what comparing with each came to


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- ours


def ours(case: Case, data: DataConfig) -> list[Reading]:
    """One reading, or one for each split where data.split is asked for."""
    first = _ours(data, "")
    if "data.split: missing" not in first.refused:
        return [first]
    column = re.search(r"data\.split_column to '([^']+)'", first.refused)
    fields = {"split_column": column[1]} if column else {}
    names = SPLITS[case.split]
    if case.layout in ("tar", "parquet"):
        names = tuple(word for name in names for word in split_words(name))
    found = [_ours(data.model_copy(update={**fields, "split": name}), name) for name in names]
    for one in found:
        if re.search(r"no (folder|row|file)|data\.split: |have no image(?! \('yak')", one.refused):
            one.refused = f"silent: the split that was asked for is refused: {one.refused}"
    return found


def _ours(data: DataConfig, split: str) -> Reading:
    try:
        index = build_index(data)
    except SeedDataError as error:
        return Reading(refused=str(error))
    found = Reading(classes=list(index.classes.key))
    for row in SeedReader(index, data).read(range(len(index))):
        try:
            if isinstance(row, RowFault):
                raise row
            pixels, note = decode(row.image)
            found.images.append(Seen(digest(row.image), index.classes.key[row.label], split))
            for library in LIBRARIES:
                theirs = library_pixels(library, row.image)
                if theirs is not None and not note and not np.array_equal(theirs, pixels):
                    found.refused = f"silent: {library} reads other pixels"
        except RowFault as fault:
            found.rows_refused[str(fault.reason)] += 1
    skipped = survey(data).get("skipped", {})
    found.skipped = Counter({suffix: one["files"] for suffix, one in skipped.items()})
    return found


# --- theirs


@cache
def library_pixels(library: str, content: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3) as a library decodes it; None where it fails."""
    try:
        if library == "torchvision":
            from torchvision.datasets.folder import pil_loader

            with NamedTemporaryFile() as file:
                file.write(content)
                file.flush()
                return np.asarray(pil_loader(file.name))
        if library == "webdataset":
            from webdataset.autodecode import imagehandler

            return imagehandler("rgb8")("png", content)
        import datasets

        return np.asarray(datasets.Image().decode_example({"bytes": content, "path": None}).convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        return None


def libraries(case: Case, made: Made) -> dict[str, Reading]:
    readers: dict[str, Callable[[Case, Made], Reading]] = {"datasets": _datasets}
    if case.layout in FOLDERS[:-1] and case.link != "loop":  # it would follow that for ever
        readers["torchvision"] = _torchvision
    if case.layout == "tar":
        readers["webdataset"] = _webdataset
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read(case, made)
        except Exception as error:  # each has errors of its own
            found[name] = Reading(refused=f"{type(error).__name__}: {error}")
    return found


def _torchvision(case: Case, made: Made) -> Reading:
    from torchvision.datasets import ImageFolder

    roots = [made.root] if case.split in ("none", "inside", "unknown words") else [
        path for path in sorted(made.root.iterdir()) if path.is_dir()]
    found = Reading()
    for root in roots:
        dataset = ImageFolder(str(root))
        found.classes = dataset.classes if len(roots) == 1 else None
        for path, label in dataset.samples:
            if Path(path).is_file():  # a pipe would be waited for
                found.images.append(Seen(digest(Path(path).read_bytes()), dataset.classes[label],
                                         root.name if len(roots) > 1 else ""))
    return found


def _webdataset(case: Case, made: Made) -> Reading:
    import webdataset

    found = Reading()
    for url in sorted(made.root.rglob("*.tar")):
        for sample in webdataset.WebDataset(str(url), shardshuffle=False, empty_check=False):
            label = sample.get("cls")
            for suffix, content in sample.items():
                if isinstance(content, bytes) and f".{suffix}" in EXTENSIONS:
                    found.images.append(Seen(digest(content), label.decode() if label else None))
    return found


def _datasets(case: Case, made: Made) -> Reading:
    import datasets

    datasets.disable_progress_bars()
    kind = {"tar": "webdataset", "parquet": "parquet", "csv": "csv", "manifest": "parquet"}.get(case.layout,
                                                                                               "imagefolder")
    path = str(made.data.path)
    given: dict[str, Any] = ({"data_files": path.removeprefix("zip://::")} if case.layout in ("zip", "csv", "manifest")
                             else {"data_dir": path})
    found = Reading()
    for split, rows in datasets.load_dataset(kind, streaming=True, **given).items():
        features = rows.features or {}
        names = getattr(features.get("label"), "names", None)
        found.classes = names
        rows = rows.cast(datasets.Features({name: _undecoded(kind) for name, kind in features.items()}))
        for row in rows:
            for content, label in _images(row, made, kind):
                found.images.append(Seen(digest(content), names[label] if names and label is not None else label,
                                         str(split)))
    return found


def _undecoded(feature: Any) -> Any:
    import datasets

    return datasets.Image(decode=False) if isinstance(feature, datasets.Image) else feature


def _images(row: dict[str, Any], made: Made, kind: str) -> Iterator[tuple[bytes, Any]]:
    label = row.get("cls", row.get("label"))
    if isinstance(row.get("json"), dict) and label is None:
        label = row["json"].get("label")
    if "path" in row:
        file = made.root / row["path"]
        if file.is_file():
            yield file.read_bytes(), label
    for cell in row.values():
        if isinstance(cell, dict) and "bytes" in cell:
            content = cell["bytes"]
            if content is None and cell.get("path"):
                path = Path(cell["path"])
                content = path.read_bytes() if path.is_file() else None
                if content is None and "::" in cell["path"]:
                    import fsspec

                    with fsspec.open(cell["path"]) as file:
                        content = file.read()
            if content is not None:
                yield content, label


# --- judging


def judge(case: Case, made: Made) -> Verdict:
    silent: list[str] = []
    try:
        found = ours(case, made.data)
    except Exception as error:
        return Verdict("crash", [f"crash: {type(error).__name__}: {error}"], {})
    theirs = libraries(case, made)
    refusals = [one.refused for one in found if one.refused]
    silent += [text for text in refusals if text.startswith("silent")]
    refusals = [text for text in refusals if not text.startswith("silent")]
    silent += [f"unclear refusal: {text}" for text in refusals if not re.search(r"data\.\w+: .+[;,] .+", text, re.S)]
    compared = {name: "refused" if one.refused else "equal" for name, one in theirs.items()}
    if len(refusals) == len(found):
        return Verdict("refused", silent, compared)
    silent += _wrong(made, found)
    if not refusals:
        silent += _lost(made, found)
    for name, one in theirs.items():
        if not one.refused:
            differences, note = _against(name, case, found, one, made)
            silent += differences
            compared[name] = note
    outcome = "rows refused" if any(one.rows_refused for one in found) else (
        "files counted" if any(one.skipped for one in found) else "all read")
    return Verdict(outcome, silent, compared)


def _wrong(made: Made, found: list[Reading]) -> Iterator[str]:
    """Images that are kept with another label than was meant, or beside those of another split."""
    meant: dict[str, set[str | None]] = {}
    splits = {image.digest: image.split for image in made.images}
    for image in made.images:
        meant.setdefault(image.digest, set()).add(image.label)
    for one in found:
        for seen in one.images:
            if seen.digest not in meant:
                yield f"kept an image that was not meant: {seen}"
            elif seen.label not in meant[seen.digest]:
                yield f"label {seen.label!r}, meant {meant[seen.digest]}"
        there = {splits[seen.digest] for seen in one.images if seen.digest in splits}
        if len(there) > 1 and there <= {"train", "test", "Train-0", "Val_1"}:
            yield f"one dataset of the splits {sorted(there)}"


def _lost(made: Made, found: list[Reading]) -> Iterator[str]:
    """Images and files of which nothing is said."""
    left = Counter(image.digest for image in made.images)
    left.subtract(Counter(seen.digest for one in found for seen in one.images))
    paths = {image.digest: image.path for image in made.images}
    files = [paths[name] for name, count in left.items() for _ in range(count)] + made.beside
    skipped = sum((one.skipped for one in found), Counter())
    unsaid = [path for path in files if not _take(skipped, path)]
    refused = sum(sum(one.rows_refused.values()) for one in found)
    if len(unsaid) > refused:
        yield f"{len(unsaid)} files left, {refused} rows refused, nothing said of some of {sorted(unsaid)[:4]}"


def _take(skipped: Counter[str], path: str) -> bool:
    name = PurePath(path)
    keys = [f"hidden {name.suffix}"] if name.name.startswith(".") else [name.suffix.lower() or "no suffix"]
    for key in keys:
        if skipped[key]:
            skipped[key] -= 1
            return True
    return False


def _against(library: str, case: Case, found: list[Reading], theirs: Reading, made: Made) -> tuple[list[str], str]:
    """(silent differences, what comparing came to)."""
    silent: list[str] = []
    kept = {seen.digest: seen for one in found for seen in one.images}
    notes = set()
    for seen in theirs.images:
        mine = kept.get(seen.digest)
        if mine is not None and seen.label is not None:
            why = _why(library, case, str(seen.label), str(mine.label), made)
            if why is None:
                silent.append(f"{library}: label {seen.label!r}, ours {mine.label!r}")
            elif why:
                notes.add(why)
    splits = {seen.split for seen in theirs.images if seen.digest in kept}
    if len(found) == 1 and len(splits) > 1:
        silent.append(f"{library}: splits {sorted(splits)}, ours one dataset")
    if {*kept} - {seen.digest for seen in theirs.images}:
        notes.add("it leaves out images")
    if theirs.classes and len(found) == 1 and "innermost" not in "".join(notes):
        partly = "it leaves out images" in notes
        classes = [name for name in found[0].classes or [] if name in theirs.classes or not partly]
        if classes != theirs.classes:
            silent.append(f"{library}: classes {theirs.classes}, ours {found[0].classes}")
    return silent, ", ".join(sorted(notes)) or "equal"


def _why(library: str, case: Case, theirs: str, mine: str, made: Made) -> str | None:
    """Which rule of the library makes its label another one; "" for equal labels, None for no rule."""
    if theirs == mine:
        return ""
    if library == "datasets" and case.layout in ("csv", "tar") and _number(theirs) == _number(mine) is not None:
        return "it reads texts of digits as numbers"
    if library == "datasets" and case.layout in FOLDERS:
        return "it takes the innermost folder"
    if case.beside == "further folder" and made.names and theirs.isdigit() and made.names[int(theirs)] == mine:
        return "it takes the types of a further file"
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

