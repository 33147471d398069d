"""Dealing and planning of 13 million rows: 1,281,167 seeds of 1,000 classes, ten copies each, dealt by losses.

    python -m tests.benchmarks.dealing               one run
    python -m tests.benchmarks.dealing --rounds 3    the same rows in rounds: each begins where the one before ended

Prints one JSON object: CPU seconds of reading scores, dealing, planning and writing the plan of each round; those in
which `verify` repeats the dealing; and the peak memory of this process.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex
from rayexpand.runs.allocation import allocated
from rayexpand.runs.config import parse
from rayexpand.runs.plan import make_plan, plan_digest, write_plan
from rayexpand.storage.files import LocalFiles

SEEDS, CLASSES = 1_281_167, 1000


def listed() -> SeedIndex:
    """The index of a dataset of ImageNet's size."""
    label = (np.arange(SEEDS) // 1282).astype(np.int32)
    zero = np.zeros(SEEDS, np.int32)
    ids = pa.array([f"n{i // 1282:08d}/n{i // 1282:08d}_{i}.JPEG" for i in range(SEEDS)])
    table = pa.table({"seed_id": ids, "label": label, "file": zero, "member": ids, "group": zero - 1,
                      "offset": zero - 1, "fault": pa.array([""] * SEEDS)}, schema=SEED_INDEX)
    table = table.replace_schema_metadata({b"files": b'["nowhere"]', b"layout": b"imagefolder"})
    return SeedIndex(table, ClassTable.of([f"c{i}" for i in range(CLASSES)], counts=np.bincount(label).tolist()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    rounds = parser.parse_args().rounds
    index, first, spent = listed(), np.zeros(SEEDS, np.uint16), []
    with tempfile.TemporaryDirectory() as folder:
        p_label = np.random.Generator(np.random.Philox(key=1)).random(SEEDS)
        scores = pa.table({"seed_id": index.table["seed_id"], "p_label": p_label})
        pq.write_table(scores, Path(folder, "scores.parquet"))
        files = LocalFiles(folder)
        files.probe()
        for number in range(rounds):
            config = parse({"name": "r", "data": {"source": "imagefolder", "path": folder}, "method": {
                "name": "classical", "ratio": 10 / rounds}, "allocate": {
                    "rule": "loss", "scores": folder, "floor": 0.2, "cap": 60}})
            started = time.process_time()
            plan = make_plan(index, config, first)
            write_plan(plan, files, f"plan/{plan_digest(plan)[:8]}-{number}")
            spent.append(round(time.process_time() - started, 2))
            first = (first + plan.copies).astype(np.uint16)
        started, rng = time.process_time(), PlanRng(config.seed, config.method.name)
        assert plan.weight is not None
        again = allocated(config.allocate, index, config.method.copies(index, rng), plan.weight, rng)
        repeated = time.process_time() - started
        assert (again == plan.copies).all()
    peak_kb = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    print(json.dumps({"rows": int(first.sum(dtype=np.int64)), "rounds": rounds, "cpu_seconds": spent,
                      "repeat_cpu_seconds": round(repeated, 2), "peak_mb": round(peak_kb / 1024)}))


if __name__ == "__main__":
    main()
