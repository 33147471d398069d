"""Tiny random models and prototypes, built once for all tests of methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.diffusion.process import prediction
from rayexpand.diffusion.prototypes import fit_prototypes
from rayexpand.models.guides import load_guide
from rayexpand.models.prior import load_prior
from rayexpand.models.texts import TextCond
from tests.diffusion.gaussian import schedule_of
from tests.tiny import tiny_clip, tiny_pipeline

CLASSES = ClassTable.of(["3", "7", "boot"], ["three", "seven", "rain_boot"], [5, 4, 2], ["digit", "digit", "shoe"],
                        ["digit", "digit", "boot"])


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder / "prior")
    tiny_clip(folder / "guide")
    guide = load_guide(str(folder / "guide"), None, CLASSES.name, device="cpu")
    pixels = torch.from_numpy(RowRng(0, "test", "seeds", 0).uniforms("x", (12, 3, 16, 16)))
    with torch.no_grad():
        features = guide.features(pixels).numpy()
    prototypes = fit_prototypes(features, np.arange(12) % 3, 3, 2, guide_hash="g", class_keys=CLASSES.key)
    return Tools(CLASSES, load_prior(str(folder / "prior"), device="cpu"), guide, prototypes,
                 torch.from_numpy(prototypes.class_KD), SeedFeatures())


class SmallestPrior:
    """Latents are images of half the size; each prediction depends on its own latent, text and timestep, and a call
    costs a few sums instead of three networks."""

    space, decode_needs_grad, device = "halves", True, torch.device("cpu")

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def latent_shape(self, height, width):
        return 3, height // 2, width // 2

    def schedule(self, solver, steps, run=None, spacing=None, latent=None):
        return schedule_of(self.scheduler, solver, steps, run, spacing)

    def embed(self, prompts, negatives, guidance):
        tokens, negative_tokens = (torch.from_numpy(np.stack([
            RowRng(0, "test", text, 0).normals("text", (4, 16)) for text in texts])) for texts in (prompts, negatives))
        return TextCond(tokens, negative_tokens, torch.full((len(tokens),), float(guidance)))

    def encode(self, x, noise):
        mean = torch.nn.functional.avg_pool2d(x, 2) * 2 - 1
        return mean if noise is None else mean + 0.1 * noise

    def decode(self, z, cond=None):
        return torch.sigmoid(torch.nn.functional.interpolate(z, scale_factor=2.0))  # neither black nor white

    def predict(self, z_BCHW, at, cond):
        texts_BTE = torch.lerp(cond.negative_tokens_BTE, cond.tokens_BTE, cond.guidance_B[:, None, None])
        told_B111 = z_BCHW.mean((1, 2, 3), keepdim=True) + texts_BTE.mean((1, 2))[:, None, None, None]
        return prediction("epsilon", torch.sin(z_BCHW + 0.001 * at.label) + 0.1 * told_B111, z_BCHW, at)


class SeedFeatures:
    """16 features of any seed."""

    def rows(self, seed_ids):
        return np.stack([RowRng(0, "test", seed_id, 0).normals("features", (16,)) for seed_id in seed_ids])
