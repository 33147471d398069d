"""Guides: image models that score samples and give gradients to the methods that descend an energy."""

# B rows, H W pixels, D features, K classes

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rayexpand.errors import ModelError
from rayexpand.priors import DIGITS, HUB_NAME, PICKLES, Progress, folder_hash, hub_snapshot, quiet_libraries

if TYPE_CHECKING:
    import torch

CLASS_PROMPT = "a photo of a {}"  # CLIP (Radford et al. 2021), section 3.1.4
TEXTS_PER_CALL = 256
IMAGES_PER_CALL = 256

_HUB_FILES = ("open_clip_config.json", "open_clip_*model.safetensors", "*.json", "*.txt")


def load_guide(weights: str, checkpoint: str | None, class_names: Sequence[str], *, device: str = "auto") -> ClipGuide:
    """The guide named by `weights`, asked about "a photo of a <class name>". `weights` is `digits` (the embedded
    default, trained on first use) or what `ClipGuide.load` takes. Raises ModelError."""
    folder = _resolve(weights) or weights
    return ClipGuide.load(str(folder), checkpoint, [CLASS_PROMPT.format(name) for name in class_names], device)


def guide_hash(weights: str, checkpoint: str | None, progress: Progress | None = None) -> str:
    """Content hash of the guide's files; trains the embedded default or downloads first where needed."""
    folder = _resolve(weights, progress)
    if folder is not None:
        return folder_hash(folder)
    with open(_checkpoint(weights, checkpoint), "rb") as stream:
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(f"{weights}\0{content}\n".encode()).hexdigest()


class ClipGuide:
    """Image features and class logits of an open_clip model, frozen, in float32 and differentiable in the image."""

    differentiable = True

    def __init__(self, model: Any, tokenizer: Any, class_prompts: Sequence[str], device: torch.device) -> None:
        import torch
        from open_clip import get_model_preprocess_cfg

        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device
        settings = get_model_preprocess_cfg(model)
        size = settings["size"]
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self._mean, self._std = (torch.tensor(settings[k], device=device).view(1, 3, 1, 1) for k in ("mean", "std"))
        with torch.no_grad():
            rows = [model.encode_text(tokenizer(list(class_prompts[i : i + TEXTS_PER_CALL])).to(device), normalize=True)
                    for i in range(0, len(class_prompts), TEXTS_PER_CALL)]
        self.texts_KD = torch.cat(rows)
        self.scale = float(model.logit_scale.exp())

    @classmethod
    def load(cls, folder_or_model: str, checkpoint: str | None, class_prompts: Sequence[str],
             device: str = "auto") -> ClipGuide:
        """From a folder in open_clip's layout, `org/name@revision`, or the name of an open_clip architecture with a
        safetensors `checkpoint`. Raises ModelError."""
        import open_clip
        from safetensors import SafetensorError

        from rayexpand.priors.latent import choose_device

        if not class_prompts:
            raise ModelError(f"guide {folder_or_model} has no classes to tell apart; give at least one class prompt")
        where = choose_device(device)
        folder = _resolve(folder_or_model)
        name, file = (f"local-dir:{folder}", None) if folder else (folder_or_model,
                                                                  str(_checkpoint(folder_or_model, checkpoint)))
        try:
            with quiet_libraries():
                model = open_clip.create_model(name, pretrained=file, require_pretrained=True)
                return cls(model, open_clip.get_tokenizer(name), class_prompts, where)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"guide {folder_or_model} cannot be loaded: {error}. Fetch or save it again with "
                             "open_clip") from error

    def features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Image embedding (B, D) as the model gives it, not normalised, of images (B, 3, H, W) in [0, 1] of any size.
        They are resized without antialiasing (bicubic, aspect not kept) to the size the model takes."""
        import torch.nn.functional as F  # noqa: N812

        x = x_BCHW.to(self.device).float()
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=False)
        return self.model.encode_image((x - self._mean) / self._std)

    def logits(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, K): cosine of image and class text times the model's own learned logit scale (`scale`; exp of 4.6 = 100
        in CLIP's released models, smaller in the embedded default). A fixed 100 would saturate a model that was
        trained with less, and gradients through its softmax would vanish."""
        import torch.nn.functional as F  # noqa: N812

        return self.scale * F.normalize(self.features(x_BCHW), dim=-1) @ self.texts_KD.T

    def zero_shot(self, images: np.ndarray) -> np.ndarray:
        """int64 (n,): class of each uint8 (n, H, W, 3) image."""
        import torch

        with torch.no_grad():
            rows = [self.logits(torch.from_numpy(images[i : i + IMAGES_PER_CALL]).permute(0, 3, 1, 2) / 255).argmax(1)
                    for i in range(0, len(images), IMAGES_PER_CALL)]
        return torch.cat(rows).cpu().numpy()


def _resolve(weights: str, progress: Progress | None = None) -> Path | None:
    """Complete open_clip folder, or None for the name of an architecture. Raises ModelError."""
    if weights == DIGITS:
        from rayexpand.priors import digits

        return digits.ensure(progress) / "guide"
    path = Path(weights).expanduser()
    if path.is_dir():
        if problems := _missing(path):
            raise ModelError("\n  ".join([f"{path} is not a complete folder in open_clip's layout:", *problems]))
        return path
    if HUB_NAME.fullmatch(weights):
        return hub_snapshot(weights, _HUB_FILES, complete=_missing)
    return None


def _missing(folder: Path) -> list[str]:
    problems = [] if (folder / "open_clip_config.json").is_file() else ["open_clip_config.json is missing"]
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(f.name for f in folder.glob("*") if f.suffix in PICKLES)
        problems.append(f"{pickles[0]} is a pickle, which can run code when opened; convert it to "
                        "open_clip_model.safetensors" if pickles else "open_clip_model.safetensors is missing")
    return problems


def _checkpoint(model: str, checkpoint: str | None) -> Path:
    """The safetensors file of an architecture. Raises ModelError."""
    import open_clip

    if model not in open_clip.list_models():
        raise ModelError(f"guide '{model}' is neither a folder here nor an open_clip architecture; give 'digits', a "
                         "folder with open_clip_config.json, org/name@revision, or a name from open_clip.list_models()")
    if checkpoint is None:
        raise ModelError(f"guide '{model}' is an architecture without weights; set guide.checkpoint to a "
                         "safetensors file")
    path = Path(checkpoint).expanduser()
    if path.suffix != ".safetensors":
        raise ModelError(f"guide.checkpoint {path} is not a safetensors file; pickles can run code when opened and are "
                         "not read: convert it with safetensors.torch.save_file")
    if not path.is_file():
        raise ModelError(f"guide.checkpoint {path} does not exist; give the path of a safetensors file")
    return path
