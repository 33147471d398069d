from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayexpand.runs import run as runs
from rayexpand.runs.joined import run_folders
from rayexpand.storage.places import open_files
from rayexpand.studies.rounds.config import LoopConfig, RoundsConfig
from rayexpand.studies.rounds.decisions import RoundDecision
from rayexpand.studies.rounds.learning import Learning
from rayexpand.studies.rounds.loop import Loop, drive_loop, open_loop
from rayexpand.studies.train import train_with
from tests.conftest import small_run
from tests.runs.test_growth import contents

MakeLoop = Callable[..., LoopConfig]


@pytest.fixture
def make_loop(image_folder: Path, tmp_path: Path) -> MakeLoop:
    """`make_loop("Fake", count=3, ratio=6)`: a loop over the image folder."""
    def make(method: str = "Fake", *, rounds: dict[str, Any] | None = None, name: str = "loop",
             **fields: Any) -> LoopConfig:
        run = small_run(image_folder, tmp_path / "out", method, name=name, **{"ratio": 6, **fields})
        return LoopConfig(run=run, rounds=RoundsConfig(**(rounds or {})))

    return make


def in_this_process(run: runs.Run) -> None:
    expander = runs.start(run)
    try:
        runs.drive(run, runs.in_process(expander), lambda: runs.pending_jobs(run))
    finally:
        expander.close()


def finished(config: LoopConfig) -> tuple[Loop, RoundDecision]:
    """A loop made to its end in this process, and the decision that ended it."""
    loop = open_loop(config)
    return loop, drive_loop(loop, Learning(train_with(lambda *_: None)), in_this_process)


def rounds_of(loop: Loop) -> list[runs.Run]:
    return rounds_at(loop.config.folder)


def rounds_at(folder: str) -> list[runs.Run]:
    return [runs.open_run(one) for one in run_folders(open_files(folder))]


def union(loop: Loop) -> dict[str, dict[str, Any]]:
    """`contents` of all rounds; fails where a sample is there twice."""
    found: dict[str, dict[str, Any]] = {}
    for run in rounds_of(loop):
        made = contents(run)
        assert not made.keys() & found.keys()
        found |= made
    return found
