"""Counts the bytes of images that are held, while something runs."""

from __future__ import annotations

import threading
import weakref

import numpy as np

from rayexpand.data import pixels


class Live:
    """Counts the bytes of arrays that somebody still holds."""

    def __init__(self) -> None:
        self.peak, self._now, self._lock = 0, 0, threading.RLock()

    def add(self, image: np.ndarray) -> np.ndarray:
        with self._lock:
            self._now += image.nbytes
            self.peak = max(self.peak, self._now)
        weakref.finalize(image, self._gone, image.nbytes)
        return image

    def _gone(self, count: int) -> None:
        with self._lock:
            self._now -= count

    def decode(self, image: bytes, **limits: int) -> tuple[np.ndarray, str]:
        """`pixels.decode`, counted."""
        array, note = _decode(image, **limits)
        return self.add(array), note


_decode = pixels.decode
