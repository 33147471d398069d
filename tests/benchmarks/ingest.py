"""Images per second of training ingest, stage by stage, on a dataset of small images.

    python -m tests.benchmarks.ingest stages --data <folder with train-*.parquet>   one process, CPU time per image
    python -m tests.benchmarks.ingest loader --data ... --workers 2                 a plain DataLoader on the same files
    python -m tests.benchmarks.ingest compare --data ...                            Ray Data against the DataLoader

`compare` gives each side one loader process and one consumer, alternates them three times, without and with a small
ResNet that trains on what comes, and prints the ratio of each pair. Run from the root of the repository with nothing
else on the machine. Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision import transforms

from rayexpand.classifier.classifier import TrainBatch
from rayexpand.classifier.recipe import Recipe
from rayexpand.classifier.transforms import train_transform
from rayexpand.contract.rng import generator, row_key
from rayexpand.data import pixels
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.loader.images import ImageReader
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import TrainingSet
from rayexpand.studies.config import parse_study
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trial import TrialWork, make_classifier, open_work
from rayexpand.studies.trials import make_trials

SIZE, BATCH, REPEATS = 32, 256, 3


def recipe(**fields: Any) -> Recipe:
    """CIFAR's usual training: padding 4, random crop, flip."""
    return Recipe(**{"size": SIZE, "crop": "pad", "crop_pad": 4, "hflip": 0.5, "batch": BATCH, "updates": None,
                     **fields})


def study_list(folder: str) -> TrainingSet:
    data = DataConfig(source="parquet", path=folder, split="train")
    return TrainingSet.of_seeds(build_index(data), data)


