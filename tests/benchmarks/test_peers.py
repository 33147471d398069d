"""The judge of the peer bench notices what it is for; the harness kills everything and counts what a UNet is given."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.benchmarks.peers import table
from tests.benchmarks.peers.harness import COUNTER, Attempt, Kill, draw_kills
from tests.benchmarks.peers.judge import Output, Verdict, judge, read_images, read_listed, read_parquet
from tests.commands import ROOT

SLOTS = [f"{label}/{label}-{seed}/{copy}" for label in ("one", "two") for seed in range(2) for copy in range(3)]
PLANNED = Counter(SLOTS)


def png(number: int) -> bytes:
    pixels = np.random.Generator(np.random.Philox(key=number)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


class Images:
    """A folder of one file for each sample."""

    read = staticmethod(table._files)

    def __init__(self, out: Path) -> None:
        self.out = out
        for number, slot in enumerate(SLOTS):
            self.path(slot).parent.mkdir(parents=True, exist_ok=True)
            self.path(slot).write_bytes(png(number))

    def path(self, slot: str) -> Path:
        seed, _, copy = slot.rpartition("/")
        return self.out / f"{seed}_{copy}.png"

    def lose(self) -> None:
        self.path(SLOTS[0]).unlink()

    def double(self) -> None:
        self.path(SLOTS[0]).with_suffix(".jpg").write_bytes(png(0))

    def tear(self) -> None:
        self.path(SLOTS[0]).write_bytes(png(0)[:-40])

    def leave(self) -> None:
        (self.out / "temp.png").write_bytes(png(0))

    def change(self) -> None:
        self.path(SLOTS[0]).write_bytes(png(99))


class Listed(Images):
    """Files that a list names, in one folder."""

    def __init__(self, out: Path) -> None:
        (out / "images").mkdir()
        super().__init__(out)
        self.write()

    def path(self, slot: str) -> Path:
        return self.out / "images" / slot.replace("/", "__")

    def read(self, out: Path) -> Output:  # type: ignore[override]
        return read_listed(out, "list.jsonl", "images", lambda name: name.replace("__", "/"))

    def write(self, slots: list[str] = SLOTS) -> None:
        (self.out / "list.jsonl").write_text("".join(json.dumps({"images": [str(self.path(slot))]}) + "\n"
                                                     for slot in slots))

    def lose(self) -> None:
        super().lose()
        self.write(SLOTS[1:])

    def double(self) -> None:
        self.write([*SLOTS, SLOTS[0]])


class Tables:
    """Parquet files, one for each seed."""

    read = staticmethod(partial(read_parquet, pattern="data/*.parquet", slot_of=lambda row: row["slot"],
                                image="image.bytes", keeps=("run.json",)))

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "data").mkdir()
        (out / "run.json").write_text("{}")
        for start in range(0, len(SLOTS), 3):
            self.write(start // 3, [(slot, png(start + i)) for i, slot in enumerate(SLOTS[start:start + 3])])

    def write(self, number: int, rows: list[tuple[str, bytes]]) -> None:
        pq.write_table(pa.table({"slot": [slot for slot, _ in rows], "image": [{"bytes": image} for _, image in rows]}),
                       self.out / f"data/{number}.parquet")

    def lose(self) -> None:
        self.write(0, [(slot, png(i)) for i, slot in enumerate(SLOTS[:3]) if i])

    def double(self) -> None:
        self.write(9, [(SLOTS[0], png(0))])

    def tear(self) -> None:
        self.write(0, [(slot, png(i)[:-40 if i == 0 else None]) for i, slot in enumerate(SLOTS[:3])])

    def leave(self) -> None:
        (self.out / "data/1.pending").write_bytes(b"")

    def change(self) -> None:
        self.write(0, [(slot, png(99 if i == 0 else i)) for i, slot in enumerate(SLOTS[:3])])


WHOLE = {"planned": 12, "samples": 12, "lost": 0, "duplicate": 0, "torn": 0, "orphan": 0, "changed": 0}


@pytest.mark.parametrize("kind", [Images, Listed, Tables])
@pytest.mark.parametrize(("plant", "noticed"), [
    (None, {}), ("lose", {"lost": 1, "samples": 11}), ("double", {"duplicate": 1, "samples": 13}),
    ("tear", {"torn": 1, "samples": 11}), ("leave", {"orphan": 1}), ("change", {"changed": 1})])
def test_the_judge_notices_one_of_each(tmp_path: Path, kind: Callable[[Path], Images], plant: str | None,
                                       noticed: dict[str, int]) -> None:
    made = kind(tmp_path)
    undisturbed = made.read(tmp_path)
    if plant:
        getattr(made, plant)()
    assert judge(PLANNED, made.read(tmp_path), undisturbed) == Verdict(**{**WHOLE, **noticed})


def test_a_file_of_samples_that_cannot_be_read_is_torn_and_loses_its_rows(tmp_path: Path) -> None:
    made = Tables(tmp_path)
    (tmp_path / "data/0.parquet").write_bytes((tmp_path / "data/0.parquet").read_bytes()[:-20])
    found = judge(PLANNED, made.read(tmp_path))
    assert (found.torn, found.lost, found.samples) == (1, 3, 9)


def test_samples_that_only_their_class_tells_apart_are_counted() -> None:
    planned = Counter({"one": 2, "two": 2})
    calm = Output([("one", "a"), ("one", "b"), ("two", "c"), ("two", "c")])
    assert judge(planned, Output([("one", "b"), ("one", "a"), ("one", "x"), ("two", "c")]), calm) == Verdict(
        4, 4, lost=1, duplicate=1, torn=0, orphan=0, changed=1)


def test_the_own_names_of_peers_are_read(tmp_path: Path) -> None:
    assert table._copy_of("one/one-0_12.png") == "one/one-0/12"
    assert table._own_slot({"sample_id": "one/one-0.png/3"}) == "one/one-0/3"
    assert table._generated("one/one_gen_12.png") == "one"
    assert table._generated("one/one-0.png") is table._generated("temp.png") is None
    found = read_images(tmp_path, lambda name: None)
    assert found == Output()


def test_kills_are_drawn_and_leave_work() -> None:
    calm = Attempt(0, wall_s=50.0, files=100)
    kills = draw_kills(1, 20, calm)
    assert kills == draw_kills(1, 20, calm) != draw_kills(2, 20, calm)
    assert 0 < sum(kill.seconds or 0 for kill in kills) < 45
    assert sum(kill.file is not None for kill in kills) == 10
    assert Kill(file=1) in draw_kills(1, 20, Attempt(0, wall_s=50.0, files=1))


KILLED = """
import os, subprocess, sys, time
from pathlib import Path
from tests.benchmarks.peers.harness import Bench, Kill, Peer
from tests.benchmarks.peers.judge import Output
from tests.benchmarks.peers.task import Task
from tests.benchmarks.peers.counter.sitecustomize import note

