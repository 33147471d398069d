"""What calls of the API return: plain data, a table, and that table in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from rayexpand.contract.errors import three_digits
from rayexpand.contract.secrets import masked

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Event:
    """How far a task is: `done` of `total`, and counts such as rows kept or actors alive. `rate`: of a run, its images
    per second, 0 before it is known."""

    task: str
    done: int
    total: int
    facts: Mapping[str, int] = field(default_factory=dict)
    rate: float | None = None


class Result:
    """What a call found: plain data, a table, and that table in a notebook."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    def table(self) -> Table:
        """(titles, rows of text)."""
        rows: list[tuple[str, ...]] = [(name.replace("_", " "), text(value)) for name, value in self.to_dict().items()]
        return (type(self).__name__, ""), rows

    def below(self) -> list[str]:
        """Sentences that stand below the table: they are no cells, which they would make hundreds of letters wide."""
        return []

    def _repr_html_(self) -> str:
        titles, rows = self.table()
        lines = ["".join(f"<th>{html.escape(one)}</th>" for one in titles)]
        lines += ["".join(f"<td>{html.escape(masked(one))}</td>" for one in row) for row in rows]
        below = "".join(f"<p>{html.escape(masked(one))}</p>" for one in self.below())
        return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>" + below


class Paged(Result):
    """A folder with a page, which the verb that made it has written."""

    folder: str

    @property
    def page(self) -> str:
        """Where the page is."""
        from rayexpand.storage.places import open_files

        return str(open_files(self.folder).at("report.html"))


@dataclass(frozen=True)
class Checked(Result):
    """A file with every default filled in, what its dataset holds, and what is wrong with the world around it."""

    kind: str
    config: dict[str, Any]
    problems: list[str]
    dataset: dict[str, Any] | None = None  # see data.seeds.survey; None where it cannot be listed
    notes: list[str] = field(default_factory=list)  # how the generator of a run will be sampled
    sees: str = ""  # of a study: which difference it can show
    counts: list[str] = field(default_factory=list)  # of a sweep: its trials, classifiers, expansions

    def table(self) -> Table:
        from rayexpand.data.seeds import survey_lines

        rows: list[tuple[str, ...]] = [*survey_lines(self.dataset or {}), *(("sampling", one) for one in self.notes)]
        return (self.kind, str(self.config.get("name", ""))), rows

    def below(self) -> list[str]:
        return [*([f"study: {self.sees}"] if self.sees else []), *(f"sweep: {one}" for one in self.counts),
                *(f"problem: {one}" for one in self.problems)]


@dataclass(frozen=True)
class Planned(Result):
    """What a run would make, and what still keeps it from starting. `estimate` is a runs.estimate.Estimate."""

    estimate: Any
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {**self.estimate.to_json(), "problems": self.problems}

    def table(self) -> Table:
        from rayexpand.data.seeds import survey_lines

        return ("what", "estimate", "how it is known"), [
            *self.estimate.table(), *((f"dataset: {name}", value, "") for name, value in survey_lines(
                self.estimate.dataset or {}))]

    def below(self) -> list[str]:
        return [f"not yet ready to expand: {one}" for one in self.problems]


@dataclass(frozen=True)
class PlannedStages(Result):
    """What a file would make and cost by stage, and what still keeps it from starting."""

    plan: Any
    problems: list[str]
    verb: ClassVar[str]

    @property
    def costs(self) -> Any:
        """runs.stages.Stages."""
        return self.plan.costs

    def to_dict(self) -> dict[str, Any]:
        return {**self.plan.to_json(), "problems": self.problems}

    def table(self) -> Table:
        return ("stage", "what", "hours", "wall time", "USD", "bytes", "how hours are known"), self.costs.table()

    def below(self) -> list[str]:
        return [f"not yet ready to {self.verb}: {one}" for one in self.problems]


@dataclass(frozen=True)
class PlannedFit(PlannedStages):
    """Artifacts. `plan` is a runs.stages.Stages."""

    verb: ClassVar[str] = "fit"

    @property
    def costs(self) -> Any:
        return self.plan


