"""DA-Fusion (Trabucco et al., "Effective Data Augmentation with Diffusion Models", 2023): image to image within the
class, with a word for each class that was learned from its images, and a strength drawn for each sample.

    paper    here         meaning, unit
    t0       strengths    share of the schedule that is run, in (0, 1]
    M        ratio        samples for each real image
    <y>      {token}      learned word of the class

The mode says which words those are, and with them how the adapter is fitted (strategy `ti`) and the defaults here:

    per_class    the paper: a word learned for each class by itself, starting from a common word, no superclass in the
                 prompt; 10 samples for each image, 50 steps
    joint_ti     as Diff-Mix compares with it: the words of all classes learned together, with the superclass in the
                 prompt; 5 samples for each image, 25 steps of DPM-Solver++

The paper's 50 steps are of the pseudo-linear multistep solver that Stable Diffusion comes with; DDIM on the same grid
stands in for it. Labels are hard. The paper replaces a real image only by its own variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from rayexpand.contract.prompts import Template
from rayexpand.contract.settings import Section
from rayexpand.diffusion import sampling
from rayexpand.methods._copies import MAX_COPIES
from rayexpand.methods._on_plain import OnPlain
from rayexpand.methods.diffmix import DiffMix, Strengths

MODES: dict[str, dict[str, Any]] = {
    "per_class": {"ratio": 10.0, "prompt": "a photo of a {token}", "steps": 50, "solver": "ddim"},
    "joint_ti": {"ratio": 5.0, "prompt": "a photo of a {token} {metaclass}", "steps": 25, "solver": "dpmpp_2m"},
}


class DaFusion(OnPlain, Section):
    """Settings of DA-Fusion. Defaults are those of the paper unless noted; `mode` sets four of them."""

    model_config = ConfigDict(validate_default=True)

    name: Literal["dafusion"] = "dafusion"
    mode: Literal["per_class", "joint_ti"] = Field("joint_ti", description="per_class (paper) or joint_ti (Diff-Mix's "
                                                   "tables); see above")
    ratio: float = Field(default_factory=lambda data: _own(data, "ratio"), gt=0, le=MAX_COPIES,
                         description="samples for each real image (per_class: 10; joint_ti: 5)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    prompt: Template = Field(default_factory=lambda data: _own(data, "prompt"), description="template with {token}, "
                             "{metaclass}, {name}, {noun}, {caption} (per_class: a photo of a {token}; joint_ti: a "
                             "photo of a {token} {metaclass})")
    negative: str = Field("", description="negative prompt (paper: empty)")
    strengths: Strengths = Field(
        (1.0, 0.75, 0.5, 0.25), description="shares of the schedule that is run, of which each row draws "
        "one (paper: these four)")
    steps: int = Field(default_factory=lambda data: _own(data, "steps"), ge=1, le=999,
                       description="solver steps of the whole schedule (per_class: 50; joint_ti: 25)")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale (paper: 7.5)")
    solver: sampling.Solver = Field(default_factory=lambda data: _own(data, "solver"),
                                    description="ddim (per_class), dpmpp_2m (joint_ti) or unipc")
    spacing: sampling.Spacing | None = Field(None, description="where the steps lie; none: as the weights were "
                                             "shipped, or as published: leading for ddim, else linspace, where that "
                                             "is Stable Diffusion 1.x or 2.x")

    _plain: DiffMix = PrivateAttr()  # the plan and the sampler

    @field_validator("steps")
    @classmethod
    def _runs_a_step(cls, steps: int, info: ValidationInfo) -> int:
        for strength in info.data.get("strengths", ()):
            sampling.steps_run(strength, steps)
        return steps

    @model_validator(mode="after")
    def _samples(self) -> DaFusion:
        self._plain = DiffMix(variant="diff_aug", ratio=self.ratio, quota=self.quota, prompt=self.prompt,
                              negative=self.negative, strengths=self.strengths, steps=self.steps,
                              guidance_scale=self.guidance_scale, solver=self.solver, spacing=self.spacing)
        return self

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]


def _own(fields: Mapping[str, Any], name: str) -> Any:
    return MODES[fields.get("mode", "joint_ti")][name]
