"""Training a small generator and its guide from nothing, on labelled images of any kind, in one process.

The order was measured on digits: the CLIP guide first, its text tower copied into the generator and frozen, then the
autoencoder, then the UNet. A text encoder trained together with the UNet left 85 % of the samples unreadable; trained
first, at most 4 % were.

A class is known by its captions. Classes that share their captions count as one for the guide, which cannot tell them
apart by any text.
"""

# n images, B rows, K classes, N captions, T tokens, E text embedding, D guide embedding
# x_n3HW uint8 images, x_B3HW floats in [0, 1], z_BCHW latents

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from rayexpand.contract.device import torch_threads
from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import generator, row_key
from rayexpand.models.folders import quiet_libraries
from rayexpand.models.tiny import views
from rayexpand.models.tiny.architecture import (
    assemble,
    build_guide,
    build_scheduler,
    build_tokenizer,
    build_unet,
    build_vae,
    guide_config,
    normals,
    save_guide,
    text_encoder_of,
    tokenize,
    unet_shape,
    vae_shape,
)
from rayexpand.models.tiny.setting import Setting
from rayexpand.storage.checkpoints import Checkpoints, Stage

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from open_clip import CLIP
    from transformers import CLIPTextModel, CLIPTokenizer

PROMPT = "a photo of a {}"  # what a guide is asked about a class, here and in every run
STREAMS = "digits"  # domain of the keyed streams; another word would change the weights of the embedded default
CALL_PIXELS = 2**18  # of one call outside training
SPREAD_IMAGES = 1024  # about so many are encoded to find the scale of latents

GUIDE, AUTOENCODER, GENERATOR = STAGES = ("guide", "autoencoder", "generator")


@dataclass(frozen=True)
class TrainingImages:
    """What is learned from: images, their classes, and the captions of each class."""

    x_n3HW: torch.Tensor  # uint8
    labels: torch.Tensor  # int64 (n,)
    captions: tuple[tuple[str, ...], ...]  # K x N


@dataclass(frozen=True)
class Trained:
    """A guide and a pipeline that share a tokenizer, with the seconds each stage took."""

    setting: Setting
    guide: CLIP
    pipe: StableDiffusionPipeline
    seconds: dict[str, dict[str, float]]

    def save(self, folder: Path) -> None:
        """Writes `guide/` (open_clip's layout) and `pipeline/` (diffusers')."""
        save_guide(self.guide, self.pipe.tokenizer, folder / "guide", _guide_config(self.setting, self.pipe.tokenizer))
        self.pipe.save_pretrained(folder / "pipeline", safe_serialization=True)


