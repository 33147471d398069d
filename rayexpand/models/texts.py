"""Texts of a generator: what its one or two text encoders say of prompts, kept for the next call, and the condition
that a network gets of each row. Sampling and fine-tuning have it from here."""

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
                             "(ViT-L/14 with Stable Diffusion 1.x: 768; ViT-L/14 and ViT-bigG/14 side by side with XL: "
                             "2048). Make the features with another encoder")
        tokens_BTE, negative_tokens_BTE = self.tokens_BTE.clone(), self.negative_tokens_BTE
        tokens_BTE[:, -1] = v_BD.to(tokens_BTE)
        if both:
            negative_tokens_BTE = negative_tokens_BTE.clone()
            negative_tokens_BTE[:, -1] = v_BD.to(negative_tokens_BTE)
        return replace(self, tokens_BTE=tokens_BTE, negative_tokens_BTE=negative_tokens_BTE)


class States(NamedTuple):
    """What encoders say of one text, or of B texts with B in front: hidden states (T, E), and the pooled embedding (P,)
    where the last encoder has a projection."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None

    @property
    def size(self) -> int:
        return sum(one.numel() * one.element_size() for one in self if one is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """One text encoder with its tokenizer."""

    model: Any  # CLIPTextModel or CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    penultimate: bool = False  # hidden states before the last layer and without the final norm, as SDXL

    @property
    def masked(self) -> bool:
        """Whether the model does not read the padding; Stable Diffusion does."""
        return bool(getattr(self.model.config, "use_attention_mask", False))

    def __call__(self, text: str) -> States:
        longest = self.tokenizer.model_max_length
        tokens = self.tokenizer(text, padding="max_length", max_length=longest, truncation=True, return_tensors="pt")
        with torch.no_grad():
            made = self.states(tokens.input_ids.to(self.model.device),
                               tokens.attention_mask.to(self.model.device) if self.masked else None)
        return States(made.tokens[0], None if made.pooled is None else made.pooled[0])

    def states(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> States:
        """Of texts as ids, on the device of the model, with their graph."""
        out = self.model(ids_BT, return_dict=True, output_hidden_states=self.penultimate, attention_mask=mask_BT)
        return States(out.hidden_states[-2] if self.penultimate else out.last_hidden_state,
                      getattr(out, "text_embeds", None))


def joined(parts: Sequence[States]) -> States:
    """What several encoders say of the same texts, side by side; the pooled embedding is that of the last one."""
    if len(parts) == 1:
        return parts[0]
    return States(torch.cat([one.tokens for one in parts], dim=-1), parts[-1].pooled)


def added_condition(pooled_BP: torch.Tensor, height: int, width: int) -> dict[str, torch.Tensor]:
    """What the UNet of Stable Diffusion XL reads besides hidden states: the pooled text, and the sizes of an image of
    height x width pixels before and after cropping, with no corner cut off. Sizes stay in float32: in bfloat16 522
    pixels are 520."""
    size = [height, width]
    ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=pooled_BP.device)
    return {"text_embeds": pooled_BP, "time_ids": ids.expand(len(pooled_BP), 6)}


class TextEncoders:
    """The text encoders of a generator. Each text is encoded alone, so its row does not depend on its batch-mates, and
    the texts used last are kept, up to CACHED_BYTES."""

    def __init__(self, encoders: Sequence[Encoder], *, zero_empty_negative: bool = False,
                 spelled: Callable[[str], str] = str) -> None:
        """`zero_empty_negative`: no negative prompt is zeros and not the states of an empty text. `spelled` writes out
        words that are several vectors."""
        self.encoders, self.zero_empty_negative, self.spelled = tuple(encoders), zero_empty_negative, spelled
        self._kept: OrderedDict[str, States] = OrderedDict()
        self._bytes = 0

    def cond(self, prompts: Sequence[str], negatives: Sequence[str], guidance: float | Sequence[float]) -> TextCond:
        """Of B prompts and B negatives."""
        texts, others = [self.text(one) for one in prompts], [self._negative(one) for one in negatives]
        scales = [guidance] * len(texts) if isinstance(guidance, (int, float)) else list(guidance)
        return TextCond(torch.stack([one.tokens for one in texts]), torch.stack([one.tokens for one in others]),
                        torch.tensor(scales, dtype=torch.float32), _stacked([one.pooled for one in texts]),
                        _stacked([one.pooled for one in others]))

    def text(self, text: str) -> States:
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        made = joined([encoder(self.spelled(text)) for encoder in self.encoders])
        self._kept[text] = made
        self._bytes += made.size
        while self._bytes > CACHED_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].size
        return made

    def forget(self) -> None:
        """Texts are encoded anew, for encoders whose weights have changed."""
        self._kept.clear()
        self._bytes = 0

    def _negative(self, text: str) -> States:
        made = self.text(text)
        if text or not self.zero_empty_negative:
            return made
        return States(torch.zeros_like(made.tokens), None if made.pooled is None else torch.zeros_like(made.pooled))


def _stacked(rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [one for one in rows if one is not None]
    return torch.stack(there) if there else None
