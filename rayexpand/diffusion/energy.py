"""What guided methods descend or climb: distances to prototypes, entropy, class agreement, diversity; and the resize in
front of a guide.

    paper                   here               meaning, unit
    theta(x)                f_BD               guide features
    p_c, p_g                class_BD, group_BGD   prototypes of the class of each row, feature units
    D_c, D_g                class_distance, group_distance   L2 norms, not squared (DistDiff)
    s'_j                    class_term         probability of the anchor class (GIF)
    -ln s_y                 class_loss         nats; cross-entropy of the class of each row
    H(s') - H(s)            entropy_gain       nats; grows where the sample gets harder to classify
    KL(sigma(f), sigma(f-bar))   kl_diversity  nats per copy

Every function returns one number per row. Callers sum over rows, never average: a guide in eval mode treats rows
apart, so the gradient of the sum gives each row the gradient it would have alone.
"""

# B rows, K copies or classes, G groups, D features, C channels, H W pixels

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def class_distance(f_BD: torch.Tensor, class_BD: torch.Tensor) -> torch.Tensor:
    """(B,): ||f - p_c||. Its gradient in f has length 1 (0 where f meets the prototype)."""
    import torch

    return torch.linalg.vector_norm(f_BD - class_BD, dim=1)


def nearest_group(f_BD: torch.Tensor, group_BGD: torch.Tensor, valid_BG: torch.Tensor) -> torch.Tensor:
    """int64 (B,): the group prototype with the largest cosine to f, among the valid ones. No gradient.

    The cosine and not the inner product: prototypes are not of unit length.
    """
    import torch.nn.functional as F  # noqa: N812

    cosine_BG = (F.normalize(group_BGD, dim=-1) @ F.normalize(f_BD.detach(), dim=-1)[..., None])[..., 0]
    return cosine_BG.masked_fill(~valid_BG, -2.0).argmax(dim=1)


def group_distance(f_BD: torch.Tensor, group_BGD: torch.Tensor, valid_BG: torch.Tensor) -> torch.Tensor:
    """(B,): ||f - p_g|| to the group of the largest cosine."""
    import torch

    nearest_B = nearest_group(f_BD, group_BGD, valid_BG)
    return class_distance(f_BD, group_BGD[torch.arange(len(f_BD), device=f_BD.device), nearest_B])


def prototype_energy(f_BD: torch.Tensor, class_BD: torch.Tensor, group_BGD: torch.Tensor, valid_BG: torch.Tensor,
                     lambda_c: float = 1.0, lambda_g: float = 1.0) -> torch.Tensor:
    """(B,): lambda_c ||f - p_c|| + lambda_g ||f - p_g|| (DistDiff). A weight of 0 leaves its term out."""
    energy_B = f_BD.new_zeros(len(f_BD))
    if lambda_c:
        energy_B = energy_B + lambda_c * class_distance(f_BD, class_BD)
    if lambda_g:
        energy_B = energy_B + lambda_g * group_distance(f_BD, group_BGD, valid_BG)
    return energy_B


def entropy(logits_BK: torch.Tensor) -> torch.Tensor:
    """(B,): entropy of softmax(logits) in nats. Through log_softmax, so that no probability underflows to NaN."""
    log_BK = logits_BK.log_softmax(dim=1)
    return -(log_BK.exp() * log_BK).sum(dim=1)


def class_loss(logits_BK: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """(B,): -ln of the probability of each row's class, nats."""
    return -logits_BK.log_softmax(dim=1).gather(1, label_B[:, None])[:, 0]


def entropy_gain(logits_BK: torch.Tensor, seed_logits_BK: torch.Tensor) -> torch.Tensor:
    """(B,): H(sample) - H(seed), nats."""
    return entropy(logits_BK) - entropy(seed_logits_BK)


def class_term(logits_BK: torch.Tensor, anchor_B: torch.Tensor) -> torch.Tensor:
    """(B,): probability of each row's anchor class."""
    return logits_BK.softmax(dim=1).gather(1, anchor_B[:, None])[:, 0]


def kl_diversity(f_KD: torch.Tensor, *, reverse: bool = False) -> torch.Tensor:
    """(K,): KL(softmax(f_i) || softmax(mean f)) of the copies of one seed, nats; all 0 for one copy.

    The mean is taken before the softmax. `reverse` swaps the two sides, as GIF's released code does by the argument
    order of its framework. Constant shifts of f change nothing.
    """
    log_KD = f_KD.log_softmax(dim=1)
    mean_1D = f_KD.mean(dim=0, keepdim=True).log_softmax(dim=1)
    if reverse:
        return (mean_1D.exp() * (mean_1D - log_KD)).sum(dim=1)
    return (log_KD.exp() * (log_KD - mean_1D)).sum(dim=1)


def resize(x_BCHW: torch.Tensor, size: tuple[int, int], *, antialias: bool = False) -> torch.Tensor:
    """Images (B, C, *size) by bicubic interpolation, aspect not kept, as two matrix products.

    Equal to torch's `interpolate(mode="bicubic", align_corners=False)` to 1e-6, forward and backward, but its
    gradient is deterministic on a GPU too, where that of `interpolate` adds up with atomics.
    """
    height, width = x_BCHW.shape[-2:]
    if height != size[0]:
        x_BCHW = _matrix(height, size[0], antialias).to(x_BCHW) @ x_BCHW
    if width != size[1]:
        x_BCHW = x_BCHW @ _matrix(width, size[1], antialias).to(x_BCHW).T
    return x_BCHW


@lru_cache(maxsize=64)
def _matrix(old: int, new: int, antialias: bool) -> torch.Tensor:
    """float32 (new, old): what torch's own interpolation does to each unit impulse of one axis, on the CPU."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    with torch.no_grad():
        impulses = torch.eye(old)[None, None]
        return F.interpolate(impulses, (new, old), mode="bicubic", align_corners=False, antialias=antialias)[0, 0]
