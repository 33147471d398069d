"""LoRA files that people bring are added to the weights of a generator, in float32."""

# A (r, in) and B (out, r) are the two halves of a pair; W (out, in), or of a convolution (out, in, height, width).

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from rayexpand.contract.errors import ModelError
from rayexpand.models.lora_files import LoraFile, LoraPair, lora_files, lora_pairs, lora_problems

log = logging.getLogger(__name__)


@torch.no_grad()
def merge(parts: Mapping[str, torch.nn.Module], loras: Sequence[LoraFile]) -> None:
    """W += scale * alpha / r * B A for every pair of each LoRA, in list order and in float32 whatever the dtype of the
    weights. `parts`: unet, text_encoder, text_encoder_2 as the generator has them.

    Raises ModelError with every reason not to, before any weight is changed by that LoRA.
    """
    weights = {part: dict(model.named_parameters()) for part, model in parts.items()}
    shapes = {part: {name: tuple(W.shape) for name, W in own.items()} for part, own in weights.items()}
    if problems := lora_problems(loras, shapes):
        raise ModelError("\n".join(problems))
    for lora in loras:
        pairs, file = lora_pairs(lora, shapes)[0], lora_files(lora)[-1]
        tensors = _tensors(file, pairs)
        for pair in pairs:
            W = weights[pair.part][pair.weight]
            A, B = (tensors[key].to(W.device, torch.float32).flatten(1) for key in (pair.A, pair.B))
            W.copy_(W.float() + (lora.scale * pair.factor * (B @ A)).view(W.shape))


def _tensors(file: Path, pairs: Sequence[LoraPair]) -> dict[str, torch.Tensor]:
    """All tensors of the file. Raises ModelError for one that cannot be added, or that would change nothing."""
    tensors = load_file(file)
    if bad := [key for key, one in tensors.items() if not torch.isfinite(one).all()]:
        raise ModelError(f"{file}: {bad[0]} is not finite; the training diverged or the file is damaged, use another")
    still = [pair for pair in pairs if not (tensors[pair.A].any() and tensors[pair.B].any())]
    if len(still) == len(pairs):
        raise ModelError(f"{file} holds zeros in all of its {len(pairs)} pairs, such as {pairs[0].B}, and would change "
                         "nothing; it was not trained. Use another, or leave it out")
    if still:
        log.warning("%s: %d of %d pairs are zero and change nothing, such as %s", file, len(still), len(pairs),
                    still[0].B)
    return tensors
