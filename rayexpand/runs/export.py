"""Committed samples of a run or loop in the layout another tool expects: WebDataset, ImageFolder or Hugging Face.

    webdataset    train/000000.tar ...               members <key>.png|jpg, <key>.cls, <key>.json; index.json. One kind
                                                     of image for all: where a run has both, JPEGs become PNGs
    imagefolder   train/<class>/<key>.png|jpg        train/metadata.csv, one line per image; up to about 100,000 images
    huggingface   data/train-00000-of-00007.parquet  the columns of the run's own files

Where the labels of a method are mixtures (Diff-Mix), samples carry `soft_label`, a list with one weight for each class;
those of a loop carry `round`, from 1.
In metadata.csv lists and scores are JSON, and a text that a spreadsheet would take for a formula, or a reader for
something else than this text, has an apostrophe before it (`storage.tables.csv_cell`).
Every image carries a mark of its synthetic origin (marks.py); its pixels, and so sample_sha256, are those of the run.

Keys number the samples from 0, zero-padded to one width, in the order of the run's files: contiguous, unique over the
whole dataset, without a dot (in WebDataset the first dot of a name starts its extension). Every sample is there once,
those of a retry included. All is written into a hidden folder beside `out` and renamed at the end, so nobody reads half
an export; what a killed export left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import tarfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from rayexpand.contract.errors import StorageError, UsageError
from rayexpand.contract.schema import (
    DATA_SCHEMA,
    DRAW_FIELDS,
    ROUND,
    SOFT_LABEL,
    ClassTable,
    data_place,
    huggingface_metadata,
)
from rayexpand.methods import label_words
from rayexpand.runs.joined import open_samples, round_of
from rayexpand.runs.marks import FROM_IMAGE, VOCABULARY, kind_of, mark_of, marked
from rayexpand.runs.run import Run
from rayexpand.runs.selections import Selection, read_selection
from rayexpand.runs.status import rounds_words
from rayexpand.storage.files import Files, process_token, token_alive
from rayexpand.storage.tables import batches, csv_cell

Layout = Literal["webdataset", "imagefolder", "huggingface"]
OnRows = Callable[[str, int, int], None]  # task, done, total

BATCH = 250  # rows held in memory at a time, and images in one row group of the Hugging Face layout
_EXTENSIONS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg"}
_PROVENANCE = ("method", *DRAW_FIELDS, "note", "sample_sha256")
_UNSAFE = re.compile(r"[^\w. -]")
_NAME_BYTES = 130  # of a class in a folder name; with a label before it still below the smallest limit in use, 143


@dataclass(frozen=True)
class Exported:
    folder: Path
    layout: str
    count: int  # samples
    files: int  # tar, image or parquet files
    pending: int  # planned samples the run had not decided when the export read it


def export(folder: str, out: str, layout: Layout, *, shard_images: int = 1000, selection: str | None = None,
           release: str = "", on_rows: OnRows = lambda task, done, total: None) -> Exported:
    """Writes the kept samples of the run or loop in `folder` to the new folder `out`.

    `shard_images`: samples of one tar or parquet file. `selection`: name of a decision in selections/, of which only
    the rows to keep are written. `release`: Markdown of the release sheet, for the card. Raises UsageError for an
    unknown layout or selection, a run without samples, or an `out` that exists, and StorageError where `out` cannot be
    written.
    """
    if layout not in get_args(Layout):
        near = get_close_matches(str(layout), get_args(Layout), n=1)
        raise UsageError(f"layout {layout!r} is unknown; " + (f"did you mean {near[0]!r}?" if near else
                                                              f"choose one of {', '.join(get_args(Layout))}"))
    if shard_images < 1:
        raise UsageError(f"shard_images is {shard_images}; give the samples of one file, 1 or more")
    target = _new_folder(out)
    run = open_samples(folder)
    totals = run.totals()
    chosen = read_selection(run, selection) if selection else None
    words = label_words(run.config.method, len(run.plan.index.classes))
    rows = _rows(run, chosen, totals.kept, on_rows)
    further = [ROUND] * ("rounds" in run.facts) + [SOFT_LABEL] * bool(words)
    if words:
        rows = (_with_soft_labels(table, run) for table in rows)
    partial = _partial_folder(target)
    one_kind = True
    try:
        if layout == "webdataset":
            one_kind = len(_image_kinds(run, chosen)) < 2
            made, files = _webdataset(rows, partial, run.plan.index.classes, shard_images, totals.kept, one_kind)
        elif layout == "imagefolder":
            made, files = _imagefolder(rows, partial, run.plan.index.classes, totals.kept, further)
        else:
            made, files = _huggingface(rows, partial, run.plan.index.classes, shard_images, further)
        if not made:
            raise UsageError(f"{folder} has no sample to export" + (f" in selection {selection!r}" if selection else
                             "; run `rayexpand expand` first, `rayexpand status` says how far it is"))
        (partial / "README.md").write_text(_readme(run, layout, made, files, selection, words, one_kind,
                                                     release),
                                             encoding="utf-8")
        _publish(partial, target)
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror or error}. Nothing was exported; free space or choose another "
                           "folder, then export again.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(target, layout, made, files, totals.pending)


def _new_folder(out: str) -> Path:
    if "://" in out:
        raise UsageError(f"{out}: an export goes to a local folder. Export to one, then copy it with the tool of that "
                         "store, for example `aws s3 cp --recursive` or `gcloud storage cp -r`.")
    target = Path(out).absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise UsageError(f"{out} exists already; an export never changes what is there. Give a new folder, or remove "
                         "that one.")
    return target


def _partial_folder(target: Path) -> Path:
    """A hidden folder beside `target`; leftovers of exports that died here are removed."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}.partial-"
        for leftover in target.parent.glob(f"{prefix}*"):
            if not token_alive(leftover.name.removeprefix(prefix)):
                shutil.rmtree(leftover, ignore_errors=True)
        partial = target.parent / f"{prefix}{process_token()}"
        partial.mkdir()
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror}). Choose another folder.") from error
    return partial


