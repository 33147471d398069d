"""What a single file that people bring is, by the header of its safetensors: family, parts, what its network predicts.

Names of tensors decide, because sizes and file names do not tell. Nothing here loads a weight or imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import ModelError
from rayexpand.models.folders import Header, read_header, tensor_values

SUFFIX = ".safetensors"
FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}
REPOSITORIES = {"sd1": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2": "stabilityai/stable-diffusion-2-1",
                "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
                "playground": "playgroundai/playground-v2.5-1024px-aesthetic"}
JSON_FILES = '--include "*.json" "*.txt" "*.model"'  # what a single file lacks, for `hf download`

# A name of a tensor of each part: what stands before its own name, and how that begins in one of the layouts.
_BLOCKS = (r"((input_blocks|middle_block|output_blocks)\.\d|(down_blocks|up_blocks)\.\d+\.(resnets|attentions|"
           r"downsamplers|upsamplers)\.|mid_block\.(resnets|attentions)\.)")
_CODER = r"(encoder|decoder)\.(conv_in|conv_out|down\.|up\.|mid\.|down_blocks\.|up_blocks\.|mid_block\.)"
_PARTS = {"unet": re.compile(rf"(model\.diffusion_model\.|){_BLOCKS}"),
          "vae": re.compile(rf"(first_stage_model\.|vae\.|){_CODER}"),
          "text_encoder": re.compile(r"(cond_stage_model\.|conditioner\.embedders\.0\.)"),
          "text_encoder_2": re.compile(r"(conditioner\.embedders\.1\.)")}

_LORA = re.compile(r"^lora_|\.lora_[AB]\.|\.lora_(up|down)\.|\.lora\.(up|down)\.|\.(hada|lokr)_|\.dora_scale$")
_EDM_RANGE = ("edm_vpred.sigma_min", "edm_vpred.sigma_max")
_MARKER_TENSORS = ("v_pred", "ztsnr", *_EDM_RANGE, "edm_mean", "edm_std")
_PREDICTS = {"v": "v_prediction", "eps": "epsilon"}  # of modelspec.predict_key; other words stay as they are
_QUANTISED = re.compile(r"(^|\.)(scaled_fp8|scale_weight|weight_scale|SCB|absmax|quant_map|quant_state)(\.|$)")
_WHOLE_BYTES = ("F16", "BF16", "F32", "F64", "I64", "I32")  # I64 and I32 are counters and positions

_MAGIC = ((b"GGUF", "a GGUF file, whose weights are quantised"),
          (b"PK\x03\x04", "a pickle, which can run code when opened"),
          (b"\x80", "a pickle, which can run code when opened"),
          (b"version https://git-lfs", "a pointer of Git LFS in place of the file"),
          (b"<", "a web page in place of the file"))
_SUFFIXES = {".gguf": _MAGIC[0][1], **dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), _MAGIC[1][1])}
_NEXT = {_MAGIC[0][1]: "use the bfloat16 or float16 safetensors of the same model",
         _MAGIC[1][1]: "use its safetensors, or convert it once where you trust it (safetensors.torch.save_file of the "
                       "tensors it holds)",
         _MAGIC[3][1]: "fetch it with `git lfs pull` or `hf download`",
         _MAGIC[4][1]: "download it again; sites that ask for a login answer with a page"}

_BASE = "use the text-to-image model that it was made from"
_OTHER_INPUTS = {
    9: f"an inpainting model: its UNet takes 9 channels, the mask and the masked image among them; {_BASE}",
    8: ("an image-editing model (InstructPix2Pix, CosXL-edit): its UNet takes the seed as 4 more channels and starts "
        f"from pure noise, which would be a method of its own; {_BASE}"),
    7: f"an upscaler: its UNet takes a small image as 3 more channels; {_BASE}",
    5: f"a depth model: its UNet takes a depth map as one more channel; {_BASE}"}


@dataclass(frozen=True, slots=True)
class Marker:
    """What a file says about how its network was trained. `field` is one of the scheduler's configuration, or `edm`."""

    name: str  # the tensor or the line of metadata
    field: str
    value: Any


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A safetensors file as its header tells it."""

    file: Path
    family: str  # a key of FAMILIES; "" where it is no generator that can be sampled here, or an autoencoder alone
    kind: str  # in words
    parts: tuple[str, ...]
    markers: tuple[Marker, ...]
    refusal: str  # why it cannot be used and what to do, "" where it can
    unread: tuple[str, ...]  # tensors that belong to no part

    def prediction(self) -> Marker | None:
        """What says what the network predicts."""
        return next((marker for marker in self.markers if marker.field == "prediction_type"), None)


def describe(file: Path) -> SingleFile:
    """Raises ModelError for a file that is no whole safetensors file."""
    refuse_other_formats(file)
    header = read_header(file)
    family, kind, why = _kind(header)
    if not why and (quantised := quantised_tensors(header)):
        why = (f"its weights are quantised ({', '.join(quantised[:3])}), which is not supported; name the bfloat16 or "
               "float16 file of the same model")
    places = {part: part_tensors(header.shapes, part) for part in _PARTS}
    read = {name for names in places.values() for name in names} | set(_MARKER_TENSORS)
    return SingleFile(file, "" if why else family, kind, tuple(part for part, names in places.items() if names),
                      _markers(file, header), why, tuple(name for name in header.shapes if name not in read))


def refuse_other_formats(file: Path) -> None:
    """Raises ModelError for a file that is not there or of another format, by its suffix and its first bytes."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(32)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({error.strerror or error})") from error
    found = _SUFFIXES.get(file.suffix.lower())
    if start[8:9] != b"{":  # no header of safetensors, whose length may begin as the magic of another format
        found = found or next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)
    if found:
        raise ModelError(f"{file} is {found}; {_NEXT[found]}")
    if file.suffix.lower() != SUFFIX:
        raise ModelError(f"{file} is no {SUFFIX} file, and only those are read; use the safetensors of the model")


