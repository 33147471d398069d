"""Every layout of LoRA files gives the weights computed by hand, or is refused by the file and the key."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import tensor_shapes
from rayexpand.models.lora_files import LoraFile, _sgm_names, lora_files, lora_hash, lora_pairs, lora_problems
from rayexpand.models.loras import merge
from tests.models import families
from tests.tiny import tiny_adapter, tiny_pipeline

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters")  # of what diffusers skips
Parts = dict[str, torch.nn.Module]
Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 4, 8.0
ATTENTION, CONV = "down_blocks.1.attentions.0.transformer_blocks.0.attn2", "down_blocks.0.resnets.0.conv1"
UNET = [f"{ATTENTION}.to_q", f"{ATTENTION}.to_k", f"{ATTENTION}.to_out.0",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"]
WIDE = [*UNET, CONV, "conv_in", "down_blocks.1.attentions.0.proj_in", "up_blocks.0.upsamplers.0.conv",
        "down_blocks.0.downsamplers.0.conv", "time_embedding.linear_2", "up_blocks.1.resnets.0.conv_shortcut",
        "mid_block.resnets.1.time_emb_proj", "conv_out"]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc2"]


def unet(width: int, **options: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": width,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4), **options})


def text_config(width: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(vocab_size=40, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                          num_attention_heads=2, max_position_embeddings=16, projection_dim=12)


def build_sd() -> Parts:
    from transformers import CLIPTextModel

    return {"unet": unet(16), "text_encoder": CLIPTextModel(text_config(16))}


def load_sdxl(folder: Path) -> Parts:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {"unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
            "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parts]:
    sdxl = load_sdxl(families.build("sdxl", tmp_path_factory.mktemp("families") / "sdxl"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"sd": build_sd(), "sdxl": sdxl}


@pytest.fixture
def parts(bases: dict[str, Parts]) -> Parts:
    return copy.deepcopy(bases["sd"])


def shapes_of(parts: Mapping[str, torch.nn.Module]) -> dict[str, dict[str, tuple[int, ...]]]:
    return {part: {name: tuple(W.shape) for name, W in model.named_parameters()} for part, model in parts.items()}


class Truth:
    """Random halves for some modules, and the weights that they make."""

    def __init__(self, parts: Parts, modules: Mapping[str, list[str]], rank: int = RANK, seed: int = 0) -> None:
        self.parts, self.rank = parts, rank
        numbers = torch.Generator().manual_seed(seed)
        self.pairs: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
        for part, names in modules.items():
            for name in names:
                W = self.weight(part, name)
                A = torch.randn(rank, *W.shape[1:], generator=numbers)
                B = torch.randn(len(W), rank, *[1] * (W.dim() - 2), generator=numbers)
                self.pairs[part, name] = (0.3 * A, 0.3 * B)

    def weight(self, part: str, name: str) -> torch.Tensor:
        return self.parts[part].get_parameter(f"{name}.weight")

    def weights(self, scale: float = 1.0, alpha: float = ALPHA) -> dict[tuple[str, str], torch.Tensor]:
        return {(part, name): self.weight(part, name).detach() + scale * alpha / self.rank * torch.einsum(
            "or,r...->o...", B.flatten(1), A) for (part, name), (A, B) in self.pairs.items()}

    def tensors(self, key: Callable[[str, str], str], A: str = "lora_A", B: str = "lora_B",
                alpha: float | None = None) -> Tensors:
        """By the name that `key(part, module)` gives, without the half."""
        made = {}
        for (part, name), halves in self.pairs.items():
            for end, half in zip((A, B), halves, strict=True):
                made[f"{key(part, name)}{'' if end.startswith('_') else '.'}{end}.weight"] = half
            if alpha is not None:
                made[f"{key(part, name)}.alpha"] = torch.tensor(alpha)
        return made


def prefixed(part: str, module: str) -> str:
    return f"{part}.{module}"


def kohya(part: str, module: str) -> str:
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[part]
    own = module if part == "unet" or module == "text_projection" else f"text_model.{module}"
    return f"{prefix}_{own.replace('.', '_')}"


def settings(parts: Parts, **changes: Any) -> dict[str, str]:
    """The header of a file that diffusers saved."""
    one = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA", "target_modules": ["to_q"], **changes}
    return {"format": "pt", "lora_adapter_metadata": json.dumps(
        {f"{part}.{name}": value for part in parts for name, value in one.items()})}


def save(file: Path, tensors: Tensors, metadata: dict[str, str] | None = None, **fields: Any) -> LoraFile:
    save_file({name: one.contiguous() for name, one in tensors.items()}, file, metadata)
    return LoraFile(file=str(file), **fields)


def assert_merged(parts: Parts, base: Parts, expected: Mapping[tuple[str, str], torch.Tensor]) -> None:
    """The expected weights, all of which moved, and no other one moved."""
    for (part, name), W in expected.items():
        before, after = (models[part].get_parameter(f"{name}.weight") for models in (base, parts))
        assert torch.allclose(after, W, atol=1e-6), name
        assert not torch.allclose(after, before, atol=1e-3), name
    moved = {(part, name.removesuffix(".weight")) for part, model in parts.items()
             for name, W in model.named_parameters() if not torch.equal(W, base[part].get_parameter(name))}
    assert moved == set(expected)


def by_diffusers(parts: Parts, file: str) -> Parts:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline(**copy.deepcopy(parts), vae=None, tokenizer=None,
                                   scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


# -------------------------------------------------------------------------------------------------------------- layouts


def diffusers_old(part: str, module: str) -> str:
    """`attn2.processor.to_q_lora`, `self_attn.to_q_lora`."""
    if part == "unet":
        return "unet." + re.sub(r"(attn[12])\.(to_[a-z]+)(\.0)?$", r"\1.processor.\2", module)
    return f"{part}.text_model." + re.sub(r"([qkv]|out)_proj$", r"to_\1", module)


def layout_of_diffusers(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    return save(folder / "x.safetensors", truth.tensors(prefixed), settings(parts))


def layout_without_settings(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    return save(folder / "x.safetensors", truth.tensors(prefixed), alpha=ALPHA)


def layout_with_alphas(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    return save(folder / "x.safetensors", truth.tensors(prefixed, alpha=ALPHA))


def layout_of_lora_down(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    return save(folder / "x.safetensors", truth.tensors(prefixed, "lora.down", "lora.up"), alpha=ALPHA)


def layout_of_processors(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    return save(folder / "x.safetensors", truth.tensors(diffusers_old, "_lora.down", "_lora.up"), alpha=ALPHA)


def layout_without_prefix(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    return save(folder / "x.safetensors", truth.tensors(lambda part, module: module), alpha=ALPHA)


def layout_of_kohya(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    return save(folder / "x.safetensors", truth.tensors(kohya, "lora_down", "lora_up", ALPHA))


def layout_in_bfloat16(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    tensors = truth.tensors(kohya, "lora_down", "lora_up", ALPHA)
    truth.pairs = {name: (A.bfloat16().float(), B.bfloat16().float()) for name, (A, B) in truth.pairs.items()}
    return save(folder / "x.safetensors", {name: one.bfloat16() for name, one in tensors.items()})


def layout_of_peft(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    save(folder / "adapter_model.safetensors", truth.tensors(lambda part, module: f"base_model.model.{module}"))
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": False, "bias": "none"}))
    return LoraFile(file=str(folder))


def layout_of_peft_in_diffusers(truth: Truth, folder: Path, parts: Parts) -> LoraFile:
    tensors = truth.tensors(lambda part, module: f"{part}.base_model.model.{module}", "lora_A.default",
                            "lora_B.default")
    return save(folder / "x.safetensors", tensors, settings(parts))


LAYOUTS = {  # and what diffusers' load_lora_weights makes of them
    layout_of_diffusers: "exact", layout_of_kohya: "exact", layout_in_bfloat16: "exact",
    layout_without_settings: "half the strength", layout_of_lora_down: "half the strength",
    layout_of_processors: "half the strength", layout_without_prefix: "nothing", layout_of_peft: "nothing",
    layout_of_peft_in_diffusers: "error", layout_with_alphas: "error"}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one.__name__)
def test_a_layout_gives_the_weights_computed_by_hand(bases: dict[str, Parts], parts: Parts, tmp_path: Path,
                                                     layout: Callable[..., LoraFile]) -> None:
    attention_only = layout is layout_of_processors
    truth = Truth(bases["sd"], {"unet": UNET[:3] if attention_only else WIDE,
                                "text_encoder": TEXT[:2] if attention_only else TEXT})
    lora = layout(truth, tmp_path, parts)

    assert lora_problems([lora], shapes_of(parts)) == []
    merge(parts, [lora])

    assert_merged(parts, bases["sd"], truth.weights())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: one.__name__)
def test_what_diffusers_makes_of_it(bases: dict[str, Parts], tmp_path: Path, layout: Callable[..., LoraFile]) -> None:
    """Why names are matched here and not by its loader. A version that is right everywhere shows here."""
    truth = Truth(bases["sd"], {"unet": UNET[:2]})
    file = str(lora_files(layout(truth, tmp_path, {"unet": bases["sd"]["unet"]}))[-1])
    exact, half = truth.weights(), truth.weights(0.5)  # half: alpha is taken to be the rank
    try:
        W = by_diffusers(bases["sd"], file)["unet"].get_parameter(f"{UNET[0]}.weight")
    except (ValueError, AttributeError):
        assert LAYOUTS[layout] == "error"
        return

    now = {"exact": exact["unet", UNET[0]], "half the strength": half["unet", UNET[0]],
           "nothing": truth.weight("unet", UNET[0])}
    assert [name for name, one in now.items() if torch.allclose(W, one, atol=1e-6)] == [LAYOUTS[layout]]


def test_text_encoder_keys_with_and_without_the_lost_prefix(bases: dict[str, Parts], tmp_path: Path) -> None:
    """CLIPTextModel lost text_model. in transformers 5; files have it or not, with settings and without."""
    truth = Truth(bases["sd"], {"text_encoder": TEXT})
    for prefix in ("text_model.", ""):
        tensors = truth.tensors(lambda part, module, prefix=prefix: f"{part}.{prefix}{module}")  # type: ignore[misc]
        for number, (header, alpha) in enumerate(((settings(bases["sd"]), None), (None, ALPHA))):
            parts = copy.deepcopy(bases["sd"])
            merge(parts, [save(tmp_path / f"{prefix}{number}.safetensors", tensors, header, alpha=alpha)])
            assert_merged(parts, bases["sd"], truth.weights())
    old_names = {"text_encoder": {f"text_model.{name}": shape for name, shape in
                                  shapes_of(bases["sd"])["text_encoder"].items()}}
    lora = LoraFile(file=str(tmp_path / "1.safetensors"), alpha=ALPHA)
    assert {one.weight for one in lora_pairs(lora, old_names)[0]} == {f"text_model.{name}.weight" for name in TEXT}


def test_sdxl_has_two_text_encoders(bases: dict[str, Parts], tmp_path: Path) -> None:
    modules = {"unet": [*UNET, "add_embedding.linear_1", "down_blocks.1.attentions.0.proj_in"], "text_encoder": TEXT,
               "text_encoder_2": [f"text_model.{name}" for name in TEXT] + ["text_projection"]}
    truth = Truth(bases["sdxl"], modules)

    def by_te1(part: str, module: str) -> str:
        return kohya(part, module.removeprefix("text_model.")).replace("lora_te_", "lora_te1_")

    for lora in (
            save(tmp_path / "kohya.safetensors", truth.tensors(by_te1, "lora_down", "lora_up", ALPHA)),
            save(tmp_path / "diffusers.safetensors", truth.tensors(prefixed), settings(bases["sdxl"]))):
        parts = copy.deepcopy(bases["sdxl"])
        merge(parts, [lora])
        assert_merged(parts, bases["sdxl"], truth.weights())
    unprefixed = save(tmp_path / "x.safetensors", truth.tensors(lambda part, module: module), alpha=ALPHA)
    problem, = lora_problems([unprefixed], shapes_of(bases["sdxl"]))
    assert "and 11 more does not say of which text encoder it is" in problem


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_names_of_the_original_code_are_those_of_the_checkpoint_converter(family: str, tmp_path: Path) -> None:
    """kohya names modules of the SDXL UNet as the original code does. The oracle is diffusers' converter of whole
    checkpoints; its converter of LoRA files takes the first upsampler of Stable Diffusion 1.x for an attention."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    options: dict[str, Any] = {"layers_per_block": 2}
    if family == "sd":
        options |= {"block_out_channels": (8,) * 4, "attention_head_dim": 4,
                    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
                    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)}
    else:
        options |= {"block_out_channels": (8,) * 3, "attention_head_dim": 4, "transformer_layers_per_block": (1, 2, 3),
                    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
                    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72}
    with torch.device("meta"):
        model = unet(16, **options)
    names = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
    original = _sgm_names(names)
    assert set(original) == set(names)
    # the converter takes both; published files have these, after the attention of their level where there is one
    assert original["up_blocks.0.upsamplers.0.conv"] == f"output_blocks.2.{1 if family == 'sd' else 2}.conv"
    assert original["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    numbers = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    checkpoint = {f"model.diffusion_model.{original[name]}.weight": number for name, number in numbers.items()}
    checkpoint |= {name.replace(".weight", ".bias"): torch.zeros(1) for name in checkpoint}  # it asks for them
    checkpoint |= {f"model.diffusion_model.out.0.{end}": torch.zeros(1) for end in ("weight", "bias")}
    converted = convert_ldm_unet_checkpoint(checkpoint, model.config)
    assert {name: converted[f"{name}.weight"] for name in names} == numbers

    tensors = {f"lora_unet_{original[name].replace('.', '_')}.{half}": torch.zeros(*shape)
               for name in names for W in [model.get_parameter(f"{name}.weight")]
               for half, shape in (("lora_down.weight", (1, *W.shape[1:])), ("lora_up.weight", (len(W), 1)))}
    pairs, problems = lora_pairs(save(tmp_path / "x.safetensors", tensors, alpha=1), shapes_of({"unet": model}))
    assert problems == []
    assert {pair.weight: pair.A for pair in pairs} == {
        f"{name}.weight": f"lora_unet_{original[name].replace('.', '_')}.lora_down.weight" for name in names}


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"attn2.to_k": 3, "to_q": 5}},
    {"alpha_pattern": {r"down_blocks\.1\..*\.to_k": 1}}, {"init_lora_weights": "gaussian"}], ids=str)
