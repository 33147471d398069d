"""The run folder: what is committed, how a shard becomes visible exactly once, and how to check it.

    run.json                      resolved config and digests; created once, never changed
    grown/0001.json               the same of the larger run that it became; see growth.py
    attempts/0007.json            one per start
    plan/<digest8>/               see plan.py
    data/train-000123.parquet     the only commit point; generation 1 of a retry is train-000123.r1.parquet
    rejected/000123-<hash8>.parquet   refused rows; counts only if the footer of a data file names it
    receipts/000123.json          a cache of that footer, plus seconds by phase
    receipts/rollup-0007-1.json   many of them in one file, so that a status reads tens of files and not thousands
    selections/                   later decisions; data files are never rewritten
    blame/                        markers of sampler calls in flight (blame.py)

The order of a commit is side file, data file, receipt; files.py and objects.py publish each without overwriting.
Whoever publishes the data file first has committed the shard; a later writer adopts that file if it belongs to the
same run digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayexpand.contract.errors import DamagedFile, DigestMismatch, StorageError, UsageError, looked_at
from rayexpand.contract.schema import (
    DATA_SCHEMA,
    REFUSED_SCHEMA,
    SEED_REASONS,
    ClassTable,
    Reason,
    Receipt,
    Sample,
    Status,
    data_place,
    huggingface_metadata,
    samples_to_arrow,
)
from rayexpand.storage.files import Files, StorageDenied, each, process_token
from rayexpand.storage.tables import (
    NAMED,
    ROW_GROUP,
    open_parquet,
    parquet_facts,
    parquet_of,
    read_columns,
    sealed,
    table_of,
    unsealed,
)

FOOTER = b"rayexpand"
_GROUP_BYTES = 64 << 20  # of encoded images in one row group, or one image
MAKE_AGAIN = ("Restore it from a copy, or delete it with later files of its shard (.r1, .r2, ...) and run `expand` "
              "again: it makes the same samples.")
_DATA_NAME = re.compile(r"^train-(\d{6,})(?:\.r(\d+))?\.parquet$")
_ROLL_UP_NAME = re.compile(r"^rollup-(\d+)-(\d+)\.json$")
_NO_ROLL_UP = (-1, -1)
_FULL_ROLL_UP = 5_000  # receipts; a smaller roll-up is folded into the next one


_FACTS = {"config": dict, "run_digest": str, "plan_digest": str, "plan": str, "planned": int, "shards": int,
          "models": dict, "name": str}  # what run.json always has


def first_look(files: Files, name: str = "run.json") -> bytes | None:
    """run.json, or another file that says what a folder is, None without it. Raises StorageError if this user may not
    read there."""
    try:
        return files.read(name)
    except StorageDenied as error:
        raise StorageError(str(error)) from error
    except OSError as error:
        raise StorageError(f"{files.at(name)}: cannot be read ({error.strerror}). Give this user the right to "
                           "read the run folder.") from error


def facts_name(files: Files) -> str:
    """The file that says what a run is: run.json, or the last one of grown/."""
    steps = [int(name[:-5]) for name in files.list("grown") if re.fullmatch(r"\d{4,}\.json", name)]
    return step_name(max(steps, default=0))


def step_name(number: int) -> str:
    """The file that says what a run is after it has grown so many times."""
    return f"grown/{number:04d}.json" if number else "run.json"


def adopted_digests(facts: Mapping[str, Any]) -> dict[str, int]:
    """Digests of the smaller runs that a run has grown from, with their shards."""
    return {step["run_digest"]: step["shards"] for step in facts.get("grown", ())}


def read_facts(files: Files) -> dict[str, Any]:
    """run.json, or what replaces it in a run that has grown. Raises UsageError if there is no run, StorageError if this
    user may not read it, DamagedFile if it does not hold what was written."""
    name, text = "run.json", first_look(files)
    if text is not None and (name := facts_name(files)) != "run.json":
        text = first_look(files, name)
    where = files.at(name)
    others = () if text is not None else ("study", "sweep")
    if other := next((name for name in others if first_look(files, f"{name}.json")), ""):
        raise UsageError(f"{files.root} holds a {other} and not a run; `rayexpand report` shows it, and its runs lie "
                         "in runs/ (a sweep's in pilots/)")
    if text is None:
        raise UsageError(f"{files.root} is not a run folder (no run.json){looked_at(files.root)}. Give the "
                         "folder that `expand` printed, <out>/<name>, or start a run with `rayexpand expand`.")
    try:
        facts = unsealed(name, text, where)
        if lacking := [name for name in _FACTS if not isinstance(facts.get(name), _FACTS[name])]:
            raise DamagedFile(f"{where}: is damaged: it has no {', '.join(lacking)}")
    except DamagedFile as error:
        raise DamagedFile(f"{error}. Restore it from a copy; the data files beside it are whole. A run with other "
                          "settings needs another `name`") from error
    return facts


def run_title(facts: Mapping[str, Any], folder: str) -> str:
    """The name of a run, of a round of a loop that of the loop with its number."""
    if "follows" not in facts:
        return str(facts["name"])
    return f"{folder.rstrip('/').split('/')[-3]}, round {facts['follows']['round']}"


def data_name(shard_id: int, generation: int = 0) -> str:
    suffix = f".r{generation}" if generation else ""
    return f"train-{shard_id:06d}{suffix}.parquet"


def parse_data_name(name: str) -> tuple[int, int] | None:
    """(shard id, generation) of a data file name, None for any other file."""
    match = _DATA_NAME.match(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of a run or of one shard; planned = kept + rejected + failed + pending."""

    planned: int = 0
    kept: int = 0
    rejected: int = 0
    failed: int = 0
    shards: int = 0  # committed

    @property
    def pending(self) -> int:
        return self.planned - self.kept - self.rejected - self.failed


