"""rayexpand: make a labelled image dataset bigger and better with guided diffusion models.

    run = rayexpand.expand("my.yaml")
    run.export("birds-5x", layout="imagefolder")

The names are those of rayexpand.api, which is imported when the first of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayexpand.api.cluster import submit
    from rayexpand.api.folders import AuditFolder, StudyFolder, SweepFolder, open
    from rayexpand.api.results import (
        Artifact,
        Audited,
        Checked,
        ClusterJob,
        Event,
        Planned,
        PlannedFit,
        PlannedLoop,
        PlannedStudy,
        PlannedSweep,
        Scores,
        Selected,
    )
    from rayexpand.api.runs import LoopFolder, RunFolder
    from rayexpand.api.statuses import status
    from rayexpand.api.verbs import (
        audit,
        bench,
        dataset,
        demo,
        evaluate,
        expand,
        fit,
        plan,
        select,
        sweep,
        train,
        validate,
    )
    from rayexpand.contract.errors import RayexpandError
    from rayexpand.methods import trust

__version__ = "0.2.0"
__all__ = ["Artifact", "AuditFolder", "Audited", "Checked", "ClusterJob", "Event", "LoopFolder", "Planned",
           "PlannedFit", "PlannedLoop", "PlannedStudy", "PlannedSweep", "RayexpandError", "RunFolder", "Scores",
           "Selected", "StudyFolder", "SweepFolder", "audit", "bench", "dataset", "demo", "evaluate", "expand", "fit",
           "open", "plan", "select", "status", "submit", "sweep", "train", "trust", "validate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rayexpand' has no attribute '{name}'")
    return getattr(import_module("rayexpand.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