def load(folder: Path, setting: Setting, seconds: dict[str, dict[str, float]],
         device: str | torch.device = "cpu") -> Trained:
    """What `Trained.save` wrote, frozen."""
    import open_clip
    from diffusers import StableDiffusionPipeline

    guide = open_clip.create_model(f"local-dir:{folder / 'guide'}", require_pretrained=True)
    pipe = StableDiffusionPipeline.from_pretrained(folder / "pipeline", use_safetensors=True, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in (guide, pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return Trained(setting, guide.to(device), pipe.to(device), seconds)


def to_bytes(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) to uint8 (n, 3, H, W)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_unit(x_B3HW: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 in [0, 1]."""
    return x_B3HW.float().div(255)


def stream(seed: int, part: str) -> np.random.Generator:
    """The keyed stream of one part of a training: weights or draws of a stage."""
    return generator(row_key(seed, STREAMS, part, 0, 0, "training"))


@contextmanager
def settled(threads: int) -> Iterator[None]:
    """`threads` CPU threads: at these sizes two cost twice the CPU for the same speed, and results differ between
    counts. Denormal numbers are flushed, as they cost time; library progress bars are silenced; torch's global
    generator is left as it was."""
    torch.set_flush_denormal(True)
    try:
        # fork_rng: constructors draw throw-away weights from the global generator
        with torch_threads(threads), quiet_libraries(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_flush_denormal(False)


@dataclass(frozen=True)
class PretrainStage:
    """What every stage of a training is given; each notes its seconds (wall, cpu)."""

    images: TrainingImages
    setting: Setting
    seed: int
    report: Progress
    checkpoints: Checkpoints | None = None
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.images.x_n3HW.device

    def stream(self, part: str) -> np.random.Generator:
        return stream(self.seed, part)

    def run(self, stage: Stage, loss: Callable[[], torch.Tensor]) -> None:
        stage.run(loss, self.report, self.checkpoints)
        self.seconds[stage.name] = stage.seconds


def train(work: PretrainStage) -> Trained:
    """Guide, autoencoder and UNet, frozen, on the device of the images; call it inside `settled`. With checkpoints it
    continues where an earlier call with the same work stopped, to the same weights.

    Raises UsageError for captions longer than the context, and for a training that diverges.
    """
    captions = work.images.captions
    tokenizer = build_tokenizer([text for row in captions for text in row], work.setting.context)
    _refuse_long(tokenizer, captions)
    guide = train_guide(work, tokenizer)
    text_encoder = text_encoder_of(guide).to(work.device)
    vae = train_vae(work)
    own = work.setting.unet
    scheduler = build_scheduler(own.prediction_type, rescale_betas_zero_snr=own.rescale_betas_zero_snr,
                                timestep_spacing=own.spacing)
    unet = train_unet(work, vae, caption_table(tokenizer, text_encoder, captions), scheduler)
    return Trained(work.setting, guide, assemble(vae, text_encoder, tokenizer, unet, scheduler), work.seconds)


def train_guide(work: PretrainStage, tokenizer: CLIPTokenizer) -> CLIP:
    """Contrastive training on captions; every pair of one class is a positive, in both directions. Half of each batch
    is augmented: with all of it augmented the untouched test digits are named 3 points worse (measured)."""
    own, images, device, rng = work.setting.guide, work.images, work.device, work.stream("guide")
    model = build_guide(len(tokenizer), work.stream("guide weights"), _guide_config(work.setting, tokenizer)).to(device)
    ids_KNT = torch.stack([tokenize(tokenizer, list(row)) for row in images.captions])
    alike_K = torch.tensor([images.captions.index(row) for row in images.captions])

    def loss() -> torch.Tensor:
        rows = torch.from_numpy(rng.integers(len(images.labels), size=own.batch))
        kinds = torch.from_numpy(rng.integers(ids_KNT.shape[1], size=own.batch))
        y = images.labels[rows]
        x = views.half_changed(to_unit(images.x_n3HW[rows.to(device)]), views.GUIDE[work.setting.augment], rng)
        image_BD = F.normalize(model.encode_image(x * 2 - 1), dim=-1)
        text_BD = F.normalize(model.encode_text(ids_KNT[y, kinds].to(device)), dim=-1)
        logits_BB = model.logit_scale.exp() * image_BD @ text_BD.T
        same = alike_K[y]
        target_BB = F.normalize((same[:, None] == same[None]).float(), p=1, dim=1).to(device)
        return (F.cross_entropy(logits_BB, target_BB) + F.cross_entropy(logits_BB.T, target_BB)) / 2

    work.run(Stage(GUIDE, model, rng, steps=own.steps, rate=own.rate, decay=0.05, beta=0.98, warm=0.1), loss)
    return model.eval().requires_grad_(False)


def train_vae(work: PretrainStage) -> AutoencoderKL:
    """L1 + 0.5 MSE + KL on half plain, half augmented images: a VAE that has only seen upright digits draws rotated
    ones at 16 dB, and no fine-tuning of the UNet lifts that ceiling (measured)."""
    own, x_n3HW, device, rng = work.setting.vae, work.images.x_n3HW, work.device, work.stream("vae")
    vae = build_vae(work.stream("vae weights"), **vae_shape(work.setting)).to(device)

    def loss() -> torch.Tensor:
        rows = torch.from_numpy(rng.integers(len(x_n3HW), size=own.batch)).to(device)
        x = views.half_changed(to_unit(x_n3HW[rows]), views.AUTOENCODER[work.setting.augment], rng) * 2 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * normals(rng, posterior.mean.shape).to(device)
        y = vae.decode(z).sample
        return F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 1e-4 * posterior.kl().mean() / x[0, 0].numel()

    work.run(Stage(AUTOENCODER, vae, rng, steps=own.steps, rate=own.rate, decay=0.01, beta=0.99, warm=0.1), loss)
    vae.eval().requires_grad_(False)
    spread = posteriors(vae, x_n3HW[::max(1, len(x_n3HW) // SPREAD_IMAGES)])[0].std()
    vae.register_to_config(scaling_factor=1 / float(spread))  # latents of about unit variance, as the noise has
    return vae


def train_unet(work: PretrainStage, vae: AutoencoderKL, texts_KNTE: torch.Tensor,
               scheduler: DDIMScheduler) -> UNet2DConditionModel:
    """Denoising on cached posteriors, with caption dropout for guidance; the moving average of the weights.

    `texts_KNTE[k, n]` is caption n of class k; the last class holds the empty text. The posteriors of all images (and
    of their mirror images, where the setting has them) stay in memory: 8 bytes for each number of a latent."""
    own, device, rng = work.setting.unet, work.device, work.stream("unet")
    unet, average = (build_unet(work.stream("unet weights"), **unet_shape(work.setting)).to(device) for _ in range(2))
    means_snCHW, stds_snCHW = _both_sides(work, vae)
    steps, empty = int(scheduler.config.num_train_timesteps), len(texts_KNTE) - 1

    def loss() -> torch.Tensor:
        rows = torch.from_numpy(rng.integers(len(work.images.labels), size=own.batch))
        sides = (torch.from_numpy(rng.integers(2, size=own.batch)) if len(means_snCHW) == 2
                 else torch.zeros_like(rows))
        mean, std = (part[sides.to(device), rows.to(device)] for part in (means_snCHW, stds_snCHW))
        z_0 = (mean + std * normals(rng, mean.shape).to(device)) * vae.config.scaling_factor
        noise = normals(rng, mean.shape).to(device)
        t_B = torch.from_numpy(rng.integers(steps, size=own.batch)).to(device)
        dropped = torch.from_numpy(rng.random(own.batch) < own.caption_drop)
        kinds = torch.from_numpy(rng.integers(texts_KNTE.shape[1], size=own.batch))
        text_BTE = texts_KNTE[torch.where(dropped, empty, work.images.labels[rows]).to(device), kinds.to(device)]
        out = unet(scheduler.add_noise(z_0, noise, t_B), t_B, encoder_hidden_states=text_BTE).sample
        wanted = noise if own.prediction_type == "epsilon" else scheduler.get_velocity(z_0, noise, t_B)
        return F.mse_loss(out, wanted)

    work.run(Stage(GENERATOR, unet, rng, steps=own.steps, rate=own.rate, decay=1e-3, beta=0.99, warm=0.05,
                   average=average, ema=own.ema), loss)
    return average.eval().requires_grad_(False)


def _both_sides(work: PretrainStage, vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and deviations of the latents, (1, n, C, H, W), or (2, n, C, H, W) with those of mirrored images."""
    sides = [posteriors(vae, work.images.x_n3HW)]
    if work.setting.augment in views.MIRRORED:
        sides.append(posteriors(vae, work.images.x_n3HW.flip(3)))
    means, stds = zip(*sides, strict=True)
    return torch.stack(means), torch.stack(stds)


def caption_table(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel,
                  captions: Sequence[Sequence[str]]) -> torch.Tensor:
    """float32 (K + 1, N, T, E): hidden states of N captions of each class, then the empty text N times."""
    rows = [*(list(row) for row in captions), [""] * len(captions[0])]
    with torch.no_grad():
        return torch.stack([text_encoder(tokenize(tokenizer, row).to(text_encoder.device))[0] for row in rows])


@torch.no_grad()
def posteriors(vae: AutoencoderKL, x_n3HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents of uint8 images, not scaled."""
    found = [vae.encode(to_unit(x) * 2 - 1).latent_dist for x in _calls(x_n3HW)]
    return torch.cat([one.mean for one in found]), torch.cat([one.std for one in found])


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, x_n3HW: torch.Tensor) -> torch.Tensor:
    """float32 (n, 3, H, W) in [0, 1]: uint8 images drawn again from the mean of their latents."""
    found = [vae.decode(vae.encode(to_unit(x) * 2 - 1).latent_dist.mean).sample for x in _calls(x_n3HW)]
    return (torch.cat(found) / 2 + 0.5).clamp(0, 1)


def psnr(vae: AutoencoderKL, x_n3HW: torch.Tensor) -> float:
    """Mean over images of the PSNR of their reconstruction, dB."""
    return psnr_of(reconstructions(vae, x_n3HW), x_n3HW)


def psnr_of(redrawn_n3HW: torch.Tensor, x_n3HW: torch.Tensor) -> float:
    """Mean over images of the PSNR of floats in [0, 1] against the uint8 images they show, dB."""
    error_n = (redrawn_n3HW - to_unit(x_n3HW)).square().mean((1, 2, 3))
    return float((-10 * error_n.log10()).mean())


@torch.no_grad()
def named(trained: Trained, x_nCHW: torch.Tensor, class_names: Sequence[str]) -> np.ndarray:
    """int64 (n,): the class the guide sees in images, uint8 or floats in [0, 1]."""
    guide, tokenizer = trained.guide, trained.pipe.tokenizer
    device = guide.logit_scale.device
    ids = tokenize(tokenizer, [PROMPT.format(name) for name in class_names]).to(device)
    texts_KD = guide.encode_text(ids, normalize=True)
    found = [(guide.encode_image((to_unit(x) if x.dtype == torch.uint8 else x).to(device) * 2 - 1) @ texts_KD.T
              ).argmax(1) for x in _calls(x_nCHW)]
    return torch.cat(found).cpu().numpy()


def sample(trained: Trained, prompts: Sequence[str], seed: int, report: Progress, batch: int = 64) -> torch.Tensor:
    """float32 (n, 3, H, W) in [0, 1]: text to image by diffusers' own pipeline."""
    setting, pipe, rng = trained.setting, trained.pipe, stream(seed, "samples")
    side = setting.size // setting.vae.factor
    rows = []
    for first in range(0, len(prompts), batch):
        texts = list(prompts[first:first + batch])
        noise = normals(rng, (len(texts), setting.vae.latent_channels, side, side)).to(pipe.device)
        rows.append(pipe(texts, latents=noise, guidance_scale=setting.guidance_scale, height=setting.size,
                         width=setting.size, num_inference_steps=setting.sample_steps, output_type="pt").images)
        report("measuring", min(first + batch, len(prompts)), len(prompts))
    return torch.cat(rows).float()


def _guide_config(setting: Setting, tokenizer: CLIPTokenizer) -> dict[str, object]:
    return guide_config(len(tokenizer), setting.size, setting.context, setting.guide)


def _calls(x_nCHW: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows in parts small enough for one call."""
    yield from x_nCHW.split(max(1, CALL_PIXELS // (x_nCHW.shape[2] * x_nCHW.shape[3])))


def _refuse_long(tokenizer: CLIPTokenizer, captions: Sequence[Sequence[str]]) -> None:
    longest = max((text for row in captions for text in row), key=lambda text: len(tokenizer(text).input_ids))
    if (needed := len(tokenizer(longest).input_ids)) > tokenizer.model_max_length:
        raise UsageError(f"the caption {longest!r} takes {needed} tokens with those of start and end, but a text has "
                         f"{tokenizer.model_max_length}: raise context to {needed}, or shorten captions or class names")
