"""What one call of a generator costs in floating point operations, known before anything is loaded.

Counted are matrix products, convolutions and attention, 2 operations for each multiplication with its addition, as
torch's FlopCounterMode counts them; attention as a fused kernel does it, whose backward pass computes the scores again.
A backward pass is the gradient with respect to the input: weights are frozen, so it costs about as much as the forward
pass and not twice.

On a square image of s pixels a call costs c_0 + c_1 q + c_2 q^2 with q = (s / 512)^2. That is exact: what texts and the
timestep need does not depend on the image (c_0), convolutions and projections go with the pixels (c_1), self-attention
with their square (c_2).

Known are the published architectures below, every folder whose networks were counted on this machine (`count`, which
`rayexpand bench` calls), and masked autoencoders, whose arithmetic follows from their configuration. Nothing here
imports torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import ModelError
from rayexpand.contract.settings import digest
from rayexpand.models.folders import HUB_NAME, cache_root, is_mae, read_json
from rayexpand.storage.notes import keep_note, read_note

Curve = tuple[float, float, float]  # c_0, c_1, c_2

UNIT = 512  # pixels of the side at which q is 1
COUNTED = ("unet", "vae", "text_encoder", "text_encoder_2")  # parts whose configuration decides what a call costs


@dataclass(frozen=True, slots=True)
class Work:
    """TFLOP of one call of a network on one row."""

    forward: Curve
    backward: Curve = (0.0, 0.0, 0.0)

    def at(self, side: float) -> float:
        """Of a forward pass on an image of `side` pixels."""
        return _at(self.forward, side)

    def back_at(self, side: float) -> float:
        """Of a backward pass alone."""
        return _at(self.backward, side)


@dataclass(frozen=True, slots=True)
class Cost:
    """What the networks of a generator cost."""

    name: str  # of the architecture
    known: str  # how it is known that the generator has this architecture
    side: int | None  # pixels the generator was trained at, where that is known
    network: Work  # one denoising forward, without guidance
    encode: Work
    decode: Work
    text: float  # TFLOP of one text, in all text encoders
    doubles: bool = True  # whether classifier-free guidance runs the network twice

    def forwards(self, guidance_scale: float) -> int:
        """Forward passes of the network in one denoising step."""
        return 2 if self.doubles and guidance_scale != 1 else 1


# By `count` from the published configurations; tests/models/test_flops.py counts them again.
_ENCODE = Work((0.0, 1.082299, 0.03436), (0.0, 1.082299, 0.085899))
_DECODE = Work((0.0, 2.480159, 0.03436), (0.0, 2.480159, 0.085899))
SD1 = Cost("Stable Diffusion 1.x", "", 512, Work((0.003008, 0.677771, 0.122495), (0.0, 0.683107, 0.306237)),
           _ENCODE, _DECODE, 0.013299)
SD2 = Cost("Stable Diffusion 2.x", "", 768, Work((0.003992, 0.677771, 0.122495), (0.0, 0.683107, 0.306237)),
           _ENCODE, _DECODE, 0.045127)
SDXL = Cost("Stable Diffusion XL", "", 1024, Work((0.052531, 1.489272, 0.046976), (0.0, 1.501383, 0.117441)),
            _ENCODE, _DECODE, 0.111162)

# Widths of the UNet, width of its texts, transformer layers of its levels; all with the autoencoder of these widths.
_ARCHITECTURES: dict[tuple[Any, Any, Any], Cost] = {
    ((320, 640, 1280, 1280), 768, 1): SD1,
    ((320, 640, 1280, 1280), 1024, 1): SD2,
    ((320, 640, 1280), 2048, (1, 2, 10)): SDXL}
_AUTOENCODER = (128, 256, 512, 512)

# What the name of a model that is not here says, and the side it was trained at: the first that fits.
_NAMES: tuple[tuple[str, Cost, int], ...] = (
    (r"xl.*turbo", SDXL, 512),
    (r"xl|playground-v2", SDXL, 1024),
    (r"sd-turbo|(diffusion|sd)-?v?2.*base", SD2, 512),
    (r"(diffusion|sd)-?v?2", SD2, 768),
    (r"(diffusion|sd)-?v?1", SD1, 512))


# Widths of the transformers of ViT-MAE as published, by the word in the name: encoder and layers, then the decoder's.
_MAES = {"base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}


def cost_of(weights: str) -> Cost | None:
    """What a generator costs, as it was counted on this machine, else by its configuration, else by its name. That of
    Stable Diffusion 1.x where its name says nothing, as `known` then says; None where its configuration is here, is
    none of those above, and was not counted."""
    parts = _configurations(weights)
    if {"unet", "vae"} <= parts.keys():
        return counted(parts) or _published(parts["unet"], parts["vae"])
    if parts.get("", {}).get("model_type") == "vit_mae":
        return replace(autoencoder(parts[""]), known="by its configuration")
    name = weights.partition("@")[0].lower()
    if found := re.search(r"vit-?mae-(base|large|huge)", name):
        width, layers = _MAES[found[1]]
        return replace(autoencoder({"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                                    "patch_size": 14 if found[1] == "huge" else 16}), known="by its name")
    for pattern, cost, side in _NAMES:
        if re.search(pattern, name):
            return replace(cost, known="by its name", side=side, doubles="lcm" not in name)
    return replace(SD1, known="assumed, for its name says nothing", side=None)


# Image towers of CLIP by the letter or word in the name: width, width inside its layers, layers.
_TOWERS = {"b": (768, 3072, 12), "l": (1024, 4096, 24), "h": (1280, 5120, 32), "g": (1408, 6144, 40),
           "bigg": (1664, 8192, 48)}
_TOWER = re.compile(r"vit[-_](base|large|huge|giant|gigantic|b|l|h|g|bigg)[-_](?:patch)?(\d+)(?:.*?[-_](\d{3})\b)?")
_WORDS = {"base": "b", "large": "l", "huge": "h", "giant": "g", "gigantic": "bigg"}


def tower_of(name: str) -> float | None:
    """TFLOP of one image in the transformer that the name of a guide says (ViT-B-32, timm/vit_large_patch14_clip_224);
    None where it says none."""
    if (found := _TOWER.search(name.lower())) is None:
        return None
    width, inner, layers = _TOWERS[_WORDS.get(found[1], found[1])]
    patch, side = int(found[2]), int(found[3] or 224)
    patches = (side // patch) ** 2
    return (_transformer(patches + 1, width, inner, layers)[0] + 2 * patches * 3 * patch * patch * width) / 1e12


def _configurations(weights: str) -> dict[str, Any]:
    """Configurations by part, as far as they are on this machine, in a folder or in the cache of the hub."""
    folder = Path(weights).expanduser()
    with contextlib.suppress(ModelError):  # whoever loads it says so
        if folder.is_dir():
            return configurations(folder)
        if match := HUB_NAME.fullmatch(weights):
            from huggingface_hub import try_to_load_from_cache

            files = {part: try_to_load_from_cache(match["repo"], f"{part}/config.json".lstrip("/"),
                                                  revision=match["revision"]) for part in (*COUNTED, "")}
            return {part: read_json(Path(file)) for part, file in files.items() if isinstance(file, str)}
    return {}


def autoencoder(config: Mapping[str, Any]) -> Cost:
    """Of a masked autoencoder of this config.json, with nothing hidden, at its own size."""
    def said(name: str, default: int) -> int:
        return int(config.get(name, default))

    side, patch, width, other = (said(name, default) for name, default in (
        ("image_size", 224), ("patch_size", 16), ("hidden_size", 768), ("decoder_hidden_size", 512)))
    patches, pixels = (side // patch) ** 2, 3 * patch * patch
    tokens = patches + 1
    encode = _transformer(tokens, width, said("intermediate_size", 3072), said("num_hidden_layers", 12))
    decode = _transformer(tokens, other, said("decoder_intermediate_size", 2048), said("decoder_num_hidden_layers", 8))
    first, ends = 2 * patches * pixels * width, 2 * tokens * other * (width + pixels)
    return Cost("masked autoencoder", "", side, Work((0.0, 0.0, 0.0)), _constant(*(one + first for one in encode)),
                _constant(*(one + ends for one in decode)), 0.0, doubles=False)


def _transformer(tokens: int, width: int, inner: int, layers: int) -> tuple[int, int]:
    """Operations forward, and back to the input."""
    linear, attention = 2 * tokens * width * (4 * width + 2 * inner), 2 * tokens * tokens * width
    return layers * (linear + 2 * attention), layers * (linear + 5 * attention)


def _constant(forward: int, backward: int) -> Work:
    return Work((forward / 1e12, 0.0, 0.0), (backward / 1e12, 0.0, 0.0))


def _published(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Cost | None:
    """Of an architecture above."""
    widths, texts, layers = (_hashable(unet.get(name, default)) for name, default in (
        ("block_out_channels", ()), ("cross_attention_dim", 1280), ("transformer_layers_per_block", 1)))
    found = _ARCHITECTURES.get((widths, texts, layers))
    if found is None or _hashable(vae.get("block_out_channels", ())) != _AUTOENCODER:
        return None
    side = unet.get("sample_size")
    return replace(found, known="by its configuration", doubles=unet.get("time_cond_proj_dim") is None,
                   side=side * 2 ** (len(_AUTOENCODER) - 1) if isinstance(side, int) else found.side)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def counted(parts: Mapping[str, Any]) -> Cost | None:
    """What `keep` wrote for networks of these configurations."""
    if (found := read_note(_file(parts))) is None:
        return None
    with contextlib.suppress(TypeError, KeyError, AttributeError):
        works = {name: Work(**{way: tuple(curve) for way, curve in found[name].items()})
                 for name in ("network", "encode", "decode")}
        return Cost(**{**found, **works})
    return None


def keep(parts: Mapping[str, Any], cost: Cost) -> None:
    """Writes what networks of these configurations cost into the cache of this machine."""
    keep_note(_file(parts), asdict(cost))


def configurations(folder: Path) -> dict[str, Any]:
    """Configurations by part of a generator's folder, without what says nothing of its size. Raises ModelError."""
    return {part: read_json(file) for part in (*COUNTED, *([""] if is_mae(folder) else []))
            if (file := folder / part / "config.json").is_file()}


def _at(curve: Curve, side: float) -> float:
    q = (side / UNIT) ** 2
    return curve[0] + curve[1] * q + curve[2] * q * q


def _file(parts: Mapping[str, Any]) -> Path:
    shapes = {part: {name: value for name, value in said.items() if not name.startswith("_")}
              for part, said in parts.items()}
    return cache_root() / "cost" / f"{digest(shapes)[:16]}.json"
