"""Real-Fake: the visual token, the literal UniPC loop image by image, the worked numbers, presets, and counts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from pydantic import ValidationError

from rayexpand.artifacts.columns import open_image_features, write_captions, write_image_features
from rayexpand.contract.errors import ModelError, UsageError
from rayexpand.contract.protocols import Batch, Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import SEED_INDEX, ClassTable, SeedIndex, Start
from rayexpand.diffusion.process import Point, Prediction
from rayexpand.methods import load_method
from rayexpand.methods.realfake import RealFake
from rayexpand.models.prior import load_prior
from rayexpand.models.texts import TextCond
from tests.conftest import complete, hashes
from tests.diffusion.gaussian import GaussianPrior, schedule_of, sd_scheduler
from tests.methods.fakes import batch_of
from tests.tiny import tiny_adapter, tiny_pipeline

CLASSES = ClassTable.of(["n01", "n02", "n03"], ["great_auk", "crane", "crane"], [3, 5, 0])
ROWS = [("a", 0, 0), ("b", 1, 0), ("a", 0, 1)]
PLAIN = {"prompt": "photo of {name}"}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return load_prior(str(tiny_pipeline(tmp_path_factory.mktemp("tiny") / "prior")), device="cpu")


def features(width=16):
    """(3, width): one row for each class."""
    return torch.from_numpy(RowRng(0, "test", "features", 0).normals("x", (3, width)))


def latents_of(method, batch, tools):
    """The clean latents of `expand`, before decoding."""
    seen = {}

    class Seen:
        def __getattr__(self, name):
            return getattr(tools.prior, name)

        def decode(self, z, cond=None):
            seen["z"] = z
            return tools.prior.decode(z, cond)

    method.expand(batch, replace(tools, prior=Seen()))
    return seen["z"]


# ---------------------------------------------------------------------------------------------------------- the token


def cond_of():
    """Two texts of T slots and width 3; the negatives are -1 throughout."""
    tokens = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3) + 100
    return TextCond(tokens, -torch.ones(2, 4, 3), torch.full((2,), 2.0))


class Embedder:
    """A prior that gives the texts above, knows nothing else, and keeps the condition it is asked with."""

    scheduler, device = sd_scheduler(), "cpu"

    def __init__(self):
        self.cond = None

    def __getattr__(self, name):
        return getattr(GaussianPrior(self.scheduler), name)

    def embed(self, prompts, negatives, guidance):
        return cond_of()

    def predict(self, z_t, at, cond):
        self.cond = cond
        return Prediction(z_t, z_t)


@pytest.mark.parametrize(("visual_token", "branch"), [("class_mean", "cond_only"), ("instance", "cond_only"),
                                                      ("class_mean", "both"), ("none", "cond_only")])
def test_each_row_gets_its_own_feature_in_the_last_slot_and_nothing_else_changes(tmp_path, visual_token, branch):
    v = np.array([[0, 1, 2], [10, 11, 12], [7, 7, 7]], np.float32)
    write_image_features(tmp_path, ["b", "a"], v[[1, 0]], encoder_sha256="0" * 64)
    prior = Embedder()
    tools = Tools(CLASSES, prior=prior, class_features=torch.from_numpy(v),
                  image_features=open_image_features(tmp_path))
    method = RealFake(visual_token=visual_token, negative_branch=branch, steps=4, strength=1.0, **PLAIN)
    method.expand(batch_of(method, CLASSES, [("a", 0, 0), ("b", 1, 0)]), tools)
    plain, found = cond_of(), prior.cond

    if visual_token == "none":
        assert torch.equal(found.tokens_BTE, plain.tokens_BTE)
        return
    assert found.tokens_BTE[:, -1].tolist() == [[0, 1, 2], [10, 11, 12]]
    assert torch.equal(found.tokens_BTE[:, :-1], plain.tokens_BTE[:, :-1])
    assert found.tokens_BTE.shape == plain.tokens_BTE.shape
    if branch == "both":
        assert found.negative_tokens_BTE[:, -1].tolist() == [[0, 1, 2], [10, 11, 12]]
        assert torch.equal(found.negative_tokens_BTE[:, :-1], plain.negative_tokens_BTE[:, :-1])
    else:
        assert torch.equal(found.negative_tokens_BTE, plain.negative_tokens_BTE)


def test_only_the_last_of_the_priors_slots_changes(prior):
    texts = ["photo of crane", "photo of a great auk on a rock"]
    plain = prior.embed(texts, ["", ""], 2.0)
    found = plain.with_last_slot(features()[:2])
    moved = (found.tokens_BTE != plain.tokens_BTE).any(dim=-1)

    assert found.tokens_BTE.shape == (2, prior.tokenizer.model_max_length, 16)
    assert moved.nonzero().tolist() == [[0, 15], [1, 15]]
    with pytest.raises(ModelError, match="width 16"):
        plain.with_last_slot(torch.zeros(2, 8))


def test_permuting_a_batch_permutes_its_samples_and_tokens_decide_them(prior):
    method = RealFake(steps=4, **PLAIN)
    tools = Tools(CLASSES, prior=prior, class_features=features())
    batch = batch_of(method, CLASSES, [("a", 0, 0), ("b", 1, 0), ("c", 1, 0), ("d", 2, 0)])
    z = latents_of(method, batch, tools)
    order = [2, 0, 3, 1]
    moved = Batch(*(tuple(getattr(batch, name)[i] for i in order) for name in ("draws", "images", "rngs", "filler")))
    assert torch.equal(latents_of(method, moved, tools), z[order])

    swapped = replace(tools, class_features=features()[[0, 0, 2]])
    other = latents_of(method, batch, swapped)
    assert [torch.equal(one, two) for one, two in zip(z, other, strict=True)] == [True, False, False, True]


# ------------------------------------------------------------------------------------------- against the literal loop


def reference(prior, draw, image, rng, visual_E, steps, executed):
    """The clean latent (1, C, h, w) of one row, with the scheduler, the UNet and the encoders themselves."""
    def text(words):
        ids = prior.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt",
                              max_length=prior.tokenizer.model_max_length).input_ids
        return prior.text_encoder(ids).last_hidden_state

    scheduler = UniPCMultistepScheduler.from_config(prior.scheduler.config, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[steps - executed:]
    scheduler.set_begin_index(steps - executed)
    shape = prior.latent_shape(16, 16)
    noise = torch.from_numpy(rng.normals("noise", shape))[None]
    with torch.no_grad():
        wanted, unwanted = text(draw.prompt), text(draw.negative)
        wanted = torch.cat([wanted[:, :-1], visual_E.reshape(1, 1, -1)], dim=1)
        z = noise
        if executed < steps:
            posterior = prior.vae.encode(torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
            sampled = posterior.mean + posterior.std * torch.from_numpy(rng.normals("posterior", shape))[None]
            z = scheduler.add_noise(sampled * prior.vae.config.scaling_factor, noise, timesteps[:1])
        for t in timesteps:
            eps_c = prior.unet(z, t, encoder_hidden_states=wanted).sample
            eps_n = prior.unet(z, t, encoder_hidden_states=unwanted).sample
            z = scheduler.step(eps_n + 2.0 * (eps_c - eps_n), t, z).prev_sample
    return z


@pytest.mark.parametrize(("prediction_type", "visual_token", "latent_prior", "steps", "executed"), [
    ("epsilon", "class_mean", True, 30, 22), ("v_prediction", "instance", True, 8, 6),
    ("epsilon", "instance", False, 8, 8)])
def test_a_batch_is_the_released_loop_row_by_row(prior, tmp_path, prediction_type, visual_token, latent_prior, steps,
                                                 executed):
    if prediction_type != "epsilon":
        prior = load_prior(str(tiny_pipeline(tmp_path / "prior", prediction_type=prediction_type)), device="cpu")
    own = {"a": features()[2], "b": features()[0]}
    write_image_features(tmp_path, list(own), np.stack([v.numpy() for v in own.values()]), encoder_sha256="0" * 64)
    tools = Tools(CLASSES, prior=prior, class_features=features(), image_features=open_image_features(tmp_path))
    method = RealFake(visual_token=visual_token, latent_prior=latent_prior, steps=steps, **PLAIN)
    batch = batch_of(method, CLASSES, ROWS)
    batch = replace(batch, draws=tuple(replace(draw, prompt=f"{draw.prompt}, on a rock") for draw in batch.draws))
    z = latents_of(method, batch, tools)
    half = {seed: v.half().float() for seed, v in own.items()}  # as they are kept
    for row, (draw, image, rng) in enumerate(zip(batch.draws, batch.images, batch.rngs, strict=True)):
        visual = half[draw.seed_id] if visual_token == "instance" else features()[draw.target_label]
        expected = reference(prior, draw, image, rng, visual, steps, executed)
        torch.testing.assert_close(z[row:row + 1], expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------- worked numbers


@pytest.mark.parametrize(("spacing", "first", "signal", "noise"), [(None, 733, 0.2535, 0.9673),
                                                                  ("leading", 705, 0.282, 0.9594)])
def test_three_quarters_of_thirty_steps(spacing, first, signal, noise):
    method, prior = RealFake(spacing=spacing, visual_token="none", **PLAIN), GaussianPrior(sd_scheduler())
    method.expand(batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior=prior))
    start = schedule_of(sd_scheduler(), "unipc", 30, 22, spacing).first
    one, zero = torch.ones(1), torch.zeros(1)

    assert (len(prior.timesteps), prior.timesteps[0]) == (22, first)
    assert start.label == first
    assert float(start.mix(one, zero)) == pytest.approx(signal, abs=5e-5 if spacing is None else 5e-4)
    assert float(start.mix(zero, one)) == pytest.approx(noise, abs=5e-5)


@pytest.mark.parametrize(("fields", "run"), [({}, 22), ({"strength": 1.0, "steps": 5}, 5)])
def test_the_unet_is_called_once_a_step_with_a_doubled_batch(prior, fields, run):
    method = RealFake(visual_token="none", **PLAIN, **fields)
    batch, rows = batch_of(method, CLASSES, ROWS), []
    handle = prior.unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    method.expand(batch, Tools(CLASSES, prior=prior))
    handle.remove()

    assert rows == [6] * run
    assert {draw.steps_run for draw in batch.draws} == {run}


def test_guidance_moves_away_from_the_negative_prompt(prior, monkeypatch):
    out = torch.tensor([[0.5, -1.0], [1.0, 2.0]]).reshape(2, 1, 1, 2)  # negative, then conditional
    monkeypatch.setattr(prior, "unet", lambda *args, **fields: (out,))
    cond = TextCond(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), torch.tensor([RealFake().guidance_scale]))
    p = prior.predict(torch.zeros(1, 1, 1, 2), Point(0.8, 0.6, 0.0), cond)
    assert p.noise.tolist() == [[[[1.5, 5.0]]]]
    torch.testing.assert_close(p.clean, -0.75 * p.noise)


def test_without_guidance_the_negative_prompt_has_no_effect(prior):
    def made(negative, scale):
        method = RealFake(negative=negative, guidance_scale=scale, steps=4, visual_token="none", **PLAIN)
        return latents_of(method, batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior=prior))

    assert torch.equal(made("", 1.0), made("blurry", 1.0))
    assert not torch.equal(made("", 2.0), made("blurry", 2.0))


@pytest.mark.parametrize("latent_prior", [True, False])
def test_start_latents_belong_to_the_row(prior, latent_prior):
    """Of batches of 1, 3 and 8 rows, in any order and again; replicas share the encoded image and differ in noise."""
    method = RealFake(visual_token="none", latent_prior=latent_prior, **PLAIN)
    starts = {}

    def start(rows):
        class First(Exception):
            pass

        class Seen:
            def __getattr__(self, name):
                return getattr(prior, name)

            def predict(self, z_t, at, cond):
                raise First(z_t)

        with pytest.raises(First) as found:
            method.expand(batch_of(method, CLASSES, rows), Tools(CLASSES, prior=Seen()))
        return dict(zip(rows, found.value.args[0], strict=True))

    rows = [*ROWS, *((f"s{i}", i % 2, i) for i in range(5))]
    for some in (rows, rows[::-1], ROWS, ROWS[:1], ROWS[::-1], rows):
        other_shape = latent_prior and len(some) < len(rows)  # the encoder rounds in another order
        for row, z in start(some).items():
            torch.testing.assert_close(z, starts.setdefault(row, z), rtol=0, atol=2e-6 if other_shape else 0)
    assert not torch.equal(starts["a", 0, 0], starts["a", 0, 1])


# ------------------------------------------------------------------------------------------------ settings and counts


def index_of(sizes):
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    n = len(labels)
    table = pa.table({"seed_id": [f"s{i}" for i in range(n)], "label": labels, "file": np.zeros(n, np.int32),
                      "member": [""] * n, "group": np.zeros(n, np.int32), "offset": np.arange(n, dtype=np.int32),
                      "fault": [""] * n}, schema=SEED_INDEX)
    return SeedIndex(table, ClassTable.of([f"c{i}" for i in range(len(sizes))], counts=sizes))


def counted(index, **fields):
    return np.bincount(index.labels, RealFake(**fields).copies(index, PlanRng(3, "realfake")),
                       minlength=len(index.classes)).astype(int).tolist()


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, [3, 5]), ({"ratio": 2}, [6, 10]), ({"ratio": 2.5}, [7, 12]), ({"ratio": 0.3}, [0, 1]),
    ({"ratio": 10}, [30, 50]), ({"balance": "uniform"}, [4, 4]), ({"balance": "uniform", "ratio": 2.5}, [10, 10]),
    ({"quota": 7}, [7, 7])])
def test_counts(fields, expected):
    assert counted(index_of([3, 5]), **fields) == expected


def test_larger_ratios_hold_the_smaller_ones_and_uniform_cycles_through_a_class():
    index, rng = index_of([3, 5, 20]), PlanRng(3, "realfake")
    ratios = [1, 1.5, 2, 2.3, 2.5, 2.9, 3]
    counts = [RealFake(ratio=ratio).copies(index, rng) for ratio in ratios]
    assert all((less <= more).all() for less, more in pairwise(counts))
    assert counted(index, ratio=2.3)[2] == 46, "0.3 of 20 is 6, whatever floats say"
    uniform = RealFake(balance="uniform", ratio=2).copies(index, rng)
    assert [np.ptp(uniform[index.labels == label]) <= 1 for label in range(3)] == [True] * 3
    assert counted(index_of([3, 0, 5]), balance="uniform") == [4, 0, 4]
    with pytest.raises(UsageError, match="less than one sample for each of 2 classes"):
        counted(index_of([3, 5]), balance="uniform", ratio=0.2)


@pytest.mark.parametrize(("fields", "prompt", "negative", "visual_token"), [
    ({}, "photo of {name}, {caption}", "distorted, unrealistic, blurry, out of frame", "class_mean"),
    ({"preset": "official_code"}, "photo of {name}, {caption}, best quality",
     "distorted, unrealistic, blurry, out of frame, cropped, deformed", "instance"),
    ({"preset": "official_code", "prompt": "{name}, photo, best quality", "visual_token": "none"},
     "{name}, photo, best quality", "distorted, unrealistic, blurry, out of frame, cropped, deformed", "none"),
    ({"finetuned": False, "negative": ""}, "photo of {name}, {caption}", "", "none")])
def test_presets_fill_what_is_not_given(fields, prompt, negative, visual_token):
    method = RealFake(**fields)
    assert (method.prompt, method.negative, method.visual_token) == (prompt, negative, visual_token)
    assert (method.strength, method.steps, method.guidance_scale, method.solver, method.lora_scale, method.ratio) == (
        0.75, 30, 2.0, "unipc", 0.5, 1.0)
    assert load_method("realfake", method.model_dump()) == method


@pytest.mark.parametrize(("fields", "needs"), [
    ({}, {"prior", "adapter", "captions", "class_features"}), (PLAIN, {"prior", "adapter", "class_features"}),
    ({"preset": "official_code"}, {"prior", "adapter", "captions", "image_features"}),
    ({"visual_token": "none", **PLAIN}, {"prior", "adapter"}), ({"finetuned": False, **PLAIN}, {"prior"}),
    ({"finetuned": False}, {"prior", "captions"})])
def test_needs_follow_the_settings(fields, needs):
    assert RealFake(**fields).needs() == needs


@pytest.mark.parametrize(("fields", "message"), [
    ({"strength": 0.03}, r"strength 0\.03 \* steps 30 = 0\.9 runs no step"), ({"steps": 1}, "runs no step"),
    ({"finetuned": False, "prompt": "a {token}"}, "is a word of the adapter"), ({"preset": "code"}, "official_code"),
    ({"prompt": "photo of {nmae}"}, "unknown placeholder"), ({"visual_token": "mean"}, "class_mean"),
    ({"ratio": 0}, "greater than 0"), ({"balance": "fill"}, "uniform"), ({"lora_scale": -1}, "greater than"),
    ({"finetuned": False, "lora_scale": 1.0, **PLAIN}, "lora_scale\n.*no effect without adapter"),
    ({"visual_token": "none", "negative_branch": "both", **PLAIN}, "negative_branch\n.*no effect without visual token"),
    ({"finetuned": False, "negative_branch": "both", **PLAIN}, "no effect without visual token")])
def test_settings_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        RealFake(**fields)


def test_draws_hold_the_slot_of_the_caption_and_a_hard_label():
    method = RealFake(ratio=2)
    draw = method.draw("s", 1, 1, 9, CLASSES, RowRng(0, "realfake", "s", 1))
    assert (draw.prompt, draw.start, draw.strength, draw.steps_run) == (
        "photo of crane, {caption}", Start.IMAGE, 0.75, 22)
    text = RealFake(latent_prior=False, strength=0.01).draw("s", 0, 0, 0, CLASSES, RowRng(0, "realfake", "s", 0))
    assert (text.prompt, text.start, text.strength, text.steps_run) == (
        "photo of great auk, {caption}", Start.NOISE, 1.0, 30)
    labels = method.soft_label(np.array([0, 1]), np.array([0, 1]), np.array([0.75, 0.75]), 3)
    assert labels.tolist() == [[1, 0, 0], [0, 1, 0]]


# -------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_takes_adapter_captions_and_features(make_config, tmp_path):
    base = tiny_pipeline(tmp_path / "base")
    ids = [f"{key}/{i}.png" for key in ("ant", "bee", "cat", "dog") for i in range(5)]
    places = {name: tmp_path / name for name in ("adapter", "captions", "image_features")}
    for name in ("captions", "image_features"):
        places[name].mkdir()
    tiny_adapter(places["adapter"], base, ["ant", "bee", "cat", "dog"], strategy="db", visual_token="instance")
    write_captions(places["captions"], ids, [f"number {i} on grass" for i in range(20)])
    write_image_features(places["image_features"], ids, RowRng(0, "test", "rows", 0).normals("x", (20, 16)),
                         encoder_sha256="0" * 64)

    def run(**changes):
        made = {name: str(folder) for name, folder in {**places, **changes}.items()}
        return make_config("realfake", name=f"run{len(changes)}", visual_token="instance", steps=4, ratio=1.5,
                           sections={"prior": {"weights": str(base), "device": "cpu"}, "artifacts": made})

    done, totals = complete(run())
    (tmp_path / "others").mkdir()
    write_captions(tmp_path / "others", ids, ["a red boat"] * 20)
    other, _ = complete(run(captions=tmp_path / "others"))

    assert totals.kept == 28
    assert done.plan.units(0)[0][0].prompt == "photo of ant, number 0 on grass"
    assert hashes(done).keys() == hashes(other).keys()
    assert not set(hashes(done).values()) & set(hashes(other).values()), "captions decide images"
