"""Building small models of the real classes: diffusers' and transformers' generator parts, open_clip's guide.

Every size has the embedded default's value unless it is given. Initial weights are drawn from a given stream.
"""

# B rows, T tokens, N captions, E text embedding, K classes

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayexpand.models.tiny.setting import GROUPS, HEAD, GuideSetting, Setting

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableUnCLIPImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from open_clip import CLIP
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

CONTEXT = 16  # tokens of one text
EOS = 1  # never 2: CLIPTextModel reads 2 as "pool at the largest id", which breaks once tokens are added
SPECIALS = ("<|startoftext|>", "<|endoftext|>")


def build_tokenizer(texts: Iterable[str], context: int = CONTEXT) -> CLIPTokenizer:
    """CLIP byte-pair tokenizer in which every word of `texts` is one token; other words fall back to bytes, never to
    an unknown token. It lowercases text and added tokens alike: an added token must be given in lowercase."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letter_of = bytes_to_unicode()
    letters = list(letter_of.values())
    ranks: dict[tuple[str, str], int] = {}  # of the merges, in the order they are learned
    for word in sorted({word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())}):
        spelled = [letter_of[byte] for byte in word.encode()]
        pieces = _merged([*spelled[:-1], spelled[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces[:2] = [pieces[0] + pieces[1]]
    vocabulary = [*SPECIALS, *letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in ranks)]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=list(ranks),
                         model_max_length=context)


def _merged(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """What the merges so far make of a word: the lowest rank goes first, so earlier words can cut into later ones."""
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        i = min(known)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64 (B, T) token ids, T the tokenizer's context."""
    return tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
                     return_tensors="pt").input_ids


