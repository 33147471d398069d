"""The space of a sweep: the values each field may take, and which of them are tried next.

Suggestion number i is a function of (seed, i) for random and grid search. Optuna's tree of Parzen estimators (Bergstra
et al. 2011) also looks at the results so far; its sampler is made anew for each suggestion with a seed keyed by
(seed, i), so a sweep that was killed goes on as it would have, where a sampler restored with its first seed would
suggest the first configurations again.

A field with `when` has a value only where other fields have one of the values it names; elsewhere the study's own
stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rayexpand.contract.rng import generator, row_key

if TYPE_CHECKING:
    import numpy as np
    from optuna.distributions import BaseDistribution

KINDS = ("choice", "grid", "uniform", "loguniform", "randint", "lograndint")
WHOLE, LOG = ("randint", "lograndint"), ("loguniform", "lograndint")
DIGITS = 4  # significant digits of a drawn number: a name for a value should be short
STARTUP = 10  # optuna: random suggestions before the first modelled one; a third of the samples where those are fewer


@dataclass(frozen=True)
class Dimension:
    """One swept field: `values` of choice and grid, else the ends and the step of a range. `when`: fields that must
    have one of these values for it to be swept."""

    field: str
    kind: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def examples(self) -> list[Any]:
        """Values that must all be valid for the whole dimension to be: every choice, or both ends and one between."""
        between = self.low + (self.step or 0.382 * (self.high - self.low))
        return list(self.values) or [self.rounded(one) for one in (self.low, between, self.high)]

    def with_conditions(self, value: Any) -> dict[str, Any]:
        """The value beside one that each field of `when` may have."""
        return {**{name: wanted[0] for name, wanted in self.when}, self.field: value}

    def draw(self, rng: np.random.Generator) -> Any:
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        if (step := self.step or self.kind == "randint"):
            return self.rounded(self.low + step * int(rng.integers(self._steps(step) + 1)))
        share = float(rng.random())
        if self.kind == "lograndint":  # each whole number has the logarithms that round to it
            low, high = math.log(self.low - 0.5), math.log(self.high + 0.5)
            return self.rounded(min(max(math.exp(low + share * (high - low)), self.low), self.high))
        if self.kind == "loguniform":
            return self.rounded(math.exp(math.log(self.low) + share * math.log(self.high / self.low)))
        return self.rounded(self.low + share * (self.high - self.low))

    def rounded(self, value: float) -> float | int:
        if self.kind in WHOLE:
            return round(value)
        return min(max(float(f"{value:.{12 if self.step else DIGITS}g}"), self.low), self.high)

    def distribution(self) -> BaseDistribution:
        """Optuna's; a choice is the number of the value, which may be of any type."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values:
            return CategoricalDistribution(list(range(len(self.values))))
        if self.kind in WHOLE:
            return IntDistribution(int(self.low), int(self.high), log=self.kind in LOG, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.kind in LOG, step=self.step)

    def _steps(self, step: float) -> int:
        return math.floor((self.high - self.low) / step + 1e-9)


def parse_dimension(field: str, spec: Any) -> Dimension | str:
    """The dimension of {choice: [...]} and so on, or what is wrong with it, as "field: why"."""
    step = spec.get("step") if isinstance(spec, Mapping) else None
    kinds = [key for key in spec if key not in ("step", "when")] if isinstance(spec, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        return f"{field}: write one of {', '.join(KINDS)}, such as {{uniform: [0.3, 0.9]}}, got {spec!r}"
    kind, values = kinds[0], spec[kinds[0]]
    found = _values(field, kind, values, step)
    if isinstance(found, str) or spec.get("when") is None:
        return found
    when = spec["when"]
    if not isinstance(when, Mapping) or not when:
        return f"{field}.when: must name fields of the space with the values they must have, got {when!r}"
    return replace(found, when=tuple((str(name), tuple(one) if isinstance(one, list) else (one,))
                                     for name, one in when.items()))


def _values(field: str, kind: str, values: Any, step: Any) -> Dimension | str:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) < 2:
        return f"{field}.{kind}: must be a list of two or more, got {values!r}"
    if kind in ("choice", "grid"):
        if step is not None:
            return f"{field}.step: has no effect on {kind}; take it out"
        if any(value in values[:i] for i, value in enumerate(values)):
            return f"{field}.{kind}: a value is given twice, in {values!r}"
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            return f"{field}.{kind}: a value is not finite, in {values!r}"
        return Dimension(field, kind, tuple(values))
    return _range(field, kind, values, step)


def _range(field: str, kind: str, values: Sequence[Any], step: Any) -> Dimension | str:
    numbers = [*values, *([] if step is None else [step])]
    if len(values) != 2 or any(isinstance(one, bool) or not isinstance(one, int | float) for one in numbers):
        return f"{field}.{kind}: must be [low, high] (and step) in numbers, got {list(values)!r}" + (
            "" if step is None else f", step {step!r}")
    if not all(map(math.isfinite, numbers)) or values[0] >= values[1]:
        return f"{field}.{kind}: low must be below high, got {list(values)!r}"
    if kind in LOG and (values[0] <= 0 or step is not None):
        return f"{field}.{kind}: needs low above 0, and takes no step"
    if kind in WHOLE and any(one != int(one) for one in numbers):
        return f"{field}.{kind}: needs whole numbers, got {numbers!r}"
    if step is not None and not 0 < step <= values[1] - values[0]:
        return f"{field}.step: must lie between 0 and high - low, got {step!r}"
    high = values[1]
    if step is not None:  # the last step that fits
        high = values[0] + step * math.floor((values[1] - values[0]) / step + 1e-9)
        high = float(f"{high:.12g}")
    return Dimension(field, kind, (), values[0], high, step)