def part_tensors(names: Iterable[str], part: str) -> dict[str, str]:
    """The tensors of a part in a file: name in the file -> name without what stands before the names of the part."""
    names, pattern = list(names), _PARTS[part]
    prefix = next((match[1] for name in names if (match := pattern.match(name))), None)
    if prefix is None:
        return {}
    if not prefix and any(_PARTS[other].match(name) for other in _PARTS if other != part for name in names):
        return {}  # a name of another part that looks alike
    return {name: name.removeprefix(prefix) for name in names
            if name.startswith(prefix) and (prefix or name not in _MARKER_TENSORS)}


def quantised_tensors(header: Header) -> list[str]:
    """Tensors of weights in float8 or fewer bits, and those that only quantised weights have."""
    return [f"{name} {kind}" for name, kind in header.types.items()
            if name not in _MARKER_TENSORS and (kind not in _WHOLE_BYTES or _QUANTISED.search(name))]


def fetch(repository: str) -> str:
    """The command that fetches all but the weights of a repository of the hub."""
    return f"hf download {repository} {JSON_FILES} --local-dir {repository.rpartition('/')[2]}"


def _kind(header: Header) -> tuple[str, str, str]:
    """(family, what it is, why it cannot be used) of a file; the first two may be "" and the last one mostly is."""
    names, architecture = header.shapes, header.metadata.get("modelspec.architecture", "")
    if any(_LORA.search(name) for name in names) or "/lora" in architecture:
        return "", "a LoRA", ("it is a LoRA; name it in prior.loras, and in prior.weights the model that it was "
                              "trained on")
    if "emb_params" in names or set(names) == {"clip_l", "clip_g"} or (0 < len(names) < 3 and all(
            len(shape) < 3 for shape in names.values())):
        return "", "an embedding", "it is a textual inversion embedding; name it in prior.embeddings"
    if any(name.startswith(("control_model.", "controlnet_", "control_")) for name in names):
        return "", "a ControlNet", f"it is a ControlNet, which needs an image as its input; {_BASE}"
    for mark, words in (("joint_blocks.", "Stable Diffusion 3"), ("distilled_guidance_layer.", "Chroma"),
                        ("single_stream_modulation.", "FLUX.2"), ("double_blocks.", "FLUX.1")):
        if any(name.removeprefix("model.diffusion_model.").startswith(mark) for name in names):
            return "", words, (f"it is {words}, a rectified flow, and only {', '.join(FAMILIES.values())} are "
                               "supported so far; name one of those")
    if unet := part_tensors(names, "unet"):
        return _unet_kind({own: names[name] for name, own in unet.items()}, names)
    if part_tensors(names, "vae"):
        return "", "an autoencoder", ""
    shown = architecture or f"tensors such as {', '.join(list(names)[:3]) or 'none'}"
    return "", "a file of an unknown kind", (f"it is no generator that we know ({shown}); name a single file of "
                                             f"{', '.join(FAMILIES.values())}")


