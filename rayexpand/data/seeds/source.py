"""What the user says about the seeds: the configuration section, and the two small files it may name."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections import Counter
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from rayexpand.contract.errors import SeedDataError, few
from rayexpand.contract.settings import Later, Section
from rayexpand.data.pixels import PILLOW_PIXELS
from rayexpand.data.seeds.places import read_bytes, read_text

REPEAT = "~"  # before the number of an image that is listed again


class DataConfig(Section):
    """Which seeds a run starts from."""

    source: Literal["digits", "imagefolder", "parquet", "webdataset", "manifest", "npz", "cifar",
                    "cifar_c"] = Field(description=(
        "digits: built in; imagefolder: one folder per class; parquet: Hugging Face layout; webdataset: tar shards; "
        "manifest: CSV or parquet file of image paths and labels; npz: MedMNIST arrays; cifar: python batches of "
        "CIFAR-10 or CIFAR-100; cifar_c: arrays of CIFAR-10-C or CIFAR-100-C"))
    path: str | None = Field(default=None, description=(
        "dataset folder or fsspec URL, or one file (parquet, tar, manifest, npz), or a pattern with * (parquet, tar); "
        "relative paths start at the working directory"))
    split: str | None = Field(default=None, description=(
        "imagefolder: sub-folder ('train'); parquet, webdataset: prefix of the file names ('train-*.parquet'), also "
        "looked for in data/ and <split>/; manifest: value of split_column; npz: prefix of the arrays; cifar: train or "
        "test; cifar_c: a corruption (fog), a severity ('3') or both (fog/3), null for all; digits: "
        "seeds (the default), test, or pool, which the tiny prior and guide are trained on"))
    classes: str | None = Field(default=None, description=(
        "file that maps class ids to names: JSON object, CSV with columns key,name[,metaclass,noun], or lines "
        "'n01440764 tench, Tinca tinca'"))
    image_column: str = Field(default="image", description=(
        "parquet: struct{bytes,path} or binary column; manifest: column of paths ('path' or 'file_name' serve where "
        "there is no 'image')"))
    label_column: str = Field(default="label", description=(
        "parquet, manifest: integer, ClassLabel or string column; webdataset: field of the .json files, where a "
        "sample has no .cls file"))
    id_column: str | None = Field(default=None, description=(
        "parquet, manifest: column of unique seed ids; without it ids are <file stem>/<row>, or the image paths"))
    split_column: str = Field(default="split", description="manifest: column that data.split selects from")
    ids: str | None = Field(default=None, description=(
        "file of the seed ids to use: text lines, CSV or parquet with a column seed_id, or a JSON list"))
    per_class: int | None = Field(default=None, ge=1, description=(
        "seeds taken of each class; a smaller set lies inside a larger one"))
    subset_seed: int = Field(default=0, description="which random subset per_class takes")
    min_side: int = Field(default=8, ge=1, description="images with a shorter side, in pixels, are refused (too_small)")
    max_pixels: int = Field(default=PILLOW_PIXELS, ge=1, le=2 * PILLOW_PIXELS,
                            description="images with more pixels are refused unread (too_large)")
    digits_split: int = Field(default=0, ge=0, description="digits: number of the random pool/test/seeds split")
    digits_background: Literal["dark", "correlated", "all"] = Field(default="dark", description=(
        "digits: dark as they are; correlated: 0-4 mostly on dark and 5-9 mostly on grey, 19 of 20; all: every digit "
        "on both; seed ids then end in /low-dark, /low-grey, /high-dark or /high-grey"))
    repeats: Annotated[dict[str, int], Later({})] = Field(default={}, description=(
        "seed id -> how often this image is listed, as in a dataset that holds it so often; the others are called "
        "<id>~2, <id>~3 and so on"))


def image_id(data: DataConfig, seed_id: str) -> str:
    """The id of the image behind a seed id, which is another one for an image that `data.repeats` lists again."""
    stem, mark, _ = seed_id.rpartition(REPEAT)
    return stem if mark and stem in data.repeats else seed_id


def class_mapping(data: DataConfig) -> dict[str, dict[str, str]] | None:
    """Class key -> {name, metaclass, noun} of the file data.classes."""
    if data.classes is None:
        return None
    text = read_text("data.classes", data.classes)
    suffix = posixpath.splitext(data.classes.split("::")[0])[1].lower()
    try:
        if suffix == ".json":
            entries = {key: value if isinstance(value, dict) else {"name": value}
                       for key, value in json.loads(text, object_pairs_hook=_once).items()}
        elif suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
            if long := [row["key"] for row in rows if any(row.get(None, ()))]:
                raise ValueError(f"more cells than the header has at {few(long)}; put quotes around a comma")
            entries = _once([(row["key"], row) for row in rows])
        else:
            lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
            entries = _once([(key, {"name": rest.split(",")[0].strip()}) for key, rest in lines])
        table = {key: {part: entry.get(part) or "" for part in ("name", "metaclass", "noun")}
                 for key, entry in entries.items()}
        if not table or not all(isinstance(part, str) for entry in table.values() for part in entry.values()) \
                or not all(entry["name"] for entry in table.values()):
            raise ValueError("an entry without a name")
    except (ValueError, KeyError, AttributeError, TypeError, csv.Error) as error:
        raise SeedDataError(f"data.classes: '{data.classes}' is not a class mapping ({error!r}); give a JSON object "
                            "{id: name}, a CSV with columns key,name, or lines 'id name'") from error
    return table


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"{few(twice)} more than once")
    return dict(pairs)


def wanted_ids(data: DataConfig) -> list[str] | None:
    """Seed ids of the file data.ids, in its order, each once."""
    if data.ids is None:
        return None
    suffix = posixpath.splitext(data.ids.split("::")[0])[1].lower()
    try:
        if suffix == ".parquet":
            content = pa.BufferReader(read_bytes("data.ids", data.ids))
            found = pq.read_table(content, columns=["seed_id"])["seed_id"].to_pylist()
        elif suffix == ".json":
            found = json.loads(read_text("data.ids", data.ids))
        elif suffix == ".csv":
            found = [row["seed_id"] for row in csv.DictReader(io.StringIO(read_text("data.ids", data.ids)))]
        else:
            found = [line for line in read_text("data.ids", data.ids).split("\n") if line]
        if not found or not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ValueError("no list of names")
    except (ValueError, KeyError, csv.Error) as error:
        raise SeedDataError(f"data.ids: '{data.ids}' holds no seed ids ({error!r}); give one id per line, a JSON list, "
                            "or a CSV or parquet file with a column seed_id") from error
    return list(dict.fromkeys(found))
