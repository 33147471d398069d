"""Adapters: what fine-tuning adds to a generator, as a folder without pickles.

    adapter.json                      for which base model and classes, how it was trained; written last
    pytorch_lora_weights.safetensors  LoRA of the UNet in diffusers' layout; absent where only tokens were trained (ti)
    tokens.safetensors                "tokens" (N, E) float32, row i for the class with label i; of a generator with two
                                      text encoders also "tokens_2", the same words in the second; absent without (db)

Classes go by label and key, never by name: two classes of ImageNet are called crane, and a table keyed by names would
shift every row after the second one (Diff-Mix's code has such a table).
"""

# N classes, E text embedding

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayexpand.artifacts.columns import CLASS_FEATURES, IMAGE_FEATURES, encoders_of, feature_facts
from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.contract.class_tokens import class_token
from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Method

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ADAPTER, LORA, TOKENS = "adapter.json", "pytorch_lora_weights.safetensors", "tokens.safetensors"
VERSION = 1
TABLES = ("tokens", "tokens_2")  # in TOKENS, by text encoder
PARTS = {"ti": (TOKENS,), "db": (LORA,), "ti_db": (LORA, TOKENS)}  # weight files by strategy

_MAKE = "fine-tune one with `rayexpand fit`, or copy the folder again"
_PREFIX = "unet."
_LATER = {"encoder_2_sha256": "", "tokenizer_2_length": None}  # fields not written while they are as they were before


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
    encoder_2_sha256: str = ""  # of a second one, whose features stood behind those of the first
    tokenizer_2_length: int | None = None  # of the second tokenizer; None for a generator with one text encoder

    @property
    def has_lora(self) -> bool:
        return LORA in PARTS[self.strategy]

    @property
    def has_tokens(self) -> bool:
        return TOKENS in PARTS[self.strategy]

    @property
    def words(self) -> tuple[int, ...]:
        """Length of each tokenizer before class tokens were added."""
        return tuple(one for one in (self.tokenizer_length, self.tokenizer_2_length) if one is not None)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables of class tokens."""
        return TABLES[:len(self.words)]


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
    encoder_2_sha256: str = ""  # this and the next came with generators that have two text encoders
    tokenizer_2_length: int | None = Field(None, ge=1)
    files: dict[str, str]  # sha256 of each weight file


def write_adapter(folder: Path, facts: AdapterFacts, lora: Mapping[str, torch.Tensor] | None,
                  tokens_NE: torch.Tensor | None, tokens_2_NE: torch.Tensor | None = None) -> None:
    """Writes an adapter. `lora` is the LoRA of the UNet as peft names it (`<module>.lora_A.weight`, (rank, in)), with
    or without diffusers' prefix `unet.`; None exactly where facts.strategy has none, as `tokens_NE`, the rows in the
    first text encoder. `tokens_2_NE` are those in the second one, where the generator has two.

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
        tables = (tokens_NE, tokens_2_NE)
        tensors[TOKENS] = {name: one for name, one in zip(TABLES, tables, strict=True) if one is not None}
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
    for name in ("names", "metaclasses", *(name for name, before in _LATER.items() if content[name] == before)):
        del content[name]
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


def load_tokens(folder: Path | str) -> list[torch.Tensor]:
    """(N, E) float32 token rows of an adapter that has been read, for each text encoder."""
    from safetensors.torch import load_file

    found = load_file(Path(folder) / TOKENS)
    return [found[name] for name in TABLES if name in found]


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
        if set(shapes) != set(facts.tables) or any(len(one) != 2 or one[0] != n for one in shapes.values()):
            raise ModelError(f"{where} holds {dict(shapes)}; one row for each of its {n} classes is needed, under the "
                             f"name {' and as many under '.join(facts.tables)}; {_MAKE}")
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


def may_adapt(method: Method) -> bool:
    """Whether a method that asks for no adapter samples with one that its run names: what one paper fine-tunes serves
    the others. Not where a field says that the weights are taken as they are, nor a generator that reads no text."""
    as_they_are = not getattr(method, "finetuned", True) or str(getattr(method, "variant", "")).startswith("real_")
    return "prior" in method.needs() and not as_they_are and reads_text(method)


def reads_text(method: Method) -> bool:
    """Whether the generator of a method is told in words what to paint."""
    return getattr(method, "generator", "sd") == "sd" and any(
        hasattr(method, name) for name in ("prompt", "prompts", "domains"))


