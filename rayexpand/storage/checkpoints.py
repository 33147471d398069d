"""A model in training that can be put down between two steps and taken up again, bit for bit on the CPU.

One safetensors file for each stage holds weights, their moving average and the optimiser; its metadata the number of
the next step, the state of the random stream and the learning rate. A stage is finished when that number is its last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayexpand.contract.errors import Diverged
from rayexpand.contract.metrics import TRAINING_STEP, record
from rayexpand.contract.protocols import Progress
from rayexpand.storage.position import Position

log = logging.getLogger(__name__)

FINITE_STEPS = 50  # steps between two looks at the loss, which a GPU would wait for


class Checkpoints:
    """A folder with one file for each stage, written anew every `every` steps of it and at its end."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every

    def load(self, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and state; None where there are none, or damaged ones, which it says."""
        from safetensors import SafetensorError, safe_open

        path = self._path(stage)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
            if said.get("sha256", found := _sha256(tensors, said["state"])) != found:
                raise ValueError("its content does not match its hash")
            return tensors, json.loads(said["state"])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("the checkpoint %s is damaged (%s) and counts as none; %s begins anew", path, error, stage)
            return None

    def save(self, stage: str, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f".{stage}.partial-*"):  # of attempts that were killed here; one process writes
            stale.unlink(missing_ok=True)
        partial = self.folder / f".{stage}.partial-{secrets.token_hex(4)}"
        whole, said = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}, json.dumps(state)
        save_file(whole, partial, {"state": said, "sha256": _sha256(whole, said)})
        with open(partial, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, self._path(stage))

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"


def _sha256(tensors: Mapping[str, torch.Tensor], state: str) -> str:
    hasher = hashlib.sha256(state.encode())
    for name, one in sorted(tensors.items()):
        hasher.update(f"{name} {one.dtype} {list(one.shape)}\n".encode())
        hasher.update(one.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


class Stage:
    """AdamW with a one-cycle schedule and gradients clipped at norm 1.

    `average` takes part in no gradient: after each step it moves towards the weights, keeping the share `ema` (less in
    the first steps). `seconds` counts what all processes that worked on the stage have spent (wall and CPU).
    """

    def __init__(self, name: str, model: torch.nn.Module, rng: np.random.Generator, *, steps: int, rate: float,
                 decay: float, beta: float, warm: float, average: torch.nn.Module | None = None,
                 ema: float = 0.0) -> None:
        self.name, self.model, self.rng, self.steps = name, model, rng, steps
        self.average, self._ema = average, ema
        self.step, self.seconds = 0, {"wall": 0.0, "cpu": 0.0}
        self._optimiser = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, beta), weight_decay=decay, fused=True)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimiser, rate, total_steps=steps, pct_start=warm)

    def run(self, loss_of: Callable[[], torch.Tensor], report: Progress, checkpoints: Checkpoints | None) -> None:
        """All steps that are left. Raises Diverged where the loss is no longer a number."""
        if checkpoints is not None and (found := checkpoints.load(self.name)) is not None:
            self._restore(*found)
        started = time.perf_counter(), time.process_time()
        before = dict(self.seconds)
        position = None if checkpoints is None else Position(checkpoints.folder)
        while self.step < self.steps:
            loss = loss_of()
            self._descend(loss)
            self.step += 1
            last = self.step == self.steps
            saves = checkpoints is not None and (last or self.step % checkpoints.every == 0)
            if (saves or last or self.step % FINITE_STEPS == 0) and not torch.isfinite(loss):
                raise Diverged(f"training of the {self.name} diverged: the loss is {float(loss.detach())} at step "
                               f"{self.step} of {self.steps}. Lower its rate")
            self.seconds = {"wall": before["wall"] + time.perf_counter() - started[0],
                            "cpu": before["cpu"] + time.process_time() - started[1]}
            if checkpoints is not None and saves:
                checkpoints.save(self.name, *self._state())
            report(self.name, self.step, self.steps)
            record(TRAINING_STEP, self.step, model="prior")
            if position is not None:
                position(self.name, self.step, self.steps, lambda: {"loss": float(loss.detach())})  # noqa: B023

    def _descend(self, loss: torch.Tensor) -> None:
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()
        self._schedule.step()
        if self.average is not None:
            keep = min(self._ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - keep)

    def _state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        state = self._optimiser.state_dict()
        tensors = {f"model.{name}": one for name, one in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": one for name, one in self.average.state_dict().items()}
        tensors |= {f"optimiser.{i}.{name}": one for i, own in state["state"].items() for name, one in own.items()}
        rates = [{"lr": group["lr"], "betas": group["betas"]} for group in state["param_groups"]]
        return tensors, {"step": self.step, "rng": _plain(self.rng.bit_generator.state), "rates": rates,
                         "seconds": self.seconds}

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict(_below(tensors, "model."))
        if self.average is not None:
            self.average.load_state_dict(_below(tensors, "average."))
        own = self._optimiser.state_dict()
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, one in _below(tensors, "optimiser.").items():
            number, _, leaf = name.partition(".")
            states.setdefault(int(number), {})[leaf] = one
        groups = [{**group, "lr": rate["lr"], "betas": tuple(rate["betas"])}
                  for group, rate in zip(own["param_groups"], state["rates"], strict=True)]
        self._optimiser.load_state_dict({"state": states, "param_groups": groups})
        self.step, self.seconds = state["step"], state["seconds"]
        self._schedule.load_state_dict({**self._schedule.state_dict(), "last_epoch": self.step,
                                        "_step_count": self.step + 1})
        self.rng.bit_generator.state = _arrays(state["rng"])


def _below(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}


def _plain(value: Any) -> Any:
    """A generator's state as JSON data: words of 64 bits become Python integers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    return np.array(value, np.uint64) if isinstance(value, list) else value
