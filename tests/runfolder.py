"""Builds a run folder without any model: run.json, plan files, and shards committed through the real store."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from rayexpand.contract.rng import generator, row_key
from rayexpand.contract.schema import (
    SEED_INDEX,
    ClassTable,
    Draw,
    Reason,
    Receipt,
    Sample,
    SeedIndex,
    Start,
    Status,
    sample_sha256,
)
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.runs.store import Store, data_name, new_attempt, receipt_name
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import create_once, parquet_bytes

RUN_DIGEST = "ab12" * 16
PLAN = "plan/0f1e2d3c"
CPU_STACK = {"torch": "2.15.0", "diffusers": "0.42.1", "device": "cpu", "cpu": "AVX512", "dtype": "float32",
             "threads": "1"}
SECONDS = {"load": 0.0, "read": 0.4, "prepare": 0.1, "sample": 8.0, "encode": 0.9, "commit": 0.1, "total": 9.5}
GPU_STACK = {**CPU_STACK, "device": "NVIDIA H200", "dtype": "bfloat16"}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Builder:
    """A run of `shards` shards, each of `seeds_per_shard` seeds with `copies` copies; classes take turns."""

    folder: Path
    names: tuple[str, ...] = NAMES
    shards: int = 6
    seeds_per_shard: int = 5
    copies: int = 6
    side: int = 16
    method: str = "img2img"
    prompt: str = "a photo of a {}"
    data: DataConfig | None = None  # real seeds, shards * seeds_per_shard of them; None: seeds that are not there

    @property
    def store(self) -> Store:
        return Store(LocalFiles(self.folder), RUN_DIGEST)

    @cached_property
    def index(self) -> SeedIndex:
        if self.data is not None:
            return build_index(self.data)
        n = self.shards * self.seeds_per_shard
        labels = [i % len(self.names) for i in range(n)]
        table = pa.table({"seed_id": [f"{self.names[c]}/{i:04d}.png" for i, c in enumerate(labels)], "label": labels,
                          "file": [0] * n, "member": [""] * n, "group": [0] * n, "offset": list(range(n)),
                          "fault": [""] * n}, schema=SEED_INDEX)
        counts = np.bincount(labels, minlength=len(self.names)).tolist()
        return SeedIndex(table, ClassTable.of(self.names, counts=counts))

    def start(self, **facts: Any) -> Builder:
        """Writes run.json and the plan, and registers the first attempt."""
        store, index = self.store, self.index
        store.files.probe()
        (self.folder / PLAN).mkdir(parents=True)
        store.files.publish(f"{PLAN}/seeds.parquet", parquet_bytes(index.table, index.table.schema.metadata or {}))
        store.files.publish(f"{PLAN}/classes.parquet", parquet_bytes(index.classes.to_arrow(), {}))
        planned = self.shards * self.seeds_per_shard * self.copies
        data = self.data or DataConfig(source="imagefolder", path="gone")
        config = {"name": self.folder.name, "out": "runs", "seed": 0, "data": data.model_dump(mode="json"),
                  "method": {"name": self.method, "strength": 0.6, "steps": 25}, "image": {"size": self.side}}
        create_once(store.files, "run.json", {
            "version": "0.1.0", "created": 1_760_000_000.0, "name": self.folder.name, "config": config,
            "run_digest": RUN_DIGEST, "plan_digest": "0f1e2d3c" * 8, "plan": PLAN, "planned": planned,
            "shards": self.shards, "seeds": len(index), "classes": len(index.classes),
            "models": {"prior": "c0ffee" * 10 + "beef"}, **facts}, "run")
        self.attempt(1_760_000_000.0)
        return self

    def attempt(self, started: float, **facts: Any) -> int:
        return new_attempt(self.store.files, {"host": "node-1", "pid": 4242, "version": "0.1.0", **facts},
                           clock=lambda: started)

    def samples(self, shard: int, refuse: dict[int, tuple[Reason, str]] | None = None) -> list[Sample]:
        """The rows of a shard in order; `refuse` maps a row of the shard to its reason and detail."""
        index = self.index
        made = []
        for seed in range(shard * self.seeds_per_shard, (shard + 1) * self.seeds_per_shard):
            seed_id, label = index.seed_ids[seed], int(index.labels[seed])
            for copy in range(self.copies):
                made.append(self._sample(seed_id, label, copy, seed * self.copies + copy))
        for i, (reason, detail) in (refuse or {}).items():
            image = made[i].image if reason.status is Status.REJECTED else None
            made[i] = replace(made[i], status=reason.status, reason=reason, detail=detail, image=image,
                              path=made[i].path if image else "", sample_sha256="")
        return made

    def commit(self, shard: int, samples: Sequence[Sample] | None = None, *, generation: int = 0, attempt: int = 1,
               stack: dict[str, str] | None = None, seconds: dict[str, float] | None = None,
               host: str = "node-1") -> Receipt:
        """Commits `samples` (default: all rows of the shard, kept)."""
        samples = self.samples(shard) if samples is None else samples
        reasons: dict[str, int] = {}
        for sample in samples:
            if sample.reason:
                reasons[sample.reason.value] = reasons.get(sample.reason.value, 0) + 1
        count = {status: sum(s.status is status for s in samples) for status in Status}
        receipt = Receipt(shard, generation, data_name(shard, generation), "", len(samples), count[Status.KEPT],
                          count[Status.REJECTED], count[Status.FAILED], reasons, [64], RUN_DIGEST, attempt, "",
                          CPU_STACK if stack is None else stack, seconds or SECONDS, host)
        return self.store.commit(receipt, samples, self.index.classes)

    def forget_receipt(self, receipt: Receipt) -> None:
        (self.folder / receipt_name(receipt)).unlink()

    def _sample(self, seed_id: str, label: int, copy: int, row: int) -> Sample:
        prompt = self.prompt.format(self.index.classes.name[label])
        draw = Draw(f"{seed_id}/{copy}", seed_id, copy, label, label, prompt, "",
                    Start.IMAGE, 0.6, 15, 0, row, 0)
        pixels = picture(self.side, label, seed_id, copy)
        return Sample(draw, self.method, Status.KEPT, png(pixels), f"{row:09d}.png", scores={"guide": 0.9},
                      sample_sha256=sample_sha256(pixels, draw))


def picture(side: int, label: int, seed_id: str, copy: int = 0) -> np.ndarray:
    """uint8 (side, side, 3): the digit of a label, shifted and shaded by its keys."""
    rng = generator(row_key(0, "picture", seed_id, copy, 0, "picture"))
    image = Image.new("RGB", (side, side), tuple(rng.integers(0, 90, 3).tolist()))
    shift = rng.integers(-1, 2, 2)
    ImageDraw.Draw(image).text((side * 0.3 + shift[0], side * 0.05 + shift[1]), str(label % 10),
                               fill=tuple(rng.integers(150, 256, 3).tolist()), font_size=side * 0.8)
    return np.asarray(image)


def png(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def sample_run(folder: Path) -> Builder:
    """A half-finished run with every kind of trouble: refusals, a retry, a lost receipt, two attempts, two stacks."""
    run = Builder(folder, data=DataConfig(source="digits", per_class=3)).start()
    refuse = {3: (Reason.NAN_LATENT, "inf in slot 3 of call 0"), 7: (Reason.WRONG_CLASS, "guide says four, 0.91"),
              8: (Reason.BELOW_THRESHOLD, "clip_similarity 0.41 < 0.60")}
    run.commit(0, run.samples(0, refuse))
    run.forget_receipt(run.commit(1))
    run.attempt(1_760_003_600.0, host="node-2", pid=77)
    run.commit(2, run.samples(2, {0: (Reason.DECODE_ERROR, "image file is truncated <4 bytes>")}), attempt=2)
    run.commit(3, attempt=2, stack=GPU_STACK, host="node-2")
    run.commit(0, [run.samples(0)[3]], generation=1, attempt=2)
    return run
