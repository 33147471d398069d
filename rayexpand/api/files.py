"""Jobs as the API takes them: which kind a file is, what a machine file adds, and the ready files of the package."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from rayexpand.contract.errors import ConfigError, UsageError, looked_at
from rayexpand.contract.settings import override, put, read

Job = str | os.PathLike[str] | Mapping[str, Any] | BaseModel
Set = Mapping[str, Any] | Sequence[str]

# The kinds of files: the key that only this kind has, and the verb that takes it. A run is what has none of the keys.
KINDS = {"study": ("arms", "train"), "sweep": ("space", "sweep"), "fit": ("fit", "fit"), "select": ("rule", "select"),
         "evaluate": ("reference", "evaluate"), "audit": ("audit", "audit"),
         "pivot": ("sources", "report"), "run": ("method", "expand"), "loop": ("rounds", "expand")}
MACHINE = ("cluster", "runtime", "store", "estimate")  # sections of a machine file, beside `device`
LISTS = (".csv", ".json", ".txt")  # suffixes of ready files beside the YAML
DEVICE = {"run": "prior.device", "fit": "device", "study": "training.device", "sweep": "study.training.device",
          "select": "device", "evaluate": "extractor.device", "audit": "device", "loop": "training.device"}


def kind_of(raw: Mapping[str, Any], where: str) -> str:
    """The kind of a file: what `kind` says, else the key that only one kind has. Raises ConfigError."""
    said = raw.get("kind")
    if said is not None and (not isinstance(said, str) or said not in KINDS):
        raise ConfigError(where, [f"kind: {said!r} is none; kinds are {', '.join(KINDS)}"])
    found = next((kind for kind, (key, _) in KINDS.items() if key in raw), "run")
    if said is not None and said != found and KINDS[said][0] not in raw:
        raise ConfigError(where, [f"kind: {said} needs the section '{KINDS[said][0]}', which is missing"])
    return said or found


def read_job(job: Job, set: Set, machine: Job | None) -> tuple[str, dict[str, Any], str]:
    """(kind, content, what to call it in errors)."""
    where = where_of(job)
    raw = content_of(job)
    kind = kind_of(raw, where)
    if machine is not None:
        _apply_machine(raw, kind, machine)
    for dotted, value in set.items() if isinstance(set, Mapping) else ():
        put(raw, dotted, value)
    raw = override(raw, () if isinstance(set, Mapping) else set)
    kind = kind_of(raw, where)
    raw.pop("kind", None)
    return kind, raw, where


def content_of(job: Job) -> dict[str, Any]:
    if isinstance(job, BaseModel):
        return job.model_dump(mode="json")
    return deepcopy(dict(job)) if isinstance(job, Mapping) else read(os.fspath(job))


def where_of(job: Job) -> str:
    return "configuration" if isinstance(job, (BaseModel, Mapping)) else os.fspath(job)


def _apply_machine(raw: dict[str, Any], kind: str, machine: Job) -> None:
    """Puts what a machine file says over what a job says. Sections that a kind does not have are for other kinds."""
    said = content_of(machine)
    if unknown := sorted({*said} - {*MACHINE, "device"}):
        raise ConfigError(where_of(machine), [f"{one}: a machine file has only {', '.join(MACHINE)} and device; what "
                                              "is made belongs into the job" for one in unknown])
    if kind == "loop":
        from rayexpand.studies.rounds.config import run_in

        raw["run"] = run_in(raw.get("run"))
        if isinstance(raw["run"], dict):
            _apply_machine(raw["run"], "run", machine)
    known = _loader(kind)[0].model_fields
    sections = [name for name in MACHINE if name in said and name in known]
    for where, found in ((where_of(machine), said), ("the job", raw)):
        if wrong := [name for name in sections if not isinstance(found.get(name) or {}, Mapping)]:
            raise ConfigError(where, [f"{name}: must be a section with fields, got {found[name]!r}" for name in wrong])
    for name in sections:
        raw[name] = {**(raw.get(name) or {}), **(said[name] or {})}
    if "device" in said:
        if kind == "sweep" and isinstance(raw.get("study"), str):
            from rayexpand.studies.sweep.config import study_in

            raw["study"] = study_in(raw["study"])
        put(raw, DEVICE[kind], said["device"])


def _loader(kind: str) -> tuple[type[BaseModel], Callable[[Mapping[str, Any], str], Any]]:
    """The configuration class of a kind, and what parses it."""
    if kind == "study":
        from rayexpand.studies.config import StudyConfig, parse_study

        return StudyConfig, parse_study
    if kind == "sweep":
        from rayexpand.studies.sweep.config import SweepConfig, parse_sweep

        return SweepConfig, parse_sweep
    if kind == "fit":
        from rayexpand.fitting.config import FitConfig, parse_fit

        return FitConfig, parse_fit
    if kind == "select":
        from rayexpand.evaluation.select import SelectConfig
        from rayexpand.evaluation.select import parse as parse_select

        return SelectConfig, parse_select
    if kind == "evaluate":
        from rayexpand.evaluation.evaluate import EvaluateConfig
        from rayexpand.evaluation.evaluate import parse as parse_evaluate

        return EvaluateConfig, parse_evaluate
    if kind == "audit":
        from rayexpand.studies.audit import AuditConfig, parse_audit

        return AuditConfig, parse_audit
    if kind == "pivot":
        from rayexpand.studies.pivot_config import PivotConfig, parse_pivot

        return PivotConfig, parse_pivot
    if kind == "loop":
        from rayexpand.studies.rounds.config import LoopConfig, parse_loop

        return LoopConfig, parse_loop
    from rayexpand.runs.config import RunConfig
    from rayexpand.runs.config import parse as parse_run

    return RunConfig, parse_run


def parsed(kind: str, raw: Mapping[str, Any], where: str, wanted: str = "", verb: str = "") -> Any:
    """The configuration of a kind. Raises ConfigError with every mistake, also for a file of another kind than `verb`
    takes."""
    if wanted and kind != wanted:
        key, verb = KINDS[wanted][0], verb or KINDS[wanted][1]
        if KINDS[kind][0] not in raw:
            raise ConfigError(where, [f"{key}: `rayexpand {verb}` needs this section, and it is missing"])
        raise ConfigError(where, [f"this is a file for `rayexpand {KINDS[kind][1]}` (kind {kind}, for it has "
                                  f"'{KINDS[kind][0]}'), not for `rayexpand {verb}`"])
    return _loader(kind)[1](raw, where)


def config_of(wanted: str, job: Job, set: Set, machine: Job | None, verb: str = "") -> Any:
    kind, raw, where = read_job(job, set, machine)
    return parsed(kind, raw, where, wanted, verb)


def data_of(kind: str, config: Any) -> Any:
    """The `data` of a file, of an evaluation its reference; None where the file has none."""
    if kind == "sweep":
        return _study_of(config).data
    if kind == "loop":
        return config.run.data
    return getattr(config, "reference" if kind == "evaluate" else "data", None)


def preflight(kind: str, config: Any) -> list[str]:
    """What is wrong with the world around a parsed file, one line each."""
    from rayexpand.fitting.config import preflight as of_fit
    from rayexpand.runs.run import preflight as of_run
    from rayexpand.studies.config import study_preflight

    if kind == "run":
        return of_run(config)
    if kind == "fit":
        return of_fit(config)
    if kind == "study":
        return study_preflight(config)
    if kind == "sweep":
        return study_preflight(_study_of(config))
    if kind == "loop":
        from rayexpand.studies.rounds.config import loop_preflight

        return loop_preflight(config)
    if kind == "pivot":
        from rayexpand.studies.pivot_config import pivot_preflight

        return pivot_preflight(config)
    return []


def _study_of(sweep: Any) -> Any:
    from rayexpand.studies.config import parse_study

    return parse_study({**sweep.study, "name": sweep.name, "out": sweep.out})


def as_overrides(set: Set) -> list[str]:
    """Overrides as `a.b=value` lines."""
    return [f"{name}={json.dumps(value)}" for name, value in set.items()] if isinstance(set, Mapping) else list(set)


def schema(kind: str) -> dict[str, Any]:
    """JSON schema of a kind of file, for editors."""
    if kind not in KINDS:
        raise UsageError(f"there is no kind '{kind}'; kinds are {', '.join(KINDS)}")
    found = _loader(kind)[0].model_json_schema()
    found["properties"]["kind"] = {"const": kind}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"rayexpand {kind}", **found}


def first_file(images: str, *, model: str = "", ratio: float = 5) -> str:
    """A first YAML for a folder of images, as text. Raises UsageError where it holds none that can be read."""
    from rayexpand.data import seeds

    folder = Path(images)
    if not folder.is_dir():
        raise UsageError(f"{images}: there is no such folder{looked_at(images)}; give one with a folder of "
                         "images for each class")
    names = {one.name for one in folder.iterdir()}
    source = next((kind for kind, suffix in (("parquet", ".parquet"), ("webdataset", ".tar"))
                   if any(name.endswith(suffix) for name in names)), "imagefolder")
    data = {"source": source, "path": images, **({"split": "train"} if "train" in names else {})}
    if problems := seeds.check(seeds.DataConfig(**data)):
        raise ConfigError(images, problems)
    seeds.build_index(seeds.DataConfig(**data))
    method: dict[str, Any] = {"name": "classical", "policy": "randaugment", "ratio": ratio}
    if model:
        method = {"name": "img2img", "ratio": ratio, "prompt": "a photo of a {name}.", "strength": 0.5}
    raw = {"kind": "run", "name": _run_name(folder), "data": data,
           **({"prior": {"weights": model}} if model else {}), "method": method}
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def _run_name(folder: Path) -> str:
    """The name of a folder with `-` for what the name of a run may not have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.absolute().name).strip("-._") or "run"


