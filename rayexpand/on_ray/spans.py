"""Spans of the seed index over a pool of actors: what fit computes of every image.

    driver    spans of rows -> map_batches(a SpanActor) -> rows of results, in any order

Spans follow the order in which images are stored, so that a row group is read once.
"""

from __future__ import annotations

import logging
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from rayexpand.contract.errors import EnvironmentFault, packed, unpacked
from rayexpand.contract.schema import SeedIndex
from rayexpand.fitting.config import FitConfig
from rayexpand.models.folders import ModelFiles
from rayexpand.on_ray.pool import choose_pool, ending, enter
from rayexpand.on_ray.stage import open_model_server

SPAN_IMAGES = 2048  # images of one task; long beside the 10-30 ms a task costs

log = logging.getLogger(__name__)


def over_spans(actor: type[SpanActor], arguments: dict[str, Any], config: FitConfig, models: dict[str, ModelFiles],
               index: SeedIndex, batch: int, costs: dict[str, Any],
               spans: list[range] | None = None) -> Iterator[dict[str, Any]]:
    """Rows that a pool of `actor` makes of all spans of `index`, whole calls of `batch` images each (or of `spans`), in
    any order.

    A span that its node spoils is made once more, by new actors. Raises EnvironmentFault for one that is spoilt twice,
    and for more of them than there are actors; what an actor refuses (a model that cannot be used) as it is.
    """
    pool = choose_pool(config.cluster.at("fit"), config.device)
    spans = spans or _spans(len(index), batch, pool.actors)
    costs |= {"cpu_seconds": 0.0, "gpu_seconds": 0.0, "process_seconds": 0.0, "actors": min(pool.actors, len(spans))}
    spoilt: list[range] = []
    with ending(open_model_server(models, shared=index)) as server:
        for again in (False, True):
            wanted = [{"first": one.start, "stop": one.stop} for one in (spoilt if again else spans)]
            for row in pool.map(wanted, actor, {**arguments, "server": server}).iter_rows():
                costs["device"] = row["device"] or costs.get("device", "")
                costs["cpu_seconds"] += row["cpu_seconds"]
                costs["process_seconds"] += row["seconds"]
                costs["gpu_seconds"] += row["seconds"] * pool.gpus * (row["device"] == "cuda")
                if not row["fault"]:
                    yield row
                    continue
                fault = unpacked(row["fault"])
                if not isinstance(fault, EnvironmentFault) or again or len(spoilt) >= pool.actors:
                    raise fault
                log.warning("images %d to %d could not be worked on (%s); they are tried once more", row["span_start"],
                            row["span_stop"] - 1, fault)
                spoilt.append(range(row["span_start"], row["span_stop"]))
            if not spoilt:
                return


def _spans(count: int, batch: int, actors: int) -> list[range]:
    """Ranges of whole calls; small datasets are cut finer, so that every actor has a share."""
    share = -(-count // (batch * actors))
    size = batch * max(1, min(SPAN_IMAGES // batch, share))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


class SpanActor(ABC):
    """One process of a pool. Loads its model at the first span, so that a bad start is a fault, not a crash."""

    nothing: ClassVar[dict[str, Any]]  # what `_made` gives, empty: all rows of a Ray dataset have the same columns

    def __init__(self, server: Any, cwd: str) -> None:
        enter(cwd)
        self._server, self._device = server, ""

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (first,), (stop,) = batch["first"], batch["stop"]
        wall, cpu = time.perf_counter(), time.process_time()
        row = {**self.nothing, "fault": "", "span_start": int(first), "span_stop": int(stop)}
        try:
            row |= self._made(range(int(first), int(stop)))
        except Exception as error:
            row["fault"] = packed(error, f"on {socket.gethostname()}")
        row |= {"device": self._device, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {name: [value] for name, value in row.items()}

    @abstractmethod
    def _made(self, rows: range) -> dict[str, Any]:
        """What is made of a span. Sets `_device`."""
