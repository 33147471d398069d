"""A run folder of 13 million tiny rows in 13,000 shards, and what every verb needs on it: seconds and peak memory.

    python -m tests.benchmarks.whole_scale make --out FOLDER                 1.3 million seeds, ten copies of each
    python -m tests.benchmarks.whole_scale make --out FOLDER --shards 13     the same, small
    python -m tests.benchmarks.whole_scale measure VERB ... --out FOLDER     each in a process of its own
    python -m tests.benchmarks.whole_scale measure VERB --out FOLDER --limit-s 600

`measure` prints one JSON object for each verb: seconds, peak resident memory of the process in MB (`driver_mb`), and of
the largest of its children (`child_mb`). A verb that is not over after --limit-s is stopped, and says how far it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.runs import run as runs
from rayexpand.runs.run import Run, open_run
from rayexpand.storage.tables import read_table
from tests.benchmarks.whole_run import CLASSES, FEATURES, SIDE, data_of, make


class _OverError(Exception):
    """The time for one verb is over."""


class Clock:
    """Rows by time of a task, and its end after `limit_s`: an `on_rows` of any verb."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.first, self.last = limit_s, (0.0, 0), (0.0, 0)
        self.total, self.found = 0, dict[str, Any]()

    def __call__(self, task: str, done: int, total: int, *_: Any) -> None:
        now = time.perf_counter()
        if total != self.total:
            self.first, self.total = (now, done), total
        self.last = (now, done)
        if now - self.first[0] > self.limit_s:
            raise _OverError

    def facts(self) -> dict[str, Any]:
        (begun, first), (ended, last) = self.first, self.last
        rate = (last - first) / max(1e-9, ended - begun)
        return {"stopped_at_row": last, "of": self.total, "rows_per_second": round(rate),
                "whole_s_at_this_rate": round(self.total / rate)}


def measure(out: Path, verb: str, limit_s: float) -> dict[str, Any]:
    """One verb in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks.whole_scale", "one", verb, "--out", str(out),
                           "--limit-s", str(limit_s)], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(out: Path, verb: str, limit_s: float) -> dict[str, Any]:
    clock, found = Clock(limit_s), dict[str, Any]()
    started = time.perf_counter()
    try:
        found = VERBS[verb](out, clock)
    except _OverError:
        found = clock.facts()
    seconds = time.perf_counter() - started
    self_kb, child_kb = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    return {"verb": verb, "seconds": round(seconds, 1), "cpu_s": round(cpu.ru_utime + cpu.ru_stime, 1),
            "driver_mb": round(self_kb / 1024), "child_mb": round(child_kb / 1024), **found}


def _status(out: Path, clock: Clock) -> dict[str, Any]:
    from rayexpand.runs.status import read_status

    return {"kept": read_status(out / "run").kept}


def _verify(out: Path, clock: Clock) -> dict[str, Any]:
    from rayexpand.runs.verify import verify

    found = verify(open_run(str(out / "run")))
    return {"problems": len(found.problems), "kept": found.totals.kept}


def _retry_plan(out: Path, clock: Clock) -> dict[str, Any]:
    return {"jobs": len(runs.retry_jobs(open_run(str(out / "run")))())}


def _lookup(out: Path, clock: Clock) -> dict[str, Any]:
    from rayexpand.runs.lookup import keyed_seeds, rows_of, seed_table
    from rayexpand.runs.status import view_run

    view = view_run(out / "run")
    table = seed_table(view)
    seeds = [one for ids in keyed_seeds([table], 1, 8).values() for one in ids]
    return {"rows": len(rows_of(view, table, seeds).kept)}


def _regen(out: Path, clock: Clock) -> dict[str, Any]:
    import rayexpand

    run = open_run(str(out / "run"))
    middle = run.plan.draws_of(len(run.plan.index) // 2)[3].sample_id
    return {"sample_id": rayexpand.open(out / "run").regen(middle)["sample_id"]}


def _report(out: Path, clock: Clock) -> dict[str, Any]:
    from rayexpand.reports.run import write_report

    return {"bytes": Path(write_report(out / "run")).stat().st_size}


def _card(out: Path, clock: Clock) -> dict[str, Any]:
    from rayexpand.reports.card import write_card

    return {"bytes": Path(write_card(out / "run")).stat().st_size}


def _matrix(out: Path, clock: Clock) -> dict[str, Any]:
    from rayexpand.reports.matrix import write_matrix

    return {"bytes": Path(write_matrix([str(out / "run")], str(out / "run"))).stat().st_size}


def _export(layout: str) -> Callable[[Path, Clock], dict[str, Any]]:
    """`clock` ends it; what was written by then is removed by the export itself."""
    def verb(out: Path, clock: Clock) -> dict[str, Any]:
        import rayexpand

        target = out / f"export-{layout}"
        try:
            found = rayexpand.open(out / "run").export(target, layout, on=lambda event: clock(
                event.task, event.done, event.total))
            return {"files": found.files, "bytes": sum(one.stat().st_size for one in target.rglob("*.*"))}
        finally:
            shutil.rmtree(target, ignore_errors=True)
    return verb


def _in_worker(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """(seconds, result) of a call in another process, as a worker of a cluster would make it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_timed, function, *arguments).result()


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def _rate(rows: int, seconds: float, of: int) -> dict[str, Any]:
    return {"real_rows": rows, "rows_per_second": round(rows / seconds), "whole_s_at_this_rate": round(
        of * seconds / rows)}


