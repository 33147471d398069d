"""When a fleet of GPUs that may be taken away finishes a run, and what it costs: a discrete-event simulation.

    here               meaning, unit
    seconds_N          work of each shard on one GPU, seconds, in the order they are handed out
    gpus, per_node     GPUs asked for, and on one node; a node is lost as a whole
    loss_rate          lambda: losses of a node per hour that it is up, exponential
    node_start_s       from asking for a node to a node that can run: the autoscaler's delay and the boot, seconds
    load_s             from a node that can run to the first sampler call: copying the models there and loading them
    shard_s            of each shard, beside its sampler calls: reading, committing, Ray
    idle_s             a node without work is given back after so many seconds
    saved_s            what is saved within a shard every so many seconds is not lost: a training has checkpoints
    wave               shards handed out together: the next wave begins, and its actors load, when one is done

What is simulated is what the engine does on Ray (runs/run.py, on_ray/expand.py). A GPU takes the next shard when it has
committed one. With its node, a GPU loses the shard it works on; another node is asked for at once, and the shard begins
again there. If another GPU has run out of work before, its process ends and that of the lost node is started in its
place, once Ray knows of the loss. A node is paid for from its boot until it is lost or given back.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np

from rayexpand.contract.rng import generator, row_key

SILENT_S = 15.0  # Ray takes a node for lost after five health checks, three seconds apart
HOPELESS = 50.0  # times its work and an hour of each GPU: a run that has been paid for longer never ends

Event = Callable[[int, float], None]  # number of a node or GPU, now


@dataclass(frozen=True, slots=True)
class Fleet:
    gpus: int
    per_node: int = 1
    loss_rate: float = 0.0
    node_start_s: float = 120.0
    load_s: float = 60.0
    shard_s: float = 0.0
    idle_s: float = 60.0
    wave: int = 20_000
    saved_s: float = np.inf


class Course(NamedTuple):
    """How a run went; infinite hours if it would not end. `lost_hours`: GPU time that ended in no committed shard,
    `waited_hours`: paid GPU time without work (boot, loading, idle)."""

    wall_hours: float
    paid_hours: float
    lost_hours: float
    waited_hours: float
    losses: int


def simulate(seconds_N: Sequence[float] | np.ndarray, fleet: Fleet, seed: int = 0, repetition: int = 0) -> Course:
    """One course of a run; the losses of a node are drawn with the key of `seed`, `repetition` and its number."""
    return _Course(np.asarray(seconds_N, np.float64) + fleet.shard_s, fleet, seed, repetition).run()


def lives(fleet: Fleet, node: int, seed: int, repetition: int) -> Iterator[float]:
    """Seconds that a node is up before each of its losses."""
    rng = generator(row_key(seed, "fleet", str(node), repetition, 0, "losses"))
    while True:
        yield rng.exponential(3600 / fleet.loss_rate) if fleet.loss_rate else np.inf


@dataclass(slots=True)
class _Gpu:
    node: int
    loaded: bool = False
    shard: int | None = None  # what it works on
    kept: int | None = None  # what it lost with its node, and begins again
    since: float = 0.0  # it works on the shard, or has lost it


@dataclass(slots=True)
class _Node:
    gpus: list[int]
    lives: Iterator[float]
    life: int = 0  # how often it was asked for; events of an earlier life are stale
    up: bool = False
    since: float = 0.0  # paid from here
    idle_since: float | None = None


class _Course:
    """A state and a heap of (time, order, event, which GPU or node, its life)."""

    def __init__(self, seconds_N: np.ndarray, fleet: Fleet, seed: int, repetition: int) -> None:
        self.seconds_N, self.fleet = seconds_N, fleet
        used, size = min(fleet.gpus, len(seconds_N)), fleet.per_node
        self.gpus = [_Gpu(number // size) for number in range(used)]
        self.nodes = [_Node(list(range(first, min(first + size, used))), lives(fleet, first // size, seed, repetition))
                      for first in range(0, used, size)]
        self.queue: deque[int] = deque()
        self.next_shard = self.left = self.losses = 0  # left: of the wave
        self.paid = self.lost = 0.0
        self.events: list[tuple[float, int, Event, int, int]] = []
        self.order = count()

    def run(self) -> Course:
        work, now = float(self.seconds_N.sum()), 0.0
        for number in range(len(self.nodes)):
            self._ask(number, now)
        self._next_wave(now)
        while self.left:
            now, _, event, which, life = heapq.heappop(self.events)
            of = which if event in (self._up, self._loss) else self.gpus[which].node
            if life == self.nodes[of].life:
                event(which, now)
            if self.paid > HOPELESS * (work + 3600 * len(self.gpus)):
                return Course(*(np.inf,) * 4, self.losses)
        for node in self.nodes:
            self._pay(node, now)
        return Course(now / 3600, self.paid / 3600, self.lost / 3600, (self.paid - self.lost - work) / 3600,
                      self.losses)

    # Events --------------------------------------------------------------------------------------------------------

    def _up(self, number: int, now: float) -> None:
        node = self.nodes[number]
        node.up = True
        if (life := next(node.lives)) < np.inf:
            self._at(now + life, self._loss, number, node)
        for gpu in node.gpus:
            self._at(now + self.fleet.load_s, self._ready, gpu, node)

    def _ready(self, number: int, now: float) -> None:
        self.gpus[number].loaded = True
        self._take(number, now)

    def _done(self, number: int, now: float) -> None:
        self.gpus[number].shard = None
        self.left -= 1
        if self.left:
            self._take(number, now)
        else:
            self._next_wave(now)

    def _loss(self, number: int, now: float) -> None:
        node = self.nodes[number]
        if self._left_at(node) < now:
            return  # it was given back before
        self.losses += 1
        for gpu in (self.gpus[one] for one in node.gpus):
            if gpu.shard is not None:
                done = now - gpu.since
                saved = done - done % self.fleet.saved_s
                self.lost += done - saved
                self.seconds_N[gpu.shard] -= saved
                gpu.kept, gpu.since = gpu.shard, now
            gpu.shard, gpu.loaded = None, False
        self._pay(node, now)
        self._ask(number, now)
        for other in range(len(self.gpus)):
            self._hand_over(other, now)

    def _hand_over(self, number: int, now: float) -> None:
        """A GPU without work gets the process that waits for a node longest, with the shard that it lost."""
        gpu, node = self.gpus[number], self.nodes[self.gpus[number].node]
        waiting = [one for one in self.gpus if one.kept is not None and not self.nodes[one.node].up]
        if not waiting or not gpu.loaded or gpu.shard is not None or self._left_at(node) < now:
            return
        longest = min(waiting, key=lambda one: one.since)
        if (known := longest.since + SILENT_S) > now:
            self._at(known, self._hand_over, number, node)
            return
        gpu.kept, longest.kept = longest.kept, None
        gpu.loaded, node.idle_since = False, None
        self._at(now + self.fleet.load_s, self._ready, number, node)

    # Steps ---------------------------------------------------------------------------------------------------------

    def _next_wave(self, now: float) -> None:
        wave = range(self.next_shard, min(self.next_shard + self.fleet.wave, len(self.seconds_N)))
        self.queue.extend(wave)
        self.left, self.next_shard = len(wave), wave.stop
        for number, node in enumerate(self.nodes if wave else ()):
            if self._left_at(node) < now:
                self._pay(node, now)
                self._ask(number, now)
            node.idle_since = None  # its actors load
            for gpu in node.gpus:
                self.gpus[gpu].loaded = False
                if node.up:
                    self._at(now + self.fleet.load_s, self._ready, gpu, node)

    def _take(self, number: int, now: float) -> None:
        gpu = self.gpus[number]
        node = self.nodes[gpu.node]
        if not gpu.loaded or gpu.shard is not None or self._left_at(node) < now:
            return
        if (shard := self._next_shard(gpu)) is not None:
            node.idle_since, gpu.shard, gpu.since = None, shard, now
            self._at(now + float(self.seconds_N[shard]), self._done, number, node)
            return
        if node.idle_since is None and all(self.gpus[one].shard is self.gpus[one].kept is None for one in node.gpus):
            node.idle_since = now
        self._hand_over(number, now)

    def _next_shard(self, gpu: _Gpu) -> int | None:
        """Its own lost one, else the next in line."""
        if gpu.kept is None:
            return self.queue.popleft() if self.queue else None
        shard, gpu.kept = gpu.kept, None
        return shard

    def _ask(self, number: int, now: float) -> None:
        node = self.nodes[number]
        node.life, node.up, node.idle_since, node.since = node.life + 1, False, None, now
        self._at(now + self.fleet.node_start_s, self._up, number, node)

    def _pay(self, node: _Node, now: float) -> None:
        self.paid += max(0.0, min(now, self._left_at(node)) - node.since) * len(node.gpus)

    def _left_at(self, node: _Node) -> float:
        """When it was, or will be, given back if no work comes."""
        return np.inf if node.idle_since is None else node.idle_since + self.fleet.idle_s

    def _at(self, when: float, event: Event, which: int, node: _Node) -> None:
        heapq.heappush(self.events, (when, next(self.order), event, which, node.life))
