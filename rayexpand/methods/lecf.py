"""LECF: language enhancement and CLIP filtering (He et al., "Is Synthetic Data from Generative Models Ready for Image
Recognition?", 2023). Each sample gets one of many sentences about its class; what CLIP does not recognise is dropped.

    paper    here       meaning, unit
    LE       prompts    sentences about a class, 200 for each; one is drawn, uniformly, for each sample
    CF       (select)   a sample stays if CLIP's probability of its class reaches a threshold

The sentences come with the configuration, as lists or as the name of a JSON file that is read once: `rayexpand fit`
writes such a file with a local text model (prompt_lists.py), and any other list will do. They become part of run.json,
for what each sample is asked for belongs to the plan: a worker draws it again without the file or a text model, and a
file that changes cannot change a run that has begun.

The filter is a decision over a whole run, so it is the verb `select` with rule `clip_confidence`, which drops samples:
the set shrinks (DistDiff's comparison). It can be moved later without making an image again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr, field_validator, model_validator

from rayexpand.contract.errors import UsageError, looked_at
from rayexpand.contract.prompts import check_template, format_prompt, prompt_needs
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex
from rayexpand.contract.settings import Section
from rayexpand.diffusion import sampling
from rayexpand.methods._on_plain import OnPlain
from rayexpand.methods.img2img import Img2Img
from rayexpand.methods.text2img import Text2Img

ANY = "*"  # the entry of `prompts` that serves every class without one of its own
FILE = "prompts.json"


class Lecf(OnPlain, Section):
    """Settings of LECF's generator. Defaults are those of Stable Diffusion's text-to-image pipeline unless noted."""

    name: Literal["lecf"] = "lecf"
    ratio: float = Field(5.0, gt=0, le=65535, description="samples for each seed; 2.5 gives half of each class a third "
                         "one (ours, as img2img)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    prompts: dict[str, tuple[str, ...]] = Field(
        {ANY: ("a photo of a {name}.",)}, description="sentences by class key, or a JSON file with them, or a folder "
        f"that `rayexpand fit` made; '{ANY}' holds templates with {{name}}, {{metaclass}}, {{noun}} for every class "
        "without a list (LECF: 200 sentences for each class)")
    negative: str = Field("", description="negative prompt (Stable Diffusion: empty)")
    strength: float | None = Field(None, gt=0, le=1, description="null: from pure noise (LECF); else from the seed "
                                   "image, so much of the schedule (DistDiff's comparison: 0.5)")
    steps: int = Field(50, ge=1, le=999, description="solver steps of the whole schedule (Stable Diffusion: 50)")
    guidance_scale: float = Field(7.5, ge=0, description="classifier-free guidance scale (Stable Diffusion: 7.5)")
    solver: sampling.Solver = Field("ddim", description="ddim (ours, as img2img), dpmpp_2m or unipc")
    spacing: sampling.Spacing | None = Field(None, description="timestep spacing; none: leading for ddim, linspace for "
                                             "the others")

    _plain: Any = PrivateAttr()  # the method that samples, with prompts of ours

    @field_validator("prompts", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return read_prompts(value) if isinstance(value, str) else value

    @field_validator("prompts")
    @classmethod
    def _are_sentences(cls, prompts: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if not prompts:
            raise ValueError("has no class")
        if blank := [key for key, found in prompts.items() if not found or not all(one.strip() for one in found)]:
            raise ValueError(f"class {blank[0]!r} has no prompt, or an empty one; take it out or fill it")
        for template in prompts.get(ANY, ()):
            check_template(template)
        return prompts

    @model_validator(mode="after")
    def _samples(self) -> Lecf:
        fields = {name: getattr(self, name) for name in ("ratio", "quota", "negative", "steps", "guidance_scale",
                                                         "solver", "spacing")}
        if self.strength is None:
            self._plain = Text2Img(prompt="", **fields)
        else:
            sampling.steps_run(self.strength, self.steps)
            self._plain = Img2Img(prompt="", strength=self.strength, **fields)
        return self

    def needs(self) -> frozenset[str]:
        return self._plain.needs() | prompt_needs(*self.prompts.get(ANY, ()))

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        """Raises UsageError for a class without a prompt."""
        classes, planned = index.classes, self._plain.copies(index, rng)
        asked = sorted({classes.key[label] for label in np.unique(index.labels[planned > 0])})
        if ANY not in self.prompts and (missing := [key for key in asked if key not in self.prompts]):
            near = get_close_matches(missing[0], self.prompts, n=1)
            hint = f"; did you mean {near[0]!r} by {missing[0]!r}?" if near else ""
            raise UsageError(f"method.prompts has no list for {len(missing)} of {len(asked)} classes, such as "
                             f"{', '.join(missing[:5])}{hint} Add them by their class key, or templates for all under "
                             f"'{ANY}'.")
        return planned

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        own = self.prompts.get(classes.key[label])
        choice = own or self.prompts[ANY]
        prompt = choice[int(rng("prompt").integers(len(choice)))]
        return replace(self._plain.draw(seed_id, label, copy, row, classes, rng),
                       prompt=prompt if own else format_prompt(prompt, label, classes))


def read_prompts(path: str) -> dict[str, list[str]]:
    """Sentences by class key from a JSON file, or from `prompts.json` of a folder. Raises ValueError."""
    file = Path(path).expanduser()
    file = file / FILE if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}){looked_at(file)}; give a JSON file with a list of "
                         "sentences for each class key, or a folder that `rayexpand fit` made") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} holds a {type(found).__name__}; expected an object with a list of sentences for each "
                         "class key")
    return dict(found)
