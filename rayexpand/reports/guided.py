"""A closer look at a guided run, with its models: samples beside what their noise gives without guidance, those the
guide is least sure of, and where samples lie among the prototypes.

The page of a run (report.py) needs no model; `rayexpand report RUN --strips N` loads them once and adds this to it.
"""

# B rows, N points, D features, K classes

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from PIL import Image

from rayexpand import methods
from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Batch, Method, Tools
from rayexpand.contract.schema import Receipt
from rayexpand.reports.run import Picture, picture_of, score_texts, spread
from rayexpand.runs import run as runs
from rayexpand.runs.expander import Expander

SHARDS = 4  # looked at, evenly over the run
FAILURES = 12
HEADLINES = ("energy", "score", "retained", "clamp", "flip")  # what scores beside a strip begin with
CLASSES, POINTS = 10, 400  # of the figure
GUIDE_BATCH = 64
SIDE, MARGIN = 420, 14  # of the figure, its units


@dataclass(frozen=True, slots=True)
class Strip:
    name: str  # class
    seed: Picture
    plain: Picture
    guided: Picture
    scores: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A sample to which the guide gives little of its own class."""

    name: str
    sample_id: str
    probability: float
    seen_as: str
    seed: Picture
    guided: Picture


@dataclass(frozen=True, slots=True)
class MapPoint:
    """A point of the figure: `kind` sample, seed, group (prototype) or class (prototype); `of` its class."""

    kind: str
    x: float
    y: float
    series: int  # colour of its class
    of: str
    title: str


@dataclass(frozen=True, slots=True)
class Look:
    twin: str  # how the plain images were made
    strips: tuple[Strip, ...]
    failures: tuple[Failure, ...]
    judged: int  # samples the guide looked at
    named_right: float  # share of them it puts in their own class
    points: tuple[MapPoint, ...]
    explained: float  # share of the variance that the two axes show
    classes: tuple[tuple[str, int, float, float], ...]  # of the figure: name, colour, and where the name stands
    side: int = SIDE


@dataclass(frozen=True, slots=True)
class _Row:
    """A kept sample with the batch it came from."""

    sample: dict[str, Any]  # a row of its data file
    batch: Batch
    slot: int
    pixels: np.ndarray  # uint8 (H, W, 3)


def look(folder: str, strips: int) -> Look:
    """Loads the models of a guided run and looks at some of its samples. Raises UsageError for a run whose method has
    no guide or that has no sample yet, DigestMismatch where its models have changed."""
    run = runs.open_run(folder, check_models=True, kept=False)  # plain samples are shown beside those of the run
    method = run.config.method
    if "guide" not in method.needs():
        raise UsageError(f"--strips compares guided samples with plain ones, and {method.name} as it was run here has "
                         "no guide; leave --strips out")
    expander = runs.expander_of(run, attempt=0)
    try:
        rows = list(_rows(run, expander))
        if not rows:
            raise UsageError(f"{folder} has no kept sample to show yet; run `rayexpand expand` first")
        tools = expander.loaded()
        twin = plain_twin(method)
        f_ND, p_NK = _judged([row.pixels for row in rows], tools)
        labels_N = np.array([row.sample["label"] for row in rows])
        points, explained, legend = _picture_of_features(rows, f_ND, labels_N, tools)
        return Look(_described(twin), _strips(rows, twin, tools, strips), _failures(rows, p_NK, labels_N, tools),
                    len(rows), float((p_NK.argmax(1) == labels_N).mean()), points, explained, legend)
    finally:
        expander.close()


def plain_twin(method: Method) -> Method:
    """The method without guidance, from the same noise where it gets the same batch: the method itself where it has
    such a setting, else image-to-image with its strength, steps and scale."""
    field = type(method).model_fields.get("guidance")  # type: ignore[attr-defined]
    if field is not None and "none" in get_args(field.annotation):
        return method.model_copy(update={"guidance": "none"})  # type: ignore[attr-defined]
    shared = ("prompt", "negative", "strength", "steps", "guidance_scale")
    return methods.load_method("img2img", {name: getattr(method, name) for name in shared if hasattr(method, name)})


def _described(twin: Method) -> str:
    return f"{twin.name} without guidance" if hasattr(twin, "guidance") else twin.name


def _rows(run: runs.Run, expander: Expander) -> Iterator[_Row]:
    """Kept samples of some shards."""
    kept: Sequence[Receipt] = [receipt for receipt in run.store.receipts() if receipt.kept]
    for receipt in spread(kept, SHARDS):
        table = {row["sample_id"]: row for row in run.store.data(receipt).to_pylist()}
        for batch in expander.batches(receipt.shard_id):
            for slot, draw in enumerate(batch.draws):
                if not batch.filler[slot] and (row := table.get(draw.sample_id)) and row["attempt"] == draw.attempt:
                    yield _Row(row, batch, slot, _pixels(row["image"]["bytes"]))


def _pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
        return np.asarray(image.convert("RGB"))


def _judged(images: Sequence[np.ndarray], tools: Tools) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and class probabilities (N, K) of images by the guide."""
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(images), GUIDE_BATCH):
            x_BHWC = torch.from_numpy(np.stack(images[start:start + GUIDE_BATCH]))
            f_BD = tools.guide.features(x_BHWC.permute(0, 3, 1, 2) / 255).float()
            parts.append((f_BD.cpu().numpy(), tools.guide.head(f_BD).softmax(1).cpu().numpy()))
    f_ND, p_NK = (np.concatenate(column) for column in zip(*parts, strict=True))
    return f_ND, p_NK


