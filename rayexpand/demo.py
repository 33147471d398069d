"""The demo: expand two real digits per class, train a classifier with and without, and say what the gain means.

Three subsets of two digits per class; five copies each by img2img on the embedded default; four training arms with
the same number of optimiser steps, tested on 500 digits that neither the prior nor any arm has seen. Two controls
stand beside the table: the guide's own zero-shot accuracy, and an expansion with an empty prompt.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rayexpand import run as runs
from rayexpand.config import RunConfig, parse
from rayexpand.core.classifier import Recipe, accuracy, train
from rayexpand.guides import load_guide
from rayexpand.pixels import decode
from rayexpand.priors import digits
from rayexpand.schema import Tools
from rayexpand.seeds import SeedReader, digits_split

PER_CLASS, RATIO, SUBSETS = 2, 5, 3
ARMS = ("original", "original + RandAugment", "expanded", "expanded + RandAugment")
CONTROL = "empty-prompt expansion"
NOTE = ("The gain shows that knowledge of captioned digits in the generator reaches a classifier through the samples; "
        "it does not show data made from nothing: the generator saw 1,000 other captioned digits, its guide alone "
        "reads the test digits as well or better, and the gain fades at about 10 real digits per class.")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DemoResult:
    accuracies: dict[str, list[float]]  # arm -> one per subset
    guide_zero_shot: float
    gain: float  # expanded - original, mean over subsets
    gain_se: float  # standard error of the paired difference
    images_per_second: float
    seconds: float
    folders: list[str]  # runs of the expanded arm
    measured: dict[str, float] = field(default_factory=dict)  # of the embedded default, when it was trained

    def summary(self) -> dict[str, Any]:
        arms = {name: {"accuracies": values, "mean": float(np.mean(values)), "se": standard_error(values)}
                for name, values in self.accuracies.items()}
        control = arms.pop(CONTROL)
        return {"arms": arms, "controls": {"guide zero-shot": self.guide_zero_shot, CONTROL: control["mean"]},
                "control_arms": {CONTROL: control}, "gain": self.gain, "gain_se": self.gain_se, "note": NOTE,
                "images_per_second": self.images_per_second, "seconds": self.seconds, "prior": self.measured,
                "runs": self.folders}


def standard_error(values: list[float]) -> float:
    """Standard error of the mean (sample standard deviation over sqrt(n))."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def demo(out: Path | str, progress: Progress) -> DemoResult:
    """Runs the demo below `out`; what is there already is used again, not made again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # accuracies depend on it, and on small models a second thread only spins
    try:
        return _demo(out, progress)
    finally:
        torch.set_num_threads(threads)


def _demo(out: Path | str, progress: Progress) -> DemoResult:
    started = time.perf_counter()
    cached = digits.ensure(progress)
    test_images, test_labels = digits_split()["test"]
    accuracies: dict[str, list[float]] = {name: [] for name in (*ARMS, CONTROL)}
    folders, made, making, tools = [], 0, 0.0, None
    for subset in range(SUBSETS):
        expanded = _config(out, subset, empty=False)
        control = _config(out, subset, empty=True)
        for config in (expanded, control):
            progress(f"expanding {config.name}", 0, PER_CLASS * 10 * RATIO)
            before = time.perf_counter()
            tools, rows = _expand(config, tools, progress)
            made, making = made + rows, making + (time.perf_counter() - before if rows else 0.0)
        real = _seeds(expanded)
        synthetic, empty = _with_samples(expanded, real), _with_samples(control, real)
        plans = {ARMS[0]: (real, False), ARMS[1]: (real, True), ARMS[2]: (synthetic, False), ARMS[3]: (synthetic, True),
                 CONTROL: (empty, False)}
        for done, (name, ((images, labels), randaugment)) in enumerate(plans.items()):
            progress(f"training on subset {subset + 1} of {SUBSETS}: {name}", done, len(plans))
            model = train(images, labels, 10, subset, Recipe(randaugment=randaugment))
            accuracies[name].append(accuracy(model, test_images, test_labels))
        folders.append(expanded.folder)
    guide = load_guide("digits", None, digits.CLASS_NAMES, device="cpu")
    zero_shot = float((np.asarray(guide.zero_shot(test_images)) == test_labels).mean())
    differences = [a - b for a, b in zip(accuracies[ARMS[2]], accuracies[ARMS[0]], strict=True)]
    measured = json.loads((cached / "measured.json").read_text())
    return DemoResult(accuracies, zero_shot, float(np.mean(differences)), standard_error(differences),
                      made / making if making else 0.0, time.perf_counter() - started, folders, measured)


def _config(out: Path | str, subset: int, empty: bool) -> RunConfig:
    # The empty prompt keeps the label only at moderate strength: at 0.9 nothing of the digit is left to label.
    method = {"name": "img2img", "ratio": RATIO, "steps": 10, "guidance_scale": 2.0,
              "prompt": "" if empty else "a photo of a {name}", "strength": 0.5 if empty else 0.9}
    return parse({"name": f"{'control' if empty else 'expanded'}-{subset}", "out": str(out), "method": method,
                  "data": {"source": "digits", "per_class": PER_CLASS, "subset_seed": subset},
                  "sampler": {"batch": 50, "shard_images": 50}})


def _expand(config: RunConfig, tools: Tools | None, progress: Progress) -> tuple[Tools | None, int]:
    """Expands one run with models already loaded, if any; returns the models and how many rows were made."""
    run = runs.prepare(config)
    jobs = runs.pending_jobs(run)
    if not jobs:
        return tools, 0
    done = 0

    def on_rows(rows: int) -> None:
        nonlocal done
        done += rows
        progress(f"expanding {config.name}", done, run.plan.planned)

    expander = runs.start(run, tools, on_rows)
    try:
        runs.drive(run, runs.in_process(expander), lambda: runs.pending_jobs(run))
    finally:
        expander.close()
    return expander.tools, done


def _seeds(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    plan = runs.open_run(config.folder).plan
    found = SeedReader(plan.index, config.data).read(range(len(plan.index)))
    limits = {"min_side": config.data.min_side, "max_pixels": config.data.max_pixels}
    images = np.stack([decode(seed.image, **limits)[0] for seed in found])  # type: ignore[union-attr]
    return images, plan.index.labels


def _with_samples(config: RunConfig, real: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Real images and labels followed by the committed samples of a run."""
    run = runs.open_run(config.folder)
    images, labels = [real[0]], [real[1]]
    for receipt in run.store.receipts():
        for row in run.store.data(receipt, ["image", "label"]).to_pylist():
            with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
                images.append(np.asarray(image)[None])
            labels.append(np.array([row["label"]]))
    return np.concatenate(images), np.concatenate(labels)
