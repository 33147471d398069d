"""What a sweep file says, and what is wrong with it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract import settings
from rayexpand.contract.errors import ConfigError
from rayexpand.contract.settings import Later, Section, digest
from rayexpand.data.seeds import DataConfig
from rayexpand.data.seeds.source import wanted_ids
from rayexpand.data.subsets import ids_hash
from rayexpand.runs import config as configs
from rayexpand.runs.config import ClusterConfig, EstimateConfig, RunConfig, semantic
from rayexpand.storage.places import open_files
from rayexpand.studies.config import StudyConfig, parse_study, study_preflight
from rayexpand.studies.sections import ArmConfig, ExpansionConfig
from rayexpand.studies.sweep.proxies_config import EarlyConfig, ProxiesConfig, early_problems
from rayexpand.studies.sweep.space import Dimension, condition_problems, n_suggestions, parse_dimension

TUNED = ("recipe", "expansions", "arms", "subset")  # sections of a study whose fields can be swept


# What may change between two starts of one sweep.
OPERATIONAL = ("name", "out", "samples", "fresh_seeds", "max_concurrent", "cpus_per_trial", "gpus_per_trial",
               "cluster", "estimate")
# Of its study; `also` is what 0.1 called extra_tests.
UNSWEPT = ("training", "cluster", "estimate", "extra_tests", "also")


class AshaConfig(Section):
    grace: int = Field(1, ge=1, description="epochs every trial gets")
    reduction_factor: float = Field(3.0, gt=1, description="at grace, grace x this, grace x this squared, ... epochs "
                                    "only about one in so many goes on")


class SweepConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the sweep's folder is <out>/<name>")
    out: str = Field("runs", min_length=1)
    study: dict[str, Any] = Field(description="a study as `train` takes it, without name and out, or the path of its "
                                  "file; a trial trains in one process, whatever its training.workers")
    arm: str = Field(description="name of the arm that is tuned")
    space: dict[str, Any] = Field(min_length=1, description="dotted field -> {choice: [...]}, {grid: [...]}, "
                                  "{uniform: [low, high], step: ...}, {loguniform: [low, high]}, {randint: [low, "
                                  "high]} or {lograndint: [low, high]}, both ends included; `when: {field: value}` "
                                  "beside it: only where a field of the space has this value, or one of a list; an arm "
                                  "or expansion stands by its name")
    samples: int | None = Field(None, ge=1, description="configurations that are tried; of each point of the grid, "
                                "where there is one")
    search: Literal["random", "grid", "optuna"] = Field("random", description="optuna: tree of Parzen estimators")
    scheduler: AshaConfig | None = Field(None, description="none, or asha: {grace, reduction_factor}, which stops "
                                         "what falls behind")
    proxies: Annotated[ProxiesConfig | None, Later(None)] = Field(
        None, description="measure the samples of every trial before it trains, and say how these numbers go with the "
        "scores; {}: Frechet distance, MMD, class energy, coverage, variety")
    early: Annotated[EarlyConfig | None, Later(None)] = Field(
        None, description="do not train what a proxy finds poor; null: train everything")
    metric: Literal["top1", "top5", "per_class"] = Field("top1", description="of the last epoch, mean over seeds")
    score_on: Literal["validation", "test"] = Field("validation", description="test: choose by the test images, which "
                                                    "flatters the best")
    hold_out: int | None = Field(None, ge=1, description="without study.validation: so many images of each class of "
                                 "data are the validation images and are never trained on")
    seeds: list[int] | None = Field(None, min_length=1, description="instead of the study's")
    fresh_seeds: int = Field(3, ge=0, description="the best configuration is trained once more with so many seeds "
                             "that it was not chosen by, and scored on the test images and on those it was chosen by; "
                             "0: with the seeds of the sweep, on the test images alone")
    seed: int = Field(0, ge=0, description="keys the suggestions and the held-out images")
    cpus_per_trial: float = Field(1.0, gt=0)
    gpus_per_trial: float | None = Field(None, ge=0, description="fractions share one; null: 1 where the cluster has "
                                         "GPUs, else 0")
    max_concurrent: int | None = Field(None, ge=1, description="null: as many as the cluster holds")
    cluster: ClusterConfig = ClusterConfig()
    estimate: Annotated[EstimateConfig, Later(EstimateConfig())] = Field(
        EstimateConfig(), description="what `rayexpand plan` reckons with; where it is left out, that of the study")

    @field_validator("scheduler", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """`none`, `asha` or {asha: {...}}."""
        if value in ("none", {"none": None}):
            return None
        if value in ("asha", {"asha": None}):
            return {}
        return value["asha"] if isinstance(value, Mapping) and set(value) == {"asha"} else value

    @property
    def folder(self) -> str:
        return f"{self.out.rstrip('/')}/{self.name}"

    @property
    def epochs(self) -> int:
        """Of the tuned arm."""
        return make_recipe({**self.study.get("recipe", {}),
                            **(arm_of(self.study, self.arm).get("recipe") or {})}).epochs


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Sweep of a YAML file with `a.b=value` overrides. Raises ConfigError with all mistakes."""
    return parse_sweep(settings.read(path, overrides), str(path))