def test_what_peft_saved_is_what_peft_merges(bases: dict[str, Parts], parts: Parts, tmp_path: Path,
                                             options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=6, target_modules=["to_q", "to_k", "conv1", "proj_in"], **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(bases["sd"]["unet"]), config)
        for name, one in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(one, std=0.3)
    model.save_pretrained(tmp_path)
    expected = dict(model.merge_and_unload().named_parameters())

    merge(parts, [LoraFile(file=str(tmp_path))])

    for name, W in parts["unet"].named_parameters():
        assert torch.allclose(W, expected[name], atol=1e-6), name
    for name in (f"{UNET[0]}.weight", f"{CONV}.weight"):
        assert not torch.allclose(expected[name], bases["sd"]["unet"].get_parameter(name), atol=1e-3)


def test_several_are_added_in_order_each_with_its_scale(bases: dict[str, Parts], parts: Parts, tmp_path: Path) -> None:
    first, second = (Truth(bases["sd"], {"unet": UNET[:2]}, rank, seed) for rank, seed in ((4, 1), (2, 2)))
    one = save(tmp_path / "1.safetensors", first.tensors(kohya, "lora_down", "lora_up", 8.0), scale=0.7)
    two = save(tmp_path / "2.safetensors", second.tensors(prefixed), alpha=3, scale=-1.5)

    merge(parts, [one, two])

    expected = {name: W + second.weights(-1.5, 3)[name] - second.weight(*name).detach()
                for name, W in first.weights(0.7).items()}
    assert_merged(parts, bases["sd"], expected)


