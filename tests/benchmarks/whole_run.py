"""Writes a run folder of millions of tiny rows for whole_scale.py.

It goes through the package's own planning, driver loop, commits and roll-ups; only sampling is left out: the images of
a shard come from a pool, and the columns of its draws are those of one seed, with what differs filled in. `rayexpand
verify --pixels` accepts the folder. Every tenth shard has rows that were rejected and rows that failed.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayexpand.contract.rng import generator, row_key
from rayexpand.contract.schema import DATA_SCHEMA, REFUSED_SCHEMA, Reason, Receipt, sample_sha256
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig, parse
from rayexpand.runs.run import Run, open_run
from rayexpand.runs.store import content_sha256
from rayexpand.storage.tables import ROW_GROUP

COPIES, SHARD_SEEDS = 10, 100
SIDE, POOL = 8, 1000  # pixels; images that samples are taken from
CLASSES, HELD_OUT = 1000, 20_000
REJECTED, FAILED, EVERY = 3, 2, 10  # rows of every tenth shard
FEATURES = 512  # of the extractor


def make(out: Path, shards: int, processes: int) -> dict[str, Any]:
    from tests.tiny import tiny_clip

    started = time.perf_counter()
    out.mkdir(parents=True)
    seeds = shards * SHARD_SEEDS
    _write_images(out / "seeds", seeds, "seeds")
    _write_images(out / "real", min(HELD_OUT, max(2000, seeds)), "real")
    tiny_clip(out / "clip", features=FEATURES)
    run = runs.prepare(run_config(out))
    planned = time.perf_counter()
    attempt = runs.begin(run)
    with ProcessPoolExecutor(processes, initializer=_open, initargs=(str(run.folder), attempt)) as pool:
        totals = runs.drive(run, lambda jobs: pool.map(_expand, [shard for shard, _ in jobs], chunksize=8),
                            lambda: runs.pending_jobs(run))
    data = run.files.entries("data")
    return {**asdict(totals), "bytes": sum(one.size for one in data.values()), "run": str(run.folder),
            "plan_s": round(planned - started, 1), "shards_s": round(time.perf_counter() - planned, 1)}


def run_config(out: Path) -> RunConfig:
    return parse({
        "name": "run", "out": str(out), "method": {"name": "classical", "ratio": COPIES},
        "data": data_of(out / "seeds"), "sampler": {"batch": 100, "shard_images": SHARD_SEEDS * COPIES},
        "prior": {"device": "cpu"}, "guide": {"weights": str(out / "clip")}})


def data_of(folder: Path) -> dict[str, Any]:
    return {"source": "parquet", "path": str(folder), "split": "train", "id_column": "id"}


def _write_images(folder: Path, count: int, name: str) -> None:
    """`count` images of SIDE pixels, no two alike, in files of 20,000; neighbours are of one class."""
    folder.mkdir()
    rng, per_class = _rng(name), max(1, -(-count // CLASSES))
    files = -(-count // 20_000)
    for number in range(files):
        at = np.arange(number * 20_000, min(count, (number + 1) * 20_000))
        label = at // per_class
        ids = [f"c{c:04d}/{name}{i:07d}" for c, i in zip(label.tolist(), at.tolist(), strict=True)]
        images = [{"bytes": _png(one), "path": f"{i}.png"} for i, one in zip(at.tolist(), _pixels(rng, len(at)),
                                                                               strict=True)]
        table = pa.table({"image": images, "label": [f"c{c:04d}" for c in label.tolist()], "id": ids})
        pq.write_table(table, folder / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=500)


def _pixels(rng: np.random.Generator, count: int) -> np.ndarray:
    """uint8 (count, SIDE, SIDE, 3): stripes of two colours, which compress well."""
    colour = rng.integers(0, 256, (count, 2, 3), dtype=np.uint8)
    which = np.repeat(rng.integers(0, 2, (count, SIDE, 1)), SIDE, axis=2)
    return colour[np.arange(count)[:, None, None], which]


def _png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def _rng(name: str) -> np.random.Generator:
    return generator(row_key(0, "whole_scale", name, 0, 0, "images"))


class _Made:
    """What a process that writes shards holds."""

    def __init__(self, folder: str, attempt: int) -> None:
        self.run, self.attempt = open_run(folder), attempt
        self.pixels = list(_pixels(_rng("samples"), POOL))
        self.images = [_png(one) for one in self.pixels]


_made: _Made


def _open(folder: str, attempt: int) -> None:
    global _made
    _made = _Made(folder, attempt)


def _expand(shard: int) -> Receipt:
    run = _made.run
    table = _decided_rows(run, shard)
    out = REJECTED + FAILED if shard % EVERY == 0 else 0
    kept, refused = table.slice(out), table.slice(0, out)
    said = {"status": ["rejected"] * REJECTED + ["failed"] * FAILED, "detail": [""] * out,
            "reason": [Reason.BELOW_THRESHOLD.value] * REJECTED + [Reason.NAN_LATENT.value] * FAILED}
    for name in said if out else ():
        refused = refused.append_column(name, pa.array(said[name]))
    pairs = zip(kept["sample_id"].to_pylist(), kept["sample_sha256"].to_pylist(), strict=True)
    receipt = Receipt(
        shard, 0, "", "", table.num_rows, kept.num_rows, REJECTED if out else 0, FAILED if out else 0,
        {Reason.BELOW_THRESHOLD.value: REJECTED, Reason.NAN_LATENT.value: FAILED} if out else {},
        [run.config.sampler.batch], "", _made.attempt, content_sha256(pairs), stack={"torch": "none"},
        seconds={"total": 1.0, "sample": 0.9}, host="here")
    return run.store.commit_tables(receipt, _in_groups(kept, DATA_SCHEMA),
                                   _in_groups(refused, REFUSED_SCHEMA) if out else None, run.plan.index.classes)


def _decided_rows(run: Run, shard: int) -> pa.Table:
    """The draws of a shard with images, scores and hashes."""
    table = shard_rows(run, shard)
    which = (table["label"].to_numpy() * 7 + table["copy"].to_numpy()) % POOL
    images = pa.array([{"bytes": _made.images[i], "path": f"{at:06d}.png"} for at, i in enumerate(which.tolist())],
                      DATA_SCHEMA.field("image").type)
    values = generator(row_key(0, "whole_scale", str(shard), 0, 0, "scores")).random(table.num_rows)
    score = pa.StructArray.from_arrays([pa.array(["quality"] * table.num_rows), pa.array(values)], ["name", "value"])
    scores = pa.ListArray.from_arrays(pa.array(np.arange(table.num_rows + 1, dtype=np.int32)), score)
    return table.append_column("image", images).append_column("scores", scores).append_column(
        "sample_sha256", pa.array(_hashes(run, shard, table, which)))


def shard_rows(run: Run, shard: int) -> pa.Table:
    """The columns of the draws of a shard, those of the first seed with what differs filled in."""
    plan, seeds = run.plan, run.plan.seeds_of(shard)
    first = plan.draws_of(int(seeds[0]))[0]
    copies = plan.copies[seeds].astype(np.int64)
    own = np.repeat(np.arange(len(seeds)), copies)
    copy = np.arange(len(own)) - np.repeat(np.cumsum(copies) - copies, copies)
    seed_id = plan.index.table["seed_id"].take(pa.array(seeds[own])).combine_chunks()
    label = plan.index.labels[seeds[own]]
    sample_id = pa.array([f"{one}/{number}" for one, number in zip(seed_id.to_pylist(), copy.tolist(), strict=True)])
    differs = {"sample_id": sample_id, "seed_id": seed_id, "copy": copy, "source_label": label, "target_label": label,
               "row": np.arange(len(own)) + first.row, "group": copy, "label": label, "method": None, "note": None}
    columns = {}
    for name in set(DATA_SCHEMA.names) - {"image", "scores", "sample_sha256"}:
        same = {"method": run.config.method.name, "note": ""}.get(name, getattr(first, name, None))
        values = differs.get(name)
        kind = DATA_SCHEMA.field(name).type
        columns[name] = pa.array([same] * len(own), kind) if values is None else pa.array(values).cast(kind)
    return pa.table(columns)


def _hashes(run: Run, shard: int, table: pa.Table, which: np.ndarray) -> list[str]:
    """sample_sha256 of every row, by one text with places for what differs."""
    first = run.plan.draws_of(int(run.plan.seeds_of(shard)[0]))[0]
    drawn = {**asdict(first), "copy": 0, "group": 0, "row": 1, "sample_id": "S", "seed_id": "I", "source_label": 2,
             "target_label": 2}
    text = json.dumps([[SIDE, SIDE, 3], drawn], sort_keys=True)
    for name, value in (("copy", 0), ("group", 0), ("row", 1), ("source_label", 2), ("target_label", 2)):
        text = text.replace(f'"{name}": {value}', f'"{name}": %({name})d')
    text = text.replace('"sample_id": "S"', '"sample_id": "%(seed_id)s/%(copy)d"').replace(
        '"seed_id": "I"', '"seed_id": "%(seed_id)s"')
    columns = [table[name].to_pylist() for name in ("seed_id", "copy", "row", "label")]
    raw = [one.tobytes() for one in _made.pixels]
    found = [hashlib.sha256((text % {"seed_id": seed, "copy": copy, "group": copy, "row": row, "source_label": label,
                                     "target_label": label}).encode() + raw[i]).hexdigest()
             for seed, copy, row, label, i in zip(*columns, which.tolist(), strict=True)]
    assert found[0] == sample_sha256(_made.pixels[which[0]], first)
    return found


def _in_groups(table: pa.Table, schema: pa.Schema) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, ROW_GROUP):
        yield table.slice(start, ROW_GROUP).select(schema.names).cast(schema)
