"""The release sheet of a run: what is known of its samples before they are given away, line by line, never one number.

    line         passes
    copies       no sample is a copy of another seed (own seeds are reported)
    candidates   samples above tau exceed the null rate by less than EXCESS, at 95 % confidence
    membership   the attack finds no more members, at one false alarm in 1,000, than with permuted memberships, where it
                 does of classifiers of the real images, and finds the planted one
    classes      every class of the seeds has a sample
    labels       the guide sees the label of samples at least AGREEMENT times as often as that of real images
    mark         every image says that it is synthetic
    licenses     those of generator, adapter data and seeds are given

A line that was not measured does not pass.
"""

# N samples, K classes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Receipt
from rayexpand.evaluation import copy_statistics as statistics
from rayexpand.evaluation.audit_files import committed_sha256, copy_rows, latest, numbers
from rayexpand.runs.export import stated_licenses
from rayexpand.runs.selections import Selection
from rayexpand.runs.status import RunView, class_counts, read_classes
from rayexpand.storage.files import Files
from rayexpand.storage.tables import read_json

LINES = ("copies", "candidates", "membership", "classes", "labels", "mark", "licenses")
WITH = {"copies": ("copies", "candidates")}  # lines that are required together
EXCESS = 0.001
AGREEMENT = 0.9
SCOPES = {"class": "of the class", "all": "of all"}

Status = Literal["pass", "fail", "not measured"]


class ReleaseLine(NamedTuple):
    name: str
    status: Status
    text: str  # what was found, or what to do


def release_sheet(view: RunView, chosen: Selection | None = None, *, exported: bool = False,
                  kept: np.ndarray | None = None, licenses: Mapping[str, str] | None = None) -> list[ReleaseLine]:
    """The lines of a run, of the samples that a selection keeps where one is given. `exported`: of an export, whose
    images carry the mark. `kept`: int64 (K,), samples of each class, where they have been counted. `licenses`: those of
    generator, adapter and seeds; None: as the card of the run states."""
    if kept is None:
        kept = class_counts(view) if chosen is None else _counts_of(view, chosen)
    return [*_copies(view, chosen), _membership(view), _classes(view, kept), _labels(view, chosen), _mark(exported),
            _licenses(view, stated_licenses(view.files) if licenses is None else licenses)]


def require(sheet: Sequence[ReleaseLine], wanted: Sequence[str]) -> None:
    """Raises UsageError with every wanted line that does not pass."""
    if unknown := [name for name in wanted if name not in LINES]:
        raise UsageError(f"--require: {', '.join(map(repr, unknown))} is no line of the release sheet; those are "
                         f"{', '.join(LINES)}")
    names = {one for name in wanted for one in WITH.get(name, (name,))}
    if failing := [line for line in sheet if line.name in names and line.status != "pass"]:
        raise UsageError("\n  ".join(["nothing was exported, for the release sheet does not pass:", *(
            f"{line.name}: {line.status.upper()}: {line.text}" for line in failing)]))


# ---------------------------------------------------------------------------------------------------------------- lines


def _copies(view: RunView, chosen: Selection | None) -> list[ReleaseLine]:
    found = latest(view.files, "copies")
    if found is None:
        text = "no audit has looked for copies; `rayexpand audit` does"
    elif found["committed_sha256"] != committed_sha256(view.receipts):
        text = f"the run has other samples than when `{found['audit']}` audited it; audit it again"
    else:
        text = found["words"]
    if text or found is None:
        return [ReleaseLine(name, "not measured", text) for name in ("copies", "candidates")]
    scopes = found["scopes"] if chosen is None else _scopes_of(view.files, found, chosen)
    by = f"by {found['extractor']['name']}, audit {found['audit']}"
    copied = [f"{one['copies']:,} of another seed {SCOPES[scope]}" for scope, one in scopes.items() if scope in SCOPES]
    unseen = "" if "all" in scopes else "; seeds of other classes were not looked at"
    lines = [ReleaseLine("copies", _passed(not any(scopes[one]["copies"] for one in SCOPES if one in scopes)),
                         f"copies among {scopes['own']['of']:,} samples: {', '.join(copied)}; "
                         f"{scopes['own']['copies']:,} of their own seed{unseen} ({by})")]
    nulls = {scope: one["null"] for scope, one in scopes.items() if "null" in one}
    words = [f"{SCOPES[scope]} {one['observed']:,} above tau, {one['expected']:.3g} expected, excess at most "
             f"{100 * one['excess']['high']:.2g} %" for scope, one in nulls.items()]
    passes = all(one["excess"]["high"] < EXCESS for one in nulls.values())
    few = "" if passes or any(one["observed"] for one in nulls.values()) else \
        f"; too few samples to know, {statistics.least_samples(EXCESS):,} are needed"
    return [*lines, ReleaseLine("candidates", _passed(passes), f"near another seed {'; '.join(words)}; allowed "
                                f"{100 * EXCESS:g} %{few}")]


