"""Ten times ImageNet-1k by every method, on 8, 64 and 512 GPUs: the tables of docs/cluster.md.

    python -m tests.benchmarks.tenfold                        # every file of jobs/imagenet, some CPU minutes
    python -m tests.benchmarks.tenfold expand-gif-mae         # one of them

What `rayexpand plan` says of the files of jobs/imagenet, with nothing measured: hours are intervals. Reads no data.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rayexpand.fitting.config import load_fit
from rayexpand.fitting.plan import plan_fit
from rayexpand.runs.amounts import human_bytes
from rayexpand.runs.config import load
from rayexpand.runs.estimate import Estimate, estimate_config
from rayexpand.runs.stages import shown

JOBS = Path(__file__).parents[2] / "jobs" / "imagenet"
FLEETS = (8, 64, 512)
TOLD = ("estimate.seeds=1281167", "estimate.classes=1000", "estimate.preemptions_per_gpu_hour=0.05")


def expand_row(file: Path) -> str:
    """A line of the first table."""
    found = {gpus: estimate_config(load(file, [*TOLD, "method.ratio=10", f"estimate.gpus={gpus}"])) for gpus in FLEETS}
    first = found[FLEETS[0]]
    tflop = "unknown" if first.petaflop is None else f"{1000 * first.petaflop / first.images:.3g}"
    sizes = list(dict.fromkeys(f"{one.best_shard_images:,}" for one in found.values()))
    return _line([f"`{file.stem}`", tflop, _ends(first, "gpu_hours"), human_bytes(first.bytes),
                  *(_ends(one, "wall_hours") for one in found.values()), " / ".join(sizes)])


def fit_row(file: Path) -> str:
    """A line of the second table."""
    found = {gpus: plan_fit(load_fit(file, [*TOLD, f"estimate.gpus={gpus}"])) for gpus in FLEETS}
    first = found[FLEETS[0]]
    return _line([f"`{file.stem}`", shown(first.total("gpu_hours")), human_bytes(first.bytes),
                  *(shown(one.total("wall_hours")) for one in found.values()), ", ".join(first.unknown) or "none"])


def expand_files() -> list[Path]:
    return sorted(JOBS.glob("expand-*.yaml"))


def fit_files() -> list[Path]:
    return sorted(JOBS.glob("fit-*.yaml"))


def _ends(found: Estimate, field: str) -> str:
    values = [getattr(one, field) for one in found.interval or (found,)]
    return "unknown" if None in values else shown(sorted(values))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="files of jobs/imagenet without .yaml; none: all")
    names = parser.parse_args().names
    walls = [f"wall hours, {gpus} GPUs" for gpus in FLEETS]
    for files, row, head in (
            (expand_files(), expand_row, ["file", "TFLOP an image", "GPU hours", "output", *walls, "shard, images"]),
            (fit_files(), fit_row, ["file", "GPU hours", "output", *walls, "unknown"])):
        if chosen := [file for file in files if not names or file.stem in names]:
            print(_line(head), _line(["---"] * len(head)), sep="\n")
            for file in chosen:
                print(row(file), flush=True)


if __name__ == "__main__":
    main()
