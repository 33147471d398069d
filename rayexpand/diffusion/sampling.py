"""Sampling from a latent diffusion prior: the solvers, the whole loop, and images in and out.

    paper               here              meaning, unit
    z_0, z_t            z_BCHW            latent, clean or at a point (unit of the latent space)
    z_0|t, eps_theta    clean, noise      what the network sees in it, classifier-free guidance already applied
    N                   steps             solver steps of the whole grid
    s                   strength          share of the grid that is executed, in (0, 1]
    lambda              log_snr           log(a / s) of a point; h is its difference over a step
    k                   kappa             share of fresh noise in the noise of a step

What is noise at a point belongs to the weights (`process.py`). How the way back is cut into steps belongs to the
method: the solver is named, and a spacing where it is not that of the weights.

torch is imported where it is used: methods import this module while planning, without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayexpand.contract.protocols import Batch, Cond, LatentPrior
from rayexpand.contract.schema import Reason
from rayexpand.diffusion.process import Point, Prediction, Schedule, Solver, Spacing

if TYPE_CHECKING:
    import torch

__all__ = ["Point", "Prediction", "Schedule", "Solver", "Spacing"]

SEED_PIXELS = 512 * 512  # pixels of seed images per call of an encoder

Fresh = Callable[[int], "torch.Tensor"]  # step of the whole grid -> noise (B, C, H, W)
Step = Callable[["torch.Tensor", Prediction, Point, Point], "torch.Tensor"]


def steps_run(strength: float, steps: int) -> int:
    """How many of `steps` solver steps a strength executes: floor(strength * steps), safe against 0.58 * 50 = 28.99...

    Raises ValueError when that is none.
    """
    run = min(int(np.floor(strength * steps + 1e-6)), steps)
    if run < 1:
        raise ValueError(f"strength {strength:g} * steps {steps} = {strength * steps:g} runs no step and would return "
                         f"the seed image; raise strength to {1 / steps:.3g} or steps to {int(np.ceil(1 / strength))}")
    return run


def stepper(plan: Schedule, fresh: Fresh | None = None) -> Step:
    """step(z, prediction, here, there) -> z of the schedule's solver, to be called once per executed step, in order.

    `fresh(i)` gives the noise of step i, for the steps in `plan.fresh_steps` only. Multistep solvers remember earlier
    predictions of the whole batch: take a new stepper for every batch.
    """
    if plan.solver == "dpmpp_2m":
        return _Multistep(len(plan.steps)).step
    if plan.solver == "unipc":
        return _UniPC(len(plan.steps)).step
    return _FirstOrder(plan, fresh).step


class _FirstOrder:
    """DDIM without fresh noise (Song et al. 2021, eq. 12), which is Euler's step in every family; ancestral sampling
    and LCM with it."""

    def __init__(self, plan: Schedule, fresh: Fresh | None) -> None:
        assert fresh is not None or not plan.fresh_steps, "these steps take fresh noise"
        self.kappa, self.fresh, self.i = plan.kappa, fresh, plan.start

    def step(self, z: torch.Tensor, p: Prediction, here: Point, there: Point) -> torch.Tensor:
        k, i = self.kappa[self.i], self.i
        self.i += 1
        if k == 0 or self.fresh is None:
            return there.mix(p.clean, p.noise)
        return there.mix(p.clean, (1 - k * k) ** 0.5 * p.noise + k * self.fresh(i))


class _Multistep:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): first order in the first and the last step."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.before: tuple[torch.Tensor, float] | None = None  # clean prediction and log(a / s) of the last step

    def step(self, z: torch.Tensor, p: Prediction, here: Point, there: Point) -> torch.Tensor:
        stepped = self._predicted(z, p, here, there) if self.left > 1 else there.mix(p.clean, p.noise)
        self.before, self.left = (p.clean, here.log_snr), self.left - 1
        return stepped

    def _predicted(self, z: torch.Tensor, p: Prediction, here: Point, there: Point) -> torch.Tensor:
        if self.before is None or not math.isfinite(here.log_snr) or not math.isfinite(there.log_snr):
            return there.mix(p.clean, p.noise)
        clean, log_snr = self.before
        h = there.log_snr - here.log_snr
        r_h = (here.log_snr - log_snr) / h
        d = p.clean + (p.clean - clean) / (2 * r_h)
        return there.s / here.s * z - there.a * math.expm1(-h) * d


class _UniPC(_Multistep):
    """UniPC of order 2, bh2, on the clean prediction (Zhao et al. 2023): its predictor is 2M; each new prediction first
    corrects the step that led to it."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.from_there: tuple[torch.Tensor, Point] | None = None  # latent and point before the last step
        self.earlier: tuple[torch.Tensor, float] | None = None  # what `before` was at that step

    def step(self, z: torch.Tensor, p: Prediction, here: Point, there: Point) -> torch.Tensor:
        if self.from_there is not None and self.before is not None:
            z = self._corrected(z, p, here, *self.from_there, self.before[0])
        z_there = self._predicted(z, p, here, there) if self.left > 1 else _first_order(z, p, here, there)
        self.from_there, self.earlier = (z, here), self.before
        self.before, self.left = (p.clean, here.log_snr), self.left - 1
        return z_there

    def _corrected(self, z: torch.Tensor, p: Prediction, here: Point, z_before: torch.Tensor, point: Point,
                   clean: torch.Tensor) -> torch.Tensor:
        """The step from `point` to `here` once more, now that the prediction at its end is known."""
        h = here.log_snr - point.log_snr
        if not math.isfinite(h):
            return z
        phi = math.expm1(-h)
        plain = here.s / point.s * z_before - here.a * phi * clean
        new = p.clean - clean
        if self.earlier is None or not math.isfinite(self.earlier[1]):
            return plain - here.a * phi * 0.5 * new
        r = (self.earlier[1] - point.log_snr) / h  # negative: it lies behind
        first = phi / -h - 1
        b1, b2 = first / phi, 2 * (first / -h - 0.5) / phi
        old_weight = (b1 - b2) / (1 - r)
        return plain - here.a * phi * (old_weight * (self.earlier[0] - clean) / r + (b1 - old_weight) * new)


