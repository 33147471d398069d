"""DiffCoRe-Mix: text to image, told by a context what to show and by a negative prompt what not to; what is unlike the
real image of its row is drawn again (Islam and Akhtar, "Context-guided Responsible Data Augmentation with Diffusion
Models", 2025). No training.

    paper       here                     meaning, unit
    P_c         prompt with a context    contextual prompt
    P_n         negatives                negative prompt, without what contradicts class or context
    gamma       guidance_scale - 1       e = (1 + gamma) e(P_c) - gamma e(P_n) = e(P_n) + s (e(P_c) - e(P_n)): s is the
                                         guidance scale (equation 4)
    S, tau      (accept)                 cosine of a guide's features of the real image and of the sample; its threshold
    x_T         z_BCHW                   pure noise: the real image is not looked at
    p           ratio                    floor(p N_k) samples of class k; -50 is 0.5, -100 is 1

The hard cosine filtration is the section `accept` of a run, which this method brings (`acceptance`): a job without one
is judged by its preset. The paper draws until it accepts, so that counts are exact; here the best of `accept.attempts`
is kept (`exhausted: best`). The released code drops what is not above 0.6 at once. Mixing with the real image is a
matter of training, where a sample is found by its seed id.
"""

# B rows

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from rayexpand.contract.prompts import CLASS_WORDS, check_template, format_prompt, placeholders, prompt_needs
from rayexpand.contract.protocols import Batch, Expansion, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Draw, SeedIndex, Start, spoken, spoken_name
from rayexpand.contract.settings import Section
from rayexpand.diffusion import sampling
from rayexpand.methods._copies import MAX_COPIES, quota_copies, ratio_copies

CONTEXT = "{context}"

# The paper prints one context, heavy snow, and no negative prompt; the released code has sixteen scenes for things that
# fly, here in our words, and one list of terms for all datasets.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "prompt": "a {name}, {context}", "guidance_scale": 7.5,
        "contexts": ("in soft morning light", "in bright daylight", "at sunset", "at night", "in heavy snow",
                     "in the rain", "in thick fog", "on a plain background", "outdoors", "indoors",
                     "seen from the side", "seen from above", "in a close-up", "from some distance"),
        "negatives": ("distorted", "blurry", "out of frame", "watermark", "text", "collage", "cartoon")},
    "official_code": {
        "prompt": "A {name}, a {metaclass}, {context}", "guidance_scale": 12.0,
        "contexts": ("in a garden", "in a stormy sky with dark clouds", "over calm water under a clear sky",
                     "in an orange and pink sunset", "on a misty morning", "between the peaks of mountains",
                     "over a dense forest", "at high altitude without a cloud", "over an open desert",
                     "at night under a full moon", "in a storm with lightning", "with its shadow on the ocean",
                     "before the skyline of a city at twilight", "over golden fields of crop", "in swirling snow",
                     "under thick clouds"),
        "negatives": ("train", "car", "newspaper", "sunlight", "people", "human", "tree", "cityscape", "road",
                      "landscape", "bus", "building", "desk", "computer", "paper texture", "windows", "streets",
                      "rails", "traffic", "sky", "road lines", "traffic lights")},
}
ACCEPTANCE: dict[str, dict[str, Any]] = {
    "paper": {"exhausted": "best"}, "official_code": {"above": 0.6, "attempts": 1}}

_NO_WORDS = frozenset({"the", "and", "with", "from", "for", "its"})
_LEAST_LETTERS = 3  # of a word that counts for a contradiction


