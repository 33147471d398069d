"""Texts of a generator: what its one or two text encoders say of prompts, kept for the next call, and the condition
that a network gets of each row."""

# B rows, T tokens, E text embedding, P pooled embedding

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rayexpand.contract.errors import ModelError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CACHED_BYTES = 1 << 28  # of hidden states that are kept: 1,100 texts of Stable Diffusion 1.5 in bfloat16, 830 of XL


@dataclass(frozen=True, slots=True, eq=False)
class TextCond:
    """What the network is told of each row: hidden states of its prompt and of its negative, pooled embeddings where
    the family has them, and the scale of guidance. `cond[rows]` takes rows like a tensor, an int keeps its row."""

    tokens_BTE: torch.Tensor
    negative_tokens_BTE: torch.Tensor
    guidance_B: torch.Tensor  # float32, on the CPU
    pooled_BP: torch.Tensor | None = None
    negative_pooled_BP: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens_BTE)

    def __getitem__(self, rows: Any) -> TextCond:
        if isinstance(rows, int):
            rows = [rows]
        pooled, negative = (None if one is None else one[rows] for one in (self.pooled_BP, self.negative_pooled_BP))
        return TextCond(self.tokens_BTE[rows], self.negative_tokens_BTE[rows], self.guidance_B[rows], pooled, negative)

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
        return replace(self, tokens_BTE=tokens_BTE, negative_tokens_BTE=negative_tokens_BTE)


class Text(NamedTuple):
    """Of one text."""

    tokens_TE: torch.Tensor
    pooled_P: torch.Tensor | None

    @property
    def size(self) -> int:
        return sum(one.numel() * one.element_size() for one in self if one is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """One text encoder with its tokenizer."""

    model: Any  # CLIPTextModel or CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    penultimate: bool = False  # hidden states before the last layer and without the final norm, as SDXL

    def __call__(self, text: str) -> Text:
        longest, masked = self.tokenizer.model_max_length, getattr(self.model.config, "use_attention_mask", False)
        tokens = self.tokenizer(text, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        with torch.no_grad():
            out = self.model(tokens.input_ids.to(self.model.device), return_dict=True,
                             output_hidden_states=self.penultimate,
                             attention_mask=tokens.attention_mask.to(self.model.device) if masked else None)
        hidden = out.hidden_states[-2] if self.penultimate else out.last_hidden_state
        pooled = getattr(out, "text_embeds", None)
        return Text(hidden[0], None if pooled is None else pooled[0])


class TextEncoders:
    """The text encoders of a generator. Each text is encoded alone, so its row does not depend on its batch-mates, and
    the texts used last are kept, up to CACHED_BYTES."""

    def __init__(self, encoders: Sequence[Encoder], *, zero_empty_negative: bool = False,
                 spelled: Callable[[str], str] = str) -> None:
        """`zero_empty_negative`: no negative prompt is zeros and not the states of an empty text. `spelled` writes out
        words that are several vectors."""
        self.encoders, self.zero_empty_negative, self.spelled = tuple(encoders), zero_empty_negative, spelled
        self._kept: OrderedDict[str, Text] = OrderedDict()
        self._bytes = 0

    def cond(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float | Sequence[float]) -> TextCond:
        """Of B prompts and B negatives."""
        texts, others = [self.text(one) for one in prompts], [self._negative(one) for one in negatives]
        scales = [guidance] * len(texts) if isinstance(guidance, (int, float)) else list(guidance)
        return TextCond(torch.stack([one.tokens_TE for one in texts]), torch.stack([one.tokens_TE for one in others]),
                        torch.tensor(scales, dtype=torch.float32), _stacked([one.pooled_P for one in texts]),
                        _stacked([one.pooled_P for one in others]))

    def text(self, text: str) -> Text:
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        said = [encoder(self.spelled(text)) for encoder in self.encoders]
        made = Text(torch.cat([one.tokens_TE for one in said], dim=-1) if len(said) > 1 else said[0].tokens_TE,
                    said[-1].pooled_P)
        self._kept[text] = made
        self._bytes += made.size
        while self._bytes > CACHED_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].size
        return made

    def _negative(self, text: str) -> Text:
        made = self.text(text)
        if text or not self.zero_empty_negative:
            return made
        return Text(torch.zeros_like(made.tokens_TE),
                    None if made.pooled_P is None else torch.zeros_like(made.pooled_P))


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [one for one in rows if one is not None]
    return torch.stack(there) if there else None
