"""Hashes of large model files, remembered on this machine: reading tens of gigabytes takes half a minute for each
process that starts, and a file that nobody has touched since has the hash it had.

A file counts as untouched while its path, size, inode, and times of change are what they were when it was hashed. The
time of its last change of state (ctime) is among them, which no program can set, so copies and restores that keep the
time of modification are noticed. A file that changed less than SETTLED before it is hashed is not remembered: it could
change again within one tick of the file system's clock.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from rayexpand.artifacts.store import file_sha256
from rayexpand.storage.notes import keep_note, read_note

LEAST = 1 << 20  # bytes of a file that is worth a note
SETTLED = 2.0  # seconds; the coarsest clock of a file system ticks every two


def remembered_sha256(file: Path, notes: Path) -> str:
    """sha256 of a file, from its note in the folder `notes` where that is of this very file."""
    known = _state(file)
    if known["size"] < LEAST:
        return file_sha256(file)
    note = notes / f"{hashlib.sha256(known['path'].encode()).hexdigest()[:32]}.json"
    found = read_note(note) or {}
    if found == {**known, "sha256": found.get("sha256")}:
        return str(found["sha256"])
    settled = time.time() - max(known["modified"], known["changed"]) / 1e9 > SETTLED
    made = file_sha256(file)
    if settled and _state(file) == known:
        keep_note(note, {**known, "sha256": made})
    return made


def _state(file: Path) -> dict[str, Any]:
    """What differs between two contents of a file, but for the content."""
    seen = os.stat(file)
    return {"path": os.path.realpath(file), "size": seen.st_size, "inode": seen.st_ino, "modified": seen.st_mtime_ns,
            "changed": seen.st_ctime_ns}
