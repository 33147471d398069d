"""The image feature of each seed: for a visual token of its own, and for the judge of a run to compare samples with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rayexpand.artifacts.columns import (
    IMAGE_FEATURES,
    ColumnsKind,
    ImageFeatures,
    feature_facts,
    open_image_features,
)
from rayexpand.artifacts.kinds import RunInputs
from rayexpand.artifacts.store import read_facts
from rayexpand.artifacts.thresholds import other_judge
from rayexpand.contract.errors import ModelError
from rayexpand.contract.protocols import Method


class ImageFeaturesKind(ColumnsKind):
    name = IMAGE_FEATURES
    wants = "features of each seed image and none are"
    by_run = True

    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        if (problems := super().problems(folder, run)) or run.comparison != "seed":
            return problems
        try:
            facts = feature_facts(folder, self.name)
        except ModelError as error:
            return [str(error)]
        if "encoder_2_sha256" in facts:
            return [f"{folder} has features of two encoders side by side, and the judge compares with one; make them "
                    "without guide_2"]
        if read_facts(folder).get("made_from", {}).get("resize") == "squash":
            return [f"{folder} has features of squashed images, and the judge sees samples cropped; make them with "
                    "resize: crop"]
        return other_judge(folder, facts["encoder_sha256"], run)

    def unused(self, method: Method) -> tuple[str, str]:
        return "uses no features of seed images", "set accept.to: seed, or method.visual_token: instance"

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> ImageFeatures:
        return open_image_features(folder)
