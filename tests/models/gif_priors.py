"""Small folders of GIF's other generators with random weights, built in a fraction of a second; and the published
configurations of large ones with files that have a header and no content."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayexpand.contract.rng import generator, row_key
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.tiny import architecture, digits, digits_mae
from tests.tiny import tiny_pipeline

SMALL = digits_mae.MaeRecipe(width=16, layers=1, decoder_layers=1, heads=2)  # 17 tokens of 16 channels


def _stream(part: str, seed: int) -> np.random.Generator:
    return generator(row_key(seed, "tiny", part, 0, 0, "weights"))


def tiny_mae(folder: Path, seed: int = 0) -> Path:
    """Write a ViTMAEForPreTraining folder of 16 px."""
    model = digits_mae.build(digits_mae.MaeRecipe(seed=seed, width=16, layers=1, decoder_layers=1, heads=2))
    with torch.no_grad():
        for parameter in model.parameters():  # also the biases, which start at 0
            if parameter.ndim == 1:
                parameter.add_(0.1 * architecture.normals(_stream("mae", seed), parameter.shape))
    with quiet_libraries():
        digits_mae.save(model.eval(), folder)
    return folder


def tiny_unclip(folder: Path, guide: Path, seed: int = 0) -> Path:
    """Write a StableUnCLIPImg2ImgPipeline folder of 16 px around the image tower of an open_clip folder."""
    import open_clip
    from diffusers import StableDiffusionPipeline

    with quiet_libraries():
        pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline(folder.with_name(f"{folder.name}-sd"), seed=seed))
        encoder = architecture.image_encoder_of(open_clip.create_model(f"local-dir:{guide}", require_pretrained=True),
                                                16)
        features = encoder.config.projection_dim
        unet = digits.build_unet(
            _stream("unclip", seed), block_out_channels=(8, 16), norm_num_groups=4, sample_size=8,
            cross_attention_dim=16, attention_head_dim=8, **architecture.unclip_unet_shape(features))
        made = architecture.assemble_unclip(pipe, unet, encoder, torch.linspace(-0.2, 0.2, features),
                                            torch.linspace(0.5, 1.5, features))
        made.save_pretrained(folder)
    return folder


def header(file: Path, shapes: Mapping[str, tuple[int, ...]], filled: tuple[str, ...] = ()) -> Path:
    """A float16 safetensors file of these shapes that takes no room on the disk: all zeros, but for the first number
    of the tensors named in `filled`."""
    entries, at = {}, 0
    for name, shape in shapes.items():
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(entries).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
        for name in filled:
            stream.seek(8 + len(text) + entries[name]["data_offsets"][0])
            stream.write(np.float16(1).tobytes())
    return file


def write(file: Path, values: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1) + "\n")