class DiffCoReMix(Section):
    """Settings of DiffCoRe-Mix. Defaults are ours unless noted; `preset` sets those of prompts and guidance."""

    model_config = ConfigDict(validate_default=True)

    name: Literal["diffcoremix"] = "diffcoremix"
    preset: Literal["paper", "official_code"] = Field("paper", description="defaults of prompt, contexts, negatives, "
                                                      "guidance_scale and of the section accept; fields that are given "
                                                      "win")
    ratio: float = Field(1.0, gt=0, le=MAX_COPIES, description="samples for each real image, rounded down in each "
                         "class (paper: 0.5 is -50, 1 is -100)")
    quota: int | None = Field(None, ge=1, description="samples per class, instead of `ratio`")
    prompt: str = Field(default_factory=lambda data: _own(data, "prompt"), description="template with {context} and "
                        "{name}, {metaclass}, {noun}, {token}, {caption}; must say the class (paper: generate "
                        "{context} to the {name}, a bird object)")
    contexts: tuple[str, ...] = Field(
        default_factory=lambda data: _own(data, "contexts"), description="scenes, of which one is drawn for each "
        "attempt; ours are neutral, those of official_code are for things that fly")
    negatives: tuple[str, ...] = Field(
        default_factory=lambda data: _own(data, "negatives"), description="terms of the negative prompt; one that "
        "shares a word with class or context is left out of that prompt")
    strip_numbers: bool = Field(True, description="say 011.Rusty_Blackbird as Rusty Blackbird (released code; off for "
                                "aircraft)")
    filtration: bool = Field(True, description="bring the section accept; false: keep all samples, unless the job has "
                             "that section")
    steps: int = Field(50, ge=1, le=999, description="solver steps, all of them run (released code: 50)")
    guidance_scale: float = Field(
        default_factory=lambda data: _own(data, "guidance_scale"), ge=0, description="s = 1 + gamma of equation 4, not "
        "gamma (paper: no value; released code: 12, for CosXL; 5 to 7.5 for others)")
    solver: sampling.Solver = Field("ddim", description="ddim (released code: Euler's step on the noise levels of an "
                                    "EDM, which CosXL is shipped with), dpmpp_2m or unipc")
    spacing: sampling.Spacing | None = Field(None, description="where the steps lie; null: as the weights were "
                                             "shipped; of Stable Diffusion 1.x and 2.x leading for ddim, else linspace")

    @field_validator("prompt")
    @classmethod
    def _names_the_class(cls, prompt: str) -> str:
        check_template(prompt.replace(CONTEXT, ""))
        if not placeholders(prompt.replace(CONTEXT, "")) & {"name", "token"}:
            raise ValueError(f"prompt {prompt!r} does not say the class; write {{name}}, or {{token}} of an adapter")
        return prompt

    @field_validator("contexts")
    @classmethod
    def _are_said(cls, contexts: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if bad := [one for one in contexts if not one.strip() or "{" in one or "}" in one]:
            raise ValueError(f"{bad[0]!r} is no scene; write plain words, without braces")
        if "prompt" in info.data and (CONTEXT in info.data["prompt"]) != bool(contexts):
            raise ValueError("are drawn for {context} of the prompt, " + (
                "which it does not have; write it into the prompt, or set contexts: []" if contexts else
                "and there are none; name some, or take it out of the prompt"))
        return contexts

    def expand(self, batch: Batch, tools: Tools) -> Expansion:
        import torch

        prior = tools.prior
        schedule = sampling.batch_schedule(prior, batch, self.solver, self.steps, self.spacing)
        with torch.no_grad():
            cond = sampling.embed_batch(prior, batch, self.guidance_scale)
            z_BCHW = sampling.noise_batch(prior, batch)
            z_BCHW = sampling.denoise(prior, z_BCHW, schedule, cond, sampling.fresh_noise(prior, batch))
            images, reasons = sampling.to_images(prior.decode(z_BCHW, cond))
        return Expansion(images, reasons)

    @property
    def negative(self) -> str:
        """The negative prompt where nothing contradicts it."""
        return ", ".join(self.negatives)

    def acceptance(self) -> dict[str, Any] | None:
        """The section `accept` of the preset, as far as it differs from the section's own defaults."""
        return ACCEPTANCE[self.preset] if self.filtration else None

    def needs(self) -> frozenset[str]:
        return frozenset({"prior"}) | prompt_needs(self.prompt.replace(CONTEXT, ""))

    def copies(self, index: SeedIndex, rng: PlanRng) -> np.ndarray:
        if self.quota is None:
            return ratio_copies(index, self.ratio, rng, down=True)
        return quota_copies(index, np.full(len(index.classes), self.quota), rng)

    def draw(self, seed_id: str, label: int, copy: int, row: int, classes: ClassTable, rng: RowRng) -> Draw:
        context = self.contexts[int(rng("context").integers(len(self.contexts)))] if self.contexts else ""
        name = spoken_name(classes.name[label]) if self.strip_numbers else spoken(classes.name[label])
        template = self.prompt.replace(CONTEXT, context)
        if name:
            template = template.replace("{name}", name.replace("{", "{{").replace("}", "}}"))
        said = (name, *(getattr(classes, word)[label] for word in CLASS_WORDS[1:]), context)
        return Draw(sample_id=f"{seed_id}/{copy}", seed_id=seed_id, copy=copy, source_label=label, target_label=label,
                    prompt=format_prompt(template, label, classes),
                    negative=", ".join(without_contradictions(self.negatives, said)), start=Start.NOISE, strength=1.0,
                    steps_run=self.steps, attempt=0, row=row, group=copy)

    def group(self, copies: int) -> int:
        return 1

    def batch_key(self, draw: Draw) -> tuple[Any, ...]:
        return ()

    def soft_label(self, source: np.ndarray, target: np.ndarray, strength: np.ndarray, n_classes: int,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target]


@lru_cache(maxsize=65_536)
def without_contradictions(terms: tuple[str, ...], said: tuple[str, ...]) -> tuple[str, ...]:
    """The terms that share no word with what the prompt says. Two words are one where the longer begins with the
    shorter (sky and skyline, car and cars), which takes out too many rather than too few."""
    words = _words(said)
    return tuple(term for term in terms if not any(one.startswith(other) or other.startswith(one)
                                                   for one in _words([term]) for other in words))


def _words(texts: Sequence[str]) -> set[str]:
    found = re.findall(r"[^\W\d_]+", " ".join(texts).casefold())
    return {word for word in found if len(word) >= _LEAST_LETTERS} - _NO_WORDS


def _own(fields: Mapping[str, Any], name: str) -> Any:
    return PRESETS[fields.get("preset", "paper")][name]
