"""A folder whose samples are read: a run, or a loop, whose rounds are seen as one run.

    <loop>/rounds.json             what the loop is
           rounds/0001/ 0002/ ...  its runs, in order
           decisions/0003.json     whether there is a round 3

    shard, row    numbered through all rounds, as in the plan of a run that has grown
    copy          as in the rounds, where no two have the same of a seed; so sample ids are those of one run
    data file     named by its path below the loop (`store.data_place`); the column `row` in it counts in its round, and
                  `Store.first_row` says where that begins

What reads samples (`select`, `evaluate`, `audit`, `export`, cards, training sets) opens a folder here and knows nothing
of rounds. What makes samples opens one run (`run.open_run`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.contract.errors import DamagedFile, UsageError, looked_at
from rayexpand.contract.schema import Receipt
from rayexpand.contract.settings import digest
from rayexpand.runs.config import RunConfig, parse
from rayexpand.runs.plan import Plan, Portions
from rayexpand.runs.run import Run, open_run
from rayexpand.runs.status import RunView, view_run
from rayexpand.runs.store import Store, first_look
from rayexpand.storage.files import Files
from rayexpand.storage.places import is_url, open_files
from rayexpand.storage.tables import read_json, unsealed

LOOP = "rounds.json"


def open_samples(folder: str) -> Run:
    """The run in a folder, or the rounds of a loop as one, to read. Raises UsageError where there is neither."""
    return _joined(folder)[0] if is_loop(folder) else open_run(folder)


def view_samples(folder: str | Path, on_damaged: Callable[[str], None] | None = None) -> RunView:
    """What is on disk of a run, or of all rounds of a loop. Raises what `status.view_run` raises."""
    if not is_loop(folder):
        return view_run(folder, on_damaged)
    run, store = _joined(str(folder))
    return RunView(run.facts, tuple(store.receipts(on_damaged=on_damaged)), store.modified(), store)


def is_loop(folder: str | Path) -> bool:
    return first_look(open_files(folder), LOOP) is not None


def read_loop_facts(files: Files) -> dict[str, Any]:
    """rounds.json. Raises UsageError where there is none, DamagedFile where it does not hold what was written."""
    if (content := first_look(files, LOOP)) is None:
        raise UsageError(f"{files.root}: no loop is here (no {LOOP}){looked_at(files.root)}. Give the folder that "
                         "`rayexpand expand` makes of a loop file, <out>/<name>")
    try:
        return unsealed(LOOP, content, files.at(LOOP))
    except DamagedFile as error:
        raise DamagedFile(f"{error}. Restore it from a copy; the rounds beside it are whole") from error


def round_name(number: int) -> str:
    """Of the run of a round, as a path below its loop."""
    return f"rounds/{number:04d}"


def round_folder(files: Files, number: int) -> str:
    """Of the run of a round."""
    return f"{files.root}/{round_name(number)}"


def run_folders(files: Files) -> list[str]:
    """The runs of a loop that have begun, in the order of their rounds."""
    folders = (round_folder(files, number) for number in itertools.count(1))
    return list(itertools.takewhile(lambda folder: first_look(open_files(folder)) is not None, folders))


def round_with(folder: str, sample_id: str) -> int:
    """The round of a loop that has planned a sample. Raises UsageError where none has."""
    run, store = _joined(folder)
    return int(np.searchsorted(store.shards, run.plan.find(sample_id), side="right"))


def round_of(data_file: str) -> int | None:
    """The round that a data file of a joined run is of; None of a run."""
    return int(data_file.split("/")[1]) if "/" in data_file else None


class JoinedStore(Store):
    """Committed shards of all rounds of a loop, to read."""

    def __init__(self, files: Files, rounds: Sequence[Run]) -> None:
        super().__init__(files, "")
        self._rounds = tuple(rounds)
        self.shards = np.cumsum([0, *(one.plan.n_shards for one in rounds)])
        self.rows = np.cumsum([0, *(one.plan.planned for one in rounds)])

    def receipts(self, names: Iterable[str] | None = None,
                 on_damaged: Callable[[str], None] | None = None) -> Iterator[Receipt]:
        for number, run in enumerate(self._rounds, 1):
            place, shard = round_name(number), int(self.shards[number - 1])
            for one in run.store.receipts(on_damaged=on_damaged):
                yield replace(one, shard_id=shard + one.shard_id, data_file=f"{place}/data/{one.data_file}",
                              side_file=one.side_file and f"{place}/rejected/{one.side_file}")

    @contextlib.contextmanager
    def open(self, receipt: Receipt) -> Iterator[pq.ParquetFile]:
        run, own = self._own(receipt)
        with run.store.open(own) as parquet:
            yield parquet

    def refused(self, receipt: Receipt) -> pa.Table:
        run, own = self._own(receipt)
        return run.store.refused(own)

    def first_row(self, data_file: str) -> int:
        return int(self.rows[(round_of(data_file) or 1) - 1])

    def modified(self) -> dict[str, float]:
        """Data file -> modification time, unix seconds."""
        return {f"{round_name(number)}/data/{name}": entry.modified for number, run in enumerate(self._rounds, 1)
                for name, entry in run.files.entries("data").items() if name.endswith(".parquet")}

    def _own(self, receipt: Receipt) -> tuple[Run, Receipt]:
        """The run of a receipt, and the receipt as that run has it."""
        number = round_of(receipt.data_file) or 1
        return self._rounds[number - 1], replace(
            receipt, shard_id=receipt.shard_id - int(self.shards[number - 1]),
            data_file=receipt.data_file.rpartition("/")[2], side_file=receipt.side_file.rpartition("/")[2])


def _joined(folder: str) -> tuple[Run, JoinedStore]:
    files = open_files(folder)
    facts, rounds = read_loop_facts(files), [open_run(one) for one in run_folders(files)]
    if not rounds:
        raise UsageError(f"{files.root} is a loop that has made no round yet; run `rayexpand expand` with its file")
    store = JoinedStore(files, rounds)
    plan = _plan(rounds, store)
    to_come, said = _to_come(files, facts, len(rounds)), [one.facts for one in rounds]
    return Run(_config(folder, facts, rounds[-1].config), files, store, plan, {
        **{key: said[0][key] for key in ("seeds", "classes", "dataset", "cut_prompts") if key in said[0]},
        "plan": f"{round_name(1)}/{said[0]['plan']}",
        "version": facts["version"], "created": facts["created"], "name": facts["name"],
        "config": {**facts["config"]["run"], "rounds": facts["config"]["rounds"]},
        "run_digest": facts["digest"], "models": _models(said),
        "plan_digest": digest([one["plan_digest"] for one in said]), "planned": plan.planned + to_come,
        "shards": plan.n_shards, "rounds": [one["planned"] for one in said]}), store


def _config(folder: str, facts: dict[str, Any], newest: RunConfig) -> RunConfig:
    """What the rounds have in common, as if it were that of one run in this folder; its guide is that of the newest
    round."""
    out, _, name = (folder if is_url(folder) else str(Path(folder).absolute())).rstrip("/").rpartition("/")
    config = parse({**facts["config"]["run"], "out": out or "/", "name": name}, f"{folder}/{LOOP}")
    return config.model_copy(update={"guide": newest.guide})


def _to_come(files: Files, facts: dict[str, Any], made: int) -> int:
    """Samples of rounds that have not begun; none where the loop has ended."""
    decided = read_json(files, f"decisions/{made + 1:04d}.json")
    return 0 if decided is not None and decided.get("state") == "stop" else sum(
        facts["parts"][made:facts["config"]["rounds"]["count"]])


def _plan(rounds: Sequence[Run], store: JoinedStore) -> Plan:
    """That of a run which has grown by each round."""
    plans = [one.plan for one in rounds]
    first = plans[0]
    parts = Portions(*(np.concatenate(one) for one in (
        [plan.parts.seed for plan in plans], [plan.parts.first for plan in plans],
        [plan.parts.copies for plan in plans],
        [plan.parts.shard + np.int32(shard) for plan, shard in zip(plans, store.shards, strict=False)])))
    copies = np.stack([plan.copies for plan in plans]).sum(axis=0, dtype=np.uint16)
    return replace(first, copies=copies, weight=None, grown=parts)


def _models(said: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Hashes by name; where rounds differ, as guides do, with the number of the round."""
    found: dict[str, str] = {}
    for number, facts in enumerate(said, 1):
        for name, sha256 in facts["models"].items():
            same = all(one["models"].get(name, sha256) == sha256 for one in said)
            found[name if same else f"{name} of round {number}"] = sha256
    return found
