"""The space of a sweep: the values each field may take, and which of them are tried next.

Suggestion number i is a function of (seed, i) for random and grid search. Optuna's tree of Parzen estimators (Bergstra
et al. 2011) also looks at the results so far; its sampler is made anew for each suggestion with a seed keyed by
(seed, i), so a sweep that was killed goes on as it would have, where a sampler restored with its first seed would
suggest the first configurations again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rayexpand.contract.rng import generator, row_key

if TYPE_CHECKING:
    import numpy as np
    from optuna.distributions import BaseDistribution

KINDS = ("choice", "grid", "uniform", "loguniform", "randint")
DIGITS = 4  # significant digits of a drawn number: a name for a value should be short
STARTUP = 10  # optuna: random suggestions before the first modelled one; a third of the samples where those are fewer


@dataclass(frozen=True)
class Dimension:
    """One swept field: `values` of choice and grid, else the ends and the step of a range."""

    field: str
    kind: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None

    def examples(self) -> list[Any]:
        """Values that must all be valid for the whole dimension to be: every choice, or both ends."""
        return list(self.values) or [self.rounded(self.low), self.rounded(self.high)]

    def draw(self, rng: np.random.Generator) -> Any:
        if self.values:
            return self.values[int(rng.integers(len(self.values)))]
        if self.kind == "randint":
            return self.rounded(self.low + (self.step or 1) * int(rng.integers(self._steps(self.step or 1) + 1)))
        if self.step:
            return self.rounded(self.low + self.step * int(rng.integers(self._steps(self.step) + 1)))
        share = float(rng.random())
        if self.kind == "loguniform":
            return self.rounded(math.exp(math.log(self.low) + share * math.log(self.high / self.low)))
        return self.rounded(self.low + share * (self.high - self.low))

    def rounded(self, value: float) -> float | int:
        if self.kind == "randint":
            return round(value)
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def distribution(self) -> BaseDistribution:
        """Optuna's; a choice is the number of the value, which may be of any type."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values:
            return CategoricalDistribution(list(range(len(self.values))))
        if self.kind == "randint":
            return IntDistribution(int(self.low), int(self.high), step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.kind == "loguniform", step=self.step)

    def _steps(self, step: float) -> int:
        return math.floor((self.high - self.low) / step + 1e-9)


def parse_dimension(field: str, spec: Any) -> Dimension | str:
    """The dimension of {choice: [...]} and so on, or what is wrong with it, as "field: why"."""
    step = spec.get("step") if isinstance(spec, Mapping) else None
    kinds = [key for key in spec if key != "step"] if isinstance(spec, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in KINDS:
        return f"{field}: write one of {', '.join(KINDS)}, such as {{uniform: [0.3, 0.9]}}, got {spec!r}"
    kind, values = kinds[0], spec[kinds[0]]
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) < 2:
        return f"{field}.{kind}: must be a list of two or more, got {values!r}"
    if kind in ("choice", "grid"):
        if step is not None:
            return f"{field}.step: has no effect on {kind}; take it out"
        if any(value in values[:i] for i, value in enumerate(values)):
            return f"{field}.{kind}: a value is given twice, in {values!r}"
        return Dimension(field, kind, tuple(values))
    return _range(field, kind, values, step)


def _range(field: str, kind: str, values: Sequence[Any], step: Any) -> Dimension | str:
    numbers = [*values, *([] if step is None else [step])]
    if len(values) != 2 or any(isinstance(one, bool) or not isinstance(one, int | float) for one in numbers):
        return f"{field}.{kind}: must be [low, high] (and step) in numbers, got {list(values)!r}" + (
            "" if step is None else f", step {step!r}")
    if not all(map(math.isfinite, numbers)) or values[0] >= values[1]:
        return f"{field}.{kind}: low must be below high, got {list(values)!r}"
    if kind == "loguniform" and (values[0] <= 0 or step is not None):
        return f"{field}.loguniform: needs low above 0, and takes no step"
    if kind == "randint" and any(one != int(one) for one in numbers):
        return f"{field}.randint: needs whole numbers, got {numbers!r}"
    if step is not None and not 0 < step <= values[1] - values[0]:
        return f"{field}.step: must lie between 0 and high - low, got {step!r}"
    high = values[1]
    if step is not None:  # the last step that fits
        high = values[0] + step * math.floor((values[1] - values[0]) / step + 1e-9)
        high = float(f"{high:.12g}")
    return Dimension(field, kind, (), values[0], high, step)


def n_suggestions(space: Sequence[Dimension], search: str, samples: int | None) -> int:
    """Configurations a sweep tries, equal ones counted as often as they come."""
    gridded = [one for one in space if _is_gridded(one, search)]
    return math.prod(len(one.values) for one in gridded) * (samples or 1)


def suggest(space: Sequence[Dimension], search: Literal["random", "grid"] | str, seed: int, number: int,
            seen: Sequence[tuple[Mapping[str, Any], Sequence[tuple[int, float]], str]] = (),
            samples: int = 1) -> dict[str, Any]:
    """Values of suggestion `number`. `seen`, for optuna: values of earlier ones, their scores as (epoch, score), and
    their state: running, stopped, diverged or finished."""
    if search == "optuna":
        return _parzen(space, seed, number, seen, samples)
    gridded = sorted((one for one in space if _is_gridded(one, search)), key=lambda one: one.field)
    points = list(itertools.product(*(one.values for one in gridded)))
    values = dict(zip((one.field for one in gridded), points[number % len(points)], strict=True))
    for one in space:
        if one.field not in values:
            values[one.field] = one.draw(generator(row_key(seed, "sweep", one.field, number, 0, "value")))
    return {one.field: values[one.field] for one in space}


def _parzen(space: Sequence[Dimension], seed: int, number: int,
            seen: Sequence[tuple[Mapping[str, Any], Sequence[tuple[int, float]], str]], samples: int) -> dict[str, Any]:
    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = {"running": TrialState.RUNNING, "stopped": TrialState.PRUNED, "finished": TrialState.COMPLETE,
              "diverged": TrialState.COMPLETE}
    distributions = {one.field: one.distribution() for one in space}
    key = int(generator(row_key(seed, "sweep", "", number, 0, "optuna")).integers(2**31))
    sampler = optuna.samplers.TPESampler(seed=key, n_startup_trials=min(STARTUP, max(1, samples // 3)),
                                         constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for values, curve, state in seen:
        params = {one.field: one.values.index(values[one.field]) if one.values else values[one.field] for one in space}
        study.add_trial(create_trial(
            params=params, distributions=distributions, state=states[state], intermediate_values=dict(curve),
            value=curve[-1][1] if states[state] is TrialState.COMPLETE else None))
    asked = study.ask(distributions).params
    return {one.field: one.values[asked[one.field]] if one.values else one.rounded(asked[one.field]) for one in space}


def _is_gridded(dimension: Dimension, search: str) -> bool:
    return dimension.kind == "grid" or (search == "grid" and dimension.kind == "choice")
