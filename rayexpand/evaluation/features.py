"""Features of images: a published extractor, a guide or a timm backbone, in calls of one shape.

    here          meaning, unit
    x_BHWC        images 0..255, uint8 or float32, square, of the side the extractor takes
    h_BD          float32 features

Distances depend on the extractor and on how images are brought to its size, so results state both.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from rayexpand.contract.errors import ModelError, RowFault, UsageError, looked_at
from rayexpand.contract.protocols import Progress
from rayexpand.contract.settings import Device, Later, Section
from rayexpand.data.pixels import PILLOW_PIXELS, decode
from rayexpand.evaluation.intake import IntakeConfig
from rayexpand.evaluation.presets import OPEN_CLIP, PRESETS, RESERVED, TIMM_DINOV2, PresetName, content_problem
from rayexpand.models.folders import DIGITS, HUB_NAME, PICKLES, ModelFiles, folder_hash, loaded_files, unreadable
from rayexpand.models.guide_files import CLASS_PROMPT, present_guide

if TYPE_CHECKING:
    import torch


class ExtractorConfig(Section):
    """Which model's features are compared."""

    guide: str | None = Field(None, description="'digits', an open_clip folder, org/name@revision, or an open_clip "
                              "model name with a checkpoint; null: the guide the run is configured with")
    timm: str | None = Field(None, description="a timm model name with a checkpoint, instead of a guide")
    preset: Annotated[PresetName | None, Later(None)] = Field(
        None, description="a published extractor with its intake and its checkpoint (`rayexpand convert`), "
        "instead of both")
    checkpoint: str | None = Field(None, description="safetensors file of a model name")
    intake: Annotated[IntakeConfig | None, Later(None)] = Field(
        None, description="how images are brought to its size; null: that of the preset, else the middle square, "
        "bilinear")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")

    @property
    def is_named(self) -> bool:
        return (self.guide or self.timm or self.preset) is not None

    @property
    def brought(self) -> IntakeConfig:
        """How images are brought to its size."""
        return PRESETS[self.preset].intake if self.preset else self.intake or IntakeConfig()


class Extractor:
    """A frozen image model. `size` is the side of its input in pixels; `intake` brings images there."""

    def __init__(self, size: int, device: torch.device, features: Callable[[torch.Tensor], Any],
                 intake: IntakeConfig | None = None) -> None:
        self.size, self.device, self.intake, self._features = size, device, intake or IntakeConfig(), features

    def __call__(self, x_BHWC: np.ndarray) -> np.ndarray:
        """float32 (B, D) features of (B, size, size, 3) images, 0..255."""
        import torch

        with torch.inference_mode():
            x_BCHW = torch.from_numpy(np.array(x_BHWC)).to(self.device).permute(0, 3, 1, 2).float() / 255
            return self._features(x_BCHW).float().cpu().numpy()


def check(config: ExtractorConfig) -> list[str]:
    """What is wrong with the choice, without loading a model: `field: what, why, next step`."""
    given = [name for name in ("guide", "timm", "preset") if getattr(config, name) is not None]
    if len(given) > 1:
        return [f"extractor: {' and '.join(given)} are both given; keep one of them"]
    if config.preset is not None:
        fixed = [] if config.intake is None else [
            f"extractor.intake: {config.preset} has its own; take it out, or name the model with guide or timm"]
        return fixed + [f"extractor.{line}" for line in _checkpoint_problems(config.checkpoint, config.preset)]
    if config.timm is None:
        from rayexpand.models.guide_files import check_guide

        if config.checkpoint is not None and is_folder(config.guide or DIGITS):
            return [f"extractor.checkpoint: has no effect on guide '{config.guide or DIGITS}', whose folder holds its "
                    "weights; remove it"]
        return [f"extractor.guide: {line}" for line in check_guide(config.guide or DIGITS, config.checkpoint)]
    import timm

    problems = [] if timm.is_model(config.timm) else [
        f"extractor.timm: '{config.timm}' is not a timm model; see timm.list_models()"]
    return problems + [f"extractor.{line}" for line in _checkpoint_problems(config.checkpoint, config.timm)]


def is_folder(guide: str) -> bool:
    """Whether a guide comes as a folder with weights, rather than as an architecture with a checkpoint."""
    return guide == DIGITS or HUB_NAME.fullmatch(guide) is not None or Path(guide).expanduser().is_dir()


def name_of(config: ExtractorConfig) -> str:
    if config.preset:
        return f"preset {config.preset}"
    return f"timm {config.timm}" if config.timm else f"guide {config.guide or DIGITS}"


def name_problem(config: ExtractorConfig) -> str | None:
    """Why distances by this extractor have no known name; None where they have."""
    if config.preset is None:
        return f"{name_of(config)} is another extractor"
    problem = content_problem(config.preset, str(config.checkpoint))
    return problem and f"{config.checkpoint} is not known to be its published content: {problem}"


