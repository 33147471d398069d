"""What a study file says: data, subset, arms, expansions, training. Reading it, and every mistake in it at once.

study.py makes a study of it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator

from rayexpand.classifier.recipe import Recipe, make_recipe
from rayexpand.contract import settings
from rayexpand.contract.errors import ConfigError, looked_at
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import Later, Section
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig, renamed
from rayexpand.data.subsets import SubsetConfig
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation import select as selecting
from rayexpand.evaluation.evaluate import metric_problems
from rayexpand.evaluation.features import ExtractorConfig
from rayexpand.evaluation.select_rules import BY_GUIDE
from rayexpand.fitting.config import fit_config
from rayexpand.fitting.config import preflight as fit_preflight
from rayexpand.loader.config import TrainingConfig
from rayexpand.models.folders import unreadable
from rayexpand.models.prior import facts_to_come
from rayexpand.runs import config as configs
from rayexpand.runs import run as runs
from rayexpand.runs.config import DIGITS, ClusterConfig, EstimateConfig, RunConfig, guide_of_run, not_named
from rayexpand.studies import baselines, extra_tests
from rayexpand.studies.baselines import Baseline
from rayexpand.studies.extra_tests import ExtraTest
from rayexpand.studies.priors import prior_problems
from rayexpand.studies.rounds.config import LoopConfig, contradictions
from rayexpand.studies.sections import (
    OVERSAMPLE,
    REPEATED,
    ArmConfig,
    ExpansionConfig,
    SamplesConfig,
    fit_problems,
    ratio_problems,
    round_problems,
    unknown_soft_labels,
)
from rayexpand.studies.value_config import ValueArm, ValueConfig, ValuePrices, used_by, value_arms, value_problems


class StudyConfig(Section):
    OLD_NAMES: ClassVar = {"also": "extra_tests"}

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the study's folder is <out>/<name>")
    out: str = Field("runs", min_length=1)
    data: DataConfig = Field(description="the real images the subsets are taken from")
    subset: SubsetConfig = SubsetConfig()
    test: DataConfig = Field(description="images every arm is tested on; never trained on")
    extra_tests: dict[str, ExtraTest] = Field({}, description="further test sets by name, which every finished "
                                              "classifier is tested on once")
    frequency: tuple[int, int] = Field((5, 20), description="classes with fewer real images than the first are `few`, "
                                       "with more than the second `many`: CUB-LT; Flower-LT: [10, 30]")
    samples: Annotated[SamplesConfig | None, Later(None)] = Field(
        None, description="compare the samples of every arm with real images: coverage, distance. {}: with the test "
        "images, by everything; null: not")
    validation: DataConfig | None = Field(None, description="images a sweep chooses by, so that it does not choose by "
                                          "the test")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="repetitions; three or more for error bars")
    recipe: dict[str, Any] = Field({}, description="preset and fields of the training recipe")
    expansions: dict[str, ExpansionConfig] = Field({}, description="runs the arms use, by name")
    selections: Annotated[dict[str, dict[str, Any]], Later({})] = Field(
        {}, description="decisions by name that arms ask for in `selection` and the study makes of the runs they use: "
        "the file of `rayexpand select` without name, run and cluster")
    arms: list[ArmConfig] = Field(min_length=1)
    baselines: Annotated[list[Baseline], Later([])] = Field(
        [], description="rows that need no expansion, by their kind or as sections: what a model trained on other "
        "images makes of the same real images")
    value: Annotated[ValueConfig | None, Later(None)] = Field(
        None, description="what one sample is worth in real images; {}: of every expansion, at 1, 2 and 5 samples of "
        "each image; null: not asked")
    price: Annotated[ValuePrices | None, Later(None)] = Field(
        None, description="what an hour and a real image cost, in one currency; with value")
    baseline: str | None = Field(None, description="arm the others are compared with; null: the first")
    resample: bool | None = Field(None, description="expand anew for each seed; null: where the subsets differ")
    vary: Annotated[Literal["all", "classifier", "data"], Later("all")] = Field(
        "all", description="what differs between the seeds. classifier: the real images and the samples are those of "
        "the first seed, so that ± shows the classifier alone; data: the classifier seed is the first one, so that ± "
        "shows the samples, and the real images unless subset.seed names one subset")
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = ClusterConfig()
    estimate: Annotated[EstimateConfig, Later(EstimateConfig())] = Field(
        EstimateConfig(), description="what `rayexpand plan` reckons with; also of the runs that the study makes")

    @field_validator("expansions", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """An expansion may be written as its run configuration (`fit` and others beside it), or as {run: folder}."""
        if not isinstance(value, Mapping):
            return value
        beside = ExpansionConfig.model_fields.keys()
        return {name: one if not isinstance(one, Mapping) or {"run", "config"} & set(one) else
                {"config": {key: field for key, field in one.items() if key not in beside},
                 **{key: field for key, field in one.items() if key in beside}} for name, one in value.items()}

    @field_validator("baselines", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        return baselines.short_form(value)

    @property
    def used(self) -> set[str]:
        """Names of the expansions that arms or baselines use."""
        return {name for arm in self.arms for name in arm.uses} | {one.use for one in self.baselines if one.use} | {
            *used_by(self.value, self.expansions)}

    def value_arms(self, real: Sequence[float] | None = None) -> list[ValueArm]:
        """The arms of the section value; `real`: with these sizes alone."""
        return value_arms(self.value, self.expansions, real)

    @property
    def folder(self) -> str:
        return f"{self.out.rstrip('/')}/{self.name}"


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Study of a YAML file with `a.b=value` overrides. Raises ConfigError with all mistakes."""
    return parse_study(settings.read(path, overrides), str(path))


