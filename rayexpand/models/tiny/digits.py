"""The embedded default: a Stable-Diffusion-shaped generator and an open_clip guide of the digits, trained in a minute.

Nothing is downloaded. `ensure` trains both once on the `pool` part of scikit-learn's digits (pretrain.py, with
`setting`) and keeps them in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from rayexpand.contract.protocols import Progress
from rayexpand.data.seeds import digits_split
from rayexpand.models.folders import cache_root
from rayexpand.models.tiny import architecture, pretrain
from rayexpand.models.tiny.architecture import (
    CONTEXT,
    assemble,
    build_guide,
    build_scheduler,
    build_unet,
    build_vae,
    guide_config,
    save_guide,
    text_encoder_of,
    tokenize,
)
from rayexpand.models.tiny.once import trained_once
from rayexpand.models.tiny.pretrain import PROMPT
from rayexpand.models.tiny.setting import GuideSetting, Setting, UnetSetting, VaeSetting

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["CAPTIONS", "CLASS_NAMES", "CONTEXT", "PROMPT", "RECIPE", "DigitsRecipe", "assemble", "build_guide",
           "build_scheduler", "build_tokenizer", "build_unet", "build_vae", "cache_name", "cache_root", "ensure",
           "guide_config", "save_guide", "setting", "text_encoder_of", "texts", "to_tensor", "tokenize", "train"]

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (PROMPT, "a {}", "the digit {}", "a photo of the digit {}", "a drawing of a {}", "a handwritten {} shape")


@dataclass(frozen=True, slots=True)
class DigitsRecipe:
    """What decides the trained weights; its digest names the cache folder. Rates are the peaks of a one-cycle AdamW."""

    version: int = 1  # raised when the code below trains something else from the same numbers
    seed: int = 0
    split: int = 0  # of digits_split
    guide_steps: int = 300
    guide_batch: int = 64
    guide_rate: float = 2e-3
    vae_steps: int = 300
    vae_batch: int = 32
    vae_rate: float = 4e-3
    unet_steps: int = 400
    unet_batch: int = 32
    unet_rate: float = 2e-3
    caption_drop: float = 0.1
    ema: float = 0.995
    measured_samples: int = 200  # generated to measure; 0 skips the measurement of samples
    measured_steps: int = 10

    def stream(self, stage: str) -> np.random.Generator:
        return pretrain.stream(self.seed, stage)


RECIPE = DigitsRecipe()


def setting(recipe: DigitsRecipe = RECIPE) -> Setting:
    """The recipe as a setting of the trainer; sizes are the trainer's defaults, which were measured on digits."""
    return Setting(
        guide=GuideSetting(steps=recipe.guide_steps, batch=recipe.guide_batch, rate=recipe.guide_rate),
        vae=VaeSetting(steps=recipe.vae_steps, batch=recipe.vae_batch, rate=recipe.vae_rate),
        unet=UnetSetting(steps=recipe.unet_steps, batch=recipe.unet_batch, rate=recipe.unet_rate, ema=recipe.ema,
                         caption_drop=recipe.caption_drop),
        samples=recipe.measured_samples, sample_steps=recipe.measured_steps)


def texts() -> tuple[tuple[str, ...], ...]:
    """The captions of each class."""
    return tuple(tuple(caption.format(name) for caption in CAPTIONS) for name in CLASS_NAMES)


def cache_name(recipe: DigitsRecipe = RECIPE) -> str:
    """`digits-` and eight hex digits over recipe, captions and the library versions that shape the training."""
    stack = {name: version(name).split("+")[0].split(".")[:2] for name in ("torch", "diffusers", "open_clip_torch")}
    text = json.dumps([asdict(recipe), CAPTIONS, CLASS_NAMES, stack], sort_keys=True)
    return f"digits-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def ensure(progress: Progress | None = None, cache: Path | None = None, recipe: DigitsRecipe = RECIPE) -> Path:
    """Folder with `pipeline/` (diffusers), `guide/` (open_clip) and `measured.json`; trained on first use.

    `progress(stage, done, total)` is called as training proceeds, with total 0 while waiting. Raises ModelError when
    the cache cannot be written.
    """
    report = progress or (lambda stage, done, total: None)
    return trained_once(cache_root(cache) / cache_name(recipe), lambda folder: train(folder, recipe, report), report)


def train(folder: Path, recipe: DigitsRecipe, report: Progress) -> None:
    """Train guide, VAE and UNet and write them to `folder` with what was measured. One thread; global state kept."""
    with pretrain.settled(threads=1):
        data = digits_split(recipe.split)
        images = pretrain.TrainingImages(pretrain.to_bytes(data["pool"][0]), torch.from_numpy(data["pool"][1]).long(),
                                         texts())
        trained = pretrain.train(pretrain.PretrainStage(images, setting(recipe), recipe.seed, report))
        trained.save(folder)
        measured = measure(trained, data["test"], recipe, report)
        (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


def measure(trained: pretrain.Trained, test: tuple[np.ndarray, np.ndarray], recipe: DigitsRecipe,
            report: Progress) -> dict[str, float]:
    """Quality on the `test` part: shares in [0, 1], PSNR in dB."""
    x_n3HW = pretrain.to_bytes(test[0])
    measured = {"zero_shot": float((pretrain.named(trained, x_n3HW, CLASS_NAMES) == test[1]).mean()),
                "psnr_upright_db": pretrain.psnr(trained.pipe.vae, x_n3HW),
                "psnr_rotated_db": pretrain.psnr(trained.pipe.vae, torch.rot90(x_n3HW, 1, (2, 3)))}
    if recipe.measured_samples:
        wanted = np.arange(recipe.measured_samples) % len(CLASS_NAMES)
        prompts = [PROMPT.format(CLASS_NAMES[k]) for k in wanted]
        samples = pretrain.sample(trained, prompts, recipe.seed, report)
        measured["samples_named_right"] = float((pretrain.named(trained, samples, CLASS_NAMES) == wanted).mean())
    return {name: round(value, 4) for name, value in measured.items()}


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) to float32 (n, 3, H, W) in [0, 1]."""
    return pretrain.to_unit(pretrain.to_bytes(images))


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the embedded default: every word of its captions is one token."""
    return architecture.build_tokenizer([text for row in texts() for text in row])
