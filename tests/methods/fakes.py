"""Cheap methods for tests: every corner of the method contract, and every way to fail. They start without torch.

Any of these methods is loaded by its dotted name, `tests.methods.fakes.Fake`. Their image is 16 x 16 and a function
of the draw, the keyed noise of its row and the mean colour of the seed image, so equal rows have equal bytes.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, PrivateAttr

from rayexpand.contract.protocols import Batch, Expansion, Method, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import CAPTION_SLOT, ClassTable, Draw, Reason, SeedIndex, Start
from rayexpand.methods._copies import quota_copies, ratio_copies

SIZE = 16


def picture(batch: Batch, i: int, noise: np.ndarray | None = None) -> np.ndarray:
    """uint8 (16, 16, 3) of slot i."""
    draw, rng = batch.draws[i], batch.rngs[i]
    noise = rng.normals("noise", (SIZE, SIZE, 3)) if noise is None else noise
    mean = batch.images[i].reshape(-1, 3).mean(axis=0)
    shift = 7 * draw.target_label + 13 * draw.attempt + 3 * draw.copy
    return np.clip(0.5 * mean + 30 * noise + 20 + shift % 60, 0, 255).astype(np.uint8)


class Fake(BaseModel):
    """`ratio` copies of every seed, one picture per row. The other fakes change one thing each."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = "tests.methods.fakes.Fake"
    ratio: float = 2.0

    def needs(self) -> frozenset[str]:
        return frozenset()

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        return ratio_copies(index, self.ratio, rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt=classes.name[label], negative="", start=Start.IMAGE, strength=0.0, steps_run=0, attempt=0,
                    row=row, group=copy // self.group(copy + 1))

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return ()

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        return Expansion([picture(batch, i) for i in range(len(batch))], [None] * len(batch))

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]


class Mixes(Fake):
    """Every second copy is painted as the next class, and labelled as Diff-Mix would."""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        draw = super().draw(seed_id, label, copy, row, classes, rng)
        return replace(draw, target_label=(label + copy % 2) % len(classes), strength=0.25)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   gamma: float = 0.5, **recipe: float) -> np.ndarray:
        weight, one = (strength ** gamma)[:, None], np.eye(n_classes)
        return (weight * one[target] + (1 - weight) * one[source]).astype(np.float32)


class ByRow(Fake):
    """Its class follows from the number of the row in the whole plan."""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return replace(super().draw(seed_id, label, copy, row, classes, rng), target_label=row % len(classes))


class FractionalRatio(Fake):
    ratio: float = 2.5


class ClassQuota(Fake):
    """Exactly `quota` samples of every class."""

    quota: int = 7

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        return quota_copies(index, np.full(len(index.classes), self.quota), rng)


class ClassUniformReferences(Fake):
    """`per_class` samples of every class, each from a seed drawn uniformly, with replacement, from its class."""

    per_class: int = 6

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        chosen = rng.dataset("references")
        of_class = [np.flatnonzero(index.labels == label) for label in range(len(index.classes))]
        rows = [chosen.choice(seeds, self.per_class) for seeds in of_class if len(seeds)]
        return np.bincount(np.concatenate(rows), minlength=len(index)).astype(np.uint16)


class NoiseStart(Fake):
    """The seed image is never looked at."""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return replace(super().draw(seed_id, label, copy, row, classes, rng), start=Start.NOISE, strength=1.0)


class Echo(Fake):
    """Gives back the prepared seed image."""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        return Expansion([image.copy() for image in batch.images])


class Planted(Fake):
    """Samples that a test has put into `images`, by sample id; the others as of Fake."""

    images: ClassVar[dict[str, np.ndarray]] = {}

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        found = [self.images.get(draw.sample_id) for draw in batch.draws]
        return Expansion([picture(batch, i) if one is None else one for i, one in enumerate(found)],
                         [None] * len(batch))


class Captioned(Fake):
    """Its prompt is the caption of the seed."""

    def needs(self) -> frozenset[str]:
        return frozenset({"captions"})

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return replace(super().draw(seed_id, label, copy, row, classes, rng), prompt=CAPTION_SLOT)


class Groups(Fake):
    """Copies of a seed in groups of `size` that share a call: each picture has the mean noise of its group taken out.

    The members of a group are the different copies with one (seed_id, group), wherever they stand in the batch.
    """

    ratio: float = 5.0
    size: int = 2

    def group(self, copies: int) -> int:
        return self.size

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        groups: dict[tuple[str, int], dict[int, np.ndarray]] = {}
        for draw, rng in zip(batch.draws, batch.rngs, strict=True):
            groups.setdefault((draw.seed_id, draw.group), {})[draw.copy] = rng.normals("noise", (SIZE, SIZE, 3))
        images: list[np.ndarray | None] = []
        for i, draw in enumerate(batch.draws):
            members = groups[draw.seed_id, draw.group]
            mean = np.mean([members[copy] for copy in sorted(members)], axis=0)
            images.append(picture(batch, i, members[draw.copy] - mean))
        return Expansion(images, [None] * len(batch))


