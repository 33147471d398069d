"""The samples of every arm beside real images: how much of what is real they cover, and how far they are from it.

All arms are compared with the same reference, in features of the same extractor, so that what differs is the samples.
Other real images, as many as the samples, say what could be reached at that number.

    scores/<trial>.json                the samples that the trial may use
    scores/real/<images>-<seed>.json   other real images, where the study names some
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.settings import digest
from rayexpand.data.subsets import fingerprint
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.evaluate import DistanceConfig, EvaluateConfig, Extract, facts_of, texts_of, training_of
from rayexpand.evaluation.extraction import Found
from rayexpand.evaluation.measure import measure
from rayexpand.evaluation.sides import Choice, Side, reference_of, samples_of
from rayexpand.runs.estimate import estimate, first_draws
from rayexpand.runs.run import Run
from rayexpand.runs.work import cost_of_run
from rayexpand.storage.tables import healthy_json, replace_json
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.trials import arms_of

SCORES, REAL = "scores", "scores/real"
FEWEST = 2  # images of either side
TOGETHER = 8  # comparisons whose features are held at once
OF_A_RUN = {"cover", "alignment"}  # metrics that ask for its seeds or classes


@dataclass(frozen=True)
class _Comparison:
    """Images of one side of a comparison, and the files its result belongs in."""

    side: Side
    files: dict[str, dict[str, Any]]  # name -> what the result is of
    run: str | None = None  # that made them


def score_samples(study: Study, trials: Sequence[Trial], extract: Extract,
                  progress: Progress = lambda *_: None) -> list[str]:
    """Compares the samples of every trial, where the study asks for it and it is not done; one line for each that could
    not be. Raises ModelError for an extractor that cannot be loaded."""
    if study.config.samples is None:
        return []
    config = _asked(study)
    sha256 = extractors.extractor_hash(config.extractor, progress)
    settings = {"settings": study.config.samples.model_dump(mode="json")}
    shared = {**settings, "extractor": facts_of(config.extractor, sha256)}
    same = {name: one for name, one in shared["extractor"].items() if name != "unnamed"}  # what is as it was before
    reference_sha256 = fingerprint(study.opened.index(config.reference), config.reference)
    made_from = digest([{**settings, "extractor": same}, reference_sha256])
    todo = [*_samples(study, trials, made_from)]
    todo += _real(study, trials, made_from, todo)
    if not todo:
        return []
    for folder in (SCORES, REAL):
        study.files.make_folder(folder)
    failed = []
    for one, result in _measured(study, config, todo, partial(extract, config, sha256), progress):
        if isinstance(result, UsageError):
            failed += [f"samples of {name}: {result}" for name in one.files]
            continue
        for name, of in one.files.items():
            replace_json(study.files, f"{name}.json", {**of, **shared, **result})
    return failed


def _asked(study: Study, **changes: Any) -> EvaluateConfig:
    """What `evaluate` would be asked for."""
    wanted = study.config.samples
    assert wanted is not None
    fields = {name: getattr(wanted, name) for name in DistanceConfig.model_fields}
    return EvaluateConfig(**{"run": study.config.folder, "reference": wanted.reference or study.config.test,
                             "cluster": study.config.cluster, **fields, **changes})


def _samples(study: Study, trials: Sequence[Trial], made_from: str) -> Iterator[_Comparison]:
    """What trials without a result use. Those that use the same samples share one comparison."""
    arms = {arm.name: arm for arm in arms_of(study.config)}
    wanted: dict[tuple[str, int | float | None, str | None], dict[str, dict[str, Any]]] = {}
    for trial in trials:
        if trial.run:
            arm, most = arms[trial.arm], int(study.opened.run(trial.run).plan.copies.max(initial=0))
            copies = arm.copies if arm.copies is not None and arm.copies < most else None
            of = {"digest": digest([made_from, trial.list_sha256]), "list_sha256": trial.list_sha256, "arm": trial.arm,
                  "seed": trial.seed, "run": trial.run, "copies": copies, "selection": arm.config.selection,
                  "filled": arm.config.fill, "gflop_per_image": gflop_per_image(study.opened.run(trial.run))}
            name = f"{SCORES}/{trial.name}"
            if not _is_done(study, name, of):
                wanted.setdefault((trial.run, copies, arm.config.selection), {})[name] = of
    for (run, copies, selection), files in wanted.items():
        yield _Comparison(samples_of(study.opened.run(run), _asked(study).choice, selection, copies), files, run)


def gflop_per_image(run: Run) -> float | None:
    """Counted arithmetic of one sample: 0 for methods without a generator, None for one of which nothing is known."""
    config, plan = run.config, run.plan
    if "prior" not in config.needs:
        return 0.0
    if cost_of_run(config) is None and (folder := Path(config.prior.weights)).is_dir():
        from rayexpand.models.flops import count_once

        count_once(folder)
    found = estimate(config, seeds=len(plan.index), planned=plan.planned,
                     draws=first_draws(config, plan.index, plan.planned))
    return None if found.petaflop is None else 1e6 * found.petaflop / plan.planned


def _real(study: Study, trials: Sequence[Trial], made_from: str, todo: Sequence[_Comparison]) -> list[_Comparison]:
    """Other real images, drawn anew for each repetition, as many as any trial has samples."""
    wanted = study.config.samples
    if wanted is None or wanted.real is None:
        return []
    known = [healthy_json(study.files, f"{SCORES}/{trial.name}.json") for trial in trials if trial.run]
    counts = {len(one.side) for one in todo} | {one["n_samples"] for one in known if one is not None}
    real_sha256, found = fingerprint(study.opened.index(wanted.real), wanted.real), []
    for images in sorted(counts):
        for seed in study.config.seeds if FEWEST <= images <= len(study.opened.index(wanted.real)) else ():
            of = {"digest": digest([made_from, real_sha256, images, seed]), "images": images, "seed": seed}
            if not _is_done(study, name := f"{REAL}/{images}-{seed}", of):
                side = reference_of(wanted.real, Choice(images, wanted.rows, seed))
                found.append(_Comparison(replace(side, name="other real images"), {name: of}))
    return found


def _is_done(study: Study, name: str, of: Mapping[str, Any]) -> bool:
    return (healthy_json(study.files, f"{name}.json") or {}).get("digest") == of["digest"]


def _measured(study: Study, config: EvaluateConfig, todo: Sequence[_Comparison], extract: Callable[..., list[Found]],
              progress: Progress) -> Iterator[tuple[_Comparison, dict[str, Any] | UsageError]]:
    """Scores of each comparison, or why there are none. Features of TOGETHER of them are held at once."""
    reference, known = None, dict[Any, Any]()
    for start in range(0, len(todo), TOGETHER):
        part = todo[start:start + TOGETHER]
        runs = list(dict.fromkeys(one.run for one in part if one.run)) if "cover" in config.metrics else []
        sides = [one.side for one in part] + [training_of(study.opened.run(run), config) for run in runs]
        if reference is None:
            reference, *found = extract([reference_of(config.reference, config.choice), *sides], progress)
        else:
            found = extract(sides, progress)
        training = dict(zip(runs, found[len(part):], strict=True))
        for one, features in zip(part, found, strict=False):
            try:
                yield one, _scores(study, config, one, features, reference, training, known)
            except UsageError as error:
                yield one, error


def _scores(study: Study, config: EvaluateConfig, one: _Comparison, found: Found, reference: Found,
            training: Mapping[str, Found], known: dict[Any, Any]) -> dict[str, Any]:
    """Scores as they are written. Raises UsageError where there are too few images."""
    if len(one.side) < FEWEST:
        raise UsageError(f"{len(one.side)} images cannot be compared; at least {FEWEST} are needed")
    metrics = [metric for metric in config.metrics if one.run or metric not in OF_A_RUN]
    measured = measure(metrics, found, reference, seed=config.seed, known=known,
                       key=lambda statistic: extractors.key_of(statistic, config.extractor),
                       training=training.get(str(one.run)),
                       texts=texts_of(config, study.opened.run(one.run)) if one.run else None)
    return {**measured, "refused": {"samples": found.refused, "reference": reference.refused}, "size": reference.size}
