"""Prototypes of each class and its groups, by the features of a guide (DistDiff)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from rayexpand.artifacts.prototypes import FILE
from rayexpand.artifacts.store import publish
from rayexpand.contract.settings import Section
from rayexpand.diffusion.prototypes import join, save_prototypes
from rayexpand.fitting.costs import asked_of_guide
from rayexpand.fitting.features import Intake, by_class, gathered
from rayexpand.fitting.maker import FitBase, Maker, World, data_facts
from rayexpand.models.guides import guide_hash
from rayexpand.runs.stages import PlanStage, Sizes

VERSION = 1  # raised when the code below makes something else of the same configuration


class PrototypesFit(Section):
    groups: int = Field(3, ge=1, description="groups of each class (DistDiff: 3)")
    batch: int = Field(64, ge=1, description="images of one guide call; features may depend on it in the last digit")

    @property
    def intake(self) -> Intake:
        return Intake(self.batch)


class PrototypesMaker(Maker):
    kind = "prototypes"
    text = "prototypes of each class by the guide's features"
    section = PrototypesFit
    by_guide = True

    def stages(self, section: PrototypesFit, config: FitBase, sizes: Sizes) -> list[PlanStage]:
        return [asked_of_guide("fit prototypes", config, sizes)]

    def make(self, section: PrototypesFit, config: FitBase, world: World) -> Path:
        guide = guide_hash(config.guide.weights, config.guide.checkpoint, world.progress)
        made_from = {"version": VERSION, "data": data_facts(config, world.index), "guide_sha256": guide,
                     **section.model_dump()}

        def make(folder: Path) -> dict[str, Any]:
            costs: dict[str, Any] = {}
            scratch = folder / "features.tmp"
            features_ND, sound_N, refused = gathered(world.engine.blocks(config, guide, world.index, section.intake,
                                                                         costs), len(world.index),
                                                     scratch, world.progress)
            classes = []
            for done, one in enumerate(world.engine.classes(by_class(features_ND, sound_N, world.index),
                                                            section.groups), 1):
                classes.append(one)
                world.progress("grouping classes", done, len(world.index.classes))
            del features_ND
            scratch.unlink()
            save_prototypes(join(classes, guide, world.index.classes.key), folder / FILE)
            return {**costs, "guide": config.guide.model_dump(mode="json"), "refused": len(refused),
                    "refused_examples": dict(list(refused.items())[:20])}

        return publish(config.out, "prototypes", made_from, make)
