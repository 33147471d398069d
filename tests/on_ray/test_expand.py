"""The same engine on Ray: equal hashes for any number of actors, whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from rayexpand.runs import run as runs
from rayexpand.runs.verify import verify
from tests.chaos.test_kill import BAD, SHARD
from tests.commands import rayexpand
from tests.conftest import MakeConfig, attempts, complete, hashes, refused
from tests.contract.test_log_lines import checked
from tests.on_ray.conftest import ROOT, Head, processes_of, start_head, stop_head
from tests.s3server import Server

pytestmark = pytest.mark.cluster

Oracle = tuple[dict[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def oracle(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Hashes and refusals of the undisturbed run, made once in this process."""
    from rayexpand.runs.config import parse

    out = tmp_path_factory.mktemp("oracle")
    run, _ = complete(parse({**_raw(image_folder, out), "name": "oracle"}))
    return hashes(run), refused(run)


def _raw(images: Path, out: Path, **method: Any) -> dict[str, Any]:
    method = {"name": "tests.methods.fakes.Failing", "ratio": 2, "nan": BAD, **method}
    return {"name": "run", "out": str(out), "seed": 3, "data": {"source": "imagefolder", "path": str(images)},
            "method": {name: value for name, value in method.items() if value is not None},
            "sampler": {"batch": 8, "shard_images": 8}, "limits": {"max_failed": 1.0}}


