"""The loops of a study, and the runs that its controls of them are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rayexpand.contract.errors import DigestMismatch
from rayexpand.contract.protocols import Progress
from rayexpand.contract.settings import digest
from rayexpand.evaluation import select as selecting
from rayexpand.evaluation import select_scores
from rayexpand.evaluation.select_scores import Score
from rayexpand.runs.config import semantic
from rayexpand.runs.run import Run, pending_jobs, prepare
from rayexpand.studies.config import StudyConfig, expansion_config
from rayexpand.studies.parts import Arm, Study
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.controls import KINDS, Beside, Remade, may_have, one_shot


def loops_of(study: Study, arm: Arm, seed: int) -> list[Beside]:
    """Those that an arm uses for a study seed. Raises UsageError where one has not ended."""
    return [beside_of(study, name, made) for name in arm.config.uses
            if isinstance(made := study.expansions[name, seed], LoopConfig)]


def beside_of(study: Study, name: str, made: LoopConfig) -> Beside:
    return study.opened.beside(made, study.config.expansions[name].oversample)


def kinds_of(study: Study, arm: Arm) -> list[str]:
    """The controls of its loops that an arm has."""
    if not arm.config.control or arm.stands_for:
        return []
    loops = [loop for seed in study.config.seeds for loop in loops_of(study, arm, seed)]
    return [kind for kind in KINDS if any(loop.has(kind, arm.rounds) for loop in loops)
            and (kind != "whole" or any(loop.stopped for loop in loops))]


def foreseen_controls(config: StudyConfig, arms: Sequence[Arm]) -> list[Arm]:
    """The controls of their loops that arms will have, as far as the configuration says; what they share once. Where a
    loop will stop, and whether as many of each class is what the method plans, is not known yet."""
    found = dict[tuple[str, ...], Arm]()
    for arm in arms:
        loops = [made for name in arm.config.uses if (one := config.expansions[name]).rounds is not None and isinstance(
            made := expansion_config(config, name, one, config.seeds[0], config.data), LoopConfig)]
        for kind in KINDS if arm.config.control else ():
            if kind == "whole" or not any(may_have(kind, one, arm.rounds) for one in loops):
                continue
            shared = [digest(semantic(one_shot(one, kind))) + f"{one.rounds.share_of(arm.rounds):g}" for one in loops]
            key = (kind, digest(arm.recipe.model_dump(mode="json")), *(
                shared if kind in ("uniform", "classes") else [arm.name]))
            found.setdefault(key, replace(arm, control_of=arm.name, stands_for=kind))
    return list(found.values())


def control_runs(study: Study, arms: Sequence[Arm]) -> list[Remade]:
    """What the controls of these arms are made of, each once."""
    found = dict[str, Remade]()
    for arm in arms:
        for kind in kinds_of(study, arm):
            for seed in study.config.seeds:
                for loop in loops_of(study, arm, seed):
                    if loop.has(kind, arm.rounds):
                        found |= {one[0].folder: one for one in loop.runs(kind, arm.rounds)}
    return list(found.values())


def pending_controls(study: Study, arms: Sequence[Arm], progress: Progress = lambda *_: None, *,
                     device_here: bool = True) -> Iterator[Run]:
    """Those that have shards to make, ready to be driven. Raises DigestMismatch for one of another loop."""
    for made, part in control_runs(study, arms):
        run = prepare(made, progress, device_here=device_here, where=f"control {made.name}", part=part)
        if part is not None and (said := run.facts.get("follows")) != part.follows:
            raise DigestMismatch(f"{run.folder} is a control of another loop: it follows {said}, and that is "
                                 f"{part.follows}. Move it away, and the same command makes it")
        if pending_jobs(run):
            yield run


def prune(study: Study, arms: Sequence[Arm], score: Score = select_scores.in_process,
          progress: Progress = lambda *_: None) -> None:
    """Chooses from the pools of guided rounds. Raises DigestMismatch where a pool was chosen from in another way."""
    cluster, done = study.config.cluster.model_dump(mode="json"), set[str]()
    for arm in arms:
        if "pruned" not in kinds_of(study, arm):
            continue
        for loop in (loop for seed in study.config.seeds for loop in loops_of(study, arm, seed)):
            for raw in loop.prunings(arm.rounds) if loop.has("pruned", arm.rounds) else ():
                if raw["run"] not in done:
                    done.add(raw["run"])
                    selecting.select(selecting.parse({**raw, "cluster": cluster}, raw["run"]), score, progress)