def stages(folder: str, images: int) -> dict[str, Any]:
    """CPU microseconds per image of each stage alone, and of whole batches of the first pass and of a later one."""
    table: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any], count: int = images) -> Any:
        started = time.process_time()
        found = work()
        table[name] = round((time.process_time() - started) / count * 1e6, 2)
        return found

    rows = timed("index and list", lambda: study_list(folder), 50_000)
    items = np.arange(images)
    encoded = timed("read", lambda: ImageReader(rows).encoded(items))
    decoded = timed("decode", lambda: [pixels.decode(one)[0] for one in encoded])
    streams = generator(row_key(0, "bench", "", 0, 0, "augment"))
    for name, fields in {"crop and flip": {}, "crop, flip, randaugment": {"augment": "randaugment"},
                         "resized crop": {"crop": "resized"},
                         "timm rand-m7-mstd0.5-inc1": {"augment": "timm", "timm_augment": "rand-m7-mstd0.5-inc1"}
                         }.items():
        chosen = recipe(**fields)
        some = decoded[:images if name == "crop and flip" else max(1, images // 10)]
        timed(name, lambda s=some, r=chosen: [train_transform(one, streams, r) for one in s],  # type: ignore[misc]
              len(some))
    timed("labels", lambda: [ImageReader(rows).targets(items[i:i + BATCH]) for i in range(0, images, BATCH)])
    feed = Loader(rows, recipe(), 0)
    timed("order of an epoch", lambda: feed.slots(0), 50_000)
    steps = images // BATCH
    for name in ("batches, first pass", "batches, files kept"):
        timed(name, lambda: sum(1 for _ in feed.batches(0, steps)), steps * BATCH)
    return {"cpu_us_per_image": table, "images_per_cpu_second": round(1e6 / table["batches, files kept"]),
            "rss_mb": psutil.Process().memory_info().rss // 2**20}


class Plain(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """What one writes without this package: all encoded images in memory, Pillow, torchvision."""

    def __init__(self, folder: str) -> None:
        self.images: list[bytes] = []
        self.labels: list[int] = []
        for path in sorted(Path(folder).glob("train-*.parquet")):
            table = pq.read_table(path)
            self.images += [row["bytes"] for row in table["image"].to_pylist()]
            self.labels += table["label"].to_pylist()
        self.transform = transforms.Compose([transforms.RandomCrop(SIZE, 4), transforms.RandomHorizontalFlip(),
                                             transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        with Image.open(io.BytesIO(self.images[item])) as image:
            return self.transform(image.convert("RGB")), self.labels[item]


def loader(folder: str, images: int, workers: int) -> dict[str, Any]:
    """Images per second of torch's DataLoader after its first batch, and CPU time per image in this process, which is
    all of it where there are no workers."""
    torch.set_num_threads(1)
    batches: Iterator[Any] = iter(torch.utils.data.DataLoader(Plain(folder), BATCH, shuffle=True, num_workers=workers,
                                                              drop_last=True))
    next(batches)
    started, spent, steps = time.perf_counter(), time.process_time(), images // BATCH - 1
    for _ in range(steps):
        next(batches)
    return {"workers": workers, "images_per_second": round(steps * BATCH / (time.perf_counter() - started)),
            "cpu_us_per_image": round((time.process_time() - spent) / (steps * BATCH) * 1e6, 2)}


def compare(folder: str, images: int) -> dict[str, Any]:
    """Images per second of both ways to load `images`, or to train on a tenth of them, pair by pair."""
    from rayexpand.on_ray.pool import connected
    from rayexpand.runs.config import ClusterConfig

    fields = recipe().model_dump(mode="json", exclude_defaults=True)
    data = {"source": "parquet", "path": folder}
    with tempfile.TemporaryDirectory() as out:
        study = prepare_study(parse_study({
            "name": "bench", "out": out, "data": {**data, "split": "train"}, "test": {**data, "split": "test"},
            "seeds": [0], "arms": [{"name": "original"}], "recipe": fields, "training": {"workers": 1}}))
        trial = make_trials(study)[0]
        plain = Plain(folder)
        pairs: dict[str, list[dict[str, float]]] = {}
        with connected(ClusterConfig()):
            for name, count in (("loading only", images), ("with a small ResNet", images // 10)):
                pairs[name] = _pairs(study, trial, plain, count // BATCH, train=name != "loading only")
    return pairs


def _pairs(study: Study, trial: Trial, plain: Plain, steps: int, *, train: bool) -> list[dict[str, float]]:
    from rayexpand.on_ray.train import loaded_batches

    trial = replace(trial, recipe={**trial.recipe, "updates": steps})
    work = open_work(study.files, trial, study.config.training)
    config = {"folder": str(study.files.root), "trial": vars(trial), "cwd": os.getcwd(),
              "training": study.config.training.model_dump()}
    ways = {"ray": lambda: loaded_batches(work, config, 0, 0, 1), "dataloader": lambda: _plain_batches(plain, steps)}
    pairs = []
    for repeat in range(REPEATS):
        found = {way: _consumed(ways[way](), work, train=train) for way in sorted(ways, reverse=repeat % 2 == 1)}
        pairs.append({**{f"{way} images/s": round(rate) for way, rate in found.items()},
                      "ratio": round(found["ray"] / found["dataloader"], 3)})
    return pairs


def _plain_batches(plain: Plain, steps: int) -> Iterator[TrainBatch]:
    done = 0
    while done < steps:
        for x_BCHW, y_B in torch.utils.data.DataLoader(plain, BATCH, shuffle=True, num_workers=1, drop_last=True):
            y_BK = torch.nn.functional.one_hot(y_B, 10).float()
            yield TrainBatch(x_BCHW.permute(0, 2, 3, 1).numpy(), y_BK.numpy(), done)
            done += 1
            if done == steps:
                return


def _consumed(batches: Iterator[TrainBatch], work: TrialWork, *, train: bool) -> float:
    """Images per second from the first batch on, with or without a training step on each."""
    torch.set_num_threads(1)
    classifier, seen = make_classifier(work, "cpu"), 0
    for batch in batches:
        if not seen:
            started = time.perf_counter()
        seen += len(batch.x_BHWC)
        if train:
            classifier.update(batch)
    return (seen - BATCH) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stages", "loader", "compare"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    ways = {"stages": lambda: stages(given.data, given.images), "compare": lambda: compare(given.data, given.images),
            "loader": lambda: loader(given.data, given.images, given.workers)}
    found = ways[given.what]()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
