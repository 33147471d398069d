"""How good the trained guides behind samples are: each answers the test images of the study once, whatever arms use it.

    guides/<digest of guide and test images>.json    kind, sha256, images, and the scores of a classifier

A guide that takes any classes (CLIP as it is) is asked by `evaluate`, metric alignment.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.artifacts import store
from rayexpand.classifier.accuracy import Answers, answer, scores_of, softmax
from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.errors import RayexpandError
from rayexpand.contract.schema import ClassTable
from rayexpand.contract.settings import digest
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.loader.loader import TestSet
from rayexpand.models.guide_files import CLASSIFIER, CLIP_HEAD, about_guide, kind_of, present_guide
from rayexpand.models.guides import guide_hash, load_guide
from rayexpand.runs.joined import is_loop
from rayexpand.runs.store import read_facts
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import healthy_json, replace_json
from rayexpand.studies.parts import Trial

log = logging.getLogger(__name__)

FOLDER = "guides"
BATCH = 256


def guide_scores(files: Files, trial: Trial, classes: ClassTable, device: str) -> dict[str, Any] | None:
    """Scores of the guide of a trial's run on the test images. None without a guide that was trained, and of a loop,
    which has one for each guided round; where it is gone or has changed, a warning and None, since the trial itself is
    sound."""
    if not trial.run or is_loop(trial.run):
        return None
    try:
        run = read_facts(open_files(trial.run))
        weights, sha256 = (run["config"].get("guide") or {}).get("weights"), run["models"].get("guide")
        folder = present_guide(weights) if weights and sha256 else None
        if folder is None or (kind := kind_of(folder)) not in (CLASSIFIER, CLIP_HEAD):
            return None
        place = f"{FOLDER}/{digest([sha256, trial.test_sha256])[:16]}.json"
        if (known := healthy_json(files, place)) is not None:
            return known
        if guide_hash(str(folder), None) != sha256:
            log.warning("%s is not the guide that %s was made with, so its accuracy is not stored", folder, trial.run)
            return None
        found = {"kind": kind, "sha256": sha256, **_scores(folder, DataConfig(**trial.test), classes, device)}
    except (RayexpandError, OSError) as error:
        log.warning("the accuracy of the guide of %s is not stored: %s", trial.run, error)
        return None
    files.make_folder(FOLDER)
    replace_json(files, place, found)
    return found


def _scores(folder: Path, test: DataConfig, classes: ClassTable, device: str) -> dict[str, Any]:
    """Images as the guide's own recipe shows them to it."""
    import torch

    guide = load_guide(str(folder), None, classes.asked, device=device, class_keys=classes.key)
    made_from = store.read_facts(folder).get("made_from") or {}
    side = guide.size[0]
    view = Recipe(**{**(about_guide(folder).get("recipe") or made_from.get("recipe") or {}), "size": side,
                     "test_size": side, "checkpoint": None, "pretrained": None})

    def logits(x_BHWC: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return guide.logits(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2) / 255).double().cpu().numpy()

    shown = TestSet(build_index(test), test, view, 0, 1, BATCH, cache_bytes=0)
    answers = Answers.concatenate([answer(items, softmax(logits(x_BHWC)), labels)
                                   for x_BHWC, labels, items in shown.batches()])
    return {"images": len(answers.item), **scores_of(answers, len(classes))}
