"""Real Guidance (He et al., "Is Synthetic Data from Generative Models Ready for Image Recognition?", 2023), as
Diff-Mix compares with it: image to image from weights as they are, within the class, so weak that little changes.

    paper    here        meaning, unit
    s        strength    share of the schedule that is run: 0.1 of 25 steps is 2 steps; DA-Fusion's comparison has 0.5
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayexpand.contract.prompts import Template
from rayexpand.diffusion import sampling
from rayexpand.methods.img2img import Img2Img


class RealGuidance(Img2Img):
    """Settings of Real Guidance: those of img2img with other defaults, which are Diff-Mix's unless noted."""

    name: Literal["realguidance"] = "realguidance"  # type: ignore[assignment]
    prompt: Template = Field("a photo of a {name} {metaclass}", description="template with {name}, {metaclass}, "
                             "{noun}, {caption}; give one without {metaclass} where classes have none")
    strength: float = Field(0.1, gt=0, le=1, description="share of the schedule that is run (Diff-Mix: 0.1; DA-Fusion: "
                            "0.5)")
    steps: int = Field(25, ge=1, le=999, description="solver steps of the whole schedule (Diff-Mix: 25)")
    solver: sampling.Solver = Field("dpmpp_2m", description="dpmpp_2m (Diff-Mix), ddim or unipc")
