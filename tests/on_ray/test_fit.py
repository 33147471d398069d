"""Prototypes on a cluster: the same bytes for any number of actors, and models on nodes that have none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from safetensors.numpy import save_file

import rayexpand
from rayexpand.artifacts import KINDS
from rayexpand.artifacts.columns import write_class_features, write_image_features
from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import ModelError, UsageError
from rayexpand.fitting import fit as fits
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.status import read_fits
from rayexpand.models import folders
from rayexpand.models.guides import guide_hash, guide_model
from rayexpand.models.prior import prior_hash
from rayexpand.on_ray import fit as on_ray
from rayexpand.on_ray import stage
from rayexpand.on_ray.pool import connected
from rayexpand.runs import run as runs
from rayexpand.runs.config import GuideConfig, parse
from rayexpand.storage.position import POSITION
from tests.conftest import complete, hashes
from tests.on_ray.conftest import ROOT, Head
from tests.on_ray.test_nodes import add, expand_with, on
from tests.studies.test_study import SMALL
from tests.tiny import tiny_adapter, tiny_clip, tiny_pipeline

pytestmark = pytest.mark.cluster


@pytest.fixture
def raw(image_folder: Path, tmp_path: Path) -> dict[str, Any]:
    clip = tiny_clip(tmp_path / "clip")
    return {"name": "ants", "out": str(tmp_path / "here"), "guide": {"weights": str(clip)}, "device": "cpu",
            "data": {"source": "imagefolder", "path": str(image_folder)},
            "fit": {"prototypes": {"groups": 2, "batch": 3}}}


def quiet(task: str, done: int, total: int) -> None:
    """Nothing is shown."""


def test_prototypes_are_the_same_bytes_for_any_number_of_actors(head: Head, raw: dict[str, Any],
                                                                tmp_path: Path) -> None:
    expected = fits.fit(parse_fit(raw), quiet)["prototypes"]
    file = tmp_path / "fit.yaml"
    for actors in (1, 2):
        file.write_text(yaml.safe_dump({**raw, "out": str(tmp_path / str(actors)),
                                        "cluster": {"address": head.address, "actors": actors}}))
        done = subprocess.run([sys.executable, "-m", "rayexpand", "fit", str(file), "--json"], cwd=ROOT, env=head.env,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)["prototypes"]
        assert made["actors"] == actors
        assert made["cpu_seconds"] > 0
        assert Path(made["folder"]).name == expected.name
        assert ((Path(made["folder"]) / "prototypes.safetensors").read_bytes()
                == (expected / "prototypes.safetensors").read_bytes())


def test_scores_are_the_same_bytes_on_a_cluster(head: Head, tmp_path: Path) -> None:
    """Folds as tasks: the bytes of this process. Spread over two Ray Train workers: scores of the same folds."""
    raw = {"name": "digits", "out": str(tmp_path / "here"), "data": {"source": "digits", "per_class": 2},
           "device": "cpu", "fit": {"scores": {"folds": 2, "recipe": SMALL}}}
    expected, file = Path(rayexpand.fit(raw)["scores"].folder), tmp_path / "fit.yaml"
    for workers in (0, 2):
        spread = {"scores": {**raw["fit"]["scores"], "training": {"workers": workers, "gpus_per_worker": 0}}}
        file.write_text(yaml.safe_dump({**raw, "out": str(tmp_path / str(workers)), "fit": spread,
                                        "cluster": {"address": head.address}}))
        done = subprocess.run([sys.executable, "-m", "rayexpand", "fit", str(file), "--json"], cwd=ROOT, env=head.env,
                              text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)["scores"]
        assert made["updates"] == 2 * 6
        assert made["cpu_seconds"] > 0
        found = Path(made["folder"]) / "scores.parquet"
        if not workers:
            assert found.read_bytes() == (expected / "scores.parquet").read_bytes()
        one, other = pq.read_table(found), pq.read_table(expected / "scores.parquet")
        assert one.select(["seed_id", "fold"]) == other.select(["seed_id", "fold"])
        np.testing.assert_allclose(one["p_label"].to_numpy(), other["p_label"].to_numpy(), atol=0.1)


def test_features_of_two_guides_are_the_same_bytes(head: Head, raw: dict[str, Any], tmp_path: Path) -> None:
    second = {"weights": str(tiny_clip(tmp_path / "second", seed=1, features=24))}
    made = {**raw, "fit": {"class_features": {"images": None, "guide_2": second}}}
    expected = fits.fit(parse_fit(made), quiet)["class_features"]
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump({**made, "out": str(tmp_path / "there"),
                                    "cluster": {"address": head.address, "actors": 1}}))
    done = subprocess.run([sys.executable, "-m", "rayexpand", "fit", str(file), "--json"], cwd=ROOT, env=head.env,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["class_features"]["folder"])
    assert folder.name == expected.name
    for name in ("class_features.safetensors", "features.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert read_facts(folder)["process_seconds"] > 0


def test_a_guide_that_cannot_be_loaded_is_said(head: Head, raw: dict[str, Any], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Path(raw["guide"]["weights"])
    file = tmp_path / "fit.yaml"
    about = {"kind": "classifier", "classes": ["ant", "bee", "cat", "wolf"], "recipe": {}}
    (weights / "guide.json").write_text(json.dumps(about))
    save_file({}, weights / "model.safetensors")
    file.write_text(yaml.safe_dump({**raw, "cluster": {"address": head.address, "actors": 1}}))
    done = subprocess.run([sys.executable, "-m", "rayexpand", "fit", str(file), "--json"], cwd=ROOT, env=head.env,
                          text=True, capture_output=True)

    assert done.returncode == 2
    assert "class 3 is 'wolf' there and 'dog' here" in json.loads(done.stdout)["error"]["message"]
    assert "Traceback" not in done.stderr
    assert [one.name for one in (tmp_path / "here").glob("[!.]*")] == ["heartbeats"], "of the fit, and no artifact"


def test_guide_and_prototypes_reach_nodes_with_empty_caches(cluster: Any, tmp_path: Path) -> None:
    """The driver has all; two nodes have nothing, and what the driver names lies where they do not look."""
    caches = [tmp_path / f"node{i}" for i in range(2)]
    for cache in caches:
        add(cluster, resources={"sampler": 1}, env_vars={"RAYEXPAND_CACHE": str(cache)})
    cluster.wait_for_nodes()
    raw = {"name": "spread", "out": str(tmp_path / "out"), "data": {"source": "digits", "per_class": 2},
           "method": {"name": "distdiff", "ratio": 1, "steps": 4, "guide_step": 2, "guidance_scale": 2.0},
           "sampler": {"batch": 5, "shard_images": 5}, "prior": {"device": "cpu"},
           **on(cluster, actors=2, cpus_per_actor=0.5, resources={"sampler": 1})}
    config = parse(raw)
    wanted = fits.fit_config(config, groups=2, out=str(tmp_path / "artifacts"))
    assert wanted is not None
    with connected(config.cluster):
        made = on_ray.fit(wanted, quiet)
    assert read_facts(made["prototypes"])["actors"] == 1, "20 images are one call"
    filled = [cache for cache in caches if cache.exists()]
    assert filled
    for cache in filled:
        assert [one.name for one in (cache / "staged").iterdir() if one.is_dir()] == [guide_hash("digits", None)[:16]]
    run = runs.prepare(fits.with_artifacts(config, made), device_here=False)
    totals = expand_with(run)
    local, _ = complete(parse({**raw, "name": "local", "artifacts": {"prototypes": str(made["prototypes"])}}))

    assert totals.kept == 20
    assert hashes(run) == hashes(local)
    for cache in caches:
        if cache.exists():
            assert {one.name for one in (cache / "staged").iterdir() if one.is_dir()} <= {
                prior_hash("digits")[:16], guide_hash("digits", None)[:16]}


def test_every_kind_of_model_is_copied_and_checked(head: Head, raw: dict[str, Any], tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, the checkpoint of an architecture, and artifacts, to a cache that has none of them."""
    import open_clip
    from safetensors.torch import load_file

    folder = fits.fit(parse_fit(raw), quiet)["prototypes"]
    clip = Path(raw["guide"]["weights"])
    config = json.loads((clip / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-staged-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-staged-clip.json")
    named = GuideConfig(weights="tiny-staged-clip", checkpoint=str(clip / "open_clip_model.safetensors"))
    models = {"folder": (guide_model(str(clip), None), guide_hash(str(clip), None)),
              "checkpoint": (guide_model(named.weights, named.checkpoint), guide_hash(named.weights, named.checkpoint)),
              "prototypes": (stage.artifact_model(folder, "prototypes"), KINDS["prototypes"].sha256(folder))}
    for kind in ("class_features", "image_features"):
        (tmp_path / kind).mkdir()
    features = np.ones((2, 3), np.float32)
    write_class_features(tmp_path / "class_features", features, class_keys=["a", "b"], encoder_sha256="e",
                         images_per_class=None)
    write_image_features(tmp_path / "image_features", ["a/0", "b/0"], features, encoder_sha256="e")
    tiny_adapter(tmp_path / "adapter", tiny_pipeline(tmp_path / "base"), ["a", "b"])
    for kind in ("class_features", "image_features", "adapter"):
        models[kind] = (stage.artifact_model(tmp_path / kind, kind), KINDS[kind].sha256(tmp_path / kind))
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    ray.init(address=head.address, log_to_driver=False)
    try:
        server = stage.open_model_server({sha256: model for model, sha256 in models.values()})
        monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path / "cache"))
        for model, sha256 in models.values():
            assert stage.local(model, sha256,
                               server) == next(iter(model.find().values())).parent, "what is here is used"
            away = replace(model, present=lambda: None)
            copy = stage.local(away, sha256, server)
            assert copy == tmp_path / "cache/staged" / sha256[:16]
            assert model.hash(copy) == sha256
            assert stage.local(away, sha256, server) == copy
        moved = stage.guide_at(named, str(tmp_path / "cache/staged" / models["checkpoint"][1][:16]))
        assert load_file(str(moved.checkpoint)).keys() == load_file(str(named.checkpoint)).keys()
        wrong = replace(models["folder"][0], present=lambda: None, hash=lambda folder: "another")
        with pytest.raises(Exception, match="its files changed while the run was on"):
            stage.local(wrong, "f" * 64, stage.open_model_server({"f" * 64: wrong}))
        with pytest.raises(ModelError, match=r"has no prototypes\.safetensors"):
            KINDS["prototypes"].sha256(tmp_path)
    finally:
        ray.shutdown()