def adapter_fits(method: Any, strategy: str, visual_token: str, adapter: str) -> list[str]:
    """Where a method does not sample as an adapter of this strategy and visual token was trained, one line each.
    `adapter`: what to call it."""
    problems = []
    if (own := getattr(method, "visual_token", "none")) != visual_token:
        reads, remedy = (f"method.visual_token is {own}", f"set method.visual_token to {visual_token}, or ") if hasattr(
            method, "visual_token") else (f"{method.name} reads none", "")
        problems.append(f"{adapter} is trained with visual_token {visual_token}, but {reads}; what was not trained "
                        f"cannot be read at sampling: {remedy}fine-tune with {own}")
    asks, parts = asks_for_tokens(method), PARTS[strategy]
    if asks and TOKENS not in parts:
        problems.append(f"the prompt has {{token}}, but {adapter} (strategy {strategy}) has no class tokens; use "
                        "{name} as in training, or an adapter with tokens (ti, ti_db)")
    if parts == (TOKENS,) and not asks:
        problems.append(f"{adapter} (strategy {strategy}) has class tokens and nothing else, and no prompt of "
                        f"{method.name} has {{token}}, so samples would be those of the model as it is; write "
                        "{token} into method.prompt, or take an adapter with LoRA (db, ti_db)")
    return problems


def asks_for_tokens(method: Any) -> bool:
    """Whether a prompt of the method has the class token."""
    return any("token" in (key for _, key, _, _ in Formatter().parse(one)) for one in _texts(method.model_dump())
               if "{token}" in one)


def _texts(value: Any) -> Iterator[str]:
    """All strings in nested lists and mappings, such as lists of prompts by class."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


class AdapterKind(ArtifactKind):
    name = "adapter"
    wants = "a fine-tuned adapter of its prior and none is"

    def unused(self, method: Method) -> tuple[str, str]:
        variant = str(getattr(method, "variant", ""))
        if "prior" in method.needs() and not reads_text(method):
            return "asks its generator for no text", "set method.generator: sd" if hasattr(
                method, "generator") else "choose a method with a prompt"
        return "samples from the weights as they are", (
            "set method.finetuned: true" if hasattr(method, "finetuned")
            else f"choose {variant.replace('real_', 'diff_')}" if variant.startswith("real_")
            else "write {token} into the prompt, or choose a method with one")

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        try:
            facts = read_adapter(folder)
        except ModelError as error:
            return [str(error)]
        problems = []
        if run.prior_sha256 is not None and (problem := base_problem(folder, facts, run, run.prior_sha256)):
            problems.append(problem)
        problems += adapter_fits(run.method, facts.strategy, facts.visual_token, str(folder))
        problems += [one for kind in (CLASS_FEATURES, IMAGE_FEATURES) if (one := _encoder_problem(run, kind, facts))]
        if facts.has_tokens and facts.has_lora and not asks_for_tokens(run.method):
            log.warning("artifacts.adapter: %s has class tokens, but no prompt of %s has {token}, so they are not "
                        "used; it was trained with the prompt %r", folder, run.method.name, facts.prompt)
        return problems

    def classes(self, folder: Path) -> Sequence[str]:
        return read_adapter(folder).classes

    def sha256(self, folder: Path) -> str:
        read_adapter(folder)
        return super().sha256(folder)


def base_problem(folder: Path, facts: AdapterFacts, run: RunInputs, prior_sha256: str) -> str:
    """Why an adapter is not one for the generator with this content hash, "" where it is."""
    if facts.base_sha256 == prior_sha256:
        return ""
    return (f"{folder} was trained on base model {facts.base_sha256[:12]}, but prior.weights {run.prior_weights} is "
            f"model {prior_sha256[:12]}, whose weights it does not fit; name the base model in prior.weights, or "
            "fine-tune this one with `rayexpand fit`")


def _encoder_problem(run: RunInputs, kind: str, facts: AdapterFacts) -> str:
    """Where the visual token would be of another image encoder than the adapter was trained with."""
    folder = run.folder(kind)
    if kind not in run.method.needs() or folder is None or not facts.encoder_sha256:
        return ""
    try:
        own = encoders_of(feature_facts(folder, kind))
    except ModelError:
        return ""  # listed with that artifact
    if own == (there := tuple(one for one in (facts.encoder_sha256, facts.encoder_2_sha256) if one)):
        return ""
    return (f"was trained with visual tokens of image encoder {_short(there)}, but artifacts.{kind} {folder} holds "
            f"features of encoder {_short(own)}; make these with the same guide.weights"
            f"{' and guide_2.weights' if len(there) > 1 else ''}, or fine-tune with them")


def _short(hashes: Sequence[str]) -> str:
    return " and ".join(one[:12] for one in hashes)
