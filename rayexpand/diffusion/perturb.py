"""The perturbation of a latent that DistDiff and GIF share, and the box it must stay in.

    paper            here         meaning, unit
    e, b             e, b         multiplicative noise (no unit) and bias (latent units) of a row, broadcast over z
    tau(z)           apply        (1 + e) z + b
    P_{z,eps}        project      nearest point of the L-infinity ball of radius eps around z, latent units

DistDiff, equation 3; GIF, equation 1. Both draw e from U(0, 1) and b from N(0, 1) for each row and channel; the
projection is elementwise although e and b are not.
"""

# B rows, C channels, h w latent pixels

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rayexpand.contract.protocols import Batch

if TYPE_CHECKING:
    import torch

Level = Literal["channel", "pixel"]


def draw(batch: Batch, z: torch.Tensor, level: Level = "channel") -> tuple[torch.Tensor, torch.Tensor]:
    """(e, b) of every row, float32 on the device of z (B, C, ...), from the streams "e" and "b" of the row.

    Channel level: one number per row and channel, shape (B, C, 1, ...). Pixel level: the shape of z (an
    ablation of GIF, worse there).
    """
    import torch

    shape = tuple(z.shape[1:]) if level == "pixel" else (z.shape[1], *(1,) * (z.ndim - 2))
    e, b = (torch.from_numpy(noise).to(z.device) for noise in (batch.uniforms("e", shape), batch.normals("b", shape)))
    return e, b


def apply(z: torch.Tensor, e: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """tau(z) = (1 + e) z + b. Differentiable in e and b."""
    return (1 + e) * z + b


def project(u: torch.Tensor, z: torch.Tensor, eps: float) -> torch.Tensor:
    """Each element of u moved to [z - eps, z + eps] where it lies outside; NaN stays NaN.

    Done once, after the update: an energy of the projected latent would have no gradient in clamped elements.
    """
    import torch

    return torch.minimum(torch.maximum(u, z - eps), z + eps)


def clamp_fraction(u: torch.Tensor, z: torch.Tensor, eps: float) -> torch.Tensor:
    """(B,): share of the elements of each row that the projection moves. 0.86 for eps 0.2 and untouched e = 0, b."""
    return ((u - z).abs() > eps).flatten(1).float().mean(1)


def flip_fraction(z: torch.Tensor, before: tuple[Any, Any], after: tuple[Any, Any]) -> torch.Tensor:
    """(B,): share of elements whose displacement e z + b has another sign under `after` = (e, b) than under `before`.

    Most elements sit on the surface of the ball, so guidance acts by the side they sit on: near 0 the step is too
    small to matter, near 0.5 the gradient has exploded.
    """
    sides = [(e * z + b).sign() for e, b in (before, after)]
    return (sides[0] != sides[1]).flatten(1).float().mean(1)
