"""A picture of what a generator in training draws: one row for each of a few classes, named by its prompt, and one
column for each noise."""

# B samples

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from rayexpand.contract.protocols import LatentPrior
from rayexpand.contract.rng import generator, row_key
from rayexpand.diffusion import sampling
from rayexpand.fitting.adapter.config import SheetConfig
from rayexpand.fitting.picture_grid import picture_grid

if TYPE_CHECKING:
    from rayexpand.fitting.adapter.finetuner import Finetuner
    from rayexpand.fitting.adapter.loader import LatentLoader
    from rayexpand.models.latent import StableDiffusionPrior


def draw_sheet(sheet: SheetConfig, prior: StableDiffusionPrior, tuner: Finetuner, feed: LatentLoader,
               seed: int) -> Image.Image:
    """Samples of the weights as they are now, always from the same noises. `prior` holds the models in training."""
    import torch

    texts, visual_BD = feed.shown(sheet.classes)
    rows = len(texts)
    def noise(column: int, step: int | None = None) -> torch.Tensor:
        """(B, C, H, W) on the device, the same for all rows: of the start, or what a step adds."""
        name = "sheet" if step is None else f"sheet/{step}"
        one = generator(row_key(seed, "finetune", "", column, 0, name)).standard_normal(feed.latents.shape, np.float32)
        return torch.from_numpy(np.broadcast_to(one, (rows, *one.shape)).copy()).to(prior.device)

    plan = prior.schedule(sheet.solver, sheet.steps)
    columns, sampled = [], cast(LatentPrior, prior)
    with torch.no_grad():
        prior.texts.forget()  # their encoders have been trained since
        cond = prior.embed(texts, [""] * rows, sheet.guidance_scale)
        if visual_BD is not None:
            cond = cond.with_last_slot(torch.from_numpy(visual_BD).to(prior.device))
        for column in range(sheet.images):
            z_BCHW = sampling.denoise(sampled, noise(column), plan, cond, partial(noise, column))
            with torch.autocast(prior.device.type, enabled=False):  # in float16 the autoencoder overflows
                columns.append(sampling.to_images(prior.decode(z_BCHW))[0])
    return picture_grid(list(zip(*columns, strict=True)), texts, [f"noise {1 + n}" for n in range(sheet.images)],
                        f"step {tuner.step:,}, {sheet.steps} solver steps, guidance {sheet.guidance_scale:g}")
