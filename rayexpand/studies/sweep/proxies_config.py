"""What a sweep file says of early signals: by what samples are judged before a classifier is trained on them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayexpand.contract.settings import Section
from rayexpand.data.seeds import DataConfig
from rayexpand.evaluation.evaluate import DistanceConfig, Metric

OF_METHOD = "method."  # before the name of a score that a method writes
LOWER = ("fd", "fid", "kd", "kid", "mmd2", "cmmd", "class_energy", f"{OF_METHOD}energy")  # proxies by how they are read
HIGHER = ("precision", "recall", "density", "coverage", "authenticity", "vendi", "clip_", f"{OF_METHOD}accept_score",
          f"{OF_METHOD}score_after")
PROXY_NAMES = {"fd_infinity": ("fd",), "precision_recall": ("precision", "recall"), "alignment": ("clip_",),
               "density_coverage": ("density", "coverage"), "mmd2_rbf10": ("mmd2_rbf10", "cmmd"), "classes": ()}

Prefers = Literal["lower", "higher"]


class ProxiesConfig(DistanceConfig):
    """By what the samples of a trial are judged before it trains."""

    metrics: list[Metric] = Field(["fd", "mmd2_rbf", "class_energy", "density_coverage", "vendi"], min_length=1,
                                  description="as of `evaluate`; scores that the method writes are taken too")
    reference: DataConfig | None = Field(None, description="real images that the samples of every trial are compared "
                                         "with; null: the images that the sweep scores on")


class EarlyConfig(Section):
    """Trials that are not trained, because a proxy of their samples is poor."""

    proxy: str = Field(min_length=1, description="its name in the results or the beginning of it: fd, "
                       "class_energy, method.energy_after")
    keep: float = Field(0.5, gt=0, lt=1, description="a trial is trained where its proxy is among this share of those "
                        "measured before it")
    first: int = Field(4, ge=1, description="so many trials are trained whatever theirs is")
    prefer: Prefers | None = Field(None, description="null: as the proxy is known to be read")


def prefers(proxy: str) -> Prefers | None:
    """How a proxy is read, None where that is not known."""
    return "lower" if proxy.startswith(LOWER) else "higher" if proxy.startswith(HIGHER) else None


def early_problems(proxies: ProxiesConfig, early: EarlyConfig | None) -> list[str]:
    if early is None:
        return []
    offered = [name for metric in proxies.metrics for name in PROXY_NAMES.get(metric, (metric,))]
    if not early.proxy.startswith((OF_METHOD, *offered)):
        return [f"early.proxy: '{early.proxy}' is not measured; known: {', '.join(offered)}, {OF_METHOD}<score that "
                "the method writes>; or add its metric to proxies.metrics"]
    if early.prefer is None and prefers(early.proxy) is None:
        return [f"early.prefer: is required, because whether lower or higher {early.proxy} is better is not known"]
    return []
