"""A generator as one trainable module: text encoder with the class tokens' own rows, UNet with LoRA.

With N class tokens the text encoder reads `where(id >= first, V[id - first], E[id])`: V is a parameter and the only
thing of the text that trains, which equals training the whole table and restoring the old rows after each step
(Diff-Mix's code).

    paper symbol     name here            meaning, unit
    z_t              z_t                  latents (B, C, H, W) noised to timestep t
    V                rows_NE              rows of the class tokens `<class_0>` .. `<class_{N-1}>`, fp32
    E                table                the vocabulary's rows, frozen
    A, B, r          lora_A, lora_B       W + alpha / r B A; A normal with standard deviation 1 / r, B zero
    v                visual_BD            image feature that replaces the hidden state of the last text slot
    c                text_BTE             hidden states of the text encoder
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the customary name)

from rayexpand.contract.errors import ConfigError, ModelError
from rayexpand.contract.rng import generator, row_key
from rayexpand.fitting.adapter.recipe import TARGETS, FinetuneConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, so that DDP around it averages the gradients of both."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, end_of_text: int) -> None:
        super().__init__()
        self.unet, self.text_encoder, self._end_of_text = unet, text_encoder, end_of_text
        self._masked = getattr(text_encoder.config, "use_attention_mask", False)  # Stable Diffusion reads its padding
        self._text_trains = any(p.requires_grad for p in text_encoder.parameters())

    def forward(self, z_t: Tensor, t_B: Tensor, ids_BT: Tensor, visual_BD: Tensor | None = None,
                shown_B: Tensor | None = None) -> Tensor:
        """Prediction (B, C, H, W) for noised latents. `visual_BD` replaces the last slot of the text, in the rows of
        `shown_B` where that is given."""
        text_BTE = self.text(ids_BT)
        if visual_BD is not None:
            if visual_BD.shape[1] != text_BTE.shape[2]:
                raise ModelError(f"the visual token has {visual_BD.shape[1]} numbers and the text's hidden states "
                                 f"{text_BTE.shape[2]}. Take features of a guide whose width is the text encoder's")
            last_BD = visual_BD.to(text_BTE.dtype)
            if shown_B is not None:
                last_BD = torch.where(shown_B[:, None], last_BD, text_BTE[:, -1])
            text_BTE = torch.cat([text_BTE[:, :-1], last_BD[:, None]], dim=1)
        return self.unet(z_t, t_B, encoder_hidden_states=text_BTE, return_dict=False)[0]

    def text(self, ids_BT: Tensor) -> Tensor:
        """Hidden states (B, T, E); no graph where nothing of the text trains."""
        mask_BT = None
        if self._masked:  # all tokens up to the first end of text
            ends_BT = (ids_BT == self._end_of_text).long()
            mask_BT = (ends_BT.cumsum(1) - ends_BT == 0).long()
        with nullcontext() if self._text_trains else torch.no_grad():
            return self.text_encoder(ids_BT, attention_mask=mask_BT, return_dict=True).last_hidden_state


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


def insert_rows(text_encoder: CLIPTextModel, first: int, n_classes: int, init: int | None) -> None:
    """Rows of the class tokens behind the vocabulary of `text_encoder`, wherever this transformers keeps its table."""
    table = text_encoder.get_input_embeddings()
    if len(table.weight) < first:
        raise ModelError(f"the text encoder has {len(table.weight)} rows and the tokenizer {first} tokens; they do not "
                         "belong together. Fetch or save the model again")
    row_E = table.weight.detach().float().mean(0) if init is None else table.weight[init].detach().float()
    text_encoder.set_input_embeddings(ClassEmbedding(table, row_E.repeat(n_classes, 1), first))
