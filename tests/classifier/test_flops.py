from __future__ import annotations

import pytest

from rayexpand.classifier.flops import count_classifier
from rayexpand.classifier.recipe import make_recipe


def test_a_small_network_by_hand() -> None:
    """SmallResNet of width w at s pixels: 3x3 convolutions at s, s / 2, s / 4, and 1x1 ones beside two blocks."""
    w, s, classes = 4, 16, 7
    found = count_classifier(make_recipe({"backbone_args": {"width": w}, "size": s}), classes)
    first = 9 * 3 * w * s * s
    blocks = [(w, w, s, 0), (w, 2 * w, s // 2, 1), (2 * w, 4 * w, s // 4, 1)]
    rest = sum(side * side * (9 * inner * outer + 9 * outer * outer + shrinks * inner * outer)
               for inner, outer, side, shrinks in blocks) + 4 * w * classes

    assert found.answer == pytest.approx(2 * (first + rest) / 1e12)
    assert found.train == pytest.approx(2 * (2 * first + 3 * rest) / 1e12), "the image itself has no gradient"


def test_resnet50_as_published() -> None:
    """4.09 billion multiplications and additions at 224 pixels (He et al. 2016, table 1, with timm's strides)."""
    found = count_classifier(make_recipe({"preset": "distdiff"}), 1000)
    assert found.answer == pytest.approx(2 * 4.09e-3, rel=0.01)
    assert found.train == pytest.approx(3 * found.answer, rel=0.02)


def test_preact_networks_and_three_views() -> None:
    fields = {"backbone": "preact_resnet18", "size": 32, "augment": "augmix"}
    plain, three = (count_classifier(make_recipe({**fields, "jsd": jsd}), 10) for jsd in (0, 12))
    assert three.train == pytest.approx(3 * plain.train)
    assert three.answer == plain.answer
