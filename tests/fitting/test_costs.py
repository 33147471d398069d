"""Counted arithmetic of a fit, against what a step really does and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rayexpand.artifacts.store import publish
from rayexpand.contract.errors import SeedDataError
from rayexpand.fitting.adapter.recipe import make_finetune
from rayexpand.fitting.config import FitConfig, parse_fit
from rayexpand.fitting.costs import step_tflop
from rayexpand.fitting.plan import plan_fit, sizes_of
from rayexpand.models.cost import SD1, Cost, Work, tower_of
from rayexpand.runs.stages import PlanStage
from tests.fitting.adapter.test_finetuner import batch, tuner


def job(**fit: Any) -> FitConfig:
    return parse_fit({"name": "x", "data": {"source": "imagefolder", "path": "not/here"}, "fit": fit,
                      "prior": {"weights": "stable-diffusion-v1-5/stable-diffusion-v1-5@main"},
                      "guide": {"weights": "timm/vit_base_patch32_clip_224.openai@main"},
                      "estimate": {"seeds": 13_000, "classes": 10}})


def stages(config: FitConfig) -> dict[str, PlanStage]:
    return {one.stage.name: one.stage for one in plan_fit(config).stages}


@pytest.mark.parametrize("strategy", ["db", "full"])
def test_a_step_is_counted_as_it_is(strategy: str) -> None:
    """The tiny UNet of 4 x 4 latents: forward and gradients to the input counted alone, then as in `step_tflop`; what
    LoRA itself costs is left out, and the first layer needs no gradient to its input."""
    model = tuner(strategy=strategy, rank=1)
    rows = 6
    model.update(batch(0, rows))
    with FlopCounterMode(display=False) as step:
        model.update(batch(1, rows))
    module, parts = model.module.requires_grad_(False), batch(2, rows)
    z = parts.z0_BCHW.clone().requires_grad_(True)
    ids = model.ids(list(parts.text))
    with FlopCounterMode(display=False) as texts:
        hidden = model.encoders[0].model(ids).last_hidden_state
    with FlopCounterMode(display=False) as forward:
        out = model.unet(z, parts.t_B, encoder_hidden_states=hidden.detach(), return_dict=False)[0]
    with FlopCounterMode(display=False) as back:
        torch.autograd.grad(out.sum(), z)
    assert module is model.module
    each = [one.get_total_flops() / rows / 1e12 for one in (forward, back, texts)]
    cost = Cost("tiny", "counted", 16, Work((0.0, each[0], 0.0), (0.0, each[1], 0.0)), Work((0.0,) * 3),
                Work((0.0,) * 3), each[2])
    said, words = step_tflop(make_finetune({"preset": "tiny", "strategy": strategy, "prompt": "a {name}"}), cost, 512)

    assert rows * said == pytest.approx(step.get_total_flops() / 1e12, rel=0.1)
    assert ("to the weights" in words) == (strategy == "full")


def test_fine_tuning_by_hand() -> None:
    found = stages(job(adapter={"recipe": {"preset": "diffmix", "steps": 1000, "precision": "bf16"}, "workers": 4,
                                "resolution": 512}))
    each = SD1.network.at(512) + SD1.network.back_at(512) + 2 * SD1.text
    steps, latents = found["fit adapter"], found["fit adapter: latents"]

    assert steps.petaflop == pytest.approx(1000 * 8 * each / 1000)
    assert steps.hours == pytest.approx((8000 * each / (0.4 * 312) / 3600, 8000 * each / (0.1 * 312) / 3600))
    assert (steps.width, steps.saves) == (4, 1)
    assert latents.petaflop == pytest.approx(13_000 * 2 * SD1.encode.at(512) / 1000)
    assert latents.bytes == 13_000 * 2 * 64 * 1024, "LatentsConfig: 64 KiB a view at 512 pixels, mean and std"


def test_towers_by_their_names() -> None:
    """open_clip's own table: 4.41 and 81 billion multiplications and additions of the image tower."""
    assert tower_of("ViT-B-32") == pytest.approx(2 * 4.41e-3, rel=0.01)
    assert tower_of("timm/vit_large_patch14_clip_224.openai@main") == pytest.approx(2 * 81.08e-3, rel=0.01)
    assert (tower_of("ViT-L-14-336") or 0) > 2 * (tower_of("ViT-L-14") or 1)
    assert tower_of("resnet50") is None


def test_each_artifact_has_a_stage_and_a_word() -> None:
    found = stages(job(guide={"kind": "classifier", "recipe": {"preset": "distdiff"}}, prototypes={},
                       captions={"model": "models/blip"}, class_features={"images": 64}, thresholds={}))

    assert list(found) == ["fit classifier", "fit prototypes", "fit captions", "fit class_features", "fit thresholds"]
    assert found["fit classifier"].what == "20,300 steps of 64 images"
    assert found["fit captions"].hours is None
    assert "captioning model costs is not counted" in found["fit captions"].source
    assert found["fit class_features"].what == "features of 640 images"
    assert found["fit prototypes"].petaflop == pytest.approx(13 * 2 * 4.09e-3, rel=0.01), "of the ResNet-50 it trains"
    least, most = found["fit thresholds"].hours or (0, 0)
    assert most >= least == pytest.approx(13_000 * 2.2e-3 / 2 / 3600), "decoding takes longer than the smallest tower"


def test_what_was_made_before_says_how_long_it_took(tmp_path: Path) -> None:
    config = job(captions={"model": "models/blip"}).model_copy(update={"out": str(tmp_path)})
    made = publish(str(tmp_path), "captions", {}, lambda folder: {"process_seconds": 7200.0})
    (tmp_path / "x-captions").symlink_to(made.name)
    found = stages(config)["fit captions"]

    assert found.hours == (0.0, pytest.approx(2.0))
    assert found.source.startswith("measured: ")


def test_data_that_is_not_here_and_not_told_is_an_error() -> None:
    with pytest.raises(SeedDataError, match="not/here"):
        sizes_of(job(prototypes={}).model_copy(update={"estimate": job().estimate.model_copy(update={"seeds": None})}))