@pytest.fixture
def job(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        file = tmp_path / "job.yaml"
        raw = _raw(image_folder, tmp_path / "out", **changes.pop("method", {}))
        file.write_text(yaml.safe_dump({**raw, **changes}))
        return file

    return make


def start(head: Head, file: Path, *sets: str, more: Sequence[str] = (), **environment: str) -> subprocess.Popen[str]:
    arguments = [*more, *(part for one in (f"cluster.address={head.address}", *sets) for part in ("--set", one))]
    return subprocess.Popen([sys.executable, "-m", "rayexpand", "expand", str(file), "--json", *arguments], cwd=ROOT,
                            env={**head.env, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(child: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    stdout, stderr = child.communicate()
    return child.returncode, json.loads(stdout) if stdout.strip() else {}, stderr


def check(folder: Path, oracle: Oracle) -> None:
    run = runs.open_run(str(folder))
    assert (hashes(run), refused(run)) == oracle
    assert run.totals().pending == 0
    assert verify(run, pixels=True).problems == []


Expand = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def expand(head: Head, monkeypatch: pytest.MonkeyPatch) -> Expand:
    """The command with its driver in this process: exit code, summary, stderr. Only actors are processes."""
    def run(file: Path, *sets: str, **environment: str) -> tuple[int, dict[str, Any], str]:
        with monkeypatch.context() as patch:
            for name, value in {**head.env, **environment}.items():
                patch.setenv(name, value)
            arguments = [part for one in (f"cluster.address={head.address}", *sets) for part in ("--set", one)]
            done = rayexpand("expand", file, "--json", *arguments, on_ray=True)
        return done.returncode, json.loads(done.stdout) if done.stdout.strip() else {}, done.stderr

    return run


@pytest.mark.parametrize("actors", [1, 2, 4])
def test_the_same_hashes_with_any_number_of_actors(expand: Expand, job: Callable[..., Path], tmp_path: Path,
                                                   oracle: Oracle, actors: int) -> None:
    code, summary, stderr = expand(job(), f"cluster.actors={actors}")

    assert code == 0, stderr
    assert (summary["kept"], summary["failed"]) == (39, 1)
    check(tmp_path / "out/run", oracle)


def test_rows_are_drawn_again_alike_on_a_cluster(expand: Expand, job: Callable[..., Path], image_folder: Path,
                                                judge_folder: Path, tmp_path: Path) -> None:
    """The judge is staged and loaded by each actor; one of them is killed on the way."""
    from rayexpand.runs.config import parse

    accept = {"guide": {"weights": str(judge_folder)}, "score": "confidence", "above": 0.2502, "attempts": 3,
              "exhausted": "best"}
    once, raw = tmp_path / "once", _raw(image_folder, tmp_path / "local")
    code, summary, stderr = expand(job(accept=accept), "cluster.actors=2", RAYEXPAND_FAILPOINT_ONCE=str(once),
                                   RAYEXPAND_FAILPOINT=f"after_call@shard={SHARD}:kill")
    local, _ = complete(parse({**raw, "accept": accept}))

    assert code == 0, stderr
    assert once.exists()
    assert (summary["kept"], summary["failed"]) == (39, 1)
    check(tmp_path / "out/run", (hashes(local), refused(local)))
    assert attempts(runs.open_run(str(tmp_path / "out/run"))) == attempts(local)
    assert {0, 1, 2} == set(attempts(local).values())


@pytest.mark.parametrize("point", ["before_call", "after_call", "before_data", "after_data", "after_receipt"])
def test_an_actor_killed(expand: Expand, job: Callable[..., Path], tmp_path: Path, oracle: Oracle, point: str) -> None:
    once = tmp_path / "once"
    code, _, stderr = expand(job(), "cluster.actors=2", RAYEXPAND_FAILPOINT=f"{point}@shard={SHARD}:kill",
                             RAYEXPAND_FAILPOINT_ONCE=str(once))

    assert once.exists(), "the failpoint was never reached"
    assert code == 0, stderr
    check(tmp_path / "out/run", oracle)


def test_every_line_of_log_json_is_json_where_an_actor_is_killed(head: Head, job: Callable[..., Path], tmp_path: Path,
                                                                 oracle: Oracle) -> None:
    once = tmp_path / "once"
    code, summary, stderr = finish(start(
        head, job(), "cluster.actors=2", more=["--log-json"], RAYEXPAND_FAILPOINT=f"before_call@shard={SHARD}:kill",
        RAYEXPAND_FAILPOINT_ONCE=str(once)))
    lines = [checked(line) for line in stderr.splitlines()]
    last = next(line for line in reversed(lines) if line["event"] == "progress")

    assert (code, once.exists()) == (0, True)
    assert {line["verb"] for line in lines} == {"expand"}
    commits = [line for line in lines if line["event"] == "commit"]
    assert len({line["shard"] for line in commits}) == len(list((tmp_path / "out/run/data").iterdir()))
    assert {(line["run"], line["attempt"]) for line in commits} == {("run", 1)}
    assert (last["done"], last["per_second"]) == (40, summary["images_per_second"])
    check(tmp_path / "out/run", oracle)


def test_every_line_of_an_actor_is_json_with_its_shard(head: Head, job: Callable[..., Path], tmp_path: Path) -> None:
    file = job(method={"name": "tests.methods.fakes.Failing"})
    code, _, stderr = finish(start(head, file, "cluster.actors=1", more=["--log-json"]))
    assert code == 0, stderr
    said = []
    for one in head.folder.glob("session_*/logs/worker-*.err"):
        text = one.read_text()
        if '"event": "failed"' in text:
            own = [line for line in text.splitlines() if line and not line.startswith(":")]  # Ray's begin with :
            said += [checked(line) for line in own]
    failed = [line for line in said if line["event"] == "failed"]
    assert failed
    assert {(line["verb"], line["run"], line["attempt"]) for line in failed} == {("expand", "run", 1)}
    assert {line["reason"] for line in failed} == {"nan_latent"}
    assert {line["pid"] for line in said}.isdisjoint({os.getpid()})
    refused = [one for path in (tmp_path / "out/run/rejected").iterdir()
               for one in pq.read_table(path).to_pylist() if one["status"] == "failed"]
    assert {line["sample"] for line in failed} == {one["sample_id"] for one in refused}


@pytest.mark.parametrize("seen", ["blame", "data", "receipts"], ids=["before publish", "after data", "after a receipt"])
def test_the_driver_killed(head: Head, job: Callable[..., Path], tmp_path: Path, oracle: Oracle, seen: str) -> None:
    file = job(method={"name": "tests.methods.fakes.Failing"})
    child = start(head, file, "cluster.actors=2")
    wanted = tmp_path / "out/run" / seen
    _until(lambda: wanted.is_dir() and any(wanted.iterdir()))
    child.kill()
    child.communicate()
    code, _, stderr = finish(start(head, file, "cluster.actors=2"))

    assert code == 0, stderr
    check(tmp_path / "out/run", oracle)


@pytest.mark.parametrize("seen", ["attempts", "data"], ids=["no shard yet", "after a shard"])
def test_an_ordinary_stop_says_only_that(head: Head, job: Callable[..., Path], tmp_path: Path, seen: str) -> None:
    child = start(head, job(method={"name": "tests.methods.fakes.Sleeping", "nan": None, "seconds": 0.3}),
                  "cluster.actors=2")
    wanted = tmp_path / "out/run" / seen
    _until(lambda: wanted.is_dir() and any(wanted.iterdir()))
    time.sleep(1)
    child.terminate()
    code, _, stderr = finish(child)

    assert code == 75
    *told, last = stderr.splitlines()
    assert last == "rayexpand: SIGTERM received; the same command continues where this one was"
    assert [line for line in told if not line.startswith("expanding run: ")] == []


@pytest.mark.parametrize(("method", "reason"), [("Hang", "timeout"), ("Segfault", "actor_died")])
def test_a_row_that_ends_its_actor_is_refused_alone(expand: Expand, job: Callable[..., Path], tmp_path: Path,
                                                    make_config: MakeConfig, method: str, reason: str) -> None:
    limits = {"max_failed": 1.0, "deadline_s": 2.0, "first_deadline_s": 2.0}
    reference = hashes(complete(make_config(method, ratio=2, sections={"limits": limits}, name="healthy"))[0])
    file = job(method={"name": f"tests.methods.fakes.{method}", "bad": BAD, "nan": None}, limits=limits)
    code, summary, stderr = expand(file, "cluster.actors=2")

    assert code == 0, stderr
    assert (summary["kept"], summary["failed"]) == (39, 1)
    run = runs.open_run(str(tmp_path / "out/run"))
    assert refused(run) == {BAD: reason}
    assert hashes(run) == {k: v for k, v in reference.items() if k != BAD}


def test_a_broken_sampler_ends_resumably(expand: Expand, job: Callable[..., Path], tmp_path: Path) -> None:
    file = job(method={"name": "tests.methods.fakes.BrokenAfterFirst", "nan": None},
               sampler={"batch": 4, "shard_images": 20})
    code, summary, _ = expand(file, "cluster.actors=2")

    assert code == 75
    assert "fails even on a call of fillers" in summary["error"]["message"]
    assert runs.open_run(str(tmp_path / "out/run")).totals().failed == 0


def test_no_cluster_at_an_address_is_said(job: Callable[..., Path], head: Head) -> None:
    child = start(head, job(), "cluster.address=127.0.0.1:1")
    code, summary, stderr = finish(child)

    assert code == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in summary["error"]["message"]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("there", "here"), [("disabled", "token"), ("token", "disabled")])
def test_a_token_that_one_side_has_and_the_other_has_not(job: Callable[..., Path], head: Head, there: str,
                                                        here: str) -> None:
    cluster = head if there == "token" else start_head(cpus=2, auth=there)
    try:
        code, summary, stderr = finish(start(cluster, job(), RAY_AUTH_MODE=here))
    finally:
        if cluster is not head:
            stop_head(cluster)

    assert code == 2
    assert f"cluster.address: token mismatch with {cluster.address}" in summary["error"]["message"]
    assert ("RAY_AUTH_MODE=disabled" if here == "token" else "RAY_AUTH_MODE=token") in summary["error"]["message"]
    assert stderr.splitlines() == [f"rayexpand: {summary['error']['message']}"]


def test_a_cluster_of_our_own_leaves_nothing_behind(job: Callable[..., Path], tmp_path: Path, oracle: Oracle) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rxt-"))
    done = subprocess.run([sys.executable, "-m", "rayexpand", "expand", str(job()), "--json"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "TMPDIR": str(folder)})

    assert done.returncode == 0, done.stderr
    check(tmp_path / "out/run", oracle)
    assert processes_of(folder) == []
    assert list(folder.glob("rx-*")) == [], "Ray's own folder"
    shutil.rmtree(folder)


def _until(done: Callable[[], bool]) -> None:
    while not done():
        time.sleep(0.02)


def test_a_run_in_an_object_store(job: Callable[..., Path], object_stores: Server, oracle: Oracle) -> None:
    """Actors killed once on the way; every file is published by a conditional request."""
    done = subprocess.run([sys.executable, "-m", "rayexpand", "expand", str(job()), "--json", "--set",
                           "out=s3://runs/on-ray"], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "RAYEXPAND_FAILPOINT": f"after_data@shard={SHARD}:kill",
                               "RAYEXPAND_FAILPOINT_ONCE": str(job().parent / "once")})

    assert done.returncode == 0, done.stderr
    assert (job().parent / "once").exists()
    run = runs.open_run("s3://runs/on-ray/run")
    assert (hashes(run), refused(run)) == oracle
    assert verify(run, pixels=True).problems == []
