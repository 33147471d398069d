import json
import multiprocessing
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import ModelError
from rayexpand.data.seeds import digits_split
from rayexpand.diffusion.process import schedule
from rayexpand.models import folders
from rayexpand.models.folders import folder_hash
from rayexpand.models.guides import load_guide
from rayexpand.models.prior import inspect_prior, load_prior
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.tiny import digits
from tests.diffusion.gaussian import point_at

torch.set_num_threads(1)
SHORT = replace(digits.RECIPE, guide_steps=2, vae_steps=2, unet_steps=2, measured_samples=0)


def test_caption_words_are_single_tokens_and_other_words_fall_back_to_bytes():
    tokenizer = digits.build_tokenizer()
    words = {word for caption in digits.CAPTIONS for word in caption.format("").split()} | set(digits.CLASS_NAMES)
    for word in words:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    odd = tokenizer("café 12!").input_ids
    assert tokenizer.unk_token_id not in odd[1:-1]
    assert tokenizer.decode(odd, skip_special_tokens=True).replace(" ", "") == "café12!"
    ids = digits.tokenize(tokenizer, ["A Photo of a ZERO", "a photo of a zero", ""])
    assert torch.equal(ids[0], ids[1])
    assert ids.shape == (3, digits.CONTEXT)


def test_added_tokens_are_lowercase_only(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = digits.build_tokenizer()
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<class_0>", "<class_1>"]) == 2
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(again) == size + 2
    assert again("a <class_1> shape").input_ids[2] == again("a <CLASS_1> shape").input_ids[2] == size + 1


def test_text_tower_is_copied_to_the_bit():
    tokenizer = digits.build_tokenizer()
    guide = digits.build_guide(len(tokenizer), SHORT.stream("test")).eval()
    for parameter in guide.parameters():  # biases and norms too must differ from their starting values
        parameter.data.add_(torch.from_numpy(SHORT.stream("more").standard_normal(parameter.shape).astype("f4")) * 0.1)
    ids = digits.tokenize(tokenizer, [c.format(n) for c in digits.CAPTIONS for n in digits.CLASS_NAMES] + ["", "x y z"])
    text_encoder = digits.text_encoder_of(guide)
    with torch.no_grad():
        x, mask = guide._embeds(ids) if hasattr(guide, "_embeds") else (
            guide.token_embedding(ids) + guide.positional_embedding, guide.attn_mask)
        expected = guide.ln_final(guide.transformer(x, attn_mask=mask))
        out = text_encoder(ids)
        assert (out.last_hidden_state - expected).abs().max() == 0.0
        pooled = guide.encode_text(ids)
        assert torch.allclose(out.pooler_output @ guide.text_projection, pooled, atol=1e-5)
    assert expected.std() > 0.1
    assert not any(p.requires_grad for p in text_encoder.parameters())


def test_cache_name_follows_recipe_and_library_versions(monkeypatch):
    name = digits.cache_name()
    assert name == digits.cache_name(replace(digits.RECIPE))
    assert name != digits.cache_name(replace(digits.RECIPE, unet_steps=401))
    monkeypatch.setattr(digits, "version", lambda package: "9.9.1+cpu")
    other = digits.cache_name()
    assert other != name
    monkeypatch.setattr(digits, "version", lambda package: "9.9.2")
    assert digits.cache_name() == other


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYEXPAND_CACHE", str(tmp_path / "env"))
    assert folders.cache_root() == tmp_path / "env"
    assert folders.cache_root(tmp_path) == tmp_path
    monkeypatch.delenv("RAYEXPAND_CACHE")
    assert folders.cache_root().name == "rayexpand"


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"file/cache, which cannot be written; .*RAYEXPAND_CACHE"):
        digits.ensure(None, tmp_path / "file/cache", SHORT)


@pytest.mark.slow
def test_training_is_repeatable_and_leaves_global_state_alone(tmp_path, monkeypatch):
    few = {part: (x_nHWC[:64], labels[:64]) for part, (x_nHWC, labels) in digits_split().items()}
    monkeypatch.setattr(digits, "digits_split", lambda split: few)
    before, threads, calls = torch.get_rng_state(), torch.get_num_threads(), []
    first = digits.ensure(lambda *call: calls.append(call), tmp_path / "a", SHORT)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert {stage for stage, _, _ in calls} == {"guide", "autoencoder", "generator"}
    assert calls[-1] == ("generator", 2, 2)
    assert {"zero_shot", "psnr_upright_db", "psnr_rotated_db"} == set(json.loads((first / "measured.json").read_text()))
    second = digits.ensure(None, tmp_path / "b", SHORT)
    other = digits.ensure(None, tmp_path / "b", replace(SHORT, seed=1))
    for part in ("pipeline", "guide"):
        assert folder_hash(first / part) == folder_hash(second / part) != folder_hash(other / part)
    facts, said = inspect_prior(str(first / "pipeline")), inspect_prior("digits")
    assert replace(facts, weights="digits", process=said.process) == said
    assert replace(facts.process, config=said.process.config) == said.process
    assert facts.process.config.items() >= said.process.config.items()
    for solver in ("ddim", "dpmpp_2m", "unipc"):
        assert schedule(facts.process, solver, 10, 5).points == schedule(said.process, solver, 10, 5).points