def key_of(statistic: str, config: ExtractorConfig) -> str:
    """How results call a statistic (fd, kd, mmd2_...) by this extractor: by its known name for the published content
    with the published intake, else with the name of the model, and never by a known name."""
    if config.preset and statistic in PRESETS[config.preset].names and name_problem(config) is None:
        return PRESETS[config.preset].names[statistic]
    return key_by_name(statistic, name_of(config)) + (
        "_unverified" if config.preset and name_problem(config) is not None else "")


def key_by_name(statistic: str, name: str) -> str:
    """The key of a statistic by an extractor that results call `name`: "guide models/a-guide" gives fd_a_guide."""
    kind, _, rest = name.partition(" ")
    model = (rest if kind in ("guide", "timm", "preset") else name).rstrip("/").rpartition("/")[2].partition("@")[0]
    key = f"{statistic}_{re.sub(r'[^A-Za-z0-9]+', '_', model).strip('_')}"
    return f"{key}_model" if key in RESERVED else key


def with_current_names(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the keys of today: files of before called every Frechet distance fid, whatever the extractor."""
    about = result.get("extractor")
    if not isinstance(about, Mapping) or "unnamed" in about:
        return dict(result)
    return {**result, "scores": {
        key_by_name(_OLD_KEYS[key], str(about.get("name"))) if key in _OLD_KEYS else key: one
        for key, one in result["scores"].items()}}


_OLD_KEYS = {"fid": "fd", "kid": "kd", "kid_poly3_unbiased": "kd", "mmd2_linear_biased": "mmd2_linear_biased",
             "mmd2_rbf_median_unbiased": "mmd2_rbf_median_unbiased"}


def load_extractor(config: ExtractorConfig) -> Extractor:
    """The extractor, in float32. Raises ModelError."""
    if config.preset:
        return _preset(config)
    return _timm(config) if config.timm else _guide(config)


def class_texts(config: ExtractorConfig, names: Sequence[str]) -> np.ndarray:
    """float32 (K, D) of length 1: features of "a photo of a <name>". Raises UsageError for an extractor without
    text."""
    from rayexpand.models.guides import ClipGuide, load_guide

    guide = None
    if config.preset == "clip_l14_336":
        guide = load_guide(OPEN_CLIP, config.checkpoint, ["image"], device=config.device)
    elif config.timm is None and config.preset is None:
        guide = load_guide(config.guide or DIGITS, config.checkpoint, ["image"], device=config.device)
    if not isinstance(guide, ClipGuide):
        raise UsageError(NO_TEXT.format(name_of(config)))
    return guide.texts([CLASS_PROMPT.format(name=name) for name in names])


NO_TEXT = "alignment compares images with the words of their class, and {} reads no text; name a CLIP guide"


def model_files(config: ExtractorConfig, progress: Progress | None = None) -> dict[str, Path]:
    """File name -> file of everything `load_extractor` reads; trains the embedded default or downloads first."""
    from rayexpand.models.guide_files import guide_folder

    folder = None if config.timm or config.preset else guide_folder(config.guide or DIGITS, progress)
    if folder is not None:
        return {name: folder / name for name in sorted(loaded_files(folder))}
    if problems := _checkpoint_problems(config.checkpoint, config.preset or config.timm or config.guide or ""):
        raise ModelError(f"extractor.{problems[0]}")
    path = Path(str(config.checkpoint)).expanduser()
    return {path.name: path}


def moved(config: ExtractorConfig, folder: Path) -> ExtractorConfig:
    """The same extractor with its files in `folder`."""
    if config.checkpoint:
        return config.model_copy(update={"checkpoint": str(folder / Path(config.checkpoint).name)})
    return config.model_copy(update={"guide": str(folder)})


def extractor_model(config: ExtractorConfig) -> ModelFiles:
    """The files of an extractor."""
    def present() -> Path | None:
        if not config.checkpoint:
            return present_guide(config.guide or DIGITS)
        file = Path(config.checkpoint).expanduser()
        return file.parent if file.is_file() else None

    return ModelFiles(lambda: model_files(config), present, lambda folder: extractor_hash(moved(config, folder)))


def extractor_hash(config: ExtractorConfig, progress: Progress | None = None) -> str:
    """sha256 over the model's name and the content of its files; the same for every place they lie in."""
    files = model_files(config, progress)
    if not config.checkpoint:
        return folder_hash(next(iter(files.values())).parent)
    with open(files[Path(config.checkpoint).name], "rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(f"{config.preset or config.timm or config.guide}\0{content}\n".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- calls


class ImageBatch(NamedTuple):
    """Images of one call, always `batch` rows; the last `batch - rows` are fillers."""

    x_BHWC: np.ndarray
    rows: int
    refused: int  # images before or among these that could not be decoded
    at: tuple[int, ...] = ()  # places of the rows among the images
    labels: np.ndarray | None = None  # of the rows


def calls(images: Iterable[bytes | RowFault], size: int, batch: int, *, min_side: int = 1,
          max_pixels: int = PILLOW_PIXELS, intake: IntakeConfig | None = None) -> Iterator[ImageBatch]:
    """Encoded images as calls of one shape, in order. An image that cannot be used is left out and counted."""
    intake = intake or IntakeConfig()
    x_BHWC: np.ndarray = np.zeros((batch, size, size, 3), intake.dtype)
    at, refused = list[int](), 0
    for place, image in enumerate(images):
        try:
            if isinstance(image, RowFault):
                raise image
            pixels = decode(image, min_side=min_side, max_pixels=max_pixels)[0]
        except RowFault:
            refused += 1
            continue
        x_BHWC[len(at)] = intake(pixels, size)
        at.append(place)
        if len(at) == batch:
            yield ImageBatch(x_BHWC, batch, refused, tuple(at))
            x_BHWC, at, refused = np.zeros_like(x_BHWC), [], 0
    if at or refused:
        yield ImageBatch(x_BHWC, len(at), refused, tuple(at))


def features(extractor: Extractor, batches: Iterable[ImageBatch]) -> tuple[np.ndarray, int]:
    """((N, D) float32 features, how many images were refused). Every call has one shape, so a row's features do not
    depend on how many images there are or who computes them."""
    parts: list[np.ndarray] = []
    refused = 0
    for call in batches:
        refused += call.refused
        if call.rows:
            parts.append(extractor(call.x_BHWC)[:call.rows])
    return stacked(parts), refused


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """(N, D) of the features of all calls; (0, 0) without any."""
    return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)


# -------------------------------------------------------------------------------------------------------------- loading


def _guide(config: ExtractorConfig) -> Extractor:
    from rayexpand.models.guides import load_guide

    weights = config.guide or DIGITS
    guide = load_guide(weights, config.checkpoint, ["image"], device=config.device)
    height, width = guide.size
    if height != width:
        raise ModelError(f"extractor.guide: {weights} takes images of {height} x {width} pixels; give one with a "
                         "square input")
    return Extractor(height, guide.device, guide.features, config.brought)


def _preset(config: ExtractorConfig) -> Extractor:
    name = str(config.preset)
    if name == "dinov2_l14":
        return _timm(config.model_copy(update={"timm": TIMM_DINOV2}))
    if name == "clip_l14_336":
        return _guide(config.model_copy(update={"guide": OPEN_CLIP}))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from rayexpand.contract.device import choose_device
    from rayexpand.evaluation.inception import inception_2015

    (path,) = model_files(config).values()
    where = choose_device(config.device)
    try:
        model = inception_2015(load_file(path)).to(where)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"extractor.checkpoint: {path} cannot be loaded into {name}: {error}") from error
    return Extractor(PRESETS[name].size, where, lambda x_BCHW: model((x_BCHW * 255 - 128) / 128), config.brought)


