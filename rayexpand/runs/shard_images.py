"""Images of a shard: decoded ahead of the sampler and encoded behind it, in threads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from rayexpand.contract.errors import RowFault
from rayexpand.contract.schema import Draw, Seed, Start
from rayexpand.runs.plan import Call


class Decoded(NamedTuple):
    pixels: np.ndarray  # uint8 (H, W, 3), prepared
    note: str
    size: tuple[int, int]  # height and width before


class ShardImages:
    """Decoded seeds of a shard: decoded ahead in the pool, kept for the call that runs and the next one."""

    def __init__(self, found: dict[str, Seed | RowFault | None], listed: dict[str, RowFault],
                 decode: Callable[[Seed], Decoded], pool: ThreadPoolExecutor) -> None:
        self._found, self._listed, self._decode, self._pool = found, listed, decode, pool
        self._decoded: dict[str, Future[Decoded]] = {}
        self._notes: dict[str, str] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def ahead(self, *calls: Call | None) -> None:
        """Starts decoding what `calls` use, and forgets the rest."""
        used = {draw.seed_id for call in calls if call for draw in call.slots if draw and draw.start == Start.IMAGE}
        self._decoded = {seed_id: future for seed_id, future in self._decoded.items() if seed_id in used}
        for seed_id in used - set(self._decoded):
            if isinstance(seed := self._found[seed_id], Seed):
                self._decoded[seed_id] = self._pool.submit(self._decode, seed)

    def try_alone(self, seed_id: str) -> None:
        """Decodes a seed here and now, for what it does to the process."""
        if isinstance(seed := self._found[seed_id], Seed):
            with contextlib.suppress(RowFault):
                self._decode(seed)

    def fault(self, draw: Draw, clock: PhaseClock) -> RowFault | None:
        """Why a draw cannot start: a fault of its seed in the listing, or of the pixels if it starts from them."""
        seed_id = draw.seed_id
        if draw.start != Start.IMAGE:
            return self._listed.get(seed_id)
        if isinstance(fault := self._found[seed_id], RowFault):
            return fault
        if seed_id in self._decoded:
            try:
                with clock.phase("decode"):
                    _, self._notes[seed_id], self._sizes[seed_id] = self._decoded[seed_id].result()
            except RowFault as error:
                return error
        return None

    def pixels(self, seed_id: str) -> np.ndarray | None:
        """Prepared uint8 (H, W, 3) pixels; None when no draw uses them."""
        return self._decoded[seed_id].result().pixels if seed_id in self._decoded else None

    def size(self, seed_id: str) -> tuple[int, int] | None:
        """Height and width of a seed image before it was prepared; None where it was not decoded."""
        return self._sizes.get(seed_id)

    def note(self, seed_id: str) -> str:
        return self._notes.get(seed_id, "")


class PhaseClock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("load", "read", "decode", "sample", "encode"), 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started
