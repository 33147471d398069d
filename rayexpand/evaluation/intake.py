"""How an image reaches an extractor: what happens to its aspect, and by which filter it is resized.

    here      meaning, unit
    n, size   side of an image before and after, pixels
    at        place of an output pixel in the input, input pixels

A distance depends on it: TensorFlow 1 takes the two nearest pixels however many lie between (it does not average), so
a pattern of single pixels survives that other filters make grey.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from rayexpand.contract.rng import RowRng
from rayexpand.contract.settings import Section
from rayexpand.data.pixels import prepare

ResizeFilter = Literal["tf1_bilinear", "bilinear", "bicubic", "bicubic_float"]


class IntakeConfig(Section):
    resize: Literal["crop", "squash"] = Field("crop", description="crop: the middle square; squash: both sides to the "
                                              "size of the extractor, whatever that does to the aspect")
    filter: ResizeFilter = Field(
        "bilinear", description="bilinear, bicubic: Pillow's, antialiased, rounded to whole grey levels; "
        "bicubic_float: the same on floats, clipped, not rounded (clean-fid); tf1_bilinear: as TensorFlow 1, not "
        "antialiased, not rounded (the published FID)")

    @property
    def dtype(self) -> type:
        return np.float32 if self.filter in _ON_FLOATS else np.uint8

    @property
    def words(self) -> str:
        """As results state it."""
        if self == IntakeConfig():
            return "shorter side to size, bilinear, antialiased (Pillow), middle square"
        shape = "both sides to size" if self.resize == "squash" else "middle square"
        return f"{shape}, {_WORDS[self.filter]}"

    def __call__(self, image_HWC: np.ndarray, size: int) -> np.ndarray:
        """(size, size, 3) of a uint8 (H, W, 3) image: `dtype`, 0..255."""
        if self.filter not in _ON_FLOATS:
            fit: Literal["center", "squash"] = "center" if self.resize == "crop" else "squash"
            by: Literal["bicubic", "bilinear"] = "bicubic" if self.filter == "bicubic" else "bilinear"
            return prepare(image_HWC, size, fit, _NO_CHANCE, squashed_by=by, cut_by=by)
        if self.resize == "crop":
            image_HWC = _middle_square(image_HWC)
        return _ON_FLOATS[self.filter](image_HWC, size)


def tf1_bilinear(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """float32 (size, size, 3) as TensorFlow 1's resize_bilinear without aligned corners gives it: output pixel i lies
    at i n / size, between its two neighbours (resize_bilinear_op.cc)."""
    x = image_HWC.astype(np.float32)
    for axis in (1, 0):
        n = x.shape[axis]
        at = np.arange(size, dtype=np.float32) * np.float32(n / size)
        low = at.astype(np.int64)
        share = np.expand_dims(at - low.astype(np.float32), tuple(i for i in range(3) if i != axis))
        left, right = x.take(low, axis), x.take(np.minimum(low + 1, n - 1), axis)
        x = left + (right - left) * share
    return x


def bicubic_float(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """float32 (size, size, 3) by Pillow's bicubic filter, each channel as floats, clipped to 0..255 (clean-fid)."""
    channels = [Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
                for channel in np.moveaxis(image_HWC, 2, 0)]
    return np.stack([np.asarray(one) for one in channels], axis=2).clip(0, 255)


def _middle_square(image_HWC: np.ndarray) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image_HWC[top:top + side, left:left + side]


_ON_FLOATS = {"tf1_bilinear": tf1_bilinear, "bicubic_float": bicubic_float}
_WORDS = {"tf1_bilinear": "bilinear as TensorFlow 1, not antialiased", "bilinear": "bilinear, antialiased (Pillow)",
          "bicubic": "bicubic, antialiased (Pillow)",
          "bicubic_float": "bicubic of floats, antialiased (Pillow), clipped, not rounded"}
_NO_CHANCE = RowRng(0, "evaluate", "", 0)  # "center" draws nothing