def run(task, out):
    subprocess.Popen(["sleep", "600"], start_new_session=True)
    note(2)
    starts = len(list(out.iterdir()))
    (out / f"start-{starts}").touch()
    if starts < 2:
        time.sleep(600)

peer = Peer("sleeper", "", run, None, lambda out: Output([(path.name, "") for path in out.iterdir()]))
found, attempts, rows = Bench(Task("", ""), Path(sys.argv[1])).killed(peer, [Kill(file=1), Kill(seconds=0.3)])
print(len(found.samples), [attempt.code for attempt in attempts], rows)
"""


def test_a_kill_ends_all_processes_and_the_start_is_the_same_again(tmp_path: Path) -> None:
    began = time.time()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.stdout.split("\n")[0] == "3 [None, None, 0] 6", done.stderr
    left = [one for one in psutil.process_iter(["cmdline", "create_time"])
            if one.info["cmdline"] == ["sleep", "600"] and one.info["create_time"] > began]
    assert left == []


def test_a_unet_counts_its_rows_where_the_counter_is_in_the_path(tmp_path: Path) -> None:
    (tmp_path / "diffusers/models/unets").mkdir(parents=True)
    for folder in ("diffusers", "diffusers/models", "diffusers/models/unets"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "diffusers/models/unets/unet_2d_condition.py").write_text(
        "class UNet2DConditionModel:\n    def forward(self, sample, t):\n        return sample + [t]\n")
    script = ("from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as U\n"
              "assert U().forward([1, 2], t=3) == [1, 2, 3]; U().forward([1], 4)")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env={
        **os.environ, "PYTHONPATH": f"{COUNTER}{os.pathsep}{tmp_path}", "PEERS_CALLS": str(tmp_path / "calls")})
    assert (tmp_path / "calls").read_text().split() == ["2", "1"]
