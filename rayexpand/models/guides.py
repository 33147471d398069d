"""Guides: image models that score samples and give gradients to the methods that descend an energy.

guide_files.py says what lies in their folders.
"""

# B rows, H W pixels, D features, K classes

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import ConfigError, ModelError
from rayexpand.contract.protocols import Progress
from rayexpand.diffusion.energy import resize
from rayexpand.models.folders import ModelFiles, folder_hash, folder_model, model_sha256, quiet_libraries
from rayexpand.models.guide_files import (
    CLASS_PROMPT,
    CLASSIFIER,
    CLASSIFIER_WEIGHTS,
    CLIP_HEAD,
    HEAD_WEIGHTS,
    about_guide,
    check_architecture,
    checkpoint_file,
    class_problem,
    guide_classes,
    guide_folder,
    kind_of,
    present_guide,
    read_tensors,
)

if TYPE_CHECKING:
    import torch

TEXTS_PER_CALL = 256
TEXTS_KNOWN = 10_000  # texts whose features are kept
IMAGES_PER_CALL = 256


def load_guide(weights: str, checkpoint: str | None, class_names: Sequence[str], *, device: str = "auto",
               class_keys: Sequence[str] | None = None, prompt: str = CLASS_PROMPT) -> ClipGuide | ClassifierGuide:
    """The guide named by `weights`. CLIP is asked about `prompt` with each class name, so names come as people say them
    (`ClassTable.asked`); a guide that knows its classes is refused where they are not `class_keys`. Raises ModelError.
    """
    folder = guide_folder(weights)
    if class_keys is not None and folder is not None and (problem := class_problem(folder, class_keys)):
        raise ModelError(problem)
    guide: ClipGuide | ClassifierGuide
    if folder is not None and kind_of(folder) == CLASSIFIER:
        guide = ClassifierGuide.load(folder, device)
        guide.classes = guide_classes(folder) or ()
        return guide
    guide = ClipGuide.load(str(folder or weights), checkpoint, [prompt.format(name=name) for name in class_names],
                           device)
    if folder is not None and kind_of(folder) == CLIP_HEAD:
        guide.texts_KD = read_tensors(folder / HEAD_WEIGHTS)["weight"].to(guide.device)
        guide.classes = guide_classes(folder) or ()
    return guide


def guide_model(weights: str, checkpoint: str | None) -> ModelFiles:
    """The files of a guide: its folder, or the checkpoint of an architecture (only these have one)."""
    if checkpoint is None:
        def find() -> dict[str, Path]:
            folder = guide_folder(weights)
            if folder is not None:
                return folder_model(folder).find()
            file = checkpoint_file(weights, None)
            return {file.name: file}

        return ModelFiles(find, lambda: present_guide(weights), folder_hash)
    name = Path(checkpoint).name

    def named() -> dict[str, Path]:
        return {name: checkpoint_file(weights, checkpoint)}

    def here() -> Path | None:
        file = Path(checkpoint).expanduser()
        return file.parent if file.is_file() else None

    return ModelFiles(named, here, lambda folder: guide_hash(weights, str(folder / name)))


def guide_hash(weights: str, checkpoint: str | None, progress: Progress | None = None) -> str:
    """Content hash of the guide's files; trains the embedded default or downloads first where needed."""
    folder = guide_folder(weights, progress)
    if folder is not None:
        return folder_hash(folder)
    content = model_sha256(checkpoint_file(weights, checkpoint))
    return hashlib.sha256(f"{weights}\0{content}\n".encode()).hexdigest()


