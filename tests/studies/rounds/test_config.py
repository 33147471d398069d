from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayexpand import api
from rayexpand.api.files import read_job
from rayexpand.contract.errors import ConfigError
from rayexpand.studies.rounds.config import LoopConfig, parse_loop, resolved_loop
from tests.conftest import MakeConfig

RUN = {"name": "birds", "data": {"source": "digits", "per_class": 2}, "method": {"name": "classical", "ratio": 6}}


def problems(**fields: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_loop({"run": RUN, "rounds": {}, **fields})
    return raised.value.problems


def test_every_mistake_is_said_at_once() -> None:
    found = problems(run={**RUN, "seed": -1, "grow": "x"}, rounds={"rule": "los", "count": 0}, extra=1)
    assert sorted(one.partition(":")[0] for one in found) == [
        "extra", "rounds.count", "rounds.rule", "run.grow", "run.seed"]


@pytest.mark.parametrize(("rounds", "said"), [
    ({"count": 3, "shares": [1, 1]}, "shares: 2 parts for 3 rounds"), ({"shares": [1, 0, 1]}, "above 0"),
    ({"rule": "slow"}, "share: is missing"), ({"share": 0.5}, "share: has no effect"),
    ({"permuted": True}, "permuted: has no effect"), ({"guided_from": 4}, "none would be guided"),
    ({"stop": {"on": "validation"}}, "validation: is missing"), ({"guide": {}}, "guide: has no effect"),
    ({"validation": {"source": "digits", "split": "test"}}, "validation: has no effect"),
    ({"count": 1, "stop": {}}, "stop: has no effect"), ({"count": 1, "rule": "loss"}, "rule: loss reads scores"),
    ({"scores": {"folds": 3}}, "scores: has no effect"),
    ({"scores": {"recipe": {"epochs": 0}}}, "scores.recipe"),
    ({"scores": {"folds": 1}, "stop": {}}, "stop.on: folds compares")])
def test_what_rounds_cannot_mean(rounds: dict[str, Any], said: str) -> None:
    assert said in problems(rounds=rounds)[0]


@pytest.mark.parametrize(("run", "rounds", "said"), [
    ({"allocate": {"rule": "uniform"}}, {}, "run.allocate"), ({"grow": True}, {}, "run.grow"),
    ({"method": {"name": "vae", "sample": False}}, {}, "run.method"),
    ({}, {"guided_from": 2}, "rounds.guided_from: classical cannot be guided")])
def test_what_a_run_and_its_rounds_cannot_mean_together(run: dict[str, Any], rounds: dict[str, Any],
                                                        said: str) -> None:
    assert any(one.startswith(said) for one in problems(run={**RUN, **run}, rounds=rounds))


def test_a_run_may_be_the_path_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"kind": "run", **RUN}))
    config = parse_loop({"run": str(tmp_path / "run.yaml"), "rounds": {"count": 2}})
    assert config == parse_loop({"run": RUN, "rounds": {"count": 2}})
    assert config.folder == "runs/birds"


def test_what_is_written_is_read_as_the_same(make_config: MakeConfig) -> None:
    config = LoopConfig(run=make_config(ratio=2), rounds={"count": 2, "cap": 3})
    assert parse_loop(resolved_loop(config)) == config
    kind, raw, _ = read_job(config, (), {"cluster": {"actors": 2}, "device": "cpu"})
    assert (kind, raw["run"]["cluster"]["actors"], raw["run"]["prior"]["device"], raw["training"]["device"]) == (
        "loop", 2, "cpu", "cpu")


def test_a_loop_is_a_kind_of_file(tmp_path: Path) -> None:
    found = api.validate({"run": RUN, "rounds": {"count": 2}})
    assert (found.kind, found.problems) == ("loop", [])
    assert api.schema("loop")["properties"]["kind"] == {"const": "loop"}
    nowhere = {"source": "imagefolder", "path": str(tmp_path / "no")}
    wrong = api.validate({"run": {**RUN, "data": nowhere}, "rounds": {}})
    assert wrong.problems[0].startswith("run.data.path")
    with pytest.raises(ConfigError, match="not for `rayexpand train`"):
        api.train({"run": RUN, "rounds": {}})
