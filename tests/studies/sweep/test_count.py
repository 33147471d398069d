"""What a sweep says of itself before it starts, and that it is what it then does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayexpand import api
from rayexpand.contract.errors import ConfigError
from rayexpand.studies.sweep.config import SweepConfig, parse_sweep
from rayexpand.studies.sweep.count import count_of
from rayexpand.studies.sweep.search import Search
from rayexpand.studies.sweep.sweep import open_sweep

MAGNITUDE, BINS = "expansions.noisy.method.magnitude", "expansions.noisy.method.bins"
LR, POLICY = "recipe.lr", "expansions.noisy.method.policy"


def sweep(**sections: Any) -> SweepConfig:
    """Two repetitions of two digits a class, RandAugment, six learning rates by two magnitudes."""
    raw: dict[str, Any] = {
        "name": "counted", "arm": "noisy", "search": "grid", "hold_out": 5,
        "space": {LR: {"choice": [0.1, 0.05, 0.02, 0.01, 0.005, 0.002]}, MAGNITUDE: {"choice": [3, 9]}},
        "study": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"}, "seeds": [0, 1],
                  "subset": {"kind": "per_class", "n": 2}, "recipe": {"preset": "digits", "updates": 4, "epochs": 2},
                  "expansions": {"noisy": {"method": {"name": "classical", "policy": "randaugment", "ratio": 1}}},
                  "arms": [{"name": "original"}, {"name": "noisy", "use": "noisy"}]}}
    return parse_sweep({**raw, **sections})


def test_trials_that_differ_in_training_share_their_expansions() -> None:
    found = count_of(sweep())

    assert (found.asked, found.points, found.trials, found.classifiers) == (12, 12, 12, 24)
    assert (found.expansions, found.uses, found.again) == (4, 24, 3)
    assert found.sentence == ("12 trials; 24 classifiers (2 seeds each) and 3 of the best once more; 4 expansions, "
                              "used 24 times")


@pytest.mark.parametrize(("changes", "expansions"), [
    ({"subset": {"kind": "full"}}, 1), ({"subset": {"kind": "per_class", "n": 2, "seed": 7}}, 1),
    ({"vary": "classifier"}, 1), ({"subset": {"kind": "full"}, "resample": True}, 2), ({"seeds": [0, 1, 2]}, 3)])
def test_repetitions_with_the_same_images_share_an_expansion(changes: dict[str, Any], expansions: int) -> None:
    study = {**sweep().study, **changes}
    assert count_of(sweep(study=study, space={LR: {"choice": [0.1, 0.2]}})).expansions == expansions


def test_a_random_search_smaller_than_its_space_says_so() -> None:
    found = count_of(sweep(search="random", samples=5, seed=2))

    assert found.trials < 12
    assert f"{found.trials} trials (of the 12 points of the space" in found.sentence


def test_more_asked_for_than_there_is_says_what_is_equal() -> None:
    found = count_of(sweep(search="random", samples=30, space={LR: {"choice": [0.1, 0.2]}}))
    assert "2 trials (28 of 30 asked for are equal to another)" in found.sentence


def test_optuna_is_counted_from_above() -> None:
    found = count_of(sweep(search="optuna", samples=20))
    assert (found.is_exact, found.trials, found.expansions) == (False, 12, 24)
    assert found.sentence.startswith("at most 12 trials; at most 24 classifiers")
    trained = count_of(sweep(search="optuna", samples=20, space={LR: {"loguniform": [0.001, 0.1]}}))
    assert (trained.trials, trained.points, trained.expansions) == (20, None, 2), "the learning rate expands nothing"


def test_a_grid_says_its_size_where_fewer_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"this space has 12; take samples out, or .* tries 5 of"):
        sweep(samples=5)


def test_values_that_do_not_go_together_are_counted_and_named_before_it_starts() -> None:
    found = count_of(sweep(space={MAGNITUDE: {"choice": [3, 20]}, BINS: {"choice": [31, 15]}}))

    assert (found.trials, len(found.refused)) == (3, 1)
    assert "3 trials (of the 4 points of the space, 1 cannot be)" in found.sentence
    assert found.lines() == [f"cannot be: {found.refused[0]}"]
    assert "magnitude 20 must be below bins 15" in found.refused[0]


def test_validate_and_sweep_say_it_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    raw = {**sweep().model_dump(mode="json"), "out": str(tmp_path)}
    said: list[str] = []

    def opened(*_: Any) -> None:
        raise KeyboardInterrupt(" ".join(said))

    monkeypatch.setattr("rayexpand.studies.sweep.sweep.open_sweep", opened)
    counted, costs = api.validate(raw).counts
    assert counted == count_of(sweep()).sentence
    assert "48 epochs" in costs
    with pytest.raises(KeyboardInterrupt, match="12 trials; 24 classifiers"):
        api.sweep(raw, say=said.append)
    assert not list(tmp_path.iterdir())


# Conditions ----------------------------------------------------------------------------------------------------------


def conditional(**when: Any) -> dict[str, Any]:
    return {POLICY: {"choice": ["randaugment", "cutout"]}, MAGNITUDE: {"choice": [3, 6, 9], "when": when or {
        POLICY: "randaugment"}}}


def test_a_field_is_swept_only_where_its_condition_holds(tmp_path: Any) -> None:
    config = sweep(space=conditional(), out=str(tmp_path))
    found = count_of(config)
    tried = [one.values for one in iter(Search(open_sweep(config)).next, None)]

    assert (found.asked, found.trials, found.refused) == (6, 4, ())
    assert sorted(tried, key=json.dumps) == sorted([
        {POLICY: "cutout"}, *({POLICY: "randaugment", MAGNITUDE: n} for n in (3, 6, 9))], key=json.dumps)


def test_optuna_takes_fields_that_are_not_always_there(tmp_path: Any) -> None:
    config = sweep(space=conditional(), search="optuna", samples=15, out=str(tmp_path))
    search = Search(open_sweep(config))
    while (found := search.next()) is not None:
        assert (MAGNITUDE in found.values) == (found.values[POLICY] == "randaugment")
        search.results[found.key] = {"number": found.number, "values": found.values, "state": "finished",
                                     "curve": [{"epoch": 1, "score": 0.5}]}
        search.running.clear()
    assert {one["values"][POLICY] for one in search.results.values()} == {"randaugment", "cutout"}


def test_all_that_is_wrong_with_conditions_is_said_at_once() -> None:
    space = {"recipe.epochs": {"choice": [2, 3], "when": {"recipe.epoch": 2}},
             MAGNITUDE: {"choice": [3, 9], "when": {POLICY: "gridmusk"}},
             POLICY: {"choice": ["randaugment", "cutout"], "when": {MAGNITUDE: 3}},
             LR: {"loguniform": [0.1, 1], "when": {"recipe.updates": 3}}, "recipe.updates": {"randint": [2, 3]}}
    with pytest.raises(ConfigError) as caught:
        sweep(space=space)
    said = "\n".join(caught.value.problems)
    for line in ("space.recipe.epochs.when.recipe.epoch: is no field of the space, which alone can be asked; known: "
                 f"{MAGNITUDE}", f"space.{MAGNITUDE}.when.{POLICY}: asks in a circle",
                 f"space.{POLICY}.when.{MAGNITUDE}: asks in a circle",
                 f"space.{LR}.when.recipe.updates: recipe.updates is drawn from a range"):
        assert line in said, said
    with pytest.raises(ConfigError, match="is never 'gridmusk'; it is one of 'randaugment', 'cutout'"):
        sweep(space={MAGNITUDE: space[MAGNITUDE], POLICY: {"choice": ["randaugment", "cutout"]}})
