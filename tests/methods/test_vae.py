"""vae: no UNet, no prompt, the quality that `pretrain` reports, and copies that differ only with `sample`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import UsageError
from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import PlanRng
from rayexpand.data.seeds import digits_split
from rayexpand.methods.vae import Vae
from rayexpand.models.prior import load_prior
from rayexpand.models.tiny import digits, pretrain
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.test_contract import index_of

ROWS = [("a", 0, 0), ("b", 1, 0), ("a", 0, 1)]


class OnlyAutoencoder:
    """A prior that says nothing to prompts and has no UNet."""

    def __init__(self, prior: Any) -> None:
        self.latent_shape, self.encode, self.decode = prior.latent_shape, prior.encode, prior.decode


def images_of(method: Vae, tools: Tools) -> list[np.ndarray]:
    batch = batch_of(method, CLASSES, ROWS)
    made = method.expand(batch, replace(tools, prior=OnlyAutoencoder(tools.prior)))
    assert made.reasons == [None] * 3
    return made.images  # type: ignore[return-value]


def test_copies_of_the_mean_are_one_image_and_those_of_the_posterior_are_not(tools: Tools) -> None:
    mean, drawn = images_of(Vae(), tools), images_of(Vae(sample=True), tools)

    np.testing.assert_array_equal(mean[0], mean[2])
    assert not np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(mean[0], drawn[0])


def test_it_is_the_decoder_of_the_encoder(tools: Tools) -> None:
    vae = tools.prior.vae
    x_BCHW = torch.from_numpy(np.stack(batch_of(Vae(), CLASSES, ROWS).images)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        redrawn = vae.decode(vae.encode(x_BCHW.contiguous()).latent_dist.mean).sample / 2 + 0.5
    expected = (redrawn.clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    for image, one in zip(images_of(Vae(), tools), expected, strict=True):
        np.testing.assert_allclose(image, one, atol=0.51)


def test_its_psnr_is_what_pretrain_reports_of_the_autoencoder() -> None:
    prior = load_prior("digits", device="cpu")
    seeds = digits_split()["test"][0][:100]
    batch = replace(batch_of(Vae(), CLASSES, [(str(n), 0, 0) for n in range(100)]), images=tuple(seeds))
    made = np.stack([one for one in Vae().expand(batch, Tools(CLASSES, prior=prior)).images if one is not None])
    made_n3HW, seeds_n3HW = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (made, seeds))
    with torch.no_grad():
        reported = pretrain.psnr(prior.vae, seeds_n3HW)

    assert pretrain.psnr_of(made_n3HW / 255, seeds_n3HW) == pytest.approx(reported, abs=0.05)  # rounded to bytes
    measured = json.loads((digits.ensure() / "measured.json").read_text())
    assert reported == pytest.approx(measured["psnr_upright_db"], abs=0.5)  # of 100 of its images


@pytest.mark.parametrize(("fields", "field"), [({"ratio": 2}, "ratio"), ({"ratio": 1.5}, "ratio"),
                                               ({"quota": 3}, "quota")])
def test_several_copies_of_one_image_are_refused_when_they_are_planned(fields: dict[str, Any], field: str) -> None:
    index = index_of([0, 0, 1, 1, 2, 2])
    with pytest.raises(UsageError, match=rf"method\.{field}: .* would be one image.*sample: true"):
        Vae(**fields).copies(index, PlanRng(0, "vae"))
    assert Vae(sample=True, **fields).copies(index, PlanRng(0, "vae")).max() > 1
    np.testing.assert_array_equal(Vae().copies(index, PlanRng(0, "vae")), 1)
