"""Diff-Mix and the five generators it is compared with (Wang et al., "Enhance Image Classification via Inter-Class
Image Mixup with Diffusion Model", 2024): repaint an image of one class as another, and label it as a mixture of both.

                 from noise   its own class   any class        "its own" and "any": the class of the reference
    vanilla      real_gen     real_aug        real_mix         image, whose latent is noised to strength s
    fine-tuned   diff_gen     diff_aug        diff_mix

    paper    here             meaning, unit
    i        target_label     class in the prompt
    j        source_label     class of the reference, which is the seed image of the row
    s        strengths        share of the schedule that is run, in (0, 1]
    T        steps            solver steps of the whole schedule
    M        ratio            samples for each real image
    gamma    gamma            exponent of the label: weight s^gamma for i, the rest for j; an argument of training

A variant decides the weights (with or without an adapter), where a sample starts and which plan is made; nothing else.
Sampling is that of img2img and text2img. The six share their random streams: a row of diff_mix whose target happens to
be the class of its reference is the row of diff_aug, byte for byte.

The plan is M rows for each real image. How often a seed is the reference of a row is decided at once for all of them
(`references`), the target class row by row (`targets`). Where both follow from one class (aug, or targets: reference),
`references` decides the classes too.
"""

# K classes, N rows of the plan, B rows of a training batch

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from rayexpand.contract.errors import UsageError
from rayexpand.contract.prompts import Template, format_prompt, placeholders, prompt_needs
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start
from rayexpand.contract.settings import Section
from rayexpand.diffusion import sampling
from rayexpand.methods._copies import MAX_COPIES, quota_copies, rank_in_class
from rayexpand.methods.img2img import Img2Img
from rayexpand.methods.text2img import Text2Img

GAMMA = 0.5  # the paper's
Variant = Literal["real_gen", "real_aug", "real_mix", "diff_gen", "diff_aug", "diff_mix"]


def _one_or_more(strengths: tuple[float, ...]) -> tuple[float, ...]:
    if not strengths:
        raise ValueError("needs at least one number")
    return strengths


Strengths = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], AfterValidator(_one_or_more)]