def _publish(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)  # replaces an empty folder, fails on any other
    except OSError as error:
        if target.exists() and any(target.iterdir()):
            raise UsageError(f"{target} was filled by somebody else while this export ran; nothing was changed "
                             "there. Give a new folder.") from error
        raise


def _rows(run: Run, chosen: Selection | None, kept: int, on_rows: OnRows) -> Iterator[pa.Table]:
    """Tables of at most BATCH kept rows, by shard and then generation. Raises UsageError if a row comes twice."""
    seen, done = np.zeros(run.plan.planned, bool), 0
    for receipt in run.store.receipts():
        if not receipt.kept:
            continue
        with run.store.open(receipt) as parquet:
            for table in batches(parquet, run.files.at(data_place(receipt.data_file)), BATCH, DATA_SCHEMA):
                numbers = table["row"].to_numpy() + run.store.first_row(receipt.data_file)
                if seen[numbers].any() or len(np.unique(numbers)) < len(numbers):
                    raise UsageError(f"{run.folder}: {data_place(receipt.data_file)} repeats samples of another file; "
                                     "`rayexpand verify` names them. Nothing was exported.")
                seen[numbers] = True
                done += len(numbers)
                on_rows(f"exporting {run.config.name}", done, kept)
                if (number := round_of(receipt.data_file)) is not None:
                    table = table.append_column(ROUND, pa.array([number] * table.num_rows, ROUND.type))
                if chosen is not None:
                    table = table.filter(chosen.keeps(table["sample_id"]))
                if table.num_rows:
                    yield _marked(table, generated="prior" in run.config.needs)


def _marked(table: pa.Table, *, generated: bool) -> pa.Table:
    """The rows with the mark of synthetic origin in each image."""
    images = [{**image, "bytes": marked(image["bytes"], kind_of(start, generated=generated))}
              for image, start in zip(table["image"].to_pylist(), table["start"].to_pylist(), strict=True)]
    column = table.schema.get_field_index("image")
    return table.set_column(column, table.schema.field(column), pa.array(images, table.schema.field(column).type))


def _image_kinds(run: Run, chosen: Selection | None) -> set[str]:
    """Extensions of the images that are exported."""
    found: set[str] = set()
    for receipt in run.store.receipts():
        if receipt.kept:
            table = run.store.data(receipt, ["sample_id", "image.path"])
            if chosen is not None:
                table = table.filter(chosen.keeps(table["sample_id"]))
            found |= {_extension({"image": image}) for image in table["image"].to_pylist()}
    return found


