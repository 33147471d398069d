"""Stable Diffusion 1.x and 2.x behind the LatentPrior protocol: any diffusers folder, the embedded default included."""

# B rows, C latent channels, H W pixels, T tokens, E text embedding

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rayexpand.errors import ModelError
from rayexpand.priors import quiet_libraries, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("auto", "sdpa", "eager")
CACHED_TEXTS = 1024  # 0.12 GB of hidden states at Stable Diffusion 1.5 in bfloat16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class TextCond:
    """Hidden states of prompts and of their negatives; `cond[rows]` takes rows like a tensor, an int keeps its row."""

    tokens_BTE: torch.Tensor
    negative_tokens_BTE: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens_BTE)

    def __getitem__(self, rows: Any) -> TextCond:
        if isinstance(rows, int):
            rows = [rows]
        return TextCond(self.tokens_BTE[rows], self.negative_tokens_BTE[rows])


class StableDiffusionPrior:
    """UNet, autoencoder and text encoder of one pipeline folder, frozen and in eval mode.

    Gradients flow through `predict`, `encode` and `decode` to their inputs; whether a graph is built is the caller's
    decision. The autoencoder computes in float32 whatever the dtype: in float16 that of Stable Diffusion overflows.
    No safety checker is ever loaded.
    """

    decode_needs_grad = True

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel,
                 tokenizer: CLIPTokenizer, scheduler: Any, device: torch.device) -> None:
        self.unet, self.vae, self.text_encoder = (
            model.to(device).eval().requires_grad_(False) for model in (unet, vae, text_encoder))
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.device, self.dtype = device, unet.dtype
        self.space = f"vae{vae.config.latent_channels}"
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._abar = scheduler.alphas_cumprod.to(torch.float64).tolist()
        self._shift = vae.config.get("shift_factor") or 0.0
        self._texts: OrderedDict[str, torch.Tensor] = OrderedDict()

    @classmethod
    def load(cls, folder: Path, *, dtype: str = "auto", device: str = "auto", attention: str = "auto",
             channels_last: bool = False, compile: bool = False) -> StableDiffusionPrior:
        """From a complete pipeline folder (see `load_prior`). Raises ModelError."""
        where = choose_device(device)
        if attention not in ATTENTIONS:
            raise ModelError(f"attention '{attention}' is unknown; choose one of {', '.join(ATTENTIONS)}")
        if dtype != "auto" and dtype not in DTYPES:
            raise ModelError(f"dtype '{dtype}' is unknown; choose auto or one of {', '.join(DTYPES)}")
        number = DTYPES.get(dtype, torch.bfloat16 if where.type == "cuda" else torch.float32)
        try:
            with quiet_libraries():
                unet, vae, text_encoder, tokenizer, scheduler = _components(folder, number)
            prior = cls(unet, vae, text_encoder, tokenizer, scheduler, where)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
                SafetensorError) as error:
            raise ModelError(f"{folder} cannot be loaded: {error}. Fetch or save the model again") from error
        if attention != "auto":
            _set_attention(prior, attention)
        if channels_last:
            prior.unet.to(memory_format=torch.channels_last)
            prior.vae.to(memory_format=torch.channels_last)
        if compile:
            prior.unet.compile()
        return prior

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of one image of height x width pixels."""
        return self.vae.config.latent_channels, height // self.vae_factor, width // self.vae_factor

    def embed(self, prompts: Sequence[str], negatives: Sequence[str]) -> TextCond:
        """Hidden states of B prompts and B negatives. Each text is encoded alone, so its row does not depend on its
        batch-mates, and kept for the next call."""
        rows, negative_rows = ([self._text(text) for text in texts] for texts in (prompts, negatives))
        return TextCond(torch.stack(rows), torch.stack(negative_rows))

    def predict(self, z_t: torch.Tensor, t: int, cond: TextCond, guidance_scale: float) -> torch.Tensor:
        """Noise prediction eps (B, C, H, W) at timestep t, in the dtype of z_t.

        Classifier-free guidance (Ho and Salimans 2022, in the form uncond + scale * (cond - uncond)) runs as one
        doubled batch; at scale 1 the unconditional half is left out. v becomes eps as sqrt(abar_t) v + sqrt(1 -
        abar_t) z_t (Salimans and Ho 2022, appendix D).
        """
        guided = guidance_scale != 1
        texts = torch.cat([cond.negative_tokens_BTE, cond.tokens_BTE]) if guided else cond.tokens_BTE
        z_in = (torch.cat([z_t, z_t]) if guided else z_t).to(self.dtype)
        t_in = torch.full((len(z_in),), t, device=self.device)
        out = self.unet(z_in, t_in, encoder_hidden_states=texts, return_dict=False)[0].to(z_t.dtype)
        if guided:
            uncond, conditional = out.chunk(2)
            out = uncond + guidance_scale * (conditional - uncond)
        if self.scheduler.config.prediction_type == "v_prediction":
            abar = self._abar[t]
            out = abar**0.5 * out + (1 - abar) ** 0.5 * z_t
        return out

    def encode(self, x_BCHW: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] to scaled float32 latents: the posterior mean, plus `noise` standard
        deviations where noise of the latent's shape is given."""
        posterior = self.vae.encode(x_BCHW.to(self.device, torch.float32) * 2 - 1).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return (z - self._shift) * self.vae.config.scaling_factor

    def decode(self, z: torch.Tensor, cond: Any = None) -> torch.Tensor:
        """Scaled latents to float32 images (B, 3, H, W), about [0, 1], unclamped. `cond` is not used."""
        z = z.to(self.device, torch.float32) / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(z, return_dict=False)[0] / 2 + 0.5

    def _text(self, text: str) -> torch.Tensor:
        """(T, E) hidden states of one text."""
        if text in self._texts:
            self._texts.move_to_end(text)
            return self._texts[text]
        longest = self.tokenizer.model_max_length
        tokens = self.tokenizer(text, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        if len(self.tokenizer(text).input_ids) > longest:
            log.warning("only the first %d tokens of this prompt are read: %r", longest, text)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        with torch.no_grad():
            hidden = self.text_encoder(tokens.input_ids.to(self.device), return_dict=True,
                                       attention_mask=tokens.attention_mask.to(self.device) if masked else None)
        self._texts[text] = hidden.last_hidden_state[0]
        if len(self._texts) > CACHED_TEXTS:
            self._texts.popitem(last=False)
        return self._texts[text]


def choose_device(name: str) -> torch.device:
    """auto is CUDA where torch sees it. Raises ModelError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device '{name}' is unknown; choose auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
                         "choose auto or cpu")
    return device


def _components(folder: Path, dtype: torch.dtype) -> tuple[Any, ...]:
    """unet, vae, text_encoder, tokenizer, scheduler."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    local: dict[str, Any] = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": CLIPTextModel}
    models = []
    for part, kind in kinds.items():
        precision = torch.float32 if part == "vae" else dtype
        model, info = kind.from_pretrained(
            **local, subfolder=part, use_safetensors=True, variant=weight_files(folder, part)[0],
            output_loading_info=True, **{"dtype" if part == "text_encoder" else "torch_dtype": precision})
        # diffusers and transformers fill absent weights with random numbers and go on
        if absent := sorted(info["missing_keys"]):
            raise ValueError(f"{part} lacks {len(absent)} weights its configuration asks for, such as {absent[0]}")
        models.append(model)
    name = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)["_class_name"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"scheduler/scheduler_config.json names {name}, which this diffusers does not have")
    return (*models, CLIPTokenizer.from_pretrained(**local, subfolder="tokenizer"),
            kind.from_pretrained(**local, subfolder="scheduler"))


def _set_attention(prior: StableDiffusionPrior, attention: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    for model in (prior.unet, prior.vae):
        model.set_attn_processor(AttnProcessor2_0() if attention == "sdpa" else AttnProcessor())
