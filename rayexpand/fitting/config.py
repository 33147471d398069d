"""What to fit: the file of `rayexpand fit`, or what the method of a run needs.

One YAML names the data and what to make of it:

    name: digits
    data: {source: digits}
    fit:
      guide: {kind: classifier}        # else `guide` names the one whose features are taken
      prototypes: {groups: 3}
      prompts: {generator: models/keytotext}     # LECF's sentences (prompts.py)
      captions: {column: text}                   # a text about each image (captions.py)
      class_features: {images: 64}               # mean CLIP feature of each class (class_features.py)
      image_features: {}                         # CLIP feature of each image (class_features.py)
      thresholds: {}                             # how alike images of a class are, for accept (thresholds.py)
      scores: {folds: 5}                         # how hard each image is, for allocate (scores.py)
      pretrain: {size: 16}                       # a small generator with its guide, from nothing (pretrain.py)
      adapter: {recipe: {preset: diffmix}}       # fine-tune the generator `prior` names (adapter/config.py)

A single thing may be written flat, `fit: {kind: prototypes, groups: 3}`. Everything is an artifact: the
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
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, create_model, field_validator

from rayexpand.artifacts.adapter import may_adapt
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import Section, mistakes, read
from rayexpand.data import seeds
from rayexpand.fitting.adapter.config import AdapterFit, BaseConfig
from rayexpand.fitting.adapter.fit import AdapterMaker
from rayexpand.fitting.captions import CaptionsFit, CaptionsMaker
from rayexpand.fitting.class_features import ClassFeaturesMaker, ImageFeaturesMaker
from rayexpand.fitting.guide import GuideFit, GuideMaker
from rayexpand.fitting.maker import ARTIFACTS, FitBase, Maker
from rayexpand.fitting.pretrain import PretrainMaker
from rayexpand.fitting.prompts import PromptsMaker
from rayexpand.fitting.prototypes import PrototypesFit, PrototypesMaker
from rayexpand.fitting.scores import ScoresMaker
from rayexpand.fitting.thresholds import ThresholdsMaker
from rayexpand.models.guide_files import CLASSIFIER, CLIP_HEAD, check_guide, kind_of, present_guide
from rayexpand.runs.config import RunConfig, unnamed
from rayexpand.storage.places import is_url

# In the order in which they run. A new kind is an entry here, and one in artifacts.KINDS where methods read it.
MAKERS: tuple[Maker, ...] = (PretrainMaker(), GuideMaker(), PrototypesMaker(), PromptsMaker(), CaptionsMaker(),
                             ClassFeaturesMaker(), ImageFeaturesMaker(), ThresholdsMaker(), ScoresMaker(),
                             AdapterMaker())
# The parts of `fit:`, each None where it is not asked for.
if TYPE_CHECKING:
    FitSection = Any
else:
    FitSection = create_model("FitSection", __base__=Section, **{
        maker.kind: (maker.section | None, Field(None, description=maker.text)) for maker in MAKERS})


class FitConfig(FitBase):
    fit: FitSection

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


def fit_config(config: RunConfig, guide: GuideFit | None = None, adapter: AdapterFit | None = None,
               captions: CaptionsFit | None = None, *, groups: int = 3, out: str = ARTIFACTS) -> FitConfig | None:
    """What the method of a run needs to have fitted, on the run's own seeds; None where it needs nothing. `guide`:
    train one rather than use the run's; `adapter`, `captions`: how to fine-tune the generator and where captions come
    from, which a run does not say."""
    said = {"guide": guide, "adapter": adapter, "captions": captions, "prototypes": PrototypesFit(groups=groups)}
    needs = config.needs | ({"adapter"} if adapter is not None and may_adapt(config.method) else frozenset())
    made = FitSection(**{maker.kind: said.get(maker.kind, maker.for_run(config)) for maker in MAKERS
                         if maker.kind in needs})
    if made == FitSection():
        return None
    return FitConfig(name=config.name, out=out, seed=config.seed, data=config.data, guide=config.guide,
                     prior=BaseConfig(weights=config.prior.weights), fit=made, device=config.prior.device,
                     runtime=config.runtime, cluster=config.cluster)


def refuse_untold_adapter(config: RunConfig, where: str) -> None:
    """Raises UsageError for a run whose method needs an adapter that the run does not name."""
    if "adapter" in config.needs and config.artifacts.get("adapter") is None:
        raise UsageError(f"{where}: {config.method.name} needs a fine-tuned generator, and a run does not say how to "
                         "train one. Write a file with the same data and prior and with `fit: {adapter: {recipe: "
                         "{preset: diffmix}}}` (or realfake, tiny), run `rayexpand fit` on it, and set "
                         "artifacts.adapter to the folder it prints")


def preflight(config: FitConfig, *, device_here: bool = True, on_ray: bool = True) -> list[str]:
    """Everything wrong that can be known without loading a model or listing the dataset, one line each.

    `device_here`: something is computed in this process, so its device must be here too; `on_ray`: it may also be
    spread over workers.
    """
    problems = secret_problems(config.model_dump(mode="json")) or seeds.check(config.data)
    wanted = [(maker, section) for maker in MAKERS if (section := getattr(config.fit, maker.kind)) is not None]
    if not wanted:
        problems.append("fit: names nothing to make; write guide: {kind: classifier}, prototypes: {groups: 3}, or both")
    for maker, section in wanted:
        problems += maker.problems(section, config, on_ray=on_ray)
    made = config.fit.guide
    own = {maker.kind: getattr(section, "guide", None) for maker, section in wanted if maker.by_guide}
    scores = None in own.values()
    for kind, guide in own.items():
        if guide is not None:
            problems += [f"fit.{kind}.guide.weights: {one}" for one in check_guide(guide.weights, guide.checkpoint)]
            problems += unnamed(f"fit.{kind}.guide.weights", guide, config.data)
    if (made is None and scores) or (made is not None and made.kind == CLIP_HEAD):
        problems += [f"guide.weights: {one}" for one in check_guide(config.guide.weights, config.guide.checkpoint)]
        if config.fit.pretrain is None:  # which makes both
            problems += unnamed("guide.weights", config.guide, config.data)
    if config.fit.adapter is not None and config.fit.pretrain is None:
        problems += unnamed("prior.weights", config.prior, config.data)
    problems += _encoder_problems(config)
    if is_url(config.out):
        problems.append(f"out: {config.out} is an object store; artifacts are read as files, so give a folder")
    if device_here and config.device.startswith("cuda"):
        from rayexpand.contract.device import absent_device

        problems += [f"device: {one}" for one in absent_device(config.device)]
    return problems


def makes_features(fit: Any) -> bool:
    """Whether a CLIP guide is asked for features that condition a generator."""
    return any(section is not None and section.guide is None for section in (fit.class_features, fit.image_features))


def _encoder_problems(config: FitConfig) -> list[str]:
    """Class and image features stand beside hidden states of a text encoder, so CLIP must make them."""
    if not makes_features(config.fit):
        return []
    if config.fit.guide is not None:
        return ["fit.guide: class_features and image_features are those of the CLIP model that guide.weights names, so "
                "make them in a file of their own"]
    folder = present_guide(config.guide.weights)
    if folder is not None and not check_guide(config.guide.weights, None) and kind_of(folder) == CLASSIFIER:
        return [f"guide.weights: {config.guide.weights} is a classifier; class_features and image_features need the "
                "image tower of a CLIP model"]
    return []