def study_in(file: str) -> dict[str, Any]:
    """A study file as a sweep has it: name and folder are the sweep's."""
    return {key: value for key, value in settings.read(file).items() if key not in ("name", "out", "kind")}


def parse_sweep(raw: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Sweep of a mapping. Raises ConfigError with every mistake of every section; nothing heavy is loaded."""
    raw = {str(key): value for key, value in raw.items()}
    if isinstance(raw.get("study"), str):
        raw["study"] = study_in(raw["study"])
    try:
        config = SweepConfig(**raw)
    except ValidationError as error:
        space = raw["space"].items() if isinstance(raw.get("space"), Mapping) else ()
        parsed = [parse_dimension(str(field), spec) for field, spec in space]
        raise ConfigError(where, [*settings.mistakes(error, SweepConfig, ""), *_mistakes_of_train(raw), *(
            f"space.{one}" for one in parsed if isinstance(one, str))]) from error
    problems, sampling = _study_problems(config), _sampling_problems(config)
    if not problems:
        problems = [*_proxy_problems(config), *_space_problems(config)]
    if problems or sampling:
        raise ConfigError(where, [*sampling, *problems])
    return config


def put(raw: dict[str, Any], field: str, value: Any) -> None:
    """Sets a dotted field of a study mapping in place. Raises ConfigError for an arm or expansion there is not."""
    section, _, rest = field.partition(".")
    target = raw.setdefault(section, {})
    if section in ("arms", "expansions"):
        named = {arm["name"]: arm for arm in target} if section == "arms" else target
        name = max((one for one in named if rest.startswith(f"{one}.")), key=len, default=None)
        if name is None:
            meant = rest.split(".")[0]
            if meant in named:
                raise ConfigError(field, [f"is a whole {section[:-1]}; name one of its fields, {field}.<field>"])
            near = get_close_matches(meant, list(named), n=1)
            raise ConfigError(field, [f"'{meant}' is no {section[:-1]} of the study; "
                                      + (f"did you mean '{near[0]}'?" if near else f"known: {', '.join(named)}")])
        rest, target = rest.removeprefix(f"{name}."), named[name]
        if section == "expansions" and isinstance(target.get("config"), dict):
            target = target["config"]
    *sections, leaf = rest.split(".")
    for part in sections:
        child = target.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(field, [f"'{part}' is not a section"])
        target = child
    target[leaf] = value


def base_study(config: SweepConfig) -> dict[str, Any]:
    """The study as a mapping, its real images without those that are held out."""
    base = copy.deepcopy({key: value for key, value in config.study.items() if key not in ("name", "out")})
    if config.seeds is not None:
        base["seeds"] = config.seeds
    if is_holding_out(config):
        files = open_files(config.folder)
        data = {key: value for key, value in base["data"].items() if key not in ("per_class", "subset_seed")}
        base |= {section: {**data, "ids": str(files.at(f"ids/{section}.txt"))} for section in ("validation", "data")}
    return base


def study_with(base: Mapping[str, Any], config: SweepConfig, values: Mapping[str, Any]) -> StudyConfig:
    """The study of a configuration: the tuned arm alone."""
    raw = copy.deepcopy(dict(base))
    for field, value in values.items():
        put(raw, field, value)
    raw |= {"name": "trial", "out": config.folder, "test": scored_data(base, config),
            "training": {**(raw.get("training") or {}), "workers": 0}}
    raw.pop("baseline", None)
    raw.pop("validation", None)  # they are the test images of a trial
    for name in ("extra_tests", "also", "baselines", "value", "price"):
        raw.pop(name, None)  # nothing is chosen by them
    study = parse_study(raw)
    arm = next(one for one in study.arms if one.name == config.arm).model_copy(update={"control": False})
    if isinstance(arm.ratio, list):
        raise ConfigError(f"arms.{arm.name}.ratio", ["a list of ratios is several arms, and a sweep tunes one; give "
                                                     "one ratio"])
    return study.model_copy(update={"arms": [arm], "expansions": {
        name: one for name, one in study.expansions.items() if name in arm.uses}, "selections": {
        name: one for name, one in study.selections.items() if name == arm.selection}})


def identity(study: StudyConfig) -> dict[str, Any]:
    """What decides the result of a trial."""
    arm: ArmConfig = study.arms[0]
    data = by_content(study.data)
    found = {"arm": arm.model_dump(mode="json", exclude={"name", "recipe", "control"}),
             "recipe": make_recipe({**study.recipe, **arm.recipe}).model_dump(mode="json"),
             **study.model_dump(mode="json", include={"subset", "seeds", "resample", "vary"}),
             "data": data, "test": by_content(study.test),
             "order": [study.training.shuffle_rows, study.training.streams]}
    if arm.selection in study.selections:
        found["select"] = study.selections[str(arm.selection)]
    made = [made_from(study.expansions[name], data) for name in arm.uses]
    return {**found, **(made[0] if len(made) == 1 else {"expansions": made} if made else {})}


def made_from(one: ExpansionConfig, data: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the samples of an expansion."""
    return {"expansion": one.run if one.run is not None else semantic(pilot_run(one, data)),
            **({"fit": one.fit.model_dump(mode="json")} if one.fit is not None else {})}


def by_content(data: DataConfig) -> dict[str, Any]:
    """A list of ids counts by what it says, wherever it lies."""
    return {**data.model_dump(mode="json"), "ids": data.ids and _ids_sha256(data.ids)}


@functools.cache
def _ids_sha256(path: str) -> str:
    return ids_hash(wanted_ids(DataConfig(source="digits", ids=path)) or [])


def pilot_run(one: ExpansionConfig, data: Mapping[str, Any]) -> RunConfig:
    return configs.parse({**(one.config or {}), "name": "pilot", "data": data})


def scored_data(base: Mapping[str, Any], config: SweepConfig) -> Any:
    return base["test"] if config.score_on == "test" else base.get("validation") or base["test"]


def arm_of(study: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next((one for one in _arms(study) if one.get("name") == name), {})


def _arms(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = study.get("arms")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def is_holding_out(config: SweepConfig) -> bool:
    return config.score_on == "validation" and not config.study.get("validation")


def dimensions_of(config: SweepConfig) -> tuple[Dimension, ...]:
    found = [parse_dimension(field, spec) for field, spec in config.space.items()]
    return tuple(one for one in found if isinstance(one, Dimension))


def _study_problems(config: SweepConfig) -> list[str]:
    if given := sorted({"name", "out"} & set(config.study)):
        return [f"study: {', '.join(given)} come from the sweep; take them out"]
    problems = _mistakes_of_train({"study": config.study, "out": config.folder})
    arms = [str(arm["name"]) for arm in _arms(config.study) if "name" in arm]
    if arms and config.arm not in arms:
        problems.append(f"arm: '{config.arm}' is no arm of the study; {_near(config.arm, arms)}")
    elif arms and isinstance(arm_of(config.study, config.arm).get("ratio"), list):
        problems.append(f"arm: '{config.arm}' has several ratios; a sweep tunes one arm, so give it one ratio")
    if config.score_on == "validation" and config.study.get("validation") is None and config.hold_out is None:
        problems.append("score_on: there are no validation images to choose by; give study.validation, or hold_out: "
                        "<images of each class of data>, or choose by the test images in so many words with "
                        "score_on: test")
    expansions = config.study.get("expansions")
    problems += [f"study.expansions.{name}.rounds: a sweep makes each expansion in one run; take the section out, or "
                 "compare rounds in a study" for name, one in (
                     expansions.items() if isinstance(expansions, Mapping) else ())
                 if isinstance(one, Mapping) and one.get("rounds")]
    if config.hold_out is not None and not is_holding_out(config):
        problems.append("hold_out: has no effect where study.validation is given or score_on is test; take it out")
    return problems


def _proxy_problems(config: SweepConfig) -> list[str]:
    if config.proxies is None:
        return ["early: needs the section proxies, which measures what it goes by; write proxies: {}"] * (
            config.early is not None)
    try:  # what `train` says of comparing samples
        study = study_with({**config.study, "samples": config.proxies.model_dump(mode="json")}, config, {})
        found, uses = study_preflight(study), study.arms[0].uses
    except ConfigError as error:
        found, uses = error.problems, ("",)
    problems = [line.replace("samples", "proxies") for line in found
                if line.startswith("samples.") or "`samples`" in line]
    if not uses:
        problems = [f"proxies: the arm '{config.arm}' has no samples to measure; tune one with `use`"]
    return [*problems, *early_problems(config.proxies, config.early)]


def _mistakes_of_train(raw: Mapping[str, Any]) -> list[str]:
    """What `train` would say of the study of a sweep; nothing where there is none."""
    if not isinstance(raw.get("study"), dict):
        return []
    try:
        parse_study({**raw["study"], "name": "trial", "out": raw.get("out", "runs")})
    except ConfigError as error:
        return [f"study.{line}" for line in error.problems]
    return []


def _sampling_problems(config: SweepConfig) -> list[str]:
    parsed = [parse_dimension(field, spec) for field, spec in config.space.items()]
    problems = [f"space.{one}" for one in parsed if isinstance(one, str)]
    known = [one for one in parsed if isinstance(one, Dimension)]
    kinds = {one.kind for one in known}
    if len(known) == len(parsed):
        problems += [f"space.{line}" for line in condition_problems(known)]
    if config.search == "grid":
        if kinds - {"choice", "grid"}:
            problems.append("search: a grid needs every field as a list of values; write choice, or search: random")
        elif config.samples is not None:
            points = n_suggestions(known, "grid", None)
            problems.append(f"samples: search grid tries every point once, and this space has {points:,}; take samples "
                            f"out, or write search: random, which tries {config.samples:,} of them")
    elif config.samples is None:
        problems.append("samples: is required and missing; how many configurations are tried")
    if config.search == "optuna" and "grid" in kinds:
        problems.append("search: optuna chooses every value itself; write choice instead of grid")
    return problems


def _space_problems(config: SweepConfig) -> list[str]:
    """Each value of each field is put into the study, which is then checked as `train` would."""
    problems = []
    for dimension in dimensions_of(config):
        found = list(_field_problems(config, dimension))
        problems += [f"space.{dimension.field}: {line}" for line in dict.fromkeys(found)]
    if config.scheduler is not None:
        if config.epochs <= config.scheduler.grace:
            problems.append(f"scheduler.asha: the arm trains for {config.epochs} epochs and none is stopped before "
                            f"{config.scheduler.grace}; set recipe.epochs (with `updates` it is the number of scores "
                            "taken) above grace, or scheduler: none")
        if {"recipe.epochs", f"arms.{config.arm}.recipe.epochs"} & set(config.space):
            problems.append("scheduler.asha: compares trials after equally many epochs, so their number cannot be "
                            "swept; sweep recipe.updates or recipe.lr, or set scheduler: none")
    return problems


def _field_problems(config: SweepConfig, dimension: Dimension) -> Iterator[str]:
    field, section = dimension.field, dimension.field.split(".")[0]
    if section not in TUNED or "." not in field:
        yield (f"cannot be swept; {_near(section, list(TUNED))}" if section not in StudyConfig.model_fields else
               f"cannot be swept, because trials could not be compared; fields of {', '.join(TUNED)} can")
        return
    identities = []
    for value in dimension.examples():
        try:
            identities.append(digest(identity(study_with(config.study, config, dimension.with_conditions(value)))))
        except ConfigError as error:
            yield from (line.removeprefix(f"{field}: ") for line in error.problems)
    if len(identities) > 1 and len(set(identities)) == 1:
        yield f"decides nothing for the arm '{config.arm}', whatever its value; take it out, or tune another arm"


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
