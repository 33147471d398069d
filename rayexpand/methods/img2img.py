"""Plain image to image (SDEdit; Meng et al. 2022): noise a seed image part of the way, denoise it with a class prompt.

The baseline every guided method is measured against. An empty prompt makes the control that shows what the prior
alone adds.

    paper    here              meaning, unit
    s        strength          share of the schedule that is run, in (0, 1]
    N        steps             solver steps of the whole schedule
    w        guidance_scale    classifier-free guidance, 1 = none
    z_0      z0_BCHW           latent of the seed image
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from rayexpand.contract.prompts import Template, format_prompt, prompt_needs
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start
from rayexpand.contract.settings import Section
from rayexpand.diffusion import sampling
from rayexpand.methods._copies import quota_copies, ratio_copies


class Img2Img(Section):
    """Settings of img2img. Defaults are those of DistDiff's plain Stable Diffusion baseline unless noted."""

    name: Literal["img2img"] = "img2img"
    ratio: float = Field(5.0, gt=0, le=65535, description="copies of each seed; 2.5 gives half of each class a third "
                         "copy (DistDiff: 5)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    prompt: Template = Field("a photo of a {name}.", description="template with {name}, {metaclass}, {noun}, {token}, "
                             "{caption}; may be empty (DistDiff, sec. 4.1)")
    negative: str = Field("", description="negative prompt (DistDiff: empty)")
    strength: float = Field(0.5, gt=0, le=1, description="share of the schedule that is run (DistDiff: 0.5)")
    steps: int = Field(50, ge=1, le=999, description="solver steps of the whole schedule (DistDiff: 50)")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale (DistDiff: 7.5)")
    solver: sampling.Solver = Field("ddim", description="ddim (DistDiff), dpmpp_2m (Diff-Mix) or unipc (Real-Fake)")
    spacing: sampling.Spacing | None = Field(None, description="where the steps lie; none: as the weights were "
                                             "shipped, or as published: leading for ddim, else linspace, where that "
                                             "is Stable Diffusion 1.x or 2.x")

    @model_validator(mode="after")
    def _runs_a_step(self) -> Img2Img:
        sampling.steps_run(self.strength, self.steps)
        return self

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        prior = tools.prior
        schedule = sampling.batch_schedule(prior, batch, self.solver, self.steps, self.spacing)
        with torch.no_grad():
            cond = sampling.embed_batch(prior, batch, self.guidance_scale)
            z_BCHW = schedule.first.mix(sampling.encode_batch(prior, batch), sampling.noise_batch(prior, batch))
            z_BCHW = sampling.denoise(prior, z_BCHW, schedule, cond, sampling.fresh_noise(prior, batch))
            images, reasons = sampling.to_images(prior.decode(z_BCHW, cond))
        return Expansion(images, reasons)

    def needs(self) -> frozenset[str]:
        return frozenset({"prior"}) | prompt_needs(self.prompt)

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        if self.quota is None:
            return ratio_copies(index, self.ratio, rng)
        return quota_copies(index, np.full(len(index.classes), self.quota), rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt=format_prompt(self.prompt, label, classes), negative=self.negative, start=Start.IMAGE,
                    strength=self.strength, steps_run=sampling.steps_run(self.strength, self.steps), attempt=0,
                    row=row, group=copy)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return (draw.steps_run,)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]