def write_new(file: Path, text: str) -> None:
    """Writes a file that is not there yet. Raises UsageError where it is."""
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise UsageError(f"{file} exists already; give another name") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); give a place you may write to") from error


def job_files(word: str = "") -> list[tuple[str, str, str]]:
    """(name, verb, first line of its comment) of the ready files, those with `word` in their name."""
    found = []
    for file in sorted(_jobs().rglob("*.yaml")):
        name = file.relative_to(_jobs()).with_suffix("").as_posix()
        if word in name:
            lines = file.read_text(encoding="utf-8").splitlines()
            about = next((line.lstrip("# ") for line in lines if line.startswith("#")), "")
            found.append((name, KINDS[kind_of(read(file), name)][1], about))
    return found


def job_text(name: str) -> str:
    """A ready file by its name, as text. Raises UsageError where there is none."""
    short = name.removeprefix("jobs/")
    file = (_jobs() / (short if short.endswith((*LISTS, ".yaml")) else f"{short}.yaml")).resolve()
    if not file.is_relative_to(_jobs().resolve()) or not file.is_file():
        near = get_close_matches(name, [one for one, _, _ in job_files()], n=1, cutoff=0.4)
        raise UsageError(f"there is no ready file '{name}'" + (f"; did you mean '{near[0]}'?" if near else "")
                         + " `rayexpand jobs ls` lists them")
    return file.read_text(encoding="utf-8")


def jobs_named_by(name: str) -> list[str]:
    """Other ready files that one names (`jobs/...`): lists of classes, and studies of a sweep with theirs."""
    found, todo = list[str](), [name]
    while todo:
        lines = [line.partition("#")[0] for line in job_text(todo.pop()).splitlines()]
        for other in re.findall(r"\bjobs/[\w./-]+\.(?:csv|json|txt|yaml)\b", "\n".join(lines)):
            if other not in found:
                found.append(other)
                todo += [other] if other.endswith(".yaml") else []
    return found


def _jobs() -> Path:
    return Path(__file__).parents[1] / "jobs"
