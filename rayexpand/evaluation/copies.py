"""The audit `copies`: is a sample of a run a copy of a seed, its own or another?

Every sample is compared with all seeds in the features of one extractor. What counts as a copy is calibrated first, by
held-out real images and by copies that are known to be some (copy_statistics.py). The work is cut into chunks: seeds,
held-out images, known copies, and data files of the run; copy_search.py turns them into tables, here or on a cluster.

Parts of the result (audit_files.py) are written as chunks come in, so a stopped audit continues.
"""

# N samples, M seeds, D features

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.settings import digest
from rayexpand.data.seeds import build_index
from rayexpand.evaluation import copy_extractor as extractors
from rayexpand.evaluation import copy_statistics as statistics
from rayexpand.evaluation.audit_files import committed_sha256, numbers, part_names
from rayexpand.evaluation.chunk_columns import ChunkColumns
from rayexpand.evaluation.copies_config import CopiesConfig, chosen_extractor
from rayexpand.evaluation.copy_search import CompareChunk, ComparedSeeds, CopyJob, OnRows, Work, held_out_chunk
from rayexpand.evaluation.feature_file import FeatureFile
from rayexpand.evaluation.known_copies import EDITS, STRENGTHS, has_img2img
from rayexpand.runs.config import RuntimeConfig
from rayexpand.runs.run import Run
from rayexpand.storage.tables import parquet_bytes, parquet_facts, read_table

log = logging.getLogger(__name__)

CHUNK = 2048  # seeds or held-out images of one chunk
KNOWN_CHUNK = 64  # known copies of one
PART_ROWS = 50_000  # a part is written when it holds so many rows
VERSION = 1  # raised when the code below makes other numbers of the same images
COUNTED = ["label", "strength", "own", "class", "all"]  # columns that are held of all samples at once
JOB = b"rayexpand"  # schema metadata of a part: digest of the job, and the chunks in it


def audit_copies(run: Run, config: CopiesConfig, runtime: RuntimeConfig, folder: str, work: Work,
                 on_rows: OnRows = lambda task, done, total: None) -> dict[str, Any]:
    """What the audit found, for its result file; its tables are written below `folder` of the run. Raises UsageError
    for fewer than 1000 held-out images or a run without samples."""
    config = config.model_copy(update={"extractor": chosen_extractor(config, run)})
    job = CopyJob(str(run.folder), config, extractors.sha256_of(config.extractor, on_rows), runtime)
    samples = [CompareChunk("samples", f"{one.data_file} {one.content_sha256}", one.kept, one.data_file)
               for one in run.store.receipts() if one.kept]
    if not samples:
        raise UsageError(f"{run.folder} has no kept sample to audit; run `rayexpand expand` first")
    held_out = _held_out_chunks(config)
    known = _known_chunks(run, config)
    with FeatureFile(len(run.plan.index)) as file:
        return _audited(run, job, folder, _seed_features(run, job, work, file, on_rows), samples, held_out, known, work,
                        on_rows)


def _audited(run: Run, job: CopyJob, folder: str, found: ComparedSeeds, samples: Sequence[CompareChunk],
             held_out: Sequence[CompareChunk], known: Sequence[CompareChunk], work: Work,
             on_rows: OnRows) -> dict[str, Any]:
    config = job.config
    calibration = _calibration(job, [*held_out, *known], found, work, on_rows)
    for name in (folder, ".tmp"):
        run.files.make_folder(name)
    run.files.replace(f"{folder}/calibration.parquet", parquet_bytes(calibration, {}))
    identity = digest({"version": VERSION, "config": config.model_dump(mode="json", exclude={"extractor", "known"}),
                       "extractor": job.extractor_sha256, "seeds": found.sha256})
    rows = _Parts(run, folder, identity).rows(samples, lambda chunks: work(job, chunks, found), on_rows)
    extractor = {"name": extractors.name_of(config.extractor), "sha256": job.extractor_sha256,
                 "resize": config.extractor.brought.words, "features": found.width}
    repeated_M = (found.same_M != np.arange(len(found.same_M))) & found.sound_M
    return {"identity": identity, "committed_sha256": committed_sha256(run.store.receipts()), "extractor": extractor,
            "within": config.within, "centre": config.centre, "top": config.top,
            "seeds": {"listed": len(run.plan.index), "compared": int(found.sound_M.sum()),
                      "same_as_another": int(repeated_M.sum())},
            **_summary(run, config, calibration, rows, sum(one.rows for one in held_out))}


# --------------------------------------------------------------------------------------------------------------- chunks