class ImageGuide(ABC):
    """What all guides share. Subclasses set `model` (frozen, eval mode), `device`, `size`, and `mean`, `std` as
    (1, 3, 1, 1) tensors, and give `_embed` and `head`."""

    differentiable = True
    model: Any
    device: torch.device
    size: tuple[int, int]  # height and width in pixels that the model takes
    filter: Literal["bicubic", "bilinear"]  # how its own preprocessing resizes
    mean: torch.Tensor
    std: torch.Tensor
    classes: tuple[str, ...] = ()  # keys of the classes it was trained on, none where it takes any

    def features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Features (B, D) as the model gives them, not normalised, of images (B, 3, H, W) in [0, 1] of any size. They
        are resized without antialiasing (bicubic, aspect not kept) to the size the model takes."""
        x = x_BCHW.to(self.device).float()
        if tuple(x.shape[-2:]) != self.size:
            x = resize(x, self.size)
        return self._embed((x - self.mean) / self.std)

    def logits(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, K) class scores before the softmax."""
        return self.head(self.features(x_BCHW))

    @abstractmethod
    def head(self, h_BD: torch.Tensor) -> torch.Tensor:
        """(B, K): the logits of `features`."""

    @abstractmethod
    def _embed(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, D) of normalised images of the model's own size."""

    def seen(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(features (B, D) float32, logits (B, K) float64) of uint8 images of the model's own size, in one call."""
        import torch

        with torch.inference_mode():
            h_BD = self.features(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)
            return h_BD.float().cpu().numpy(), self.head(h_BD).double().cpu().numpy()

    def zero_shot(self, images: np.ndarray) -> np.ndarray:
        """int64 (n,): class of each uint8 (n, H, W, 3) image."""
        import torch

        with torch.no_grad():
            rows = [self.logits(torch.from_numpy(images[i : i + IMAGES_PER_CALL]).permute(0, 3, 1, 2) / 255).argmax(1)
                    for i in range(0, len(images), IMAGES_PER_CALL)]
        return torch.cat(rows).cpu().numpy()


class ClipGuide(ImageGuide):
    """Image features and class logits of an open_clip model, frozen, in float32 and differentiable in the image."""

    def __init__(self, model: Any, tokenizer: Any, class_prompts: Sequence[str], device: torch.device) -> None:
        import torch
        from open_clip import get_model_preprocess_cfg

        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        self._tokenizer, self._known = tokenizer, dict[str, np.ndarray]()
        settings = get_model_preprocess_cfg(model)
        size = settings["size"]
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.filter = "bilinear" if settings.get("interpolation") == "bilinear" else "bicubic"
        self.mean, self.std = (torch.tensor(settings[k], device=device).view(1, 3, 1, 1) for k in ("mean", "std"))
        with torch.no_grad():
            rows = [model.encode_text(tokenizer(list(class_prompts[i : i + TEXTS_PER_CALL])).to(device), normalize=True)
                    for i in range(0, len(class_prompts), TEXTS_PER_CALL)]
        self.texts_KD = torch.cat(rows)  # or the weights of a head that started from them
        self.scale = float(model.logit_scale.exp())

    @classmethod
    def load(cls, folder_or_model: str, checkpoint: str | None, class_prompts: Sequence[str],
             device: str = "auto") -> ClipGuide:
        """From a folder in open_clip's layout, `org/name@revision`, or the name of an open_clip architecture with a
        safetensors `checkpoint`. Raises ModelError."""
        import open_clip
        from safetensors import SafetensorError

        from rayexpand.contract.device import choose_device

        if not class_prompts:
            raise ModelError(f"guide {folder_or_model} has no classes to tell apart; give at least one class prompt")
        where = choose_device(device)
        folder = guide_folder(folder_or_model)
        name, file = f"local-dir:{folder}", None
        if folder is None:
            path = checkpoint_file(folder_or_model, checkpoint)
            check_architecture(folder_or_model, path)
            name, file = folder_or_model, str(path)
        try:
            with quiet_libraries():
                model = open_clip.create_model(name, pretrained=file, require_pretrained=True)
                return cls(model, open_clip.get_tokenizer(name), class_prompts, where)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AssertionError, SafetensorError) as error:
            raise ModelError(f"guide {folder_or_model} cannot be loaded: {error}. Fetch or save it again with "
                             "open_clip") from error

    def head(self, h_BD: torch.Tensor) -> torch.Tensor:
        """(B, K): cosine of image and class text times the model's own learned logit scale (`scale`; exp of 4.6 = 100
        in CLIP's released models, smaller in the embedded default). A fixed 100 would saturate a model that was
        trained with less, and gradients through its softmax would vanish."""
        import torch.nn.functional as F  # noqa: N812

        return self.scale * F.normalize(h_BD, dim=-1) @ self.texts_KD.T

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """float32 (B, D) of length 1. Each text is read by itself, so that it does not depend on the others."""
        import torch

        if len(self._known) > TEXTS_KNOWN:
            self._known.clear()
        for prompt in set(prompts) - self._known.keys():
            with torch.inference_mode():
                text_1D = self.model.encode_text(self._tokenizer([prompt]).to(self.device), normalize=True)
            self._known[prompt] = text_1D[0].float().cpu().numpy()
        return np.stack([self._known[prompt] for prompt in prompts])

    def _embed(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(x_BCHW)


class ClassifierGuide(ImageGuide):
    """Pooled features before the head, and logits, of a classifier, frozen, in float32, differentiable in the image."""

    def __init__(self, model: Any, recipe: Recipe, device: torch.device) -> None:
        import torch

        model = model.to(device).eval().requires_grad_(False)
        self._head = model.get_classifier()
        self.model = _headless(model)
        self.device = device
        side = recipe.test_size or recipe.size
        self.size, self.filter = (side, side), recipe.filter
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (recipe.mean, recipe.std))

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> ClassifierGuide:
        """From a folder that `save_classifier` wrote. Raises ModelError."""
        from rayexpand.classifier.backbones import build_backbone
        from rayexpand.contract.device import choose_device

        about = about_guide(folder)
        try:
            recipe = Recipe(**about["recipe"])
            model = build_backbone(recipe, len(about["classes"]), seed=0)
            model.load_state_dict(read_tensors(folder / CLASSIFIER_WEIGHTS))
        except (ConfigError, ValueError, TypeError, RuntimeError) as error:
            raise ModelError(f"guide {folder} cannot be loaded: {error}. Make it again with `rayexpand fit`") from error
        return cls(model, recipe, choose_device(device))

    def head(self, h_BD: torch.Tensor) -> torch.Tensor:
        """(B, K): the logits of `features`."""
        convolves = type(self._head).__name__ == "Conv2d"  # the head of timm's pre-activation networks
        return self._head(h_BD[..., None, None]).flatten(1) if convolves else self._head(h_BD)

    def _embed(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.model(x_BCHW)


def _headless(model: Any) -> Any:
    """The network with its classifier taken off, so that it gives what the classifier would get."""
    import torch

    head = model.get_classifier()
    (name,) = [name for name, module in model.named_modules() if module is head]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, torch.nn.Identity())
    return model
