"""What a file is, by the names and shapes of its tensors: told without torch, and refused with the next step."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from rayexpand.contract.errors import ModelError
from rayexpand.models.single_files import Marker, describe
from rayexpand.models.sources import PriorSources
from tests.commands import ROOT
from tests.models import original_layout as original

IN, MID = "model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.middle_block.0.in_layers.0.weight"
WIDE, WORDS = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight", "cond_stage_model."


def header_only(file: Path, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str] | None = None,
                **metadata: str) -> Path:
    """A safetensors file of these shapes, whose numbers are a hole in the file."""
    sizes = {"F16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1, "I64": 8}
    entries, at = {}, 0
    for name, shape in shapes.items():
        kind, count = (types or {}).get(name, "F16"), 1
        for length in shape:
            count *= length
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at := at + count * sizes[kind]]}
    text = json.dumps({**entries, **({"__metadata__": metadata} if metadata else {})}).encode()
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
    return file


def unet(inputs: int = 4, width: int = 768) -> dict[str, tuple[int, ...]]:
    return {IN: (320, inputs, 3, 3), MID: (1280,), WIDE: (1280, width)}


SIZES = {"model.diffusion_model.label_emb.0.0.weight": (1280, 2816)}
KINDS = {  # what the header holds -> family, parts, words of the kind
    "sd1": ({**unet(), "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
             f"{WORDS}transformer.text_model.final_layer_norm.bias": (768,)}, "sd1", "Stable Diffusion 1.x"),
    "sd2": ({**unet(4, 1024), f"{WORDS}model.ln_final.bias": (1024,)}, "sd2", "Stable Diffusion 2.x"),
    "sdxl": ({**unet(4, 2048), **SIZES, "conditioner.embedders.1.model.ln_final.bias": (1280,)}, "sdxl",
             "Stable Diffusion XL"),
    "original UNet": (unet(4, 1024), "sd2", "the UNet of Stable Diffusion 2.x alone"),
    "UNet without prefix": ({name.removeprefix("model.diffusion_model."): shape
                             for name, shape in (unet(4, 2048) | SIZES).items()}, "sdxl",
                            "the UNet of Stable Diffusion XL alone"),
    "diffusers UNet": ({"conv_in.weight": (320, 4, 3, 3), "add_embedding.linear_1.weight": (1280, 2816),
                        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 2048)}, "sdxl",
                       "the UNet of Stable Diffusion XL alone"),
    "original VAE": ({"encoder.conv_in.weight": (128, 3, 3, 3), "decoder.mid.block_1.norm1.bias": (512,)}, "",
                     "an autoencoder"),
    "VAE with prefix": ({"first_stage_model.decoder.up.0.block.0.norm1.bias": (128,), "v": (1, 1, 1)}, "",
                        "an autoencoder"),
    "diffusers VAE": ({"decoder.mid_block.resnets.0.norm1.bias": (512,), "quant_conv.bias": (8,), "c": (1, 1, 1)}, "",
                      "an autoencoder"),
}


@pytest.mark.parametrize(("shapes", "family", "kind"), KINDS.values(), ids=KINDS)
def test_names_and_shapes_say_what_a_file_is(tmp_path: Path, shapes: dict[str, tuple[int, ...]], family: str,
                                             kind: str) -> None:
    found = describe(header_only(tmp_path / "a.safetensors", shapes))
    assert (found.family, found.kind, found.refusal) == (family, kind, "")


@pytest.mark.parametrize(("name", "parts", "unread"), [
    ("sd", ("unet", "vae", "text_encoder"), ("alphas_cumprod",)), ("sd2", ("unet", "vae", "text_encoder"), ()),
    ("sdxl", ("unet", "vae", "text_encoder", "text_encoder_2"), ())])
def test_parts_of_a_whole_file(single_file: Callable[[str], PriorSources], name: str, parts: tuple[str, ...],
                               unread: tuple[str, ...]) -> None:
    found = describe(single_file(name).weights)
    assert (found.parts, found.unread, found.markers) == (parts, unread, ())


REFUSED = {
    "inpainting": (unet(9), "inpainting.*9 channels.*text-to-image model that it was made from"),
    "editing": (unet(8) | SIZES, "CosXL-edit.*4 more channels.*method of its own.*text-to-image model"),
    "upscaler": (unet(7), "upscaler.*small image"),
    "upscaler by its noise level": (unet() | {"model.diffusion_model.label_emb.weight": (1000, 1024)}, "noise level"),
    "depth": (unet(5, 1024), "depth map"),
    "refiner": (unet(4, 1280) | SIZES | {"conditioner.embedders.0.model.ln_final.bias": (1280,)}, "refiner.*base"),
    "refiner's UNet": (unet(4, 1280) | SIZES, "refiner"),
    "unCLIP": (unet(4, 1024) | SIZES | {f"{WORDS}model.ln_final.bias": (1024,)}, "unCLIP.*features of an image"),
    "SD3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (3, 1, 1)},
            "Stable Diffusion 3, a rectified flow.*supported so far"),
    "FLUX": ({"double_blocks.0.img_attn.qkv.weight": (3, 1, 1)}, r"FLUX\.1, a rectified flow.*name one of those"),
    "LoRA": ({"lora_unet_mid_block_attentions_0.lora_down.weight": (4, 320)}, r"LoRA; name it in prior\.loras"),
    "diffusers LoRA": ({"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 320)}, r"prior\.loras"),
    "embedding": ({"emb_params": (2, 768)}, r"textual inversion.*prior\.embeddings"),
    "SDXL's embedding": ({"clip_g": (2, 1280), "clip_l": (2, 768)}, r"prior\.embeddings"),
    "token of diffusers": ({"<cat-toy>": (768,)}, r"prior\.embeddings"),
    "ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet.*image as its input"),
    "cascade": ({"down_blocks.1.0.channelwise.0.weight": (1, 1, 1), "clip_txt_mapper.weight": (1, 1, 1)},
                "no generator that we know.*clip_txt_mapper.*Stable Diffusion XL"),
    "nothing": ({}, "no generator that we know"),
}


@pytest.mark.parametrize(("shapes", "words"), REFUSED.values(), ids=REFUSED)
def test_other_kinds_are_refused_with_the_next_step(tmp_path: Path, shapes: dict[str, tuple[int, ...]],
                                                    words: str) -> None:
    found = describe(header_only(tmp_path / "a.safetensors", shapes))
    assert found.family == ""
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found.refusal)


@pytest.mark.parametrize(("extra", "kind"), [({}, "F8_E4M3"), ({"scaled_fp8": (2,)}, "F16"),
                                             ({f"{MID}_scale_weight".replace("_scale", ".scale"): (1,)}, "F16"),
                                             ({f"{MID}.absmax": (1,)}, "U8")])
def test_quantised_weights_are_refused(tmp_path: Path, extra: dict[str, tuple[int, ...]], kind: str) -> None:
    found = describe(header_only(tmp_path / "a.safetensors", unet() | extra, {MID: kind}))
    assert "quantised" in found.refusal
    assert next(iter(extra), MID) in found.refusal
    assert "bfloat16 or float16 file" in found.refusal


FORMATS = {"model.gguf": (b"GGUF\x03", "GGUF.*bfloat16 or float16 safetensors"),
           "model.ckpt": (b"PK\x03\x04", "pickle.*convert it once"), "model.pt": (b"", "pickle"),
           "model.bin": (b"\x80\x02}q", "pickle"), "pickle.safetensors": (b"\x80\x04\x95", "pickle"),
           "gguf.safetensors": (b"GGUF\x03", "GGUF"), "zip.safetensors": (b"PK\x03\x04", "pickle"),
           "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS.*git lfs pull"),
           "page.safetensors": (b"<!DOCTYPE html>", "web page.*download it again"),
           "model.onnx": (b"\x08\x07", "no .safetensors file"), "half.safetensors": (b"\x08\x07", "cut off, damaged")}


@pytest.mark.parametrize(("name", "start", "words"), [(name, *one) for name, one in FORMATS.items()], ids=FORMATS)
def test_other_formats_are_told_by_suffix_and_first_bytes(tmp_path: Path, name: str, start: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(start)
    with pytest.raises(ModelError, match=rf"{name} .*{words}"):
        describe(tmp_path / name)


def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path: Path) -> None:
    bare = len(header_only(tmp_path / "a.safetensors", {IN: (4, 4, 3, 3)}, note="").read_bytes()) - 8 - 288
    file = header_only(tmp_path / "a.safetensors", {IN: (4, 4, 3, 3)}, note="x" * (0x280 - bare))
    assert file.read_bytes()[:2] == b"\x80\x02"  # 640, and how a pickle of protocol 2 begins
    assert describe(file).family == "sd1"


MARKERS = {
    "v_pred": ({"v_pred": (0,)}, {}, [("v_pred", "prediction_type", "v_prediction")]),
    "ztsnr": ({"ztsnr": (0,)}, {}, [("ztsnr", "rescale_betas_zero_snr", True)]),
    "metadata v": ({}, {"modelspec.predict_key": "v"}, [("modelspec.predict_key", "prediction_type", "v_prediction")]),
    "metadata epsilon": ({}, {"modelspec.predict_key": "epsilon"},
                         [("modelspec.predict_key", "prediction_type", "epsilon")]),
    "architecture": ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"},
                     [("modelspec.architecture", "prediction_type", "v_prediction")]),
    "playground": ({"edm_mean": (1, 4, 1, 1), "edm_std": (1, 4, 1, 1)}, {},
                   [("edm_mean", "edm", True), ("edm_mean", "prediction_type", "epsilon")]),
}


@pytest.mark.parametrize(("tensors", "metadata", "markers"), MARKERS.values(), ids=MARKERS)
def test_markers_of_the_noise_process(tmp_path: Path, tensors: dict[str, tuple[int, ...]], metadata: dict[str, str],
                                      markers: list[tuple[str, str, object]]) -> None:
    found = describe(header_only(tmp_path / "a.safetensors", unet() | tensors, dict.fromkeys(tensors, "F32"),
                                 **metadata))
    assert found.markers == tuple(Marker(*one) for one in markers)
    assert (found.refusal, found.unread) == ("", ())  # none counts as a tensor of a part, or as one that is not read


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_range_of_cosxl_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    bare = {name.removeprefix("model.diffusion_model."): torch.zeros(shape)
            for name, shape in {IN: (4, 4, 3, 3), MID: (4,)}.items()}
    file = original.write(tmp_path / "a.safetensors", {
        **bare, "edm_vpred.sigma_max": torch.tensor(120.0, dtype=dtype),
        "edm_vpred.sigma_min": torch.tensor([0.002], dtype=dtype)})
    values = {marker.field: marker.value for marker in describe(file).markers}
    assert values == {"sigma_min": pytest.approx(0.002, rel=4e-3), "sigma_max": 120.0, "edm": True,
                      "prediction_type": "v_prediction"}


def test_planning_imports_no_torch() -> None:
    code = "import sys, rayexpand.models.sources; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=ROOT).stdout == "set()\n"
