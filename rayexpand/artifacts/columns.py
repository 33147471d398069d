"""Artifacts that hold something for each seed, or for each class, of a dataset: captions and image features.

    captions         captions.parquet           seed_id, caption; "" where none could be made
    class_features   class_features.safetensors (K, D) float32, one row for each class in label order
                     features.json              classes, encoders, images of each class, normalised
    image_features   features.npy               (n, D) float16, memory mapped: 2.0 GB for 1.3 million seeds of 768
                     ids.parquet                seed_id of each row, sorted, so that a row is found without a table
                     features.json              encoders, normalised

Everything a reader takes is checked against what it says of itself. Features are those of the encoder as it gives
them, never of unit length: a condition that was fitted with one length must be sampled with it. Those of two encoders,
for a generator with two text encoders, stand side by side.
"""

# B rows of a call, n seeds, K classes, D features

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.artifacts.store import files_hash
from rayexpand.contract.errors import ModelError, looked_at

CAPTIONS, CLASS_FEATURES, IMAGE_FEATURES = "captions", "class_features", "image_features"
FILES = {CAPTIONS: ("captions.parquet",),
         CLASS_FEATURES: ("class_features.safetensors", "features.json"),
         IMAGE_FEATURES: ("features.npy", "ids.parquet", "features.json")}
FILLER = "filler"  # the seed id of a slot that stands in for an absent row

_FACTS = "features.json"
_CHUNK = 1 << 14  # rows written at once
_CAPTIONS_SCHEMA = pa.schema([("seed_id", pa.string()), ("caption", pa.string())])


def columns_hash(folder: Path | str, kind: str) -> str:
    """Content hash of the files of an artifact of this kind; how it was made is no part of it. Raises ModelError."""
    _require(Path(folder), kind)
    return files_hash(Path(folder), FILES[kind])


def columns_problem(folder: Path | str, kind: str) -> str:
    """What is wrong with a folder as an artifact of this kind, as far as names of files say; "" where nothing is."""
    path = Path(folder)
    if not path.is_dir():
        return (f"there is no folder {path}{looked_at(path)}; make it with `rayexpand fit`, kind {kind}, or correct "
                "the path")
    if absent := [name for name in FILES[kind] if not (path / name).is_file()]:
        return (f"{path} has no {', '.join(absent)}, so it holds no {kind.replace('_', ' ')}; give a folder that "
                f"`rayexpand fit` made with kind {kind}")
    return ""


class ColumnsKind(ArtifactKind):
    """A kind of FILES: it is whole where its files are there, and readers check what they hold."""

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        if problem := columns_problem(folder, self.name):
            return [problem]
        conditions = self.name != CAPTIONS and self.name in run.method.needs()  # else a judge alone compares with them
        if not conditions or run.text_width is None:
            return []
        try:
            problem = width_problem(features_width(folder, self.name), run.text_width)
        except ModelError as error:
            return [str(error)]
        return [f"{folder} {problem}"] if problem else []

    def files(self, folder: Path) -> list[str]:
        return list(FILES[self.name])

    def sha256(self, folder: Path) -> str:
        return columns_hash(folder, self.name)


# ------------------------------------------------------------------------------------------------------------- captions


def write_captions(folder: Path, seed_ids: Sequence[str], captions: Sequence[str]) -> None:
    """One caption for each seed, in this order; "" is none."""
    table = pa.table({"seed_id": list(seed_ids), "caption": list(captions)}, schema=_CAPTIONS_SCHEMA)
    pq.write_table(table, folder / FILES[CAPTIONS][0], compression="zstd")


def read_captions(folder: Path | str) -> pa.Table:
    """Columns seed_id, caption, no id twice and no nulls. Raises ModelError."""
    _require(Path(folder), CAPTIONS)
    file = Path(folder, FILES[CAPTIONS][0])
    table = _read_table(file, _CAPTIONS_SCHEMA, CAPTIONS)
    if len(pc.unique(table["seed_id"])) != len(table):
        raise ModelError(f"captions {file}: a seed id is there twice, so it cannot be told which caption holds; "
                         f"{_again(CAPTIONS)}")
    return table


def captions_for(folder: Path | str, seed_ids: pa.Array) -> pa.Array:
    """The caption of each seed in this order: "" where none could be made, null where the seed is not listed. Raises
    ModelError."""
    table = read_captions(folder)
    place = pc.index_in(seed_ids, value_set=table["seed_id"].combine_chunks())
    return pc.utf8_trim_whitespace(table["caption"].combine_chunks().take(place))


# ------------------------------------------------------------------------------------------------------- class features


