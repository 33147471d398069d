"""Image to image here against diffusers' own pipeline object, in CPU seconds of each image, pair by pair in one run.

    python -m tests.benchmarks.pipelines --weights digits --pairs 7 --batch 16

`method` is the plain method on batches of seed images, from images in to images out. `pipeline` is
StableDiffusionImg2ImgPipeline with the same models, prompts, steps, strength and batch; `one by one` is that pipeline
with one image a call, as scripts do. The pairs take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rayexpand.contract.protocols import Batch, Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.methods.img2img import Img2Img
from rayexpand.models.prior import inspect_prior, load_prior, resolve


def batch_of(method: Img2Img, rows: int, size: int) -> tuple[Batch, ClassTable]:
    classes = ClassTable.of(["zero", "one"])
    rngs = tuple(RowRng(0, method.name, f"s{i}", 0) for i in range(rows))
    images = tuple(rng("pixels").integers(0, 256, (size, size, 3), dtype=np.uint8) for rng in rngs)
    draws = tuple(method.draw(rng.seed_id, i % 2, 0, i, classes, rng) for i, rng in enumerate(rngs))
    return Batch(draws, images, rngs, (False,) * rows), classes


def cpu_seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure(weights: str, pairs: int, rows: int, steps: int, strength: float) -> dict[str, Any]:
    from diffusers import AutoPipelineForImage2Image

    prior, size = load_prior(weights), inspect_prior(weights).image_size
    method = Img2Img(steps=steps, strength=strength)
    batch, classes = batch_of(method, rows, size)
    pipe = AutoPipelineForImage2Image.from_pretrained(Path(resolve(weights)), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pictures, prompts = [Image.fromarray(image) for image in batch.images], [draw.prompt for draw in batch.draws]

    def piped(some: slice) -> None:
        pipe(prompts[some], image=pictures[some], strength=strength, num_inference_steps=steps,
             guidance_scale=method.guidance_scale)

    ways: dict[str, Callable[[], Any]] = {
        "method": lambda: method.expand(batch, Tools(classes, prior)),
        "pipeline": lambda: piped(slice(None)),
        "one by one": lambda: [piped(slice(i, i + 1)) for i in range(rows)]}
    for way in ways.values():
        way()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(pairs):
        for name, way in ways.items():
            taken[name].append(cpu_seconds(way) / rows)
    ratios = {name: [a / b for a, b in zip(taken[name], taken["method"], strict=True)] for name in ways
              if name != "method"}
    return {"weights": weights, "size": size, "batch": rows, "steps": steps, "strength": strength,
            "cpu_seconds_per_image": {name: statistics.median(found) for name, found in taken.items()},
            "times_the_method": {name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
                                 for name, found in ratios.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="digits")
    for name, value in (("pairs", 7), ("batch", 16), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--strength", type=float, default=0.5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(chosen.weights, chosen.pairs, chosen.batch, chosen.steps, chosen.strength), indent=1))


if __name__ == "__main__":
    main()
