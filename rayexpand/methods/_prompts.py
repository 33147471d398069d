"""Prompt templates: text with {name}, {metaclass} and {noun} of the class of a draw."""

from __future__ import annotations

from string import Formatter
from typing import Annotated

from pydantic import AfterValidator

from rayexpand.errors import UsageError
from rayexpand.schema import ClassTable

PLACEHOLDERS = ("name", "metaclass", "noun")


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


def format_prompt(template: str, label: int, classes: ClassTable) -> str:
    """The prompt of class `label`; underscores of a class name become spaces.

    Raises UsageError when the template asks for a word the class does not have.
    """
    words = {key: getattr(classes, key)[label].replace("_", " ") for key in PLACEHOLDERS}
    wanted = {key for _, key, _, _ in Formatter().parse(template) if key}
    blank = sorted(key for key in wanted if not words[key].strip())
    if blank:
        raise UsageError(f"prompt {template!r} asks for {{{blank[0]}}}, which class '{classes.key[label]}' does not "
                         f"have; add a {blank[0]} to the class mapping file or take it out of the prompt")
    return template.format(**words)
