from __future__ import annotations

from typing import Any

import pytest

from rayexpand import api
from tests.commands import rayexpand


def test_the_table_of_the_demo_has_error_and_n_of_every_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    arm = {"accuracies": [0.5, 0.6, 0.7], "mean": 0.6, "se": 0.0577}
    found: dict[str, Any] = {
        "arms": {"original": arm}, "control_arms": {"original repeated": arm}, "fit_cpu_seconds": {},
        "controls": {"guide zero-shot": 0.966, "original repeated": 0.6}, "gain": 0.1, "gain_se": 0.02, "note": "",
        "samples": "", "report": ""}
    monkeypatch.setattr(api, "demo", lambda *_, **__: found)
    lines = [line.split() for line in rayexpand("demo").stdout.splitlines()]
    assert ["original", "60.0", "±", "5.8", "3"] in lines
    assert ["control:", "original", "repeated", "60.0", "±", "5.8", "3"] in lines
    assert ["control:", "guide", "zero-shot", "96.6"] in lines
    assert sum("repeated" in line for line in lines) == 1
