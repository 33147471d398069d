"""Classifier networks: a small residual network of our own, pre-activation networks for small images, any timm model.

Initial weights are a function of the seed alone. `small_resnet` draws them by numpy; the others use timm's own
initialisers, which draw from torch's generator, so a fork of it is seeded from the same kind of key.

    backbone                          arguments (recipe.backbone_args)
    small_resnet                      width 16, norm batch | group; for images of 8 to 64 pixels
    preact_resnet18, preact_resnet34  width 64, norm batch | group; 3x3 stride-1 stem (He et al. 2016b on CIFAR)
    any timm model                    those of timm
"""

from __future__ import annotations

import logging
import math
import sys
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the customary name)

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import ConfigError, ModelError
from rayexpand.contract.rng import generator, row_key

log = logging.getLogger(__name__)

PREACT = {"preact_resnet18": "resnetv2_18", "preact_resnet34": "resnetv2_34"}  # timm's basic pre-activation blocks
_WRAPPERS = ("module.", "_orig_mod.")
_POSITIONS = ("pos_embed", "relative_position_bias_table", "rel_pos")
SMALL_GROUPS, PREACT_GROUPS = 8, 32  # groups of GroupNorm; 32 is the default of Wu and He (2018)


def build_backbone(recipe: Recipe, n_classes: int, seed: int) -> nn.Module:
    """Network from (B, 3, H, W) normalised images to (B, n_classes) logits, on the CPU, in float32.

    Raises ConfigError for a backbone or argument that does not exist, ModelError for a checkpoint that does not fit.
    """
    args = dict(recipe.backbone_args)
    key = row_key(seed, "classifier", "", 0, 0, "weights")
    with torch.random.fork_rng(devices=[]):  # torch's and timm's initialisers take no generator
        torch.manual_seed(int.from_bytes(key[:8], "little"))
        if recipe.backbone == "small_resnet":
            model: nn.Module = _small_resnet(recipe, n_classes, args)
            _initialise(model, generator(key))
        else:
            model = _timm(recipe, n_classes, args)
    if recipe.checkpoint is not None:
        _load(model, recipe.checkpoint)
    return model


class SmallResNet(nn.Module):
    """3x3 stem and three residual blocks of width w, 2w, 4w; global average pooling."""

    def __init__(self, n_classes: int, width: int, norm: str = "batch") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), _norm(norm, width), nn.ReLU())
        self.blocks = nn.Sequential(_Block(width, width, 1, norm), _Block(width, 2 * width, 2, norm),
                                    _Block(2 * width, 4 * width, 2, norm))
        self.head = nn.Linear(4 * width, n_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x_BCHW)).mean(dim=(2, 3)))

    def get_classifier(self) -> nn.Module:
        """The head, under the name timm's models give theirs."""
        return self.head


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int, norm: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, stride, 1, bias=False), _norm(norm, outer), nn.ReLU(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False), _norm(norm, outer))
        self.skip = nn.Identity() if inner == outer and stride == 1 else nn.Sequential(
            nn.Conv2d(inner, outer, 1, stride, bias=False), _norm(norm, outer))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.body(x_BCHW) + self.skip(x_BCHW))


