"""The audit `membership`: what attacks see of shadow pipelines, and what that says (membership.py makes the shadows).

    phi/<line>/<shadow>.parquet   seed_id, phi (float32, one number for each query), of every audited image

A line is an attack, or `private`: the attack `classifier` on classifiers of the members' real images.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.contract.errors import DamagedFile, RayexpandError, RowFault, UsageError
from rayexpand.contract.protocols import Progress
from rayexpand.contract.settings import digest
from rayexpand.data.pixels import decode
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.data.seeds.listing import encode_png
from rayexpand.data.subsets import ids_hash
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.evaluate import EvaluateConfig, Extract
from rayexpand.evaluation.membership import log_odds
from rayexpand.evaluation.membership_result import LIMITS, judged, said, worse
from rayexpand.evaluation.search import References, unit_rows
from rayexpand.evaluation.select_scores import Score
from rayexpand.evaluation.sides import EVERY_ROW, ChunkImages, read_seeds, reference_of, samples_of
from rayexpand.loader.loader import TestSet
from rayexpand.runs.config import ClusterConfig, RuntimeConfig
from rayexpand.runs.driving import Driver, Listener
from rayexpand.storage.files import Files
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import NAMED, parquet_bytes, read_table
from rayexpand.studies.expansions import Fit, pending_runs
from rayexpand.studies.kept import load_classifier
from rayexpand.studies.membership import (
    EXPANSION,
    PRIVATE,
    SELECTION,
    Members,
    MembershipConfig,
    extractor_of,
    refuse_shared,
    refuse_unreadable,
    study_of,
)
from rayexpand.studies.parts import Study, Train, Trial, folder_of, read_result
from rayexpand.studies.selections import make_selections
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trials import announce, make_trials

log = logging.getLogger(__name__)

BATCH = 256  # images of one call of a classifier
_FACTS = b"rayexpand"


class Machines(NamedTuple):
    """What does the work, in this process or on a cluster."""

    drive: Driver
    fit: Fit
    score: Score
    extract: Extract
    train: Train
    ask: Ask
    device_here: bool = True  # runs are sampled in this process


class Question(NamedTuple):
    """What classifiers are asked: phi of every sound image of `data`, once for each query."""

    data: DataConfig
    queries: tuple[str, ...]


# answers of trials, float32 (N, Q) each, as they come in
Ask = Callable[[Study, Sequence[Trial], Question], Iterable[tuple[Trial, np.ndarray]]]


def audit_membership(config: MembershipConfig, folder: str, machines: Machines, progress: Listener, *,
                     runtime: RuntimeConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Makes what is missing of the shadows in `folder`, attacks them, and returns what was found.

    Raises ConfigError, UsageError, and RayexpandError where a classifier could not be trained.
    """
    files, whole = open_files(folder), build_index(config.data)
    wanted, members = study_of(config, folder, cluster), Members(config, whole)
    refuse_shared(config, wanted, whole)
    if files.read("members.parquet") is None:
        refuse_unreadable(config, whole, progress)
    for name in ("phi", ".tmp", *(f"phi/{line}" for line in config.lines)):
        files.make_folder(name)
    files.replace("members.parquet", parquet_bytes(members.table(), {NAMED: b"members.parquet"}))
    study = prepare_study(wanted, members.subset)
    announce(study)
    for run in pending_runs(study, progress, machines.fit, device_here=machines.device_here):
        machines.drive(run, progress)
    make_selections(study, machines.score, progress)
    trials = [trial for trial in make_trials(study) if trial.arm in config.lines]
    if failed := machines.train(study.trial_folder, trials):
        raise RayexpandError("audit.membership: classifiers of shadows could not be trained; what is done is kept, and "
                             "the same command tries these again:\n  " + "\n  ".join(failed))
    phi = _Phi(config, files, members)
    _ask(phi, study, trials, machines.ask, progress)
    if "samples" in config.attack:
        _compare(phi, study, machines.extract, runtime, progress)
    return _result(phi, study, trials)


# -------------------------------------------------------------------------------------------------------------- answers


