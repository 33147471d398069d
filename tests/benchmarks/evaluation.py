"""Evaluation of many samples: images per second beside a plain loop, and the memory of the driver.

    python -m tests.benchmarks.evaluation make --out <folder> [--samples 100000]     two runs of digits, once
    python -m tests.benchmarks.evaluation compare --out <folder> [--images 20000] [--small]   beside a plain loop
    python -m tests.benchmarks.evaluation whole --out <folder> [--no-ray]            `rayexpand evaluate` of all samples

`compare` alternates both sides three times in one process, on the same data files with the same extractor, and prints
the ratio of each pair in seconds and in CPU seconds (which a busy machine disturbs less): an untrained ResNet-18 at 224
pixels (at most 1,000 images), or with `--small` an untrained CLIP of 16 pixels and 512 features, which costs less than
decoding. `whole` compares all samples with a fifth as many of another run by that CLIP, and prints images/s of
extraction, seconds of each part, and the largest memory of the driver. Run from the root of the repository. Each prints
one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from rayexpand.evaluation.evaluate import EvaluateConfig, in_process, parse
from rayexpand.evaluation.features import load_extractor
from rayexpand.evaluation.sides import EVERY_ROW, Side, samples_of
from rayexpand.runs.config import parse as parse_run
from rayexpand.runs.run import open_run
from tests.conftest import complete
from tests.tiny import tiny_clip

FEATURES, BATCH, REPEATS = 512, 64, 3
FEW = 1000  # images of the slow extractor


def make(out: Path, samples: int) -> dict[str, Any]:
    """Two runs of RandAugment of a thousand digits by two random seeds, the second a fifth as large; an extractor."""
    for seed, (name, images) in enumerate((("samples", samples), ("other", samples // 5))):
        complete(parse_run({
            "name": name, "out": str(out), "seed": seed, "data": {"source": "digits", "split": "pool"},
            "method": {"name": "classical", "policy": "randaugment", "ratio": images // 1000},
            "sampler": {"batch": 250, "shard_images": 1000}}))
    tiny_clip(out / "clip", features=FEATURES)
    save_file(timm.create_model("resnet18").state_dict(), out / "resnet18.safetensors")
    return {"samples": samples, "bytes": sum(file.stat().st_size for file in out.rglob("*.parquet"))}


def config_of(out: Path, **fields: Any) -> EvaluateConfig:
    return parse(raw_of(out, **fields))


def raw_of(out: Path, **fields: Any) -> dict[str, Any]:
    return {"run": str(out / "samples"), "batch": BATCH, "extractor": {"guide": str(out / "clip"), "device": "cpu"},
            "reference": {"source": "parquet", "path": str(out / "other"), "split": "train",
                          "id_column": "sample_id"}, **fields}


def compare(out: Path, images: int, small: bool) -> dict[str, Any]:
    config = config_of(out, metrics=["fd", "kd"], **({} if small else {"extractor": {
        "timm": "resnet18", "checkpoint": str(out / "resnet18.safetensors"), "device": "cpu"}}))
    images = images if small else min(images, FEW)
    run = open_run(str(out / "samples"))
    whole = samples_of(run, EVERY_ROW)
    side = replace(whole, chunks=whole.chunks[:images // whole.chunks[0].num_rows])
    found: dict[str, Any] = {"images": len(side), "ratios": [], "ratios_of_cpu_seconds": [], "images_per_second": []}
    for _ in range(REPEATS):
        plain, ours = _timed(lambda: _plain(config, out, side)), _timed(lambda: _ours(config, side))
        found["ratios"].append(plain[0] / ours[0])
        found["ratios_of_cpu_seconds"].append(plain[1] / ours[1])
        found["images_per_second"].append((len(side) / ours[0], len(side) / plain[0]))
        assert np.array_equal(ours[2], plain[2]), "not the same features"
    return found


def _timed(work: Any) -> tuple[float, float, np.ndarray]:
    """Seconds, CPU seconds of this process, features."""
    start, cpu = time.perf_counter(), time.process_time()
    features = work()
    return time.perf_counter() - start, time.process_time() - cpu, features


def _ours(config: EvaluateConfig, side: Side) -> np.ndarray:
    return in_process(config, "", [side], lambda *_: None)[0].features_ND


def _plain(config: EvaluateConfig, out: Path, side: Side) -> np.ndarray:
    """What a script would do: read, decode, resize, extract, keep."""
    torch.set_num_threads(1)
    extractor, parts = load_extractor(config.extractor), []
    size = extractor.size
    for chunk in side.chunks:
        file = out / "samples/data" / chunk.schema.metadata[b"file"].decode()
        pixels = []
        for one in pq.read_table(file, columns=["image"])["image"].to_pylist():
            image = Image.open(io.BytesIO(one["bytes"])).convert("RGB")
            pixels.append(np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)))
        for start in range(0, len(pixels), BATCH):
            call = np.zeros((BATCH, size, size, 3), np.uint8)
            call[:len(pixels[start:start + BATCH])] = pixels[start:start + BATCH]
            parts.append(extractor(call)[:len(pixels) - start])
    return np.concatenate(parts)


def whole(out: Path, no_ray: bool, metrics: list[str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(raw_of(out, metrics=metrics, cluster={"actors": 1}), file)
        file.flush()
        command = [sys.executable, "-m", "rayexpand", "evaluate", file.name, "--json", *["--no-ray"] * no_ray]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        driver, most = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                most = max(most, driver.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.1)
        assert process.stdout is not None
        found = json.loads(process.stdout.read())
    images = found["n_samples"] + found["n_reference"]
    return {"images": images, "images_per_second": images / found["seconds"]["features"], "seconds": found["seconds"],
            "driver_mb": round(most / 1e6), "scores": {name: one["value"] for name, one in found["scores"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["make", "compare", "whole"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--metrics", nargs="+", default=["fd", "kd", "density_coverage", "vendi"])
    given = parser.parse_args()
    if given.what == "make":
        found = make(given.out, given.samples)
    elif given.what == "compare":
        found = compare(given.out, given.images, given.small)
    else:
        found = whole(given.out, given.no_ray, given.metrics)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
