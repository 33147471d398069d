"""The built-in seeds: scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from rayexpand.errors import SeedDataError
from rayexpand.seeds.listing import Listing, Read, blanks, encode_png
from rayexpand.seeds.places import Place
from rayexpand.seeds.source import DataConfig

SPLITS = ("seeds", "test", "pool")
_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits_split(split: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits as uint8 (n, 16, 16, 3) images and int labels, in three parts that share no image:
    `pool` (1000, trains the tiny prior and guide), `test` (500) and `seeds` (297).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    small = (data.images / 16 * 255).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC).convert("RGB"))
                       for image in small])
    return {name: (images[rows], data.target[rows]) for name, rows in _rows(len(images), split).items()}


def _rows(count: int, split: int) -> dict[str, np.ndarray]:
    order = np.random.Generator(np.random.Philox(key=split)).permutation(count)
    return {"pool": order[:1000], "test": order[1000:1500], "seeds": order[1500:]}


def check(data: DataConfig) -> None:
    """Raises SeedDataError for a part they do not have."""
    if data.split not in (None, *SPLITS):
        raise SeedDataError(f"data.split: the digits have no part '{data.split}'; choose one of {', '.join(SPLITS)}")


def root(data: DataConfig) -> Place:
    return Place("")


def list_seeds(data: DataConfig) -> Listing:
    """Ids are `digits/<number in scikit-learn's set>`, so a digit has one id in every split."""
    parts, part = digits_split(data.digits_split), data.split or "seeds"
    labels = parts[part][1].astype(np.int32)
    count = len(labels)
    numbers = _rows(sum(len(one) for _, one in parts.values()), data.digits_split)[part]
    return Listing(pa.array([f"digits/{number:04d}" for number in numbers]), labels, np.zeros(count, np.int8),
                   [str(digit) for digit in range(10)], _NAMES, [""], np.zeros(count, np.int32), blanks(count),
                   np.full(count, -1, np.int32), np.arange(count, dtype=np.int32))


def reader(folder: Place, files: list[str], data: DataConfig) -> Read:
    images: list[np.ndarray] = []

    def read(row: dict[str, Any]) -> bytes:
        if not images:
            images.append(digits_split(data.digits_split)[data.split or "seeds"][0])
        return encode_png(images[0][row["offset"]])

    return read
