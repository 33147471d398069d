"""The samples of every arm beside real images: how much of what is real they cover, and how far they are from it.

All arms are compared with the same reference, in features of the same extractor, so that what differs is the samples.
Other real images, as many as the samples, say what could be reached at that number.

    scores/<trial>.json                the samples that the trial may use
    scores/real/<images>-<seed>.json   other real images, where the study names some
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.settings import digest
from rayexpand.data.subsets import fingerprint
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.distance import measure
from rayexpand.evaluation.evaluate import DistanceConfig, EvaluateConfig, Extract, Found, Side, reference_of, samples_of
from rayexpand.runs.estimate import estimate, first_draws
from rayexpand.runs.run import Run
from rayexpand.runs.work import cost_of_run
from rayexpand.storage.tables import healthy_json, replace_json
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.trials import arms_of

SCORES, REAL = "scores", "scores/real"
FEWEST = 2  # images of either side


@dataclass(frozen=True)
class _Comparison:
    """Images of one side of a comparison, and the files its result belongs in."""

    side: Side
    files: dict[str, dict[str, Any]]  # name -> what the result is of


def score_samples(study: Study, trials: Sequence[Trial], extract: Extract,
                  progress: Progress = lambda *_: None) -> list[str]:
    """Compares the samples of every trial, where the study asks for it and it is not done; one line for each that could
    not be. Raises ModelError for an extractor that cannot be loaded."""
    if study.config.samples is None:
        return []
    config = _asked(study)
    sha256 = extractors.extractor_hash(config.extractor, progress)
    shared = {"settings": study.config.samples.model_dump(mode="json"), "extractor": {
        "name": extractors.name_of(config.extractor), "sha256": sha256, "resize": extractors.RESIZE}}
    made_from = digest([shared, fingerprint(study.opened.index(config.reference), config.reference)])
    todo = [*_samples(study, trials, made_from)]
    todo += _real(study, trials, made_from, todo)
    if not todo:
        return []
    reference, *found = extract(config, sha256, [reference_of(config), *(one.side for one in todo)], progress)
    for folder in (SCORES, REAL):
        study.files.make_folder(folder)
    failed = []
    for one, features in zip(todo, found, strict=True):
        try:
            result = _measured(config, one.side, features, reference)
        except UsageError as error:
            failed += [f"samples of {name}: {error}" for name in one.files]
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
        yield _Comparison(samples_of(study.opened.run(run), _asked(study, copies=copies, selection=selection)), files)


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
                chosen = _asked(study, reference=wanted.real, images=images, seed=seed)
                found.append(_Comparison(replace(reference_of(chosen), name="other real images"), {name: of}))
    return found


def _is_done(study: Study, name: str, of: Mapping[str, Any]) -> bool:
    return (healthy_json(study.files, f"{name}.json") or {}).get("digest") == of["digest"]


def _measured(config: EvaluateConfig, side: Side, found: Found, reference: Found) -> dict[str, Any]:
    """Scores as they are written. Raises UsageError where there are too few images."""
    if len(side) < FEWEST:
        raise UsageError(f"{len(side)} images cannot be compared; at least {FEWEST} are needed")
    measured = measure(config.metrics, found.features_ND, reference.features_ND, config.seed)
    return {**measured, "refused": {"samples": found.refused, "reference": reference.refused}, "size": reference.size}
