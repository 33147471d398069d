"""Names and shapes of weights against what their config.json asks for: nothing may be absent, of no use or cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayexpand.models.header_check import header_problems, part_problems, weight_problems
from rayexpand.models.sources import PartSource, PriorSources
from tests.models import original_layout as original
from tests.models.families import FAMILIES

Folders, Files = Callable[[str], Path], Callable[[str], PriorSources]


def changed(folder: Path, part: str, to: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A pipeline folder with this part alone, whose tensors were changed."""
    made = Path(shutil.copytree(folder / part, to / part)).parent
    (file,) = (made / part).glob("*.safetensors")
    change(tensors := load_file(file))
    save_file(tensors, file)
    return made


def line(problems: list[str], *words: str) -> None:
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.fast_cases(5)
def test_one_tensor_removed_from_each_part_of_each_fixture_is_named(family_folder: Folders, tmp_path: Path,
                                                                    family: str) -> None:
    folder = family_folder(family)
    assert weight_problems(PriorSources(folder)) == []
    for number, (part, kind) in enumerate(PriorSources(folder).classes().items()):
        (file,) = (folder / part).glob("*.safetensors")
        names = sorted(load_file(file))
        lost = names[(number + 1) * len(names) // 6]
        made = changed(folder, part, tmp_path, lambda tensors, lost=lost: tensors.pop(lost))
        line(header_problems(made, part, kind), str(made / part / file.name), "lacks 1 tensor", lost,
             str(made / part / "config.json"), "fetch or save the weights again")


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
@pytest.mark.fast_cases(1)
def test_one_tensor_removed_from_each_part_of_a_single_file_is_named(single_file: Files, tmp_path: Path,
                                                                     name: str) -> None:
    sources, tensors = single_file(name), load_file(single_file(name).weights)
    assert weight_problems(sources) == []
    lost = {"model.diffusion_model.input_blocks.0.0.weight": "conv_in.weight",
            "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight":
                "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            "model.diffusion_model.label_emb.0.0.weight": "label_emb.0.0.weight",
            "model.diffusion_model.input_blocks.2.0.op.bias": "down_blocks.0.downsamplers.0.conv.bias",
            "first_stage_model.decoder.mid.attn_1.q.weight": "decoder.mid_block.attentions.0.to_q.weight",
            "first_stage_model.quant_conv.bias": "quant_conv.bias",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias": "final_layer_norm.bias",
            "cond_stage_model.model.ln_final.bias": "final_layer_norm.bias",
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight":
                "embeddings.token_embedding.weight",
            "conditioner.embedders.1.model.text_projection": "text_projection.weight"}
    for old, new in lost.items():
        if old in tensors:
            file = original.write(tmp_path / "less.safetensors", {key: one for key, one in tensors.items()
                                                                  if key != old})
            line(weight_problems(PriorSources(file, sources.config)), str(file), new)
    file = original.write(tmp_path / "less.safetensors", {
        key: one for key, one in tensors.items() if not key.endswith("resblocks.1.attn.in_proj_weight")})
    if name != "sd":
        line(weight_problems(PriorSources(file, sources.config)), "lacks 3 tensors", "layers.1.self_attn.q_proj.weight")


def test_a_tensor_of_no_use_is_named(family_folder: Folders, tmp_path: Path) -> None:
    made = changed(family_folder("sd"), "vae", tmp_path, lambda tensors: tensors.update(
        {"decoder.extra.weight": torch.zeros(2)}))
    line(header_problems(made, "vae", "AutoencoderKL"), "diffusion_pytorch_model.safetensors has 1 tensor",
         "has no place for: decoder.extra.weight", "name its configuration")


@pytest.mark.parametrize(("extra", "part"), [
    ("model.diffusion_model.label_emb.0.0.weight", "unet"), ("model.diffusion_model.adapter.weight", "unet"),
    ("first_stage_model.encoder.adapter.weight", "vae"),
    ("cond_stage_model.transformer.text_model.encoder.layers.2.layer_norm1.bias", "text_encoder")])
def test_a_tensor_of_a_single_file_that_the_conversion_leaves_out_is_named(single_file: Files, tmp_path: Path,
                                                                           extra: str, part: str) -> None:
    sources = single_file("sd")
    file = original.write(tmp_path / "more.safetensors", {**load_file(sources.weights), extra: torch.zeros(2)})
    line(part_problems(PartSource(part, sources.folder / part, file), {
        "unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}[part]),
        f"{file} has 1 tensor", extra.rpartition("model.")[2])


def test_what_single_files_hold_beside_the_parts_is_no_problem(single_file: Files, tmp_path: Path) -> None:
    beside = ("first_stage_model.loss.logvar", "first_stage_model.loss.discriminator.main.0.weight", "model_ema.decay",
              "cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight")
    sources = single_file("sd")
    file = original.write(tmp_path / "more.safetensors", {
        **load_file(sources.weights), **{name: torch.zeros(2, 2) for name in beside}})
    assert weight_problems(PriorSources(file, sources.config)) == []


def test_the_last_layer_of_stable_diffusion_2_is_left_out(single_file: Files, tmp_path: Path) -> None:
    """Its files hold all 24 layers and the projection of OpenCLIP; its text encoder ends at the 23rd."""
    sources = single_file("sd2")
    beside = ("transformer.resblocks.23.ln_1.bias", "transformer.resblocks.23.attn.in_proj_weight", "text_projection")
    file = original.write(tmp_path / "more.safetensors", {
        **load_file(sources.weights), **{f"cond_stage_model.model.{name}": torch.zeros(32, 32) for name in beside}})
    assert weight_problems(PriorSources(file, sources.config)) == []


def test_a_shape_of_another_model_is_named_with_both(family_folder: Folders, single_file: Files,
                                                     tmp_path: Path) -> None:
    name = "encoder.layers.0.mlp.fc1.bias"
    made = changed(family_folder("sd"), "text_encoder", tmp_path, lambda tensors: tensors.update(
        {name: torch.zeros(31)}))
    line(header_problems(made, "text_encoder", "CLIPTextModel"), f"{name} is [31] in place of [32]",
         "model.safetensors")
    sources = single_file("sdxl")
    file = original.write(tmp_path / "cut.safetensors", {
        **load_file(sources.weights), "model.diffusion_model.out.2.bias": torch.zeros(9)})
    line(weight_problems(PriorSources(file, sources.config)), f"{file} has 1 tensor of another shape",
         "conv_out.bias is [9] in place of [4]")


def test_weights_of_another_width_are_one_line_of_each_kind(family_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family_folder("sd") / "unet", tmp_path / "unet")).parent
    settings = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(settings | {"block_out_channels": [8, 16]}))
    (problem,) = header_problems(folder, "unet", "UNet2DConditionModel")
    assert "tensors of another shape" in problem
    assert problem.count(" in place of ") == 3
    assert ", ..." in problem


def shards(folder: Path, part: str, to: Path, stem: str, variant: str = "") -> Path:
    """A pipeline folder with this part alone, in two files and their index."""
    made = Path(shutil.copytree(folder / part, to / part)).parent
    (file,) = (made / part).glob("*.safetensors")
    names, tensors = sorted(load_file(file)), load_file(file)
    file.unlink()
    files = {f"{stem}{variant}-0000{half + 1}-of-00002.safetensors": names[half::2] for half in (0, 1)}
    for name, part_names in files.items():
        save_file({one: tensors[one] for one in part_names}, made / part / name)
    index = {"metadata": {}, "weight_map": {one: name for name, part_names in files.items() for one in part_names}}
    (made / part / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return made


@pytest.mark.parametrize(("part", "kind", "stem"), [
    ("unet", "UNet2DConditionModel", "diffusion_pytorch_model"), ("text_encoder", "CLIPTextModel", "model"),
    ("text_encoder_2", "CLIPTextModelWithProjection", "model")])
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_all_shards_are_read_and_the_lacking_one_is_named(family_folder: Folders, tmp_path: Path, part: str, kind: str,
                                                          stem: str, variant: str) -> None:
    folder = shards(family_folder("sdxl"), part, tmp_path, stem, variant)
    assert header_problems(folder, part, kind) == []
    second = folder / part / f"{stem}{variant}-00002-of-00002.safetensors"
    lost, tensors = sorted(load_file(second))[-1], load_file(second)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, second)
    line(header_problems(folder, part, kind), f"{folder / part} lacks 1 tensor", lost)
    second.unlink()
    line(header_problems(folder, part, kind), f"{second} is missing, a shard of the {part}")


def test_the_variant_that_is_loaded_is_the_one_that_is_checked(family_folder: Folders, tmp_path: Path) -> None:
    made = changed(family_folder("sd"), "unet", tmp_path, lambda tensors: tensors.pop("conv_in.bias"))
    full = made / "unet/diffusion_pytorch_model.safetensors"
    half = full.rename(full.with_name("diffusion_pytorch_model.fp16.safetensors"))
    line(header_problems(made, "unet", "UNet2DConditionModel"), str(half), "conv_in.bias")
    shutil.copy(family_folder("sd") / "unet" / full.name, full)
    assert header_problems(made, "unet", "UNet2DConditionModel") == []


def renamed(names: Mapping[str, str]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            new = name
            for one, other in names.items():
                new = new.replace(one, other)
            tensors[new] = tensors.pop(name)
    return change


def test_the_attention_of_autoencoders_of_2022_is_read(family_folder: Folders, tmp_path: Path) -> None:
    made = changed(family_folder("sd"), "vae", tmp_path, renamed({
        "attentions.0.to_q.": "attentions.0.query.", "attentions.0.to_k.": "attentions.0.key.",
        "attentions.0.to_v.": "attentions.0.value.", "attentions.0.to_out.0.": "attentions.0.proj_attn."}))
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(next((made / "vae").glob("*.safetensors")))
    assert header_problems(made, "vae", "AutoencoderKL") == []


def test_text_encoders_with_and_without_the_prefix_are_the_same(family_folder: Folders, tmp_path: Path) -> None:
    def with_prefix(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        tensors["text_projection.weight"] = torch.zeros(24, 32)

    made = changed(family_folder("sd"), "text_encoder", tmp_path / "a", with_prefix)
    assert header_problems(made, "text_encoder", "CLIPTextModel") == []
    made = changed(family_folder("sdxl"), "text_encoder_2", tmp_path / "b", renamed({"text_model.": ""}))
    assert header_problems(made, "text_encoder_2", "CLIPTextModelWithProjection") == []


def test_a_text_encoder_without_projection_is_none_with(family_folder: Folders) -> None:
    line(header_problems(family_folder("sd"), "text_encoder", "CLIPTextModelWithProjection"), "lacks 1 tensor",
         "text_projection.weight")


def test_float8_in_a_folder_is_refused(family_folder: Folders, tmp_path: Path) -> None:
    made = changed(family_folder("sd"), "unet", tmp_path, lambda tensors: tensors.update(
        {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items() if tensor.ndim > 1}))
    line(header_problems(made, "unet", "UNet2DConditionModel"), "F8_E4M3", "bfloat16 or float16 files")


def test_a_configuration_that_builds_nothing_is_named(family_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(family_folder("sd"), tmp_path / "sd"))
    line(header_problems(folder, "unet", "UNetOfTheFuture"), "model_index.json names UNetOfTheFuture",
         "name another model")
    settings = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(settings | {"down_block_types": ["NoSuchBlock2D"] * 2}))
    line(header_problems(folder, "unet", "UNet2DConditionModel"), "unet/config.json", "cannot be built", "NoSuchBlock")
    (folder / "vae/config.json").write_text("{")
    line(header_problems(folder, "vae", "AutoencoderKL"), "vae/config.json cannot be read as JSON")
    (folder / "text_encoder/model.safetensors").unlink()
    line(header_problems(folder, "text_encoder", "CLIPTextModel"), "text_encoder holds no model.safetensors")


def test_a_part_that_is_not_in_the_file_is_named(single_file: Files) -> None:
    sources = single_file("sd")
    line(part_problems(PartSource("text_encoder_2", sources.folder / "text_encoder", sources.weights), "CLIPTextModel"),
         f"{sources.weights} holds no text_encoder_2")


def test_a_file_over_the_shapes_of_another_model_does_not_crash(single_file: Files) -> None:
    sd, sdxl = single_file("sd"), single_file("sdxl")
    for part, kind in PriorSources(sd.folder).classes().items():
        assert part_problems(PartSource(part, sd.folder / part, sdxl.weights), kind) or part == "vae"
        assert part_problems(PartSource(part, sdxl.folder / part, sd.weights), kind) or part == "vae"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_as_many_blocks_and_layers_as_published_models_have(tmp_path: Path, family: str) -> None:
    """Two levels of the fixtures have no block 10, which begins as block 1 does."""
    import diffusers

    levels = {"sd": (["CrossAttn"] * 3 + [""], 2), "sdxl": (["", "CrossAttn", "CrossAttn"], (1, 2, 3))}[family]
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8,) * len(levels[0]), norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=[f"{one}DownBlock2D" for one in levels[0]],
        up_block_types=[f"{one}UpBlock2D" for one in reversed(levels[0])],
        **({"transformer_layers_per_block": levels[1]} if family == "sdxl" else {}))
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 8, 8, 8), norm_num_groups=4, layers_per_block=2,
                                  down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    for part, module in (("unet", unet), ("vae", vae)):
        module.save_pretrained(tmp_path / part)
        file = original.write(tmp_path / f"{part}.safetensors", getattr(original, part)(tmp_path))
        assert part_problems(PartSource(part, tmp_path / part, file), type(module).__name__) == []


def test_the_check_draws_no_random_number(family_folder: Folders) -> None:
    before = torch.get_rng_state()
    assert weight_problems(PriorSources(family_folder("sdxl"))) == []
    assert torch.equal(torch.get_rng_state(), before)
