"""Prototypes: means of the guide's features of each class and of its groups, for DistDiff."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import ModelError, looked_at
from rayexpand.contract.protocols import Method
from rayexpand.diffusion.prototypes import Prototypes, load_prototypes

FILE = "prototypes.safetensors"


class PrototypesKind(ArtifactKind):
    name = "prototypes"
    wants = "prototypes of the training images and none are"
    by_run = True

    def unused(self, method: Method) -> tuple[str, str]:
        return "compares samples with no prototypes", "take a method that does, such as distdiff"

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        if not (folder / FILE).is_file():
            return [f"{folder} has no {FILE}{looked_at(folder)}; make it with `rayexpand fit` and this same file, or "
                    "give a folder that it made"]
        made_with = read_facts(folder).get("made_from", {}).get("guide_sha256")
        if not made_with or run.guide_sha256 is None or run.guide_sha256 == made_with:
            return []
        return [f"{folder} holds features of guide {made_with[:12]}, but guide.weights {run.guide_weights} is guide "
                f"{run.guide_sha256[:12]}; features of two guides cannot be compared: name the guide they were made "
                "with, or make them again with `rayexpand fit` and this same file"]

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> Prototypes:
        assert run.guide_sha256 is not None
        return load_prototypes(folder / FILE, guide_hash=run.guide_sha256, class_keys=class_keys)

    def classes(self, folder: Path) -> Sequence[str]:
        return read_facts(folder).get("made_from", {}).get("data", {}).get("classes", ())

    def sha256(self, folder: Path) -> str:
        if not (folder / FILE).is_file():
            raise ModelError(f"artifacts.prototypes: {folder} has no {FILE}; give a folder that `rayexpand fit` made")
        return super().sha256(folder)
