"""The arithmetic of a run, before it starts: how often its method calls the networks of its generator, times what one
call costs (models.cost).

Left out, because it is small beside them: a guide whose name does not say what it is, such as one trained here, text
encoders (texts repeat, and each is encoded once), and everything that is no matrix product, convolution or attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayexpand.contract.protocols import Calls
from rayexpand.contract.schema import Draw, Start
from rayexpand.models.cost import Cost, cost_of, tower_of
from rayexpand.models.folders import EMBEDDED

if TYPE_CHECKING:
    from rayexpand.runs.config import RunConfig

PEAKS = {"float32": 19.5}  # TFLOP/s of an A100, by the dtype of a run; of the others 312, both without sparsity
PEAK = 312.0


@dataclass(frozen=True, slots=True)
class ImageWork:
    """`tflop` of one image, and how it comes about."""

    tflop: float
    words: str


def cost_of_run(config: RunConfig) -> Cost | None:
    """What the generator of a run costs. None for the embedded ones, which are made for CPUs, for methods that need
    no generator, and where nothing is known of it."""
    if "prior" not in config.needs or config.prior.weights in EMBEDDED:
        return None
    return cost_of(config.prior.weights)


def image_work(config: RunConfig, cost: Cost, side: int, copies: float, draws: Sequence[Draw]) -> ImageWork:
    """Of a run with `copies` of each seed whose draws are like these."""
    calls, scale = calls_of(config, copies, draws), getattr(config.method, "guidance_scale", 1.0) or 1.0
    forwards = 1 if config.prior.guidance in ("embedded", "none") else cost.forwards(scale)
    network, decode = cost.network, cost.decode
    doubled = f" ({forwards} x {network.at(side):.3g} with guidance)" if forwards > 1 else ""
    parts = ((calls.steps, forwards * network.at(side), f"steps{doubled}"),
             (calls.decodes, decode.at(side), "decoding"), (calls.encodes, cost.encode.at(side), "encoding"),
             (calls.steps_back, forwards * network.back_at(side), "gradients of steps"),
             (calls.decodes_back, decode.back_at(side), "gradients of decoding"),
             (calls.decodes_back, 2 * _guide(config), "guide, there and back"))
    tflop = sum(count * each for count, each, _ in parts)
    said = ", ".join(f"{count:.3g} x {each:.3g} {what}" for count, each, what in parts if count and each)
    return ImageWork(tflop, f"{cost.name} ({cost.known}) at {side} px: {tflop:,.4g} TFLOP an image, {said}")


def _guide(config: RunConfig) -> float:
    """TFLOP of one answer of the guide that gradients come from; 0 where its name says nothing of its network."""
    return (tower_of(config.guide.weights) or 0.0) if "guide" in config.needs else 0.0


def calls_of(config: RunConfig, copies: float, draws: Sequence[Draw]) -> Calls:
    """Calls for one image of a run. A call encodes each of its seeds once, and their copies follow each other."""
    rows = config.sampler.batch
    seeds = 1 / max(copies, 1) + (1 - 1 / max(copies, 1)) / rows
    count = max(len(draws), 1)
    plain = Calls(steps=sum(draw.steps_run for draw in draws) / count, decodes=1.0,
                  encodes=seeds * sum(draw.start == Start.IMAGE for draw in draws) / count)
    said = getattr(config.method, "calls", None)
    return plain if said is None else said(plain, rows)


def peak_tflops(config: RunConfig) -> tuple[float, str]:
    """(TFLOP/s at most of one GPU, how that is known)."""
    if (given := config.estimate.peak_tflops) is not None:
        return given, "estimate.peak_tflops"
    found = PEAKS.get(config.prior.dtype, PEAK)
    return found, f"an A100 in {'float32' if config.prior.dtype == 'float32' else 'half precision'}"
