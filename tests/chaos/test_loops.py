"""SIGKILL between and within the rounds of a loop: the same command again ends with the decisions and the samples of a
loop that nobody disturbed, each sample once. Every row of the table of loops in docs/promise.md is a case here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand.contract.errors import RayexpandError
from rayexpand.runs.joined import read_loop_facts
from rayexpand.storage.files import LocalFiles
from rayexpand.studies import trial as trials
from rayexpand.studies.rounds.config import LoopConfig, resolved_loop
from rayexpand.studies.rounds.decisions import read_chain
from rayexpand.studies.rounds.verify import verify_loop
from tests.chaos.test_kill import LOOPING, exit_code, in_child
from tests.commands import ROOT
from tests.conftest import hashes
from tests.studies.rounds.conftest import finished, rounds_at
from tests.studies.rounds.test_learning import digits_loop
from tests.studies.test_study import SMALL

# Of a run. Round 1 is complete when round 2 is driven into these.
IN_A_ROUND = ["before_index", "after_classes_link", "before_plan", "after_plan", "before_run", "after_run_write",
              "after_run_link", "after_attempt_link", "before_call@shard=1", "after_call@shard=0",
              "after_data_write@shard=1", "after_data_link@shard=1", "after_data@shard=2", "after_receipt@shard=2"]
CHAOS = ["after_rounds_link", "before_scores@shard=2", "after_scores_link@shard=2", "after_dealt@shard=3",
         "before_decision@shard=2", "after_decision_write@shard=3", "after_decision_link@shard=2",
          "after_guide@shard=3"]
Ended = tuple[list[str], list[tuple[str, str]]]


def loop_config(out: Path, name: str = "loop") -> LoopConfig:
    """Three rounds of a method of the tests, the last one guided."""
    rounds = {"count": 3, "rule": "loss", "scores": {"folds": 2, "recipe": {**SMALL, "updates": 60, "batch": 20}},
              "guided_from": 3}
    return digits_loop(out, name, "Practised", rounds, ratio=3, shard_images=8)


def ended(folder: str) -> Ended:
    """Hashes of the decisions, and id and hash of every sample; fails where a sample is there twice."""
    files = LocalFiles(folder)
    made = [sample for run in rounds_at(folder) for sample in hashes(run).items()]
    assert len({sample_id for sample_id, _ in made}) == len(made)
    return [one.sha256 for one in read_chain(files, read_loop_facts(files))], sorted(made)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    loop, end = finished(loop_config(tmp_path_factory.mktemp("undisturbed")))
    assert (end.round, end.reason) == (4, "budget: the last share is spent")
    found = ended(loop.config.folder)
    assert len(found[1]) == 60
    return found


def run_command(config: LoopConfig) -> None:
    try:
        finished(config)
    except RayexpandError as error:
        print(error, file=sys.stderr)
        os._exit(error.exit_code)
    os._exit(0)


def killed(config: LoopConfig, point: str) -> None:
    assert exit_code(in_child(run_command, config, failpoint=f"{point}:kill")) == -signal.SIGKILL, "never reached"


def assert_ends_as(undisturbed: Ended, config: LoopConfig) -> None:
    assert exit_code(in_child(run_command, config)) == 0
    assert ended(config.folder) == undisturbed
    assert verify_loop(config.folder, pixels=True).problems == []
    for folder in (config.folder, *(str(run.folder) for run in rounds_at(config.folder))):
        assert os.listdir(f"{folder}/.tmp") == [], "leftovers of the dead are swept at the next start"


def windows() -> list[Any]:
    of_a_loop = [point if "rounds" in point else f"{point}@shard={number}" for point in LOOPING
                 for number in ((3,) if "guide" in point else (2, 3)) if "rounds" not in point or number == 2]
    return [pytest.param(one, marks=pytest.mark.chaos if one in CHAOS else pytest.mark.soak) for one in of_a_loop]


@pytest.mark.parametrize("point", windows())
def test_killed_between_rounds(undisturbed: Ended, tmp_path: Path, point: str) -> None:
    config = loop_config(tmp_path)
    killed(config, point)
    assert_ends_as(undisturbed, config)


@pytest.mark.soak
@pytest.mark.parametrize("point", IN_A_ROUND)
def test_killed_in_the_run_of_round_two(undisturbed: Ended, tmp_path: Path, point: str) -> None:
    config = loop_config(tmp_path)
    killed(config, "after_decision@shard=2")
    killed(config, point)
    assert_ends_as(undisturbed, config)


@pytest.mark.chaos
def test_killed_again_and_again(undisturbed: Ended, tmp_path: Path) -> None:
    """Twice in a row at one point, then in the run of round 2, then while the guide of round 3 is made."""
    config = loop_config(tmp_path)
    for point in ("before_decision@shard=2", "before_decision@shard=2", "after_decision@shard=2", "after_data@shard=1",
                  "before_scores@shard=3", "before_guide@shard=3", "after_decision@shard=4"):
        killed(config, point)
    assert_ends_as(undisturbed, config)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.chaos
def test_a_fold_goes_on_from_its_checkpoint_and_a_finished_one_is_read(
        undisturbed: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, results = loop_config(tmp_path), tmp_path / "loop/results"
    keeper, write_result = trials.keeper, trials.write_result
    with monkeypatch.context() as patch:
        patch.setattr(trials, "keeper", lambda *given: lambda: (keeper(*given)(), _die()))
        assert exit_code(in_child(run_command, config)) == -signal.SIGKILL
    assert os.listdir(tmp_path / "loop/checkpoints") == ["r0002-fold0.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(trials, "write_result", lambda *given, **named: (write_result(*given, **named), _die()))
        assert exit_code(in_child(run_command, config)) == -signal.SIGKILL
    first = (results / "r0002-fold0.json").read_bytes()
    assert json.loads(first)["starts"] == [0, 30]
    assert os.listdir(results) == ["r0002-fold0.json"]
    assert_ends_as(undisturbed, config)
    assert (results / "r0002-fold0.json").read_bytes() == first


@pytest.mark.chaos
@pytest.mark.parametrize("point", ["after_scores@shard=2", "before_decision@shard=2", "after_decision@shard=1"])
def test_two_drivers_make_one_decision_and_both_end_with_it(undisturbed: Ended, tmp_path: Path, point: str) -> None:
    """One is stopped between scores and decision while the other makes the whole loop."""
    config = loop_config(tmp_path)
    sleeper = in_child(run_command, config, failpoint=f"{point}:stop")
    assert os.waitpid(sleeper.pid or 0, os.WUNTRACED)[0] == sleeper.pid
    assert exit_code(in_child(run_command, config)) == 0
    os.kill(sleeper.pid or 0, signal.SIGCONT)

    assert exit_code(sleeper) == 0
    assert ended(config.folder) == undisturbed


@pytest.mark.chaos
def test_two_drivers_side_by_side(undisturbed: Ended, tmp_path: Path) -> None:
    config = loop_config(tmp_path)
    children = [in_child(run_command, config) for _ in range(2)]
    assert [exit_code(child) for child in children] == [0, 0]
    assert ended(config.folder) == undisturbed


def command(config: LoopConfig, folder: Path) -> subprocess.Popen[bytes]:
    job = folder / "loop.yaml"
    job.write_text(yaml.safe_dump(resolved_loop(config)))
    return subprocess.Popen([sys.executable, "-m", "rayexpand", "expand", str(job), "--no-ray", "--trust",
                             config.run.method.name], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.chaos), *(
    pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 4))])
def test_the_command_killed_from_outside(undisturbed: Ended, tmp_path: Path, seed: int) -> None:
    """At whatever it is doing when another file has appeared; two kills, then the end."""
    config = loop_config(tmp_path)
    wanted = [["scores/0002.parquet", "decisions/0003.json"], ["lists/r0002-fold0.txt", "rounds/0002/run.json"],
              ["checkpoints/r0002-fold1.pt", "checkpoints/r0003-guide.pt"],
              ["rounds/0001/data/train-000001.parquet", "results/r0003-guide.json"]][seed]
    for name in wanted:
        process = command(config, tmp_path)
        while process.poll() is None and not (Path(config.folder) / name).exists():
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    process = command(config, tmp_path)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()[-2000:]
    assert ended(config.folder) == undisturbed
    assert verify_loop(config.folder).problems == []