def _evaluate(out: Path, clock: Clock) -> dict[str, Any]:
    """Features of the real images and of the first samples by a worker; those of the other samples are random."""
    from rayexpand.evaluation import evaluate as evaluation
    from rayexpand.evaluation.extraction import Gathered

    config = evaluation.parse({"run": str(out / "run"), "reference": data_of(out / "real"), "batch": 250,
                               "extractor": {"guide": str(out / "clip"), "device": "cpu"}})
    facts, rng = dict[str, Any](), np.random.default_rng(0)

    def made_up(part: Any, chunks: Sequence[pa.Table]) -> Any:
        keep_N = np.concatenate([chunk["keep"].to_numpy() for chunk in chunks])
        kept = int(keep_N.sum())
        return part._replace(features_ND=rng.standard_normal((kept, FEATURES), np.float32), labels_N=np.arange(
            kept) % CLASSES, half_N=np.zeros(kept, np.int8), rows=len(keep_N))

    def extract(config: Any, sha256: str, sides: Sequence[Any], on_rows: Any) -> list[Any]:
        found = []
        for side in sides:
            gathered = Gathered(side, 16)
            spans = [[side.chunks[i] for i in span] for span in side.spans]
            first = len(spans) if side.name != "samples" else 1
            seconds, parts = _in_worker(_parts_of, config, replace(side, chunks=[]), spans[:first])
            if side.name == "samples":
                facts.update(_rate(parts[0].rows, seconds, len(side)))
            for number, chunks in enumerate(spans):
                gathered.add(number, parts[number] if number < first else made_up(parts[0], chunks))
            found.append(gathered.found())
        return found

    scores = evaluation.evaluate(config, extract)
    return {**facts, "seconds_of": {name: round(value, 1) for name, value in scores["seconds"].items()}}


def _parts_of(config: Any, side: Any, spans: Sequence[Sequence[pa.Table]]) -> list[Any]:
    import torch

    from rayexpand.evaluation.extraction import ahead, part_of
    from rayexpand.evaluation.features import load_extractor

    torch.set_num_threads(1)
    extractor = load_extractor(config.extractor)
    return [part_of(((chunk, ahead(side.calls(chunk, extractor.size, config.batch, extractor.intake)))
                     for chunk in chunks), extractor, sums=True) for chunks in spans]


def _audit(out: Path, clock: Clock) -> dict[str, Any]:
    """The first seeds, all that calibrates, and the first samples by a worker; other tables are made up of the last."""
    from rayexpand.evaluation.copies import audit_copies
    from rayexpand.evaluation.copies_config import CopiesConfig

    run = open_run(str(out / "run"))
    shutil.rmtree(out / "run/audit", ignore_errors=True)
    config = CopiesConfig(held_out=data_of(out / "real"), held_out_images=2000, within="class", batch=250, extractor={
        "guide": str(out / "clip"), "device": "cpu"})
    facts = dict[str, Any]()

    def work(job: Any, chunks: Sequence[Any], found: Any) -> Iterator[tuple[int, pa.Table]]:
        kind = chunks[0].kind
        first = 5 if kind in ("seeds", "samples") else len(chunks)
        seconds, tables = _in_worker(_compared, job, chunks[:first], found)
        facts[kind] = _rate(sum(one.num_rows for one in tables), seconds, sum(one.rows for one in chunks))
        for number, chunk in enumerate(chunks):
            yield number, tables[number] if number < first else _like(run, tables[-1], chunk, number)

    found = audit_copies(run, config, run.config.runtime, "audit/scale/copies", work)
    return {**facts, "samples": found["samples"]}


def _compared(job: Any, chunks: Sequence[Any], found: Any) -> list[pa.Table]:
    from rayexpand.evaluation import copy_search

    return [table for _, table in copy_search.in_process(job, chunks, found)]


def _like(run: Run, table: pa.Table, chunk: Any, number: int) -> pa.Table:
    """A table of the size of a chunk, with the numbers of another one."""
    other = table.take(pa.array(np.arange(chunk.rows) % table.num_rows))
    if chunk.kind == "seeds":
        return other.set_column(2, "pixels", pa.array(np.arange(chunk.rows, dtype=np.uint64) + number * 10_000))
    ids = read_table(run.files, f"data/{chunk.file}", ["sample_id"])
    return other.set_column(other.schema.get_field_index("sample_id"), "sample_id", ids["sample_id"])


