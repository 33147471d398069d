"""LoRA files that people bring: which layout, which weights of the generator they change, what keeps them from fitting.

Layouts differ in the names of their keys only, so there is one rule for all. Without prefix and with `_` for `.`, a key
names a module of the generator: by its own name, by the one it had in old files, or by that of the original code
(SGM). A key that names none is a refusal, for diffusers and peft skip such keys without a word.

    unet.down_blocks.0...to_q.lora_A.weight            diffusers; also without `unet.`
    unet.down_blocks.0...processor.to_q_lora.down.weight   diffusers before peft
    base_model.model.down_blocks.0...to_q.lora_A.weight    peft, adapter_config.json beside it
    lora_unet_down_blocks_0_..._to_q.lora_down.weight  kohya; alpha as a tensor `....alpha`
    lora_unet_input_blocks_4_1_..._to_q.lora_down.weight   kohya with names of the original code

Nothing here imports torch: headers, json and the tensors of alpha are read.
"""

# A (r, in) and B (out, r) are the two halves of a pair; W (out, in), or of a convolution (out, in, height, width).

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rayexpand.artifacts.adapter import ADAPTER
from rayexpand.artifacts.store import files_hash
from rayexpand.contract.errors import ModelError, few, looked_at
from rayexpand.contract.settings import Section
from rayexpand.models.folders import PICKLES, metadata_of, read_json, tensor_shapes, tensor_values

Shape = tuple[int, ...]
Shapes = Mapping[str, Mapping[str, Shape]]  # part of the generator -> name of a weight -> its shape
_Weight = tuple[str, str]  # part, name

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
_CONFIG, _FOLDER_FILES = "adapter_config.json", ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_SETTINGS = "lora_adapter_metadata"  # where diffusers keeps the settings of peft in the header of a file

_HALF = re.compile(r"(?P<stem>.+?)[._]lora(?P<half>_A|_B|_down|_up|\.down|\.up|_linear_layer\.down|_linear_layer\.up)"
                   r"(\.default)?\.weight")
_ALPHA = re.compile(r"(?P<stem>.+)\.alpha")
_PREFIXES = {"lora_unet_": UNET, "lora_te_": TEXT, "lora_te1_": TEXT, "lora_te2_": TEXT_2, "unet_": UNET,
             "diffusion_model_": UNET, "text_encoder_2_": TEXT_2, "text_encoder_": TEXT}  # the first that fits
_OTHER_GENERATOR = re.compile(r"(base_model\.model\.)?(transformer|lora_transformer_|transformer_blocks\.|lora_te3_|"
                              r"text_encoder_3)|.*(double_blocks|single_blocks|joint_blocks|single_transformer_blocks)")
_OTHER_KINDS = {r"\.(dora_scale|lora_magnitude_vector)": "DoRA", r"\.hada_": "LoHa", r"\.lokr_": "LoKr",
                r"\.lora_mid": "LoCon in Tucker form", r"\.oft_": "OFT", r"\.[wb]_norm": "LyCORIS with norms",
                r"\.diff(_b)?$": "LyCORIS with full differences"}
_KINDS = {"LOHA": "LoHa", "LOKR": "LoKr"}  # of peft, written as their papers do
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # these leave the weights they are added to alone
# Settings of peft that change what is added, or where.
_UNSUPPORTED = ("fan_in_fan_out", "use_qalora", "lora_bias", "modules_to_save", "target_parameters", "arrow_config",
                "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "use_bdlora", "kasa_config",
                "monteclora_config")
_PLAIN = "only plain LoRA can be merged. Use its plain version, or merge it with the tool that made it"
_OF_THIS_MODEL = "Use a LoRA that was trained for this model"
_INCOMPLETE = "the file is incomplete or damaged, fetch or save it again"
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # of hidden states


