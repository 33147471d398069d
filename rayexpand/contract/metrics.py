"""What is counted while verbs work, for Prometheus: the names, their labels, and who is told.

`record` tells every sink of this process: on Ray its metrics endpoints (on_ray/metrics.py), with `--metrics PORT` an
endpoint of the command (api/endpoint.py), else nobody. Labels have few values: no class, seed, trial or text of a user
is one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rayexpand.contract.schema import Reason

PREFIX = "rayexpand_"


@dataclass(frozen=True, slots=True)
class Metric:
    """A counter only rises, a gauge is set; `name` is without PREFIX, of a counter it ends in `_total`."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...] = ()


IMAGES = Metric("images_total", "counter", "Rows decided: kept, rejected or failed.", ("method", "status"))
REFUSED = Metric("refused_total", "counter", "Rows rejected or failed, by reason.", ("reason",))
SHARDS = Metric("shards_committed_total", "counter", "Shards committed.", ("method",))
STAGE_SECONDS = Metric("stage_seconds_total", "counter", "Seconds of sampler processes, by stage of a shard.",
                       ("stage",))
RETRIES = Metric("retries_total", "counter", "Work done again: a shard that its node gave back (environment), rows "
                 "that had failed (row), a training that goes on from a checkpoint (training).", ("cause",))
PREEMPTIONS = Metric("preemptions_total", "counter", "Nodes that were taken away while the job ran.")
ACTORS = Metric("actors", "gauge", "Sampler processes alive.")
NODES = Metric("nodes", "gauge", "Hosts with a sampler process alive.")
TRAINING_IMAGES = Metric("training_images_total", "counter", "Images shown to a model in training.", ("model",))
TRAINING_STEP = Metric("training_step", "gauge", "Optimiser step of the training that reported last.", ("model",))
TRAINING_LOSS = Metric("training_loss", "gauge", "Its loss.", ("model",))
TRAINING_ACCURACY = Metric("training_accuracy", "gauge", "Top-1 accuracy of a classifier after its last epoch, 0 to 1.",
                           ("model",))
WORK = Metric("work_total", "counter", "Rows, images, steps or trials that a verb has dealt with, by its stage.",
              ("verb", "stage"))
DONE = Metric("stage_done", "gauge", "Of the stage that a verb is at: so much is done.", ("verb", "stage"))
PLANNED = Metric("stage_planned", "gauge", "Of the same stage: so much is planned.", ("verb", "stage"))
ETA = Metric("eta_seconds", "gauge", "Seconds until the stage that a verb is at ends.", ("verb",))
HEARTBEAT = Metric("heartbeat_timestamp_seconds", "gauge", "When the driver last said that it lives, unix seconds.",
                   ("verb",))
ATTEMPT = Metric("attempt", "gauge", "Which start of the verb this is.", ("verb",))

METRICS = (IMAGES, REFUSED, SHARDS, STAGE_SECONDS, RETRIES, PREEMPTIONS, ACTORS, NODES, TRAINING_IMAGES, TRAINING_STEP,
           TRAINING_LOSS, TRAINING_ACCURACY, WORK, DONE, PLANNED, ETA, HEARTBEAT, ATTEMPT)
CAUSES = ("environment", "row", "training")
MODELS = ("classifier", "guide", "adapter", "prior")
STAGES = {  # first words of what verbs say they do -> the label
    "expanding": "expand", "training": "train", "sweeping": "sweep", "fitting": "fit", "features": "features",
    "fine-tuning": "train", "latents": "latents", "captions": "captions", "grouping": "prototypes",
    "writing": "prompts", "scores": "score", "samples": "compare", "comparing": "compare", "asking": "ask",
    "looking": "read", "reading": "read", "measuring": "measure", "exporting": "export", "waiting": "wait"}
OTHER = "other"

Sink = Callable[[Metric, float, dict[str, str]], None]
_sinks: dict[str, Sink] = {}


def publish_to(name: str, sink: Sink | None) -> None:
    """Tells a sink from now on; None: no longer. What is counted before is not told again."""
    if sink is None:
        _sinks.pop(name, None)
        return
    _sinks[name] = sink
    sink(PREEMPTIONS, 0.0, {})
    for cause in CAUSES:
        sink(RETRIES, 0.0, {"cause": cause})
    for reason in Reason:
        sink(REFUSED, 0.0, {"reason": reason.value})


def is_published(name: str, sink: Sink) -> bool:
    """Whether this sink is still told."""
    return _sinks.get(name) is sink


def record(metric: Metric, value: float = 1.0, **labels: str) -> None:
    """Adds to a counter, or sets a gauge."""
    assert tuple(labels) == metric.labels, f"{metric.name} has the labels {metric.labels}"
    for sink in tuple(_sinks.values()):
        sink(metric, float(value), labels)


def stage_of(task: str) -> str:
    """The label of a task, of which there are few: tasks hold names of runs."""
    return STAGES.get(task.partition(" ")[0], OTHER)


class Meter:
    """Counts what a verb says of its progress; called as a listener of it is."""

    def __init__(self, verb: str) -> None:
        self._verb, self._task = verb, ""
        self._begun, self._first, self._last = 0.0, 0, 0

    def __call__(self, task: str, done: int, total: int, facts: Mapping[str, float] | None = None,
                 rate: float | None = None) -> None:
        now, labels = time.monotonic(), {"verb": self._verb, "stage": stage_of(task)}
        if task != self._task or done < self._first:  # one of the same name may begin again
            self._task, self._begun, self._first, self._last = task, now, done, done
        record(WORK, max(0, done - self._last), **labels)
        self._last = max(done, self._last)
        record(DONE, done, **labels)
        record(PLANNED, total, **labels)
        spent = now - self._begun
        if pace := rate or (spent > 1 and (done - self._first) / spent):
            record(ETA, max(0, total - done) / pace, verb=self._verb)
        for metric in (ACTORS, NODES):
            if facts and metric.name in facts:
                record(metric, facts[metric.name])


def record_training(model: str, images: int, step: int, loss: float | None = None) -> None:
    """Counts one step of a training. `model`: one of MODELS."""
    if not _sinks:
        return
    record(TRAINING_IMAGES, images, model=model)
    record(TRAINING_STEP, step, model=model)
    if loss is not None:
        record(TRAINING_LOSS, loss, model=model)


def record_start(step: int) -> None:
    """Counts the start of a training, where it goes on from a checkpoint."""
    if step:
        record(RETRIES, cause="training")