def write_class_features(folder: Path, features_KD: np.ndarray, *, class_keys: Sequence[str], encoder_sha256: str,
                         images_per_class: int | None, encoder_2_sha256: str = "") -> None:
    """Means of unnormalised features, of `images_per_class` images of each class, None: of all. `encoder_2_sha256`:
    of the encoder whose features stand behind those of the first one."""
    from safetensors.numpy import save_file

    assert features_KD.shape[0] == len(class_keys)
    assert np.isfinite(features_KD).all()
    save_file({"features": np.ascontiguousarray(features_KD, np.float32)}, folder / FILES[CLASS_FEATURES][0])
    _write_facts(folder, CLASS_FEATURES, encoder_sha256, encoder_2_sha256, classes=list(class_keys),
                 images_per_class=images_per_class)


def read_class_features(folder: Path | str, class_keys: Sequence[str]) -> np.ndarray:
    """(K, D) float32 for these classes, in their order. Raises ModelError for files that are damaged, and for other
    classes or the same in another order."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    facts = feature_facts(folder, CLASS_FEATURES)
    file = Path(folder, FILES[CLASS_FEATURES][0])
    try:
        features_KD = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"class features {file} cannot be read ({error}); {_again(CLASS_FEATURES)}") from error
    if features_KD.dtype != np.float32 or features_KD.ndim != 2 or not np.isfinite(features_KD).all():
        raise ModelError(f"class features {file} are not finite float32 numbers of shape (classes, features); "
                         f"{_again(CLASS_FEATURES)}")
    own = facts.get("classes")
    if own != list(class_keys) or len(own) != len(features_KD):
        raise ModelError(f"class features {folder} were made for other classes than the dataset has, or for the same "
                         f"in another order ({_some(own)}; the dataset has {_some(list(class_keys))}); "
                         f"{_again(CLASS_FEATURES)} on this dataset")
    return features_KD


def encoders_of(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Content hashes of the image encoders whose features stand side by side, in their order."""
    return tuple(str(facts[name]) for name in ("encoder_sha256", "encoder_2_sha256") if name in facts)


