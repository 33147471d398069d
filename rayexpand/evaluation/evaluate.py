"""The verb `evaluate`: how far the kept samples of a run are from real images, in features of one extractor.

Both sides are cut into chunks (a data file of the run, or consecutive seeds), chunks into calls of one shape. What
turns chunks into features is given by the caller: this process (`in_process`) or a cluster. Features come back, images
never do. The result is <run>/scores/<name>.json, written anew each time; the run itself is not touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from rayexpand import __version__
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import Later, Section, mistakes, read
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.audit_files import committed_sha256
from rayexpand.evaluation.extraction import Found, Gathered, OnRows, ahead, counted, part_of
from rayexpand.evaluation.features import ExtractorConfig
from rayexpand.evaluation.measure import measure
from rayexpand.evaluation.presets import RESERVED
from rayexpand.evaluation.sides import Choice, Side, reference_of, samples_of, seeds_of
from rayexpand.models.guide_files import CLASSIFIER, kind_of, present_guide
from rayexpand.runs.config import ClusterConfig, RuntimeConfig, guide_of_run
from rayexpand.runs.joined import open_samples
from rayexpand.runs.run import Run
from rayexpand.runs.selections import read_selection
from rayexpand.storage.tables import replace_json

Metric = Literal["fd", "fd_infinity", "kd", "mmd2_linear", "mmd2_rbf", "mmd2_rbf10", "precision_recall",
                 "density_coverage", "authenticity", "vendi", "classes", "cover", "alignment", "class_energy",
                 "fid", "fid_clean", "kid", "fd_dinov2", "cmmd"]
EVERYTHING: list[Metric] = ["fd", "fd_infinity", "kd", "mmd2_linear", "mmd2_rbf", "precision_recall",
                            "density_coverage", "authenticity", "vendi", "classes"]  # that needs only two sides
TRAINING = "training images"  # the third side, of cover
FRECHET = {"fd", "fid", "fid_clean", "fd_dinov2"}  # of all images, by sums
OF_MEANS, OF_VARIETY = {"mmd2_rbf10", "cmmd"}, {"density_coverage", "vendi", "cover"}


class DistanceConfig(Section):
    """By what images are compared."""

    images: int | None = Field(None, ge=2, description="take so many images of each side, chosen by a key; a smaller "
                               "choice lies inside a larger one. null: all")
    rows: Annotated[int, Later(50_000)] = Field(
        50_000, ge=4, description="neighbours, kernels and diversity are computed on so many images of a side at most, "
        "chosen by a key; Frechet distances take all")
    extractor: ExtractorConfig = ExtractorConfig()
    metrics: list[Metric] = Field(EVERYTHING, min_length=1, description="what to compute; fid, fid_clean, kid, "
                                  "fd_dinov2 and cmmd are for the published extractors alone")
    batch: int = Field(64, ge=1, description="images per call of the extractor")
    seed: int = Field(0, ge=0, description="keys the choice of `images`, of `rows`, of kd's subsets and of halves")

    @property
    def choice(self) -> Choice:
        return Choice(self.images, self.rows, self.seed)


class EvaluateConfig(DistanceConfig):
    name: str = Field("scores", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the result is "
                      "<run>/scores/<name>.json")
    run: str = Field(min_length=1, description="run or loop folder whose kept samples are compared")
    selection: str | None = Field(None, description="a decision in selections/ of the run; only rows it keeps")
    copies: int | float | None = Field(None, gt=0, description="only the first so many copies of each seed; 2.5 takes "
                                       "the third copy of half of each class, rounded down")
    reference: DataConfig = Field(description="real images to compare with")
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()


# (configuration with the extractor named, its content hash, sides) -> what was found of each side
Extract = Callable[[EvaluateConfig, str, Sequence[Side], OnRows], list[Found]]


def load(path: str, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Configuration of a YAML file. Raises ConfigError with every mistake, those of the run and the data included."""
    return parse(read(path, overrides), path)