@dataclass(frozen=True)
class PlannedStudy(PlannedStages):
    """Fits, expansions, trainings, and which difference they can show. `plan` is a studies.plan.StudyPlan."""

    verb: ClassVar[str] = "train"

    def below(self) -> list[str]:
        found = self.plan
        controls = f", and {found.controls:,} of controls" if found.controls else ""
        done = f"; {found.done:,} are done" if found.done else ""
        return [f"arms: {', '.join(found.arms)}; seeds: {', '.join(map(str, found.seeds))}",
                f"trainings: {found.trainings:,}{controls}{done}", f"study: {found.sees['sentence']}",
                *super().below()]


@dataclass(frozen=True)
class PlannedSweep(PlannedStages):
    """Trials and epochs. `plan` is a studies.sweep.plan.SweepPlan."""

    verb: ClassVar[str] = "sweep"

    def below(self) -> list[str]:
        return [f"sweep: {self.plan.sentence}", *super().below()]


@dataclass(frozen=True)
class PlannedLoop(PlannedStages):
    """Rounds, with scoring and guides between them. `plan` is a studies.rounds.plan.LoopPlan."""

    verb: ClassVar[str] = "expand"

    def below(self) -> list[str]:
        found = self.plan
        unspent = f"; {found.unspent:,} are left unspent" if found.unspent else ""
        guided = f"; guided from round {found.guided_from}" if found.guided_from else ""
        return [f"loop: {found.budget:,} samples of {found.seeds:,} seeds in {len(found.rounds)} rounds of "
                f"{', '.join(f'{rows:,}' for rows in found.rounds)}{guided}{unspent}", *super().below()]


@dataclass(frozen=True)
class Artifact(Result):
    """A folder that `fit` made, or found made, and how that was."""

    folder: str
    facts: dict[str, Any]
    link: str = ""  # <out>/<name>-<role>, which leads to what was made last under that name

    def to_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, **self.facts}


@dataclass(frozen=True)
class Selected(Result):
    """A decision beside a run."""

    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.facts

    def table(self) -> Table:
        found = self.facts
        rows: list[tuple[str, ...]] = [(name, f"{found[name]:,}") for name in ("planned", "kept", "rejected", "failed")]
        rows += [(f"dropped: {reason}", f"{count:,}") for reason, count in found["reasons"].items()]
        rows.append(("expansion ratio", f"{found['ratio_before']:.3g} -> {found['ratio']:.3g}"))
        if found.get("threshold") is not None:
            rows.append(("threshold", f"{found['threshold']:.6g}"))
        return (f"selection {found['name']}", str(found["run"])), rows


@dataclass(frozen=True)
class Scores(Result):
    """How far samples are from real images."""

    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.facts

    def table(self) -> Table:
        """Each distance with its floor: the same statistic between halves of the real images."""
        found = self.facts
        rows: list[tuple[str, ...]] = [(name, _number(one["value"]), *_beside(one))
                                       for name, one in found["scores"].items()]
        for line in found.get("classes", {}).get("worst", ()):
            rows.append((f"coverage of {line['class']}", _number(line["coverage"]), f"real {line['real']:.4g}",
                         f"{line['generated_minus_real']:.4g}"))
        return ((f"{found['n_samples']:,} samples, {found['n_reference']:,} real", str(found["extractor"]["name"]),
                 "floor, images", "value - floor"), rows)


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.6g}"


def _beside(score: Mapping[str, Any]) -> tuple[str, str]:
    """What a score is to be read against, and how far it is from it."""
    for name, words in (("floor", f"{score.get('floor_images', 0):,}"), ("reference", "real"),
                        ("training_alone", "without samples")):
        if (other := score.get(name)) is not None and score["value"] is not None:
            return f"{other:.6g}, {words}", f"{score['value'] - other:.6g}"
    return "", ""