class DiffMix(Section):
    """Settings of Diff-Mix and its relatives. Defaults are those of the paper unless noted."""

    model_config = ConfigDict(validate_default=True)

    name: Literal["diffmix"] = "diffmix"
    variant: Variant = Field("diff_mix", description="real_: weights as they are; diff_: with the adapter. gen: from "
                             "noise; aug: from an image of the prompt's class; mix: from an image of any class")
    ratio: float = Field(5.0, gt=0, le=MAX_COPIES, description="M, samples for each real image (paper: 5; its released "
                         "code on long tails: 10)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`; of each exactly as many "
                              "with targets balanced or reference")
    references: Literal["stratified", "image_uniform", "class_uniform"] = Field(
        "stratified", description="how often an image is a reference. stratified: all alike, to within one, of "
        "each class the same share (ours); image_uniform: "
        "drawn from all images (paper; released code on long tails); class_uniform: a class is drawn, then one of its "
        "images (released code on balanced sets)")
    targets: Literal["reference", "uniform", "balanced", "fill"] = Field(
        default_factory=lambda data: "reference" if _kind(data) == "aug" else "uniform", description="class in the "
        "prompt. reference: that of the reference (aug; gen and mix where asked); uniform: any, also one without "
        "images (gen, mix); balanced: each in the same number of rows, to within one; fill: as many rows as a class "
        "has fewer images than the largest (SYNAuG), whatever `ratio` says")
    strengths: Strengths = Field(
        (0.5, 0.7, 0.9), description="shares of the schedule that is run, of which each row draws one; a "
        "list of one: fixed (paper: these three; 0.7 on long tails); no effect on gen")
    pairing: Literal["all", "same_metaclass"] = Field(
        "all", description="targets a reference may get in mix: any, or those of its metaclass (ours, for datasets as "
        "broad as ImageNet)")
    referable_classes: int | None = Field(
        None, ge=1, description="reference classes each target is limited to, a random set (figure 7b); every "
        "reference class is in as many sets, to within one, so that both stay uniform. null: all")
    prompt: Template = Field(
        default_factory=lambda data: f"a photo of a {{{'token' if _fitted(data) else 'name'}}} {{metaclass}}",
        description="template with {name}, {metaclass}, {noun}, {token}, {caption}. By default a photo of a {token} "
        "{metaclass} for diff_ (released code), a photo of a {name} {metaclass} for real_; give one without "
        "{metaclass} where classes have none")
    negative: str = Field("", description="negative prompt (paper: empty)")
    steps: int = Field(25, ge=1, le=999, description="solver steps of the whole schedule (paper: 25)")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale (released code: 7.5)")
    solver: sampling.Solver = Field("dpmpp_2m", description="dpmpp_2m (paper), ddim or unipc")
    spacing: sampling.Spacing | None = Field(None, description="where the steps lie; null: as the weights were "
                                             "shipped; of Stable Diffusion 1.x and 2.x linspace, for ddim leading")

    _plain: Img2Img | Text2Img = PrivateAttr()  # the method that samples

    @field_validator("targets")
    @classmethod
    def _fit_the_variant(cls, targets: str, info: ValidationInfo) -> str:
        if targets == "uniform" and _kind(info.data) == "aug":
            raise ValueError("aug paints a class over images of its own, so the references decide it; leave targets "
                             "out, and set references: class_uniform for uniform classes")
        if targets == "fill" and info.data.get("quota"):
            raise ValueError("fill says itself how many samples a class gets; leave quota out, or set targets: "
                             "balanced")
        return targets

    @field_validator("pairing", "referable_classes")
    @classmethod
    def _limits_a_free_target(cls, value: Any, info: ValidationInfo) -> Any:
        free = _kind(info.data) == "mix" and info.data.get("targets") == "uniform"
        if value not in (None, "all") and {"variant", "targets"} <= info.data.keys() and not free:
            raise ValueError("limits which target a reference may get, and only mix with targets: uniform leaves that "
                             "open; leave it out, or change those")
        return value

    @field_validator("prompt")
    @classmethod
    def _has_no_token_without_adapter(cls, prompt: str, info: ValidationInfo) -> str:
        if "variant" in info.data and not _fitted(info.data) and "token" in placeholders(prompt):
            raise ValueError(f"{info.data['variant']} samples from the weights as they are, which know no {{token}}; "
                             "write {name}, or choose the diff_ variant")
        return prompt

    @field_validator("steps")
    @classmethod
    def _runs_a_step(cls, steps: int, info: ValidationInfo) -> int:
        for strength in info.data.get("strengths", ()) if _kind(info.data) != "gen" else ():
            sampling.steps_run(strength, steps)
        return steps

    @model_validator(mode="after")
    def _samples(self) -> DiffMix:
        shared = {name: getattr(self, name) for name in ("negative", "steps", "guidance_scale", "solver", "spacing")}
        self._plain = Text2Img(prompt="", **shared) if self._from_noise else Img2Img(
            prompt="", strength=self.strengths[0], **shared)
        return self

    @property
    def _from_noise(self) -> bool:
        return _kind(vars(self)) == "gen"

    @property
    def _tied(self) -> bool:
        """Whether the target is the class of the reference."""
        return _kind(vars(self)) == "aug" or self.targets == "reference"

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        return self._plain.expand(batch, tools)

    def needs(self) -> frozenset[str]:
        return frozenset({"prior", "adapter"} if _fitted(vars(self)) else {"prior"}) | prompt_needs(self.prompt)

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        """Raises UsageError where the classes cannot be prompted, paired or filled as the fields ask."""
        classes, counts_K = index.classes, np.array(index.classes.count)
        for label in np.flatnonzero(counts_K) if self._tied else range(len(classes)):
            format_prompt(self.prompt, int(label), classes)
        if self._limited:
            self._allowed(classes, rng.run_seed, rng.method)
        amount_K = self.amounts(counts_K, rng)
        if amount_K is not None and not amount_K.any():
            raise UsageError("method.targets: fill has nothing to fill, for every class has as many images as the "
                             "largest; use uniform or balanced")
        if amount_K is not None and self._tied:
            if self.references == "stratified" or (amount_K[counts_K == 0] > 0).any():  # which quota_copies refuses
                return quota_copies(index, amount_K, rng)
            return _counted(_in_classes(index, np.repeat(np.arange(len(classes)), amount_K), rng), index)
        rows = round(self.ratio * len(index)) if amount_K is None else int(amount_K.sum())
        return _references(self.references, index, rows, rng)

    def amounts(self, counts_K: np.ndarray, rng: PlanRng) -> np.ndarray | None:
        """int64 (K,): rows of each target class, None where only the number of all rows is given."""
        if self.targets == "fill":
            return np.asarray(counts_K.max() - counts_K, np.int64)
        if self.quota is not None:
            return np.full(len(counts_K), self.quota)
        if self.targets != "balanced":
            return None
        rows = round(self.ratio * int(counts_K.sum()))
        able = np.flatnonzero(counts_K) if self._tied else np.arange(len(counts_K))
        each, rest = divmod(rows, len(able))
        amount_K = np.zeros(len(counts_K), np.int64)
        amount_K[able] = each
        amount_K[rng.dataset("balance").permutation(able)[:rest]] += 1
        return amount_K

    def no_allocation(self) -> str:
        return (f"gives every target class its number of samples already (targets: {self.targets})"
                if self.targets in ("balanced", "fill") else "")

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        target = self._target(label, row, classes, rng)
        strength, run = 1.0, self.steps
        if not self._from_noise:
            strength = self.strengths[int(rng("strength").integers(len(self.strengths)))]
            run = sampling.steps_run(strength, self.steps)
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=target,
                    prompt=format_prompt(self.prompt, target, classes), negative=self.negative,
                    start=Start.NOISE if self._from_noise else Start.IMAGE, strength=strength, steps_run=run,
                    attempt=0, row=row, group=copy)

    def _target(self, label: int, row: int, classes: ClassTable, rng: RowRng) -> int:
        if self._tied:
            return label
        if self.targets in ("balanced", "fill"):
            return int(_dealt(self, classes.count, rng.run_seed, rng.method)[row])
        if not self._limited:
            return int(rng("target").integers(len(classes)))
        able = self._allowed(classes, rng.run_seed, rng.method)[label]
        return able[int(rng("target").integers(len(able)))]

    @property
    def _limited(self) -> bool:
        return self.pairing != "all" or self.referable_classes is not None

    def _allowed(self, classes: ClassTable, run_seed: int, method: str) -> tuple[tuple[int, ...], ...]:
        metaclass = classes.metaclass if self.pairing == "same_metaclass" else None
        return partners(classes.count, metaclass, self.referable_classes, run_seed, method)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return self._plain.batch_key(draw)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   gamma: float = GAMMA, soft_scaler: float = 1.0, **recipe: float) -> np.ndarray:
        """float32 (B, K): s^gamma at the target, 1 - s^gamma at the reference, with 0^0 = 1, times `soft_scaler`.

        Paper, equation 3, read with table 6 and the released code: its indices are the other way round. gamma 0.5 is
        the paper's, 0.1 its advice for few images; the released code sums labels to 0.9 in some settings.
        Raises UsageError for a gamma or scaler without meaning.
        """
        if gamma < 0 or not 0 < soft_scaler <= 1:
            raise UsageError(f"soft_label: gamma {gamma:g} must be 0 or more and soft_scaler {soft_scaler:g} in (0, 1]")
        weight_B = np.asarray(strength, np.float64) ** gamma
        y_BK, rows = np.zeros((len(target), n_classes)), np.arange(len(target))
        y_BK[rows, source] += 1 - weight_B
        y_BK[rows, target] += weight_B
        return (soft_scaler * y_BK).astype(np.float32)


    def label_words(self) -> str:
        if _kind(vars(self)) != "mix" or self._tied or set(self.strengths) == {1.0}:
            return ""  # the target alone
        return (f"A sample was painted over an image of class `source_label` as class `label`, by a share s of the "
                "schedule, which is in `strength`. The class `label` has the weight s^gamma and `source_label` the "
                f"weight 1 - s^gamma, with gamma = {GAMMA:g} as in the paper; where they are one class, its weight is "
                "1. `label` alone names the class that was painted.")