class _Phi:
    """The files of phi, each of one line and one shadow."""

    def __init__(self, config: MembershipConfig, files: Files, members: Members) -> None:
        self.config, self.files, self.members = config, files, members
        self._ids = ids_hash(members.ids)

    def made_from(self, **facts: Any) -> str:
        return digest({"ids": self._ids, "queries": list(self.config.queries), **facts})

    def lacks(self, line: str, shadow: int, made_from: str) -> bool:
        """Whether a file is not there, damaged, or of something else."""
        try:
            found = read_table(self.files, _name(line, shadow))
        except FileNotFoundError:
            return True
        except DamagedFile as error:
            log.warning("%s. It is made again", error)
            return True
        return dict(json.loads((found.schema.metadata or {}).get(_FACTS, b"{}"))).get("digest") != made_from

    def write(self, line: str, shadow: int, made_from: str, phi_NQ: np.ndarray) -> None:
        table = pa.table({"seed_id": self.members.ids,
                          "phi": pa.FixedSizeListArray.from_arrays(phi_NQ.astype(np.float32).ravel(), phi_NQ.shape[1])})
        name = _name(line, shadow)
        self.files.replace(name, parquet_bytes(table, {NAMED: name.encode(),
                                                       _FACTS: json.dumps({"digest": made_from}).encode()}))

    def read(self, line: str) -> np.ndarray:
        """float32 (S, N, Q)."""
        columns = (read_table(self.files, _name(line, shadow))["phi"].combine_chunks()
                   for shadow in range(self.config.shadows))
        return np.stack([one.flatten().to_numpy().reshape(len(one), -1) for one in columns])


def _name(line: str, shadow: int) -> str:
    return f"phi/{line}/{shadow}.parquet"


# ----------------------------------------------------------------------------------------------------------- classifier


def _ask(phi: _Phi, study: Study, trials: Sequence[Trial], ask: Ask, progress: Progress) -> None:
    digests = {trial.name: phi.made_from(trial=trial.digest) for trial in trials}
    todo = [trial for trial in trials if phi.lacks(trial.arm, trial.seed, digests[trial.name])]
    for done, (trial, phi_NQ) in enumerate(ask(study, todo, Question(phi.config.data, phi.config.queries)), 1):
        phi.write(trial.arm, trial.seed, digests[trial.name], phi_NQ)
        progress("asking classifiers", len(trials) - len(todo) + done, len(trials))


def ask_here(study: Study, trials: Sequence[Trial], question: Question) -> Iterator[tuple[Trial, np.ndarray]]:
    """Answers of classifiers in this process."""
    for trial in trials:
        yield trial, phi_of(study.files, trial, question, study.config.training.device, study.config.training.threads)


def phi_of(files: Files, trial: Trial, question: Question, device: str, threads: int) -> np.ndarray:
    """float32 (N, Q): log odds that a finished classifier gives the label of each image. Raises UsageError for an image
    that cannot be read."""
    from rayexpand.contract.device import choose_device, torch_threads

    data = question.data
    with torch_threads(threads):
        kept = load_classifier(files, trial, str(choose_device(device)))
        images = TestSet(build_index(data), data, kept.view, 0, 1, BATCH, cache_bytes=0,
                         section="audit.membership.data")
        parts = [np.stack([log_odds(kept.answering.logits(_asked(batch.x_BHWC, query)), batch.labels)
                           for query in question.queries], axis=1) for batch in images.batches()]
    return np.concatenate(parts).astype(np.float32)


def _asked(x_BHWC: np.ndarray, query: str) -> np.ndarray:
    """Images as a query shows them."""
    return np.ascontiguousarray(x_BHWC[:, :, ::-1]) if query == "flip" else x_BHWC


# -------------------------------------------------------------------------------------------------------------- samples


