"""Smoothing, CutMix boxes and mixing against hand-worked numbers and timm; slices of workers against one batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup

from rayexpand.classifier.mixing import (
    Mix,
    apply_mix,
    cut,
    draw_image_mix,
    draw_mix,
    draw_paste,
    smooth,
    worker_rows,
)
from rayexpand.classifier.recipe import Recipe


@pytest.mark.parametrize(("mode", "expected"), [
    ("others", [1 / 30, 1 / 30, 1 / 30, 0.9]), ("reference", [1 / 30, 1 / 30, 1 / 30, 0.9 + 1 / 30]),
    ("all", [0.025, 0.025, 0.025, 0.925])])
def test_smoothing_of_a_hard_label(mode: str, expected: list[float]) -> None:
    y_BK = smooth(torch.tensor([[0.0, 0, 0, 1]]), 0.1, mode)

    torch.testing.assert_close(y_BK, torch.tensor([expected]))
    uniform = -(y_BK * torch.full((1, 4), 0.25).log()).sum()
    assert float(uniform) == pytest.approx(math.log(4) * sum(expected), rel=1e-6)


@pytest.mark.parametrize(("mass", "total"), [(1.0, 1.0005), (0.9, 0.9105)])
def test_the_reference_mode_has_diffmix_label_mass(mass: float, total: float) -> None:
    y_BK = torch.zeros(1, 200)
    y_BK[0, 3] = mass

    assert float(smooth(y_BK, 0.1, "reference").sum()) == pytest.approx(total, abs=5e-5)


@pytest.mark.parametrize("mode", ["others", "all"])
def test_soft_labels_keep_their_sum_and_agree_with_hard_ones(mode: str) -> None:
    soft = torch.tensor([[0, 0.16334, 0, 0.83666]])
    hard = [smooth(torch.eye(4)[k:k + 1], 0.1, mode) for k in (1, 3)]

    torch.testing.assert_close(smooth(soft, 0.1, mode), 0.16334 * hard[0] + 0.83666 * hard[1])
    assert float(smooth(soft, 0.1, mode).sum()) == pytest.approx(1, abs=1e-6)
    assert smooth(soft, 0.0, mode) is soft


def test_bce_targets_of_timm() -> None:
    labels = torch.tensor([3, 7])
    y_BK = torch.nn.functional.one_hot(labels, 1000).float()

    smoothed = smooth(y_BK, 0.1, "all")
    assert smoothed[0, 3].item() == pytest.approx(0.9001, abs=1e-7)
    assert smoothed[0, 4].item() == pytest.approx(0.0001, abs=1e-7)
    _, mixed = apply_mix(torch.zeros(2, 3, 8, 8), y_BK, Mix(0.3, None))
    torch.testing.assert_close(smooth(mixed, 0.1, "all"), timm_mixup.mixup_target(labels, 1000, 0.3, 0.1))


@pytest.mark.parametrize(("center", "box", "lam"), [((112, 112), (56, 168, 56, 168), 0.75),
                                                    ((0, 0), (0, 56, 0, 56), 0.9375)])
def test_cutmix_box_is_clipped_and_the_label_knows(center: tuple[int, int], box: tuple[int, int, int, int],
                                                   lam: float) -> None:
    assert cut(0.75, center, 224) == Mix(lam, box)


def test_cutmix_equals_timm_at_odd_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, lam, center in [(33, 0.3, (5, 30)), (32, 0.9, (31, 0)), (7, 0.0, (3, 3)), (16, 1.0, (8, 8))]:
        at = iter(center)
        monkeypatch.setattr(np.random, "randint", lambda *_, at=at, **__: next(at))
        theirs, corrected = timm_mixup.cutmix_bbox_and_lam((1, 3, size, size), lam)

        ours = cut(lam, center, size)
        assert ours.box == tuple(int(v) for v in theirs)
        assert ours.lam == pytest.approx(corrected)


def test_mixed_pixels_and_labels() -> None:
    x_BCHW = torch.tensor([100.0, 0.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    y_BK = torch.eye(2)

    x, y = apply_mix(x_BCHW, y_BK, Mix(0.3, None))
    assert x[:, 0, 0, 0].tolist() == pytest.approx([30, 70])  # swapped shares give 70, 30
    torch.testing.assert_close(y, torch.tensor([[0.3, 0.7], [0.7, 0.3]]))
    x, y = apply_mix(x_BCHW, y_BK, Mix(0.75, (0, 1, 0, 4)))
    assert x[0, :, 0].unique().tolist() == [0]
    assert x[0, :, 1:].unique().tolist() == [100]
    torch.testing.assert_close(y, torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    assert x_BCHW[0, 0, 0, 0] == 100  # the input stays
    assert apply_mix(x_BCHW, y_BK, None) == (x_BCHW, y_BK)


def test_boxes_of_cmo_are_a_function_of_seed_and_step() -> None:
    """One box per step of Beta(1, 1), of half of the steps, moved by nothing but seed and step."""
    recipe = Recipe(cmo=0.5, cmo_span=(0, 1))
    drawn = [draw_paste(recipe, 0, step, 1500, 32) for step in range(1500)]
    made = [one for one in drawn if one is not None]

    assert len(made) / 1500 == pytest.approx(0.5, abs=0.039)  # 3 sigma
    always = [draw_paste(Recipe(cmo=1.0, cmo_power=0.5, cmo_span=(0, 1)), 0, step, 1500, 32) for step in range(1500)]
    assert all(one in (None, other) for one, other in zip(drawn, always, strict=True))
    areas = [1 - one.lam for one in always if one is not None]
    rng = np.random.default_rng(0)
    expected = [1 - cut(float(rng.random()), (int(rng.integers(32)), int(rng.integers(32))), 32).lam
                for _ in range(1500)]
    assert np.mean(areas) == pytest.approx(np.mean(expected), abs=0.025)
    assert np.quantile(areas, [0.25, 0.75]) == pytest.approx(np.quantile(expected, [0.25, 0.75]), abs=0.05)
    assert draw_paste(recipe, 1, 0, 1500, 32) != draw_paste(recipe, 2, 0, 1500, 32)
    assert draw_paste(Recipe(), 0, 0, 10, 32) is None
    assert all(draw_paste(Recipe(cmo=1.0), 0, step, 1000, 32) is None for step in (0, 19, 985, 999))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("mix", [Mix(0.3, None), Mix(0.6, (1, 4, 0, 3))], ids=["mixup", "cutmix"])
def test_slices_of_workers_equal_one_batch(world: int, mix: Mix) -> None:
    rng = np.random.default_rng(3)
    x_BCHW, y_BK = torch.from_numpy(rng.random((16, 3, 5, 5))), torch.from_numpy(rng.random((16, 4)))
    x_whole, y_whole = apply_mix(x_BCHW, y_BK, mix)

    rows = [worker_rows(16, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(rows)) == list(range(16))
    for mine in rows:
        x, y = apply_mix(x_BCHW[mine], y_BK[mine], mix)
        assert torch.equal(x, x_whole[mine])
        assert torch.equal(y, y_whole[mine])


def test_a_slice_is_two_mirrored_runs() -> None:
    assert worker_rows(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert worker_rows(8, 1, 2).tolist() == [2, 3, 4, 5]
    assert worker_rows(5, 0, 1).tolist() == [0, 1, 2, 3, 4]


def test_a_mix_is_a_function_of_seed_and_step() -> None:
    recipe = Recipe(mixup=0.2, cutmix=1.0)

    assert draw_mix(recipe, 1, 5, 32) == draw_mix(recipe, 1, 5, 32)
    assert len({draw_mix(recipe, seed, step, 32) for seed in range(3) for step in range(5)}) == 15
    assert draw_mix(Recipe(), 1, 5, 32) is None
    sometimes = Recipe(mixup=0.2, cutmix=1.0, mix_probability=0.5)
    for step in range(20):  # the probability moves no other draw
        assert draw_mix(sometimes, 1, step, 32) in (None, draw_mix(recipe, 1, step, 32))


def test_odds_of_mixing() -> None:
    both = [draw_mix(Recipe(mixup=0.2, cutmix=1.0), 0, step, 32) for step in range(2000)]
    lams = [m.lam for m in both if m is not None and m.box is None]

    assert len(lams) / 2000 == pytest.approx(0.5, abs=0.034)  # 3 sigma
    assert np.mean(lams) == pytest.approx(0.5, abs=0.04)
    assert np.std(lams) == pytest.approx(math.sqrt(1 / (4 * 1.4)), abs=0.03)  # of Beta(0.2, 0.2)
    half = [draw_mix(Recipe(cutmix=1.0, mix_probability=0.1), 0, step, 32) for step in range(2000)]
    assert sum(m is not None for m in half) / 2000 == pytest.approx(0.1, abs=0.02)
    assert all(m.box is not None for m in half if m is not None)
    assert all(m.box is None for m in (draw_mix(Recipe(mixup=1.0), 0, step, 32) for step in range(50)) if m)


def test_mixes_of_images_have_the_law_of_those_of_batches() -> None:
    """Which of the two, whether at all, lambda and box: 2,000 images against 2,000 steps."""
    fields = {"mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.7}
    batch, image = Recipe(**fields), Recipe(**fields, mix_per="image")
    steps = [draw_mix(batch, 0, step, 32) for step in range(2000)]
    images = [draw_image_mix(image, np.random.default_rng(key), 32) for key in range(2000)]

    assert draw_mix(image, 0, 0, 32) is None
    blends, boxes = ([one for one in images if one[0] < 1 and (one[2] > one[1]) is is_box] for is_box in (False, True))
    of_steps = [one for one in steps if one is not None]
    for found, wanted in ((blends, [one.lam for one in of_steps if one.box is None]),
                          (boxes, [one.lam for one in of_steps if one.box and one.lam < 1])):
        assert len(found) == pytest.approx(len(wanted), abs=90)
        assert np.mean([one[0] for one in found]) == pytest.approx(np.mean(wanted), abs=0.06)
    for lam, top, bottom, left, right in boxes:
        assert lam == pytest.approx(1 - (bottom - top) * (right - left) / 32**2)
