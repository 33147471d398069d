"""Real-Fake: synthetic data by matching the distribution of the real (Yuan et al., "Real-Fake: Effective Training Data
Synthesis Through Distribution Matching", ICLR 2024). Every sample starts from one real image, whose latent is noised
and denoised with a fine-tuned generator under the class, a caption of that image and an image feature of its class.

    paper           here              meaning, unit
    latent prior    latent_prior      start from the latent of the seed image instead of pure noise
    s               strength          share of the schedule that is run, in (0, 1]
    N               steps             solver steps of the whole schedule
    w               guidance_scale    classifier-free guidance, 1 = none
    v               visual_BD         image feature that takes the last slot of the text condition, never normalised
    k in "kx"       ratio             samples for each real image; 1x inside 2x inside 2.5x

The paper joins a mean feature of the class to the text; its code puts one into the last of the 77 slots, where a short
text has padding and a long one the end of text, and takes the feature of the seed image itself. Either way the mode of
sampling must be that of fine-tuning. Labels are hard. The code squashes images to 512 pixels: image.fit: squash.

    preset           prompt                                        negative            visual_token
    paper            photo of {name}, {caption}                    four terms          class_mean
    official_code    photo of {name}, {caption}, best quality      six terms           instance

Datasets without captions (CUB, Cars, Pets, EuroSAT) are asked for "photo of {name}", in the code "{name}, photo, best
quality".
"""

# B rows, K classes

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from rayexpand.contract.errors import UsageError
from rayexpand.contract.prompts import Template, format_prompt, placeholders, prompt_needs
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start
from rayexpand.contract.settings import Section
from rayexpand.diffusion import sampling
from rayexpand.methods._copies import MAX_COPIES, quota_copies, ratio_copies

_NEGATIVE = "distorted, unrealistic, blurry, out of frame"
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"prompt": "photo of {name}, {caption}", "negative": _NEGATIVE, "visual_token": "class_mean"},
    "official_code": {"prompt": "photo of {name}, {caption}, best quality",
                      "negative": f"{_NEGATIVE}, cropped, deformed", "visual_token": "instance"},
}


