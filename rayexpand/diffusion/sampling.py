"""Sampling from a latent diffusion prior: the timestep grid, one step, and the whole loop.

    paper               here              meaning, unit
    z_0, z_t            z_BCHW            latent, clean or at timestep t (unit of the latent space)
    eps_theta, psi      eps_BCHW          noise prediction, classifier-free guidance already applied
    alpha-bar_t         abar[t]           cumulative signal power at timestep t, in (0, 1)
    N                   steps             solver steps of the whole grid
    s                   strength          share of the grid that is executed, in (0, 1]
    z_0|t               clean_prediction  clean latent implied by z_t and eps

What is noise at t belongs to the weights: alpha-bar and the step offset come from the scheduler the prior was shipped
with. How the way back is cut into steps belongs to the method: solver and timestep spacing are pinned by name, never
left to the defaults of a scheduler class, which differ between classes and versions.

torch and diffusers are imported where they are used: methods import this module while planning, without either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Batch, Cond, LatentPrior
from rayexpand.contract.schema import Reason

if TYPE_CHECKING:
    import torch

Solver = Literal["ddim", "dpmpp_2m", "unipc"]
Spacing = Literal["leading", "trailing", "linspace"]

# What the released code of the papers ends up with: DistDiff and GIF run DDIM on the leading grid of Stable Diffusion,
# Diff-Mix (DPM-Solver++) and Real-Fake (UniPC) the linspace grid their solver class falls back to.
DEFAULT_SPACING: dict[Solver, Spacing] = {"ddim": "leading", "dpmpp_2m": "linspace", "unipc": "linspace"}

SEED_PIXELS = 512 * 512  # pixels of seed images per call of an encoder

FINAL = -1  # the "timestep" after the last one: the clean latent

_PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")  # every noise process states these
_PROCESS_OPTIONAL = ("trained_betas", "steps_offset")

Step = Callable[["torch.Tensor", "torch.Tensor", int, int], "torch.Tensor"]


def steps_run(strength: float, steps: int) -> int:
    """How many of `steps` solver steps a strength executes: floor(strength * steps), safe against 0.58 * 50 = 28.99...

    Raises ValueError when that is none.
    """
    run = min(int(np.floor(strength * steps + 1e-6)), steps)
    if run < 1:
        raise ValueError(f"strength {strength:g} * steps {steps} = {strength * steps:g} runs no step and would return "
                         f"the seed image; raise strength to {1 / steps:.3g} or steps to {int(np.ceil(1 / strength))}")
    return run


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A timestep grid over a noise process, and the arithmetic between its points. Build it with `schedule`."""

    solver: Solver
    spacing: Spacing
    process: dict[str, Any]  # noise process of the weights, as arguments of a diffusers scheduler
    abar: np.ndarray  # float64 (T,): alpha-bar by timestep
    final_abar: float  # alpha-bar after the last step of DDIM
    grid: tuple[int, ...]  # all timesteps, descending
    start: int  # index into `grid` of the first executed one

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The executed timesteps, descending."""
        return self.grid[self.start:]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(t, t_prev) of every executed step; the last t_prev is FINAL.

        t_prev is the next point of the grid. diffusers' DDIM takes t - T // N, which is the same number wherever N
        divides T or the spacing is leading, and one timestep off elsewhere.
        """
        return list(zip(self.timesteps, (*self.timesteps[1:], FINAL), strict=True))

    def abar_at(self, t: int) -> float:
        """alpha-bar at timestep t, or after the last step for FINAL."""
        return self.final_abar if t == FINAL else float(self.abar[t])

    def noise_to(self, z0: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
        """z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise."""
        abar = self.abar_at(t)
        return abar**0.5 * z0 + (1 - abar) ** 0.5 * noise

    def clean_prediction(self, z_t: torch.Tensor, eps: torch.Tensor, t: int) -> torch.Tensor:
        """z_0|t = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t). Never clipped: latents have no range."""
        abar = self.abar_at(t)
        return (z_t - (1 - abar) ** 0.5 * eps) / abar**0.5

    def ddim_step(self, z_t: torch.Tensor, eps: torch.Tensor, t: int, t_prev: int) -> torch.Tensor:
        """Deterministic DDIM (eta 0; Song et al. 2021, eq. 12) from t to t_prev. Differentiable."""
        abar_prev = self.abar_at(t_prev)
        return abar_prev**0.5 * self.clean_prediction(z_t, eps, t) + (1 - abar_prev) ** 0.5 * eps

    def stepper(self) -> Step:
        """step(z_t, eps, t, t_prev) -> z of the schedule's solver, to be called once per pair, in order.

        Multistep solvers remember earlier predictions of the whole batch: take a fresh stepper for every batch.
        """
        if self.solver == "ddim":
            return self.ddim_step
        solver = _diffusers_solver(self.solver, self.spacing, self.process)
        solver.set_timesteps(len(self.grid))
        solver.set_begin_index(self.start)

        def step(z_t: torch.Tensor, eps: torch.Tensor, t: int, t_prev: int) -> torch.Tensor:
            # at FINAL the solver returns the clean prediction itself
            return solver.step(eps.to(z_t.dtype), t, z_t, return_dict=False)[0]

        return step


def schedule(scheduler: Any, solver: Solver, steps: int, run: int | None = None,
             spacing: Spacing | None = None) -> Schedule:
    """Grid of `steps` timesteps whose last `run` are executed (None: all), over the noise process of `scheduler`.

    `spacing` None takes DEFAULT_SPACING of the solver. Raises ModelError for a scheduler without a usable noise
    process, ValueError for more steps than the process has timesteps.
    """
    config = dict(scheduler.config)
    missing = [key for key in _PROCESS if key not in config]
    if missing:
        raise ModelError(f"scheduler/scheduler_config.json: {type(scheduler).__name__} has no {', '.join(missing)}; "
                         "only diffusion priors with a beta schedule (Stable Diffusion 1.x, 2.x) can be sampled")
    process = {key: config[key] for key in (*_PROCESS, *_PROCESS_OPTIONAL) if config.get(key) is not None}
    abar = np.asarray(scheduler.alphas_cumprod, np.float64)
    if abar.min() < 1e-6:
        raise ModelError("scheduler/scheduler_config.json: rescale_betas_zero_snr leaves no signal at the last "
                         "timestep, where a noise prediction has no clean image; use weights trained without it")
    spacing = spacing or DEFAULT_SPACING[solver]
    points = _diffusers_solver(solver, spacing, process)
    points.set_timesteps(steps)
    grid = tuple(int(t) for t in points.timesteps)
    run = steps if run is None else run
    if not 1 <= run <= len(grid):
        raise ValueError(f"cannot run {run} of {len(grid)} steps")
    # Only DDIM-like configs carry the flag; Stable Diffusion was trained with it off.
    final_abar = 1.0 if config.get("set_alpha_to_one", False) else float(abar[0])
    return Schedule(solver, spacing, process, abar, final_abar, grid, len(grid) - run)


def _diffusers_solver(solver: Solver, spacing: Spacing, process: dict[str, Any]) -> Any:
    """A diffusers scheduler with everything pinned that changes numbers. Predictions are eps: the prior converts."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

    shared = {**process, "prediction_type": "epsilon", "timestep_spacing": spacing}
    if solver == "ddim":
        return DDIMScheduler(**shared, clip_sample=False)
    shared |= {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
    if solver == "dpmpp_2m":
        return DPMSolverMultistepScheduler(**shared, algorithm_type="dpmsolver++", solver_type="midpoint",
                                           euler_at_final=False)
    return UniPCMultistepScheduler(**shared, solver_type="bh2", predict_x0=True)


def denoise(prior: LatentPrior, z_t: torch.Tensor, plan: Schedule, cond: Cond, guidance_scale: float) -> torch.Tensor:
    """Clean latent (B, C, h, w) from z_t at `plan.timesteps[0]`, by all executed steps of the schedule."""
    step = plan.stepper()
    for t, t_prev in plan.pairs:
        eps = prior.predict(z_t, t, cond, guidance_scale)
        z_t = step(z_t, eps, t, t_prev)
    return z_t


def to_tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    """float32 (B, 3, H, W) in [0, 1] from uint8 (H, W, 3) images of one size, on the CPU."""
    import torch

    x_BHWC = torch.from_numpy(np.stack(images))
    return x_BHWC.permute(0, 3, 1, 2).contiguous().float() / 255


def to_images(x_BCHW: torch.Tensor) -> tuple[list[np.ndarray | None], list[Reason | None]]:
    """uint8 (H, W, 3) images, clamped and rounded, or None and Reason.NAN_LATENT where a pixel is not finite.

    The check and the rounding run on the device of x_BCHW; one byte per value is moved.
    """
    import torch

    finite_B = torch.isfinite(x_BCHW).flatten(1).all(dim=1).cpu().numpy()
    x_BHWC = x_BCHW.detach().float().nan_to_num().clamp(0, 1).permute(0, 2, 3, 1)
    pixels_BHWC = (x_BHWC * 255).round().to(torch.uint8).contiguous().cpu().numpy()
    images: list[np.ndarray | None] = [image if ok else None for image, ok in zip(pixels_BHWC, finite_B, strict=True)]
    return images, [None if ok else Reason.NAN_LATENT for ok in finite_B]


def encode_batch(prior: LatentPrior, batch: Batch) -> torch.Tensor:
    """Latents (B, C, h, w) of the seed images, sampled from the posterior.

    The posterior noise is a stream of the seed, not of the copy: all copies of a seed start from one latent.
    """
    noise_BCHW = noise_batch(prior, batch, "posterior")
    return once_per_seed(batch, lambda x_nCHW, slots: prior.encode(x_nCHW, noise_BCHW[slots]))


def once_per_seed(batch: Batch, function: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> torch.Tensor:
    """(B, ...) rows of `function(x_nCHW, slots)`, which is called on the distinct seed images of the batch only.

    It gets SEED_PIXELS at a time: large images one by one, so that ten copies of a seed cost one of them; small ones
    in one call of the batch's own shape, where a call per image would cost more than it saves. The shape of a call
    follows from that of the batch alone, so that a row's numbers do not depend on how many seeds its batch holds.
    """
    keys = [(rng.run_seed, rng.method, rng.seed_id, image.tobytes())
            for image, rng in zip(batch.images, batch.rngs, strict=True)]
    first: dict[tuple[int, str, str, bytes], int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    slots, place = list(first.values()), {key: n for n, key in enumerate(first)}
    height, width = batch.images[0].shape[:2]
    size = min(len(batch), max(1, SEED_PIXELS // (height * width)))

    def call(chosen: list[int]) -> torch.Tensor:
        rows = [slots[i] for i in chosen]
        return function(to_tensor([batch.images[i] for i in rows]), rows)

    return in_chunks(call, len(slots), size)[[place[key] for key in keys]]


def chunks(rows: int, size: int) -> Iterator[tuple[list[int], int]]:
    """(row numbers, how many of them count) of the calls of `size` rows that cover `rows` rows.

    Every call has one shape, because numbers may depend on it: the last one fills up with the first rows again.
    """
    for start in range(0, rows, size):
        yield [i % rows for i in range(start, start + size)], min(size, rows - start)


def in_chunks(function: Callable[[list[int]], torch.Tensor], rows: int, size: int) -> torch.Tensor:
    """(rows, ...) tensor of `function(row numbers)`, called on `size` rows at a time."""
    import torch

    return torch.cat([function(chosen)[:kept] for chosen, kept in chunks(rows, size)])


def noise_batch(prior: LatentPrior, batch: Batch, stream: str = "noise") -> torch.Tensor:
    """float32 (B, C, h, w) standard normals in the latent shape of the batch, each row from its own stream.

    Drawn on the CPU, then moved to the device of the prior.
    """
    import torch

    height, width = batch.images[0].shape[:2]
    noise_BCHW = torch.from_numpy(batch.normals(stream, prior.latent_shape(height, width)))
    return noise_BCHW.to(getattr(prior, "device", "cpu"))
