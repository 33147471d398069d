"""Checks the folder of a loop: each round as a run, and whether its decisions follow from each other and from scores.

Each problem names one file: that whose content does not agree with the others. Samples that a later `retry` made are no
problem; they are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from rayexpand.contract.errors import DamagedFile, RayexpandError, few
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.settings import digest
from rayexpand.data import seeds
from rayexpand.models.guides import guide_hash
from rayexpand.runs.allocation import READS
from rayexpand.runs.config import resolved
from rayexpand.runs.joined import LOOP, read_loop_facts, round_folder, round_name
from rayexpand.runs.run import Run, open_run
from rayexpand.runs.verify import Findings
from rayexpand.runs.verify import verify as verify_run
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.studies.fold_check import leaked_seeds
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.dealing import deal_round, parts_of, weigh
from rayexpand.studies.rounds.decisions import (
    FIRST,
    RoundDecision,
    array_sha256,
    config_in,
    decision_name,
    read_dealt,
    read_decision,
    round_problem,
    seen_of,
    unseen,
)
from rayexpand.studies.rounds.learning import table_in
from rayexpand.studies.rounds.loop import refuse_overlap

COPY = "Restore it from a copy"
CLOSE = 1e-9  # weights hold logarithms, which differ in the last digit between machines


@dataclass
class LoopFindings(Findings):
    unseen: int = 0  # samples that a later retry made, so that the next decision did not see them

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "unseen": self.unseen}

    def table(self) -> list[tuple[str, str]]:
        return [*super().table(), ("made after the next decision", f"{self.unseen:,}")]


def verify_loop(folder: str, *, pixels: bool = False) -> LoopFindings:
    """Findings of all rounds together, and what does not agree in decisions, scores, guides and lists. Rounds that are
    not there yet are no problem. Raises UsageError where there is no loop."""
    files, found = open_files(folder), LoopFindings()
    runs = dict(_sound_rounds(files, found, pixels))
    try:
        facts = read_loop_facts(files)
        config = config_in(files, facts)
    except DamagedFile as error:
        found.problems.append(_below(files, error))
        return found
    check = _Check(files, facts, config, runs, found)
    check.facts_and_chain()
    check.validation()
    for decision in check.decisions:
        check.decision(decision)
    return found


def _sound_rounds(files: Files, found: LoopFindings, pixels: bool) -> Iterator[tuple[int, Run]]:
    """Verifies the run of each round; those without a problem by their numbers."""
    first: Run | None = None
    last = max((int(name[:4]) for name in files.list("decisions") if re.fullmatch(r"\d{4}\.json", name)), default=0)
    for number in range(1, last + 1):
        folder, where = round_folder(files, number), round_name(number)
        try:
            if problem := round_problem(files, number):
                found.problems.append(problem)
            if problem or open_files(folder).read("run.json") is None:
                continue
            run = open_run(folder)
            one = verify_run(run, pixels=pixels)
        except RayexpandError as error:
            found.problems.append(f"{where}/{str(error).replace(f'{folder}/', '')}")
            continue
        found.add(one, where)
        if one.problems:
            continue
        if first is not None and run.plan.index.table.equals(first.plan.index.table):
            run = replace(run, plan=replace(run.plan, index=first.plan.index))  # one in memory for all rounds
        first = first or run
        yield number, run


@dataclass
class _Check:
    files: Files
    facts: dict[str, Any]
    config: LoopConfig
    runs: dict[int, Run]  # rounds without a problem
    found: LoopFindings
    decisions: list[RoundDecision] = field(default_factory=list)  # those that can be read
    tables: dict[int, Any] = field(default_factory=dict)  # what they deal, by round

    def say(self, name: str, problem: str) -> None:
        self.found.problems.append(f"{name}: {problem}. {COPY}")

    def facts_and_chain(self) -> None:
        """rounds.json, and which decisions are those of this loop."""
        there = [int(name[:-5]) for name in self.files.list("decisions") if re.fullmatch(r"\d{4}\.json", name)]
        for number in range(1, max(there, default=0) + 1):
            name = decision_name(number)
            if number not in there:
                self.say(name, f"is gone, and {decision_name(max(there))} is there")
            elif (decision := self.read(name, partial(read_decision, self.files, number))) is not None:
                self.decisions.append(decision)
        others = [one for one in self.decisions if one.loop != self.facts["digest"]]
        if self.decisions == others != [] or not self.facts_agree():
            self.say(LOOP, "was changed by hand: it is not what the decisions were made by")
            self.decisions = []
            return
        for one in others:
            self.say(one.name, "is a decision of another loop")
        self.decisions = [one for one in self.decisions if one not in others]

    def validation(self) -> None:
        """No image that rounds are compared on is trained on, as far as both datasets are here."""
        run, data = next(iter(self.runs.values()), None), self.config.rounds.validation
        if run is not None and data is not None and not (seeds.check(data) or seeds.check(run.config.data)):
            self.read(LOOP, partial(refuse_overlap, self.config, run.plan.index))

    def facts_agree(self) -> bool:
        """Whether rounds.json says one thing. Lists of ids and groups may be gone since, so they are not looked at."""
        said, rounds = self.facts["identity"], self.config.rounds.model_dump(mode="json")
        run = resolved(self.config.run)
        return (digest(said) == self.facts["digest"] and parts_of(self.config.rounds, said["planned"]) == said["parts"]
                and (self.facts["parts"], self.facts["planned"]) == (said["parts"], said["planned"])
                and all(said["config"]["rounds"][name] == value for name, value in rounds.items()
                        if name not in ("scores", "guide", "validation"))
                and all(said["config"]["run"][name] == run[name] for name in ("method", "seed")))

    def read(self, name: str, read: Callable[[], Any]) -> Any:
        """What `read` gives, None where the file is damaged, which is said."""
        try:
            return read()
        except DamagedFile as error:
            self.found.problems.append(_below(self.files, error))
        except RayexpandError as error:
            self.found.problems.append(f"{name}: {error}")
        return None

    def decision(self, decision: RoundDecision) -> None:
        before = next((one for one in self.decisions if one.round == decision.round - 1), None)
        if not self.follows(decision, before):
            return
        self.counts(decision)
        sound_scores = self.scores(decision)
        if decision.state == "run":
            table = self.read(decision.name, partial(read_dealt, self.files, decision))
            if table is not None:
                self.tables[decision.round] = table
                self.dealing(decision, table, sound_scores)
            self.guide(decision)
        self.seen(decision)

    def follows(self, decision: RoundDecision, before: RoundDecision | None) -> bool:
        """The chain. run.json of a round says which decision was there when it began."""
        run = self.runs.get(decision.round)
        if run is not None and run.facts.get("follows") != {"round": decision.round, "decision": decision.sha256}:
            self.say(decision.name, f"is not the decision that rounds/{decision.round:04d} was made by")
        elif before is not None and decision.follows != before.sha256 and self.was_there(before):
            self.say(decision.name, f"does not follow {before.name}")
        elif decision.round == 1 and decision.follows != FIRST:
            self.say(decision.name, "does not begin a loop")
        else:
            return True
        return False

    def was_there(self, decision: RoundDecision) -> bool:
        """Whether the round of a decision says that it is the one it was made by; else that is said already."""
        run = self.runs.get(decision.round)
        return run is None or run.facts.get("follows", {}).get("decision") == decision.sha256

    def counts(self, decision: RoundDecision) -> None:
        planned, parts = self.facts["planned"], self.facts["parts"]
        spent = sum(parts[:decision.round - 1])
        rows = parts[decision.round - 1] if decision.state == "run" else 0
        if (decision.spent, decision.planned, decision.left) != (spent, rows, planned - spent - rows):
            self.say(decision.name, f"plans {decision.planned:,} samples after {decision.spent:,} with "
                     f"{decision.left:,} left, where the shares give {rows:,} after {spent:,}")

    def scores(self, decision: RoundDecision) -> bool:
        """The files that a decision rests on; whether all are as they were."""
        sound = True
        for name, sha256 in decision.scores.items():
            table = self.read(name, partial(table_in, self.files, name, sha256))
            sound = sound and table is not None
            if table is not None and "fold" in table.column_names and {*range(1, decision.round)} <= self.runs.keys():
                self.folds(decision.round)
        return sound

    def folds(self, number: int) -> None:
        """No fold was trained on a seed that it scores, or on a sample of one. What was cleared away says nothing."""
        names = [one.removesuffix(".json") for one in self.files.list("trials", f"r{number:04d}-fold")]
        for name in sorted(names) if self.config.rounds.scores.folds > 1 else ():
            if self.files.read(rows := f"lists/{name}.txt") is None:
                continue
            leaked = self.read(rows, partial(leaked_seeds, self.files, name, self.opened))
            if leaked:
                self.say(rows, f"{len(leaked):,} of these seeds, or samples of theirs, are in what {name} was trained "
                         f"on ({few(leaked)}), so that its scores say nothing")

    def opened(self, folder: str) -> Run:
        """A round by its folder, which may have moved since."""
        return self.runs[int(folder.rpartition("/")[2])]

    def dealing(self, decision: RoundDecision, table: Any, sound_scores: bool) -> None:
        """Copies follow from weights, weights from scores, first copies from the round before."""
        name = decision.table["file"]
        copies_N, first_N, weight_N = (table[one].to_numpy() for one in ("copies", "first", "weight"))
        if (array_sha256(copies_N), array_sha256(first_N)) != (decision.table["copies"], decision.table["first"]):
            self.say(decision.name, f"states other hashes than {name} has")
            return
        had_N, earlier = np.zeros_like(first_N), self.tables.get(decision.round - 1)
        if earlier is not None:
            had_N = earlier["first"].to_numpy() + earlier["copies"].to_numpy()
        elif decision.round > 1:
            return  # that of the round before is damaged, which is said
        run = next(iter(self.runs.values()), None)
        if not np.array_equal(first_N, had_N):
            self.say(name, "does not count from where the round before ended")
        elif int(copies_N.sum(dtype=np.int64)) != decision.planned:
            self.say(name, f"deals {int(copies_N.sum(dtype=np.int64)):,} samples, and {decision.name} says "
                     f"{decision.planned:,}")
        elif run is not None and (problem := self.dealt(decision, run, copies_N, first_N, weight_N, sound_scores)):
            self.say(name, problem)
        elif (own := self.runs.get(decision.round)) is not None and not (
                np.array_equal(own.plan.copies, copies_N) and np.array_equal(own.plan.first, first_N)):
            self.say(f"rounds/{decision.round:04d}/{own.facts['plan']}", f"is not what {name} deals")

    def dealt(self, decision: RoundDecision, run: Run, copies_N: np.ndarray, first_N: np.ndarray, weight_N: np.ndarray,
              sound_scores: bool) -> str:
        """What is wrong with the counts of a round, dealt once more from weights and from scores."""
        index, rounds = run.plan.index, self.config.rounds
        rng = PlanRng(self.config.run.seed, self.config.run.method.name)
        base_N, reads = self.config.run.method.copies(index, rng), bool(READS[rounds.rule]) and decision.round > 1
        again_N = deal_round(rounds, index, base_N, first_N, weight_N, decision.planned, rng, scored=reads)
        if len(wrong := np.flatnonzero(again_N != copies_N)):
            seed_id = index.table["seed_id"][int(wrong[0])].as_py()
            return (f"the copies of {len(wrong):,} seeds are not those that their weights give ({seed_id}: "
                    f"{copies_N[wrong[0]]} instead of {again_N[wrong[0]]})")
        if reads and not sound_scores:
            return ""
        scores = table_in(self.files, f"scores/{decision.round:04d}.parquet") if reads else None
        if not np.allclose(weigh(rounds, index, base_N, first_N, rng, scores), weight_N, rtol=CLOSE, atol=0):
            return "its weights do not follow from the scores"
        return ""

    def guide(self, decision: RoundDecision) -> None:
        if not decision.guide:
            return
        folder = decision.guide["folder"]
        if (found := self.read(folder, partial(guide_hash, str(self.files.at(folder)), None))) is not None and (
                found != decision.guide["sha256"]):
            self.say(folder, f"is not the guide that {decision.name} names")

    def seen(self, decision: RoundDecision) -> None:
        """Samples of earlier rounds as they were seen; what came later is counted by the next decision."""
        for number, seen in enumerate(decision.seen, 1):
            if (run := self.runs.get(number)) is None:
                continue
            if seen_of(run.store, seen.generations) != seen:
                self.say(decision.name, f"saw other samples than are in rounds/{number:04d}/data")
            elif number == decision.round - 1:
                self.found.unseen += unseen(run.store, seen)


def _below(files: Files, error: RayexpandError) -> str:
    return str(error).replace(f"{files.root}/", "")
