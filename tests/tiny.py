"""Model folders of the real classes with random weights, small enough to be built in every test run.

The weights say nothing about images, but every output depends on every input: that is what tests of mechanics need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.priors import digits, quiet_libraries
from rayexpand.rng import generator, row_key


def _stream(part: str, seed: int) -> np.random.Generator:
    return generator(row_key(seed, "tiny", part, 0, 0, "weights"))


def _guide_config(vocabulary: int) -> dict[str, Any]:
    config = digits.guide_config(vocabulary)
    config["embed_dim"] = 16
    config["vision_cfg"] |= {"width": 16, "layers": 1, "head_width": 8, "patch_size": 8}
    config["text_cfg"] |= {"width": 16, "layers": 1}
    return config


def tiny_pipeline(folder: Path, *, prediction_type: str = "epsilon", size: int = 16, seed: int = 0) -> Path:
    """Write a StableDiffusionPipeline folder: autoencoder factor 2, two UNet levels, text context 16."""
    tokenizer = digits.build_tokenizer()
    guide = digits.build_guide(len(tokenizer), _stream("text", seed), _guide_config(len(tokenizer)))
    vae = digits.build_vae(_stream("vae", seed), block_out_channels=(4, 8), norm_num_groups=4, sample_size=size)
    unet = digits.build_unet(_stream("unet", seed), block_out_channels=(8, 16), norm_num_groups=4,
                             sample_size=size // 2, cross_attention_dim=16, attention_head_dim=8)
    vae.register_to_config(scaling_factor=0.5)
    pipe = digits.assemble(vae, digits.text_encoder_of(guide), tokenizer, unet,
                           digits.build_scheduler(prediction_type))
    with quiet_libraries():
        pipe.save_pretrained(folder)
    return folder


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Write an open_clip folder: 16 px, 16 features."""
    tokenizer = digits.build_tokenizer()
    config = _guide_config(len(tokenizer))
    digits.save_guide(digits.build_guide(len(tokenizer), _stream("clip", seed), config), tokenizer, folder, config)
    return folder
