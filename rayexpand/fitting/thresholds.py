"""Thresholds of the judge of a run: how alike real images of a class are, by its guide (artifacts/thresholds.py).

    fit:
      thresholds: {}

    paper       here            meaning
    I^k, N_k    units_ND, N     images of class k, as features u_i of length 1
    S(i, j)     u_i . u_j       cosine of two of them
    E[S]        mean            over the N (N - 1) / 2 pairs of different images (equation 5, which as it is printed
                                sums ordered pairs, and so gives twice the mean)

No pair is looked at for mean and deviation: with the sums S = sum u_i and C = sum u_i u_i^T,

    mean = (|S|^2 - N) / (N (N - 1)) = (N |m|^2 - 1) / (N - 1),   m = S / N
    mean of squares = (|C|^2 - N) / (N (N - 1)),   |C| the Frobenius norm

so sums of parts of a class add up (`Pairs`). With `pairs` so many drawn ones are looked at instead, as the paper does
(z, without a value); their mean has no bias. An image and the mean of the others is u_i . (S - u_i) / |S - u_i|, which
follows from S too. Quantiles of pairs are exact up to 4,096 images of a class, and those of so many drawn images above.
"""

# N images of a class, K classes, D features

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from rayexpand.artifacts.store import publish
from rayexpand.artifacts.thresholds import LEVELS, Statistics, Thresholds, write_thresholds
from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.settings import Later, Section
from rayexpand.fitting.costs import asked_of_guide
from rayexpand.fitting.features import Intake, by_class, gathered
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts, with_guide
from rayexpand.models.guide_files import CLASS_PROMPT
from rayexpand.models.guides import ClipGuide, guide_hash, load_guide
from rayexpand.models.scores import confidence, unit
from rayexpand.runs.config import GuideConfig, RunConfig
from rayexpand.runs.stages import PlanStage, Sizes

VERSION = 1  # raised when the code below makes something else of the same configuration
MOST = 4096  # images of a class whose pairs are all looked at for quantiles


class ThresholdsFit(Section):
    guide: Annotated[GuideConfig | None, Later(None)] = Field(None, description="the guide that will judge; null: that "
                                                              "of the file")
    batch: int = Field(64, ge=1, description="images of one guide call; features may depend on it in the last digit")
    pairs: Annotated[int | None, Later(None)] = Field(None, ge=1, description="look at so many drawn pairs of each "
                                                      "class (paper: z, without a value); null: at all, by sums")

    @property
    def intake(self) -> Intake:
        return Intake(self.batch, "crop")


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """What is known of the pairs of some images of a class. Sums of parts of a class are those of the class."""

    count: int
    sum_D: np.ndarray  # float64
    outer_DD: np.ndarray

    @classmethod
    def of(cls, units_ND: np.ndarray) -> Pairs:
        return cls(len(units_ND), units_ND.sum(axis=0), units_ND.T @ units_ND)

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(self.count + other.count, self.sum_D + other.sum_D, self.outer_DD + other.outer_DD)

    @property
    def mean(self) -> float:
        """Not a number for a single image."""
        return self._over_pairs(float(self.sum_D @ self.sum_D))

    @property
    def deviation(self) -> float:
        return float(np.sqrt(max(self._over_pairs(float((self.outer_DD ** 2).sum())) - self.mean ** 2, 0.0)))

    def _over_pairs(self, total: float) -> float:
        """The mean over pairs of different images of what sums to `total` over all pairs, an image with itself being
        1."""
        return (total - self.count) / (self.count * (self.count - 1)) if self.count > 1 else float("nan")


