"""Runs in rounds: dealt uniformly they are the run in one go, sample for sample."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.contract.errors import ConfigError, DamagedFile, DigestMismatch, OverBudget, UsageError
from rayexpand.runs import run as runs
from rayexpand.runs.allocation import Allocate
from rayexpand.runs.config import parse, resolved
from rayexpand.runs.verify import verify
from rayexpand.studies.rounds.config import LoopConfig, RoundsConfig
from rayexpand.studies.rounds.decisions import FIRST, read_decision
from rayexpand.studies.rounds.loop import open_loop
from rayexpand.studies.rounds.status import read_loop_status
from rayexpand.studies.rounds.verify import verify_loop
from tests.conftest import complete, small_run
from tests.methods.test_families import method_for
from tests.runs.test_growth import contents, models, paint  # noqa: F401  (a fixture)
from tests.studies.rounds.conftest import MakeLoop, finished, rounds_of, union

UNEVEN = {"count": 3, "shares": [1, 3, 2]}


def in_one_go(config: LoopConfig, **sections: Any) -> dict[str, dict[str, Any]]:
    raw = {**resolved(config.run), "name": "whole", **sections}
    return contents(complete(parse(raw))[0])


@pytest.mark.parametrize(("method", "rounds", "ratio"), [
    ("Fake", UNEVEN, 6), ("FractionalRatio", {"count": 2}, 2.5),
    pytest.param("Mixes", {"count": 3, "shares": [0.2, 1, 0.5]}, 5.3, marks=pytest.mark.slow)])
def test_three_uneven_rounds_are_the_run_in_one_go(make_loop: MakeLoop, method: str, rounds: dict[str, Any],
                                                   ratio: float) -> None:
    config = make_loop(method, rounds=rounds, ratio=ratio)
    loop, end = finished(config)

    assert union(loop) == in_one_go(config)
    assert (end.round, end.reason, end.left) == (rounds["count"] + 1, "budget: the last share is spent", 0)
    assert all(verify(run, pixels=True).problems == [] for run in rounds_of(loop))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["img2img", "distdiff", "diffmix"])
def test_rounds_of_the_methods_of_papers_are_the_run_in_one_go(models: dict[str, Any], tmp_path: Path,  # noqa: F811
                                                               method: str) -> None:
    own = {**method_for(method, "sd").model_dump(exclude={"name"}), "ratio": 6}  # type: ignore[attr-defined]
    kinds = {"prototypes"} if method == "distdiff" else set()
    sections = {**models["sections"], "grow": False, "artifacts": {
        kind: path for kind, path in models["sections"]["artifacts"].items() if kind in kinds}}
    run = small_run(Path(), tmp_path, method, batch=4, shard_images=20, data=models["data"], sections=sections,
                    name="loop", **own)
    config = LoopConfig(run=run, rounds=RoundsConfig(**UNEVEN))
    loop, _ = finished(config)

    found = union(loop)
    assert len(found) == 48
    assert found == in_one_go(config)


def test_without_first_a_round_repeats_the_one_before(make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that the tests above would not let live."""
    planned = runs.make_plan
    monkeypatch.setattr(runs, "make_plan", lambda index, config, first, copies: planned(index, config, None, copies))
    loop, _ = finished(make_loop(rounds={"count": 2}))
    first, second = (contents(run) for run in rounds_of(loop))

    assert first == second


def test_equal_per_class_in_rounds_is_that_of_one_go(tmp_path: Path) -> None:
    seeds = paint(tmp_path / "seeds", "ant", each=6)
    paint(seeds, "bee", each=2)
    run = small_run(seeds, tmp_path, name="loop", ratio=3)
    limits = {"floor": 0.25, "cap": 7}
    config = LoopConfig(run=run, rounds=RoundsConfig(count=3, shares=[1, 2, 2], rule="equal", **limits))
    loop, _ = finished(config)
    whole = in_one_go(config, allocate=Allocate(rule="equal", **limits).model_dump())

    assert union(loop) == whole
    assert sum(one["target_label"] for one in whole.values()) == 12


