"""Faults of a fine-tuning: what is refused before it costs anything, what is said, and what is never lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rayexpand.artifacts.adapter import adapter_fits
from rayexpand.artifacts.columns import write_captions, write_image_features
from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import ConfigError, Interrupted, ModelError, UsageError
from rayexpand.fitting.adapter import fit as artifact
from rayexpand.fitting.adapter import latents
from rayexpand.fitting.adapter import train as finetune_run
from rayexpand.fitting.config import parse_fit, preflight
from rayexpand.methods.lecf import Lecf
from rayexpand.models.prior import load_prior
from rayexpand.runs import run as runs
from rayexpand.storage.checkpoints import Checkpoints
from tests.conftest import MakeConfig
from tests.fitting.adapter.test_train import KEYS, PLAIN, SHEET, SHORT, feed_of, fit

torch.set_num_threads(1)
IDS = [f"{key}/{i}.png" for key in KEYS for i in range(5)]


# -------------------------------------------------------------------------------------------------- checkpoints, sheets


def test_a_sheet_that_fails_costs_no_checkpoint(raw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    seen = list[int]()

    def fail(*_: Any) -> Any:
        (work,) = Path(config["out"]).glob(".adapter-*.work")
        found = Checkpoints(work, 2).load(finetune_run.STAGE)
        assert found is not None, "the checkpoint comes first"
        seen.append(int(found[0]["step"]))
        raise (torch.OutOfMemoryError("no memory left") if len(seen) == 1 else Interrupted("stopped"))

    config = raw({**SHORT, "strategy": "ti"}, sheet=SHEET)
    monkeypatch.setattr(finetune_run, "draw_sheet", fail)
    with pytest.raises(Interrupted):
        fit(config)
    assert seen == [2, 4]
    assert "no picture of step 2 could be drawn (OutOfMemoryError: no memory left)" in caplog.text


def test_the_models_of_a_fine_tuning_and_of_its_sheet(raw: Callable[..., Any],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights come in float32, and the Finetuner casts; the autoencoder of a sheet computes in float32."""
    loaded, decoded = [], []

    def watched(weights: str, **options: Any) -> Any:
        model = load_prior(weights, **options)
        loaded.append({one.dtype for one in model.unet.parameters()})
        model.vae.decoder.conv_in.register_forward_hook(lambda _, __, out: decoded.append(out.dtype))
        return model

    monkeypatch.setattr(finetune_run, "load_prior", watched)
    fit(raw({**PLAIN, "steps": 1, "precision": "bf16"}, sheet=SHEET))
    assert loaded == [{torch.float32}]
    assert decoded == [torch.float32]


def test_a_scheduler_that_ends_in_noise_draws_no_sheet(raw: Callable[..., Any], prior: Path,
                                                       tmp_path: Path) -> None:
    base = Path(shutil.copytree(prior, tmp_path / "base"))
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True}))
    for sheet, problems in ((SHEET, 1), (None, 0)):
        found = preflight(parse_fit({**raw(PLAIN, sheet=sheet), "prior": {"weights": str(base)}}))
        assert len(found) == problems
        assert all("fit.adapter.sheet: " in one and "set sheet: null" in one for one in found)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".finetune.partial-0a0a0a0a").write_bytes(b"half")
    (tmp_path / ".other.partial-0a0a0a0a").write_bytes(b"half")
    Checkpoints(tmp_path, 1).save("finetune", {"step": torch.tensor(1)}, {})
    assert sorted(one.name for one in tmp_path.iterdir()) == [".other.partial-0a0a0a0a", "finetune.safetensors"]


def test_latents_survive_a_kill_before_they_are_published(raw: Callable[..., Any], tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    config, made = raw({**SHORT, "strategy": "ti", "steps": 1}), list[int]()

    def write(folder: Path, part: latents.LatentPart) -> None:
        made.append(part.first)
        latents.write_part(folder, part)

    monkeypatch.setattr(latents, "PART_SEEDS", 8)
    monkeypatch.setattr(artifact, "write_part", write)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "finish", lambda *_: (_ for _ in ()).throw(Interrupted("killed")))
        with pytest.raises(Interrupted):
            fit(config)
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    fit(config)
    assert made == [0, 8, 16]


