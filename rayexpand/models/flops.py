"""Counting what a generator's networks cost, from its configuration files alone: no weight is read.

Networks are built and called on fake tensors, which have shapes and no content. They say that they are on a CPU and not
on the meta device, because there attention is broken up into matrix products, and here it stays one fused operation.
"""

# B rows, C channels, H W pixels, T tokens, E text embedding

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rayexpand.models.cost import UNIT, Cost, Curve, Work, configurations, counted, keep
from rayexpand.models.folders import quiet_libraries

SIDES = (1, 2, 4)  # times the side the generator was trained at: three points for a curve with three numbers


def count_once(folder: Path) -> Cost:
    """`count`, or what was counted on this machine before."""
    parts = configurations(folder)
    if (found := counted(parts)) is None:
        found = count(parts)
        keep(parts, found)
    return found


def count(parts: dict[str, Any]) -> Cost:
    """What a generator with these configurations by part costs."""
    unet, vae, texts = parts["unet"], parts["vae"], [said for part, said in parts.items() if part.startswith("text")]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = int(np.max(unet.get("sample_size") or vae.get("sample_size", UNIT) // factor)) * factor
    with quiet_libraries(), FakeTensorMode():
        autoencoder = AutoencoderKL.from_config(vae).eval().requires_grad_(False)
        network = UNet2DConditionModel.from_config(unet).eval().requires_grad_(False)
        rest = _rest(unet, texts[0])
        channels = autoencoder.config.latent_channels

        def denoise(z_BCHW: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = network(z_BCHW, torch.zeros(1), return_dict=False, **rest)[0]
            return out

        return Cost(
            name=f"UNet of {sum(one.numel() for one in network.parameters()) / 1e6:,.0f} million parameters",
            known="counted from its configuration", side=side,
            network=_work(denoise, network.config.in_channels, side, factor),
            encode=_work(lambda x: autoencoder.encode(x).latent_dist.mode(), 3, side, 1),
            decode=_work(lambda z: autoencoder.decode(z, return_dict=False)[0], channels, side, factor),
            text=sum(map(_text, texts)), doubles=unet.get("time_cond_proj_dim") is None)


def _rest(unet: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """What a call of the UNet takes beside latent and timestep."""
    width, tokens = unet.get("cross_attention_dim", 1280), text.get("max_position_embeddings", 77)
    rest: dict[str, Any] = {"encoder_hidden_states": torch.zeros(
        1, tokens, width if isinstance(width, int) else max(width))}
    if (guidance := unet.get("time_cond_proj_dim")) is not None:
        rest["timestep_cond"] = torch.zeros(1, guidance)
    if unet.get("class_embed_type") == "projection":
        rest["class_labels"] = torch.zeros(1, unet["projection_class_embeddings_input_dim"])
    if unet.get("addition_embed_type") == "text_time":
        ids = 6
        pooled = unet["projection_class_embeddings_input_dim"] - ids * unet["addition_time_embed_dim"]
        rest["added_cond_kwargs"] = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, ids)}
    return rest


def _work(call: Callable[[torch.Tensor], torch.Tensor], channels: int, side: int, factor: int) -> Work:
    """Of a network whose input has 1 / factor of the side of the image."""
    points = []
    for times in SIDES:
        x_BCHW = torch.zeros(1, channels, *[times * side // factor] * 2, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            out = call(x_BCHW)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(out.sum(), x_BCHW)
        points.append([forward.get_total_flops() / 1e12, backward.get_total_flops() / 1e12])
    q = (np.array(SIDES) * side / UNIT) ** 2
    curves = np.linalg.solve(np.vander(q, increasing=True), np.array(points)).T
    return Work(*(_curve(one) for one in curves))


def _curve(numbers: np.ndarray) -> Curve:
    c_0, c_1, c_2 = (float(np.round(one, 12)) + 0.0 for one in numbers)  # whole operations, and no -0.0
    return c_0, c_1, c_2


def _text(said: dict[str, Any]) -> float:
    """TFLOP of one text."""
    config = CLIPTextConfig(**{name: value for name, value in said.items() if not name.startswith("_")})
    projected = "CLIPTextModelWithProjection" in said.get("architectures", ())
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, config.max_position_embeddings, dtype=torch.int64))
    return counter.get_total_flops() / 1e12