def _timm(config: ExtractorConfig) -> Extractor:
    import timm
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from timm.data import resolve_model_data_config

    from rayexpand.classifier.backbones import fitted
    from rayexpand.contract.device import choose_device

    (path,) = model_files(config).values()
    where = choose_device(config.device)
    try:
        sized = {"img_size": PRESETS[config.preset].size} if config.preset else {}
        model = timm.create_model(str(config.timm), pretrained=False, num_classes=0, **sized)
        missing, extra = model.load_state_dict(fitted(load_file(path), model), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"extractor.checkpoint: {path} cannot be loaded into {config.timm}: {error}") from error
    head = model.pretrained_cfg.get("classifier") or "fc"
    heads = tuple(f"{one}." for one in ([head] if isinstance(head, str) else head))
    if wrong := [*missing, *(name for name in extra if not name.startswith(heads))]:
        raise ModelError(f"extractor.checkpoint: {path} is not a checkpoint of {config.timm}; {len(wrong)} tensors are "
                         f"missing or unknown, the first is {wrong[0]}")
    data = resolve_model_data_config(model)
    _, height, width = (3, *[sized["img_size"]] * 2) if sized else data["input_size"]
    if height != width:
        raise ModelError(f"extractor.timm: {config.timm} takes images of {height} x {width} pixels; give one with a "
                         "square input")
    model = model.to(where).eval().requires_grad_(False)
    mean, std = (torch.tensor(data[key], device=where).view(1, 3, 1, 1) for key in ("mean", "std"))
    return Extractor(height, where, lambda x_BCHW: model((x_BCHW - mean) / std), config.brought)


def _checkpoint_problems(checkpoint: str | None, model: str) -> list[str]:
    if checkpoint is None:
        return [f"checkpoint: {model} is a model without weights; name its safetensors file"]
    path = Path(checkpoint).expanduser()
    if path.suffix in PICKLES or path.suffix != ".safetensors":
        return [f"checkpoint: {checkpoint} is not a safetensors file; pickles can run code when opened and are not "
                "read: convert it with safetensors.torch.save_file"]
    if not path.is_file():
        return [f"checkpoint: {checkpoint} does not exist{looked_at(checkpoint)}; give the path of a safetensors file"]
    return [f"checkpoint: {line}" for line in unreadable(path)]
