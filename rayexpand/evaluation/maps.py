"""Where the samples of several runs and the real images lie for one guide: features in a plane, with the prototypes.

    here        meaning, unit
    f_ND        features of N images by one guide, as it gives them
    p_MD        prototypes in the same space: class means, and means of the groups of a class
    pca         the two axes of largest variance of real images and samples together; prototypes are projected on them
    tsne        t-SNE (van der Maaten and Hinton 2008) of images and prototypes together; distances between far points
                mean nothing in it

Images are those of the seeds that a key chooses, the same for all runs (DistDiff, figure 6; Real-Fake, figure 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.artifacts.prototypes import FILE
from rayexpand.contract.errors import ConfigError, RayexpandError, RowFault, UsageError
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex
from rayexpand.data.seeds import DataConfig, SeedReader
from rayexpand.diffusion.prototypes import Prototypes, load_prototypes
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.features import Extractor, ExtractorConfig
from rayexpand.models.folders import DIGITS
from rayexpand.runs.differences import short_names
from rayexpand.runs.lookup import keyed_seeds, rows_of, seed_table
from rayexpand.runs.status import RunView, read_classes, read_plan_table, view_run

MOST_POINTS = 6000  # t-SNE of them takes about a minute of one core
PERPLEXITY = 30.0
BATCH = 64
REAL = -1  # number of the real images among the runs


@dataclass(frozen=True, slots=True)
class MappedImage:
    run: int  # place of its run, or REAL
    label: int
    name: str  # sample id or seed id
    encoded: bytes | RowFault


def feature_map(folders: Sequence[str], *, guide: str | None = None, checkpoint: str | None = None, images: int = 20,
                classes: int = 10) -> dict[str, Any]:
    """Points of `images` samples and real images for each class and run, as JSON takes them.

    `guide`: null takes that of the first run that has one. Keys of the result: `extractor`, `classes`, `runs`, `points`
    (kind real, sample, group or class; run; label; name; pca; tsne), `pca`, `tsne`, `notes`. Raises ConfigError with
    all that is wrong before a model is loaded.
    """
    views = [view_run(folder) for folder in folders]
    chosen = _extractor(views, guide, checkpoint)
    if problems := [*_problems(views, images * classes), *extractors.check(chosen)]:
        raise ConfigError("--map", problems)
    table, keep = read_classes(views[0]), _chosen(views, images, classes)
    sha256, extractor = extractors.extractor_hash(chosen), extractors.load_extractor(chosen)
    notes: list[str] = []
    shown, f_ND = _features(extractor, itertools.chain(_real(views[0], keep), *(
        _samples(view, number, keep, images) for number, view in enumerate(views))), keep, notes)
    marks = _prototypes(views, sha256, table, list(keep), notes)
    plane, facts = project(f_ND, np.array([one["feature"] for one in marks]).reshape(-1, f_ND.shape[1]))
    points = [{"kind": "real" if one.run == REAL else "sample", "run": one.run, "label": one.label, "name": one.name}
              for one in shown] + [{key: value for key, value in one.items() if key != "feature"} for one in marks]
    names = short_names([view.run["config"] for view in views])
    for name, xy_N2 in plane.items():
        for point, xy in zip(points, xy_N2.round(4).tolist(), strict=True):
            point[name] = xy
    return {"extractor": {"name": extractors.name_of(chosen), "sha256": sha256, "size": extractor.size,
                          "resize": extractor.intake.words},
            "classes": {str(label): table.display[label] for label in keep}, "images_per_class": images,
            "runs": [{"name": name, "run": str(view.files.root), "run_digest": view.run["run_digest"]}
                     for name, view in zip(names, views, strict=True)], "points": points, **facts, "notes": notes}


def project(f_ND: np.ndarray, p_MD: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Places (N + M, 2) of images and prototypes by `pca` and `tsne`, and what each says of itself. Raises UsageError
    for fewer than four images."""
    import sklearn
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(f_ND) < 4:
        raise UsageError(f"--map: {len(f_ND)} images are too few for a plane; take more with --images, or finish the "
                         "runs")
    f_ND, p_MD = f_ND.astype(np.float64), p_MD.astype(np.float64)
    all_ND = np.concatenate([f_ND, p_MD])
    pca = PCA(2, svd_solver="full").fit(f_ND)
    perplexity = min(PERPLEXITY, (len(all_ND) - 1) / 3)
    tsne = TSNE(2, init="pca", perplexity=perplexity, random_state=0)  # begins at the PCA: the same points every time
    places = {"pca": pca.transform(all_ND), "tsne": tsne.fit_transform(all_ND).astype(np.float64)}
    return places, {"pca": {"explained": pca.explained_variance_ratio_.tolist()},
                    "tsne": {"perplexity": perplexity, "kl": float(tsne.kl_divergence_),
                             "iterations": int(tsne.n_iter_), "library": f"scikit-learn {sklearn.__version__}"}}


