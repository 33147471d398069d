"""What a loop decided: one file for each round, each of which names the one before by its hash.

    rounds.json              the configuration with its digest, rows of each round, a hash of the seeds; created once
    decisions/0002.json      state run or stop, with the reason; `follows`, the sha256 of decision 1; what it saw of the
                             samples of earlier rounds; hashes of scores, table and guide; published without overwriting
    decisions/0002-<hash8>.parquet   seed_id, copies, first, weight; counts only if a decision names it

Round r is a function of decision r alone: once that is there, nothing of it is computed again. No clock, host or path
is in a decision, so that a loop that was killed ends with the decisions of one that was not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import DamagedFile, DigestMismatch
from rayexpand.contract.settings import digest
from rayexpand.runs import config as configs
from rayexpand.runs.joined import LOOP, round_folder, round_name
from rayexpand.runs.store import Store, first_look, read_facts
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import NAMED, parquet_bytes, read_json, sealed, table_of
from rayexpand.studies.rounds.config import LoopConfig

FIRST = "0" * 64  # what the first decision follows


@dataclass(frozen=True)
class Seen:
    """What a decision saw of the samples of an earlier round."""

    files: str  # sha256 over its sorted (data file, content hash)
    kept: int
    generations: dict[str, int] = field(default_factory=dict)  # of shards that had more than the first one


@dataclass(frozen=True)
class RoundDecision:
    """How a round is made, or that the loop ends."""

    round: int
    state: Literal["run", "stop"]
    reason: str
    follows: str  # sha256 of the decision before, FIRST for the first one
    loop: str  # digest in rounds.json
    spent: int  # rows of the rounds before
    left: int  # of the budget, after this round
    planned: int = 0  # rows of this round
    seen: tuple[Seen, ...] = ()  # of each round before
    scores: dict[str, str] = field(default_factory=dict)  # file -> sha256 of its content
    table: dict[str, str] = field(default_factory=dict)  # file; sha256 of it, of copies and of first
    method: dict[str, Any] = field(default_factory=dict)
    guide: dict[str, str] = field(default_factory=dict)  # folder below the loop, sha256; none where it is not guided
    dealt: dict[str, Any] = field(default_factory=dict)  # see allocation.dealt_facts
    gain: dict[str, Any] = field(default_factory=dict)  # see stop.gain_of

    @property
    def sha256(self) -> str:
        """Of all fields."""
        return digest(asdict(self))

    @property
    def name(self) -> str:
        return decision_name(self.round)


def decision_name(number: int) -> str:
    return f"decisions/{number:04d}.json"


def config_in(files: Files, facts: Mapping[str, Any]) -> LoopConfig:
    """The configuration that a loop was created with, in the folder where it is now."""
    out, _, name = str(files.root).rstrip("/").rpartition("/")
    raw = facts["config"]
    run = configs.parse({**raw["run"], "out": out or "/", "name": name}, LOOP)
    return LoopConfig(run=run, **{key: value for key, value in raw.items() if key != "run"})


def read_decision(files: Files, number: int) -> RoundDecision | None:
    """Raises DamagedFile where the file does not hold what was written."""
    if (found := read_json(files, decision_name(number))) is None:
        return None
    said = found.pop("sha256", None)
    try:
        decision = RoundDecision(**{**found, "seen": tuple(Seen(**one) for one in found["seen"])})
    except (TypeError, KeyError) as error:
        raise DamagedFile(f"{files.at(decision_name(number))}: is damaged ({error})") from error
    if decision.sha256 != said or decision.round != number:
        raise DamagedFile(f"{files.at(decision_name(number))}: is damaged, or was changed by hand: its content does "
                          "not match its sha256")
    return decision


def read_chain(files: Files, facts: Mapping[str, Any]) -> list[RoundDecision]:
    """The decisions of a loop in their order. Raises DigestMismatch where one is of another loop, or follows another
    decision."""
    chain, before = list[RoundDecision](), FIRST
    while (decision := read_decision(files, len(chain) + 1)) is not None:
        differs = [f"{name}: {there[:8]} instead of {wanted[:8]}" for name, there, wanted in (
            ("digest of rounds.json", decision.loop, facts["digest"]), ("follows", decision.follows, before))
            if there != wanted]
        if differs:
            raise DigestMismatch("\n  ".join([
                f"{files.at(decision.name)} is no decision of this loop, so its rounds would not follow from each "
                "other. What differs:", *differs, "Put back the file that was here"]))
        chain.append(decision)
        before = decision.sha256
    if later := sorted(name for name in files.list("decisions") if re.fullmatch(r"\d{4}\.json", name))[len(chain):]:
        raise DamagedFile(f"{files.at(decision_name(len(chain) + 1))}: is gone, and {max(later)} is there. Restore it "
                          "from a copy")
    return chain


def read_dealt(files: Files, decision: RoundDecision) -> pa.Table:
    """seed_id, copies, first, weight of a decision that makes a round. Raises DamagedFile."""
    name = decision.table["file"]
    where, content = files.at(name), files.read(name)
    if content is None:
        raise DamagedFile(f"{where}: is gone. Restore it from a copy")
    if hashlib.sha256(content).hexdigest() != decision.table["sha256"]:
        raise DamagedFile(f"{where}: is damaged, or not what {decision.name} names. Restore it from a copy")
    return table_of(content, where)


def publish_dealt(files: Files, number: int, seed_ids: pa.Array, copies: np.ndarray, first: np.ndarray,
                  weight: np.ndarray) -> dict[str, str]:
    """Writes what a round deals to each seed; what its decision says of that."""
    hashes = {"copies": array_sha256(copies), "first": array_sha256(first)}
    name = f"decisions/{number:04d}-{digest([hashes, array_sha256(weight)])[:8]}.parquet"
    table = pa.table({"seed_id": seed_ids, "copies": copies, "first": first, "weight": weight})
    content = parquet_bytes(table, {NAMED: name.encode()}, row_group=1 << 18)
    if not files.publish(name, content, "dealt", number) and files.read(name) != content:  # damaged: nothing names it
        files.replace(name, content)
    return {"file": name, "sha256": hashlib.sha256(content).hexdigest(), **hashes}


def publish_decision(files: Files, decision: RoundDecision) -> None:
    """The one commit point between two rounds; whoever is second finds the decision of the first."""
    content = {**asdict(decision), "sha256": decision.sha256}
    files.publish(decision.name, sealed(decision.name, content), "decision", decision.round)


def array_sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def seen_of(store: Store, upto: Mapping[str, int] | None = None) -> Seen:
    """What is there of the samples of a round; `upto`: only generations that a decision saw."""
    receipts = [one for one in store.receipts() if upto is None or one.generation <= upto.get(str(one.shard_id), 0)]
    files = sorted([one.data_file, one.content_sha256] for one in receipts)
    return Seen(digest(files), sum(one.kept for one in receipts),
                {str(one.shard_id): one.generation for one in receipts if one.generation})


def unseen(store: Store, seen: Seen) -> int:
    """Samples of a round that a later `retry` made, so that a decision did not see them."""
    return sum(one.kept for one in store.receipts() if one.generation > seen.generations.get(str(one.shard_id), 0))


def round_problem(files: Files, number: int, *, gone: bool = True) -> str:
    """What is wrong with the run.json of a round that is decided, "" where nothing is, or the round has not begun.
    `gone`: also where it is gone, which the next `expand` mends. Raises DamagedFile."""
    run, where = open_files(round_folder(files, number)), f"{round_name(number)}/run.json"
    if first_look(run) is None:
        return f"{where}: is gone. `rayexpand expand` of the loop makes it again" * (gone and bool(run.list("data")))
    return "" if read_facts(run).get("follows", {}).get("round") == number else (
        f"{where}: is that of another run. Delete it, and `rayexpand expand` of the loop makes the right one again")


def first_of(chain: Sequence[RoundDecision], files: Files, seeds: int) -> np.ndarray:
    """uint16 (N,): copies that the rounds of `chain` deal to each seed; the next round begins to count there."""
    if not (rounds := [one for one in chain if one.state == "run"]):
        return np.zeros(seeds, np.uint16)
    table = read_dealt(files, rounds[-1])
    return table["first"].to_numpy() + table["copies"].to_numpy()
