"""The nouns of the system, and their Arrow schemas.

One seed dataset becomes a plan of draws; a shard of draws becomes one data file of samples and one receipt.
No torch here: arrays of the protocols are torch tensors, named with a shape suffix (B rows, C channels, H, W pixels,
D features, K classes, T tokens, E embedding).
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa


class Status(StrEnum):
    KEPT = "kept"
    REJECTED = "rejected"  # made, then refused by a rule of the method
    FAILED = "failed"  # could not be made; `retry` tries these again, `max_failed` counts them


class Reason(StrEnum):
    """Why a row is not in the data. Every refused row has exactly one."""

    DECODE_ERROR = "decode_error"
    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    UNSUPPORTED_MODE = "unsupported_mode"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    UNSAFE_PATH = "unsafe_path"
    DUPLICATE_ID = "duplicate_id"
    BAD_LABEL = "bad_label"
    NAN_LATENT = "nan_latent"
    CONSTANT_IMAGE = "constant_image"
    SAMPLER_ERROR = "sampler_error"
    SAFETY_FLAGGED = "safety_flagged"
    BELOW_THRESHOLD = "below_threshold"
    WRONG_CLASS = "wrong_class"
    GUIDANCE_DIVERGED = "guidance_diverged"
    EXHAUSTED = "exhausted"
    NEAR_COPY = "near_copy"
    TIMEOUT = "timeout"
    ACTOR_DIED = "actor_died"

    @property
    def status(self) -> Status:
        return Status.REJECTED if self in _REJECTIONS else Status.FAILED


# What a seed is refused for before anything is sampled.
SEED_REASONS = frozenset({
    Reason.DECODE_ERROR, Reason.TOO_SMALL, Reason.TOO_LARGE, Reason.UNSUPPORTED_MODE, Reason.MISSING, Reason.UNREADABLE,
    Reason.UNSAFE_PATH, Reason.DUPLICATE_ID, Reason.BAD_LABEL})

_REJECTIONS = frozenset(
    {Reason.SAFETY_FLAGGED, Reason.BELOW_THRESHOLD, Reason.WRONG_CLASS, Reason.EXHAUSTED, Reason.NEAR_COPY}
)


CAPTION_SLOT = "{caption}"  # in the prompt of a draw: where the plan puts the caption of its seed


class Start:
    """Where a draw starts: from its seed image, or from pure noise (text to image)."""

    IMAGE = "image"
    NOISE = "noise"


@dataclass(frozen=True, slots=True)
class Seed:
    """One labelled image of the seed dataset, still encoded."""

    seed_id: str
    label: int
    image: bytes


def spoken(word: str) -> str:
    """A class name as prompts and guides say it: underscores are spaces."""
    return word.replace("_", " ")


def spoken_name(name: str) -> str:
    """A class name without a number before it: `011.Rusty_Blackbird` is Rusty Blackbird."""
    return spoken(re.sub(r"^\d+\.\s*", "", name)).strip()


@dataclass(frozen=True, slots=True)
class ClassTable:
    """Classes by label 0..K-1. `key` is the folder or id, `name` what a person calls it; names may collide, keys not.

    `metaclass` is a superclass word ("bird"), `noun` a head noun, both "" when unknown; `count` the seeds of the class.
    """

    key: tuple[str, ...]
    name: tuple[str, ...]
    metaclass: tuple[str, ...]
    noun: tuple[str, ...]
    count: tuple[int, ...]

    @classmethod
    def of(cls, keys: Sequence[str], names: Sequence[str] | None = None, counts: Sequence[int] | None = None,
           metaclasses: Sequence[str] | None = None, nouns: Sequence[str] | None = None) -> ClassTable:
        n = len(keys)
        blank = ("",) * n
        return cls(tuple(keys), tuple(names or keys), tuple(metaclasses or blank), tuple(nouns or blank),
                   tuple(int(c) for c in (counts if counts is not None else (0,) * n)))

    def __len__(self) -> int:
        return len(self.key)

    @property
    def asked(self) -> tuple[str, ...]:
        """The names as a guide is asked for them."""
        return tuple(map(spoken, self.name))

    @property
    def display(self) -> tuple[str, ...]:
        """One text for each class that no other class has: its name, or "name (key)" where another has that name."""
        taken, shown, times = set(self.name), [], Counter(self.name)
        for key, name in zip(self.key, self.name, strict=True):
            if times[name] > 1:
                name = f"{name} ({key})"
                while name in taken:
                    name = f"{name} ({key})"
            taken.add(name)
            shown.append(name)
        return tuple(shown)

    def same_names(self) -> dict[str, list[str]]:
        """Name -> keys of the classes that prompts and guides cannot tell apart by it, whatever the case, the spaces
        and the Unicode form."""
        keys: dict[str, list[str]] = {}
        for key, name in zip(self.key, self.asked, strict=True):
            keys.setdefault(" ".join(unicodedata.normalize("NFC", name).casefold().split()), []).append(key)
        return {name: found for name, found in keys.items() if len(found) > 1}

    def to_arrow(self) -> pa.Table:
        table = pa.table({"label": pa.array(range(len(self)), pa.int64()), "key": pa.array(self.key, pa.string()),
                         "name": pa.array(self.name, pa.string()), "metaclass": pa.array(self.metaclass, pa.string()),
                         "noun": pa.array(self.noun, pa.string()), "count": pa.array(self.count, pa.int64())})
        return table.replace_schema_metadata(ASKED)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> ClassTable:
        kind = cls if ASKED.items() <= (table.schema.metadata or {}).items() else _AsWritten
        return kind(*(tuple(table[name].to_pylist()) for name in ("key", "name", "metaclass", "noun", "count")))


class _AsWritten(ClassTable):
    """Of a run that began when guides were asked for names with their underscores: it goes on as it began."""

    __slots__ = ()

    @property
    def asked(self) -> tuple[str, ...]:
        return self.name


ASKED = {b"asked": b"spoken"}  # schema metadata of a class table whose guide is asked for spoken names


# The seed index: one row per seed, made once per run. `file` indexes the list of files kept in the schema metadata
# under b"files" (JSON); `group`, `offset` locate a row inside its file, each layout in its way (-1 for one image per
# file); `fault` is "" or the Reason known from listing alone (duplicate_id, bad_label, missing, unsafe_path).
SEED_INDEX = pa.schema([("seed_id", pa.string()), ("label", pa.int32()), ("file", pa.int32()), ("member", pa.string()),
                        ("group", pa.int32()), ("offset", pa.int32()), ("fault", pa.string())])


@dataclass(frozen=True, slots=True)
class SeedIndex:
    """All seeds of a run in a fixed order, with their classes. `table` follows SEED_INDEX."""

    table: pa.Table
    classes: ClassTable

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def labels(self) -> np.ndarray:
        """int32[n]."""
        return self.table["label"].to_numpy()

    @property
    def seed_ids(self) -> list[str]:
        return self.table["seed_id"].to_pylist()


@dataclass(frozen=True, slots=True)
class Draw:
    """One planned sample: everything random about it is decided (noise follows from the keyed streams)."""

    sample_id: str  # "seed_id/copy"
    seed_id: str
    copy: int
    source_label: int
    target_label: int
    prompt: str
    negative: str
    start: str  # Start.IMAGE or Start.NOISE
    strength: float  # share of the schedule that is run, in (0, 1]; 0 where no diffusion runs
    steps_run: int  # executed solver steps; 0 where no diffusion runs
    attempt: int  # 0, then + 1 for each redraw
    row: int  # number in the whole plan
    group: int  # which group of copies of its seed it shares a call with


DRAW_FIELDS = tuple(f.name for f in fields(Draw))


@dataclass(frozen=True, slots=True)
class Sample:
    """One decided row: kept with its encoded image, or refused with a reason."""

    draw: Draw
    method: str
    status: Status
    image: bytes | None  # encoded
    path: str  # file name the image would have, "" without image
    reason: Reason | None = None
    detail: str = ""
    note: str = ""  # how an odd seed image was read ("cmyk", "first_frame", ...)
    scores: dict[str, float] = field(default_factory=dict)
    sample_sha256: str = ""

    @property
    def label(self) -> int:
        return self.draw.target_label


def sample_sha256(pixels: np.ndarray, draw: Draw) -> str:
    """Hash of decoded uint8 (H, W, 3) pixels, label and draw: equal hashes mean the same sample. A field of a draw that
    came later has a default, and does not count while it is that."""
    default = {one.name: one.default for one in fields(draw) if one.default is not MISSING}
    drawn = {name: value for name, value in asdict(draw).items() if name not in default or value != default[name]}
    hasher = hashlib.sha256(json.dumps([pixels.shape, drawn], sort_keys=True).encode())
    hasher.update(pixels.tobytes())
    return hasher.hexdigest()


_DRAW_TYPES: dict[str, pa.DataType] = {
    "sample_id": pa.string(), "seed_id": pa.string(), "copy": pa.int32(), "source_label": pa.int32(),
    "target_label": pa.int32(), "prompt": pa.string(), "negative": pa.string(), "start": pa.string(),
    "strength": pa.float64(), "steps_run": pa.int32(), "attempt": pa.int32(), "row": pa.int64(), "group": pa.int32()}

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCORES = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))

DATA_SCHEMA = pa.schema([("image", _IMAGE), ("label", pa.int64()), *_DRAW_TYPES.items(), ("method", pa.string()),
                         ("note", pa.string()), ("scores", _SCORES), ("sample_sha256", pa.string())])
REFUSED_SCHEMA = pa.schema([("image", _IMAGE), ("label", pa.int64()), *_DRAW_TYPES.items(), ("method", pa.string()),
                            ("note", pa.string()), ("scores", _SCORES), ("sample_sha256", pa.string()),
                            ("status", pa.string()), ("reason", pa.string()), ("detail", pa.string())])

SOFT_LABEL = pa.field("soft_label", pa.list_(pa.float32()))  # of exports, where labels are mixtures: one weight a class
ROUND = pa.field("round", pa.int32())  # of exports of a loop: the round that made the sample

_HF_TYPES = {pa.string(): "string", pa.int32(): "int32", pa.int64(): "int64", pa.float64(): "float64"}


def huggingface_metadata(classes: ClassTable, schema: pa.Schema = DATA_SCHEMA) -> dict[bytes, bytes]:
    """Schema metadata that makes `datasets` read `image` as Image and `label` as ClassLabel."""
    features: dict[str, Any] = {}
    for column in schema:
        if column.name == "image":
            features["image"] = {"_type": "Image"}
        elif column.name == "label":
            features["label"] = {"names": list(classes.display), "_type": "ClassLabel"}
        elif column.name == "soft_label":
            features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
        elif column.name == "scores":
            features["scores"] = {"feature": {"name": {"dtype": "string", "_type": "Value"},
                                              "value": {"dtype": "float64", "_type": "Value"}}, "_type": "List"}
        else:
            features[column.name] = {"dtype": _HF_TYPES[column.type], "_type": "Value"}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def samples_to_arrow(samples: Sequence[Sample], schema: pa.Schema) -> pa.Table:
    """Table of `samples` in `schema` (DATA_SCHEMA or REFUSED_SCHEMA)."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for s in samples:
        values = {"image": None if s.image is None else {"bytes": s.image, "path": s.path}, "label": s.label,
                  **asdict(s.draw), "method": s.method, "note": s.note, "sample_sha256": s.sample_sha256,
                  "scores": [{"name": k, "value": float(v)} for k, v in sorted(s.scores.items())],
                  "status": s.status.value, "reason": s.reason.value if s.reason else "", "detail": s.detail}
        for name in columns:
            columns[name].append(values[name])
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a committed shard says about itself. A cache of its data file's footer plus timings."""

    shard_id: int
    generation: int  # 0, then 1, 2, ... for `retry`
    data_file: str  # name in data/, or of a round of a loop its path below the loop
    side_file: str  # name in rejected/, or such a path, "" without refused rows
    planned: int
    kept: int
    rejected: int
    failed: int
    reasons: dict[str, int]
    shape: list[int]  # in force at the end, smaller after out-of-memory: rows per call, then of each of the method's
    # own pieces inside a call (its PIECES: distdiff guide_batch; gif chunk, forward_chunk), 0 for the whole call
    run_digest: str
    attempt: int
    content_sha256: str  # over sorted (sample_id, sample_sha256)
    stack: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by phase: load read prepare sample encode commit
    host: str = ""

    @property
    def decided(self) -> int:
        return self.kept + self.rejected + self.failed

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        return cls(**json.loads(text))


def data_place(data_file: str) -> str:
    """Where a data file lies below the folder, by its name; that of a round of a loop is such a place already."""
    return data_file if "/" in data_file else f"data/{data_file}"


def side_place(side_file: str) -> str:
    """The same of a file of refused rows."""
    return side_file if "/" in side_file else f"rejected/{side_file}"