def test_half_precision_weights_are_added_to_in_float32(bases: dict[str, Parts], tmp_path: Path) -> None:
    parts = {"unet": copy.deepcopy(bases["sd"]["unet"]).bfloat16()}
    truth = Truth(copy.deepcopy(parts), {"unet": WIDE})

    merge(parts, [save(tmp_path / "x.safetensors", truth.tensors(prefixed), alpha=ALPHA)])

    for (_, name), W in Truth({"unet": truth.parts["unet"].float()}, {"unet": WIDE}).weights().items():
        assert torch.equal(parts["unet"].get_parameter(f"{name}.weight"), W.bfloat16()), name


def test_a_matrix_is_a_convolution_of_kernel_one(bases: dict[str, Parts], parts: Parts, tmp_path: Path) -> None:
    """Trainers disagree on proj_in, which is a matrix in some UNets and such a convolution in others."""
    name = "down_blocks.1.attentions.0.proj_in"
    truth = Truth(bases["sd"], {"unet": [name]})
    assert truth.weight("unet", name).shape == (16, 16, 1, 1)
    A, B = truth.pairs["unet", name]
    flat = {f"unet.{name}.lora_A.weight": A.flatten(1), f"unet.{name}.lora_B.weight": B.flatten(1)}

    merge(parts, [save(tmp_path / "x.safetensors", flat, alpha=ALPHA)])

    assert_merged(parts, bases["sd"], truth.weights())


