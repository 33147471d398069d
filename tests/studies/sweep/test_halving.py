"""ASHA's rule, against that of Ray Tune."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler

from rayexpand.studies.sweep.config import AshaConfig
from rayexpand.studies.sweep.halving import Halving


@pytest.mark.parametrize(("grace", "factor", "epochs"), [(1, 3, 30), (2, 2, 8), (4, 4, 4), (1, 1.5, 12), (3, 2, 100)])
def test_it_stops_what_ray_tune_stops(grace: int, factor: float, epochs: int) -> None:
    theirs = ASHAScheduler("epoch", "score", "max", max_t=epochs, grace_period=grace,
                                      reduction_factor=factor)
    ours = Halving(AshaConfig(grace=grace, reduction_factor=factor), epochs)
    rng, nobody = np.random.default_rng(1), None
    running: dict[str, int] = {str(n): 0 for n in range(40)}
    trials: dict[str, Any] = {key: SimpleNamespace(trial_id=key) for key in running}
    for trial in trials.values():
        theirs.on_trial_add(nobody, trial)
    stopped = 0
    while running:
        key = str(rng.choice(list(running)))  # in any order
        running[key] += 1
        epoch, score = running[key], float(rng.normal())
        if epoch == epochs:
            del running[key]  # Tune's stops it there in any case
            continue
        goes_on = ours.goes_on(key, epoch, score)
        assert goes_on is (theirs.on_trial_result(nobody, trials[key], {"epoch": epoch, "score": score}) == "CONTINUE")
        if not goes_on:
            stopped += 1
            del running[key]
    assert stopped > 10 or grace == epochs


def test_a_trial_is_asked_once_at_each_rung() -> None:
    halving = Halving(AshaConfig(grace=2, reduction_factor=2), 8)
    assert [halving.goes_on("a", epoch, 0.5) for epoch in (1, 2, 2, 3, 4)] == [True] * 5
    assert halving.goes_on("b", 1, 0.0), "before the first rung nobody is stopped"
    assert not halving.goes_on("b", 2, 0.4)
    assert halving.goes_on("b", 2, 0.0), "a process that was restarted reports again what was decided"
