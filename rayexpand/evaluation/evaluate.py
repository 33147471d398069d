"""The verb `evaluate`: how far the kept samples of a run are from real images, in features of one extractor.

Both sides are cut into chunks (a data file of the run, or consecutive seeds), chunks into calls of one shape. What
turns chunks into features is given by the caller: this process (`in_process`) or a cluster. Features come back, images
never do. The result is <run>/scores/<name>.json, written anew each time; the run itself is not touched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from rayexpand import __version__
from rayexpand.contract.errors import ConfigError, RowFault, UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import ClassTable, Receipt, SeedIndex
from rayexpand.contract.secrets import secret_problems
from rayexpand.contract.settings import Section, mistakes, read
from rayexpand.data import seeds
from rayexpand.data.pixels import PILLOW_PIXELS
from rayexpand.data.seeds import DataConfig, SeedReader, build_index
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.distance import measure
from rayexpand.evaluation.features import ExtractorConfig, ImageBatch
from rayexpand.runs import run as runs
from rayexpand.runs.config import ClusterConfig, RuntimeConfig, guide_of_run
from rayexpand.runs.run import Run
from rayexpand.runs.selections import read_selection
from rayexpand.storage.files import each
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_table, replace_json

CHUNK = 2048  # seeds read, and held encoded, at once

Metric = Literal["fid", "kid", "mmd2_linear", "mmd2_rbf", "precision_recall", "density_coverage"]
OnRows = Callable[[str, int, int], None]


class DistanceConfig(Section):
    """By what images are compared."""

    images: int | None = Field(None, ge=2, description="take so many images of each side, chosen by a key; a smaller "
                               "choice lies inside a larger one. null: all")
    extractor: ExtractorConfig = ExtractorConfig()
    metrics: list[Metric] = Field(["fid", "kid", "mmd2_linear", "mmd2_rbf", "precision_recall", "density_coverage"],
                                  min_length=1, description="what to compute")
    batch: int = Field(64, ge=1, description="images per call of the extractor")
    seed: int = Field(0, ge=0, description="keys the choice of `images`, of kid's subsets and of the median's rows")


class EvaluateConfig(DistanceConfig):
    name: str = Field("scores", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the result is "
                      "<run>/scores/<name>.json")
    run: str = Field(min_length=1, description="run folder whose kept samples are compared")
    selection: str | None = Field(None, description="a decision in selections/ of the run; only rows it keeps")
    copies: int | float | None = Field(None, gt=0, description="only the first so many copies of each seed; 2.5 takes "
                                       "the third copy of half of each class, rounded down")
    reference: DataConfig = Field(description="real images to compare with")
    runtime: RuntimeConfig = RuntimeConfig()
    cluster: ClusterConfig = ClusterConfig()


@dataclass(frozen=True)
class Side:
    """The images of one side in their order. `read` turns one of `chunks` into encoded images, anywhere."""

    name: str
    chunks: list[pa.Table]
    read: Callable[[pa.Table], list[bytes | RowFault]]
    min_side: int = 1
    max_pixels: int = PILLOW_PIXELS

    def __len__(self) -> int:
        return sum(chunk.num_rows for chunk in self.chunks)

    def calls(self, chunk: pa.Table, size: int, batch: int) -> Iterator[ImageBatch]:
        return extractors.calls(self.read(chunk), size, batch, min_side=self.min_side, max_pixels=self.max_pixels)


class Found(NamedTuple):
    features_ND: np.ndarray  # float32
    refused: int  # images that could not be decoded
    size: int  # side of the extractor's input, pixels


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
            run = runs.open_run(folder)
            if isinstance(selection := raw.get("selection"), str):
                read_selection(run, selection)
        except UsageError as error:
            problems.append(f"{'run' if run is None else 'selection'}: {error}")
    problems += _reference_problems(raw) + _extractor_problems(raw, run)
    if problems or config is None:
        raise ConfigError(where, problems)
    assert run is not None
    return config.model_copy(update={"extractor": _chosen(config.extractor, run)})


def evaluate(config: EvaluateConfig, extract: Extract, on_rows: OnRows = lambda task, done, total: None
             ) -> dict[str, Any]:
    """Scores of the run, as written to its folder; `file` says where. Raises UsageError where a side has too few
    images for a metric."""
    started = time.perf_counter()
    run = runs.open_run(config.run)
    sides = [samples_of(run, config), reference_of(config)]
    for side in sides:
        if len(side) < 2:
            raise UsageError(f"{config.run}: {len(side)} {side.name} to compare, at least two are needed; run "
                             "`rayexpand expand` first, or choose less narrowly with copies, selection and ids")
    sha256 = extractors.extractor_hash(config.extractor, on_rows)
    listed = time.perf_counter()
    found = extract(config, sha256, sides, on_rows)
    extracted = time.perf_counter()
    measured = measure(config.metrics, found[0].features_ND, found[1].features_ND, config.seed)
    result = {
        "name": config.name, "run": str(run.folder), "run_digest": run.facts["run_digest"], "version": __version__,
        "created": time.time(), "config": config.model_dump(mode="json"),
        "extractor": {"name": extractors.name_of(config.extractor), "sha256": sha256, "size": found[0].size,
                      "resize": extractors.RESIZE},
        **measured, "refused": {side.name: one.refused for side, one in zip(sides, found, strict=True)},
        "warnings": _warnings(run, config, sides, found) + measured["warnings"],
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
        found = []
        for side in sides:
            calls = (call for chunk in side.chunks for call in side.calls(chunk, extractor.size, config.batch))
            shown = _counted(calls, lambda done, side=side: on_rows(  # type: ignore[misc]
                f"features of {side.name}", done, len(side)))
            found.append(Found(*extractors.features(extractor, shown), extractor.size))
        return found


# ---------------------------------------------------------------------------------------------------------------- sides


def samples_of(run: Run, config: EvaluateConfig) -> Side:
    """The kept samples that the configuration chooses; one chunk is one data file."""
    chosen = read_selection(run, config.selection) if config.selection else None
    rng = PlanRng(config.seed, "evaluate")
    whole = chosen is None and config.copies is None and config.images is None
    taken = run.plan.first_copies(config.copies)

    def rows_of(receipt: Receipt) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a data file, and the number that ranks each for `images`."""
        if whole:
            return np.arange(receipt.kept), np.zeros(receipt.kept)
        table = run.store.data(receipt, ["sample_id", "copy", "row"])
        ids = table["sample_id"].to_pylist()
        keep = np.ones(len(ids), bool) if chosen is None else np.asarray(chosen.keeps(ids))
        if config.copies is not None:
            keep &= table["copy"].to_numpy() < taken[run.plan.position(table["row"].to_numpy())]
        return np.flatnonzero(keep), rng.per_seed("images", ids)[keep]

    receipts = [receipt for receipt in run.store.receipts() if receipt.kept]
    parts = list(each(run.files, rows_of, receipts))
    limit = _limit([rank for _, rank in parts], config.images)
    chunks = []
    for receipt, (rows, rank) in zip(receipts, parts, strict=True):
        if len(rows := rows[rank <= limit]):
            chunks.append(pa.table({"row": rows}).replace_schema_metadata({b"file": receipt.data_file.encode()}))
    return Side("samples", chunks, partial(read_samples, str(run.folder)))


