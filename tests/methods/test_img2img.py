"""img2img against the diffusers pipeline on the same noise, its limits, and its settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionImg2ImgPipeline, UniPCMultistepScheduler
from pydantic import ValidationError

from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.diffusion import sampling
from rayexpand.methods.img2img import Img2Img
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.prior import load_prior
from tests.diffusion.gaussian import GaussianPrior, point_at, sd_scheduler
from tests.methods.fakes import batch_of
from tests.tiny import tiny_pipeline

CLASSES = ClassTable.of(["n01", "n02"], ["great_auk", "crane"], [2, 2], ["bird", ""], ["auk", "crane"])
ROWS = [("a", 0, 0), ("b", 1, 0), ("a", 0, 1)]


def prompt(template, label=0):
    return Img2Img(prompt=template).draw("s", label, 0, 0, CLASSES, RowRng(0, "img2img", "s", 0)).prompt


def test_prompts():
    assert prompt("a photo of a {name}.") == "a photo of a great auk."
    assert prompt("{name}, a {metaclass}, {noun}; {{raw}}") == "great auk, a bird, auk; {raw}"
    assert prompt("") == ""
    assert prompt("{token} {metaclass}: {caption}, {{caption}}") == "<class_0> bird: {caption}, {caption}"
    assert Img2Img(prompt="a {name}").needs() == {"prior"}
    assert Img2Img(prompt="a {token}, {caption}").needs() == {"prior", "adapter", "captions"}
    with pytest.raises(UsageError, match=r"asks for \{metaclass\}, which class 'n02' does not have"):
        prompt("a {metaclass}", label=1)


@pytest.mark.parametrize(("template", "message"), [
    ("a {nmae}", r"unknown placeholder \{nmae\}; known are \{name\}"), ("a {}", r"unknown placeholder \{\}"),
    ("a {name", "write a literal brace twice"), ("{name:>8}", "no ':'"), ("{name!r}", "no ':'"),
    ("{name.__class__}", "unknown placeholder"), ("{0}", "unknown placeholder")])
def test_broken_templates_are_refused(template, message):
    with pytest.raises(ValidationError, match=message):
        Img2Img(prompt=template)


@pytest.mark.parametrize("fields", [{"strength": 0.01}, {"strength": 0.0}, {"strength": 1.1}, {"steps": 0},
                                    {"ratio": 0}, {"solver": "euler"}, {"spacing": "sigmoid"}, {"quota": 0}])
def test_settings_that_cannot_work_are_refused(fields):
    with pytest.raises(ValidationError):
        Img2Img(**fields)


def test_a_run_without_steps_names_both_fields():
    with pytest.raises(ValidationError, match=r"strength 0\.01 \* steps 50 .* steps to 100"):
        Img2Img(strength=0.01)


def test_draws_record_what_is_executed():
    draw = Img2Img(strength=0.75, steps=30, negative="blurry").draw("s", 1, 2, 9, CLASSES, RowRng(0, "m", "s", 2))
    assert (draw.strength, draw.steps_run, draw.negative, draw.sample_id) == (0.75, 22, "blurry", "s/2")


def test_expand_is_the_textbook_loop_on_the_keyed_noise():
    prior = GaussianPrior(sd_scheduler())
    method = Img2Img(prompt="", steps=20, strength=0.5)
    batch = batch_of(method, CLASSES, ROWS)
    made = method.expand(batch, Tools(CLASSES, prior=prior))
    assert prior.timesteps == [451 - 50 * k for k in range(10)]
    reference = sd_scheduler()
    reference.set_timesteps(20)
    x_BCHW = torch.stack([torch.from_numpy(image).permute(2, 0, 1) / 255 for image in batch.images])
    posterior = torch.stack([torch.from_numpy(rng.normals("posterior", (3, 16, 16))) for rng in batch.rngs])
    noise = torch.stack([torch.from_numpy(rng.normals("noise", (3, 16, 16))) for rng in batch.rngs])
    z = reference.add_noise(x_BCHW + 0.01 * posterior, noise, reference.timesteps[10:11])
    cond = prior.embed([""] * 3, [""] * 3, 7.5)
    for t in reference.timesteps[10:]:
        z = reference.step(prior.predict(z, point_at(reference, int(t)), cond).noise, t, z).prev_sample
    expected, _ = sampling.to_images(z)
    for image, wanted in zip(made.images, expected, strict=True):
        assert np.abs(image.astype(int) - wanted.astype(int)).max() <= 1


PIPELINE = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
@pytest.mark.fast_cases(2)
def test_images_are_those_of_the_diffusers_pipeline(tmp_path, monkeypatch, prediction_type, solver):
    folder = tiny_pipeline(tmp_path, prediction_type=prediction_type)
    prior = load_prior(str(folder), device="cpu")
    method = Img2Img(solver=solver, steps=10, strength=0.75, negative="blurry", guidance_scale=3.0)
    batch = batch_of(method, CLASSES, ROWS)
    ours = method.expand(batch, Tools(CLASSES, prior=prior)).images
    with quiet_libraries():
        pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if solver != "ddim":
        cls, pinned = {"dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
                       "unipc": (UniPCMultistepScheduler, {})}[solver]
        pipe.scheduler = cls.from_config(pipe.scheduler.config, timestep_spacing="linspace", **pinned)
    noise_BCHW = sampling.noise_batch(prior, batch)
    monkeypatch.setattr(f"{PIPELINE}.randn_tensor", lambda *shape, **_: noise_BCHW)
    theirs = pipe([d.prompt for d in batch.draws], sampling.encode_batch(prior, batch), strength=0.75,
                  num_inference_steps=10, guidance_scale=3.0, negative_prompt=["blurry"] * 3, output_type="np").images
    for image, wanted in zip(ours, theirs, strict=True):
        assert np.abs(image - wanted * 255).max() <= 0.51


def test_a_weaker_run_stays_nearer_to_its_seed():
    prior = GaussianPrior(sd_scheduler(), mean=0.5, std=0.1)

    def distance(strength):
        method = Img2Img(prompt="", steps=50, strength=strength, ratio=1)
        batch = batch_of(method, CLASSES, ROWS)
        images = method.expand(batch, Tools(CLASSES, prior=prior)).images
        return float(np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(images, batch.images, strict=True)]))

    assert distance(0.1) < distance(0.3) < distance(0.6)


def test_the_prompt_reaches_the_prior_and_an_empty_one_is_the_control():
    prior = GaussianPrior(sd_scheduler())

    def brightness(template):
        method = Img2Img(prompt=template, steps=10, strength=1.0)
        return np.mean(method.expand(batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior=prior)).images)

    assert brightness("x") > brightness("") + 50
