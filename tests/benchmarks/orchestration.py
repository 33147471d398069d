"""What Ray and the engine cost around a sampler, on this machine.

    python -m tests.benchmarks.orchestration efficiency --ms 20     rate of a sleeping sampler over its bare rate
    python -m tests.benchmarks.orchestration slope --shards 6000    driver memory over shards that do almost nothing

Run from the root of the repository with nothing else on the machine. Both print one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from rayexpand.methods import trust
from rayexpand.on_ray.expand import expand
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig, parse


def efficiency(ms: float, actors: int, window_s: float) -> dict[str, Any]:
    """Images/s from when every actor has committed once to the last commit, over `actors` / `ms`."""
    with tempfile.TemporaryDirectory() as folder:
        shards = actors * (1 + -(-int(window_s) // max(1, int(0.256 * ms))))
        config = run_config(folder, write_seeds(folder, shards * 8), ratio=32, batch=32, shard_images=256,
                            actors=actors, method={"name": "tests.methods.fakes.Sleeping", "seconds": ms / 1000})
        run = runs.prepare(config, device_here=False)
        expand(run, lambda: runs.pending_jobs(run))
        times = sorted(entry.modified for entry in run.files.entries("data").values())
    window = times[-1] - times[actors - 1]
    rate = 256 * (len(times) - actors) / window
    return {"ms_per_image": ms, "actors": actors, "window_s": round(window, 1), "images_per_second": round(rate, 2),
            "bare_images_per_second": actors * 1000 / ms, "efficiency": round(rate * ms / 1000 / actors, 4)}


def slope(shards: int) -> dict[str, Any]:
    """Least-squares growth of the driver's memory over committed shards, after the first tenth."""
    readings: list[tuple[int, float]] = []
    stop = threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(folder, write_seeds(folder, shards), ratio=1, batch=1, shard_images=1, actors=2,
                            method={"name": "tests.methods.fakes.Fake"})
        run = runs.prepare(config, device_here=False)

        def read() -> None:
            me = psutil.Process()
            while not stop.wait(2):
                readings.append((len(run.store.committed()), me.memory_info().rss / 2**20))

        thread = threading.Thread(target=read)
        thread.start()
        started = time.perf_counter()
        expand(run, lambda: runs.pending_jobs(run))
        seconds = time.perf_counter() - started
        stop.set()
        thread.join()
    late = np.array([reading for reading in readings if reading[0] > shards / 10])
    per_shard = float(np.polyfit(late[:, 0], late[:, 1], 1)[0])
    return {"shards": shards, "seconds": round(seconds, 1), "shards_per_second": round(shards / seconds, 1),
            "driver_mb": round(readings[-1][1]), "mb_per_10000_shards": round(1e4 * per_shard, 1)}


def write_seeds(folder: str, count: int) -> Path:
    images = Path(folder, "seeds", "one")
    images.mkdir(parents=True)
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(images / "0000000.png")
    content = (images / "0000000.png").read_bytes()
    for i in range(1, count):
        (images / f"{i:07d}.png").write_bytes(content)
    return images.parent


def run_config(folder: str, seeds: Path, *, ratio: int, batch: int, shard_images: int, actors: int,
               method: dict[str, Any], cluster: Mapping[str, Any] | None = None) -> RunConfig:
    trust(method["name"])
    return parse({"name": "run", "out": folder, "data": {"source": "imagefolder", "path": str(seeds)},
                  "method": {**method, "ratio": ratio}, "sampler": {"batch": batch, "shard_images": shard_images},
                  "cluster": {"actors": actors, "cpus_per_actor": 0.5, **(cluster or {})}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["efficiency", "slope"])
    parser.add_argument("--ms", type=float, default=20, help="milliseconds per image of the sleeping sampler")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--window", type=float, default=60, help="seconds to measure over")
    parser.add_argument("--shards", type=int, default=6000)
    given = parser.parse_args()
    found = efficiency(given.ms, given.actors, given.window) if given.what == "efficiency" else slope(given.shards)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
