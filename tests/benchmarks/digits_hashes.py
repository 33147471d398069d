"""One hash for the samples of every digits job: the same before and after a change that promises to change no sample.

    python -m tests.benchmarks.digits_hashes            the package here
    python -m tests.benchmarks.digits_hashes --tree T   the package in another checkout T, with its own job files

A hash covers the sorted (sample_id, sample_sha256) of all samples, kept or not. Only the command line is used, so any
version can be asked.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
FITS = {"expand-distdiff": "expand-distdiff", "expand-diffmix": "fit-diffmix", "expand-realfake": "fit-realfake",
        "expand-practice": "fit-practice"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT)
    tree = parser.parse_args().tree.absolute()
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted((tree / "jobs/digits").glob("expand-*.yaml")):
            if file.stem in FITS:
                _run(tree, folder, "fit", tree / f"jobs/digits/{FITS[file.stem]}.yaml")
            _run(tree, folder, "expand", file, "--set", f"out={folder}/{file.stem}")
            print(f"{file.stem:24} {_hash(Path(folder, file.stem))}", flush=True)


def _run(tree: Path, cwd: str, verb: str, *arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", "rayexpand", verb, *map(str, arguments), "--no-ray"], cwd=cwd,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{verb} {arguments}: exit code {done.returncode}\n{done.stderr}")


def _hash(out: Path) -> str:
    rows = [(row["sample_id"], row["sample_sha256"]) for name in ("data", "rejected")
            for file in out.rglob(f"{name}/*.parquet")
            for row in pq.read_table(file, columns=["sample_id", "sample_sha256"]).to_pylist()]
    return f"{len(rows):5} samples  {hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()[:32]}"


if __name__ == "__main__":
    main()