def parse(raw: Mapping[str, Any], where: str = "configuration") -> EvaluateConfig:
    """Configuration of a mapping, with the run's guide as extractor where none is named. Raises ConfigError."""
    if problems := secret_problems(raw):
        raise ConfigError(where, problems)
    config, run = None, None
    try:
        config = EvaluateConfig(**{str(key): value for key, value in raw.items()})
    except ValidationError as error:
        problems += mistakes(error, EvaluateConfig, "")
    if isinstance(folder := raw.get("run"), str) and folder:
        try:
            run = open_samples(folder)
            if isinstance(selection := raw.get("selection"), str):
                read_selection(run, selection)
        except UsageError as error:
            problems.append(f"{'run' if run is None else 'selection'}: {error}")
    problems += _reference_problems(raw) + (found := _extractor_problems(raw, run))
    if config is not None and run is not None and not found:
        problems += metric_problems(config.metrics, _chosen(config.extractor, run))
    if problems or config is None:
        raise ConfigError(where, problems)
    assert run is not None
    return config.model_copy(update={"extractor": _chosen(config.extractor, run)})


def evaluate(config: EvaluateConfig, extract: Extract, on_rows: OnRows = lambda task, done, total: None
             ) -> dict[str, Any]:
    """Scores of the run, as written to its folder; `file` says where. Raises UsageError where a side has too few
    images for a metric."""
    started = time.perf_counter()
    run = open_samples(config.run)
    sides = [samples_of(run, config.choice, config.selection, config.copies),
             reference_of(config.reference, config.choice)]
    if "cover" in config.metrics:
        sides.append(training_of(run, config))
    for side in sides:
        if len(side) < 2:
            raise UsageError(f"{config.run}: {len(side)} {side.name} to compare, at least two are needed; run "
                             "`rayexpand expand` first, or choose less narrowly with copies, selection and ids")
    sha256 = extractors.extractor_hash(config.extractor, on_rows)
    listed = time.perf_counter()
    found, sizes = extract(config, sha256, sides, on_rows), {side.name: len(side) for side in sides}
    sides.clear()  # of 13 million samples: 0.3 GB
    if "alignment" not in config.metrics:  # which is of float32; all others are of float64, and both take room
        found = [one._replace(features_ND=np.asarray(one.features_ND, np.float64)) for one in found]
    extracted = time.perf_counter()
    measured = measure(config.metrics, found[0], found[1], seed=config.seed, training=found[2] if found[2:] else None,
                       key=lambda statistic: extractors.key_of(statistic, config.extractor),
                       texts=texts_of(config, run))
    result = {
        "name": config.name, "run": str(run.folder), "run_digest": run.facts["run_digest"], "version": __version__,
        "committed_sha256": committed_sha256(run.store.receipts()), "created": time.time(),
        "config": config.model_dump(mode="json"),
        "extractor": facts_of(config.extractor, sha256, found[0].size),
        **measured, "refused": {name: one.refused for name, one in zip(sizes, found, strict=True)},
        "warnings": _warnings(run, config, sizes, found) + measured["warnings"],
        "seconds": {"list": listed - started, "features": extracted - listed,
                    "scores": time.perf_counter() - extracted}}
    for folder in ("scores", ".tmp"):
        run.files.make_folder(folder)
    replace_json(run.files, f"scores/{config.name}.json", result)
    return {**result, "file": str(run.files.at(f"scores/{config.name}.json"))}


def in_process(config: EvaluateConfig, sha256: str, sides: Sequence[Side], on_rows: OnRows) -> list[Found]:
    """Features by this process."""
    from rayexpand.contract.device import torch_threads

    with torch_threads(config.runtime.torch_threads):
        extractor = extractors.load_extractor(config.extractor)
        return [_in_process(config, extractor, side, on_rows) for side in sides]


def _in_process(config: EvaluateConfig, extractor: extractors.Extractor, side: Side, on_rows: OnRows) -> Found:
    gathered, done = Gathered(side, extractor.size), 0

    def more(images: int) -> None:
        nonlocal done
        done += images
        on_rows(f"features of {side.name}", done, len(side))

    for number, span in enumerate(side.spans):
        chunks = [side.chunks[i] for i in span]
        gathered.add(number, part_of(
            ((chunk, counted(ahead(side.calls(chunk, extractor.size, config.batch, extractor.intake)), more))
             for chunk in chunks), extractor, sums=sums_wanted(config)))
    return gathered.found()


