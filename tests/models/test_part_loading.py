"""Parts out of single files: the numbers of the folder that they were made from, and those that diffusers makes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.part_loading import load_part
from rayexpand.models.sources import PartSource, PriorSources
from tests.models import original_layout as original
from tests.models.conftest import SINGLE

Folders, Files = Callable[[str], Path], Callable[[str], PriorSources]

PIPELINES = {"sd": diffusers.StableDiffusionImg2ImgPipeline, "sd2": diffusers.StableDiffusionImg2ImgPipeline,
             "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline}


def loaded(sources: PriorSources, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {name: load_part(sources.part(name), kind, dtype) for name, kind in sources.classes().items()}


def assert_equal(one: torch.nn.Module, other: torch.nn.Module) -> None:
    numbers, others = one.state_dict(), other.state_dict()
    assert numbers.keys() == others.keys()
    for name, tensor in numbers.items():
        assert tensor.dtype == others[name].dtype
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.fast_cases(1)
def test_tensors_are_those_of_the_folder_and_of_diffusers(single_file: Files, family_folder: Folders,
                                                          name: str) -> None:
    """diffusers' own single-file pipeline is the oracle; it reads the file in another way."""
    sources = single_file(name)
    with quiet_libraries():
        pipe = PIPELINES[name].from_single_file(str(sources.weights), config=str(sources.config),
                                                local_files_only=True)
    folder = loaded(PriorSources(family_folder(SINGLE[name][0])))
    for part, module in loaded(sources).items():
        assert not module.training
        assert_equal(module, folder[part])
        assert_equal(module, getattr(pipe, part))


def images(name: str, parts: dict[str, Any], folder: Path) -> torch.Tensor:
    """Two images made from images, 5 of 10 guided steps, by the pipeline of diffusers with scheduler and tokenizers of
    a folder."""
    with quiet_libraries():
        pipe = PIPELINES[name].from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    x_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return pipe(["a photo of the digit two", "a zero"], image=x_BCHW, negative_prompt=["one", "one"], strength=0.5,
                num_inference_steps=10, guidance_scale=5.0, output_type="pt",
                generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.fast_cases(1)
def test_images_are_those_of_the_folder(single_file: Files, family_folder: Folders, name: str) -> None:
    folder = family_folder(SINGLE[name][0])
    mine, theirs = images(name, loaded(single_file(name)), folder), images(name, loaded(PriorSources(folder)), folder)
    assert theirs.std() > 0.01
    assert 255 * float((mine - theirs).abs().max()) <= 1.5e-4


def test_images_of_a_file_in_half_precision_differ_by_its_rounding_alone(single_file: Files, family_folder: Folders,
                                                                         tmp_path: Path) -> None:
    """The specification saw 0.09 of 255 grey levels on smaller random weights; these give 0.16."""
    sources, folder = single_file("sd"), family_folder("sd")
    half = original.write(tmp_path / "half.safetensors", {
        key: one.half() if one.is_floating_point() else one for key, one in load_file(sources.weights).items()})
    mine, whole = images("sd", loaded(replace(sources, weights=half)), folder), loaded(PriorSources(folder))
    assert 0 < 255 * float((mine - images("sd", whole, folder)).abs().max()) <= 0.25
    rounded = {part: module.half().float() for part, module in whole.items()}
    assert torch.equal(mine, images("sd", rounded, folder))


def bare(tensors: original.Tensors) -> original.Tensors:
    return {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("family", ["sd", "lightning"])
@pytest.mark.parametrize("layout", [original.unet, lambda folder: bare(original.unet(folder)),
                                    lambda folder: original.part(folder, "unet")],
                         ids=["original", "bare", "diffusers"])
@pytest.mark.fast_cases(2)
def test_a_unet_alone_over_the_parts_of_a_folder(family_folder: Folders, tmp_path: Path, family: str,
                                                 layout: Callable[[Path], original.Tensors]) -> None:
    base = family_folder("sdxl" if family == "lightning" else "sd2v")
    file = original.write(tmp_path / "unet.safetensors", layout(family_folder(family)))
    parts, wanted = loaded(PriorSources(base, parts={"unet": file})), loaded(PriorSources(base))
    wanted["unet"] = load_part(PriorSources(family_folder(family)).part("unet"), "UNet2DConditionModel", torch.float32)
    for name, module in parts.items():
        assert_equal(module, wanted[name])


def old_attention(folder: Path) -> original.Tensors:
    names = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    return original.renamed(original.part(folder, "vae"), lambda name: original.replaced(name, names))


@pytest.mark.parametrize("layout", [lambda folder: original.vae(folder, ""), original.vae,
                                    lambda folder: original.vae(folder, "vae."),
                                    lambda folder: original.part(folder, "vae"), old_attention],
                         ids=["original", "first_stage_model", "vae", "diffusers", "diffusers of 2022"])
@pytest.mark.fast_cases(2)
def test_a_named_autoencoder_replaces_that_of_the_model(single_file: Files, family_folder: Folders, tmp_path: Path,
                                                        layout: Callable[[Path], original.Tensors]) -> None:
    file = original.write(tmp_path / "vae.safetensors", layout(family_folder("sd2v")))
    wanted = load_part(PriorSources(family_folder("sd2v")).part("vae"), "AutoencoderKL", torch.float32)
    for sources in (PriorSources(family_folder("sd")), single_file("sd")):
        own = load_part(sources.part("vae"), "AutoencoderKL", torch.float32)
        assert not torch.equal(own.decoder.conv_in.weight, wanted.decoder.conv_in.weight)
        assert_equal(load_part(replace(sources, vae=file).part("vae"), "AutoencoderKL", torch.float32), wanted)


def test_the_configuration_of_a_named_autoencoder_counts(family_folder: Folders) -> None:
    sources = PriorSources(family_folder("sdxl"), vae=family_folder("playground") / "vae")
    config = load_part(sources.part("vae"), "AutoencoderKL", torch.float32).config
    assert (config.scaling_factor, config.latents_mean) == (0.5, [-1.6574, 1.886, -1.383, 2.5155])


def test_a_unet_with_its_own_configuration(family_folder: Folders) -> None:
    sources = PriorSources(family_folder("sd"), parts={"unet": family_folder("lcm") / "unet"})
    assert load_part(sources.part("unet"), "UNet2DConditionModel", torch.float32).config.time_cond_proj_dim == 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_part_has_the_dtype_that_is_asked_for(single_file: Files, family_folder: Folders,
                                                    dtype: torch.dtype) -> None:
    for sources in (single_file("sdxl"), PriorSources(family_folder("sdxl"))):
        for module in loaded(sources, dtype).values():
            assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}
            assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_a_lacking_tensor_is_named_before_anything_is_loaded(single_file: Files, family_folder: Folders,
                                                            tmp_path: Path) -> None:
    sources = single_file("sdxl")
    less = original.write(tmp_path / "less.safetensors", {
        name: tensor for name, tensor in load_file(sources.weights).items() if not name.endswith(".out.2.bias")})
    with pytest.raises(ModelError, match=r"less\.safetensors lacks 1 tensor of the unet .*conv_out\.bias"):
        load_part(replace(sources, weights=less).part("unet"), "UNet2DConditionModel", torch.float32)
    folder = Path(shutil.copytree(family_folder("sd") / "vae", tmp_path / "vae"))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read: it is cut off"):
        load_part(PartSource("vae", folder, folder), "AutoencoderKL", torch.float32)
