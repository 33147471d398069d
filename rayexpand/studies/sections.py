"""Sections of a study file: arms, expansions, samples; what is wrong with one of them by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import signature
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rayexpand.artifacts.adapter import adapter_fits, may_adapt
from rayexpand.classifier.seed_mixing import SeedMix
from rayexpand.contract.protocols import Method
from rayexpand.contract.settings import Later, Section
from rayexpand.data.seeds import DataConfig
from rayexpand.evaluation.evaluate import DistanceConfig
from rayexpand.fitting.adapter.config import AdapterFit
from rayexpand.fitting.captions import CaptionsFit
from rayexpand.fitting.config import fit_config
from rayexpand.fitting.guide import GuideFit
from rayexpand.runs.config import RunConfig
from rayexpand.runs.inputs import no_effect
from rayexpand.studies.priors import PriorFit
from rayexpand.studies.rounds.config import RoundsConfig

REPEATED = "original repeated"  # how controls are called
OVERSAMPLE = 2.5  # times as many unguided samples as guided ones, of which a control keeps as many (ours)


class ArmConfig(Section):
    name: str = Field(min_length=1, description="what tables and figures call it")
    use: str | tuple[str, ...] | None = Field(None, description="name of an expansion, or several, whose samples are "
                                              "taken together; null: real rows only")
    ratio: int | float | list[int | float] | None = Field(
        None, description="only the first so many copies of each seed; 2.5 takes the third copy of half of each class, "
        "rounded down; a list makes one arm of each; null: all")
    rounds: Annotated[int | list[int] | None, Later(None)] = Field(
        None, description="of an expansion in rounds: only the samples of the first so many; a list makes one arm of "
        "each; null: all")
    real: float = Field(1.0, ge=0, description="how often each real row is used per epoch; 0: synthetic only")
    weight: float = Field(1.0, gt=0, description="the same for synthetic rows")
    replace: float | None = Field(None, ge=0, le=1, description="instead of the union: probability that a real row is "
                                  "replaced by a synthetic one (Diff-Mix)")
    draw: Literal["uniform", "inverse_freq", "own"] = Field(
        "uniform", description="with replace: any synthetic row; inverse_freq: first a class, rare ones more often "
        "(Diff-Mix, long tail); own: a sample of the very row that it replaces, which stays where it has none "
        "(DA-Fusion)")
    fill: bool = Field(False, description="of each class only as many synthetic rows as bring it to the size of the "
                       "largest real class (SYNAuG)")
    selection: str | None = Field(None, description="a decision in selections/ of the expansion; only rows it keeps. "
                                  "One of `selections` the study makes; for another of a run the study makes, `select` "
                                  "it when `train` asks for it, and train again")
    soft_label: dict[str, float] = Field({}, description="arguments of the method's soft label, such as gamma")
    mix: Annotated[SeedMix | None, Later(None)] = Field(
        None, description="mix samples with a real image as they are trained (DiffCoRe-Mix); {}: with their own seeds, "
        "pixel or patch at even odds; null: not. Controls are not mixed")
    recipe: dict[str, Any] = Field({}, description="recipe fields of this arm alone")
    control: bool = Field(True, description="also train on the real rows repeated to as many rows, and, with an "
                          "expansion in rounds, on as many samples that were made otherwise")

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of its expansions."""
        return () if self.use is None else (self.use,) if isinstance(self.use, str) else self.use

    @property
    def group(self) -> str:
        """What its expansions are called together; "" for real rows only."""
        return " + ".join(self.uses)

    @field_validator("ratio")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """5.0 is 5, in names too."""
        if isinstance(value, list):
            return [cls._whole(one) for one in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value


class ExpansionFit(Section):
    """What is made before a run expands the real rows of a seed, from those very rows; `pretrain` from its own data."""

    guide: GuideFit | None = Field(None, description="train a guide; null: the one the run configuration names")
    groups: int = Field(3, ge=1, description="prototypes of each class (DistDiff: 3)")
    adapter: AdapterFit | None = Field(None, description="fine-tune the generator, in the process that drives the "
                                       "study; null: the one the run configuration names")
    captions: Annotated[CaptionsFit | None, Later(None)] = Field(
        None, description="where captions come from; null: the artifact the run configuration names")
    pretrain: Annotated[PriorFit | None, Later(None)] = Field(
        None, description="train the generator, from nothing; null: the one the run configuration names")


class ExpansionConfig(Section):
    run: str | None = Field(None, description="folder of an existing run; {seed} stands for the study's seed")
    config: dict[str, Any] | None = Field(None, description="a run configuration without name, out and data, which "
                                          "the study gives")
    fit: ExpansionFit | None = Field(None, description="with a run configuration: fit what its method and its judge "
                                     "need, for each seed on its own real rows; {} for prototypes of the guide as it "
                                     "is")
    rounds: Annotated[RoundsConfig | None, Later(None)] = Field(
        None, description="with a run configuration: make its samples in rounds, as a loop file says")
    oversample: Annotated[float, Later(OVERSAMPLE)] = Field(
        OVERSAMPLE, gt=1, description="with guided rounds: the control that keeps the samples of highest entropy makes "
        "so many times as many")


class SamplesConfig(DistanceConfig):
    """What every arm's samples are compared with, beside the classifier that they train."""

    reference: DataConfig | None = Field(None, description="real images that the samples of every arm are compared "
                                         "with; null: the test images")
    real: DataConfig | None = Field(None, description="other real images, as many as an arm has samples, that are "
                                    "compared with them too: what the scores of real images are. null: none")


def ratio_problems(arm: ArmConfig) -> list[str]:
    ratios = ratios_of(arm)
    problems = [f"ratio: {one} copies of each seed are none to train on; give more than 0, or leave `use` out"
                for one in ratios if not 0 < one < math.inf]
    if len(set(ratios)) < len(ratios):
        problems.append(f"ratio: {ratios} gives a value twice, which would be one arm twice; give each once")
    return problems if ratios or arm.ratio is None else ["ratio: an empty list makes no arm; give ratios, or null"]


def round_problems(arm: ArmConfig, expansions: Mapping[str, ExpansionConfig], *, compared: bool) -> list[str]:
    """What is wrong with the rounds of an arm, and what cannot be done with samples that lie in several runs.
    `compared`: the study compares samples with real images."""
    loops = {name: one.rounds for name in arm.uses
             if (one := expansions.get(name)) is not None and one.rounds is not None}
    asked, problems = rounds_of(arm), list[str]()
    if asked and arm.uses and not loops:
        problems.append(f"rounds: {arm.group} is not made in rounds; give it a section rounds, or say ratio")
    if arm.rounds == [] or len(set(asked)) < len(asked):
        problems.append(f"rounds: {asked} must name rounds, each once")
    problems += [f"ratio: {name} is made in rounds, so how many samples are taken is said by rounds; take it out"
                 for name in loops if arm.ratio is not None]
    problems += [f"rounds: {one} asked for, and {name} has 1 to {rounds.count}" for name, rounds in loops.items()
                 for one in asked if not 1 <= one <= rounds.count]
    problems += [f"{field}: is made of one run, and {name} is several, its rounds; take it out" for name in loops
                 for field in ("selection", "fill") if getattr(arm, field)]
    problems += [f"use: `samples` compares what one run made, and {name} is several, its rounds; take `samples` out"
                 for name in loops if compared]
    return problems


def rounds_of(arm: ArmConfig) -> list[int]:
    return arm.rounds if isinstance(arm.rounds, list) else [] if arm.rounds is None else [arm.rounds]


def ratios_of(arm: ArmConfig) -> list[int | float]:
    return arm.ratio if isinstance(arm.ratio, list) else [] if arm.ratio is None else [arm.ratio]


def unknown_soft_labels(arm: ArmConfig, methods: Sequence[Method]) -> list[str]:
    """Arguments that the soft label of none of these methods has."""
    columns = ("source", "target", "strength", "n_classes")
    known = [name for method in methods for name, one in signature(method.soft_label).parameters.items()
             if name not in columns and one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return [f"soft_label.{key}: " + (f"did you mean '{near[0]}'?" if (near := get_close_matches(key, known, n=1)) else
                                     f"unknown, the soft label of {' and '.join(one.name for one in methods)} takes "
                                     f"{', '.join(known) or 'no arguments; take it out'}")
            for key in arm.soft_label if methods and key not in known]


def fit_problems(made: RunConfig, fit: ExpansionFit) -> list[str]:
    """What the fit of an expansion cannot mean for its run, one line each."""
    wanted, problems = fit_config(made, fit.guide, fit.adapter, fit.captions), []
    if fit.pretrain is not None:
        if "prior" not in made.needs:
            problems.append(f"fit.pretrain: {made.method.name} samples without a generator; take it out")
        elif "weights" in made.prior.model_fields_set:
            problems.append(f"prior.weights: {made.prior.weights} would not be read, for fit.pretrain trains the "
                            "generator; take one of the two out")
    if fit.adapter is not None and not ("adapter" in made.needs or may_adapt(made.method)):
        problems.append(f"fit.adapter: {no_effect(made.method, 'adapter')}")
    if wanted is None:
        return problems if problems or fit.pretrain is not None else [
            f"fit: {made.method.name} as it is set here needs nothing fitted; take it out"]
    problems += [f"artifacts.{kind}: {folder} would not be read, for fit makes them of each seed's own rows; take one "
                "of the two out" for kind, folder in made.artifacts.items() if getattr(wanted.fit, kind)]
    problems += [f"fit.{role}: has no effect on {made.method.name} as it is set here; take it out"
                 for role in ("guide", "captions") if getattr(fit, role) and getattr(wanted.fit, role) is None]
    if fit.adapter is None or wanted.fit.adapter is None:
        return problems
    recipe, plain = fit.adapter.finetune, AdapterFit()
    first = "run `rayexpand fit` first, in a file of its own, and name the folder it prints in "
    if spread := [field for field in ("workers", "cpus_per_worker", "gpus_per_worker", "loaders")
                  if getattr(fit.adapter, field) != getattr(plain, field)]:
        problems.append(f"fit.adapter.{spread[0]}: a study fine-tunes in its own process, so {', '.join(spread)} would "
                        f"have no effect; take it out, or {first}artifacts.adapter")
    if recipe.strategy == "full":
        return [*problems, "fit.adapter.recipe.strategy: full makes a whole generator, and this method samples with an "
                f"adapter; {first}prior.weights"]
    return problems + [f"fit.adapter.recipe: {line}" for line in adapter_fits(
        made.method, recipe.strategy, recipe.visual_token, "it")]
