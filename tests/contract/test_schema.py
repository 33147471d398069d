from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from rayexpand.contract.schema import ClassTable, Draw, huggingface_metadata, sample_sha256


@pytest.mark.parametrize(("keys", "names", "shown"), [
    (("ant", "bee"), ("ant", "bee"), ("ant", "bee")),
    (("n1", "n2", "n3"), ("crane", "maillot", "crane"), ("crane (n1)", "maillot", "crane (n3)")),
    (("n1", "n2", "n3"), ("crane", "crane", "crane (n1)"), ("crane (n1) (n1)", "crane (n2)", "crane (n1)"))])
def test_display_names_are_unique(keys: tuple[str, ...], names: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert ClassTable.of(keys, names).display == shown


def test_unique_class_names_keep_their_metadata() -> None:
    features = json.loads(huggingface_metadata(ClassTable.of(("a", "b"), ("ant", "bee")))[b"huggingface"])
    assert features["info"]["features"]["label"] == {"names": ["ant", "bee"], "_type": "ClassLabel"}


@dataclass(frozen=True, slots=True)
class LaterDraw(Draw):
    tilt: float = 0.0


def test_a_field_of_a_draw_that_came_later_changes_no_hash() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    fields = {"sample_id": "a/0", "seed_id": "a", "copy": 0, "source_label": 0, "target_label": 1, "prompt": "",
              "negative": "", "start": "image", "strength": 0.5, "steps_run": 2, "attempt": 0, "row": 0, "group": 0}
    before = sample_sha256(pixels, Draw(**fields))

    assert sample_sha256(pixels, LaterDraw(**fields)) == before
    assert sample_sha256(pixels, LaterDraw(**fields, tilt=0.1)) != before