class LoraFile(Section):
    """One LoRA that is added to the weights of the generator."""

    file: str = Field(description="safetensors file in the layout of diffusers, kohya or peft, or a folder with "
                      "adapter_config.json (peft) or pytorch_lora_weights.safetensors (diffusers)")
    scale: float = Field(1.0, allow_inf_nan=False, description="multiplies what is added to the weights")
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False, description="alpha of the training, for a file that "
                                "does not say it; alpha / rank multiplies what is added")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """W += scale * factor * B A for one weight of the generator."""

    part: str
    weight: str  # name of W in its part
    A: str  # key in the file
    B: str
    factor: float  # alpha / r


def lora_problems(loras: Sequence[LoraFile], shapes: Shapes) -> list[str]:
    """What keeps these LoRAs from being added to a generator with weights of these shapes, one line each."""
    problems = []
    for place, lora in enumerate(loras):
        try:
            lines = lora_pairs(lora, shapes)[1]
        except ModelError as error:
            lines = [str(error)]
        problems += [f"prior.loras.{place}: {line}" for line in lines]
    return problems


def lora_pairs(lora: LoraFile, shapes: Shapes) -> tuple[list[LoraPair], list[str]]:
    """All pairs of a LoRA, and one line for each reason not to add them; pairs count only where there is none. Raises
    ModelError for a file that is none."""
    reader = _Reader(lora, shapes)
    return reader.pairs, reader.problems


def lora_files(lora: LoraFile) -> list[Path]:
    """The files that count: the weights, after adapter_config.json of a peft folder. Raises ModelError."""
    path = Path(lora.file).expanduser()
    if path.suffix in PICKLES:
        raise ModelError(f"{path} {_pickle(path.name)}")
    if path.is_dir():
        return _files_of_folder(path)
    if not path.is_file():
        raise ModelError(f"there is no file {path}{looked_at(lora.file)}; give a safetensors file, or a peft folder")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path} is no safetensors file; give a LoRA with the ending .safetensors")
    return [path]


def lora_hash(lora: LoraFile) -> str:
    """Content hash of its files, whatever the name of a single one. Raises ModelError."""
    files = lora_files(lora)
    if len(files) > 1:
        return files_hash(files[0].parent, [file.name for file in files])
    with open(files[0], "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------- files


def _files_of_folder(folder: Path) -> list[Path]:
    if (folder / ADAPTER).is_file():
        raise ModelError(f"{folder} is an adapter that `rayexpand fit` made; name it in artifacts.adapter")
    config = [folder / _CONFIG] if (folder / _CONFIG).is_file() else []
    weights = [folder / name for name in _FOLDER_FILES if (folder / name).is_file()]
    if len(weights) == 1:
        return [*config, weights[0]]
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise ModelError(f"{folder}: {pickles[0]} {_pickle(pickles[0])}")
    below = sorted(file.parent.name for file in folder.glob(f"*/{_CONFIG}"))
    what = (f"name each of its folders {few(below)} in an entry of its own" if below else
            "name the safetensors file in it that you mean")
    raise ModelError(f"{folder} holds {'both' if weights else 'none'} of {' and '.join(_FOLDER_FILES)}; {what}")


def _pickle(name: str) -> str:
    return (f"is a pickle, which can run code when opened; load it once where you trust it and save its tensors with "
            f"safetensors.torch.save_file as {Path(name).stem}.safetensors")


# ---------------------------------------------------------------------------------------------------------------- names


def _modules(part: str, weights: Mapping[str, Shape]) -> dict[str, str]:
    """Name of a weight by every name that a key may give its module, with `_` for `.`."""
    own = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    if part == UNET:
        others = [*_sgm_names(list(own)).items(), *((module, module.removesuffix(".0")) for module in own
                                                    if module.endswith(".to_out.0"))]
    else:
        others = [(module, re.sub(r"self_attn\.([qkv]|out)_proj$", r"self_attn.to_\1", module)) for module in own]
    return {_flat(name): own[module] for module, name in (*others, *((module, module) for module in own))}


def _flat(name: str) -> str:
    """CLIPTextModel lost its prefix text_model in transformers 5, CLIPTextModelWithProjection has it still."""
    flat = name.replace(".", "_").replace("base_model_model_", "").replace("_processor_", "_")
    return flat.removeprefix("text_model_")


def _sgm_names(modules: Sequence[str]) -> dict[str, str]:
    """Name in the original code of modules of a UNet: its blocks are counted through, a level adds one more."""
    blocks = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
              "mid_block.resnets.1": "middle_block.2"}
    for side, first in (("down", 1), ("up", 0)):
        count = first
        for level in range(_count(modules, rf"{side}_blocks\.(\d+)\.")):
            block = f"{side}_blocks.{level}"
            attentions = _count(modules, rf"{side}_blocks\.{level}\.attentions\.(\d+)\.")
            for layer in range(_count(modules, rf"{side}_blocks\.{level}\.resnets\.(\d+)\.")):
                target = f"{'input' if side == 'down' else 'output'}_blocks.{count}"
                blocks |= {f"{block}.resnets.{layer}": f"{target}.0", f"{block}.attentions.{layer}": f"{target}.1"}
                blocks[f"{block}.upsamplers.0"] = f"{target}.{2 if attentions else 1}"  # in the last one of a level
                count += 1
            if side == "down":
                blocks[f"{block}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
                count += 1
    layers = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
              "conv_shortcut": "skip_connection"}
    names = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
             "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
             "add_embedding.linear_2": "label_emb.0.2"}
    for module in modules:
        for block, target in blocks.items():
            if module == block or module.startswith(f"{block}."):
                rest = module[len(block):].lstrip(".")
                rest = layers.get(rest, rest) if ".resnets." in module else rest
                names[module] = f"{target}.{rest}".rstrip(".")
    return {module: names[module] for module in modules if module in names}


