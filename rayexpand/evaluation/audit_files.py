"""Results of audits beside a run, read.

    <run>/audit/<name>.done                            says that there is a result: object stores list no folders
    <run>/audit/<name>/result.json                     an entry for each section
    <run>/audit/<name>/copies/part-00000.parquet       one row for each sample: own, other and nearest seeds
    <run>/audit/<name>/copies/calibration.parquet      the same of held-out images and known copies
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.contract.schema import Receipt
from rayexpand.contract.settings import digest
from rayexpand.runs.selections import id_digests
from rayexpand.storage.files import Files
from rayexpand.storage.tables import read_json, read_table, texts

FOLDER, RESULT = "audit", "result.json"
_DONE = ".done"


def read_audit(files: Files, name: str) -> dict[str, Any] | None:
    """The result of an audit of the run in `files`, None where there is none. Raises DamagedFile."""
    with _made_again():
        return read_json(files, f"{FOLDER}/{name}/{RESULT}") if re.fullmatch(r"[\w.-]+", name) else None


@contextmanager
def _made_again() -> Iterator[None]:
    try:
        yield
    except DamagedFile as error:
        raise DamagedFile(f"{error}. Run `rayexpand audit` with its file again, which makes it anew") from error


def register(files: Files, name: str) -> None:
    """Makes the audit `name` known among those of the run."""
    files.make_folder(FOLDER)
    files.mark(f"{FOLDER}/{name}{_DONE}")


def audit_names(files: Files) -> list[str]:
    return sorted(name.removesuffix(_DONE) for name in files.list(FOLDER) if name.endswith(_DONE))


def latest(files: Files, section: str) -> dict[str, Any] | None:
    """The entry of a section that was written last in any audit of the run, with the `audit` it is of."""
    found = [{**one[section], "audit": name} for name in audit_names(files)
             if (one := read_audit(files, name)) and section in one]
    return max(found, key=lambda entry: entry["created"], default=None)


def committed_sha256(receipts: Iterable[Receipt]) -> str:
    """Hash over what is committed; a retry changes it."""
    return digest(sorted((one.data_file, one.content_sha256) for one in receipts))


def part_names(files: Files, folder: str) -> list[str]:
    return sorted(name for name in files.list(folder) if name.startswith("part-"))


def copy_rows(files: Files, name: str, columns: Sequence[str], rows: np.ndarray | None = None) -> pa.Table:
    """Columns of the samples of the audit `name`, in the order of its parts, or of some of its `rows`, as these are
    ordered; what else a part has is not kept. Raises UsageError where it has none."""
    folder = f"{FOLDER}/{name}/copies"
    if not (names := part_names(files, folder)):
        known = [one for one in audit_names(files) if part_names(files, f"{FOLDER}/{one}/copies")]
        raise UsageError(f"{files.root} has no audit {name!r} of copies; it has {', '.join(known) or 'none'}. Make it "
                         "with `rayexpand audit`")
    with _made_again():
        parts = (read_table(files, f"{folder}/{part}", list(columns)).replace_schema_metadata() for part in names)
        return pa.concat_tables(parts) if rows is None else _chosen(parts, rows)


def _chosen(parts: Iterable[pa.Table], rows: np.ndarray) -> pa.Table:
    order, found, start = np.argsort(rows, kind="stable"), list[pa.Table](), 0
    rising = rows[order]
    for part in parts:
        low, high = np.searchsorted(rising, [start, start + part.num_rows])
        if high > low or not found:
            found.append(part.take(pa.array(rising[low:high] - start)))
        start += part.num_rows
    return pa.concat_tables(found).take(pa.array(np.argsort(order, kind="stable")))


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """float64, not a number where the table has none."""
    return table[column].to_numpy().astype(np.float64)


def similarities_of(files: Files, name: str, scope: str, sample_ids: Sequence[str]) -> np.ndarray:
    """float64: the similarity in a scope of each sample. Raises UsageError where the audit does not know one."""
    table = copy_rows(files, name, ["sample_id", scope])
    known, wanted = id_digests(texts(table["sample_id"])), id_digests(sample_ids)
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)
    if len(absent := np.flatnonzero(known[order][at] != wanted)):
        raise UsageError(f"audit {name!r} says nothing about {len(absent):,} samples, such as "
                         f"{sample_ids[int(absent[0])]}; they were made after it: audit the run again")
    return numbers(table, scope)[order[at]]