def _compare(phi: _Phi, study: Study, extract: Extract, runtime: RuntimeConfig, progress: Progress) -> None:
    """Writes how alike every image and the released sample nearest to it are, for each shadow where that is missing."""
    config = phi.config
    extractor = extractor_of(config, study.config)
    sha256 = extractors.extractor_hash(extractor, progress)
    asked = EvaluateConfig(run=study.config.folder, reference=config.data, extractor=extractor, batch=config.batch,
                           metrics=["precision_recall"], runtime=runtime, cluster=study.config.cluster)  # rows, no sums
    selection = None if config.selection is None else SELECTION
    runs = {shadow: study.opened.run(folder_of(study.expansions[EXPANSION, shadow])) for shadow in study.config.seeds}
    digests = {shadow: phi.made_from(run=run.facts["run_digest"], extractor=sha256, copies=config.copies,
                                     selection=config.selection) for shadow, run in runs.items()}
    todo = [shadow for shadow in runs if phi.lacks("samples", shadow, digests[shadow])]
    if not todo:
        return
    reference = reference_of(config.data, EVERY_ROW)
    images = replace(reference, name="audited images", chunks=[
        chunk.filter(pc.equal(chunk["fault"], "")) for chunk in reference.chunks])
    views = {"identity": images,
             "flip": replace(images, name="flipped images", read=partial(read_flipped, config.data))}
    found = extract(asked, sha256, [views[query] for query in config.queries], progress)
    if any(one.refused for one in found):
        raise UsageError(f"audit.membership.data: {max(one.refused for one in found)} images cannot be decoded; list "
                         "the others in a file and give it as data.ids")
    for done, shadow in enumerate(todo, 1):
        side = samples_of(runs[shadow], EVERY_ROW, selection, config.copies)
        samples, = extract(asked, sha256, [side], progress)
        phi.write("samples", shadow, digests[shadow], np.stack(
            [nearest(one.features_ND, samples.features_ND) for one in found], axis=1))
        progress("comparing samples with images", len(runs) - len(todo) + done, len(runs))


def nearest(images_ND: np.ndarray, samples_RD: np.ndarray) -> np.ndarray:
    """float32 (N,): the largest cosine of each image with any sample."""
    return References(unit_rows(samples_RD)).nearest(unit_rows(images_ND), 1)[0][:, 0]


def read_flipped(data: DataConfig, chunk: pa.Table) -> ChunkImages:
    """Encoded mirror images of rows of a seed index."""
    plain = read_seeds(data, chunk)
    found: list[bytes | RowFault] = []
    for one in plain.images:
        try:
            found.append(one if isinstance(one, RowFault) else encode_png(
                decode(one, min_side=data.min_side, max_pixels=data.max_pixels)[0][:, ::-1]))
        except RowFault as fault:
            found.append(fault)
    return plain._replace(images=found)


# --------------------------------------------------------------------------------------------------------------- result


def _result(phi: _Phi, study: Study, trials: Sequence[Trial]) -> dict[str, Any]:
    config, members = phi.config, phi.members
    lines = {line: judged(phi.read(line), members.member_SN, members.null_SN, members.planted,
                          variance=config.variance, reference=config.reference, seed=config.seed)
             for line in config.lines}
    attack = worse({line: lines[line] for line in config.attack})
    short = ("tpr_at_fpr_001", "tpr_at_fpr_01", "auc")
    sizes = members.member_SN.sum(axis=1)
    return {
        **{key: lines[attack][key] for key in short}, "worse": attack,
        "private": {key: lines[PRIVATE][key] for key in short},
        "null": {key: lines[attack]["null"][key] for key in short},
        "planted": {**lines[attack]["planted"], "image": members.ids[members.planted], "repeats": config.planted,
                    "seen_by": [line for line in config.attack if lines[line]["planted"]["found"]]},
        "lines": lines, "says": said(lines, config.planted), "limits": list(LIMITS),
        "images": len(members.ids), "shadows": config.shadows, "members": [int(sizes.min()), int(sizes.max())],
        "accuracy": _accuracy(study, trials), "study": study.config.folder}


def _accuracy(study: Study, trials: Sequence[Trial]) -> dict[str, float]:
    """Mean top-1 on the test images: a classifier that learned nothing tells nothing."""
    found: dict[str, list[float]] = {}
    for trial in trials:
        result: Mapping[str, Any] = read_result(study.files, trial.name) or {}
        found.setdefault(trial.arm, []).append(result["last"]["top1"])
    return {arm: float(np.mean(values)) for arm, values in found.items()}
