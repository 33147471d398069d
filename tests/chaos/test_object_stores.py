"""Runs in object stores, killed between two requests; roll-ups of receipts, killed between two system calls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import yaml

from rayexpand.contract.errors import EXIT_RESUMABLE
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.runs.status import read_status
from rayexpand.runs.verify import verify
from rayexpand.storage import buckets
from rayexpand.storage.places import open_files
from tests.chaos.test_kill import BAD, SHARD, exit_code, in_child, run_command
from tests.conftest import MakeConfig, complete, hashes, refused
from tests.s3server import Server
from tests.storage.test_objects import put_seeds, thirteen_thousand

POINTS = [*(f"{when}_{step}" for step in ("plan", "run", "attempt") for when in ("before", "after")),
          *(f"{point}@shard={SHARD}" for point in ("before_call", "after_call", "before_side", "after_side_link",
                                                  "before_data", "after_data_link", "after_data", "before_receipt",
                                                  "after_receipt")),
          "before_rollup", "after_rollup_link", "after_rollup"]


def failing(make_config: MakeConfig, out: str | None = None) -> RunConfig:
    return make_config("Failing", ratio=2, nan=BAD, sections={"out": out} if out else None)


@pytest.fixture
def reference(make_config: MakeConfig) -> tuple[dict[str, str], dict[str, str]]:
    run, _ = complete(failing(make_config))
    return hashes(run), refused(run)


def place(scheme: str = "s3") -> str:
    return f"{scheme}://runs/{uuid.uuid4().hex[:8]}"


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_run_again(make_config: MakeConfig, reference: tuple, object_stores: Server,
                                       point: str) -> None:
    config = failing(make_config, place())

    assert exit_code(in_child(run_command, config, failpoint=f"{point}:kill")) == -signal.SIGKILL, "never reached"
    assert exit_code(in_child(run_command, config)) == 0
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference
    assert run.totals().pending == 0
    assert verify(run, pixels=True).problems == []


@pytest.mark.parametrize("point", ["before_data", "after_data", "after_receipt"])
def test_killed_on_gcs_and_run_again(make_config: MakeConfig, reference: tuple, object_stores: Server,
                                     point: str) -> None:
    config = failing(make_config, place("gs"))

    assert exit_code(in_child(run_command, config, failpoint=f"{point}@shard={SHARD}:kill")) == -signal.SIGKILL
    assert exit_code(in_child(run_command, config)) == 0
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference


@pytest.mark.parametrize("point", ["before_rollup", "after_rollup_write", "after_rollup_link", "after_rollup"])
def test_killed_while_receipts_are_folded(make_config: MakeConfig, point: str) -> None:
    config = failing(make_config)
    reference = {name: getattr(read_status(complete(make_config("Failing", ratio=2, nan=BAD, name="other"))[0].folder),
                               name) for name in ("kept", "rejected", "failed", "pending", "shards_done", "reasons")}

    assert exit_code(in_child(run_command, config, failpoint=f"{point}:kill")) == -signal.SIGKILL
    seen = read_status(config.folder)
    assert {name: getattr(seen, name) for name in reference} == reference
    assert exit_code(in_child(run_command, config)) == 0
    assert len(runs.open_run(config.folder).files.list("receipts")) == 1


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_two_drivers_on_one_output(make_config: MakeConfig, reference: tuple, object_stores: Server,
                                   scheme: str) -> None:
    config = failing(make_config, place(scheme))
    children = [in_child(run_command, config) for _ in range(2)]

    assert [exit_code(child) for child in children] == [0, 0]
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference
    assert run.totals().pending == 0
    assert len(run.files.list("attempts")) == 2


@pytest.mark.parametrize("point", ["after_side", "before_data"])
def test_an_old_attempt_that_wakes_up_replaces_nothing(make_config: MakeConfig, reference: tuple,
                                                       object_stores: Server, point: str) -> None:
    config = failing(make_config, place())
    sleeper = in_child(run_command, config, failpoint=f"{point}@shard={SHARD}:stop")
    assert os.waitpid(sleeper.pid, os.WUNTRACED)[0] == sleeper.pid  # type: ignore[arg-type]
    assert exit_code(in_child(run_command, config)) == 0
    files = open_files(config.folder)
    data = {name: files.read(f"data/{name}") for name in files.list("data")}
    os.kill(sleeper.pid, signal.SIGCONT)  # type: ignore[arg-type]

    assert exit_code(sleeper) == 0
    assert {name: files.read(f"data/{name}") for name in files.list("data")} == data
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference


def test_a_store_that_goes_away_stops_the_run_resumably(make_config: MakeConfig, reference: tuple,
                                                        object_stores: Server,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "TRIES", 2)
    config = failing(make_config, place())
    object_stores.reset(("PUT", "/data/", -1, 503), code="InternalError")
    assert exit_code(in_child(run_command, config)) == EXIT_RESUMABLE
    object_stores.reset()
    assert exit_code(in_child(run_command, config)) == 0
    assert hashes(runs.open_run(config.folder)) == reference[0]


@pytest.mark.parametrize("method", ["Hang", "Segfault"])
def test_a_row_that_ends_its_process_is_refused_alone(make_config: MakeConfig, object_stores: Server,
                                                      method: str) -> None:
    sections = {"limits": {"max_failed": 1.0, "deadline_s": 1.0, "first_deadline_s": 1.0}, "out": place()}
    config = make_config(method, ratio=2, bad=BAD, sections=sections)
    codes = []
    while not codes or (codes[-1] != 0 and len(codes) < 6):
        codes.append(exit_code(in_child(run_command, config)))

    assert len(codes) == 5
    run = runs.open_run(config.folder)
    assert refused(run) == {BAD: "timeout" if method == "Hang" else "actor_died"}
    assert run.files.list("blame") == []


@pytest.mark.parametrize("source", ["imagefolder", "parquet"])
def test_seeds_and_output_in_s3_killed_in_the_middle(make_config: MakeConfig, image_folder: Path,
                                                     object_stores: Server, source: str) -> None:
    data = put_seeds(image_folder, source)
    fields = {"ratio": 2, "data": data, "batch": 2, "shard_images": 2}
    reference = hashes(complete(make_config("classical", **fields))[0])
    config = make_config("classical", sections={"out": place()}, **fields)
    child = in_child(run_command, config)
    files = open_files(config.folder)
    while len(files.list("data")) < 3:
        assert child.is_alive()
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
    child.join()
    made = len(files.list("data"))
    assert made < 20
    assert exit_code(in_child(run_command, config)) == 0

    assert hashes(runs.open_run(config.folder)) == reference


def test_every_verb_takes_a_url(image_folder: Path, tmp_path: Path, object_stores: Server) -> None:
    out = place()
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({
        "name": "r", "out": out, "method": {"name": "classical", "ratio": 2},
        "data": {"source": "imagefolder", "path": str(image_folder)}, "sampler": {"batch": 4, "shard_images": 4}}))

    def call(*arguments: str, fails: int = 0) -> dict:
        done = subprocess.run([sys.executable, "-m", "rayexpand", *arguments, "--json"], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)
        assert done.returncode == fails, done.stderr
        assert "not-a-secret" not in done.stdout + done.stderr
        return json.loads(done.stdout)

    job = str(tmp_path / "job.yaml")
    assert call("plan", job)["images"] == 40
    made = call("expand", job, "--no-ray")
    assert (made["kept"], made["pending"], made["run"]) == (40, 0, f"{out}/r")
    assert call("expand", job, "--no-ray")["kept"] == 40
    assert call("status", f"{out}/r")["complete"]
    assert call("verify", f"{out}/r", "--pixels")["problems"] == []
    assert call("retry", f"{out}/r", "--no-ray")["kept"] == 40
    assert call("regen", f"{out}/r", "ant/0.png/0")["equal"]
    assert call("report", f"{out}/r") == {"report": f"{out}/r/report.html"}
    assert call("card", f"{out}/r") == {"card": f"{out}/r/README.md"}
    assert call("status", f"{out}/other", fails=2)["error"]["type"] == "UsageError"
    assert call("status", "s3://no-such-bucket/r", fails=2)["error"]["type"] == "StorageError"
    assert call("expand", job, "--no-ray", "--set", "method.ratio=3", fails=4)["error"]["type"] == "DigestMismatch"
    assert os.listdir(tmp_path) == ["job.yaml"], "nothing of a remote run lies here"


def test_status_of_thirteen_thousand_shards(object_stores: Server) -> None:
    thirteen_thousand(object_stores, 13_000)


pytestmark = pytest.mark.chaos
