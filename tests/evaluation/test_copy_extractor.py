"""TorchScript extractors: loaded only if trusted and of the stated content, called SSCD only if they are that."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayexpand.contract.errors import ConfigError, ModelError
from rayexpand.evaluation import copy_extractor as extractors
from rayexpand.evaluation.copy_extractor import CopyExtractorConfig, TorchscriptConfig
from rayexpand.studies.audit import parse_audit


class Model(torch.nn.Module):
    """Means of four columns of the first channel, as rows of length 1 with `width` features."""

    def __init__(self, width: int, unit: bool = True) -> None:
        super().__init__()
        self.width, self.unit = width, unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.adaptive_avg_pool2d(x, (1, 4))[:, 0, 0] + torch.arange(4)
        h = torch.nn.functional.pad(h, [0, self.width - 4])
        return torch.nn.functional.normalize(h, dim=1) if self.unit else h


def saved(folder: Path, name: str = "model.pt", width: int = 8, unit: bool = True) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Model(width, unit)), str(folder / name))
    return {"path": str(folder / name), "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "trust": True}


def config(script: dict[str, Any]) -> CopyExtractorConfig:
    return CopyExtractorConfig(torchscript=TorchscriptConfig(**script), device="cpu")


def test_images_reach_it_squashed_and_normalised(tmp_path: Path) -> None:
    found = extractors.load(config({**saved(tmp_path, unit=False), "size": 8}))
    image = np.zeros((30, 50, 3), np.uint8)
    image[:, :25, 0] = 255
    h_BD = found(np.stack([found.intake(image, 8)]))

    np.testing.assert_allclose(h_BD[0, [0, 3]], [(1 - 0.485) / 0.229, -0.485 / 0.229 + 3], atol=1e-5)
    assert (found.size, h_BD.shape) == (8, (1, 8))


def test_only_a_trusted_file_of_the_stated_content_is_loaded(tmp_path: Path) -> None:
    script = saved(tmp_path)
    for trust in (False, None, "yes"):
        with pytest.raises(ValidationError, match="runs code when it is loaded"):
            TorchscriptConfig(**{**script, "trust": trust})
    other = config({**script, "sha256": "0" * 64})
    assert extractors.check(config(script)) == []
    assert "is another file than was meant" in extractors.check(other)[0]
    with pytest.raises(ModelError, match="it is not loaded"):
        extractors.load(other)
    assert "does not exist" in extractors.check(config({**script, "path": "nowhere.pt"}))[0]
    both = CopyExtractorConfig(torchscript=TorchscriptConfig(**script), guide="digits")
    assert extractors.check(both) == ["extractor: torchscript and guide are both given; keep one of them"]
    with pytest.raises(ConfigError, match=r"audit.copies.extractor.torchscript.sha256"):
        parse_audit({"audit": {"run": "nowhere", "copies": {"held_out": {"source": "digits"}, "extractor": {
            "torchscript": {**script, "sha256": "short"}}}}})


def test_only_sscd_is_called_sscd(tmp_path: Path) -> None:
    named = "sscd_disc_large.torchscript.pt"
    sscd = saved(tmp_path, named, width=1024)

    said = f"by its file name; sha256 {sscd['sha256'][:12]}"
    assert extractors.name_of(config(sscd)) == f"SSCD sscd_disc_large ({said})"
    assert extractors.name_of(config({**sscd, "size": 288})) == f"torchscript {named}", "another intake"
    assert extractors.name_of(config(saved(tmp_path))) == "torchscript model.pt"
    assert extractors.load(config(sscd)).size == 320
    assert extractors.sha256_of(config(sscd)) == sscd["sha256"]
    for wrong in ({"width": 512}, {"width": 1024, "unit": False}):
        with pytest.raises(ModelError, match="it is not SSCD: give it another name"):
            extractors.load(config(saved(tmp_path, named, **wrong)))


def test_it_moves_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    script = saved(tmp_path)
    model = extractors.files_of(config(script))
    assert model.find() == {"model.pt": tmp_path / "model.pt"}
    (tmp_path / "there/model.pt").write_bytes((tmp_path / "model.pt").read_bytes())
    assert model.lies_in(tmp_path / "there", script["sha256"])
    assert extractors.load(extractors.moved(config(script), tmp_path / "there")).size == 320


def test_what_is_no_program_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"none")
    with pytest.raises(ModelError, match="is no TorchScript file"):
        extractors.load(config({**saved(tmp_path, "other.pt"), "path": str(tmp_path / "model.pt"),
                                "sha256": hashlib.sha256(b"none").hexdigest()}))
