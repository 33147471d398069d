"""Sentences about the classes of a dataset, written by a local text model: the language enhancement of LECF.

    fit:
      prompts: {generator: models/keytotext, per_class: 200}

The model is asked about one class at a time and its next token is drawn by inverting the distribution at one keyed
uniform number, so a sentence depends on the model, the class, its number and the seed: not on torch's random state, nor
on who else is written for. It runs once; `method.prompts` of a run names the folder, and the sentences become part of
that run (methods/lecf.py says why).
"""

# B sentences of a call, T tokens, V words of the vocabulary

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from rayexpand.artifacts.store import publish
from rayexpand.contract.errors import ModelError, UsageError
from rayexpand.contract.prompts import Template, format_prompt
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.contract.settings import Section
from rayexpand.fitting.costs import unit_on
from rayexpand.fitting.maker import FitBase, Maker, World
from rayexpand.methods.lecf import FILE
from rayexpand.models.folders import flat_weight_problems, folder_hash, quiet_libraries
from rayexpand.runs.stages import PlanStage, Sizes, unknown

if TYPE_CHECKING:
    import torch

TRIES = 4  # sentences written for each one wanted, before a shorter list is taken
VERSION = 1  # raised when the code below writes other sentences


class PromptsFit(Section):
    generator: str = Field(min_length=1, description="folder of a text model in transformers' layout, encoder-decoder "
                           "(LECF: a keyword-to-sentence T5) or decoder alone")
    per_class: int = Field(200, ge=1, description="different sentences wanted of each class (LECF: 200)")
    instruction: Template = Field("{name}", description="what the model is given: template with {name}, {metaclass}, "
                                  "{noun} (LECF: the class name)")
    must_name: bool = Field(True, description="drop sentences without the class name (ours)")
    temperature: float = Field(1.0, gt=0, description="of the distribution of the next token (ours)")
    top_k: int = Field(50, ge=1, description="likeliest tokens one is drawn from (ours)")
    max_tokens: int = Field(32, ge=1, description="tokens of a sentence at most (ours)")
    batch: int = Field(50, ge=1, description="sentences written at once")


