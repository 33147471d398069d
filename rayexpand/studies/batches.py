"""The first training batch of every arm of a study, exactly as its loader makes it and its recipe mixes it.

    <study>/figures/<name>.parquet    one row for each image: the picture as the network is shown it, its label and how
                                      it was mixed

No model is loaded, and of a batch only the images that are shown are read, each with its partner in the batch, so that
MixUp and CutMix are those of the training.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.contract.errors import RayexpandError, UsageError
from rayexpand.loader.config import TrainingConfig
from rayexpand.loader.loader import Slots
from rayexpand.loader.row_mixing import RowMixes
from rayexpand.loader.training_set import TrainingSet
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import NAMED, parquet_bytes
from rayexpand.studies.parts import Trial
from rayexpand.studies.results import read_study
from rayexpand.studies.trial import TrialWork, open_work

MOST_ARMS = 40
BATCHES = pa.schema([
    ("arm", pa.string()), ("trial", pa.string()), ("place", pa.int32()), ("item", pa.int64()), ("is_real", pa.bool_()),
    ("label", pa.list_(pa.struct([("name", pa.string()), ("share", pa.float64())]))),
    ("mixing", pa.string()), ("own_share", pa.float64()), ("image", pa.binary()), ("batch", pa.int32()),
    ("why", pa.string())])  # why there is no image


def write_batches(folder: str, *, images: int = 16, name: str = "batch") -> pa.Table:
    """Makes `images` of the first batch of each arm, for the first repetition of the study, and keeps them. A row
    without an image says why an arm has none. Raises UsageError where there is no study or it has no trial yet."""
    files, view = open_files(folder), read_study(folder)
    first = min((int(one["seed"]) for one in view.planned.values() if one), default=None)
    trials = [Trial(**{key: value for key, value in one.items() if key != "digest"})
              for one in view.planned.values() if one and one["seed"] == first]
    if not trials:
        raise UsageError(f"--batch: {folder} has no trial yet, so no training set is written; run `rayexpand train` "
                         "first, it may be stopped once training begins")
    training = TrainingConfig(**(view.config.get("training") or {}))
    rows = [row for trial in trials[:MOST_ARMS] for row in _rows(files, trial, training, images)]
    rows += [{"arm": trial.arm, "trial": trial.name, "why": f"a page has room for {MOST_ARMS} arms"}
             for trial in trials[MOST_ARMS:]]
    table = pa.Table.from_pylist(rows, BATCHES)
    place = f"figures/{name}.parquet"
    for where in ("figures", ".tmp"):
        files.make_folder(where)
    files.replace(place, parquet_bytes(table, {NAMED: place.encode()}))
    return table


def _rows(files: Files, trial: Trial, training: TrainingConfig, images: int) -> Iterator[dict[str, Any]]:
    if not trial.is_trained:
        yield {"arm": trial.arm, "trial": trial.name, "why": "no network is trained step by step here"}
        return
    try:
        yield from _batch(trial, open_work(files, trial, training), images)
    except (RayexpandError, OSError) as error:  # its runs or images may be elsewhere; the other arms are worth showing
        yield {"arm": trial.arm, "trial": trial.name, "why": str(error)}


def _batch(trial: Trial, work: TrialWork, images: int) -> Iterator[dict[str, Any]]:
    import torch
    from PIL import Image

    from rayexpand.classifier.mixing import mixed

    loader, recipe = work.feed, work.recipe
    batch, slots, mixes = loader.part(0, images)
    x_BCHW = torch.from_numpy(batch.x_BHWC).permute(0, 3, 1, 2).float()
    x_BCHW, y_BK = mixed(recipe, loader.seed, 0, x_BCHW, torch.from_numpy(batch.y_BK), batch.mix_B5)
    pixels = x_BCHW.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    told = list(_mixing(trial, work, slots, mixes, batch.mix_B5))
    for place, (item, y_K, image) in enumerate(zip(slots.items.tolist(), y_BK.numpy(), pixels, strict=True)):
        sink = io.BytesIO()
        Image.fromarray(image).save(sink, "PNG")
        yield {"arm": trial.arm, "trial": trial.name, "place": place, "item": item,
               "is_real": item < loader.rows.n_seeds, "label": _label(y_K, loader.rows), "mixing": told[place][0],
               "own_share": told[place][1], "image": sink.getvalue(), "batch": loader.batch}


def _label(y_K: np.ndarray, rows: TrainingSet) -> list[dict[str, Any]]:
    """Classes of a label with their shares, the largest first."""
    names = rows.classes.display
    return [{"name": names[k], "share": float(y_K[k])} for k in np.argsort(-y_K, kind="stable") if y_K[k] > 0]


def _mixing(trial: Trial, work: TrialWork, slots: Slots, mixes: RowMixes,
            mix_B5: np.ndarray | None) -> Iterator[tuple[str, float]]:
    """Of each image how it is mixed, in words, and its own share of the pixels."""
    from rayexpand.classifier.mixing import draw_mix, draw_paste

    recipe, seed, loader = work.recipe, work.feed.seed, work.feed
    with_real = {int(at): mixture for at, mixture in zip(mixes.at, mixes.mixtures, strict=True)}
    of_batch = draw_mix(recipe, seed, 0, recipe.size)
    pasted = draw_paste(recipe, seed, 0, loader.total_steps, recipe.size)
    for i in range(len(slots.items)):
        words, own = list[str](), 1.0
        if (mixture := with_real.get(i)) is not None:
            own *= 1 - mixture.lam
            kind = "blended with" if mixture.box is None else "a box and"
            words.append(f"{kind} a real image, {100 * mixture.lam:.0f} % of it")
        if pasted is not None and pasted.box is not None:
            own *= pasted.lam
            words.append(f"a box of a rare class pasted (CMO), {100 * (1 - pasted.lam):.0f} %")
        lam, is_box = (1.0, False) if of_batch is None else (of_batch.lam, of_batch.box is not None)
        if mix_B5 is not None:
            row = mix_B5[i]
            lam, is_box = float(row[0]), bool(row[2] > row[1] and row[4] > row[3])
        if lam < 1:
            own *= lam
            words.append(f"{'CutMix' if is_box else 'MixUp'} with image {len(slots.items) - i}, "
                         f"{100 * (1 - lam):.0f} % of it")
        yield "; ".join(words), own