@pytest.mark.parametrize(("fields", "message"), [
    ({"guidance": "embedded"}, "prior.guidance: embedded needs a network with the scale as an input"),
    ({"process": {"sigma_max": 80.0}}, "prior.process.sigma_max: DDIMScheduler has timesteps"),
    ({"process": {"shift": 3.0}}, "prior.process.shift: is of flows")])
def test_what_the_embedded_default_cannot_be_is_known_before_it_is_trained(fields, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        inspect_prior(PriorModel(weights="digits", **fields))
    assert inspect_prior(PriorModel(weights="digits", guidance="none")).guidance == "none"
    zero = {"rescale_betas_zero_snr": True}
    assert inspect_prior(PriorModel(weights="digits", process=zero)).ends_in_noise


def test_a_failed_training_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def broken(folder: Path, recipe: digits.DigitsRecipe, report: object) -> None:
        (folder / "half").write_text("")
        raise MemoryError

    monkeypatch.setattr(digits, "train", broken)
    with pytest.raises(MemoryError):
        digits.ensure(None, tmp_path, SHORT)
    folder = tmp_path / digits.cache_name(SHORT)
    assert not folder.exists()
    assert len(list(tmp_path.glob("*.partial-*"))) == 1
    monkeypatch.setattr(digits, "train", lambda folder, recipe, report: (folder / "whole").write_text(""))
    assert digits.ensure(None, tmp_path, SHORT) == folder
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert not list(tmp_path.glob("*.partial-*"))


def ask(root: Path, seconds: float) -> None:
    """Training itself is replaced: what is tested is who trains."""
    def train(folder: Path, recipe: digits.DigitsRecipe, report: object) -> None:
        (folder / "begun").write_text("")
        with open(root / "trainers", "a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        (folder / "measured.json").write_text("{}")

    digits.train = train
    (root / f"ready-{os.getpid()}").write_text("")
    with open(root / f"said-{os.getpid()}", "w") as said:
        folder = digits.ensure(lambda *call: print(call[0], file=said), root)
    assert (folder / "measured.json").exists()


def asking(root: Path, seconds: float) -> multiprocessing.Process:
    """Forked, so that nobody imports torch again."""
    child = multiprocessing.get_context("fork").Process(target=ask, args=(root, seconds), daemon=True)
    child.start()
    return child


def wait_for(condition) -> None:
    while not condition():
        time.sleep(0.02)


def test_of_three_processes_one_trains_and_after_a_kill_another_does(tmp_path):
    killed = asking(tmp_path, 600)
    wait_for((tmp_path / "trainers").exists)
    others = [asking(tmp_path, 0.3) for _ in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 3)
    time.sleep(0.2)
    assert len((tmp_path / "trainers").read_text().split()) == 1  # the others wait
    killed.kill()
    for other in others:
        other.join()
    said = [(tmp_path / f"said-{other.pid}").read_text() for other in others]
    assert [other.exitcode for other in others] == [0, 0], said
    assert any("waiting for another process" in text for text in said)
    killed.join()
    trainers = (tmp_path / "trainers").read_text().split()
    assert len(trainers) == 2
    assert trainers[0] == str(killed.pid)
    assert trainers[1] in {str(other.pid) for other in others}
    assert {p.name for p in tmp_path.glob("digits-*") if p.is_dir()} == {digits.cache_name()}


@pytest.fixture(scope="session")
def digits_prior() -> Path:
    """The trained default in the user's cache; trained here (about a minute) if it is not there yet."""
    return digits.ensure()


def test_trained_default_is_as_good_as_promised(digits_prior):
    measured = json.loads((digits_prior / "measured.json").read_text())
    assert measured["zero_shot"] >= 0.90
    assert measured["psnr_upright_db"] >= 29
    assert measured["psnr_rotated_db"] >= 27
    assert measured["samples_named_right"] >= 0.95


@torch.no_grad()
def test_trained_default_loads_like_any_other_model(digits_prior):
    """The stored numbers again, through the public loaders and our own prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    images, labels = digits_split()["test"]
    prior, guide = load_prior("digits", device="cpu"), load_guide("digits", None, digits.CLASS_NAMES, device="cpu")
    measured = json.loads((digits_prior / "measured.json").read_text())
    assert np.isclose((guide.zero_shot(images) == labels).mean(), measured["zero_shot"], atol=0.003)
    x = digits.to_tensor(images)
    error = (prior.decode(prior.encode(x, None)).clamp(0, 1) - x).square().mean((1, 2, 3))
    assert np.isclose(float((-10 * error.log10()).mean()), measured["psnr_upright_db"], atol=0.01)
    assert 0.8 < prior.encode(x, None).std() < 1.2

    wanted = np.arange(100) % 10
    cond = prior.embed([digits.PROMPT.format(digits.CLASS_NAMES[k]) for k in wanted], [""] * 100, 2.0)
    solver = DDIMScheduler.from_config(prior.scheduler.config, prediction_type="epsilon")
    solver.set_timesteps(10)
    z = torch.from_numpy(SHORT.stream("test noise").standard_normal((100, 4, 8, 8), dtype=np.float32))
    for t in solver.timesteps:
        z = solver.step(prior.predict(z, point_at(solver, int(t)), cond).noise, t, z).prev_sample
    samples = (prior.decode(z).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (guide.zero_shot(samples) == wanted).mean() >= 0.93
    pipe = StableDiffusionPipeline.from_pretrained(digits_prior / "pipeline")
    assert pipe.safety_checker is None
    assert pipe.scheduler.config.prediction_type == "v_prediction"
