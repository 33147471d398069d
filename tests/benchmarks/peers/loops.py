"""Loops over diffusers' image-to-image pipeline: as its documentation has them, and as the papers' released scripts
behave around the sampler call. The call is the same for all (plain image to image): what is compared is which files are
written under which names, what is skipped, and where random numbers come from. Written from descriptions of the scripts
(their source is named at each), not from their code.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.benchmarks.peers.task import Seed, Task, load_pipeline, opened

Row = tuple[Seed, int]


def name_of(row: Row, ending: str = ".png") -> str:
    seed, copy = row
    return f"{seed.label}/{Path(seed.path).stem}_{copy}{ending}"


def sampled(pipe: Any, task: Task, rows: Sequence[Row], generators: list[Any] | None = None) -> list[Image.Image]:
    images: list[Image.Image] = pipe([f"a photo of a {seed.label}" for seed, _ in rows],
                                     image=[opened(seed.path) for seed, _ in rows], generator=generators,
                                     **task.call()).images
    return images


def chunks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start:start + size]


def make_folders(task: Task, out: Path) -> None:
    for seed in task.listed():
        (out / seed.label).mkdir(parents=True, exist_ok=True)


def in_processes(task: Task, work: Callable[[int], None]) -> None:
    """`work(rank)` in processes of their own, one thread each. Where one fails, the others go on, as in the scripts."""
    children = []
    for rank in range(task.processes):
        child = os.fork()
        if not child:
            try:
                work(rank)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


# diffusers' documentation -------------------------------------------------------------------------------------------


def one_by_one(task: Task, out: Path) -> None:
    """One image a call, a generator for each image ("reproducible pipelines" of diffusers' docs), files that exist are
    skipped."""
    batched(task, out, 1)


def batched(task: Task, out: Path, size: int | None = None) -> None:
    """A call for `size` images and a list of generators; skipped where all of its files exist."""
    import torch

    pipe, rows = load_pipeline(task), task.rows()
    make_folders(task, out)
    for chunk in chunks(rows, size or task.batch):
        paths = [out / name_of(row) for row in chunk]
        if all(path.exists() for path in paths):
            continue
        generators = [torch.Generator().manual_seed(task.copies * seed.number + copy) for seed, copy in chunk]
        for path, image in zip(paths, sampled(pipe, task, chunk, generators), strict=True):
            image.save(path)


# The papers ---------------------------------------------------------------------------------------------------------


def distdiff(task: Task, out: Path) -> None:
    """haoweiz23/DistDiff, generate_data.py: contiguous splits that are started by hand, seed 42 in each of them, noise
    from the global generator; a batch is skipped where all of its files exist, and made whole where one is missing."""
    import torch

    rows = task.rows()
    make_folders(task, out)

    def work(rank: int) -> None:
        torch.manual_seed(42)
        pipe, size = load_pipeline(task), math.ceil(len(rows) / task.processes)
        for chunk in chunks(rows[rank * size:(rank + 1) * size], task.batch):
            paths = [out / name_of(row) for row in chunk]
            if not all(path.exists() for path in paths):
                for path, image in zip(paths, sampled(pipe, task, chunk), strict=True):
                    image.save(path)

    in_processes(task, work)


def diffmix(task: Task, out: Path, size: int = 1) -> None:
    """Zhicaiwww/Diff-Mix, scripts/sample_mp.py (its default batch is 1): a queue of (number, class) that all processes
    take from; random numbers from seed + process, which also draw the source image; a batch is skipped where its first
    file exists. At the end, files whose header cannot be opened are deleted."""
    import multiprocessing
    from queue import Empty

    import torch

    by_class: dict[str, list[Seed]] = {}
    for seed in task.listed():
        by_class.setdefault(seed.label, []).append(seed)
    make_folders(task, out)
    queue: Any = multiprocessing.Queue()
    for number, label in diffmix_plan(task):
        queue.put((number, label))

    def work(rank: int) -> None:
        drawn = random.Random(rank)
        torch.manual_seed(rank)
        pipe = load_pipeline(task)
        while True:
            taken = []
            try:
                while len(taken) < size:
                    taken.append(queue.get(timeout=1))
            except Empty:
                pass
            if not taken:
                return
            chunk = [(drawn.choice(by_class[label]), number) for number, label in taken]
            paths = [out / seed.label / f"{seed.label}-{number:06d}.png" for seed, number in chunk]
            if not paths[0].exists():
                for path, image in zip(paths, sampled(pipe, task, chunk), strict=True):
                    image.save(path)

    in_processes(task, work)
    for path in out.rglob("*.png"):
        try:
            Image.open(path).close()
        except OSError:
            path.unlink()


def diffmix_plan(task: Task) -> list[tuple[int, str]]:
    """Classes are drawn in the first process, from its seed."""
    labels = random.Random(0).choices(sorted(task.classes()), k=len(task.listed()) * task.copies)
    return list(enumerate(labels))


def diffmix_batches(task: Task, out: Path) -> None:
    """The same with the batch of the other peers."""
    diffmix(task, out, task.batch)


def realfake(task: Task, out: Path) -> None:
    """BAAI-DCAI/Training-Data-Synthesis, generate.py: contiguous chunks of floor(n / processes), the last takes the
    rest; no generator; JPEG of Pillow's default quality; a batch is skipped where its last file exists."""
    import torch

    rows = task.rows()
    make_folders(task, out)

    def work(rank: int) -> None:
        torch.seed()
        pipe, size = load_pipeline(task), len(rows) // task.processes
        mine = rows[rank * size:] if rank == task.processes - 1 else rows[rank * size:(rank + 1) * size]
        for chunk in chunks(mine, task.batch):
            paths = [out / name_of(row, ".jpg") for row in chunk]
            if not paths[-1].exists():
                for path, image in zip(paths, sampled(pipe, task, chunk), strict=True):
                    image.save(path)

    in_processes(task, work)


def gif(task: Task, out: Path) -> None:
    """Vanint/DatasetExpansion, GIF_SD: splits of ceil(n / splits) seeds that are started by hand, all copies of a seed
    in one call, no seed, nothing is skipped; names count up from 0 in each class and split, so a new start writes over
    what an old one left."""
    import torch

    make_folders(task, out)

    def work(rank: int) -> None:
        torch.seed()
        pipe = load_pipeline(task)
        counts: dict[str, int] = {}
        for seed in gif_split(task, rank):
            for image in sampled(pipe, task, [(seed, copy) for copy in range(task.copies)]):
                number = counts.setdefault(seed.label, 0)
                counts[seed.label] += 1
                image.save(out / seed.label / f"stable_{rank}_expanded_{number}.png")

    in_processes(task, work)


def gif_split(task: Task, rank: int) -> list[Seed]:
    seeds = task.listed()
    size = math.ceil(len(seeds) / task.processes)
    return seeds[rank * size:(rank + 1) * size]


def diffcoremix(task: Task, out: Path) -> None:
    """khawar-islam/DiffCoRe-Mix, diffcoreMix.py: one image a call, no seed, into the folders of the real images; how
    many a class gets is counted from the images that are there, so a new start counts what an old one made as real;
    numbers count up from 0 over all classes; each image passes through a file temp.png. Its filter (CLIP) is left out,
    and it samples from text alone: here the call is that of the others, with a random image of the folder."""
    import torch

    torch.seed()
    drawn, made = random.Random(), 0
    pipe = load_pipeline(task)
    for label in sorted(path.name for path in out.iterdir() if path.is_dir()):
        there = sorted((out / label).glob("*.png"))
        for _ in range(len(there) * task.copies):
            seed = Seed(0, label, str(drawn.choice(there)))
            (image,) = sampled(pipe, task, [(seed, 0)])
            image.save(out / "temp.png")
            image.save(out / label / f"{label}_gen_{made}.png")
            made += 1
            (out / "temp.png").unlink()


def copy_seeds(task: Task, out: Path) -> None:
    """What DiffCoRe-Mix starts from: the real images in the folder it writes to."""
    shutil.copytree(task.seeds, out, dirs_exist_ok=True)
