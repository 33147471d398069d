"""Jobs: what is sent, how their end is read, and a real cluster that runs, stops and continues one."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rayexpand.contract.errors import Interrupted, UsageError
from rayexpand.methods import trust
from rayexpand.on_ray import job, package, submit
from rayexpand.on_ray.job import JobOrder, entrypoint
from rayexpand.on_ray.submit import Ended, follow, keep_trying, outcome
from rayexpand.runs import run as runs
from rayexpand.runs.config import load
from tests.commands import rayexpand
from tests.conftest import complete, hashes
from tests.on_ray.conftest import ROOT, Head

REMOTE = "http://cluster.example:8265"
CLASSICAL = "jobs/digits/expand-classical.yaml"


def details(status: str, code: int | None = None, message: str = "", error_type: str | None = None) -> Any:
    return SimpleNamespace(status=status, driver_exit_code=code, message=message, error_type=error_type)


@pytest.mark.parametrize(("found", "exit_code"), [
    (details("SUCCEEDED", 0), 0),
    (details("FAILED", 1), 1),
    (details("FAILED", 2), 2),
    (details("FAILED", 3), 3),
    (details("FAILED", 4), 4),
    (details("FAILED", 70), 70),
    (details("FAILED", 75), 75),
    (details("FAILED", -9), 75),  # killed, as by the out-of-memory killer or a lost node
    (details("FAILED", 137), 75),
    (details("FAILED", 127, "python: not found"), 1),
    (details("STOPPED"), 75),
    (details("FAILED", None, "died", "JOB_SUPERVISOR_ACTOR_DIED"), 75),
    (details("FAILED", None, "", "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"), 75),
    (details("FAILED", None, "no module", "RUNTIME_ENV_SETUP_FAILURE"), 1),
    (details("FAILED", None, "cannot start", "JOB_ENTRYPOINT_COMMAND_START_ERROR"), 1),
    (details("FAILED", None, "Unexpected error"), 75)])
def test_the_end_of_a_job_is_one_of_our_exit_codes(found: Any, exit_code: int) -> None:
    assert outcome("run-1", found).exit_code == exit_code


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    monkeypatch.setattr(submit.time, "sleep", made.append)
    return made


def trying(*ends: Ended | OSError, retries: int = 3) -> tuple[Ended, list[str]]:
    script, said, numbers = list(ends), [], itertools.count(1)

    def attempt(before: Ended | None) -> Ended:
        end = script.pop(0)
        if isinstance(end, OSError):
            raise end
        return replace(end, submission_id=f"run-{next(numbers)}")

    return keep_trying(attempt, retries=retries, backoff_s=10.0, say=said.append), said


LOST = Ended("", "FAILED", 75, "node lost")


def test_what_can_be_resumed_is_submitted_again(pauses: list[float]) -> None:
    end, said = trying(LOST, LOST, Ended("", "SUCCEEDED", 0))

    assert (end.submission_id, end.exit_code, end.attempts) == ("run-3", 0, 3)
    assert pauses == [10.0, 20.0]
    assert said == ["run-1: node lost; again in 10 s (1 of 3)", "run-2: node lost; again in 20 s (2 of 3)"]


@pytest.mark.parametrize(("ends", "exit_code", "attempts"), [
    ([Ended("", "FAILED", 2)], 2, 1),
    ([Ended("", "FAILED", 3)], 3, 1),
    ([Ended("", "STOPPED", 75)], 75, 1),  # somebody wanted that
    ([LOST, Ended("", "FAILED", 4)], 4, 2),
    ([LOST] * 4, 75, 4),
    ([ConnectionError("refused"), Ended("", "SUCCEEDED", 0)], 0, 2)])
def test_nothing_else_is(pauses: list[float], ends: list[Any], exit_code: int, attempts: int) -> None:
    end, _ = trying(*ends)

    assert (end.exit_code, end.attempts) == (exit_code, attempts)


class FakeClient:
    """A job whose log comes in pieces; each connection to it ends as scripted."""

    def __init__(self, log: str, cuts: list[int | Exception], ends: list[Any]) -> None:
        self.log, self.cuts, self.ends = log, cuts, ends

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        cut = self.cuts.pop(0)
        if isinstance(cut, Exception):
            raise cut
        for start in range(0, cut, 4):
            yield self.log[start:min(start + 4, cut)]
            await asyncio.sleep(0)

    def get_job_info(self, submission_id: str) -> Any:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def get_job_logs(self, submission_id: str) -> str:
        return self.log


def test_a_log_that_breaks_off_comes_through_once(pauses: list[float]) -> None:
    client = FakeClient("one line\nanother line\nlast\n", [5, ConnectionError("gone"), 14, 20],
                        [details("RUNNING"), ConnectionError("gone"), details("RUNNING"), details("SUCCEEDED", 0)])
    heard: list[str] = []

    assert follow(client, "run-1", heard.append).exit_code == 0
    assert "".join(heard) == client.log


def test_a_cluster_out_of_reach_makes_the_job_lost(pauses: list[float]) -> None:
    gone = FakeClient("", [ConnectionError("refused")], [ConnectionError("refused")])
    other = FakeClient("", [0], [RuntimeError("Request failed with status code 404: Job run-1 does not exist.")])

    assert follow(gone, "run-1", print, patience_s=-1.0).status == "LOST"
    end = follow(other, "run-1", print)
    assert (end.status, end.exit_code) == ("LOST", 75)


def test_a_job_that_outlives_the_connection_is_followed_again(pauses: list[float], monkeypatch: pytest.MonkeyPatch,
                                                              tmp_path: Path) -> None:
    """The first connection is lost for good, the second finds the same job at work: it is not sent twice."""
    client = Jobs()
    ends = iter([Ended("", "LOST", 75), Ended("", "SUCCEEDED", 0)])
    followed: list[str] = []

    def fake_follow(client: Jobs, submission_id: str, on_log: Any) -> Ended:
        followed.append(submission_id)
        client.known = [SimpleNamespace(submission_id=submission_id, status="RUNNING", metadata={})]
        return replace(next(ends), submission_id=submission_id)

    monkeypatch.setattr(submit, "_client", lambda url: client)
    monkeypatch.setattr(submit, "follow", fake_follow)
    end = submit.submit(JobOrder("plan", CLASSICAL), working_dir=str(ROOT / "jobs"))

    assert (followed, len(client.sent), end.exit_code) == (["digits-classical-1"] * 2, 1, 0)


def test_a_reader_who_leaves_is_told_how_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "_tail", leave)
    with pytest.raises(Interrupted, match="submit --logs run-1"):
        follow(object(), "run-1", print)


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, shell=True, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_entrypoint_ends_with_our_exit_code(tmp_path: Path) -> None:
    hostile = "name=it's; exit 9"
    wrong = shell(entrypoint(["validate", CLASSICAL, "--set", hostile], [], python=sys.executable, here=False))

    assert wrong.returncode == 2
    assert "it's; exit 9" in wrong.stderr
    good = entrypoint(["validate", CLASSICAL, "--set", f"out={tmp_path}"], ["SOME_SECRET"], python=sys.executable,
                      here=False)
    asked = shell(good)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "SOME_SECRET is not set on the cluster" in asked.stderr
    assert shell(good, SOME_SECRET="x y\"'").returncode == 0


def test_a_forwarded_port_falls_back_to_the_python_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "python"
    there.write_text("#!/bin/sh\necho there \"$@\"\n")
    there.chmod(there.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}:{os.environ['PATH']}"
    line = entrypoint(["plan", "x.yaml"], [], python=None, here=True)

    assert "p=python; exec" in entrypoint(["plan", "x.yaml"], [], python=None, here=False)
    assert "x.yaml: 1 problem" in shell(line, PATH=path).stderr  # this machine: our own interpreter
    for missing in (str(tmp_path / "absent"), "/bin/false"):
        monkeypatch.setattr(job.sys, "executable", missing)
        line = entrypoint(["plan", "x.yaml"], [], python=None, here=True)
        assert shell(line, PATH=path).stdout == "there -m rayexpand plan x.yaml\n"


def test_the_package_holds_code_and_no_secrets(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("mine.py", "jobs/a.yaml", ".env", ".aws/credentials", "id.pem", "runs/x/data.parquet", "data/1.png",
                 "pkg/data/table.py", "__pycache__/mine.pyc", "env/pyvenv.cfg", "env/lib/torch.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "weights.bin").write_bytes(bytes(package.LARGE_BYTES + 1))
    (tree / "link.txt").symlink_to("/etc/hostname")
    (tmp_path / "job.yaml").write_text("name: x")
    inside, left_out = package.write_package(tmp_path / "a.zip", tree, [str(tmp_path / "job.yaml")])
    package.write_package(tmp_path / "b.zip", tree, [str(tmp_path / "job.yaml")])
    names = zipfile.ZipFile(tmp_path / "a.zip").namelist()

    assert (inside, left_out) == ({str(tmp_path / "job.yaml"): "job/0/job.yaml"}, ["weights.bin"])
    assert {name for name in names if not name.startswith("rayexpand/")} == {
        "mine.py", "jobs/a.yaml", "pkg/data/table.py", "job/0/job.yaml"}
    assert {"rayexpand/__main__.py", "rayexpand/reports/card.md.j2", "rayexpand/on_ray/submit.py"} <= set(names)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert package.write_package(tmp_path / "c.zip", tree, [str(tree / "jobs" / "a.yaml")])[0] == {
        str(tree / "jobs/a.yaml"): "jobs/a.yaml"}


def test_git_decides_what_belongs_to_a_tree(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("secrets.yaml\n")
    for name in ("secrets.yaml", "new.py", "gone.py"):
        (tmp_path / name).write_text(name)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "gone.py"], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    package.write_package(tmp_path / "out.zip", tmp_path)

    names = zipfile.ZipFile(tmp_path / "out.zip").namelist()
    assert [name for name in names if "/" not in name] == ["new.py"]


def test_every_module_of_the_package_is_sent(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    package.write_package(tmp_path / "out.zip", tmp_path / "work")

    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        sent = {name for name in archive.namelist() if name.endswith(".py")}
    here = {str(file.relative_to(ROOT)) for file in (ROOT / "rayexpand").rglob("*.py")}
    assert sent == here
    assert {"rayexpand/runs/run.py", "rayexpand/data/pixels.py"} <= sent


def test_git_is_not_asked_about_the_package(tmp_path: Path) -> None:
    tree = tmp_path / "checkout"
    shutil.copytree(ROOT / "rayexpand", tree / "rayexpand", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / ".gitignore").write_text("data/\nruns/\n")  # what a user of the package ignores are rooms of it
    (tree / "mine.py").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    package.write_package(tmp_path / "out.zip", tree)

    names = zipfile.ZipFile(tmp_path / "out.zip").namelist()
    assert {"mine.py", "rayexpand/runs/run.py", "rayexpand/data/pixels.py"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("verb", "fields"), [
    ("expand", {"method": {"name": "classical"}}), ("validate", {"rule": {"kind": "random"}})])
def test_a_file_that_says_its_kind_is_submitted(verb: str, fields: dict[str, Any], tmp_path: Path) -> None:
    kind = "run" if verb == "expand" else "select"
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({"kind": kind, "name": "mine", "out": "/runs", "data": {"source": "digits"},
                                    **fields}))
    assert job.checked(JobOrder(verb, str(file))).name_and_folder() == ("mine", "/runs/mine")


def test_a_loop_names_what_a_job_would_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump({"name": "birds", "out": "/runs", "method": {"name": "classical"},
                                                "data": {"source": "imagefolder", "path": "data/birds"}}))
    Path("loop.yaml").write_text(yaml.safe_dump({"run": "run.yaml", "rounds": {"count": 2}}))
    order = job.checked(JobOrder("expand", "loop.yaml"))
    assert order.name_and_folder() == ("birds", "/runs/birds")
    assert [one.partition(":")[0] for one in job.unsent_problems(order, {"run.yaml"})] == ["run.data.path"]
    assert [one.partition(":")[0] for one in job.unsent_problems(order, set())] == ["run.data.path", "run (a file)"]


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "PACKAGE_BYTES", 1000)
    with pytest.raises(UsageError, match="files would be sent"):
        package.write_package(tmp_path / "x.zip", ROOT)
    with pytest.raises(UsageError, match="not a folder"):
        package.write_package(tmp_path / "x.zip", tmp_path / "absent")


@pytest.mark.parametrize(("arguments", "fields", "says"), [
    (("expand", CLASSICAL), {}, "out: 'runs' is relative"),
    (("expand", CLASSICAL, ["method.polcy=x"]), {}, "did you mean 'policy'"),
    (("retry", "runs/digits"), {}, r"path that every node .*/runs/digits"),
    (("submit", CLASSICAL), {}, "does not run as a job"),
    (("plan", CLASSICAL), {"address": "10.0.0.1:6379"}, "give its URL"),
    (("plan", CLASSICAL), {"env": ["HF_TOKEN=abc"]}, "looks like a secret"),
    (("plan", CLASSICAL), {"env": ["A-B"]}, "not the name"),
    (("plan", CLASSICAL), {"address": "http://127.0.0.1:9"}, "no Ray cluster answers")])
def test_what_is_wrong_here_is_never_sent(arguments: tuple[Any, ...], fields: dict[str, Any], says: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def write_package(path: Path, *rest: Any) -> tuple[str, list[str]]:
        zipfile.ZipFile(path, "w").close()
        return {}, []

    monkeypatch.setattr(submit, "write_package", write_package)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=says):
        submit.submit(JobOrder(*arguments), **fields)


def test_what_is_not_sent_is_named_before_anything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/birds/ant/1.png", "lists/classes.csv", "models/sd15/model_index.json", "seen/ids.txt"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("x")
    Path(".gitignore").write_text("models/\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    Path("birds.yaml").write_text(yaml.safe_dump({
        "name": "birds", "method": {"name": "img2img"}, "prior": {"weights": "models/sd15"},
        "data": {"source": "imagefolder", "path": "data/birds", "classes": "lists/classes.csv",
                 "ids": "seen/ids.txt"}}))
    Path("sweep.yaml").write_text(yaml.safe_dump({"name": "s", "out": "/runs", "space": {}, "study": "birds.yaml"}))
    Path("select.yaml").write_text(yaml.safe_dump({"run": "runs/birds", "rule": {"kind": "random"}}))
    Path("fit.yaml").write_text(yaml.safe_dump({
        "name": "f", "out": "/runs", "fit": {"captions": {"file": "data/c.json"}},
        "data": {"source": "parquet", "path": "s3://bucket/birds"}}))
    Path("data/c.json").touch()

    def refused(verb: str, file: str) -> list[str]:
        with pytest.raises(UsageError) as caught:
            submit.submit(JobOrder(verb, file), address="http://127.0.0.1:9")
        return [line.split(":")[0] for line in getattr(caught.value, "problems", [])]

    assert refused("expand", "birds.yaml") == ["out", "data.path", "prior.weights"]
    Path("shards").mkdir()
    Path("shards/a.parquet").write_text("x")
    for place in ("shards/*.parquet", "~/birds"):
        Path("sent.yaml").write_text(yaml.safe_dump({
            "name": "sent", "out": "/runs", "method": {"name": "classical"},
            "data": {"source": "parquet", "path": place}}))
        assert refused("expand", "sent.yaml") == []  # no cluster is there, which is another error
    assert refused("sweep", "sweep.yaml") == ["study.data.path", "study.prior.weights"]
    assert refused("select", "select.yaml") == ["run"]
    assert refused("fit", "fit.yaml") == ["fit.captions.file"]
    assert refused("fit", "birds.yaml") == ["out", "data.path", "prior.weights"]
    assert refused("plan", "birds.yaml") == [], "a plan can do without data"


def printed() -> list[str]:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "cluster").iterdir(),
             ROOT / "rayexpand/cli/cluster.py"]
    lines = [line for page in pages for line in page.read_text().replace("\n--", " --").splitlines()]
    return sorted({f"submit {part.partition('`')[0].partition('|')[0]}".strip().rstrip(".")
                   for line in lines for part in line.split("rayexpand submit ")[1:] if not part.startswith("--env")})


@pytest.mark.parametrize("command", printed())
@pytest.mark.fast_cases(6)
def test_a_command_that_a_page_prints_gets_as_far_as_the_cluster(command: str, tmp_path: Path) -> None:
    contents = {
        "study.yaml": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"},
                       "arms": [{"name": "original"}]},
        "figures.yaml": {"sources": {"a": ["/shared/runs/a"]}}, "gpus.yaml": {"cluster": {"actors": 8}},
        **{name: {"data": {"source": "digits"}, "method": {"name": "img2img"}} for name in ("my.yaml", "birds.yaml")}}
    for name, content in contents.items():
        (tmp_path / name).write_text(yaml.safe_dump({**content, **({} if "cluster" in content else {"name": "one"})}))
    words = [str(tmp_path / word) if word in contents else word.replace("$PWD", "/here").strip("'")
             for word in shlex.split(command, comments=True)]
    end = rayexpand(*words, *(() if "--rayjob" in words else ("--address", "http://127.0.0.1:9")))

    if "--rayjob" in words:
        assert [one["kind"] for one in yaml.safe_load_all(end.stdout)] == ["ConfigMap", "RayJob"], end.stderr
    else:
        assert (end.returncode, "no Ray cluster answers" in end.stderr) == (2, True), end.stderr


def test_the_help_names_every_verb_that_runs_as_a_job() -> None:
    words = rayexpand("submit", "--help").stdout.replace(",", " ").split()
    assert {*job.FILE_VERBS, *job.RUN_VERBS} <= set(words)


def test_a_token_goes_to_other_machines_only_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("abc\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    found = {}
    for mode in ("", "token", "disabled"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        found[mode] = (submit._token("http://127.0.0.1:8265"), submit._token(REMOTE))

    assert found == {"": ("abc", None), "token": ("abc", "abc"), "disabled": (None, None)}


class Jobs:
    """A client that knows some jobs and takes others."""

    def __init__(self, *known: tuple[str, str, str, str]) -> None:
        self.known = [SimpleNamespace(submission_id=i, status=s, metadata={
            "run": r, "rayexpand": v, "folder": f"/runs/{r}"})
                      for i, s, r, v in known]
        self.sent: list[dict[str, Any]] = []
        self.taken = {"digits-8"}

    def list_jobs(self) -> list[Any]:
        return [*self.known, SimpleNamespace(submission_id=None, status="RUNNING", metadata=None)]

    def submit_job(self, **job: Any) -> str:
        if job["submission_id"] in self.taken:
            raise RuntimeError(f"Job with submission_id {job['submission_id']} already exists.")
        self.sent.append(job)
        return job["submission_id"]


def test_each_attempt_has_its_own_number() -> None:
    client = Jobs(("digits-7", "FAILED", "digits", "expand"), ("digits-x-99", "FAILED", "digits-x", "expand"))
    order = submit.Submission("digits", "expand", "/runs/digits", "true", {"OMP_NUM_THREADS": "1"}, 0.0,
                              {"head": 0.01})

    assert submit._send(client, order, Path("p.zip")) == "digits-9"  # 8 was taken meanwhile
    (sent,) = client.sent
    assert sent["metadata"] == {"rayexpand": "expand", "run": "digits", "folder": "/runs/digits", "attempt": "9"}
    assert sent["runtime_env"] == {"working_dir": "p.zip", "env_vars": {"OMP_NUM_THREADS": "1"}}
    assert (sent["entrypoint_num_cpus"], sent["entrypoint_resources"]) == (0.0, {"head": 0.01})


def test_a_run_is_not_driven_twice() -> None:
    order = submit.Submission("digits", "expand", "/runs/digits", "true", {})
    with pytest.raises(UsageError, match="digits-2 is running and does the same"):
        submit._refuse_twin(Jobs(("digits-2", "RUNNING", "digits", "expand")), order)
    submit._refuse_twin(Jobs(("digits-2", "STOPPED", "digits", "expand"), ("d-1", "RUNNING", "digits", "plan"),
                             ("digits-3", "RUNNING", "other/digits", "expand")), order)


# From here on a real cluster, one for all tests of this folder.


@pytest.fixture
def cluster(head: Head, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")  # the argument must win
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(ROOT)
    return head.dashboard


@pytest.mark.cluster
def test_a_job_makes_what_this_machine_makes(cluster: str, tmp_path: Path) -> None:
    heard: list[str] = []
    end = submit.submit(JobOrder("expand", CLASSICAL, [f"out={tmp_path / 'job'}"]), address=cluster,
                        on_log=heard.append, env=["PATH", "SOME_SETTING=1"])
    here, _ = complete(load(CLASSICAL, [f"out={tmp_path / 'here'}"]))

    assert (end.exit_code, end.status, end.attempts) == (0, "SUCCEEDED", 1)
    assert hashes(runs.open_run(str(tmp_path / "job" / "digits-classical"))) == hashes(here)
    assert "Running entrypoint" in "".join(heard)
    assert "run digits-classical" in "".join(heard)  # the summary, at the end of the log
    (known,) = [one for one in submit.jobs(address=cluster) if one["submission_id"] == end.submission_id]
    assert (known["run"], known["verb"], known["status"]) == ("digits-classical", "expand", "SUCCEEDED")
    assert known["exit_code"] == 0
    again: list[str] = []
    assert submit.logs(end.submission_id, address=cluster, on_log=again.append).exit_code == 0
    assert "".join(again) == "".join(heard)


@pytest.fixture
def slow_job(tmp_path: Path, image_folder: Path) -> Path:
    """40 rows in five shards, 0.1 s each, outside the tree that is sent."""
    file = tmp_path / "slow.yaml"
    file.write_text(yaml.safe_dump({
        "name": f"slow-{tmp_path.name}", "out": str(tmp_path / "out"), "seed": 3,
        "data": {"source": "imagefolder", "path": str(image_folder)},
        "method": {"name": "tests.methods.fakes.Sleeping", "ratio": 2, "seconds": 0.1},
        "sampler": {"batch": 8, "shard_images": 8}, "limits": {"max_failed": 1.0}}))
    return file


@pytest.mark.cluster
def test_a_job_stopped_midway_continues_when_submitted_again(cluster: str, slow_job: Path, tmp_path: Path) -> None:
    name = yaml.safe_load(slow_job.read_text())["name"]
    sent = submit.submit(JobOrder("expand", str(slow_job)), address=cluster, wait=False)
    with pytest.raises(UsageError, match="does the same"):
        submit.submit(JobOrder("expand", str(slow_job)), address=cluster, wait=False)
    data = tmp_path / "out" / name / "data"
    while not (data.is_dir() and any(data.iterdir())):
        time.sleep(0.02)
    stopped = submit.stop(sent.submission_id, address=cluster)
    halfway = runs.open_run(str(tmp_path / "out" / name)).totals()
    end = submit.submit(JobOrder("expand", str(slow_job)), address=cluster)
    undisturbed, _ = complete(load(slow_job, [f"out={tmp_path / 'here'}", "method.seconds=0.1"]))

    assert (stopped.status, stopped.exit_code, sent.submission_id) == ("STOPPED", 75, f"{name}-1")
    assert 0 < halfway.kept < halfway.planned
    assert (end.submission_id, end.exit_code) == (f"{name}-2", 0)
    assert hashes(runs.open_run(str(tmp_path / "out" / name))) == hashes(undisturbed)


@pytest.mark.cluster
@pytest.mark.parametrize(("changes", "exit_code", "says"), [
    (["data.path=/absent/seeds"], 2, "data.path"),
    (["limits.max_failed=0.01", "method.name=tests.methods.fakes.Failing", "method.nan=ant/0.png/0"], 3,
     "rows failed, more than limits.max_failed")])
def test_exit_codes_come_through(cluster: str, slow_job: Path, changes: list[str], exit_code: int, says: str) -> None:
    raw = yaml.safe_load(slow_job.read_text())
    del raw["method"]["seconds"]
    slow_job.write_text(yaml.safe_dump(raw))
    heard: list[str] = []
    end = submit.submit(JobOrder("expand", str(slow_job), changes), address=cluster, on_log=heard.append)

    assert (end.exit_code, end.status, end.attempts) == (exit_code, "FAILED", 1)
    assert says in "".join(heard)


@pytest.mark.cluster
def test_a_method_of_the_users_own_travels(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mywork"
    folder.mkdir()
    (folder / "mymethod.py").write_text(
        "from rayexpand.methods.classical import Classical\n\n\nclass Mine(Classical):\n"
        "    name: str = 'mymethod.Mine'\n")
    (folder / "mine.yaml").write_text(yaml.safe_dump({
        "name": "mine", "out": str(tmp_path / "out"), "data": {"source": "digits", "per_class": 1},
        "method": {"name": "mymethod.Mine", "ratio": 1}, "sampler": {"batch": 8}}))
    monkeypatch.syspath_prepend(str(folder))
    trust("mymethod.Mine")  # here, where the file is read before it is sent
    end = submit.submit(JobOrder("expand", str(folder / "mine.yaml"), trust=["mymethod.Mine"]), address=cluster,
                        working_dir=str(folder))

    assert end.exit_code == 0, end.message
    assert runs.open_run(str(tmp_path / "out" / "mine")).totals().kept == 10


@pytest.mark.cluster
@pytest.mark.parametrize("token", [None, "wrong-token-wrong-token"])
def test_a_wrong_token_is_explained(cluster: str, tmp_path: Path, token: str | None) -> None:
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment = {**hidden, "HOME": str(tmp_path), **({"RAY_AUTH_TOKEN": token} if token else {})}
    code = (f"from rayexpand.contract.errors import UsageError\nfrom rayexpand.on_ray import submit\n"
            f"try: submit.jobs(address={cluster!r})\nexcept UsageError as error: print(error)")
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout

    assert "the cluster refuses this client's token" in said
    assert "RAY_AUTH_TOKEN_PATH" in said
    assert "wrong-token" not in said


@pytest.mark.cluster
def test_no_job_holds_the_token(cluster: str) -> None:
    submit.submit(JobOrder("plan", CLASSICAL), address=cluster)
    real, client = submit._token(cluster), submit.connect(cluster)
    assert real
    for one in client.list_jobs():
        assert real not in json.dumps(vars(one), default=str)
        assert not one.submission_id or real not in client.get_job_logs(one.submission_id)


@pytest.mark.cluster
def test_unknown_jobs_are_named(cluster: str) -> None:
    for ask in (submit.stop, lambda i, address: submit.logs(i, address=address, on_log=print)):
        with pytest.raises(UsageError, match="no-such-1 is no job of this cluster"):
            ask("no-such-1", address=cluster)


@pytest.mark.cluster
def test_a_killed_job_is_submitted_again_by_itself(cluster: str, slow_job: Path, tmp_path: Path) -> None:
    import psutil

    name = yaml.safe_load(slow_job.read_text())["name"]
    data, victims = tmp_path / "out" / name / "data", []

    def kill_once() -> None:
        while not (data.is_dir() and any(data.iterdir())):
            time.sleep(0.02)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:4] == ["-m", "rayexpand", "expand"] and "slow.yaml" in process.cmdline()[4]:
                    victims.append(process.pid)
                    process.kill()

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    end = submit.submit(JobOrder("expand", str(slow_job)), address=cluster, backoff_s=0.1)
    killer.join()
    undisturbed, _ = complete(load(slow_job, [f"out={tmp_path / 'here'}"]))

    assert len(victims) == 1
    assert (end.exit_code, end.attempts, end.submission_id) == (0, 2, f"{name}-2")
    assert hashes(runs.open_run(str(tmp_path / "out" / name))) == hashes(undisturbed)
