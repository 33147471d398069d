"""The peers: what each runs, what it plans, and how its output is read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.peers import loops, ours, ray_data
from tests.benchmarks.peers.harness import Peer
from tests.benchmarks.peers.judge import Slots, read_images, read_listed, read_parquet
from tests.benchmarks.peers.task import Task


def copy_slots(task: Task) -> Slots:
    return task.slots()


def _copy_of(name: str) -> str | None:
    """`zero/zero-0_3.png` is copy 3 of zero/zero-0."""
    found = re.fullmatch(r"(.+/.+)_(\d+)\.(?:png|jpg)", name)
    return found and f"{found[1]}/{found[2]}"


def diffmix_slots(task: Task) -> Slots:
    return Counter(f"{label}/{label}-{number:06d}.png" for number, label in loops.diffmix_plan(task))


def gif_slots(task: Task) -> Slots:
    counts = [(rank, label, count * task.copies) for rank in range(task.processes)
              for label, count in Counter(seed.label for seed in loops.gif_split(task, rank)).items()]
    return Counter(f"{label}/stable_{rank}_expanded_{number}.png" for rank, label, count in counts
                   for number in range(count))


def class_slots(task: Task) -> Slots:
    """Where names say the class alone: as many as a class has."""
    return Counter({label: count * task.copies for label, count in task.classes().items()})


def seed_slots(task: Task) -> Slots:
    """Where names say the seed alone."""
    return Counter({Path(seed.path).stem: task.copies for seed in task.listed()})


def _generated(name: str) -> str | None:
    found = re.fullmatch(r"(.+)/\1_gen_\d+\.png", name)
    return found and found[1]


def _own_slot(row: dict[str, Any]) -> str:
    seed, _, copy = row["sample_id"].rpartition("/")
    return f"{seed.removesuffix('.png')}/{copy}"


def juicer(task: Task, out: Path) -> None:
    """Becomes the Python of another environment."""
    import json

    file = out.parent / "task.json"
    file.write_text(json.dumps(asdict(task)))
    out.mkdir(exist_ok=True)
    os.environ["PYTHONPATH"] = os.environ["PYTHONPATH"].partition(os.pathsep)[0]  # the counter, not rayexpand
    os.execv(task.data_juicer, [task.data_juicer, str(Path(__file__).parent / "juicer.py"), str(file), str(out)])


_files = partial(read_images, slot_of=_copy_of)
_ours = partial(read_parquet, pattern="run/data/*.parquet", slot_of=_own_slot, image="image.bytes",
                keeps=("run/run.json", "run/plan/*", "run/receipts/*", "run/attempts/*", "run/heartbeats/*",
                       "run/README.md", "run/report.html"))
_ray: Callable[[Path], Any] = partial(read_parquet, pattern="data/*.parquet", slot_of=lambda row: row["slot"],
                                      image="image")
_paths = partial(read_images, slot_of=lambda name: name if name.endswith(".png") else None)

PEERS = {peer.run.__name__: peer for peer in (
    Peer("diffusers, one image a call", "diffusers' docs", loops.one_by_one, copy_slots, _files),
    Peer("diffusers, batched", "diffusers' docs", loops.batched, copy_slots, _files),
    Peer("Ray Data, a row for each copy", "Ray's docs", ray_data.a_row_for_each_copy, copy_slots, _ray),
    Peer("Ray Data, a row for each seed", "Ray's docs", ray_data.a_row_for_each_seed, copy_slots, _ray),
    Peer("DistDiff's script", "haoweiz23/DistDiff", loops.distdiff, copy_slots, _files),
    Peer("GIF's script", "Vanint/DatasetExpansion", loops.gif, gif_slots, _paths),
    Peer("Diff-Mix's script, batch 1", "Zhicaiwww/Diff-Mix", loops.diffmix, diffmix_slots, _paths),
    Peer("Diff-Mix's script, batched", "Zhicaiwww/Diff-Mix", loops.diffmix_batches, diffmix_slots, _paths),
    Peer("Real-Fake's script", "BAAI-DCAI/Training-Data-Synthesis", loops.realfake, copy_slots, _files),
    Peer("DiffCoRe-Mix's script", "khawar-islam/DiffCoRe-Mix", loops.diffcoremix, class_slots,
         partial(read_images, slot_of=_generated, keeps=("*/*-?.png", "*/*-??.png")), loops.copy_seeds),
    Peer("Data-Juicer", "py-data-juicer", juicer, seed_slots,
         partial(read_listed, listing="samples.jsonl", images="images",
                 slot_of=lambda name: name.partition("__dj_hash_")[0])),
    Peer("rayexpand --no-ray", "", ours.in_process, copy_slots, _ours),
    Peer("rayexpand on Ray", "", ours.on_ray, copy_slots, _ours))}
