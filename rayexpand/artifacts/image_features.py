"""The image feature of each seed, for a visual token of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayexpand.artifacts.columns import (
    FILES,
    IMAGE_FEATURES,
    ImageFeatures,
    columns_hash,
    columns_problem,
    open_image_features,
)
from rayexpand.artifacts.kinds import ArtifactKind, RunInputs
from rayexpand.contract.protocols import Method


class ImageFeaturesKind(ArtifactKind):
    name = IMAGE_FEATURES
    wants = "features of each seed image and none are"

    def unused(self, method: Method) -> tuple[str, str]:
        return "has no visual token of each image", "set method.visual_token: instance"

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        return [problem] if (problem := columns_problem(folder, self.name)) else []

    def files(self, folder: Path) -> list[str]:
        return list(FILES[self.name])

    def sha256(self, folder: Path) -> str:
        return columns_hash(folder, self.name)

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> ImageFeatures:
        return open_image_features(folder)
