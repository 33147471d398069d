"""Prompts that a generator's tokenizer cuts: counted before a run starts, once, for its plan, page and card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts.adapter import read_adapter
from rayexpand.contract.class_tokens import add_class_tokens
from rayexpand.contract.schema import Draw
from rayexpand.models.embedding_files import expand_prompt, token_counts, token_words
from rayexpand.models.prior import prior_tokenizer
from rayexpand.runs.config import RunConfig
from rayexpand.runs.inputs import artifact_folder
from rayexpand.runs.plan import Plan

SHOWN = 300  # characters of the longest text
MOST_ROWS = 20_000  # looked at; of a larger plan so many, spread over its seeds


@dataclass(frozen=True, slots=True)
class CutPrompts:
    """How many rows have a prompt, or negative prompt, of which a generator reads only the beginning."""

    rows: int  # looked at
    cut: int  # of them
    tokens: int  # that the generator reads, those of start and end among them
    longest: int  # tokens of the longest text
    example: str  # the longest text, or its beginning

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def words(self) -> str:
        return words_of(self.to_json())


def words_of(found: dict[str, Any]) -> str:
    """One sentence for people about what `to_json` of CutPrompts gave."""
    return (f"{found['cut']:,} of {found['rows']:,} prompts have more than the {found['tokens']} tokens that the "
            f"generator reads, and only their beginning counts; the longest has {found['longest']}: "
            f"“{found['example']}”")


def cut_prompts(plan: Plan, config: RunConfig, folder: Path | None) -> CutPrompts | None:
    """Counts the prompts of a plan that are cut by the tokenizer in the generator's `folder`. None where no prompt is
    read, or where the generator is not on this machine."""
    if "prior" not in config.needs or folder is None or getattr(config.method, "generator", "sd") != "sd":
        return None
    tokenizer = prior_tokenizer(folder)
    if "adapter" in config.needs and (facts := read_adapter(artifact_folder(config, "adapter"))).has_tokens:
        add_class_tokens(tokenizer, len(facts.classes))
    counts = token_counts(config.prior.embeddings)
    tokenizer.add_tokens([word for token, n in counts.items() for word in token_words(token, n)])
    length = _counter(tokenizer, partial(expand_prompt, counts=counts))
    most, rows, cut, example = tokenizer.model_max_length, 0, 0, ("", 0)
    for draw in _spread(plan):
        text = max(draw.prompt, draw.negative, key=length)
        rows, cut = rows + 1, cut + (length(text) > most)
        example = max(example, (text, length(text)), key=lambda one: one[1])
    text, longest = example
    return CutPrompts(rows, cut, most, longest, text if len(text) <= SHOWN else f"{text[:SHOWN]}...")


def _counter(tokenizer: Any, spelled: Callable[[str], str]) -> Callable[[str], int]:
    """Tokens of a text with those of start and end; at most, where that is few enough: a byte is a token at most."""
    known: dict[str, int] = {}

    def length(text: str) -> int:
        text = spelled(text)
        if (bytes_ := len(text.lower().encode()) + 2) <= tokenizer.model_max_length:
            return bytes_
        if text not in known:
            known[text] = len(tokenizer(text, verbose=False).input_ids)
        return known[text]

    return length


def _spread(plan: Plan) -> Iterator[Draw]:
    """The draws of whole seeds, spread evenly over the plan, MOST_ROWS of them or a few more."""
    seeds = len(plan.index)
    wanted = min(seeds, max(1, MOST_ROWS * seeds // max(plan.planned, 1)))
    for position in np.unique(np.linspace(0, seeds - 1, wanted).astype(int)).tolist():
        yield from plan.draws_of(position)
