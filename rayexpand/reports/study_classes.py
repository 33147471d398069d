"""Of a study: where the best arm differs from the baseline, class by class, and what it confuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayexpand.runs.joined import view_samples
from rayexpand.runs.status import read_classes
from rayexpand.studies.results import Predicted, StudyView, run_folder, runs_of

CLASSES, CONFUSED = 8, 10  # classes shown at either end; pairs of classes


def classes_of(study: StudyView, baseline: str | None, best: str | None) -> dict[str, Any] | None:
    """Accuracy by class of the best arm and the baseline over their common seeds, and what is confused most."""
    if not baseline or not best:
        return None
    sides = [{r["seed"]: study.predicted(r["trial"]) for r in study.arms[arm]} for arm in (baseline, best)]
    seeds = [seed for seed in sides[0].keys() & sides[1].keys()
             if all(isinstance(side[seed], Predicted) for side in sides)]
    if not seeds:
        return None
    tables = [_confusion([side[seed] for seed in sorted(seeds)]) for side in sides]  # type: ignore[misc]
    images = {label: sum(n for (true, _), n in tables[0].items() if true == label) for label, _ in tables[0]}
    names = _class_names(study)
    lines: list[dict[str, Any]] = []
    for label, count in sorted(images.items()):
        before, after = (table.get((label, label), 0) / count for table in tables)
        lines.append({"name": _class_name(names, label), "images": round(count / len(seeds)), "baseline": before,
                      "best": after, "difference": after - before})
    lines.sort(key=lambda line: line["difference"])
    pairs = sorted(((n, pair) for pair, n in tables[1].items() if pair[0] != pair[1]), reverse=True)[:CONFUSED]
    return {"lines": lines, "shown": CLASSES if len(lines) > 2 * CLASSES else 0, "seeds": len(seeds), "confused": [
                {"true": _class_name(names, pair[0]), "predicted": _class_name(names, pair[1]),
                 "baseline": tables[0].get(pair, 0) / images[pair[0]], "best": n / images[pair[0]]}
                for n, pair in pairs if pair[0] in images]}


def _confusion(trials: Sequence[Predicted]) -> dict[tuple[int, int], int]:
    """(label, predicted) -> images, summed over trials."""
    counts: dict[tuple[int, int], int] = {}
    for trial in trials:
        pairs, found = np.unique(np.stack([trial.labels, trial.predicted]), axis=1, return_counts=True)
        for (label, predicted), n in zip(pairs.T.tolist(), found.tolist(), strict=True):
            counts[label, predicted] = counts.get((label, predicted), 0) + n
    return counts


def _class_names(study: StudyView) -> Sequence[str]:
    """Names from the first run of the study that can be read; without one, classes are numbers."""
    for run in dict.fromkeys(run for result in study.results for run in runs_of(result)):
        try:
            return read_classes(view_samples(run_folder(study, run))).display
        except Exception:  # noqa: S112  # whatever is wrong with the run, numbers do
            continue
    return ()


def _class_name(names: Sequence[str], label: int) -> str:
    return str(names[label]) if 0 <= label < len(names) else f"class {label}"
