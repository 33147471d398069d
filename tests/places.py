"""Where temporary folders of tests lie."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

ROOM = 6 << 30  # bytes; a whole run of the fast tests leaves 1.5 GB


def in_memory() -> str | None:
    """A folder in memory, on Linux with room for it: a test of a run waits hundreds of times for a disk."""
    place = Path("/dev/shm")
    if not place.is_dir() or not os.access(place, os.W_OK):
        return None
    found = os.statvfs(place)
    room = min(found.f_bavail * found.f_frsize, psutil.virtual_memory().available)
    return str(place) if room > ROOM and not found.f_flag & os.ST_NOEXEC else None
