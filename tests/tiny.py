"""Model folders of the real classes with random weights, small enough to be built in every test run.

The weights say nothing about images, but every output depends on every input: that is what tests of mechanics need.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts.adapter import AdapterFacts, write_adapter
from rayexpand.contract.rng import generator, row_key
from rayexpand.models.folders import folder_hash, quiet_libraries
from rayexpand.models.tiny import digits


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


def tiny_clip(folder: Path, seed: int = 0, features: int = 16) -> Path:
    """Write an open_clip folder: 16 px."""
    tokenizer = digits.build_tokenizer()
    config = {**_guide_config(len(tokenizer)), "embed_dim": features}
    digits.save_guide(digits.build_guide(len(tokenizer), _stream("clip", seed), config), tokenizer, folder, config)
    return folder


def tiny_adapter(folder: Path, base: Path, class_keys: Sequence[str], *, strategy: str = "ti_db", size: float = 0.3,
                 seed: int = 0, **facts: Any) -> Path:
    """Write an adapter of the pipeline folder `base` with random tokens, and LoRA of rank 2 and alpha 4 with numbers of
    this size on its attention; size 0 is a LoRA that has not been trained yet."""
    import torch
    from safetensors import safe_open

    def normals(part: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(_stream(f"adapter {part}", seed).standard_normal(shape, np.float32))

    lora = {}
    with safe_open(base / "unet/diffusion_pytorch_model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            if module.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) and name != module:
                rows, columns = weights.get_slice(name).get_shape()
                lora[f"{module}.lora_A.weight"] = 0.3 * normals(f"{module} A", 2, columns)
                lora[f"{module}.lora_B.weight"] = size * normals(f"{module} B", rows, 2)
    texts = [json.loads(file.read_text()) for file in sorted(base.glob("text_encoder*/config.json"))]
    noise = json.loads((base / "scheduler/scheduler_config.json").read_text())
    words = dict(zip(("tokenizer_length", "tokenizer_2_length"), (one["vocab_size"] for one in texts), strict=False))
    made = {"base_sha256": folder_hash(base), "strategy": strategy, "classes": tuple(class_keys),
            "names": tuple(class_keys), "metaclasses": ("",) * len(class_keys), "prompt": "a photo of a {token}",
            **words, "prediction_type": noise["prediction_type"], "targets": ("to_q",)}
    has_lora, has_tokens = strategy != "ti", strategy != "db"
    write_adapter(folder, AdapterFacts(**{**made, **({"rank": 2, "alpha": 4.0} if has_lora else {}), **facts}),
                  lora if has_lora else None,
                  *[0.3 * normals(f"tokens{end}", len(class_keys), text["hidden_size"]) if has_tokens else None
                    for end, text in zip(("", "_2"), texts, strict=False)])
    return folder
