"""Stable unCLIP behind the Prior protocol, for GIF-DALLE: the latent of an image is its CLIP embedding, and decoding it
is a whole diffusion of Stable Diffusion that is told this embedding.

    paper               here              meaning, unit
    f                   z_BD              image embedding as the encoder gives it, not normalised
    f_CLIP-I            encode            image encoder
    G                   decode            diffusion from noise, then the autoencoder

As diffusers' StableUnCLIPImg2ImgPipeline: the embedding gets noise of a level, and the network is told both as class
labels; where nothing is to be followed it is told zeros. Texts are empty.
"""

# B rows, D features, C latent channels, H W pixels, h w latent pixels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from rayexpand.diffusion.energy import resize
from rayexpand.diffusion.process import Process, Schedule, Solver, Spacing
from rayexpand.diffusion.sampling import Fresh, denoise
from rayexpand.models.embedding_files import EmbeddingFile
from rayexpand.models.folders import EMBEDDING_NOISE, UNCLIP_PIXELS, read_json
from rayexpand.models.image_towers import encoder_space
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.lora_files import LoraFile
from rayexpand.models.part_loading import load_part
from rayexpand.models.prior_files import Settings, pixel_numbers
from rayexpand.models.sources import PriorSources

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection


@dataclass(frozen=True, slots=True, eq=False)
class Variation:
    """How embeddings become images. `variation[rows]` takes rows like a tensor."""

    schedule: Schedule
    noise_BChw: torch.Tensor  # that the diffusion begins with
    level_noise_BD: torch.Tensor  # of the embedding
    guidance_scale: float
    level: int = 0  # timestep of the noise in the embedding
    fresh: Fresh | None = None  # noise of steps that add some

    def __getitem__(self, rows: Any) -> Variation:
        of_all = self.fresh
        return replace(self, noise_BChw=self.noise_BChw[rows], level_noise_BD=self.level_noise_BD[rows],
                       fresh=None if of_all is None else lambda i: of_all(i)[rows])


class EmbeddingDecoder(StableDiffusionPrior):
    """Stable Diffusion whose network is told an image embedding. It stands in the condition where SDXL has its pooled
    texts, with zeros as negative."""

    def _beside(self, pooled_BP: torch.Tensor, height: int, width: int) -> dict[str, Any]:
        return {"class_labels": pooled_BP.to(self.dtype)}


@dataclass(frozen=True, slots=True, eq=False)
class ImageParts:
    """What unCLIP has beside Stable Diffusion, in float32."""

    encoder: CLIPVisionModelWithProjection
    normalizer: Any  # StableUnCLIPImageNormalizer: mean and deviation of embeddings
    noising: Any  # scheduler of the noise in embeddings
    mean: Sequence[float]  # of pixels
    std: Sequence[float]


class UnclipPrior:
    """An image encoder and the decoder of its embeddings, frozen and in eval mode.

    `space` names what the encoder sees (image_towers.py): a guide may score latents without decoding them where it has
    the same name. Nothing has a gradient here.
    """

    decode_needs_grad = False

    def __init__(self, decoder: EmbeddingDecoder, parts: ImageParts, space: str) -> None:
        self.decoder, self.space, self.device = decoder, space, decoder.device
        self.encoder, self.normalizer = (model.to(self.device).eval().requires_grad_(False)
                                         for model in (parts.encoder, parts.normalizer))
        self.noising, self.process = parts.noising, decoder.process
        self.mean, self.std = (torch.tensor(one, device=self.device).view(1, 3, 1, 1)
                               for one in (parts.mean, parts.std))
        self.features = int(self.encoder.config.projection_dim)

    @classmethod
    def load(cls, sources: PriorSources, process: Process, loras: Sequence[LoraFile] = (),
             embeddings: Sequence[EmbeddingFile] = (), **options: Any) -> UnclipPrior:
        """From complete files (see `load_prior`). Raises ModelError."""
        import diffusers

        decoder = EmbeddingDecoder.load(sources, process, loras, embeddings, **options)
        encoder, normalizer = (load_part(sources.part(name), kind, torch.float32)
                               for name, kind in sources.image_classes().items())
        folder = sources.folder
        noise = read_json(folder / EMBEDDING_NOISE)
        noising = getattr(diffusers, noise["_class_name"]).from_config(noise)
        mean, std = pixel_numbers(Settings(UNCLIP_PIXELS, read_json(folder / UNCLIP_PIXELS), []))
        return cls(decoder, ImageParts(encoder, normalizer, noising, mean, std), encoder_space(folder))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the noise that the diffusion of one image begins with."""
        return self.decoder.latent_shape(height, width)

    def schedule(self, solver: Solver, steps: int, run: int | None = None, spacing: Spacing | None = None,
                 latent: Sequence[int] | None = None) -> Schedule:
        return self.decoder.schedule(solver, steps, run, spacing, latent)

    def variation(self, schedule: Schedule, noise_BChw: torch.Tensor, level_noise_BD: torch.Tensor,
                  guidance_scale: float, level: int = 0, fresh: Fresh | None = None) -> Variation:
        """What `decode` takes beside embeddings."""
        return Variation(schedule, noise_BChw, level_noise_BD, guidance_scale, level, fresh)

    def encode(self, x_BCHW: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] of any size to float32 embeddings (B, D), resized with antialiasing as CLIP's
        own preprocessing does. `noise` has no effect: there is no posterior to sample."""
        side = int(self.encoder.config.image_size)
        x_BCHW = resize(x_BCHW.to(self.device, torch.float32).clamp(0, 1), (side, side), antialias=True)
        return self.encoder((x_BCHW - self.mean) / self.std).image_embeds

    def posterior(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents that the decoder denoises, float32."""
        return self.decoder.posterior(x_BCHW)

    def decode(self, z: torch.Tensor, cond: Variation) -> torch.Tensor:
        """Embeddings (B, D) to float32 images (B, 3, H, W), about [0, 1], unclamped."""
        level_B = torch.full((len(z),), cond.level, dtype=torch.int64, device=self.device)
        labels_BP = self.labels(z.to(self.device, torch.float32), cond.level_noise_BD, level_B)
        empty = [""] * len(z)
        told = replace(self.decoder.embed(empty, empty, cond.guidance_scale), pooled_BP=labels_BP,
                       negative_pooled_BP=torch.zeros_like(labels_BP))
        inner: Any = self.decoder
        return self.decoder.decode(denoise(inner, cond.noise_BChw.to(self.device), cond.schedule, told, cond.fresh))

    def labels(self, z_BD: torch.Tensor, noise_BD: torch.Tensor, level_B: torch.Tensor) -> torch.Tensor:
        """What the network is told, (B, 2 D): embeddings with noise of a level (int64), and what says the level."""
        from diffusers.models.embeddings import get_timestep_embedding

        noisy_BD = self.normalizer.unscale(self.noising.add_noise(self.normalizer.scale(z_BD), noise_BD.to(z_BD),
                                                                  level_B))
        return torch.cat([noisy_BD, get_timestep_embedding(level_B, self.features, flip_sin_to_cos=True,
                                                           downscale_freq_shift=0)], dim=1)
