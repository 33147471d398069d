"""What arms cost in training: clocks apart, overhead against the baseline."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayexpand import api
from rayexpand.contract.errors import UsageError
from rayexpand.loader.loader import Loader
from rayexpand.studies import bench as module
from rayexpand.studies.bench import ArmCost, TrainingBench, bench_study, overhead
from rayexpand.studies.config import parse_study
from tests.studies.test_study import expanded, raw_study


@pytest.mark.parametrize(("augmented", "percent"), [(168.2, 68.2), (100.0, 0.0), (50.0, -50.0)])
def test_overhead_by_hand(augmented: float, percent: float) -> None:
    assert overhead(augmented, 100.0) == pytest.approx(percent)


def test_the_loader_and_the_step_have_clocks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow loader of one arm is seen in its loader alone, and twice the rows are twice the training."""
    plain = Loader.batches

    def slower(self: Loader, *span: int, **where: int) -> Iterator[Any]:
        for batch in plain(self, *span, **where):
            if self.rows.mix is not None:
                time.sleep(0.05)
            yield batch

    monkeypatch.setattr(Loader, "batches", slower)
    monkeypatch.setattr(module, "STEPS", 4)
    raw = raw_study(tmp_path, seeds=[0], recipe={"backbone_args": {"width": 4}, "batch": 10, "updates": None}, arms=[
        {"name": "original"}, {"name": "mixed", "use": "flips", "mix": {}, "ratio": 1}])
    expanded(raw)
    found = bench_study(parse_study(raw))

    costs = {one.arm: one for one in found.arms}
    assert list(costs) == ["original", "mixed", "original repeated 2x"]
    assert found.baseline == "original"
    assert costs["mixed"].loader_seconds - costs["original"].loader_seconds == pytest.approx(0.05, abs=0.045)
    assert {arm: (one.steps, one.batch) for arm, one in costs.items()} == {
        "original": (2, 10), "mixed": (4, 10), "original repeated 2x": (4, 10)}
    assert costs["original"].overhead == 0
    assert costs["mixed"].overhead > 100 + costs["mixed"].overhead_per_image
    written = json.loads((tmp_path / "small/bench-10.json").read_text())
    assert written["arms"][1]["loader_seconds"] == costs["mixed"].loader_seconds
    assert not list((tmp_path / "small/trials").iterdir()), "trials that were finished with other settings stay"


def test_a_baseline_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, seeds=[0], recipe={"backbone_args": {"width": 4}, "batch": 10, "updates": None},
                    expansions={}, arms=[{"name": "original"}], baselines=["clip_zero_shot"], baseline="clip_zero_shot")
    with pytest.raises(UsageError, match="'clip_zero_shot' is not trained"):
        bench_study(parse_study(raw))


def test_the_table_has_a_line_for_each_arm() -> None:
    arms = (ArmCost("plain", 16, 100, 0.02, 0.08, "plain"),
            ArmCost("mixed", 16, 200, 0.02, 0.08, "plain", 100.0, 0.0))
    head, lines = TrainingBench(arms, "plain", 480, "cpu").table()
    assert len(head) == 7
    assert lines == [("plain", "16", "20.0", "80.0", "10.0", "baseline", ""),
                     ("mixed", "16", "20.0", "80.0", "20.0", "+100.0", "+0.0")]


def test_a_study_is_measured_by_the_same_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 1)
    raw = raw_study(tmp_path, seeds=[0], arms=[{"name": "original"}, {"name": "cut", "recipe": {"cutmix": 1.0}},
                                                   {"name": "original of 4", "recipe": {"batch": 4}},
                                                   {"name": "cut of 4", "recipe": {"batch": 4, "cutmix": 1.0}}])
    found = api.bench(raw, rows=40)
    assert {one.arm: one.against for one in found.arms} == {  # of its own batch size
        "original": "original", "cut": "original", "original of 4": "original of 4", "cut of 4": "original of 4"}
    assert found.images >= 40
    with pytest.raises(UsageError, match=r"expansions.flips: its samples are not there"):
        api.bench(raw_study(tmp_path / "other", seeds=[0]))
