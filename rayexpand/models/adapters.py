"""Adapters: what fine-tuning adds to a generator, as a folder without pickles.

    adapter.json                      for which base model and classes, how it was trained; written last
    pytorch_lora_weights.safetensors  LoRA of the UNet in diffusers' layout; absent where only tokens were trained (ti)
    tokens.safetensors                "tokens" (N, E) float32, row i for the class with label i; absent without (db)

Classes go by label and key, never by name: two classes of ImageNet are called crane, and a table keyed by names would
shift every row after the second one (Diff-Mix's code has such a table).
"""

# N classes, E text embedding

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayexpand.contract.class_tokens import class_token
from rayexpand.contract.errors import ModelError

if TYPE_CHECKING:
    import torch

ADAPTER, LORA, TOKENS = "adapter.json", "pytorch_lora_weights.safetensors", "tokens.safetensors"
VERSION = 1
PARTS = {"ti": (TOKENS,), "db": (LORA,), "ti_db": (LORA, TOKENS)}  # weight files by strategy

_MAKE = "fine-tune one with `rayexpand fit`, or copy the folder again"
_PREFIX = "unet."


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What adapter.json says. Classes are in label order."""

    base_sha256: str  # prior_hash of the model it was trained on
    strategy: str  # ti (token rows), db (LoRA of the UNet) or ti_db (both)
    classes: tuple[str, ...]  # keys
    names: tuple[str, ...]
    metaclasses: tuple[str, ...]
    prompt: str  # template of the training texts
    tokenizer_length: int  # before class tokens were added, so the id of `<class_0>`
    prediction_type: str  # of the base model
    rank: int | None = None  # None without LoRA
    alpha: float | None = None
    targets: tuple[str, ...] = ()  # projections that have LoRA
    init_token_id: int | None = None  # whose row the token rows started as
    visual_token: str = "none"  # noqa: S105  what the last text slot held in training: none, class_mean or instance
    encoder_sha256: str = ""  # of the image encoder whose features it held

    @property
    def has_lora(self) -> bool:
        return LORA in PARTS[self.strategy]

    @property
    def has_tokens(self) -> bool:
        return TOKENS in PARTS[self.strategy]


class _Class(BaseModel):
    model_config = ConfigDict(extra="forbid")

    label: int
    key: str
    name: str
    metaclass: str
    token: str


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    base_sha256: str = Field(min_length=1)
    strategy: Literal["ti", "db", "ti_db"]
    rank: int | None = Field(ge=1)
    alpha: float | None = Field(gt=0, allow_inf_nan=False)
    targets: tuple[str, ...]
    prediction_type: str
    prompt: str
    tokenizer_length: int = Field(ge=1)
    init_token_id: int | None
    classes: list[_Class] = Field(min_length=1)
    visual_token: Literal["none", "class_mean", "instance"]
    encoder_sha256: str
    files: dict[str, str]  # sha256 of each weight file


def write_adapter(folder: Path, facts: AdapterFacts, lora: Mapping[str, torch.Tensor] | None,
                  tokens_NE: torch.Tensor | None) -> None:
    """Writes an adapter. `lora` is the LoRA of the UNet as peft names it (`<module>.lora_A.weight`, (rank, in)), with
    or without diffusers' prefix `unet.`; None exactly where facts.strategy has none, as `tokens_NE`.

    Raises ModelError where trained numbers are not finite.
    """
    import torch
    from safetensors.torch import save_file

    assert facts.has_lora == (lora is not None)
    assert facts.has_tokens == (tokens_NE is not None)
    assert len(facts.classes) == len(facts.names) == len(facts.metaclasses)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    if lora is not None:
        tensors[LORA] = {_PREFIX + name.removeprefix(_PREFIX): one for name, one in lora.items()}
    if tokens_NE is not None:
        tensors[TOKENS] = {"tokens": tokens_NE}
    for file, state in tensors.items():
        state = {name: one.detach().to("cpu", torch.float32).contiguous() for name, one in state.items()}
        if bad := [name for name, one in state.items() if not torch.isfinite(one).all()]:
            raise ModelError(f"the trained numbers of {bad[0]} are not finite: training diverged. Lower the learning "
                             "rate, or train in fp32 or bf16")
        # one entry at most: safetensors writes more of them in a random order, and equal adapters need equal bytes
        save_file(state, folder / file, _diffusers_metadata(facts, state) if file == LORA else {"format": "pt"})
        _check_shapes(folder, facts, file, {name: tuple(one.shape) for name, one in state.items()})
    content = {"version": VERSION, **asdict(facts), "classes": [
        {"label": label, "key": key, "name": name, "metaclass": metaclass, "token": class_token(label)}
        for label, (key, name, metaclass) in enumerate(zip(facts.classes, facts.names, facts.metaclasses, strict=True))
    ], "files": {file: _sha256(folder / file) for file in tensors}}
    del content["names"], content["metaclasses"]
    (folder / ADAPTER).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_adapter(folder: Path | str) -> AdapterFacts:
    """Facts of an adapter whose files are all there, unchanged and of fitting shapes; no model is loaded, nor torch.

    Raises ModelError for anything else.
    """
    folder = Path(folder)
    raw = _content(folder)
    try:
        found = _File.model_validate(raw)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ModelError(f"{folder / ADAPTER} does not describe an adapter of this version: {'; '.join(lines)}. "
                         f"{_MAKE.capitalize()}") from error
    for place, one in enumerate(found.classes):
        if (one.label, one.token) != (place, class_token(place)):
            raise ModelError(f"{folder / ADAPTER}: place {place} of its classes holds label {one.label} with token "
                             f"{one.token} ({one.key!r}). The rows of {TOKENS} are in label order, so classes in "
                             f"another order would get each other's tokens; {_MAKE}")
    facts = AdapterFacts(
        classes=tuple(one.key for one in found.classes), names=tuple(one.name for one in found.classes),
        metaclasses=tuple(one.metaclass for one in found.classes),
        **found.model_dump(exclude={"version", "classes", "files"}))
    if facts.has_lora != (facts.rank is not None) or facts.has_lora != (facts.alpha is not None):
        raise ModelError(f"{folder / ADAPTER}: strategy {facts.strategy} does not go with rank {facts.rank} and alpha "
                         f"{facts.alpha}; {_MAKE}")
    _check_files(folder, facts, found.files)
    return facts


def load_tokens(folder: Path | str) -> torch.Tensor:
    """(N, E) float32 token rows of an adapter that has been read."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / TOKENS)["tokens"]


