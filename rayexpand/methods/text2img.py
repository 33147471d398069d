"""Text to image: a sample from pure noise and a class prompt. The seed image is not looked at.

The seeds set how many samples a class gets and name them; as an expansion it shows what the prior knows of the class
without any real image.

    paper    here              meaning, unit
    N        steps             solver steps, all of them run
    w        guidance_scale    classifier-free guidance, 1 = none
    z_T      z_BCHW            pure noise

Two published baselines are presets, tables of field values that a field given beside them overrides:

    fakeit   Sariyildiz et al., "Fake it till you make it", 2023: class and its superclass in the prompt, guidance 2.0
             instead of 7.5 for diversity, as many samples as real images. Their other prompts are `prompt` here, with
             the class's definition as its noun, say; a background of its own for each sample is a list of lecf
    cip      Lei et al., "Image Captions are Natural Prompts for Text-to-Image Models", 2023: class and the caption of
             a real image, one sample for each image; its sampler here is that of fakeit (ours)
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

_SYNTHETIC: dict[str, Any] = {"ratio": 1.0, "guidance_scale": 2.0, "steps": 50}
PRESETS: dict[str, dict[str, Any]] = {
    "fakeit": {**_SYNTHETIC, "prompt": "{name}, {metaclass}"},
    "cip": {**_SYNTHETIC, "prompt": "a photo of a {name}, {caption}"},
}


class Text2Img(Section):
    """Settings of text2img. Defaults are those of Stable Diffusion's text-to-image pipeline unless noted."""

    name: Literal["text2img"] = "text2img"
    preset: Literal["fakeit", "cip"] | None = Field(None, description="a published baseline; sets ratio, prompt, "
                                                    "guidance_scale and steps where they are not given")
    ratio: float = Field(5.0, gt=0, le=65535, description="samples for each seed; 2.5 gives half of each class a third "
                         "one (ours, as img2img)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    prompt: Template = Field("a photo of a {name}.", description="template with {name}, {metaclass}, {noun}, {token}, "
                             "{caption}; may be empty (DistDiff, sec. 4.1)")
    negative: str = Field("", description="negative prompt (Stable Diffusion: empty)")
    steps: int = Field(50, ge=1, le=999, description="solver steps (Stable Diffusion: 50)")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale (Stable Diffusion: 7.5)")
    solver: sampling.Solver = Field("ddim", description="ddim (ours, as img2img), dpmpp_2m (Diff-Gen) or unipc")
    spacing: sampling.Spacing | None = Field(None, description="where the steps lie; none: as the weights were "
                                             "shipped, or as published: leading for ddim, else linspace, where that "
                                             "is Stable Diffusion 1.x or 2.x")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, fields: Any) -> Any:
        known = isinstance(fields, dict) and fields.get("preset") in list(PRESETS)
        return {**PRESETS[fields["preset"]], **fields} if known else fields

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        prior = tools.prior
        schedule = sampling.batch_schedule(prior, batch, self.solver, self.steps, self.spacing)
        with torch.no_grad():
            cond = sampling.embed_batch(prior, batch, self.guidance_scale)
            z_BCHW = sampling.noise_batch(prior, batch)
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
                    prompt=format_prompt(self.prompt, label, classes), negative=self.negative, start=Start.NOISE,
                    strength=1.0, steps_run=self.steps, attempt=0, row=row, group=copy)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return (draw.steps_run,)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]
