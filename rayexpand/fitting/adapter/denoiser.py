"""A generator as one trainable module: text encoders with the class tokens' own rows, UNet with LoRA.

With N class tokens a text encoder reads `where(id >= first, V[id - first], E[id])`: V is a parameter and the only
thing of the text that trains, which equals training the whole table and restoring the old rows after each step
(Diff-Mix's code). Where there are two text encoders (Stable Diffusion XL) each has a V of its own for the same words.

    paper symbol     name here            meaning, unit
    z_t              z_t                  latents (B, C, H, W) noised to timestep t
    V                rows_NE              rows of the class tokens `<class_0>` .. `<class_{N-1}>`, fp32
    E                table                the vocabulary's rows, frozen
    A, B, r          lora_A, lora_B       W + alpha / r B A; A normal with standard deviation 1 / r, B zero
    v                visual_BD            image feature that replaces the hidden state of the last text slot
    c                States.tokens        hidden states (B, T, E) of the text encoders, side by side
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the customary name)

from rayexpand.contract.errors import ConfigError, ModelError
from rayexpand.contract.rng import generator, row_key
from rayexpand.fitting.adapter.recipe import TARGETS, FinetuneConfig
from rayexpand.models.embeddings import pool_at_end_of_text
from rayexpand.models.texts import Encoder, States, TextEncoders, added_condition, joined

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTokenizer


Labels = Callable[[Tensor], Tensor]  # what a feed tells of images (B, 2 D + 1) to what a UNet is told (B, 2 D)


class Denoiser(nn.Module):
    """Text encoders and UNet as one module, so that DDP around it averages the gradients of all.

    Where no text means zeros to the sampler (`zero_empty_negative`), rows whose text is dropped read zeros too.
    `labels`, of a decoder of image embeddings, makes what the UNet is told of images (`draw_told`); where that is
    dropped it is zeros.
    """

    def __init__(self, unet: UNet2DConditionModel, texts: TextEncoders, vae_factor: int,
                 labels: Labels | None = None) -> None:
        super().__init__()
        self._labels = labels
        self.unet, self._texts, self._vae_factor = unet, texts, vae_factor
        self.text_encoder = texts.encoders[0].model
        if len(texts.encoders) > 1:
            self.text_encoder_2 = texts.encoders[1].model
        self._text_trains = any(p.requires_grad for one in texts.encoders for p in one.model.parameters())

    def forward(self, z_t: Tensor, t_B: Tensor, ids: Tensor, visual_BD: Tensor | None = None,
                shown_B: Tensor | None = None) -> Tensor:
        """Prediction (B, C, H, W) for noised latents. `visual_BD` replaces the last slot of the text; rows that are not
        in `shown_B`, where that is given, have neither text nor visual token."""
        text_BTE, pooled_BP = self.text(ids)
        if shown_B is not None and self._texts.zero_empty_negative:
            text_BTE = torch.where(shown_B[:, None, None], text_BTE, 0)
            pooled_BP = None if pooled_BP is None else torch.where(shown_B[:, None], pooled_BP, 0)
        more: dict[str, Any] = {}
        if visual_BD is not None and self._labels is not None:
            labels_BP = self._labels(visual_BD)
            more["class_labels"] = labels_BP if shown_B is None else labels_BP * shown_B[:, None]
        elif visual_BD is not None:
            if visual_BD.shape[1] != text_BTE.shape[2]:
                raise ModelError(f"the visual token has {visual_BD.shape[1]} numbers and the text's hidden states "
                                 f"{text_BTE.shape[2]}. Take features of a guide whose width is the text encoder's")
            last_BD = visual_BD.to(text_BTE.dtype)
            if shown_B is not None:
                last_BD = torch.where(shown_B[:, None], last_BD, text_BTE[:, -1])
            text_BTE = torch.cat([text_BTE[:, :-1], last_BD[:, None]], dim=1)
        if pooled_BP is not None:
            height, width = (side * self._vae_factor for side in z_t.shape[-2:])
            more["added_cond_kwargs"] = added_condition(pooled_BP, height, width)
        return self.unet(z_t, t_B, encoder_hidden_states=text_BTE, return_dict=False, **more)[0]

    def text(self, ids: Tensor) -> States:
        """What the text encoders say of ids (B, T), or of the ids of each of two (B, 2, T); no graph where nothing of
        the text trains."""
        encoders = self._texts.encoders
        with nullcontext() if self._text_trains else torch.no_grad():
            return joined([one.states(ids_BT, _mask(one, ids_BT)) for one, ids_BT in zip(
                encoders, ids.view(len(ids), len(encoders), -1).unbind(1), strict=True)])


def _mask(encoder: Encoder, ids_BT: Tensor) -> Tensor | None:
    """All tokens up to the first end of text, for encoders that want it."""
    if not encoder.masked:
        return None
    ends_BT = (ids_BT == encoder.tokenizer.eos_token_id).long()
    return (ends_BT.cumsum(1) - ends_BT == 0).long()


class ClassEmbedding(nn.Module):
    """A text encoder's embedding table with the rows of the class tokens behind it, as a parameter of their own."""

    def __init__(self, table: nn.Embedding, rows_NE: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.rows_NE = nn.Parameter(rows_NE)

    @property
    def weight(self) -> Tensor:  # libraries ask for its dtype and device
        return self.table.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        own_BT = ids_BT >= self.first
        own_BTE = F.embedding((ids_BT - self.first).clamp(min=0), self.rows_NE)
        return torch.where(own_BT[..., None], own_BTE, self.table(ids_BT.masked_fill(own_BT, 0)).to(own_BTE.dtype))


def add_lora(unet: UNet2DConditionModel, config: FinetuneConfig, seed: int) -> None:
    """Puts LoRA on the projections of `config.targets`: fp32, A normal with standard deviation 1 / rank drawn from
    `seed`, B zero. Everything else keeps its requires_grad."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):  # peft draws A from the global generator; it is drawn again below
        unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.alpha or config.rank, lora_dropout=0.0,
                                    init_lora_weights="gaussian", target_modules=list(TARGETS[config.targets])))
    rng = generator(row_key(seed, "finetune", "", 0, 0, "lora"))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_A" in name:
            drawn = rng.standard_normal(tuple(parameter.shape), np.float32) / config.rank
            parameter.data.copy_(torch.from_numpy(drawn))


def init_token_id(config: FinetuneConfig, tokenizer: CLIPTokenizer) -> int | None:
    """Id of the token the class tokens start from; None for the mean of all. Raises ConfigError for one that is not
    in the vocabulary."""
    token = config.init_token
    if token is None:
        return None
    if isinstance(token, str):
        pieces = tokenizer(token, add_special_tokens=False).input_ids
        if len(pieces) == 1:
            return int(pieces[0])
        problem = f"{token!r} is {len(pieces)} tokens in this vocabulary; name a word that is one, or its id"
    elif 0 <= token < len(tokenizer):
        return token
    else:
        problem = (f"id {token} is not in this vocabulary of {len(tokenizer)} tokens; name an id or a word of it "
                   "(42170 is for Stable Diffusion 1.x)")
    raise ConfigError("finetune", [f"init_token: {problem}"])


def insert_rows(encoder: Encoder, first: int, n_classes: int, init: int | None) -> None:
    """Rows of the class tokens behind the vocabulary of a text encoder, wherever this transformers keeps its table."""
    table = encoder.model.get_input_embeddings()
    if len(table.weight) < first:
        raise ModelError(f"the text encoder has {len(table.weight)} rows and the tokenizer {first} tokens; they do not "
                         "belong together. Fetch or save the model again")
    row_E = table.weight.detach().float().mean(0) if init is None else table.weight[init].detach().float()
    encoder.model.set_input_embeddings(ClassEmbedding(table, row_E.repeat(n_classes, 1), first))
    pool_at_end_of_text(encoder.model, encoder.tokenizer)
