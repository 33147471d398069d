"""A verb and what it works on, as a job: its name, its shell line, and whether its files would be where it starts.

A job starts in a folder of its own that is removed after it. Small files of the working directory are there
(package.py), the job file and the machine file always; data, models and results are not.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import EXIT_USAGE, ConfigError, UsageError
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import read
from rayexpand.on_ray.package import LARGE_BYTES
from rayexpand.runs.config import parse
from rayexpand.studies.rounds.config import parse_loop, run_in

FILE_VERBS = ("expand", "train", "fit", "evaluate", "audit", "select", "sweep", "plan", "validate", "bench")
WRITING = ("expand", "train", "fit", "sweep", "report")  # below `out`
RUN_VERBS = ("retry", "verify", "report", "card")
# Fields whose value is a file or folder where one of that name is here; others are where they hold a slash, too.
FILES = ("ids", "classes", "captions", "features", "weights", "checkpoint", "file", "model", "generator", "guide",
         "class_map", "groups", "group", "scores", "config", "vae", "timm")
STUDY_FILE, RUN_FILE = "study (a file)", "run (a file)"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|(^|_)KEY(_|$)|APIKEY", re.IGNORECASE)


@dataclass(frozen=True)
class JobOrder:
    """What is asked for. `trust`: dotted names of methods of the user's own; `machine`: a machine file; `raw`: the
    content of the file with it and the overrides, as the job will see it, nothing for the verb of a folder."""

    verb: str
    target: str
    overrides: Sequence[str] = ()
    machine: str | None = None
    trust: Sequence[str] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_file(self) -> bool:
        return self.verb in FILE_VERBS or (self.verb == "report" and self.target.endswith((".yaml", ".yml")))

    @property
    def is_loop(self) -> bool:
        return "rounds" in self.raw

    @property
    def run(self) -> dict[str, Any]:
        """The sections of a run: of a loop those of its section `run`, written out, else all."""
        return dict(run_in(self.raw.get("run")) or {}) if self.is_loop else dict(self.raw)

    @property
    def files(self) -> list[str]:
        """What must be there whatever else is."""
        return [*([self.target] if self.takes_file else []), *([self.machine] if self.machine else [])]

    def arguments(self, target: str, machine: str | None) -> list[str]:
        """The command line of the job, with the files where they are for it."""
        return [self.verb, *(["--pivot"] if self.verb == "report" and self.takes_file else []), target,
                *(["--machine", machine] if machine else []),
                *(part for one in self.overrides for part in ("--set", one)),
                *(part for one in self.trust for part in ("--trust", one))]

    def name_and_folder(self) -> tuple[str, str]:
        """What it is called, and where it writes. Raises UsageError for what is no job; ConfigError with the mistakes
        of a run or a study: the job itself checks other files."""
        if not self.takes_file:
            if self.verb not in RUN_VERBS:
                raise UsageError(f"{self.verb!r} does not run as a job; these do: "
                                 f"{', '.join(dict.fromkeys((*FILE_VERBS, *RUN_VERBS)))}")
            if _is_relative(self.target):
                raise UsageError(f"{self.target}: a job does not start in this folder; give the path that every node "
                                 f"of the cluster sees, such as {Path(self.target).absolute()}")
            return self.target.rstrip("/").rpartition("/")[2], self.target.rstrip("/")
        raw: dict[str, Any] = {key: value for key, value in self.raw.items() if key != "kind"}
        found: Any = None
        if self.is_loop:
            found = parse_loop(raw, self.target).run if self.verb == "expand" else None
            raw = self.run
        elif self.verb == "train":
            from rayexpand.studies.config import parse_study

            found = parse_study(raw, self.target)
        elif self.verb == "expand" or (self.verb in ("plan", "bench") and "method" in raw):
            found = parse(raw, self.target)
        name = str(found.name if found else raw.get("name", Path(self.target).stem))
        out = str(found.out if found else raw.get("out", "runs"))
        return name, f"{out.rstrip('/')}/{name}"


def checked(job: JobOrder) -> JobOrder:
    """The order with the content of its file, where it has none yet. Raises ConfigError for secrets, which anyone who
    sees the dashboard could read."""
    raw = job.raw or (read(job.target, job.overrides) if job.takes_file else {})
    run = {"run": run_in(raw.get("run"))} if "rounds" in raw else {}
    if problems := secret_problems({"target": job.target, **raw, **run, **(read(job.machine) if job.machine else {})}):
        raise ConfigError(job.target, problems)
    return replace(job, raw=raw)


def unsent_problems(job: JobOrder, sent: Set[str], root: Path | None = None) -> list[str]:
    """What a job would look for where it starts and not find, and a relative `out`, each with what to give instead.
    `sent`: relative paths that are there; `root`: the folder they are sent from, None where none is."""
    if not job.takes_file:
        return []
    raw, problems = dict(job.raw), list[str]()
    out = job.name_and_folder()[1].rpartition("/")[0]
    if job.verb == "fit" and "fit" not in raw:
        problems.append("out: what `fit` makes for the file of a run goes to ./artifacts, and a job's working "
                        "directory is removed after it. Give `fit` a file of its own, with an `out` that every node "
                        "sees")
    elif (job.verb in WRITING or (job.verb == "audit" and not raw["audit"].get("run"))) and _is_relative(out):
        field = "run.out" if job.is_loop else "out"
        problems.append(f"{field}: {out!r} is relative, and a job's working directory is removed after it. Give a path "
                        f"or URL that every node of the cluster sees: --set {field}={Path(out).absolute()}")
    if "://" in out:
        problems += [f"expansions.{name}.fit.adapter: a fine-tuning keeps its checkpoints in a folder that all nodes "
                     f"share, and out is an object store ({out}); give a folder that every node sees: --set "
                     "out=/shared/runs" for name, one in (raw.get("expansions") or {}).items()
                     if isinstance(one, Mapping) and (one.get("fit") or {}).get("adapter") is not None]
    if isinstance(study := raw.get("study"), str) and Path(study).is_file():
        raw |= {STUDY_FILE: study, "study": read(study)}
    if job.is_loop and isinstance(run := raw.get("run"), str) and Path(run).is_file():
        raw |= {RUN_FILE: run, "run": read(run)}
    if job.verb != "plan":  # which estimates without data
        problems += [f"{name}: {place!r} is not sent ({_why(place, root)}). Give a path or URL that every node of the "
                     f"cluster sees: {_remedy(name, place)}" for name, place in _places(raw)
                     if _is_relative(place) and not fnmatch.filter(sent, os.path.normpath(place))]
    return problems


def _why(place: str, root: Path | None) -> str:
    at = Path(place).absolute()
    if root is None:
        return "nothing but the job file is"
    if not at.exists():
        return "it is not there" if "*" not in place else "data does not travel with a job"
    if not at.resolve().is_relative_to(root.resolve()):
        return f"it is outside of --working-dir {root}"
    if at.is_file() and at.stat().st_size > LARGE_BYTES:
        return f"files above {LARGE_BYTES >> 20} MB stay here"
    return "runs/, data/, hidden files, links, keys, and what git ignores stay here"


def _remedy(name: str, place: str) -> str:
    said = f"{name.removesuffix(' (a file)')}={Path(place).absolute()}"
    return f"{said}, in the file" if re.search(r"\.\d+(\.|$)", name) else f"--set {said}"


def _is_relative(place: str) -> bool:
    return "://" not in place and not Path(place).expanduser().is_absolute()


def _places(raw: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(field, text) of what a file names: dataset and runs, and other texts that are a file or folder here."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            yield from _places(value, f"{above}{key}.")
        elif isinstance(value, list):
            yield from _places({f"{key}.{number}": one for number, one in enumerate(value)}, above)
        elif isinstance(value, str) and key != "out" and _is_place(str(key), value, above):
            yield f"{above}{key}", value.rpartition("::")[2]


def _is_place(key: str, value: str, above: str) -> bool:
    if key in ("path", "run", STUDY_FILE, RUN_FILE) or above.endswith("sources."):
        return True
    return (key in FILES or "/" in value or above.endswith("artifacts.")) and Path(value).exists()


def environment_of(asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(names the cluster must have, settings to send)."""
    references, settings = [], {}
    for one in asked:
        name, sign, value = one.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"--env {name}: not the name of an environment variable")
        if sign and SECRET_NAME.search(name):
            raise UsageError(f"--env {name}=...: looks like a secret, and what is sent with a job can be read by "
                             f"everyone who sees the cluster's dashboard and logs. Set it on the nodes "
                             f"(cluster/README.md), and give --env {name}.")
        if sign:
            settings[name] = value
        else:
            references.append(name)
    return references, settings


def entrypoint(arguments: Sequence[str], references: Sequence[str], *, python: str | None, here: bool) -> str:
    """The shell line of a job; the exit code of rayexpand is its exit code. `here`: the cluster may be on this machine,
    or a port of another one is forwarded to it."""
    if python:
        line = f"p={shlex.quote(python)}; "
    elif here:  # our interpreter if it has ray there
        probe = shlex.quote("import importlib.util as u, sys; sys.exit(u.find_spec('ray') is None)")
        line = f'p={shlex.quote(sys.executable)}; "$p" -c {probe} 2>/dev/null || p=python; '
    else:
        line = "p=python; "
    for name in references:
        line += (f'[ -n "${{{name}:-}}" ] || {{ echo "rayexpand: {name} is not set on the cluster; set it on the nodes '
                 f'by reference to a secret" >&2; exit {EXIT_USAGE}; }}; ')
    return f'{line}exec "$p" -m rayexpand {shlex.join(arguments)}'
