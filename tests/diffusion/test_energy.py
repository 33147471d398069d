"""Energies and scores against numbers worked out by hand, and the resize against torch's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from rayexpand.contract.rng import RowRng
from rayexpand.diffusion import energy


def normals(name, shape):
    return torch.from_numpy(RowRng(0, "test", "energy", 0).normals(name, shape))


def rows(*values):
    return torch.tensor([values] if not isinstance(values[0], tuple) else list(values), dtype=torch.float32)


def test_prototype_energy_by_hand():
    f, class_BD, group_BGD = rows(2.0, 4.0), rows(2.0, 1.0), torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert energy.nearest_group(f, group_BGD, valid).tolist() == [1]
    total = {(1, 1): 6.49285, (1, 0.9): 6.14356, (1, 0): 3.0, (0, 1): 3.49285, (0, 0): 0.0}
    for (lambda_c, lambda_g), expected in total.items():
        got = energy.prototype_energy(f, class_BD, group_BGD, valid, lambda_c, lambda_g)
        assert float(got) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("f", "groups", "nearest"), [
    ((2.0, 0.1), ((0.6, 0.0), (0.9, 0.9)), 0),  # inner products 1.20 and 1.89 would pick 1
    ((0.2, 0.1), ((1.0, 0.0), (0.0, 0.3)), 0)])  # distances 0.806 and 0.283 would pick 1
def test_the_nearest_group_is_that_of_the_largest_cosine(f, groups, nearest):
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert energy.nearest_group(rows(*f), torch.tensor([groups]), valid).tolist() == [nearest]


def test_padding_is_never_nearest():
    f, groups = rows(1.0, 0.0), torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])
    assert energy.nearest_group(f, groups, torch.tensor([[True, False]])).tolist() == [0]
    assert float(energy.group_distance(f, groups, torch.tensor([[True, False]]))) == pytest.approx(2)


@pytest.mark.parametrize(("f", "p", "distance"), [
    ((3.0, 4.0), (0.6, 0.8), 4.0), ((0.6, 0.8), (0.6, 0.8), 0.0), ((3.0, 4.0), (1.0, 0.0), 4.472),
    ((0.6, 0.8), (1.0, 0.0), 0.894)])
def test_distance_in_mixed_and_unit_spaces(f, p, distance):
    assert float(energy.class_distance(rows(*f), rows(*p))) == pytest.approx(distance, abs=1e-3)


def test_gradient_has_unit_length_and_none_at_the_prototype():
    f = torch.stack([rows(3.0, 4.0)[0], rows(1.0, 1.0)[0]]).requires_grad_()
    (g,) = torch.autograd.grad(energy.class_distance(f, rows((0.0, 0.0), (1.0, 1.0))).sum(), f)
    torch.testing.assert_close(g, rows((0.6, 0.8), (0.0, 0.0)))


def test_each_row_of_a_sum_has_the_gradient_it_has_alone():
    f, class_BD, group_BGD = normals("f", (5, 6)), normals("c", (5, 6)), normals("g", (5, 3, 6))
    valid = torch.ones(5, 3, dtype=torch.bool)

    def gradient(chosen):
        leaf = f[chosen].requires_grad_()
        total = energy.prototype_energy(leaf, class_BD[chosen], group_BGD[chosen], valid[chosen], 1.0, 0.5)
        return torch.autograd.grad(total.sum(), leaf)[0]

    together = gradient([0, 1, 2, 3, 4])
    for i in range(5):
        torch.testing.assert_close(together[i], gradient([i])[0])


def logits(*probabilities):
    return torch.tensor([probabilities]).log()


def test_entropy_gain_and_class_term_by_hand():
    seed, copy = logits(0.9, 0.1), logits(0.6, 0.4)
    assert float(energy.entropy(seed)) == pytest.approx(0.32508, abs=1e-5)
    assert float(energy.entropy(copy)) == pytest.approx(0.67301, abs=1e-5)
    information = energy.class_term(copy, torch.tensor([0])) + energy.entropy_gain(copy, seed)
    assert float(information) == pytest.approx(0.94793, abs=1e-5)


@pytest.mark.parametrize(("a", "expected"), [(0.0, 0.25), (1.0, 0.0), (2.0, -0.104994)])
def test_gradient_of_the_information_in_a_logit(a, expected):
    values = torch.tensor([[a, 0.0]], requires_grad=True)
    total = energy.class_term(values, torch.tensor([0])) + energy.entropy(values)
    assert float(torch.autograd.grad(total.sum(), values)[0][0, 0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("classes", "best"), [(2, 1.31326), (10, 2.46115), (1000, 6.90947)])
def test_the_largest_information_is_ln_e_plus_classes_less_one(classes, best):
    values = torch.zeros(1, classes)
    values[0, 0] = 1.0  # s'_j = e / (e + C - 1)
    total = energy.class_term(values, torch.tensor([0])) + energy.entropy(values)
    assert float(total) == pytest.approx(best, abs=1e-4)
    assert best == pytest.approx(math.log(math.e + classes - 1), abs=1e-5)


@pytest.mark.parametrize(("scale", "p", "h"), [(100.0, 0.73106, 0.58220), (1.0, 0.50250, 0.69313)])
def test_temperature(scale, p, h):
    values = scale * torch.tensor([[0.30, 0.29]])
    assert float(energy.class_term(values, torch.tensor([0]))) == pytest.approx(p, abs=1e-5)
    assert float(energy.entropy(values)) == pytest.approx(h, abs=1e-5)


def test_entropy_of_a_certain_row_is_zero_and_has_a_gradient():
    values = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    assert energy.entropy(values).tolist() == [0.0]
    assert torch.isfinite(torch.autograd.grad(energy.entropy(values).sum(), values)[0]).all()


def test_diversity_by_hand_in_both_directions():
    f = torch.tensor([[0.0, 0.0], [0.0, math.log(3)]])
    torch.testing.assert_close(energy.kl_diversity(f), torch.tensor([0.037252, 0.030738]), atol=1e-6, rtol=0)
    torch.testing.assert_close(energy.kl_diversity(f, reverse=True), torch.tensor([0.036341, 0.032996]), atol=1e-6,
                               rtol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_diversity_is_zero_for_one_copy_and_for_copies_that_differ_by_a_constant(reverse):
    f = normals("f", (1, 8))
    assert energy.kl_diversity(f, reverse=reverse).tolist() == [0.0]
    torch.testing.assert_close(energy.kl_diversity(torch.cat([f, f + 7]), reverse=reverse), torch.zeros(2), atol=1e-6,
                               rtol=0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [((32, 32), (16, 16)), ((16, 16), (40, 40)), ((37, 21), (16, 24)),
                                          ((17, 16), (16, 16)), ((64, 64), (28, 28))])
def test_resize_is_bicubic_interpolation_forward_and_backward(old, new, antialias):
    x = torch.from_numpy(RowRng(0, "test", "energy", 1).uniforms("x", (2, 3, *old))).requires_grad_()
    y = F.interpolate(x, new, mode="bicubic", align_corners=False, antialias=antialias)
    ours = energy.resize(x, new, antialias=antialias)
    weights = normals("w", tuple(y.shape))
    torch.testing.assert_close(ours, y, atol=1e-6, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, y)), atol=1e-5,
                               rtol=0)


def test_resize_from_diffusion_to_guide_size():
    x = torch.from_numpy(RowRng(0, "test", "energy", 2).uniforms("x", (1, 1, 512, 512)))
    expected = F.interpolate(x, (224, 224), mode="bicubic", align_corners=False)
    assert float((energy.resize(x, (224, 224)) - expected).abs().max()) < 1e-6
    assert energy.resize(x, (512, 512)) is x
    np.testing.assert_allclose(energy.resize(torch.full((1, 1, 9, 9), 0.5), (4, 4)), 0.5, atol=1e-6)
