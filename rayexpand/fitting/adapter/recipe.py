"""How a generator is fine-tuned: one frozen configuration and the published presets. No torch here.

    paper symbol       name here         meaning, unit
    r, alpha           rank, alpha       rank of the low-rank update B A; its scale is alpha / rank
    [V_i] [metaclass]  {token}           the class's own word in the training prompt, see core.class_tokens
    gamma (Real-Fake)  mmd_gamma         weight of the MMD term; means nothing without reduction, weighting and scope
    g (Min-SNR)        snr_gamma         largest signal-to-noise ratio a timestep is weighted as
    N                  batch             images of one optimiser step over all workers
"""

from __future__ import annotations

from string import Formatter
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rayexpand.contract.settings import Section

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"attention": ATTENTION,
           "attention+ff": (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")}
PLACEHOLDERS = ("token", "name", "metaclass", "noun", "caption")


class FinetuneConfig(Section):
    """One way to fine-tune a generator. The defaults are Diff-Mix's, as its released scripts run it."""

    model_config = ConfigDict(allow_inf_nan=False)

    strategy: Literal["ti", "db", "ti_db", "full"] = Field(
        "ti_db", description="ti: one new token per class, nothing else; db: LoRA on the UNet, plain class names; "
        "ti_db: both; full: every weight of UNet and text encoder, plain class names (of a decoder of image "
        "embeddings: its UNet, and no texts)")
    targets: Literal["attention", "attention+ff"] = Field(
        "attention", description="projections with LoRA: those of attention, or also the feed-forward layers and the "
        "projections around each attention block (tiny generators need these)")
    rank: int = Field(10, ge=1, description="of LoRA")
    alpha: float | None = Field(None, gt=0, description="LoRA is scaled by alpha / rank; null: rank")

    prompt: str | None = Field(None, description="training text with {token}, {name}, {metaclass}, {noun}, {caption}; "
                               "null: 'a photo of a {token} {metaclass}', without tokens 'a photo of a {name}'")
    init_token: int | str | None = Field(42170, description="every class token starts as this one's row: an id "
                                         "(Diff-Mix's, for Stable Diffusion 1.x), a word of the vocabulary; null: the "
                                         "mean of all rows")
    caption_drop: float = Field(0.0, ge=0, lt=1, description="share of visits with empty text and no visual token")
    visual_token: Literal["none", "class_mean", "instance"] = Field(
        "none", description="what replaces the hidden state of the last text slot: the class's mean image feature "
        "(Real-Fake's paper), or the image's own (its code)")

    steps: int = Field(35_000, ge=1, description="optimiser steps")
    batch: int = Field(8, ge=1, description="images of one optimiser step over all workers")
    accumulate: int = Field(1, ge=1, description="parts a worker's slice of the batch is computed in; MMD then takes "
                            "its mean within a part")
    balance: Literal["none", "inverse"] = Field("none", description="inverse: images drawn with replacement, weight 1 "
                                                "/ images of their class (Diff-Mix's long tail)")
    lr: float = Field(5e-5, gt=0, description="of LoRA, or of all weights with full; constant")
    token_lr: float = Field(5e-5, gt=0, description="of the class tokens; constant")
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's, on everything that is trained")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient of LoRA (with full: of all "
                               "weights); tokens are never clipped")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of frozen weights and activations; what is trained stays in fp32. fp16 needs CUDA")

    snr_gamma: float | None = Field(None, gt=0, description="Min-SNR weighting (Hang et al. 2023); null: off")
    noise_offset: float = Field(0.0, ge=0, description="standard deviation of one more noise value per row and channel")
    mmd_gamma: float = Field(0.0, ge=0, description="weight of the MMD term (Real-Fake); 0: off; the paper's is 0.05 "
                             "with the defaults below")
    mmd_reduction: Literal["mean", "sum"] = Field("mean", description="errors averaged over the batch (paper) or added "
                                                  "up (code: grows with the square of the batch)")
    mmd_weighting: Literal["none", "min_snr"] = Field("none", description="Min-SNR weights inside the norm (code) or "
                                                      "not (paper)")
    mmd_scope: Literal["global", "per_rank"] = Field(
        "global", description="one term over the batch of all workers, or one for each mmd_images of it, as if each "
        "worker had so many")
    mmd_images: int | None = Field(None, ge=1, description="images of one term with mmd_scope per_rank, whatever the "
                                   "number of workers")

    @property
    def has_tokens(self) -> bool:
        return self.strategy in ("ti", "ti_db")

    @property
    def has_lora(self) -> bool:
        return self.strategy in ("db", "ti_db")

    @property
    def has_visual(self) -> bool:
        return self.visual_token != "none"  # noqa: S105  (not a password)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def template(self) -> str:
        """The training prompt, the default filled in."""
        return self.prompt or ("a photo of a {token} {metaclass}" if self.has_tokens else "a photo of a {name}")

    @property
    def images_per_term(self) -> int:
        """Images whose errors one MMD term averages: to be recorded with mmd_gamma."""
        return self.mmd_images or self.batch // self.accumulate

    def identity(self, world: int) -> dict[str, Any]:
        """What the artifact of a training by so many workers is named after. Terms over all that a worker has were
        what per_rank meant when there was no mmd_images, and those artifacts keep their names."""
        fields = self.model_dump(mode="json")
        if self.mmd_images in (None, self.batch // self.accumulate // world):
            del fields["mmd_images"]
        return fields

    @model_validator(mode="after")
    def _agree(self) -> FinetuneConfig:
        problems = _prompt_problems(self)
        if self.mmd_weighting == "min_snr" and self.snr_gamma is None:
            problems.append("mmd_weighting min_snr needs snr_gamma, 5 in Real-Fake")
        if self.mmd_images and (self.mmd_scope == "global" or not self.mmd_gamma):
            problems.append("mmd_images has no effect without mmd_gamma and mmd_scope per_rank")
        if self.mmd_gamma and self.mmd_scope == "per_rank" and not self.mmd_images:
            problems.append(f"mmd_scope per_rank needs mmd_images, the images of one term, or each number of workers "
                            f"would train something else; so far it was {self.batch // self.accumulate} divided by the "
                            "number of workers, and Real-Fake's code has 8")
        if self.batch % self.accumulate:
            problems.append(f"batch {self.batch} cannot be computed in {self.accumulate} equal parts (accumulate)")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas {list(self.betas)} must lie in [0, 1)")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _prompt_problems(config: FinetuneConfig) -> list[str]:
    try:
        parts = [part for part in Formatter().parse(config.template) if part[1] is not None]
    except ValueError as error:
        return [f"prompt {config.prompt!r} cannot be read ({error}); write a literal brace twice"]
    slots = {str(slot) for _, slot, _, _ in parts}
    problems = [f"prompt {config.prompt!r} formats {{{slot}}}; placeholders take no ':' or '!' part"
                for _, slot, form, conversion in parts if form or conversion]
    if unknown := sorted(slots - set(PLACEHOLDERS)):
        problems.append(f"prompt has the unknown placeholder {{{unknown[0]}}}; known are "
                        + ", ".join(f"{{{slot}}}" for slot in PLACEHOLDERS))
    if config.has_tokens and "token" not in slots:
        problems.append(f"prompt {config.template!r} lacks {{token}}, which strategy {config.strategy} trains")
    if not config.has_tokens and "token" in slots:
        problems.append(f"prompt {config.template!r} holds {{token}}, but strategy {config.strategy} has no class "
                        "tokens; take ti or ti_db, or write {name}")
    return problems


def make_finetune(fields: dict[str, Any]) -> FinetuneConfig:
    """FinetuneConfig of a mapping: `preset` names one of PRESETS, the other fields override it. Raises ValueError."""
    own = dict(fields)
    preset = own.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; known: {', '.join(PRESETS)}")
    return FinetuneConfig(**{**(PRESETS[preset] if preset else {}), **own})


# Real-Fake, table 7: Stable Diffusion 1.5, AdamW at 1e-4, 64 images over 8 workers. The rank is its code's; steps are
# 100 epochs of the 13,000 images of ten ImageNet classes. For Min-SNR's g the table has 0.75, the code 5.
_REALFAKE: dict[str, Any] = {
    "strategy": "db", "rank": 4, "lr": 1e-4, "batch": 64, "steps": 20_000, "prompt": "photo of {name}, {caption}",
    "visual_token": "class_mean", "snr_gamma": 5.0, "mmd_gamma": 0.05}

PRESETS: dict[str, dict[str, Any]] = {
    "diffmix": {},
    "realfake": _REALFAKE,
    # the MMD term over 8 images, which each of its workers had, their weighted errors added up; the image's own feature
    # as token
    "realfake_official": {**_REALFAKE, "visual_token": "instance", "mmd_gamma": 0.003, "mmd_reduction": "sum",
                          "mmd_weighting": "min_snr", "mmd_scope": "per_rank", "mmd_images": 8},
    # ours, measured on the digits generator: its attention sits on one 4 x 4 level, and SD's rates are far too slow
    "tiny": {"targets": "attention+ff", "rank": 8, "lr": 3e-3, "token_lr": 2e-2, "batch": 16, "steps": 400,
             "init_token": "digit"},
}
