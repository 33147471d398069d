"""Latent changes along tokens and channels: by hand, and of samples that are made again as they are in the run."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import UsageError
from rayexpand.evaluation.latents import DecoderListener, latent_changes, profiles
from rayexpand.reports.figure import read_figure
from rayexpand.reports.latents import histograms, write_latents_page
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse
from rayexpand.storage.places import open_files
from rayexpand.storage.tables import read_json
from tests.conftest import complete


def one_run(out: Path, method: dict[str, object], **sections: object) -> runs.Run:
    config = parse({"name": f"{method['name']}", "out": str(out), "data": {"source": "digits", "per_class": 1},
                    "method": {"ratio": 1, **method}, "sampler": {"batch": 5, "shard_images": 5}, **sections})
    return complete(config)[0]


PLAIN = {"name": "img2img", "strength": 0.5, "steps": 4, "guidance_scale": 1.0, "prompt": "a photo of a {name}"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    return one_run(tmp_path_factory.mktemp("latents"), PLAIN)


def shift(channels: int, tokens: int, where: tuple[object, object]) -> np.ndarray:
    change_CT = np.zeros((channels, tokens))
    change_CT[where] = 2.0
    return change_CT


@pytest.mark.parametrize(("change_CT", "token", "channel"), [
    (shift(2, 4, (0, slice(None))), 0.0, 1.0),  # one of two channels
    (shift(2, 4, (slice(None), 0)), 0.8660254, 0.0),  # one of four tokens
    (shift(2, 4, (slice(None), slice(None))), 0.0, 0.0)])
def test_spreads_by_hand(change_CT: np.ndarray, token: float, channel: float) -> None:
    assert profiles(change_CT).spreads == pytest.approx((token, channel))
    assert profiles(change_CT.reshape(2, 2, 2)).spreads == pytest.approx((token, channel)), "positions are tokens"


def test_an_embedding_has_one_token() -> None:
    found = profiles(np.array([1.0, 3.0]))
    assert (found.token_T.tolist(), found.spreads) == ([2.0], (0.0, 1.0))


def test_a_latent_is_found_by_its_image_whatever_else_was_decoded() -> None:
    class Prior:
        space = "toy"

        def decode(self, z: torch.Tensor, cond: object = None) -> torch.Tensor:
            return z.expand(-1, 3, 2, 2) / 10

    listener = DecoderListener(Prior())
    for z in ([1.0, 2.0], [3.0], [float("nan")]):
        listener.decode(torch.tensor(z).view(-1, 1, 1, 1), cond=None)
    image = np.full((2, 2, 3), round(25.5 * 2), np.uint8)

    assert listener.space == "toy"
    found = listener.latent_of(image)
    assert found is not None
    assert found.ravel().tolist() == [2.0]
    assert listener.latent_of(image + 1) is None


def test_the_change_is_that_of_the_samples_of_the_run(made: runs.Run) -> None:
    found = latent_changes(str(made.folder), 8)

    assert (found["channels"], found["tokens"], found["equal"]) == (4, 64, 8)
    assert len(found["samples"]) == 8
    shards = {made.plan.find(one["sample_id"]) for one in found["samples"]}
    assert len(shards) == 2, "spread over the shards"
    tools = runs.expander_of(made, attempt=0).loaded()
    for profile, entries in (("token", 64), ("channel", 4)):
        assert sum(found[profile]["counts"]) == 8 * entries
    name = found["samples"][0]["sample_id"]
    listener = DecoderListener(tools.prior)
    from dataclasses import replace

    from rayexpand.data.pixels import decode
    from rayexpand.diffusion import sampling

    expander = runs.expander_of(made, attempt=0)
    batch = next(one for one in expander.batches(made.plan.find(name)) if name in [d.sample_id for d in one.draws])
    i = [draw.sample_id for draw in batch.draws].index(name)
    image = made.config.method.expand(batch, replace(tools, prior=listener)).images[i]
    row = next(row for receipt in made.store.receipts() for row in made.store.data(receipt).to_pylist()
               if row["sample_id"] == name)
    assert np.array_equal(decode(row["image"]["bytes"])[0], image)
    with torch.no_grad():
        seed_C = tools.prior.encode(sampling.to_tensor([batch.images[i]]), None)[0].numpy()
    d_CT = (listener.latent_of(image) - seed_C).reshape(4, 64)
    assert found["samples"][0]["token_spread"] == pytest.approx(d_CT.mean(0).std(), rel=1e-4)
    assert found["samples"][0]["channel_spread"] == pytest.approx(d_CT.mean(1).std(), rel=1e-4)


def test_figures_are_drawn_from_what_is_stored(made: runs.Run, tmp_path: Path) -> None:
    page = write_latents_page([str(made.folder)], str(tmp_path), images=4)
    stored = read_json(open_files(tmp_path), "figures/latents.json") or {}

    assert read_figure(open_files(tmp_path), "latents-histograms")["runs"][0]["token"] == stored["runs"][0]["token"]
    assert histograms(stored, "latents").svg in Path(page).read_text()


def test_a_run_without_a_generator_is_refused(tmp_path: Path) -> None:
    plain = one_run(tmp_path, {"name": "classical", "policy": "cutout"})
    with pytest.raises(UsageError, match="no generator and so no latents"):
        latent_changes(str(plain.folder))


@pytest.mark.slow
def test_noise_of_channels_leaves_tokens_alone_in_gif_mae(tmp_path: Path) -> None:
    mae = {"name": "gif", "generator": "mae", "ratio": 2}
    for level, method in itertools.product(("channel", "pixel"), [mae]):
        run = one_run(tmp_path / level, {**method, "level": level}, prior={"weights": "digits-mae"})
        found = latent_changes(str(run.folder), 10)["samples"]
        token, channel = (np.mean([one[f"{name}_spread"] for one in found]) for name in ("token", "channel"))
        assert (token < 0.1 * channel) == (level == "channel")