# Images --------------------------------------------------------------------------------------------------------------


def _problems(views: Sequence[RunView], images: int) -> list[str]:
    first = read_classes(views[0])
    found = [f"runs: {view.files.root} has other classes than {views[0].files.root}, and one plane shows the same "
             "classes of all" for view in views[1:] if read_classes(view).key != first.key]
    if (points := images * (len(views) + 1)) > MOST_POINTS:
        found.append(f"images: {points:,} points are more than the {MOST_POINTS:,} that are drawn; lower --images or "
                     "--classes")
    if not any(receipt.kept for view in views for receipt in view.receipts):
        found.append(f"runs: {views[0].files.root} has no kept sample yet; run `rayexpand expand` first")
    return found


def _extractor(views: Sequence[RunView], guide: str | None, checkpoint: str | None) -> ExtractorConfig:
    """The guide that was named, else that of the first run that was made with one, else that of the first run."""
    if guide is not None:
        return ExtractorConfig(guide=guide, checkpoint=checkpoint)
    with_guide = [view for view in views if view.run["models"].get("guide")]
    said = (with_guide or views)[0].run["config"].get("guide") or {}
    weights = said.get("weights") or DIGITS
    return ExtractorConfig(guide=weights, checkpoint=None if extractors.is_folder(weights) else said.get("checkpoint"))


def _chosen(views: Sequence[RunView], images: int, classes: int) -> dict[int, list[str]]:
    return keyed_seeds([seed_table(view) for view in views], images, classes)


def _real(view: RunView, keep: Mapping[int, Sequence[str]]) -> Iterator[MappedImage]:
    """The seeds themselves."""
    table = read_plan_table(view, "seeds.parquet").select(SEED_INDEX.names)
    wanted = pa.array([seed_id for ids in keep.values() for seed_id in ids], pa.string())
    table = table.filter(pc.is_in(table["seed_id"], wanted))
    reader = SeedReader(SeedIndex(table, read_classes(view)), DataConfig.model_validate(view.run["config"]["data"]))
    for row, found in enumerate(reader.read(range(table.num_rows))):
        yield MappedImage(REAL, table["label"][row].as_py(), table["seed_id"][row].as_py(),
                          found if isinstance(found, RowFault) else found.image)


def _samples(view: RunView, number: int, keep: Mapping[int, Sequence[str]], images: int) -> Iterator[MappedImage]:
    """The first copies of the seeds of a class, `images` of them at most."""
    table = seed_table(view)
    for seeds in keep.values():
        copies = math.ceil(images / len(seeds))
        found = rows_of(view, table, seeds, copies).kept
        ordered = [row for copy in range(copies) for seed_id in seeds if (row := found.get((seed_id, copy)))]
        for row in ordered[:images]:
            yield MappedImage(number, row["label"], row["sample_id"], row["image"]["bytes"])


def _features(extractor: Extractor, images: Iterator[MappedImage], keep: Mapping[int, Any],
              notes: list[str]) -> tuple[list[MappedImage], np.ndarray]:
    """Images of the classes that are shown, with their features; what is left out is said."""
    shown, pixels, other, refused = list[MappedImage](), list[np.ndarray](), 0, 0
    for one in images:
        if one.label not in keep:
            other += 1
            continue
        (call,) = extractors.calls([one.encoded], extractor.size, 1, intake=extractor.intake)
        refused += call.refused
        if call.rows:
            shown.append(replace(one, encoded=b""))
            pixels.append(call.x_BHWC[0])
    if other:
        notes.append(f"{other} samples are of classes that are not shown here")
    if refused:
        notes.append(f"{refused} images cannot be decoded and are left out")
    return shown, extractors.stacked([extractor(np.stack(pixels[i:i + BATCH])) for i in range(0, len(pixels), BATCH)])


# Prototypes ----------------------------------------------------------------------------------------------------------


def _prototypes(views: Sequence[RunView], sha256: str, classes: ClassTable, labels: Sequence[int],
                notes: list[str]) -> list[dict[str, Any]]:
    """Those of the first run that has some of this guide: class means and valid groups."""
    for number, view in enumerate(views):
        folder = (view.run["config"].get("artifacts") or {}).get("prototypes")
        if folder is None:
            continue
        try:
            found = load_prototypes(Path(folder) / FILE, guide_hash=sha256, class_keys=classes.key)
        except RayexpandError as error:
            notes.append(f"the prototypes of {view.run['name']} are not shown: {error}")
            continue
        return list(_marks(found, number, labels, classes.display))
    return []


def _marks(found: Prototypes, run: int, labels: Sequence[int], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    for label in labels:
        for group in np.flatnonzero(found.valid_KG[label]).tolist():
            yield {"kind": "group", "run": run, "label": label, "name": f"group {group + 1} of {names[label]}",
                   "feature": found.group_KGD[label, group]}
        yield {"kind": "class", "run": run, "label": label, "name": names[label], "feature": found.class_KD[label]}