def _scores(clock: Clock) -> Callable[[Any, Sequence[Any]], Iterator[tuple[int, pa.Table]]]:
    """Scores of the first files by a worker; those of other files are made up."""
    def score(job: Any, chunks: Sequence[Any]) -> Iterator[tuple[int, pa.Table]]:
        run, first = open_run(job.run), 10
        seconds, tables = _in_worker(_scored, job, chunks[:first])
        clock.found = _rate(sum(one.num_rows for one in tables), seconds, sum(one.stop - one.start for one in chunks))
        for number, chunk in enumerate(chunks):
            if number < first:
                yield number, tables[number]
                continue
            rows = read_table(run.files, f"data/{chunk.file}", ["row"])["row"]
            yield number, tables[-1].take(pa.array(np.arange(len(rows)) % len(tables[-1]))).set_column(0, "row", rows)
    return score


def _scored(job: Any, chunks: Sequence[Any]) -> list[pa.Table]:
    from rayexpand.evaluation import select_scores

    return [table for _, table in select_scores.in_process(job, chunks)]


def _select(name: str, rule: dict[str, Any]) -> Callable[[Path, Clock], dict[str, Any]]:
    def verb(out: Path, clock: Clock) -> dict[str, Any]:
        from rayexpand.evaluation import select

        (out / f"run/selections/{name}.parquet").unlink(missing_ok=True)
        found = select.select(select.parse({"name": name, "run": str(out / "run"), "rule": rule}), _scores(clock))
        return {"kept": found["kept"], **clock.found}
    return verb


def _training_set(out: Path, **fields: Any) -> Any:
    from rayexpand.data import seeds
    from rayexpand.loader.training_set import RowSource
    from rayexpand.studies.samples import training_set

    run = open_run(str(out / "run"))
    index = seeds.build_index(run.config.data)
    return training_set([RowSource(seeds=(index, run.config.data)), RowSource(run=str(out / "run"), **fields)])


def _study_list(**fields: Any) -> Callable[[Path, Clock], dict[str, Any]]:
    def verb(out: Path, clock: Clock) -> dict[str, Any]:
        rows = _training_set(out, **fields)
        (out / "rows.arrow").write_bytes(rows.to_bytes())
        return {"rows": len(rows), "file_mb": round((out / "rows.arrow").stat().st_size / 2**20)}
    return verb


def _loader(out: Path, clock: Clock) -> dict[str, Any]:
    """Of the file that `study_list` wrote, as a training worker reads it."""
    from rayexpand.classifier.recipe import make_recipe
    from rayexpand.loader.loader import Loader
    from rayexpand.loader.training_set import TrainingSet

    begun = time.perf_counter()
    rows = TrainingSet.load(out / "rows.arrow")
    loaded = time.perf_counter()
    recipe = make_recipe({"size": SIDE, "batch": 256, "epochs": 1})
    batches = Loader(rows, recipe, 0).batches(0, 10**9)
    next(batches)
    first = time.perf_counter()
    images = sum(len(next(batches).x_BHWC) for _ in range(400))
    return {"load_s": round(loaded - begun, 1), "first_batch_s": round(first - loaded, 1),
            "images_per_second": round(images / (time.perf_counter() - first))}


VERBS: dict[str, Callable[[Path, Clock], dict[str, Any]]] = {
    "status": _status, "retry_plan": _retry_plan, "lookup": _lookup, "regen": _regen, "verify": _verify,
    "select_random": _select("half", {"kind": "random", "share": 0.5}),
    "select_quantile": _select("best", {"kind": "quantile", "score": "quality", "drop": 0.1}),
    "select_best": _select("cap", {"kind": "best", "score": "quality", "n": 5, "per": "seed"}),
    "select_confidence": _select("real-filtering", {"kind": "clip_confidence"}),
    "select_near_copies": _select("distinct", {"kind": "near_copies", "within": "seed"}),
    "study_list": _study_list(), "study_list_selected": _study_list(selection="best"), "loader": _loader,
    "report": _report, "card": _card, "matrix": _matrix, "evaluate": _evaluate, "audit_copies": _audit,
    "export_huggingface": _export("huggingface"), "export_webdataset": _export("webdataset"),
    "export_imagefolder": _export("imagefolder")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "measure", "one"])
    parser.add_argument("verbs", nargs="*", help=f"of measure: {', '.join(VERBS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=13_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=600)
    given = parser.parse_args()
    if given.what == "make":
        print(json.dumps(make(given.out, given.shards, given.processes)))
    for verb in given.verbs:
        work = one if given.what == "one" else measure
        print(json.dumps(work(given.out, verb, given.limit_s)), flush=True)


if __name__ == "__main__":
    main()
