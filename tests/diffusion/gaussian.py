"""A diffusion prior whose every answer is known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
                    "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}


def sd_scheduler(**changes: Any) -> DDIMScheduler:
    """The scheduler Stable Diffusion 1.x was shipped with, or one that differs in `changes`."""
    return DDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, **changes})


@dataclass
class FakeCond:
    tokens_BTE: torch.Tensor

    def __getitem__(self, rows: Any) -> FakeCond:
        return FakeCond(self.tokens_BTE[rows])


@dataclass
class GaussianPrior:
    """Exact diffusion prior of latents whose elements are independent N(mean, std^2); latents are pixels.

    The best noise prediction is linear in z_t, and (z_t - a mean) / sqrt(a^2 std^2 + 1 - a^2), a^2 = abar_t, stays
    constant along the sampling path: any solver can be compared with the exact answer. A prompt is its number of
    characters, added to the mean when guidance_scale is not 0.
    """

    scheduler: Any
    mean: float = 0.3
    std: float = 0.2
    space: str = "pixels"
    decode_needs_grad: bool = False
    timesteps: list[int] = field(default_factory=list)  # of every predict call

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def embed(self, prompts: Sequence[str], negatives: Sequence[str]) -> FakeCond:
        return FakeCond(torch.tensor([float(len(p)) for p in prompts]).reshape(-1, 1, 1))

    def encode(self, x_BCHW: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return x_BCHW if noise is None else x_BCHW + 0.01 * noise

    def decode(self, z: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return z

    def predict(self, z_t: torch.Tensor, t: int, cond: FakeCond, guidance_scale: float) -> torch.Tensor:
        self.timesteps.append(t)
        abar = float(self.scheduler.alphas_cumprod[t])
        mean_B111 = self.mean + (guidance_scale != 0) * cond.tokens_BTE[..., None]
        return (1 - abar) ** 0.5 * (z_t - abar**0.5 * mean_B111) / (abar * self.std**2 + 1 - abar)
