"""What a loop and its controls cost before they start: samples without and with guidance, scoring, guides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.subsets import sound_rows
from rayexpand.fitting.costs import trained, unit_on
from rayexpand.fitting.scores import scoring_stage
from rayexpand.runs.config import DIGITS, RunConfig
from rayexpand.runs.stages import PlanStage, Sizes
from rayexpand.studies.rounds.config import LoopConfig
from rayexpand.studies.rounds.controls import KINDS
from rayexpand.studies.rounds.dealing import parts_of
from rayexpand.studies.run_costs import run_stage


def loop_stages(name: str, loop: LoopConfig, index: SeedIndex, planned: int, times: int,
                left: float) -> list[PlanStage]:
    """Of `times` loops of a budget of `planned` samples, of which `left` budgets are still to be made in all."""
    rounds, parts, sizes = loop.rounds, _parts(loop, planned), Sizes(len(sound_rows(index)), len(index.classes))
    stages = [run_stage(f"expand {name}{words}", made, index, rows, times, left, "estimate")
              for words, made, rows in _sampling(loop, parts)]
    seen = [sum(parts[:number]) for number in range(1, rounds.count)]  # before rounds 2, 3, ...
    if rounds.scores_seeds:
        stages += [scoring_stage(f"score seeds for round {number} of {name}", rounds.scores, loop.training, loop.run,
                                 sizes, samples) for number, samples in enumerate(seen, 2)]
    if rounds.trains_guide:
        first = rounds.guided_from if rounds.guided_from is not None else 2
        stages += [guide_stage(f"guide of round {number} of {name}", loop, sizes, samples)
                   for number, samples in enumerate([0, *seen], 1) if number >= first]
    return [one if one.name.startswith("expand") else replace(
        one, times=times, hours=one.hours and (left * one.hours[0], left * one.hours[1])) for one in stages]


def control_stages(name: str, loop: LoopConfig, kind: str, index: SeedIndex, planned: int, oversample: float,
                   times: int) -> Iterator[PlanStage]:
    """The samples of a control of `times` such loops."""
    parts = _parts(loop, planned)
    by_words = {words: (made, rows) for words, made, rows in _sampling(loop, parts)}
    plain, guided = by_words.get("", (loop.of_round(1), 0)), by_words.get(GUIDED, (loop.run, 0))
    made_of: Mapping[str, list[tuple[RunConfig, int]]] = {
        "uniform": [(plain[0], planned)], "classes": [(plain[0], planned)], "whole": [],
        "targets": [(plain[0], plain[1] - parts[0]), guided], "direction": [guided],
        "pruned": [(plain[0], round(oversample * guided[1]))]}
    of = "" if kind in ("uniform", "classes") else f" of {name}"
    for number, (made, rows) in enumerate(made_of[kind]):
        if rows > 0:
            yield run_stage(f"expand {KINDS[kind]}{of}{GUIDED * bool(number)}", made, index, rows, times, times,
                            "estimate")


GUIDED = ", guided"


def _parts(loop: LoopConfig, planned: int) -> list[int]:
    return parts_of(loop.rounds, planned)[:loop.rounds.count]


def _sampling(loop: LoopConfig, parts: Sequence[int]) -> list[tuple[str, RunConfig, int]]:
    """(words, a run that is sampled so, samples) without and with guidance."""
    first = loop.rounds.guided_from
    plain = parts if first is None else parts[:first - 1]
    found = [("", loop.of_round(1), sum(plain)), (GUIDED, loop.of_round(loop.rounds.count), sum(parts) - sum(plain))]
    return [one for one in found if one[2]]


def guide_stage(name: str, loop: LoopConfig, sizes: Sizes, samples: int) -> PlanStage:
    recipe, training = make_recipe(loop.rounds.guide_recipe), loop.training
    rows = sizes.images + samples
    batch = max(1, min(recipe.batch, rows))
    steps = recipe.updates or recipe.epochs * (rows // batch)
    return trained(name, f"a training of {steps:,} steps", recipe, sizes.classes, steps * batch, 0.0, loop.run.estimate,
                   unit_on(training.device, training.gpus_per_worker == 0, loop.run.data.source == DIGITS))
