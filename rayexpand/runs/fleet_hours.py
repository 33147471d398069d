"""Hours and prices of work on the fleet that the section `estimate` describes: simulated (runs.fleet) several times.

    here           meaning
    seconds_N      work of each task on what it holds (a GPU, or `width` GPUs at once), seconds
    width          GPUs that a task holds at once; the loss of one ends what all of them do
    saved_s        a task that is lost goes on from what it saved every so many seconds; infinite: from its beginning
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rayexpand.contract.rng import generator, row_key
from rayexpand.runs.fleet import Course, Fleet, simulate

if TYPE_CHECKING:
    from rayexpand.runs.config import EstimateConfig

GPU, PROCESS = "GPU", "CPU process"  # what hours are of
COURSES, LEAST_COURSES = 20, 5  # simulated runs; of more tasks than MANY_TASKS fewer: they differ less
MANY_TASKS = 4_000
STARTS = {GPU: (120.0, 60.0), PROCESS: (0.0, 5.0)}  # assumed: seconds of a node's start, and of loading
SPREAD = 0.1  # assumed: seconds of a task are within 10 % of the mean, evenly
SHARD_S = 0.2  # of a shard beside its sampler calls: 96.5 % of a bare sampler's rate at 5.1 s a shard (docs/figures.md)


@dataclass(frozen=True, slots=True)
class Hours:
    """What follows from a throughput. Hours are those of GPUs or CPU processes, means over simulated runs."""

    images_per_second: float | None = None  # of one GPU, or of one CPU process
    gpu_hours: float | None = None  # that end in what was wanted
    expected_lost_hours: float | None = None  # work that is done again after a loss
    waiting_hours: float | None = None  # paid without work: boot, loading, the end
    wall_hours: float | None = None
    wall_hours_95: float | None = None  # 95 % of simulated runs end before
    cost_usd: float | None = None


def hours_of(asked: EstimateConfig, unit: str, seconds_N: np.ndarray, *, width: int = 1, saved_s: float = math.inf,
             task_s: float = SHARD_S) -> Hours:
    """Of tasks that any GPU (or `width` of them) may take; `task_s`: seconds of each beside its work."""
    fleet = fleet_of(asked, unit, width, saved_s, task_s)
    courses = courses_of(fleet, seconds_N)
    wall, paid, lost, waited = (float(np.mean([one[place] for one in courses])) for place in range(4))
    late = float(np.quantile([one.wall_hours for one in courses], 0.95, method="higher"))
    return Hours(None, float(seconds_N.sum()) * width / 3600, width * lost, width * waited, wall, late,
                 cost(asked, unit, width * paid, wall))


def courses_of(fleet: Fleet, seconds_N: np.ndarray) -> list[Course]:
    """Simulated runs."""
    many = min(COURSES, max(LEAST_COURSES, COURSES * MANY_TASKS // len(seconds_N)))
    return [simulate(seconds_N, fleet, repetition=number) for number in range(many if fleet.loss_rate else 1)]


def spread(total_s: float, tasks: int) -> np.ndarray:
    """Seconds of tasks that are about equal."""
    spread_N = generator(row_key(0, "fleet", "", 0, 0, "seconds")).uniform(1 - SPREAD, 1 + SPREAD, tasks)
    return total_s * spread_N / spread_N.sum()


def fleet_of(asked: EstimateConfig, unit: str, width: int = 1, saved_s: float = math.inf,
             task_s: float = SHARD_S) -> Fleet:
    """The fleet as tasks see it: of `width` GPUs at once, spread over as many nodes as they need."""
    start, load = (given if given is not None else one for given, one in zip((asked.node_start_s, asked.load_s),
                                                                             STARTS[unit], strict=True))
    if width == 1:
        return Fleet(asked.gpus, asked.gpus_per_node, asked.preemptions_per_gpu_hour, start, load, task_s,
                     asked.idle_s, saved_s=saved_s)
    rate = asked.preemptions_per_gpu_hour * -(-width // asked.gpus_per_node)
    return Fleet(max(1, asked.gpus // width), 1, rate, start, load, task_s, asked.idle_s, saved_s=saved_s)


def cost(asked: EstimateConfig, unit: str, paid_hours: float, wall_hours: float) -> float | None:
    """USD of hours that are paid, with the head over the wall time; None without a price."""
    price = price_of(asked, unit)
    return None if price is None else paid_hours * price + wall_hours * (asked.head_hour_usd or 0.0)


def price_of(asked: EstimateConfig, unit: str) -> float | None:
    """USD an hour."""
    return asked.gpu_hour_usd if unit == GPU or asked.cpu_hour_usd is None else asked.cpu_hour_usd
