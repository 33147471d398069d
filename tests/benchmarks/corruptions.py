"""Milliseconds of each corruption for one image, on one core.

    python -m tests.benchmarks.corruptions --side 224 --images 6

Every type in all five severities of the table for that side (cifar up to 64 pixels, else imagenet); images are smooth
random colours with an edge, whose content does not change what is computed. Frost is left out without its pictures.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from PIL import Image

from rayexpand.contract.rng import generator, row_key
from rayexpand.data.corruptions.config import Corrupt
from rayexpand.data.corruptions.corruptor import Corruptor
from rayexpand.data.corruptions.tables import SEVERITIES


def images(side: int, count: int) -> list[np.ndarray]:
    rng = generator(row_key(0, "benchmark", "", 0, 0, "corruptions"))
    rough = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    return [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BILINEAR)) for one in rough]


def measured(side: int, count: int) -> dict[str, float]:
    """CPU milliseconds for one image and severity, by type, and their mean."""
    made = Corruptor(Corrupt(table="cifar" if side <= 64 else "imagenet"), "benchmark")
    found, shown = {}, images(side, count)
    for kind in made.config.names:
        made(shown[0], "warm", kind, 1)
        started = time.process_time()
        for number, image in enumerate(shown):
            for severity in SEVERITIES:
                made(image, str(number), kind, severity)
        found[kind] = round(1000 * (time.process_time() - started) / (count * len(SEVERITIES)), 2)
    return {**found, "mean": round(sum(found.values()) / len(found), 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=6)
    chosen = parser.parse_args()
    print(json.dumps({**vars(chosen), "ms": measured(chosen.side, chosen.images)}, indent=1))
