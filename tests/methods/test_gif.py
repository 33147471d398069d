"""GIF-SD against a literal one-image reference, its signed step, groups and chunks, costs and settings."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import Reason
from rayexpand.diffusion import perturb
from rayexpand.methods import gif
from rayexpand.methods.gif import Gif
from rayexpand.methods.img2img import Img2Img
from tests.diffusion.gaussian import sd_scheduler
from tests.methods import references
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.references import Exploding, MeanGuide, ToyPrior, Watched

torch.set_num_threads(1)
ROWS = [("a", 0, 0), ("b", 1, 1), ("a", 0, 1), ("b", 1, 0), ("a", 0, 2)]
QUICK = {"steps": 10, "strength": 0.3, "guidance_scale": 2.0, "rotation": 0.0, "flip": False}


@pytest.fixture
def updates(monkeypatch):
    """(z, e, b) of every perturbation that is applied."""
    seen, plain = [], perturb.apply

    def apply(z, e, b):
        seen.append((z.detach(), e.detach(), b.detach()))
        return plain(z, e, b)

    monkeypatch.setattr(perturb, "apply", apply)
    return seen


def run(method, batch, tools):
    """Expansion, and the latents and pixels of its last decode."""
    prior = Watched(tools.prior)
    made = method.expand(batch, replace(tools, prior=prior))
    return made, *prior.decoded[-1]


@pytest.mark.parametrize("settings", [
    {}, {"kl_direction": "official"}, {"class_term_on": "first"}, {"lambda_cls": 0.0}, {"lambda_ent": 0.0},
    {"lambda_cls": 0.0, "lambda_ent": 0.0}, {"noise_level": "official"}, {"level": "pixel"}, {"chunk": 2},
    {"class_term_on": "first", "kl_direction": "official", "noise_level": "official", "lambda_ent": 0.5,
     "lambda_div": 0.5, "group_size": 2}], ids=str)
@pytest.mark.fast_cases(2)
def test_batched_equals_one_image_at_a_time(tools, updates, settings):
    compare(Gif(**{**QUICK, **settings}), tools, updates)


def test_images_larger_than_the_guide_takes(tools, updates):
    compare(Gif(**QUICK), tools, updates, size=32)


def compare(method, tools, updates, size=16):
    """Every row against the literal reference of its group."""
    batch = batch_of(method, CLASSES, ROWS, size)
    made, latent, pixels = run(method, batch, tools)
    _, e, b = updates[-1]
    pair = method.group_size or 3
    for members in [part for copies in ([0, 2, 4], [3, 1])
                    for part in (copies[start:start + pair] for start in range(0, len(copies), pair))]:
        group = references.gif(
            references.Sampler(tools.prior, method.steps, method.guidance_scale), tools.guide, batch.images[members[0]],
            [batch.draws[i].prompt for i in members], [batch.rngs[i] for i in members],
            executed=batch.draws[0].steps_run, eps=method.eps, step=method.step,
            lambdas=(method.lambda_cls, method.lambda_ent, method.lambda_div),
            official_kl=method.kl_direction == "official", first_only=method.class_term_on == "first",
            extra_noise=method.noise_level == "official", pixel=method.level == "pixel")
        for i, one in zip(members, group, strict=True):
            torch.testing.assert_close(e[i : i + 1], one.e, atol=1e-5, rtol=0)
            torch.testing.assert_close(b[i : i + 1], one.b, atol=1e-5, rtol=0)
            torch.testing.assert_close(latent[i : i + 1], one.latent, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(pixels[i : i + 1], one.pixels, atol=1e-5, rtol=1e-5)
            for name, value in one.terms.items():
                assert made.scores[f"{name}_before"][i] == pytest.approx(value, abs=1e-5)
        assert sum(made.scores["score_before"][i] for i in members) == pytest.approx(group[0].energy, abs=1e-5)


def test_chunks_of_one_two_and_all_copies_make_the_same_update(tools, updates):
    outcomes = []
    for chunk in (1, 2, 4, None):
        method = Gif(**QUICK, chunk=chunk, forward_chunk=chunk)
        run(method, batch_of(method, CLASSES, ROWS), tools)
        outcomes.append(updates[-1])
    for z, e, b in outcomes[:-1]:
        torch.testing.assert_close(z, outcomes[-1][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(e, outcomes[-1][1], atol=1e-5, rtol=0)
        torch.testing.assert_close(b, outcomes[-1][2], atol=1e-5, rtol=0)


def test_thirty_copies_run_in_the_memory_of_two(tools):
    def peak(copies, chunk):
        method = Gif(**{**QUICK, "strength": 0.1}, chunk=chunk, forward_chunk=chunk)
        batch = batch_of(method, CLASSES, [("a", 0, copy) for copy in range(copies)])
        return references.peak_saved(lambda: method.expand(batch, tools), tools.prior.vae, tools.guide.model)

    two = peak(2, None)
    assert peak(30, 2) < 1.1 * two
    assert peak(30, None) > 10 * two


# The signed step -----------------------------------------------------------------------------------------------------


def moved(updates, method, batch, tools):
    """How far e and b of each row were moved, (B, channels) each, and the last latents."""
    updates.clear()
    method.expand(batch, tools)
    e, b = (torch.from_numpy(noise) for noise in (batch.uniforms("e", (4, 1, 1)), batch.normals("b", (4, 1, 1))))
    return (updates[-1][1] - e).flatten(1), (updates[-1][2] - b).flatten(1)


def test_every_number_moves_by_the_step_or_not_at_all(tools, updates):
    method = Gif(**QUICK)
    batch = batch_of(method, CLASSES, ROWS)
    shifts = torch.cat(moved(updates, method, batch, tools))
    distance = torch.minimum(shifts.abs(), (shifts.abs() - 0.1).abs())
    assert float(distance.max()) < 1e-6
    assert float(shifts.abs().max()) > 0.05
    scaled = Gif(**QUICK, lambda_cls=7.0, lambda_ent=7.0, lambda_div=7.0)
    assert torch.equal(torch.cat(moved(updates, scaled, batch, tools)), shifts)


def test_a_small_step_raises_the_score(tools):
    method = Gif(**QUICK, step=0.002, eps=float("inf"), measure=True)
    scores = method.expand(batch_of(method, CLASSES, ROWS), tools).scores
    np.testing.assert_allclose(scores["score_random"], scores["score_before"], atol=1e-5)  # nothing is projected
    assert sum(scores["score_after"]) > sum(scores["score_before"])


def test_the_class_term_reaches_every_copy_or_the_first_alone(tools, updates):
    batch = batch_of(Gif(**QUICK), CLASSES, ROWS)
    only = {**QUICK, "lambda_ent": 0.0, "lambda_div": 0.0}
    assert (moved(updates, Gif(**only), batch, tools)[1].abs().sum(1) > 0).all()
    first = moved(updates, Gif(**only, class_term_on="first"), batch, tools)[1].abs().sum(1) > 0
    assert first.tolist() == [True, False, False, True, False]  # copies 0 of both seeds


def test_one_copy_has_no_diversity_and_says_so(tools, updates, caplog):
    gif._warn_of_single_copies.cache_clear()
    with caplog.at_level(logging.WARNING, "rayexpand.methods.gif"):
        method = Gif(**QUICK)
        scores = method.expand(batch_of(method, CLASSES, [("a", 0, 0), ("b", 1, 0)]), tools).scores
    assert scores["diversity_before"] == [0.0, 0.0]
    assert caplog.text.count("one copy only") == 1
    alone = moved(updates, Gif(**QUICK, lambda_cls=0, lambda_ent=0), batch_of(method, CLASSES, [("a", 0, 0)]), tools)
    assert float(torch.cat(alone).abs().max()) == 0
    caplog.clear()
    gif._warn_of_single_copies.cache_clear()
    Gif(**QUICK).expand(batch_of(method, CLASSES, [("a", 0, 0), ("a", 0, 1)]), tools)
    assert caplog.text == ""


def test_the_anchor_is_what_the_guide_sees_and_never_the_label(tools):
    method = Gif(**QUICK, domains=("a",), adjectives=("",), subject="")
    batch = batch_of(method, CLASSES, ROWS)
    mislabelled = batch_of(method, CLASSES, [(seed, (label + 1) % 3, copy) for seed, label, copy in ROWS])
    assert torch.equal(run(method, batch, tools)[2], run(method, mislabelled, tools)[2])


def test_another_seed_of_the_call_changes_nothing(tools, updates):
    method = Gif(**QUICK)
    batch = batch_of(method, CLASSES, ROWS)
    method.expand(batch, tools)
    before = updates[-1]
    other = batch_of(method, CLASSES, [("a", 0, 0), ("x", 2, 1), ("a", 0, 1), ("x", 2, 0), ("a", 0, 2)])
    method.expand(other, tools)
    for ours, theirs in zip(before, updates[-1], strict=True):
        assert torch.equal(ours[[0, 2, 4]], theirs[[0, 2, 4]])
        assert not torch.equal(ours[[1, 3]], theirs[[1, 3]])


def test_a_copy_that_is_no_number_leaves_its_group_alone(tools):
    class Poisoned(Watched):
        def predict(self, z_t, at, cond):
            p = self._model.predict(z_t, at, cond)
            p.noise[2] = p.clean[2] = float("nan")
            return p

    method = Gif(**QUICK)
    made = method.expand(batch_of(method, CLASSES, ROWS), replace(tools, prior=Poisoned(tools.prior)))
    assert made.reasons == [None, None, Reason.NAN_LATENT, None, None]
    without = batch_of(method, CLASSES, [*ROWS[:2], ("other", 2, 0), *ROWS[3:]])
    expected = method.expand(without, replace(tools, prior=Poisoned(tools.prior))).images
    for i in (0, 1, 3, 4):
        np.testing.assert_array_equal(made.images[i], expected[i])


def test_a_gradient_that_is_no_number_is_named(tools):
    method = Gif(**QUICK)
    batch = batch_of(method, CLASSES, ROWS)
    plain, made = (method.expand(batch, Tools(CLASSES, ToyPrior(sd_scheduler(), 0.1), guide))
                   for guide in (MeanGuide(), Exploding(row=4)))
    assert made.reasons == [None] * 4 + [Reason.GUIDANCE_DIVERGED]
    assert made.images[4] is None
    for ours, theirs in zip(made.images[:4], plain.images[:4], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pixels_move_by_one_slope_for_each_channel(tools, updates):
    method = Gif(**QUICK, eps=100.0)
    _, latent, _ = run(method, batch_of(method, CLASSES, ROWS), tools)
    z, e, b = updates[-1]
    torch.testing.assert_close(latent - z, e * z + b, atol=1e-5, rtol=1e-5)
    assert e.shape == (5, 4, 1, 1)
    assert Gif(**QUICK, level="pixel", eps=100.0).expand(batch_of(method, CLASSES, ROWS), tools).reasons == [None] * 5
    assert updates[-1][1].shape == z.shape


# Identities, noise and costs -----------------------------------------------------------------------------------------


class MeanPosterior(Watched):
    """An autoencoder without posterior noise: GIF draws it for each copy, image to image for each seed."""

    def encode(self, x, noise):
        return self._model.encode(x, None)


def test_without_room_to_move_it_is_img2img_to_the_bit(tools):
    calm = replace(tools, prior=MeanPosterior(tools.prior))
    batch = batch_of(Gif(**QUICK), CLASSES, ROWS)
    plain = Img2Img(steps=10, strength=0.3, guidance_scale=2.0)
    expected = run(plain, batch, calm)[2]
    assert torch.equal(run(Gif(**QUICK, guidance="none"), batch, calm)[2], expected)
    assert torch.equal(run(Gif(**QUICK, eps=0.0), batch, calm)[2], expected)
    assert torch.equal(run(Gif(**QUICK, eps=0.0, guidance="random"), batch, calm)[2], expected)
    random = run(Gif(**QUICK, guidance="random"), batch, calm)[2]
    assert torch.equal(run(Gif(**QUICK, step=0.0), batch, calm)[2], random)
    assert not torch.equal(run(Gif(**QUICK), batch, calm)[2], random)


@pytest.mark.parametrize(("level", "noised_to"), [("first_step", 881), ("official", 901)])
def test_noise_level(level, noised_to):
    prior = ToyPrior(sd_scheduler(), z0=torch.ones(1, 3, 4, 4))
    method = Gif(noise_level=level, guidance="none")
    batch = batch_of(method, CLASSES, [("a", 0, 0)], size=4)
    method.expand(batch, Tools(CLASSES, prior))
    assert prior.called == [881 - 20 * k for k in range(45)]
    abar = float(sd_scheduler().alphas_cumprod[noised_to])
    noise = torch.from_numpy(batch.normals("noise", (3, 4, 4)))
    torch.testing.assert_close(prior.seen[0], abar**0.5 + (1 - abar) ** 0.5 * noise)


@pytest.mark.parametrize(("settings", "decode", "guide", "decode_graphs"), [
    ({}, 2, 2, 1), ({"guidance": "random"}, 1, 0, 0), ({"guidance": "none"}, 1, 0, 0), ({"chunk": 2}, 7, 7, 3),
    ({"measure": True}, 3, 4, 1)], ids=str)
def test_calls_of_one_batch(settings, decode, guide, decode_graphs):
    """The UNet is asked once per executed step, and never with a gradient."""
    class Unyielding(Watched):
        def predict(self, z_t, at, cond):
            assert not z_t.requires_grad
            assert not torch.is_grad_enabled()
            return self._model.predict(z_t, at, cond)

    toy = ToyPrior(sd_scheduler(), slope=0.1)
    prior, watched = Unyielding(toy), Watched(MeanGuide())
    method = Gif(**settings)
    method.expand(batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior, watched))
    assert len(toy.called) == 45
    assert (prior.calls["encode"], prior.calls["decode"], watched.calls.get("features", 0)) == (1, decode, guide)
    assert prior.graphs["decode"] == decode_graphs
    assert watched.rows.get("features", 0) >= (5 + 5 if guide else 0)


def test_forward_chunks_bound_every_call():
    toy = ToyPrior(sd_scheduler(), slope=0.1)
    prior = Watched(toy)
    method = Gif(chunk=2, forward_chunk=2, steps=10)
    method.expand(batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior, MeanGuide()))
    assert {len(z) for z in toy.seen} == {2}
    assert {len(z) for z, _ in prior.decoded} == {2}


def test_each_copy_is_turned_its_own_way_and_has_its_own_posterior():
    class Seen(ToyPrior):
        def encode(self, x, noise):
            self.given = (x, noise)
            return x

    prior = Seen(sd_scheduler())
    method = Gif(steps=10, guidance="none")
    batch = batch_of(method, CLASSES, [("a", 0, copy) for copy in range(8)])
    method.expand(batch, Tools(CLASSES, prior))
    x, noise = prior.given
    assert len({image.numpy().tobytes() for image in x}) == 8
    assert len({image.numpy().tobytes() for image in noise}) == 8
    Gif(steps=10, guidance="none", rotation=0).expand(batch, Tools(CLASSES, prior))
    seed = torch.from_numpy(batch.images[0]).permute(2, 0, 1) / 255
    kinds = [int(torch.equal(image, seed)) - int(torch.equal(image, seed.flip(2))) for image in prior.given[0]]
    assert set(kinds) == {1, -1}


def test_a_seed_is_turned_by_the_filter_that_is_named():
    """Nearest is torchvision's default, with which the released code turns it: no colour is made but the black of the
    corners. What began before there was a choice goes on bilinear, in a file that does not name it."""
    from torchvision.transforms import functional

    class Seen(ToyPrior):
        def encode(self, x, noise):
            self.given = (255 * x).round().to(torch.uint8)
            return x

    def turned(**fields):
        method, prior = Gif(steps=10, guidance="none", flip=False, **fields), Seen(sd_scheduler())
        batch = batch_of(method, CLASSES, [("a", 0, 1)])
        method.expand(batch, Tools(CLASSES, prior))
        angle = batch.rngs[0]("aug").uniform(-15, 15)
        return prior.given[0], functional.rotate(torch.from_numpy(batch.images[0]).permute(2, 0, 1), angle,
                                                 fill=[0, 0, 0]), method

    nearest, torchvisions, method = turned(rotation_filter="nearest")
    bilinear, _, before = turned()

    assert (nearest != torchvisions).float().mean() < 0.02, "the same but for ties"
    assert (bilinear != torchvisions).float().mean() > 0.2
    assert method.model_dump()["rotation_filter"] == "nearest"
    assert "rotation_filter" not in before.model_dump()


# Draws and settings --------------------------------------------------------------------------------------------------


def draw(method, seed="s", copy=0, label=2):
    return method.draw(seed, label, copy, 0, CLASSES, RowRng(0, "gif", seed, copy))


def test_prompts_are_drawn_from_every_pair_without_double_spaces():
    method = Gif()
    prompts = [draw(method, f"s{i}").prompt for i in range(1000)]
    assert len(set(prompts)) == 50
    assert all(prompt.endswith("rain boot") and "  " not in prompt for prompt in prompts)
    assert "a sketch of rain boot" in prompts
    assert "an oil painting of colorful rain boot" in prompts
    assert 60 < sum(prompt.startswith("a sketch of") for prompt in prompts) / 2 < 140
    assert draw(Gif(domains=("x-ray of",), adjectives=("",))).prompt == "x-ray of rain boot"


def test_groups():
    assert [Gif().group(copies) for copies in (1, 2, 5, 30)] == [1, 2, 5, 30]
    assert [Gif(group_size=2).group(copies) for copies in (1, 2, 5)] == [1, 2, 2]
    assert [draw(Gif(group_size=2), copy=copy).group for copy in range(5)] == [0, 0, 1, 1, 2]
    assert {draw(Gif(), copy=copy).group for copy in range(5)} == {0}


@pytest.mark.parametrize(("fields", "messages"), [
    ({"strength": 1.0, "noise_level": "official"}, {"noise_level": "no point before the first"}),
    ({"strength": 0.01}, {"steps": "runs no step"}),
    ({"lambda_cls": 0, "lambda_ent": 0, "lambda_div": 0}, {"lambda_div": "nothing to climb"}),
    ({"group_size": 1, "eps": -1, "chunk": 0, "domains": []},
     {"group_size": "greater than", "eps": "greater than", "chunk": "greater than", "domains": "at least 1"}),
    ({"kl_direction": "both", "level": "token", "subject": "{nmae}"},
     {"kl_direction": "'official'", "level": "'pixel'", "subject": "unknown placeholder"})])
def test_settings_that_cannot_work_are_refused_all_at_once(fields, messages):
    with pytest.raises(ValidationError) as error:
        Gif(**fields)
    found = {str(problem["loc"][0]): problem["msg"] for problem in error.value.errors()}
    assert found.keys() == messages.keys()
    assert all(message in found[field] for field, message in messages.items())


def test_needs_follow_the_guidance():
    assert Gif().needs() == {"prior", "guide"}
    assert Gif(guidance="random").needs() == Gif(guidance="none", measure=True).needs() == {"prior"}
    assert Gif(guidance="random", measure=True).needs() == {"prior", "guide"}
