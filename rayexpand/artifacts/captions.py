"""A text about each seed image, which the plan puts into prompts."""

from __future__ import annotations

from pathlib import Path

from rayexpand.artifacts.columns import CAPTIONS, FILES, columns_hash, columns_problem
from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.contract.protocols import Method


class CaptionsKind(ArtifactKind):
    name = CAPTIONS
    wants = "captions of the seeds and none are"
    planned = True

    def unused(self, method: Method) -> tuple[str, str]:
        return "has no {caption} in its prompt", "write {caption} into the prompt"

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        return [problem] if (problem := columns_problem(folder, self.name)) else []

    def files(self, folder: Path) -> list[str]:
        return list(FILES[self.name])

    def sha256(self, folder: Path) -> str:
        return columns_hash(folder, self.name)
