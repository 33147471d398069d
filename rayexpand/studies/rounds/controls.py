"""What stands beside a loop in a study: as many samples, made otherwise.

    kind        its samples                                                             is there where
    uniform     one run, as the method plans them                                       rule or guide say otherwise
    whole       the same, of the whole budget                                           a loop stopped before that
    classes     one run, as many of each class                                          the method plans otherwise
    targets     the rounds once more, the counts of each handed to other seeds          the rule reads scores
    direction   guided rounds once more, in random directions as long as the gradient   rounds are guided
    pruned      for a guided round those of highest entropy, by its guide, among n      rounds are guided
                times as many without guidance, as many of each class

A budget is counted in planned samples, of the rounds that an arm uses; one run is made of the whole budget, and as many
of its samples are taken as these rounds spent, the first ones of each seed. What is made once more is of the same
decision, with its guide: round 1, and rounds before the guided ones, are those of the loop. A control that would train
on the samples of its loop is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.settings import digest
from rayexpand.loader.training_set import RowSource
from rayexpand.runs.allocation import READS, Allocate, deal
from rayexpand.runs.config import RunConfig, semantic
from rayexpand.runs.joined import round_folder
from rayexpand.runs.plan import planned_copies
from rayexpand.runs.run import RoundPart, open_run
from rayexpand.runs.status import class_counts, view_run
from rayexpand.storage.tables import healthy_json
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.decisions import RoundDecision, read_dealt
from rayexpand.studies.rounds.loop import Loop, round_config

KINDS = {"uniform": "one-shot uniform", "whole": "one-shot whole budget", "classes": "one-shot equal per class",
         "targets": "random targets", "direction": "random direction", "pruned": "over-sampled and pruned"}
PRUNED = "pruned"  # the selection of a pool
# How runs are called that are made of a round, and the controls that they belong to.
CALLED = {"random-targets": "targets", "random-direction": "direction", "pool": "pruned"}

Remade = tuple[RunConfig, RoundPart | None]  # a run of a control, with what it is dealt where it is of a round


def may_have(kind: str, loop: LoopConfig, used: int | None) -> bool:
    """Whether a loop has a control of this kind, as far as its configuration says. `used`: of its rounds; None: all."""
    rounds, method = loop.rounds, loop.run.method
    last = rounds.count if used is None else used
    guided = rounds.guided_from is not None and last >= rounds.guided_from
    aims = rounds.rule != "uniform" and (last > 1 or not READS[rounds.rule])
    return {"uniform": guided or aims,
            "whole": rounds.stop is not None and last == rounds.count,
            "classes": guided or rounds.rule != "equal",
            "targets": bool(READS[rounds.rule]) and not rounds.permuted and last > 1,
            "direction": guided and getattr(method, "direction", None) == "gradient",
            "pruned": guided}[kind]


def unguided(loop: LoopConfig) -> RunConfig:
    """The run of a loop without guidance."""
    if loop.rounds.guided_from is None:
        return loop.run
    return loop.run.model_copy(update={"method": loop.run.method.model_copy(update={"omega": 0.0})})


def one_shot(loop: LoopConfig, kind: str) -> RunConfig:
    """The run of the controls `uniform` and `classes`, but for its place."""
    allocate = Allocate(rule="equal", cap=loop.rounds.allocate.cap) if kind == "classes" else None
    return unguided(loop).model_copy(update={"allocate": allocate})


@dataclass(frozen=True)
class Beside:
    """A loop of a study that has ended, and what stands beside it."""

    loop: Loop
    out: str  # folder of the runs of the study
    oversample: float

    def __post_init__(self) -> None:
        if self.chain[-1:] == [] or self.chain[-1].state != "stop":
            raise UsageError(f"{self.loop.files.root}: the loop has not ended; run the same `rayexpand train` again")

    @cached_property
    def chain(self) -> list[RoundDecision]:
        return self.loop.chain()

    @cached_property
    def decisions(self) -> list[RoundDecision]:
        """Of the rounds that were made."""
        return [one for one in self.chain if one.state == "run"]

    @cached_property
    def _copies(self) -> dict[str, np.ndarray]:
        """Of each seed in a run of the whole budget."""
        return {kind: planned_copies(self.loop.index, self._one_shot(kind))[0] for kind in ("uniform", "classes")}

    def spent(self, used: int | None) -> int:
        return sum(one.planned for one in self.decisions[:used])

    @property
    def stopped(self) -> bool:
        """Whether it ended before its shares were spent."""
        return len(self.decisions) < self.loop.config.rounds.count

    def has(self, kind: str, used: int | None) -> bool:
        """Whether there is a control of this kind."""
        return may_have(kind, self.loop.config, used) and (
            kind != "classes" or not np.array_equal(self._copies[kind], self.loop.base_N))

    def rows(self, kind: str, used: int | None) -> list[RowSource]:
        """What is trained on: of the loop itself ("") or of a control."""
        if kind == "whole":
            return [RowSource(run=self._one_shot(kind).folder)]
        if kind in ("uniform", "classes"):
            most_N = self._copies[kind].astype(np.int64)
            key_N = self.loop.rng.per_seed("allocate", self.loop.index.seed_ids)
            return [RowSource(run=self._one_shot(kind).folder,
                              copies=deal(most_N, self.spent(used), key_N, None, most_N))]
        again = {part.follows["round"]: made.folder for made, part in self.runs(kind, used) if part is not None}
        return [RowSource(run=again.get(one.round, round_folder(self.loop.files, one.round)),
                          selection=PRUNED if kind == "pruned" and one.round in again else None)
                for one in self.decisions[:used]]

    def runs(self, kind: str, used: int | None) -> list[Remade]:
        """The runs that a control is made of, beside those of the loop."""
        if kind in ("uniform", "whole", "classes"):
            return [(self._one_shot(kind), None)]
        remake: dict[str, Callable[[Sequence[RoundDecision]], Iterator[Remade]]] = {
            "": lambda decisions: iter(()), "targets": self._permuted, "direction": self._in_random_directions,
            "pruned": self._pools}
        return list(remake[kind](self.decisions[:used]))

    def prunings(self, used: int | None) -> Iterator[dict[str, Any]]:
        """What `select` is asked for each pool."""
        guided = {one.round: one for one in self.decisions if one.guide}
        for pool, part in self.runs("pruned", used):
            assert part is not None
            number = part.follows["round"]
            kept_K = class_counts(view_run(round_folder(self.loop.files, number)))
            yield {"name": PRUNED, "run": pool.folder, "seed": self.loop.config.run.seed,
                   "guide": {"weights": str(self.loop.files.at(guided[number].guide["folder"]))},
                   "rule": {"kind": "best", "score": "clip_entropy", "n": kept_K.tolist(), "per": "class"}}

    def facts(self, used: int | None) -> dict[str, Any]:
        """What an arm says of its loop: budgets in planned samples, and how it ended."""
        decisions, end = self.decisions[:used], self.chain[-1]
        return {"loop": self.loop.config.name, "rounds": len(decisions), "of": self.loop.config.rounds.count,
                "spent": self.spent(used), "planned": self.loop.facts["planned"], "stopped": self.stopped,
                "kept": sum(open_run(round_folder(self.loop.files, one.round)).totals().kept for one in decisions),
                "ended": end.reason if len(decisions) == len(self.decisions) else ""}

    def seconds(self, used: int | None) -> dict[str, float]:
        """Process-seconds of the trainings before the decisions of these rounds; of all of them also before the last
        one, which says stop: `scoring` seeds, and `guide`, a classifier of everything."""
        last = len(self.chain) if len(self.decisions[:used]) == len(self.decisions) else used
        found = {"scoring": 0.0, "guide": 0.0}
        for name in self.loop.files.list("results"):
            if (result := healthy_json(self.loop.files, f"results/{name}")) and int(name[1:5]) <= (last or 0):
                kind = "scoring" if "-fold" in name else "guide"
                found[kind] += result["seconds"] * max(1, result["workers"])
        return found

    # ------------------------------------------------------------------------------------------------------ the runs

    def _one_shot(self, kind: str) -> RunConfig:
        """A run of the whole budget, the same for all loops of one method."""
        made = one_shot(self.loop.config, kind)
        called = "per-class" if kind == "classes" else "one-shot"
        name = f"{called}-{digest([semantic(made), made.artifacts])[:8]}"
        return made.model_copy(update={"name": name, "out": self.out})

    def _dealt(self, decision: RoundDecision) -> tuple[np.ndarray, np.ndarray]:
        """Copies and first copies of each seed."""
        table = read_dealt(self.loop.files, decision)
        return table["copies"].to_numpy(), table["first"].to_numpy()

    def _again(self, decision: RoundDecision, called: str, made: RunConfig, copies_N: np.ndarray,
               first_N: np.ndarray) -> Remade:
        name = f"{self.loop.config.name}-{called}-{decision.round:04d}"
        part = RoundPart(self.loop.index, self.loop.dataset, copies_N.astype(np.uint16), first_N.astype(np.uint16),
                         {"round": decision.round, "decision": decision.sha256, "control": called})
        return made.model_copy(update={"name": name, "out": self.out}), part

    def _permuted(self, decisions: Sequence[RoundDecision]) -> Iterator[Remade]:
        """One permutation of all seeds that the method has copies for, so that concentration stays."""
        able = np.flatnonzero(self.loop.base_N)
        ids = self.loop.index.seed_ids
        order = np.argsort(self.loop.rng.per_seed("permute", [ids[one] for one in able]), kind="stable")
        first_N = np.zeros(len(ids), np.int64)
        for one in decisions:
            copies_N, _ = self._dealt(one)
            if one.round > 1:
                dealt_N, copies_N = copies_N, np.zeros_like(copies_N)
                copies_N[able[order]] = dealt_N[able]
                yield self._again(one, "random-targets", round_config(self.loop, one), copies_N, first_N)
            first_N = first_N + copies_N

    def _in_random_directions(self, decisions: Sequence[RoundDecision]) -> Iterator[Remade]:
        for one in decisions:
            if one.guide:
                made = round_config(self.loop, one)
                made = made.model_copy(update={"method": made.method.model_copy(update={"direction": "random"})})
                yield self._again(one, "random-direction", made, *self._dealt(one))

    def _pools(self, decisions: Sequence[RoundDecision]) -> Iterator[Remade]:
        """Unguided samples of the seeds of each guided round, numbered one after the other."""
        next_N: np.ndarray | None = None
        key_N = self.loop.rng.per_seed("allocate", self.loop.index.seed_ids)
        for one in decisions:
            if one.guide:
                copies_N, first_N = self._dealt(one)
                next_N = first_N.astype(np.int64) if next_N is None else next_N
                many_N = deal(copies_N, round(self.oversample * one.planned), key_N)
                yield self._again(one, "pool", unguided(self.loop.config), many_N, next_N)
                next_N = next_N + many_N


def round_facts(loops: Sequence[Beside], used: int | None, kind: str) -> dict[str, Any]:
    """What a trial says of its loops, or which control of them it is."""
    if kind:
        return {"stands_for": kind}
    seconds = [one.seconds(used) for one in loops]
    return {"loops": [one.facts(used) for one in loops],
            **{f"{name}_seconds": sum(one[name] for one in seconds) for name in ("scoring", "guide")}}


def learned_seconds(loops: Sequence[Beside], used: int | None, kind: str) -> float:
    """Process-seconds of trainings that samples rest on: of the guide for those that are guided, or chosen by it."""
    guided = [one for one in loops if any(decision.guide for decision in one.decisions[:used])]
    needs: Mapping[str, tuple[str, ...]] = {"": ("scoring", "guide"), "uniform": (), "whole": (), "classes": ()}
    return sum(one.seconds(used)[name] for one in (loops if not kind else guided)
               for name in needs.get(kind, ("guide",)))
