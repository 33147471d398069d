"""Fine-tuning a latent diffusion model step by step: class tokens, LoRA, or every weight of UNet and text encoders.

A worker hands in its slice of the global batch with everything random decided (`draw_visit`); the step draws nothing.
Like slices on R workers under DDP, or the whole batch on one: the same weights, but for the order of additions.

    paper symbol     name here            meaning, unit
    z_0              z0_BCHW              latents, already times the autoencoder's scaling factor
    eps              noise_BCHW           standard normal noise (plus noise_offset's)
    t                t_B                  timestep, 0 to 999 in Stable Diffusion
    a_r              share                R n_r / N of n_r rows here and N on R workers
    V                rows_NE              rows of the class tokens `<class_0>` .. `<class_{N-1}>`, fp32
    A, B             lora_A, lora_B       of the low-rank updates, fp32
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rayexpand.contract.class_tokens import add_class_tokens
from rayexpand.contract.errors import ConfigError, Diverged, ModelError
from rayexpand.fitting.adapter.denoiser import Denoiser, Labels, add_lora, init_token_id, insert_rows
from rayexpand.fitting.adapter.objective import Reduce, all_reduce, l_simple, min_snr, mmd, noised
from rayexpand.fitting.adapter.recipe import PRESETS, FinetuneConfig, make_finetune
from rayexpand.fitting.adapter.training_draw import TrainingDraw, draw_visit
from rayexpand.models.texts import TextEncoders

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["PRESETS", "FinetuneConfig", "Finetuner", "LatentBatch", "Losses", "TrainingDraw", "draw_visit",
           "make_finetune"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

log = logging.getLogger(__name__)


class LatentBatch(NamedTuple):
    """One worker's rows of the global batch of one step, in the order of the batch (worker r of R holds the r-th of R
    runs of rows). B is a multiple of `accumulate`; everything is decided by the caller, nothing is drawn here."""

    z0_BCHW: Tensor  # float32 clean latents, already times the autoencoder's scaling factor
    noise_BCHW: Tensor  # float32; holds the noise offset, if any
    t_B: Tensor  # int64 timesteps, 0 to num_train_timesteps - 1
    text: Tensor | Sequence[str]  # B prompts, or their int64 ids as `Finetuner.ids` makes them
    # float32 image features as wide as the hidden states, or what a decoder of embeddings is told; None: neither
    visual_BD: Tensor | None = None
    dropped_B: Tensor | None = None  # bool: these rows get the empty text and no visual token; None: none of them
    share: float = 1.0  # R B / N of N rows over R workers: 1 where all slices have the same size


class Losses(NamedTuple):
    """Of the last step, over this worker's rows (mmd: over its scope; 0 where it is off)."""

    total: float
    simple: float
    mmd: float
    grad_norm: float  # of all that trains, over all workers' rows, before clipping


class AdapterTensors(NamedTuple):
    """What an adapter holds, float32 on the CPU; None for what is not trained."""

    lora: dict[str, Tensor] | None
    tokens_NE: Tensor | None
    tokens_2_NE: Tensor | None  # of the second text encoder


