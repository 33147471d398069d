"""Everything random about showing one image in fine-tuning once: a function of keys. No torch here, for what feeds a
step has processes of its own."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rayexpand.contract.rng import generator, row_key
from rayexpand.fitting.adapter.recipe import FinetuneConfig


class TrainingDraw(NamedTuple):
    """Everything random of one visit of one image."""

    posterior_CHW: np.ndarray  # float32: latent = mean + std * posterior
    noise_CHW: np.ndarray  # float32, with the noise offset
    t: int
    dropped: bool


CLEAN, LEVELS = 0.5, 500  # share of embeddings without noise; the others get a level below


def draw_told(seed: int, seed_id: str, visit: int, embedding_D: np.ndarray) -> np.ndarray:
    """float32 (2 D + 1,): what a decoder is told of the image at this visit, which is its embedding, noise for it, and
    the level of that noise."""
    rng = generator(row_key(seed, "finetune", seed_id, visit, 0, "level"))
    level = int(rng.integers(LEVELS)) if rng.random() >= CLEAN else 0
    noise_D = rng.standard_normal(embedding_D.shape, np.float32)
    return np.concatenate([embedding_D, noise_D, np.array([level], np.float32)])


def draw_visit(config: FinetuneConfig, seed: int, seed_id: str, visit: int, shape: tuple[int, ...],
               timesteps: int) -> TrainingDraw:
    """Draws of the `visit`-th visit of an image, latents of `shape` (C, H, W): a function of its arguments alone."""
    def stream(name: str) -> np.random.Generator:
        return generator(row_key(seed, "finetune", seed_id, visit, 0, name))

    noise = stream("noise").standard_normal(shape, np.float32)
    if config.noise_offset:
        noise += config.noise_offset * stream("offset").standard_normal((shape[0], 1, 1), np.float32)
    # not the stream "posterior", which all visits of a seed share
    return TrainingDraw(stream("latent").standard_normal(shape, np.float32), noise,
                        int(stream("timestep").integers(timesteps)),
                        bool(stream("drop").random() < config.caption_drop))
