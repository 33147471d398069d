"""Textual inversion embeddings that people bring: which tokens they add, and how prompts name them.

    {token: (E,) or (n, E)}            diffusers
    {"emb_params": (n, E)}             the web interfaces; the token is given in the configuration
    {"clip_l": (n, E), "clip_g": ...}  SDXL, one table for each text encoder

A token of n vectors is n words `<t>`, `<t>_1`, ..., `<t>_{n-1}`, so a prompt that has `<t>` must get all of them:
`expand_prompt`. Nothing here imports torch.
"""

# E width of a text encoder's words, n vectors of one token

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from rayexpand.contract.errors import ModelError, few, looked_at
from rayexpand.contract.settings import Section
from rayexpand.models.folders import PICKLES, tensor_shapes, tensor_values

_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_NAMELESS = ("emb_params", *_PARTS)  # keys that are no token
_CLASS_TOKEN = re.compile(r"<class_\d+>")
_WORD_END = "</w>"  # of CLIP's vocabulary
_WIDTHS = {768: "Stable Diffusion 1.x, and the first encoder of SDXL", 1024: "Stable Diffusion 2.x",
           1280: "the second encoder of SDXL"}

Rows = dict[str, dict[str, np.ndarray]]  # part -> token -> float32 (n, E)


class EmbeddingFile(Section):
    """One textual inversion token that prompts may name."""

    file: str = Field(description="safetensors file of a textual inversion: {token: vectors}, emb_params, or clip_l "
                      "and clip_g (SDXL)")
    token: str | None = Field(None, description="how prompts name it; null: the name in the file, if it has one")


def embedding_problems(embeddings: Sequence[EmbeddingFile], widths: Mapping[str, int],
                       words: Collection[str]) -> list[str]:
    """What keeps these embeddings from being added to text encoders of these widths, one line each. `words`: all that
    the tokenizers know."""
    return embedding_rows(embeddings, widths, words)[1]


def embedding_rows(embeddings: Sequence[EmbeddingFile], widths: Mapping[str, int],
                   words: Collection[str]) -> tuple[Rows, list[str]]:
    """The vectors of each token for each text encoder, tokens in the order of the list; and the lines of
    `embedding_problems`, without which they count."""
    rows: Rows = {part: {} for part in widths}
    problems: list[str] = []
    for place, embedding in enumerate(embeddings):
        lines: list[str] = []
        try:
            token = _token(embedding)
            lines += _token_problems(token, words)
            for part, vectors_nE in _vectors(embedding, widths).items():
                if token in rows[part]:
                    lines.append(f"token {token} of {part} comes from an earlier entry already; give another token")
                rows[part][token] = vectors_nE
        except ModelError as error:
            lines.append(str(error))
        problems += [f"prior.embeddings.{place}: {embedding.file}: {line}" for line in lines]
    return rows, problems or _uneven(rows, words)