def _count(modules: Sequence[str], pattern: str) -> int:
    return 1 + max((int(found[1]) for module in modules if (found := re.match(pattern, module))), default=-1)


# -------------------------------------------------------------------------------------------------------------- reading


class _Reader:
    """Reads the header of one LoRA against a generator."""

    def __init__(self, lora: LoraFile, shapes: Shapes) -> None:
        *config, self.file = lora_files(lora)
        self.lora, self.shapes = lora, shapes
        self.tensors, self.metadata = tensor_shapes(self.file), metadata_of(self.file)
        self.modules = {part: _modules(part, weights) for part, weights in shapes.items()}
        self.pairs: list[LoraPair] = []
        self.problems: list[str] = []
        if other := self._other_kind():
            self.problems.append(f"{self.file} {other}")
            return
        self.settings = self._read_settings(config)
        if not self.problems:
            self._match(*self._sorted_keys())

    def _say(self, keys: Sequence[str], text: str) -> None:
        """One line for all keys with the same fault, if there are any."""
        if keys:
            self.problems.append(f"{self.file}: {_some(keys)} {text}")

    def _other_kind(self) -> str:
        """What the file is that is no plain LoRA of a UNet, "" for one that may be."""
        for pattern, kind in _OTHER_KINDS.items():
            if keys := [key for key in self.tensors if re.search(pattern, key)]:
                return f"is {kind} ({_some(keys)}), and {_PLAIN}"
        if keys := [key for key in self.tensors if _OTHER_GENERATOR.match(key)]:
            return (f"is a LoRA of a transformer such as FLUX or Stable Diffusion 3 ({_some(keys)}), and this model "
                    f"has {' and '.join(self.shapes)}. {_OF_THIS_MODEL}")
        if not any(_HALF.fullmatch(key) for key in self.tensors):
            return f"is no LoRA: none of its {len(self.tensors)} keys is half of a pair ({_some(list(self.tensors))})"
        return ""

    def _read_settings(self, config: Sequence[Path]) -> dict[str, dict[str, Any]]:
        """peft's settings by part, "" for all parts: of adapter_config.json, else of the header."""
        found: Any = {}
        where = f"{self.file}, {_SETTINGS}"
        if config:
            where, found = str(config[0]), read_json(config[0])
        elif _SETTINGS in self.metadata:
            try:
                found = json.loads(self.metadata[_SETTINGS])
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                self.problems.append(f"{where} is no JSON object, so alpha is not known; save the LoRA again")
                return {}
        settings: dict[str, dict[str, Any]] = {}
        for name, value in found.items():
            part, _, field = name.rpartition(".")
            settings.setdefault(part, {})[field] = value
        lines = [f"{where}: {line}" for one in settings.values() for line in _unsupported(one)]
        self.problems += dict.fromkeys(lines)  # often the same for each part
        return settings

    def _sorted_keys(self) -> tuple[dict[_Weight, dict[str, str]], dict[_Weight, str]]:
        """The keys of A and B, and that of alpha, by weight."""
        halves: dict[_Weight, dict[str, str]] = {}
        alphas: dict[_Weight, dict[str, str]] = {}
        strange: list[str] = []
        elsewhere: list[str] = []
        unclear: list[str] = []
        again: list[str] = []
        for key in self.tensors:
            half, alpha = _HALF.fullmatch(key), _ALPHA.fullmatch(key)
            if (found := half or alpha) is None:
                strange.append(key)
                continue
            weights = self._weights(found["stem"])
            if len(weights) != 1:
                (unclear if weights else elsewhere).append(key)
                continue
            keys = (halves if half else alphas).setdefault(weights[0], {})
            side = "alpha" if half is None else "A" if half["half"].endswith(("A", "down")) else "B"
            if side in keys:
                again.append(f"{keys[side]} beside {key}")
            keys[side] = key
        said = self.metadata.get("modelspec.architecture") or self.metadata.get("ss_base_model_version")
        self._say(strange, f"is no part of a LoRA, and {_PLAIN}")
        self._say(elsewhere, f"changes what is not in {', '.join(self.shapes)} of this model; the file is of another "
                             f"one{f' (its metadata says {said})' if said else ''}. {_OF_THIS_MODEL}")
        self._say(unclear, f"does not say of which text encoder it is; rename the keys so that they begin with {TEXT}. "
                           f"or {TEXT_2}.")
        self._say(again, "are for the same weight; give a file with one LoRA")
        return halves, {weight: keys["alpha"] for weight, keys in alphas.items()}

    def _weights(self, stem: str) -> list[_Weight]:
        """The weights that a key may name: one, if all is well."""
        flat = _flat(stem)
        parts: Sequence[str] = list(self.modules)
        if prefix := next((one for one in _PREFIXES if flat.startswith(one)), None):
            parts, flat = [_PREFIXES[prefix]], _flat(flat.removeprefix(prefix))
        return [(part, self.modules[part][flat]) for part in parts if flat in self.modules.get(part, {})]

    def _match(self, halves: Mapping[_Weight, dict[str, str]], alphas: Mapping[_Weight, str]) -> None:
        said = self._alpha_values(alphas)
        self._say([key for weight, key in alphas.items() if weight not in halves],
                  f"is the alpha of a pair that is not there; {_INCOMPLETE}")
        self._say([key for keys in halves.values() if len(keys) < 2 for key in keys.values()],
                  f"has no other half, and a pair of LoRA has two; {_INCOMPLETE}")
        unfit, unsaid, ranks = [], [], []
        for weight, keys in halves.items():
            if len(keys) < 2:
                continue
            if misfit := self._misfit(weight, keys):
                unfit.append(misfit)
                continue
            rank, settings = self.tensors[keys["A"]][0], self._settings_of(weight[0])
            if (stated := self._setting(weight, "rank_pattern", "r")) not in (None, rank):
                ranks.append(f"{keys['A']} has rank {rank} and the settings say {stated}")
            alpha = said.get(weight, self._setting(weight, "alpha_pattern", "lora_alpha"))
            if alpha is None:
                unsaid.append(keys["A"])
                alpha = self.lora.alpha or 0.0
            by_root = settings.get("use_rslora") and weight not in said
            self.pairs.append(LoraPair(*weight, keys["A"], keys["B"], alpha / (math.sqrt(rank) if by_root else rank)))
        self._say(sorted(unfit, key=lambda line: "width" not in line), f"(another model's). {_OF_THIS_MODEL}")
        self._say(ranks, f"(of two LoRAs); {_INCOMPLETE}")
        self._say_alpha(unsaid)

    def _misfit(self, weight: _Weight, keys: Mapping[str, str]) -> str:
        """Why a pair cannot be added to its weight, "" where it can."""
        shapes = [self.tensors[keys["A"]], self.tensors[keys["B"]], self.shapes[weight[0]][weight[1]]]
        A, B, W = map(_without_ones, shapes)
        if len(W) >= 2 and len(A) == len(W) and A[0] and (W[0], A[0]) == B and A[1:] == W[1:]:
            return ""
        family = _WIDTHS.get(A[1]) if weight[1].endswith("attn2.to_k.weight") and len(A) > 1 else None
        return (f"{keys['A']} {list(shapes[0])} with {keys['B']} {list(shapes[1])} does not fit {weight[1]} "
                f"{list(shapes[2])} of {weight[0]}{f', the width is that of {family}' if family else ''}")

    def _alpha_values(self, alphas: Mapping[_Weight, str]) -> dict[_Weight, float]:
        values = tensor_values(self.file, list(alphas.values()))
        self._say([key for key, value in values.items() if value.size != 1 or not 0 < value.item() < math.inf],
                  "is not one number above 0; fetch or save the file again")
        return {weight: float(values[key].flat[0]) for weight, key in alphas.items() if values[key].size}

    def _say_alpha(self, unsaid: Sequence[str]) -> None:
        if self.lora.alpha is None:
            self._say(unsaid, "has no alpha, which its strength follows from; set alpha of this entry to that of its "
                              "training (its rank, where the trainer knows no alpha), or for a LoRA of peft name the "
                              f"folder with {_CONFIG}")
        elif not unsaid and not self.problems:
            self.problems.append(f"{self.file} says alpha itself, so alpha {self.lora.alpha:g} of this entry would "
                                 "not be used; leave it out, and set scale for another strength")

    def _settings_of(self, part: str) -> Mapping[str, Any]:
        return self.settings.get(part) or self.settings.get("") or {}

    def _setting(self, weight: _Weight, patterns: str, otherwise: str) -> float | None:
        """A number of peft's settings for one weight: of the first pattern that matches, as peft matches."""
        settings = self._settings_of(weight[0])
        module = weight[1].removesuffix(".weight").removeprefix("text_model.")
        names = [module] if weight[0] == UNET else [module, f"text_model.{module}"]
        found = settings.get(otherwise)
        for pattern, value in (settings.get(patterns) or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                found = value
                break
        return found


def _unsupported(settings: Mapping[str, Any]) -> Iterator[str]:
    kind, start = str(settings.get("peft_type") or "LORA"), settings.get("init_lora_weights")
    if kind != "LORA" or settings.get("use_dora"):
        yield f"is {_KINDS.get(kind, kind) if kind != 'LORA' else 'DoRA'}, and {_PLAIN}"
    if start not in _PLAIN_STARTS:
        yield (f"init_lora_weights {start} changed the weights that the LoRA is added to; convert it with peft's "
               "path_initial_model_for_weight_conversion")
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = settings.get(pattern) or {}
        if not isinstance(patterns, dict) or not all(map(_positive, patterns.values())) or not _compile(patterns):
            yield f"{pattern} {patterns!r} is no table of patterns and numbers above 0; {_INCOMPLETE}"
        if settings.get(name) is not None and not _positive(settings[name]):
            yield f"{name} {settings[name]!r} is no number above 0; {_INCOMPLETE}"
    bias = settings.get("bias")
    for name in (*_UNSUPPORTED, *(["bias"] if bias not in (None, "none") else [])):
        if settings.get(name):
            yield f"{name} {settings[name]!r} is more than pairs of matrices, and {_PLAIN}"


def _without_ones(shape: Shape) -> Shape:
    """A convolution of kernel 1 is a matrix."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _compile(patterns: Mapping[str, Any]) -> bool:
    try:
        return all(re.compile(pattern) for pattern in patterns)
    except re.error:
        return False


def _some(keys: Sequence[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
