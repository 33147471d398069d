"""Numbers of a trial that tables and figures show, by name, each with its unit.

    top1 top5 per_class ece        after the last epoch, percent
    best                           top-1 of the best epoch, chosen on the test images, percent
    many medium few                by the number of real images of a class, percent
    also.<set>.<score>             on a further test set: top1, top5, per_class, ece; worst, mean of groups
    samples.<score>                of its samples beside real images, as the study measured them
    score.<name>                   of its samples by `evaluate`; score.<file>.<name> where several files have it
    guide                          of its samples: the guide's own top-1, percent. Of a guide that was trained, on the
                                   test images of the study; of a CLIP model that `evaluate` asked, on the reference
    images seconds_per_image       samples it trained on, process-seconds of each
    discarded                      images that were drawn for these samples and not kept
    hours                          process-hours of the samples and of what was fitted for them
    price                          of these hours, at given prices, else those of the section price of its study
    overhead                       of its training over the baseline by `bench`, percent (DiffCoRe-Mix, equation 9)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from rayexpand.contract.errors import UsageError
from rayexpand.studies.records import Record
from rayexpand.studies.results import number

FURTHER = ("top1", "top5", "per_class", "ece", "worst", "mean")


@dataclass(frozen=True, slots=True)
class Measure:
    """`label`: with its unit, as an axis has it; `digits` after the point; `difference`: its unit in words."""

    name: str
    label: str
    of: Callable[[Record], float | None]
    digits: int = 1
    difference: str = ""


@dataclass(frozen=True, slots=True)
class Prices:
    """In any currency; None where it is not given."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None


def measure(name: str, prices: Prices = Prices()) -> Measure:
    """Raises UsageError for a name that is no measure."""
    plain = _plain(prices)
    if name in plain:
        return plain[name]
    first, _, rest = name.partition(".")
    if first == "also" and rest.rpartition(".")[2] in FURTHER and rest.rpartition(".")[0]:
        test, _, score = rest.rpartition(".")
        words = {"worst": "worst group", "mean": "mean of groups", "per_class": "mean per class"}.get(score, score)
        return Measure(name, f"{words} on {test} (%)", lambda one: _also(one, test, score), difference="points")
    if first == "samples" and rest:
        return Measure(name, f"{rest} of the samples", lambda one: one.samples.get(rest), 3)
    if first == "score" and rest:
        return Measure(name, f"{rest} of the samples", lambda one: _score(one, rest), 3)
    known = [*plain, "also.<set>.top1", "samples.<score>", "score.<name>"]
    near = get_close_matches(name, known, 1)
    raise UsageError(f"{name!r} is no measure{f', did you mean {near[0]!r}' if near else ''}; there are "
                     f"{', '.join(known)}")


def _plain(prices: Prices) -> dict[str, Measure]:
    shares = {"top1": ("last.top1", "top-1, last epoch"), "top5": ("last.top5", "top-5, last epoch"),
              "per_class": ("last.per_class", "mean per class"), "ece": ("last.ece", "expected calibration error"),
              "best": ("best.top1", "top-1, best epoch"),
              **{name: (f"by_frequency.{name}", f"classes with {name} images") for name in ("many", "medium", "few")}}
    found = [Measure(name, f"{words} (%)", _share(place), difference="points")
             for name, (place, words) in shares.items()]
    found += [Measure("images", "images generated", lambda one: number(one.result, "synthetic_rows"), 0),
              Measure("seconds_per_image", "process-seconds of an image", _seconds_per_image, 3),
              Measure("discarded", "images discarded", _discarded, 0), Measure("hours", "process-hours", _hours, 3),
              Measure("price", "price", lambda one: _price(one, prices), 2),
              Measure("guide", "top-1 of the guide (%)", _guide, difference="points"),
              Measure("overhead", "overhead in training (%)", lambda one: one.overhead, difference="points"),
              Measure("batch_seconds", "seconds of a batch", _batch_seconds, 3)]
    return {one.name: one for one in found}


def _share(place: str) -> Callable[[Record], float | None]:
    def of(record: Record) -> float | None:
        found = number(record.result, place)
        return None if found is None else 100 * found
    return of


def _also(record: Record, test: str, score: str) -> float | None:
    further = record.result.get("also") or {}
    place = f"by_group.{score}" if score in ("worst", "mean") else score
    found = number(further.get(test) or {}, place)
    return None if found is None else 100 * found


def _score(record: Record, name: str) -> float | None:
    """Of the one file that has it, or of the file that is named. Raises UsageError where several have it."""
    files: Mapping[str, Mapping[str, float]] = record.run.scores if record.run else {}
    file, _, rest = name.partition(".")
    if rest and file in files:
        return files[file].get(rest)
    having = [one for one, scores in files.items() if name in scores]
    if len(having) > 1:
        raise UsageError(f"score.{name}: {', '.join(having)} of {record.run and record.run.folder} all have it; write "
                         f"score.{having[0]}.{name}")
    return files[having[0]][name] if having else None


def _guide(record: Record) -> float | None:
    found = number(record.result, "guide.top1")
    found = _score(record, "clip_top1.reference") if found is None else found
    return None if found is None else 100 * found


def _seconds_per_image(record: Record) -> float | None:
    spent, rows = number(record.result, "expansion_seconds"), number(record.result, "synthetic_rows")
    return spent / rows if spent and rows else None


def _discarded(record: Record) -> float | None:
    """At the rate of its run: what was drawn for the rows it trained on, less these."""
    share, rows = record.run.discarded_share if record.run else None, number(record.result, "synthetic_rows")
    return None if share is None or rows is None or share == 1 else rows * share / (1 - share)


def _hours(record: Record) -> float | None:
    spent, fitted = number(record.result, "expansion_seconds"), number(record.result, "fitting_seconds")
    return None if spent is None else (spent + (fitted or 0.0)) / 3600


def _price(record: Record, prices: Prices) -> float | None:
    """At the hour of the device that the trial ran on, as given, else as its study says. Raises UsageError where that
    has no price."""
    on_gpu = str(record.result.get("device", "")).startswith("cuda")
    name, given = ("gpu_hour", prices.gpu_hour) if on_gpu else ("cpu_hour", prices.cpu_hour)
    hours, hourly = _hours(record), record.prices.get(name) if given is None else given
    if hours and hourly is None:
        raise UsageError(f"prices.{name} is not given, and {record.arm} of {record.source} was made on that device, "
                         f"whose study has no price.{name} either; give it, or leave the measure price out")
    return None if hours is None else hours * (hourly or 0.0)


def _batch_seconds(record: Record) -> float | None:
    """Of a bench: loader and step of one batch."""
    parts = [number(record.result, name) for name in ("loader_seconds", "step_seconds")]
    return None if None in parts else sum(part for part in parts if part is not None)
