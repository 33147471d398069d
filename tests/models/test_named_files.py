"""Runs by files that people bring: the samples of the folder, and refusals before there is a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from rayexpand.contract.errors import ConfigError
from rayexpand.models.prior import load_prior, prior_hash, prior_model
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.sources import PriorSources
from rayexpand.runs.config import parse
from rayexpand.runs.run import preflight, prepare, sampling_of
from tests.conftest import complete
from tests.models import original_layout as original

Folders, Files = Callable[[str], Path], Callable[[str], PriorSources]


def job(out: Path, **prior: Any) -> dict[str, Any]:
    return {"name": "run", "out": str(out), "data": {"source": "digits"}, "prior": prior,
            "method": {"name": "img2img", "guidance_scale": 2.0, "steps": 4, "strength": 0.5}}


def named(sources: PriorSources) -> dict[str, Any]:
    return {"weights": str(sources.weights), "config": str(sources.config)}


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.fast_cases(1)
def test_a_single_file_samples_as_its_folder(single_file: Files, family_folder: Folders, name: str) -> None:
    z_BCHW = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    outs = []
    for prior in (load_prior(PriorModel(**named(single_file(name)))), load_prior(str(family_folder(name)))):
        cond = prior.embed(["a photo of a two"] * 2, [""] * 2, 5.0)
        seen = prior.predict(z_BCHW, prior.schedule("ddim", 10, 5).first, cond)
        outs.append(torch.cat([seen.clean.flatten(), prior.decode(seen.clean).flatten()]))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)  # on some CPUs bits depend on where in memory weights lie


def test_validate_and_prepare(single_file: Files, tmp_path: Path) -> None:
    config = parse(job(tmp_path / "out", **named(single_file("sd"))))
    assert preflight(config) == []
    assert any("epsilon is assumed" in note for note in sampling_of(config))
    prepare(config)
    assert (tmp_path / "out/run").is_dir()


def test_refusals_before_a_run_folder(single_file: Files, family_folder: Folders, tmp_path: Path) -> None:
    sources = single_file("sd")
    (problem,) = preflight(parse(job(tmp_path / "out", weights=str(sources.weights))))
    assert "hf download" in problem
    less = original.write(tmp_path / "less.safetensors", {
        name: one for name, one in load_file(sources.weights).items() if not name.endswith("out.2.bias")})
    with pytest.raises(ConfigError, match=r"conv_out\.bias"):
        prepare(parse(job(tmp_path / "out", weights=str(less), config=str(sources.config))))
    folder = Path(shutil.copytree(family_folder("sd"), tmp_path / "sd"))
    tensors = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    tensors.pop("quant_conv.bias")
    original.write(folder / "vae/diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(ConfigError, match=r"quant_conv\.bias"):
        prepare(parse(job(tmp_path / "out", weights=str(folder))))
    assert not (tmp_path / "out").exists()


def test_the_hash_is_that_of_a_staged_copy(single_file: Files, family_folder: Folders, tmp_path: Path) -> None:
    prior = PriorModel(**named(single_file("sdxl")), vae=str(family_folder("playground") / "vae"))
    for name, file in prior_model(prior).find().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / name)
    assert prior_model(prior).lies_in(tmp_path, prior_hash(prior))
    assert prior_hash(str(tmp_path)) == prior_hash(prior)
    assert load_prior(str(tmp_path)).vae.config.latents_mean is not None


@pytest.mark.slow
def test_a_run_of_a_single_file_makes_the_samples_of_its_folder(single_file: Files, family_folder: Folders,
                                                                tmp_path: Path) -> None:
    samples = []
    for name, prior in (("file", named(single_file("sd"))), ("folder", {"weights": str(family_folder("sd"))})):
        raw = job(tmp_path / name, **prior)
        raw["data"]["per_class"], raw["method"]["ratio"] = 1, 1
        complete(parse(raw))
        rows = [pq.read_table(file).to_pylist() for file in sorted((tmp_path / name).rglob("data/**/*.parquet"))]
        samples.append([row["image"] for table in rows for row in table])
    assert samples[0] == samples[1]
    assert len(samples[0]) == 10
