"""Stable Diffusion 1, 2 and XL and what was made of them, behind the LatentPrior protocol: any diffusers folder, the
embedded default included."""

# B rows, C latent channels, H W pixels, T tokens, E text embedding, N classes

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError

from rayexpand.artifacts.adapter import AdapterFacts, load_lora, load_tokens, lora_config, read_adapter
from rayexpand.contract.class_tokens import add_class_tokens
from rayexpand.contract.device import choose_device
from rayexpand.contract.errors import ModelError
from rayexpand.diffusion.process import Point, Prediction, Process, Schedule, Solver, Spacing, prediction, process_of
from rayexpand.diffusion.process import schedule as schedule_of
from rayexpand.models.embedding_files import EmbeddingFile, expand_prompt, token_counts
from rayexpand.models.embeddings import add_embeddings, with_rows
from rayexpand.models.folders import quiet_libraries, read_json
from rayexpand.models.lora_files import LoraFile
from rayexpand.models.loras import merge
from rayexpand.models.part_loading import load_part
from rayexpand.models.sources import PriorSources
from rayexpand.models.texts import Encoder, TextCond, TextEncoders, added_condition

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("auto", "sdpa", "eager")

_LORA_NAME = "fitted"
_UNLOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class Parts:
    """The models of a pipeline folder. The second encoder and its tokenizer are those of Stable Diffusion XL."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any  # as fine-tuning needs it; sampling asks the Process
    text_encoder_2: Any = None
    tokenizer_2: Any = None
    zero_empty_negative: bool = False
    spelled: Callable[[str], str] = str  # writes out words that are several vectors


@dataclass(frozen=True, slots=True)
class Source:
    """Where the models came from, for a UNet that is read again."""

    files: PriorSources
    loras: tuple[LoraFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """How a generator is run, which are operational or numbers of the run digest, as the configuration says."""

    dtype: str = "auto"
    vae_dtype: str = "auto"
    attention: str = "auto"
    channels_last: bool | str = "auto"
    compile: bool | str = "auto"
    guidance: str = "auto"


class StableDiffusionPrior:
    """UNet, autoencoder and text encoders of one pipeline folder, frozen and in eval mode.

    Gradients flow through `predict`, `encode` and `decode` to their inputs; whether a graph is built is the caller's
    decision. Images are encoded in float32 whatever the dtype: in float16 the autoencoder of Stable Diffusion
    overflows, and in bfloat16 its latents move by 0.4 %. No safety checker is ever loaded.
    """

    decode_needs_grad = True

    def __init__(self, parts: Parts, device: torch.device, process: Process | None = None,
                 options: Options = Options(), source: Source | None = None,
                 adapter: AdapterFacts | None = None) -> None:
        self.parts, self.options, self.source, self.adapter = parts, options, source, adapter
        self.unet, self.vae, self.text_encoder = (
            model.to(device).eval().requires_grad_(False) for model in (parts.unet, parts.vae, parts.text_encoder))
        self.text_encoder_2 = parts.text_encoder_2 and parts.text_encoder_2.to(device).eval().requires_grad_(False)
        self.tokenizer, self.scheduler = parts.tokenizer, parts.scheduler
        self.device, self.dtype = device, self.unet.dtype
        self.process = process or process_of(dict(parts.scheduler.config) | {
            "_class_name": type(parts.scheduler).__name__}, published=parts.text_encoder_2 is None)
        config = self.vae.config
        self.space = f"vae{config.latent_channels}"
        self.vae_factor = 2 ** (len(config.block_out_channels) - 1)
        self._mean_1C11, self._std_1C11 = _moments(config, self.process.sigma_data, device)
        self._time_cond = self.unet.config.get("time_cond_proj_dim")
        self.guidance = options.guidance if options.guidance != "auto" else "embedded" if self._time_cond else "cfg"
        if self.guidance == "embedded" and not self._time_cond:
            raise ModelError("prior.guidance: embedded needs a network with guidance as an input (time_cond_proj_dim "
                             "of unet/config.json), and this one has none; use cfg or none")
        self.texts = self._text_encoders(parts)

    def _text_encoders(self, parts: Parts) -> TextEncoders:
        if self.text_encoder_2 is None:
            return TextEncoders([Encoder(self.text_encoder, parts.tokenizer)], spelled=parts.spelled)
        return TextEncoders([Encoder(self.text_encoder, parts.tokenizer, penultimate=True),
                             Encoder(self.text_encoder_2, parts.tokenizer_2, penultimate=True)],
                            zero_empty_negative=parts.zero_empty_negative, spelled=parts.spelled)

    @classmethod
    def load(cls, sources: PriorSources, process: Process, loras: Sequence[LoraFile] = (),
             embeddings: Sequence[EmbeddingFile] = (), *, device: str = "auto", **options: Any) -> Self:
        """From complete files (see `load_prior`). Raises ModelError."""
        where, chosen = choose_device(device), Options(**options)
        if chosen.attention not in ATTENTIONS:
            raise ModelError(f"attention '{chosen.attention}' is unknown; choose one of {', '.join(ATTENTIONS)}")
        for name, said in (("dtype", chosen.dtype), ("vae_dtype", chosen.vae_dtype)):
            if said != "auto" and said not in DTYPES:
                raise ModelError(f"{name} '{said}' is unknown; choose auto or one of {', '.join(DTYPES)}")
        try:
            with quiet_libraries():
                parts = _parts(sources, number_of(chosen.dtype, where), loras, embeddings)
            prior = cls(parts, where, process, chosen, Source(sources, tuple(loras)))
        except _UNLOADABLE as error:
            raise ModelError(f"{sources.folder} cannot be loaded: {error}. Fetch or save the model again") from error
        for model in (prior.unet, prior.vae):
            _set_up(model, chosen, where)
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
        parts = self.parts
        if facts.has_tokens:
            for end, rows_NE in zip(("", "_2"), load_tokens(folder), strict=False):
                tokenizer = copy.deepcopy(getattr(parts, f"tokenizer{end}"))
                first = add_class_tokens(tokenizer, len(facts.classes))
                text_encoder = with_rows(getattr(parts, f"text_encoder{end}"), tokenizer, first, rows_NE,
                                         f"adapter {folder}")
                parts = replace(parts, **{f"text_encoder{end}": text_encoder, f"tokenizer{end}": tokenizer})
        if facts.has_lora:
            parts = replace(parts, unet=self._unet_with_lora(folder, facts, scale, fuse))
        return StableDiffusionPrior(parts, self.device, self.process, self.options, self.source, facts)

    def _check_adapter(self, folder: Path | str, facts: AdapterFacts, base_sha256: str | None) -> None:
        if self.adapter is not None:
            raise ModelError(f"adapter {folder}: this model has an adapter already; load the base model again")
        if base_sha256 not in (None, facts.base_sha256):
            raise ModelError(f"adapter {folder} was trained on base model {facts.base_sha256[:12]}, but prior.weights "
                             f"is model {str(base_sha256)[:12]}, whose weights it does not fit; name the base model in "
                             "prior.weights, or fine-tune this one with `rayexpand fit`")
        here = (self.scheduler.config.prediction_type, tuple(len(one.tokenizer) for one in self.texts.encoders))
        if here != (there := (facts.prediction_type, facts.words)):
            raise ModelError(f"adapter {folder} was trained on a model that predicts {there[0]} and has "
                             f"{' and '.join(map(str, there[1]))} words, this one predicts {here[0]} and has "
                             f"{' and '.join(map(str, here[1]))}; name its base model in prior.weights")

    def _unet_with_lora(self, folder: Path | str, facts: AdapterFacts, scale: float,
                        fuse: bool) -> UNet2DConditionModel:
        """A second UNet, in float32 until the LoRA is in it."""
        assert self.source is not None, "only a prior that was loaded from a folder takes a LoRA"
        state = load_lora(folder)
        files, loras = self.source.files, self.source.loras
        unet = _models(files, torch.float32, loras)["unet"] if loras else load_part(
            files.part("unet"), files.classes()["unet"], torch.float32)
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
        _set_up(unet, self.options, self.device)
        return unet

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of one image of height x width pixels."""
        return self.vae.config.latent_channels, height // self.vae_factor, width // self.vae_factor

    def schedule(self, solver: Solver, steps: int, run: int | None = None, spacing: Spacing | None = None,
                 latent: Sequence[int] | None = None) -> Schedule:
        """`steps` steps over the noise process of the weights, of which the last `run` are executed (None: all)."""
        return schedule_of(self.process, solver, steps, run, spacing, latent)

    def embed(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float | Sequence[float]) -> TextCond:
        """Hidden states of B prompts and B negatives, with the scale of guidance of all rows, or of each."""
        return self.texts.cond(prompts, negatives, guidance)

    def predict(self, z_BCHW: torch.Tensor, at: Point, cond: TextCond) -> Prediction:
        """The clean latent and the noise (B, C, H, W) that the network sees at a point, in the dtype of z_BCHW.

        Classifier-free guidance (Ho and Salimans 2022, in the form uncond + scale * (cond - uncond)) runs as one
        doubled batch; where the scale of all rows is 1 the unconditional half is left out. A distilled network may have
        the scale as an input, or take none.
        """
        guided = self.guidance == "cfg" and bool((cond.guidance_B != 1).any())
        texts, pooled = cond.tokens_BTE, cond.pooled_BP
        if guided:
            texts = torch.cat([cond.negative_tokens_BTE, texts])
            if pooled is not None and cond.negative_pooled_BP is not None:
                pooled = torch.cat([cond.negative_pooled_BP, pooled])
        out = self._network(torch.cat([z_BCHW, z_BCHW]) if guided else z_BCHW, at, texts, pooled, cond.guidance_B)
        out = out.to(z_BCHW.dtype)
        if guided:
            uncond, conditional = out.chunk(2)
            out = uncond + cond.guidance_B.to(out)[:, None, None, None] * (conditional - uncond)
        return prediction(self.process.kind, out, z_BCHW, at)

    def _network(self, z_in: torch.Tensor, at: Point, texts: torch.Tensor, pooled: torch.Tensor | None,
                 guidance_B: torch.Tensor) -> torch.Tensor:
        rows, _, height, width = z_in.shape
        more: dict[str, Any] = {}
        if pooled is not None:
            more |= self._beside(pooled, height * self.vae_factor, width * self.vae_factor)
        if self.guidance == "embedded":
            more["timestep_cond"] = _sinusoids(guidance_B - 1, int(self._time_cond)).to(self.device, self.dtype)
        t_B = torch.full((rows,), at.label, dtype=torch.float32, device=self.device)
        return self.unet(z_in.to(self.dtype), t_B, encoder_hidden_states=texts, return_dict=False, **more)[0]

    def _beside(self, pooled_BP: torch.Tensor, height: int, width: int) -> dict[str, Any]:
        """What the network is told beside hidden states: here what Stable Diffusion XL is told."""
        return {"added_cond_kwargs": added_condition(pooled_BP, height, width)}

    def encode(self, x_BCHW: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] to float32 latents of about unit variance: the posterior mean, plus `noise`
        standard deviations where noise of the latent's shape is given."""
        posterior = self.vae.encode(x_BCHW.to(self.device, torch.float32) * 2 - 1).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return (z - self._mean_1C11) * self._std_1C11

    def posterior(self, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents that `encode` gives, float32."""
        found = self.vae.encode(x_BCHW.to(self.device, torch.float32) * 2 - 1).latent_dist
        return (found.mean - self._mean_1C11) * self._std_1C11, found.std * self._std_1C11

    def decode(self, z: torch.Tensor, cond: Any = None) -> torch.Tensor:
        """Latents to float32 images (B, 3, H, W), about [0, 1], unclamped. `cond` is not used."""
        z = z.to(self.device, torch.float32) / self._std_1C11 + self._mean_1C11
        return self.vae.decode(z.to(_decoder_dtype(self.vae)), return_dict=False)[0].float() / 2 + 0.5


def _moments(config: Any, sigma_data: float, device: torch.device) -> tuple[Any, Any]:
    """What is taken off a raw latent, and what it is then multiplied with, so that it has unit variance; numbers, or
    tensors (1, C, 1, 1) where channels differ."""
    scale = config.scaling_factor / sigma_data if sigma_data != 1 else config.scaling_factor
    if config.get("latents_mean") is None:
        return config.get("shift_factor") or 0.0, scale
    mean, std = (torch.tensor(config[name], device=device).view(1, -1, 1, 1) for name in ("latents_mean",
                                                                                          "latents_std"))
    return mean, scale / std


def _sinusoids(w_B: torch.Tensor, width: int) -> torch.Tensor:
    """(B, width) embedding of a guidance scale less one, in thousandths (Luo et al., "Latent Consistency Models")."""
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000 * w_B[:, None] * rates
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def number_of(said: str, where: torch.device) -> torch.dtype:
    """The dtype that a configuration says; auto is bfloat16 on a GPU."""
    return DTYPES.get(said, torch.bfloat16 if where.type == "cuda" else torch.float32)


def _decoder_dtype(vae: AutoencoderKL) -> torch.dtype:
    return next(vae.decoder.parameters()).dtype


def _models(sources: PriorSources, dtype: torch.dtype, loras: Sequence[LoraFile]) -> dict[str, Any]:
    """UNet, autoencoder (in float32) and text encoders. LoRAs are added in float32 before the weights are cast."""
    found = {part: load_part(sources.part(part), kind, torch.float32 if part == "vae" or loras else dtype)
             for part, kind in sources.classes().items()}
    if loras:
        networks = {part: model for part, model in found.items() if part != "vae"}
        merge(networks, loras)
        for model in networks.values():
            torch.nn.Module.to(model, dtype)
    return found


def _parts(sources: PriorSources, dtype: torch.dtype, loras: Sequence[LoraFile],
           embeddings: Sequence[EmbeddingFile]) -> Parts:
    import diffusers
    from transformers import CLIPTokenizer

    folder = sources.folder
    index = read_json(folder / "model_index.json")
    has_two = bool((index.get("text_encoder_2") or [None])[0])
    local: dict[str, Any] = {"pretrained_model_name_or_path": folder, "local_files_only": True}
    models = _models(sources, dtype, loras)
    tokenizers = {name: CLIPTokenizer.from_pretrained(**local, subfolder=name)
                  for name in ("tokenizer", *(["tokenizer_2"] if has_two else []))}
    name = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)["_class_name"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"scheduler/scheduler_config.json names {name}, which this diffusers does not have")
    if embeddings:
        made = add_embeddings({part: (tokenizers[part.replace("text_encoder", "tokenizer")], models[part])
                               for part in models if part.startswith("text_encoder")}, embeddings)
        for part, (tokenizer, encoder) in made.items():
            tokenizers[part.replace("text_encoder", "tokenizer")], models[part] = tokenizer, encoder
    return Parts(**models, **tokenizers, scheduler=kind.from_pretrained(**local, subfolder="scheduler"),
                 zero_empty_negative=has_two and index.get("force_zeros_for_empty_prompt", True),
                 spelled=partial(expand_prompt, counts=token_counts(embeddings)))


def _set_up(model: Any, options: Options, where: torch.device) -> None:
    """Attention, memory format, precision of the decoder and (of the UNet) compilation as the configuration says; auto
    is what pays on the device."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    on_gpu, is_unet = where.type == "cuda", isinstance(model, UNet2DConditionModel)
    if options.attention != "auto":
        model.set_attn_processor(AttnProcessor2_0() if options.attention == "sdpa" else AttnProcessor())
    if not is_unet:
        number = number_of(options.vae_dtype, where)
        if number is torch.float16 and model.config.get("force_upcast", True):
            raise ModelError("prior.vae_dtype: float16 overflows in this autoencoder (force_upcast in "
                             "vae/config.json); use bfloat16, or name an autoencoder in prior.vae that is safe in "
                             "float16")
        for part in (model.decoder, model.post_quant_conv):
            if part is not None:
                part.to(number)
    if options.channels_last is True or (options.channels_last == "auto" and on_gpu):
        model.to(memory_format=torch.channels_last)
    if is_unet and _repeats_blocks(model) and (
            options.compile is True or (options.compile == "auto" and on_gpu and can_compile())):
        model.compile_repeated_blocks()


def _repeats_blocks(model: Any) -> bool:
    """Whether there is something to compile: a network without attention has none of the blocks that repeat."""
    return any(type(module).__name__ in model._repeated_blocks for module in model.modules())


@cache
def can_compile() -> bool:
    """Whether torch.compile finds the compilers it calls; warns once where it does not."""
    from importlib.util import find_spec

    if find_spec("triton") and any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        return True
    log.warning("prior.compile: auto leaves the network as it is, because this machine has no triton or no C compiler")
    return False


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
