"""Rows of a table that need no expansion: what a model that was trained on other images makes of the same real images.

    clip_zero_shot    cosine of image and class text; nothing is trained, so every repetition gives the same
    clip_linear       logistic regression on CLIP's features of the real images
    clip_finetune     CLIP's image tower and a head that starts as the class texts, trained by the study's recipe
    clip_distill      the study's own classifier, which also learns what CLIP sees in each image it is shown

Each has results and predictions like an arm, so that it is paired with the arms, and is marked as one that knows other
images. The networks are in baseline_models.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayexpand.classifier.recipe import Recipe, make_recipe
from rayexpand.contract.prompts import check_template, placeholders
from rayexpand.contract.settings import Section
from rayexpand.data.seeds import DataConfig
from rayexpand.models.guide_files import check_guide, kind_of, present_guide
from rayexpand.runs.config import GuideConfig, unnamed

Kind = Literal["clip_zero_shot", "clip_linear", "clip_finetune", "clip_distill"]
UNTRAINED = ("clip_zero_shot", "clip_linear")  # no network is trained step by step
NOTE = "uses a model trained on other images"
ONE = "a photo of a {name}."  # Radford et al. 2021, section 3.1.4
C_OF_CLIP = 0.316  # Radford et al. 2021, where nothing chooses
OF_GUIDE = "clip"  # the backbone of a recipe whose network is the guide's own

# What a kind can be told beside guide, name and use; a field of another kind is refused.
_FIELDS: dict[str, tuple[str, ...]] = {
    "clip_zero_shot": ("templates",), "clip_linear": ("C",), "clip_finetune": ("templates", "recipe"),
    "clip_distill": ("templates", "recipe", "weight", "temperature", "view")}
# CLIP fine-tuned with the images and the number of steps of the other arms: the usual low rate (ours).
_FINETUNE: dict[str, Any] = {
    "backbone": OF_GUIDE, "backbone_args": {}, "stem": "own", "checkpoint": None, "pretrained": None, "drop_path": 0.0,
    "optimiser": "adamw", "lr": 1e-5, "weight_decay": 0.1, "schedule": "cosine", "schedule_unit": "step",
    "warmup_lr": 0.0, "warmup_scales": False}
_WARMUP = 0.1  # of the training


class Baseline(Section):
    kind: Kind = Field(description="clip_zero_shot, clip_linear, clip_finetune or clip_distill")
    name: str | None = Field(None, min_length=1, description="what tables and figures call it; null: the kind")
    guide: GuideConfig = Field(GuideConfig(), description="the CLIP model")
    use: str | None = Field(None, description="an expansion whose samples are trained on beside the real images; not "
                            "for clip_zero_shot")
    templates: Literal["one", "simple", "openai"] | tuple[str, ...] = Field(
        "one", description=f"what is asked of a class: one ({ONE}), open_clip's simple 7 or openai 80, or a "
        "list with {name}; of several, the mean of the texts of unit length")
    C: float | None = Field(None, gt=0, description="inverse strength of the L2 penalty of clip_linear; null: by the "
                            f"validation images of the study, of 96 steps from 1e-6 to 1e6, else {C_OF_CLIP} (CLIP)")
    recipe: dict[str, Any] = Field({}, description="recipe fields of clip_finetune (AdamW, 1e-5, decay 0.1, cosine, a "
                                   "tenth of warm-up) or of the student of clip_distill")
    weight: float = Field(0.5, gt=0, le=1, description="share of what CLIP says in the loss of clip_distill (ours)")
    temperature: float = Field(4.0, gt=0, description="of both softmax functions of clip_distill (ours)")
    view: Literal["same", "seed"] = Field("same", description="what CLIP is shown by clip_distill: the image as the "
                                          "student sees it, or the whole image, once")

    @field_validator("templates")
    @classmethod
    def _are_templates(cls, value: Any) -> Any:
        if not value:
            raise ValueError("is empty; give one template or more")
        for template in () if isinstance(value, str) else value:
            check_template(template)
            if placeholders(template) != {"name"}:
                raise ValueError(f"{template!r} must have the placeholder {{name}}, and no other")
        return value

    @model_validator(mode="after")
    def _has_effect(self) -> Baseline:
        known = {name for fields in _FIELDS.values() for name in fields}
        idle = [name for name, field in type(self).model_fields.items() if name in known - {*_FIELDS[self.kind]}
                and getattr(self, name) != field.default]
        if idle:
            raise ValueError(f"{', '.join(idle)}: no effect on {self.kind}; take it out")
        if self.kind == "clip_zero_shot" and self.use is not None:
            raise ValueError("use: clip_zero_shot trains on nothing; take it out")
        return self

    @property
    def called(self) -> str:
        return self.name or self.kind

    def settings(self) -> dict[str, Any]:
        """What its answers depend on, beside the weights, the images and the recipe."""
        return {"kind": self.kind, **{name: value for name, value in self.model_dump(mode="json").items()
                                      if name in _FIELDS[self.kind] and name != "recipe"}}


def note_of(kind: str) -> str:
    """What must be said wherever its row is shown."""
    return f"{NOTE}, and says the same in every repetition" if kind == "clip_zero_shot" else NOTE


def short_form(value: Any) -> Any:
    """A baseline may be written as its kind alone."""
    return [{"kind": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


def recipe_of(one: Baseline, study: Mapping[str, Any]) -> Recipe:
    """The recipe a baseline is trained by; of those without training, that of the study, which is not used. Raises
    ValueError."""
    if one.kind != "clip_finetune":
        return make_recipe({**study, **one.recipe})
    fields = {**{name: value for name, value in study.items() if name != "warmup_epochs"}, **_FINETUNE, **one.recipe}
    if "warmup_epochs" in one.recipe:
        return make_recipe(fields)
    return make_recipe({**fields, "warmup_epochs": _WARMUP * make_recipe({**fields, "warmup_epochs": 0.0}).epochs})


def problems(one: Baseline, recipe: Recipe, data: DataConfig) -> list[str]:
    """What is wrong as far as can be known without loading a model: `field: what, why, next step`."""
    weights = one.guide.weights
    found = unnamed("guide.weights", one.guide, data) or [
        f"guide.weights: {line}" for line in check_guide(weights, one.guide.checkpoint)]
    folder = present_guide(weights)
    if not found and folder is not None and (kind := kind_of(folder)) != "clip":
        found.append(f"guide.weights: {folder} is a {kind} that `rayexpand fit` made, and {one.kind} is about a CLIP "
                     "model as it was published; name one, or train the other as an arm")
    if one.kind == "clip_finetune" and recipe.backbone != OF_GUIDE:
        found.append(f"recipe.backbone: {recipe.backbone} would not be used, the network is that of the guide; take it "
                     "out")
    if one.kind == "clip_distill" and recipe.loss != "ce":
        found.append(f"recipe.loss: what CLIP sees is weighed against the cross-entropy, and loss is {recipe.loss}; "
                     "set loss: ce")
    mixed = [name for name in ("mixup", "cutmix", "cmo") if getattr(recipe, name)]
    if one.kind == "clip_distill" and one.view == "seed" and mixed:
        found.append(f"view: seed knows what CLIP sees in one image, and {', '.join(mixed)} of the recipe mixes two; "
                     "set view: same, or turn the mixing off")
    return found
