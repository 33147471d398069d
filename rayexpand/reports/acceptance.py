"""What the judge of a run accepted, by class and by prompt, for its page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rayexpand.contract.errors import RayexpandError
from rayexpand.contract.schema import ClassTable, Receipt, Status, spoken, spoken_name
from rayexpand.runs.accept import ABOVE, SCORE, TRY
from rayexpand.runs.plan import Plan
from rayexpand.runs.run import open_run
from rayexpand.runs.status import RunView

MOST = 25  # lines of a table: the lowest
_COLUMNS = ["sample_id", "row", "label", "attempt", "prompt", "scores"]


class Attempt(NamedTuple):
    label: int
    template: str  # the prompt with its class as {name}, "" where it is not known
    accepted: bool
    decides: bool  # it is the attempt that the row was decided by


@dataclass(slots=True)
class Share:
    name: str
    attempts: int = 0
    accepted: int = 0

    @property
    def share(self) -> float:
        return self.accepted / self.attempts


def acceptance(view: RunView, classes: ClassTable, receipts: list[Receipt]) -> dict[str, Any] | None:
    """Attempts that were judged in these files, and what was accepted of them; None for a run without a judge."""
    if not (accept := view.run["config"].get("accept")) or not receipts:
        return None
    prompts = _prompts(view)
    found = [one for receipt in receipts for one in _attempts(view, receipt, classes, prompts)]
    if not found:
        return None
    by_class, by_template = dict[str, Share](), dict[str, Share]()
    for one in found:
        for lines, name in ((by_class, classes.display[one.label]), (by_template, one.template)):
            line = lines.setdefault(name, Share(name))
            line.attempts, line.accepted = line.attempts + 1, line.accepted + one.accepted
    decided = [one.accepted for one in found if one.decides]
    return {"attempts": len(found), "accepted": sum(one.accepted for one in found), "words": _words(accept),
            "rows": len(decided), "never": len(decided) - sum(decided), "best": accept["exhausted"] == "best",
            "by_class": _lowest(by_class), "by_template": _lowest(by_template) if len(by_template) > 1 else [],
            "classes": len(by_class), "templates": len(by_template)}


def _lowest(lines: Mapping[str, Share]) -> list[Share]:
    return sorted(lines.values(), key=lambda line: (line.share, line.name))[:MOST]


def _words(accept: Mapping[str, Any]) -> str:
    score = "confidence" if accept["score"] == "confidence" else f"cosine to the {accept['to']}"
    above = accept["above"]
    if above == "class":
        above = ("the mean of real images of the class" if accept["quantile"] is None else
                 f"the quantile {accept['quantile']:g} of real images of the class")
        above += f" less {accept['deviations']:g} standard deviations" if accept["deviations"] else ""
    return f"{score} above {above}, in up to {accept['attempts']} attempts"


def _attempts(view: RunView, receipt: Receipt, classes: ClassTable,
              prompts: Callable[[Mapping[str, Any], int], str]) -> Iterator[Attempt]:
    """Every attempt of the rows of a file that has a score."""
    kept = view.store.data(receipt, _COLUMNS).to_pylist()
    others = view.store.refused(receipt).select([*_COLUMNS, "status"]).to_pylist()
    for row in [*kept, *(row for row in others if row["status"] == Status.REJECTED)]:
        scores = {one["name"]: one["value"] for one in row["scores"] or ()}
        for number in sorted(int(name.removeprefix(TRY)) for name in scores if name.startswith(TRY)):
            yield Attempt(row["label"], _template(prompts(row, number), row["label"], classes), False, False)
        if np.isfinite(scores.get(SCORE, np.nan)):
            yield Attempt(row["label"], _template(row["prompt"], row["label"], classes),
                          "status" not in row and scores[SCORE] > scores[ABOVE], True)


def _prompts(view: RunView) -> Callable[[Mapping[str, Any], int], str]:
    """The prompt of an attempt of a row, which follows from the plan and is not stored; "" where the method cannot be
    asked here."""
    try:
        plan: Plan | None = open_run(str(view.files.root)).plan
    except RayexpandError:
        plan = None

    def prompt(row: Mapping[str, Any], attempt: int) -> str:
        return "" if plan is None else plan.attempt(row["row"], attempt).prompt

    return prompt


def _template(prompt: str, label: int, classes: ClassTable) -> str:
    """A prompt with {name} in place of the name of its class, so that prompts of several classes are one."""
    name = classes.name[label]
    words = [re.escape(word) for word in sorted({name, spoken(name), spoken_name(name)}, key=len, reverse=True)
             if word.strip()]
    return re.sub(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", "{name}", prompt) if words else prompt
