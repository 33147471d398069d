"""Which verb a file is for, and that `validate` checks each kind."""

from __future__ import annotations

import pytest
import yaml

from rayexpand.contract.errors import ConfigError
from rayexpand.jobs import checked, verb_of
from tests.commands import ROOT

VERBS = {"expand": "expand", "study": "train", "sweep": "sweep", "fit": "fit", "pretrain": "fit", "select": "select",
         "evaluate": "evaluate"}


def test_the_verb_of_every_job() -> None:
    found = {path: verb_of(path) for path in (ROOT / "jobs").rglob("*.yaml")}
    assert found
    assert found == {path: VERBS[path.name.split("-")[0].removesuffix(".yaml")] for path in found}


@pytest.mark.parametrize("name", ["expand-img2img", "study", "sweep-img2img", "fit-distdiff"])
def test_a_sound_file_has_no_problems_and_all_its_fields(name: str) -> None:
    fields, problems = checked(str(ROOT / f"jobs/digits/{name}.yaml"))

    assert problems == []
    assert fields["name"]
    assert len(fields) > len(yaml.safe_load((ROOT / f"jobs/digits/{name}.yaml").read_text()))


@pytest.mark.parametrize(("name", "change", "words"), [
    ("expand-img2img", "method.strenth=1", "did you mean 'strength'"), ("study", "armz=[]", "did you mean 'arms'"),
    ("sweep-img2img", "sampels=3", "did you mean 'samples'"), ("fit-distdiff", "fit.prototyps={}", "prototypes"),
    ("select-random", "rul=1", "did you mean 'rule'"), ("evaluate-img2img", "metrcs=[]", "did you mean 'metrics'")])
def test_a_mistake_in_any_kind_of_file_is_found(name: str, change: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked(str(ROOT / f"jobs/digits/{name}.yaml"), [change])


@pytest.mark.parametrize(("name", "change"), [("study", "test.path"), ("sweep-img2img", "study.test.path"),
                                              ("fit-distdiff", "data.path"), ("expand-img2img", "data.path")])
def test_a_dataset_that_is_not_there_is_a_problem(name: str, change: str) -> None:
    section = change.rpartition(".")[0]
    _, problems = checked(str(ROOT / f"jobs/digits/{name}.yaml"),
                          [f"{section}={{source: imagefolder, path: nowhere}}"])
    assert any(f"{section.removeprefix('study.')}.path" in one for one in problems)
