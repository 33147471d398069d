"""Workers of one test with real gloo collectives: threads or forks of this process, so nothing is imported twice.

Workers that wait for each other are ended by the time limit of the test (pytest-timeout) and by nothing else: how long
a collective takes says how busy the machine is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing

Reduce = Callable[[Tensor], Tensor]


def run_ranks(world: int, work: Callable[[int, Reduce], Any]) -> list[Any]:
    """What `work(rank, sum over ranks)` returns on each rank. Raises the first error."""
    store = distributed.HashStore()
    found: list[Any] = [None] * world
    errors: list[BaseException] = []
    groups: list[Any] = []  # kept until all are done: a closed one breaks those that still connect to it

    def run(rank: int) -> None:
        torch.set_num_threads(1)

        def reduce(x: Tensor) -> Tensor:
            total = x.clone()
            group.allreduce([total]).wait()
            return total

        try:
            group = distributed.ProcessGroupGloo(store, rank, world, timedelta(hours=1))
            groups.append(group)
            found[rank] = work(rank, reduce)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return found


def run_processes(world: int, work: Callable[[int], dict[str, Tensor]], folder: Path) -> list[dict[str, Tensor]]:
    """What `work(rank)` returns in each of `world` processes forked from this one, which share a gloo group."""
    children = multiprocessing.start_processes(_child, (world, work, str(folder)), world, join=False,
                                               start_method="fork")
    try:
        while not children.join():
            pass
    finally:
        for process in children.processes:
            if process.is_alive():
                process.kill()
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(world)]


def _child(rank: int, world: int, work: Callable[[int], dict[str, Tensor]], folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    save_file(work(rank), f"{folder}/rank-{rank}.safetensors")
    distributed.destroy_process_group()
