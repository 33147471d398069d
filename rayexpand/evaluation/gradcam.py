"""Grad-CAM (Selvaraju et al. 2017): which parts of an image speak for a class, by the last convolutional block.

    paper           here            meaning, unit
    A^k             a_BChw          maps of the last block with positions
    y^c             y_B             logit of the class c, before the softmax
    alpha_k^c       alpha_BC        mean over positions of dy / dA^k
    L^c             map_Bhw         ReLU(sum_k alpha_k A^k), logits per unit of a map

The maps of a network with attention are no sums over positions that a class reads, so such networks are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rayexpand.contract.errors import UsageError


class ClassMaps(NamedTuple):
    map_Bhw: Tensor
    logits_BK: Tensor


def grad_cam(module: nn.Module, layer: str, x_BCHW: Tensor, labels_B: Tensor) -> ClassMaps:
    """Maps of the classes `labels_B` in images that are normalised as the network takes them. It is asked in evaluation
    mode, where rows do not depend on each other."""
    held: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_hook(lambda _, __, out: held.append(out))
    module.eval()
    try:
        with torch.enable_grad():  # a gradient in the maps, even of a network whose weights have none
            logits_BK = module(x_BCHW.detach().requires_grad_())
            y_B = logits_BK.gather(1, labels_B[:, None]).squeeze(1)
            (g_BChw,) = torch.autograd.grad(y_B.sum(), held[-1])
    finally:
        handle.remove()
    return ClassMaps(weighted_map(held[-1].detach(), g_BChw), logits_BK.detach())


def weighted_map(a_BChw: Tensor, g_BChw: Tensor) -> Tensor:
    """(B, h, w): ReLU(sum_k alpha_k A_k), alpha_k the mean gradient of map k."""
    alpha_BC = g_BChw.mean(dim=(2, 3))
    return torch.einsum("bc,bchw->bhw", alpha_BC, a_BChw).clamp(min=0)


def last_block(module: nn.Module, x_BCHW: Tensor) -> str:
    """Name of the module whose output is the last one with channels and positions, (B, C, h, w) with h w > 1: the last
    convolutional block, with the normalisation that follows it where it has one. Raises UsageError for a network with
    attention, or without such a block."""
    if attending := next((type(one).__name__ for one in module.modules() if "attention" in type(one).__name__.lower()),
                         ""):
        raise UsageError(f"its network has attention ({attending}), and Grad-CAM is of convolutional networks")
    names, found = {one: name for name, one in module.named_modules() if name}, list[str]()

    def see(one: nn.Module, _: object, out: object) -> None:
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[2] * out.shape[3] > 1:
            found.append(names[one])

    handles = [one.register_forward_hook(see) for one in names]
    module.eval()
    try:
        with torch.no_grad():
            module(x_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise UsageError("its network has no block with positions, and Grad-CAM needs one")
    return found[-1]
