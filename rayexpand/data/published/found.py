"""What a reader of a layout finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class ClassWords(NamedTuple):
    """A class: its key in the dataset, and what prompts call it. Empty words are filled with those of the set."""

    key: str
    name: str
    metaclass: str = ""
    noun: str = ""


@dataclass(frozen=True)
class Images:
    """Images of one part, in official order: paths below the folder of the set, and labels."""

    paths: Sequence[str]  # empty where images are rows of arrays
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Sequence[int]) -> Images:
        return Images([self.paths[row] for row in rows], [self.labels[row] for row in rows])


@dataclass(frozen=True)
class FoundSet:
    """A dataset in its official parts. `arrays` is the file or folder of a set whose images are rows of arrays, which
    are read where they are; `groups` the group of an image by its path; `notes` what people should know of it."""

    classes: Sequence[ClassWords]
    parts: Mapping[str, Images]
    arrays: str | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def joined(parts: Sequence[Images]) -> Images:
    return Images([path for part in parts for path in part.paths], [label for part in parts for label in part.labels])
