"""A sweep: which values of some fields of a study give the best classifier? One YAML, one arm, many trials.

A trial is one configuration of the study: it expands a pilot, trains the arm for every seed and scores it, in one
process. Configurations that would give the same result are one trial; expansions that would give the same samples are
one pilot, so trials that differ in recipe, soft label or selection alone share it.

    <out>/<name>/sweep.json              resolved configuration, created once, and what the data was
                 ids/                    real images of the subsets, held-out images
                 suggestions/0003.json   values of configuration 3, written before it is tried
                 pilots/<digest8>/       runs
                 studies/<digest8>/      study folder of a trial: lists, checkpoints, predictions
                 trials/<digest8>.json   its result; what is there is not trained again
                 best.yaml final.yaml    the best configuration, as `rayexpand train` takes it
                 summary.json report.html

Every decision is a function of the seed, the number of the suggestion and the results so far, and all of it is in these
files: the same command continues from them, whoever was killed. Ray Tune's own experiment state is not used for that,
because it is pickled, is written now and then only, and would run a trial again that ended after the last write.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from rayexpand import config as configs
from rayexpand import run as runs
from rayexpand import seeds
from rayexpand.config import ClusterConfig, RunConfig, Section, digest, semantic
from rayexpand.core.recipe import make_recipe
from rayexpand.errors import ConfigError, DigestMismatch, UsageError
from rayexpand.files import Files
from rayexpand.seeds import DataConfig
from rayexpand.seeds.source import wanted_ids
from rayexpand.space import Dimension, parse_dimension
from rayexpand.store import create_once, open_files
from rayexpand.study_config import ArmConfig, ExpansionConfig, StudyConfig, parse_study, study_preflight
from rayexpand.subsets import ids_file, ids_hash, per_class

TUNED = ("recipe", "expansions", "arms", "subset")  # sections of a study whose fields can be swept
FOLDERS = ("ids", "suggestions", "pilots", "studies", "trials", ".tmp")
# What may change between two starts of one sweep.
OPERATIONAL = ("name", "out", "samples", "max_concurrent", "cpus_per_trial", "gpus_per_trial", "cluster")


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
                                  "{uniform: [low, high], step: ...}, {loguniform: [low, high]} or {randint: [low, "
                                  "high]}, both ends included; an arm or expansion stands by its name")
    samples: int | None = Field(None, ge=1, description="configurations that are tried; of each point of the grid, "
                                "where there is one")
    search: Literal["random", "grid", "optuna"] = Field("random", description="optuna: tree of Parzen estimators")
    scheduler: AshaConfig | None = Field(None, description="none, or asha: {grace, reduction_factor}, which stops "
                                         "what falls behind")
    metric: Literal["top1", "top5", "per_class"] = Field("top1", description="of the last epoch, mean over seeds")
    score_on: Literal["validation", "test"] = Field("validation", description="test: choose by the test images, which "
                                                    "flatters the best")
    hold_out: int | None = Field(None, ge=1, description="without study.validation: so many images of each class of "
                                 "data are the validation images and are never trained on")
    seeds: list[int] | None = Field(None, min_length=1, description="instead of the study's")
    seed: int = Field(0, ge=0, description="keys the suggestions and the held-out images")
    cpus_per_trial: float = Field(1.0, gt=0)
    gpus_per_trial: float | None = Field(None, ge=0, description="fractions share one; null: 1 where the cluster has "
                                         "GPUs, else 0")
    max_concurrent: int | None = Field(None, ge=1, description="null: as many as the cluster holds")
    cluster: ClusterConfig = ClusterConfig()

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
        return make_recipe({**self.study.get("recipe", {}), **(_arm(self.study, self.arm).get("recipe") or {})}).epochs


@dataclass(frozen=True)
class Sweep:
    config: SweepConfig
    files: Files
    base: dict[str, Any]  # the study, as a mapping, with the images that are held out
    space: tuple[Dimension, ...]


@dataclass(frozen=True)
class Candidate:
    """One configuration of the study: the tuned arm alone, scored as the sweep scores."""

    number: int
    values: dict[str, Any]
    study: StudyConfig
    digest: str  # of what decides its result

    @property
    def key(self) -> str:
        return self.digest[:8]


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Sweep of a YAML file with `a.b=value` overrides. Raises ConfigError with all mistakes."""
    return parse_sweep(configs.read(path, overrides), str(path))