def test_what_trains_in_one_process_is_a_task_of_a_cluster_that_is_joined(
        head: Head, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver on a head without GPU trains nothing itself: here it could not."""
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    recipe = {"preset": "tiny", "strategy": "db", "rank": 2, "steps": 2, "batch": 4, "prompt": "a {name}"}
    raw = {"name": "ants", "data": {"source": "imagefolder", "path": str(image_folder)}, "device": "cpu",
           "prior": {"weights": str(tiny_pipeline(tmp_path / "base"))}, "cluster": {"address": head.address},
           "fit": {"guide": {"recipe": {"backbone_args": {"width": 4}, "updates": 3, "batch": 8}},
                   "adapter": {"recipe": recipe, "sheet": None, "tensorboard": False}}}
    here = fits.fit(parse_fit({**raw, "out": str(tmp_path / "here")}), quiet)

    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("trained by the driver")

    monkeypatch.setattr("rayexpand.classifier.classifier.Classifier.update", trained)
    monkeypatch.setattr("rayexpand.fitting.adapter.train.tune", trained)
    made = on_ray.fit(parse_fit({**raw, "out": str(tmp_path / "task")}), quiet)

    assert {role: folder.name for role, folder in made.items()} == {role: one.name for role, one in here.items()}
    for role, file in (("guide", "model.safetensors"), ("adapter", "pytorch_lora_weights.safetensors")):
        assert (made[role] / file).read_bytes() == (here[role] / file).read_bytes()
        assert {one.name for one in made[role].iterdir()} == {one.name for one in here[role].iterdir()}


def test_how_far_a_task_is_lies_in_the_folder_of_the_driver(head: Head, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in head.env.items():
        monkeypatch.setenv(name, value)
    heard, seen = list[tuple[str, int, int]](), list[str]()

    def progress(*said: Any) -> None:
        heard.append(said)
        with contextlib.suppress(UsageError):  # nothing is there yet
            seen.extend(one.words for one in read_fits(tmp_path).parts)

    made = on_ray.fit(parse_fit({
        "name": "digits", "out": str(tmp_path), "data": {"source": "digits", "per_class": 2}, "device": "cpu",
        "cluster": {"address": head.address}, "fit": {"guide": {"recipe": {
            "size": 16, "backbone_args": {"width": 24}, "updates": 600, "batch": 20}}}}), progress)

    steps = [done for task, done, total in heard if (task, total) == ("training the guide", 600)]
    assert steps == sorted(steps)
    assert [step for step in steps if 0 < step < 600]
    assert any(re.match(r"training the guide: step \d+ of 600, loss ", words) for words in seen)
    assert read_fits(tmp_path).complete
    assert not (made["guide"] / POSITION).exists()


def test_a_stage_has_resources_and_labels_of_its_own(
        cluster: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without room, one node of the wrong label, one of the right one, which says that it was there."""
    for kind in ("spot", "on-demand"):
        add(cluster, resources={"big": 1, kind: 1}, labels={"ray.io/market-type": kind}, num_gpus=1,
            env_vars={"RAYEXPAND_CACHE": str(folders.cache_root()), "KIND_OF_NODE": kind})
    cluster.wait_for_nodes()
    stage = {"resources": {"big": 1}, "label_selector": {"ray.io/market-type": "on-demand"}, "cpus_per_actor": 0.5}
    wanted = parse_fit({
        "name": "ants", "out": str(tmp_path / "out"), "data": {"source": "imagefolder", "path": str(image_folder)},
        "fit": {"guide": {"recipe": {"backbone_args": {"width": 4}, "updates": 1, "batch": 8}}},
        **on(cluster, stages={"fit": stage})})
    monkeypatch.setattr(on_ray, "_filled", _said)
    made = on_ray.fit(wanted, quiet)

    assert json.loads((made["guide"] / "said.json").read_text()) == {"kind": "on-demand", "gpus": 1, "big": 1.0}


def _said(function: Any, threads: int, folder: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    given = ray.get_runtime_context().get_assigned_resources()
    said = {"kind": os.environ["KIND_OF_NODE"], "gpus": given.get("GPU"), "big": given.get("big")}
    return {}, {"said.json": json.dumps(said).encode()}
