"""Features of images: a guide or a timm backbone as extractor, in calls of one shape.

    here          meaning, unit
    x_BHWC        uint8 images, square, of the side the extractor takes
    h_BD          float32 features

Distances depend on the extractor and on how images are brought to its size, so results state both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field

from rayexpand.contract.errors import ModelError, RowFault, looked_at
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import RowRng
from rayexpand.contract.settings import Device, Section
from rayexpand.data.pixels import PILLOW_PIXELS, decode, prepare
from rayexpand.models.folders import DIGITS, HUB_NAME, PICKLES, ModelFiles, folder_hash, loaded_files, unreadable
from rayexpand.models.guide_files import present_guide

if TYPE_CHECKING:
    import torch

RESIZE = "shorter side to size, bilinear, antialiased (Pillow), middle square"


class ExtractorConfig(Section):
    """Which model's features are compared."""

    guide: str | None = Field(None, description="'digits', an open_clip folder, org/name@revision, or an open_clip "
                              "model name with a checkpoint; null: the guide the run is configured with")
    timm: str | None = Field(None, description="a timm model name with a checkpoint, instead of a guide")
    checkpoint: str | None = Field(None, description="safetensors file of a model name")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")


class Extractor:
    """A frozen image model. `size` is the side of its input in pixels."""

    def __init__(self, size: int, device: torch.device, features: Callable[[torch.Tensor], Any]) -> None:
        self.size, self.device, self._features = size, device, features

    def __call__(self, x_BHWC: np.ndarray) -> np.ndarray:
        """float32 (B, D) features of uint8 (B, size, size, 3) images."""
        import torch

        with torch.inference_mode():
            x_BCHW = torch.from_numpy(np.array(x_BHWC)).to(self.device).permute(0, 3, 1, 2).float() / 255
            return self._features(x_BCHW).float().cpu().numpy()


def check(config: ExtractorConfig) -> list[str]:
    """What is wrong with the choice, without loading a model: `field: what, why, next step`."""
    if config.guide is not None and config.timm is not None:
        return ["extractor: guide and timm are both given; keep one of them"]
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
    return f"timm {config.timm}" if config.timm else f"guide {config.guide or DIGITS}"


def load_extractor(config: ExtractorConfig) -> Extractor:
    """The extractor, in float32. Raises ModelError."""
    return _timm(config) if config.timm else _guide(config)


def model_files(config: ExtractorConfig, progress: Progress | None = None) -> dict[str, Path]:
    """File name -> file of everything `load_extractor` reads; trains the embedded default or downloads first."""
    from rayexpand.models.guide_files import guide_folder

    folder = None if config.timm else guide_folder(config.guide or DIGITS, progress)
    if folder is not None:
        return {name: folder / name for name in sorted(loaded_files(folder))}
    if problems := _checkpoint_problems(config.checkpoint, config.timm or config.guide or ""):
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
    return hashlib.sha256(f"{config.timm or config.guide}\0{content}\n".encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- calls


class ImageBatch(NamedTuple):
    """Images of one call, always `batch` rows; the last `batch - rows` are fillers."""

    x_BHWC: np.ndarray
    rows: int
    refused: int  # images before or among these that could not be decoded


def calls(images: Iterable[bytes | RowFault], size: int, batch: int, *, min_side: int = 1,
          max_pixels: int = PILLOW_PIXELS) -> Iterator[ImageBatch]:
    """Encoded images as calls of one shape, in order. An image that cannot be used is left out and counted."""
    x_BHWC, rows, refused = np.zeros((batch, size, size, 3), np.uint8), 0, 0
    for image in images:
        try:
            if isinstance(image, RowFault):
                raise image
            pixels = decode(image, min_side=min_side, max_pixels=max_pixels)[0]
        except RowFault:
            refused += 1
            continue
        x_BHWC[rows] = prepare(pixels, size, "center", _NO_CHANCE)
        rows += 1
        if rows == batch:
            yield ImageBatch(x_BHWC, rows, refused)
            x_BHWC, rows, refused = np.zeros_like(x_BHWC), 0, 0
    if rows or refused:
        yield ImageBatch(x_BHWC, rows, refused)


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


_NO_CHANCE = RowRng(0, "evaluate", "", 0)  # "center" draws nothing


# -------------------------------------------------------------------------------------------------------------- loading


def _guide(config: ExtractorConfig) -> Extractor:
    from rayexpand.models.guides import load_guide

    weights = config.guide or DIGITS
    guide = load_guide(weights, config.checkpoint, ["image"], device=config.device)
    height, width = guide.size
    if height != width:
        raise ModelError(f"extractor.guide: {weights} takes images of {height} x {width} pixels; give one with a "
                         "square input")
    return Extractor(height, guide.device, guide.features)


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
        model = timm.create_model(str(config.timm), pretrained=False, num_classes=0)
        missing, extra = model.load_state_dict(fitted(load_file(path), model), strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"extractor.checkpoint: {path} cannot be loaded into {config.timm}: {error}") from error
    head = model.pretrained_cfg.get("classifier") or "fc"
    heads = tuple(f"{one}." for one in ([head] if isinstance(head, str) else head))
    if wrong := [*missing, *(name for name in extra if not name.startswith(heads))]:
        raise ModelError(f"extractor.checkpoint: {path} is not a checkpoint of {config.timm}; {len(wrong)} tensors are "
                         f"missing or unknown, the first is {wrong[0]}")
    data = resolve_model_data_config(model)
    _, height, width = data["input_size"]
    if height != width:
        raise ModelError(f"extractor.timm: {config.timm} takes images of {height} x {width} pixels; give one with a "
                         "square input")
    model = model.to(where).eval().requires_grad_(False)
    mean, std = (torch.tensor(data[key], device=where).view(1, 3, 1, 1) for key in ("mean", "std"))
    return Extractor(height, where, lambda x_BCHW: model((x_BCHW - mean) / std))


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