def sums_wanted(config: DistanceConfig) -> bool:
    return bool(FRECHET & set(config.metrics))


def training_of(run: Run, config: DistanceConfig) -> Side:
    """The seeds of a run."""
    return seeds_of(run.plan.index, run.config.data, Choice(None, config.rows, config.seed), TRAINING)


def texts_of(config: DistanceConfig, run: Run) -> dict[str, np.ndarray] | None:
    """Class key -> features of the text of the class, where `alignment` asks for them."""
    if "alignment" not in config.metrics:
        return None
    classes = run.plan.index.classes
    return dict(zip(classes.key, extractors.class_texts(config.extractor, classes.asked), strict=True))


def facts_of(config: ExtractorConfig, sha256: str, size: int | None = None) -> dict[str, Any]:
    """What results say of an extractor; `unnamed` is why distances by it have no known name."""
    return {"name": extractors.name_of(config), "sha256": sha256, **({"size": size} if size else {}),
            "resize": config.brought.words, "unnamed": extractors.name_problem(config)}


# ------------------------------------------------------------------------------------------------------------- mistakes


def metric_problems(metrics: Sequence[str], extractor: ExtractorConfig) -> list[str]:
    """What is wrong with metrics by an extractor that is sound."""
    problems = []
    for metric in metrics:
        if metric in RESERVED and (why := _not_known(metric, extractor)):
            problems.append(f"metrics: {why}")
    if OF_MEANS & set(metrics) and not OF_VARIETY & set(metrics):
        problems.append(f"metrics: {next(iter(OF_MEANS & set(metrics)))} compares little more than means, and does not "
                        "see samples that are few images repeated; add density_coverage or vendi")
    if "alignment" in metrics:
        folder = None if extractor.preset or extractor.timm else present_guide(extractor.guide or "digits")
        if extractor.timm or extractor.preset not in (None, "clip_l14_336") or (
                folder is not None and kind_of(folder) == CLASSIFIER):
            problems.append(f"metrics: {extractors.NO_TEXT.format(extractors.name_of(extractor))}")
    return problems


def _not_known(metric: str, extractor: ExtractorConfig) -> str | None:
    """Why a known name is not for this extractor, and what the distance is called then."""
    preset, statistic = RESERVED[metric]
    why = f"it is for extractor: {{preset: {preset}}}" if extractor.preset != preset else extractors.name_problem(
        extractor)
    return why and (f"{metric} is the name of a published convention: {why}. By {extractors.name_of(extractor)} the "
                    f"key is {extractors.key_of(statistic, extractor)}; write {statistic} for it")


def _reference_problems(raw: Mapping[str, Any]) -> list[str]:
    try:
        found = seeds.check(DataConfig(**raw["reference"]))
    except (KeyError, TypeError, ValidationError):
        return []  # reported as a mistake of the section
    return [f"reference.{line.removeprefix('data.')}" for line in found]


def _extractor_problems(raw: Mapping[str, Any], run: Run | None) -> list[str]:
    try:
        config = ExtractorConfig(**(raw.get("extractor") or {}))
    except (TypeError, ValidationError):
        return []
    if run is not None and (chosen := _chosen(config, run)) is not config:
        return guide_of_run("extractor.guide", run.config) or extractors.check(chosen)
    return extractors.check(config)


def _chosen(config: ExtractorConfig, run: Run) -> ExtractorConfig:
    if config.is_named:
        return config
    guide = run.config.guide
    checkpoint = None if extractors.is_folder(guide.weights) else guide.checkpoint
    return config.model_copy(update={"guide": guide.weights, "checkpoint": config.checkpoint or checkpoint})


def _warnings(run: Run, config: EvaluateConfig, sizes: Mapping[str, int], found: Sequence[Found]) -> list[str]:
    lines = []
    if pending := run.totals().pending:
        lines.append(f"{pending} planned samples are not decided yet and are not in this result")
    for (name, size), one in zip(sizes.items(), found, strict=True):
        if one.refused:
            lines.append(f"{one.refused} of {size} {name} images cannot be decoded and were left out")
        if config.images is not None and size < config.images and name != TRAINING:
            lines.append(f"there are only {size} {name} images of the {config.images} asked for")
    return lines
