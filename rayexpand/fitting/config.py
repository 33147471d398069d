"""What to fit: the file of `rayexpand fit`, or what the method of a run needs.

One YAML names the data and what to make of it:

    name: digits
    data: {source: digits}
    fit:
      guide: {kind: classifier}        # else `guide` names the one whose features are taken
      prototypes: {groups: 3}
      prompts: {generator: models/keytotext}     # LECF's sentences (prompt_lists.py)
      captions: {column: text}                   # a text about each image (captions.py)
      class_features: {images: 64}               # mean CLIP feature of each class (class_features.py)
      image_features: {}                         # CLIP feature of each image (class_features.py)
      pretrain: {size: 16}                       # a small generator with its guide, from nothing (pretrain.py)
      adapter: {recipe: {preset: diffmix}}       # fine-tune the generator `prior` names (finetuning/plan.py)

A single thing may be written flat, `fit: {kind: prototypes, groups: 3}`. Everything is an artifact (artifacts.py): the
same command a second time makes nothing. A run's own file works too: then what its method needs is made.

    kind          the guide
    classifier    a network trained on these images alone (DistDiff's default)
    clip_head     a CLIP guide fine-tuned on them, with a linear head that starts at the class texts (DistDiff)
    random        the network of `recipe` with its initial weights (DistDiff's ablation)
    pretrained    the network of `recipe` with the weights of recipe.checkpoint, untouched. Weights that saw other
                  images than these, such as ImageNet's, know more than the paper's guide may: artifact.json says so
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.settings import Section, mistakes, read
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.adapter.config import AdapterFit, BaseConfig, adapter_problems
from rayexpand.fitting.captions import CaptionsFit, check_captions
from rayexpand.fitting.class_features import ClassFeaturesFit, ImageFeaturesFit
from rayexpand.fitting.features import Intake
from rayexpand.fitting.pretrain import PretrainFit, check_pretrain
from rayexpand.fitting.prompts import PromptsFit, check_generator
from rayexpand.models.guide_files import CLASSIFIER, CLIP_HEAD, check_guide, kind_of, present_guide
from rayexpand.runs.config import ClusterConfig, GuideConfig, RunConfig, RuntimeConfig
from rayexpand.storage.places import is_url

ARTIFACTS = "artifacts"


class GuideFit(Section):
    kind: Literal["classifier", "clip_head", "random", "pretrained"] = "classifier"
    recipe: dict[str, Any] = Field({}, description="preset and fields of the training recipe (core/recipe.py)")

    @field_validator("recipe")
    @classmethod
    def _is_a_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        make_recipe(recipe)
        return recipe


class PrototypesFit(Section):
    groups: int = Field(3, ge=1, description="groups of each class (DistDiff: 3)")
    batch: int = Field(64, ge=1, description="images of one guide call; features may depend on it in the last digit")

    @property
    def intake(self) -> Intake:
        return Intake(self.batch)


class FitSection(Section):
    guide: GuideFit | None = Field(None, description="train a guide; null: the one `guide` names")
    prototypes: PrototypesFit | None = Field(None, description="prototypes of each class by the guide's features")
    prompts: PromptsFit | None = Field(None, description="sentences about each class, written by a text model")
    captions: CaptionsFit | None = Field(None, description="a text about each image")
    class_features: ClassFeaturesFit | None = Field(None, description="mean CLIP feature of each class")
    image_features: ImageFeaturesFit | None = Field(None, description="CLIP feature of each image")
    pretrain: PretrainFit | None = Field(None, description="a small generator with its guide, trained from nothing; "
                                         "its guide serves the other sections")
    adapter: AdapterFit | None = Field(None, description="fine-tune the generator")

    @property
    def features(self) -> bool:
        """Whether a CLIP guide is asked for features that condition a generator."""
        return self.class_features is not None or self.image_features is not None


class FitConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="<out>/<name>-guide and -prototypes become "
                      "links to what was made last under this name")
    out: str = Field(ARTIFACTS, min_length=1, description="folder that holds artifacts")
    seed: int = Field(0, ge=0, description="keys initial weights and the order of training")
    data: DataConfig = Field(description="the training images; never test images")
    guide: GuideConfig = GuideConfig()
    prior: BaseConfig = BaseConfig()
    fit: FitSection
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("fit", mode="before")
    @classmethod
    def _flat_form(cls, value: Any) -> Any:
        """`{kind: prototypes, ...}`, `{kind: prompts, ...}` and `{kind: classifier, ...}` for a single thing."""
        if not isinstance(value, Mapping) or "kind" not in value:
            return value
        if value["kind"] in FitSection.model_fields:
            return {value["kind"]: {name: field for name, field in value.items() if name != "kind"}}
        return {"guide": dict(value)}


def load_fit(path: str | Path, overrides: Sequence[str] = ()) -> FitConfig:
    """Configuration of a YAML file with `a.b=value` overrides. Raises ConfigError with all mistakes."""
    return parse_fit(read(path, overrides), str(path))


def parse_fit(raw: Mapping[str, Any], where: str = "fit") -> FitConfig:
    """Configuration of a mapping. Raises ConfigError with every mistake of every section."""
    try:
        return FitConfig(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        raise ConfigError(where, mistakes(error, FitConfig, "")) from error


def fit_config(config: RunConfig, guide: GuideFit | None = None, adapter: AdapterFit | None = None, *, groups: int = 3,
               out: str = ARTIFACTS) -> FitConfig | None:
    """What the method of a run needs to have fitted, on the run's own seeds; None where it needs nothing. `guide`:
    train one rather than use the run's; `adapter`: how to fine-tune the generator, which a run does not say."""
    needs = config.method.needs()
    made = FitSection(guide=guide if "guide" in needs else None,
                      prototypes=PrototypesFit(groups=groups) if "prototypes" in needs else None,
                      class_features=ClassFeaturesFit() if "class_features" in needs else None,
                      image_features=ImageFeaturesFit() if "image_features" in needs else None,
                      adapter=adapter if "adapter" in needs else None)
    if made == FitSection():
        return None
    return FitConfig(name=config.name, out=out, seed=config.seed, data=config.data, guide=config.guide,
                     prior=BaseConfig(weights=config.prior.weights), fit=made, device=config.prior.device,
                     runtime=config.runtime, cluster=config.cluster)


