"""text2img: pure noise, the whole grid, no look at the seed image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable, Start
from rayexpand.methods.text2img import Text2Img
from tests.diffusion.gaussian import GaussianPrior, sd_scheduler
from tests.methods.fakes import batch_of

CLASSES = ClassTable.of(["a", "b"])
ROWS = [("s", 0, 0), ("s", 0, 1), ("t", 1, 0)]


class NoEncoder(GaussianPrior):
    def encode(self, x_BCHW, noise):
        raise AssertionError("text2img has no seed image")


@pytest.mark.parametrize(("solver", "first"), [("ddim", 951), ("dpmpp_2m", 999), ("unipc", 999)])
def test_the_whole_grid_runs_from_noise_without_the_encoder(solver, first):
    prior = NoEncoder(sd_scheduler())
    method = Text2Img(prompt="", steps=20, solver=solver)
    batch = batch_of(method, CLASSES, ROWS)
    assert {(d.start, d.strength, d.steps_run) for d in batch.draws} == {(Start.NOISE, 1.0, 20)}
    images = method.expand(batch, Tools(CLASSES, prior=prior)).images
    assert len(prior.timesteps) == 20
    assert prior.timesteps[0] == first
    grey = replace(batch, images=(np.full((16, 16, 3), 128, np.uint8),) * 3)
    for image, same in zip(images, method.expand(grey, Tools(CLASSES, prior=prior)).images, strict=True):
        np.testing.assert_array_equal(image, same)
    assert not np.array_equal(images[0], images[1])


def test_samples_follow_the_distribution_of_the_prior():
    method = Text2Img(prompt="", steps=50)
    batch = batch_of(method, CLASSES, [(f"s{i}", 0, 0) for i in range(8)])
    pixels = np.stack(method.expand(batch, Tools(CLASSES, prior=GaussianPrior(sd_scheduler(), 0.5, 0.1))).images) / 255
    assert pixels.mean() == pytest.approx(0.5, abs=0.02)
    assert pixels.std() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize(("preset", "prompt", "needs"), [
    ("fakeit", "rain boot, shoe", {"prior"}), ("cip", "a photo of a rain boot, {caption}", {"prior", "captions"})])
def test_presets_fill_what_is_not_given(preset, prompt, needs):
    table = ClassTable.of(["n1"], ["rain_boot"], [2], ["shoe"])
    method = Text2Img(preset=preset)
    assert method.draw("s", 0, 0, 0, table, RowRng(0, "text2img", "s", 0)).prompt == prompt
    assert (method.ratio, method.guidance_scale, method.steps, method.needs()) == (1, 2.0, 50, needs)
    given = Text2Img(preset=preset, guidance_scale=7.5, prompt="{name}")
    assert (given.guidance_scale, given.prompt, given.steps, given.ratio) == (7.5, "{name}", 50, 1)
    assert Text2Img(**given.model_dump()) == given == Text2Img.model_validate_json(given.model_dump_json())
    assert (Text2Img().ratio, Text2Img().guidance_scale, Text2Img().preset) == (5, 7.5, None)


@pytest.mark.parametrize("preset", ["fake-it", ["cip"], 3])
def test_presets_that_are_none(preset):
    with pytest.raises(ValidationError, match="fakeit"):
        Text2Img(preset=preset)


def test_strength_is_no_setting():
    with pytest.raises(ValidationError, match="strength"):
        Text2Img(strength=0.5)
