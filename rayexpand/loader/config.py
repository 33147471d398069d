"""Where and how classifiers are trained: the section `training`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rayexpand.contract.settings import Device, Later, Section


class TrainingConfig(Section):
    OLD_NAMES: ClassVar = {"lanes": "streams"}

    workers: int = Field(0, ge=0, description="0: a trial is one process; more: Ray Train workers of each trial")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0, description="null: 1 where the cluster has GPUs, else 0")
    loaders: int = Field(1, ge=1, description="processes that read and decode for one Ray Train worker")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(1, ge=1, description="CPU threads of one worker")
    checkpoint_steps: int | None = Field(None, ge=1, description="optimiser steps between two checkpoints; null: one "
                                         "after each epoch")
    shuffle_rows: int = Field(65_536, ge=1, description="rows that are permuted together where a training set is "
                              "larger")
    streams: int = Field(8, ge=1, description="streams a larger training set is read in; workers must divide it")
    keep: Annotated[Literal["weights"] | None, Later(None)] = Field(
        None, description="weights: a finished classifier leaves its weights in weights/ of the study, for corrupted "
        "test sets and whatever else asks it again; null: its answers alone")
