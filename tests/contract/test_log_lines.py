"""Lines of --log-json, one by one, against the schema of docs/cli.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand.contract import log_lines
from rayexpand.contract.log_lines import EVENTS, as_json
from rayexpand.contract.schema import Reason
from tests.commands import ROOT, process

ALWAYS = {"time": float, "level": str, "event": str, "verb": str, "run": str, "attempt": (int, type(None)), "host": str,
          "pid": int}
OF = {"progress": {"task": str, "done": int, "total": int}, "commit": {"shard": int, "kept": int, "failed": int},
      "failed": {"shard": int, "sample": str, "reason": str}, "fault": {"message": str}, "log": {"message": str},
      "error": {"message": str, "error": dict}}


def checked(line: str) -> dict[str, Any]:
    """A line, if it is one of the schema."""
    found = json.loads(line)
    for name, kind in {**ALWAYS, **OF[found["event"]]}.items():
        assert isinstance(found[name], kind), f"{name} of {line}"
    assert found["event"] in EVENTS
    assert found["level"] in ("debug", "info", "warning", "error", "critical"), line
    assert isinstance(found.get("shard", 0), int)
    assert isinstance(found.get("sample", ""), str)
    return found


PROGRAM = """
import logging, os, sys, warnings
from rayexpand.contract import log_lines
with log_lines.json_stderr("expand"):
    print("before", file=sys.stderr)
    log_lines.bind(run="birds", attempt=3)
    sys.stderr.write("half a ")
    sys.stderr.flush()
    with log_lines.about(shard=7):
        print("line", file=sys.stderr)
        logging.getLogger("some.library").warning("told %d times", 2)
        log_lines.say("failed", sample="ant/1.png/0", reason="nan_latent", message="inf")
        print('{"time": "noon", "event": 5}', file=sys.stderr)
        os.write(2, b"from C\\n")
    log_lines.say("commit", shard=7, kept=1, rejected=0, failed=1)
    print("{not json", file=sys.stderr)
    os.write(2, b"no end")
print("after", file=sys.stderr)
"""


def test_every_line_says_whose_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    *lines, after = done.stderr.splitlines()
    found = [checked(line) for line in lines]
    assert after == "after", "stderr is what it was"
    assert [(one["event"], one.get("message"), one["run"], one["attempt"], one.get("shard")) for one in found] == [
        ("log", "before", "", None, None), ("log", "half a line", "birds", 3, 7),
        ("log", "told 2 times", "birds", 3, 7),
        ("failed", "inf", "birds", 3, 7), ("log", '{"time": "noon", "event": 5}', "birds", 3, 7),
        ("log", "from C", "birds", 3, 7), ("commit", None, "birds", 3, 7), ("log", "{not json", "birds", 3, None),
        ("log", "no end", "birds", 3, None)]
    assert [one["level"] for one in found][2:4] == ["warning", "warning"]
    assert found[3]["sample"] == "ant/1.png/0"


WORKER = """
import os
from rayexpand.contract import log_lines
log_lines.json_worker()
log_lines.bind(run="birds", attempt=4)
with log_lines.about(shard=2):
    log_lines.say("failed", sample="ant/1.png/0", reason="nan_latent", message="inf")
    os.kill(os.getpid(), 9)
"""


def test_a_worker_says_it_too_and_its_last_words_arrive() -> None:
    inherited = json.dumps({"verb": "expand", "run": "", "attempt": None})
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), log_lines.VARIABLE: inherited})
    (found,) = [checked(line) for line in done.stderr.splitlines()]
    assert (found["verb"], found["run"], found["attempt"], found["shard"], found["sample"]) == (
        "expand", "birds", 4, 2, "ant/1.png/0")
    assert found["pid"] != os.getpid()


def test_without_json_nothing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    log_lines.bind(run="birds")
    with log_lines.about(shard=1):
        log_lines.say("commit", shard=1)
    assert capfd.readouterr() == ("", "")


def test_a_line_of_somebody_else_is_a_message() -> None:
    found = json.loads(as_json("[1]", {"run": "a"}))
    assert (found["message"], found["event"], found["run"]) == ("[1]", "log", "a")


@pytest.fixture
def job(image_folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({
        "name": "birds", "out": str(tmp_path / "out"), "data": {"source": "imagefolder", "path": str(image_folder)},
        "method": {"name": "tests.methods.fakes.Failing", "ratio": 2, "nan": "bee/2.png/0"},
        "limits": {"max_failed": 0.5}, "sampler": {"shard_images": 10}, "image": {"size": 16}}))
    return file


def test_a_run_names_its_shards_and_the_samples_that_failed(job: Path, tmp_path: Path) -> None:
    done = process("expand", job, "--log-json", "--trust", "tests.methods.fakes.Failing")
    found = [checked(line) for line in done.stderr.splitlines()]
    assert done.returncode == 0, done.stderr
    assert {one["verb"] for one in found} == {"expand"}
    commits = [one for one in found if one["event"] == "commit"]
    assert sorted(one["shard"] for one in commits) == [0, 1, 2, 3]
    assert {(one["run"], one["attempt"]) for one in commits} == {("birds", 1)}
    assert sum(one["kept"] + one["failed"] for one in commits) == 40
    (failed,) = [one for one in found if one["event"] == "failed"]
    assert failed["sample"] == "bee/2.png/0"
    assert failed["reason"] in {one.value for one in Reason}
    assert failed["shard"] == next(one["shard"] for one in commits if one["failed"])
    again = process("expand", job, "--log-json", "--trust", "tests.methods.fakes.Failing", "--set", "method.ratio=3")
    last = checked(again.stderr.splitlines()[-1])
    assert (again.returncode, last["event"], last["level"], last["error"]["exit_code"]) == (4, "error", "error", 4)


