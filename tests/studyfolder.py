"""Writes a study folder without training anything: study.json, trials, results and predictions that look real."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.rng import generator, row_key

STACK = {"torch": "2.15.0", "torchvision": "0.29.2", "timm": "1.0.31", "cpu": "AVX512"}
RATIOS = (1, 2, 5, 10)
EXPANSIONS = ("classical", "img2img", "text2img")


@dataclass
class StudyFolder:
    """A study below `folder`; `add` makes one finished trial after the other, `finish` writes study.json."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    trials: list[str] = field(default_factory=list)

    def add(self, arm: str, seed: int, correct: Sequence[bool] | np.ndarray, *, labels: Sequence[int] | None = None,
            classes: int = 10, predictions: bool = True, **fields: Any) -> str:
        """Result and predictions of a trial that is right where `correct` says; returns its name."""
        right = np.asarray(correct, bool)
        label = np.arange(len(right)) % classes if labels is None else np.asarray(labels)
        predicted = np.where(right, label, (label + 1) % classes)
        trial = f"{arm.replace(' ', '-')}-s{seed}"
        top1 = float(right.mean())
        result = {"trial": trial, "arm": arm, "seed": seed, "digest": _hash(trial), "control_of": None, "ratio": 0.0,
                  "group": "", "augment": "none", "run": "", "rows": 20, "real_rows": 20, "synthetic_rows": 0,
                  "updates": 200, "samples_seen": 4000, "history": history(top1),
                  "last": {"top1": top1, "top5": min(1.0, top1 + 0.2), "ece": 0.05, "per_class": top1},
                  "best": {"top1": min(1.0, top1 + 0.01), "epoch": 9}, "seconds": 3.0, "cpu_seconds": 2.5,
                  "gpu_seconds": 0.0, "expansion_seconds": 0.0, "fitting_seconds": 0.0, "device": "cpu", "workers": 0,
                  "ids_sha256": _hash(f"ids {seed}"), "list_sha256": _hash(f"{arm} {seed}"),
                  "recipe": Recipe().model_dump(mode="json"), "stack": STACK, **fields}
        self.write(f"results/{trial}.json", result)
        self.write(f"trials/{trial}.json", {name: result[name] for name in (
            "arm", "seed", "group", "ratio", "control_of", "recipe", "list_sha256", "ids_sha256", "value", "rounds")
            if name in result})
        if predictions:
            (self.folder / "predictions").mkdir(exist_ok=True)
            pq.write_table(pa.table({"item": np.arange(len(right)), "label": label, "predicted": predicted,
                                     "confidence": np.full(len(right), 0.8, np.float32)}),
                           self.folder / f"predictions/{trial}.parquet")
        self.trials.append(trial)
        return trial

    def finish(self, *missing: str) -> Path:
        """study.json with the trials so far and `missing` ones."""
        self.write("study.json", {"config": {"name": self.folder.name, **self.config},
                                  "trials": [*self.trials, *missing]})
        return self.folder

    def write(self, name: str, content: Any) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def answers(arm: str, seed: int, share: float, images: int) -> np.ndarray:
    """Which test images a made-up trial gets right: hard images are hard for every arm, the rest is chance."""
    hard = generator(row_key(0, "studyfolder", "hard", 0, 0, "noise")).normal(size=images)
    own = generator(row_key(seed, "studyfolder", arm, 0, 0, "noise")).normal(size=images + 1)
    score = hard + 0.5 * own[:images]
    return score <= np.quantile(score, min(1.0, max(0.0, share + 0.01 * float(own[images]))))


def history(top1: float, epochs: int = 10, steps: int = 20) -> list[dict[str, float]]:
    return [{"epoch": n, "step": n * steps, "loss": 0.3 + 2.0 * 0.7 ** n, "top1": top1 * (1 - 0.6 ** n)}
            for n in range(1, epochs + 1)]


def grid(folder: Path, *, expansions: Sequence[str] = EXPANSIONS, ratios: Sequence[int] = RATIOS,
         seeds: Sequence[int] = (0, 1, 2), images: int = 500, controls: bool = True, **fields: Any) -> StudyFolder:
    """`original`, every expansion at every ratio, and controls shared by the expansions, as `train` names them."""
    study = StudyFolder(folder, {"arms": [{"name": "original", "use": None}, *(
        {"name": name, "use": name, "ratio": list(ratios)} for name in expansions)], "seeds": list(seeds)})
    for seed in seeds:
        study.add("original", seed, answers("original", seed, 0.62, images), **fields)
        for number, name in enumerate(expansions):
            for ratio in ratios:
                arm, share = f"{name} {ratio}x", 0.62 + (0.02 + 0.012 * (number % 7)) * float(np.log2(1 + ratio))
                study.add(arm, seed, answers(arm, seed, share, images), group=name, ratio=float(ratio),
                          rows=20 + 20 * ratio, synthetic_rows=20 * ratio, **{
                              "expansion_seconds": (4.0 + 3 * number) * ratio, "run": f"runs/{name}-{seed}", **fields})
        for ratio in ratios if controls else ():
            arm = f"original repeated {1 + ratio}x"
            study.add(arm, seed, answers(arm, seed, 0.625, images), control_of=f"{expansions[0]} {ratio}x", **fields)
    return study


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