def _with_soft_labels(table: pa.Table, run: Run) -> pa.Table:
    source, target, strength = (table[name].to_numpy() for name in ("source_label", "label", "strength"))
    weights = run.config.method.soft_label(source, target, strength, len(run.plan.index.classes))
    ends = np.arange(len(weights) + 1, dtype=np.int32) * weights.shape[1]
    values = pa.array(np.ascontiguousarray(weights, np.float32).ravel())
    return table.append_column(SOFT_LABEL, pa.ListArray.from_arrays(pa.array(ends), values))


def _webdataset(rows: Iterator[pa.Table], folder: Path, classes: ClassTable, shard_images: int, kept: int,
                one_kind: bool) -> tuple[int, int]:
    (folder / "train").mkdir()
    width, made, shards = _key_width(kept), 0, []
    for number, tables in groupby(_shards(rows, shard_images), itemgetter(0)):
        before, path = made, folder / "train" / f"{number:06d}.tar"
        with path.open("wb") as tar:
            for row in (row for _, table in tables for row in table.to_pylist()):
                key = f"{made:0{width}d}"
                extension, content = _extension(row), row["image"]["bytes"]
                if not one_kind and extension != "png":
                    extension, content = "png", _as_png(content)
                _member(tar, f"{key}.{extension}", content)
                _member(tar, f"{key}.cls", str(row["label"]).encode())
                _member(tar, f"{key}.json", json.dumps(_facts(row, classes), sort_keys=True).encode())
                made += 1
            _end(tar)
        shards.append({"url": f"train/{path.name}", "nsamples": made - before, "filesize": path.stat().st_size})
    index = {"wids_version": 1, "shardlist": shards, "nsamples": made,
             "classes": [{"label": label, "key": key, "name": name}
                         for label, (key, name) in enumerate(zip(classes.key, classes.name, strict=True))]}
    (folder / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return made, len(shards)


_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # epoch, root, mode 644: equal samples make equal archives
_CHECKSUM = sum(_HEADER[:148]) + 8 * ord(" ") + sum(_HEADER[156:]) - 11 * ord("0")  # without name and size


def _member(tar: BinaryIO, name: str, content: bytes) -> None:
    """As tarfile writes it, whose headers take longer than all the rest of an export of small images."""
    header, said, size = bytearray(_HEADER), name.encode(), b"%011o" % len(content)
    header[:len(said)], header[124:135] = said, size
    header[148:155] = b"%06o\0" % (_CHECKSUM + sum(said) + sum(size))
    tar.write(header)
    tar.write(content)
    tar.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def _end(tar: BinaryIO) -> None:
    end = 2 * tarfile.BLOCKSIZE
    tar.write(bytes(end + -(tar.tell() + end) % tarfile.RECORDSIZE))


def _as_png(content: bytes) -> bytes:
    """A JPEG as PNG: more bytes, the same pixels, the same mark."""
    sink = io.BytesIO()
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        image.convert("RGB").save(sink, "PNG", compress_level=3)
    return marked(sink.getvalue(), mark_of(content) or FROM_IMAGE)


def _imagefolder(rows: Iterator[pa.Table], folder: Path, classes: ClassTable, kept: int,
                 further: Sequence[pa.Field]) -> tuple[int, int]:
    train, names = folder / "train", class_folders(classes)
    for name in names:
        (train / name).mkdir(parents=True)  # empty classes too: without them torchvision would renumber the others
    width, made = _key_width(kept), 0
    with (train / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, ("file_name", "label", "class_key", "class_name", *_PROVENANCE, "scores",
                                      *(field.name for field in further)))
        lines.writeheader()
        for table in rows:
            for row in table.to_pylist():
                name = f"{names[row['label']]}/{made:0{width}d}.{_extension(row)}"
                (train / name).write_bytes(row["image"]["bytes"])
                facts = {"file_name": name, **_facts(row, classes)}
                lines.writerow({column: json.dumps(value) if isinstance(value, dict | list) else csv_cell(value)
                                for column, value in facts.items()})
                made += 1
    return made, made


def class_folders(classes: ClassTable) -> list[str]:
    """One safe folder name per label, in an order that sorting keeps, so that torchvision gives the same labels."""
    names = [_cut(_UNSAFE.sub("_", key).strip(" .-")[:100]).rstrip(" .") or "class" for key in classes.key]
    distinct = {unicodedata.normalize("NFC", name).casefold() for name in names}
    if names == sorted(names) and len(distinct) == len(names):
        return names
    width = len(str(len(names) - 1))
    return [f"{label:0{width}d}-{name}" for label, name in enumerate(names)]


def _cut(name: str) -> str:
    """The longest beginning of at most _NAME_BYTES bytes; file systems count bytes, not characters."""
    return name.encode()[:_NAME_BYTES].decode(errors="ignore")


def _huggingface(rows: Iterator[pa.Table], folder: Path, classes: ClassTable, shard_images: int,
                 further: Sequence[pa.Field]) -> tuple[int, int]:
    (folder / "data").mkdir()
    schema = pa.schema([*DATA_SCHEMA, *further])
    schema = schema.with_metadata(huggingface_metadata(classes, schema))
    paths: list[Path] = []
    made = 0
    for number, tables in groupby(_shards(rows, shard_images), itemgetter(0)):
        paths.append(folder / "data" / f"{number}.parquet")
        with pq.ParquetWriter(paths[-1], schema, compression="zstd") as writer:
            for _, table in tables:
                writer.write_table(table.select(schema.names).replace_schema_metadata(schema.metadata))
                made += table.num_rows
    for number, path in enumerate(paths):  # the total is known only now
        path.rename(path.with_name(f"train-{number:05d}-of-{len(paths):05d}.parquet"))
    return made, len(paths)


def _shards(rows: Iterator[pa.Table], shard_images: int) -> Iterator[tuple[int, pa.Table]]:
    """(file number, table) pieces of `rows`, cut so that each file but the last gets `shard_images` rows."""
    position = 0
    for table in rows:
        while table.num_rows:
            head = table.slice(0, shard_images - position % shard_images)
            yield position // shard_images, head
            position += head.num_rows
            table = table.slice(head.num_rows)


def _key_width(kept: int) -> int:
    return max(9, len(str(kept)))


def _extension(row: dict[str, Any]) -> str:
    return _EXTENSIONS[Path(row["image"]["path"]).suffix.lower()]


def _facts(row: dict[str, Any], classes: ClassTable) -> dict[str, Any]:
    """Label, class and everything known about how a sample was made."""
    return {"label": row["label"], "class_key": classes.key[row["label"]], "class_name": classes.name[row["label"]],
            **{name: row[name] for name in _PROVENANCE},
            "scores": {score["name"]: score["value"] for score in row["scores"]},
            **{field.name: row[field.name] for field in (ROUND, SOFT_LABEL) if field.name in row}}


_PATTERNS = {"webdataset": "train/*.tar", "imagefolder": "train/**", "huggingface": "data/train-*.parquet"}
_LOADING = {
    "webdataset": """import webdataset
samples = webdataset.WebDataset("<folder>/train/{{000000..{last:06d}}}.tar", shardshuffle=False).decode("pil")""",
    "imagefolder": """from torchvision.datasets import ImageFolder
images = ImageFolder("<folder>/train")        # a class without samples is an empty folder: add allow_empty=True""",
    "huggingface": """import ray
rows = ray.data.read_parquet("<folder>/data")  # image.bytes holds the encoded file""",
}


def stated_license(files: Files) -> str | None:
    """The license identifier of the card in a run folder, None where it has none."""
    found = _front_matter(files).get("license")
    return str(found) if found else None


def stated_licenses(files: Files) -> dict[str, str]:
    """The licenses of what a run was made from (generator, adapter, seeds), as the card in its folder states them."""
    found = _front_matter(files).get("source_licenses")
    return {str(name): str(one) for name, one in found.items()} if isinstance(found, dict) else {}


def _front_matter(files: Files) -> dict[str, Any]:
    text = (files.read("README.md") or b"").decode(errors="replace")
    with contextlib.suppress(yaml.YAMLError):
        matter = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        return matter if isinstance(matter, dict) else {}
    return {}


def _readme(run: Run, layout: Layout, made: int, files: int, selection: str | None, words: str, one_kind: bool,
            release: str) -> str:
    """Dataset card of an export; its front matter tells `datasets` which files are data."""
    matter: dict[str, Any] = {
        "pretty_name": run.config.name, "annotations_creators": ["machine-generated"],
        "task_categories": ["image-classification"], "size_categories": [size_category(made)],
        "tags": ["synthetic", "rayexpand", run.config.method.name],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": _PATTERNS[layout]}]}]}
    if license_id := stated_license(run.files):
        matter["license"] = license_id
    if licenses := stated_licenses(run.files):
        matter["source_licenses"] = licenses
    models = "\n".join(f"| {name} | `{digest}` |" for name, digest in run.facts["models"].items()) or "| none | |"
    chosen = f", chosen by selection `{selection}`" if selection else ""
    loading = _LOADING[layout].format(last=files - 1)
    notes = [f"**Labels are mixtures.** {words} `soft_label` holds these weights as a list, one number for each class "
             "in the order of `label`; for another gamma compute it from the other three columns."] if words else []
    if "rounds" in run.facts:
        notes.append(f"Made by a loop of {rounds_words(run.facts)}; `round` says which of them made a sample, and "
                     "`row` is its number within that round.")
    if not one_kind:
        notes.append("The samples are PNG and JPEG images; here all are PNG, with the pixels that the JPEGs decode to.")
    if layout == "imagefolder":
        notes.append("In `metadata.csv`, a text that begins with `=`, `+`, `-`, `@`, a tab, a line break or `'`, or "
                     "would be read as a number, true, false or nothing (`007`, `NA`), has one `'` before it, so that "
                     "no spreadsheet runs it and no reader changes it; take that one away to get the text back.")
    about = "".join(f"{note}\n\n" for note in notes)
    return f"""---
{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---

# {markdown_cell(run.config.name)}

{made:,} synthetic images of {len(run.plan.index.classes):,} classes{chosen}, made from {len(run.plan.index):,} labelled
seed images with the method `{run.config.method.name}`. Every image and label was produced by a program; no person has
checked them. Licenses of the seed images and of the generator apply.

{about}```python
from datasets import load_dataset
rows = load_dataset("<folder>", split="train")

{loading}
```

| model | sha256 |
|---|---|
{models}

Run digest `{run.facts["run_digest"]}`, package version {run.facts["version"]}. `sample_sha256` is a hash over decoded
pixels, label and draw; two samples with the same hash are the same sample. Every image carries an XMP packet whose
`Iptc4xmpExt:DigitalSourceType` says that it is synthetic, in the words of <{VOCABULARY}>.

{release}<details><summary>Configuration, every field with its value; absolute paths are shortened</summary>

````yaml
{yaml.safe_dump(published(run.facts["config"]), sort_keys=False)}````

</details>
"""


_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))
_ESCAPES = str.maketrans({**{c: f"\\{c}" for c in "\\`*_[]|#~"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"})


_ABSOLUTE = re.compile(r"(?:file:/*|~?[\\/]|[A-Za-z]:[\\/])(?:.*[\\/])?([^\\/]*)", re.S)
_CREDENTIALS = re.compile(r"(?<![a-z])((?:https?|ftp|sftp|ssh|s3|gs|gcs)://)[^/@\s]*@")


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it may be shown to anybody: of absolute paths only the last part, no user, password or
    signature in a URL, no address of a cluster."""
    shown = {name: _published(value) for name, value in config.items()}
    if isinstance(cluster := shown.get("cluster"), dict) and cluster.get("address") not in (None, "auto", "local"):
        cluster["address"] = "<address>"
    return shown


def _published(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _published(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_published(inner) for inner in value]
    return "::".join(map(_without_place, value.split("::"))) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    if found := _ABSOLUTE.fullmatch(text.rstrip("\\/")):
        return f"<path>/{found[1]}"
    text = _CREDENTIALS.sub(r"\1", text)
    return text.partition("?")[0] if text.startswith(("http://", "https://")) else text


def size_category(rows: int) -> str:
    """Hugging Face's name for a dataset of `rows` rows."""
    return next((name for limit, name in _SIZES if rows < limit), "n>1B")


def markdown_cell(value: Any) -> str:
    """Text that stays inside one table cell: no line break, column, tag, link or formatting of its own."""
    return " ".join(str(value).split()).translate(_ESCAPES)
