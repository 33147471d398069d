"""A decoder of image embeddings of the digits, for GIF-DALLE: `prior.weights: digits-unclip`, trained in a minute.

Image encoder, texts, autoencoder and noise process are those of the embedded default, whose guide sees what this
decoder paints: `guide.weights: digits` and no other CLIP goes with it.
"""

# B rows, n images, D features, C latent channels, H W latent pixels

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from rayexpand.contract.protocols import Progress
from rayexpand.data.seeds import digits_split
from rayexpand.models.folders import cache_root
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.prior_files import inspect_sources
from rayexpand.models.sources import PriorSources
from rayexpand.models.tiny import digits, pretrain
from rayexpand.models.tiny.architecture import (
    assemble_unclip,
    build_unet,
    image_encoder_of,
    normals,
    unclip_unet_shape,
)
from rayexpand.models.tiny.once import trained_once
from rayexpand.models.unclip import UnclipPrior, Variation
from rayexpand.storage.checkpoints import Stage

if TYPE_CHECKING:
    from diffusers import StableUnCLIPImg2ImgPipeline

STAGE = "decoder of embeddings"


@dataclass(frozen=True, slots=True)
class UnclipRecipe:
    """What decides the trained weights, beside the embedded default; its digest names the cache folder."""

    version: int = 2  # raised when the code below trains something else from the same numbers
    seed: int = 0
    steps: int = 1000
    batch: int = 32
    rate: float = 2e-3  # peak of a one-cycle AdamW
    drop: float = 0.1  # share of images shown with zeros, which classifier-free guidance needs
    clean: float = 0.5  # share of embeddings without noise; the others get a level below `levels`
    levels: int = 500
    ema: float = 0.995
    measured: int = 200  # test images that are painted again to measure

    def stream(self, stage: str) -> np.random.Generator:
        return pretrain.stream(self.seed, stage)


RECIPE = UnclipRecipe()


def cache_name(recipe: UnclipRecipe = RECIPE, base: digits.DigitsRecipe = digits.RECIPE) -> str:
    """`digits-unclip-` and eight hex digits over recipe, embedded default and library versions."""
    text = json.dumps([asdict(recipe), digits.cache_name(base), version("transformers").split("+")[0].split(".")[:2]],
                      sort_keys=True)
    return f"digits-unclip-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def ensure(progress: Progress | None = None, cache: Path | None = None, recipe: UnclipRecipe = RECIPE,
           base: digits.DigitsRecipe = digits.RECIPE) -> Path:
    """Folder with `pipeline/` (diffusers) and `measured.json`; trained on first use, after the embedded default. See
    digits.ensure."""
    report = progress or (lambda stage, done, total: None)
    folder = cache_root(cache) / cache_name(recipe, base)
    return trained_once(folder, lambda part: train(part, digits.ensure(report, cache, base), recipe, base, report),
                        report)


