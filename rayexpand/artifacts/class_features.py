"""The mean image feature of each class, for Real-Fake's visual token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayexpand.artifacts.columns import CLASS_FEATURES, ColumnsKind, feature_facts, read_class_features
from rayexpand.artifacts.kinds import RunInputs
from rayexpand.contract.protocols import Method


class ClassFeaturesKind(ColumnsKind):
    name = CLASS_FEATURES
    wants = "image features of each class and none are"

    def unused(self, method: Method) -> tuple[str, str]:
        return "has no visual token of each class", "set method.visual_token: class_mean"

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> Any:
        import torch

        return torch.from_numpy(read_class_features(folder, class_keys))

    def classes(self, folder: Path) -> Sequence[str]:
        return feature_facts(folder, self.name).get("classes", ())
