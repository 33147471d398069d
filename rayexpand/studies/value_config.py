"""What a study says to learn what one sample is worth: real sizes, ratios, checks, prices; and the arms that follow."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.data.subsets import SubsetConfig, of_counts, real_counts

HELD_OUT = "held out"  # the key of the real images at hand with as many others
Role = Literal["real", "held out", "repeated", "samples", "alone"]


class ValueConfig(Section):
    real: tuple[float, ...] = Field((0.25, 0.5, 1, 2, 4), description="sizes of real-only training sets, as multiples "
                                    "of the subset; those that `data` has too few images for are left out")
    ratio: tuple[float, ...] = Field((1, 2, 5), min_length=1, description="samples of each real image that are added")
    use: str | tuple[str, ...] | None = Field(None, description="name of an expansion, or several, each valued apart; "
                                              "null: all of the study")
    alone: bool = Field(False, description="also train on samples alone, at every ratio: what they are worth without "
                        "real images, and how many of them reach these")
    checks: bool = Field(True, description="also train on the real images with as many held-out ones, which must be "
                         "worth 1, and repeated, which must be worth 0")


class ValuePrices(Section):
    gpu_hour: float | None = Field(None, gt=0, description="of one GPU process")
    cpu_hour: float | None = Field(None, gt=0, description="of one CPU process")
    real_image: float | None = Field(None, gt=0, description="of one labelled real image more")


class ValueArm(NamedTuple):
    """One training set of the section: `size` real images as multiples of the subset, 0 for samples alone."""

    name: str
    role: Role
    size: float
    use: str | None = None
    ratio: float = 0.0

    @property
    def rows(self) -> float:
        """Rows of an epoch as multiples of the subset."""
        return self.size + self.ratio

    def facts(self) -> dict[str, str | float | None]:
        """As trials and results keep them."""
        return {"role": self.role, "size": self.size, "use": self.use, "ratio": self.ratio}


def used_by(value: ValueConfig | None, expansions: Iterable[str]) -> tuple[str, ...]:
    """Expansions that are valued, of those of the study."""
    if value is None:
        return ()
    if value.use is None:
        return tuple(expansions)
    return (value.use,) if isinstance(value.use, str) else value.use


def value_arms(value: ValueConfig | None, expansions: Iterable[str],
               real: Sequence[float] | None = None) -> list[ValueArm]:
    """The arms of the section. `real`: the sizes there are images for; None: all that are asked for."""
    if value is None:
        return []
    found = [ValueArm(f"value: real {size:g}x", "real", size) for size in (value.real if real is None else real)]
    if value.checks:
        found += [ValueArm("value: real 1x and held-out real 1x", "held out", 2.0),
                  ValueArm("value: real 1x repeated 2x", "repeated", 2.0)]
    for use in used_by(value, expansions):
        found += [ValueArm(f"value: real 1x and {use} {ratio:g}x", "samples", 1.0, use, ratio) for ratio in value.ratio]
        if value.alone:
            found += [ValueArm(f"value: {use} {ratio:g}x", "alone", 0.0, use, ratio) for ratio in value.ratio]
    return found


def value_problems(value: ValueConfig | None, price: ValuePrices | None, expansions: Collection[str],
                   subset: SubsetConfig, vary: str) -> list[str]:
    """What is wrong with the section as far as can be known without listing images."""
    if value is None:
        return [] if price is None else ["price: says what samples cost beside what they are worth; add a "
                                                "section value, or take it out"]
    problems = []
    for name, sizes in (("real", value.real), ("ratio", value.ratio)):
        if list(sizes) != sorted({*sizes}) or min(sizes, default=1) <= 0:
            problems.append(f"value.{name}: {list(sizes)} must ascend from above 0, each number once")
    if 1 not in value.real or max(value.real, default=0) < 2:
        problems.append("value.real: needs 1, the real images at hand, and 2 or more, with which they are compared")
    if not expansions:
        problems.append("value: there is no expansion whose samples could be worth something; add one in expansions")
    problems += [f"value.use: '{one}' is no expansion; known: {', '.join(expansions)}"
                 for one in used_by(value, expansions) if one not in expansions]
    if subset.kind == "full":
        problems.append("value: all of data are the real images at hand, so there are no more to compare samples with; "
                        "take a half or less of them with subset")
    if vary == "classifier":
        problems.append("vary: classifier trains on the real images of the first seed alone, so no interval of value "
                        "would hold for others; take it out")
    return problems


# Real images ---------------------------------------------------------------------------------------------------------


def sizes_in(value: ValueConfig, whole: SeedIndex, base: SeedIndex) -> list[float]:
    """The sizes that `data` has images for, with those that are held out. `base`: the subset of a seed. Raises
    UsageError below twice the subset."""
    have, wanted = real_counts(whole), real_counts(base)
    room = float((have[wanted > 0] / wanted[wanted > 0]).min()) - value.checks
    fitting = [size for size in value.real if (_scaled(wanted, size) <= have - value.checks * wanted).all()]
    if max(fitting, default=0) < 2:
        need = 2 + value.checks
        raise UsageError(f"value: data has {have.sum():,} images, and the {wanted.sum():,} at hand are compared with "
                         f"twice as many{' and as many held-out ones' if value.checks else ''}: every class needs "
                         f"{need} times its images in the subset, and one has {room + value.checks:.3g} times; make "
                         "the subset smaller")
    return fitting


def size_subset(whole: SeedIndex, base: SeedIndex, size: float, seed: int) -> np.ndarray:
    """Rows of `whole`, ascending: `size` times the images of every class of the subset, which lies inside if `size` is
    1 or more, and holds it if less. `seed`: that drew it."""
    return of_counts(whole, _scaled(real_counts(base), size).tolist(), seed)


def with_held_out(whole: SeedIndex, base: SeedIndex, largest: float, seed: int) -> np.ndarray:
    """Rows of `whole`, ascending: the subset with as many images of each class that are in no size up to `largest`."""
    counts = real_counts(base)
    curve = _scaled(counts, largest)
    others = np.setdiff1d(of_counts(whole, (curve + counts).tolist(), seed), of_counts(whole, curve.tolist(), seed))
    return np.union1d(of_counts(whole, counts.tolist(), seed), others)


def _scaled(counts: np.ndarray, size: float) -> np.ndarray:
    """Whole images of each class, of one with any at least 1."""
    return np.where(counts > 0, np.maximum(np.round(counts * size), 1), 0).astype(np.int64)


# Training ------------------------------------------------------------------------------------------------------------


def repeats_of(arms: Mapping[str, int], batch: int) -> dict[str, int]:
    """How often each arm, by its rows, shows them in an epoch, so that all fill a batch."""
    return {name: max(1, -(-batch // rows)) for name, rows in arms.items()}


def updates_of(arms: Mapping[str, int], batch: int, epochs: int) -> int:
    """Optimiser steps of every arm: those that the largest needs for its epochs."""
    repeated = repeats_of(arms, batch)
    return max(epochs * (rows * repeated[name] // min(batch, rows * repeated[name])) for name, rows in arms.items())
