"""Every method on every family of generators: it makes images, is kept from nothing, and guidance that may not move a
latent leaves the plain method's bytes. Gradients of the guided methods against differences in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.protocols import Batch, Method, Tools
from rayexpand.diffusion import perturb, sampling
from rayexpand.diffusion.process import Point
from rayexpand.methods import load_method, method_class, names
from rayexpand.methods.practice import Practice
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.prior import inspect_prior, load_prior
from rayexpand.models.prior_sampling import sampling_notes, sampling_problems, starting_points
from rayexpand.runs.config import parse
from rayexpand.runs.run import prepare
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.references import MeanGuide
from tests.models.families import FAMILIES

REFUSED = ("ip2p", "inpaint", "refiner")
SAMPLED = [name for name in FAMILIES if name not in REFUSED]
DISTILLED = ("sdturbo", "sdxlturbo", "lightning", "hyper")  # without guidance, which their files do not say
ROWS = [("a/1.png", 0, 0), ("b", 1, 0), ("a/1.png", 0, 1)]

# Few steps, and weights as they are: fine-tuning has tests of its own.
SETTINGS: dict[str, Any] = {"steps": 4, "guide_step": 2, "lookahead": 2, "strength": 0.75, "strengths": [0.75],
                            "variant": "real_mix", "finetuned": False, "sample": True}
NEEDS_TOKENS = ("dafusion",)  # its prompt is a word that was learned
NO_PRIOR = ("classical",)
METHODS = [name for name in names() if name not in (*NEEDS_TOKENS, *NO_PRIOR)]


def method_for(name: str, family: str, **changes: Any) -> Method:
    known = method_class(name).model_fields
    scale = 1.0 if family in DISTILLED else 4.0
    own = {"prompt": "a photo of a {name}"} if name in ("realfake", "realguidance", "diffmix") else {}
    chosen = {**SETTINGS, "guidance_scale": scale, **own, **changes}
    if name == "realguidance":
        chosen["solver"] = "ddim" if family == "lcm" else "dpmpp_2m"
    if family == "lcm":
        chosen |= {"negatives": [], **({"solver": "ddim", "negative": ""} if name in ("diffmix", "realfake") else {})}
    return load_method(name, {field: value for field, value in chosen.items() if field in known})


@pytest.fixture(scope="module", params=SAMPLED)
def family(request: pytest.FixtureRequest, family_folder: Any) -> tuple[str, StableDiffusionPrior]:
    return request.param, load_prior(str(family_folder(request.param)), device="cpu")


def images_of(method: Method, batch: Batch, tools: Tools) -> list[np.ndarray]:
    made = method.expand(batch, tools)
    assert made.reasons == [None] * len(batch)
    return [image for image in made.images if image is not None]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.fast_cases(9)
def test_every_method_runs_on_every_family(name: str, family: tuple[str, StableDiffusionPrior], family_folder: Any,
                                           tools: Tools) -> None:
    kind, prior = family
    method = method_for(name, kind)
    assert sampling_problems(inspect_prior(str(family_folder(kind))), method) == []
    batch = batch_of(method, CLASSES, ROWS, size=32)
    images = images_of(method, batch, replace(tools, prior=prior))
    assert [image.shape for image in images] == [(32, 32, 3)] * 3
    assert min(image.std() for image in images) > 2
    assert not np.array_equal(images[0], images[2])  # two copies of one seed


@pytest.mark.parametrize("guided", ["distdiff", "gif"])
@pytest.mark.fast_cases(7)
def test_guidance_in_a_box_of_no_size_is_the_plain_method(guided: str, family: tuple[str, StableDiffusionPrior],
                                                          tools: Tools) -> None:
    kind, prior = family
    plain = method_for("img2img", kind)
    turned_off = {"domains": ["a photo of a"], "adjectives": [""], "rotation": 0, "flip": False,
                  "subject": "{name}."} if guided == "gif" else {}
    method = method_for(guided, kind, eps=0, **turned_off)
    batch = batch_of(plain, CLASSES, ROWS, size=32)
    draws = tuple(replace(draw, group=0) for draw in batch.draws)
    same = replace(batch, draws=draws)
    if guided == "gif":  # its copies have posterior noise of their own
        same = replace(same, rngs=tuple(_OneCopy(rng) for rng in batch.rngs))  # type: ignore[arg-type]
    with_prior = replace(tools, prior=prior)
    for image, expected in zip(images_of(method, same, with_prior), images_of(plain, batch, with_prior), strict=True):
        np.testing.assert_array_equal(image, expected)


class _OneCopy:
    """Streams of a row, of which the posterior noise of the copy is that of its seed."""

    def __init__(self, rng: Any) -> None:
        self._rng = rng

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rng, name)

    def __call__(self, stream: str) -> np.random.Generator:
        return self._rng(stream)  # type: ignore[no-any-return]

    def normals(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        return self._rng.normals("posterior" if stream == "posterior_copy" else stream, shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["sd", "sdxl", "cosxl", "sdzsnr", "sdturbo", "lcm"])
@pytest.mark.fast_cases(1)
def test_gradients_through_steps_and_decoder_are_differences_in_float64(name: str, family_folder: Any) -> None:
    """d energy / d (e, b) through two steps and the decoder, as DistDiff takes it."""
    prior = load_prior(str(family_folder(name)), device="cpu")
    for model in (prior.unet, prior.vae, prior.text_encoder, prior.text_encoder_2):
        if model is not None:
            model.to(torch.float64)
    prior.dtype = torch.float64
    prior.texts._kept.clear()
    plan = prior.schedule("ddim", 4)
    with torch.no_grad():
        cond = prior.embed(["a zero", "a seven"], ["", ""], 1.0 if name in DISTILLED else 3.0)
    z_BCHW = torch.from_numpy(np.random.default_rng(3).standard_normal((2, *prior.latent_shape(32, 32))))
    wanted = torch.from_numpy(np.random.default_rng(4).standard_normal((2, 3, 32, 32)))

    def energy(e: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        u, total = perturb.apply(z_BCHW, e, b), torch.zeros((), dtype=torch.float64)
        for here, there in plan.steps[:2]:
            p = prior.predict(u, here, cond)
            total = total + (_decoded(prior, p.clean) * wanted).sum()
            u = there.mix(*p)
        return total

    e, b = (torch.from_numpy(0.1 * np.random.default_rng(n).standard_normal((2, 4, 1, 1))).requires_grad_()
            for n in (1, 2))
    gradients = torch.autograd.grad(energy(e, b), (e, b))
    with torch.no_grad():
        for which, gradient in enumerate(gradients):
            for at in ((0, 0, 0, 0), (1, 3, 0, 0)):
                h, moved = 1e-5, [e.detach().clone(), b.detach().clone()]
                moved[which][at] += h
                above = energy(*moved)
                moved[which][at] -= 2 * h
                difference = (above - energy(*moved)) / (2 * h)
                assert float(gradient[at]) == pytest.approx(float(difference), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["sd", "cosxl", "sdzsnr", "sdturbo"])
@pytest.mark.fast_cases(1)
def test_the_gradient_of_entropy_guidance_is_that_of_differences_in_float64(
        name: str, family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """d entropy / d z_t through a network that predicts noise or v, the decoder and a classifier."""
    prior = load_prior(str(family_folder(name)), device="cpu")
    for model in (prior.unet, prior.vae, prior.text_encoder, prior.text_encoder_2):
        if model is not None:
            model.to(torch.float64)
    prior.dtype = torch.float64
    prior.texts._kept.clear()
    monkeypatch.setattr(prior, "decode", lambda z, cond: _decoded(prior, z), raising=False)
    method = Practice(guidance_scale=1.0 if name in DISTILLED else 3.0)
    batch = batch_of(method, CLASSES, ROWS, size=32)
    tools, here = Tools(CLASSES, prior, MeanGuide(scale=9.0)), prior.schedule("ddim", 4).points[1]
    z_BCHW = torch.from_numpy(np.random.default_rng(3).standard_normal((3, *prior.latent_shape(32, 32))))
    with torch.no_grad():
        cond = sampling.embed_batch(prior, batch, method.guidance_scale)
        h_B, g_BCHW, _ = method._gradient(batch, tools, z_BCHW, here, cond)
        for at in ((0, 0, 0, 0), (1, 3, 2, 5), (2, 1, 15, 15)):
            moved = z_BCHW.repeat(2, 1, 1, 1).unflatten(0, (2, 3))
            moved[(0, *at)] += 1e-5
            moved[(1, *at)] -= 1e-5
            above, below = (method._gradient(batch, tools, one, here, cond)[0][at[0]] for one in moved)
            assert float(g_BCHW[at]) == pytest.approx(float(above - below) / 2e-5, rel=2e-5, abs=1e-9)
    assert float(g_BCHW.abs().max()) > 1e-5
    assert (h_B > 0.1).all()


def _decoded(prior: StableDiffusionPrior, z: torch.Tensor) -> torch.Tensor:
    """As `decode`, which goes through float32."""
    return prior.vae.decode(z / prior._std_1C11 + prior._mean_1C11, return_dict=False)[0] / 2 + 0.5


def test_rows_of_a_call_do_not_see_each_other(family: tuple[str, StableDiffusionPrior]) -> None:
    _, prior = family
    z_BCHW = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *prior.latent_shape(32, 32)))).float()
    cond = prior.embed(["a zero", "a one"], ["", ""], 3.0)
    other = prior.embed(["a zero", "a seven"], ["", ""], 3.0)
    at = Point(0.8, 0.6, 400.0 if prior.process.frame == "vp" else 0.1)
    with torch.no_grad():
        first = prior.predict(z_BCHW, at, cond)
        second = prior.predict(torch.stack([z_BCHW[0], -z_BCHW[1]]), at, other)
    assert torch.equal(first.clean[0], second.clean[0])
    assert not torch.equal(first.clean[1], second.clean[1])


def test_fresh_noise_belongs_to_the_row(family_folder: Any) -> None:
    """A row of SDXL-Turbo has the same bytes among other rows and in another slot."""
    prior = load_prior(str(family_folder("sdxlturbo")), device="cpu")
    method = method_for("text2img", "sdxlturbo")
    batch = batch_of(method, CLASSES, ROWS, size=32)
    assert prior.schedule("ddim", 4).fresh_steps == (0, 1, 2)
    turned = Batch(*(tuple(reversed(getattr(batch, name))) for name in ("draws", "images", "rngs", "filler")))
    with torch.no_grad():
        plain, back = (sampling.fresh_noise(prior, one)(2) for one in (batch, turned))
    assert torch.equal(plain, back.flip(0))
    assert not torch.equal(plain[0], plain[2])  # two copies of one seed


def test_more_steps_than_a_grid_has_are_refused_before_there_is_a_folder(family_folder: Any, tmp_path: Any) -> None:
    """LCM was distilled from 50 steps."""
    prior = {"weights": str(family_folder("lcm"))}
    config = parse({"name": "run", "out": str(tmp_path), "data": {"source": "digits", "per_class": 1}, "prior": prior,
                    "method": {"name": "img2img", "steps": 60, "guidance_scale": 4.0}, "image": {"size": 32}})
    with pytest.raises(ConfigError, match=r"method\.steps: LCMScheduler gives no shipped grid of 60 steps"):
        prepare(config)
    assert not (tmp_path / "run").exists()


def test_a_start_in_pure_noise_is_kept_as_null(family_folder: Any) -> None:
    facts = inspect_prior(str(family_folder("sdzsnr")))
    method = method_for("img2img", "sdzsnr", strength=1.0)
    assert starting_points(facts, method) == {"1": None}
    assert "log(a/s) -inf (label 999)" in sampling_notes(facts, method)[0]
