"""Stages of a plan: their totals, what is unknown of them, and what they cost on a fleet."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from rayexpand.runs.config import EstimateConfig
from rayexpand.runs.fleet_hours import GPU, PROCESS
from rayexpand.runs.stages import PlanStage, shares_of, timed, unknown

CALM = {"preemptions_per_gpu_hour": 0, "node_start_s": 0, "load_s": 0}
KNOWN = PlanStage("expand", "100 images", GPU, (4.0, 8.0), "counted", tasks=4000, bytes=5_000_000_000)


def test_totals_add_both_ends_and_name_what_is_unknown() -> None:
    asked = EstimateConfig(gpus=4, gpu_hour_usd=2, cpu_hour_usd=0.1, head_hour_usd=1, storage_gb_month_usd=0.02, **CALM)
    made = timed([KNOWN, PlanStage("train", "", PROCESS, (1.0, 1.0), "measured", tasks=1),
                  unknown("fit captions", "", "not counted")], asked)
    found = json.loads(json.dumps(made.to_json()))

    assert found["totals"]["hours"] == {GPU: [pytest.approx(4, rel=1e-6), pytest.approx(8, rel=1e-6)],
                                        PROCESS: [1.0, 1.0]}
    assert found["totals"]["wall_hours"] == pytest.approx([1 + 1, 2 + 1], rel=0.05)
    assert found["totals"]["cost_usd"] == pytest.approx([8 + 0.1 + 2, 16 + 0.1 + 3], rel=0.05)
    assert found["totals"]["unknown"] == ["fit captions"]
    assert found["totals"]["storage_usd_month"] == pytest.approx(0.1)
    assert found["stages"][2]["wall_hours"] is None
    assert "without fit captions" in made.words()
    assert made.table()[-1][2] == "4 to 8 GPU h + 1 CPU process h"


def test_what_is_done_in_a_row_takes_as_many_times_as_long() -> None:
    asked = EstimateConfig(gpus=100, node_start_s=100, load_s=20, preemptions_per_gpu_hour=0)
    once = timed([replace(KNOWN, hours=(1.0, 1.0), tasks=1)], asked).total("wall_hours")
    three = timed([replace(KNOWN, hours=(3.0, 3.0), tasks=1, times=3)], asked).total("wall_hours")
    assert once is not None
    assert three == pytest.approx([3 * once[0]] * 2)


def test_a_training_over_workers_holds_them_all() -> None:
    """Two trainings of 8 GPUs on 8: one after the other, an eighth of their hours each."""
    made = timed([replace(KNOWN, hours=(16.0, 16.0), tasks=2, width=8)], EstimateConfig(gpus=8, gpu_hour_usd=1, **CALM))
    assert made.total("wall_hours") == pytest.approx([2, 2], rel=0.01)
    assert made.total("cost_usd") == pytest.approx([16, 16], rel=0.01)


def test_one_long_task_that_saves_nothing_may_never_end() -> None:
    asked = EstimateConfig(preemptions_per_gpu_hour=1, gpu_hour_usd=1)
    endless = timed([replace(KNOWN, hours=(100.0, 100.0), tasks=1)], asked)
    saving = timed([replace(KNOWN, hours=(100.0, 100.0), tasks=1, saves=1000)], asked)

    assert endless.total("wall_hours") == (math.inf, math.inf)
    assert "never ends h" in endless.table()[0][3]
    assert endless.to_json()["totals"]["wall_hours"] == [None, None]
    assert 100 < (saving.total("wall_hours") or (0,))[0] < 130


def test_hours_of_arithmetic_are_an_interval_with_its_source() -> None:
    hours, words = shares_of(3600 * 312.0, EstimateConfig(), (312.0, "an A100"), "training_share")
    assert hours == pytest.approx((1 / 0.4, 1 / 0.1))
    assert words == ("1,123 PFLOP counted, at 10 to 40 % (estimate.training_share, an assumption) of 312 TFLOP/s (an "
                     "A100)")
