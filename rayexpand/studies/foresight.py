"""Which difference a study can see, before it runs and after."""

from __future__ import annotations

from typing import Any

import numpy as np

from rayexpand.classifier.statistics import Noise, detectable, images_for, noise_of, seeds_for
from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.seeds import build_index
from rayexpand.data.subsets import choose, sound_rows
from rayexpand.storage.places import open_files
from rayexpand.studies.comparisons import MIN_SEEDS, joint_answers
from rayexpand.studies.config import StudyConfig
from rayexpand.studies.results import StudyView, is_valued, note_of, read_study
from rayexpand.studies.rounds.in_study import foreseen_controls
from rayexpand.studies.trials import arms_of
from rayexpand.studies.value_config import sizes_in

WANTED = 0.01  # the difference that one would like to see: a point
ENOUGH_SEEDS = 10  # that more images are reckoned with


def sight(images: int, seeds: int, noise: Noise | None = None, compared: int = 1) -> dict[str, Any]:
    """`points` (the smallest difference that is shown in four of five such studies, percentage points), `together` (the
    same where `compared` arms are judged together), what it is reckoned with, and a sentence. `noise` None: nothing is
    measured yet."""
    known = Noise() if noise is None else noise
    seen = detectable(known, images, seeds)
    together = detectable(known, images, seeds, max(compared, 1))
    words = [f"sees {100 * seen:.1f} points with {seeds} seed{'s' if seeds != 1 else ''} and {images:,} test images"]
    if compared > 1:
        words[0] += f" in one comparison, {100 * together:.1f} in one of {compared} that are judged together"
    if seeds < MIN_SEEDS:
        words.append(f"fewer than {MIN_SEEDS} seeds claim nothing")
    if seen > WANTED:
        words.append(f"1 point needs {_needed(known, images, seeds)}")
    how = (f"{100 * known.disagree:.0f} % of the test images answered differently, {100 * known.seed_sd:.1f} points "
           f"between seeds: {'assumed' if noise is None else 'measured'}")
    return {"points": 100 * seen, "together": 100 * together, "compared": compared, "images": images, "seeds": seeds,
            "measured": noise is not None, "disagree": known.disagree, "repeats": known.repeats,
            "seed_sd": known.seed_sd, "sentence": f"{'; '.join(words)} ({how})"}


def _needed(noise: Noise, images: int, seeds: int) -> str:
    if (more := seeds_for(WANTED, noise, images)) is not None:
        return f"{more} seeds"
    many = max(seeds, ENOUGH_SEEDS)
    if (needed := images_for(WANTED, noise, many)) is None:
        return f"more than {many} seeds, on any number of test images"
    scale = 10 ** max(0, len(str(needed)) - 2)
    return f"at least {-(-needed // scale) * scale:,} test images, with {many} seeds"


def sight_of(study: StudyView) -> dict[str, Any] | None:
    """What the finished trials say: None without predictions of two arms on two test images."""
    if study.baseline is None:
        return None
    first = study.predicted(study.arms[study.baseline][0]["trial"])
    if isinstance(first, str) or len(study.arms) < 2 or len(first.items) < 2:
        return None
    seeds = study.config.get("seeds") or sorted({one["seed"] for one in study.results})
    judged = [one for arm, (one, *_) in study.arms.items() if arm != study.baseline and not is_valued(one)]
    return sight(len(first.items), len(seeds), _measured(study), len(judged))


def _measured(study: StudyView) -> Noise | None:
    """Parts of 6.1 over the arms that have two seeds or more with the baseline, those of the section `value` where
    there are no others; None where there are none, or where all differences are the same, which says nothing of those
    to come."""
    base = str(study.baseline)
    others = {arm: first for arm, (first, *_) in study.arms.items() if arm != base and not note_of(first)}
    found = []
    for arm in [one for one, first in others.items() if not is_valued(first)] or others:
        answers = joint_answers(study, [base, arm])
        if not isinstance(answers, str) and answers.shape[1] > 1 and answers.shape[2] > 1:
            found.append(answers[1].astype(np.int8) - answers[0])
    return noise_of(found) if any(np.ptp(one) for one in found) else None


def foreseen(config: StudyConfig, images: int | None = None) -> dict[str, Any]:
    """`sight` of a study that need not have run: test images from the listed index, unless they are told; measured
    parts where two repetitions are done. Raises SeedDataError."""
    images = len(sound_rows(build_index(config.test))) if images is None else images
    noise = None
    if open_files(config.folder).read("study.json") is not None:
        try:
            noise = _measured_in(config.folder)
        except UsageError:
            noise = None  # study.json is damaged, which `train` says and mends
    arms = [one for one in arms_of(config) if one.value is None]
    judged = sum(1 + one.is_controlled for one in arms) + len(foreseen_controls(config, arms))
    return sight(max(images, 2), len(config.seeds), noise, judged - 1)


def _measured_in(folder: str) -> Noise | None:
    study = read_study(folder)
    return None if study.baseline is None else _measured(study)


def real_sizes(config: StudyConfig) -> list[float]:
    """The sizes of the section value that there are images for; none without it. Raises UsageError where there are too
    few, and SeedDataError."""
    if config.value is None:
        return []
    whole = build_index(config.data)
    drawn = choose(whole, config.subset, config.seeds[0])
    return sizes_in(config.value, whole, SeedIndex(whole.table.take(drawn), whole.classes))
