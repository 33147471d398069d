"""Counting networks on fake tensors, against counting them as they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rayexpand.diffusion.process import Point
from rayexpand.models.cost import SD1, SD2, SDXL, Cost, Work, configurations, cost_of
from rayexpand.models.flops import count, count_once
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.prior import load_prior
from tests.models.families import build


@pytest.fixture(scope="module", params=["sd", "lcm", "sdxl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("flops") / request.param)


@pytest.fixture(scope="module")
def found(folder: Path) -> Cost:
    return count(configurations(folder))


@pytest.fixture(scope="module")
def prior(folder: Path) -> StableDiffusionPrior:
    return load_prior(str(folder), device="cpu")


def tflop(call: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e12


@pytest.mark.parametrize("side", [48, 96])
@pytest.mark.fast_cases(1)
def test_counts_are_those_of_the_networks_at_every_size(prior: StableDiffusionPrior, found: Cost, side: int) -> None:
    z, x = torch.zeros(1, 4, side // 2, side // 2), torch.zeros(1, 3, side, side)
    at, (plain, guided) = Point(0.6, 0.8, 400.0), (prior.embed(["a three"], ["a two"], scale) for scale in (1, 5))
    with torch.no_grad():
        for cond, scale in ((plain, 1), (guided, 5)):
            assert tflop(lambda cond=cond: prior.predict(z, at, cond)) == pytest.approx(
                found.forwards(scale) * found.network.at(side), rel=1e-6)
        assert tflop(lambda: prior.encode(x, None)) == pytest.approx(found.encode.at(side), rel=1e-6)
        assert tflop(lambda: prior.decode(z)) == pytest.approx(found.decode.at(side), rel=1e-6)
    for call, work in ((lambda z: prior.predict(z, at, plain).clean, found.network), (prior.decode, found.decode)):
        leaf = z.clone().requires_grad_()
        out = call(leaf).sum()
        assert tflop(lambda out=out, leaf=leaf: torch.autograd.grad(out, leaf)) == pytest.approx(
            work.back_at(side), rel=1e-6)


@pytest.mark.fast_cases(1)
def test_texts_are_counted(prior: StableDiffusionPrior, found: Cost) -> None:
    with torch.no_grad():
        assert tflop(lambda: prior.embed(["a four"], ["a five"], 1)) == pytest.approx(2 * found.text, rel=1e-6)


def test_what_was_counted_once_is_known_then(folder: Path, found: Cost, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path))
    assert cost_of(str(folder)) is None
    monkeypatch.setattr("rayexpand.models.flops.count", lambda parts: found)
    assert count_once(folder) == found
    monkeypatch.setattr("rayexpand.models.flops.count", lambda parts: pytest.fail("counted again"))
    assert count_once(folder) == cost_of(str(folder)) == found
    assert (found.side, found.doubles) == (32, folder.name != "lcm")


# As published -------------------------------------------------------------------------------------------------------

VAE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
       "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
SD = {**UNET, "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280]}
XL = {**UNET, "sample_size": 128, "block_out_channels": [320, 640, 1280], "attention_head_dim": [5, 10, 20],
      "cross_attention_dim": 2048, "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
      "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
      "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
      "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
      "projection_class_embeddings_input_dim": 2816}


def clip(width: int, layers: int, heads: int, projection: int) -> dict[str, Any]:
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": heads, "projection_dim": projection, "vocab_size": 49408,
            "architectures": ["CLIPTextModel" + ("WithProjection" if projection == 1280 else "")]}


@pytest.mark.study  # half a minute
@pytest.mark.parametrize(("parts", "stated", "millions"), [
    ({"unet": {**SD, "cross_attention_dim": 768, "attention_head_dim": 8}, "text_encoder": clip(768, 12, 12, 768)},
     SD1, 860),
    ({"unet": {**SD, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
      "text_encoder": clip(1024, 23, 16, 512)}, SD2, 866),
    ({"unet": XL, "text_encoder": clip(768, 12, 12, 768), "text_encoder_2": clip(1280, 32, 20, 1280)}, SDXL, 2567)],
    ids=["1.x", "2.x", "XL"])
def test_the_table_of_architectures(parts: dict[str, Any], stated: Cost, millions: int) -> None:
    made = count({**parts, "vae": VAE})

    assert f"{millions:,} million" in made.name
    assert made.text == pytest.approx(stated.text, abs=1e-6)
    for name in ("network", "encode", "decode"):
        work: Work = getattr(stated, name)
        assert getattr(made, name).forward == pytest.approx(work.forward, abs=1e-6)
        if name != "encode":
            assert getattr(made, name).backward == pytest.approx(work.backward, abs=1e-6)