# ------------------------------------------------------------------------------------------------------------- refusals


KEY = f"unet.{UNET[0]}"
FLUX = "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"


def changed(tensors: Tensors, drop: str = "", **more: torch.Tensor) -> Tensors:
    return {name: one for name, one in tensors.items() if not drop or drop not in name} | more


Change = Callable[[Tensors], Tensors]
REFUSED: dict[str, tuple[Change, str]] = {
    "a layer that is not there": (
        lambda t: changed(t, **{"unet.mid_block.attentions.7.to_q.lora_A.weight": torch.ones(4, 16),
                                "unet.mid_block.attentions.7.to_q.lora_B.weight": torch.ones(16, 4)}),
        r"unet\.mid_block\.attentions\.7\.to_q\.lora_A\.weight and 1 more changes what is not in unet, text_encoder"),
    "a part that is not there": (
        lambda t: changed(t, **{"lora_te2_text_projection.lora_down.weight": torch.ones(4, 16)}),
        r"lora_te2_text_projection\.lora_down\.weight changes what is not in unet, text_encoder of"),
    "half of a pair": (lambda t: changed(t, f"{UNET[0]}.lora_B"), rf"{KEY}\.lora_A\.weight has no other half"),
    "another width": (
        lambda t: changed(t, **{f"unet.{ATTENTION}.to_k.lora_A.weight": torch.ones(4, 768)}),
        rf"{ATTENTION}\.to_k\.lora_A\.weight \[4, 768\].*not fit.*\[16, 16\].*that of Stable Diffusion 1\.x"),
    "another height": (
        lambda t: changed(t, **{f"{KEY}.lora_B.weight": torch.ones(8, 4)}), r"lora_B\.weight \[8, 4\] does not"),
    "two ranks": (lambda t: changed(t, **{f"{KEY}.lora_B.weight": torch.ones(16, 3)}), r"\[16, 3\] does not fit"),
    "no rank": (lambda t: changed(t, **{f"{KEY}.lora_A.weight": torch.ones(0, 16),
                                        f"{KEY}.lora_B.weight": torch.ones(16, 0)}), r"\[16, 0\] does not fit"),
    "a normalisation": (
        lambda t: changed(t, **{"unet.conv_norm_out.lora_A.weight": torch.ones(4, 8),
                                "unet.conv_norm_out.lora_B.weight": torch.ones(8, 4)}),
        r"conv_norm_out\.lora_A\.weight.*does not fit conv_norm_out\.weight \[8\]"),
    "a bias": (lambda t: changed(t, **{f"{KEY}.lora_B.bias": torch.ones(16)}),
               rf"{KEY}\.lora_B\.bias is no part of a LoRA"),
    "DoRA": (lambda t: changed(t, **{f"lora_unet_{UNET[0].replace('.', '_')}.dora_scale": torch.ones(16)}),
             r"is DoRA \(lora_unet_.*dora_scale\)"),
    "DoRA of peft": (lambda t: changed(t, **{f"{KEY}.lora_magnitude_vector": torch.ones(16)}), "is DoRA"),
    "LoHa": (lambda t: {f"lora_unet_{UNET[0].replace('.', '_')}.hada_w1_a": torch.ones(4, 4)}, "is LoHa"),
    "LoKr": (lambda t: {f"lora_unet_{UNET[0].replace('.', '_')}.lokr_w1": torch.ones(4, 4)}, "is LoKr"),
    "Tucker": (lambda t: changed(t, **{f"{KEY}.lora_mid.weight": torch.ones(4, 4, 3, 3)}), "is LoCon in Tucker form"),
    "full differences": (lambda t: changed(t, **{"lora_unet_conv_in.diff": torch.ones(1)}), "with full differences"),
    "FLUX": (lambda t: {FLUX: torch.ones(4, 16)}, "LoRA of a transformer such as FLUX or Stable Diffusion 3 "
             f"\\({re.escape(FLUX)}"),
    "FLUX by kohya": (lambda t: {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 16)},
                      "FLUX or Stable Diffusion 3"),
    "SD3": (lambda t: {"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(4, 16)},
            "FLUX or Stable Diffusion 3"),
    "a whole model": (lambda t: {"conv_in.weight": torch.ones(4, 16), "conv_in.bias": torch.ones(4)},
                      r"is no LoRA: none of its 2 keys is half of a pair"),
    "two for one weight": (
        lambda t: changed(t, **{f"lora_unet_{UNET[0].replace('.', '_')}.lora_down.weight": torch.ones(4, 16)}),
        rf"{KEY}\.lora_A\.weight.* are for the same weight; give a file with one LoRA"),
    "alpha of nothing": (lambda t: changed(t, **{"unet.conv_in.alpha": torch.tensor(4.0)}),
                         r"unet\.conv_in\.alpha is the alpha of a pair that is not there"),
    "alpha is not finite": (lambda t: changed(t, **{f"{KEY}.alpha": torch.tensor(np.nan)}),
                            rf"{KEY}\.alpha is not one number above 0"),
    "alpha is zero": (lambda t: changed(t, **{f"{KEY}.alpha": torch.tensor(0.0)}), rf"{KEY}\.alpha is not one number"),
}


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_added_is_refused_by_file_and_key(bases: dict[str, Parts], parts: Parts, tmp_path: Path,
                                                         change: Change, words: str) -> None:
    truth = Truth(bases["sd"], {"unet": UNET})
    lora = save(tmp_path / "x.safetensors", change(truth.tensors(prefixed)), settings(parts))

    problems = lora_problems([lora], shapes_of(parts))

    assert len(problems) == 1, problems
    assert problems[0].startswith(f"prior.loras.0: {tmp_path / 'x.safetensors'}")
    assert re.search(words, problems[0]), problems[0]
    with pytest.raises(ModelError, match=words):
        merge(parts, [lora])
    assert_merged(parts, bases["sd"], {})


