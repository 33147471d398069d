"""Prompt templates: text with {name}, {metaclass}, {noun} and {token} of the class of a draw, {caption} of its seed.

{token} is the word that fine-tuning gave the class, such as `<class_7>`, so it needs an adapter. {caption} is a text
about the seed image; it stays a slot here, for a method that plans knows no captions, and the plan fills it.
"""

from __future__ import annotations

from string import Formatter
from typing import Annotated

from pydantic import AfterValidator

from rayexpand.contract.class_tokens import class_token
from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import CAPTION_SLOT, ClassTable, spoken

CLASS_WORDS = ("name", "metaclass", "noun")
PLACEHOLDERS = (*CLASS_WORDS, "token", "caption")


def check_template(template: str) -> str:
    """`template` unchanged. Raises ValueError where it is not plain text with known placeholders."""
    known = ", ".join(f"{{{key}}}" for key in PLACEHOLDERS)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"prompt {template!r} cannot be read ({error}); write a literal brace twice") from error
    for _, key, form, conversion in parts:
        if key is not None and key not in PLACEHOLDERS:
            raise ValueError(f"prompt {template!r} has the unknown placeholder {{{key}}}; known are {known}")
        if form or conversion:
            raise ValueError(f"prompt {template!r} formats {{{key}}}; placeholders take no ':' or '!' part")
    return template


Template = Annotated[str, AfterValidator(check_template)]


def placeholders(template: str) -> frozenset[str]:
    """The placeholders a template uses."""
    return frozenset(key for _, key, _, _ in Formatter().parse(template) if key)


def prompt_needs(*templates: str) -> frozenset[str]:
    """What a method needs because of its prompts: an adapter for {token}, captions for {caption}."""
    used = frozenset[str]().union(*map(placeholders, templates))
    return frozenset(need for key, need in (("token", "adapter"), ("caption", "captions")) if key in used)


def format_prompt(template: str, label: int, classes: ClassTable) -> str:
    """The prompt of class `label`, with a slot in place of the caption; underscores of a class name become spaces.

    Raises UsageError when the template asks for a word the class does not have.
    """
    words = {key: spoken(getattr(classes, key)[label]) for key in CLASS_WORDS}
    words |= {"token": class_token(label), "caption": CAPTION_SLOT}
    blank = sorted(key for key in placeholders(template) if not words[key].strip())
    if blank:
        raise UsageError(f"prompt {template!r} asks for {{{blank[0]}}}, which class '{classes.key[label]}' does not "
                         f"have; add a {blank[0]} to the class mapping file or take it out of the prompt")
    return template.format(**words)
