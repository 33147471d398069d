"""The trainer of small generators: any size, any classes, and the same weights whether or not it was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayexpand.contract.errors import UsageError
from rayexpand.contract.rng import generator, row_key
from rayexpand.data.seeds import digits_split
from rayexpand.models.folders import folder_hash
from rayexpand.models.guides import load_guide
from rayexpand.models.prior import facts_to_come, inspect_prior, load_prior
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.tiny import digits, pretrain, views
from rayexpand.models.tiny.architecture import build_tokenizer, tokenize
from rayexpand.models.tiny.setting import Setting, problems
from rayexpand.storage.checkpoints import Checkpoints
from tests.diffusion.gaussian import point_at

torch.set_num_threads(1)
NAMES = ("red fox", "Maine Coon", "café")
CAPTIONS = tuple(tuple(form.format(name) for form in ("a photo of a {}", "a {}")) for name in NAMES)
TINY: dict[str, Any] = {
    "size": 8, "augment": "photos", "samples": 0,
    "guide": {"width": 16, "layers": 1, "embed": 8, "text_width": 16, "text_layers": 1, "steps": 5, "batch": 4},
    "vae": {"channels": [8], "latent_channels": 2, "steps": 5, "batch": 4},
    "unet": {"channels": [16], "attention": [0], "steps": 7, "batch": 4}}


def _stream(name: str) -> np.random.Generator:
    return generator(row_key(0, "test", name, 0, 0, "pretrain"))


def _images(size: int = 8, count: int = 9) -> pretrain.TrainingImages:
    x = torch.from_numpy(_stream("images").integers(0, 256, (count, 3, size, size), np.uint8))
    return pretrain.TrainingImages(x, torch.arange(count) % len(NAMES), CAPTIONS)


def _train(folder: Path, setting: Setting, report: Any = lambda *_: None,
           checkpoints: Checkpoints | None = None, images: pretrain.TrainingImages | None = None) -> dict[str, str]:
    """Content hashes of what is trained."""
    with pretrain.settled(1):
        trained = pretrain.train(pretrain.PretrainStage(images or _images(setting.size), setting, 0, report,
                                                        checkpoints))
        trained.save(folder)
    return {part: folder_hash(folder / part) for part in ("guide", "pipeline")}


def test_the_embedded_digits_are_one_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes written out, the pool given as any dataset is: the weights of digits.train, to the bit."""
    few = {part: (x_nHWC[:64], labels[:64]) for part, (x_nHWC, labels) in digits_split().items()}
    monkeypatch.setattr(digits, "digits_split", lambda split: few)
    setting = Setting(
        size=16, augment="drawings", samples=0, unet={"channels": (32, 64), "attention": (1,), "steps": 2},
        guide={"width": 64, "layers": 3, "patch": 4, "text_width": 32, "text_layers": 2, "steps": 2},
        vae={"channels": (16, 32), "latent_channels": 4, "steps": 2})
    recipe = replace(digits.RECIPE, guide_steps=2, vae_steps=2, unet_steps=2, measured_samples=0)
    assert digits.setting(recipe) == setting
    digits.train(tmp_path / "digits", recipe, lambda *_: None)
    x_nHWC, labels = few["pool"]
    images = pretrain.TrainingImages(pretrain.to_bytes(x_nHWC), torch.from_numpy(labels).long(), digits.texts())

    assert _train(tmp_path / "any", setting, images=images) == {
        part: folder_hash(tmp_path / "digits" / part) for part in ("guide", "pipeline")}