class Practised(Fake):
    """Guided by a classifier: a picture is as much brighter as its seed's probabilities are uneven."""

    omega: float = 4.0
    direction: str = "gradient"  # random: each picture by a number of its own

    def needs(self) -> frozenset[str]:
        return frozenset({"guide"} if self.omega else ())

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        made = super().expand(batch, tools)
        if self.omega:
            import torch

            images = torch.from_numpy(np.stack(batch.images)).permute(0, 3, 1, 2) / 255
            with torch.inference_mode():
                top_B = tools.guide.logits(images).softmax(1).max(1).values.tolist()
            if self.direction == "random":
                top_B = [float(rng("direction").random()) for rng in batch.rngs]
            made.images = [np.clip(image + self.omega * 10 * top, 0, 255).astype(np.uint8)
                           for image, top in zip(made.images, top_B, strict=True)]
        return made


class Picky(Fake):
    """Rejects each attempt of a row itself, with chance `share`, and gives no image then."""

    share: float = 0.5

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        made = super().expand(batch, tools)
        luck = [float(rng("luck").random()) for rng in batch.rngs]
        made.scores = {"luck": luck}
        for i in np.flatnonzero(np.array(luck) < self.share):
            made.images[i], made.reasons[i] = None, Reason.WRONG_CLASS
        return made


class Numbered(Fake):
    """The first pixel of its picture says copy, attempt and row."""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        made = super().expand(batch, tools)
        for image, draw in zip(made.images, batch.draws, strict=True):
            assert image is not None
            image[0, 0] = draw.copy, draw.attempt, draw.row % 256
        return made


class Worded(Fake):
    """Draws words for its prompt and its negative prompt, and a strength."""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        word, other, strength = rng("words").integers(1000, size=3)
        return replace(super().draw(seed_id, label, copy, row, classes, rng), prompt=f"{CAPTION_SLOT} {word}",
                       negative=f"no {other}", strength=float(strength) / 1000)


class MixesWords(Worded, Mixes):
    """Its target class is drawn too, and its prompt is about that."""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        draw = super().draw(seed_id, label, copy, row, classes, rng)
        target = int(rng("target").integers(len(classes)))
        return replace(draw, target_label=target, prompt=f"{classes.name[target]} {draw.prompt}")


class Bad(Fake):
    """Base of the fakes that misbehave at sample `bad`; a filler in its place does no harm."""

    bad: str = ""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        if has(batch, self.bad):
            self.misbehave()
        return super().expand(batch, tools)

    def misbehave(self) -> None:
        raise NotImplementedError


def has(batch: Batch, sample_id: str) -> bool:
    return any(d.sample_id == sample_id and not absent for d, absent in zip(batch.draws, batch.filler, strict=True))


class Failing(Bad):
    """Raises on `bad`, makes NaN of `nan` and a constant image of `constant`."""

    nan: str = ""
    constant: str = ""

    def misbehave(self) -> None:
        raise RuntimeError(f"cannot sample {self.bad}")

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        made = super().expand(batch, tools)
        for i, draw in enumerate(batch.draws):
            if draw.sample_id == self.nan:
                made.images[i] = np.full((SIZE, SIZE, 3), np.nan, np.float32)
            if draw.sample_id == self.constant:
                made.images[i] = np.full((SIZE, SIZE, 3), 77, np.uint8)
        return made


class Hang(Bad):
    """Sleeps for an hour without letting go of the interpreter lock: no other Python thread runs."""

    def misbehave(self) -> None:
        ctypes.PyDLL(None).sleep(3600)


class Segfault(Bad):
    def misbehave(self) -> None:
        ctypes.string_at(0)


class HardExit(Bad):
    """The process ends at once, without exception or clean-up."""

    code: int = 11

    def misbehave(self) -> None:
        os._exit(self.code)


class Sleeping(Fake):
    """Takes `seconds` per image, like a sampler."""

    seconds: float = 0.02

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        time.sleep(self.seconds * len(batch))
        return super().expand(batch, tools)


class Logged(Sleeping):
    """Writes a line for each call to the file `log`: process, and rows that are no fillers."""

    log: str = ""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        found = super().expand(batch, tools)
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {sum(not absent for absent in batch.filler)}\n")
        return found


_LOADED: set[int] = set()  # processes in which a Loading has been called


class Loading(Sleeping):
    """The first call of a process takes `load` seconds more, like loading models."""

    load: float = 3.0

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        if os.getpid() not in _LOADED:
            _LOADED.add(os.getpid())
            time.sleep(self.load)
        return super().expand(batch, tools)


class Steady(Failing):
    """Takes `seconds` per image, of which no pixel depends, and fails as `Failing` does."""

    seconds: float = 0.0

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        time.sleep(self.seconds * sum(not absent for absent in batch.filler))
        return super().expand(batch, tools)


class Loud(Fake):
    """Says what libraries say: a warning, a traceback, a line from C."""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        print("a library warns", file=sys.stderr)
        try:
            raise RuntimeError("a library shows this and goes on")
        except RuntimeError:
            traceback.print_exc()
        os.write(2, b"written by C\n\n")
        return super().expand(batch, tools)