def embedding_hash(embedding: EmbeddingFile) -> str:
    """Content hash of its file. Raises ModelError."""
    with open(embedding_path(embedding), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def embedding_path(embedding: EmbeddingFile) -> Path:
    """Its file. Raises ModelError."""
    path = Path(embedding.file).expanduser()
    if path.suffix in PICKLES:
        raise ModelError("is a pickle, which can run code when opened; load it once where you trust it and save its "
                         f"vectors with safetensors.torch.save_file as {path.stem}.safetensors")
    if not path.is_file():
        raise ModelError(f"there is no such file{looked_at(embedding.file)}; give a safetensors file")
    return path


def token_counts(embeddings: Sequence[EmbeddingFile]) -> dict[str, int]:
    """How many vectors each token has, by headers alone. Raises ModelError."""
    return {_token(one): max(_table(shape)[0] for shape in tensor_shapes(embedding_path(one)).values())
            for one in embeddings}


def expand_prompt(text: str, counts: Mapping[str, int]) -> str:
    """The text with every vector of each token that it names. What it has written out already stays; case does not
    matter, as to the tokenizer."""
    written_out = {token: " ".join(token_words(token, n)) for token, n in counts.items()}
    words = {*written_out.values(), *(word for token, n in counts.items() for word in token_words(token, n))}
    if not words:
        return text
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.sub(pattern, lambda found: written_out.get(found[0].lower(), found[0]), text, flags=re.IGNORECASE)


def token_words(token: str, n: int) -> list[str]:
    """The words of a token with n vectors."""
    return [token, *(f"{token}_{i}" for i in range(1, n))]


def _token(embedding: EmbeddingFile) -> str:
    """In lower case, as CLIP's tokenizers read every text. Raises ModelError."""
    if embedding.token is not None:
        return embedding.token.lower()
    keys = list(tensor_shapes(embedding_path(embedding)))
    if len(keys) == 1 and keys[0] not in _NAMELESS:
        return keys[0].lower()
    raise ModelError(f"does not say the token of its vectors ({few(keys)}); set token of this entry, such as "
                     f"<{Path(embedding.file).stem.lower()}>")


def _token_problems(token: str, words: Collection[str]) -> list[str]:
    if not token or re.search(r"\s", token):
        return [f"token {token!r} is empty or has a space in it; set token to one word, such as <cat-toy>"]
    if token in words or token + _WORD_END in words:
        return [f"token {token} is a word of the tokenizer already, and prompts with that word would change; set "
                "token to a new word, such as <cat-toy>"]
    if _CLASS_TOKEN.match(token):
        return [f"token {token} is that of a class in a fine-tuned adapter; set token to another one"]
    return []


def _vectors(embedding: EmbeddingFile, widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Vectors (n, E) by part. Raises ModelError."""
    file = embedding_path(embedding)
    shapes = tensor_shapes(file)
    named = set(shapes) <= set(_PARTS)
    if not shapes or (len(shapes) > 1 and not named):
        raise ModelError(f"holds {few(list(shapes))}; a textual inversion has one token, or clip_l and clip_g")
    values = tensor_values(file, list(shapes))
    vectors: dict[str, np.ndarray] = {}
    for key, shape in shapes.items():
        part = _PARTS[key] if named else _part_of_width(key, shape, widths)
        if part not in widths:
            raise ModelError(f"{key} is for a second text encoder, as SDXL has, and this model has "
                             f"{' and '.join(widths)}; use an embedding that was trained for this model")
        if len(shape) not in (1, 2) or not all(shape) or shape[-1] != widths[part]:
            raise ModelError(_wrong_width(key, shape, widths))
        if not np.isfinite(values[key]).all():
            raise ModelError(f"{key} is not finite; its training diverged or the file is damaged, use another")
        vectors[part] = values[key].reshape(_table(shape))
    return vectors


def _part_of_width(key: str, shape: Sequence[int], widths: Mapping[str, int]) -> str:
    fitting = [part for part, width in widths.items() if shape and shape[-1] == width]
    if not fitting:
        raise ModelError(_wrong_width(key, shape, widths))
    if len(fitting) > 1:
        raise ModelError(f"{key} of width {shape[-1]} fits {' and '.join(fitting)}; name its tensors clip_l and "
                         "clip_g, one for each text encoder")
    return fitting[0]


def _wrong_width(key: str, shape: Sequence[int], widths: Mapping[str, int]) -> str:
    known = _WIDTHS.get(shape[-1]) if shape else None
    has = " and ".join(f"{part} {width}" for part, width in widths.items())
    return (f"{key} {list(shape)} does not fit words of width {has}: it was trained for another model"
            f"{f' ({known})' if known else ''}. Use one that was trained for this model")


def _table(shape: Sequence[int]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


def _uneven(rows: Rows, words: Collection[str]) -> list[str]:
    """Tokens that one text encoder would not know, that are longer for one than for another, or whose further words
    are those of others."""
    problems = []
    taken: dict[str, str] = {}
    for token in dict.fromkeys(token for own in rows.values() for token in own):
        counts = {part: len(own[token]) if token in own else 0 for part, own in rows.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{n} for {part}" for part, n in counts.items())
            problems.append(f"prior.embeddings: token {token} has {shown} vectors, and each text encoder needs as "
                            "many; add the file of the other one with the same token")
        for word in token_words(token, max(counts.values())):
            if word in taken or (word != token and word in words):
                problems.append(f"prior.embeddings: {word}, a vector of token {token}, is a word of "
                                f"{taken.get(word, 'the tokenizer')} too; set token to another word")
            taken[word] = f"token {token}"
    return problems