def _held_out_chunks(config: CopiesConfig) -> list[CompareChunk]:
    index = build_index(config.held_out)
    sound_N = np.flatnonzero(np.asarray(index.table["fault"].to_pylist()) == "")
    ids = index.table["seed_id"].take(pa.array(sound_N)).to_pylist()
    rank_N = PlanRng(config.seed, "audit").per_seed("held_out", ids)
    rows = np.sort(sound_N[np.argsort(rank_N, kind="stable")[:config.held_out_images]])
    if len(rows) < statistics.LEAST_NULL:
        raise UsageError(f"audit.copies.held_out: {len(rows)} real images, and {statistics.LEAST_NULL:,} are needed to "
                         "know what one image in a thousand looks like; name a larger part of the dataset")
    return [held_out_chunk(index, rows[start:start + CHUNK]) for start in range(0, len(rows), CHUNK)]


def _known_chunks(run: Run, config: CopiesConfig) -> list[CompareChunk]:
    """The same seeds for every kind."""
    table = run.plan.index.table
    sound = np.flatnonzero(pc.equal(table["fault"], "").to_numpy())
    rank = PlanRng(config.seed, "audit").per_seed("known", table["seed_id"].take(pa.array(sound)).to_pylist())
    chosen = np.sort(sound[np.argsort(rank, kind="stable")[:config.known]]).tolist()
    kinds = [*EDITS, *(STRENGTHS if has_img2img(run.config) else ())]
    return [CompareChunk(kind, f"{kind} {start}", len(part := chosen[start:start + KNOWN_CHUNK]), positions=tuple(part))
            for kind in kinds for start in range(0, len(chosen), KNOWN_CHUNK)]


def _seed_features(run: Run, job: CopyJob, work: Work, file: FeatureFile, on_rows: OnRows) -> ComparedSeeds:
    count = len(run.plan.index)
    chunks = [CompareChunk("seeds", str(start), min(CHUNK, count - start),
                    positions=tuple(range(start, min(start + CHUNK, count)))) for start in range(0, count, CHUNK)]
    tables = _worked(job, chunks, None, work, "features of seeds", on_rows)
    return ComparedSeeds.of(((number * CHUNK, table) for number, table in tables), run.plan.index.labels, file)


def _calibration(job: CopyJob, chunks: Sequence[CompareChunk], found: ComparedSeeds, work: Work,
                 on_rows: OnRows) -> pa.Table:
    tables = dict(_worked(job, chunks, found, work, "held-out images and known copies", on_rows))
    return pa.concat_tables([tables[number] for number in range(len(chunks))])


def _worked(job: CopyJob, chunks: Sequence[CompareChunk], found: ComparedSeeds | None, work: Work, task: str,
            on_rows: OnRows) -> Iterator[tuple[int, pa.Table]]:
    """Numbers of chunks and their tables, as they come."""
    total, done = sum(one.rows for one in chunks), 0
    for number, table in work(job, chunks, found):
        yield number, table
        on_rows(task, done := done + chunks[number].rows, total)


# ---------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Parts:
    """Tables of samples below a folder of the run, kept as they come in; `identity` is that of the audit."""

    run: Run
    folder: str
    identity: str

    def rows(self, chunks: Sequence[CompareChunk],
             work: Callable[[Sequence[CompareChunk]], Iterator[tuple[int, pa.Table]]], on_rows: OnRows) -> pa.Table:
        """COUNTED columns of all samples: of those that are there already, and of the others."""
        counted = ChunkColumns({chunk.key: chunk.rows for chunk in chunks}, COUNTED)
        self._known(counted)
        todo = [chunk for chunk in chunks if chunk.key not in counted]
        total = sum(one.rows for one in chunks)
        done = total - sum(one.rows for one in todo)
        waiting: list[tuple[str, pa.Table]] = []
        try:
            for number, table in work(todo) if todo else ():
                waiting.append((todo[number].key, table))
                on_rows("samples compared with seeds", done := done + todo[number].rows, total)
                counted.add(todo[number].key, table)
                if sum(table.num_rows for _, table in waiting) >= PART_ROWS:
                    self._keep(waiting)
                    waiting = []
        finally:
            if waiting:
                self._keep(waiting)
        assert not counted.missing
        return pa.table(counted.columns)

    def _known(self, counted: ChunkColumns) -> None:
        """Counts the rows of parts; those that are damaged, of another audit, or of data files that are gone are
        removed."""
        files = self.run.files
        for name in part_names(files, self.folder):
            table, start = self._part(name, counted.missing), 0
            if table is None:
                files.delete(f"{self.folder}/{name}")
                continue
            facts = json.loads(table.schema.metadata[JOB])
            for key, rows in facts["chunks"]:
                counted.add(key, table.slice(start, rows))
                start += rows

    def _part(self, name: str, wanted: Set[str]) -> pa.Table | None:
        """None where it is of another audit, of other chunks, or damaged."""
        files, file = self.run.files, f"{self.folder}/{name}"
        try:
            facts = parquet_facts(files, file, JOB) or {}
            is_ours = facts.get("job") == self.identity and {key for key, _ in facts["chunks"]} <= wanted
            return read_table(files, file) if is_ours else None
        except DamagedFile as error:
            log.warning("%s. It is made again", error)
            return None

    def _keep(self, tables: Sequence[tuple[str, pa.Table]]) -> None:
        facts = {"job": self.identity, "chunks": [(key, table.num_rows) for key, table in tables]}
        content = parquet_bytes(pa.concat_tables([table for _, table in tables]), {JOB: json.dumps(facts).encode()},
                                row_group=PART_ROWS)
        number = len(part_names(self.run.files, self.folder))
        while not self.run.files.publish(f"{self.folder}/part-{number:05d}.parquet", content):
            number += 1


