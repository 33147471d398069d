"""A text about each seed image, which the plan puts into prompts."""

from __future__ import annotations

from rayexpand.artifacts.columns import CAPTIONS, ColumnsKind
from rayexpand.contract.protocols import Method


class CaptionsKind(ColumnsKind):
    name = CAPTIONS
    wants = "captions of the seeds and none are"
    planned = True

    def unused(self, method: Method) -> tuple[str, str]:
        return "has no {caption} in its prompt", "write {caption} into the prompt"
