"""Checks a run folder against its plan: every planned sample decided exactly once, every file what its footer says."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from rayexpand.contract.errors import DamagedFile, RayexpandError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import DRAW_FIELDS, Draw, Receipt, Status, sample_sha256
from rayexpand.runs.allocation import allocated
from rayexpand.runs.growth import portion_problems
from rayexpand.runs.plan import plan_digest
from rayexpand.runs.run import Run, plan_before
from rayexpand.runs.store import MAKE_AGAIN, Store, Totals, content_sha256, data_name, parse_data_name, totals
from rayexpand.storage.tables import read_table

_NO_IDS = pa.array([], pa.string())


@dataclass
class Findings:
    problems: list[str] = field(default_factory=list)  # each names a file and what to do
    rebuilt_receipts: int = 0
    garbage: int = 0  # side files that no data file names; harmless
    totals: Totals = field(default_factory=Totals)

    def add(self, one: Findings, where: str) -> None:
        """Takes over what was found in a folder below this one; `where` stands before its problems."""
        self.problems += [f"{where}/{line}" for line in one.problems]
        self.rebuilt_receipts += one.rebuilt_receipts
        self.garbage += one.garbage
        self.totals = Totals(**{each.name: getattr(self.totals, each.name) + getattr(one.totals, each.name)
                                for each in fields(Totals)})

    def to_json(self) -> dict[str, Any]:
        return {**self._counts(), "problems": self.problems, "rebuilt_receipts": self.rebuilt_receipts,
                "unused_side_files": self.garbage}

    def table(self) -> list[tuple[str, str]]:
        counts = {**self._counts(), "receipts rebuilt": self.rebuilt_receipts, "problems": len(self.problems)}
        return [(name, f"{count:,}") for name, count in counts.items()]

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self.totals, name) for name in ("planned", "kept", "rejected", "failed", "pending",
                                                              "shards")}


def verify(run: Run, *, pixels: bool = False) -> Findings:
    """Checks every byte of every committed file, and rebuilds missing receipts. `pixels` also decodes each image and
    checks its hash, so that a file of a version without seals is checked as well."""
    findings, receipts, named = Findings(_plan_problems(run)), [], set()
    failed_before: dict[int, pa.Array] = {}
    faulty: set[int] = set()
    seen: set[tuple[int, int]] = set()
    cached = run.store.cached()
    for shard_id, generation in sorted(p for name in run.files.list("data") if (p := parse_data_name(name))):
        where, before = f"data/{data_name(shard_id, generation)}", len(findings.problems)
        if shard_id in faulty or (generation > 0 and (shard_id, generation - 1) not in seen):
            findings.problems.append(f"{where}: an earlier file of this shard is gone or faulty. Delete it too and run "
                                     "`expand` again.")
            faulty.add(shard_id)
            continue
        seen.add((shard_id, generation))
        try:
            receipt = run.store.find(shard_id, generation)
            assert receipt is not None
            expected = run.plan.sample_ids(shard_id) if generation == 0 else failed_before.pop(shard_id, _NO_IDS)
            failed_before[shard_id] = _check_file(run.store, receipt, expected, pixels, findings.problems)
            if not _is_as_adopted(run, receipt):
                findings.problems.append(f"{where}: is not the file that the run adopted when it grew. {MAKE_AGAIN}")
        except (OSError, RayexpandError, KeyError) as error:
            findings.problems.append(_problem(run, where, error))
            faulty.add(shard_id)
            continue
        if len(findings.problems) > before:
            faulty.add(shard_id)
        with suppress(OSError, RayexpandError):  # a place that cannot be written says nothing about the data
            findings.rebuilt_receipts += _rebuild(run.store, receipt, cached.get((shard_id, generation)))
        receipts.append(receipt)
        named.add(receipt.side_file)
    findings.garbage = len(set(run.files.list("rejected")) - named)
    findings.totals = totals(run.plan.planned, receipts)
    return findings


def _plan_problems(run: Run) -> list[str]:
    """Whether the plan is the one of run.json, and its copies are those that its weights give."""
    plan, allocate, folder = run.plan, run.config.allocate, run.facts["plan"]
    if plan_digest(plan) != run.facts["plan_digest"]:
        return [f"{folder}: is not the plan that run.json names. Restore that folder of the run from a copy"]
    if problems := _growth_problems(run):
        return problems
    if plan.weight is None or allocate is None:
        return []
    rng = PlanRng(plan.run_seed, plan.method.name)
    dealt = allocated(allocate, plan.index, plan.method.copies(plan.index, rng), plan.weight, rng)
    if len(wrong := np.flatnonzero(dealt != plan.copies)):
        seed_id = plan.index.table["seed_id"][int(wrong[0])].as_py()
        return [f"{folder}/seeds.parquet: the copies of {len(wrong):,} seeds are not those that their weights give "
                f"({seed_id}: {plan.copies[wrong[0]]} instead of {dealt[wrong[0]]}): they were changed by hand. "
                "Restore that folder of the run from a copy"]
    return []


def _growth_problems(run: Run) -> list[str]:
    """Of a run that has grown: whether each step follows from the one before."""
    problems, steps = list[str](), len(run.facts.get("grown", ()))
    for number in range(steps):
        try:
            before = plan_before(run.files, run.facts, number)
        except DamagedFile as error:
            problems.append(f"{str(error).replace(f'{run.files.root}/', '')}. Restore it from a copy; no data file is "
                            "at fault")
            continue
        if number == steps - 1:
            problems += [f"{run.facts['plan']}/parts.parquet: {one}. Restore it from a copy"
                         for one in portion_problems(run.plan, before)]
    return problems


def _is_as_adopted(run: Run, receipt: Receipt) -> bool:
    """Whether a file of a smaller run is the one that was there when it grew."""
    adopted = run.facts.get("adopted", {}).get(receipt.data_file)
    mine = receipt.run_digest == run.facts["run_digest"]
    return adopted is None or mine or receipt.content_sha256.startswith(adopted)


def _problem(run: Run, where: str, error: OSError | RayexpandError | KeyError) -> str:
    if isinstance(error, DamagedFile):
        text = str(error).replace(f"{run.files.root}/", "")
        text += "" if MAKE_AGAIN in text else f". {MAKE_AGAIN}"
        return text if text.startswith(f"{where}: ") else f"{where}: {text}"
    if isinstance(error, KeyError):
        return f"{where}: is damaged (it has no column {error}). {MAKE_AGAIN}"
    if isinstance(error, OSError):
        return (f"{where}: cannot be read ({error.strerror or error}), so nothing is known of it; make it readable for "
                "this user and verify again. It is not said to be damaged: keep it.")
    return f"{where}: {error}"


def _check_file(store: Store, receipt: Receipt, expected: pa.Array, pixels: bool, problems: list[str]) -> pa.Array:
    """Checks one committed file; returns the ids that failed in it."""
    where = f"data/{receipt.data_file}"
    kept, refused = read_table(store.files, where), store.refused(receipt)
    ids, others = (one["sample_id"].combine_chunks() for one in (kept, refused))
    decided, problem = pa.concat_arrays([ids, others]), None
    gone, extra = _without(expected, decided), _without(decided, expected)
    if len(decided.unique()) != len(decided):
        problem = "holds a sample twice"
    elif gone or extra:
        problem = f"does not decide what was planned (missing {gone[:3]}, not planned {extra[:3]})"
    elif content_sha256(zip(ids.to_pylist(), kept["sample_sha256"].to_pylist(), strict=True)) != receipt.content_sha256:
        problem = "does not match the content hash of its footer"
    elif (receipt.kept, receipt.rejected + receipt.failed) != (len(ids), len(others)):
        problem = "does not match the counts of its footer"
    elif pixels and (bad := [row["sample_id"] for row in kept.to_pylist() if not _pixels_match(row)]):
        problem = f"holds images that do not match their hash: {bad[:3]}"
    if problem:
        problems.append(f"{where}: {problem}. Delete it and run `expand` again.")
    return others.filter(pc.equal(refused["status"].combine_chunks(), Status.FAILED.value))


def _without(ids: pa.Array, others: pa.Array) -> list[str]:
    """Those that are not among the others, in order."""
    return sorted(ids.filter(pc.invert(pc.is_in(ids, others))).to_pylist())


def _pixels_match(row: dict) -> bool:
    try:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            decoded = np.asarray(image)
    except Exception:  # damaged images make Pillow raise nearly anything
        return False
    draw = Draw(**{name: row[name] for name in DRAW_FIELDS if name in row})
    return sample_sha256(decoded, draw) == row["sample_sha256"]


def _rebuild(store: Store, receipt: Receipt, cached: Receipt | None) -> bool:
    """Writes a receipt that is missing or disagrees with its data file; True if it did."""
    if cached is not None and replace(cached, seconds={}) == replace(receipt, seconds={}):
        return False
    store.cache(receipt)
    return True
