"""Stable Diffusion 1.x and 2.x behind the LatentPrior protocol: any diffusers folder, the embedded default included."""

# B rows, C latent channels, H W pixels, T tokens, E text embedding, N classes

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from rayexpand.artifacts.adapter import AdapterFacts, load_lora, load_tokens, lora_config, read_adapter
from rayexpand.contract.class_tokens import add_class_tokens
from rayexpand.contract.device import choose_device
from rayexpand.contract.errors import ModelError
from rayexpand.models.embeddings import with_rows
from rayexpand.models.folders import quiet_libraries, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("auto", "sdpa", "eager")
CACHED_TEXTS = 1024  # 0.12 GB of hidden states at Stable Diffusion 1.5 in bfloat16

_LORA_NAME = "fitted"
_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


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

    def with_last_slot(self, v_BD: torch.Tensor, both: bool = False) -> TextCond:
        """The last of the T slots of each prompt holds v_BD in place of its hidden state (Real-Fake's code: slot 76 of
        77, which carries an end-of-text state even where the text is cut). Negatives too only with `both`.

        Raises ModelError where features are not as wide as hidden states; there is no projection between them.
        """
        rows, _, width = self.tokens_BTE.shape
        if tuple(v_BD.shape) != (rows, width):
            raise ModelError(f"visual tokens of shape {tuple(v_BD.shape)} do not fit {rows} texts of width {width}: "
                             "the image encoder must give as many features as the text encoder's hidden states have "
                             "(ViT-L/14 with Stable Diffusion 1.x: 768). Make the features with another encoder")
        tokens_BTE, negative_tokens_BTE = self.tokens_BTE.clone(), self.negative_tokens_BTE
        tokens_BTE[:, -1] = v_BD.to(tokens_BTE)
        if both:
            negative_tokens_BTE = negative_tokens_BTE.clone()
            negative_tokens_BTE[:, -1] = v_BD.to(negative_tokens_BTE)
        return TextCond(tokens_BTE, negative_tokens_BTE)


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the weights of a prior came from, and what was done with the UNet after loading."""

    folder: Path
    attention: str
    channels_last: bool
    compile: bool


class StableDiffusionPrior:
    """UNet, autoencoder and text encoder of one pipeline folder, frozen and in eval mode.

    Gradients flow through `predict`, `encode` and `decode` to their inputs; whether a graph is built is the caller's
    decision. The autoencoder computes in float32 whatever the dtype: in float16 that of Stable Diffusion overflows.
    No safety checker is ever loaded.
    """

    decode_needs_grad = True

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel,
                 tokenizer: CLIPTokenizer, scheduler: Any, device: torch.device, source: _Source | None = None,
                 adapter: AdapterFacts | None = None) -> None:
        self.unet, self.vae, self.text_encoder = (
            model.to(device).eval().requires_grad_(False) for model in (unet, vae, text_encoder))
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.device, self.dtype = device, unet.dtype
        self.source, self.adapter = source, adapter
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
            source = _Source(folder, attention, channels_last, compile)
            prior = cls(unet, vae, text_encoder, tokenizer, scheduler, where, source)
        except _UNLOADABLE as error:
            raise ModelError(f"{folder} cannot be loaded: {error}. Fetch or save the model again") from error
        for model in (prior.unet, prior.vae):
            _set_up(model, source)
        return prior

    def with_adapter(self, folder: Path | str, *, scale: float = 1.0, fuse: bool = True,
                     base_sha256: str | None) -> StableDiffusionPrior:
        """This prior with an adapter (adapters.py). `base_sha256` is the content hash of this prior, None where the
        caller knows that it fits; `scale` multiplies the LoRA, in both halves of classifier-free guidance.

        `fuse` adds it to the weights once, in float32 whatever the dtype of the run, so that sampling costs what it
        costs without; else it stays beside them. This prior is not changed; only what the adapter leaves as it is is
        shared with it. Raises ModelError for an adapter of another model.
        """
        facts = read_adapter(folder)
        self._check_adapter(folder, facts, base_sha256)
        unet, text_encoder, tokenizer = self.unet, self.text_encoder, self.tokenizer
        if facts.has_tokens:
            tokenizer = copy.deepcopy(tokenizer)
            first = add_class_tokens(tokenizer, len(facts.classes))
            text_encoder = with_rows(text_encoder, tokenizer, first, load_tokens(folder), f"adapter {folder}")
        if facts.has_lora:
            unet = self._unet_with_lora(folder, facts, scale, fuse)
        return StableDiffusionPrior(unet, self.vae, text_encoder, tokenizer, self.scheduler, self.device, self.source,
                                    facts)

    def _check_adapter(self, folder: Path | str, facts: AdapterFacts, base_sha256: str | None) -> None:
        if self.adapter is not None:
            raise ModelError(f"adapter {folder}: this model has an adapter already; load the base model again")
        if base_sha256 not in (None, facts.base_sha256):
            raise ModelError(f"adapter {folder} was trained on base model {facts.base_sha256[:12]}, but prior.weights "
                             f"is model {str(base_sha256)[:12]}, whose weights it does not fit; name the base model in "
                             "prior.weights, or fine-tune this one with `rayexpand fit`")
        here = (self.scheduler.config.prediction_type, len(self.tokenizer))
        if here != (there := (facts.prediction_type, facts.tokenizer_length)):
            raise ModelError(f"adapter {folder} was trained on a model that predicts {there[0]} and has {there[1]} "
                             f"words, this one predicts {here[0]} and has {here[1]}; name its base model in "
                             "prior.weights")

    def _unet_with_lora(self, folder: Path | str, facts: AdapterFacts, scale: float,
                        fuse: bool) -> UNet2DConditionModel:
        """A second UNet, in float32 until the LoRA is in it."""
        assert self.source is not None, "only a prior that was loaded from a folder takes a LoRA"
        base, state = self.source.folder, load_lora(folder)
        try:
            with quiet_libraries():
                unet = _component(base, "unet", torch.float32)
        except _UNLOADABLE as error:
            raise ModelError(f"{base} cannot be loaded: {error}. Fetch or save the model again") from error
        _check_lora(unet, state, folder)
        unet.load_lora_adapter(state, prefix="unet", adapter_name=_LORA_NAME, metadata=lora_config(facts, list(state)),
                               low_cpu_mem_usage=True)  # without, peft draws initial weights from the global generator
        unet.to(self.device)
        if fuse:
            unet.fuse_lora(lora_scale=scale)
            unet.unload_lora()
        else:
            unet.set_adapters(_LORA_NAME, weights=scale)
        torch.nn.Module.to(unet, self.dtype)  # diffusers' own warns even where it has nothing to say
        _set_up(unet, self.source)
        return unet

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
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        with torch.no_grad():
            hidden = self.text_encoder(tokens.input_ids.to(self.device), return_dict=True,
                                       attention_mask=tokens.attention_mask.to(self.device) if masked else None)
        self._texts[text] = hidden.last_hidden_state[0]
        if len(self._texts) > CACHED_TEXTS:
            self._texts.popitem(last=False)
        return self._texts[text]


def _components(folder: Path, dtype: torch.dtype) -> tuple[Any, ...]:
    """unet, vae, text_encoder, tokenizer, scheduler."""
    import diffusers
    from transformers import CLIPTokenizer

    local: dict[str, Any] = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    models = [_component(folder, part, torch.float32 if part == "vae" else dtype)
              for part in ("unet", "vae", "text_encoder")]
    name = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)["_class_name"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"scheduler/scheduler_config.json names {name}, which this diffusers does not have")
    return (*models, CLIPTokenizer.from_pretrained(**local, subfolder="tokenizer"),
            kind.from_pretrained(**local, subfolder="scheduler"))


def _component(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """unet, vae or text_encoder of a pipeline folder, on the CPU."""
    import diffusers
    from transformers import CLIPTextModel

    kinds = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL, "text_encoder": CLIPTextModel}
    model, info = kinds[part].from_pretrained(
        folder, local_files_only=True, subfolder=part, use_safetensors=True, variant=weight_files(folder, part)[0],
        output_loading_info=True, **{"dtype" if part == "text_encoder" else "torch_dtype": dtype})
    # diffusers and transformers fill absent weights with random numbers and go on
    if absent := sorted(info["missing_keys"]):
        raise ValueError(f"{part} lacks {len(absent)} weights its configuration asks for, such as {absent[0]}")
    return model


def _set_up(model: Any, source: _Source) -> None:
    """Attention, memory format and (of the UNet) compilation as the loader of `source` was told."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    if source.attention != "auto":
        model.set_attn_processor(AttnProcessor2_0() if source.attention == "sdpa" else AttnProcessor())
    if source.channels_last:
        model.to(memory_format=torch.channels_last)
    if source.compile and isinstance(model, UNet2DConditionModel):
        model.compile()


def _check_lora(unet: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path | str) -> None:
    """Raises ModelError unless every LoRA pair fits a layer of the UNet; peft would skip or reshape it."""
    layers = dict(unet.named_modules())
    for name, tensor in state.items():
        module, _, side = name.removeprefix("unet.").rpartition(".lora_")
        weight = getattr(layers.get(module), "weight", None)
        along = 1 if side.startswith("A") else 0
        if weight is None or weight.shape[along] != tensor.shape[along]:
            has = "has no such layer" if weight is None else f"has weights of shape {tuple(weight.shape)} there"
            raise ModelError(f"adapter {folder} adapts {module} with {name} of shape {tuple(tensor.shape)}, but this "
                             f"UNet {has}; name its base model in prior.weights")
