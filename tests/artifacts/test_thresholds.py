"""Thresholds on disk: what is written is read, and files that are not what they say are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rayexpand.artifacts import KINDS
from rayexpand.artifacts.thresholds import (
    ABOUT,
    FILE,
    LEVELS,
    Statistics,
    Thresholds,
    read_thresholds,
    write_thresholds,
)
from rayexpand.contract.errors import ModelError

KEYS = ("ant", "bee")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = Statistics(np.array([0.5, 0.7]), np.array([0.1, 0.2]), np.stack([LEVELS, LEVELS**2]))
    write_thresholds(tmp_path, Thresholds(np.eye(2, 3, dtype=np.float32), {"seed": found}), guide_sha256="ab" * 32,
                     class_keys=KEYS, images=[4, 1], alone=["bee"])
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    found = read_thresholds(folder, KEYS)
    assert found.above("seed").tolist() == [0.5, 0.7]
    assert found.above("seed", deviations=2).tolist() == pytest.approx([0.3, 0.3])
    assert found.above("seed", quantile=0.305).tolist() == pytest.approx([0.305, 0.0931], abs=1e-4)
    assert found.unit_KD.tolist() == np.eye(2, 3).tolist()
    assert json.loads((folder / ABOUT).read_text())["alone"] == ["bee"]
    assert KINDS["thresholds"].classes(folder) == list(KEYS)
    before = KINDS["thresholds"].sha256(folder)
    (folder / "artifact.json").write_text("{}")
    (folder / "artifact.json").unlink()
    assert KINDS["thresholds"].sha256(folder) == before


def test_other_classes_and_damaged_files_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="other classes than the dataset has, or for the same in another order"):
        read_thresholds(folder, KEYS[::-1])
    tensors = load_file(folder / FILE)
    save_file({**tensors, "seed/mean": np.array([0.5, np.nan])}, folder / FILE)
    with pytest.raises(ModelError, match="are not finite numbers of 2 classes"):
        read_thresholds(folder, KEYS)
    save_file({name: one for name, one in tensors.items() if name != "seed/mean"}, folder / FILE)
    with pytest.raises(ModelError, match="cannot be read"):
        read_thresholds(folder, KEYS)
    (folder / ABOUT).write_text('{"kind": "prototypes"}')
    with pytest.raises(ModelError, match="does not describe thresholds"):
        read_thresholds(folder, KEYS)
    (folder / FILE).unlink()
    with pytest.raises(ModelError, match=r"artifacts\.thresholds: .* has no thresholds\.safetensors"):
        KINDS["thresholds"].sha256(folder)
