"""SIGKILL while a study makes its loops and what stands beside them: the same command again ends with the training sets
of a study that nobody disturbed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from rayexpand.contract.errors import RayexpandError
from rayexpand.studies.trials import make_trials
from rayexpand.studies.verify import verify_study
from tests.chaos.test_kill import exit_code, in_child
from tests.studies.rounds.test_in_study import made, raw_rounds, with_loops

pytestmark = pytest.mark.chaos


def trained_on(raw: dict[str, Any]) -> dict[str, str]:
    """The training set of each trial by its hash; what is there already is not made again."""
    return {one.name: one.list_sha256 for one in make_trials(made(raw))}


def run_command(raw: dict[str, Any]) -> None:
    try:
        make_trials(made(raw))
    except RayexpandError as error:
        print(error, file=sys.stderr)
        os._exit(error.exit_code)
    os._exit(0)


def test_killed_in_loops_and_in_their_controls(tmp_path: Path) -> None:
    undisturbed, raw = trained_on(raw_rounds(tmp_path / "undisturbed")), raw_rounds(tmp_path / "killed")
    for point in ("after_decision_link@shard=2", "after_decision@shard=3", "after_guide@shard=3"):
        assert exit_code(in_child(run_command, raw, failpoint=f"{point}:kill")) == -signal.SIGKILL, point
    with_loops(raw)
    assert not [*(tmp_path / "killed/small/runs").glob("*-pool-*")]
    for point in ("before_run", "after_run_link", "before_call@shard=1", "after_data_link@shard=2",
                  "after_data@shard=2"):
        assert exit_code(in_child(run_command, raw, failpoint=f"{point}:kill")) == -signal.SIGKILL, point
    assert exit_code(in_child(run_command, raw)) == 0
    assert trained_on(raw) == undisturbed
    assert not verify_study(str(tmp_path / "killed/small"), pixels=True).problems
