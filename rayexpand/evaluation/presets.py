"""Published extractors: which content and intake a known name of a distance stands for.

`fid`, `fid_clean`, `kid`, `fd_dinov2` and `cmmd` are written for these alone. `convert` makes a safetensors file of
the file that a publisher gives out, once its sha256 is the published one, and records that sha256 and one of all
tensors in it. `content_problem` computes the second again, so a file with other weights, or one that was changed after
the conversion, gets no known name. The record is not signed: it protects from mistakes, not from forgery.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayexpand.contract.errors import ModelError, UsageError, looked_at
from rayexpand.evaluation.intake import IntakeConfig
from rayexpand.models.folders import metadata_of

if TYPE_CHECKING:
    from torch import Tensor

PresetName = Literal["inception2015", "inception2015_clean", "dinov2_l14", "clip_l14_336"]
SOURCE, TENSORS = "source_sha256", "tensors_sha256"  # in the metadata of a converted file


@dataclass(frozen=True)
class PublishedExtractor:
    """One extractor with its intake. `names`: statistic -> the known name that it has with this extractor."""

    names: Mapping[str, str]
    size: int  # pixels
    intake: IntakeConfig
    sha256: str  # of the file that its publisher gives out
    source: str  # where that is


_TF1 = IntakeConfig(resize="squash", filter="tf1_bilinear")
_INCEPTION = ("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
              "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
              "pt_inception-2015-12-05-6726825d.pth")
# The names of the Inception file and of OpenAI's address state their sha256, the first eight digits and all; the rest
# of the first, and that of DINOv2, are what public projects that pin these files agree on.
PRESETS: dict[str, PublishedExtractor] = {
    "inception2015": PublishedExtractor({"fd": "fid", "kd": "kid"}, 299, _TF1, *_INCEPTION),
    "inception2015_clean": PublishedExtractor({"fd": "fid_clean"}, 299, IntakeConfig(
        resize="squash", filter="bicubic_float"), *_INCEPTION),
    "dinov2_l14": PublishedExtractor(
        {"fd": "fd_dinov2"}, 224, IntakeConfig(resize="squash", filter="bicubic"),
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"),
    "clip_l14_336": PublishedExtractor(
        {"mmd2_rbf10": "cmmd"}, 336, IntakeConfig(filter="bicubic"),
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "https://openaipublic.azureedge.net/clip/models/"
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt"),
}
RESERVED: dict[str, tuple[str, str]] = {known: (preset, statistic) for preset, one in PRESETS.items()
                                        for statistic, known in one.names.items()}  # name -> preset, statistic
TIMM_DINOV2 = "vit_large_patch14_dinov2.lvd142m"
OPEN_CLIP = "ViT-L-14-336-quickgelu"  # OpenAI's weights were trained with QuickGELU


def convert(preset: str, file: str, out: str) -> dict[str, Any]:
    """Writes the safetensors file `out` of the file that the publisher of a preset gives out; facts of both.

    Raises UsageError for an unknown preset and where `out` exists, ModelError where `file` is not the published one.
    """
    from safetensors.torch import save_file

    if preset not in PRESETS:
        raise UsageError(f"{preset!r} is no published extractor; choose {', '.join(PRESETS)}")
    known, path, target = PRESETS[preset], Path(file).expanduser(), Path(out).expanduser()
    if target.exists() or target.suffix != ".safetensors":
        why = "exists already; delete it, or name another" if target.exists() else "does not end in .safetensors"
        raise UsageError(f"{out} {why}")
    if not path.is_file():
        raise ModelError(f"{file} does not exist{looked_at(file)}; fetch it from {known.source}")
    with open(path, "rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    if content != known.sha256:
        raise ModelError(f"{file} is not the published file of {preset}: its sha256 is {content}, that of "
                         f"{known.source} is {known.sha256}; fetch it again from there")
    tensors = _READERS.get(preset, _read_plain)(path)
    facts = {SOURCE: content, TENSORS: tensors_sha256(tensors)}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    save_file(tensors, partial, facts)
    os.replace(partial, target)
    return {"preset": preset, "file": str(target), "tensors": len(tensors), **facts}


def content_problem(preset: str, checkpoint: str) -> str | None:
    """Why a checkpoint is not known to be the published content of a preset; None where it is."""
    path = Path(checkpoint).expanduser()
    found = path.stat()
    return _content_problem(preset, path, (found.st_size, found.st_mtime_ns), PRESETS[preset].sha256)


@cache
def _content_problem(preset: str, path: Path, _version: tuple[int, int], published: str) -> str | None:
    from safetensors.torch import load_file

    facts = metadata_of(path)
    if facts.get(SOURCE) != published:
        return (f"it has no record of being made from {PRESETS[preset].source}; make it with `rayexpand "
                f"convert {preset}`")
    if facts.get(TENSORS) != tensors_sha256(load_file(path)):
        return f"its tensors are not those that were converted; make it again with `rayexpand convert {preset}`"
    return None


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, type, shape and numbers of all tensors by name, however a file holds them."""
    import torch

    hasher = hashlib.sha256()
    for name in sorted(tensors):
        one = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name}\0{one.dtype}\0{list(one.shape)}\0".encode())
        hasher.update(one.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _read_plain(path: Path) -> dict[str, Tensor]:
    import torch

    found = torch.load(path, map_location="cpu", weights_only=True)
    return {name: one.clone().contiguous() for name, one in found.items() if name != "mask_token"}  # DINOv2's training


def _read_clip(path: Path) -> dict[str, Tensor]:
    """Of OpenAI's TorchScript archive, which is code: read only once its sha256 is the published one."""
    import open_clip

    model = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    return {name: one.clone().contiguous() for name, one in model.state_dict().items()}


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {"clip_l14_336": _read_clip}