class Store:
    """Committed shards of one run folder."""

    def __init__(self, files: Files, run_digest: str, token: str | None = None,
                 adopted: Mapping[str, int] | None = None) -> None:
        """`adopted`: digests of smaller runs whose files belong to this one, with the number of their shards."""
        self.files, self.run_digest, self.token = files, run_digest, token or process_token()
        self._adopted = adopted or {}

    def first_row(self, data_file: str) -> int:
        """What is added to the column `row` of a data file to give rows of the plan."""
        return 0

    def _is_ours(self, run_digest: str, shard_id: int) -> bool:
        return run_digest == self.run_digest or shard_id < self._adopted.get(run_digest, 0)

    def committed(self) -> dict[int, int]:
        """Committed shards with their latest generation. One listing, no file is read.

        Raises UsageError where a generation is gone and a later one is not: what is gone cannot be told from it.
        """
        latest: dict[int, int] = {}
        count: Counter[int] = Counter()
        for name in self.files.list("data"):
            if parsed := parse_data_name(name):
                latest[parsed[0]] = max(parsed[1], latest.get(parsed[0], 0))
                count[parsed[0]] += 1
        if broken := [shard for shard, last in latest.items() if count[shard] != last + 1]:
            names = [f"data/{data_name(shard).removesuffix('.parquet')}*" for shard in sorted(broken)]
            raise UsageError(f"{self.files.root}: an earlier file of {len(broken)} retried shard(s) is gone. Delete "
                             f"what is left of them ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''}) "
                             "and run `expand`.")
        return latest

    def pending(self, n_shards: int) -> list[int]:
        """Planned shards 0..n_shards-1 without a data file, in order."""
        done = self.committed()
        return [shard for shard in range(n_shards) if shard not in done]

    def find(self, shard_id: int, generation: int = 0) -> Receipt | None:
        """Receipt rebuilt from the footer of a committed data file; None if there is none.

        Raises DigestMismatch if the file belongs to another run, DamagedFile if it does not hold what was written.
        """
        name = data_name(shard_id, generation)
        try:
            footer = parquet_facts(self.files, f"data/{name}", FOOTER)
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            raise DamagedFile(f"{error}. {MAKE_AGAIN}") from error
        return self._receipt(footer, name)

    def _receipt(self, footer: dict[str, Any] | None, name: str) -> Receipt:
        """What the footer of a data file says, if it is of this place in this run."""
        if footer is None:
            raise UsageError(f"data/{name} is not a file of this package (no footer). Move it out of data/ and run "
                             "again.")
        if (footer["shard_id"], footer["generation"]) != parse_data_name(name):
            raise DamagedFile(f"{self.files.at(f'data/{name}')}: is a copy of "
                              f"{data_name(footer['shard_id'], footer['generation'])}. {MAKE_AGAIN}")
        if not self._is_ours(footer["run_digest"], footer["shard_id"]):
            raise DigestMismatch(f"data/{name} was written by run digest {footer['run_digest'][:8]}, this run is "
                                 f"{self.run_digest[:8]}. " + (
                "It may have grown since this command began: run it again" if self.files.list("grown") else
                "Use another `name`, or move that folder away."))
        return Receipt(**{**footer["receipt"], "data_file": name, "side_file": footer["side_file"],
                          "content_sha256": footer["content_sha256"], "run_digest": footer["run_digest"]})

    def commit(self, receipt: Receipt, samples: Sequence[Sample], classes: ClassTable) -> Receipt:
        """Publishes a shard: refused rows, then data, then receipt. Returns the receipt of whoever won the shard."""
        kept = [s for s in samples if s.status is Status.KEPT]
        refused = [s for s in samples if s.status is not Status.KEPT]
        assert receipt.planned == len(samples) == len({s.draw.sample_id for s in samples})
        receipt = replace(receipt, content_sha256=content_sha256((s.draw.sample_id, s.sample_sha256) for s in kept))
        return self.commit_tables(receipt, _tables(kept, DATA_SCHEMA),
                                  _tables(refused, REFUSED_SCHEMA) if refused else None, classes)

    def commit_tables(self, receipt: Receipt, kept: Iterable[pa.Table], refused: Iterable[pa.Table] | None,
                      classes: ClassTable) -> Receipt:
        """`commit` of rows that are tables already (DATA_SCHEMA, REFUSED_SCHEMA), each of them row groups of its own.
        The receipt has their counts and content_sha256."""
        started = time.perf_counter()
        shard = receipt.shard_id
        side_file, side_sha256 = "", ""
        if refused is not None:
            content = parquet_of(refused, REFUSED_SCHEMA, {})
            side_sha256 = hashlib.sha256(content).hexdigest()
            side_file = f"{shard:06d}-{side_hash(content)}.parquet"
            if not self.files.publish(where := f"rejected/{side_file}", content, "side", shard) and (
                    self.files.read(where) != content):  # damaged: its name says what it is to hold
                self.files.replace(where, content)
        receipt = replace(receipt, data_file=data_name(shard, receipt.generation), side_file=side_file,
                          run_digest=self.run_digest)
        footer = {"shard_id": shard, "generation": receipt.generation, "run_digest": self.run_digest,
                  "writer": self.token, "side_file": side_file, "side_sha256": side_sha256,
                  "content_sha256": receipt.content_sha256, "receipt": json.loads(receipt.to_json())}
        content = parquet_of(kept, DATA_SCHEMA, {**huggingface_metadata(classes), FOOTER: json.dumps(footer).encode(),
                                                 NAMED: f"data/{receipt.data_file}".encode()})
        if not self.files.publish(f"data/{receipt.data_file}", content, "data", shard):
            winner = self.find(shard, receipt.generation)
            assert winner is not None
            receipt = winner
        else:
            receipt = replace(receipt, seconds={"commit": time.perf_counter() - started, **receipt.seconds})
        self.cache(receipt)
        return receipt

    def cache(self, receipt: Receipt) -> None:
        """Writes the receipt of a committed file; a lost or stale one costs a footer read, never a count."""
        name = receipt_name(receipt)
        self.files.replace(name, sealed(name, asdict(receipt)), "receipt", receipt.shard_id)

    def receipts(self, names: Iterable[str] | None = None,
                 on_damaged: Callable[[str], None] | None = None) -> Iterator[Receipt]:
        """One receipt per committed file, in shard order: from the cache, or from the footer where that is gone.

        `names` are the files in data/, if they have been listed already. `on_damaged` hears of files whose footer says
        nothing, which are then left out; without it they raise what `find` raises.
        """
        def found(key: tuple[int, int]) -> Receipt | None:
            try:
                return self.find(*key)
            except UsageError as error:
                if on_damaged is None:
                    raise
                on_damaged(str(error))
                return None

        listed = self.files.list("data") if names is None else names
        committed = sorted(parsed for name in listed if (parsed := parse_data_name(name)))
        cached = self.cached() if committed else {}
        cached = {key: receipt for key, receipt in cached.items() if self._is_ours(receipt.run_digest, key[0])}
        rebuilt = each(self.files, found, [key for key in committed if key not in cached])
        for key in committed:
            receipt = cached[key] if key in cached else next(rebuilt)
            if receipt is not None:
                yield receipt

    def cached(self) -> dict[tuple[int, int], Receipt]:
        """Receipts by (shard, generation) from roll-ups and single files; a single file is the newer one."""
        for _ in range(3):  # a file that vanishes after the listing was folded into a new roll-up
            names = _cache_order(self.files.list("receipts"))
            texts = list(each(self.files, self.files.read, [f"receipts/{name}" for name in names]))
            if None not in texts:
                break
        return {(r.shard_id, r.generation): r for name, text in zip(names, texts, strict=True) if text is not None
                for r in _receipts_in(f"receipts/{name}", text)}

    def forget_lost(self) -> None:
        """Drops the receipts of data files that are gone, or they would count what is made in their place."""
        committed = {parsed for name in self.files.list("data") if (parsed := parse_data_name(name))}
        cached = self.cached()
        if cached.keys() <= committed:
            return
        listed = self.files.list("receipts")
        attempt = max(receipt.attempt for receipt in cached.values())
        self._publish_roll_up(attempt, 1, {key: one for key, one in cached.items() if key in committed})
        self.files.delete(*(f"receipts/{name}" for name in listed if name.endswith(".json")))

    def roll_up(self, at_least: int = 1) -> int:
        """Folds single receipts, if there are `at_least` so many, into one file; returns how many.

        Any number of drivers may do so at once: at worst a receipt is in two files, or in none and a footer is read.
        """
        listed = self.files.list("receipts")
        singles = [name for name in listed if name.endswith(".json") and _roll_up_number(name) == _NO_ROLL_UP]
        if len(singles) < max(at_least, 1):
            return 0
        folded: dict[tuple[int, int], Receipt] = {}
        spent: list[str] = []
        names = [f"receipts/{name}" for name in _cache_order(listed)]
        for name, text in zip(names, each(self.files, self.files.read, names), strict=True):
            found = _receipts_in(name, text or b"[]")
            if len(found) < _FULL_ROLL_UP:
                folded |= {(r.shard_id, r.generation): r for r in found}
                spent.append(name)
        attempt = max((receipt.attempt for receipt in folded.values()), default=0)
        number = 1 + max((n for a, n in map(_roll_up_number, listed) if a == attempt), default=0)
        self._publish_roll_up(attempt, number, folded)
        self.files.delete(*spent)
        return len(singles)

    def _publish_roll_up(self, attempt: int, number: int, receipts: dict[tuple[int, int], Receipt]) -> None:
        """Under the first number from `number` that is free."""
        content = {"receipts": [asdict(receipts[key]) for key in sorted(receipts)]}
        while not self.files.publish(name := f"receipts/rollup-{attempt:04d}-{number}.json", sealed(name, content),
                                     "rollup"):
            number += 1

    def data(self, receipt: Receipt, columns: list[str] | None = None) -> pa.Table:
        """Kept rows of a committed file (DATA_SCHEMA), or some of their columns. Raises DamagedFile."""
        with self.open(receipt) as parquet:
            return read_columns(parquet, self.files.at(data_place(receipt.data_file)), columns or DATA_SCHEMA.names,
                                DATA_SCHEMA)

    @contextlib.contextmanager
    def open(self, receipt: Receipt) -> Iterator[pq.ParquetFile]:
        """The data file of a receipt, if it is still that. Raises FileNotFoundError, DamagedFile, DigestMismatch."""
        name, where = receipt.data_file, self.files.at(f"data/{receipt.data_file}")
        try:
            opened = self.files.open(f"data/{name}")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{where}: cannot be read ({error.strerror or error}); give this user the right to read "
                               "it, or repair the storage") from error
        with self._advising(), opened as reader:
            parquet = open_parquet(reader, where)
            raw = (parquet.schema_arrow.metadata or {}).get(FOOTER)
            found = self._receipt(None if raw is None else json.loads(raw), name)
            if found.content_sha256 != receipt.content_sha256 or parquet.metadata.num_rows != receipt.kept:
                raise DamagedFile(f"{where}: is not the file of its receipt")
            yield parquet

    def refused(self, receipt: Receipt) -> pa.Table:
        """Refused rows of a committed file (REFUSED_SCHEMA); no rows where it names no side file. Raises
        DamagedFile."""
        if not receipt.side_file:
            return REFUSED_SCHEMA.empty_table()
        content, where = self.files.read(name := f"rejected/{receipt.side_file}"), self.files.at(name)
        with self._advising():
            if content is None or side_hash(content) not in receipt.side_file:
                raise DamagedFile(f"{where}: is {'gone' if content is None else 'damaged'}, and "
                                  f"data/{receipt.data_file} names it. {MAKE_AGAIN} The file to delete is "
                                  f"data/{receipt.data_file}")
            return table_of(content, where)

    @contextlib.contextmanager
    def _advising(self) -> Iterator[None]:
        """Says what to do about a damaged file."""
        try:
            yield
        except DamagedFile as error:
            if MAKE_AGAIN in str(error):
                raise
            raise DamagedFile(f"{error}. {MAKE_AGAIN}") from error


