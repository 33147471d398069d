"""What entropy guidance teaches, at an equal number of samples, and what it does to samples.

    python -m tests.benchmarks.practice                    ten subsets of digits, every arm
    python -m tests.benchmarks.practice --samples          entropy of samples by omega, convention and criterion

Each subset: two real digits per class, and nine samples of each, by loops whose first 60 samples are the same, without
guidance. The next 120 are made without it; guided by a classifier of the real digits and the first 60; the same with
that classifier trained anew after 60 more; or in random directions of equal length. Each arm trains a classifier for
100 steps on real digits and all 180 samples, which is tested on 500 digits. The embedded generator knows digits
already, so the figures say which samples teach more, and not what a user may expect.
"""

# S subsets, N test images, K classes

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayexpand.classifier.classifier import Classifier
from rayexpand.classifier.recipe import make_recipe
from rayexpand.classifier.statistics import crossed
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, build_index, digits_split
from rayexpand.data.subsets import SubsetConfig, choose
from rayexpand.diffusion import energy
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import RowSource
from rayexpand.models.guides import ClassifierGuide, load_guide
from rayexpand.runs import run as runs
from rayexpand.runs.driving import Here
from rayexpand.runs.joined import run_folders
from rayexpand.studies.demo import settings
from rayexpand.studies.rounds.config import parse_loop
from rayexpand.studies.rounds.learning import Learning
from rayexpand.studies.rounds.loop import drive_loop, open_loop
from rayexpand.studies.samples import training_set
from rayexpand.studies.train import train_with

SUBSETS, PER_CLASS, RATIO = 10, 2, 9
RECIPE = {"preset": "digits", "updates": 100}
UNGUIDED, ONE, RENEWED, RANDOM, FIRST = ("unguided", "omega 16, one guide", "omega 16, guide renewed after 60",
                                         "random direction, equal length", "first 60 alone")
GUIDED = {"guided_from": 2, "guide": RECIPE}
LOOPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fields of the method, and rounds
    UNGUIDED: ({"omega": 0.0}, {"count": 1}),
    ONE: ({}, {"count": 2, "shares": [1, 2], **GUIDED}),
    RENEWED: ({}, {"count": 3, **GUIDED}),
    RANDOM: ({"direction": "random"}, {"count": 2, "shares": [1, 2], **GUIDED})}


class Subset:
    """Two digits per class."""

    def __init__(self, number: int, root: Path) -> None:
        self.number, self.root, self.drive = number, root / str(number), Here()
        self.root.mkdir()
        whole = build_index(DataConfig(source="digits"))
        rows = choose(whole, SubsetConfig(kind="per_class", n=PER_CLASS), number)
        (self.root / "ids.txt").write_text("\n".join(whole.seed_ids[row] for row in rows) + "\n")
        self.data = DataConfig(source="digits", ids=str(self.root / "ids.txt"))

    def loop(self, name: str, rounds: Mapping[str, Any], **fields: Any) -> list[str]:
        """The folders of its rounds."""
        run = {"name": name, "out": str(self.root), "seed": self.number, "data": self.data.model_dump(mode="json"),
               "method": settings("practice", **{"ratio": RATIO, **fields}),
               "sampler": {"batch": 60, "shard_images": 60}}
        loop = open_loop(parse_loop({"run": run, "rounds": dict(rounds)}))

        def drive(run: runs.Run) -> None:
            self.drive(run, lambda *_: None)

        drive_loop(loop, Learning(train_with(lambda *_: None)), drive)
        return run_folders(loop.files)

    def right(self, folders: Sequence[str]) -> np.ndarray:
        """bool (N,): the test images that a classifier of the real digits and these samples names right."""
        recipe, index = make_recipe(RECIPE), build_index(self.data)
        rows = training_set([RowSource(seeds=(index, self.data)), *(RowSource(run=folder) for folder in folders)])
        feed = Loader(rows, recipe, self.number)
        classifier = Classifier(recipe, len(index.classes), self.number, feed.total_steps, device=torch.device("cpu"))
        for batch in feed.batches(0, feed.total_steps):
            classifier.update(batch)
        images, labels = digits_split()["test"]
        return ClassifierGuide(classifier.module, recipe, torch.device("cpu")).zero_shot(images) == labels