def _kind(fields: Mapping[str, Any]) -> str:
    """gen, aug or mix."""
    return str(fields.get("variant", "")).rpartition("_")[2]


def _fitted(fields: Mapping[str, Any]) -> bool:
    return str(fields.get("variant", "")).startswith("diff")


@lru_cache(maxsize=2)
def partners(count: tuple[int, ...], metaclass: tuple[str, ...] | None, referable: int | None, run_seed: int,
             method: str) -> tuple[tuple[int, ...], ...]:
    """Target classes that each reference class may get, by label; () for a class without seeds.

    With `metaclass`, pairs share it. With `referable`, each target is in the lists of so many references, or of all
    where its metaclass has fewer: a random graph in which the lists of two references differ in length by one at most,
    and not at all where the numbers divide. So where all references are as likely, all targets are. Raises UsageError.
    """
    groups: dict[str, list[int]] = {}
    for label in range(len(count)):
        groups.setdefault(metaclass[label] if metaclass else "", []).append(label)
    chosen, able = PlanRng(run_seed, method).dataset("pairs"), [list[int]() for _ in count]
    for word, members in groups.items():
        references = np.array([label for label in members if count[label]])
        if metaclass and (not word or not len(references)):
            raise UsageError(f"method.pairing: same_metaclass cannot pair {len(members)} classes " + (
                f"of the metaclass '{word}', which have no seed" if word else "without a metaclass")
                + f", such as label {members[0]}; give them one in the class mapping file, or set pairing: all")
        if not metaclass and (referable or 0) > len(references):
            raise UsageError(f"method.referable_classes: {referable} asked, but only {len(references)} classes have "
                             "seeds; lower it")
        listed = np.zeros(len(references), np.int64)
        for target in chosen.permutation(members).tolist():
            taken = np.lexsort((chosen.random(len(references)), listed))[:referable]  # the least listed, drawn by lot
            listed[taken] += 1
            for label in references[taken].tolist():
                able[label].append(target)
    return tuple(tuple(sorted(targets)) for targets in able)


