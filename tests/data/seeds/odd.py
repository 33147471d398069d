"""Datasets in odd shapes: each case is one level of each factor, and all pairs of levels occur. What was written is
known, so that what a reader makes of it can be judged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayexpand.data.seeds import DataConfig
from tests.corpus import encoded, odd_images, photo, rotated, write_parquet, write_tar

FACTORS: dict[str, tuple[str, ...]] = {
    "layout": ("folder", "nested", "linked", "above", "zip", "tar", "parquet", "csv", "manifest"),
    "naming": ("plain", "unicode", "spaces", "dots", "case", "long", "zeros", "underscores", "numbers", "odd signs",
               "split words"),
    "labels": ("integers from 7", "texts", "digits", "missing", "class table", "absent class", "two kinds"),
    "image": ("RGB", "1", "L", "LA", "P", "P clear", "RGBA", "CMYK", "I;16", "12 of 16", "RGB 12 of 16", "turned",
              "progressive", "truncated", "empty", "animated"),
    "link": ("none", "file", "folder", "dangling", "loop", "hard", "pipe"),
    "split": ("none", "train", "pair", "odd pair", "inside", "one and other", "unknown words"),
    "beside": ("nothing", "heic", "text", "no suffix", "hidden", "upper case", "dib", "further folder")}
FOLDERS = ("folder", "nested", "linked", "above", "zip")  # layouts of one folder for each class
SPLITS = {"train": ("train",), "pair": ("train", "test"), "odd pair": ("Train-0", "Val_1"), "inside": ("train", "test"),
          "one and other": ("train", "unlabeled"), "unknown words": ("fold a", "fold b")}


@dataclass(frozen=True)
class Case:
    number: int
    levels: dict[str, str] = field(hash=False)

    def __getattr__(self, name: str) -> str:
        try:
            return self.__dict__["levels"][name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __str__(self) -> str:
        return f"{self.number}: " + ", ".join(self.levels.values())


@dataclass(frozen=True)
class Written:
    """An image file as it was written."""

    path: str  # file, member or row
    content: bytes
    label: str | None  # as it was meant, None without one
    split: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Made:
    data: DataConfig
    images: list[Written] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)  # files that some reader may take for images, or for part of it
    names: list[str] | None = None  # of a class table, in its order
    root: Path = Path()  # of what libraries are given


def cases(seed: int, at_least: int) -> list[Case]:
    """Every pair of levels of two factors occurs in the first cases; further ones are drawn until `at_least`."""
    draw, names = Random(seed), list(FACTORS)
    open_pairs = {((a, x), (b, y)) for a, b in combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]}
    found: list[Case] = []

    def pair(a: str, x: str, b: str, y: str) -> tuple[tuple[str, str], tuple[str, str]]:
        return ((a, x), (b, y)) if names.index(a) < names.index(b) else ((b, y), (a, x))

    while open_pairs or len(found) < at_least:
        chosen = dict(draw.choice(sorted(open_pairs))) if open_pairs else {}
        for name in draw.sample(names, len(names)):
            if name not in chosen:
                levels = draw.sample(FACTORS[name], len(FACTORS[name]))
                chosen[name] = max(levels, key=lambda level: sum(pair(name, level, other, value) in open_pairs
                                                                 for other, value in chosen.items()))
        open_pairs -= {pair(a, chosen[a], b, chosen[b]) for a, b in combinations(names, 2)}
        found.append(Case(len(found), {name: chosen[name] for name in names}))
    return found


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits of (H, W) or (H, W, 2 to 4) values, which Pillow cannot write."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2] if values.ndim == 3 else 1]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(values: np.ndarray) -> bytes:
    """A TIFF of 16 bits of (H, W, 3) values, which Pillow cannot write."""
    height, width, _ = values.shape
    body = values.astype("<u2").tobytes()
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 122), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(body))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head + struct.pack("<HHH", 16, 16, 16) + body


def odd_image(kind: str) -> tuple[bytes, str]:
    """Encoded image of a level of the factor `image`, and its extension."""
    picture, named = Image.fromarray(photo(59)), odd_images()
    gray = np.asarray(picture.convert("L")).astype(np.uint16)
    jpeg = encoded(picture, "JPEG", quality=95)
    return {"RGB": (encoded(picture), "png"), "1": (encoded(picture.convert("1")), "png"),
            "L": (encoded(picture.convert("L"), "JPEG"), "jpg"), "LA": (named["la.png"][0], "png"),
            "P": (named["palette.png"][0], "png"), "P clear": (named["palette_alpha.png"][0], "png"),
            "RGBA": (named["rgba.webp"][0], "webp"), "CMYK": (named["cmyk.jpg"][0], "jpeg"),
            "I;16": (encoded(gray * 257), "png"), "12 of 16": (encoded(gray * 16), "png"),
            "RGB 12 of 16": (deep_png(photo(59).astype(np.uint16) * 16), "png"), "turned": (rotated("JPEG"), "jpg"),
            "progressive": (encoded(picture, "JPEG", progressive=True, quality=95), "jpg"),
            "truncated": (jpeg[:len(jpeg) * 2 // 3], "jpg"), "empty": (b"", "png"),
            "animated": (named["animated.gif"][0], "gif")}[kind]


def stem(naming: str, number: int) -> str:
    return {"plain": f"img{number}", "unicode": f"ñandú日本{number}", "spaces": f"my pic {number}",
            "dots": f"v1.{number}", "case": f"{'Img' if number % 2 else 'img'}{number // 2}",
            "long": "l" * 180 + str(number),
            "zeros": f"{number:04d}", "underscores": f"_a__{number}_", "numbers": str(number),
            "odd signs": f"a,b'c;#%{number}",
            "split words": f"{'test' if number % 3 == 2 else 'train'}_{number}"}[naming]


def class_names(case: Case) -> tuple[str, ...]:
    if case.labels == "integers from 7":
        return "7", "8", "20"
    if case.labels == "digits":
        return "007", "07", "7"
    if case.labels == "two kinds":
        return "1", "2", "cat"
    extra = {"unicode": "日本ü", "spaces": " of prey", "dots": "_1.8t", "long": "x" * 60, "underscores": "_great_",
             "odd signs": "'s, & co", "case": "CAT"}.get(case.naming, "")
    return f"cat{extra}", "Cat" if case.naming == "case" else f"dog{extra}", f"emu{extra}"


def write(case: Case, folder: Path) -> Made:
    """Writes the dataset of a case below `folder`."""
    images = list(_images(case))
    writers = {"tar": _tars, "parquet": _parquet, "csv": _manifest, "manifest": _manifest}
    made = writers.get(case.layout, _folder)(case, folder, images)
    if case.layout != "parquet" and case.labels in ("class table", "absent class") and (
            case.layout not in FOLDERS or case.labels == "class table"):
        names = [*class_names(case), *(["yak"] if case.labels == "absent class" else [])]
        (folder / "classes.json").write_text(json.dumps({name: f"the {name}" for name in names}))
        made.data = made.data.model_copy(update={"classes": str(folder / "classes.json")})
    return made


def _images(case: Case) -> Iterator[Written]:
    """Two or three images of each of three classes in each split; the first is the odd one."""
    splits = SPLITS.get(case.split, ("",))
    number = 0
    for split in splits:
        for label in class_names(case):
            for _ in range(3 if len(splits) == 1 else 2):
                content, extension = odd_image(case.image) if number == 0 else (encoded(photo(number)), "png")
                missing = case.labels == "missing" and number == 1
                yield Written(f"{stem(case.naming, number)}.{extension}", content, None if missing else label, split)
                number += 1


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _beside(case: Case, folder: Path, made: Made) -> None:
    """A file that lies among the images of a class folder."""
    names = {"heic": "x.heic", "text": "notes.txt", "no suffix": "LICENSE", "hidden": ".x.png", "dib": "x.dib",
             "upper case": "UP.PNG", "further folder": "deeper/still/x.png"}
    if case.beside in names:
        name = names[case.beside]
        content = encoded(photo(50)) if name.lower().endswith("png") else b"something else"
        _put(folder / name, content)
        if case.beside in ("upper case", "further folder"):
            label = _split_of(case, made, folder) if case.split == "unknown words" else folder.name
            made.images.append(Written(str(folder / name), content, label, _split_of(case, made, folder)))
        else:
            made.beside.append(str(folder / name))


def _split_of(case: Case, made: Made, folder: Path) -> str:
    parts = folder.relative_to(made.root).parts
    return parts[0] if case.split in ("train", "pair", "odd pair", "one and other", "unknown words") else ""


def _folder(case: Case, folder: Path, images: list[Written]) -> Made:
    root = folder / ("set/images" if case.layout == "above" else "set")
    root.mkdir(parents=True)
    made = Made(DataConfig(source="imagefolder", path=str(folder / "set")), root=root)
    for image in images:
        above = root if case.split in ("none", "inside") else root / image.split
        inner = ([image.split] if case.split == "inside" else []) + (["deep"] if case.layout == "nested" else [])
        where = above.joinpath(image.label, *inner) if image.label else above
        _put(where / image.path, image.content)
        label = image.split if case.split == "unknown words" else image.label  # the folder at the top
        made.images.append(Written(str(where / image.path), image.content, label, image.split))
    tops = [root] if case.split in ("none", "inside") else [root / split for split in SPLITS[case.split]]
    first = tops[0] / class_names(case)[0]
    if case.labels == "absent class":
        (tops[0] / "yak").mkdir()
    _beside(case, first, made)
    if case.layout == "linked":
        store = folder / "store"
        first.rename(store)
        first.symlink_to(store)
    if case.layout != "zip":
        _link(case, folder, first, made)
        return made
    archive = folder / "set.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(root.rglob("*")):
            packed.write(path, str(path.relative_to(root)))
    made.data = DataConfig(source="imagefolder", path=f"zip://::{archive}")
    return made


def _link(case: Case, folder: Path, where: Path, made: Made) -> None:
    split = _split_of(case, made, where)
    content, label = encoded(photo(45)), split if case.split == "unknown words" else where.name
    if case.link in ("file", "hard", "folder"):
        _put(folder / "blobs/linked.png", content)
        if case.link == "hard":
            os.link(folder / "blobs/linked.png", where / "linked.png")
        else:
            name = "linked.png" if case.link == "file" else "more"
            (where / name).symlink_to(folder / "blobs" / ("linked.png" if case.link == "file" else ""))
        name = "more/linked.png" if case.link == "folder" else "linked.png"
        made.images.append(Written(str(where / name), content, label, split))
    elif case.link == "dangling":
        (where / "gone.png").symlink_to(folder / "nowhere.png")
        made.beside.append(str(where / "gone.png"))
    elif case.link == "loop":
        (where / "again").symlink_to(where)
    elif case.link == "pipe":
        os.mkfifo(where / "pipe.png")
        made.beside.append(str(where / "pipe.png"))


def _tar_names(case: Case, split: str, part: int) -> str:
    return {"none": f"part-{part}", "inside": f"{split}/{part}", "odd pair": f"set_{split}.{part}"}.get(
        case.split, f"{split}-{part}")


def _shards(case: Case, images: list[Written]) -> dict[str, list[Written]]:
    """Images of each file of a dataset of files: two for each split."""
    found: dict[str, list[Written]] = {}
    for split in SPLITS.get(case.split, ("",)):
        mine = [image for image in images if image.split == split]
        for part in (0, 1):
            found[_tar_names(case, split, part)] = mine[part * len(mine) // 2:(part + 1) * len(mine) // 2]
    return found


def _tars(case: Case, folder: Path, images: list[Written]) -> Made:
    root = folder / "set"
    made = Made(DataConfig(source="webdataset", path=str(root)), root=root)
    for shard, (name, mine) in enumerate(_shards(case, images).items()):
        members: list[tuple[str, bytes | str]] = []
        for image in mine:
            base = image.path.rsplit(".", 1)[0]
            members.append((image.path, image.content))
            if image.label is not None:
                as_json = case.labels == "two kinds" and shard == 1
                members.append((f"{base}.json", json.dumps({"label": image.label}).encode()) if as_json else
                               (f"{base}.cls", image.label.encode()))
            made.images.append(Written(f"{name}/{image.path}", image.content, image.label, image.split))
        if shard == 0:
            extra = {"heic": "x.heic", "text": "notes.txt", "no suffix": "LICENSE", "hidden": ".x.png", "dib": "x.dib"}
            if case.beside in extra:
                members.append((extra[case.beside], encoded(photo(50))))
                made.beside.append(extra[case.beside])
            if case.beside == "upper case":
                members += [("UP.PNG", encoded(photo(50))), ("UP.cls", class_names(case)[0].encode())]
                made.images.append(Written("UP.PNG", encoded(photo(50)), class_names(case)[0], mine[0].split))
            if case.link in ("file", "dangling"):
                members += [("linked.png", mine[1].path if case.link == "file" else "nowhere.png"),
                            ("linked.cls", class_names(case)[0].encode())]
                made.beside.append("linked.png")
        write_tar(root / f"{name}.tar", members, tarfile.PAX_FORMAT)
    if case.beside == "further folder":
        write_tar(root / "more/x.tar", [("x.png", encoded(photo(50))), ("x.cls", b"1")])
        made.beside.append("more/x.tar")
    return made


def _value(case: Case, label: str | None) -> Any:
    return int(label) if label is not None and case.labels == "integers from 7" else label


def _parquet(case: Case, folder: Path, images: list[Written]) -> Made:
    root = folder / "set"
    names = [*class_names(case), *(["yak"] if case.labels == "absent class" else [])]
    table = case.labels in ("class table", "absent class")
    made = Made(DataConfig(source="parquet", path=str(root)), root=root, names=names if table else None)
    for shard, (name, mine) in enumerate(_shards(case, images).items()):
        labels: list[Any] = [_value(case, image.label) for image in mine]
        if table:
            labels = [names.index(image.label) for image in mine if image.label]
        if case.labels == "two kinds" and shard == 0:
            labels = [1 for _ in mine]
        cells: list[object] = [image.content for image in mine]
        if case.link in ("file", "dangling", "pipe") and shard == 0:
            _put(folder / "blobs/linked.png", mine[-1].content)
            (root / "pictures").mkdir(parents=True)
            target = root / "pictures/linked.png"
            if case.link == "pipe":
                os.mkfifo(target)
            else:
                target.symlink_to(folder / ("blobs/linked.png" if case.link == "file" else "nowhere"))
            cells[-1] = "pictures/linked.png"
        write_parquet(root / f"{name}.parquet", cells, pa.array(labels), names if table else None)
        for image in mine:
            label = "1" if case.labels == "two kinds" and shard == 0 else image.label
            made.images.append(Written(f"{name}/{image.path}", image.content, label, image.split))
    if case.beside in ("heic", "text", "no suffix", "dib"):
        name = {"heic": "x.heic", "text": "notes.txt", "no suffix": "LICENSE", "dib": "x.dib"}[case.beside]
        _put(root / name, b"x")
        made.beside.append(name)
    if case.beside == "further folder":
        write_parquet(root / "more/x.parquet", [encoded(photo(50))], pa.array([_value(case, "7")]))
        made.beside.append("more/x.parquet")
    return made


def _manifest(case: Case, folder: Path, images: list[Written]) -> Made:
    root = folder / "set"
    rows: list[dict[str, Any]] = []
    column = {"odd pair": "SPLIT", "inside": "subset"}.get(case.split, "split")
    file = root / ("list.csv" if case.layout == "csv" else "list.parquet")
    made = Made(DataConfig(source="manifest", path=str(file)), root=root)
    for number, image in enumerate(images):
        where = root / image.path
        if case.link in ("file", "dangling", "pipe") and number == len(images) - 1:
            _put(folder / "blobs/linked.png", image.content)
            if case.link == "pipe":
                os.mkfifo(where)
            else:
                where.symlink_to(folder / ("blobs/linked.png" if case.link == "file" else "nowhere"))
        else:
            _put(where, image.content)
        rows.append({"path": image.path, "label": _value(case, image.label)} | (
            {column: image.split} if case.split != "none" else {}))
        made.images.append(image)
    if case.beside == "upper case":
        _put(root / "UP.PNG", encoded(photo(50)))
        rows.append(rows[0] | {"path": "UP.PNG"})
        made.images.append(Written("UP.PNG", encoded(photo(50)), images[0].label, images[0].split))
    if case.layout == "csv":
        made.data = made.data.model_copy(update={"path": str(_csv(file, rows))})
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return made


def _csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    import csv

    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    file.write_text(text.getvalue(), encoding="utf-8")
    return file
