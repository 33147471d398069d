"""What a sweep says of itself before it starts, against what it then does."""

from __future__ import annotations

from typing import Any

import pytest

from rayexpand import api
from rayexpand.contract.errors import ConfigError
from rayexpand.studies.sweep.config import AshaConfig, parse_sweep
from rayexpand.studies.sweep.plan import SweepPlan, asha_epochs, plan_sweep
from rayexpand.studies.sweep.search import Search, run_here
from rayexpand.studies.sweep.sweep import open_sweep
from tests.studies.sweep.test_sweep import LR, STRENGTH, raw  # noqa: F401  (a fixture)

Raw = dict[str, Any]


def plan(raw: Raw, **sections: Any) -> SweepPlan:  # noqa: F811
    return plan_sweep(parse_sweep({**raw, **sections}))


@pytest.mark.parametrize(("changes", "trials", "pilots"), [
    ({}, 2, 1),
    ({"space": {LR: {"grid": [0.01, 0.001, 0.1]}, STRENGTH: {"grid": [5, 9]}}, "search": "grid", "samples": None},
     6, 2),
    ({"space": {STRENGTH: {"choice": [5, 9]}}, "samples": 6}, 2, 2)])
def test_trials_and_pilots_are_those_that_are_tried(raw: Raw, changes: Raw, trials: int, pilots: int) -> None:  # noqa: F811
    found = plan(raw, **changes)
    assert (found.count.trials, found.count.expansions) == (trials, pilots)
    assert found.epochs == 2 * trials
    stages = {one.stage.name: one.stage for one in found.costs.stages}
    assert stages["pilots"].tasks == pilots
    assert stages["trials"].tasks == trials

    search, tried = Search(open_sweep(parse_sweep({**raw, **changes}))), 0
    while search.next() is not None:
        tried += 1
    assert tried == trials
    assert search.total == found.count.asked


def test_trials_that_are_done_cost_nothing(raw: Raw) -> None:  # noqa: F811
    config = parse_sweep(raw)
    run_here(Search(open_sweep(config)))
    found = plan_sweep(config)
    assert (found.count.trials, found.done) == (2, 2)
    assert "; 2 trials are done; " in found.sentence


def test_asha_by_hand() -> None:
    """Rungs after 1 and 3 of 9 epochs, a third goes on. In the best order all but the first are stopped at once, in the
    worst none is."""
    scheduler = AshaConfig(grace=1, reduction_factor=3)
    assert asha_epochs(scheduler, 9, list(range(9))) == 9 + 8 * 1
    assert asha_epochs(scheduler, 9, list(reversed(range(9)))) == 9 * 9
    assert asha_epochs(scheduler, 9, [1, 0, 2]) == 9 + 9 + 1


def test_asha_is_an_interval_from_the_rule_to_nobody_stopped(raw: Raw) -> None:  # noqa: F811
    study = {**raw["study"], "recipe": {**raw["study"]["recipe"], "epochs": 9, "updates": 90}}
    found = plan(raw, study=study, scheduler={"asha": {"grace": 1, "reduction_factor": 3}}, samples=27,
                 space={LR: {"loguniform": [0.001, 0.1]}})
    assert found.count.trials == 27
    assert found.with_asha is not None
    least, most = found.with_asha
    assert most == found.epochs == 27 * 9
    assert 27 < least < 0.8 * most
    assert f"243 epochs, {least} to 243 with ASHA" in found.sentence


@pytest.mark.slow
def test_a_large_sweep_of_imagenet_without_the_data(raw: Raw) -> None:  # noqa: F811
    data = {"source": "imagefolder", "path": "not/here"}
    study = {**raw["study"], "data": data, "test": data, "validation": data, "subset": {"kind": "full"},
             "recipe": {"preset": "realfake/in100"}}
    study["expansions"] = {"noisy": {
        "method": {"name": "img2img", "ratio": 1, "prompt": "a {name}"}, "image": {"size": 512},
        "prior": {"weights": "stable-diffusion-v1-5/stable-diffusion-v1-5@main", "dtype": "bfloat16"}}}
    told = {"seeds": 126_000, "classes": 100, "tests": 5000, "gpu_hour_usd": 2}
    found = plan({name: one for name, one in raw.items() if name != "hold_out"}, study=study, samples=5, estimate=told,
                 space={"expansions.noisy.method.strength": {"uniform": [0.3, 0.9]}})
    plain = plan({name: one for name, one in raw.items() if name != "hold_out"}, study={**study, "estimate": told},
                 samples=5, space={"expansions.noisy.method.strength": {"uniform": [0.3, 0.9]}})

    assert (found.count.trials, found.count.expansions, found.costs.unknown) == (5, 5, [])
    assert "GPU hours" in found.sentence
    assert "USD" in found.sentence
    assert plain.sentence == found.sentence, "the section of the study counts where the sweep has none"
    with pytest.raises(ConfigError, match=r"estimate\.tests"):
        plan({name: one for name, one in raw.items() if name != "hold_out"}, study=study)


def test_the_verb_says_it(raw: Raw) -> None:  # noqa: F811
    found = api.plan(raw)
    said = next(line for line in found.below() if line.startswith("sweep: "))
    assert "2 trials (2 of 4 asked for are equal to another)" in said
    assert "; 4 epochs; " in said
    assert said.endswith("without pilots (unknown)")
    assert found.to_dict()["epochs"] == {"without_asha": 4, "with_asha": None}
