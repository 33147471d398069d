"""Real Guidance: img2img with the strength of its comparison, which is two steps of 25."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.methods.img2img import Img2Img
from rayexpand.methods.realguidance import RealGuidance
from tests.diffusion.gaussian import GaussianPrior, sd_scheduler
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of

ROWS = [("a", 0, 0), ("b", 2, 0), ("a", 0, 1)]


@pytest.mark.parametrize(("strength", "run", "first"), [(0.1, 2, 80), (0.5, 12, 480)])
def test_it_runs_two_steps_within_the_class(strength, run, first):
    prior = GaussianPrior(sd_scheduler())
    method = RealGuidance() if strength == 0.1 else RealGuidance(strength=strength)
    batch = batch_of(method, CLASSES, ROWS)
    assert {(d.strength, d.steps_run) for d in batch.draws} == {(strength, run)}
    assert [d.prompt for d in batch.draws[:2]] == ["a photo of a three digit", "a photo of a rain boot shoe"]
    assert all(d.source_label == d.target_label for d in batch.draws)
    method.expand(batch, Tools(CLASSES, prior=prior))
    assert (len(prior.timesteps), prior.timesteps[0]) == (run, first)


def test_it_is_img2img_with_other_defaults():
    method = RealGuidance()
    assert method.needs() == {"prior"}
    assert (method.steps, method.solver, method.guidance_scale, method.ratio) == (25, "dpmpp_2m", 7.5, 5)
    assert RealGuidance.model_fields.keys() == Img2Img.model_fields.keys()
    own = method.draw("s", 1, 0, 0, CLASSES, RowRng(0, "realguidance", "s", 0))
    plain = Img2Img(**method.model_dump(exclude={"name"})).draw("s", 1, 0, 0, CLASSES, RowRng(0, "img2img", "s", 0))
    assert own == plain
    np.testing.assert_array_equal(method.soft_label(np.array([0]), np.array([2]), np.array([0.1]), 3), [[0, 0, 1]])


def test_a_strength_without_a_step_is_refused():
    with pytest.raises(ValidationError, match=r"strength 0\.1 \* steps 4 .* steps to 10"):
        RealGuidance(steps=4)
