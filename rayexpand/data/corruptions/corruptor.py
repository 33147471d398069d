"""One image, type and severity -> the corrupted image, always the same.

Every number is drawn from the stream of (test set, image id, type). The severities of one image share it.
"""

from __future__ import annotations

import numpy as np

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.data import pixels
from rayexpand.data.corruptions.config import Corrupt, frost_files
from rayexpand.data.corruptions.tables import FROST, TABLES
from rayexpand.data.corruptions.types import FROST_STEP, TYPES, Extras, through_jpeg

VERSION = "corrupted-v1"


class Corruptor:
    """Corruptions of one test set, which `fingerprint` names. Reads the pictures of frost, where they are wanted."""

    def __init__(self, config: Corrupt, fingerprint: str) -> None:
        self.config, self._fingerprint = config, fingerprint
        pictures = tuple(pixels.decode(file.read_bytes())[0] for file in frost_files(config.frost).values()) \
            if config.frost is not None and FROST in config.names else ()
        self._extras = Extras(config.exchange, pictures, config.table == "cifar")
        shrunk = FROST_STEP if self._extras.small_frost else 1
        self._most = min((side // shrunk for one in pictures for side in one.shape[:2]), default=0)

    def __call__(self, image: np.ndarray, image_id: str, kind: str, severity: int) -> np.ndarray:
        """uint8 (S, S, 3) of uint8 (S, S, 3); values are cut off, not rounded, as in the published files. Raises
        UsageError for an image larger than the pictures of frost."""
        assert image.shape[0] == image.shape[1]
        if kind == FROST and len(image) >= self._most:
            raise UsageError(f"corrupt.frost: images of {len(image)} pixels are larger than the pictures of frost, "
                             f"{self._most} pixels at the size of table {self.config.table}; leave frost out")
        rng = generator(row_key(0, f"{VERSION}/{self._fingerprint}", image_id, 0, 0, kind))
        made = TYPES[kind](image, TABLES[self.config.table][kind][severity - 1], rng, self._extras)
        found = np.clip(made, 0, 255).astype(np.uint8)
        return found if self.config.store_jpeg is None else through_jpeg(found, self.config.store_jpeg)