@pytest.mark.parametrize("name", ["a layer that is not there", "half of a pair", "DoRA"])
def test_what_diffusers_skips_without_an_error(bases: dict[str, Parts], parts: Parts, tmp_path: Path,
                                               name: str) -> None:
    """The reason for refusing these."""
    lora = save(tmp_path / "x.safetensors", REFUSED[name][0](Truth(bases["sd"], {"unet": UNET}).tensors(prefixed)),
                settings({"unet": parts["unet"]}))

    by_diffusers(bases["sd"], lora.file)

    assert lora_problems([lora], shapes_of(parts)) != []


def test_all_is_told_at_once_and_nothing_is_merged(bases: dict[str, Parts], parts: Parts, tmp_path: Path) -> None:
    truth = Truth(bases["sd"], {"unet": UNET})
    fine = layout_of_diffusers(truth, tmp_path, parts)
    loha, lone, bias, width = (REFUSED[name][0] for name in ("LoHa", "half of a pair", "a bias", "another width"))
    two = save(tmp_path / "2.safetensors", loha(truth.tensors(prefixed)))
    three = save(tmp_path / "3.safetensors", width(bias(lone(truth.tensors(prefixed)))), settings(parts))

    problems = lora_problems([fine, two, three, LoraFile(file="no/such.safetensors")], shapes_of(parts))

    assert [line.split(":")[0] for line in problems] == ["prior.loras.1", *["prior.loras.2"] * 3, "prior.loras.3"]
    with pytest.raises(ModelError) as caught:
        merge(parts, [fine, two])
    assert str(caught.value) == problems[0]
    assert_merged(parts, bases["sd"], {})


