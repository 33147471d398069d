"""What of a dataset an artifact depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rayexpand.contract.schema import SeedIndex
from rayexpand.fitting.config import FitConfig


def data_facts(config: FitConfig, index: SeedIndex) -> dict[str, Any]:
    """What of the dataset an artifact depends on."""
    hasher = hashlib.sha256()
    for seed_id, label, fault in zip(*(index.table[name].to_pylist() for name in ("seed_id", "label", "fault")),
                                     strict=True):
        hasher.update(json.dumps([seed_id, label, fault]).encode())
    return {"config": config.data.model_dump(mode="json"), "ids_sha256": hasher.hexdigest(), "images": len(index),
            "classes": list(index.classes.key), "names": list(index.classes.name)}