def _strips(rows: Sequence[_Row], twin: Method, tools: Tools, count: int) -> tuple[Strip, ...]:
    """One sample of each of `count` seeds, the classes in turn; the plain ones are made in one call."""
    first: dict[str, _Row] = {}
    for row in rows:
        first.setdefault(row.sample["seed_id"], row)
    by_class: dict[int, list[_Row]] = {}
    for row in sorted(first.values(), key=lambda row: row.sample["label"]):
        by_class.setdefault(row.sample["label"], []).append(row)
    turns = [of_class[i] for i in range(count) for of_class in by_class.values() if i < len(of_class)]
    chosen = sorted(turns[:count], key=lambda row: row.sample["label"])
    images = twin.expand(_batch(chosen), tools).images
    return tuple(Strip(tools.classes.display[row.sample["label"]], _shown(_seed(row), f"seed {row.sample['seed_id']}"),
                       _shown(plain, "plain, the same noise"), _shown(row.pixels, row.sample["sample_id"]),
                       tuple(line for line in score_texts(row.sample) if line[0].startswith(HEADLINES)))
                 for row, plain in zip(chosen, images, strict=True))


def _batch(rows: Sequence[_Row]) -> Batch:
    return Batch(tuple(row.batch.draws[row.slot] for row in rows), tuple(_seed(row) for row in rows),
                 tuple(row.batch.rngs[row.slot] for row in rows), (False,) * len(rows))


def _seed(row: _Row) -> np.ndarray:
    return row.batch.images[row.slot]


def _shown(pixels: np.ndarray | None, title: str) -> Picture:
    if pixels is None:
        return Picture(title=f"{title}: no finite image")
    return picture_of(Image.fromarray(pixels), title)


def _failures(rows: Sequence[_Row], p_NK: np.ndarray, labels_N: np.ndarray, tools: Tools) -> tuple[Failure, ...]:
    """The samples with the lowest probability of their own class, lowest first."""
    own_N, names = p_NK[np.arange(len(rows)), labels_N], tools.classes.display
    return tuple(Failure(names[labels_N[i]], rows[i].sample["sample_id"], float(own_N[i]), names[p_NK[i].argmax()],
                         _shown(_seed(rows[i]), f"seed {rows[i].sample['seed_id']}"),
                         _shown(rows[i].pixels, rows[i].sample["sample_id"]))
                 for i in np.argsort(own_N, kind="stable")[:FAILURES])


def _picture_of_features(rows: Sequence[_Row], f_ND: np.ndarray, labels_N: np.ndarray,
                         tools: Tools) -> tuple[tuple[MapPoint, ...], float,
                                                      tuple[tuple[str, int, float, float], ...]]:
    """Samples, their seeds and prototypes on the two principal axes of all of them; the share of the variance there;
    and the classes with their colours and the middles of their samples."""
    from sklearn.decomposition import PCA

    names = tools.classes.display
    shown = spread(sorted(set(labels_N.tolist())), CLASSES)
    picked = spread([i for i, label in enumerate(labels_N.tolist()) if label in shown], POINTS)
    seeds = list({rows[i].sample["seed_id"]: i for i in picked}.values())
    found = [("sample", labels_N[i], rows[i].sample["sample_id"], f_ND[i]) for i in picked]
    seed_features, _ = _judged([_seed(rows[i]) for i in seeds], tools)
    found += [("seed", rows[i].sample["source_label"], rows[i].sample["seed_id"], f_D)
              for i, f_D in zip(seeds, seed_features, strict=True) if rows[i].sample["source_label"] in shown]
    if (of := tools.prototypes) is not None:
        found += [("group", label, f"group {g + 1} of {names[label]}", of.group_KGD[label, g])
                  for label in shown for g in np.flatnonzero(of.valid_KG[label])]
        found += [("class", label, names[label], of.class_KD[label]) for label in shown]
    if len(found) < 3:
        return (), 0.0, ()
    pca = PCA(2, random_state=0)
    xy_N2 = pca.fit_transform(np.stack([f_D for *_, f_D in found]).astype(np.float64))
    low, size = xy_N2.min(0), np.ptp(xy_N2, 0).max() or 1.0
    place_N2 = MARGIN + (SIDE - 2 * MARGIN) * (xy_N2 - low) / size
    points = tuple(MapPoint(kind, round(float(x), 1), round(float(y), 1), shown.index(label), names[label], title)
                   for (kind, label, title, _), (x, y) in zip(found, place_N2, strict=True))
    places = {i: [(point.x, point.y) for point in points if point.series == i and point.kind == "sample"]
              for i in range(len(shown))}
    middles = {i: np.mean(of, axis=0) for i, of in places.items() if of}  # a rare class may have no point
    return points, float(pca.explained_variance_ratio_.sum()), tuple(
        (names[shown[i]], i, round(float(x), 1), round(float(y), 1)) for i, (x, y) in middles.items())