def test_alpha_must_be_known_once(bases: dict[str, Parts], parts: Parts, tmp_path: Path) -> None:
    truth, shapes = Truth(bases["sd"], {"unet": UNET}), shapes_of(parts)
    tensors = truth.tensors(prefixed)

    unsaid = save(tmp_path / "1.safetensors", tensors)
    assert re.search(r"1\.safetensors: .*lora_A\.weight and 3 more has no alpha.*set alpha",
                     *lora_problems([unsaid], shapes))
    said = save(tmp_path / "2.safetensors", tensors, settings(parts), alpha=4)
    assert re.search(r"says alpha itself, so alpha 4 of this entry would not be used", *lora_problems([said], shapes))
    some = save(tmp_path / "3.safetensors", tensors | {f"{KEY}.alpha": torch.tensor(2.0)}, alpha=12)
    assert {pair.weight: pair.factor for pair in lora_pairs(some, shapes)[0]} == {
        f"{name}.weight": 0.5 if name == UNET[0] else 3.0 for name in UNET}
    other_part = save(tmp_path / "4.safetensors", tensors, settings({"text_encoder": parts["text_encoder"]}))
    assert "has no alpha" in lora_problems([other_part], shapes)[0]
    broken = save(tmp_path / "5.safetensors", tensors, {"lora_adapter_metadata": "{"}, alpha=2)
    assert "lora_adapter_metadata is no JSON object" in lora_problems([broken], shapes)[0]


