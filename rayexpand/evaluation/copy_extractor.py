"""Whose features an audit compares, in order of trust: a TorchScript file, which is how SSCD is released, else an
extractor of `evaluate` (dinov2_l14, a timm model, a guide), else the guide of the run.

SSCD (Pizzi et al. 2022, "A self-supervised descriptor for image copy detection", facebookresearch/sscd-copy-detection,
MIT) maps images to rows of length 1 whose cosine says whether one is a copy of the other; in batches images are
squashed to 320 x 320 and have the mean and deviation of ImageNet. A TorchScript file runs code when it is loaded. It is
the only model here that is not safetensors, and it is loaded only where `trust: true` and its sha256 stand in the file.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from rayexpand.contract.errors import ModelError, looked_at
from rayexpand.contract.protocols import Progress
from rayexpand.contract.settings import Later, Section
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.features import Extractor, ExtractorConfig
from rayexpand.evaluation.intake import IntakeConfig
from rayexpand.models.folders import ModelFiles

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SSCD_SIDE, SSCD_INTAKE = 320, IntakeConfig(resize="squash", filter="bilinear")
SSCD_WIDTHS = {"sscd_disc_large": 1024}  # of its models; all others have 512
_SSCD = re.compile(r"(sscd_(?:disc|imagenet)_(?:blur|advanced|mixup|large))\.torchscript\.pt")


class TorchscriptConfig(Section):
    """A model that is loaded as a program."""

    path: str = Field(min_length=1, description="TorchScript file, images (B, 3, side, side) to features (B, D)")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of that file, as its publisher or your own look at it "
                        "gave it")
    trust: Literal[True] = Field(description="true: run the code in this file")
    size: int = Field(SSCD_SIDE, ge=8, description="side of its input, pixels (SSCD: 320)")
    intake: IntakeConfig = Field(SSCD_INTAKE, description="how images are brought there (SSCD: squashed, bilinear)")

    @field_validator("trust", mode="before")
    @classmethod
    def _said(cls, value: Any) -> Any:
        if value is not True:
            raise ValueError("a TorchScript file runs code when it is loaded; write trust: true if you trust its "
                             "publisher, or take another extractor")
        return value


class CopyExtractorConfig(ExtractorConfig):
    """Whose features are compared with those of the seeds."""

    torchscript: Annotated[TorchscriptConfig | None, Later(None)] = Field(
        None, description="a model in TorchScript, such as SSCD, instead of the others")

    @property
    def is_named(self) -> bool:
        return self.torchscript is not None or super().is_named

    @property
    def brought(self) -> IntakeConfig:
        return super().brought if self.torchscript is None else self.torchscript.intake


def check(config: CopyExtractorConfig) -> list[str]:
    """What is wrong with the choice, without loading a model: `field: what, why, next step`."""
    script = config.torchscript
    if script is None:
        return extractors.check(config)
    problems = [f"extractor: torchscript and {name} are both given; keep one of them"
                for name in ("guide", "timm", "preset") if getattr(config, name) is not None]
    file, where = Path(script.path).expanduser(), f"extractor.torchscript.path: {script.path}"
    if not file.is_file():
        return [*problems, f"{where} does not exist{looked_at(script.path)}; give the path of a TorchScript file"]
    if (found := _content(file)) != script.sha256:
        problems.append(f"extractor.torchscript.sha256: {script.path} has {found}; it is another file than was meant, "
                        "and is not loaded")
    return problems


def name_of(config: CopyExtractorConfig) -> str:
    """Only a file of a released name with the published intake is called SSCD, and by what: its publisher states no
    hash that its content could be held against."""
    if (script := config.torchscript) is None:
        return extractors.name_of(config)
    if (model := _sscd_model(config)) is None:
        return f"torchscript {Path(script.path).name}"
    return f"SSCD {model} (by its file name; sha256 {script.sha256[:12]})"


def _sscd_model(config: CopyExtractorConfig) -> str | None:
    script = config.torchscript
    found = None if script is None else _SSCD.fullmatch(Path(script.path).name)
    return found[1] if found and script and (script.size, script.intake) == (SSCD_SIDE, SSCD_INTAKE) else None


def load(config: CopyExtractorConfig) -> Extractor:
    """The extractor, in float32. Raises ModelError."""
    return extractors.load_extractor(config) if config.torchscript is None else _torchscript(config)


def sha256_of(config: CopyExtractorConfig, progress: Progress | None = None) -> str:
    """Of the model's name and the content of its files; of a TorchScript file, that of its content."""
    if config.torchscript is None:
        return extractors.extractor_hash(config, progress)
    return _content(Path(config.torchscript.path).expanduser())


def files_of(config: CopyExtractorConfig) -> ModelFiles:
    """The files of an extractor."""
    if (script := config.torchscript) is None:
        return extractors.extractor_model(config)
    file = Path(script.path).expanduser()
    return ModelFiles(lambda: {file.name: file}, lambda: file.parent if file.is_file() else None,
                      lambda folder: _content(folder / file.name))


def moved(config: CopyExtractorConfig, folder: Path) -> ExtractorConfig:
    """The same extractor with its files in `folder`."""
    if (script := config.torchscript) is None:
        return extractors.moved(config, folder)
    path = str(folder / Path(script.path).name)
    return config.model_copy(update={"torchscript": script.model_copy(update={"path": path})})


def _torchscript(config: CopyExtractorConfig) -> Extractor:
    import torch

    from rayexpand.contract.device import choose_device

    script = config.torchscript
    assert script is not None
    if (found := _content(Path(script.path).expanduser())) != script.sha256:
        raise ModelError(f"extractor.torchscript: {script.path} has sha256 {found}, not the {script.sha256} that the "
                         "file names; it is not loaded")
    where = choose_device(config.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is old: it is what SSCD is released in
            model = torch.jit.load(str(Path(script.path).expanduser()), map_location=where).eval()
        mean, std = (torch.tensor(one, device=where).view(1, 3, 1, 1) for one in (MEAN, STD))
        extractor = Extractor(script.size, where, lambda x_BCHW: model((x_BCHW - mean) / std), script.intake)
        h_BD = extractor(np.zeros((2, script.size, script.size, 3), np.uint8))
    except RuntimeError as error:
        raise ModelError(f"extractor.torchscript: {script.path} does not take images of {script.size} pixels, or is no "
                         f"TorchScript file: {' '.join(str(error).split())[:300]}") from error
    if h_BD.ndim != 2:
        raise ModelError(f"extractor.torchscript: {script.path} gives {h_BD.shape} for two images; one row of features "
                         "for each is needed")
    _refuse_false_name(config, h_BD)
    return extractor


def _refuse_false_name(config: CopyExtractorConfig, h_BD: np.ndarray) -> None:
    """Raises ModelError for a file with the name of SSCD that is none."""
    model = _sscd_model(config)
    width = SSCD_WIDTHS.get(model or "", 512)
    if model and (h_BD.shape[1] != width or not np.allclose(np.linalg.norm(h_BD, axis=1), 1, atol=1e-3)):
        raise ModelError(f"extractor.torchscript: {model} gives rows of length 1 with {width} features, and this file "
                         f"gives {h_BD.shape[1]} of length {np.linalg.norm(h_BD[0]):.3g}; it is not SSCD: give it "
                         "another name")


def _content(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