def test_the_same_command_again_makes_nothing(make_loop: MakeLoop) -> None:
    config = make_loop(rounds=UNEVEN)
    loop, _ = finished(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*.parquet")}
    again, _ = finished(config)

    assert {path: path.stat().st_mtime_ns for path in Path(config.folder).rglob("*.parquet")} == before
    assert again.facts == loop.facts
    assert loop.is_over()


def test_a_round_says_where_it_comes_from_and_names_what_was_there(make_loop: MakeLoop) -> None:
    loop, end = finished(make_loop(rounds=UNEVEN))
    first, second, third, stop = loop.chain()

    assert stop == end
    assert [first.follows, second.follows, third.follows] == [FIRST, first.sha256, second.sha256]
    assert [one.facts["follows"] for one in rounds_of(loop)] == [
        {"round": one.round, "decision": one.sha256} for one in (first, second, third)]
    assert ([one.planned for one in (first, second, third)], [one.left for one in (first, second, third)]) == (
        [20, 60, 40], [100, 40, 0])
    assert [[one.kept for one in decision.seen] for decision in (first, second, third, stop)] == [
        [], [20], [20, 60], [20, 60, 40]]


def test_shares_that_are_not_reached_stay_unspent_and_that_is_said(make_loop: MakeLoop) -> None:
    _, end = finished(make_loop(rounds={"count": 2, "shares": [1, 1, 2]}))
    assert end.reason == "count: 2 rounds are made; 60 of 120 samples are not spent"
    assert (end.spent, end.left) == (60, 60)


def test_too_many_failed_rows_end_the_loop_before_the_next_decision(make_loop: MakeLoop) -> None:
    config = make_loop("Failing", rounds=UNEVEN, nan="bee/2.png/0", sections={"limits": {"max_failed": 0.01}})
    for _ in range(2):
        with pytest.raises(OverBudget, match=f"retry {config.folder}`.*--set run.limits.max_failed"):
            finished(config)
    assert [one.round for one in open_loop(config).chain()] == [1]


def test_another_loop_in_the_folder_is_refused(make_loop: MakeLoop, image_folder: Path, tmp_path: Path) -> None:
    finished(make_loop(rounds={"count": 2}))
    with pytest.raises(DigestMismatch, match=r"config\.rounds\.count: 2 -> 3\n.*parts: "):
        open_loop(make_loop(rounds={"count": 3}))
    moved = shutil.copytree(image_folder, tmp_path / "fewer")
    (moved / "ant/3.png").unlink()
    with pytest.raises(DigestMismatch, match="data: "):
        open_loop(make_loop(rounds={"count": 2}, data={"source": "imagefolder", "path": str(moved)}))


def test_a_decision_of_another_loop_is_refused(make_loop: MakeLoop) -> None:
    loop, _ = finished(make_loop(rounds={"count": 2}))
    other, _ = finished(make_loop(rounds={"count": 2}, ratio=4, name="other"))
    here = Path(loop.files.at("decisions/0002.json"))
    whole = here.read_bytes()
    shutil.copy(other.files.at("decisions/0002.json"), here)
    with pytest.raises(DigestMismatch, match=r"0002\.json is no decision of this loop"):
        loop.chain()
    here.write_bytes(whole.replace(b'"left": 0', b'"left": 1'))
    with pytest.raises(DamagedFile, match=r"0002\.json"):
        loop.chain()
    here.unlink()
    with pytest.raises(DamagedFile, match=r"0002\.json: is gone"):
        loop.chain()


def test_samples_that_a_decision_saw_must_be_there(make_loop: MakeLoop) -> None:
    config = make_loop(rounds={"count": 2})
    loop, _ = finished(config)
    run = rounds_of(loop)[0]
    run.files.delete("data/train-000001.parquet", "receipts/000001.json")
    finished(config)  # made again, the same samples
    assert read_decision(loop.files, 2) is not None
    other, _ = finished(make_loop(rounds={"count": 2}, name="other", sections={"seed": 4}))
    shutil.rmtree(run.folder)
    shutil.copytree(rounds_of(other)[0].folder, run.folder)
    with pytest.raises(DigestMismatch):
        finished(config)


def test_rounds_of_whole_groups_are_the_run_in_one_go(make_loop: MakeLoop) -> None:
    config = make_loop("Groups", rounds={"count": 3})
    assert union(finished(config)[0]) == in_one_go(config)


@pytest.mark.parametrize(("rounds", "said"), [
    ({"cap": 5}, "rounds.cap: 20 seeds with at most 5 samples each leave no room for 120"),
    ({"count": 3, "shares": [1, 1, 1e-9]}, r"rounds.shares: round 3 would have no sample")])
def test_a_budget_that_cannot_be_dealt_is_refused(make_loop: MakeLoop, rounds: dict[str, Any], said: str) -> None:
    config = make_loop(rounds=rounds)
    with pytest.raises(ConfigError, match=said):
        open_loop(config)
    assert not Path(config.folder).exists()


def test_the_plan_of_a_round_comes_back_from_its_decision(make_loop: MakeLoop) -> None:
    config = make_loop(rounds=UNEVEN)
    loop, _ = finished(config)
    run = rounds_of(loop)[1]
    shutil.rmtree(Path(run.folder, run.facts["plan"]))
    finished(config)
    again = rounds_of(loop)[1].plan
    assert (np.array_equal(again.first, run.plan.first), again.copies.tolist()) == (True, [3] * 20)


def test_a_run_and_a_loop_do_not_share_a_folder(make_loop: MakeLoop) -> None:
    config = make_loop(rounds={"count": 2})
    complete(config.run)
    with pytest.raises(UsageError, match=r"holds a run; give the loop another run\.name"):
        open_loop(config)
    other = make_loop(rounds={"count": 2}, name="other")
    open_loop(other)
    with pytest.raises(UsageError, match="holds a loop"):
        complete(other.run)


@pytest.mark.slow
def test_a_loop_in_an_object_store_is_that_of_a_disk(make_loop: MakeLoop, object_stores: object) -> None:
    disk, end = finished(make_loop(rounds=UNEVEN))
    stored, other = finished(make_loop(rounds=UNEVEN, sections={"out": "s3://runs/loops"}))
    assert stored.config.folder == "s3://runs/loops/loop"
    assert other == end
    images = [{one: row["image"] for one, row in union(loop).items()} for loop in (disk, stored)]
    assert images[0] == images[1]
    assert verify_loop("s3://runs/loops/loop").problems == []
    assert read_loop_status("s3://runs/loops/loop").complete
