"""A diffusion prior whose every answer is known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler

from rayexpand.diffusion.process import Point, Prediction, Process, Schedule, prediction, process_of, schedule

STABLE_DIFFUSION = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
                    "beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}


def sd_scheduler(**changes: Any) -> DDIMScheduler:
    """The scheduler Stable Diffusion 1.x was shipped with, or one that differs in `changes`."""
    return DDIMScheduler(**{**STABLE_DIFFUSION, "clip_sample": False, **changes})


def process_in(scheduler: Any) -> Process:
    """The noise process of a diffusers scheduler, as weights of Stable Diffusion 1.x would have it."""
    return process_of({**scheduler.config, "_class_name": type(scheduler).__name__}, published=True)


def schedule_of(scheduler: Any, solver: Any, steps: int, run: int | None = None, spacing: Any = None) -> Schedule:
    return schedule(process_in(scheduler), solver, steps, run, spacing)


def point_at(scheduler: Any, t: int) -> Point:
    """A timestep of a beta schedule, by alpha-bar in float64."""
    abar = float(scheduler.alphas_cumprod[t])
    return Point(abar**0.5, (1 - abar) ** 0.5, float(t))


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

    def schedule(self, solver: Any, steps: int, run: int | None = None, spacing: Any = None,
                 latent: Any = None) -> Schedule:
        return schedule_of(self.scheduler, solver, steps, run, spacing)

    def embed(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float) -> FakeCond:
        return FakeCond((guidance != 0) * torch.tensor([float(len(p)) for p in prompts]).reshape(-1, 1, 1))

    def encode(self, x_BCHW: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        return x_BCHW if noise is None else x_BCHW + 0.01 * noise

    def decode(self, z: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return z

    def predict(self, z_BCHW: torch.Tensor, at: Point, cond: FakeCond) -> Prediction:
        self.timesteps.append(int(at.label))
        mean_B111 = self.mean + cond.tokens_BTE[..., None]
        noise = at.s * (z_BCHW - at.a * mean_B111) / (at.a**2 * self.std**2 + at.s**2)
        return prediction("epsilon", noise, z_BCHW, at)
