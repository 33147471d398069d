"""Samples in which a guide sees the least of their own class, without sampling anything again (GIF, figure 5b).

    p_own       softmax over the classes of the run, at the label of the sample, by the guide

The guide alone is loaded, and looks at the samples of seeds that a key chooses, so that of a run of millions a few
thousand are read. Failures of those are the lowest p_own, not the worst of the run.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from rayexpand.contract.errors import ConfigError, RowFault, UsageError
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.data.pixels import decode, prepare
from rayexpand.models.guide_files import check_guide
from rayexpand.models.scores import log_probabilities
from rayexpand.runs.lookup import keyed_seeds, rows_of, seed_table
from rayexpand.runs.status import RunView, read_classes, view_run

log = logging.getLogger(__name__)

BATCH = 64
CLASSES_AT_ONCE = 8  # whose rows are held together
_NO_CHANCE = RowRng(0, "evaluate", "", 0)  # "center" draws nothing


def failures(folder: str, *, guide: str | None = None, checkpoint: str | None = None, images: int = 2000
             ) -> dict[str, Any]:
    """What the guide sees in about `images` samples, as JSON takes it: `guide`, `judged` (sample_id, seed_id, label,
    probability of its own class, `seen_as` and its probability, by rising probability of its own), `named_right`.
    `guide`: null takes that of the run. Raises ConfigError before it is loaded."""
    view = view_run(folder)
    said = view.run["config"].get("guide") or {}
    weights = guide or said.get("weights") or ""
    checkpoint = checkpoint if guide else said.get("checkpoint")
    problems = [f"guide: {line}" for line in check_guide(weights, checkpoint)] if weights else [
        "guide: the run names none; name one with --guide"]
    if not any(receipt.kept for receipt in view.receipts):
        problems.append(f"{folder} has no kept sample yet; run `rayexpand expand` first")
    if problems:
        raise ConfigError("--failures", problems)
    from rayexpand.models.guides import guide_hash, load_guide

    classes = read_classes(view)
    loaded = load_guide(weights, checkpoint, classes.asked, device=view.run["config"]["prior"]["device"],
                        class_keys=classes.key)
    judged = sorted(_judged(view, loaded, classes, images), key=lambda one: (one["probability"], one["sample_id"]))
    if not judged:
        raise UsageError(f"--failures: {folder} has no sample that can be decoded; `rayexpand verify --pixels` names "
                         "what is damaged")
    return {"run": str(view.files.root), "run_digest": view.run["run_digest"],
            "guide": {"name": weights, "sha256": guide_hash(weights, checkpoint)}, "judged": judged,
            "named_right": float(np.mean([one["seen_as"] == one["label"] for one in judged]))}


def _judged(view: RunView, guide: Any, classes: ClassTable, images: int) -> Iterator[dict[str, Any]]:
    """What the guide says of the rows of some seeds of every class, read a few classes at a time."""
    table = seed_table(view)
    per_class = max(1, math.ceil(images / max(1, len(classes))))
    most = max(1, math.ceil(view.run["planned"] / max(1, table.num_rows)))  # copies of a seed, about
    chosen = keyed_seeds([table], max(1, math.ceil(per_class / most)), min(len(classes), images))
    labels = list(chosen)
    for start in range(0, len(labels), CLASSES_AT_ONCE):
        ids = [seed_id for label in labels[start:start + CLASSES_AT_ONCE] for seed_id in chosen[label]]
        rows = list(rows_of(view, table, ids, most).kept.values())
        for first in range(0, len(rows), BATCH):
            yield from _seen(rows[first:first + BATCH], guide)


def _seen(rows: list[dict[str, Any]], guide: Any) -> Iterator[dict[str, Any]]:
    pixels, whole = list[np.ndarray](), list[dict[str, Any]]()
    for row in rows:
        try:
            image, _ = decode(row["image"]["bytes"])
        except RowFault as fault:
            log.warning("%s is not looked at: %s", row["sample_id"], fault)
            continue
        pixels.append(prepare(image, guide.size[0], "center", _NO_CHANCE, cut_by=guide.filter))
        whole.append(row)
    if not whole:
        return
    _, logits_BK = guide.seen(pixels)
    for row, p_K in zip(whole, np.exp(log_probabilities(logits_BK)), strict=True):
        top = int(p_K.argmax())
        yield {"sample_id": row["sample_id"], "seed_id": row["seed_id"], "copy": row["copy"], "label": row["label"],
               "probability": float(p_K[row["label"]]), "seen_as": top, "seen_probability": float(p_K[top])}
