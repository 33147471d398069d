"""rayexpand beside its peers: the same seeds, weights, steps and copies; undisturbed, and killed 20 times.

    python -m tests.benchmarks.peers                            all peers but Data-Juicer
    python -m tests.benchmarks.peers --peers batched in_process --per-class 1
    python -m tests.benchmarks.peers --data-juicer /venv/bin/python      an environment with py-data-juicer

Each peer has two cores; one that runs a single process uses one of them. The weights are the embedded default, 16
pixels, so a call takes milliseconds where real weights take seconds: what is compared is what the code around the
sampler loses and costs. See harness.py for how peers are killed and judge.py for what is counted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.counter import sitecustomize  # noqa: F401  before diffusers: it wraps the UNet
from tests.benchmarks.peers.harness import ROOT, Bench, Peer, draw_kills
from tests.benchmarks.peers.judge import judge
from tests.benchmarks.peers.table import PEERS
from tests.benchmarks.peers.task import Task, write_seeds

IMPORTED = ("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img", "pyarrow.dataset", "transformers",
            "rayexpand.api.verbs", "rayexpand.models.latent", "rayexpand.runs.expander")


def weights() -> str:
    """The embedded default's folder; a process of its own makes it, so that this one has no threads when it forks."""
    script = "from rayexpand.models.prior import resolve; print(resolve('digits'))"
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True,
                          cwd=ROOT).stdout.splitlines()[-1]


def preload() -> None:
    import torch

    torch.set_num_threads(1)
    for name in IMPORTED:
        import_module(name)


def measure(bench: Bench, peer: Peer, kills: int, seed: int, minutes: float) -> dict[str, Any]:
    planned = peer.planned(bench.task)
    reference, calm, needed = bench.undisturbed(peer)
    row = {"peer": peer.name, "source": peer.source, "undisturbed": judge(planned, reference).row(),
           "images_per_second": round(planned.total() / calm.wall_s, 1),
           "cpu_s_per_image": round(calm.cpu_s / planned.total(), 4), "start_cpu_s": round(calm.start_cpu_s, 1),
           "load": round(os.getloadavg()[0], 1)}
    if not kills:
        return row
    found, attempts, made = bench.killed(peer, draw_kills(seed, kills, calm), minutes)
    codes = [attempt.code for attempt in attempts if attempt.code is not None]
    return {**row, "kills": sum(attempt.code is None for attempt in attempts), "ended": codes,
            "calls": round(made / needed, 2), "killed": judge(planned, found, reference).row()}


COLUMNS = ("lost", "duplicate", "torn", "orphan", "changed")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| peer | images/s | CPU s an image | kills | calls made / needed | " + " | ".join(COLUMNS) + " |",
             "|---" * (5 + len(COLUMNS)) + "|"]
    for row in rows:
        killed = [row["kills"], row["calls"], *(row["killed"][name] for name in COLUMNS)] if "killed" in row else []
        lines.append(f"| {row['peer']} | {row['images_per_second']} | {row['cpu_s_per_image']} | "
                     + " | ".join(map(str, killed or [""] * (2 + len(COLUMNS)))) + " |")
    return "\n".join(lines)


def versions(juicer: str) -> dict[str, str]:
    found = {name: version(name) for name in ("rayexpand", "ray", "diffusers", "torch", "pyarrow")}
    if juicer:
        script = "from importlib.metadata import version; print(version('py-data-juicer'))"
        found["py-data-juicer"] = subprocess.run([juicer, "-c", script], check=True, capture_output=True,
                                                 text=True).stdout.strip()
    return {"python": sys.version.split()[0], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    for name, value, text in (("per-class", 2, "seeds of each of ten classes"), ("copies", 3, "samples of a seed"),
                              ("batch", 6, "rows of a call"), ("kills", 20, "0: only undisturbed"),
                              ("seed", 1, "of the kills")):
        parser.add_argument(f"--{name}", type=int, default=value, help=text)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which a peer is killed no more")
    parser.add_argument("--data-juicer", default="", help="Python of an environment with py-data-juicer")
    parser.add_argument("--json", action="store_true", help="one JSON object, with the undisturbed runs")
    parser.add_argument("--folder", type=Path, help="keeps outputs and logs here")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # nothing of a peer stays behind
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "seeds").exists():
            write_seeds(folder / "seeds", given.per_class)
        task = Task(weights(), str(folder / "seeds"), given.copies, batch=given.batch, data_juicer=given.data_juicer)
        preload()
        bench, rows = Bench(task, folder), []
        for name in given.peers:
            if name == "juicer" and not given.data_juicer:
                print("Data-Juicer: not run; --data-juicer names an environment with it", file=sys.stderr)
                continue
            rows.append(measure(bench, PEERS[name], given.kills, given.seed, given.minutes))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    used = versions(given.data_juicer)
    print(json.dumps({"versions": used, "peers": rows}, indent=1) if given.json else
          f"{table(rows)}\n\n" + ", ".join(f"{name} {value}" for name, value in used.items()))


if __name__ == "__main__":
    main()