def train(folder: Path, default: Path, recipe: UnclipRecipe, base: digits.DigitsRecipe, report: Progress) -> None:
    """Trains the decoder beside the embedded default in the folder `default` and writes it to `folder` with what was
    measured. One thread; global state kept."""
    with pretrain.settled(threads=1):
        data, trained = digits_split(base.split), pretrain.load(default, digits.setting(base), {})
        pipe = train_decoder(pretrain.to_bytes(data["pool"][0]), trained, recipe, report)
        pipe.save_pretrained(folder / "pipeline", safe_serialization=True)
        measured = measure(folder / "pipeline", trained, data["test"], recipe)
        (folder / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


def train_decoder(x_n3HW: torch.Tensor, trained: pretrain.Trained, recipe: UnclipRecipe,
                  report: Progress) -> StableUnCLIPImg2ImgPipeline:
    """Denoising on cached posteriors of uint8 images, told the embedding of each; the moving average of the weights."""
    from diffusers.models.embeddings import get_timestep_embedding

    rng, vae, scheduler = recipe.stream("unclip"), trained.pipe.vae, trained.pipe.scheduler
    with torch.no_grad():
        z_nD = trained.guide.encode_image(pretrain.to_unit(x_n3HW) * 2 - 1)
    features = z_nD.shape[1]
    unet, average = (build_unet(recipe.stream("unclip weights"), **unclip_unet_shape(features)) for _ in range(2))
    pipe = assemble_unclip(trained.pipe, average, image_encoder_of(trained.guide, trained.setting.size),
                           z_nD.mean(0), z_nD.std(0))
    normalizer, noising = pipe.image_normalizer, pipe.image_noising_scheduler
    empty_1TE = pretrain.caption_table(trained.pipe.tokenizer, trained.pipe.text_encoder, [[""]])[0]
    means_nCHW, stds_nCHW = pretrain.posteriors(vae, x_n3HW)

    def loss() -> torch.Tensor:
        rows = torch.from_numpy(rng.integers(len(x_n3HW), size=recipe.batch))
        mean, std = means_nCHW[rows], stds_nCHW[rows]
        z_0 = (mean + std * normals(rng, mean.shape)) * vae.config.scaling_factor
        noise = normals(rng, mean.shape)
        t_B = torch.from_numpy(rng.integers(scheduler.config.num_train_timesteps, size=recipe.batch))
        level_B = torch.from_numpy(np.where(rng.random(recipe.batch) < recipe.clean, 0,
                                            rng.integers(recipe.levels, size=recipe.batch)))
        noisy_BD = normalizer.unscale(noising.add_noise(normalizer.scale(z_nD[rows]),
                                                        normals(rng, (recipe.batch, features)), level_B))
        told_BP = torch.cat([noisy_BD, get_timestep_embedding(level_B, features, flip_sin_to_cos=True,
                                                              downscale_freq_shift=0)], dim=1)
        kept_B = torch.from_numpy(rng.random(recipe.batch) >= recipe.drop)
        out = unet(scheduler.add_noise(z_0, noise, t_B), t_B, class_labels=told_BP * kept_B[:, None],
                   encoder_hidden_states=empty_1TE.expand(recipe.batch, -1, -1)).sample
        return F.mse_loss(out, scheduler.get_velocity(z_0, noise, t_B))

    Stage(STAGE, unet, rng, steps=recipe.steps, rate=recipe.rate, decay=1e-3, beta=0.99, warm=0.05, average=average,
          ema=recipe.ema).run(loss, report, None)
    average.eval().requires_grad_(False)
    return pipe


@torch.no_grad()
def measure(pipeline: Path, trained: pretrain.Trained, test: tuple[np.ndarray, np.ndarray],
            recipe: UnclipRecipe) -> dict[str, float]:
    """Test images painted again from their embeddings, guidance 2, 10 steps: the share that the guide names as they are
    labelled, and the mean cosine between what it sees in both. The guide flatters itself."""
    sources = PriorSources(pipeline)
    process = inspect_sources(sources, PriorModel(weights=str(pipeline))).process
    prior, rng = UnclipPrior.load(sources, process, device="cpu"), recipe.stream("unclip measured")
    x_n3HW = pretrain.to_bytes(test[0][:recipe.measured])
    z_nD = prior.encode(pretrain.to_unit(x_n3HW), None)
    noise, level_noise = (normals(rng, shape) for shape in (
        (len(x_n3HW), *prior.latent_shape(*x_n3HW.shape[2:])), z_nD.shape))
    painted = prior.decode(z_nD, Variation(prior.schedule("ddim", 10), noise, level_noise, 2.0)).clamp(0, 1)
    cosines = F.cosine_similarity(prior.encode(painted, None), z_nD)
    named = pretrain.named(trained, painted, digits.CLASS_NAMES)
    return {"named_right": round(float((named == test[1][:recipe.measured]).mean()), 4),
            "cosine": round(float(cosines.mean()), 4)}
