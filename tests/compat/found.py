"""What a folder holds, as plain data that can be compared, read without the package that wrote it."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq


def everything(project: Path) -> dict[str, Any]:
    """All runs, trials, sweeps and artifacts below a project folder, by their names."""
    return {"runs": {str(one.parent.relative_to(project)): run(one.parent) for one in sorted(
                project.rglob("run.json"))},
            "trials": {str(one.relative_to(project)): trial(one) for one in sorted(
                project.glob("runs/study/results/*.json"))},
            "sweeps": {str(one.parent.relative_to(project)): sweep(one.parent) for one in sorted(
                project.rglob("sweep.json"))},
            "artifacts": {one.parent.name: artifact(one.parent) for one in sorted(
                project.glob("artifacts/*/artifact.json")) if not one.parent.is_symlink()}}


def run(folder: Path) -> dict[str, Any]:
    """The digests of a run, one hash of all samples of each shard, and what was refused for which reason."""
    facts = json.loads((folder / "run.json").read_text())
    kept = samples(folder)
    return {"digest": facts["run_digest"], "plan": facts["plan_digest"], "planned": facts["planned"],
            "kept": sum(map(len, kept.values())), "samples": {name: digest(one) for name, one in kept.items()},
            "refused": refused(folder)}


def samples(folder: Path) -> dict[str, dict[str, str]]:
    """Hash of every sample by id, by shard."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted((folder / "data").glob("*.parquet")):
        held = found.setdefault(file.name.split(".")[0], {})
        for row in pq.read_table(file, columns=["sample_id", "sample_sha256"]).to_pylist():
            assert row["sample_id"] not in held, f"{row['sample_id']} is there twice"
            held[row["sample_id"]] = row["sample_sha256"]
    return found


def refused(folder: Path) -> dict[str, str]:
    """Reason by sample id, of all generations."""
    rows = [row for file in sorted((folder / "rejected").glob("*.parquet"))
            for row in pq.read_table(file, columns=["sample_id", "reason"]).to_pylist()]
    return {row["sample_id"]: row["reason"] for row in rows}


def trial(file: Path) -> dict[str, Any]:
    """Everything of the result of a trial that no clock decides."""
    one = json.loads(file.read_text())
    return {name: one[name] for name in ("digest", "list_sha256", "ids_sha256", "updates", "history", "last")}


def sweep(folder: Path) -> dict[str, Any]:
    """Values and scores of the trials of a sweep, and the score of the best one on the test images."""
    trials = [json.loads(file.read_text()) for file in sorted((folder / "trials").glob("*.json"))]
    test = json.loads((folder / "test.json").read_text())
    return {"trials": {one["key"]: {name: one[name] for name in ("digest", "values", "pilots", "curve")}
                       for one in trials}, "test": {name: test[name] for name in ("key", "score")}}


def artifact(folder: Path) -> dict[str, Any]:
    """The digest of an artifact, and the content of its weights."""
    facts = json.loads((folder / "artifact.json").read_text())
    return {"digest": facts["digest"], "weights": {str(one.relative_to(folder)): sha256(one.read_bytes())
                                                   for one in sorted(folder.rglob("*.safetensors"))}}


def stack() -> dict[str, str]:
    """What the last digits of a network's numbers depend on."""
    import torch

    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability(), "cpu": _cpu()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return sha256(next((line for line in lines if line.startswith("flags")), "").encode())[:16]


def digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
