"""All finished classifiers of a study on its sets of corrupted images: each image is corrupted once, and shown to all.

Corrupted images depend on no classifier, so one pass follows all trials. It goes block by block; of a block only right
and wrong are kept. A pass that was stopped goes on after the last block that was written.

    robustness/<test>/<trial>.parquet    item, and right or wrong for each <type>/<severity>
    robustness/<test>/<trial>.json       scores; written last
    robustness/<test>/blocks/            blocks of a pass that has not ended
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from rayexpand.classifier.recipe import Recipe
from rayexpand.contract.device import choose_device, torch_threads
from rayexpand.contract.errors import DamagedFile, Interrupted, RayexpandError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.settings import digest
from rayexpand.evaluation.robustness import corruption_scores
from rayexpand.storage.files import Files
from rayexpand.storage.tables import NAMED, healthy_json, parquet_bytes, read_table, replace_json
from rayexpand.studies import extra_tests
from rayexpand.studies.corrupted_sets import CorruptedImages, CorruptedSet, open_corrupted
from rayexpand.studies.kept import KeptClassifier, load_classifier
from rayexpand.studies.parts import Study, Trial, read_result

log = logging.getLogger(__name__)

BLOCK = 128  # images
KEY = 16  # letters of the digest in the names of blocks
FOLDER = "robustness"


@dataclass(frozen=True)
class CorruptedPass:
    """Classifiers that see images in the same way, and the set they are shown."""

    shown: CorruptedSet
    view: Recipe
    trials: tuple[Trial, ...]
    digests: tuple[str, ...]  # of their results
    size: int  # images of a block

    @cached_property
    def key(self) -> str:
        return digest([self.size, [[one.name, of] for one, of in zip(self.trials, self.digests, strict=True)]])[:KEY]

    @property
    def blocks(self) -> int:
        return -(-len(self.shown.rows) // self.size)

    def rows_of(self, block: int) -> np.ndarray:
        return self.shown.rows[block * self.size:(block + 1) * self.size]

    def place(self, block: int) -> str:
        return f"{FOLDER}/{self.shown.name}/blocks/{self.key}-{block:06d}.parquet"


Show = Callable[[Study, CorruptedPass, Sequence[int]], Iterator[tuple[int, np.ndarray]]]
"""Number of a block and bool (cells, classifiers, images), for each of some blocks, in any order."""


def show_corrupted(study: Study, trials: Sequence[Trial], show: Show,
                   progress: Progress = lambda *_: None) -> list[str]:
    """Shows every set of corrupted images to the finished classifiers without a result of it; one line for each set
    that failed."""
    classes, failed = next(iter(study.subsets.values()))[1].classes, []
    for name, test in study.config.extra_tests.items():
        if not test.is_corrupted:
            continue
        try:
            shown = open_corrupted(name, test, classes, study.opened.index)
            for one in _passes(study, shown, trials):
                _run(study, one, show, progress)
        except Interrupted:
            raise
        except RayexpandError as error:
            failed.append(f"extra_tests.{name}: {error}")
        except (RuntimeError, ValueError, MemoryError) as error:  # torch's and the backbone's; other sets go on
            failed.append(f"extra_tests.{name}: {type(error).__name__}: {error}")
    return failed


def result_digest(shown: CorruptedSet, trial: Trial, result: dict[str, Any]) -> str:
    """What a result on corrupted images depends on."""
    return digest([shown.sha256, shown.test.restrict, trial.digest, (result.get("weights") or {}).get("sha256", "")])


def _passes(study: Study, shown: CorruptedSet, trials: Sequence[Trial]) -> list[CorruptedPass]:
    """Trials without a result, by how they see images. A pass of other classifiers that was not ended is dropped."""
    waiting: dict[str, list[tuple[Trial, Recipe, str]]] = {}
    for trial in trials:
        result = read_result(study.files, trial.name)
        if result is None or result["digest"] != trial.digest:
            continue  # it failed, and that is said already
        of, name = result_digest(shown, trial, result), f"{FOLDER}/{shown.name}/{trial.name}.json"
        if (found := healthy_json(study.files, name) or {}).get("digest") != of:
            view = shown.view_of(Recipe(**{**trial.recipe, "checkpoint": None, "pretrained": None}) if trial.is_trained
                                 else load_classifier(study.files, trial).view)
            waiting.setdefault(digest(_seen(view)), []).append((trial, view, of))
        elif found["settings"] != (settings := shown.test.model_dump(mode="json")):  # such as a folder that was moved
            replace_json(study.files, name, {**found, "settings": settings})
    passes = [CorruptedPass(shown, line[0][1], tuple(one[0] for one in line), tuple(one[2] for one in line), BLOCK)
              for line in waiting.values()]
    keys = {one.key for one in passes}
    folder = f"{FOLDER}/{shown.name}/blocks"
    study.files.delete(*(f"{folder}/{name}" for name in study.files.list(folder) if name[:KEY] not in keys))
    return passes


def _seen(view: Recipe) -> list[Any]:
    """What `test_transform` looks at."""
    return [view.test_size or view.size, view.resize, view.crop == "square_pad", view.filter]


def _run(study: Study, one: CorruptedPass, show: Show, progress: Progress) -> None:
    """Shows what is not shown yet, then writes the results."""
    files, task = study.files, f"corrupted images of {one.shown.name}"
    files.make_folder(f"{FOLDER}/{one.shown.name}/blocks")
    done = {block: right for block in range(one.blocks) if (right := _read_block(files, one, block)) is not None}
    progress(task, len(done), one.blocks)
    todo = [block for block in range(one.blocks) if block not in done]
    for block, right_CTB in show(study, one, todo) if todo else ():
        done[block] = right_CTB
        columns = {str(number): right_CTB[:, number].ravel() for number in range(len(one.trials))}
        files.replace(one.place(block), parquet_bytes(pa.table(columns), {NAMED: one.place(block).encode()}),
                      "corrupted")
        progress(task, len(done), one.blocks)
    right_CTN = np.concatenate([done[block] for block in range(one.blocks)], axis=2)
    for number, trial in enumerate(one.trials):
        _write(files, one, trial, one.digests[number], right_CTN[:, number])
    files.delete(*(one.place(block) for block in range(one.blocks)))


def _read_block(files: Files, one: CorruptedPass, block: int) -> np.ndarray | None:
    """bool (cells, classifiers, images) as it was written; None where it is not there, or damaged, which is said."""
    try:
        table = read_table(files, one.place(block))
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        log.warning("%s. It counts as none; these images are shown again", error)
        return None
    shape = (len(one.shown.cells), len(one.rows_of(block)))
    return np.stack([table[str(number)].to_numpy(zero_copy_only=False).reshape(shape)
                     for number in range(len(one.trials))], axis=1)


def _write(files: Files, one: CorruptedPass, trial: Trial, of: str, right_CN: np.ndarray) -> None:
    """Answers of a classifier, then its scores."""
    shown, name = one.shown, f"{FOLDER}/{one.shown.name}/{trial.name}"
    table = pa.table({"item": shown.rows, **{f"{kind}/{severity}": right for (kind, severity), right
                                             in zip(shown.cells, right_CN, strict=True)}})
    place = f"{name}.parquet"
    files.replace(place, parquet_bytes(table, {NAMED: place.encode()}, row_group=1 << 16), "robustness table")
    top1 = dict(zip(shown.cells, right_CN.mean(axis=1).tolist(), strict=True))
    side = one.view.test_size or one.view.size
    images, classes = int(right_CN.shape[1]), len(np.unique(shown.first.own_N[shown.rows]))
    replace_json(files, f"{name}.json", {
        "trial": trial.name, "arm": trial.arm, "seed": trial.seed, "test": shown.name, "name": shown.called,
        "digest": of, "trial_digest": trial.digest, "note": shown.note, "images": images, "side": side,
        "classes": classes, "restricted": shown.test.restrict,
        "left_out": shown.first.left_out, "settings": shown.test.model_dump(mode="json"),
        **corruption_scores(top1, shown.called, (images, classes))})


class Shower:
    """Classifiers of a pass and the images they are shown, in one process."""

    def __init__(self, one: CorruptedPass, classifiers: Sequence[KeptClassifier]) -> None:
        self._first, self._classifiers = one.shown.first, classifiers
        self._among = extra_tests.classes_among(one.shown.test, self._first)

    def right(self, rows: np.ndarray, x_BHWC: np.ndarray) -> np.ndarray:
        """bool (classifiers, B): who is right about the images of these rows."""
        labels, accepted = self._first.index.labels[rows], self._first.accepted(rows)
        return np.stack([extra_tests.answer_among(rows, one.answering.logits(x_BHWC), labels, self._among,
                                                  accepted).rank < 1 for one in self._classifiers])


def load_all(files: Files, one: CorruptedPass, device: str) -> list[KeptClassifier]:
    return [load_classifier(files, trial, device) for trial in one.trials]


def in_process(study: Study, one: CorruptedPass, blocks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Shows blocks in this process."""
    training = study.config.training
    with torch_threads(training.threads):
        shower = Shower(one, load_all(study.files, one, str(choose_device(training.device))))
        images = CorruptedImages(one.shown, one.view)
        for block in blocks:
            rows = one.rows_of(block)
            yield block, np.stack([shower.right(rows, x_BHWC) for _, x_BHWC in images.made(rows)])
