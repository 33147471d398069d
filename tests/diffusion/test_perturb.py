"""The shared perturbation and its box, by hand and by the shares the normal distribution gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable
from rayexpand.diffusion import perturb
from tests.methods.fakes import Fake, batch_of

CLASSES = ClassTable.of(["a", "b"])


def normals(name, shape):
    return torch.from_numpy(RowRng(0, "test", "perturb", 0).normals(name, shape))


@pytest.mark.parametrize(("z", "e", "b", "tau", "projected"), [(0.5, 0.5, 1.0, 1.75, 0.7), (-1.0, 1.0, 0.0, -2.0, -1.2),
                                                               (0.5, 0.0, 0.1, 0.6, 0.6), (0.5, 0.0, -9.0, -8.5, 0.3)])
def test_one_element_by_hand(z, e, b, tau, projected):
    z, e, b = (torch.tensor(v) for v in (z, e, b))
    u = perturb.apply(z, e, b)
    assert float(u) == pytest.approx(tau)
    assert float(perturb.project(u, z, 0.2)) == pytest.approx(projected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_leaves_the_box_by_more_than_a_rounding(dtype):
    z = (3 * normals("z", (64, 4, 8, 8))).to(dtype)
    out = perturb.project(z + 5 * normals("u", z.shape).to(dtype), z, 0.2)
    ulp = torch.finfo(dtype).eps * (z.abs() + 0.2).float()
    assert ((out.float() - z.float()).abs() <= 0.2 + ulp).all()


def test_no_radius_gives_the_latent_and_an_infinite_one_everything():
    z, u = normals("z", (4, 8)), normals("u", (4, 8))
    assert torch.equal(perturb.project(u, z, 0.0), z)
    assert torch.equal(perturb.project(u, z, float("inf")), u)
    u[1, 2] = float("nan")
    assert torch.isnan(perturb.project(u, z, 0.2)).sum() == 1


@pytest.mark.parametrize(("eps", "share"), [(0.2, 0.859), (0.8, 0.481), (4.0, 0.001)])
def test_clamp_fraction_of_untouched_noise(eps, share):
    z = normals("z", (2000, 4, 64))
    rng = RowRng(0, "test", "perturb", 1)
    e, b = (torch.from_numpy(rng.uniforms("e", (2000, 4, 1)))), torch.from_numpy(rng.normals("b", (2000, 4, 1)))
    fraction = perturb.clamp_fraction(perturb.apply(z, e, b), z, eps)
    assert fraction.shape == (2000,)
    assert float(fraction.mean()) == pytest.approx(share, abs=0.01)


def test_flip_fraction_counts_the_sides_that_changed():
    z = torch.tensor([[1.0, -1.0, 2.0, -2.0]])
    before, after = (torch.tensor([[0.0]]), torch.tensor([[0.5]])), (torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    assert perturb.flip_fraction(z, before, before).tolist() == [0.0]
    assert perturb.flip_fraction(z, before, after).tolist() == [0.5]  # -1 and -2 change from + to -


def test_drawn_noise_is_that_of_the_row_and_not_of_its_place():
    batch = batch_of(Fake(), CLASSES, [("s", 0, 0), ("s", 0, 1), ("t", 1, 0)])
    z = torch.zeros(3, 4, 8, 8)
    e, b = perturb.draw(batch, z)
    assert (e.shape, b.shape, e.dtype) == ((3, 4, 1, 1), (3, 4, 1, 1), torch.float32)
    assert float(e.min()) >= 0
    assert float(e.max()) < 1
    np.testing.assert_array_equal(b[1].reshape(4), batch.rngs[1].normals("b", (4,)))
    turned = replace(batch, **{name: getattr(batch, name)[::-1] for name in ("draws", "images", "rngs")})
    assert torch.equal(perturb.draw(turned, z)[0], e.flip(0))
    assert len({float(value) for value in e.flatten()}) == 12


@pytest.mark.parametrize(("level", "shape", "expected"), [
    ("channel", (4, 8, 8), (4, 1, 1)), ("pixel", (4, 8, 8), (4, 8, 8)), ("channel", (7, 16), (7, 1)),
    ("channel", (16,), (16,))])
def test_shapes_of_the_levels(level, shape, expected):
    batch = batch_of(Fake(), CLASSES, [("s", 0, 0)])
    assert perturb.draw(batch, torch.zeros(1, *shape), level)[0].shape == (1, *expected)
