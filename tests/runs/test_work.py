"""The arithmetic that a plan counts, against what the methods do, counted while they run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rayexpand.contract.protocols import Batch, Calls, Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.diffusion.prototypes import fit_prototypes
from rayexpand.models.cost import SDXL, Cost, configurations
from rayexpand.models.flops import count
from rayexpand.models.prior import load_prior
from rayexpand.runs.bench import bench
from rayexpand.runs.config import RunConfig, parse
from rayexpand.runs.estimate import estimate_config
from rayexpand.runs.run import measured
from rayexpand.runs.work import calls_of, image_work
from tests.tiny import tiny_pipeline

CLASSES = ClassTable.of(["a", "b", "c"], ["zero", "one", "two"])
ROWS = 4


class MeanGuide:
    """Sees mean colours, without a matrix product."""

    size, differentiable, mean, std = (16, 16), True, torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)

    def features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.mean((2, 3))

    def head(self, f_BD: torch.Tensor) -> torch.Tensor:
        return f_BD * 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def cost(folder: Path) -> Cost:
    return count(configurations(folder))


@pytest.fixture(scope="module")
def tools(folder: Path) -> Tools:
    features = RowRng(0, "test", "features", 0).normals("x", (9, 3))
    prototypes = fit_prototypes(features, np.arange(9) % 3, 3, 2, guide_hash="", class_keys=CLASSES.key)
    return Tools(CLASSES, load_prior(str(folder), device="cpu"), MeanGuide(), prototypes)


def job(method: dict[str, Any], **prior: Any) -> RunConfig:
    return parse({"name": "job", "data": {"source": "digits"}, "method": method, "sampler": {"batch": ROWS},
                  "prior": {"weights": "models/some", **prior}})


def batch_of(method: Any) -> Batch:
    rngs = tuple(RowRng(0, method.name, f"seed-{i}", 0) for i in range(ROWS))
    draws = tuple(method.draw(f"seed-{i}", i % 3, 0, i, CLASSES, rng) for i, rng in enumerate(rngs))
    images = tuple(np.full((16, 16, 3), 10 + i, np.uint8) for i in range(ROWS))
    return Batch(draws, images, rngs, (False,) * ROWS)


SHORT = {"strength": 0.5, "steps": 6}
DISTDIFF = {"name": "distdiff", **SHORT, "guide_step": 2, "lookahead": 2}
PRACTICE = {"name": "practice", **SHORT, "every": 2}
GIF = {"name": "gif", **SHORT, "rotation": 0.0}


@pytest.mark.parametrize("method", [
    {"name": "img2img", **SHORT}, {"name": "img2img", **SHORT, "guidance_scale": 1},
    {"name": "text2img", "steps": 3}, DISTDIFF, {**DISTDIFF, "guidance_scale": 1, "lookahead": 1},
    {**DISTDIFF, "guidance": "direct"}, {**DISTDIFF, "guidance": "random"}, {**DISTDIFF, "measure": True},
    {**DISTDIFF, "guidance": "random", "measure": True}, {**DISTDIFF, "recompute": True},
    {**DISTDIFF, "guidance": "direct", "recompute": True},
    PRACTICE, {**PRACTICE, "strength": None, "every": 4}, {**PRACTICE, "recompute": True}, {**PRACTICE, "omega": 0},
    {**PRACTICE, "convention": "score", "direction": "random"},
    GIF, {**GIF, "chunk": 2}, {**GIF, "chunk": 8}, {**GIF, "guidance": "none"}, {**GIF, "measure": True},
    {**GIF, "guidance": "random", "measure": True}], ids=str)
@pytest.mark.fast_cases(2)
def test_counted_before_and_while_a_method_runs(method: dict[str, Any], tools: Tools, cost: Cost) -> None:
    config = job(method)
    batch = batch_of(config.method)
    tools.prior.embed(*([getattr(draw, text) for draw in batch.draws] for text in ("prompt", "negative")), 1)  # known
    with FlopCounterMode(display=False) as counter:
        config.method.expand(batch, tools)

    planned = image_work(config, cost, 16, copies=1, draws=batch.draws)
    rel = 0.01 if method.get("recompute") else 1e-5  # torch leaves out the last operation of what it computes again
    assert planned.tflop == pytest.approx(counter.get_total_flops() / 1e12 / ROWS, rel=rel)


@pytest.mark.slow
def test_bench_counts_what_a_plan_counted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that are none of those known: their count is there after `bench`, and it is that of the whole call."""
    monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path / "cache"))
    config = parse({"name": "job", "out": str(tmp_path), "data": {"source": "digits", "per_class": 1},
                    "method": {"name": "img2img", **SHORT, "ratio": 1}, "sampler": {"batch": 10},
                    "prior": {"weights": str(folder), "device": "cpu"}})
    assert estimate_config(config).petaflop is None
    found, planned = bench(config), estimate_config(config, measured(config))

    assert planned.petaflop is not None
    assert planned.petaflop * 1e6 / planned.images == pytest.approx(found.gflop_per_image, rel=1e-3)
    assert planned.notes["gpu_hours"] == f"measured by `rayexpand bench` ({tmp_path}/job.bench.json)"


def test_copies_share_the_encoding_of_their_seed() -> None:
    config = job({"name": "img2img", **SHORT})
    draws = batch_of(config.method).draws
    assert calls_of(config, 1, draws) == Calls(steps=3, encodes=1, decodes=1)
    assert calls_of(config, 1000, draws).encodes == pytest.approx(1 / ROWS, rel=0.01)
    assert calls_of(config, 2, draws).encodes == pytest.approx(1 / 2 + 1 / 2 / ROWS)
    gif = job(GIF)
    assert calls_of(gif, 1000, batch_of(gif.method).draws).encodes == 1  # each copy is turned


@pytest.mark.parametrize(("guidance", "forwards"), [("auto", 2), ("cfg", 2), ("none", 1), ("embedded", 1)])
def test_a_distilled_network_runs_once(guidance: str, forwards: int) -> None:
    config = job({"name": "text2img", "steps": 4}, guidance=guidance)
    made = image_work(config, SDXL, 512, copies=1, draws=batch_of(config.method).draws)
    assert made.tflop == pytest.approx(4 * forwards * SDXL.network.at(512) + SDXL.decode.at(512))


def test_steps_are_the_mean_of_the_draws() -> None:
    config = job({"name": "img2img", **SHORT})
    first, *rest = batch_of(config.method).draws
    assert calls_of(config, 1, [replace(first, steps_run=7), *rest]).steps == 4


def test_the_words_add_up() -> None:
    config = job({"name": "distdiff", "guidance_scale": 5})
    made = image_work(config, SDXL, 1024, copies=1, draws=batch_of(config.method).draws)

    assert f"{SDXL.name}" in made.words
    assert "27 x 13.5 steps (2 x 6.76 with guidance), 3 x 10.5 decoding, 1 x 4.88 encoding" in made.words
    assert "2 x 15.8 gradients of steps, 2 x 11.3 gradients of decoding" in made.words
    assert made.tflop == pytest.approx(27 * 13.5 + 3 * 10.5 + 4.88 + 2 * 15.8 + 2 * 11.3, rel=0.01)
