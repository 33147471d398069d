from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexpand.models.sources import PriorSources
from tests.models import original_layout

SINGLE = {"sd": ("sd", original_layout.sd), "sd2": ("sd2v", original_layout.sd2),
          "sdxl": ("sdxl", original_layout.sdxl)}


@pytest.fixture(scope="session")
def single_file(tmp_path_factory: pytest.TempPathFactory, family_folder: Callable[[str], Path]) -> Callable[[str],
                                                                                                            PriorSources]:
    """A single file in the original layout (a key of SINGLE) over the folder of its json files, written once."""
    root = tmp_path_factory.mktemp("single")

    def sources(name: str) -> PriorSources:
        family, layout = SINGLE[name]
        file, config = root / f"{name}.safetensors", root / name
        if not file.exists():
            json_files(family_folder(family), config)
            original_layout.write(file, layout(family_folder(family)))
        return PriorSources(file, config)
    return sources


def json_files(folder: Path, to: Path) -> Path:
    """A copy of a pipeline folder without its weights."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))
