"""The exact search of `rayexpand audit` against sorting all similarities: the same ids, seconds, memory.

    python -m tests.benchmarks.search                                        100,000 queries, 20,000 references, 512
    python -m tests.benchmarks.search --queries 2000 --device cuda           on an accelerator, in float16
    python -m tests.benchmarks.search --faiss                                a flat faiss index beside it

Every hundredth reference is an exact copy of another, and every tenth query a reference with noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from rayexpand.contract.rng import generator, row_key
from rayexpand.evaluation.search import References, unit_rows

K, ROWS = 5, 2000  # wanted of each query; queries sorted at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("queries", 100_000), ("references", 20_000), ("width", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--faiss", action="store_true")
    said = parser.parse_args()
    torch.set_num_threads(said.threads)
    q_ND, r_MD = _rows(said)
    before = _forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    found = References(r_MD, said.device).nearest(q_ND, K)[1]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    flop = 2 * len(q_ND) * len(r_MD) * said.width
    print(f"{len(q_ND):,} x {len(r_MD):,} x {said.width} on {said.device}, {said.threads} threads: {wall:.1f} s, "
          f"{cpu:.1f} CPU s, {flop / cpu / 1e9:.0f} GFLOP per CPU s, peak {_peak_mb():.0f} MB, "
          f"{_peak_mb() - before:.0f} MB above the rows", flush=True)
    started = time.process_time()
    wrong = sum(int((found[start:start + ROWS] != _sorted(q_ND[start:start + ROWS], r_MD)).any(axis=1).sum())
                for start in range(0, len(q_ND), ROWS))
    print(f"a full sort takes {time.process_time() - started:.1f} CPU s; {wrong} of {len(q_ND):,} queries have other "
          "ids")
    if said.faiss:
        _faiss(q_ND, r_MD, found)


def _rows(said: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = generator(row_key(0, "benchmark", "search", 0, 0, "rows"))
    r_MD = unit_rows(rng.standard_normal((said.references, said.width), np.float32))
    r_MD[50::100] = r_MD[:len(r_MD[50::100])]
    q_ND = rng.standard_normal((said.queries, said.width), np.float32)
    near = rng.integers(0, len(r_MD), len(q_ND[::10]))
    q_ND[::10] = r_MD[near] + 0.02 * q_ND[::10]
    return unit_rows(q_ND), r_MD


def _sorted(q_ND: np.ndarray, r_MD: np.ndarray) -> np.ndarray:
    s_NM = (q_ND.astype(np.float64) @ r_MD.T.astype(np.float64)).astype(np.float32)
    return np.argsort(-s_NM, axis=1, kind="stable")[:, :K]


def _faiss(q_ND: np.ndarray, r_MD: np.ndarray, found: np.ndarray) -> None:
    import faiss

    index = faiss.IndexFlatIP(r_MD.shape[1])
    index.add(r_MD)
    started = time.process_time()
    there = index.search(q_ND, K)[1]
    print(f"faiss flat: {time.process_time() - started:.1f} CPU s, {(there != found).any(axis=1).sum()} queries have "
          "other ids or another order")


def _forget_peak() -> float:
    """Makes the memory in use the peak so far, and returns it (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_mb()


def _peak_mb() -> float:
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
