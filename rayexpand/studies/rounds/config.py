"""What a loop file says, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract import settings
from rayexpand.contract.errors import ConfigError
from rayexpand.contract.settings import Section
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig, renamed
from rayexpand.fitting.scores import Scoring, scoring_problems
from rayexpand.loader.config import TrainingConfig
from rayexpand.methods import load_method
from rayexpand.methods._copies import MAX_COPIES
from rayexpand.runs import config as configs
from rayexpand.runs import run as runs
from rayexpand.runs.allocation import READS, Allocate
from rayexpand.runs.config import ClusterConfig, GuideConfig, RunConfig
from rayexpand.storage.places import is_url

LoopRule = Literal["uniform", "equal", "loss", "confidence", "entropy", "margin", "slow", "class"]
OF_THE_LOOP = "of the loop"  # where an Allocate of a round has its scores


class StopConfig(Section):
    """When rounds end early: no gain in what classifiers get right."""

    on: Literal["folds", "validation"] = Field("folds", description="folds: the seeds, each by the classifier that was "
                                               "trained without it; validation: the images of rounds.validation")
    min_gain: float = Field(0.5, description="points: stop where the upper end of the 95 % interval of the gain over "
                            "the best earlier round is below it")
    patience: int = Field(1, ge=1, description="for so many rounds one after the other")


class RoundsConfig(Section):
    count: int = Field(3, ge=1, le=9999, description="rounds at most")
    shares: list[float] | None = Field(None, min_length=1, description="parts of the budget, such as [1, 1, 2]; more "
                                       "than `count` of them leave some unspent. null: equal ones")
    floor: float = Field(0.0, ge=0, le=1, description="share of each round that is dealt evenly over classes before "
                         "the rule counts")
    cap: int | None = Field(None, ge=1, le=MAX_COPIES, description="most samples of one seed over all rounds; null: "
                            f"{MAX_COPIES:,}")
    rule: LoopRule = Field("uniform", description="who gets the samples of a round, as in `allocate`. Rules that read "
                           "scores begin with round 2; round 1 is uniform")
    share: float | None = Field(None, gt=0, le=1, description="with margin and slow: of the seeds")
    per: Literal["class", "all"] = Field("class", description="with margin and slow: take the share in each class, or "
                                         "of all seeds at once")
    permuted: bool = Field(False, description="control: the weights of the rule, handed to other seeds by a key")
    scores: Scoring = Scoring()
    guided_from: int | None = Field(None, ge=1, description="first round whose method is guided by a classifier that "
                                    "was trained on all there is; rounds before have omega 0. null: never")
    guide: dict[str, Any] | None = Field(None, description="recipe of that classifier; null: that of scores")
    validation: DataConfig | None = Field(None, description="real images that rounds are compared on; never trained "
                                          "on, never test images")
    stop: StopConfig | None = Field(None, description="end early; null: spend all shares")

    @field_validator("shares")
    @classmethod
    def _are_parts(cls, shares: list[float] | None) -> list[float] | None:
        if shares is not None and not all(0 < one < float("inf") for one in shares):
            raise ValueError("every part must be a number above 0")
        return shares

    @field_validator("guide")
    @classmethod
    def _is_a_recipe(cls, recipe: dict[str, Any] | None) -> dict[str, Any] | None:
        make_recipe(recipe or {})
        return recipe

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> RoundsConfig:
        _ = self.allocate  # raises what is wrong between rule, share and permuted
        if self.shares is not None and len(self.shares) < self.count:
            raise ValueError(f"shares: {len(self.shares)} parts for {self.count} rounds; give one for each, or lower "
                             "count")
        if self.guided_from is not None and self.guided_from > self.count:
            raise ValueError(f"guided_from: there are {self.count} rounds, so none would be guided; lower it, or leave "
                             "it out")
        on_validation = self.stop is not None and self.stop.on == "validation"
        if on_validation != (self.validation is not None):
            raise ValueError("validation: is missing; stop.on: validation compares rounds on it" if on_validation else
                             "validation: has no effect without stop: {on: validation}; take it out")
        if self.scores_seeds and self.scores.folds == 1 and self.stop is not None and self.stop.on == "folds":
            raise ValueError("stop.on: folds compares seeds that were held out, and with scores.folds: 1 none is; "
                             "raise scores.folds, or compare on validation")
        if self.count == 1 and READS[self.rule]:
            raise ValueError(f"rule: {self.rule} reads scores, and rules that do begin with round 2; raise count, or "
                             "make one run with `allocate` and scores of `rayexpand fit`")
        unused = {"guide": self.guide is not None and not self.trains_guide,
                  "stop": self.stop is not None and self.count == 1,
                  "scores": self.scores != Scoring() and not (
                      self.scores_seeds or (self.guide is None and self.trains_guide))}
        for field, is_unused in unused.items():
            if is_unused:
                raise ValueError(f"{field}: has no effect here; take it out")
        return self

    @property
    def allocate(self) -> Allocate:
        """The section `allocate` that each round is dealt by."""
        return Allocate(rule=self.rule, scores=OF_THE_LOOP if READS[self.rule] else None, share=self.share,
                        per=self.per, floor=self.floor, cap=self.cap or MAX_COPIES, permuted=self.permuted)

    @property
    def scores_seeds(self) -> bool:
        """Whether seeds are scored between rounds."""
        return self.count > 1 and (bool(READS[self.rule]) or (self.stop is not None and self.stop.on == "folds"))

    def share_of(self, used: int | None) -> float:
        """The part of the budget that so many rounds spend; None: all that are made."""
        shares = self.shares or [1.0] * self.count
        return sum(shares[:self.count if used is None else min(used, self.count)]) / sum(shares)

    @property
    def trains_guide(self) -> bool:
        """Whether a classifier is trained on everything there is."""
        return self.guided_from is not None or (self.stop is not None and self.stop.on == "validation")

    @property
    def guide_recipe(self) -> dict[str, Any]:
        return self.scores.recipe if self.guide is None else self.guide


class LoopConfig(Section):
    """A loop: a run whose samples are made in rounds."""

    run: RunConfig = Field(description="a run as `expand` takes it, or the path of its file; its method says how many "
                           "samples there are in all")
    rounds: RoundsConfig
    training: TrainingConfig = Field(TrainingConfig(), description="where classifiers are trained between rounds")

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def folder(self) -> str:
        return self.run.folder

    @property
    def cluster(self) -> ClusterConfig:
        return self.run.cluster

    def of_round(self, number: int) -> RunConfig:
        """The run that a round is, but for its guide."""
        method = self.run.method
        if self.rounds.guided_from is not None and number < self.rounds.guided_from:
            method = method.model_copy(update={"omega": 0.0})
        return self.run.model_copy(update={"name": f"{number:04d}", "out": f"{self.folder}/rounds", "method": method})


def load_loop(path: str | Path, overrides: Sequence[str] = ()) -> LoopConfig:
    """Loop of a YAML file with `a.b=value` overrides. Raises ConfigError with all mistakes."""
    raw = settings.read(path, overrides)
    raw.pop("kind", None)
    return parse_loop(raw, str(path))


def run_in(value: Any) -> Any:
    """The run of a loop, written out where it is the path of a file."""
    return {key: one for key, one in settings.read(value).items() if key != "kind"} if isinstance(value, str) else value


def parse_loop(raw: Mapping[str, Any], where: str = "loop") -> LoopConfig:
    """Loop of a mapping. Raises ConfigError with every mistake of every section; nothing heavy is loaded."""
    fields, problems = {str(key): value for key, value in raw.items()}, list[str]()
    if isinstance(run := run_in(fields.pop("run", None)), Mapping):
        try:
            run = configs.parse(run, "run")
        except ConfigError as error:
            run, problems = None, [f"run.{line}" for line in error.problems]
    elif not isinstance(run, RunConfig):
        problems.append("run: must be a section with the run, or the path of its file")
    try:
        config = LoopConfig(run=run, **fields)
    except ValidationError as error:
        found = settings.mistakes(error, LoopConfig, "")
        raise ConfigError(where, problems + [line for line in found if not line.startswith("run:")]) from error
    if problems := problems + contradictions(config):
        raise ConfigError(where, problems)
    return config


def resolved_loop(config: LoopConfig) -> dict[str, Any]:
    """Every field with its value, as plain JSON data."""
    return config.model_dump(mode="json")


def contradictions(config: LoopConfig) -> list[str]:
    """What the run and its rounds cannot mean together."""
    run, rounds, problems = config.run, config.rounds, list[str]()
    if run.allocate is not None:
        problems.append("run.allocate: rounds.rule says who gets the samples; take the section out")
    if run.grow:
        problems.append("run.grow: a loop grows by its rounds; take it out")
    if why := getattr(run.method, "no_allocation", lambda: "")():
        problems.append(f"run.method: {run.method.name} {why}; a loop deals them, so choose another setting or method")
    if rounds.guided_from is not None:
        if not hasattr(run.method, "omega"):
            problems.append(f"rounds.guided_from: {run.method.name} cannot be guided by the classifier of a loop; use "
                            "method practice, or take it out")
        elif not run.method.omega:
            problems.append("run.method.omega: 0 guides nothing; raise it, or take rounds.guided_from out")
        if run.guide != GuideConfig():
            problems.append(f"run.guide.weights: {run.guide.weights} would not be read, for the loop trains the guide; "
                            "take it out, or rounds.guided_from")
        if is_url(run.out):
            problems.append(f"run.out: a guide is read as files, and {run.out} is an object store; give a folder, or "
                            "take rounds.guided_from out")
    return problems


def loop_preflight(config: LoopConfig, *, device_here: bool = True, begun: bool = False) -> list[str]:
    """Everything wrong that can be known without loading a model, one line each. `begun`: its first round has a
    plan."""
    problems = [f"run.{line}" for line in runs.preflight(config.of_round(1), device_here=device_here, planned=begun)]
    if config.rounds.scores_seeds:
        problems += [f"rounds.scores.{line}" for line in scoring_problems(config.rounds.scores, config.run.data)]
    if config.rounds.validation is not None:
        problems += renamed(seeds.check(config.rounds.validation), "rounds.validation")
    return problems


def with_fields(config: RunConfig, method: Mapping[str, Any], guide: str | None) -> RunConfig:
    """The run of a round with the method fields and the guide that its decision names."""
    fields = {key: value for key, value in method.items() if key != "name"}
    updates: dict[str, Any] = {"method": load_method(str(method["name"]), fields)}
    if guide is not None:
        updates["guide"] = config.guide.model_copy(update={"weights": guide})
    return config.model_copy(update=updates)
