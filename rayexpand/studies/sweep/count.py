"""What a sweep will try, counted before it starts: configurations, classifiers, expansions, and what trials share.

Random suggestions and grids are known beforehand, so they are counted one by one; of Optuna's, which depend on results,
and of more than MOST the numbers are upper bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rayexpand.contract.errors import ConfigError
from rayexpand.contract.settings import digest
from rayexpand.studies.config import StudyConfig
from rayexpand.studies.sweep.config import SweepConfig, dimensions_of, identity, made_from, study_with
from rayexpand.studies.sweep.space import n_points, n_suggestions, suggest

MOST = 2_000  # configurations that are looked at one by one
NAMED = 3  # of those that cannot be


@dataclass(frozen=True)
class SweepCount:
    """`asked`: configurations in all; `points` of the space, None for a range; `trials` that differ; `seeds` of each;
    `expansions`: runs that are made, one for each set of real images; `uses`: how often trials ask for one; `again`:
    classifiers of the best trained once more; `refused`: configurations whose values do not go together, and why.
    `is_exact`: False where all but `asked`, `points` and `seeds` are upper bounds."""

    asked: int
    points: int | None
    trials: int
    seeds: int
    expansions: int
    uses: int
    again: int
    refused: tuple[str, ...] = ()
    is_exact: bool = True

    @property
    def classifiers(self) -> int:
        return self.trials * self.seeds

    @property
    def sentence(self) -> str:
        """For people, before it starts."""
        most = "" if self.is_exact else "at most "
        found = [f"{most}{_n(self.trials, 'trial')}{self._of_the_space()}",
                 f"{most}{_n(self.classifiers, 'classifier')} ({_n(self.seeds, 'seed')} each)"
                 + (f" and {self.again} of the best once more" if self.again else "")]
        if self.uses:
            found.append(f"{most}{_n(self.expansions, 'expansion')}" + (
                f", used {self.uses} times" if self.uses > self.expansions and self.is_exact else ""))
        return "; ".join(found)

    def _of_the_space(self) -> str:
        equal = self.asked - self.trials - len(self.refused)
        parts = [f"of the {self.points:,} points of the space"] if self.points and self.trials != self.points else []
        parts += [f"{equal:,} of {self.asked:,} asked for are equal to another"] if equal and self.is_exact else []
        parts += [f"{len(self.refused):,} cannot be"] if self.refused else []
        return f" ({', '.join(parts)})" if parts else ""

    def lines(self) -> list[str]:
        """Configurations that cannot be, the first few."""
        more = len(self.refused) - NAMED
        return [f"cannot be: {line}" for line in self.refused[:NAMED]] + (
            [f"cannot be: {more} more"] if more > 0 else [])

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "refused": list(self.refused), "classifiers": self.classifiers,
                "sentence": self.sentence}


def count_of(config: SweepConfig) -> SweepCount:
    """Loads nothing and lists no dataset."""
    space = dimensions_of(config)
    asked = n_suggestions(space, config.search, config.samples)
    seeds = len(study_with(config.study, config, {}).seeds if config.seeds is None else config.seeds)
    again = (config.fresh_seeds or seeds) if config.score_on != "test" or config.fresh_seeds else 0
    shared: dict[str, Any] = {"asked": asked, "points": n_points(space), "seeds": seeds, "again": again}
    if config.search == "optuna" or asked > MOST:
        trials = min(asked, shared["points"] or asked)
        most = _most_expansions(config, trials)
        return SweepCount(trials=trials, expansions=most, uses=most, is_exact=False, **shared)
    refused, trials, runs, uses = list[str](), set[str](), set[str](), 0
    for values in (suggest(space, config.search, config.seed, number) for number in range(asked)):
        try:
            study = study_with(config.study, config, values)
        except ConfigError as error:
            refused.append(f"{_words(values)}: {'; '.join(error.problems)}")
            continue
        if (key := digest(identity(study))) not in trials:
            trials.add(key)
            own = [*_runs(study)]
            runs.update(own)
            uses += len(own)
    return SweepCount(trials=len(trials), expansions=len(runs), uses=uses, refused=tuple(refused), **shared)


def _runs(study: StudyConfig) -> Iterator[str]:
    """A key of each run that a configuration makes, one for each set of real images; none for runs that are there."""
    differ = study.subset.kind != "full" and study.subset.seed is None and study.vary != "classifier"
    shared = not study.resample and not differ and study.vary != "data"
    for name in study.arms[0].uses:
        if study.expansions[name].run is None:
            for seed in study.seeds[:1] if shared else study.seeds:
                yield digest([made_from(study.expansions[name], study.data.model_dump(mode="json")), seed,
                              study.subset.model_dump(mode="json")])


def _most_expansions(config: SweepConfig, trials: int) -> int:
    """Where configurations are not known: those of one, if no field changes what is expanded, else of every trial."""
    runs, most = set[str](), 0
    for dimension in dimensions_of(config):
        for value in dimension.examples():
            try:
                own = {*_runs(study_with(config.study, config, dimension.with_conditions(value)))}
            except ConfigError:
                continue
            runs |= own
            most = max(most, len(own))
    return most if len(runs) == most else trials * most


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _n(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