class Finetuner:
    """A generator in training, its optimiser and the number of the next step.

    Takes over `unet` and the encoders of `texts`: they are frozen, moved to `device` and `precision`, and LoRA and
    class tokens are put into them; tokenizers get the class tokens. `vae_factor`: image pixels per latent pixel, for
    networks that read the size of an image. `wrap` takes the one module on its device and returns what is called in
    training (DDP goes here); `world` is the number of workers, `reduce` adds a tensor up over them. Initial weights
    depend on `seed` only. `labels` is that of a decoder of image embeddings (see Denoiser), whose text is always empty:
    of it the UNet trains and nothing else. Raises ModelError where the models cannot be trained so, ConfigError for the
    rest.
    """

    def __init__(self, unet: UNet2DConditionModel, texts: TextEncoders, scheduler: Any, config: FinetuneConfig,
                 n_classes: int, seed: int, *, vae_factor: int = 8, device: str | torch.device = "cpu",
                 wrap: Callable[[nn.Module], nn.Module] = lambda module: module, world: int = 1,
                 reduce: Reduce = all_reduce, labels: Labels | None = None) -> None:
        self.config, self.device, self.world, self.step = config, torch.device(device), world, 0
        if config.precision == "fp16" and self.device.type != "cuda":
            raise ConfigError("finetune", [f"precision: fp16 needs CUDA and its loss scaling; on {self.device} take "
                                           "bf16 or fp32"])
        self.unet, self.encoders, self._told = unet, texts.encoders, labels is not None
        self._said_cut = False
        self.prediction, self._abar = _noise_schedule(scheduler, self.device)
        self._reduce = reduce if world > 1 else None
        self.words = tuple(len(one.tokenizer) for one in texts.encoders)  # so the id of <class_0> in each
        self.init_token: int | None = None  # id whose row every class token of the first encoder started as
        self._prepare(n_classes, seed)
        self.module = Denoiser(unet, texts, vae_factor, labels)
        self.module.to(self.device).eval()
        self._wrapped = wrap(self.module)
        self.trainable = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._tokens, self._weights = (
            {name: p for name, p in self.trainable.items() if name.endswith("rows_NE") == of_tokens}
            for of_tokens in (True, False))
        self.optimiser = self._make_optimiser()
        self._scaler = torch.amp.GradScaler("cuda", enabled=config.precision == "fp16")
        self._empty = self.ids([""])
        self.losses = Losses(math.nan, math.nan, math.nan, math.nan)

    def _prepare(self, n_classes: int, seed: int) -> None:
        """Freezes, casts, and puts in what trains."""
        config = self.config
        full = config.strategy == "full"
        for model in (self.unet, *(one.model for one in self.encoders)):
            model.requires_grad_(full and (model is self.unet or not self._told))
            for parameter in model.parameters():  # norms stay in fp32: CPUs cannot mix the other way round
                small = not full and parameter.ndim > 1
                parameter.data = parameter.data.to(DTYPES[config.precision] if small else torch.float32)
        if config.has_tokens:
            starts = [init_token_id(config, one.tokenizer) for one in self.encoders]
            self.init_token = starts[0]
            for one, start in zip(self.encoders, starts, strict=True):
                insert_rows(one, add_class_tokens(one.tokenizer, n_classes), n_classes, start)
        if config.has_lora:
            add_lora(self.unet, config, seed)

    def _make_optimiser(self) -> torch.optim.Optimizer:
        config = self.config
        groups: list[dict[str, Any]] = [{"params": list(self._weights.values()), "lr": config.lr},
                                        {"params": list(self._tokens.values()), "lr": config.token_lr}]
        return torch.optim.AdamW([group for group in groups if group["params"]], betas=config.betas, eps=config.eps,
                                 weight_decay=config.weight_decay, fused=True)

    def update(self, batch: LatentBatch) -> float:
        """One optimiser step; the loss of these rows. Raises Diverged where it or the gradient is not finite; in
        fp16 a gradient that is not costs the step, and GradScaler lowers its scale."""
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)  # a sampler built on the same parts has frozen them
        self.optimiser.zero_grad(set_to_none=True)
        sums_3 = torch.zeros(3, device=self.device)
        pieces = list(self._pieces(batch))
        for i, piece in enumerate(pieces):
            with self._without_sync(i + 1 < len(pieces)):
                parts = self._loss(piece)
                self._scaler.scale(parts[0] / len(pieces)).backward()
            sums_3 += torch.stack(parts).detach() / len(pieces)
        self._scaler.unscale_(self.optimiser)
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
        self._clip()
        self._scaler.step(self.optimiser)
        self._scaler.update()
        self.losses = Losses(*torch.cat([sums_3, grad_norm[None].float()]).tolist())  # last: a GPU waits here
        self._refuse_divergence()
        self.step += 1
        return self.losses.total

    def _refuse_divergence(self) -> None:
        losses, where = self.losses, f"at step {self.step} of {self.config.steps}"
        numbers = {"the loss": losses.total}
        if not self._scaler.is_enabled():
            numbers["the gradient's norm"] = losses.grad_norm
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise Diverged(f"fine-tuning diverged: {name} is {value} {where}. Lower lr and token_lr, or take "
                               "another precision")

    def _pieces(self, batch: LatentBatch) -> Iterator[LatentBatch]:
        """The batch on the device with ids for text, in `accumulate` equal parts."""
        rows, parts = len(batch.z0_BCHW), self.config.accumulate
        assert rows, "a worker has no rows"
        assert rows % parts == 0, f"{rows} rows cannot be computed in {parts} equal parts"
        assert (batch.visual_BD is not None) == (self.config.has_visual or self._told), "visual_token and visual_BD"
        ids = batch.text if isinstance(batch.text, Tensor) else self.ids(batch.text)
        if batch.dropped_B is not None:
            dropped = batch.dropped_B.view(-1, *[1] * (ids.ndim - 1)).to(ids.device)
            ids = torch.where(dropped, self._empty.to(ids.device), ids)
        whole = batch._replace(text=ids)
        for start in range(0, rows, rows // parts):
            cut: dict[str, Any] = {name: x[start:start + rows // parts].to(self.device, non_blocking=True)
                                   for name, x in whole._asdict().items() if isinstance(x, Tensor)}
            yield whole._replace(**cut)

    def _loss(self, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Total, L_simple and L_MMD of a part of the batch; the average over workers is that of all their rows."""
        config, share = self.config, batch.share
        abar_B = self._abar[batch.t_B]
        z_t, target = noised(batch.z0_BCHW, batch.noise_BCHW, abar_B, self.prediction)
        shown_B = None if batch.dropped_B is None else ~batch.dropped_B
        with torch.autocast(self.device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
            out = self._wrapped(z_t, batch.t_B, batch.text, batch.visual_BD, shown_B)
        e_BCHW = target - out.float()
        w_B = min_snr(abar_B, config.snr_gamma, self.prediction)
        simple = share * l_simple(e_BCHW, w_B)
        if not config.mmd_gamma:
            return simple, simple, torch.zeros_like(simple)
        term = mmd(e_BCHW, w_B if config.mmd_weighting == "min_snr" else None, reduction=config.mmd_reduction,
                   scope=config.mmd_scope, images=config.mmd_images, world=self.world, share=share, reduce=self._reduce)
        return simple + config.mmd_gamma * term, simple, term

    def _clip(self) -> None:
        """The gradient's norm over LoRA (or, with full, all weights); that of tokens stays as it is."""
        if self.config.clip is not None and self._weights:
            nn.utils.clip_grad_norm_(self._weights.values(), self.config.clip)

    def _without_sync(self, more: bool) -> AbstractContextManager[None]:
        """DDP averages over workers once per step, with the last part."""
        no_sync: Any = getattr(self._wrapped, "no_sync", nullcontext)
        return no_sync() if more else nullcontext()

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """int64 ids of prompts (B, T), for two tokenizers (B, 2, T), padded and truncated to the model's length; the
        first longer one is logged."""
        found = [one.tokenizer(list(prompts), padding="max_length", max_length=one.tokenizer.model_max_length,
                               truncation=True, return_tensors="pt").input_ids for one in self.encoders]
        self._say_cut(prompts)
        return found[0] if len(found) == 1 else torch.stack(found, dim=1)

    def _say_cut(self, prompts: Sequence[str]) -> None:
        tokenizer = self.encoders[0].tokenizer
        longest = tokenizer.model_max_length
        for prompt in set(prompts):
            if (not self._said_cut and len(prompt.encode()) + 2 > longest
                    and len(tokenizer(prompt, verbose=False).input_ids) > longest):
                self._said_cut = True
                log.warning("of some training texts only the first %d tokens are read, such as %r", longest, prompt)

    def trained(self) -> AdapterTensors:
        """Copies of what has been trained: LoRA in the layout of diffusers' `load_lora_weights`, B times alpha / r,
        since that layout has no scale; and the rows V of each text encoder."""
        lora = None
        rows = {name.partition(".")[0]: rows_NE.detach().to("cpu", copy=True) for name, rows_NE in self._tokens.items()}
        if self.config.has_lora:
            from peft import get_peft_model_state_dict

            scale = self.config.scale
            lora = {f"unet.{name}": (weight.detach() * (scale if "lora_B" in name else 1)).cpu().contiguous()
                    for name, weight in get_peft_model_state_dict(self.unet).items()}
        return AdapterTensors(lora, rows.get("text_encoder"), rows.get("text_encoder_2"))

    def state(self) -> dict[str, Tensor]:
        """Copy on the CPU of everything that changes, flat and without shared memory, as safetensors wants it."""
        found = {"step": torch.tensor(self.step)}
        for name, parameter in self.trainable.items():
            found[f"weights.{name}"] = parameter
            for key, value in self.optimiser.state[parameter].items():
                found[f"adam.{key}.{name}"] = value
        for key, value in self._scaler.state_dict().items():
            found[f"scaler.{key}"] = torch.tensor(value)
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continues from `state()`, bit for bit on the CPU. Raises ModelError for the state of another training."""
        shapes = {f"weights.{name}": tuple(p.shape) for name, p in self.trainable.items()}
        found = {name: tuple(value.shape) for name, value in state.items() if name.startswith("weights.")}
        if "step" not in state or shapes != found:
            odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
            raise ModelError(f"this checkpoint belongs to another training: {len(odd)} of its weights differ, such as "
                             f"{odd[0] if odd else 'step'}. Start anew, or with the model and settings it is of")
        self.step = int(state["step"])
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state[f"weights.{name}"])
        moments = [{key: state[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{key}.{name}" in state} for name in (*self._weights, *self._tokens)]
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": {
            i: {key: value.clone() for key, value in found.items()} for i, found in enumerate(moments) if found}})
        self._scaler.load_state_dict({key.removeprefix("scaler."): value.item() for key, value in state.items()
                                      if key.startswith("scaler.")})


def _noise_schedule(scheduler: Any, device: torch.device) -> tuple[str, Tensor]:
    """prediction type, and abar of every timestep."""
    prediction = scheduler.config.get("prediction_type", "epsilon")
    abar_T = getattr(scheduler, "alphas_cumprod", None)
    if prediction not in ("epsilon", "v_prediction") or abar_T is None:
        raise ModelError(f"a generator with {type(scheduler).__name__} and prediction_type {prediction!r} cannot be "
                         "fine-tuned; it takes one with alphas_cumprod that predicts epsilon or v_prediction")
    return prediction, abar_T.to(device, torch.float32)