def side_hash(content: bytes) -> str:
    """What the name of a side file says of its content."""
    return hashlib.sha256(content).hexdigest()[:16]


def receipt_name(receipt: Receipt) -> str:
    return f"receipts/{receipt.data_file.removeprefix('train-').removesuffix('.parquet')}.json"


def _cache_order(names: Iterable[str]) -> list[str]:
    """Receipt files, roll-ups first and the older before the newer, so that a later one replaces an earlier one."""
    kept = [name for name in names if name.endswith(".json")]
    return sorted(kept, key=lambda name: (_roll_up_number(name) == _NO_ROLL_UP, _roll_up_number(name)))


def _roll_up_number(name: str) -> tuple[int, int]:
    """(attempt, number) of a roll-up, _NO_ROLL_UP for any other file."""
    match = _ROLL_UP_NAME.match(name)
    return (int(match[1]), int(match[2])) if match else _NO_ROLL_UP


def _receipts_in(name: str, text: bytes) -> list[Receipt]:
    """Receipts of a cache file, one or many; none of a damaged one, for the footers replace it."""
    try:
        if text.startswith(b"["):  # as roll-ups once were
            return [Receipt(**fields) for fields in json.loads(text)]
        found = unsealed(name, text, name)
        return [Receipt(**fields) for fields in found.get("receipts", [found])]
    except (DamagedFile, ValueError, TypeError):
        return []