def check_generator(folder: str) -> list[str]:
    """What is wrong with a text model's folder as far as its files say, one line each; nothing is loaded."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return [f"there is no folder {path}; give one with config.json, tokenizer.json and *.safetensors, fetched "
                "beforehand: nothing is downloaded"]
    problems = [f"{path}: {name} is missing" for name in ("config.json", "tokenizer.json")
                if not (path / name).is_file()]
    return problems + flat_weight_problems(path)


def write_prompts(made: PromptsFit, classes: ClassTable, seed: int, device: str, progress: Progress,
                  folder: Path) -> dict[str, Any]:
    """Writes prompts.json, sentences by class key, into `folder`; returns facts about them. Raises ModelError, and
    UsageError for a class about which no sentence could be used."""
    writer = _Writer(made, device)
    lists: dict[str, list[str]] = {}
    for label, key in enumerate(classes.key):
        lists[key] = _sentences(writer, made, label, classes, seed)
        progress("writing prompts", label + 1, len(classes))
    (folder / FILE).write_text(json.dumps(lists, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lengths = [len(found) for found in lists.values()]
    return {"device": writer.device.type, "sentences": sum(lengths), "fewest_of_a_class": min(lengths)}


def _sentences(writer: _Writer, made: PromptsFit, label: int, classes: ClassTable, seed: int) -> list[str]:
    """Up to `per_class` different sentences, in the order of their numbers."""
    asked, name = format_prompt(made.instruction, label, classes), classes.asked[label]
    found: dict[str, None] = {}
    for start in range(0, TRIES * made.per_class, made.batch):
        rows = [RowRng(seed, "prompts", classes.key[label], number) for number in range(start, start + made.batch)]
        for text in writer(asked, np.stack([row.uniforms("token", (made.max_tokens,)) for row in rows])):
            if text and (not made.must_name or name.casefold() in text.casefold()):
                found.setdefault(text)
        if len(found) >= made.per_class:
            break
    if not found:
        raise UsageError(f"fit.prompts: of {TRIES * made.per_class} sentences about class {classes.key[label]!r} none "
                         f"holds {name!r}. Change fit.prompts.instruction, set fit.prompts.must_name: false, or use "
                         "another generator.")
    return list(found)[:made.per_class]


class _Writer:
    """A text model that continues one text in B ways."""

    def __init__(self, made: PromptsFit, device: str) -> None:
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        from rayexpand.contract.device import choose_device

        if problems := check_generator(made.generator):
            raise ModelError("\n  ".join(["fit.prompts.generator cannot be used:", *problems]))
        self._made, self.device = made, choose_device(device)
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(Path(made.generator).expanduser()),
                                 "local_files_only": True}
        try:
            with quiet_libraries():
                self._answers = bool(AutoConfig.from_pretrained(**where).is_encoder_decoder)
                self._tokenizer = AutoTokenizer.from_pretrained(**where)
                kind = AutoModelForSeq2SeqLM if self._answers else AutoModelForCausalLM
                model = kind.from_pretrained(**where, use_safetensors=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"fit.prompts.generator {made.generator} cannot be loaded: {error}") from error
        self._model = model.to(self.device).eval().requires_grad_(False)

    def __call__(self, text: str, uniforms_BT: np.ndarray) -> list[str]:
        """One line for each row of numbers in [0, 1)."""
        import torch
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

        asked = self._tokenizer(text, return_tensors="pt").to(self.device)
        given = {name: asked[name].repeat(len(uniforms_BT), 1) for name in ("input_ids", "attention_mask")}
        draws = _Drawn(torch.from_numpy(uniforms_BT).to(self.device))
        warped = [TemperatureLogitsWarper(self._made.temperature), TopKLogitsWarper(self._made.top_k), draws]
        with quiet_libraries(), torch.inference_mode():
            written_BT = self._model.generate(**given, do_sample=False, num_beams=1,
                                              max_new_tokens=self._made.max_tokens,
                                              logits_processor=LogitsProcessorList(warped))
        new_BT = written_BT if self._answers else written_BT[:, given["input_ids"].shape[1]:]
        return [_line(one) for one in self._tokenizer.batch_decode(new_BT, skip_special_tokens=True)]


class _Drawn:
    """A logits processor that leaves one token possible: that at which the cumulative probability passes u."""

    def __init__(self, uniforms_BT: torch.Tensor) -> None:
        self._uniforms_BT, self._step = uniforms_BT, 0

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        import torch

        below_BV = scores_BV.double().softmax(-1).cumsum(-1)
        u_B1 = self._uniforms_BT[:, self._step, None].double() * below_BV[:, -1:]
        self._step += 1
        return torch.full_like(scores_BV, -torch.inf).scatter(1, (below_BV <= u_B1).sum(-1, keepdim=True), 0.0)


def _line(text: str) -> str:
    """The first line, with single spaces and without quotation marks around it."""
    lines: Sequence[str] = text.strip().splitlines() or [""]
    return " ".join(lines[0].split()).strip("\"'“” ")


class PromptsMaker(Maker):
    kind = "prompts"
    text = "sentences about each class, written by a text model"
    section = PromptsFit

    def stages(self, section: PromptsFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        what = f"{section.per_class * sizes.classes:,} sentences"
        return [unknown("fit prompts", what, "what a text model costs is not counted; fit a part first (per_class) and "
                        "multiply", unit_on(config.device))]

    def make(self, section: PromptsFit, config: FitBase, world: World) -> Path:
        classes = world.index.classes
        made_from = {"version": VERSION, "seed": config.seed, "classes": list(classes.key),
                     "names": [list(classes.name), list(classes.metaclass), list(classes.noun)],
                     "generator_sha256": folder_hash(Path(section.generator).expanduser()),
                     **section.model_dump(exclude={"generator"})}
        return publish(config.out, "prompts", made_from, lambda folder: world.engine.alone(
            partial(write_prompts, section, classes, config.seed, config.device), world.progress, folder))

    def problems(self, section: PromptsFit, config: FitBase, *, on_ray: bool) -> list[str]:
        return [f"fit.prompts.generator: {one}" for one in check_generator(section.generator)]

    def is_here(self, section: PromptsFit) -> bool:
        return True
