"""First-order steps from noise predictions give to the bit what the first version of this package gave, so that runs
begun with it are continued.

The reference has nothing of the package but the random streams and the networks. Its arithmetic is that of that
version: numbers between tensors are Python's, of alpha-bar in float64, in the order in which they stood there.
"""

# B rows, C latent channels

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rayexpand.contract.protocols import Batch, Tools
from rayexpand.methods import load_method
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.prior import load_prior
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.references import Watched
from tests.tiny import tiny_pipeline

torch.set_num_threads(1)
ROWS = [("a", 0, 0), ("b", 1, 0), ("a", 0, 1), ("c", 2, 0)]
LEADING = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
TRAILING = [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


class Before:
    """One batch, as the first version sampled it."""

    def __init__(self, prior: StableDiffusionPrior, batch: Batch, scale: float) -> None:
        self.prior, self.batch, self.scale = prior, batch, scale
        self.abar: list[float] = prior.scheduler.alphas_cumprod.double().tolist()
        self.shape = prior.latent_shape(*batch.images[0].shape[:2])
        self.texts, self.negatives = (torch.stack([self._text(words) for words in side]) for side in (
            [draw.prompt for draw in batch.draws], [draw.negative for draw in batch.draws]))

    def _text(self, words: str) -> torch.Tensor:
        tokens = self.prior.tokenizer(words, padding="max_length", max_length=self.prior.tokenizer.model_max_length,
                                      truncation=True, return_tensors="pt")
        return self.prior.text_encoder(tokens.input_ids).last_hidden_state[0]

    def noise(self, stream: str = "noise") -> torch.Tensor:
        return torch.from_numpy(self.batch.normals(stream, self.shape))

    def encoded(self, stream: str = "posterior") -> torch.Tensor:
        x_BCHW = torch.from_numpy(np.stack(self.batch.images)).permute(0, 3, 1, 2).contiguous().float() / 255
        posterior = self.prior.vae.encode(x_BCHW * 2 - 1).latent_dist
        z_BCHW = posterior.mean + posterior.std * self.noise(stream)
        return (z_BCHW - 0.0) * self.prior.vae.config.scaling_factor

    def noised(self, z_BCHW: torch.Tensor, t: int) -> torch.Tensor:
        abar = self.abar[t]
        return abar**0.5 * z_BCHW + (1 - abar) ** 0.5 * self.noise()

    def eps(self, z_BCHW: torch.Tensor, t: int) -> torch.Tensor:
        guided = self.scale != 1
        texts = torch.cat([self.negatives, self.texts]) if guided else self.texts
        z_in = (torch.cat([z_BCHW, z_BCHW]) if guided else z_BCHW).to(self.prior.dtype)
        t_in = torch.full((len(z_in),), t)
        out = self.prior.unet(z_in, t_in, encoder_hidden_states=texts, return_dict=False)[0].to(z_BCHW.dtype)
        if guided:
            uncond, conditional = out.chunk(2)
            out = uncond + self.scale * (conditional - uncond)
        return out

    def denoised(self, z_BCHW: torch.Tensor, timesteps: list[int]) -> torch.Tensor:
        for t, t_prev in zip(timesteps, [*timesteps[1:], 0], strict=True):  # behind the last step lies abar_0
            abar, abar_prev, eps = self.abar[t], self.abar[t_prev], self.eps(z_BCHW, t)
            clean = (z_BCHW - (1 - abar) ** 0.5 * eps) / abar**0.5
            z_BCHW = abar_prev**0.5 * clean + (1 - abar_prev) ** 0.5 * eps
        return z_BCHW

    def pixels(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        raw_BCHW = z_BCHW / self.prior.vae.config.scaling_factor + 0.0
        return self.prior.vae.decode(raw_BCHW, return_dict=False)[0] / 2 + 0.5


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StableDiffusionPrior]:
    folder = tiny_pipeline(tmp_path_factory.mktemp("tiny"))
    return {dtype: load_prior(str(folder), dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16")}


def same(prior: StableDiffusionPrior, name: str, timesteps: list[int], *, from_noise: bool = False,
         noised_to: int | None = None, posterior: str = "posterior", **fields: Any) -> None:
    """A method makes what the first version did, latents and images."""
    method: Any = load_method(name, {"steps": 10, "guidance_scale": 2.3, **fields})
    batch, watched = batch_of(method, CLASSES, ROWS), Watched(prior)
    assert {draw.steps_run for draw in batch.draws} == {len(timesteps)}
    made = method.expand(batch, Tools(CLASSES, watched))
    latent, pixels = watched.decoded[-1]
    with torch.no_grad():
        before = Before(prior, batch, method.guidance_scale)
        start = before.noise() if from_noise else before.noised(
            before.encoded(posterior), timesteps[0] if noised_to is None else noised_to)
        expected = before.denoised(start, timesteps)
        assert torch.equal(latent, expected)
        assert torch.equal(pixels, before.pixels(expected))
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for image, wanted in zip(made.images, levels, strict=True):
        np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize("fields", [{}, {"guidance_scale": 1.0}, {"guidance_scale": 7.5, "negative": "blurry"}],
                         ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_image_to_image(priors: dict[str, StableDiffusionPrior], dtype: str, fields: dict[str, Any]) -> None:
    same(priors[dtype], "img2img", LEADING[3:], strength=0.7, **fields)


def test_another_grid(priors: dict[str, StableDiffusionPrior]) -> None:
    same(priors["float32"], "img2img", TRAILING[5:], strength=0.5, spacing="trailing")


def test_text_to_image(priors: dict[str, StableDiffusionPrior]) -> None:
    same(priors["float32"], "text2img", LEADING, from_noise=True)


@pytest.mark.parametrize("latent_prior", [True, False])
def test_realfake(priors: dict[str, StableDiffusionPrior], latent_prior: bool) -> None:
    same(priors["float32"], "realfake", LEADING[3:] if latent_prior else LEADING, from_noise=not latent_prior,
         strength=0.7, solver="ddim", latent_prior=latent_prior, finetuned=False, prompt="photo of {name}")


@pytest.mark.parametrize("variant", ["real_mix", "real_aug", "real_gen"])
def test_diffmix_by_ddim(priors: dict[str, StableDiffusionPrior], variant: str) -> None:
    gen = variant == "real_gen"
    same(priors["float32"], "diffmix", LEADING if gen else LEADING[3:], from_noise=gen, variant=variant,
         strengths=[0.7], solver="ddim", prompt="a photo of a {name}")


@pytest.mark.parametrize(("level", "noised_to"), [("first_step", 701), ("official", 801)])
def test_the_diffusion_of_gif(priors: dict[str, StableDiffusionPrior], level: str, noised_to: int) -> None:
    same(priors["float32"], "gif", LEADING[2:], noised_to=noised_to, posterior="posterior_copy", strength=0.8,
         guidance="none", noise_level=level, rotation=0, flip=False)