def parse_study(raw: Mapping[str, Any], where: str = "study") -> StudyConfig:
    """Study of a mapping. Raises ConfigError with every mistake of every section."""
    try:
        config = StudyConfig(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        raise ConfigError(where, settings.mistakes(error, StudyConfig, "")) from error
    problems = [*_arm_problems(config), *_recipe_problems(config), *_expansion_problems(config),
                *value_problems(config.value, config.price, config.expansions, config.subset, config.vary)]
    if problems:
        raise ConfigError(where, problems + study_preflight(config))
    return config


def study_preflight(config: StudyConfig) -> list[str]:
    """Everything wrong that can be known without loading a model or listing a dataset, one line each."""
    if problems := secret_problems(config.model_dump(mode="json")):
        return problems
    problems = [problem for section in ("data", "test", "validation") if (data := getattr(config, section))
                for problem in renamed(seeds.check(data), section)]
    problems += [f"extra_tests.{name}.{line}" for name,
                 one in config.extra_tests.items() for line in extra_tests.problems(one)]
    problems += [f"extra_tests.{name}: corrupted images are shown to the finished classifiers; set training.keep: "
                 "weights" for name, one in config.extra_tests.items()
                 if one.is_corrupted and config.training.keep != "weights"]
    problems += _samples_problems(config) + _baseline_problems(config) + _selection_problems(config)
    files = {file for arm in config.arms if (file := {**config.recipe, **arm.recipe}.get("checkpoint")) is not None}
    problems += [f"recipe.checkpoint: there is no file {file}{looked_at(file)}" for file in sorted(files)
                 if not Path(file).expanduser().is_file()]
    problems += [f"recipe.checkpoint: {line}" for file in sorted(files)
                 if (path := Path(file).expanduser()).is_file() and path.suffix == ".safetensors"
                 for line in unreadable(path)]
    for name, one in config.expansions.items():
        if one.config is None or one.run is not None or {"name", "out", "data", "seed"} & set(one.config):
            continue
        try:
            made = first_run(expansion_config(config, name, one, 0, config.data))
        except ConfigError:
            continue  # parse_study lists its mistakes
        to_come = facts_to_come(one.fit.pretrain, made.prior) if one.fit and one.fit.pretrain else None
        trained = one.fit is not None and one.fit.guide is not None and one.fit.guide.kind != "clip_head"
        given_later = ("data.", "out:", *(("artifacts.prototypes: ", "artifacts.thresholds: ")
                                          if one.fit else ()),
                       *(("artifacts.image_features: ",) if one.fit and made.accept else ()),
                       *(("artifacts.adapter: ", "artifacts.class_features: ", "artifacts.image_features: ")
                         if one.fit and one.fit.adapter else ()),
                       *(("guide.weights: ",) if trained or (one.rounds and one.rounds.guided_from == 1) else ()),
                       *(("artifacts.captions: ",) if one.fit and one.fit.captions else ()),
                       *(("prior.weights: missing",) if to_come else ()))
        problems += _judge_problems(config, name, made)
        problems += [f"expansions.{name}.{line}" for line in runs.preflight(made, device_here=False, prior=to_come)
                     if not line.startswith(given_later) or ": has no effect" in line]
        if one.fit is not None and (wanted := fit_config(made, one.fit.guide, one.fit.adapter,
                                                                one.fit.captions)) is not None:
            problems += [f"expansions.{name}.{line.partition(', or add `')[0]}"  # which a study cannot have there
                         for line in fit_preflight(wanted, device_here=False, on_ray=False)
                         if line.startswith("fit.") and not line.startswith("fit.adapter.features: is missing")]
        if one.fit is not None and one.fit.pretrain is not None:
            problems += [f"expansions.{name}.{line}" for line in prior_problems(made, one.fit.pretrain)]
        if one.rounds is not None and one.rounds.validation is not None:
            problems += renamed(seeds.check(one.rounds.validation), f"expansions.{name}.rounds.validation")
    return problems


def _selection_problems(config: StudyConfig) -> list[str]:
    """What is wrong with decisions the study makes, whatever the run."""
    problems, asked = [], {arm.selection for arm in config.arms}
    for name, raw in config.selections.items():
        if given := sorted({"name", "run", "cluster"} & set(raw)):
            problems.append(f"selections.{name}: {', '.join(given)} come from the study; take them out")
        else:
            _, found = selecting.checked({**raw, "name": name, "run": "of the study"})
            problems += [f"selections.{name}.{line}" for line in found]
        if name not in asked:
            problems.append(f"selections.{name}: no arm asks for it; set it as the `selection` of one, or take it out")
    return problems


def _judge_problems(config: StudyConfig, expansion: str, made: RunConfig) -> list[str]:
    """The problem of decisions by the guide of a run that names none."""
    found = []
    for name in dict.fromkeys(arm.selection for arm in config.arms if expansion in arm.uses):
        chosen, _ = selecting.checked({**config.selections.get(str(name), {}), "name": "x", "run": "of the study"})
        if chosen is not None and chosen.guide is None and chosen.rule.wants() & BY_GUIDE:
            found += guide_of_run(f"selections.{name}.guide.weights", made)
    return found


def _baseline_problems(config: StudyConfig) -> list[str]:
    """What is wrong with the baselines whose recipe can be made; `_recipe_problems` names the others."""
    found = []
    for one in config.baselines:
        with contextlib.suppress(ValueError):
            found += [f"baselines.{one.called}.{line}" for line in baselines.problems(
                one, baselines.recipe_of(one, config.recipe), config.data)]
    return found


def _samples_problems(config: StudyConfig) -> list[str]:
    """What is wrong with `samples` as far as can be known without loading the extractor or listing a dataset."""
    if (wanted := config.samples) is None:
        return []
    problems = [line for name in ("reference", "real") if (data := getattr(wanted, name)) is not None
                for line in renamed(seeds.check(data), f"samples.{name}")]
    problems += [f"arms.{arm.name}.use: `samples` compares what one expansion made; name one, or take `samples` out"
                 for arm in config.arms if len(arm.uses) > 1]
    if not config.used:
        problems.append("samples: no arm uses an expansion, so there are none to compare; take it out")
    if not wanted.extractor.is_named and config.data.source != DIGITS:
        problems.append(not_named("samples.extractor.guide", config.data))
    elif found := extractors.check(wanted.extractor) if wanted.extractor != ExtractorConfig() else []:
        problems += [f"samples.{line}" for line in found]
    else:
        problems += [f"samples.{line}" for line in metric_problems(wanted.metrics, wanted.extractor)]
    return problems


def run_config(config: StudyConfig, name: str, one: ExpansionConfig, seed: int, data: DataConfig) -> RunConfig:
    """The run that an expansion of the study is, for one of its seeds. Raises ConfigError."""
    raw = {**(one.config or {}), "name": f"{name}-{seed}", "out": f"{config.folder}/runs",
           "data": data.model_dump(mode="json"), "seed": seed}
    raw.setdefault("cluster", config.cluster.model_dump(mode="json"))
    return configs.parse(raw, f"expansions.{name}")


def expansion_config(config: StudyConfig, name: str, one: ExpansionConfig, seed: int,
                     data: DataConfig) -> RunConfig | LoopConfig:
    """The run, or the loop, that an expansion of the study is, for one of its seeds. Raises ConfigError."""
    made = run_config(config, name, one, seed, data)
    return made if one.rounds is None else LoopConfig(run=made, rounds=one.rounds, training=config.training)


def first_run(made: RunConfig | LoopConfig) -> RunConfig:
    """The run, or that of the first round, by which is known what is needed before anything is sampled."""
    if isinstance(made, RunConfig):
        return made
    return made.run.model_copy(update={"method": made.of_round(1).method})


def _arm_problems(config: StudyConfig) -> list[str]:
    problems = []
    names = [*(arm.name for arm in config.arms), *(one.called for one in config.baselines)]
    problems += [f"baselines.{one.called}: the name is given twice; every row needs its own, so give `name`"
                 for one in config.baselines if names.count(one.called) > 1]
    problems += [f"baselines.{one.called}.use: '{one.use}' is no expansion; known: "
                 f"{', '.join(config.expansions) or 'none, add a section expansions'}" for one in config.baselines
                 if one.use is not None and one.use not in config.expansions]
    for arm in config.arms:
        where = f"arms.{arm.name}"
        if names.count(arm.name) > 1:
            problems.append(f"{where}: the name is given twice; every arm needs its own")
        problems += [f"{where}.use: '{one}' is no expansion; known: "
                     f"{', '.join(config.expansions) or 'none, add a section expansions'}"
                     for one in arm.uses if one not in config.expansions]
        if arm.use is not None and not isinstance(arm.use, str) and len({*arm.use}) < max(2, len(arm.use)):
            problems.append(f"{where}.use: a list names two expansions or more, each once; write one as it is")
        if arm.use is None:
            plain = ArmConfig(name=arm.name)
            unused = [field for field in ("draw", "fill", "ratio", "replace", "rounds", "selection", "soft_label",
                                          "weight")
                      if getattr(arm, field) != getattr(plain, field)]
            if unused:
                problems.append(f"{where}: {', '.join(unused)} need `use`, the name of an expansion")
            if not arm.real:
                problems.append(f"{where}.real: 0 without `use` leaves nothing to train on")
        problems += [f"{where}.{field}: with replace an epoch is one pass over the real rows; leave {field} at 1"
                     for field in ("real", "weight") if arm.replace is not None and getattr(arm, field) != 1]
        if arm.fill:
            problems += [f"{where}.fill: counts rows of a union in which every row is used once; leave {field} out"
                         for field in ("real", "weight", "replace") if getattr(arm, field) not in (1, None)]
            if len(arm.uses) > 1:
                problems.append(f"{where}.fill: fills each class from one expansion; name one in use")
        if arm.draw != "uniform" and arm.use is not None and arm.replace is None:
            problems.append(f"{where}.draw: says what replaces a real row, and nothing does; give replace, or leave it")
        if arm.name in {one.name for one in config.value_arms()}:
            problems.append(f"{where}: the section value has an arm of this name; rename the arm")
        if arm.name.lower().startswith(REPEATED):
            problems.append(f"{where}: names that start with '{REPEATED}' are those of the automatic controls; rename "
                            "the arm")
        if arm.mix is not None and arm.use is None and arm.mix.partner == "seed":
            problems.append(f"{where}.mix.partner: real rows alone were made from no other image; set partner: class, "
                            "or give `use`")
        problems += [f"{where}.{line}" for line in (
            *ratio_problems(arm), *round_problems(arm, config.expansions, compared=config.samples is not None),
            *_soft_label_problems(config, arm))]
    if config.frequency[0] > config.frequency[1] + 1:
        problems.append(f"frequency: classes would be both few (under {config.frequency[0]}) and many (over "
                        f"{config.frequency[1]}); give the smaller number first")
    problems += [f"extra_tests.{name}: a name is letters, digits, - and _; rename it" for name in config.extra_tests
                 if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)]
    if config.baseline is not None and config.baseline not in names:
        problems.append(f"baseline: '{config.baseline}' is no arm; known: {', '.join(names)}")
    if (config.vary, config.resample) in (("classifier", True), ("data", False)):
        problems.append(f"vary: {config.vary} and resample: {str(config.resample).lower()} contradict each other; take "
                        "resample out")
    if len(set(config.seeds)) < len(config.seeds):
        problems.append("seeds: a seed is given twice; each is one repetition")
    return problems


