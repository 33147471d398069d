"""What every artifact kind is: which files it has, what is wrong with them for a run, and loading them.

A kind has two halves. This one reads; fitting/<kind>.py makes. A new kind is a module here with one class, its entry in
KINDS (artifacts/__init__.py), its maker with its entry in MAKERS, and a field of Tools where samplers load it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rayexpand.artifacts.store import content_files, files_hash
from rayexpand.contract.protocols import Method


class RunInputs(Protocol):
    """What a kind may ask of a run. Hashes, and the width of the hidden states that the generator reads, are None where
    the model is not on this machine yet, or is unsound."""

    @property
    def method(self) -> Method: ...
    @property
    def prior_weights(self) -> str: ...
    @property
    def guide_weights(self) -> str: ...
    @property
    def prior_sha256(self) -> str | None: ...
    @property
    def guide_sha256(self) -> str | None: ...
    @property
    def text_width(self) -> int | None: ...
    def folder(self, kind: str) -> Path | None: ...


class ArtifactKind(ABC):
    """`name` stands in `artifacts:` of a run, in `fit:`, and in what a method needs."""

    name: str
    wants: str  # "captions of the seeds and none are": what a run lacks where it names no folder
    planned = False  # the plan holds what a run needs of it, so samplers do not load it
    by_run = False  # `rayexpand fit` makes it from the file of the run itself

    @abstractmethod
    def unused(self, method: Method) -> tuple[str, str]:
        """(why the method as it is set reads none, what to do instead)."""

    @abstractmethod
    def problems(self, folder: Path, run: RunInputs) -> list[str]:
        """What is wrong with a folder for a run, by json files and headers alone; nothing is loaded."""

    def load(self, folder: Path, run: RunInputs, class_keys: Sequence[str]) -> Any:
        """What samplers are given in the field of Tools with this name. Raises ModelError."""
        raise TypeError(f"samplers do not load {self.name}")

    def classes(self, folder: Path) -> Sequence[str]:
        """Class keys it was made for; none where it does not say. Raises ModelError."""
        return ()

    def files(self, folder: Path) -> list[str]:
        """Names of the files that count, are hashed and are staged."""
        return content_files(folder)

    def sha256(self, folder: Path) -> str:
        """Content hash. Raises ModelError where the files are not there."""
        return files_hash(folder, self.files(folder))

    def unnamed(self, method: Method) -> str:
        """What to do where a method needs one and the run names none."""
        how = "this same file" if self.by_run else f"a file with fit: {{{self.name}: ...}}"
        return (f"{method.name} needs {self.wants} named; make them with `rayexpand fit` and {how}, and set "
                f"artifacts.{self.name} to the folder it prints")