class Tally:
    """Counts of a run, receipt by receipt, in any order; a retried row leaves `failed` of the generation before it."""

    def __init__(self, planned: int, receipts: Iterable[Receipt] = ()) -> None:
        self._planned = planned
        self._kept = self._rejected = self._failed = self._shards = 0
        self._seen: set[tuple[int, int]] = set()
        self._last: dict[int, tuple[int, int, dict[str, int]]] = {}  # shard -> its last generation: failed, reasons
        for receipt in receipts:
            self.add(receipt)

    def add(self, receipt: Receipt) -> None:
        """Counts a committed file once, however often it is reported."""
        key = (receipt.shard_id, receipt.generation)
        if key in self._seen:
            return
        self._seen.add(key)
        self._kept, self._rejected = self._kept + receipt.kept, self._rejected + receipt.rejected
        self._shards += receipt.generation == 0
        last, failed, _ = self._last.get(receipt.shard_id, (-1, 0, {}))
        if receipt.generation > last:
            self._last[receipt.shard_id] = (receipt.generation, receipt.failed, receipt.reasons)
            self._failed += receipt.failed - failed

    @property
    def totals(self) -> Totals:
        return Totals(self._planned, self._kept, self._rejected, self._failed, self._shards)

    def failures(self) -> Counter[str]:
        """Rows that failed and were not made since, by reason."""
        found: Counter[str] = Counter()
        for _, _, reasons in self._last.values():
            found.update({reason: n for reason, n in reasons.items() if Reason(reason).status is Status.FAILED})
        return found


