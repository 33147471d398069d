"""A loop: a run whose samples are made in rounds, each dealt by what classifiers make of those before.

    <out>/<name>/rounds.json             see decisions.py
                 decisions/              one for each round, and one that says stop
                 rounds/0001/ 0002/ ...  ordinary runs
                 scores/0002.parquet     what round 2 was decided by; published without overwriting
                 lists/ trials/ results/ predictions/ checkpoints/   trainings r0002-fold3, as in a study
                 artifacts/classifier-<digest8>/   the guide of a guided round
                 report.html

    for r = 1, 2, ...:
        is decision r there?  if not: score what there is, train the guide, deal, publish decision r
        does it say stop?     the loop is over
        make the run of round r

What is on disk is all there is to know, so the same command goes on from wherever it was killed. How seeds are scored
and where runs are driven is handed in (`Between`, `drive`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from rayexpand import __version__
from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.errors import ConfigError, DamagedFile, DigestMismatch, SeedDataError, UsageError, few
from rayexpand.contract.protocols import Progress
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.contract.settings import differences, digest
from rayexpand.data import seeds
from rayexpand.data.folds import folds_of, read_groups
from rayexpand.data.subsets import shared_images, sound_rows
from rayexpand.models.guides import guide_hash
from rayexpand.runs import run as runs
from rayexpand.runs.allocation import dealt_facts
from rayexpand.runs.config import RunConfig, ids_sha256, resolved, semantic
from rayexpand.runs.joined import LOOP, read_loop_facts, round_folder, run_folders
from rayexpand.runs.plan import hash_column
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import create_once
from rayexpand.studies.rounds.config import LoopConfig, loop_preflight, resolved_loop, with_fields
from rayexpand.studies.rounds.dealing import allocate_of, deal_round, parts_of, room_problem, weigh
from rayexpand.studies.rounds.decisions import (
    FIRST,
    RoundDecision,
    Seen,
    config_in,
    first_of,
    publish_dealt,
    publish_decision,
    read_chain,
    read_dealt,
    round_problem,
    seen_of,
)

LOOP_FOLDERS = ("rounds", "decisions", "scores", "lists", "trials", "results", "predictions", "checkpoints", ".tmp")


@dataclass(frozen=True)
class Loop:
    """A loop with its dataset listed."""

    config: LoopConfig
    files: Files
    facts: dict[str, Any]  # rounds.json
    index: SeedIndex
    dataset: dict[str, Any]  # what listing it said

    @property
    def rng(self) -> PlanRng:
        return PlanRng(self.config.run.seed, self.config.run.method.name)

    @cached_property
    def base_N(self) -> np.ndarray:
        """uint16 (N,): copies that the method plans for each seed in all."""
        return self.config.run.method.copies(self.index, self.rng)

    @property
    def parts(self) -> list[int]:
        """Rows of each round; those behind the last one are left unspent."""
        return self.facts["parts"]

    def chain(self) -> list[RoundDecision]:
        return read_chain(self.files, self.facts)

    def is_over(self) -> bool:
        """Whether it has ended, and nothing is pending."""
        chain = self.chain()
        return bool(chain) and chain[-1].state == "stop" and not any(
            runs.pending_jobs(runs.open_run(one)) for one in run_folders(self.files))


@dataclass(frozen=True)
class Learned:
    """What was learned between two rounds."""

    scores: pa.Table | None = None  # of the seeds, where the rule reads them
    files: dict[str, str] = field(default_factory=dict)  # what a decision rests on: file -> sha256
    guide: dict[str, str] = field(default_factory=dict)
    gain: dict[str, Any] = field(default_factory=dict)
    seen: tuple[Seen, ...] = ()  # of each earlier round, where scores were made before something else was added
    stop: str = ""  # why no further round is made


class Between(Protocol):
    """What is done between two rounds: scoring, training the guide, comparing with earlier rounds."""

    def __call__(self, loop: Loop, chain: Sequence[RoundDecision], earlier: Sequence[runs.Run],
                 seen: tuple[Seen, ...]) -> Learned: ...


def open_loop(config: LoopConfig, on_model: Progress | None = None, *, device_here: bool = True) -> Loop:
    """Creates the folder of a loop, or opens it if it is the same loop.

    Raises ConfigError, SeedDataError, UsageError where the budget cannot be dealt or validation images are trained on,
    DigestMismatch with what differs.
    """
    files = open_files(config.folder, single_writer=config.run.store.single_writer)
    begun = files.read(LOOP) is not None
    if other := next((one for one in ("run", "study", "sweep") if files.read(f"{one}.json") is not None), ""):
        raise UsageError(f"{config.folder} holds a {other}; give the loop another run.name")
    if problems := loop_preflight(config, device_here=device_here, begun=begun):
        raise ConfigError(config.name, problems)
    index, dataset = seeds.surveyed(config.run.data)
    base_N = config.run.method.copies(index, PlanRng(config.run.seed, config.run.method.name))
    planned = int(base_N.sum(dtype=np.int64))
    parts = parts_of(config.rounds, planned)
    if problem := room_problem(config.rounds, base_N, parts):
        raise ConfigError(config.name, [problem])
    if not begun:
        _try(config, index)
    refuse_overlap(config, index)
    open_files(round_folder(files, 1), single_writer=config.run.store.single_writer).probe()
    for folder in LOOP_FOLDERS:
        files.make_folder(folder)
    files.sweep()
    identity = {"config": semantic_loop(config), "data": _data_sha256(index), "planned": planned, "parts": parts,
                "models": runs.model_hashes(config.of_round(1), on_model)}
    found = create_once(files, LOOP, {
        "version": __version__, "created": time.time(), "name": config.name, "config": resolved_loop(config),
        "identity": identity, "digest": digest(identity), "parts": parts, "planned": planned, "seeds": len(index),
        "classes": len(index.classes)}, "rounds")
    if changed := differences(found["identity"], identity):
        raise DigestMismatch("\n  ".join([f"{files.root} holds another loop; its rounds would not follow from each "
                                          "other. What differs (there -> here):", *changed,
                                          "Set it back, or give this loop another run.name."]))
    return Loop(config, files, found, index, dataset)


def loop_in(folder: str) -> Loop:
    """The loop of an existing folder, its dataset as its first round has it. Raises UsageError where there is none, or
    it has made no round yet."""
    files = open_files(folder)
    facts = read_loop_facts(files)
    first = runs.open_run(round_folder(files, 1))
    return Loop(config_in(files, facts), files, facts, first.plan.index, first.facts.get("dataset", {}))


def drive_loop(loop: Loop, between: Between, drive: Callable[[runs.Run], None],
               progress: Progress | None = None, *, device_here: bool = True) -> RoundDecision:
    """Makes what is left of a loop, and returns the decision that ended it. `drive` makes what is pending of a run.

    Raises OverBudget where more rows of a round failed than limits.max_failed allows, DigestMismatch where a decision
    is not of this loop or what it saw is not there any more.
    """
    earlier: list[runs.Run] = []
    for number in itertools.count(1):
        chain = loop.chain()
        if len(chain) < number:
            _decide(loop, chain, earlier, between)
            chain = loop.chain()
        decision = chain[number - 1]
        _refuse_other_samples(decision, earlier)
        if decision.state == "stop":
            return decision
        run = prepare_round(loop, decision, progress, device_here=device_here)
        drive(run)
        earlier.append(replace(run, plan=replace(run.plan, index=loop.index)))  # one index in memory for all rounds
    raise AssertionError("unreachable")


def prepare_round(loop: Loop, decision: RoundDecision, progress: Progress | None = None, *,
                  device_here: bool = True) -> runs.Run:
    """The run of a decision, created or opened. Raises DigestMismatch where its folder holds another one."""
    table = read_dealt(loop.files, decision)
    if not table["seed_id"].equals(loop.index.table["seed_id"]):
        raise DigestMismatch(f"{loop.files.at(decision.name)}: is of other seeds than run.data lists now")
    _refuse_other_guide(loop, decision)
    part = runs.RoundPart(loop.index, loop.dataset, table["copies"].to_numpy(), table["first"].to_numpy(),
                          {"round": decision.round, "decision": decision.sha256})
    if problem := round_problem(loop.files, decision.round, gone=False):
        raise DamagedFile(problem)
    run = runs.prepare(round_config(loop, decision), progress, device_here=device_here,
                       where=f"{loop.config.name}, round {decision.round}", part=part)
    if (said := run.facts.get("follows")) != part.follows:
        raise DigestMismatch(f"{run.folder} was not made by {decision.name}: it follows {said}, and that is "
                             f"{part.follows}. Move it away, and the same command makes the round")
    return run


def _refuse_other_guide(loop: Loop, decision: RoundDecision) -> None:
    """Raises UsageError where the guide of a round is gone, DigestMismatch where it is another one."""
    if not decision.guide:
        return
    folder = loop.files.at(decision.guide["folder"])
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: is gone, and {decision.name} names it as the guide of its round. Copy it from "
                         "where the decision was made, or restore it from a copy")
    if (found := guide_hash(str(folder), None)) != decision.guide["sha256"]:
        raise DigestMismatch(f"{folder}: is not the guide that {decision.name} names "
                             f"({decision.guide['sha256'][:8]} -> {found[:8]}). Restore it from a copy")


def round_config(loop: Loop, decision: RoundDecision) -> RunConfig:
    """The configuration of the run of a decision."""
    guide = str(loop.files.at(decision.guide["folder"])) if decision.guide else None
    return with_fields(loop.config.of_round(decision.round), decision.method, guide)


def _refuse_other_samples(decision: RoundDecision, earlier: Sequence[runs.Run]) -> None:
    """Raises DigestMismatch where the samples that a decision saw are not those that are there."""
    for number, (run, seen) in enumerate(zip(earlier, decision.seen, strict=False), 1):
        found = seen_of(run.store, seen.generations)
        if found != seen:
            raise DigestMismatch(f"{run.folder}: {decision.name} saw {seen.kept:,} samples of round {number} (hash "
                                 f"{seen.files[:8]}), and {found.kept:,} are there now (hash {found.files[:8]}). "
                                 "Restore its data files from a copy; `rayexpand verify` names damaged ones")


def _decide(loop: Loop, chain: Sequence[RoundDecision], earlier: Sequence[runs.Run],
            between: Between) -> None:
    """Publishes the next decision."""
    number, spent, planned = len(chain) + 1, sum(one.planned for one in chain), loop.facts["planned"]
    rounds, left = loop.config.rounds, planned - spent
    seen, learned = tuple(seen_of(one.store) for one in earlier), Learned()
    if number > rounds.count:
        learned = Learned(stop=f"count: {number - 1} rounds are made" if left else "budget: the last share is spent")
    elif earlier or rounds.guided_from == 1:
        learned = between(loop, chain, earlier, seen)
    unspent = f"; {left:,} of {planned:,} samples are not spent" if left else ""
    plain = RoundDecision(
        round=number, state="stop", reason=learned.stop + unspent, follows=chain[-1].sha256 if chain else FIRST,
        loop=loop.facts["digest"], spent=spent, left=left,
        seen=learned.seen or seen, scores=learned.files, guide=learned.guide, gain=learned.gain)
    if learned.stop:
        publish_decision(loop.files, plain)
        return
    rows, first_N = loop.parts[number - 1], first_of(chain, loop.files, len(loop.index))
    weight_N = weigh(rounds, loop.index, loop.base_N, first_N, loop.rng, learned.scores)
    copies_N = deal_round(rounds, loop.index, loop.base_N, first_N, weight_N, rows, loop.rng,
                          scored=learned.scores is not None)
    table = publish_dealt(loop.files, number, loop.index.table["seed_id"].combine_chunks(), copies_N, first_N, weight_N)
    allocate = allocate_of(rounds, scored=learned.scores is not None)
    publish_decision(loop.files, replace(
        plain, state="run", reason=f"{rows:,} of {planned:,} samples", planned=rows, left=left - rows,
        method=resolved(loop.config.of_round(number))["method"], table=table,
        dealt=dealt_facts(allocate, loop.index, copies_N, learned.scores)))


def semantic_loop(config: LoopConfig) -> dict[str, Any]:
    """What decides the samples of a loop. Lists count by what they say, wherever they lie."""
    rounds = config.rounds.model_dump(mode="json")
    rounds["scores"]["recipe"] = make_recipe(config.rounds.scores.recipe).model_dump(mode="json")
    if str(group := config.rounds.scores.group).endswith(".csv"):
        rounds["scores"]["group"] = digest(read_groups(str(group)))
    if config.rounds.guide is not None:
        rounds["guide"] = make_recipe(config.rounds.guide).model_dump(mode="json")
    if (validation := config.rounds.validation) is not None:
        rounds["validation"]["ids"] = ids_sha256(validation) or validation.ids
    return {"run": semantic(config.run), "rounds": rounds}


def _data_sha256(index: SeedIndex) -> str:
    """Of ids, labels, faults and classes."""
    hasher = hashlib.sha256(json.dumps([index.classes.key, index.classes.asked]).encode())
    for name in ("seed_id", "label", "fault"):
        hash_column(hasher, index.table[name])
    return hasher.hexdigest()


def _try(config: LoopConfig, index: SeedIndex) -> None:
    """Raises what would keep classifiers from being trained after the first round."""
    from rayexpand.classifier.classifier import try_recipe

    rounds, seed = config.rounds, config.run.seed
    recipes = [rounds.scores.recipe] * rounds.scores_seeds + [rounds.guide_recipe] * rounds.trains_guide
    for recipe in recipes:
        try_recipe(make_recipe(recipe), len(index.classes), seed)
    if rounds.scores_seeds:
        folds_of(index, config.run.data, rounds.scores.folds, seed, rounds.scores.group)


def refuse_overlap(config: LoopConfig, index: SeedIndex) -> None:
    """Raises UsageError where rounds would be compared on images that are trained on, or that tell nothing."""
    if (data := config.rounds.validation) is None:
        return
    try:
        validation = seeds.build_index(data)
    except SeedDataError as error:
        raise SeedDataError(seeds.renamed([str(error)], "rounds.validation")[0]) from error
    if not len(sound_rows(validation)):
        raise UsageError("rounds.validation: has no image that can be used; correct its split, ids or files")
    if validation.classes.key != index.classes.key:
        raise UsageError(f"rounds.validation: its classes {few(validation.classes.key)} are not those of run.data "
                         f"{few(index.classes.key)}; give another part of the same dataset")
    if shared := shared_images((index, config.run.data), (validation, data)):
        raise UsageError(f"rounds.validation: {len(shared):,} of its images are those of run.data ({few(shared)}), "
                         "which are trained on; choose another part with rounds.validation.split, or leave them out "
                         "with rounds.validation.ids")
