"""Copies of seeds that are known to be copies: what an extractor must find before its silence means anything.

    exact           the seed itself
    jpeg_75         JPEG of quality 75
    crop_80         the middle, 80 % of each side
    flip            left and right exchanged
    blur_1          Gaussian blur of 1 pixel
    brightness_1.2  every value times 1.2
    img2img_0.1     image to image by the generator of the run, 10 % of the schedule; img2img_0.3 30 %
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from rayexpand.contract.protocols import Batch, Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import Draw
from rayexpand.data.pixels import prepare, to_uint8
from rayexpand.methods import load_method
from rayexpand.runs.config import RunConfig
from rayexpand.runs.run import Run

STRENGTHS = {"img2img_0.1": 0.1, "img2img_0.3": 0.3}
_STEPS = 10  # at least, so that strength 0.1 runs one


def _jpeg(image: Image.Image) -> Image.Image:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=75)
    return Image.open(sink).convert("RGB")


def _crop(image: Image.Image) -> Image.Image:
    width, height = image.size
    left, top = round(0.1 * width), round(0.1 * height)
    return image.crop((left, top, width - left, height - top))


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "exact": lambda image: image, "jpeg_75": _jpeg, "crop_80": _crop, "flip": ImageOps.mirror,
    "blur_1": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "brightness_1.2": lambda image: ImageEnhance.Brightness(image).enhance(1.2)}


def edited(kind: str, image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) to the copy of a kind of EDITS."""
    return np.asarray(EDITS[kind](Image.fromarray(image)))


def has_img2img(config: RunConfig) -> bool:
    """Whether the run has a generator that can start from an image by a prompt."""
    from rayexpand.models.prior import inspect_prior

    return "prior" in config.needs and inspect_prior(config.prior).generator == "sd"


def drawing(run: Run) -> RunConfig:
    """The configuration of the run with image to image as its method, so that nothing else is loaded than its
    generator, with its adapter where it has one."""
    artifacts = {"adapter": run.config.artifacts["adapter"]} if "adapter" in run.facts["models"] else {}
    return run.sampling.model_copy(update={"method": _method(next(iter(STRENGTHS)), run.config), "accept": None,
                                           "artifacts": artifacts})


def _method(kind: str, config: RunConfig) -> Any:
    said = {name: value for name in ("guidance_scale", "solver")
            if (value := getattr(config.method, name, None)) is not None}
    steps = max(getattr(config.method, "steps", None) or 50, _STEPS)
    return load_method("img2img", {**said, "steps": steps, "strength": STRENGTHS[kind]})


def redrawn(kind: str, images: Sequence[np.ndarray], seed_ids: Sequence[str], labels: Sequence[int], tools: Tools,
            config: RunConfig, size: int) -> list[np.ndarray | None]:
    """Copies of a kind of STRENGTHS, in calls of the run's shape; None where one is not finite. Seeds are cut as for
    the run; steps, scale of guidance and solver are those of its method where it has them; noise is keyed by the seed.
    """
    method, rows = _method(kind, config), []
    for seed_id, label, image in zip(seed_ids, labels, images, strict=True):
        crop = RowRng(config.seed, config.method.name, seed_id, 0)
        rng = RowRng(config.seed, f"audit-{kind}", seed_id, 0)
        cut = prepare(image, size, config.image.fit, crop, config.image.filter)
        rows.append((method.draw(seed_id, label, 0, 0, tools.classes, rng), cut, rng))
    batch, made = config.sampler.batch, list[np.ndarray | None]()
    for start in range(0, len(rows), batch):
        made += _call(method, rows[start:start + batch], tools, batch)
    return made


def _call(method: Any, rows: Sequence[tuple[Draw, np.ndarray, RowRng]], tools: Tools,
          batch: int) -> list[np.ndarray | None]:
    padded = [*rows, *[rows[-1]] * (batch - len(rows))]
    draws, images, rngs = zip(*padded, strict=True)
    filler = tuple(slot >= len(rows) for slot in range(batch))
    found = method.expand(Batch(draws, images, rngs, filler), tools).images[:len(rows)]
    return [None if one is None else to_uint8(np.asarray(one)) for one in found]
