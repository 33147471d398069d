"""The verb `audit`: may a run be released?

    name: release
    audit:
      run: runs/birds
      copies: {held_out: {source: imagefolder, path: data/birds, split: val}}      # evaluation/copies.py
      membership: {data: {...}, expansion: {...}, recipe: {...}}                   # membership.py, attacks.py

Each section is an audit of its own and leaves an entry of its name in <run>/audit/<name>/result.json; entries of
sections that a file does not have stay as they are. `membership` makes runs of its own and needs none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field, ValidationError

from rayexpand import __version__
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import Device, Section, mistakes, read
from rayexpand.evaluation import copies_config
from rayexpand.evaluation.audit_files import FOLDER, RESULT, register
from rayexpand.evaluation.copies_config import CopiesConfig
from rayexpand.runs.config import ClusterConfig, RuntimeConfig
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import healthy_json, replace_json
from rayexpand.studies import membership as shadows
from rayexpand.studies.membership import MembershipConfig

if TYPE_CHECKING:
    from rayexpand.evaluation.copy_search import Work
    from rayexpand.runs.driving import Listener
    from rayexpand.studies.attacks import Machines


class AuditSection(Section):
    """What is audited, and how."""

    run: str | None = Field(None, min_length=1, description="run or loop folder that is audited, and where the result "
                            "goes; nothing of it may be pending")
    copies: CopiesConfig | None = Field(None, description="compare the samples of the run with its seeds")
    membership: MembershipConfig | None = Field(None, description="attack whole pipelines of the same kind: do samples "
                                                "or classifiers say which images a dataset had?")


class AuditConfig(Section):
    name: str = Field("audit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the result is "
                      "<run>/audit/<name>/result.json, without a run <out>/<name>/result.json")
    out: str = Field("runs", min_length=1, description="folder of audits without a run")
    audit: AuditSection
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()


def load_audit(path: str, overrides: Sequence[str] = ()) -> AuditConfig:
    """Configuration of a YAML file. Raises ConfigError with every mistake, those of run and data included."""
    return parse_audit(read(path, overrides), path)


def parse_audit(raw: Mapping[str, Any], where: str = "configuration") -> AuditConfig:
    """Configuration of a mapping. Raises ConfigError with every mistake."""
    if problems := secret_problems(raw):
        raise ConfigError(where, problems)
    config, run = None, None
    try:
        config = AuditConfig(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        problems += mistakes(error, AuditConfig, "")
    section = raw.get("audit")
    if isinstance(section, Mapping) and isinstance(folder := section.get("run"), str) and folder:
        try:
            run = open_samples(folder)
        except UsageError as error:
            problems.append(f"audit.run: {error}")
    if config is not None:
        problems += _problems(config, run)
    if problems or config is None:
        raise ConfigError(where, problems)
    return config


def _problems(config: AuditConfig, run: Run | None) -> list[str]:
    section, problems = config.audit, list[str]()
    if section.copies is not None:
        problems += [f"audit.copies.{line}" for line in copies_config.check(section.copies, run)]
        if section.run is None:
            problems.append("audit.run: is missing; copies are looked for among the samples of a run")
    if section.membership is not None:
        found = shadows.check(section.membership, config.cluster)
        if run is not None and not found:
            found = shadows.made_otherwise(section.membership, run, config.cluster)
        problems += [f"audit.membership.{line}" for line in found]
    if section.copies is None and section.membership is None:
        problems.append("audit: has nothing to do; give it the section copies, or membership")
    if run is not None and (pending := run.totals().pending):
        problems.append(f"audit.run: {pending} planned samples of {run.folder} are not decided yet, and an audit looks "
                        "at all of them; run `rayexpand expand` with its file first")
    return problems


def audit(config: AuditConfig, find: Work, machines: Machines, progress: Listener) -> dict[str, Any]:
    """What the sections of the file found, as written; `file` says where. `find` compares images with seeds, `machines`
    make shadow pipelines and ask them, in this process or on a cluster."""
    from rayexpand.evaluation.copies import audit_copies
    from rayexpand.studies.attacks import audit_membership

    section, place = config.audit, place_of(config)
    if section.membership is not None and section.run is not None:
        shadows.refuse_unrelated(section.membership, open_samples(section.run))
    if section.copies is not None:
        assert section.run is not None
        started = time.perf_counter()
        found = audit_copies(open_samples(section.run), _on_device(section.copies, config.device), config.runtime,
                             place.at("copies"), find, progress)
        _store(place, config, "copies", {**found, "seconds": time.perf_counter() - started})
    if section.membership is not None:
        started, folder = time.perf_counter(), str(place.files.at(place.at("membership")))
        found = audit_membership(shadows.on_device(section.membership, config.device), folder, machines, progress,
                                 runtime=config.runtime, cluster=config.cluster)
        _store(place, config, "membership", {**found, "seconds": time.perf_counter() - started})
    return {**(healthy_json(place.files, place.at(RESULT)) or {}),
            "file": str(place.files.at(place.at(RESULT)))}


def _on_device(copies: CopiesConfig, device: str) -> CopiesConfig:
    """With the extractor there, unless it says where itself."""
    if copies.extractor.device != "auto":
        return copies
    extractor = copies.extractor.model_copy(update={"device": device})
    return copies.model_copy(update={"extractor": extractor})


class AuditPlace(NamedTuple):
    """Where an audit lies: a folder below `files`, itself for an audit without a run."""

    files: Files
    folder: str

    def at(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def place_of(config: AuditConfig) -> AuditPlace:
    if config.audit.run is None:
        return AuditPlace(open_files(f"{config.out.rstrip('/')}/{config.name}"), "")
    return AuditPlace(open_samples(config.audit.run).files, f"{FOLDER}/{config.name}")


def _store(place: AuditPlace, config: AuditConfig, section: str, found: dict[str, Any]) -> None:
    """Writes the entry of a section beside those of others."""
    for name in (place.folder, ".tmp"):
        place.files.make_folder(name)
    entry = {**found, "created": time.time(), "version": __version__,
             "config": getattr(config.audit, section).model_dump(mode="json")}
    replace_json(place.files, place.at(RESULT), {
        **(healthy_json(place.files, place.at(RESULT)) or {}), "name": config.name, "run": config.audit.run,
        section: entry})
    if place.folder:
        register(place.files, config.name)