def _soft_label_problems(config: StudyConfig, arm: ArmConfig) -> list[str]:
    """Arguments that the method's soft label does not have; those of a run that exists are known when it is opened."""
    methods = []
    for name in arm.uses if arm.soft_label else ():
        one = config.expansions.get(name)
        if one is None or one.config is None or not isinstance(one.config.get("method"), Mapping):
            return []
        try:
            methods.append(run_config(config, name, one, 0, config.data).method)
        except ConfigError:
            return []  # listed with the expansion
    return unknown_soft_labels(arm, methods)


def _recipe_problems(config: StudyConfig) -> list[str]:
    problems = []
    for one in config.baselines:
        try:
            baselines.recipe_of(one, config.recipe)
        except ValidationError as error:
            problems += settings.mistakes(error, Recipe, f"baselines.{one.called}.recipe.")
        except ValueError as error:
            problems.append(f"baselines.{one.called}.recipe.{error}")
    for where, own in [("recipe", {}), *((f"arms.{arm.name}.recipe", arm.recipe) for arm in config.arms if arm.recipe)]:
        try:
            make_recipe({**config.recipe, **own})
        except ValidationError as error:
            problems += settings.mistakes(error, Recipe, f"{where}.")
        except ValueError as error:
            problems.append(f"{where}.{error}")
    for arm in config.arms if not problems else []:
        made = make_recipe({**config.recipe, **arm.recipe})
        problems += [f"arms.{arm.name}.recipe.{field}: goes by the real images of each class, and this arm has none; "
                     f"set {field}: 0" for field in ("cmo", "drw") if getattr(made, field) and not arm.real]
    return problems


def _expansion_problems(config: StudyConfig) -> list[str]:
    problems = []
    for name, one in config.expansions.items():
        where = f"expansions.{name}"
        if (one.run is None) == (one.config is None):
            problems.append(f"{where}: give a run configuration, or run: <folder of a run>")
        elif one.run is not None and (unused := [field for field in ("fit", "rounds") if getattr(one, field)]):
            problems.append(f"{where}.{unused[0]}: has no effect on a run that exists; take it out")
        elif one.config is not None:
            if given := sorted({"name", "out", "data", "seed"} & set(one.config)):
                problems.append(f"{where}: {', '.join(given)} come from the study; take them out")
                continue
            try:
                made = expansion_config(config, name, one, 0, config.data)
            except ConfigError as error:
                problems += [f"{where}.{line}" for line in error.problems]
                continue
            problems += [f"{where}.{line}" for line in (fit_problems(first_run(made), one.fit) if one.fit else ())]
            if isinstance(made, LoopConfig):
                problems += [f"{where}.{line.removeprefix('run.')}" for line in contradictions(made)]
        if one.oversample != OVERSAMPLE and (one.rounds is None or one.rounds.guided_from is None):
            problems.append(f"{where}.oversample: has no effect without rounds.guided_from; take it out")
    return problems