@pytest.mark.parametrize("part", ["guide", "guide weights", "vae", "vae weights", "unet", "unet weights", "samples"])
def test_streams_are_those_that_the_embedded_default_was_trained_with(part: str) -> None:
    """Other ones would change its weights under the same cache name."""
    expected = generator(row_key(7, "digits", part, 0, 0, "training")).random(4)
    for found in (pretrain.PretrainStage(_images(), Setting(), 7, lambda *_: None).stream(part),
                  pretrain.stream(7, part),
                  replace(digits.RECIPE, seed=7).stream(part)):
        np.testing.assert_array_equal(found.random(4), expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return _train(tmp_path_factory.mktemp("whole"), Setting(**TINY))


@pytest.mark.parametrize(("stage", "step"), [("guide", 1), ("autoencoder", 5), ("generator", 5),
                                             ("generator", 6)])
@pytest.mark.fast_cases(1)
def test_a_killed_training_continues_to_the_same_weights(stage: str, step: int, tmp_path: Path,
                                                        undisturbed: dict[str, str]) -> None:
    seen: list[tuple[str, int]] = []

    def report(name: str, done: int, total: int) -> None:
        seen.append((name, done))
        if (name, done) == (stage, step) and seen.count((name, done)) == 1:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "steps", every=3)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "a", Setting(**TINY), report, checkpoints)
    assert _train(tmp_path / "b", Setting(**TINY), report, checkpoints) == undisturbed
    assert len(seen) - 17 < checkpoints.every, "less than an interval is done twice"
    assert {file.suffix for file in (tmp_path / "steps").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.fast_cases(1)
def test_other_sizes_load_like_any_other_model(prediction_type: str, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """32 pixels, shrunk four times, six latent channels, attention on both levels."""
    from diffusers import DDIMScheduler

    velocities: list[torch.Tensor] = []

    def velocity(scheduler: Any, z_BCHW: torch.Tensor, noise_BCHW: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        velocities.append(t_B)
        return noise_BCHW

    monkeypatch.setattr(DDIMScheduler, "get_velocity", velocity)
    steps = {"steps": 1, "batch": 2}
    setting = Setting(
        size=32, context=20, augment="none", samples=2, sample_steps=2, guide={**TINY["guide"], **steps, "patch": 8},
        vae={"channels": (8, 8, 16), "latent_channels": 6, **steps},
        unet={"channels": (16, 32), "attention": (0, 1), "prediction_type": prediction_type, **steps})
    _train(tmp_path, setting)
    facts = inspect_prior(str(tmp_path / "pipeline"))
    assert (facts.image_size, facts.vae_factor, facts.unet_factor, facts.latent_channels) == (32, 4, 2, 6)
    assert facts.prediction_type == prediction_type
    assert len(velocities) == (prediction_type == "v_prediction")

    prior = load_prior(str(tmp_path / "pipeline"), device="cpu")
    guide = load_guide(str(tmp_path / "guide"), None, NAMES, device="cpu")
    x = _images(32).x_n3HW
    with torch.no_grad():
        z = prior.encode(x / 255, None)
        assert z.shape == (9, 6, 8, 8)
        p = prior.predict(z, point_at(prior.scheduler, 500), prior.embed(["a fox"] * 9, [""] * 9, 2.0))
        assert p.clean.shape == p.noise.shape == z.shape
    again = pretrain.load(tmp_path, setting, {})
    np.testing.assert_array_equal(pretrain.named(again, x, NAMES), guide.zero_shot(x.permute(0, 2, 3, 1).numpy()))
    assert pretrain.sample(again, ["a photo of a café"] * 2, 0, lambda *_: None).shape == (2, 3, 32, 32)


@pytest.mark.slow
def test_training_learns(tmp_path: Path) -> None:
    """Three classes of plain colours: after a second the guide knows them, and the autoencoder draws them."""
    colours = torch.tensor([[220, 30, 30], [30, 200, 40], [40, 50, 220]], dtype=torch.uint8)
    labels = torch.arange(30) % 3
    noise = torch.from_numpy(_stream("noise").integers(0, 30, (30, 3, 8, 8), np.uint8))
    images = pretrain.TrainingImages(colours[labels][:, :, None, None] + noise, labels, CAPTIONS)
    setting = Setting(**{**TINY, "augment": "none", "guide": {**TINY["guide"], "steps": 40, "batch": 12, "rate": 1e-2},
                         "vae": {**TINY["vae"], "steps": 100, "batch": 8, "rate": 1e-2}})
    work = pretrain.PretrainStage(images, setting, 0, lambda *_: None)
    with pretrain.settled(1):
        trained = pretrain.train(work)

        assert (pretrain.named(trained, images.x_n3HW, NAMES) == labels.numpy()).mean() > 0.9
        assert pretrain.psnr(trained.pipe.vae, images.x_n3HW) > 20
    assert set(work.seconds) == set(pretrain.STAGES)


def test_classes_with_the_same_captions_are_one_for_the_guide(tmp_path: Path) -> None:
    """Were they two, the loss of a batch of both could not fall to that of one class."""
    images = _images()
    one, two = (replace(images, captions=(CAPTIONS[0],) * 3, labels=labels)
                for labels in (torch.zeros(9, dtype=torch.int64), images.labels))
    made = [_train(tmp_path / str(i), Setting(**TINY), images=each)["guide"] for i, each in enumerate((one, two))]
    assert made[0] == made[1]


def test_class_words_are_single_tokens_and_others_fall_back_to_bytes() -> None:
    tokenizer = build_tokenizer([text for row in CAPTIONS for text in row], 12)
    for word in ("red", "fox", "maine", "coon", "photo"):
        assert tokenizer.tokenize(word) == [word + "</w>"]
    assert len(tokenizer.tokenize("café")) == 1
    assert tokenizer.unk_token_id not in tokenizer("zebra_7!").input_ids[1:-1]
    assert tokenize(tokenizer, ["a photo of a red fox"]).shape == (1, 12)


def test_captions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'a photo of a red fox' takes 8 tokens .* has 6: raise context to 8"):
        _train(tmp_path, Setting(**{**TINY, "context": 6}))


def test_a_training_that_diverges_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"training of the autoencoder diverged: the loss is nan at step 5 of 5"):
        _train(tmp_path, Setting(**{**TINY, "vae": {**TINY["vae"], "rate": 1e30}}))


@pytest.mark.parametrize(("changes", "wanted"), [
    ({}, []),
    ({"size": 24, "guide": {"patch": 7}, "unet": {"channels": [16, 16, 16, 16]}},
     ["size: 24 px is no multiple of 16", "guide.patch: 7 px does not divide size 24"]),
    ({"size": 20}, ["size: 20 px is no multiple of 8"]),
    ({"guide": {"width": 40, "text_width": 24}}, ["guide.head_width: 16 does not divide guide.width 40",
                                                  "guide.text_width: 24 is no multiple of 16"]),
    ({"vae": {"channels": [12, 16]}, "unet": {"channels": [8, 32], "attention": [2]}},
     ["vae.channels: 12 is no positive multiple of 8", "unet.channels: 8 is no positive multiple of 16",
      "unet.attention: there is no level 2; levels of 2 unet.channels are 0 to 1"]),
    ({"guide": {"batch": 7}, "vae": {"batch": 9}}, ["guide.batch: 7 is odd", "vae.batch: 9 is odd"])])
def test_sizes_that_do_not_fit_together_are_named_at_once(changes: dict[str, Any], wanted: list[str]) -> None:
    found = problems(Setting(**changes))
    assert len(found) == len(wanted)
    for line, start in zip(found, wanted, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("kind", ["drawings", "photos", "none"])
def test_half_of_a_batch_is_changed_and_stays_an_image(kind: str) -> None:
    x = pretrain.to_unit(_images(16, 40).x_n3HW)
    for table in (views.GUIDE, views.AUTOENCODER):
        y = views.half_changed(x, table[kind], _stream("views"))
        assert y.shape == x.shape
        assert torch.equal(y[:20], x[:20])
        assert y.min() >= 0
        assert y.max() <= 1
        assert torch.equal(y, x) == (kind == "none")


def test_photos_are_mirrored_moved_by_whole_pixels_and_never_turned() -> None:
    x = pretrain.to_unit(_images(16, 40).x_n3HW)
    flipped, moved = views.flip(x, _stream("flip")), views.shift(x, _stream("shift"))
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(flipped, x, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, x, strict=True)])
    assert (mirrored ^ kept).all()
    assert 8 < mirrored.sum() < 32
    inner = x[:, :, 4:12, 4:12]
    for row, whole in zip(moved, inner, strict=True):
        assert any(torch.equal(row[:, 4 + dy:12 + dy, 4 + dx:12 + dx], whole)
                   for dy in range(-2, 3) for dx in range(-2, 3))


ZERO_SNR = {**TINY["unet"], "rescale_betas_zero_snr": True, "spacing": "trailing"}


def test_a_generator_learns_from_pure_noise_and_samples_from_there(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The last timestep of its training holds no signal, and a few steps begin at it; diffusers' own too."""
    from diffusers import DDIMScheduler

    signal: list[float] = []
    plain = DDIMScheduler.add_noise

    def noised(scheduler: DDIMScheduler, *given: torch.Tensor) -> torch.Tensor:
        signal.append(float(scheduler.alphas_cumprod[-1]))
        return plain(scheduler, *given)

    monkeypatch.setattr(DDIMScheduler, "add_noise", noised)
    _train(tmp_path, Setting(**{**TINY, "unet": ZERO_SNR}))
    assert set(signal) == {0.0}

    first = load_prior(str(tmp_path / "pipeline"), device="cpu").schedule("ddim", 4).points[0]
    assert (first.a, first.s, first.label) == (0.0, 1.0, 999.0)
    again = pretrain.load(tmp_path, Setting(**{**TINY, "unet": ZERO_SNR, "sample_steps": 4}), {})
    assert torch.isfinite(pretrain.sample(again, ["a photo of a café"], 0, lambda *_: None)).all()
    again.pipe.scheduler.set_timesteps(4)
    assert again.pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_what_a_setting_will_give_is_known_before_it_is_trained(tmp_path: Path) -> None:
    """All that its files say afterwards, and that the embedded default's say."""
    cases = {"tiny": Setting(**TINY), "zero": Setting(**{**TINY, "unet": ZERO_SNR}),
             "epsilon": Setting(**{**TINY, "unet": {**TINY["unet"], "prediction_type": "epsilon"}})}
    for name, setting in cases.items():
        _train(tmp_path / name, setting)
        expected = inspect_prior(str(tmp_path / name / "pipeline"))
        found = facts_to_come(setting, PriorModel(weights=expected.weights))
        assert replace(found, process=expected.process) == expected
        assert (found.process.kind, found.process.spacing_of("ddim")) == (
            expected.process.kind, expected.process.spacing_of("ddim"))
        assert [key for key, value in found.process.config.items() if expected.process.config[key] != value] == []
    assert inspect_prior(str(tmp_path / "zero/pipeline")).ends_in_noise


def test_fields_that_came_later_change_no_digest() -> None:
    assert not {"spacing", "rescale_betas_zero_snr"} & Setting().model_dump()["unet"].keys()
    assert Setting(unet=ZERO_SNR).model_dump()["unet"]["spacing"] == "trailing"


def test_a_noise_prediction_where_no_signal_is_left_is_refused() -> None:
    found = problems(Setting(**{**TINY, "unet": {**ZERO_SNR, "prediction_type": "epsilon"}}))
    assert [line.partition(":")[0] for line in found] == ["unet.prediction_type"]
    assert problems(Setting(**{**TINY, "unet": ZERO_SNR})) == []