@pytest.mark.parametrize(("setting", "words"), [
    ({"use_dora": True}, "is DoRA"), ({"peft_type": "LOHA"}, "is LoHa"), ({"peft_type": "LOKR"}, "is LoKr"),
    ({"peft_type": "OFT"}, "is OFT"), ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
    ({"modules_to_save": ["conv_in"]}, "modules_to_save"), ({"bias": "all"}, "bias 'all'"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changed the weights"),
    ({"r": 16}, "has rank 4 and the settings say 16"),
    ({"rank_pattern": {"to_q": 2}}, r"to_q\.lora_A\.weight has rank 4 and the settings say 2"),
    ({"lora_alpha": "8"}, "lora_alpha '8' is no number above 0"),
    ({"alpha_pattern": {"(": 2}}, "alpha_pattern.*no table")],
    ids=lambda one: str(one) if isinstance(one, dict) else "")
def test_settings_of_peft_that_are_not_followed_are_refused(bases: dict[str, Parts], parts: Parts, tmp_path: Path,
                                                            setting: dict[str, Any], words: str) -> None:
    truth = Truth(bases["sd"], {"unet": UNET[:1]})
    folder = layout_of_peft(truth, tmp_path, parts)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | setting))
    header = save(tmp_path / "x.safetensors", truth.tensors(prefixed), settings({"unet": parts["unet"]}, **setting))

    for lora in (folder, header):
        problems = lora_problems([lora], shapes_of(parts))
        assert len(problems) == 1, problems
        assert re.search(words, problems[0]), problems[0]


def test_files_that_are_none(bases: dict[str, Parts], parts: Parts, tmp_path: Path) -> None:
    shapes = shapes_of(parts)
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.txt").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    for name in ("old", "empty", "two", "both"):
        (tmp_path / name).mkdir()
    (tmp_path / "old/adapter_model.bin").write_bytes(b"")
    for name in ("unet", "text_encoder"):
        (tmp_path / "two" / name).mkdir()
        (tmp_path / "two" / name / "adapter_config.json").write_text("{}")
    for name in ("adapter_model", "pytorch_lora_weights"):
        save(tmp_path / "both" / f"{name}.safetensors", {"x": torch.ones(1)})
    base = tiny_pipeline(tmp_path / "model")
    tiny_adapter(tmp_path / "adapter", base, "xyz", strategy="db")
    for name, words in {
            "x.ckpt": "is a pickle", "x.bin": "is a pickle, which can run code.*x.safetensors",
            "x.txt": "is no safetensors file", "cut.safetensors": "cut off, damaged or no safetensors",
            "none.safetensors": "there is no file", "old": "adapter_model.bin is a pickle",
            "empty": "holds none of adapter_model.safetensors", "both": "holds both of",
            "two": "name each of its folders 'text_encoder', 'unet'",
            "adapter": "adapter that `rayexpand fit` made; name it in artifacts.adapter"}.items():
        assert re.search(words, *lora_problems([LoraFile(file=str(tmp_path / name))], shapes)), name


