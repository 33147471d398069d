"""A picture of what a generator in training draws: one row for each of a few classes, named by its prompt, and one
column for each noise."""

# B samples, T tokens, E text embedding

from __future__ import annotations

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

    from rayexpand.models.texts import TextCond

    texts, visual_BD = feed.shown(sheet.classes)
    rows = len(texts)
    noise = [generator(row_key(seed, "finetune", "", column, 0, "sheet")).standard_normal(
        feed.latents.shape, dtype=np.float32) for column in range(sheet.images)]
    plan = prior.schedule(sheet.solver, sheet.steps)
    columns, sampled = [], cast(LatentPrior, prior)
    with torch.no_grad():
        text_BTE, empty_BTE = (tuner.module.text(tuner.ids(lines).to(prior.device))
                               for lines in (texts, [""] * rows))
        cond = TextCond(text_BTE, empty_BTE, torch.full((rows,), float(sheet.guidance_scale)))
        if visual_BD is not None:
            cond = cond.with_last_slot(torch.from_numpy(visual_BD).to(prior.device))
        for one in noise:
            z_BCHW = torch.from_numpy(np.broadcast_to(one, (rows, *one.shape)).copy()).to(prior.device)
            z_BCHW = sampling.denoise(sampled, z_BCHW, plan, cond)
            with torch.autocast(prior.device.type, enabled=False):  # in float16 the autoencoder overflows
                columns.append(sampling.to_images(prior.decode(z_BCHW))[0])
    return picture_grid(list(zip(*columns, strict=True)), texts, [f"noise {1 + n}" for n in range(sheet.images)],
                        f"step {tuner.step:,}, {sheet.steps} solver steps, guidance {sheet.guidance_scale:g}")
