"""Scores of 1,281,167 seeds of 1,000 classes by five folds, without the time of training: a training here answers at
random, at once, and writes results and predictions as a real one does.

    python -m tests.benchmarks.scoring

Prints one JSON object: CPU seconds of cutting folds, of everything around the trainings (training sets, lists of ids,
gathered scores), of the file, and of dealing and planning by it; the peak memory of this process.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.schema import SeedIndex
from rayexpand.data.folds import folds_of
from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.scores import Scoring
from rayexpand.loader.config import TrainingConfig
from rayexpand.runs.allocation import FILE
from rayexpand.runs.config import ClusterConfig, parse
from rayexpand.runs.plan import make_plan
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import NAMED, parquet_bytes, replace_json
from rayexpand.studies.cross_fit import cross_fit, scores_bytes
from rayexpand.studies.parts import Trial, TrialFolder
from tests.benchmarks.dealing import CLASSES, SEEDS, listed

FOLDS = 5


def answer_at_once(index: SeedIndex, folder: TrialFolder, trials: Sequence[Trial]) -> None:
    for number, trial in enumerate(trials):
        asked = pa.array(Path(trial.test["ids"]).read_text().splitlines())
        label = index.labels[pc.index_in(asked, index.table["seed_id"].combine_chunks()).to_numpy()]
        draw = np.random.Generator(np.random.Philox(key=number))
        p_label, other = draw.random(len(label)), draw.random(len(label))
        name = f"predictions/{trial.name}.parquet"
        table = pa.table({"item": np.arange(len(label)), "label": label, "predicted": label, "confidence": p_label,
                          "p_label": p_label, "margin": p_label - other, "entropy": 2 * other,
                          "right": draw.integers(0, 91, len(label), dtype=np.int32)})
        folder.files.replace(name, parquet_bytes(table, {NAMED: name.encode()}))
        replace_json(folder.files, f"results/{trial.name}.json", {"history": [{}] * 90})


def main() -> None:
    index, spent = listed(), dict[str, float]()
    answered = 0.0

    def train(folder: TrialFolder, trials: Sequence[Trial]) -> list[str]:
        nonlocal answered
        started = time.process_time()
        answer_at_once(index, folder, trials)
        answered = time.process_time() - started
        return []

    with tempfile.TemporaryDirectory() as scratch:
        data, files = DataConfig(source="imagefolder", path=scratch), LocalFiles(scratch)
        files.probe()
        place = TrialFolder("folds", files, TrainingConfig(), ClusterConfig(), CLASSES)
        started = time.process_time()
        fold_N = folds_of(index, data, FOLDS, 0)
        spent["folds"] = time.process_time() - started
        assert np.ptp(np.bincount(fold_N)) <= 1
        started = time.process_time()
        scoring = Scoring(folds=FOLDS, recipe={"epochs": 90})
        table = cross_fit(place, "scores", scoring, (index, data), [], train, seed=0)
        spent["around trainings"] = time.process_time() - started - answered
        assert len(table) == SEEDS
        started = time.process_time()
        files.replace(FILE, scores_bytes(table))
        spent["file"] = time.process_time() - started
        started = time.process_time()
        plan = make_plan(index, parse({"name": "r", "data": data.model_dump(), "method": {
            "name": "classical", "ratio": 10}, "allocate": {"rule": "loss", "scores": f"{scratch}/{FILE}", "floor": 0.2,
                                                            "cap": 60}}))
        spent["dealing and planning"] = time.process_time() - started
        size = Path(scratch, FILE).stat().st_size
    peak_kb = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    print(json.dumps({"seeds": SEEDS, "folds": FOLDS, "rows": plan.planned, "file_mb": round(size / 1e6),
                      "cpu_seconds": {name: round(value, 1) for name, value in spent.items()},
                      "peak_mb": round(peak_kb / 1024)}))


if __name__ == "__main__":
    main()
