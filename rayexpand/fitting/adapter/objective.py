"""What a noise predictor is shown and trained to make small: Min-SNR-weighted squared error and Real-Fake's MMD term.

    paper symbol     name here          meaning, unit
    x_t              z_t                sqrt(abar_t) z0 + sqrt(1 - abar_t) noise
    e_i              e_BCHW             error of row i: target minus prediction (noise or velocity), fp32
    abar_t           abar_B             cumulative product of alphas at the timestep of a row
    w_i              w_B                min(SNR, g) / SNR, for velocities min(SNR, g) / (SNR + 1)
    n_r, N           n, images          rows of this worker, of all workers
    R                world              workers
    a_r              share              R n_r / N, 1 with equal slices: what makes a mean over workers the batch's mean
    L_simple, L_MMD  l_simple, mmd      mean over C, H, W and rows; mean over C, H, W of the squared mean error

DDP averages gradients over workers. A worker's loss is written so that this average is the gradient of the loss of
the whole batch, also where slices differ in size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sum over all workers, without gradient


def min_snr(abar_B: Tensor, gamma: float | None, prediction: str) -> Tensor:
    """float32 weights (B,) of Hang et al. 2023: min(SNR, gamma) / SNR for "epsilon", over SNR + 1 for "v_prediction".

    gamma None: ones. gamma inf: ones for epsilon; abar for v_prediction, whose plain error already weighs a timestep
    by SNR + 1."""
    if gamma is None:
        return torch.ones_like(abar_B, dtype=torch.float32)
    abar = abar_B.double()
    snr = abar / (1 - abar)
    weight = (gamma / snr).clamp(max=1)
    return (weight if prediction == "epsilon" else weight * abar).float()


def noised(z0_BCHW: Tensor, noise_BCHW: Tensor, abar_B: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Latents at the rows' timesteps, and what the UNet should say: the noise, or sqrt(abar) noise - sqrt(1 - abar) z0
    for v_prediction (Salimans and Ho 2022)."""
    signal, spread = (x.view(-1, 1, 1, 1) for x in (abar_B.sqrt(), (1 - abar_B).sqrt()))
    z_t = signal * z0_BCHW + spread * noise_BCHW
    return z_t, noise_BCHW if prediction == "epsilon" else signal * noise_BCHW - spread * z0_BCHW


def l_simple(e_BCHW: Tensor, w_B: Tensor) -> Tensor:
    """Mean over rows of w times the row's mean squared error."""
    return (w_B * e_BCHW.float().square().flatten(1).mean(1)).mean()


def mmd(e_BCHW: Tensor, w_B: Tensor | None = None, *, reduction: Literal["mean", "sum"] = "mean",
        scope: Literal["global", "per_rank"] = "global", images: int | None = None, world: int = 1, share: float = 1.0,
        reduce: Reduce | None = None) -> Tensor:
    """Real-Fake's distribution-matching term: the mean over C, H, W of (mean over the batch of w e) squared (its
    equations 7 and 21), or of the sum over the batch squared (its code); `w_B` None is unweighted (paper).

    `global` is over the rows of all workers: `reduce` adds up, the value is the same on every worker, and the average
    of the workers' gradients is exact. `per_rank` is the mean of one term for each `images` of this worker's rows
    (None: all of them), times `share`: never below the global value after averaging, and larger by up to the number of
    terms where errors are mostly noise."""
    assert world == 1 or scope == "per_rank" or reduce is not None, "a mean over workers needs reduce"
    e = e_BCHW.float()
    if w_B is not None:
        e = e * w_B.view(-1, *[1] * (e.ndim - 1))
    if scope == "per_rank":
        return share * _collapsed(e.unflatten(0, (-1, images or len(e))), reduction, 1).square().mean()
    own = _collapsed(e, reduction, 0) * (share if reduction == "mean" else 1.0)
    if reduce is None:
        return own.square().mean()
    total = reduce(own.detach()) / (world if reduction == "mean" else 1)
    scale = 1 if reduction == "mean" else world
    # value of the batch, gradient of this worker's rows: `own - own.detach()` is exactly zero
    return (total + scale * (own - own.detach())).square().mean()


def _collapsed(e: Tensor, reduction: str, dim: int) -> Tensor:
    return e.mean(dim) if reduction == "mean" else e.sum(dim)


def all_reduce(x: Tensor) -> Tensor:
    """Sum over the workers of torch.distributed's default group."""
    from torch import distributed

    total = x.clone()
    distributed.all_reduce(total)
    return total