def condition_problems(space: Sequence[Dimension]) -> list[str]:
    """What is wrong with the conditions of fields on each other, one line each."""
    known, problems = {one.field: one for one in space}, []
    for one in space:
        for name, wanted in one.when:
            where = f"{one.field}.when.{name}"
            if name not in known:
                problems.append(f"{where}: is no field of the space, which alone can be asked; known: "
                                f"{', '.join(other for other in known if other != one.field) or 'no other'}")
            elif one.field in _asked(known, name):
                problems.append(f"{where}: asks in a circle, for {name} depends on {one.field} itself")
            elif not known[name].values:
                problems.append(f"{where}: {name} is drawn from a range; a condition asks for values of a choice")
            elif lacking := [value for value in wanted if value not in known[name].values]:
                problems.append(f"{where}: {name} is never {', '.join(map(repr, lacking))}; it is one of "
                                f"{', '.join(map(repr, known[name].values))}")
    return problems


def _asked(known: Mapping[str, Dimension], field: str) -> set[str]:
    """The fields that decide whether `field` is swept, itself among them."""
    found, todo = set[str](), [field]
    while todo:
        if (name := todo.pop()) in known and name not in found:
            found.add(name)
            todo += [other for other, _ in known[name].when]
    return found | {field}


def applying(space: Sequence[Dimension], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields whose conditions hold, in the order of the space."""
    known = {one.field: one for one in space}

    def holds(field: str) -> bool:
        return all(values[name] in wanted and holds(name) for name, wanted in known[field].when)
    return {field: values[field] for field in known if holds(field)}


def n_points(space: Sequence[Dimension]) -> int | None:
    """Points of the whole space, those counted apart that differ only in fields that do not apply; None for a range of
    real numbers."""
    if any(not one.values and one.kind not in WHOLE and not one.step for one in space):
        return None
    return math.prod(len(one.values) or 1 + math.floor((one.high - one.low) / (one.step or 1) + 1e-9) for one in space)


def n_suggestions(space: Sequence[Dimension], search: str, samples: int | None) -> int:
    """Configurations a sweep tries, equal ones counted as often as they come."""
    gridded = [one for one in space if _is_gridded(one, search)]
    return math.prod(len(one.values) for one in gridded) * (samples or 1)


def suggest(space: Sequence[Dimension], search: Literal["random", "grid"] | str, seed: int, number: int,
            seen: Sequence[tuple[Mapping[str, Any], Sequence[tuple[int, float]], str]] = (),
            samples: int = 1) -> dict[str, Any]:
    """Values of suggestion `number`. `seen`, for optuna: values of earlier ones, their scores as (epoch, score), and
    their state: running, stopped, dropped, diverged or finished."""
    if search == "optuna":
        return _parzen(space, seed, number, seen, samples)
    values, place = dict[str, Any](), number
    for one in sorted((one for one in space if _is_gridded(one, search)), key=lambda one: one.field, reverse=True):
        place, at = divmod(place, len(one.values))  # the last field runs fastest
        values[one.field] = one.values[at]
    for one in space:
        if one.field not in values:
            values[one.field] = one.draw(generator(row_key(seed, "sweep", one.field, number, 0, "value")))
    return applying(space, values)


def _parzen(space: Sequence[Dimension], seed: int, number: int,
            seen: Sequence[tuple[Mapping[str, Any], Sequence[tuple[int, float]], str]], samples: int) -> dict[str, Any]:
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = {"running": TrialState.RUNNING, "stopped": TrialState.PRUNED, "dropped": TrialState.PRUNED,
              "finished": TrialState.COMPLETE, "diverged": TrialState.COMPLETE}
    distributions = {one.field: one.distribution() for one in space}
    key = int(generator(row_key(seed, "sweep", "", number, 0, "optuna")).integers(2**31))
    sampler = optuna.samplers.TPESampler(seed=key, n_startup_trials=min(STARTUP, max(1, samples // 3)),
                                         constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for values, curve, state in seen:
        params = {one.field: one.values.index(values[one.field]) if one.values else values[one.field] for one in space
                  if one.field in values}
        study.add_trial(create_trial(
            params=params, distributions={name: distributions[name] for name in params}, state=states[state],
            intermediate_values=dict(curve),
            value=curve[-1][1] if states[state] is TrialState.COMPLETE else None))
    asked = study.ask(distributions).params
    return applying(space, {one.field: one.values[asked[one.field]] if one.values else one.rounded(asked[one.field])
                            for one in space})


def _is_gridded(dimension: Dimension, search: str) -> bool:
    return dimension.kind == "grid" or (search == "grid" and dimension.kind == "choice")
