"""What the page of a run shows of its audit `copies`: what the extractor sees, counts, and samples beside the seeds
they are nearest to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import ClassTable, data_place
from rayexpand.evaluation.audit_files import copy_rows, latest, numbers
from rayexpand.runs.status import RunView
from rayexpand.storage.tables import find_rows, texts

ROWS, NEAREST = 20, 3
KNOWN = {"exact": "the seed itself", "jpeg_75": "JPEG of quality 75", "crop_80": "the middle, 80 % of each side",
         "flip": "left and right exchanged", "blur_1": "blurred by 1 pixel", "brightness_1.2": "brightness times 1.2",
         "img2img_0.1": "image to image, strength 0.1", "img2img_0.3": "image to image, strength 0.3"}
SCOPES = {"own": "the seed it was made from", "class": "another seed of its class", "all": "another seed of all"}


class CopyRow(NamedTuple):
    """A sample beside its own seed and the seeds nearest to it; pictures are of reports.run."""

    name: str  # class
    seed: Any  # the sample, which stands where a sheet has the seed
    samples: tuple[Any, ...]


def copies_section(view: RunView, classes: ClassTable, seed_pictures: Callable[[RunView, list[str]], Sequence[Any]],
                   encoded_picture: Callable[[bytes | None, str, str], Any]) -> dict[str, Any] | None:
    """The section of the newest audit, None where there is none."""
    found = latest(view.files, "copies")
    if found is None:
        return None
    rows = _chosen(view, found)
    return {**found, "known": [(KNOWN.get(kind, kind), one) for kind, one in found["known_copies"].items()],
            "counts": [(SCOPES[scope], one) for scope, one in found.get("scopes", {}).items()],
            "shown": [(title, _pictures(view, classes, lines, seed_pictures, encoded_picture))
                      for title, lines in rows.items()]}


def _chosen(view: RunView, found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows with the highest similarity to another seed, and rows chosen by a key."""
    scope, audit = found["within"], found["audit"]
    table = copy_rows(view.files, audit, ["sample_id", scope])
    s_N = numbers(table, scope)
    highest = np.argsort(-np.where(np.isnan(s_N), -np.inf, s_N), kind="stable")[:ROWS]
    key_N = PlanRng(0, "page").per_seed("copies", texts(table["sample_id"]))
    columns = ["sample_id", "file", "label", "own", "own_id", scope, "top_id", "top"]
    return {title: copy_rows(view.files, audit, columns, rows).to_pylist() for title, rows in (
        ("nearest to another seed", highest), ("chosen by chance", np.argsort(key_N, kind="stable")[:ROWS]))}


def _pictures(view: RunView, classes: ClassTable, lines: Sequence[Mapping[str, Any]],
              seed_pictures: Callable[[RunView, list[str]], Sequence[Any]],
              encoded_picture: Callable[[bytes | None, str, str], Any]) -> list[CopyRow]:
    ids = list(dict.fromkeys(one for line in lines for one in (line["own_id"], *line["top_id"][:NEAREST])))
    shown = dict(zip(ids, seed_pictures(view, ids), strict=True))
    rows = []
    for line in lines:
        (sample,) = find_rows(view.files, data_place(line["file"]), "sample_id", line["sample_id"]).to_pylist()
        near = zip(line["top_id"][:NEAREST], line["top"][:NEAREST], strict=True)
        captions = [(line["own_id"], _caption("own", line["own"])),
                    *((one, _caption("own" if one == line["own_id"] else "", s)) for one, s in near)]
        rows.append(CopyRow(classes.display[line["label"]],
                            encoded_picture(sample["image"]["bytes"], f"sample {line['sample_id']}", ""),
                            tuple(replace(shown[one], caption=text) for one, text in captions)))
    return rows


def _caption(what: str, s: float | None) -> str:
    return " ".join(filter(None, [what, "no similarity" if s is None or np.isnan(s) else f"{s:.4f}"]))
