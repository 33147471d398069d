"""LECF: which sentence a sample gets, and that everything else is plain sampling."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.data.seeds import build_index
from rayexpand.methods.img2img import Img2Img
from rayexpand.methods.lecf import Lecf
from rayexpand.methods.text2img import Text2Img
from rayexpand.runs.config import load, parse, resolved
from rayexpand.runs.plan import make_plan, plan_digest
from tests.commands import ROOT
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.test_contract import index_of

ROWS = [("s", 0, 0), ("s", 0, 1), ("t", 1, 0)]
LISTS = {"3": ["a three on a wall", "three {curly} sheep"], "7": ["a lucky seven"], "*": ["one {metaclass}, {name}"]}


def prompt_of(method, seed_id, label, copy=0):
    return method.draw(seed_id, label, copy, 0, CLASSES, RowRng(0, "lecf", seed_id, copy)).prompt


def test_each_sample_gets_one_sentence_of_its_class():
    method = Lecf(prompts=LISTS)
    seen = [prompt_of(method, f"s{i}", 0) for i in range(400)]

    assert {one: round(seen.count(one) / 400, 1) for one in seen} == dict.fromkeys(LISTS["3"], 0.5)
    assert any(a != b for a, b in pairwise(prompt_of(method, "s", 0, copy) for copy in range(8))), "copies differ"
    assert prompt_of(method, "t", 1) == "a lucky seven"
    assert prompt_of(method, "u", 2) == "one shoe, rain boot", "a template, for a class without a list"


@pytest.mark.parametrize(("strength", "plain"), [(None, Text2Img(prompt="", steps=4)),
                                                 (0.75, Img2Img(prompt="", strength=0.75, steps=4))])
def test_with_one_sentence_it_is_plain_sampling(tools, strength, plain):
    """Same run seed, seeds and copies under the plain method's name: the same streams, bit for bit."""
    method = Lecf(prompts={"*": ["a photo of a {name}"]}, strength=strength, steps=4)
    mine = batch_of(method, CLASSES, ROWS)
    theirs = replace(batch_of(plain, CLASSES, ROWS), rngs=mine.rngs, images=mine.images)
    theirs = replace(theirs, draws=tuple(replace(draw, prompt=one.prompt) for draw, one in zip(
        theirs.draws, mine.draws, strict=True)))

    assert mine.draws == theirs.draws
    for image, same in zip(method.expand(mine, tools).images, plain.expand(theirs, tools).images, strict=True):
        np.testing.assert_array_equal(image, same)


def test_a_class_without_a_sentence_is_named_before_anything_is_made():
    index = index_of([0, 0, 1, 2, 2])
    lists = {"3": ["a"], "boots": ["b"]}

    with pytest.raises(UsageError, match=r"2 of 3 classes, such as 7, boot"):
        Lecf(prompts=lists).copies(index, PlanRng(0, "lecf"))
    with pytest.raises(UsageError, match="did you mean 'boots' by 'boot'"):
        Lecf(prompts={**lists, "7": ["c"]}).copies(index, PlanRng(0, "lecf"))
    assert Lecf(prompts={**lists, "*": ["c"]}).copies(index, PlanRng(0, "lecf")).tolist() == [5] * 5


@pytest.mark.parametrize(("value", "words"), [
    ({}, "has no class"), ({"a": []}, "'a' has no prompt"), ({"a": ["x", " "]}, "or an empty one"),
    ({"*": ["{nam}"]}, "unknown placeholder"), ({"a": "x"}, "tuple"), ("gone.json", "cannot be read"),
    ("list.json", "holds a list"), ("bad.json", "is not JSON")])
def test_lists_that_cannot_be_used(tmp_path, monkeypatch, value, words):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.json").write_text("{")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValidationError, match=words):
        Lecf(prompts=value)


def test_no_step_at_all_is_refused():
    with pytest.raises(ValidationError, match="step"):
        Lecf(strength=0.01, steps=10)


def test_the_job_of_this_package():
    config = load(str(ROOT / "jobs/digits/expand-lecf.yaml"))
    assert isinstance(config.method, Lecf)


def test_a_file_is_read_once_and_is_part_of_the_run(tmp_path, image_folder):
    """What is in run.json makes the same plan when the file is gone; other sentences are another plan."""
    file = tmp_path / "prompts.json"
    lists = {key: [f"the {key} {i}" for i in range(5)] for key in ("ant", "bee", "cat", "dog")}
    file.write_text(json.dumps(lists))
    raw = {"name": "x", "data": {"source": "imagefolder", "path": str(image_folder)},
           "method": {"name": "lecf", "ratio": 2, "prompts": str(file)}}
    config = parse(raw)
    index = build_index(config.data)
    plan = make_plan(index, config)
    file.write_text(json.dumps({**lists, "ant": ["another"]}))
    other = make_plan(index, parse(raw))
    file.unlink()
    again = make_plan(index, parse(json.loads(json.dumps(resolved(config)))))

    assert plan_digest(again) == plan_digest(plan) != plan_digest(other)
    assert again.units(0) == plan.units(0)
    prompts = [draw.prompt for unit in plan.units(0) for draw in unit]
    assert len(set(prompts)) > 10
    assert all(draw.prompt.split()[1] == draw.seed_id.split("/")[0] for unit in plan.units(0) for draw in unit)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "prompts.json").write_text(json.dumps(lists))
    assert Lecf(prompts=str(folder)) == Lecf(prompts=lists)
    with pytest.raises(ConfigError, match=r"method\.prompts: .*cannot be read"):
        parse(raw)