def totals(planned: int, receipts: Iterable[Receipt]) -> Totals:
    """Counts over all generations of committed files."""
    return Tally(planned, receipts).totals


def faulty_seeds(store: Store) -> dict[str, str]:
    """Seeds that were refused before anything was sampled, and whose rows were not made since: id -> reason."""
    last: dict[int, Receipt] = {}
    for receipt in store.receipts():
        if receipt.generation >= (before := last.setdefault(receipt.shard_id, receipt)).generation:
            last[before.shard_id] = receipt
    found: dict[str, str] = {}
    for receipt in last.values():
        if SEED_REASONS & receipt.reasons.keys():
            table = store.refused(receipt).select(["seed_id", "reason"])
            found |= {row["seed_id"]: row["reason"] for row in table.to_pylist() if row["reason"] in SEED_REASONS}
    return found


def _tables(samples: Sequence[Sample], schema: pa.Schema) -> Iterator[pa.Table]:
    """Row groups of a file, one after the other, so that large images are not held once more all at once."""
    start = held = 0
    for stop, sample in enumerate(samples):
        size = len(sample.image or b"")
        if stop - start == ROW_GROUP or (stop > start and held + size > _GROUP_BYTES):
            yield samples_to_arrow(samples[start:stop], schema)
            start, held = stop, 0
        held += size
    yield samples_to_arrow(samples[start:], schema)


def content_sha256(rows: Any) -> str:
    """Hash over sorted (sample_id, sample_sha256)."""
    return hashlib.sha256("\n".join(f"{i} {s}" for i, s in sorted(rows)).encode()).hexdigest()


def new_attempt(files: Files, facts: dict[str, Any], clock: Callable[[], float] = time.time) -> int:
    """Registers a start as attempts/NNNN.json and returns its number, from 1."""
    number = 1 + max((int(name[:-5]) for name in attempt_names(files)), default=0)
    while not files.publish(name := f"attempts/{number:04d}.json",
                            sealed(name, {"attempt": number, "started": clock(), **facts}), "attempt"):
        number += 1
    return number


def attempt_names(files: Files) -> list[str]:
    """Files of attempts/ in order; what else lies there is not ours."""
    return sorted(name for name in files.list("attempts") if re.fullmatch(r"\d{4,}\.json", name))
