"""Tiny random models and prototypes, built once for all tests of methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.diffusion.prototypes import fit_prototypes
from rayexpand.models.guides import load_guide
from rayexpand.models.prior import load_prior
from tests.tiny import tiny_clip, tiny_pipeline

CLASSES = ClassTable.of(["3", "7", "boot"], ["three", "seven", "rain_boot"], [5, 4, 2], ["digit", "digit", "shoe"],
                        ["digit", "digit", "boot"])


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_pipeline(folder / "prior")
    tiny_clip(folder / "guide")
    guide = load_guide(str(folder / "guide"), None, CLASSES.name, device="cpu")
    pixels = torch.from_numpy(RowRng(0, "test", "seeds", 0).uniforms("x", (12, 3, 16, 16)))
    with torch.no_grad():
        features = guide.features(pixels).numpy()
    prototypes = fit_prototypes(features, np.arange(12) % 3, 3, 2, guide_hash="g", class_keys=CLASSES.key)
    return Tools(CLASSES, load_prior(str(folder / "prior"), device="cpu"), guide, prototypes,
                 torch.from_numpy(prototypes.class_KD), SeedFeatures())


class SeedFeatures:
    """16 features of any seed."""

    def rows(self, seed_ids):
        return np.stack([RowRng(0, "test", seed_id, 0).normals("features", (16,)) for seed_id in seed_ids])
