from __future__ import annotations

import json

import pytest

from rayexpand.contract.schema import ClassTable, huggingface_metadata


@pytest.mark.parametrize(("keys", "names", "shown"), [
    (("ant", "bee"), ("ant", "bee"), ("ant", "bee")),
    (("n1", "n2", "n3"), ("crane", "maillot", "crane"), ("crane (n1)", "maillot", "crane (n3)")),
    (("n1", "n2", "n3"), ("crane", "crane", "crane (n1)"), ("crane (n1) (n1)", "crane (n2)", "crane (n1)"))])
def test_display_names_are_unique(keys: tuple[str, ...], names: tuple[str, ...], shown: tuple[str, ...]) -> None:
    assert ClassTable.of(keys, names).display == shown


def test_unique_class_names_keep_their_metadata() -> None:
    features = json.loads(huggingface_metadata(ClassTable.of(("a", "b"), ("ant", "bee")))[b"huggingface"])
    assert features["info"]["features"]["label"] == {"names": ["ant", "bee"], "_type": "ClassLabel"}
