from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path, prior: Path) -> Callable[..., dict[str, Any]]:
    def make(recipe: dict[str, Any], **fields: Any) -> dict[str, Any]:
        adapter = {"recipe": recipe, "checkpoint_every": 2, "log_every": 2, "sheet": None, "tensorboard": False,
                   "latents": {"dtype": "float32"}, **fields}
        return {"name": "ants", "out": str(tmp_path / "artifacts"), "prior": {"weights": str(prior)}, "device": "cpu",
                "data": {"source": "imagefolder", "path": str(image_folder)}, "fit": {"adapter": adapter}}

    return make
