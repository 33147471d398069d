"""What the classifiers of a study look at: Grad-CAM of the same test images under each arm, from kept weights.

    <study>/figures/<name>.parquet    one row for each arm and image: the image, its map, and what was answered

Images are chosen by a key, one of each class in turn, and never by what an arm makes of them. The target is the true
class. An arm whose network has no such map, or whose weights were not kept, is a row that says so.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.device import choose_device, torch_threads
from rayexpand.contract.errors import RayexpandError, UsageError
from rayexpand.contract.rng import PlanRng
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.data.subsets import sound_rows
from rayexpand.loader.config import TrainingConfig
from rayexpand.loader.loader import TestSet
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import NAMED, parquet_bytes
from rayexpand.studies.kept import load_classifier, read_trial
from rayexpand.studies.parts import Trial
from rayexpand.studies.results import read_study

MOST_IMAGES, MOST_ARMS = 64, 24
MAPS = pa.schema([
    ("arm", pa.string()), ("trial", pa.string()), ("image_id", pa.string()), ("class", pa.string()),
    ("probability", pa.float64()), ("answered", pa.string()), ("layer", pa.string()), ("height", pa.int32()),
    ("width", pa.int32()), ("map", pa.list_(pa.float32())), ("image", pa.binary()),
    ("why", pa.string())])  # why there is no map


def write_saliency(folder: str, *, images: int = 10, name: str = "saliency") -> pa.Table:
    """Computes and keeps the maps of `images` test images for the first repetition of each arm. Raises UsageError where
    there is no study, no trial of it kept its weights, or no arm has a map."""
    files, view = open_files(folder), read_study(folder)
    first = min((int(one["seed"]) for one in view.results), default=None)
    trials = [read_trial(files, str(one["trial"])) for one in view.results if one["seed"] == first]
    if not any(one.get("weights") for one in view.results):
        raise UsageError(f"--saliency: {folder} has no trial with kept weights; set training.keep: weights in its file "
                         "and run `rayexpand train` again")
    if images > MOST_IMAGES:
        raise UsageError(f"--saliency: --images {images:,} are more than the {MOST_IMAGES} of a page; lower it")
    training = TrainingConfig(**(view.config.get("training") or {}))
    test = DataConfig(**trials[0].test)
    index = chosen_images(build_index(test), images)
    with torch_threads(training.threads):
        device = str(choose_device(training.device))
        rows = [row for trial in trials[:MOST_ARMS] for row in _rows(files, trial, index, test, device)]
    if not any(row.get("image") for row in rows):
        raise UsageError("\n  ".join([f"--saliency: no arm of {folder} has a map:", *(
            f"{row['arm']}: {row['why']}" for row in rows)]))
    rows += [{"arm": trial.arm, "trial": trial.name, "why": f"a page has room for {MOST_ARMS} arms"}
             for trial in trials[MOST_ARMS:]]
    rows += [{"arm": arm, "trial": "", "why": f"its trial of repetition {first} is not finished"}
             for arm in view.arms if arm not in {trial.arm for trial in trials}]
    table, place = pa.Table.from_pylist(rows, MAPS), f"figures/{name}.parquet"
    for where in ("figures", ".tmp"):
        files.make_folder(where)
    files.replace(place, parquet_bytes(table, {NAMED: place.encode()}))
    return table


def chosen_images(index: SeedIndex, count: int) -> SeedIndex:
    """`count` images of an index, the classes in turn, within a class by a key of the id; by class."""
    sound = sound_rows(index)
    ids = index.table["seed_id"].take(pa.array(sound)).to_pylist()
    labels = index.labels[sound]
    order = np.lexsort((PlanRng(0, "pictures").per_seed("test", ids), labels))
    turn = np.empty(len(order), np.int64)
    turn[order] = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
    chosen = sorted(range(len(sound)), key=lambda i: (turn[i], labels[i]))[:count]
    rows = sound[sorted(chosen, key=lambda i: (labels[i], turn[i]))]
    return SeedIndex(index.table.take(pa.array(rows)), index.classes)


def _rows(files: Files, trial: Trial, index: SeedIndex, test: DataConfig, device: str) -> Iterator[dict[str, Any]]:
    try:
        yield from _maps(files, trial, index, test, device)
    except RayexpandError as error:
        yield {"arm": trial.arm, "trial": trial.name, "why": str(error)}


def _maps(files: Files, trial: Trial, index: SeedIndex, test: DataConfig, device: str) -> Iterator[dict[str, Any]]:
    import torch
    from PIL import Image

    from rayexpand.evaluation.gradcam import grad_cam, last_block

    kept = load_classifier(files, trial, device)
    if kept.module is None:
        raise UsageError("no network is trained step by step here, so there is no block to look at")
    names, ids = index.classes.display, index.seed_ids
    mean, std = (torch.tensor(one, device=device).view(1, 3, 1, 1) for one in (kept.view.mean, kept.view.std))
    for batch in TestSet(index, test, kept.view, 0, 1, MOST_IMAGES).batches():
        x_BCHW = torch.from_numpy(batch.x_BHWC).to(device).permute(0, 3, 1, 2).float() / 255
        x_BCHW, labels_B = (x_BCHW - mean) / std, torch.from_numpy(batch.labels).to(device).long()
        layer = last_block(kept.module, x_BCHW[:1])
        maps_Bhw, logits_BK = grad_cam(kept.module, layer, x_BCHW, labels_B)
        p_BK = logits_BK.double().softmax(1).cpu().numpy()
        for i, item in enumerate(batch.items.tolist()):
            sink = io.BytesIO()
            Image.fromarray(batch.x_BHWC[i]).save(sink, "PNG")
            height, width = maps_Bhw.shape[1:]
            yield {"arm": trial.arm, "trial": trial.name, "image_id": ids[item], "class": names[batch.labels[i]],
                   "probability": float(p_BK[i, batch.labels[i]]), "answered": names[int(p_BK[i].argmax())],
                   "layer": layer, "height": height, "width": width,
                   "map": maps_Bhw[i].flatten().float().cpu().tolist(), "image": sink.getvalue()}