def parse_sweep(raw: Mapping[str, Any], where: str = "sweep") -> SweepConfig:
    """Sweep of a mapping. Raises ConfigError with every mistake of every section; nothing heavy is loaded."""
    raw = {str(key): value for key, value in raw.items()}
    if isinstance(raw.get("study"), str):
        study = configs.read(raw["study"])
        raw["study"] = {key: value for key, value in study.items() if key not in ("name", "out")}
    try:
        config = SweepConfig(**raw)
    except ValidationError as error:
        raise ConfigError(where, [*configs.mistakes(error, SweepConfig, ""), *_mistakes_of_train(raw)]) from error
    if problems := [*_study_problems(config), *_sampling_problems(config)] or _space_problems(config):
        raise ConfigError(where, problems)
    return config


def open_sweep(config: SweepConfig, on_model: Callable[[str, int, int], None] | None = None) -> Sweep:
    """Creates the folder of a sweep, or opens it if it is the same sweep; fetches or trains the models of its pilots,
    so that no trial has to.

    Raises ConfigError, SeedDataError, UsageError where a class has too few images, or DigestMismatch with the fields
    that differ.
    """
    if problems := study_preflight(parse_study({**config.study, "name": config.name, "out": config.out})):
        raise ConfigError(config.name, [f"study.{one}" for one in problems])
    files, base = open_files(config.folder), _base(config)
    index = seeds.build_index(DataConfig(**config.study["data"]))
    held = per_class(index, config.hold_out or 0, config.seed) if _is_holding_out(config) else None
    for folder in FOLDERS:
        files.make_folder(folder)
    if held is not None:
        ids = index.table["seed_id"].to_pylist()
        kept = sorted(set(range(len(ids))) - set(held.tolist()))
        for section, rows in (("validation", held.tolist()), ("data", kept)):
            files.replace(f"ids/{section}.txt", ids_file([ids[row] for row in rows]))
    facts = {"config": config.model_dump(mode="json"), "data_sha256": ids_hash(index.seed_ids),
             "models": _models(_study(base, config, {}), on_model)}
    before = create_once(files, "sweep.json", facts, "sweep")
    if changed := configs.differences(_fixed(before), _fixed(facts)):
        raise DigestMismatch("\n  ".join([f"{files.root} holds another sweep; its trials could not be compared with "
                                          "new ones. What differs (there -> here):", *changed,
                                          "Set it back, or give this sweep another `name`."]))
    return Sweep(config, files, base, _space(config))


def sweep_in(folder: str) -> Sweep:
    """The sweep of an existing folder, as far as its report needs it. Raises UsageError where there is none."""
    files = open_files(folder)
    text = files.read("sweep.json")
    if text is None:
        raise UsageError(f"{folder} holds no sweep; give the folder <out>/<name> of one")
    out, _, name = folder.rstrip("/").rpartition("/")
    config = SweepConfig(**{**json.loads(text)["config"], "out": out or ".", "name": name})
    return Sweep(config, files, _base(config), _space(config))


def candidate(sweep: Sweep, number: int, values: Mapping[str, Any]) -> Candidate:
    """Raises ConfigError where the values do not go together."""
    study = _study(sweep.base, sweep.config, values)
    identity = digest(_identity(study))
    made = study.model_copy(update={"name": identity[:8], "out": f"{sweep.config.folder}/studies"})
    return Candidate(number, dict(values), made, identity)


def read_results(files: Files) -> dict[str, dict[str, Any]]:
    """Results by key, in the order of their numbers."""
    texts = [files.read(f"trials/{name}") for name in files.list("trials") if name.endswith(".json")]
    found = [json.loads(text) for text in texts if text is not None]
    return {one["key"]: one for one in sorted(found, key=lambda one: one["number"])}