def features_width(folder: Path | str, kind: str) -> int:
    """Numbers of each feature, as json and headers say. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    if kind == IMAGE_FEATURES:
        return int(feature_facts(folder, kind).get("features") or 0)
    _require(Path(folder), kind)
    file = Path(folder, FILES[kind][0])
    try:
        with safe_open(file, "np") as opened:
            return int(opened.get_slice("features").get_shape()[1])
    except (OSError, SafetensorError, IndexError) as error:
        raise ModelError(f"class features {file} cannot be read ({error}); {_again(kind)}") from error


def width_problem(width: int, text_width: int) -> str:
    """Why features of this width cannot take a slot of hidden states of the other; "" where they can."""
    if width == text_width:
        return ""
    return (f"holds features of {width} numbers, but the hidden states of the generator's texts have {text_width}, and "
            "nothing is padded, cut or projected; make them with a guide of that width (Stable Diffusion 1.x: "
            "ViT-L/14, 768), or with guide and guide_2 side by side (XL: ViT-L/14 and ViT-bigG/14, 768 + 1280 = 2048)")


def feature_facts(folder: Path | str, kind: str) -> dict[str, Any]:
    """features.json of class or image features: encoder_sha256, normalised (false), and more. Raises ModelError."""
    _require(Path(folder), kind)
    file = Path(folder, _FACTS)
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        found = dict(facts) if isinstance(facts, dict) else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({error}); {_again(kind)}") from error
    if found.get("kind") != kind or not isinstance(found.get("encoder_sha256"), str):
        raise ModelError(f"{file} does not describe {kind.replace('_', ' ')} (kind {found.get('kind')!r}); give a "
                         f"folder that `rayexpand fit` made with kind {kind}")
    if found.get("normalised") is not False:
        raise ModelError(f"{folder} holds features of unit length, which are no condition a model was fitted with: "
                         f"their length is lost; {_again(kind)}")
    return found


# ------------------------------------------------------------------------------------------------------- image features


def write_image_features(folder: Path, seed_ids: Sequence[str], features_ND: np.ndarray,
                         rows_n: np.ndarray | None = None, *, encoder_sha256: str, encoder_2_sha256: str = "") -> None:
    """Unnormalised features of seeds, in any order, as float16. `features_ND` may lie on disk; `rows_n` is the row of
    each seed in it, None: the first, the second, ... `encoder_2_sha256`: as in `write_class_features`.

    Raises ModelError for a feature that is not finite, or beyond what float16 holds (65,504)."""
    order = np.array(sorted(range(len(seed_ids)), key=seed_ids.__getitem__), np.int64)
    rows_n = np.arange(len(seed_ids)) if rows_n is None else rows_n
    shape = (len(order), int(features_ND.shape[1]))
    out_nD = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
    for start in range(0, len(order), _CHUNK):
        some = order[start:start + _CHUNK]
        with np.errstate(over="ignore"):
            found = np.asarray(features_ND[rows_n[some]]).astype(np.float16)
        if len(bad := np.flatnonzero(~np.isfinite(found).all(axis=1))):
            raise ModelError(f"the encoder gives numbers for seed {seed_ids[some[bad[0]]]!r} that float16 cannot hold; "
                             "try device: cpu, or another encoder")
        out_nD[start:start + len(some)] = found
    out_nD.flush()
    ids = pa.array([seed_ids[i] for i in order], pa.string())
    pq.write_table(pa.table({"seed_id": ids}), folder / "ids.parquet", compression="zstd")
    _write_facts(folder, IMAGE_FEATURES, encoder_sha256, encoder_2_sha256, images=shape[0], features=shape[1])


def open_image_features(folder: Path | str) -> ImageFeatures:
    """Reads ids and maps features; nothing of the features is read yet. Raises ModelError."""
    facts = feature_facts(folder, IMAGE_FEATURES)
    ids = _read_table(Path(folder, "ids.parquet"), pa.schema([("seed_id", pa.string())]), IMAGE_FEATURES)["seed_id"]
    file = Path(folder, "features.npy")
    try:
        features_nD = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"image features {file} cannot be read ({error}); {_again(IMAGE_FEATURES)}") from error
    sound = features_nD.dtype == np.float16 and features_nD.shape == (len(ids), facts.get("features"))
    if not sound:
        raise ModelError(f"image features {file} are {features_nD.dtype}{list(features_nD.shape)}, but ids.parquet has "
                         f"{len(ids)} seeds and features.json {facts.get('features')} features of float16; "
                         f"{_again(IMAGE_FEATURES)}")
    column = ids.combine_chunks()
    if len(column) > 1 and not pc.all(pc.less(column[:-1], column[1:])).as_py():
        raise ModelError(f"image features {folder}: ids.parquet is not sorted, or an id is there twice; "
                         f"{_again(IMAGE_FEATURES)}")
    return ImageFeatures(Path(folder), column, features_nD, facts["encoder_sha256"])


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """Features by seed id, on disk. Build it with `open_image_features`."""

    folder: Path
    ids: pa.StringArray  # sorted
    features_nD: np.ndarray  # float16, memory mapped
    encoder_sha256: str

    @property
    def dim(self) -> int:
        return int(self.features_nD.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, seed_ids: Sequence[str]) -> np.ndarray:
        """(B, D) float32 in the order of `seed_ids`, zeros for a filler. Raises ModelError for a seed without any."""
        found_BD = np.zeros((len(seed_ids), self.dim), np.float32)
        for slot, row in enumerate(self._places(seed_ids)):
            if row is not None:
                found_BD[slot] = self.features_nD[row]
            elif seed_ids[slot] != FILLER:
                raise ModelError(f"image features {self.folder} have none of seed {seed_ids[slot]!r}: its image could "
                                 "not be read when they were made, or they are of another dataset; "
                                 f"{_again(IMAGE_FEATURES)} on this dataset")
        return found_BD

    def missing(self, seed_ids: Sequence[str] | pa.StringArray) -> list[str]:
        """Those of `seed_ids` without features; a second for a million."""
        wanted = pa.array(seed_ids, pa.string())
        return wanted.filter(pc.invert(pc.is_in(wanted, value_set=self.ids))).to_pylist()

    def _places(self, seed_ids: Sequence[str]) -> Iterator[int | None]:
        for seed_id in seed_ids:
            row = bisect_left(range(len(self.ids)), seed_id, key=lambda i: self.ids[i].as_py())
            yield row if row < len(self.ids) and self.ids[row].as_py() == seed_id else None


# ---------------------------------------------------------------------------------------------------------------- files


def _require(folder: Path, kind: str) -> None:
    if problem := columns_problem(folder, kind):
        raise ModelError(f"artifacts.{kind}: {problem}")


def _read_table(file: Path, schema: pa.Schema, kind: str) -> pa.Table:
    try:
        with pq.ParquetFile(file) as parquet:
            if absent := [name for name in schema.names if name not in parquet.schema_arrow.names]:
                raise ValueError(f"it has no column {absent[0]}")
            table = parquet.read(columns=schema.names, use_threads=False).cast(schema)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ModelError(f"{file} cannot be read ({error}); {_again(kind)}") from error
    if nulls := sum(table[name].null_count for name in schema.names):
        raise ModelError(f"{file} has {nulls} empty cells; {_again(kind)}")
    return table


def _write_facts(folder: Path, kind: str, encoder_sha256: str, encoder_2_sha256: str, **facts: Any) -> None:
    second = {"encoder_2_sha256": encoder_2_sha256} if encoder_2_sha256 else {}
    content = {"kind": kind, "encoder_sha256": encoder_sha256, **second, "normalised": False, **facts}
    (folder / _FACTS).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _again(kind: str) -> str:
    return f"make them again with `rayexpand fit`, kind {kind}"


def _some(names: Any) -> str:
    if not isinstance(names, list):
        return "no classes"
    return f"{len(names)} classes, such as {', '.join(map(repr, names[:3]))}"
