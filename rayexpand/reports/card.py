"""The dataset card: README.md of a run or loop folder, which makes it a dataset that tools can load and people
can judge.

The front matter points at the data files only, so `datasets.load_dataset(<folder>)` never reads refused rows or
receipts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import ClassTable, Reason, huggingface_metadata
from rayexpand.data.seeds import survey_lines
from rayexpand.evaluation.release import ReleaseLine, release_sheet
from rayexpand.methods import label_words_of
from rayexpand.reports.licenses import license_identifier
from rayexpand.reports.templates import render
from rayexpand.runs.cut_prompts import words_of
from rayexpand.runs.export import markdown_cell, published, size_category, stated_license, stated_licenses
from rayexpand.runs.joined import view_samples
from rayexpand.runs.status import RunView, class_counts, history, read_classes, write_page

PROMISE = (
    "On one stack (versions in the receipt, same CPU instruction set or GPU model, dtype, attention backend, thread "
    "count) the decoded pixels, label and draw of a sample are a function of plan, model hashes and sample id only: "
    "any number of actors, any order, kill, resume, retry, or failure of a neighbour. Committed output holds every "
    "planned sample exactly once; a sampler may run twice. Not promised: equal pixels across stacks or batch shapes, "
    "equal encoded bytes across encoder versions, equal Parquet bytes.")
GPU_CAVEAT = "On a GPU, guided methods are called run-to-run bitwise only after a test there has shown it."
LICENSED = ("generator", "adapter", "seeds")
RELEASE = "What is known before these samples are given away. A line that was not measured does not pass."
ALL_CLASSES = 100  # up to here every class has its line


def write_card(folder: str | Path, *, license_id: str | None = None,
               license_of: Mapping[str, str] | None = None) -> Path | str:
    """Writes README.md into a run or loop folder and returns its path or URL.

    `license_id` is a Hugging Face or SPDX license identifier; without one that of the card that is there stays, else
    the card says that the license is unknown. `license_of`: those of `generator`, `adapter` and `seeds`; what is not
    given stays as it was.
    Raises UsageError if there is no run or no such license, EnvironmentFault if the card cannot be written.
    """
    view = view_samples(folder)
    license_id = stated_license(view.files) if license_id is None else license_identifier(license_id)
    licenses = {**stated_licenses(view.files), **_source_licenses(license_of or {})}
    config = published(view.run["config"])
    classes, kept = read_classes(view), class_counts(view)
    lines = [(label, classes.name[label], classes.key[label], classes.count[label], int(kept[label]))
             for label in range(len(classes))]
    reasons = [(reason, Reason(reason).status.value, rows) for reason, rows in view.reasons.items()]
    text = render("card.md.j2", {"cell": markdown_cell, "number": lambda n: f"{n:,}"},
        front=_front_matter(view, license_id, licenses),
        release=sheet_text(release_sheet(view, kept=kept, licenses=licenses)), run={**view.run, "config": config},
        title=view.title, totals=view.totals, reasons=reasons, classes=lines,
        listed=lines if len(lines) <= ALL_CLASSES else [], license_id=license_id, promise=PROMISE,
        gpu_caveat=GPU_CAVEAT, data=data_of(view),
        stacks=view.stacks, source=_fields(config["data"]), settings=_fields(config["method"]),
        cut_words=words_of(view.run["cut_prompts"]) if view.run.get("cut_prompts") else "",
        dataset=survey_lines(view.run.get("dataset", {})), history=history(view.run),
        label_words=label_words_of(view.run["config"]["method"], len(classes)),
        config=yaml.safe_dump(config, sort_keys=False))
    return write_page(view.files, "README.md", text)


def data_of(view: RunView) -> str:
    """Where the data files lie below the folder."""
    return "rounds/*/data" if "rounds" in view.run else "data"


def sheet_text(sheet: Sequence[ReleaseLine]) -> str:
    """The release sheet as a section in Markdown."""
    lines = [f"| {line.name} | {'pass' if line.status == 'pass' else f'**{line.status.upper()}**'} | "
             f"{markdown_cell(line.text)} |" for line in sheet]
    return "\n".join(["## Release", "", RELEASE, "", "| line | | what was found |", "|---|---|---|", *lines, "", ""])


def _source_licenses(given: Mapping[str, str]) -> dict[str, str]:
    """Raises UsageError for a license that is unknown, or of something else."""
    if unknown := [name for name in given if name not in LICENSED]:
        raise UsageError(f"--license-of: {unknown[0]} is none of {', '.join(LICENSED)}")
    return {name: license_identifier(one) for name, one in given.items()}


def _features(classes: ClassTable) -> list[dict[str, Any]]:
    """The columns of the data files as `datasets` reads them from a card."""
    plain = json.loads(huggingface_metadata(classes)[b"huggingface"])["info"]["features"]
    names = {str(label): name for label, name in enumerate(classes.display)}
    own: dict[str, dict[str, Any]] = {
        "image": {"dtype": "image"}, "label": {"dtype": {"class_label": {"names": names}}},
        "scores": {"list": [{"name": "name", "dtype": "string"}, {"name": "value", "dtype": "float64"}]}}
    return [{"name": name, **own.get(name, {"dtype": one.get("dtype")})} for name, one in plain.items()]


def _front_matter(view: RunView, license_id: str | None, licenses: Mapping[str, str]) -> str:
    matter: dict[str, Any] = {
        "pretty_name": view.run["name"], "annotations_creators": ["machine-generated"],
        "task_categories": ["image-classification"], "size_categories": [size_category(view.totals.kept)],
        "tags": ["synthetic", "rayexpand", view.run["config"]["method"]["name"]],
        "configs": [{"config_name": "default",
                     "data_files": [{"split": "train", "path": f"{data_of(view)}/*.parquet"}]}]}
    if any(step["classes"] != view.run["classes"] for step in view.run.get("grown", ())):
        matter["dataset_info"] = {"features": _features(read_classes(view))}  # older files do not know the new classes
    if license_id:
        matter["license"] = license_id
    if licenses:
        matter["source_licenses"] = dict(licenses)
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def _fields(section: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Fields of a configuration section that are set, nested ones with dots."""
    lines: list[tuple[str, Any]] = []
    for name, value in section.items():
        if isinstance(value, Mapping):
            lines += [(f"{name}.{inner}", v) for inner, v in _fields(value)]
        elif value is not None:
            lines.append((name, value))
    return lines
