"""Dealing and planning of 13 million rows: 1,281,167 seeds of 1,000 classes, ten copies each, dealt by losses.

    python -m tests.benchmarks.dealing               one run
    python -m tests.benchmarks.dealing --rounds 3    the same rows by a loop: its decisions, and the plans of its rounds

Prints one JSON object: CPU seconds of reading scores, dealing, deciding, planning and writing the plan of each round;
those in which `verify` repeats the dealing, or verifies the loop; in which the rounds are opened as one run with the
seed of each row, and the numbers of their page are counted; and the peak memory of this process.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex
from rayexpand.data import seeds
from rayexpand.runs.allocation import allocated
from rayexpand.runs.config import parse
from rayexpand.runs.joined import open_samples
from rayexpand.runs.plan import make_plan, plan_digest, write_plan
from rayexpand.runs.run import Run
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import NAMED, parquet_bytes
from rayexpand.studies.rounds.config import parse_loop
from rayexpand.studies.rounds.learning import file_sha256
from rayexpand.studies.rounds.loop import Learned, Loop, drive_loop, open_loop
from rayexpand.studies.rounds.summary import loop_summary
from rayexpand.studies.rounds.verify import verify_loop

SEEDS, CLASSES = 1_281_167, 1000
RUN = {"name": "r", "method": {"name": "classical", "ratio": 10}}
LIMITS = {"floor": 0.2, "cap": 60}


def listed() -> SeedIndex:
    """The index of a dataset of ImageNet's size."""
    label = (np.arange(SEEDS) // 1282).astype(np.int32)
    zero = np.zeros(SEEDS, np.int32)
    ids = pa.array([f"n{i // 1282:08d}/n{i // 1282:08d}_{i}.JPEG" for i in range(SEEDS)])
    table = pa.table({"seed_id": ids, "label": label, "file": zero, "member": ids, "group": zero - 1,
                      "offset": zero - 1, "fault": pa.array([""] * SEEDS)}, schema=SEED_INDEX)
    table = table.replace_schema_metadata({b"files": b'["nowhere"]', b"layout": b"imagefolder"})
    return SeedIndex(table, ClassTable.of([f"c{i}" for i in range(CLASSES)], counts=np.bincount(label).tolist()))


def one_go(index: SeedIndex, folder: Path) -> dict[str, object]:
    """The plan of one run, dealt by the losses in `folder`."""
    files = LocalFiles(folder)
    files.probe()
    config = parse({**RUN, "data": {"source": "imagefolder", "path": str(folder)}, "allocate": {
        "rule": "loss", "scores": str(folder), **LIMITS}})
    started = time.process_time()
    plan = make_plan(index, config)
    write_plan(plan, files, f"plan/{plan_digest(plan)[:8]}")
    spent, started, rng = time.process_time() - started, time.process_time(), PlanRng(config.seed, config.method.name)
    again = allocated(config.allocate, index, config.method.copies(index, rng), plan.weight, rng)
    assert (again == plan.copies).all()
    return {"rows": plan.planned, "cpu_seconds": round(spent, 2),
            "repeat_cpu_seconds": round(time.process_time() - started, 2)}


def in_rounds(index: SeedIndex, folder: Path, rounds: int) -> dict[str, object]:
    """The decisions and plans of a loop of these rounds, and its verification; no sample is made."""
    config = parse_loop({"run": {**RUN, "out": str(folder), "data": {"source": "imagefolder", "path": str(folder)}},
                         "rounds": {"count": rounds, "rule": "loss", **LIMITS}})
    spent: list[float] = []

    def between(loop: Loop, chain: object, earlier: object, seen: object) -> Learned:
        name = f"scores/{len(spent) + 1:04d}.parquet"
        table = pq.read_table(folder / "scores.parquet")
        loop.files.publish(name, parquet_bytes(table, {NAMED: name.encode()}, 1 << 16))
        return Learned(table, {name: file_sha256(loop.files, name)})

    with mock.patch.object(seeds, "surveyed", return_value=(index, {})):
        loop, started = open_loop(config), time.process_time()

        def planned(run: Run) -> None:
            nonlocal started
            spent.append(round(time.process_time() - started, 2))
            started = time.process_time()

        drive_loop(loop, between, planned)
    peak, started = peak_mb(), time.process_time()
    found = verify_loop(config.folder)
    assert found.problems == []
    verified, started = round(time.process_time() - started, 2), time.process_time()
    run = open_samples(config.folder)
    assert len(run.plan.position(np.arange(found.totals.planned))) == SEEDS * 10
    opened, started = round(time.process_time() - started, 2), time.process_time()
    assert len(loop_summary(config.folder)["accuracy"]) == rounds - 1
    return {"rows": found.totals.planned, "rounds": rounds, "cpu_seconds": spent, "decided_peak_mb": peak,
            "verify_cpu_seconds": verified, "open_cpu_seconds": opened,
            "page_cpu_seconds": round(time.process_time() - started, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    rounds, index = parser.parse_args().rounds, listed()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "c0").mkdir()
        Path(folder, "c0/0.JPEG").touch()
        p_label = np.random.Generator(np.random.Philox(key=1)).random(SEEDS)
        pq.write_table(pa.table({"seed_id": index.table["seed_id"], "p_label": p_label, "margin": 2 * p_label - 1,
                                 "loss": -np.log(np.maximum(p_label, 1e-6)), "fold": np.zeros(SEEDS, np.int32)}),
                       Path(folder, "scores.parquet"))
        found = one_go(index, Path(folder)) if rounds == 1 else in_rounds(index, Path(folder), rounds)
    print(json.dumps({**found, "peak_mb": peak_mb()}))


def peak_mb() -> int:
    """The most memory that this process has had."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024  # type: ignore[index]


if __name__ == "__main__":
    main()