def _norm(norm: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(SMALL_GROUPS, channels)


def _small_resnet(recipe: Recipe, n_classes: int, args: dict[str, Any]) -> SmallResNet:
    width, norm = _own_args(recipe, args, width=16, groups=SMALL_GROUPS)
    if recipe.drop_path:
        raise ConfigError("recipe", ["drop_path: small_resnet has no stochastic depth; set it to 0 or take a timm "
                                     "backbone"])
    return SmallResNet(n_classes, width, norm)


def _own_args(recipe: Recipe, args: dict[str, Any], width: int, groups: int) -> tuple[int, str]:
    """Width and normalisation of a network of our own. Raises ConfigError with all that is wrong."""
    chosen, norm = args.pop("width", width), args.pop("norm", "batch")
    problems = [f"backbone_args.{name}: {recipe.backbone} takes width and norm only" for name in args]
    if norm not in ("batch", "group"):
        problems.append(f"backbone_args.norm: expected batch or group, got {norm!r}")
    if not isinstance(chosen, int) or isinstance(chosen, bool) or chosen < 1:
        problems.append(f"backbone_args.width: expected a whole number of channels >= 1, got {chosen!r}")
    elif norm == "group" and chosen % groups:
        problems.append(f"backbone_args.width: group normalisation makes {groups} groups, which do not divide "
                        f"{chosen} channels; take a multiple of {groups}")
    if problems:
        raise ConfigError("recipe", problems)
    return int(chosen), str(norm)


def _timm(recipe: Recipe, n_classes: int, args: dict[str, Any]) -> nn.Module:
    import timm
    from timm.layers import GroupNormAct

    name = PREACT.get(recipe.backbone, recipe.backbone)
    if not timm.is_model(name):
        near = get_close_matches(name, ["small_resnet", *PREACT, *timm.list_models()], n=3)
        raise ConfigError("recipe", [f"backbone: {name!r} is neither one of ours nor a timm model"
                                     f"{'; did you mean ' + ', '.join(near) + '?' if near else ''} "
                                     "(timm.list_models() names them all)"])
    if recipe.backbone in PREACT:
        width, norm = _own_args(recipe, args, width=64, groups=PREACT_GROUPS)
        args = {"channels": tuple(width * 2**i for i in range(4)), "stem_chs": width}
        if norm == "group":
            args["norm_layer"] = partial(GroupNormAct, num_groups=PREACT_GROUPS)
    if recipe.drop_path:
        args["drop_path_rate"] = recipe.drop_path
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=n_classes, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError("recipe", [f"backbone {name} with arguments {args or 'none'}: {error}. backbone_args and "
                                     "drop_path must be what timm's model takes"]) from error
    if recipe.stem == "small" or recipe.backbone in PREACT:
        _small_stem(model, recipe.backbone)
    return model


def _small_stem(model: Any, name: str) -> None:
    """3x3 stride-1 first convolution and no max-pooling, in place, with timm's own initialisation of it."""
    from timm.models.resnet import ResNet
    from timm.models.resnetv2 import ResNetV2

    if isinstance(model, ResNet):
        model.conv1, model.maxpool = _stem_conv(nn.Conv2d, model.bn1.num_features), nn.Identity()
    elif isinstance(model, ResNetV2) and hasattr(model.stem, "conv"):
        model.stem.conv = _stem_conv(type(model.stem.conv), model.stem.conv.out_channels)
        model.stem.pool = nn.Identity()
        if hasattr(model.stem, "pad"):
            model.stem.pad = nn.Identity()
    else:
        raise ConfigError("recipe", [f"stem: the small stem is made for timm's resnet and resnetv2 families with one "
                                     f"stem convolution, not for {name}; set stem: own, or take preact_resnet18"])


def _stem_conv(kind: Any, channels: int) -> nn.Module:
    conv: nn.Conv2d = kind(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _load(model: nn.Module, checkpoint: str) -> None:
    """Weights of a local safetensors file; a head of another number of classes keeps its new weights."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(checkpoint).expanduser()
    if path.suffix != ".safetensors":
        raise ModelError(f"checkpoint {path} is not a .safetensors file; other formats can run code when opened. Save "
                         "the weights with safetensors.torch.save_file and name that file")
    try:
        weights = fitted(load_file(path), model)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"checkpoint {path} cannot be read: {error}. recipe.checkpoint must name a local safetensors "
                         "file") from error
    own = model.state_dict()
    if not own.keys() & weights.keys() and (prefix := _prefix(weights)):
        raise ModelError(f"checkpoint {path}: every name begins with '{prefix}'; take it off with "
                         "safetensors.torch.save_file, so that names are those of the backbone, such as "
                         f"{next(iter(own))}")
    head = _head_prefix(model)
    fresh = {name for name in own if name.startswith(head) and (
        name not in weights or weights[name].shape != own[name].shape)}
    fresh |= {name for name in own if name.startswith(head) and any(n.startswith(head) for n in fresh)}
    counters = {name for name in own if name.endswith("num_batches_tracked") and name not in weights}
    problems = [f"{name}: missing" for name in own if name not in weights and name not in fresh | counters]
    problems += [f"{name}: not in this backbone" for name in weights if name not in own and not name.startswith(head)]
    problems += [f"{name}: shape {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}" for name in own
                 if name in weights and name not in fresh and weights[name].shape != own[name].shape]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ModelError("\n  ".join([f"checkpoint {path} does not fit the backbone ({len(problems)} weights differ); "
                                      "set recipe.backbone, backbone_args and stem to what it was saved from:",
                                      *problems[:8]]) + more)
    model.load_state_dict({name: weights[name] for name in own if name not in fresh | counters}, strict=False)


def fitted(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names of `model`: without the prefixes of wrappers (DataParallel, torch.compile), and with
    position embeddings and tables resampled to its image size as timm does it (bicubic). Others are as they were."""
    while any(weights and all(name.startswith(prefix) for name in weights) for prefix in _WRAPPERS):
        log.warning("the prefix %s of all weights was taken off", next(iter(weights)).partition(".")[0])
        weights = {name.partition(".")[2]: one for name, one in weights.items()}
    own = model.state_dict()
    other = [name for name in weights if name in own and weights[name].shape != own[name].shape
             and any(word in name for word in _POSITIONS)]
    resample = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not other or resample is None:
        return weights
    try:
        found = resample({name: weights[name] for name in weights if "patch_embed" not in name}, model)
    except (RuntimeError, KeyError, ValueError, AssertionError):  # not of another size but of another kind
        return weights
    if any(name not in found or found[name].shape != own[name].shape for name in other):
        return weights
    log.warning("%s resampled to the image size of the backbone", ", ".join(other[:3]))
    return {name: found[name] if name in other else one for name, one in weights.items()}


def _prefix(weights: dict[str, Tensor]) -> str:
    """First part of the names of all weights, "" where they differ."""
    firsts = {name.partition(".")[0] for name in weights}
    return f"{firsts.pop()}." if len(firsts) == 1 else ""


def _head_prefix(model: Any) -> str:
    """Name of the classification head in the state, with its dot."""
    head = model.get_classifier()
    return next((f"{name}." for name, module in model.named_modules() if module is head and name), "\0")


def _initialise(model: nn.Module, rng: np.random.Generator) -> None:
    """He-normal convolutions, uniform head; from `rng`, in parameter order."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            scale = math.sqrt(2 / (parameter.shape[0] * parameter.shape[2] * parameter.shape[3]))
            values = rng.standard_normal(parameter.shape, dtype=np.float32) * scale
        elif parameter.ndim == 2:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = rng.uniform(-bound, bound, parameter.shape).astype(np.float32)
        else:
            values = np.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0, np.float32)
        parameter.data.copy_(torch.from_numpy(values))
