"""SIGKILL while a run grows: the same command again ends with the run that began as large, and what was there stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig
from rayexpand.runs.verify import verify
from tests.chaos.test_kill import (
    COMMITTING,
    GROWING,
    PREPARING,
    SAMPLING,
    STARTING,
    exit_code,
    in_child,
    run_command,
)
from tests.conftest import complete, small_run
from tests.runs.test_growth import contents, paint, stored

PLANNING = [point for point in PREPARING if "run" not in point]
SHARD = 3  # the first that a growing run makes


def config(folder: Path, out: str, ratio: int) -> RunConfig:
    return small_run(folder / "seeds", folder / out, "Fake", ratio=ratio, shard_images=4, sections={"grow": True})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("growth") / "seeds", "ant", "bee", each=3).parent


@pytest.mark.parametrize("point", PLANNING + GROWING + STARTING + [f"{one}@shard={SHARD}" for one in SAMPLING + [
    one for one in COMMITTING if "side" not in one]])
@pytest.mark.fast_cases(8, "chaos")
def test_killed_while_it_grows(world: Path, tmp_path: Path, point: str) -> None:
    out = tmp_path.name
    begun, _ = complete(config(world, out, 2))
    assert begun.plan.n_shards == SHARD
    before = stored(begun)

    child = in_child(run_command, config(world, out, 4), failpoint=f"{point}:kill")
    assert exit_code(child) == -signal.SIGKILL, "the failpoint was never reached"
    assert runs.open_run(begun.config.folder).plan.planned in (12, 24), "it can be read at any time"
    assert exit_code(in_child(run_command, config(world, out, 4))) == 0

    run, (whole, _) = runs.open_run(begun.config.folder), complete(config(world, f"{out}-whole", 4))
    assert contents(run) == contents(whole)
    assert {name: Path(name).read_bytes() for name in before} == before
    assert verify(run, pixels=True).problems == []
    assert len(run.facts["grown"]) == 1
    assert os.listdir(Path(run.folder, "grown")) == ["0001.json"]


def test_killed_twice_while_it_grows_twice(world: Path, tmp_path: Path) -> None:
    out = tmp_path.name
    complete(config(world, out, 1))
    for ratio, points in ((2, ("after_parts", "after_grown_link")), (5, ("before_grown", "after_grown"))):
        for point in points:
            child = in_child(run_command, config(world, out, ratio), failpoint=f"{point}:kill")
            assert exit_code(child) == -signal.SIGKILL
            if point == "after_grown_link":
                break
        assert exit_code(in_child(run_command, config(world, out, ratio))) == 0
    run, (whole, _) = runs.open_run(config(world, out, 5).folder), complete(config(world, f"{out}-whole", 5))
    assert contents(run) == contents(whole)
    assert [step["planned"] for step in run.facts["grown"]] == [6, 12]


def test_two_drivers_that_grow_one_run_agree(world: Path, tmp_path: Path) -> None:
    """One grows to 3 copies while another, which has looked at the run of 1 copy, is about to make it 4."""
    out = tmp_path.name
    complete(config(world, out, 1))
    looked, plain = runs.read_facts, []

    def late(files: object) -> object:
        found = looked(files)  # type: ignore[arg-type]
        if not plain:
            plain.append(1)
            assert exit_code(in_child(run_command, config(world, out, 3))) == 0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "read_facts", late)
        run, _ = complete(config(world, out, 4))
    assert [step["planned"] for step in run.facts["grown"]] == [6, 18]
    assert contents(run) == contents(complete(config(world, f"{out}-whole", 4))[0])
    assert verify(run, pixels=True).problems == []