def _unet_kind(unet: Mapping[str, tuple[int, ...]], file: Mapping[str, tuple[int, ...]]) -> tuple[str, str, str]:
    """The kind of a file with a UNet. `unet`: shapes of its tensors, under their names without prefix."""
    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in file)

    inputs = next((unet[name][1] for name in ("input_blocks.0.0.weight", "conv_in.weight") if name in unet), 4)
    width = next((shape[-1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight")), 0)
    sizes = any(name.startswith(("label_emb.0.", "add_embedding.")) for name in unet)
    if inputs in _OTHER_INPUTS:
        return "", _OTHER_INPUTS[inputs].partition(":")[0], f"it is {_OTHER_INPUTS[inputs]}"
    if has("conditioner.embedders.0.model.") or (sizes and width == 1280):
        return "", "the refiner of Stable Diffusion XL", ("it is the refiner of Stable Diffusion XL, which finishes "
                                                          f"images of the base model; {_BASE}")
    if sizes and has("cond_stage_model.", "embedder.", "noise_augmentor."):
        return "", "an unCLIP model", f"it is an unCLIP model, whose input is the features of an image; {_BASE}"
    if any(name.startswith(("label_emb.weight", "class_embedding.")) for name in unet):
        return "", "an upscaler", f"it is an upscaler, whose input is a noise level; {_BASE}"
    family = "sdxl" if sizes else "sd2" if has("cond_stage_model.model.") or width == 1024 else "sd1"
    alone = not has(*("cond_stage_model.", "conditioner.", "first_stage_model.", "vae."))
    return family, f"the UNet of {FAMILIES[family]} alone" if alone else FAMILIES[family], ""


def _markers(file: Path, header: Header) -> tuple[Marker, ...]:
    there, found = header.shapes, []
    if "edm_mean" in there and "edm_std" in there:
        found += [Marker("edm_mean", "edm", True), Marker("edm_mean", "prediction_type", "epsilon")]
    for name, number in tensor_values(file, [name for name in _EDM_RANGE if there.get(name) in ((), (1,))]).items():
        found.append(Marker(name, name.rpartition(".")[2], float(number.reshape(-1)[0])))
    if _EDM_RANGE[1] in there:
        found += [Marker(_EDM_RANGE[1], "edm", True), Marker(_EDM_RANGE[1], "prediction_type", "v_prediction")]
    if "v_pred" in there:
        found.append(Marker("v_pred", "prediction_type", "v_prediction"))
    if "ztsnr" in there:
        found.append(Marker("ztsnr", "rescale_betas_zero_snr", True))
    if said := header.metadata.get("modelspec.predict_key", "").lower():
        found.append(Marker("modelspec.predict_key", "prediction_type", _PREDICTS.get(said, said)))
    if header.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        found.append(Marker("modelspec.architecture", "prediction_type", "v_prediction"))
    return tuple(found)
