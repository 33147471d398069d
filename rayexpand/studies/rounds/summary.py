"""What a loop has spent, dealt and learned so far, in numbers: what its page shows.

    symbol   here       meaning
    k of n   right      seeds (or validation images) that a classifier names right which was not trained on them, unless
                        the line is `on` in_sample
    [l, h]   low, high  95 %: exact (Clopper and Pearson) of a share, Student's t over images of a difference of shares

An interval is over images: one classifier for each fold, so it says nothing of how another training would have ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.classifier.statistics import crossed
from rayexpand.evaluation.roc import exact_interval
from rayexpand.runs.allocation import FACTS, said_in_sample
from rayexpand.runs.joined import read_loop_facts, round_folder, run_folders
from rayexpand.runs.status import RunView, read_classes, read_plan_table, shard_seconds, view_run
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from rayexpand.studies.rounds.decisions import RoundDecision, read_chain, read_dealt, unseen
from rayexpand.studies.rounds.learning import table_in
from rayexpand.studies.rounds.stop import WORDS

HARDEST = 10  # classes


def loop_summary(folder: str) -> dict[str, Any]:
    """`rounds`, with what each took; `further`, what was trained since the last of them; `dealt`, by round and class;
    `accuracy` after each round, and what it `says`; `hardest` classes. Raises UsageError where no loop is,
    DamagedFile, DigestMismatch."""
    files = open_files(folder)
    facts = read_loop_facts(files)
    chain = read_chain(files, facts)
    views = [view_run(one) for one in run_folders(files)]
    decided = [one for one in chain if one.state == "run"]
    table = read_plan_table(views[0], "seeds.parquet") if views else None
    names = read_classes(views[0]).display if views else ()
    tables = {name: table_in(files, name, sha256) for one in chain for name, sha256 in one.scores.items()}
    accuracy = _accuracy(chain, tables)
    ended = chain[-1] if chain and chain[-1].state == "stop" else None
    return {
        "name": facts["name"], "budget": facts["planned"], "spent": sum(one.planned for one in decided),
        "left": facts["planned"] - sum(one.planned for one in decided), "count": facts["config"]["rounds"]["count"],
        "ended": ended.reason if ended else "", "rule": facts["config"]["rounds"]["rule"],
        "rounds": [_round(files, one, chain, views) for one in decided],
        "further": {"scoring_seconds": _training_seconds(files, f"r{len(decided) + 1:04d}-fold"),
                    "guide_seconds": _training_seconds(files, f"r{len(decided) + 1:04d}-guide")},
        "classes": list(names), "dealt": [] if table is None else [
            _by_class(read_dealt(files, one)["copies"].to_numpy(), table["label"].to_numpy(), len(names))
            for one in decided],
        "accuracy": accuracy, "says": [*_says(accuracy, len(decided), ended is not None), *_too_good(tables)],
        "hardest": [] if table is None else _hardest(chain, tables, table, names)}


def _round(files: Files, decision: RoundDecision, chain: Sequence[RoundDecision],
           views: Sequence[RunView]) -> dict[str, Any]:
    """One line: what was decided, what came of it, what both took."""
    number = decision.round
    view = views[number - 1] if number <= len(views) else None
    counts = None if view is None else view.totals
    later = next((one for one in chain if one.round == number + 1), None)
    prefix, done = f"r{number:04d}-", 0 if counts is None else counts.planned - counts.pending
    seconds = 0.0 if view is None else sum(shard_seconds(one) - one.seconds.get("load", 0.0) for one in view.receipts)
    return {
        "round": number, "planned": decision.planned, **{name: getattr(counts, name, 0) for name in (
            "kept", "rejected", "failed")}, "pending": decision.planned - done, "guided": bool(decision.guide),
        "dealt": decision.dealt, "decision": decision.sha256, "omega": decision.method.get("omega"),
        "unseen": unseen(view.store, later.seen[number - 1]) if view is not None and later is not None and len(
            later.seen) >= number else 0,
        "sampling_seconds": seconds, "seconds_per_sample": seconds / done if done else None,
        "scoring_seconds": _training_seconds(files, f"{prefix}fold"),
        "guide_seconds": _training_seconds(files, f"{prefix}guide")}


def _training_seconds(files: Files, prefix: str) -> float:
    """Process-seconds of finished trainings."""
    found = (read_json(files, f"results/{name}") for name in files.list("results", prefix))
    return float(sum(one["seconds"] * max(1, one["workers"]) for one in found if one is not None))


def _by_class(copies_N: np.ndarray, label_N: np.ndarray, classes: int) -> list[int]:
    known = label_N >= 0
    return np.bincount(label_N[known], copies_N[known], classes).astype(int).tolist()


def _accuracy(chain: Sequence[RoundDecision], tables: Mapping[str, pa.Table]) -> list[dict[str, Any]]:
    """What classifiers that were trained on the rounds before each decision name right, by what they were asked for."""
    found, before = list[dict[str, Any]](), dict[str, list[tuple[int, np.ndarray]]]()
    for decision in chain:
        for name in decision.scores:
            on = "validation" if name.endswith("-validation.parquet") else (
                "in_sample" if said_in_sample(tables[name].schema) else "folds")
            right_N = tables[name]["margin"].to_numpy() > 0
            low, high = exact_interval(right := int(right_N.sum()), len(right_N))
            line = {"on": on, "after": decision.round - 1, "images": len(right_N), "right": right,
                    "accuracy": right / len(right_N), "low": low, "high": high}
            earlier = before.setdefault(on, [])
            if earlier and len(right_N) > 1:
                after, best_N = max(earlier, key=lambda one: int(one[1].sum()))
                gain = crossed(right_N.astype(np.float64) - best_N.astype(np.float64))
                line |= {"against": after, "gain": gain.mean, "gain_low": gain.interval()[0],
                         "gain_high": gain.interval()[1], "gained": int((right_N & ~best_N).sum()),
                         "lost": int((best_N & ~right_N).sum())}
            earlier.append((decision.round - 1, right_N))
            found.append(line)
    return found


def _says(accuracy: Sequence[Mapping[str, Any]], rounds: int, ended: bool) -> list[str]:
    """What the intervals allow, in words."""
    found = [_allowed(line) for line in accuracy if "gain" in line]
    if not accuracy:
        return ["No seed was scored, so nothing is known of what a round brought. A rule that reads scores, or "
                "`stop: {on: folds}`, scores them; a study compares arms on test images."]
    if ended and max(line["after"] for line in accuracy) < rounds:
        found.append(f"Nothing was scored after round {rounds}, the last one, so what it brought is not known here.")
    found.append("All intervals are over images and of one training each: they do not say how another training would "
                 "have ended.")
    if any(line["on"] == "folds" for line in accuracy):
        found.append("Seeds are those that the samples were made from; a gain on test images is for a study to show.")
    return found


def _too_good(tables: Mapping[str, pa.Table]) -> list[str]:
    """Why seeds are named right more often than classifiers that have not seen them would."""
    found = []
    if any(said_in_sample(one.schema) for one in tables.values()):
        found.append("Scores are in sample: the classifier was trained on the very seeds that it was asked for.")
    if made_with := sorted({kind for one in tables.values() for kind in json.loads(
            (one.schema.metadata or {}).get(FACTS, b"{}")).get("samples_by", [])}):
        found.append(f"Samples were made with {' and '.join(made_with)}; what was fitted on these seeds makes scores "
                     "too good.")
    return found


def _allowed(line: Mapping[str, Any]) -> str:
    """What the difference between two rounds can and cannot be."""
    low, high = 100 * line["gain_low"], 100 * line["gain_high"]
    what = (f"After round {line['after']}, {line['right']:,} of {line['images']:,} {WORDS[line['on']]} are named "
            f"right, {100 * line['gain']:+.1f} points [{low:+.1f}, {high:+.1f}] against after round {line['against']} "
            f"({line['gained']:,} newly right, {line['lost']:,} newly wrong)")
    if not line["gained"] + line["lost"]:
        return f"{what}: the same images, so that nothing tells these rounds apart."
    if low <= 0 <= high:
        return (f"{what}: no difference is shown, for the interval holds 0. It rules out a gain above {high:.1f} "
                f"points and a loss above {-low:.1f}.")
    more = "more" if low > 0 else "fewer"
    return f"{what}: {more} are right, by {min(abs(low), abs(high)):.1f} points at least."


def _hardest(chain: Sequence[RoundDecision], tables: Mapping[str, pa.Table], seeds: pa.Table,
             names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes with the lowest share of seeds named right by the newest scores; ties by mean loss."""
    newest = next((name for one in reversed(chain) for name in one.scores if "fold" in tables[name].column_names), None)
    if newest is None:
        return []
    table = tables[newest]
    at = pc.index_in(table["seed_id"].combine_chunks(), seeds["seed_id"].combine_chunks())
    label_N, right_N = seeds["label"].to_numpy()[at.to_numpy()], table["margin"].to_numpy() > 0
    of_K, right_K, loss_K = (np.bincount(label_N, weights, len(names)) for weights in (
        None, right_N, table["loss"].to_numpy()))
    with_K = np.maximum(of_K, 1)
    order = np.lexsort((-loss_K / with_K, right_K / with_K))
    return [{"class": names[label], "label": int(label), "images": int(of_K[label]), "right": int(right_K[label]),
             "loss": float(loss_K[label] / of_K[label]), "in_sample": said_in_sample(table.schema),
             "after": int(newest.split("/")[1][:4]) - 1}
            for label in _first(order.tolist(), of_K)]


def _first(order: Iterable[int], of_K: np.ndarray) -> list[int]:
    return [label for label in order if of_K[label]][:HARDEST]


def last_guided(files: Files, chain: Sequence[RoundDecision]) -> str | None:
    """The run of the last guided round that has samples."""
    for decision in reversed(chain):
        if decision.guide and open_files(folder := round_folder(files, decision.round)).read("run.json") is not None:
            return folder
    return None
