"""Damage to the files of finished work, and what every verb then says: one damage and one verb are a case.

A case is sound where the verb gives what it gives without the damage, where it refuses and names the file, or where it
says of the file that it is damaged and goes on (a cache or a checkpoint that is made again).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import RayexpandError

Verb = Callable[[Path], Any]  # of a folder; what it gives, as far as it can be compared
DAMAGES = ("flip", "flip late", "cut", "empty", "zeros", "gone", "swapped", "longer")


@dataclass
class Work:
    """Finished work: a folder, its kinds of files as patterns, and the verbs that read it."""

    name: str
    folder: Path
    kinds: Mapping[str, str]
    verbs: Mapping[str, Verb]
    absent: Mapping[str, str] = field(default_factory=dict)  # kind -> words that say that files of it are not there
    sound: dict[str, Outcome] = field(default_factory=dict)  # what each verb gives without damage

    def files(self, kind: str) -> list[Path]:
        found = sorted(one.relative_to(self.folder) for one in self.folder.glob(self.kinds[kind]) if one.is_file())
        assert found, f"{self.name} has no {kind}"
        return found


@dataclass(frozen=True)
class Case:
    work: str
    kind: str
    verb: str
    damage: str
    number: int

    def __str__(self) -> str:
        return f"{self.work}, {self.kind}, {self.damage} {self.number}, {self.verb}"


def cases(works: Mapping[str, Work], times: int, seed: int = 0) -> list[Case]:
    """Each (kind of file, verb) of each work `times` times, with damages in turn, in a random order."""
    pairs = [(work.name, kind, verb) for work in works.values() for kind in work.kinds for verb in work.verbs]
    found = [Case(*pair, DAMAGES[(number + place) % len(DAMAGES)], number)
             for place, pair in enumerate(pairs) for number in range(times)]
    random.Random(seed).shuffle(found)
    return found


def damage(work: Work, folder: Path, case: Case) -> Path:
    """Damages one file of a copy of the work; returns it, relative to the folder."""
    chance = random.Random(str(case))
    files = work.files(case.kind)
    name = chance.choice(files)
    path = folder / name
    content = bytearray(path.read_bytes())
    if case.damage == "gone":
        path.unlink()
        return name
    if case.damage == "swapped":
        others = [one for one in files if (work.folder / one).read_bytes() != content]
        content[:] = (work.folder / chance.choice(others)).read_bytes() if others else b""
    elif case.damage in ("flip", "flip late") and content:
        first = 0 if case.damage == "flip" else max(0, len(content) - 600)
        content[chance.randrange(first, len(content))] ^= 1 << chance.randrange(8)
    elif case.damage == "cut":
        del content[chance.randrange(len(content) + 1):]
    elif case.damage == "empty":
        content.clear()
    elif case.damage == "zeros":
        start = chance.randrange(len(content) + 1)
        content[start:start + 64] = bytes(len(content[start:start + 64]))
    elif case.damage == "longer":
        content += b"\0" * chance.randrange(1, 40)
    path.unlink()  # it may be a link to the original
    path.write_bytes(content)
    return name


def run_case(work: Work, case: Case, place: Path) -> str:
    """What became of a case: same, refused, said, or what is wrong."""
    folder = place / work.folder.name
    shutil.copytree(work.folder, folder, symlinks=True)
    said = _Said()
    logging.getLogger().addHandler(said)
    try:
        name = damage(work, folder, case)
        try:
            found = work.verbs[case.verb](folder)
        except RayexpandError as error:
            is_said = _names(str(error), name) or _says_absent(work, case, str(error))
            return "refused" if is_said else f"does not name {name}: {error}"
        except Exception as error:  # what the terminal calls a fault of ours
            return f"exit 70 for {name}: {type(error).__name__}: {error}"
        if (found := _outcome(found)) == (sound := work.sound[case.verb]):
            return "same"
        told = f"{found.said} {said.text}" if found.said != sound.said else said.text
        is_said = _names(told, name) or _says_absent(work, case, f"{found}")
        return "said" if is_said else f"silently different for {name}: {found}"
    finally:
        logging.getLogger().removeHandler(said)
        shutil.rmtree(place, ignore_errors=True)


def _names(text: str, name: Path) -> bool:
    """Whether a text names the file, or the folder with a digest in its name that is restored as a whole."""
    if name.name in text or f"{name.name.split('.')[0]}*" in text:
        return True
    return bool(re.fullmatch(r"[\w-]*[0-9a-f]{8}", name.parent.name) and name.parent.name in text)


@dataclass(frozen=True)
class Outcome:
    """What a verb gave, and what it said about files beside that."""

    given: Any
    said: str = ""


def _outcome(found: Any) -> Outcome:
    return found if isinstance(found, Outcome) else Outcome(found)


def _says_absent(work: Work, case: Case, text: str) -> bool:
    words = work.absent.get(case.kind, "")
    return bool(words) and case.damage == "gone" and re.search(words, text) is not None


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


def run_all(works: Mapping[str, Work], chosen: Sequence[Case], place: Path) -> tuple[Counter[Any], list[str]]:
    """Counts by (work, kind, verb, outcome), and every case that is not sound."""
    counts: Counter[Any] = Counter()
    wrong: list[str] = []
    for work in works.values():
        for verb, call in work.verbs.items():
            copy = place / "sound" / work.folder.name
            shutil.copytree(work.folder, copy, symlinks=True)
            work.sound[verb] = _outcome(call(copy))
            shutil.rmtree(place / "sound")
    for case in chosen:
        outcome = run_case(works[case.work], case, place / "case")
        counts[case.work, case.kind, case.verb, outcome if outcome in ("same", "refused", "said") else "WRONG"] += 1
        if outcome not in ("same", "refused", "said"):
            wrong.append(f"{case}: {outcome}")
    return counts, wrong


def table(counts: Counter[Any]) -> str:
    """One line for each (work, kind, verb) with its outcomes."""
    lines = []
    for pair, group in itertools.groupby(sorted(counts), key=lambda key: key[:3]):
        found = {key[3]: counts[key] for key in group}
        lines.append(f"{', '.join(pair):60} " + ", ".join(f"{name} {count}" for name, count in found.items()))
    return "\n".join(lines)


def content_of(folder: Path | str, ignore: str = "") -> dict[str, str]:
    """sha256 of every file below a folder by its name, without those that match `ignore`."""
    root = Path(folder)
    return {str(one.relative_to(root)): hashlib.sha256(one.read_bytes()).hexdigest()
            for one in sorted(root.rglob("*")) if one.is_file() and not (ignore and re.search(ignore, str(one)))}
