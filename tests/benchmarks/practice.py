"""What entropy guidance teaches, at an equal number of samples, and what it does to samples.

    python -m tests.benchmarks.practice                    ten subsets of digits, every arm
    python -m tests.benchmarks.practice --samples          entropy of samples by omega, convention and criterion

Each subset: two real digits per class, three unguided samples of each seed, a classifier trained on these, and then six
more of each seed (120 samples) by every arm, from the same noise. `renewed` makes three of them, trains the classifier
anew on what there is, and makes three more. Each classifier is trained for 100 steps and tested on 500 digits. The
embedded generator knows digits already, so the figures say which samples teach more, and not what a user may expect.
"""

# S subsets, N test images, K classes

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayexpand.classifier.classifier import Classifier
from rayexpand.classifier.recipe import make_recipe
from rayexpand.classifier.statistics import crossed
from rayexpand.data.seeds import DataConfig, build_index, digits_split
from rayexpand.data.subsets import SubsetConfig, choose
from rayexpand.diffusion import energy
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import RowSource
from rayexpand.models.guide_files import save_classifier
from rayexpand.models.guides import load_guide
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.runs.driving import Here
from rayexpand.studies.demo import settings
from rayexpand.studies.samples import training_set

SUBSETS, PER_CLASS = 10, 2
RECIPE = {"preset": "digits", "updates": 100}
UNGUIDED, ONE, RENEWED, RANDOM, FIRST = ("unguided", "omega 16, one guide", "omega 16, guide renewed after 60",
                                         "random direction, equal length", "round 1 alone")


@dataclass(frozen=True)
class Made:
    """Samples of some copies of every seed."""

    folder: str
    images: np.ndarray  # uint8 (n, H, W, 3)
    labels: np.ndarray


class Subset:
    """Two digits per class with all that is made of them."""

    def __init__(self, number: int, root: Path, drive: Here) -> None:
        self.number, self.root, self.drive = number, root / str(number), drive
        self.root.mkdir()
        whole = build_index(DataConfig(source="digits"))
        rows = choose(whole, SubsetConfig(kind="per_class", n=PER_CLASS), number)
        (self.root / "ids.txt").write_text("\n".join(whole.seed_ids[row] for row in rows) + "\n")
        self.data = DataConfig(source="digits", ids=str(self.root / "ids.txt"))
        self.index = build_index(self.data)

    def expand(self, name: str, first: int, copies: int, guide: str | None = None, **fields: Any) -> Made:
        """Copies first ... first + copies - 1 of each seed, as a run of its own in the way of a loop's round."""
        method = settings("practice", ratio=copies, **({} if guide else {"omega": 0}), **fields)
        config = parse({"name": name, "out": str(self.root), "seed": self.number, "method": method,
                        "data": self.data.model_dump(mode="json"), "sampler": {"batch": 60, "shard_images": 60},
                        **({"guide": {"weights": guide}} if guide else {})})
        counts = (np.full(len(self.index), count, np.uint16) for count in (copies, first))
        run = runs.prepare(config, part=runs.RoundPart(self.index, {}, *counts, {"round": 1, "decision": name}))
        self.drive(run, lambda *progress: None)
        found = [row for receipt in run.store.receipts() for row in run.store.data(receipt).to_pylist()]
        assert len(found) == copies * len(self.index)
        return Made(run.folder, np.stack([_pixels(row["image"]["bytes"]) for row in found]),
                    np.array([row["label"] for row in found]))

    def train(self, name: str, *made: Made) -> tuple[np.ndarray, str]:
        """(N,) which test images a classifier of the real digits and these samples names right, and its folder."""
        recipe = make_recipe(RECIPE)
        rows = training_set([RowSource(seeds=(self.index, self.data)), *(RowSource(run=one.folder) for one in made)])
        feed = Loader(rows, recipe, self.number)
        classifier = Classifier(recipe, len(self.index.classes), self.number, feed.total_steps,
                                device=torch.device("cpu"))
        for batch in feed.batches(0, feed.total_steps):
            classifier.update(batch)
        folder = self.root / f"guide-{name}"
        folder.mkdir()
        save_classifier(folder, classifier.module, recipe, self.index.classes.key)
        images, labels = digits_split()["test"]
        return load_guide(str(folder), None, (), device="cpu").zero_shot(images) == labels, str(folder)

    @cached_property
    def before(self) -> Made:
        return self.expand("round-1", 0, 3)

    @cached_property
    def guide(self) -> tuple[np.ndarray, str]:
        return self.train("1", self.before)

    def arms(self) -> dict[str, np.ndarray]:
        """(N,) right answers by arm."""
        alone, guide = self.guide
        one = [self.expand(f"one-{first}", first, 3, guide) for first in (3, 6)]
        _, renewed = self.train("2", self.before, one[0])
        added = {UNGUIDED: [self.expand("unguided", 3, 6)], ONE: one,
                 RENEWED: [one[0], self.expand("renewed", 6, 3, renewed)],
                 RANDOM: [self.expand("random", 3, 6, guide, direction="random")]}
        return {FIRST: alone, **{name: self.train(f"arm-{i}", self.before, *made)[0]
                                 for i, (name, made) in enumerate(added.items())}}


def _pixels(encoded: bytes) -> np.ndarray:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def compare(subsets: Sequence[int], root: Path) -> dict[str, np.ndarray]:
    """(S, N) right answers by arm."""
    torch.set_num_threads(1)
    drive, made = Here(), list[dict[str, np.ndarray]]()
    for number in subsets:
        made.append(Subset(number, root, drive).arms())
        print(f"subset {number}: " + ", ".join(f"{name} {100 * right.mean():.1f}" for name, right in made[-1].items()),
              flush=True)
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


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
    """Mean entropy of 60 samples by their guide, and the share that the generator's CLIP names as its class."""
    torch.set_num_threads(1)
    subset = Subset(0, root, Here())
    guide = subset.guide[1]
    judge = load_guide(guide, None, (), device="cpu")
    clip = load_guide("digits", None, subset.index.classes.asked, device="cpu")
    score = [{"omega": omega} for omega in (0.0, 1.0, 4.0, 16.0, 64.0)]
    unit = [{"omega": omega, "convention": "unit"} for omega in (0.03, 0.1, 0.3)]
    found = []
    for i, fields in enumerate([*score, {"direction": "random"}, {"criterion": "loss"}, *unit]):
        made = subset.expand(f"sample-{i}", 3, 3, guide, **fields)
        x_BCHW = torch.from_numpy(made.images).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            entropy = float(energy.entropy(judge.logits(x_BCHW)).mean())
        named = (clip.zero_shot(made.images) == made.labels).mean()
        found.append(f"{', '.join(f'{name} {value}' for name, value in fields.items()):34} entropy {entropy:.2f} nats, "
                     f"named {100 * named:.0f} %")
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