def load_lora(folder: Path | str) -> dict[str, torch.Tensor]:
    """LoRA tensors of an adapter that has been read, by peft's names with the prefix `unet.`."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / LORA)


def lora_config(facts: AdapterFacts, names: list[str]) -> dict[str, Any]:
    """peft's settings of a LoRA with tensors of these names, in the form diffusers keeps them."""
    modules = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in names})
    return {f"{_PREFIX}{key}": value for key, value in
            {"r": facts.rank, "lora_alpha": facts.alpha, "target_modules": modules}.items()}


def _content(folder: Path) -> Any:
    file = folder / ADAPTER
    if not file.is_file():
        if (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} is a complete pipeline, not an adapter; name it in prior.weights")
        if pickles := sorted(one.name for one in folder.glob("*") if one.suffix in (".bin", ".pt", ".pth", ".ckpt")):
            raise ModelError(f"{folder} has no {ADAPTER}, and {pickles[0]} is a pickle, which can run code when "
                             "opened; give a folder that `rayexpand fit` made")
        raise ModelError(f"{folder} has no {ADAPTER}; give the folder of an adapter that `rayexpand fit` made")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); {_MAKE}") from error


def _check_files(folder: Path, facts: AdapterFacts, hashes: Mapping[str, str]) -> None:
    """Raises ModelError unless the weight files are those adapter.json was written with."""
    from safetensors import SafetensorError, safe_open

    for file in PARTS[facts.strategy]:
        path = folder / file
        if not path.is_file():
            raise ModelError(f"{folder} has no {file}, which strategy {facts.strategy} needs; {_MAKE}")
        if hashes.get(file) != _sha256(path):
            raise ModelError(f"{path} is not the file this adapter was written with: it was damaged, or belongs to "
                             f"another adapter; {_MAKE}")
        try:
            with safe_open(path, framework="numpy") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as safetensors ({error}); {_MAKE}") from error
        _check_shapes(folder, facts, file, shapes)


def _check_shapes(folder: Path, facts: AdapterFacts, file: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    n, where = len(facts.classes), folder / file
    if file == TOKENS:
        if set(shapes) != {"tokens"} or len(shapes["tokens"]) != 2 or shapes["tokens"][0] != n:
            raise ModelError(f"{where} holds {dict(shapes)}; one row for each of its {n} classes is needed, under the "
                             f"name tokens; {_MAKE}")
        return
    pairs = {name.rpartition(".lora_")[0] for name in shapes}
    for module in sorted(pairs):
        down, up = (shapes.get(f"{module}.lora_{side}.weight", ()) for side in "AB")
        if len(down) < 2 or len(up) < 2 or down[0] != facts.rank or up[1] != facts.rank:
            raise ModelError(f"{where}: {module} has LoRA of shapes {list(down)} and {list(up)}, not those of rank "
                             f"{facts.rank}; {_MAKE}")
    if not pairs or len(shapes) != 2 * len(pairs) or not all(name.startswith(_PREFIX) for name in shapes):
        raise ModelError(f"{where} is not a LoRA of a UNet in diffusers' layout; {_MAKE}")


def _diffusers_metadata(facts: AdapterFacts, state: Mapping[str, Any]) -> dict[str, str]:
    """What makes diffusers take alpha from the file too; without, it would set it to the rank."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    return {LORA_ADAPTER_METADATA_KEY: json.dumps(lora_config(facts, list(state)))}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
