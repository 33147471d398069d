"""What is counted of the progress of a verb."""

from __future__ import annotations

from typing import Any

import pytest

from rayexpand.contract import metrics
from rayexpand.contract.metrics import ETA, WORK, Meter


def test_a_task_that_begins_again_has_no_time_left_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[Any, float]] = []
    now = 0.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    monkeypatch.setattr(metrics, "record", lambda metric, value, **labels: said.append((metric, value)))
    meter = Meter("fit")
    for seconds, done, total in ((0.0, 64, 150), (10.0, 150, 150), (20.0, 32, 140), (30.0, 140, 140)):
        now = seconds
        meter("latents", done, total)

    assert [value for metric, value in said if metric is ETA] == [0, 0]
    assert [value for metric, value in said if metric is WORK] == [0, 86, 0, 108]
