"""What the samples of a run cost, where it is part of a study, a sweep or a loop."""

from __future__ import annotations

from rayexpand.contract.schema import SeedIndex
from rayexpand.runs.amounts import unit_of, work_of
from rayexpand.runs.config import RunConfig
from rayexpand.runs.estimate import first_draws
from rayexpand.runs.run import measured
from rayexpand.runs.stages import PlanStage, shares_of
from rayexpand.runs.work import peak_tflops


def run_stage(name: str, made: RunConfig, index: SeedIndex, planned: int, times: int, share: float,
              where: str) -> PlanStage:
    """Of `times` runs of so many images, of which the share is still to be made. `where`: its section `estimate`."""
    work = work_of(made, seeds=len(index), planned=planned, measured=measured(made),
                   draws=first_draws(made, index, planned))
    what = f"{round(share * planned):,} images" + (f" in {times} runs" if times > 1 else "")
    hours = [share * planned / rate / 3600 for rate in sorted(work.rates, reverse=True)]
    source = work.notes["gpu_hours"] if hours else (
        f"no rate is known: run a part of it, `rayexpand bench` a file of its own, or set {where}.images_per_second")
    if work.petaflop is not None and len(hours) > 1:
        _, source = shares_of(1000 * share * work.petaflop, made.estimate, peak_tflops(made), "peak_share")
        source += f"; {work.notes['petaflop']}"
    return PlanStage(name, what, unit_of(made), (hours[0], hours[-1]) if hours else None, source,
                     tasks=max(1, round(work.shards * share / times)), times=times,
                     bytes=None if work.bytes is None else round(work.bytes * share),
                     petaflop=None if work.petaflop is None else work.petaflop * share)
