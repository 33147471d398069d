"""Fine-tuning a decoder of image embeddings: what it is told of an image, a step by hand, and what comes out of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.numpy import load_file

from rayexpand.artifacts.store import read_facts
from rayexpand.contract.errors import Interrupted
from rayexpand.contract.schema import ClassTable
from rayexpand.data import seeds
from rayexpand.data.seeds import DataConfig
from rayexpand.diffusion.sampling import to_tensor
from rayexpand.fitting import fit as fits
from rayexpand.fitting.adapter import latents
from rayexpand.fitting.adapter.finetuner import Finetuner, LatentBatch
from rayexpand.fitting.adapter.latents import Views, view_pictures
from rayexpand.fitting.adapter.loader import LatentLoader, Sources
from rayexpand.fitting.adapter.recipe import make_finetune
from rayexpand.fitting.adapter.train import told_labels
from rayexpand.fitting.adapter.training_draw import CLEAN, LEVELS, draw_told
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.config import preflight as preflight_fit
from rayexpand.models.folders import folder_hash, loaded_files
from rayexpand.models.image_towers import encoder_space, guide_space
from rayexpand.models.prior import inspect_prior, load_prior
from rayexpand.runs import run as runs
from tests.conftest import small_run
from tests.models.gif_priors import tiny_mae, tiny_unclip
from tests.tiny import tiny_clip

torch.set_num_threads(1)
D = 16
FULL = {"strategy": "full", "steps": 5, "batch": 4, "lr": 1e-3, "caption_drop": 0.3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    tiny_unclip(folder / "unclip", tiny_clip(folder / "guide"))
    return folder


@pytest.fixture
def config(raw: Callable[..., dict[str, Any]], root: Path) -> Callable[..., dict[str, Any]]:
    return lambda recipe, **fields: {**raw(recipe, **fields), "prior": {"weights": str(root / "unclip")}}


def fit(config: dict[str, Any]) -> Path:
    (folder,) = fits.fit(parse_fit(config), lambda *_: None).values()
    return folder


def finetuner(prior: Any, **fields: Any) -> Finetuner:
    model = prior.decoder
    return Finetuner(model.unet, model.texts, model.scheduler, make_finetune({**FULL, **fields}), 4, 0,
                     vae_factor=model.vae_factor, labels=lambda told_BD: told_labels(prior, told_BD))


def batch_of(prior: Any, rows: int = 4, level: int = 0) -> LatentBatch:
    rng = np.random.default_rng(0)
    z0, noise = (torch.from_numpy(rng.standard_normal((rows, 4, 8, 8), np.float32)) for _ in range(2))
    told = torch.from_numpy(rng.standard_normal((rows, 2 * D + 1), np.float32))
    told[:, -1] = level
    dropped = torch.arange(rows) % 3 == 1
    return LatentBatch(z0, noise, torch.from_numpy(rng.integers(1000, size=rows)), [""] * rows, told, dropped)


@pytest.mark.parametrize("level", [0, 300])
def test_a_step_is_that_of_diffusers_own_parts(root: Path, level: int) -> None:
    from diffusers import StableUnCLIPImg2ImgPipeline

    prior = load_prior(str(root / "unclip"), device="cpu")
    tuner, batch = finetuner(prior), batch_of(prior, level=level)
    pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(root / "unclip")
    assert batch.visual_BD is not None
    assert batch.dropped_B is not None
    told = pipe.noise_image_embeddings(batch.visual_BD[:, :D], level, noise=batch.visual_BD[:, D:2 * D])
    words = pipe.tokenizer([""], padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        text = pipe.text_encoder(words.input_ids).last_hidden_state.expand(4, -1, -1)
    out = pipe.unet(pipe.scheduler.add_noise(batch.z0_BCHW, batch.noise_BCHW, batch.t_B), batch.t_B, text,
                    class_labels=told * ~batch.dropped_B[:, None]).sample
    loss = F.mse_loss(out, batch.noise_BCHW)
    loss.backward()
    pipe_norm = torch.nn.utils.get_total_norm([p.grad for p in pipe.unet.parameters() if p.grad is not None])
    assert tuner.update(batch) == pytest.approx(loss.item(), abs=1e-5)
    assert tuner.losses.grad_norm == pytest.approx(pipe_norm.item(), rel=1e-4)
    assert {name.partition(".")[0] for name in tuner.trainable} == {"unet"}


def test_what_is_told_of_an_image_is_the_embedding_of_its_view(root: Path, image_folder: Path) -> None:
    prior = load_prior(str(root / "unclip"), device="cpu")
    views = Views(resolution=16, crops=1, flips=True, batch=3, dtype="float16", seed=9)
    data = DataConfig(source="imagefolder", path=str(image_folder))
    index = seeds.build_index(data)
    part = latents.LatentMaker(index, data, prior, views)(range(5))
    assert part.embedding is not None
    assert part.embedding.shape == (5, 2, D)
    assert part.embedding.dtype == np.float32
    image = np.asarray(Image.open(image_folder / "ant/2.png").convert("RGB"))
    squares = view_pictures(image, "ant/2.png", views)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(part.embedding[2]), prior.encode(to_tensor(squares)), atol=1e-5,
                                   rtol=0)
    assert not np.allclose(part.embedding[2, 0], part.embedding[2, 1], atol=1e-3)  # its mirror image is another one


def test_half_of_the_embeddings_are_clean_and_no_visit_repeats_its_noise() -> None:
    embedding = np.arange(D, dtype=np.float32)
    told = np.stack([draw_told(0, "s", visit, embedding) for visit in range(400)])
    assert (told[:, :D] == embedding).all()
    assert np.array_equal(told[3], draw_told(0, "s", 3, embedding))
    assert len(np.unique(told[:, D])) == 400
    levels = told[:, -1]
    assert abs((levels == 0).mean() - CLEAN) < 0.07
    assert LEVELS * 0.9 < levels.max() < LEVELS


def test_a_tuned_decoder_is_a_generator_with_another_network_and_the_same_eyes(
        config: Callable[..., dict[str, Any]], root: Path, image_folder: Path, tmp_path: Path) -> None:
    made = fit(config(FULL, sheet={"classes": 2, "images": 1, "steps": 4}))
    base = root / "unclip"
    assert made.name.startswith("generator-")
    assert {name for name in loaded_files(base) if (base / name).read_bytes() != (made / name).read_bytes()} == {
        "unet/diffusion_pytorch_model.safetensors", "unet/config.json"}
    assert json.loads((made / "unet/config.json").read_text())["_name_or_path"] == ""
    assert encoder_space(made) == guide_space(str(root / "guide"), None)
    assert inspect_prior(str(made)).family == "unclip"
    old, new = (load_file(one / "unet/diffusion_pytorch_model.safetensors") for one in (base, made))
    assert {name for name in old if np.array_equal(old[name], new[name])} == set()
    assert len(list((made / "sheets").iterdir())) == 3
    run = small_run(image_folder, tmp_path / "out", "gif", generator="unclip", ratio=2, steps=3, sections={
        "prior": {"weights": str(made), "device": "cpu"}, "guide": {"weights": str(root / "guide")}})
    assert runs.preflight(run) == []


def test_a_killed_one_goes_on_to_the_same_bytes(config: Callable[..., dict[str, Any]], tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    whole, job, update = fit({**config(FULL), "out": str(tmp_path / "whole")}), config(FULL), Finetuner.update

    def stop_at_three(self: Finetuner, batch: Any) -> float:
        if self.step == 3:
            raise Interrupted("stopped")
        return update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "update", stop_at_three)
        with pytest.raises(Interrupted):
            fit(job)
    made = fit(job)
    assert folder_hash(made) == folder_hash(whole)
    assert (read_facts(made)["starts"], read_facts(whole)["starts"]) == ([0, 2], [0])


def test_workers_share_what_is_told(config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fit(config({**FULL, "steps": 1}))
    (folder,) = (tmp_path / "artifacts").glob("latents-*")
    feed = LatentLoader(Sources(str(folder)), make_finetune(FULL), ClassTable.of(["ant", "bee", "cat", "dog"]), 0, 1000)
    whole, halves = feed.visits(7), [feed.visits(7, rank, 2) for rank in range(2)]
    assert whole.texts == [""] * 4
    assert whole.visual_BD is not None
    assert whole.visual_BD.shape == (4, 2 * D + 1)
    np.testing.assert_array_equal(np.concatenate([half.visual_BD for half in halves]), whole.visual_BD)


def test_training_teaches_it_its_images(root: Path) -> None:
    prior = load_prior(str(root / "unclip"), device="cpu")
    tuner, batch = finetuner(prior, lr=1e-2), batch_of(prior)._replace(dropped_B=None)
    losses = [tuner.update(batch) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("prior", "recipe", "words"), [
    ("unclip", {"strategy": "db", "prompt": None}, "recipe.strategy: .*takes no adapter; set strategy: full"),
    ("unclip", {}, "recipe.strategy: .*takes no adapter"),
    ("unclip", {**FULL, "prompt": "a photo of a {name}"}, "recipe.prompt: .*reads no prompt; take it out"),
    ("mae", FULL, "is a masked autoencoder, which has no prompts to fine-tune")], ids=str)
def test_what_means_nothing_to_it_is_refused(raw: Callable[..., dict[str, Any]], root: Path, prior: str,
                                             recipe: dict[str, Any], words: str) -> None:
    if prior == "mae" and not (root / "mae").is_dir():
        tiny_mae(root / "mae")
    job = {**raw(recipe), "prior": {"weights": str(root / prior)}}
    problems = preflight_fit(parse_fit(job))
    assert any(re.search(words, one) for one in problems), problems


def test_a_sound_one_is_not_refused(config: Callable[..., dict[str, Any]]) -> None:
    assert preflight_fit(parse_fit(config(FULL))) == []