# --------------------------------------------------------------------------------------------------------------- result


def _summary(run: Run, config: CopiesConfig, calibration: pa.Table, rows: pa.Table, listed: int) -> dict[str, Any]:
    """Thresholds, what they find of known copies, and the counts of the samples. The scope class has none where too few
    held-out images are of these classes."""
    kind = np.asarray(calibration["kind"].to_pylist())
    scopes: list[str] = [*dict.fromkeys(("class", config.within))]
    null = {scope: numbers(calibration, scope)[kind == "held_out"] for scope in scopes}
    null = {scope: s_N[~np.isnan(s_N)] for scope, s_N in null.items()}
    own_N = numbers(calibration, "own")
    known = {one: own_N[(kind == one) & ~np.isnan(own_N)] for one in dict.fromkeys(kind.tolist()) if one != "held_out"}
    tau = {scope: statistics.threshold(s_N) for scope, s_N in null.items() if len(s_N) >= statistics.LEAST_NULL}
    if config.within not in tau:
        raise UsageError(f"audit.copies.held_out: {len(null[config.within])} of {listed:,} held-out images can be "
                         f"compared (within: {config.within}), and {statistics.LEAST_NULL:,} are needed: others are "
                         "seeds themselves, cannot be read, or have a class that the run has not")
    tau_copy = {scope: statistics.copy_threshold(known, value) for scope, value in tau.items()}
    found = {scope: statistics.found_shares(known, value) for scope, value in tau.items()}
    words = statistics.cannot_see(found[config.within])
    result: dict[str, Any] = {
        "held_out": {"listed": listed, "compared": {scope: len(s_N) for scope, s_N in null.items()}},
        "tau": tau, "tau_copy": tau_copy, "known_copies": {
            one: {"images": len(s_N), "median": float(np.median(s_N)),
                  "found": {scope: found[scope][one] for scope in tau}} for one, s_N in known.items()},
        "sees_copies": not words, "words": words, "samples": rows.num_rows}
    return result if words else {**result, **_counts(run, rows, tau, tau_copy)}


def _counts(run: Run, rows: pa.Table, tau: Mapping[str, float], tau_copy: Mapping[str, float]) -> dict[str, Any]:
    """Copies and candidates by scope; shares of copies by strength, and the classes with the largest ones."""
    strength_N, label_N = rows["strength"].to_numpy(), rows["label"].to_numpy()
    keys = run.plan.index.classes.key
    scopes: dict[str, Any] = {}
    for scope in ("own", *tau):
        s_N = numbers(rows, scope)
        if scope == "class" and len(tau) > 1 and np.isnan(s_N).all():
            continue  # every class has one seed
        copy_N = s_N > tau_copy[statistics.judged_by(scope, tau)]
        scopes[scope] = {**statistics.scope_counts(s_N, scope, tau, tau_copy),
                         "by_strength": _shares(copy_N, strength_N), "by_class": _largest(copy_N, label_N, keys)}
    return {"scopes": scopes}


def _shares(copy_N: np.ndarray, strength_N: np.ndarray) -> dict[str, float]:
    """Share of copies by strength; none where there are more than 20."""
    values, which_N = np.unique(strength_N, return_inverse=True)
    if len(values) > 20:
        return {}
    return {f"{value:g}": float(copy_N[which_N == i].mean()) for i, value in enumerate(values)}


def _largest(copy_N: np.ndarray, label_N: np.ndarray, keys: Sequence[str], most: int = 10) -> dict[str, float]:
    """Share of copies of the classes where it is largest."""
    had_K, copies_K = (np.bincount(one, minlength=len(keys)) for one in (label_N, label_N[copy_N]))
    share_K = copies_K / np.maximum(had_K, 1)
    return {keys[label]: float(share_K[label]) for label in np.argsort(-share_K, kind="stable")[:most].tolist()
            if copies_K[label]}
