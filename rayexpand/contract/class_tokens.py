"""The tokens that stand for classes in a fine-tuned generator's prompts.

    paper symbol     name here            meaning, unit
    [V_i]            class_token(i)       text of the token of the class with label i
    49,408           first id             id of `<class_0>`: the length of the tokenizer before any were added
    N                n                    number of classes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayexpand.contract.errors import ModelError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def class_token(label: int) -> str:
    """Text of the token of a class. By label and not by name: two ImageNet classes are called crane."""
    return f"<class_{label}>"


def add_class_tokens(tokenizer: CLIPTokenizer, n: int) -> int:
    """Adds `<class_0>` to `<class_{n-1}>` to `tokenizer`, in this order, and returns the id of the first; the others
    follow it one by one. Raises ModelError, with the tokenizer as it was, where one of them is in it already or the
    ids of its words leave gaps; and where the tokenizer took fewer than n."""
    assert n >= 1
    first, tokens = len(tokenizer), [class_token(label) for label in range(n)]
    known = tokenizer.get_vocab()
    if taken := [token for token in tokens if token in known]:
        raise ModelError(f"the tokenizer already holds {len(taken)} of {n} class tokens, such as {taken[0]}: it is of "
                         "a fine-tuned model. Start from the tokenizer of its base model")
    if max(known.values(), default=-1) != first - 1:
        raise ModelError(f"the tokenizer has {first} words but ids up to {max(known.values())}, so class tokens cannot "
                         "follow them. Save the tokenizer again with the ids of its words without gaps")
    added = tokenizer.add_tokens(tokens)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    if added != n or ids != list(range(first, first + n)):
        raise ModelError(f"the tokenizer took {added} of {n} class tokens from id {first} on; it cannot hold tokens "
                         f"like {tokens[0]}. Use a CLIP tokenizer as diffusers saves it")
    return first
