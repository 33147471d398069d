"""A picture of what a generator in training draws: one row for each of a few classes, named by its prompt, and one
column for each noise. A decoder of image embeddings is told an image of each class."""

# B samples

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from rayexpand.contract.protocols import LatentPrior
from rayexpand.contract.rng import generator, row_key
from rayexpand.diffusion import sampling
from rayexpand.fitting.adapter.config import SheetConfig
from rayexpand.fitting.picture_grid import picture_grid

if TYPE_CHECKING:
    import torch

    from rayexpand.diffusion.process import Schedule
    from rayexpand.fitting.adapter.finetuner import Finetuner
    from rayexpand.fitting.adapter.loader import LatentLoader
    from rayexpand.models.latent import StableDiffusionPrior
    from rayexpand.models.unclip import UnclipPrior


def draw_sheet(sheet: SheetConfig, prior: Any, tuner: Finetuner, feed: LatentLoader, seed: int) -> Image.Image:
    """Samples of the weights as they are now, always from the same noises. `prior` (a StableDiffusionPrior or
    UnclipPrior) holds the models in training."""
    import torch

    texts, visual_BD = feed.shown(sheet.classes)
    rows = len(texts)
    def noise(column: int, step: int | None = None) -> torch.Tensor:
        """(B, C, H, W) on the device, the same for all rows: of the start, or what a step adds."""
        name = "sheet" if step is None else f"sheet/{step}"
        one = generator(row_key(seed, "finetune", "", column, 0, name)).standard_normal(feed.latents.shape, np.float32)
        return torch.from_numpy(np.broadcast_to(one, (rows, *one.shape)).copy()).to(prior.device)

    plan, columns = prior.schedule(sheet.solver, sheet.steps), []
    with torch.no_grad():
        told_BD: Any = None if visual_BD is None else torch.from_numpy(visual_BD).to(prior.device)
        painted = _by_text(prior, texts, told_BD, sheet) if prior.decode_needs_grad else _by_embedding(
            prior, told_BD, sheet)
        for column in range(sheet.images):
            columns.append(sampling.to_images(painted(plan, noise(column), partial(noise, column)))[0])
    return picture_grid(list(zip(*columns, strict=True)), texts, [f"noise {1 + n}" for n in range(sheet.images)],
                        f"step {tuner.step:,}, {sheet.steps} solver steps, guidance {sheet.guidance_scale:g}")


Painter = Callable[["Schedule", "torch.Tensor", sampling.Fresh], "torch.Tensor"]  # steps and noises to images


def _by_text(prior: StableDiffusionPrior, texts: Sequence[str], visual_BD: torch.Tensor | None,
             sheet: SheetConfig) -> Painter:
    import torch

    prior.texts.forget()  # their encoders have been trained since
    cond: Any = prior.embed(list(texts), [""] * len(texts), sheet.guidance_scale)
    if visual_BD is not None:
        cond = cond.with_last_slot(visual_BD)

    def painted(plan: Schedule, noise_BCHW: torch.Tensor, fresh: sampling.Fresh) -> torch.Tensor:
        z_BCHW = sampling.denoise(cast(LatentPrior, prior), noise_BCHW, plan, cond, fresh)
        with torch.autocast(prior.device.type, enabled=False):  # in float16 the autoencoder overflows
            return prior.decode(z_BCHW)

    return painted


def _by_embedding(prior: UnclipPrior, z_BD: torch.Tensor, sheet: SheetConfig) -> Painter:
    import torch

    level_noise_BD = torch.zeros_like(z_BD)
    return lambda plan, noise_BCHW, fresh: prior.decode(z_BD, prior.variation(
        plan, noise_BCHW, level_noise_BD, sheet.guidance_scale, fresh=fresh))