def reference_of(config: EvaluateConfig) -> Side:
    """The real images that the configuration chooses; seeds known to be faulty only count as refused."""
    table = build_index(config.reference).table
    if config.images is not None:
        rank = PlanRng(config.seed, "evaluate").per_seed("images", table["seed_id"].to_pylist())
        rank[np.asarray(table["fault"].to_pylist()) != ""] = 2.0
        table = table.take(pa.array(np.flatnonzero(rank <= _limit([rank], config.images))))
    files = json.loads(table.schema.metadata[b"files"])
    chunks = [_with_own_files(table.slice(i, CHUNK), files) for i in range(0, table.num_rows, CHUNK)]
    return Side("reference", chunks, partial(read_seeds, config.reference), config.reference.min_side,
                config.reference.max_pixels)


def read_samples(folder: str, chunk: pa.Table) -> list[bytes | RowFault]:
    """Encoded images of chosen rows of a data file."""
    table = read_table(open_files(folder), f"data/{chunk.schema.metadata[b'file'].decode()}", ["image"])
    return [image["bytes"] for image in table["image"].take(chunk["row"]).to_pylist()]


def read_seeds(data: DataConfig, chunk: pa.Table) -> list[bytes | RowFault]:
    """Encoded images of rows of a seed index, a RowFault for one that cannot be read."""
    found = SeedReader(SeedIndex(chunk, ClassTable.of([])), data).read(range(chunk.num_rows))
    return [one if isinstance(one, RowFault) else one.image for one in found]


def _limit(ranks: Sequence[np.ndarray], images: int | None) -> float:
    """The rank of the last image taken; ranks of 2 and more are never taken."""
    ranks_N = np.concatenate([np.empty(0), *ranks])
    if images is None or len(ranks_N) <= images:
        return 1.0
    return min(1.0, float(np.partition(ranks_N, images - 1)[images - 1]))


def _with_own_files(table: pa.Table, files: Sequence[str]) -> pa.Table:
    """The rows with only the file names they need: a chunk travels, thousands of names would travel with each."""
    used, file = np.unique(table["file"].to_numpy(), return_inverse=True)
    column = table.schema.get_field_index("file")
    metadata = {**table.schema.metadata, b"files": json.dumps([files[i] for i in used]).encode()}
    return table.set_column(column, table.schema.field(column), pa.array(file, pa.int32())
                            ).replace_schema_metadata(metadata)


# ------------------------------------------------------------------------------------------------------------- mistakes


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
    if config.guide is not None or config.timm is not None:
        return config
    guide = run.config.guide
    checkpoint = None if extractors.is_folder(guide.weights) else guide.checkpoint
    return config.model_copy(update={"guide": guide.weights, "checkpoint": config.checkpoint or checkpoint})


def _warnings(run: Run, config: EvaluateConfig, sides: Sequence[Side], found: Sequence[Found]) -> list[str]:
    lines = []
    if pending := run.totals().pending:
        lines.append(f"{pending} planned samples are not decided yet and are not in this result")
    for side, one in zip(sides, found, strict=True):
        if one.refused:
            lines.append(f"{one.refused} of {len(side)} {side.name} images cannot be decoded and were left out")
        if config.images is not None and len(side) < config.images:
            lines.append(f"there are only {len(side)} {side.name} images of the {config.images} asked for")
    return lines


def _counted(calls: Iterator[ImageBatch], say: Callable[[int], None]) -> Iterator[ImageBatch]:
    done = 0
    for call in calls:
        yield call
        done += call.rows + call.refused
        say(done)
