"""DA-Fusion: a learned word, the class kept, one of four strengths for each row; two modes are tables of defaults."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import Start
from rayexpand.methods.dafusion import DaFusion
from rayexpand.methods.diffmix import DiffMix
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.test_diffmix import index_of


def draws(method, n):
    return [method.draw(f"s{i}", i % 3, 0, i, CLASSES, RowRng(0, method.name, f"s{i}", 0)) for i in range(n)]


def test_each_row_takes_one_of_four_strengths_and_keeps_its_class():
    made = draws(DaFusion(), 1200)
    assert {(d.strength, d.steps_run) for d in made} == {(1.0, 25), (0.75, 18), (0.5, 12), (0.25, 6)}
    for strength in (1.0, 0.75, 0.5, 0.25):
        assert np.mean([d.strength == strength for d in made]) == pytest.approx(0.25, abs=0.04)
    assert all(d.source_label == d.target_label and d.start == Start.IMAGE for d in made)


@pytest.mark.parametrize(("mode", "prompt", "facts", "steps"), [
    ("joint_ti", "a photo of a <class_2> shoe", (5, 25, "dpmpp_2m", 7.5), {6, 12, 18, 25}),
    ("per_class", "a photo of a <class_2>", (10, 50, "ddim", 7.5), {12, 25, 37, 50})])
def test_a_mode_is_a_table_of_defaults(mode, prompt, facts, steps):
    method = DaFusion(mode=mode)
    assert method.draw("s", 2, 0, 0, CLASSES, RowRng(0, "dafusion", "s", 0)).prompt == prompt
    assert (method.ratio, method.steps, method.solver, method.guidance_scale) == facts
    assert {d.steps_run for d in draws(method, 60)} == steps
    assert method.needs() == {"prior", "adapter"}
    assert method.copies(index_of([3, 2, 1]), PlanRng(0, "dafusion")).tolist() == [facts[0]] * 6
    given = DaFusion(mode=mode, ratio=2, steps=20, prompt="{token}", solver="unipc")
    assert (given.ratio, given.steps, given.prompt, given.solver) == (2, 20, "{token}", "unipc")


def test_labels_are_hard_and_quotas_exact():
    np.testing.assert_array_equal(DaFusion().soft_label(np.array([0]), np.array([2]), np.array([0.5]), 3), [[0, 0, 1]])
    copies = DaFusion(quota=4).copies(index_of([3, 2, 1]), PlanRng(0, "dafusion"))
    assert (copies[:3].sum(), copies[3:5].sum(), copies[5]) == (4, 4, 4)


def test_samples_are_those_of_diff_aug(tools):
    """Only the name differs, which keys the noise."""
    fields = {"steps": 4, "strengths": [0.5], "prompt": "a photo of a {token}"}
    ours, theirs = DaFusion(**fields), DiffMix(variant="diff_aug", **fields)
    rows = [("a", 0, 0), ("b", 1, 0)]
    same = theirs.model_copy(update={"name": "dafusion"})
    np.testing.assert_array_equal(ours.expand(batch_of(ours, CLASSES, rows), tools).images,
                                  theirs.expand(batch_of(same, CLASSES, rows), tools).images)


@pytest.mark.parametrize(("fields", "words"), [
    ({"mode": "both"}, "per_class"), ({"strengths": []}, "at least one"), ({"strengths": [0.0]}, "greater than"),
    ({"strengths": [0.5, 0.01]}, "runs no step"), ({"targets": "fill"}, "extra"), ({"solver": "plms"}, "ddim")])
def test_settings_that_cannot_work_are_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        DaFusion(**fields)
