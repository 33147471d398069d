"""A sweep: which values of some fields of a study give the best classifier? One YAML, one arm, many trials.

A trial is one configuration of the study: it expands a pilot, trains the arm for every seed and scores it, in one
process. Configurations that would give the same result are one trial; expansions that would give the same samples are
one pilot, so trials that differ in recipe, soft label or selection alone share it.

    <out>/<name>/sweep.json              resolved configuration, created once, and what the data was
                 ids/                    real images of the subsets, held-out images
                 suggestions/0003.json   values of configuration 3, written before it is tried
                 pilots/<digest8>/       runs
                 proxies/<digest8>.json  what samples are worth, where that is measured
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from rayexpand.contract import settings
from rayexpand.contract.errors import ConfigError, DigestMismatch, UsageError
from rayexpand.contract.settings import digest
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.data.subsets import ids_file, ids_hash, per_class
from rayexpand.runs import run as runs
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import create_once, healthy_json, read_json
from rayexpand.studies.config import StudyConfig, parse_study, study_preflight
from rayexpand.studies.sections import ArmConfig
from rayexpand.studies.sweep.config import (
    OPERATIONAL,
    UNSWEPT,
    SweepConfig,
    arm_of,
    base_study,
    by_content,
    dimensions_of,
    identity,
    is_holding_out,
    pilot_run,
    put,
    scored_data,
    study_with,
)
from rayexpand.studies.sweep.space import Dimension

FOLDERS = ("ids", "suggestions", "pilots", "proxies", "studies", "trials", ".tmp")


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


def open_sweep(config: SweepConfig, on_model: Callable[[str, int, int], None] | None = None) -> Sweep:
    """Creates the folder of a sweep, or opens it if it is the same sweep; fetches or trains the models of its pilots,
    so that no trial has to.

    Raises ConfigError, SeedDataError, UsageError where a class has too few images, or DigestMismatch with the fields
    that differ.
    """
    if problems := study_preflight(parse_study({**config.study, "name": config.name, "out": config.out})):
        raise ConfigError(config.name, [f"study.{one}" for one in problems])
    files, base = open_files(config.folder), base_study(config)
    index = seeds.build_index(DataConfig(**config.study["data"]))
    held = per_class(index, config.hold_out or 0, config.seed) if is_holding_out(config) else None
    for folder in FOLDERS:
        files.make_folder(folder)
    if held is not None:
        ids = index.table["seed_id"].to_pylist()
        kept = sorted(set(range(len(ids))) - set(held.tolist()))
        for section, rows in (("validation", held.tolist()), ("data", kept)):
            files.replace(f"ids/{section}.txt", ids_file([ids[row] for row in rows]))
    facts = {"config": config.model_dump(mode="json"), "data_sha256": ids_hash(index.seed_ids),
             "models": _models(study_with(base, config, {}), on_model)}
    before = create_once(files, "sweep.json", facts, "sweep")
    if changed := settings.differences(_fixed(before), _fixed(facts)):
        raise DigestMismatch("\n  ".join([f"{files.root} holds another sweep; its trials could not be compared with "
                                          "new ones. What differs (there -> here):", *changed,
                                          "Set it back, or give this sweep another `name`."]))
    return Sweep(config, files, base, dimensions_of(config))


def sweep_in(folder: str) -> Sweep:
    """The sweep of an existing folder, as far as its report needs it. Raises UsageError where there is none."""
    files = open_files(folder)
    facts = read_json(files, "sweep.json")
    if facts is None:
        raise UsageError(f"{folder} holds no sweep, for it has no sweep.json; give the folder <out>/<name> of one")
    out, _, name = folder.rstrip("/").rpartition("/")
    config = SweepConfig(**{**facts["config"], "out": out or ".", "name": name})
    return Sweep(config, files, base_study(config), dimensions_of(config))


def candidate(sweep: Sweep, number: int, values: Mapping[str, Any]) -> Candidate:
    """Raises ConfigError where the values do not go together."""
    study = study_with(sweep.base, sweep.config, values)
    key = digest(identity(study))
    made = study.model_copy(update={"name": key[:8], "out": f"{sweep.config.folder}/studies"})
    return Candidate(number, dict(values), made, key)


def read_results(files: Files) -> dict[str, dict[str, Any]]:
    """Results by key, in the order of their numbers; a damaged one counts as none."""
    read = [healthy_json(files, f"trials/{name}") for name in files.list("trials") if name.endswith(".json")]
    found = [one for one in read if one is not None]
    return {one["key"]: one for one in sorted(found, key=lambda one: one["number"])}


def read_suggestions(files: Files) -> list[dict[str, Any]]:
    """What was written of suggestions before they were tried, by their numbers; a damaged one counts as none. `key` is
    None of one whose values do not go together."""
    read = [healthy_json(files, f"suggestions/{name}") for name in files.list("suggestions") if name.endswith(".json")]
    return sorted((one for one in read if one is not None), key=lambda one: one["number"])


def without_result(suggestions: Iterable[Mapping[str, Any]], results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of configurations that were to be tried and have no result: in work, or their files are gone."""
    return sorted({one["key"] for one in suggestions} - {None} - {one["key"] for one in results})


