"""Whether two CLIP models see images alike: a hash of the image tower, the same in open_clip's and in transformers'
layout, whatever the precision it was stored in.

A decoder of image embeddings paints what its own image encoder saw. A guide that scores such embeddings without
painting them must be this very encoder; another one of the same width would be silently wrong. Nothing here imports
torch: tensors are read one by one and rounded to float16, which copies in half and in full precision agree on.
"""

# D width of the tower

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import read_json, tensor_shapes, tensor_values, weight_files
from rayexpand.models.guide_files import clip_files

Read = Callable[[str], np.ndarray]  # a tensor by its name in the file

_NAMES = {"class_embedding": "embeddings.class_embedding", "positional_embedding":
          "embeddings.position_embedding.weight", "conv1.weight": "embeddings.patch_embedding.weight",
          **{f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in (
              ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")) for kind in ("weight", "bias")}}
_IN_A_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
               "attn.out_proj": "self_attn.out_proj"}


def encoder_space(folder: Path) -> str:
    """The name of the space of `image_encoder/` of a pipeline folder. Raises ModelError."""
    said = read_json(folder / "image_encoder/config.json")
    said = said.get("vision_config", said)
    layers, heads = said.get("num_hidden_layers", 12), said.get("num_attention_heads", 12)
    read, names = _reader([folder / name for name in weight_files(folder, "image_encoder")[1]])
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
    try:
        return _space({"heads": heads, "act": said.get("hidden_act", "quick_gelu")}, _of_transformers(read, prefix,
                                                                                                      layers))
    except KeyError as error:
        raise ModelError(f"{folder}/image_encoder lacks the tensor {error}; fetch or save it again") from error


def guide_space(weights: str, checkpoint: str | None) -> str:
    """The same of a CLIP guide, whose files are on this machine. Raises ModelError for one that is no CLIP with a plain
    vision transformer."""
    files = clip_files(weights, checkpoint)
    if files is None:
        raise ModelError(f"{weights} is a classifier, which knows no image embeddings")
    config, file = files
    vision, other = config.get("vision_cfg", {}), f"guide {weights} is no CLIP with a plain vision transformer"
    if not isinstance(vision.get("layers"), int) or vision.get("timm_model_name"):
        raise ModelError(other)
    if vision.get("pool_type", "tok") != "tok":
        raise ModelError(f"{other}: it pools its tokens by '{vision['pool_type']}', which no image encoder of unCLIP "
                         "does")
    read, _ = _reader([file])
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    try:
        return _space({"heads": vision["width"] // vision.get("head_width", 64), "act": act},
                      _of_open_clip(read, vision["layers"]))
    except KeyError as error:
        raise ModelError(f"{other}: it lacks the tensor {error}") from error


def _space(facts: Mapping[str, Any], tensors: Iterator[tuple[str, np.ndarray]]) -> str:
    hasher = hashlib.sha256(repr(sorted(facts.items())).encode())
    for name, value in tensors:
        hasher.update(f"{name} {list(value.shape)}\n".encode())
        with np.errstate(over="ignore"):
            hasher.update(np.ascontiguousarray(value.astype(np.float16)).tobytes())
    return f"clip-{hasher.hexdigest()[:16]}"


def _of_open_clip(read: Read, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    for name in _NAMES:
        yield name, read(f"visual.{name}")
    for i in range(layers):
        block = f"visual.transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            yield f"{i}.attn.in_proj_{kind}", read(f"{block}.attn.in_proj_{kind}")
            yield from ((f"{i}.{name}.{kind}", read(f"{block}.{name}.{kind}")) for name in _IN_A_BLOCK)
    yield "proj", read("visual.proj")


def _of_transformers(read: Read, prefix: str, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    for name, theirs in _NAMES.items():
        yield name, read(prefix + theirs)
    for i in range(layers):
        block = f"{prefix}encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [read(f"{block}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            yield f"{i}.attn.in_proj_{kind}", np.concatenate(parts)
            yield from ((f"{i}.{name}.{kind}", read(f"{block}.{theirs}.{kind}"))
                        for name, theirs in _IN_A_BLOCK.items())
    yield "proj", read("visual_projection.weight").T


def _reader(files: list[Path]) -> tuple[Read, set[str]]:
    """A function that reads a tensor, and the names of all."""
    where = {name: file for file in files if file.suffix == ".safetensors" for name in tensor_shapes(file)}
    plain = {re.sub(r"^module\.", "", name): name for name in where}  # of a model that was trained in parallel

    def read(name: str) -> np.ndarray:
        stored = plain[name]
        return tensor_values(where[stored], [stored])[stored]

    return read, set(plain)
