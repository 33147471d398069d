"""What is learned between two rounds: scores of seeds, a guide, and whether another round is worth it.

Decision r rests on trainings r000r-fold0, ... (cross_fit.py) and r000r-guide, the latter on everything there is. What
they gave is published without overwriting before the decision, and it says which samples it saw:

    scores/000r.parquet               of the seeds
    scores/000r-validation.parquet    label, margin: answers of r000r-guide for the validation images
    artifacts/classifier-<digest8>    r000r-guide, as methods are guided by it
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.artifacts.store import publish
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import DamagedFile, RayexpandError
from rayexpand.data.seeds import build_index
from rayexpand.data.subsets import sound_rows
from rayexpand.fitting.maker import ARTIFACTS
from rayexpand.loader.training_set import RowSource
from rayexpand.models.guide_files import CLASSIFIER, save_classifier
from rayexpand.models.guides import guide_hash
from rayexpand.runs.allocation import FACTS, READS
from rayexpand.runs.run import Run
from rayexpand.runs.store import faulty_seeds
from rayexpand.storage.files import Files, failpoint
from rayexpand.storage.tables import NAMED, parquet_bytes, read_table, table_of
from rayexpand.studies.cross_fit import Seeds, classifier_trial, cross_fit, held_out, scores_bytes
from rayexpand.studies.kept import load_classifier
from rayexpand.studies.parts import Train, Trial, TrialFolder
from rayexpand.studies.rounds.decisions import RoundDecision, Seen
from rayexpand.studies.rounds.loop import Learned, Loop
from rayexpand.studies.rounds.stop import gain_of, stops
from rayexpand.studies.samples import training_set

ASKED = 256  # seeds that a guide answers for where there are no validation images: it has seen them


@dataclass(frozen=True)
class Learning:
    """Scores seeds and trains guides by classifiers; `train` says where."""

    train: Train

    def __call__(self, loop: Loop, chain: Sequence[RoundDecision], earlier: Sequence[Run],
                 seen: tuple[Seen, ...]) -> Learned:
        rounds, work = loop.config.rounds, _Work(loop, len(chain) + 1, earlier, seen, self.train)
        on = rounds.stop.on if rounds.stop is not None else ""
        made = [work.scores()] if rounds.scores_seeds and earlier else []
        made += [work.validated()] if on == "validation" and earlier else []
        learned = Learned(files={name: file_sha256(loop.files, name) for name, _ in made},
                          seen=_seen(made[0][1]) if made else seen)
        if rounds.stop is not None and earlier:
            before = [table_in(loop.files, name, sha256) for one in chain for name, sha256 in one.scores.items()
                      if _is_compared(name, on)]
            gain = gain_of(rounds.stop, [*map(_right, before), _right(made[-1][1])], chain[-1].gain)
            learned = replace(learned, gain=gain, stop=stops(rounds.stop, gain))
        if READS[rounds.rule] and earlier:
            learned = replace(learned, scores=made[0][1])
        if work.is_guided and not learned.stop:
            learned = replace(learned, guide=work.guide())
        return learned


@dataclass(frozen=True)
class _Work:
    """The trainings before one decision."""

    loop: Loop
    number: int
    earlier: Sequence[Run]
    seen: tuple[Seen, ...]
    train: Train

    @cached_property
    def seeds(self) -> Seeds:
        """The dataset; a seed that could not be read when it was expanded has that fault."""
        faults = {one: why for run in self.earlier for one, why in faulty_seeds(run.store).items()}
        index = self.loop.index
        if faults:
            column = pa.array([faults.get(one, fault) for one, fault in zip(
                index.seed_ids, index.table["fault"].to_pylist(), strict=True)], pa.string())
            at = index.table.schema.get_field_index("fault")
            index = replace(index, table=index.table.set_column(at, index.table.schema.field(at), [column.cast(
                index.table.schema.field(at).type)]))
        return index, self.loop.config.run.data

    @property
    def seed(self) -> int:
        return self.loop.config.run.seed

    @property
    def is_guided(self) -> bool:
        """Whether the round that is decided is."""
        first = self.loop.config.rounds.guided_from
        return first is not None and self.number >= first

    @property
    def sources(self) -> list[RowSource]:
        """Earlier rounds that have samples."""
        return [RowSource(run=str(run.folder)) for run, seen in zip(self.earlier, self.seen, strict=True) if seen.kept]

    def folder(self, **training: Any) -> TrialFolder:
        config = self.loop.config
        return TrialFolder(f"{config.name} before round {self.number}", self.loop.files,
                           config.training.model_copy(update=training), config.cluster, len(self.loop.index.classes))

    def scores(self) -> tuple[str, pa.Table]:
        """File and table of the scores of the seeds."""
        name = f"scores/{self.number:04d}.parquet"
        if self.loop.files.read(name) is None:
            table = cross_fit(self.folder(), f"r{self.number:04d}", self.loop.config.rounds.scores, self.seeds,
                              self.sources, self.train, seed=self.seed)
            facts = {**json.loads(table.schema.metadata[FACTS]), **self._seen_facts()}
            table = table.replace_schema_metadata({FACTS: json.dumps(facts, sort_keys=True).encode()})
            self.loop.files.publish(name, scores_bytes(table, name), "scores", self.number)
        return name, table_in(self.loop.files, name)

    def validated(self) -> tuple[str, pa.Table]:
        """File and table of what the classifier of everything says of the validation images."""
        name = f"scores/{self.number:04d}-validation.parquet"
        if self.loop.files.read(name) is None:
            found = read_table(self.loop.files, f"predictions/{self.trained.name}.parquet")
            table = pa.table({"label": found["label"], "margin": found["margin"]})
            content = parquet_bytes(table, {NAMED: name.encode(), FACTS: json.dumps(self._seen_facts()).encode()})
            self.loop.files.publish(name, content, "scores", self.number)
        return name, table_in(self.loop.files, name)

    def guide(self) -> dict[str, str]:
        """The artifact of the classifier of everything."""
        trial, loop = self.trained, self.loop
        failpoint("before_guide", self.number)
        folder = publish(str(loop.files.at(ARTIFACTS)), CLASSIFIER, {"trial": trial.digest}, lambda folder: _as_guide(
            loop.files, trial, folder, loop.index.classes.key))
        failpoint("after_guide", self.number)
        return {"folder": f"{ARTIFACTS}/{folder.name}", "sha256": guide_hash(str(folder), None)}

    @cached_property
    def trained(self) -> Trial:
        """The finished trial of a classifier of all seeds and samples, its weights kept."""
        rounds = self.loop.config.rounds
        folder = self.folder(**({"keep": "weights"} if self.is_guided else {}))
        name, rows = f"r{self.number:04d}-guide", training_set([RowSource(seeds=self.seeds), *self.sources])
        validation = rounds.validation
        asked = (build_index(validation), validation) if validation is not None else held_out(
            folder, name, *self.seeds, sound_rows(self.seeds[0])[:ASKED])
        trial = classifier_trial(folder, name, rounds.guide_recipe, self.seeds[1], asked, rows, self.seed)
        if failed := self.train(folder, [trial]):
            raise RayexpandError(f"the classifier before round {self.number} could not be trained; the same command "
                                 f"tries again:\n  {failed[0]}")
        return trial

    def _seen_facts(self) -> dict[str, Any]:
        return {"seen": [asdict(one) for one in self.seen]}


def table_in(files: Files, name: str, sha256: str = "") -> pa.Table:
    """A table of scores/. Raises DamagedFile where it does not hold what was written, or what has this hash."""
    where, content = files.at(name), files.read(name)
    if content is None:
        raise DamagedFile(f"{where}: is gone. Restore it from a copy")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedFile(f"{where}: is damaged, or was changed by hand: it is not what a decision names. Restore it "
                          "from a copy")
    return table_of(content, where)


def file_sha256(files: Files, name: str) -> str:
    return hashlib.sha256(files.read(name) or b"").hexdigest()


def _seen(table: pa.Table) -> tuple[Seen, ...]:
    return tuple(Seen(**one) for one in json.loads(table.schema.metadata[FACTS])["seen"])


def _right(table: pa.Table) -> np.ndarray:
    return table["margin"].to_numpy() > 0


def _is_compared(name: str, on: str) -> bool:
    return name.endswith("-validation.parquet") == (on == "validation")


def _as_guide(files: Files, trial: Trial, folder: Path, classes: Sequence[str]) -> dict[str, Any]:
    module = load_classifier(files, trial).module
    save_classifier(folder, module, Recipe(**trial.recipe), classes)
    return {"trial": trial.name}
