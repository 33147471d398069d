"""Counts the rows that a UNet is given, in every Python process that has this folder in PYTHONPATH.

Python imports a module of this name at its start. Each forward pass of diffusers' UNet2DConditionModel appends one
line, its number of rows, to the file named in PEERS_CALLS. That holds for every peer alike: nobody's code is changed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "diffusers.models.unets.unet_2d_condition"


class Counting(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module, and has its UNet count."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)  # type: ignore[union-attr]
        unet = module.UNet2DConditionModel
        forward = unet.forward

        def counted(self: Any, sample: Any, *rest: Any, **named: Any) -> Any:
            note(len(sample))
            return forward(self, sample, *rest, **named)

        unet.forward = counted


def note(rows: int) -> None:
    if where := os.environ.get("PEERS_CALLS"):
        file = os.open(where, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(file, b"%d\n" % rows)
        os.close(file)


if MODULE not in sys.modules:
    sys.meta_path.insert(0, Counting())