def best_of(results: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The finished trial with the highest score, the earlier one of two equal ones."""
    finished = [one for one in results.values() if one["state"] == "finished"]
    return max(finished, key=lambda one: (one["score"], -one["number"]), default=None)


def fresh_seeds(sweep: Sweep) -> list[int]:
    """The seeds that the best configuration is trained again with: the first ones above those of the sweep."""
    used = StudyConfig.model_fields["seeds"].default if sweep.base.get("seeds") is None else sweep.base["seeds"]
    return list(range(max(used) + 1, max(used) + 1 + sweep.config.fresh_seeds))


def read_test(sweep: Sweep, best: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The score of the best configuration on the test images, None where it was not taken yet or with other seeds than
    are asked for. One of a version without fresh seeds counts."""
    found = healthy_json(sweep.files, "test.json") or {}
    is_current = found.get("seeds") in (None, fresh_seeds(sweep))
    return found if best is not None and found.get("key") == best["key"] and is_current else None


def scores_again(sweep: Sweep) -> bool:
    """Whether the best configuration is trained once more."""
    return sweep.config.score_on != "test" or sweep.config.fresh_seeds > 0


def write_best(sweep: Sweep, best: Mapping[str, Any]) -> None:
    """best.yaml: the tuned arm alone, scored as here, so that `train` gives the same score again; final.yaml: the whole
    study with the best values, on the test images."""
    raw = copy.deepcopy(sweep.base)
    for field, value in best["values"].items():
        put(raw, field, value)
    alone = {**raw, "arms": [{**arm_of(raw, sweep.config.arm), "control": False}], "test": scored_data(sweep.base,
                                                                                                   sweep.config)}
    alone["expansions"] = {name: one for name, one in (raw.get("expansions") or {}).items()
                           if name in ArmConfig(**alone["arms"][0]).uses}
    for field in ("baseline", "baselines", "value", "price"):
        alone.pop(field, None)
    if chosen := {name: one for name, one in (raw.get("selections") or {}).items()
                  if name == alone["arms"][0].get("selection")}:
        alone["selections"] = chosen
    else:
        alone.pop("selections", None)
    alone.pop("validation", None)  # they are the test images of best.yaml
    out = str(sweep.files.root)
    for name, study in (("best", alone), ("final", raw)):
        text = yaml.safe_dump({"name": name, "out": out, **study}, sort_keys=False, allow_unicode=True)
        sweep.files.replace(f"{name}.yaml", text.encode())


def _models(study: StudyConfig, on_model: Callable[[str, int, int], None] | None) -> dict[str, dict[str, str]]:
    """Content hashes of the models of the tuned arm's expansion."""
    return {name: runs.model_hashes(pilot_run(one, by_content(study.data)), on_model, fitted=one.fit is not None)
            for name, one in study.expansions.items() if one.run is None}


def _fixed(facts: Mapping[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in facts["config"].items() if key not in OPERATIONAL}
    study = {key: value for key, value in config["study"].items() if key not in UNSWEPT}
    return {**facts, "config": {**config, "study": study}}


# Mistakes ------------------------------------------------------------------------------------------------------------


