"""The image feature of each seed, for a visual token of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayexpand.artifacts.columns import IMAGE_FEATURES, ColumnsKind, ImageFeatures, open_image_features
from rayexpand.artifacts.kinds import RunInputs
from rayexpand.contract.protocols import Method


class ImageFeaturesKind(ColumnsKind):
    name = IMAGE_FEATURES
    wants = "features of each seed image and none are"

    def unused(self, method: Method) -> tuple[str, str]:
        return "has no visual token of each image", "set method.visual_token: instance"

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> ImageFeatures:
        return open_image_features(folder)