def drawn_pairs(count: int, z: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(i, j), i < j, of z different pairs of `count` images."""
    chosen = np.sort(rng.choice(count * (count - 1) // 2, z, replace=False))
    ends = np.cumsum(np.arange(count - 1, 0, -1))  # pairs with a first image of at most i
    i = np.searchsorted(ends, chosen, side="right")
    return i, chosen - ends[i] + count


def pair_statistics(units_ND: np.ndarray, rng: np.random.Generator,
                    z: int | None = None) -> tuple[float, float, np.ndarray]:
    """(mean, deviation, quantiles) of the cosines of pairs, of z drawn ones where there are more; not numbers for a
    single image."""
    if len(units_ND) < 2:
        return float("nan"), float("nan"), np.full(len(LEVELS), np.nan)
    if z is not None and z < len(units_ND) * (len(units_ND) - 1) // 2:
        i, j = drawn_pairs(len(units_ND), z, rng)
        return statistics((units_ND[i] * units_ND[j]).sum(axis=1))
    pairs = Pairs.of(units_ND)
    some_ND = units_ND if len(units_ND) <= MOST else units_ND[np.sort(rng.permutation(len(units_ND))[:MOST])]
    cosines = (some_ND @ some_ND.T)[np.triu_indices(len(some_ND), 1)]
    return pairs.mean, pairs.deviation, np.quantile(cosines, LEVELS)


def to_the_others(units_ND: np.ndarray) -> np.ndarray:
    """(N,): cosine of each image and the mean of the others of its class; nothing for a single image."""
    if len(units_ND) < 2:
        return np.zeros(0)
    others_ND = units_ND.sum(axis=0) - units_ND
    return (units_ND * unit(others_ND)).sum(axis=1)


def statistics(scores: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(mean, deviation, quantiles); not numbers where there are no scores."""
    if not len(scores):
        return float("nan"), float("nan"), np.full(len(LEVELS), np.nan)
    return float(scores.mean()), float(scores.std()), np.quantile(scores, LEVELS)


def thresholds_of(parts: Iterator[np.ndarray], guide: Any, names: tuple[str, ...],
                  z: int | None = None) -> tuple[Thresholds, list[int]]:
    """Thresholds of the features of each class, and the positions of classes of one image, whose pairs have the mean
    numbers of all other classes. Raises UsageError where no class has two images."""
    rows: dict[str, list[tuple[float, float, np.ndarray]]] = {"seed": [], "class": [], "confidence": []}
    texts_KD = guide.texts([CLASS_PROMPT.format(name=name) for name in names]) if isinstance(guide, ClipGuide) else None
    if texts_KD is not None:
        rows["prompt"] = []
    means, alone, draws = [], [], PlanRng(0, "thresholds")
    for label, found_ND in enumerate(parts):
        units_ND = unit(found_ND)
        means.append(units_ND.mean(axis=0))
        if len(units_ND) == 1:
            alone.append(label)
        rows["seed"].append(pair_statistics(units_ND, draws.dataset(f"class {label}"), z))
        rows["class"].append(statistics(to_the_others(units_ND)))
        rows["confidence"].append(statistics(confidence(_logits(guide, found_ND), np.full(len(found_ND), label))))
        if texts_KD is not None:
            rows["prompt"].append(statistics(units_ND @ unit(texts_KD[label:label + 1])[0]))
    if len(alone) == len(means):
        raise UsageError("no class has two images that can be read, so nothing is known of how alike images of a class "
                         "are; give more images, or set accept.above to a number and use no thresholds")
    of = {name: _filled(Statistics(*(np.array(column) for column in zip(*found, strict=True))))
          for name, found in rows.items()}
    return Thresholds(np.stack(means).astype(np.float32), of), alone


def _filled(found: Statistics) -> Statistics:
    """With means over the other classes for a class without numbers."""
    def filled(values: np.ndarray) -> np.ndarray:
        gone = np.isnan(values if values.ndim == 1 else values[:, 0])
        return np.where(gone if values.ndim == 1 else gone[:, None], values[~gone].mean(axis=0), values)

    return Statistics(filled(found.mean_K), filled(found.deviation_K), filled(found.quantiles_KQ))


def _logits(guide: Any, features_ND: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return guide.head(torch.from_numpy(features_ND).to(guide.device)).double().cpu().numpy()


class ThresholdsMaker(Maker):
    kind = "thresholds"
    text = "how alike real images of a class are, for the judge of a run"
    section = ThresholdsFit
    by_guide = True

    def for_run(self, config: RunConfig) -> ThresholdsFit:
        return ThresholdsFit(guide=None if config.accept is None else config.accept.guide)

    def stages(self, section: ThresholdsFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        return [asked_of_guide("fit thresholds", config, sizes, section.guide)]

    def make(self, section: ThresholdsFit, config: FitBase, world: World) -> Path:
        config, classes = with_guide(config, section.guide), world.index.classes
        sha256 = guide_hash(config.guide.weights, config.guide.checkpoint, world.progress)
        made_from = {"version": VERSION, "data": data_facts(config, world.index), "guide_sha256": sha256,
                     **section.model_dump(exclude={"guide"})}

        def make(folder: Path) -> dict[str, Any]:
            costs: dict[str, Any] = {}
            scratch = folder / "features.tmp"
            blocks = world.engine.blocks(config, sha256, world.index, section.intake, costs)
            features_ND, sound_N, refused = gathered(blocks, len(world.index), scratch, world.progress)
            guide = load_guide(config.guide.weights, config.guide.checkpoint, classes.asked, device="cpu",
                               class_keys=classes.key)
            made, alone = thresholds_of(by_class(features_ND, sound_N, world.index, "threshold"), guide, classes.asked,
                                        section.pairs)
            del features_ND
            scratch.unlink()
            images = np.bincount(world.index.labels[sound_N], minlength=len(classes)).tolist()
            write_thresholds(folder, made, guide_sha256=sha256, class_keys=classes.key, images=images,
                             alone=[classes.key[label] for label in alone])
            return {**costs, "guide": config.guide.model_dump(mode="json"), "refused": len(refused),
                    "refused_examples": dict(list(refused.items())[:20]), "classes_of_one_image": len(alone),
                    **{f"mean_{name}": float(found.mean_K.mean()) for name, found in made.of.items()},
                    "real_pairs_above": _share_above(made)}

        return publish(config.out, self.kind, made_from, make)


def _share_above(made: Thresholds) -> float:
    """Share of the pairs of real images of a class that lie above their own mean, on average over the classes: what may
    be expected of samples that are no better than real images."""
    found = made.of["seed"]
    return float(np.mean([1 - np.interp(mean, values_Q, LEVELS)
                          for mean, values_Q in zip(found.mean_K, found.quantiles_KQ, strict=True)]))