def compare(subsets: Sequence[int], root: Path) -> dict[str, np.ndarray]:
    """(S, N) right answers by arm."""
    torch.set_num_threads(1)
    found = list[dict[str, np.ndarray]]()
    for number in subsets:
        subset, made = Subset(number, root), dict[str, list[str]]()
        for i, (name, (fields, rounds)) in enumerate(LOOPS.items()):
            made[name] = subset.loop(f"loop-{i}", rounds, **fields)
        made[FIRST] = made[RENEWED][:1]
        found.append({name: subset.right(folders) for name, folders in made.items()})
        print(f"subset {number}: " + "; ".join(f"{name} {100 * right.mean():.1f}" for name, right in found[-1].items()),
              flush=True)
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def lines(right: Mapping[str, np.ndarray]) -> list[str]:
    """Each arm, and what it differs from others, in points: mean, standard error over subsets, and the 95 % interval
    over subsets and test images."""
    against = {FIRST: [UNGUIDED], ONE: [UNGUIDED], RENEWED: [UNGUIDED, RANDOM, ONE], RANDOM: [UNGUIDED]}
    return [f"{name:34} {100 * right_SN.mean():.1f} %" + "".join(
        f"\n    over {other}: {difference(right, name, other)}" for other in against.get(name, ()))
        for name, right_SN in right.items()]


def difference(right: Mapping[str, np.ndarray], name: str, other: str) -> str:
    apart_SN = right[name].astype(float) - right[other]
    each_S, whole = 100 * apart_SN.mean(1), crossed(apart_SN)
    low, high = whole.interval()
    error = each_S.std(ddof=1) / len(each_S) ** 0.5
    return (f"{each_S.mean():+.1f} +- {error:.1f} [{100 * low:+.1f}, {100 * high:+.1f}], better in "
            f"{(each_S > 0).sum()} of {len(each_S)}, worse in {(each_S < 0).sum()}")


def samples(root: Path) -> list[str]:
    """Mean entropy of 60 samples by the classifier of what was there before, and the share that the generator's own
    CLIP names as its class."""
    torch.set_num_threads(1)
    subset, made, found = Subset(0, root), list[tuple[dict[str, Any], runs.Run]](), list[str]()
    score: list[dict[str, Any]] = [{"omega": omega} for omega in (0.0, 1.0, 4.0, 16.0, 64.0)]
    unit: list[dict[str, Any]] = [{"convention": "unit", "omega": omega} for omega in (0.03, 0.1, 0.3)]
    for i, fields in enumerate([*score, {"direction": "random"}, {"criterion": "loss"}, *unit]):
        rounds = {"count": 2, **(GUIDED if fields.get("omega", 16) else {})}
        made.append((fields, runs.open_run(subset.loop(f"loop-{i}", rounds, **{"ratio": 6, **fields})[1])))
    classes = made[0][1].plan.index.classes
    judge = load_guide(made[-1][1].config.guide.weights, None, (), device="cpu")  # all loops have this one
    clip = load_guide("digits", None, classes.asked, device="cpu")
    for fields, run in made:
        rows = [row for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()]
        images = np.stack([decode(row["image"]["bytes"])[0] for row in rows])
        with torch.no_grad():
            entropy = float(energy.entropy(judge.logits(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)).mean())
        named = (clip.zero_shot(images) == np.array([row["label"] for row in rows])).mean()
        said = ", ".join(f"{name} {value}" for name, value in fields.items())
        found.append(f"{said:34} entropy {entropy:.2f} nats, named {100 * named:.0f} %")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", action="store_true", help="look at samples instead of training on them")
    parser.add_argument("--subsets", type=int, nargs=2, default=(0, SUBSETS), help="numbers of the subsets: from, to")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        said = samples(Path(folder)) if given.samples else lines(compare(range(*given.subsets), Path(folder)))
    print("\n".join(said))


if __name__ == "__main__":
    main()
