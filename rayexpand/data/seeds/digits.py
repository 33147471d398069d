"""The built-in seeds: scikit-learn's handwritten digits, as they are or on backgrounds that go with their class.

With backgrounds, a classifier can be tested for what it learned from them: white ink stays white, and dark or a flat
grey lies behind it, which is what the tiny prior can draw (its autoencoder restores test digits on dark at 38.5 dB, on
this grey at 30.1, on stripes at 23.8, on a checkerboard at 16.9; measured).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from rayexpand.contract.errors import SeedDataError
from rayexpand.contract.rng import PlanRng
from rayexpand.data.seeds.listing import Listing, Read, blanks, encode_png
from rayexpand.data.seeds.places import Place
from rayexpand.data.seeds.source import DataConfig

SPLITS = ("seeds", "test", "pool")
BACKGROUNDS = {"dark": 0.0, "grey": 0.5}  # brightness
CORRELATION = 0.95  # share of the digits 0-4 on dark, and of 5-9 on grey
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits_split(split: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits as uint8 (n, 16, 16, 3) images and int labels, in three parts that share no image:
    `pool` (1000, trains the tiny prior and guide), `test` (500) and `seeds` (297).
    """
    images, labels = _digits()
    return {name: (images[rows], labels[rows]) for name, rows in _rows(len(images), split).items()}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All images and labels, which nobody may write into."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = (data.images / 16 * 255).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC).convert("RGB"))
                     for image in small]), data.target


def _rows(count: int, split: int) -> dict[str, np.ndarray]:
    order = np.random.Generator(np.random.Philox(key=split)).permutation(count)
    return {"pool": order[:1000], "test": order[1000:1500], "seeds": order[1500:]}


def _on_background(image: np.ndarray, name: str) -> np.ndarray:
    """uint8 (16, 16, 3), black lifted to the background's brightness, white left white."""
    lift = BACKGROUNDS[name or "dark"]
    return np.rint(255 * lift + (1 - lift) * image).astype(np.uint8) if lift else image


def check(data: DataConfig) -> None:
    """Raises SeedDataError for a part they do not have."""
    if data.split not in (None, *SPLITS):
        raise SeedDataError(f"data.split: the digits have no part '{data.split}'; choose one of {', '.join(SPLITS)}")


def splits(data: DataConfig) -> list[str]:
    return list(SPLITS)


def digit_of(seed_id: str) -> str:
    """The id of a digit as it is, whatever background a seed id puts behind it."""
    return "/".join(seed_id.split("/")[:2])


def root(data: DataConfig) -> Place:
    return Place("")


def list_seeds(data: DataConfig) -> Listing:
    """Ids are `digits/<number in scikit-learn's set>`, so a digit has one id in every split; with backgrounds
    `/low-grey` and the like follows. `member` is the background."""
    parts, part = digits_split(data.digits_split), data.split or "seeds"
    labels, at = parts[part][1].astype(np.int32), np.arange(len(parts[part][1]), dtype=np.int32)
    numbers = _rows(sum(len(one) for _, one in parts.values()), data.digits_split)[part]
    ids, behind = [f"digits/{number:04d}" for number in numbers], [""] * len(labels)
    if data.digits_background == "all":
        ids, at, behind = [one for one in ids for _ in BACKGROUNDS], np.repeat(at, 2), [*BACKGROUNDS] * len(labels)
        labels = labels[at]
    elif data.digits_background == "correlated":
        goes_with = PlanRng(data.digits_split, "digits").per_seed("background", ids) < CORRELATION
        behind = np.where((labels < 5) == goes_with, *BACKGROUNDS).tolist()
    if data.digits_background != "dark":
        ids = [f"{one}/{'low' if label < 5 else 'high'}-{name}"
               for one, label, name in zip(ids, labels, behind, strict=True)]
    count = len(labels)
    return Listing(pa.array(ids), labels, np.zeros(count, np.int8), [str(digit) for digit in range(10)], _NAMES, [""],
                   np.zeros(count, np.int32), pa.array(behind) if any(behind) else blanks(count),
                   np.full(count, -1, np.int32), at)


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    images: list[np.ndarray] = []

    def read(row: dict[str, Any]) -> bytes:
        if not images:
            images.append(digits_split(data.digits_split)[data.split or "seeds"][0])
        return encode_png(_on_background(images[0][row["offset"]], row["member"]))

    return read