@lru_cache(maxsize=2)
def _dealt(method: DiffMix, count: tuple[int, ...], run_seed: int, name: str) -> np.ndarray:
    """int32 (N,): target of every row of a plan, the exact amounts in a random order."""
    rng = PlanRng(run_seed, name)
    amount_K = method.amounts(np.array(count), rng)
    assert amount_K is not None
    return rng.dataset("targets").permutation(np.repeat(np.arange(len(count), dtype=np.int32), amount_K))


def _references(how: str, index: SeedIndex, rows: int, rng: PlanRng) -> np.ndarray:
    """uint16[n]: exactly `rows` copies, of seeds whatever their class."""
    n, chosen = len(index), rng.dataset("references")
    if how == "stratified":
        return _counted(np.concatenate([np.tile(np.arange(n), rows // n), _spread(index, rng)[:rows % n]]), index)
    if how == "image_uniform":
        return _counted(chosen.integers(n, size=rows), index)
    present = np.unique(index.labels)
    return _counted(_in_classes(index, present[chosen.integers(len(present), size=rows)], rng), index)


def _spread(index: SeedIndex, rng: PlanRng) -> np.ndarray:
    """int64[n]: all seeds in an order whose first m have about m n_c / n of each class c, so that more rows contain
    fewer: systematic sampling in each class, with starts spread over the classes, which keeps the share of many classes
    of one seed too."""
    counts_K = np.bincount(index.labels, minlength=len(index.classes))
    start_K = (rng.dataset("starts").permutation(len(counts_K)) + 0.5) / len(counts_K)
    rank = rank_in_class(index.labels, rng.per_seed("copies", index.seed_ids))
    return np.argsort((rank + start_K[index.labels]) / counts_K[index.labels], kind="stable")


def _in_classes(index: SeedIndex, classes_N: np.ndarray, rng: PlanRng) -> np.ndarray:
    """int64 (N,): a seed of each class in `classes_N`, uniform among those of the class."""
    order = np.argsort(index.labels, kind="stable")
    counts_K = np.bincount(index.labels, minlength=len(index.classes))
    first_K = np.cumsum(counts_K) - counts_K
    place_N = (rng.dataset("members").random(len(classes_N)) * counts_K[classes_N]).astype(np.int64)
    return order[first_K[classes_N] + place_N]


def _counted(seeds_N: np.ndarray, index: SeedIndex) -> np.ndarray:
    """uint16[n]: how often each seed was chosen."""
    copies = np.bincount(seeds_N, minlength=len(index))
    if copies.max(initial=0) > MAX_COPIES:
        raise UsageError(f"at most {MAX_COPIES} copies of one seed can be planned, got {copies.max()}")
    return copies.astype(np.uint16)
