"""The mean image feature of each class, for Real-Fake's visual token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayexpand.artifacts.columns import (
    CLASS_FEATURES,
    FILES,
    columns_hash,
    columns_problem,
    feature_facts,
    read_class_features,
)
from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.contract.protocols import Method


class ClassFeaturesKind(ArtifactKind):
    name = CLASS_FEATURES
    wants = "image features of each class and none are"

    def unused(self, method: Method) -> tuple[str, str]:
        return "has no visual token of each class", "set method.visual_token: class_mean"

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        return [problem] if (problem := columns_problem(folder, self.name)) else []

    def files(self, folder: Path) -> list[str]:
        return list(FILES[self.name])

    def sha256(self, folder: Path) -> str:
        return columns_hash(folder, self.name)

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> Any:
        import torch

        return torch.from_numpy(read_class_features(folder, class_keys))

    def classes(self, folder: Path) -> Sequence[str]:
        return feature_facts(folder, self.name).get("classes", ())