@pytest.mark.parametrize("fields", [{"scale": float("nan")}, {"alpha": 0}, {"alpha": float("inf")}, {"strength": 1}])
def test_fields_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LoraFile(file="x.safetensors", **fields)


def test_numbers_that_change_nothing_or_are_none(bases: dict[str, Parts], parts: Parts, tmp_path: Path,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    truth = Truth(bases["sd"], {"unet": UNET})
    tensors = truth.tensors(prefixed)
    broken = save(tmp_path / "1.safetensors", tensors | {f"{KEY}.lora_B.weight": torch.full((16, 4), torch.inf)},
                  alpha=1)
    with pytest.raises(ModelError, match=rf"1\.safetensors: {KEY}\.lora_B\.weight is not finite"):
        merge(parts, [broken])
    zeros = {name: torch.zeros_like(one) if "lora_B" in name else one for name, one in tensors.items()}
    with pytest.raises(ModelError, match=r"2\.safetensors holds zeros in all of its 4 pairs"):
        merge(parts, [save(tmp_path / "2.safetensors", zeros, alpha=1)])
    assert_merged(parts, bases["sd"], {})

    still = tensors | {f"{KEY}.lora_B.weight": torch.zeros(16, 4)}  # as of a part whose learning rate was 0
    merge(parts, [save(tmp_path / "3.safetensors", still, alpha=ALPHA)])

    assert "1 of 4 pairs are zero and change nothing" in caplog.text
    assert_merged(parts, bases["sd"], {name: W for name, W in truth.weights().items() if name[1] != UNET[0]})


def test_the_hash_is_that_of_the_content(bases: dict[str, Parts], parts: Parts, tmp_path: Path) -> None:
    one = layout_of_diffusers(Truth(bases["sd"], {"unet": UNET}), tmp_path, parts)
    first = lora_hash(one)
    shutil.copy(one.file, tmp_path / "other-name.safetensors")
    assert lora_hash(LoraFile(file=str(tmp_path / "other-name.safetensors"), scale=0.3)) == first
    tensors = load_file(one.file)
    tensors[f"{KEY}.lora_A.weight"][0, 0] += 1
    assert lora_hash(save(tmp_path / "x.safetensors", tensors, settings(parts))) != first

    (tmp_path / "peft").mkdir()
    folder = layout_of_peft(Truth(bases["sd"], {"unet": UNET}), tmp_path / "peft", parts)
    before = lora_hash(folder)
    (tmp_path / "peft/README.md").write_text("notes")
    assert lora_hash(folder) == before
    (tmp_path / "peft/adapter_config.json").write_text('{"r": 4, "lora_alpha": 9}')
    assert lora_hash(folder) != before


def test_headers_alone_are_enough_and_torch_is_not_needed(bases: dict[str, Parts], parts: Parts,
                                                          tmp_path: Path) -> None:
    """While planning, shapes come from the headers of the generator's files."""
    for part, model in parts.items():
        model.save_pretrained(tmp_path / part)
    files = {part: next((tmp_path / part).glob("*.safetensors")) for part in parts}
    lora = layout_of_kohya(Truth(bases["sd"], {"unet": WIDE, "text_encoder": TEXT}), tmp_path, parts)
    pairs, problems = lora_pairs(lora, {part: tensor_shapes(file) for part, file in files.items()})
    assert problems == []
    assert pairs == lora_pairs(lora, shapes_of(parts))[0]

    code = ("import sys\n"
            "from rayexpand.models.folders import tensor_shapes\n"
            "from rayexpand.models.lora_files import LoraFile, lora_problems, lora_hash\n"
            "import rayexpand.models.embedding_files\n"
            "lora, unet = LoraFile(file=sys.argv[1]), sys.argv[2]\n"
            "assert 'not in unet' in lora_problems([lora], {'unet': tensor_shapes(unet)})[0] and lora_hash(lora)\n"
            "assert not {'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code, lora.file, str(files["unet"])], check=True)