def test_weights_that_are_not_finite_are_no_generator(prior: Path, tmp_path: Path) -> None:
    model = load_prior(str(prior), device="cpu")
    model.text_encoder.get_input_embeddings().weight.data[3, 1] = float("nan")
    with pytest.raises(ModelError, match="not finite: training diverged"):
        finetune_run.write_pipeline(model, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(("precision", "norm", "shown"), [("fp16", float("inf"), 0.0), ("fp16", 2.0, 2.0),
                                                          ("bf16", float("inf"), float("inf"))])
def test_only_fp16_leaves_steps_out(precision: str, norm: float, shown: float) -> None:
    tuner: Any = SimpleNamespace(losses=SimpleNamespace(total=1.0, simple=1.0, mmd=0.0, grad_norm=norm),
                                 config=SimpleNamespace(precision=precision, mmd_gamma=0.0))
    assert finetune_run.measured(tuner)["grad_norm"] == shown


# ---------------------------------------------------------------------------------------------------------------- feed


def test_a_class_without_an_image_to_learn_from_is_named(tmp_path: Path, raw: Callable[..., Any],
                                                         image_folder: Path) -> None:
    said = {"db": "{name}, {caption}", "ti": "a {token} {caption}"}
    for strategy, prompt in said.items():
        with pytest.raises(UsageError, match=r"empty caption of every image of 1 of 3 classes \('k1'\)"):
            feed_of(tmp_path / strategy, (2, 2, 1), ["red", "", "", " ", "blue"], strategy=strategy, prompt=prompt)
    broken = Path(shutil.copytree(image_folder, tmp_path / "broken"))
    for file in (broken / "dog").iterdir():
        file.write_bytes(b"nothing")
    config = {**raw({**SHORT, "strategy": "ti"}), "data": {"source": "imagefolder", "path": str(broken)}}
    with pytest.raises(UsageError, match=r"fit\.adapter: 1 of 4 classes have no image that can be read \('dog'\)"):
        fit(config)


def test_blank_captions_are_counted(tmp_path: Path, raw: Callable[..., Any]) -> None:
    write_captions(tmp_path, IDS, ["", *["text"] * 18, " "])
    folder = fit(raw({**PLAIN, "steps": 1, "prompt": "{name}, {caption}"}, captions=str(tmp_path)))
    assert [read_facts(folder)[name] for name in ("images", "refused", "blank_captions")] == [18, 0, 2]


def test_images_without_features_are_known_before_the_first_step(tmp_path: Path) -> None:
    ids, wide = [f"s{i}" for i in range(4)], np.ones((4, 2), np.float32)
    recipe: dict[str, Any] = {"strategy": "db", "prompt": "{name}, {caption}", "visual_token": "instance"}
    captions = ["red", "", "blue", "green"]
    write_image_features(tmp_path, [ids[0], *ids[2:]], wide[:3], encoder_sha256="e")
    assert len(feed_of(tmp_path / "l", (2, 2), captions, tmp_path, **recipe).rows) == 3, "a blank one needs none"
    write_image_features(tmp_path, ids[:3], wide[:3], encoder_sha256="e")
    with pytest.raises(UsageError, match=r"fit\.adapter\.features: .* no features of 1 of 3 seeds, such as 's3'"):
        feed_of(tmp_path / "l", (2, 2), captions, tmp_path, **recipe)


def test_a_home_folder_is_one_place_for_every_check(raw: Callable[..., Any], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "texts").mkdir()
    write_captions(tmp_path / "texts", IDS, ["text"] * 20)
    assert preflight(parse_fit(raw({**PLAIN, "prompt": "{name}, {caption}"}, captions="~/texts"))) == []


# ---------------------------------------------------------------------------------------------------------------- runs


def test_tokens_are_looked_for_in_lists_of_prompts() -> None:
    method = Lecf(prompts={"*": ["a {token} here"]}, steps=2)
    (problem,) = adapter_fits(method, "db", "none", "this adapter")
    assert "the prompt has {token}" in problem
    assert adapter_fits(method, "ti", "none", "this adapter") == []


@pytest.mark.parametrize(("limit", "refused"), [(0.19, True), (0.2, False)])
def test_a_run_whose_captions_are_blank_does_not_start(limit: float, refused: bool, make_config: MakeConfig,
                                                       tmp_path: Path) -> None:
    write_captions(tmp_path, IDS, ["", " ", "", "", *["text"] * 16])
    config = make_config("Captioned", sections={"artifacts": {"captions": str(tmp_path)},
                                                "limits": {"max_failed": limit}})
    if not refused:
        assert sum(map(len, runs.prepare(config).plan.units(0))) > 0
        return
    with pytest.raises(ConfigError, match=r"empty caption of 4 of 20 seeds \(ant/0\.png, .*max_failed = 0\.19"):
        runs.prepare(config)
    assert not Path(config.folder).exists()