class Gated(Fake):
    """Rows of the first class are made at once, the others when the file `gate` is there."""

    gate: str = ""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        while self.gate and all(draw.source_label for draw in batch.draws) and not os.path.exists(self.gate):
            time.sleep(0.01)
        return super().expand(batch, tools)


class BrokenAfterFirst(Fake):
    """The first call of each process works, every later one raises: a fault of the machine, not of a row."""

    _calls: Iterator[int] = PrivateAttr(default_factory=itertools.count)

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        if next(self._calls):
            raise RuntimeError("device lost")
        return super().expand(batch, tools)


class Capacity(Fake):
    """Runs out of memory above `rows` rows a call."""

    rows: int = 4

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        if len(batch) > self.rows:
            import torch

            raise torch.OutOfMemoryError(f"{len(batch)} rows")
        return super().expand(batch, tools)


class ManyBad(Fake):
    """Runs out of memory above `rows` rows a call, and raises while any of `bads` is in a call."""

    bads: tuple[str, ...] = ()
    rows: int = 1000

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        if len(batch) > self.rows:
            import torch

            raise torch.OutOfMemoryError(f"{len(batch)} rows")
        if any(has(batch, bad) for bad in self.bads):
            raise RuntimeError("a bad row is among them")
        return super().expand(batch, tools)


class ManyBadGroups(ManyBad, Groups):
    """A group that is not whole makes other pictures."""


class BadRedraws(Fake):
    """Raises while the first redraw of any of `bads` is in a call."""

    bads: tuple[str, ...] = ()

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        if any(draw.attempt == 1 and draw.sample_id in self.bads for draw in batch.draws):
            raise RuntimeError("a bad redraw is among them")
        return super().expand(batch, tools)


class DeadlyRedraw(Fake):
    """The first redraw of `bad` ends the process."""

    bad: str = ""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        if any(draw.attempt == 1 and draw.sample_id == self.bad for draw in batch.draws):
            os._exit(11)
        return super().expand(batch, tools)


class OddPicture(Fake):
    """The picture of `bad` is no uint8 or float (H, W, 3) array: `gray` has no channels, `int` is int64."""

    bad: str = ""
    mode: str = "gray"

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        made = super().expand(batch, tools)
        for i, draw in enumerate(batch.draws):
            if draw.sample_id == self.bad:
                image = made.images[i]
                assert image is not None
                made.images[i] = image[..., 0] / 255 if self.mode == "gray" else image.astype(np.int64)
        return made


class MixedStarts(Fake):
    """Rows of the seeds whose id starts with `seeds` start from their image, the others from noise."""

    seeds: str = ""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        draw = super().draw(seed_id, label, copy, row, classes, rng)
        return draw if seed_id.startswith(self.seeds) else replace(draw, start=Start.NOISE)

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        """The size of each picture is that of the image given."""
        images: list[np.ndarray | None] = [rng.uniforms("noise", image.shape)
                                           for rng, image in zip(batch.rngs, batch.images, strict=True)]
        return Expansion(images, [None] * len(batch))


class SecondCopyFromNoise(Fake):
    """Copy 0 starts from its seed image; an image other than grey at a later copy is an error."""

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        draw = super().draw(seed_id, label, copy, row, classes, rng)
        return replace(draw, start=Start.NOISE) if copy else draw

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        for draw, image in zip(batch.draws, batch.images, strict=True):
            assert draw.start == Start.IMAGE or (image == 128).all()
        return super().expand(batch, tools)


class EchoThenNoise(SecondCopyFromNoise):
    """A picture of the size the sampler sees: the prepared seed image, and noise at a later copy."""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        return Expansion([rng.uniforms("noise", image.shape) if draw.copy else image.copy()
                          for draw, rng, image in zip(batch.draws, batch.rngs, batch.images, strict=True)])


class RejectsAndFails(Picky):
    """Rejects by luck, and fails the samples listed in the environment variable FAILS."""

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        made = super().expand(batch, tools)
        for i, draw in enumerate(batch.draws):
            if draw.sample_id in os.environ.get("FAILS", "").split():
                made.images[i], made.reasons[i] = np.full((SIZE, SIZE, 3), np.nan, np.float32), None
        return made


def batch_of(method: Method, classes: ClassTable, rows: Sequence[tuple[str, int, int]], size: int = SIZE,
             run_seed: int = 0) -> Batch:
    """Batch of (seed_id, label, copy) rows; the seed image is a function of its id."""
    draws, images, rngs = [], [], []
    for row, (seed_id, label, copy) in enumerate(rows):
        rng = RowRng(run_seed, method.name, seed_id, copy)
        draws.append(method.draw(seed_id, label, copy, row, classes, rng))
        images.append(RowRng(0, "pixels", seed_id, 0)("image").integers(0, 256, (size, size, 3), dtype=np.uint8))
        rngs.append(rng)
    return Batch(tuple(draws), tuple(images), tuple(rngs), (False,) * len(rows))
