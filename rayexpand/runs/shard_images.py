"""Images of a shard: decoded ahead of the sampler and encoded behind it, in threads.

What is decoded counts in bytes, which headers tell before anything is decoded. With

    N   bytes that may be held: runtime.image_bytes       c   bytes of the rows of a call, each of the size of its seed
    f   bytes of the rows of the call after it            w   bytes of samples that wait to be encoded

a call holds c of seeds and c of samples, f are decoded meanwhile, and w wait: 2 c + f + w <= N. The next call is
decoded ahead where that fits, and a call begins once w is small enough. Calls of methods that load nothing are cut so
that c <= N / 4; an image larger than that has a call of its own. The others keep their planned shape, whatever they
hold.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from rayexpand.contract.errors import RowFault
from rayexpand.contract.schema import Draw, Sample, Seed, Start
from rayexpand.runs.plan import Call

_PARTS = 4  # of the limit: the seeds of a call, its samples, the next call's seeds, samples that wait


class Decoded(NamedTuple):
    pixels: np.ndarray  # uint8 (H, W, 3), prepared
    note: str
    size: tuple[int, int]  # height and width before


class ShardImages:
    """Decoded seeds of a shard: decoded ahead in the pool, kept for the call that runs and the next one.

    `limit`: bytes that may be held. `size`: bytes of the decoded seed. `blank`: those of a row without a seed image.
    """

    def __init__(self, found: dict[str, Seed | RowFault | None], listed: dict[str, RowFault],
                 decode: Callable[[Seed], Decoded], pool: ThreadPoolExecutor, limit: int,
                 size: Callable[[Seed], int], blank: int) -> None:
        self._found, self._listed, self._decode, self._pool = found, listed, decode, pool
        self._limit, self._size, self._blank = limit, size, blank
        self._bytes: dict[str, int] = {}
        self._decoded: dict[str, Future[Decoded]] = {}
        self._encoding: deque[tuple[Future[Sample], int]] = deque()
        self._notes: dict[str, str] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def parts(self, call: Call) -> list[Call]:
        """The call, or calls of some of its units each where its images are too large for one."""
        if self._held(call) <= self._limit // _PARTS:
            return [call]
        parts: list[list[Draw | None]] = []
        room = 0
        for start in range(0, len(call.slots), call.unit):
            unit = call.slots[start:start + call.unit]
            if not any(unit):
                continue
            if (held := self._held(replace(call, slots=unit))) > room or not parts:
                parts.append([])
                room = self._limit // _PARTS
            parts[-1] += unit
            room -= held
        return [replace(call, slots=tuple(part)) for part in parts]

    def _held(self, call: Call) -> int:
        """Bytes of the rows of a call; a filler has the size of its smallest batch-mate."""
        rows = [self._row_bytes(draw) for draw in call.slots if draw]
        return sum(rows) + min(rows, default=0) * (len(call.slots) - len(rows))

    def _row_bytes(self, draw: Draw) -> int:
        if draw.start != Start.IMAGE:
            return self._blank
        if draw.seed_id not in self._bytes:
            seed = self._found[draw.seed_id]
            self._bytes[draw.seed_id] = self._size(seed) if isinstance(seed, Seed) else 0
        return self._bytes[draw.seed_id]

    def ahead(self, call: Call, following: Call | None = None) -> None:
        """Starts decoding what `call` uses, and `following` where that fits too; forgets the rest, and waits until
        enough samples are encoded."""
        room, more = self._limit - 2 * self._held(call), self._held(following) if following else 0
        if more > room:
            following, more = None, 0
        used = {draw.seed_id for one in (call, following) if one for draw in one.slots
                if draw and draw.start == Start.IMAGE}
        self._decoded = {seed_id: future for seed_id, future in self._decoded.items() if seed_id in used}
        waiting = sum(count for _, count in self._encoding)
        while self._encoding and (waiting > room - more or self._encoding[0][0].done()):
            sample, count = self._encoding.popleft()
            wait([sample])
            waiting -= count
        for seed_id in used - set(self._decoded):
            if isinstance(seed := self._found[seed_id], Seed):
                self._decoded[seed_id] = self._pool.submit(self._decode, seed)

    def encode(self, work: Callable[[], Sample], count: int) -> Future[Sample]:
        """Starts `work` on a sample of `count` bytes in the pool."""
        sample = self._pool.submit(work)
        self._encoding.append((sample, count))
        return sample

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