def _first_order(z: torch.Tensor, p: Prediction, here: Point, there: Point) -> torch.Tensor:
    """A step by the clean prediction alone, since a corrected latent is no longer what the noise was predicted of."""
    if here.s == 0 or not math.isfinite(here.log_snr):
        return there.mix(p.clean, p.noise)
    return there.s / here.s * z + (there.a - there.s * here.a / here.s) * p.clean


def denoise(prior: LatentPrior, z_BCHW: torch.Tensor, plan: Schedule, cond: Cond, fresh: Fresh | None = None,
            ) -> torch.Tensor:
    """Clean latent (B, C, H, W) from one at `plan.first`, by all executed steps of the schedule."""
    step = stepper(plan, fresh)
    for here, there in plan.steps:
        z_BCHW = step(z_BCHW, prior.predict(z_BCHW, here, cond), here, there)
    return z_BCHW


def batch_schedule(prior: LatentPrior, batch: Batch, solver: Solver, steps: int, spacing: Spacing | None = None,
                   ) -> Schedule:
    """The schedule of a call, whose rows execute one number of steps."""
    height, width = batch.images[0].shape[:2]
    plan: Schedule = prior.schedule(solver, steps, batch.draws[0].steps_run, spacing, prior.latent_shape(height, width))
    return plan


def embed_batch(prior: LatentPrior, batch: Batch, guidance_scale: float) -> Cond:
    """What the network is told of each row: its prompt, its negative prompt, and the scale of guidance."""
    return prior.embed([d.prompt for d in batch.draws], [d.negative for d in batch.draws], guidance_scale)


def fresh_noise(prior: LatentPrior, batch: Batch, rows: Sequence[int] | None = None) -> Fresh:
    """The noise that solver steps add, each row from its own stream `step/<number of the step in the whole grid>`."""
    def draw(i: int) -> torch.Tensor:
        noise_BCHW = noise_batch(prior, batch, f"step/{i}")
        return noise_BCHW if rows is None else noise_BCHW[list(rows)]
    return draw


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
