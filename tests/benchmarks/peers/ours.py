"""rayexpand by its command line, in one process and on a Ray of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import yaml

from tests.benchmarks.peers.task import Task


def write_job(task: Task, out: Path) -> Path:
    job = out.parent / "job.yaml"
    job.write_text(yaml.safe_dump({
        "name": "run", "out": str(out), "data": {"source": "imagefolder", "path": task.seeds},
        "prior": {"weights": task.weights}, "cluster": {"actors": task.processes},
        "method": {"name": "img2img", "ratio": task.copies, "prompt": "a photo of a {name}", "steps": task.steps,
                   "strength": task.strength, "guidance_scale": task.guidance},
        "sampler": {"batch": task.batch, "shard_images": task.batch}}))
    return job


def expand(task: Task, out: Path, *options: str) -> None:
    """Raises SystemExit with rayexpand's exit code."""
    from rayexpand.cli.main import main

    sys.argv = ["rayexpand", "expand", str(write_job(task, out)), *options, "--json"]
    main()


def in_process(task: Task, out: Path) -> None:
    expand(task, out, "--no-ray")


def on_ray(task: Task, out: Path) -> None:
    os.environ["RAY_AUTH_MODE"] = "token"
    expand(task, out)
