"""How fast a configuration is on this machine, and how much of the bare sampler's speed the engine keeps.

The first shards of the real plan run twice in turn: the method's own `expand` on batches that are ready in memory (the
bare loop, whose clock stands still while a batch is made ready), and the whole engine (read, decode, sample, encode,
commit) into a temporary folder. Figures are medians of the pairs, so that a machine whose speed drifts is compared with
itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Receipt
from rayexpand.models.folders import EMBEDDED
from rayexpand.models.prior import resolve
from rayexpand.runs import run as runs
from rayexpand.runs.config import MODELS, RunConfig
from rayexpand.runs.expander import Expander

PAIRS = 3


@dataclass(frozen=True, slots=True)
class Bench:
    """`efficiency` is engine rate over bare rate; seconds are of the engine, by phase, for `rows` rows."""

    rows: int
    images_per_second: float
    bare_images_per_second: float
    efficiency: float
    bytes_per_image: float
    gflop_per_image: float | None  # counted matrix products and convolutions; None for methods without a model
    seconds: dict[str, float]
    stack: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> tuple[tuple[str, str], list[tuple[str, str]]]:
        gflop = "none counted" if self.gflop_per_image is None else f"{self.gflop_per_image:,.3g} GFLOP"
        return ("bench", f"{self.rows:,} rows"), [
            ("engine", f"{self.images_per_second:,.1f} images/s"),
            ("bare sampler loop", f"{self.bare_images_per_second:,.1f} images/s"),
            ("efficiency", f"{100 * self.efficiency:.1f} %"), ("arithmetic per image", gflop),
            ("bytes per image", f"{self.bytes_per_image:,.0f}"),
            *((f"seconds: {phase}", f"{seconds:,.3f}") for phase, seconds in self.seconds.items())]


def bench(config: RunConfig, rows: int = 0) -> Bench:
    """Measures `config` on its first shards, at least `rows` rows. Writes <out>/<name>.bench.json for `plan` to use.

    Raises what `run.prepare` raises, and UsageError when every row of those shards is refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = runs.prepare(config.model_copy(update={"out": folder}))
        shards, counted = [], 0
        for shard in range(run.plan.n_shards):
            shards.append(shard)
            counted += run.plan.shard_rows(shard)
            if counted >= rows:
                break
        warm = runs.start(run)
        warm(shards[0])
        pairs = [_pair(config, folder, number, shards, warm) for number in range(PAIRS)]
        gflop = _gflop(warm, shards[0])
        warm.close()
    _count_networks(config)
    receipts = pairs[-1][2]
    kept = sum(receipt.kept for receipt in receipts)
    if not kept:
        raise UsageError(f"{config.name}: all {counted} rows of the first {len(shards)} shard(s) were refused, so "
                         "there is nothing to measure. Run `expand` and look at its report.")
    found = Bench(counted, median(p[1] for p in pairs), median(p[0] for p in pairs), median(p[1] / p[0] for p in pairs),
                  pairs[-1][3] / kept, gflop, _phases(receipts), warm.stack)
    path = runs.bench_file(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found.to_json(), indent=1))
    return found


def _pair(config: RunConfig, folder: str, number: int, shards: list[int],
          warm: Expander) -> tuple[float, float, list[Receipt], int]:
    """(bare images/s, engine images/s, receipts, bytes of their data files) of one alternation."""
    real, sampling = 0, 0.0
    for batch in (batch for shard in shards for batch in warm.batches(shard)):
        started = time.perf_counter()
        config.method.expand(batch, warm.loaded())
        sampling += time.perf_counter() - started
        real += batch.filler.count(False)
    bare = real / sampling
    run = runs.prepare(config.model_copy(update={"out": folder, "name": f"pair-{number}"}))
    expander = runs.start(run, warm.loaded)
    started = time.perf_counter()
    receipts = [expander(shard) for shard in shards]
    seconds = time.perf_counter() - started
    expander.close()
    size = sum(path.stat().st_size for path in Path(folder, f"pair-{number}", "data").iterdir())
    return bare, sum(receipt.planned for receipt in receipts) / seconds, receipts, size


def _gflop(expander: Expander, shard: int) -> float | None:
    if not expander.config.needs & MODELS:
        return None
    from torch.utils.flop_counter import FlopCounterMode

    batch = next(expander.batches(shard))
    with FlopCounterMode(display=False) as counter:
        expander.config.method.expand(batch, expander.loaded())
    return counter.get_total_flops() / len(batch) / 1e9


def _count_networks(config: RunConfig) -> None:
    """Leaves what the networks of the generator cost in the cache of this machine, where `plan` finds it."""
    if "prior" in config.needs and config.prior.weights not in EMBEDDED and (
            getattr(config.method, "generator", "sd") != "mae"):
        from rayexpand.models.flops import count_once

        count_once(resolve(config.prior.weights))


def _phases(receipts: list[Receipt]) -> dict[str, float]:
    total: dict[str, float] = {}
    for receipt in receipts:
        for phase, seconds in receipt.seconds.items():
            total[phase] = total.get(phase, 0.0) + seconds
    return {phase: round(seconds, 4) for phase, seconds in total.items()}