def refuse_untold_adapter(config: RunConfig, where: str) -> None:
    """Raises UsageError for a run whose method needs an adapter that the run does not name."""
    if "adapter" in config.method.needs() and config.artifacts.adapter is None:
        raise UsageError(f"{where}: {config.method.name} needs a fine-tuned generator, and a run does not say how to "
                         "train one. Write a file with the same data and prior and with `fit: {adapter: {recipe: "
                         "{preset: diffmix}}}` (or realfake, tiny), run `rayexpand fit` on it, and set "
                         "artifacts.adapter to the folder it prints")


def preflight(config: FitConfig, *, device_here: bool = True, on_ray: bool = True) -> list[str]:
    """Everything wrong that can be known without loading a model or listing the dataset, one line each.

    `device_here`: something is computed in this process, so its device must be here too; `on_ray`: it may also be
    spread over workers.
    """
    problems = seeds.check(config.data)
    made = config.fit.guide
    if (prompts := config.fit.prompts) is not None:
        problems += [f"fit.prompts.generator: {one}" for one in check_generator(prompts.generator)]
    if config.fit.captions is not None:
        problems += [f"fit.captions.{one}" for one in check_captions(config.fit.captions, config.data)]
    if config.fit.pretrain is not None:
        problems += [f"fit.pretrain.{one}" for one in check_pretrain(config.fit.pretrain)]
    if config.fit == FitSection():
        problems.append("fit: names nothing to make; write guide: {kind: classifier}, prototypes: {groups: 3}, or both")
    scores = config.fit.prototypes is not None or config.fit.features
    if (made is None and scores) or (made is not None and made.kind == CLIP_HEAD):
        problems += [f"guide.weights: {one}" for one in check_guide(config.guide.weights, config.guide.checkpoint)]
    problems += _encoder_problems(config)
    if config.fit.adapter is not None:
        weights = None if config.fit.pretrain is not None else config.prior.weights
        problems += adapter_problems(config.fit.adapter, weights, config.device,
                                     [name for name in FitSection.model_fields if getattr(config.fit, name)],
                                     on_ray=on_ray)
    if made is not None and (problem := _checkpoint_problem(made)):
        problems.append(f"fit.guide.recipe.checkpoint: {problem}")
    if is_url(config.out):
        problems.append(f"out: {config.out} is an object store; artifacts are read as files, so give a folder")
    if device_here and config.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            problems.append(f"device: {config.device} asked for, but torch sees no CUDA device here; use auto or cpu")
    return problems


def _encoder_problems(config: FitConfig) -> list[str]:
    """Class and image features stand beside hidden states of a text encoder, so CLIP must make them."""
    if not config.fit.features:
        return []
    if config.fit.guide is not None:
        return ["fit.guide: class_features and image_features are those of the CLIP model that guide.weights names, so "
                "make them in a file of their own"]
    folder = present_guide(config.guide.weights)
    if folder is not None and not check_guide(config.guide.weights, None) and kind_of(folder) == CLASSIFIER:
        return [f"guide.weights: {config.guide.weights} is a classifier; class_features and image_features need the "
                "image tower of a CLIP model"]
    return []


def _checkpoint_problem(made: GuideFit) -> str:
    checkpoint = make_recipe(made.recipe).checkpoint
    if made.kind == "pretrained" and checkpoint is None:
        return "is missing; kind pretrained takes its weights from a local safetensors file"
    if made.kind in ("random", CLIP_HEAD) and checkpoint is not None:
        return f"has no effect on kind {made.kind}; take it out, or use kind pretrained or classifier"
    if checkpoint is not None and not Path(checkpoint).expanduser().is_file():
        return f"there is no file {checkpoint}"
    return ""
