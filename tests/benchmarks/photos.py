"""Peak memory of one sampler process that expands large photos by classical augmentation, one copy of each.

    python -m tests.benchmarks.photos --count 64 --width 6000 --height 4000 --batch 16
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from rayexpand.runs import run as runs
from rayexpand.runs.config import IMAGE_BYTES, parse


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """JPEGs of soft coloured noise, in two classes."""
    rng = np.random.Generator(np.random.Philox(key=7))
    for i in range(count):
        small = rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8)
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(
            folder / "ab"[i % 2] / f"{i}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("count", 64), ("width", 6000), ("height", 4000), ("batch", 16), ("image-bytes", IMAGE_BYTES)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder, "photos"), chosen.count, chosen.width, chosen.height)
        run = runs.prepare(parse({
            "name": "photos", "out": folder, "data": {"source": "imagefolder", "path": f"{folder}/photos"},
            "method": {"name": "classical", "policy": "cutout", "ratio": 1}, "sampler": {"batch": chosen.batch},
            "runtime": {"image_bytes": chosen.image_bytes}}))
        started = time.perf_counter()
        expander = runs.start(run)
        totals = runs.drive(run, runs.in_process(expander), lambda: runs.pending_jobs(run))
        expander.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{totals.kept} samples, {time.perf_counter() - started:,.0f} s, peak RSS {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