def _scopes_of(files: Files, found: Mapping[str, Any], chosen: Selection) -> dict[str, Any]:
    """Counts of the samples that a selection keeps."""
    scopes = [*found["scopes"]]
    rows = copy_rows(files, found["audit"], ["sample_id", *scopes])
    rows = rows.filter(chosen.keeps(rows["sample_id"]))
    return {scope: statistics.scope_counts(numbers(rows, scope), scope, found["tau"], found["tau_copy"])
            for scope in scopes}


def _membership(view: RunView) -> ReleaseLine:
    found = latest(view.files, "membership")
    if found is None:
        return ReleaseLine("membership", "not measured", "no audit has attacked the samples; `rayexpand audit` with a "
                           "section membership does")
    mine, private, null = (one["tpr_at_fpr_001"] for one in (found, found["private"], found["null"]))
    planted, is_low = found["planted"], mine["low"] <= null["high"]
    by = f"audit {found['audit']}"
    if is_low and not planted["seen_by"]:
        return ReleaseLine("membership", "not measured", f"no attack of {by} finds the image that it "
                           f"lists {planted['repeats']} times, so what they do not find may be there")
    if is_low and private["low"] <= null["high"]:
        return ReleaseLine("membership", "not measured", f"{by} is too small: even of classifiers of the real images "
                           f"it finds {_share(private)} of the members at one false alarm in 1,000, with permuted "
                           f"memberships {_share(null)}; audit more images, or with more shadows")
    return ReleaseLine("membership", _passed(is_low), (
        f"attack by {found['worse']}: {_share(mine)} of the members found at one false alarm in 1,000; of a classifier "
        f"of the real images {_share(private)}, with permuted memberships {_share(null)} ({by}). An "
        "attack that finds nothing proves nothing"))


def _share(one: Mapping[str, Any]) -> str:
    return f"{100 * one['value']:.2g} % [{100 * one['low']:.2g}, {100 * one['high']:.2g}]"


def _classes(view: RunView, kept_K: np.ndarray) -> ReleaseLine:
    classes = read_classes(view)
    seeded = np.array(classes.count) > 0
    empty = np.flatnonzero(seeded & (kept_K == 0)).tolist()
    text = f"{int(seeded.sum()) - len(empty):,} of {int(seeded.sum()):,} classes have samples"
    return ReleaseLine("classes", _passed(not empty), text + (
        f"; none of {', '.join(classes.display[label] for label in empty[:5])}" if empty else ""))


def _labels(view: RunView, chosen: Selection | None) -> ReleaseLine:
    """Of the newest result of `evaluate` that asked the guide about these samples."""
    samples = {"selection": None if chosen is None else chosen.name, "copies": None}
    made, files = committed_sha256(view.receipts), view.files
    results = [one for name in files.list("scores") if name.endswith(".json")
               if (one := read_json(files, f"scores/{name}")) and "clip_top1" in one.get("scores", {})
               and one.get("committed_sha256") == made and {key: one["config"][key] for key in samples} == samples]
    if not results:
        return ReleaseLine("labels", "not measured", "no result of `rayexpand evaluate` has clip_top1 of these samples")
    newest = max(results, key=lambda one: one["created"])
    found = newest["scores"]["clip_top1"]
    real = found.get("reference")
    beside = "" if real is None else f", of real images in {100 * real:.1f} %"
    status: Status = "not measured" if real is None else _passed(found["value"] >= AGREEMENT * real)
    return ReleaseLine("labels", status, f"the guide sees the label of samples in {100 * found['value']:.1f} %{beside} "
                       f"({newest['name']})")


def _mark(exported: bool) -> ReleaseLine:
    if exported:
        return ReleaseLine("mark", "pass", "every image carries an IPTC digital source type; `rayexpand verify "
                           "--marks` checks them")
    return ReleaseLine("mark", "not measured", "images of a run carry none; `rayexpand export` writes it into each")


def _licenses(view: RunView, given: Mapping[str, str]) -> ReleaseLine:
    models = view.run["models"]
    needed = [*(("generator",) if "prior" in models else ()), *(("adapter",) if "adapter" in models else ()), "seeds"]
    text = ", ".join(f"{name} {given.get(name, 'not given')}" for name in needed)
    if all(name in given for name in needed):
        return ReleaseLine("licenses", "pass", f"as given: {text}")
    return ReleaseLine("licenses", "not measured", f"{text}; `rayexpand card --license-of seeds=cc-by-4.0` states one")


def _passed(value: bool) -> Status:
    return "pass" if value else "fail"


def _counts_of(view: RunView, chosen: Selection) -> np.ndarray:
    """int64 (K,): samples of each class that a selection keeps."""
    kept_K = np.zeros(len(read_classes(view)), np.int64)
    for receipt in (one for one in view.receipts if one.kept):
        kept_K += np.bincount(_labels_of(view, receipt, chosen), minlength=len(kept_K))
    return kept_K


def _labels_of(view: RunView, receipt: Receipt, chosen: Selection) -> np.ndarray:
    table: pa.Table = view.store.data(receipt, ["sample_id", "label"])
    return table.filter(chosen.keeps(table["sample_id"]))["label"].to_numpy()