def best_of(results: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The finished trial with the highest score, the earlier one of two equal ones."""
    finished = [one for one in results.values() if one["state"] == "finished"]
    return max(finished, key=lambda one: (one["score"], -one["number"]), default=None)


def read_test(sweep: Sweep, best: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The score of the best configuration on the test images, None where it was not taken yet."""
    found = json.loads(sweep.files.read("test.json") or b"{}")
    return found if best is not None and found.get("key") == best["key"] else None


def write_best(sweep: Sweep, best: Mapping[str, Any]) -> None:
    """best.yaml: the tuned arm alone, scored as here, so that `train` gives the same score again; final.yaml: the whole
    study with the best values, on the test images."""
    raw = copy.deepcopy(sweep.base)
    for field, value in best["values"].items():
        put(raw, field, value)
    alone = {**raw, "arms": [{**_arm(raw, sweep.config.arm), "control": False}], "test": _scored(sweep.base,
                                                                                                   sweep.config)}
    alone["expansions"] = {name: one for name, one in (raw.get("expansions") or {}).items()
                           if name == alone["arms"][0].get("use")}
    alone.pop("baseline", None)
    alone.pop("validation", None)  # they are the test images of best.yaml
    out = str(sweep.files.root)
    for name, study in (("best", alone), ("final", raw)):
        text = yaml.safe_dump({"name": name, "out": out, **study}, sort_keys=False, allow_unicode=True)
        sweep.files.replace(f"{name}.yaml", text.encode())


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


def _base(config: SweepConfig) -> dict[str, Any]:
    """The study as a mapping, its real images without those that are held out."""
    base = copy.deepcopy({key: value for key, value in config.study.items() if key not in ("name", "out")})
    if config.seeds is not None:
        base["seeds"] = config.seeds
    if _is_holding_out(config):
        files = open_files(config.folder)
        data = {key: value for key, value in base["data"].items() if key not in ("per_class", "subset_seed")}
        base |= {section: {**data, "ids": str(files.at(f"ids/{section}.txt"))} for section in ("validation", "data")}
    return base


def _study(base: Mapping[str, Any], config: SweepConfig, values: Mapping[str, Any]) -> StudyConfig:
    """The study of a configuration: the tuned arm alone."""
    raw = copy.deepcopy(dict(base))
    for field, value in values.items():
        put(raw, field, value)
    raw |= {"name": "trial", "out": config.folder, "test": _scored(base, config),
            "training": {**(raw.get("training") or {}), "workers": 0}}
    raw.pop("baseline", None)
    raw.pop("validation", None)  # they are the test images of a trial
    raw.pop("also", None)  # nothing is chosen by them
    study = parse_study(raw)
    arm = next(one for one in study.arms if one.name == config.arm).model_copy(update={"control": False})
    return study.model_copy(update={"arms": [arm], "expansions": {
        name: one for name, one in study.expansions.items() if name == arm.use}})


def _identity(study: StudyConfig) -> dict[str, Any]:
    """What decides the result of a trial."""
    arm: ArmConfig = study.arms[0]
    data = _by_content(study.data)
    found = {"arm": arm.model_dump(mode="json", exclude={"name", "recipe", "control"}),
             "recipe": make_recipe({**study.recipe, **arm.recipe}).model_dump(mode="json"),
             **study.model_dump(mode="json", include={"subset", "seeds", "resample"}),
             "data": data, "test": _by_content(study.test),
             "order": [study.training.shuffle_rows, study.training.lanes]}
    if arm.use is not None:
        one = study.expansions[arm.use]
        found["expansion"] = one.run if one.run is not None else semantic(_pilot(one, data))
        if one.fit is not None:
            found["fit"] = one.fit.model_dump(mode="json")
    return found


def _by_content(data: DataConfig) -> dict[str, Any]:
    """A list of ids counts by what it says, wherever it lies."""
    return {**data.model_dump(mode="json"), "ids": data.ids and _ids_sha256(data.ids)}


@functools.cache
def _ids_sha256(path: str) -> str:
    return ids_hash(wanted_ids(DataConfig(source="digits", ids=path)) or [])


def _models(study: StudyConfig, on_model: Callable[[str, int, int], None] | None) -> dict[str, dict[str, str]]:
    """Content hashes of the models of the tuned arm's expansion."""
    return {name: runs.model_hashes(_pilot(one, _by_content(study.data)), on_model, fitted=one.fit is not None)
            for name, one in study.expansions.items() if one.run is None}


def _pilot(one: ExpansionConfig, data: Mapping[str, Any]) -> RunConfig:
    return configs.parse({**(one.config or {}), "name": "pilot", "data": data})


def _scored(base: Mapping[str, Any], config: SweepConfig) -> Any:
    return base["test"] if config.score_on == "test" else base.get("validation") or base["test"]


def _arm(study: Mapping[str, Any], name: str) -> dict[str, Any]:
    return next((one for one in _arms(study) if one.get("name") == name), {})


def _arms(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = study.get("arms")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _is_holding_out(config: SweepConfig) -> bool:
    return config.score_on == "validation" and not config.study.get("validation")


def _space(config: SweepConfig) -> tuple[Dimension, ...]:
    found = [parse_dimension(field, spec) for field, spec in config.space.items()]
    return tuple(one for one in found if isinstance(one, Dimension))


def _fixed(facts: Mapping[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in facts["config"].items() if key not in OPERATIONAL}
    study = {key: value for key, value in config["study"].items() if key not in ("training", "cluster")}
    return {**facts, "config": {**config, "study": study}}


# Mistakes ------------------------------------------------------------------------------------------------------------


def _study_problems(config: SweepConfig) -> list[str]:
    if given := sorted({"name", "out"} & set(config.study)):
        return [f"study: {', '.join(given)} come from the sweep; take them out"]
    problems = _mistakes_of_train({"study": config.study, "out": config.folder})
    arms = [str(arm["name"]) for arm in _arms(config.study) if "name" in arm]
    if arms and config.arm not in arms:
        problems.append(f"arm: '{config.arm}' is no arm of the study; {_near(config.arm, arms)}")
    elif arms and isinstance(_arm(config.study, config.arm).get("ratio"), list):
        problems.append(f"arm: '{config.arm}' has several ratios; a sweep tunes one arm, so give it one ratio")
    if config.score_on == "validation" and config.study.get("validation") is None and config.hold_out is None:
        problems.append("score_on: there are no validation images to choose by; give study.validation, or hold_out: "
                        "<images of each class of data>, or choose by the test images in so many words with "
                        "score_on: test")
    if config.hold_out is not None and not _is_holding_out(config):
        problems.append("hold_out: has no effect where study.validation is given or score_on is test; take it out")
    return problems


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
    kinds = {one.kind for one in parsed if isinstance(one, Dimension)}
    if config.search == "grid":
        if kinds - {"choice", "grid"}:
            problems.append("search: a grid needs every field as a list of values; write choice, or search: random")
        if config.samples is not None:
            problems.append("samples: search grid tries every point once; take samples out")
    elif config.samples is None:
        problems.append("samples: is required and missing; how many configurations are tried")
    if config.search == "optuna" and "grid" in kinds:
        problems.append("search: optuna chooses every value itself; write choice instead of grid")
    return problems


def _space_problems(config: SweepConfig) -> list[str]:
    """Each value of each field is put into the study, which is then checked as `train` would."""
    problems = []
    for dimension in _space(config):
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
            identities.append(digest(_identity(_study(config.study, config, {field: value}))))
        except ConfigError as error:
            yield from (line.removeprefix(f"{field}: ") for line in error.problems)
    if len(identities) > 1 and len(set(identities)) == 1:
        yield f"decides nothing for the arm '{config.arm}', whatever its value; take it out, or tune another arm"


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
