"""Words that are added to text encoders: class tokens of fine-tuned adapters, textual inversion tokens of files."""

# N new words, V known ones, E text embedding

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rayexpand.contract.errors import ModelError
from rayexpand.models.embedding_files import EmbeddingFile, embedding_rows, token_words

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

TextParts = Mapping[str, tuple["CLIPTokenizer", "CLIPTextModel"]]


def add_embeddings(parts: TextParts, embeddings: Sequence[EmbeddingFile]) -> TextParts:
    """Copies of all tokenizers and text encoders of a generator (text_encoder, text_encoder_2) that know the tokens of
    these files. Prompts must be expanded (`expand_prompt`). Raises ModelError with every reason not to."""
    widths = {part: encoder.get_input_embeddings().weight.shape[1] for part, (_, encoder) in parts.items()}
    words = {word for tokenizer, _ in parts.values() for word in tokenizer.get_vocab()}
    rows, problems = embedding_rows(embeddings, widths, words)
    if problems:
        raise ModelError("\n".join(problems))
    made = {}
    for part, (tokenizer, encoder) in parts.items():
        if not rows[part]:
            made[part] = (tokenizer, encoder)
            continue
        tokenizer = copy.deepcopy(tokenizer)
        names = [word for token, vectors_nE in rows[part].items() for word in token_words(token, len(vectors_nE))]
        first = len(tokenizer)
        tokenizer.add_tokens(names)
        if (ids := tokenizer.convert_tokens_to_ids(names)) != list(range(first, first + len(names))):
            raise ModelError(f"prior.embeddings: the tokenizer of {part} did not take the tokens {names} as new words "
                             f"from id {first} on, but as {ids}; set token to other words")
        rows_NE = torch.from_numpy(np.concatenate(list(rows[part].values())))
        made[part] = (tokenizer, with_rows(encoder, tokenizer, first, rows_NE, "prior.embeddings"))
    return made


def with_rows(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, first: int, rows_NE: torch.Tensor,
              origin: str) -> CLIPTextModel:
    """A copy of the text encoder whose table of words holds rows_NE from id `first` on. `origin`: whose rows these are,
    for messages. Raises ModelError where they have another width."""
    made = copy.deepcopy(text_encoder)
    table_VE = made.get_input_embeddings().weight
    (n, width), (size, own) = rows_NE.shape, table_VE.shape
    if width != own:
        raise ModelError(f"{origin} has tokens of width {width}, but this text encoder embeds words in {own}; "
                         "name its base model in prior.weights")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        made.resize_token_embeddings(max(size, first + n), mean_resizing=False)  # fills new rows with random numbers
        made.get_input_embeddings().weight[first:first + n] = rows_NE.to(table_VE)
    pool_at_end_of_text(made, tokenizer)
    return made


def pool_at_end_of_text(model: Any, tokenizer: CLIPTokenizer) -> None:
    """Makes a text encoder that gets new words pool where the text ends.

    With the eos_token_id 2 of the published configurations transformers pools at the largest id of a text. That is the
    end of text as long as no later word is known, and the slot of the first new word from then on.
    """
    for module in model.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id
