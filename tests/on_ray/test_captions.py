"""Captions and features on a cluster: those of this process, and a model on nodes that have none."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.numpy import save_file

from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import ModelError
from rayexpand.fitting import fit as fits
from rayexpand.fitting.config import parse_fit
from rayexpand.models.folders import folder_hash
from rayexpand.on_ray import fit as on_ray
from rayexpand.on_ray import stage
from rayexpand.on_ray.captions import captioner_model
from tests.captioners import tiny_captioner
from tests.on_ray.conftest import Head
from tests.tiny import tiny_clip

pytestmark = pytest.mark.cluster


def quiet(*said: object) -> None:
    """Nothing is shown."""


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    broken = Path(shutil.copytree(image_folder, tmp_path / "images"))
    (broken / "bee/2.png").write_bytes(b"nothing")
    captioner = tiny_captioner(tmp_path / "captioner", "blip-2-opt")
    return {"name": "ants", "out": str(tmp_path / "here"), "guide": {"weights": str(tiny_clip(tmp_path / "clip"))},
            "device": "cpu", "data": {"source": "imagefolder", "path": str(broken)},
            "fit": {"captions": {"model": str(captioner), "batch": 3, "max_new_tokens": 4},
                    "class_features": {"images": 2, "batch": 3}, "image_features": {"batch": 3},
                    "thresholds": {"batch": 3}}}


def test_two_actors_write_what_this_process_writes(head: Head, raw: dict[str, Any], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fits.fit(parse_fit(raw), quiet)
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    spread = {**raw, "out": str(tmp_path / "spread"), "cluster": {"address": head.address, "actors": 2}}
    made = on_ray.fit(parse_fit(spread), quiet)
    files = {"captions": "captions.parquet", "class_features": "class_features.safetensors",
             "image_features": "features.npy", "thresholds": "thresholds.safetensors"}

    assert {role: folder.name for role, folder in made.items()} == {
        role: folder.name for role, folder in expected.items()}
    for role, file in files.items():
        assert (made[role] / file).read_bytes() == (expected[role] / file).read_bytes(), role
        facts = read_facts(made[role])
        assert (facts["actors"], facts["cpu_seconds"] > 0) == (2, True)
        assert facts.get("refused_examples", {}).keys() <= {"bee/2.png"}
    assert read_facts(made["captions"])["refused"] == 1


def test_a_captioner_is_copied_to_a_node_without_it_and_a_broken_one_is_said(
        head: Head, raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    folder = Path(raw["fit"]["captions"]["model"])
    sha256, model = folder_hash(folder), captioner_model(folder)
    ray.init(address=head.address, log_to_driver=False)
    try:
        server = stage.open_model_server({sha256: model})
        monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path / "cache"))
        copy = stage.local(replace(model, present=lambda: None), sha256, server)
        assert copy.parent == tmp_path / "cache/staged"
        assert {file.name for file in folder.iterdir()} == {file.name for file in copy.iterdir()}
    finally:
        ray.shutdown()
    save_file({}, folder / "model.safetensors")
    only = {**raw, "fit": {"captions": raw["fit"]["captions"]}, "cluster": {"address": head.address, "actors": 1}}
    with pytest.raises(ModelError, match=r"fit\.captions\.model .* cannot be loaded: .* \(on "):
        on_ray.fit(parse_fit(only), quiet)
