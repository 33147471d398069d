"""Tensors of a file under the names that a module has for them, and modules without numbers to hold them against.

Files hold the layout of the original code, or that of diffusers and transformers. diffusers converts the one into the
other; the same conversion runs on numbers when a part is loaded and on empty tensors when it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import MAE, UNCLIP_CLASSES, quiet_libraries, read_json

_TEXT = "text_model."  # which the names of a CLIP text encoder have or not, by the version of transformers
_OPEN_CLIP = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}
_MAE_NAMES = (("decoder.decoder_encoder.layer.", "decoder.decoder_layers."), ("vit.encoder.layer.", "vit.layers."),
              ("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
              ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"),
              ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"))
# What files hold beside the weights of a module: positions, training losses, the image side of CLIP.
_BESIDE = re.compile(r"(^|\.)(position_ids|logit_scale|attn_mask|visual\..*|text_projection(\.weight)?|loss\..*|"
                     r"logvar)$")


def module_class(class_name: str) -> Any:
    """A class of diffusers or transformers by its name. Raises ModelError."""
    import diffusers
    import transformers

    kind = getattr(diffusers, class_name, None) or getattr(transformers, class_name, None)
    if class_name == UNCLIP_CLASSES["image_normalizer"]:  # of a pipeline, and nowhere else by name
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

        kind = StableUnCLIPImageNormalizer
    if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
        return kind
    raise ModelError(f"model_index.json names {class_name}, and neither diffusers nor transformers has such a model; "
                     "install the versions that it asks for, or name another model")


def skeleton(folder: Path, class_name: str) -> Any:
    """The module of a config.json, whose weights are on the meta device. Raises ModelError."""
    from accelerate import init_empty_weights

    read_json(folder / "config.json")
    kind = module_class(class_name)
    try:
        with init_empty_weights(), quiet_libraries():
            if hasattr(kind, "load_config"):  # of diffusers
                return kind.from_config(kind.load_config(folder, local_files_only=True))
            return kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ModelError(f"{folder / 'config.json'}: {class_name} cannot be built of it ({error}); fetch it "
                         "again") from error


def module_names(tensors: Mapping[str, Any], module: Any, *, sharded: bool = False) -> dict[str, Any]:
    """What a folder holds for a module, under the names that loading gives it."""
    named = dict(tensors)
    fix = getattr(module, "_fix_state_dict_keys_on_load", None)  # autoencoders of 2022 have other names of attention
    if fix is not None:
        if not sharded:  # as from_pretrained
            fix(named)
        return named
    if type(module).__name__ == MAE:
        return {_mae_name(name): one for name, one in named.items()}
    return _without_beside(_text_names(named, module), module)


def _mae_name(name: str) -> str:
    """The name in memory of a tensor of a masked autoencoder, as files of the hub name it, and as transformers 5 does
    that saves it again."""
    for theirs, ours in _MAE_NAMES:
        name = name.replace(theirs, ours)
    return name


def converted(tensors: Mapping[str, torch.Tensor], places: Mapping[str, str], part: str,
              module: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors under the module's names, names of the file that it has no use for) of a part of a single file.
    `places`: name in the file -> the part's own name (`part_tensors`)."""
    own = {inner: tensors[name] for name, inner in places.items()}
    with quiet_libraries():
        made = _convert(own, part, module)
    if part.startswith("text_encoder"):
        made = _text_names(made, module)
    made = {name: tensor for name, tensor in made.items() if tensor is not None}
    used = {id(one) for tensor in made.values() for one in (tensor, tensor._base)}
    # OpenCLIP's weights are cut and copied, so that no tensor of the file is found again in what was made of it.
    return _without_beside(made, module), [name for name, inner in places.items() if not part.startswith("text_encoder")
                   and id(own[inner]) not in used and not _BESIDE.search(inner)]


def _convert(own: dict[str, torch.Tensor], part: str, module: Any) -> dict[str, Any]:
    from diffusers.loaders import single_file_utils as original

    def begins(*starts: str) -> bool:
        return any(name.startswith(starts) for name in own)

    if part == "unet":
        if not begins("input_blocks.", "middle_block.", "output_blocks."):
            return own
        return original.convert_ldm_unet_checkpoint({original.LDM_UNET_KEY + name: one for name, one in own.items()},
                                                    dict(module.config))
    if part == "vae":
        if begins("encoder.down_blocks.", "decoder.up_blocks.", "encoder.mid_block.", "decoder.mid_block."):
            return module_names(own, module)
        return original.convert_ldm_vae_checkpoint(own, dict(module.config))
    if not begins("model."):
        return {name.removeprefix("transformer."): one for name, one in own.items()}
    prefix = _OPEN_CLIP[part]
    return original.convert_open_clip_checkpoint(
        module, {prefix + name.removeprefix("model."): one for name, one in own.items()}, prefix=prefix)


def _without_beside(named: Mapping[str, Any], module: Any) -> dict[str, Any]:
    wanted = module.state_dict()
    return {name: one for name, one in named.items() if name in wanted or not _BESIDE.search(name)}


def _text_names(named: Mapping[str, Any], module: Any) -> dict[str, Any]:
    prefix = _TEXT if hasattr(module, _TEXT.rstrip(".")) else ""
    bare = {name.removeprefix(_TEXT): one for name, one in named.items()}
    return {name if name.startswith("text_projection.") else prefix + name: one for name, one in bare.items()}
