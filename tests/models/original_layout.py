"""Single files as model sites have them: the parts of a pipeline folder in the key layout of the original code.

The names are the inverse of what diffusers converts (convert_ldm_unet_checkpoint and its like), for any number of
blocks and layers. Text encoders: CLIP as transformers named it, and OpenCLIP, whose query, key and value are one
matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rayexpand.models.folders import read_json

Tensors = dict[str, torch.Tensor]

_RESNET = (("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("norm2.", "out_layers.0."),
           ("conv2.", "out_layers.3."), ("time_emb_proj.", "emb_layers.1."), ("conv_shortcut.", "skip_connection."))
_UNET = (("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
         ("add_embedding.linear_1.", "label_emb.0.0."), ("add_embedding.linear_2.", "label_emb.0.2."),
         ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."))
_VAE_ATTENTION = (("group_norm.", "norm."), ("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."),
                  ("to_out.0.", "proj_out."))
_OPEN_CLIP = (("encoder.layers.", "transformer.resblocks."), ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."),
              (".fc1.", ".c_fc."), (".fc2.", ".c_proj."), ("self_attn.out_proj.", "attn.out_proj."),
              ("embeddings.position_embedding.weight", "positional_embedding"),
              ("embeddings.token_embedding.", "token_embedding."), ("final_layer_norm.", "ln_final."))


def part(folder: Path, name: str) -> Tensors:
    return load_file(next((folder / name).glob("*.safetensors")))


def unet(folder: Path, prefix: str = "model.diffusion_model.") -> Tensors:
    config = read_json(folder / "unet/config.json")
    layers = config["layers_per_block"] + 1
    crossed = [kind.startswith("CrossAttn") for kind in config["up_block_types"]]

    def old(name: str) -> str:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
            way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            at = block * layers + layer + (way == "down")
            return (f"{'input' if way == 'down' else 'output'}_blocks.{at}.{int(kind == 'attentions')}."
                    + (replaced(rest, _RESNET) if kind == "resnets" else rest))
        if match := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            return (f"middle_block.1.{match[3]}" if match[1] == "attentions" else
                    f"middle_block.{2 * int(match[2])}.{replaced(match[3], _RESNET)}")
        if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
            return f"input_blocks.{(int(match[1]) + 1) * layers}.0.op.{match[2]}"
        if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
            block = int(match[1])
            return f"output_blocks.{(block + 1) * layers - 1}.{1 + crossed[block]}.conv.{match[2]}"
        return replaced(name, _UNET)

    return renamed(part(folder, "unet"), lambda name: prefix + old(name))


def vae(folder: Path, prefix: str = "first_stage_model.") -> Tensors:
    last = len(read_json(folder / "vae/config.json")["block_out_channels"]) - 1

    def old(name: str) -> str:
        if match := re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
            return f"{match[1]}.mid." + (f"attn_1.{replaced(match[4], _VAE_ATTENTION)}" if match[2] == "attentions"
                                         else f"block_{int(match[3]) + 1}.{match[4]}")
        name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", name)
        for new, original in (("down_blocks.", "down."), (".resnets.", ".block."), (".downsamplers.0.", ".downsample."),
                              (".upsamplers.0.", ".upsample."), ("conv_norm_out.", "norm_out."),
                              ("conv_shortcut.", "nin_shortcut.")):
            name = name.replace(new, original)
        return name

    made = renamed(part(folder, "vae"), lambda name: prefix + old(name))
    return {name: tensor[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name) else tensor
            for name, tensor in made.items()}


def clip(folder: Path, prefix: str = "cond_stage_model.transformer.text_model.") -> Tensors:
    made = renamed(part(folder, "text_encoder"), lambda name: prefix + name.removeprefix("text_model."))
    places = len(made[f"{prefix}embeddings.position_embedding.weight"])
    return {**made, f"{prefix}embeddings.position_ids": torch.arange(places)[None]}  # as files of that time


def open_clip(folder: Path, name: str = "text_encoder_2", prefix: str = "conditioner.embedders.1.model.") -> Tensors:
    tensors, made = {key.removeprefix("text_model."): one for key, one in part(folder, name).items()}, {}
    for key, tensor in tensors.items():
        if key == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif match := re.match(r"(encoder\.layers\.\d+\.)self_attn\.q_proj\.(weight|bias)", key):
            rows = [tensors[key.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")]
            made[f"{replaced(match[1], _OPEN_CLIP)}attn.in_proj_{match[2]}"] = torch.cat(rows)
        elif not re.search(r"self_attn\.[kv]_proj", key):
            made[replaced(key, _OPEN_CLIP)] = tensor
    return {prefix + key: tensor for key, tensor in made.items()} | {f"{prefix}logit_scale": torch.tensor(4.6)}


def sd(folder: Path) -> Tensors:
    """Stable Diffusion 1.x, with what such files hold beside the parts."""
    return {**unet(folder), **vae(folder), **clip(folder), "alphas_cumprod": torch.linspace(1, 0, 1000)}


def sd2(folder: Path) -> Tensors:
    return {**unet(folder), **vae(folder), **open_clip(folder, "text_encoder", "cond_stage_model.model.")}


def sdxl(folder: Path) -> Tensors:
    return {**unet(folder), **vae(folder), **clip(folder, "conditioner.embedders.0.transformer.text_model."),
            **open_clip(folder)}


def write(file: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata or None)
    return file


def renamed(tensors: Tensors, to: Callable[[str], str]) -> Tensors:
    made = {to(name): tensor for name, tensor in tensors.items()}
    assert len(made) == len(tensors), "two tensors have one name"
    return made


def replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for new, original in pairs:
        name = name.replace(new, original)
    return name