def normals(rng: np.random.Generator, shape: Iterable[int]) -> torch.Tensor:
    """float32 standard normals, on the CPU."""
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def initialise(model: torch.nn.Module, rng: np.random.Generator, gain: float = 3**-0.5) -> None:
    """Redraw every parameter from `rng`: normal weights of standard deviation gain / sqrt(fan in) (torch's own default
    is 1 / sqrt(3 fan in)), text embeddings 0.02, norms 1, biases 0. Parameters without a dimension keep their value."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith(("weight", "bias")):
                parameter.fill_(float(name.endswith("weight")))
            elif parameter.ndim:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else len(parameter)
                std = 0.02 if name.startswith(("token_embedding", "positional_embedding")) else gain * fan_in**-0.5
                parameter.copy_(normals(rng, parameter.shape) * std)


def guide_config(vocabulary: int, size: int = 16, context: int = CONTEXT,
                 shape: GuideSetting | None = None) -> dict[str, Any]:
    """open_clip's model configuration. Vision pools at the class token, so that the tower has an exact counterpart in
    CLIPVisionModel; text pools at the end token by id and not at the largest id, which breaks with added tokens."""
    shape = shape or GuideSetting()
    return {"embed_dim": shape.embed,
            "vision_cfg": {"image_size": size, "patch_size": shape.patch, "width": shape.width, "layers": shape.layers,
                           "head_width": shape.head_width, "pool_type": "tok"},
            "text_cfg": {"context_length": context, "vocab_size": vocabulary, "width": shape.text_width,
                         "heads": shape.text_width // HEAD, "layers": shape.text_layers, "mlp_ratio": 2.0,
                         "hf_tokenizer_name": "local", "pool_type": "eos", "eos_id": EOS, "pad_id": EOS}}


def build_guide(vocabulary: int, rng: np.random.Generator, config: dict[str, Any] | None = None) -> CLIP:
    from open_clip import CLIP

    model = CLIP(**(config or guide_config(vocabulary)))
    initialise(model, rng, gain=0.7)
    return model


def build_vae(rng: np.random.Generator, **changes: Any) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    shape: dict[str, Any] = {
        "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "norm_num_groups": GROUPS,
        "sample_size": 16, "latent_channels": 4, "mid_block_add_attention": False}
    vae = AutoencoderKL(in_channels=3, out_channels=3, **{**shape, **changes})
    initialise(vae, rng)
    return vae


def build_unet(rng: np.random.Generator, **changes: Any) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    shape: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4), "norm_num_groups": GROUPS}
    unet = UNet2DConditionModel(**{**shape, **changes})
    initialise(unet, rng)
    return unet


def unclip_unet_shape(features: int) -> dict[str, Any]:
    """What `build_unet` takes for a network that is told an image embedding and the level of noise in it, as wide, and
    no text: on digits attention to texts cost more and followed the embedding worse (measured)."""
    return {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
            "mid_block_type": "UNetMidBlock2D", "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 2 * features, "resnet_time_scale_shift": "scale_shift"}


def assemble_unclip(pipe: StableDiffusionPipeline, unet: UNet2DConditionModel,
                    image_encoder: CLIPVisionModelWithProjection, mean_D: torch.Tensor, std_D: torch.Tensor,
                    ) -> StableUnCLIPImg2ImgPipeline:
    """A whole unCLIP around the autoencoder, texts and scheduler of a generator: diffusers opens no folder in which a
    part is missing. `mean_D`, `std_D`: of image embeddings."""
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessor

    side, normalizer = image_encoder.config.image_size, StableUnCLIPImageNormalizer(len(mean_D))
    normalizer.load_state_dict({"mean": mean_D[None], "std": std_D[None]})
    made = StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False,
                                             image_mean=[0.5] * 3, image_std=[0.5] * 3),
        image_encoder=image_encoder, image_normalizer=normalizer.requires_grad_(False),
        image_noising_scheduler=DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"), tokenizer=pipe.tokenizer,
        text_encoder=pipe.text_encoder, unet=unet, scheduler=pipe.scheduler, vae=pipe.vae)
    made.set_progress_bar_config(disable=True)
    pipe.vae.register_to_config(_name_or_path="")  # else the folder it was read from, which would be in every hash
    return made


def vae_shape(setting: Setting) -> dict[str, Any]:
    """What `build_vae` takes for a setting."""
    levels = len(setting.vae.channels)
    return {"block_out_channels": setting.vae.channels, "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels, "sample_size": setting.size,
            "latent_channels": setting.vae.latent_channels}


def unet_shape(setting: Setting) -> dict[str, Any]:
    """What `build_unet` takes for a setting."""
    unet = setting.unet
    down = ["CrossAttnDownBlock2D" if level in unet.attention else "DownBlock2D" for level in range(len(unet.channels))]
    return {"sample_size": setting.size // setting.vae.factor, "in_channels": setting.vae.latent_channels,
            "out_channels": setting.vae.latent_channels, "block_out_channels": unet.channels,
            "layers_per_block": unet.layers, "down_block_types": tuple(down),
            "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
            "cross_attention_dim": setting.guide.text_width,
            "attention_head_dim": tuple(width // HEAD for width in unet.channels)}


def build_scheduler(prediction_type: str = "v_prediction", **changes: Any) -> DDIMScheduler:
    from diffusers import DDIMScheduler

    return DDIMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type, **changes)


def text_encoder_of(guide: CLIP) -> CLIPTextModel:
    """The guide's text tower as a CLIPTextModel with the same hidden states, to the bit. Frozen."""
    from transformers import CLIPTextConfig, CLIPTextModel

    first = guide.transformer.resblocks[0]
    config = CLIPTextConfig(
        vocab_size=guide.vocab_size, hidden_size=guide.token_embedding.embedding_dim, hidden_act="gelu",
        intermediate_size=first.mlp.c_fc.out_features, num_hidden_layers=len(guide.transformer.resblocks),
        num_attention_heads=first.attn.num_heads, max_position_embeddings=guide.context_length,
        projection_dim=guide.text_projection.shape[1], bos_token_id=0, eos_token_id=EOS, pad_token_id=EOS)
    model = CLIPTextModel(config)
    state = {"embeddings.token_embedding.weight": guide.token_embedding.weight,
             "embeddings.position_embedding.weight": guide.positional_embedding,
             **_blocks(guide.transformer.resblocks),
             **{f"final_layer_norm.{kind}": guide.ln_final.get_parameter(kind) for kind in ("weight", "bias")}}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def image_encoder_of(guide: CLIP, size: int) -> CLIPVisionModelWithProjection:
    """The guide's image tower as a CLIPVisionModelWithProjection. Frozen. It has the same features because the guide
    pools at the class token (`guide_config`): a mean over tokens would be copied without a complaint and be wrong."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = guide.visual
    first, patch = tower.transformer.resblocks[0], tower.conv1.kernel_size[0]
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=tower.conv1.out_channels, hidden_act="gelu", intermediate_size=first.mlp.c_fc.out_features,
        num_hidden_layers=len(tower.transformer.resblocks), num_attention_heads=first.attn.num_heads, image_size=size,
        patch_size=patch, projection_dim=tower.proj.shape[1]))
    state = {"embeddings.class_embedding": tower.class_embedding,
             "embeddings.patch_embedding.weight": tower.conv1.weight,
             "embeddings.position_embedding.weight": tower.positional_embedding,
             **_blocks(tower.transformer.resblocks)}
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        state |= {f"{theirs}.{kind}": getattr(tower, ours).get_parameter(kind) for kind in ("weight", "bias")}
    model.load_state_dict({**{f"vision_model.{name}": one for name, one in state.items()},
                           "visual_projection.weight": tower.proj.T})
    return model.eval().requires_grad_(False)


def _blocks(resblocks: Iterable[Any]) -> dict[str, torch.Tensor]:
    """Transformer blocks of open_clip under their names in transformers."""
    state: dict[str, torch.Tensor] = {}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}
    for i, block in enumerate(resblocks):
        for kind in ("weight", "bias"):
            query, key, value = getattr(block.attn, f"in_proj_{kind}").chunk(3)
            state |= {f"encoder.layers.{i}.self_attn.{n}_proj.{kind}": part
                      for n, part in (("q", query), ("k", key), ("v", value))}
            state |= {f"encoder.layers.{i}.{theirs}.{kind}": block.get_parameter(f"{ours}.{kind}")
                      for ours, theirs in names.items()}
    return state


def assemble(vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel,
             scheduler: DDIMScheduler) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                                   scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_guide(guide: CLIP, tokenizer: CLIPTokenizer, folder: Path, config: dict[str, Any] | None = None) -> None:
    """Write open_clip's local-dir layout: configuration, safetensors, tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model_config = config or guide_config(len(tokenizer))
    size = model_config["vision_cfg"]["image_size"]
    preprocess = {"size": [size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                  "resize_mode": "squash"}
    settings = {"model_cfg": model_config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    save_file({name: t.contiguous() for name, t in guide.state_dict().items()},
              folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
