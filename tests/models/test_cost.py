"""What a generator costs by the table of architectures, by names and by what was counted here; nothing is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayexpand.models import cost
from rayexpand.models.cost import SD1, SD2, SDXL, configurations, cost_of, counted, keep


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pipeline(folder: Path, unet: dict[str, Any], vae: dict[str, Any] | None = None) -> Path:
    for part, said in (("unet", unet), ("vae", vae or {"block_out_channels": [128, 256, 512, 512]})):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(said))
    return folder


WIDE, NARROW = [320, 640, 1280, 1280], [320, 640, 1280]


@pytest.mark.parametrize(("found", "at_512", "at_1024"), [
    (SD1, 0.803, 4.67), (SD2, 0.804, 4.67), (SDXL, 1.589, 6.76)], ids=lambda one: getattr(one, "name", ""))
def test_the_table_is_that_of_the_specification(found: cost.Cost, at_512: float, at_1024: float) -> None:
    assert found.network.at(512) == pytest.approx(at_512, rel=2e-3)
    assert found.network.at(1024) == pytest.approx(at_1024, rel=2e-3)
    assert (found.decode.at(512), found.decode.at(1024)) == pytest.approx((2.52, 10.5), rel=3e-3)
    assert (found.encode.at(512), found.encode.at(1024)) == pytest.approx((1.12, 4.88), rel=3e-3)


def test_stable_diffusion_of_25_guided_steps_as_published() -> None:
    assert 25 * SD1.forwards(7.5) * SD1.network.at(512) + SD1.decode.at(512) == pytest.approx(42.7, abs=0.05)
    assert (SD1.forwards(1), replace(SD1, doubles=False).forwards(7.5)) == (1, 1)


@pytest.mark.parametrize(("unet", "found", "side"), [
    ({"block_out_channels": WIDE, "cross_attention_dim": 768, "sample_size": 64}, SD1, 512),
    ({"block_out_channels": WIDE, "cross_attention_dim": 1024, "sample_size": 96}, SD2, 768),
    ({"block_out_channels": NARROW, "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10],
      "sample_size": 128}, SDXL, 1024)], ids=["1.5", "2.1", "XL"])
def test_a_folder_is_known_by_its_configuration(tmp_path: Path, unet: dict[str, Any], found: cost.Cost,
                                                side: int) -> None:
    said = cost_of(str(pipeline(tmp_path / "sdxl-by-its-name", unet)))

    assert said == replace(found, known="by its configuration", side=side)


def test_guidance_that_is_an_input_runs_the_network_once(tmp_path: Path) -> None:
    unet = {"block_out_channels": WIDE, "cross_attention_dim": 768, "time_cond_proj_dim": 256}
    assert (found := cost_of(str(pipeline(tmp_path / "lcm", unet)))) is not None
    assert found.forwards(8) == 1


@pytest.mark.parametrize(("unet", "vae"), [
    ({"block_out_channels": NARROW, "cross_attention_dim": 768}, None),
    ({"block_out_channels": WIDE, "cross_attention_dim": 768}, {"block_out_channels": [64, 64, 64, 64]})])
def test_another_architecture_is_unknown_until_it_was_counted(tmp_path: Path, unet: dict[str, Any],
                                                              vae: dict[str, Any] | None) -> None:
    folder = pipeline(tmp_path / "stable-diffusion-v1-5", unet, vae)
    assert cost_of(str(folder)) is None

    keep(configurations(folder), replace(SD1, name="counted here"))
    assert cost_of(str(folder)) == replace(SD1, name="counted here")


def test_a_damaged_count_is_none(tmp_path: Path, cache: Path) -> None:
    folder = pipeline(tmp_path / "model", {"block_out_channels": NARROW})
    keep(parts := configurations(folder), SDXL)
    assert counted(parts) == SDXL
    (file,) = (cache / "cost").iterdir()
    whole = file.read_text()

    for damaged in ("", whole[:100], whole.replace("1.48", "1.49"), '{"name": "x"}', "[]"):
        file.write_text(damaged)
        assert counted(parts) is None
    keep(parts, SDXL)
    assert counted(parts) == SDXL


@pytest.mark.parametrize(("weights", "found", "side"), [
    ("stable-diffusion-v1-5/stable-diffusion-v1-5@main", SD1, 512), ("CompVis/stable-diffusion-v1-4", SD1, 512),
    ("stabilityai/stable-diffusion-2-1", SD2, 768), ("stabilityai/stable-diffusion-2-1-base@main", SD2, 512),
    ("stabilityai/sd-turbo", SD2, 512), ("stabilityai/sdxl-turbo@main", SDXL, 512),
    ("stabilityai/stable-diffusion-xl-base-1.0@main", SDXL, 1024), ("stabilityai/cosxl", SDXL, 1024)])
def test_a_model_that_is_not_here_is_known_by_its_name(weights: str, found: cost.Cost, side: int) -> None:
    assert cost_of(weights) == replace(found, known="by its name", side=side)


def test_a_name_that_says_nothing_is_said_to_be_a_guess() -> None:
    assert (found := cost_of("some/model@main")) is not None
    assert (found.network, found.side) == (SD1.network, None)
    assert "assumed" in found.known


def test_configurations_in_the_cache_of_the_hub_win_over_the_name(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo, commit = tmp_path / "hub/models--acme--stable-diffusion-xl", "0" * 40
    pipeline(repo / "snapshots" / commit, {"block_out_channels": WIDE, "cross_attention_dim": 768, "sample_size": 32})
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(commit)

    assert cost_of("acme/stable-diffusion-xl") == replace(SD1, known="by its configuration", side=256)
    assert cost_of("acme/stable-diffusion-xl@main") == replace(SD1, known="by its configuration", side=256)
    assert cost_of("acme/stable-diffusion-xl@other") == replace(SDXL, known="by its name")


def test_needs_no_torch() -> None:
    script = ("import sys\nfrom rayexpand.models.cost import cost_of\nassert cost_of('a/sdxl-turbo').side == 512\n"
              "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)


# Masked autoencoders -------------------------------------------------------------------------------------------------


def test_a_masked_autoencoder_is_counted_as_torch_counts_it(tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from rayexpand.models.prior import load_prior
    from tests.models.gif_priors import tiny_mae

    prior, found = load_prior(str(tiny_mae(tmp_path / "mae")), device="cpu"), cost_of(str(tmp_path / "mae"))
    assert found is not None
    assert (found.side, found.known, found.forwards(4.0)) == (16, "by its configuration", 1)
    x = torch.rand(1, 3, 16, 16)
    with FlopCounterMode(display=False) as encoded:
        z = prior.encode(x, None)
    z = z.detach().requires_grad_()
    with FlopCounterMode(display=False) as decoded:
        out = prior.decode(z)
    with FlopCounterMode(display=False) as back:
        torch.autograd.grad(out.sum(), z)
    for work, forward in ((found.encode, encoded), (found.decode, decoded)):
        assert work.at(16) == pytest.approx(forward.get_total_flops() / 1e12)
    assert found.decode.back_at(16) == pytest.approx(back.get_total_flops() / 1e12)


def test_vit_mae_by_its_name() -> None:
    large = cost_of("facebook/vit-mae-large@main")
    assert large is not None
    assert (large.side, large.known) == (224, "by its name")
    assert large.encode.at(224) == pytest.approx(0.123, rel=0.01)  # 2 x 61.6 billion multiplications (ViT-L/16)
