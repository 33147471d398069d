"""Scores of the seeds of a dataset, each by a classifier that was trained without it and without its samples.

    symbol   here          meaning, unit
    k        fold          fold k is held out of training k
    p_i      p_label       probability of the label of seed i
             margin        p_i minus the highest probability of another class
    H_i      entropy       of all probabilities, nats
    s_i      speed         share of the evaluations on the way that were right: 1/J sum_j [argmax p_i^j = y_i]
             loss          -ln max(p_i, 1e-6), nats

A fold is an ordinary trial: its training set has the real images, and the samples of runs, whose seed is not in the
fold; its test images are those of the fold. So it goes on from its checkpoint, runs on Ray, and leaves files as trials
of a study do:

    lists/<digest8>.arrow        what a fold trains on; no word of a held-out seed is in it
    lists/<prefix>-fold0.txt     ids of the seeds that it is asked for
    trials/ results/ predictions/ checkpoints/    of <prefix>-fold0, <prefix>-fold1 ...

With `folds: 1` one classifier is trained on everything and asked for everything: in sample.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayexpand.artifacts.store import file_sha256
from rayexpand.classifier.accuracy import CUB_LT
from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.errors import RayexpandError, UsageError, few
from rayexpand.contract.protocols import Progress
from rayexpand.contract.schema import SeedIndex
from rayexpand.data.folds import NEVER, folds_of
from rayexpand.data.seeds import DataConfig
from rayexpand.data.seeds.source import image_id
from rayexpand.data.subsets import differing, fingerprint, ids_file, sound_rows
from rayexpand.fitting.maker import FitBase
from rayexpand.fitting.scores import ScoresFit, Scoring
from rayexpand.loader.training_set import RowSource, TrainingSet
from rayexpand.runs.allocation import FACTS, LEAST_P
from rayexpand.runs.joined import open_samples
from rayexpand.storage.places import open_files
from rayexpand.storage.position import Position
from rayexpand.storage.tables import NAMED, parquet_bytes, read_json, read_table, replace_json
from rayexpand.studies.parts import Opened, Train, Trial, TrialFolder, read_result
from rayexpand.studies.samples import training_set
from rayexpand.studies.train import Runner, run_here, train_with

FOLDERS = ("lists", "trials", "results", "predictions", "checkpoints", ".tmp")
_ROW_GROUP = 1 << 16

Seeds = tuple[SeedIndex, DataConfig]


def cross_fit(folder: TrialFolder, prefix: str, scoring: Scoring, seeds: Seeds, runs: Sequence[RowSource],
              train: Train, *, seed: int) -> pa.Table:
    """Scores of the seeds: seed_id, fold, p_label, margin, entropy, speed, loss, in the order of the index. A seed with
    a fault, and the only one of its class, has no row. `fold` is -1 for scores in sample.

    `folder`: where trials called <prefix>-fold<k> are made, or found finished; `runs`: whose samples are trained on
    too, made from these seeds; `train`: `studies.train.train_with` (in this process, or on Ray); `seed` keys folds and
    classifiers. The table says in its metadata how it was made, and is the same whatever was killed on the way. Raises
    UsageError, ConfigError, SeedDataError, and RayexpandError with what failed.
    """
    for name in FOLDERS:
        folder.files.make_folder(name)
    fold_N = folds_of(*seeds, scoring.folds, seed, scoring.group)
    made = fold_trials(folder, prefix, scoring, seeds, fold_N, runs, seed)
    if failed := train(folder, [trial for trial, _ in made]):
        raise RayexpandError(f"{len(failed)} of {len(made)} folds of scores could not be trained; what is done is "
                             "kept, and the same command tries these again:\n  " + "\n  ".join(failed))
    table = pa.concat_tables([_answers(folder, trial, held, seeds[0], fold_N) for trial, held in made])
    table = table.take(pc.sort_indices(table["row"]))
    facts = {**_facts(scoring, seed, seeds[0], table), "folds": len(made), "samples_by": _made_with(runs)}
    return table.drop_columns(["row", "right"]).replace_schema_metadata({FACTS: json.dumps(facts).encode()})


def scores_bytes(table: pa.Table, name: str = "") -> bytes:
    """The Parquet file of scores, sealed; `name`: the one place where it may lie."""
    named = {NAMED: name.encode()} if name else {}
    return parquet_bytes(table, {**named, FACTS: table.schema.metadata[FACTS]}, _ROW_GROUP)


def fold_trials(folder: TrialFolder, prefix: str, scoring: Scoring, seeds: Seeds, fold_N: np.ndarray,
                runs: Sequence[RowSource], seed: int) -> list[tuple[Trial, np.ndarray]]:
    """The trial of each fold, its training set written, with the rows of the index that it is asked for."""
    opened, found = Opened(), list[tuple[Trial, np.ndarray]]()
    of_runs = [_folds_of_run(opened, rows, seeds, fold_N) for rows in runs]
    asked = sound_rows(seeds[0])
    for fold in range(scoring.folds):
        held = asked if scoring.folds == 1 else np.flatnonzero(fold_N == fold)
        if not len(held):  # more folds than seeds
            continue
        out = NEVER - 1 if scoring.folds == 1 else fold
        parts = [RowSource(seeds=seeds, only=fold_N != out)]
        parts += [replace(rows, only=(of_run != out) & (True if rows.only is None else rows.only))
                  for rows, of_run in zip(runs, of_runs, strict=True)]
        rows, name = training_set(parts, opened=opened.run), f"{prefix}-fold{fold}"
        found.append((classifier_trial(folder, name, scoring.recipe, seeds[1], held_out(
            folder, name, *seeds, held), rows, seed, track=True), held))
    return found


def score_artifact(run: Runner, section: ScoresFit, config: FitBase, index: SeedIndex, folder: str,
                   progress: Progress) -> tuple[bytes, dict[str, Any]]:
    """The file of the scores that a fit file asks for, their folds trained by `run` in a folder, and facts of it."""
    position = Position(folder)

    def listen(task: str, done: int, total: int, facts: Any = None, rate: float | None = None) -> None:
        progress(task, done, total)
        position("training folds", done, total)

    place = TrialFolder(f"folds of {config.name}", open_files(folder), section.training, config.cluster.at("fit"),
                        len(index.classes))
    table = cross_fit(place, "scores", section, (index, config.data), [RowSource(run=one) for one in section.runs],
                      train_with(listen, run), seed=config.seed)
    costs = fold_costs(place, "scores")
    if run is run_here:
        del costs["cpu_seconds"]  # whoever asks counts those of this process
    facts = json.loads(table.schema.metadata[FACTS])
    return scores_bytes(table), {**facts, **costs, "summary": summary(facts)}


def summary(facts: Mapping[str, Any]) -> list[str]:
    """Scores in words, by what their file says of them."""
    how = ("in sample: trained on the very images that it is asked for" if facts["in_sample"] else
           f"trained without them and their samples, in {facts['folds']} folds")
    found = [f"{facts['accuracy']:.1%} of {facts['images']:,} images named right by a classifier {how}"]
    if alone := facts["not_scored"]:
        found.append(f"{len(alone):,} classes have one image, which is not scored ({few(alone)})")
    if made_with := facts["samples_by"]:
        found.append(f"samples were made with {' and '.join(made_with)}; what was fitted on these images makes scores "
                     "too good")
    return found


def fold_costs(folder: TrialFolder, prefix: str) -> dict[str, float]:
    """What the finished folds of a prefix took: process_seconds, cpu_seconds and gpu_seconds of all processes, and
    updates."""
    names = [one for one in folder.files.list("results") if one.startswith(f"{prefix}-fold")]
    found = [result for one in names if (result := read_json(folder.files, f"results/{one}")) is not None]
    return {"process_seconds": sum(one["seconds"] * max(1, one["workers"]) for one in found),
            **{name: sum(one[name] for one in found) for name in ("cpu_seconds", "gpu_seconds", "updates")}}


def classifier_trial(folder: TrialFolder, name: str, recipe: Mapping[str, Any], data: DataConfig, test: Seeds,
                     rows: TrainingSet, seed: int, *, track: bool = False) -> Trial:
    """A trial of a training set of seeds of `data` and samples of theirs, written with it. `test`: what it is asked
    for."""
    made, place, training = make_recipe(dict(recipe)), f"lists/{rows.digest[:8]}.arrow", folder.training
    folder.files.replace(place, rows.to_bytes())
    trained = SeedIndex(rows.indexes[0], rows.classes)
    order = [training.shuffle_rows, training.streams] if rows.epoch_rows > training.shuffle_rows else []
    trial = Trial(
        name=name, arm="", seed=seed, group="", ratio=rows.n_synthetic / rows.n_real, control_of="",
        augment=made.augment, recipe=made.model_dump(mode="json"), rows=place, list_sha256=rows.digest,
        ids_sha256=rows.parts[0].ids_sha256, data_sha256=fingerprint(trained, data),
        test=test[1].model_dump(mode="json"), test_sha256=fingerprint(*test), also={}, frequency=list(CUB_LT),
        checkpoint_sha256=file_sha256(Path(made.checkpoint)) if made.checkpoint else "",
        workers=max(1, training.workers), order=order, expansion_seconds=0.0, run="", track=track)
    replace_json(folder.files, f"trials/{trial.name}.json", {**vars(trial), "digest": trial.digest})
    return trial


def held_out(folder: TrialFolder, name: str, index: SeedIndex, data: DataConfig, held: np.ndarray) -> Seeds:
    """The seeds at `held` as a dataset, their ids in a file. One that is listed again has all its ids in one fold."""
    chosen = index.table.take(pa.array(held))
    ids = dict.fromkeys(image_id(data, one) for one in chosen["seed_id"].to_pylist())
    folder.files.replace(place := f"lists/{name}.txt", ids_file(list(ids)))
    repeats = {one: times for one, times in data.repeats.items() if one in ids}
    asked = data.model_copy(update={"ids": str(folder.files.at(place)), "per_class": None, "repeats": repeats})
    return SeedIndex(chosen, index.classes), asked


def _folds_of_run(opened: Opened, rows: RowSource, seeds: Seeds, fold_N: np.ndarray) -> np.ndarray:
    """The fold of each seed of a run. Raises UsageError for seeds that are none of those scored: an image among these
    may be held out under another name."""
    assert rows.run is not None
    run, (index, data) = opened.run(rows.run), seeds
    of_run = run.plan.index.table["seed_id"].combine_chunks()
    place = pc.index_in(of_run, index.table["seed_id"].combine_chunks())
    if place.null_count:
        lost = of_run.filter(place.is_null()).to_pylist()
        raise UsageError(f"scores: {rows.run} was made from {len(lost):,} images that are none of the {len(index):,} "
                         f"seeds that are scored ({few(lost[:4])}); score the seeds that it was made from")
    mine = SeedIndex(index.table.take(place), index.classes)
    same = run.plan.index.classes.key == index.classes.key  # else the training set says so
    other = of_run.filter(pa.array(mine.labels != run.plan.index.labels)).to_pylist() if same else []
    if other := other or differing((run.plan.index, run.config.data), (mine, data)):
        raise UsageError(f"scores: {rows.run} was made from other images, or labels, than those that are scored, which "
                         f"have the same ids ({few(other[:4])}); score the seeds that it was made from")
    return fold_N[place.to_numpy()]


def _answers(folder: TrialFolder, trial: Trial, held: np.ndarray, index: SeedIndex, fold_N: np.ndarray) -> pa.Table:
    """The rows of one fold, but for seeds whose class it has seen nothing of. Raises DamagedFile."""
    found, result = (read_table(folder.files, f"predictions/{trial.name}.parquet"),
                     read_result(folder.files, trial.name))
    if result is None or not np.array_equal(found["label"].to_numpy(), index.labels[held]):
        raise UsageError(f"{folder.files.at('results')}: fold {trial.name} was asked for other images than are there "
                         "now, because the dataset changed meanwhile; run the same command again")
    p_label = found["p_label"].to_numpy()
    rows = pa.table({
        "row": held, "seed_id": index.table["seed_id"].take(pa.array(held)).combine_chunks(),
        "fold": fold_N[held].astype(np.int16), "p_label": p_label, "margin": found["margin"],
        "entropy": found["entropy"], "speed": found["right"].to_numpy() / len(result["history"]),
        "loss": -np.log(np.maximum(p_label, LEAST_P)), "right": found["predicted"].to_numpy() == index.labels[held]})
    several = np.bincount(index.labels[sound_rows(index)], minlength=len(index.classes))[index.labels[held]] > 1
    return rows.filter(pa.array(several | (fold_N[held] == NEVER)))


def _made_with(runs: Sequence[RowSource]) -> list[str]:
    """Kinds of artifacts, and a guide, that samples were made with. If one was fitted on all seeds, each fold has seen
    something of what it is asked for."""
    configs = [open_samples(rows.run).config for rows in runs if rows.run is not None]
    return sorted({kind for one in configs for kind in (*one.artifacts, *(one.needs & {"guide"}))})


def _facts(scoring: Scoring, seed: int, index: SeedIndex, table: pa.Table) -> dict[str, Any]:
    n_K = np.bincount(index.labels[sound_rows(index)], minlength=len(index.classes))
    alone = [] if scoring.folds == 1 else np.flatnonzero(n_K == 1).tolist()
    return {"seed": seed, "in_sample": scoring.folds == 1, "images": len(table),
            "accuracy": float(np.mean(table["right"].to_numpy(zero_copy_only=False))),
            "not_scored": [index.classes.key[label] for label in alone]}
