"""Notes: small JSON files that save work and may be lost, such as those in the cache of a machine.

A note that is absent, damaged or half written counts as none, and one that cannot be written is not missed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayexpand.contract.errors import DamagedFile
from rayexpand.storage.tables import sealed, unsealed


def read_note(file: Path) -> dict[str, Any] | None:
    """What `keep_note` was given, None where that is not what is there."""
    with contextlib.suppress(OSError, DamagedFile):
        return unsealed(file.name, file.read_bytes(), file)
    return None


def keep_note(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a note, or replaces one, whole at every instant, whoever else writes it at the same time."""
    partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(sealed(file.name, content))
        os.replace(partial, file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