class RealFake(Section):
    """Settings of Real-Fake. Defaults are those of the paper unless noted; `preset` sets three of them."""

    model_config = ConfigDict(validate_default=True)

    name: Literal["realfake"] = "realfake"
    preset: Literal["paper", "official_code"] = Field("paper", description="defaults of prompt, negative and "
                                                      "visual_token; fields that are given win")
    ratio: float = Field(1.0, gt=0, le=MAX_COPIES, description="samples for each real image (paper: 1 to 10); a "
                         "fraction is rounded down in each class")
    balance: Literal["real", "uniform"] = Field("real", description="real: classes are as large as in the seeds; "
                                                "uniform: as many samples in all, the same number of each class (ours)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio` and `balance`")
    finetuned: bool = Field(True, description="sample with the adapter; false: with the weights as they are, "
                            "also where they were fine-tuned as a whole")
    lora_scale: float = Field(0.5, ge=0, description="share of the LoRA that is applied (released code: 0.5; the paper "
                              "does not say)")
    visual_token: Literal["none", "class_mean", "instance"] = Field(
        default_factory=lambda data: _own(data, "visual_token") if data.get("finetuned", True) else "none",
        description="what the last slot of the condition holds. class_mean: mean feature of the class (paper); "
        "instance: that of the seed image (released code); none: the default without adapter")
    negative_branch: Literal["cond_only", "both"] = Field(
        "cond_only", description="where it stands: in the prompt alone, so that guidance amplifies it, or in the "
        "negative prompt too (neither is stated)")
    prompt: Template = Field(default_factory=lambda data: _own(data, "prompt"), description="template with {name}, "
                             "{caption}, {metaclass}, {noun}, {token}; see above")
    negative: str = Field(default_factory=lambda data: _own(data, "negative"), description="negative prompt (paper: "
                          "distorted, unrealistic, blurry, out of frame; the released code adds two)")
    latent_prior: bool = Field(True, description="start from the seed image; false: from noise, by all steps")
    strength: float = Field(0.75, gt=0, le=1, description="share of the schedule that is run with the latent prior "
                            "(paper: 0.75)")
    steps: int = Field(30, ge=1, le=999, description="solver steps of the whole schedule (paper: 30)")
    guidance_scale: float = Field(2.0, ge=0, description="classifier-free guidance scale (paper: 2)")
    solver: sampling.Solver = Field("unipc", description="unipc (paper), ddim or dpmpp_2m")
    spacing: sampling.Spacing | None = Field(None, description="where the steps lie; null: as the weights were "
                                             "shipped; of Stable Diffusion 1.x and 2.x linspace, for ddim leading")

    @field_validator("prompt")
    @classmethod
    def _has_no_token_without_adapter(cls, prompt: str, info: ValidationInfo) -> str:
        if not info.data.get("finetuned", True) and "token" in placeholders(prompt):
            raise ValueError("{token} is a word of the adapter; write {name}, or set finetuned: true")
        return prompt

    @field_validator("lora_scale")
    @classmethod
    def _scales_something(cls, scale: float, info: ValidationInfo) -> float:
        if info.data.get("finetuned") is False and scale != cls.model_fields["lora_scale"].default:
            raise ValueError("has no effect without adapter; take it out, or set finetuned: true")
        return scale

    @field_validator("negative_branch")
    @classmethod
    def _holds_something(cls, branch: str, info: ValidationInfo) -> str:
        if info.data.get("visual_token") == "none" and branch != cls.model_fields["negative_branch"].default:
            raise ValueError("has no effect without visual token; take it out, or set visual_token: class_mean or "
                             "instance")
        return branch

    @field_validator("steps")
    @classmethod
    def _runs_a_step(cls, steps: int, info: ValidationInfo) -> int:
        if info.data.get("latent_prior") and "strength" in info.data:
            sampling.steps_run(info.data["strength"], steps)
        return steps

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        prior = tools.prior
        schedule = sampling.batch_schedule(prior, batch, self.solver, self.steps, self.spacing)
        with torch.no_grad():
            cond = sampling.embed_batch(prior, batch, self.guidance_scale)
            visual_BD = self._visual(batch, tools)
            if visual_BD is not None:
                cond = cond.with_last_slot(visual_BD, both=self.negative_branch == "both")
            z_BCHW = sampling.noise_batch(prior, batch)
            if self.latent_prior:
                z_BCHW = schedule.first.mix(sampling.encode_batch(prior, batch), z_BCHW)
            z_BCHW = sampling.denoise(prior, z_BCHW, schedule, cond, sampling.fresh_noise(prior, batch))
            images, reasons = sampling.to_images(prior.decode(z_BCHW, cond))
        return Expansion(images, reasons)

    def _visual(self, batch: Batch, tools: Tools) -> Any:
        """float32 (B, D) tensor, row by row; None without a visual token."""
        import torch

        if self.visual_token == "class_mean":  # noqa: S105
            return torch.as_tensor(tools.class_features)[[d.target_label for d in batch.draws]]
        if self.visual_token == "instance":  # noqa: S105
            return torch.from_numpy(tools.image_features.rows([d.seed_id for d in batch.draws]))
        return None

    def needs(self) -> frozenset[str]:
        visual = {"none": [], "class_mean": ["class_features"], "instance": ["image_features"]}[self.visual_token]
        return frozenset({"prior", *visual, *(["adapter"] if self.finetuned else [])}) | prompt_needs(self.prompt)

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        """Raises UsageError where `balance: uniform` leaves nothing for a class."""
        if self.quota is not None:
            return quota_copies(index, np.full(len(index.classes), self.quota), rng)
        if self.balance == "real":
            return ratio_copies(index, self.ratio, rng, down=True)
        counts_K = np.bincount(index.labels, minlength=len(index.classes))
        each = int(self.ratio * len(index) / np.count_nonzero(counts_K) + 1e-6)
        if each < 1:
            raise UsageError(f"method.balance: uniform leaves less than one sample for each of "
                             f"{np.count_nonzero(counts_K)} classes, as ratio {self.ratio:g} makes "
                             f"{int(self.ratio * len(index))} in all; raise method.ratio, or set method.quota")
        return quota_copies(index, np.where(counts_K > 0, each, 0), rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        run = sampling.steps_run(self.strength, self.steps) if self.latent_prior else self.steps
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt=format_prompt(self.prompt, label, classes), negative=self.negative,
                    start=Start.IMAGE if self.latent_prior else Start.NOISE,
                    strength=self.strength if self.latent_prior else 1.0, steps_run=run, attempt=0, row=row, group=copy)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return (draw.steps_run,)

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]


def _own(fields: Mapping[str, Any], name: str) -> Any:
    return PRESETS[fields.get("preset", "paper")][name]