@dataclass(frozen=True)
class Audited(Result):
    """What an audit found, one entry for each of its sections."""

    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.facts

    def table(self) -> Table:
        rows = [row for name, lines in (("copies", copy_lines), ("membership", membership_lines)) if name in self.facts
                for row in lines(self.facts[name])]
        return (f"audit {self.facts['name']}", str(self.facts["run"] or "")), rows


def copy_lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The audit `copies` in lines: what the extractor sees, and copies by scope."""
    rows: list[tuple[str, ...]] = [("extractor", found["extractor"]["name"])]
    rows += [(f"found of {kind}", ", ".join(f"{scope} {100 * share:.0f} %" for scope, share in one["found"].items()))
             for kind, one in found["known_copies"].items()]
    if not found["sees_copies"]:
        return [*rows, ("verdict", found["words"])]
    for scope, one in found["scopes"].items():
        rows.append((f"copies of {SCOPES[scope]}", f"{one['copies']:,} of {found['samples']:,}"))
        if null := one.get("null"):
            high = 100 * null["excess"]["high"]
            rows.append((f"near {SCOPES[scope]}", f"{null['observed']:,} above tau, {null['expected']:.3g} expected; "
                         f"excess at most {high:.2g} %"))
    return rows


def membership_lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The audit `membership` in lines: every attack, what it says, and what it does not."""
    rows: list[tuple[str, ...]] = [("membership", f"{found['images']:,} images, {found['shadows']} shadows")]
    for name, one in found["lines"].items():
        tpr, auc, null = one["tpr_at_fpr_001"], one["auc"], one["null"]["auc"]
        rows.append((f"attack {name}" if name != "private" else name, f"TPR {_shares(tpr)} at FPR 0.1 %, AUC "
                     f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]; permuted {null['value']:.3f} "
                     f"[{null['low']:.3f}, {null['high']:.3f}]"))
    return rows + [("", line) for line in (*found["says"], *found["limits"])]


def _shares(one: Mapping[str, float]) -> str:
    return f"{100 * one['value']:.2g} % [{100 * one['low']:.2g}, {100 * one['high']:.2g}]"


SCOPES = {"own": "the own seed", "class": "another seed of the class", "all": "another seed"}


@dataclass(frozen=True)
class PreparedData(Result):
    """A published dataset in its official layout, ready to be read. `sections` has the `data` of a job for each part,
    `published` the numbers of images that `images` should be, `notes` what differs and what is not published."""

    name: str
    split: str
    label: str
    classes: int
    images: Mapping[str, int]
    published: Mapping[str, int]
    sections: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, bool]  # path -> whether this call wrote it
    groups: str | None
    notes: Sequence[str]

    def table(self) -> Table:
        rows: list[tuple[str, ...]] = [(part, f"{count:,} images, {self.published.get(part, 0):,} published")
                                       for part, count in self.images.items()]
        return (f"{self.name}, {self.split}", f"{self.classes:,} classes"), rows

    def job_text(self) -> str:
        """The sections `data` and `test` of a job, as YAML; further parts as comments."""
        lines, used = [], set[str]()
        for section, parts in (("data", ("train", "all")), ("test", ("test", "val", "valid"))):
            if part := next((one for one in parts if one in self.sections), None):
                used.add(part)
                lines.append(_one_line({section: self.sections[part]}))
        lines += [f"# {_one_line({part: section})}" for part, section in self.sections.items() if part not in used]
        return "\n".join([*lines, *([f"# groups: {self.groups}"] if self.groups else [])])


@dataclass(frozen=True)
class ClusterJob(Result):
    """A job on a cluster: how it ended, or stands where it was not waited for."""

    submission_id: str
    status: str
    exit_code: int
    message: str = ""
    attempts: int = 1

    def table(self) -> Table:
        return ("job", ""), [(name.replace("_", " "), text(value)) for name, value in self.to_dict().items()
                             if value != ""]


def _one_line(content: Mapping[str, Mapping[str, Any]]) -> str:
    import yaml

    ((name, section),) = content.items()
    body = yaml.safe_dump(dict(section), default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"{name}: {body.strip()}"


def text(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float):
        return three_digits(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
