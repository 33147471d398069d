"""DistDiff against a literal one-image reference, arithmetic by hand, its identities, costs and settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError

from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import RowRng
from rayexpand.contract.schema import ClassTable, Reason
from rayexpand.diffusion import perturb
from rayexpand.diffusion.prototypes import Prototypes, classes_hash, fit_prototypes
from rayexpand.methods.distdiff import DistDiff
from rayexpand.methods.img2img import Img2Img
from tests.diffusion.gaussian import sd_scheduler
from tests.methods import references
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.references import Exploding, Fixed, MeanGuide, ToyPrior, Watched

torch.set_num_threads(1)
ROWS = [("a", 0, 0), ("b", 1, 0), ("a", 0, 1), ("c", 2, 0)]
QUICK = {"steps": 10, "strength": 0.5, "guide_step": 4, "lookahead": 2, "rho": 1.0}


@pytest.fixture
def updates(monkeypatch):
    """(z, e, b) of every perturbation that is applied; the last one of a call is the refined one."""
    seen, plain = [], perturb.apply

    def apply(z, e, b):
        seen.append((z.detach(), e.detach(), b.detach()))
        return plain(z, e, b)

    monkeypatch.setattr(perturb, "apply", apply)
    return seen


def watched(method, batch, tools):
    """Expansion, and the latents and pixels of its last decode."""
    prior = Watched(tools.prior)
    made = method.expand(batch, replace(tools, prior=prior))
    return made, prior.decoded[-1]


def literal(method, batch, tools, i):
    draw, of = batch.draws[i], tools.prototypes
    paper = method.proto_space == "paper"
    return references.distdiff(
        references.Sampler(tools.prior, method.steps, method.guidance_scale), tools.guide, batch.images[i], draw.prompt,
        batch.rngs[i], (of.class_KD if paper else of.class_unit_KD)[draw.target_label],
        (of.group_KGD if paper else of.group_unit_KGD)[draw.target_label], executed=draw.steps_run,
        guide_step=method.guide_step, lookahead=method.lookahead, rho=method.rho, eps=method.eps,
        lambda_g=method.lambda_g, unit=method.proto_space == "unit" or (
            method.proto_space == "official" and method.guidance == "direct"),
        raw_input=method.guide_input == "raw", direct=method.guidance == "direct")


@pytest.mark.parametrize("settings", [
    {}, {"lookahead": 1, "lambda_g": 0.5}, {"lookahead": 3, "guide_step": 5}, {"guide_batch": 2}, {"recompute": True},
    {"proto_space": "official"}, {"proto_space": "unit", "rho": 5.0}, {"guide_input": "raw"}, {"eps": 100.0},
    {"proto_space": "official", "guide_input": "raw"},
    {"guidance": "direct"}, {"guidance": "direct", "proto_space": "official", "guide_batch": 3}], ids=str)
@pytest.mark.fast_cases(2)
def test_batched_equals_one_image_at_a_time(tools, updates, settings):
    compare(DistDiff(**{**QUICK, **settings}), tools, updates)


def test_images_larger_than_the_guide_takes(tools, updates):
    compare(DistDiff(**QUICK), tools, updates, size=32)


def compare(method, tools, updates, size=16):
    """Every row against the literal reference."""
    batch = batch_of(method, CLASSES, ROWS, size)
    made, (latent, pixels) = watched(method, batch, tools)
    for i in range(len(ROWS)):
        one = literal(method, batch, tools, i)
        torch.testing.assert_close(latent[i : i + 1], one.latent, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pixels[i : i + 1], one.pixels, atol=1e-5, rtol=1e-5)
        assert made.scores["energy_before"][i] == pytest.approx(one.energy, rel=1e-5)
        if method.guidance == "transform":
            _, e, b = updates[-1]
            torch.testing.assert_close(torch.stack([e[i], b[i]]), torch.stack([one.e[0], one.b[0]]), atol=1e-5,
                                       rtol=1e-5)
    assert made.reasons == [None] * len(ROWS)


# Identities ----------------------------------------------------------------------------------------------------------


def same_streams(batch, **streams):
    return replace(batch, rngs=tuple(Fixed(rng, streams) for rng in batch.rngs))


def test_without_guidance_it_is_img2img_to_the_bit(tools):
    plain = Img2Img(steps=10, strength=0.5)
    batch = batch_of(DistDiff(**QUICK), CLASSES, ROWS)
    still = same_streams(batch, e=0.0, b=0.0)
    expected = watched(plain, batch, tools)[1][1]

    def pixels(batch, **settings):
        return watched(DistDiff(**{**QUICK, **settings}), batch, tools)[1][1]

    assert torch.equal(pixels(still, rho=0.0), expected)
    assert torch.equal(pixels(batch, eps=0.0), expected)
    assert torch.equal(pixels(batch, eps=0.0, guide_batch=2, rho=100.0), expected)
    assert not torch.equal(pixels(batch, rho=0.0, eps=float("inf")), expected)
    assert torch.equal(pixels(batch, rho=0.0), pixels(batch, guidance="random"))
    assert not torch.equal(pixels(batch), pixels(batch, guidance="random"))


# By hand -------------------------------------------------------------------------------------------------------------

TWO = ClassTable.of(["a"])
BY_HAND = {"steps": 1, "strength": 1.0, "guide_step": 1, "lookahead": 1, "eps": float("inf"), "measure": True}


def by_hand(settings, streams=(("e", 0.0), ("b", 0.0), ("noise", 0.0)), slope=0.0, steps=1):
    """One row of two channels whose latent at the guided step has the channel means (1, 2); sqrt(abar) is 0.5 there."""
    betas = [0.75] if steps == 1 else [0.5, 0.5]
    scheduler = DDIMScheduler(num_train_timesteps=steps, trained_betas=betas, clip_sample=False, set_alpha_to_one=True)
    ripple = torch.tensor([[0.5, -0.5], [-0.25, 0.25]])
    z_t = torch.stack([1 + ripple, 2 - ripple])[None]
    prior = ToyPrior(scheduler, slope, z0=2 * z_t, channels=2)
    prototypes = Prototypes(np.float32([[2, 1]]), np.float32([[[1, 0], [0.6, 0.8]]]), np.float32([[0.6, 0.8]]),
                            np.float32([[[1, 0], [0.6, 0.8]]]), np.ones((1, 2), np.int64), "", classes_hash("a"))
    method = DistDiff(**{**BY_HAND, "steps": steps, **settings})
    batch = same_streams(batch_of(method, TWO, [("s", 0, 0)], size=2), **dict(streams))
    guide = MeanGuide(channels=2)
    return method.expand(batch, Tools(TWO, prior, guide, prototypes)), prior


@pytest.mark.parametrize(("settings", "before", "gb", "ge"), [
    ({}, 6.49285, (0.80164, 3.83231), (0.80164, 7.66463)),
    ({"lambda_g": 0.9}, 6.14356, (0.72147, 3.64908), (0.72147, 7.29816))])
def test_energy_and_gradient_by_hand(updates, settings, before, gb, ge):
    rho = 0.01
    made, _ = by_hand({"rho": rho, **settings})
    _, e, b = updates[1]  # the first is the one that is scored
    assert made.scores["energy_before"] == pytest.approx([before], abs=1e-4)
    np.testing.assert_allclose(e.flatten() / -rho, ge, atol=1e-4)
    np.testing.assert_allclose(b.flatten() / -rho, gb, atol=1e-4)
    if not settings:
        assert made.scores["energy_after"] == pytest.approx([5.74833], abs=1e-4)  # up, 7.24219, with the wrong sign
        assert made.scores["energy_random"] == pytest.approx([before], abs=1e-4)


def test_a_long_step_ends_on_the_surface_of_the_box():
    made, prior = by_hand({"rho": 10.0, "eps": 0.2})
    torch.testing.assert_close(prior.seen[-1].mean((2, 3)), torch.tensor([[0.8, 1.8]]))
    assert made.scores["clamp_fraction"] == [1.0]


@pytest.mark.parametrize("settings", [{"lambda_c": 0.0}, {"lambda_g": 0.0}, {"lambda_c": 1.0, "lambda_g": 1.0}])
def test_either_prototype_can_be_turned_off(settings):
    parts = {"lambda_c": 3.0, "lambda_g": 3.49285}
    expected = sum(value for name, value in parts.items() if settings.get(name, 1.0))
    assert by_hand(settings)[0].scores["energy_before"] == pytest.approx([expected], abs=1e-4)


def test_lookahead_is_an_average(updates):
    """With a noise prediction of zero every clean prediction is the same, so a second one changes nothing."""
    settings = {"rho": 0.01, "guide_step": 2}
    one, _ = by_hand({**settings, "lookahead": 1}, steps=2)
    two, _ = by_hand({**settings, "lookahead": 2}, steps=2)
    assert two.scores["energy_before"] == pytest.approx(one.scores["energy_before"])
    last = [update for update in updates if update[1].abs().sum() > 0]
    torch.testing.assert_close(last[0][1], last[-1][1])


def test_the_gradient_runs_through_both_noise_predictions(updates):
    """Against central differences of the energy; cutting the graph between the steps or in the UNet breaks it."""
    settings, step = {"guide_step": 2, "lookahead": 2, "measure": False}, 2e-3

    def energy(e, b):
        streams = (("e", e), ("b", b), ("noise", 0.3))
        return by_hand({**settings, "rho": 0.0}, streams, slope=0.8, steps=2)[0].scores["energy_before"][0]

    e, b = np.array([0.3, 0.6]), np.array([-0.2, 0.4])
    by_hand({**settings, "rho": 1.0}, (("e", e), ("b", b), ("noise", 0.3)), slope=0.8, steps=2)
    moved_e, moved_b = (update.flatten().double().numpy() for update in updates[-1][1:])
    for channel in range(2):
        d = step * np.eye(2)[channel]
        slope_e, slope_b = (energy(e + d, b) - energy(e - d, b)), (energy(e, b + d) - energy(e, b - d))
        assert e[channel] - moved_e[channel] == pytest.approx(slope_e / (2 * step), abs=3e-3)
        assert b[channel] - moved_b[channel] == pytest.approx(slope_b / (2 * step), abs=3e-3)


@pytest.mark.parametrize(("guide_input", "pixel", "seen"), [
    ("normalised", 0.5, 0.0655), ("normalised", 1.0, 2.2489), ("normalised", 0.0, -2.1179), ("raw", 0.5, 0.0),
    ("raw", 1.0, 1.0), ("raw", 0.0, -1.0)])
def test_what_the_guide_sees_of_a_decoded_pixel(guide_input, pixel, seen):
    guide = MeanGuide()
    guide.mean, guide.std = torch.full((1, 3, 1, 1), 0.485), torch.full((1, 3, 1, 1), 0.229)
    prior = ToyPrior(sd_scheduler(), z0=torch.full((1, 3, 4, 4), pixel))
    nothing = np.zeros((1, 3), np.float32)
    prototypes = Prototypes(nothing, nothing[None], nothing, nothing[None], np.ones((1, 1), np.int64), "", "")
    method = DistDiff(steps=4, guide_step=1, lookahead=1, guide_input=guide_input, lambda_g=0)
    batch = same_streams(batch_of(method, TWO, [("s", 0, 0)], size=4), e=0.0, b=0.0, noise=0.0)
    made = method.expand(batch, Tools(TWO, prior, guide, prototypes))
    assert made.scores["energy_before"] == pytest.approx([abs(seen) * 3**0.5], abs=1e-3)


# Costs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "predict", "decode", "guide", "graphs"), [
    ({}, 27, 3, 2, 2), ({"lookahead": 1}, 26, 2, 1, 1), ({"guidance": "random"}, 25, 1, 0, 0),
    ({"guidance": "direct"}, 25, 3, 2, 2), ({"guide_batch": 3}, 29, 5, 4, 4), ({"measure": True}, 31, 7, 6, 2)],
    ids=str)
def test_calls_of_one_batch(settings, predict, decode, guide, graphs):
    prior, watched_guide = Watched(ToyPrior(sd_scheduler(), slope=0.1)), Watched(MeanGuide())
    prototypes = fit_prototypes(RowRng(0, "t", "p", 0).normals("x", (9, 3)), np.arange(9) % 3, 3, 2, guide_hash="",
                                class_keys=CLASSES.key)
    method = DistDiff(**settings)
    batch = batch_of(method, CLASSES, ROWS)
    method.expand(batch, Tools(CLASSES, prior, watched_guide, prototypes))
    assert (prior.calls["predict"], prior.calls["decode"], watched_guide.calls.get("features", 0)) == (
        predict, decode, guide)
    assert prior.graphs["predict"] == graphs
    assert prior.calls["encode"] == 1


def test_large_seeds_are_encoded_once_for_all_copies():
    prior = Watched(ToyPrior(sd_scheduler()))
    method = DistDiff(guidance="random", steps=4, guide_step=2)
    batch = batch_of(method, CLASSES, [("a", 0, 0), ("a", 0, 1), ("b", 1, 0), ("a", 0, 2)], size=512)
    method.expand(batch, Tools(CLASSES, prior))
    assert (prior.calls["encode"], prior.rows["encode"]) == (2, 2)


def test_each_text_is_encoded_once(tools):
    prior, method = tools.prior, DistDiff(**QUICK, prompt="only here {name}")
    calls, plain = [], prior.text_encoder.forward
    prior.text_encoder.forward = lambda *a, **k: (calls.append(1), plain(*a, **k))[1]
    try:
        method.expand(batch_of(method, CLASSES, ROWS), tools)
    finally:
        prior.text_encoder.forward = plain
    assert len(calls) == 3  # classes; the empty text is known from before


@pytest.mark.parametrize(("settings", "first", "place"), [
    ({}, 381, 5), ({"guide_step": 25}, 481, 0), ({"guide_step": 10, "strength": 0.2}, 181, 0),
    ({"guide_step": 2}, 21, 23)])
def test_the_guided_step_is_counted_from_the_end(settings, first, place):
    assert_rolled_out(settings, [981 - 20 * k for k in range(50)], place, [first, first - 20])


@pytest.mark.parametrize(("settings", "spacing", "place", "rollout"), [
    ({"guide_at": -0.09}, "leading", 5, [381, 361]),  # step 20 of 50, of the paper
    ({"guide_at": -0.065}, "leading", 5, [381, 361]), ({"guide_at": -0.05}, "leading", 6, [361, 341]),
    ({"guide_at": -0.09, "lookahead": 1}, "leading", 5, [381]),
    ({"guide_at": -0.09, "lookahead": 3}, "leading", 5, [381, 361, 341]),
    ({"guide_at": -0.418}, "leading", 0, [481, 461]), ({"guide_at": -2.0, "strength": 0.9}, "leading", 0, [881, 861]),
    ({"guide_at": 1.95}, "leading", 23, [21, 1]), ({"guide_at": -0.09, "guide_step": 2}, "leading", 5, [381, 361]),
    ({"guide_at": -0.09}, "trailing", 6, [379, 359])])
def test_a_guided_noise_level_is_the_nearest_step_that_is_run(settings, spacing, place, rollout):
    grid = [(981 if spacing == "leading" else 999) - 20 * k for k in range(50)]
    assert_rolled_out(settings, grid, place, rollout, timestep_spacing=spacing)


def assert_rolled_out(settings, grid, place, rollout, **scheduler):
    """The guided rollout is made once, before the step at `place` of those that are run."""
    prior = ToyPrior(sd_scheduler(**scheduler), slope=0.1)
    prototypes = fit_prototypes(RowRng(0, "t", "p", 0).normals("x", (9, 3)), np.arange(9) % 3, 3, 2, guide_hash="",
                                class_keys=CLASSES.key)
    method = DistDiff(**settings)
    method.expand(batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior, MeanGuide(), prototypes))
    executed = grid[-method.draw("s", 0, 0, 0, CLASSES, None).steps_run:]
    assert prior.called == [*executed[:place], *rollout, *executed[place:]]


@pytest.mark.parametrize("settings", [{}, {"guidance": "direct"}, {"guidance": "random"}], ids=str)
def test_a_noise_level_and_its_step_are_one_setting(tools, settings):
    """Step 4 of 10 begins at timestep 301, where log(a / s) is 0.15."""
    images = []
    for fields in ({"guide_step": 4}, {"guide_at": 0.15}, {"guide_at": 0.15, "guide_step": 9}, {"guide_step": 3}):
        method = DistDiff(steps=10, rho=1.0, **fields, **settings)
        images.append(np.stack(method.expand(batch_of(method, CLASSES, ROWS), tools).images))
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[3])


def test_with_a_noise_level_the_number_of_the_step_is_not_looked_at():
    """What of the way is run is known where the generator is: `validate` refuses a level outside of it."""
    with pytest.raises(ValidationError, match="executes the last 5"):
        DistDiff(steps=10)
    assert DistDiff(steps=10, guide_at=0.1).guide_step == 20
    assert DistDiff(steps=10, guide_at=0.1, guide_step=1, lookahead=2).lookahead == 2


def test_recomputation_and_small_chunks_keep_less(tools):
    batch = batch_of(DistDiff(**QUICK), CLASSES, ROWS)

    def kept(**settings):
        method = DistDiff(**{**QUICK, **settings})
        return references.peak_saved(lambda: method.expand(batch, tools), tools.prior.unet, tools.prior.vae,
                                     tools.guide.model)

    whole = kept()
    assert kept(recompute=True) < 0.5 * whole
    assert kept(guide_batch=2) == pytest.approx(whole / 2, rel=0.05)
    assert kept(guide_batch=1) == pytest.approx(whole / 4, rel=0.05)


# Rows that go wrong --------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_no_number_is_named_and_its_mates_keep_their_bytes():
    prototypes = fit_prototypes(RowRng(0, "t", "p", 0).normals("x", (9, 3)), np.arange(9) % 3, 3, 2, guide_hash="",
                                class_keys=CLASSES.key)
    method = DistDiff(**QUICK)
    batch = batch_of(method, CLASSES, ROWS[:3])
    plain = method.expand(batch, Tools(CLASSES, ToyPrior(sd_scheduler(), 0.1), MeanGuide(), prototypes))
    made = method.expand(batch, Tools(CLASSES, ToyPrior(sd_scheduler(), 0.1), Exploding(row=1), prototypes))
    assert made.reasons == [None, Reason.GUIDANCE_DIVERGED, None]
    assert made.images[1] is None
    for i in (0, 2):
        np.testing.assert_array_equal(made.images[i], plain.images[i])


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "messages"), [
    ({"guide_step": 26}, {"guide_step": "executes the last 25"}),
    ({"strength": 0.2}, {"guide_step": "executes the last 10"}),
    ({"steps": 20, "strength": 0.9}, {"guide_step": "executes the last 18"}),
    ({"guide_step": 1}, {"lookahead": "only 1 steps are left"}),
    ({"guide_step": 3, "lookahead": 4}, {"lookahead": "only 3 steps are left"}),
    ({"guide_step": 26, "rho": -1, "proto_space": "raw", "eps": -0.1},
     {"guide_step": "executes", "rho": "greater than", "proto_space": "'unit'", "eps": "greater than"}),
    ({"strength": 0.01, "lookahead": 0}, {"steps": "runs no step", "lookahead": "greater than"}),
    ({"lambda_c": 0, "lambda_g": 0}, {"lambda_g": "nothing to descend"}),
    ({"guide_batch": 0, "guidance": "both"}, {"guide_batch": "greater than", "guidance": "'direct'"})])
def test_settings_that_cannot_work_are_refused_all_at_once(fields, messages):
    with pytest.raises(ValidationError) as error:
        DistDiff(**fields)
    found = {str(problem["loc"][0]): problem["msg"] for problem in error.value.errors()}
    assert found.keys() == messages.keys()
    assert all(message in found[field] for field, message in messages.items())


def test_defaults_are_those_of_the_paper():
    method = DistDiff()
    assert (method.steps, method.strength, method.guide_step, method.lookahead) == (50, 0.5, 20, 2)
    assert (method.rho, method.eps, method.lambda_g, method.guidance_scale) == (10.0, 0.2, 1.0, 7.5)
    assert method.needs() == {"prior", "guide", "prototypes"}
    assert DistDiff(guidance="random").needs() == {"prior"}
    assert DistDiff(guidance="random", measure=True).needs() == {"prior", "guide", "prototypes"}
    assert DistDiff(guide_step=25, lookahead=25).guide_step == 25
