"""The grids of the papers, one step against closed forms and diffusers, the loop against an exact prior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

from rayexpand.contract.errors import ModelError
from rayexpand.contract.schema import ClassTable, Reason
from rayexpand.diffusion import sampling
from rayexpand.diffusion.process import Prediction, prediction
from tests.diffusion.gaussian import STABLE_DIFFUSION, FakeCond, GaussianPrior, schedule_of, sd_scheduler
from tests.methods.fakes import NoiseStart, batch_of


@pytest.mark.parametrize(("strength", "steps", "run"), [
    (0.5, 50, 25), (0.2, 50, 10), (0.9, 50, 45), (0.8, 50, 40), (0.58, 50, 29), (0.29, 100, 29), (1.0, 50, 50),
    (0.75, 30, 22), (0.1, 25, 2), (0.5, 25, 12), (0.75, 25, 18), (0.9, 25, 22), (0.02, 50, 1)])
def test_steps_run_floors_without_the_float_trap(strength, steps, run):
    assert sampling.steps_run(strength, steps) == run


def test_a_strength_that_runs_no_step_is_refused_with_both_remedies():
    with pytest.raises(ValueError, match=r"strength 0\.03 \* steps 30 .* raise strength to 0\.0333 or steps to 34"):
        sampling.steps_run(0.03, 30)


def labels(plan):
    """Of every point of the grid but the end."""
    return [point.label for point in plan.points[:-1]]


def signals(plan):
    """alpha-bar by label, that of the end under None."""
    return {**{here.label: here.a**2 for here, _ in plan.steps}, None: plan.points[-1].a ** 2}


def test_ddim_leading_grid_and_abar_of_stable_diffusion():
    plan = schedule_of(sd_scheduler(), "ddim", 50)
    assert labels(plan) == [981 - 20 * k for k in range(50)]
    oracle = {181: 0.782654, 361: 0.488180, 381: 0.455239, 481: 0.302296, 501: 0.274999, 881: 0.017185,
              901: 0.014005, 981: 0.005776}
    for t, abar in oracle.items():
        assert signals(plan)[t] == pytest.approx(abar, abs=1e-5)
    assert signals(plan)[None] == pytest.approx(0.99915, abs=1e-6)
    for point in plan.points:
        assert point.a**2 + point.s**2 == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("run", "first"), [(25, 481), (10, 181), (45, 881)])
def test_ddim_start(run, first):
    plan = schedule_of(sd_scheduler(), "ddim", 50, run)
    assert len(plan.steps) == run
    assert plan.first.label == first
    assert [point.label for point in plan.steps[0]] == [first, first - 20]
    assert plan.steps[-1] == (plan.points[-2], plan.points[-1])
    assert plan.points[-2].label == 1


@pytest.mark.parametrize("run", [0, -1, 51])
def test_steps_that_are_not_there_are_refused(run):
    with pytest.raises(ValueError, match=f"cannot run {run} of 50 steps"):
        schedule_of(sd_scheduler(), "ddim", 50, run)


@pytest.mark.parametrize(("run", "linspace", "signal", "noise", "leading"), [
    (2, 80, 0.9583, 0.2858, 77), (6, 240, 0.8307, 0.5567, 229), (7, 280, 0.7900, 0.6131, 267),
    (12, 480, 0.5511, 0.8344, 457), (17, 679, 0.3098, 0.9508, 647), (18, 719, 0.2676, 0.9635, 685),
    (22, 879, 0.1324, 0.9912, 837), (25, 999, 0.0683, 0.9977, 951)])
def test_dpmpp_grid_of_25_steps(run, linspace, signal, noise, leading):
    plan = schedule_of(sd_scheduler(), "dpmpp_2m", 25, run)
    one, zero = torch.ones(()), torch.zeros(())
    assert [here.label for here, _ in plan.steps] == [int(np.rint(999 * k / 25)) for k in range(run, 0, -1)]
    assert plan.first.label == linspace
    assert float(plan.first.mix(one, zero)) == pytest.approx(signal, abs=1e-4)
    assert float(plan.first.mix(zero, one)) == pytest.approx(noise, abs=1e-4)
    assert plan.points[-1][:2] == (1, 0)
    assert schedule_of(sd_scheduler(), "dpmpp_2m", 25, run, "leading").first.label == leading


def test_unipc_grid_of_30_steps():
    plan = schedule_of(sd_scheduler(), "unipc", 30, 22)
    assert labels(plan)[:10] == [999, 966, 932, 899, 866, 832, 799, 766, 733, 699]
    assert labels(plan)[-1] == 33
    assert plan.first.label == 733
    assert plan.first.a == pytest.approx(0.2535, abs=1e-4)
    assert schedule_of(sd_scheduler(), "unipc", 30, 22, "leading").first.label == 705


def test_trailing_grid_starts_at_the_last_timestep():
    assert labels(schedule_of(sd_scheduler(), "ddim", 10, spacing="trailing")) == list(range(999, 0, -100))


@pytest.mark.parametrize("config_spacing", ["leading", "trailing", "linspace"])
def test_spacing_of_the_weights_config_never_leaks_into_a_named_one(config_spacing):
    scheduler = sd_scheduler(timestep_spacing=config_spacing)
    assert labels(schedule_of(scheduler, "ddim", 50, spacing="leading"))[0] == 981
    assert labels(schedule_of(scheduler, "ddim", 50, spacing="trailing"))[0] == 999
    assert labels(schedule_of(scheduler, "unipc", 30, spacing="linspace"))[:2] == [999, 966]


@pytest.mark.parametrize(("solver", "published"), [("ddim", "leading"), ("dpmpp_2m", "linspace"),
                                                   ("unipc", "linspace")])
def test_the_spacing_of_the_weights_is_taken_unless_it_is_the_one_the_papers_replaced(solver, published):
    assert schedule_of(sd_scheduler(), solver, 10).spacing == published
    for own in ("trailing", "linspace"):
        scheduler = sd_scheduler(timestep_spacing=own)
        scheduler.set_timesteps(10)
        plan = schedule_of(scheduler, solver, 10)
        assert plan.spacing == "shipped"
        assert labels(plan) == scheduler.timesteps.tolist()


def test_noise_process_comes_from_the_weights_not_from_a_bare_scheduler():
    assert labels(schedule_of(sd_scheduler(steps_offset=0), "ddim", 50))[0] == 980
    other = schedule_of(sd_scheduler(beta_end=0.02), "ddim", 50)
    assert abs(signals(other)[481] - 0.302296) > 0.01
    assert schedule_of(sd_scheduler(set_alpha_to_one=True), "ddim", 50).points[-1][:2] == (1, 0)
    pndm = schedule_of(PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True), "ddim", 50)
    assert labels(pndm)[0] == 981
    assert signals(pndm)[481] == pytest.approx(0.302296, abs=1e-5)


def test_a_scheduler_without_a_usable_noise_process_is_refused():
    from diffusers import CMStochasticIterativeScheduler

    with pytest.raises(ModelError, match="CMStochasticIterativeScheduler has no beta_start"):
        schedule_of(CMStochasticIterativeScheduler(), "ddim", 10, spacing="leading")


def test_zero_snr_is_refused_for_noise_predictions_and_sampled_for_v():
    """At the last timestep, which is on trailing grids, all is noise: what noise is there says nothing of an image."""
    plan = schedule_of(sd_scheduler(rescale_betas_zero_snr=True), "ddim", 10, spacing="trailing")
    assert plan.first[:2] == (0, 1)
    z, out = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.25)
    with pytest.raises(ModelError, match=r"prior\.process\.rescale_betas_zero_snr: false"):
        prediction("epsilon", out, z, plan.first)
    assert torch.equal(prediction("v_prediction", out, z, plan.first).clean, -out)
    assert torch.equal(prediction("v_prediction", out, z, plan.first).noise, z)


def test_one_ddim_step_by_hand():
    here, there = schedule_of(sd_scheduler(), "ddim", 50, 20).steps[0]
    assert (here.label, there.label) == (381, 361)
    p = prediction("epsilon", torch.tensor(0.5), torch.ones(()), here)
    assert float(p.clean) == pytest.approx(0.93515, abs=1e-5)
    assert float(there.mix(*p)) == pytest.approx(1.01110, abs=1e-5)
    step = sampling.stepper(schedule_of(sd_scheduler(), "ddim", 50, 20))
    assert float(step(torch.ones(()), p, here, there)) == float(there.mix(*p))


@pytest.mark.parametrize("final_one", [False, True])
def test_ddim_equals_diffusers(final_one):
    reference = sd_scheduler(set_alpha_to_one=final_one)
    reference.set_timesteps(50)
    plan = schedule_of(reference, "ddim", 50, 25)
    step = sampling.stepper(plan)
    z = expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for here, there in plan.steps:
        z = step(z, prediction("epsilon", torch.sin(z), z, here), here, there)
        expected = reference.step(torch.sin(expected), int(here.label), expected).prev_sample
        torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("solver", "cls", "pinned"), [
    ("dpmpp_2m", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    ("unipc", UniPCMultistepScheduler, {})])
def test_multistep_equals_diffusers_as_its_pipelines_use_it(solver, cls, pinned):
    prior = GaussianPrior(sd_scheduler())
    reference = cls.from_config(prior.scheduler.config, timestep_spacing="linspace", **pinned)
    reference.set_timesteps(25)
    reference.set_begin_index(7)
    plan, cond = prior.schedule(solver, 25, 18), FakeCond(torch.zeros(2, 1, 1))
    z_t = expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for t, (here, _) in zip(reference.timesteps[7:], plan.steps, strict=True):
        assert int(t) == here.label
        expected = reference.step(prior.predict(expected, here, cond).noise, t, expected).prev_sample
    z = sampling.denoise(prior, z_t, plan, cond)
    torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(z, sampling.denoise(prior, z_t, plan, cond))  # no history left behind


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_solvers_never_ask_what_the_weights_predict(solver):
    z_t, cond = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)), FakeCond(torch.zeros(1, 1, 1))
    out = [sampling.denoise(prior, z_t, prior.schedule(solver, 10), cond)
           for prior in (GaussianPrior(sd_scheduler(prediction_type=p)) for p in ("epsilon", "v_prediction"))]
    assert torch.equal(*out)


def exact(prior, z_t, here, there):
    """End of the exact sampling path: the standardised latent is constant."""
    def moments(point):
        return point.a * prior.mean, (point.a**2 * prior.std**2 + point.s**2) ** 0.5
    (m_t, s_t), (m_0, s_0) = moments(here), moments(there)
    return m_0 + s_0 * (z_t - m_t) / s_t


def error(solver, steps, first_order=False, end=-1):
    """Largest distance to the exact path from halfway down to the last grid point before the clean latent, or to the
    end of another executed step."""
    prior, cond = GaussianPrior(sd_scheduler(), std=0.8), FakeCond(torch.zeros(2, 1, 1))
    plan = prior.schedule(solver, steps, steps // 2)
    step = sampling.stepper(replace(plan, solver="ddim") if first_order else plan)
    z = z_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for here, there in plan.steps[:end]:
        z = step(z, prior.predict(z, here, cond), here, there)
    return float((z - exact(prior, z_t, plan.first, there)).abs().max())


def test_ddim_reaches_the_exact_answer_at_first_order():
    coarse, fine = error("ddim", 20), error("ddim", 160)
    assert fine < 0.03
    assert 5 < coarse / fine < 12


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_multistep_solvers_beat_ddim_on_their_own_grid(solver):
    assert error(solver, 20) < 0.2 * error(solver, 20, first_order=True)


@pytest.mark.parametrize(("solver", "least", "most"), [("ddim", 1.8, 2.4), ("dpmpp_2m", 3.4, 6), ("unipc", 3.4, 10)])
def test_twice_the_steps_are_a_half_or_a_quarter_of_the_error(solver, least, most):
    """From timestep 500 to 250, which lie on both grids."""
    coarse, fine = (error(solver, steps, end=steps // 4) for steps in (40, 80))
    assert least < coarse / fine < most


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_denoise_asks_once_per_executed_timestep_and_ends_at_the_data(solver):
    prior = GaussianPrior(sd_scheduler())
    plan = prior.schedule(solver, 50, 40)
    z_t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    z = sampling.denoise(prior, z_t, plan, FakeCond(torch.zeros(2, 1, 1)))
    assert prior.timesteps == labels(plan)[-40:]
    assert float(z.mean()) == pytest.approx(prior.mean, abs=0.03)
    assert float(z.std()) == pytest.approx(prior.std, abs=0.06)


def test_pixels_survive_both_ways_and_are_clamped_and_rounded():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x_BCHW = sampling.to_tensor([pixels, pixels[::-1]])
    assert x_BCHW.shape == (2, 3, 16, 16)
    assert x_BCHW.dtype == torch.float32
    assert float(x_BCHW.max()) == 1.0
    images, reasons = sampling.to_images(x_BCHW)
    np.testing.assert_array_equal(images[0], pixels)
    assert reasons == [None, None]
    assert images[0].flags.c_contiguous
    (image,), _ = sampling.to_images(torch.tensor([-0.3, 1.7, 0.5]).reshape(1, 3, 1, 1))
    assert image.reshape(-1).tolist() == [0, 255, 128]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_the_slot_with_a_non_finite_pixel_is_refused(value, dtype):
    x_BCHW = torch.full((3, 3, 4, 4), 0.25, dtype=dtype)
    x_BCHW[1, 2, 3, 0] = value
    images, reasons = sampling.to_images(x_BCHW)
    assert reasons == [None, Reason.NAN_LATENT, None]
    assert images[1] is None
    assert images[0].shape == (4, 4, 3)
    np.testing.assert_array_equal(images[0], images[2])


def test_copies_of_a_seed_share_the_latent_and_not_the_noise():
    batch = batch_of(NoiseStart(), ClassTable.of(["a", "b"]), [("s", 0, 0), ("s", 0, 1), ("t", 1, 0)])
    prior = GaussianPrior(sd_scheduler())
    z0_BCHW, noise_BCHW = sampling.encode_batch(prior, batch), sampling.noise_batch(prior, batch)
    assert torch.equal(z0_BCHW[0], z0_BCHW[1])
    assert not torch.equal(z0_BCHW[0], z0_BCHW[2])
    assert not torch.equal(noise_BCHW[0], noise_BCHW[1])
    assert noise_BCHW.dtype == torch.float32
    assert noise_BCHW.shape == (3, *prior.latent_shape(16, 16))


def test_noise_is_moved_to_the_device_of_the_prior():
    prior = GaussianPrior(sd_scheduler())
    prior.device = torch.device("meta")
    batch = batch_of(NoiseStart(), ClassTable.of(["a"]), [("s", 0, 0)])
    assert sampling.noise_batch(prior, batch).device.type == "meta"


def test_steps_are_differentiable():
    here, there = schedule_of(sd_scheduler(), "ddim", 50, 20).steps[0]
    z = torch.ones(1, 1, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(there.mix(*prediction("epsilon", 0.5 * z, z, here)).sum(), z)
    assert float(gradient) == pytest.approx(1.01110, abs=1e-5)


@pytest.mark.parametrize(("rows", "size", "calls"), [
    (5, 2, [([0, 1], 2), ([2, 3], 2), ([4, 0], 1)]), (4, 2, [([0, 1], 2), ([2, 3], 2)]), (3, 3, [([0, 1, 2], 3)]),
    (2, 5, [([0, 1, 0, 1, 0], 2)])])
def test_chunks_have_one_shape_and_count_every_row_once(rows, size, calls):
    assert list(sampling.chunks(rows, size)) == calls
    x = torch.arange(rows)
    assert torch.equal(sampling.in_chunks(lambda chosen: 2 * x[chosen], rows, size), 2 * x)


@pytest.mark.parametrize(("side", "shapes"), [(16, [4]), (256, [4]), (512, [1, 1, 1])])
def test_distinct_seeds_are_visited_once_in_calls_of_a_shape_that_their_number_does_not_change(side, shapes):
    rows = [("s", 0, 0), ("t", 1, 0), ("s", 0, 1), ("u", 1, 0)]
    batch = batch_of(NoiseStart(), ClassTable.of(["a", "b"]), rows, side)
    seen = []

    def mean(x_nCHW, slots):
        seen.append(slots)
        return x_nCHW.mean((1, 2, 3))

    expected = sampling.to_tensor(batch.images).mean((1, 2, 3))
    torch.testing.assert_close(sampling.once_per_seed(batch, mean), expected)
    assert [len(slots) for slots in seen] == shapes
    assert {slot for slots in seen for slot in slots} == {0, 1, 3}


def test_two_images_under_one_seed_id_are_two_seeds():
    batch = batch_of(NoiseStart(), ClassTable.of(["a"]), [("s", 0, 0), ("s", 0, 1)])
    batch = replace(batch, images=(batch.images[0], 255 - batch.images[1]))
    means = sampling.once_per_seed(batch, lambda x_nCHW, slots: x_nCHW.mean((1, 2, 3)))
    assert float(means[0]) == pytest.approx(1 - float(means[1]))


@pytest.mark.parametrize("kappa", [1.0, 0.6])
def test_a_step_takes_its_share_of_fresh_noise_by_the_number_of_the_whole_grid(kappa):
    """Of 10 steps the last 4 are run; the last one ends at the data and takes none."""
    asked, noise = [], torch.full((1, 1, 2, 2), 7.0)
    plan = replace(schedule_of(sd_scheduler(), "ddim", 10, 4), kappa=(kappa,) * 9 + (0.0,))
    step = sampling.stepper(plan, lambda i: (asked.append(i), noise)[1])
    clean, eps = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), -1.0)
    for here, there in plan.steps:
        z = step(torch.full((1, 1, 2, 2), float("nan")), Prediction(clean, eps), here, there)
        mixed = there is not plan.points[-1]
        expected = there.a * 0.5 + there.s * ((1 - kappa**2) ** 0.5 * -1.0 + kappa * 7.0 if mixed else -1.0)
        torch.testing.assert_close(z, torch.full((1, 1, 2, 2), expected))
    assert asked == list(plan.fresh_steps) == [6, 7, 8]
    with pytest.raises(AssertionError, match="fresh noise"):
        sampling.stepper(plan)


def test_fresh_noise_is_that_of_the_row_and_of_the_step():
    batch = batch_of(NoiseStart(), ClassTable.of(["a", "b"]), [("s", 0, 0), ("s", 0, 1), ("t", 1, 0)])
    prior = GaussianPrior(sd_scheduler())
    fresh = sampling.fresh_noise(prior, batch)
    for i in (0, 7):
        for row, rng in enumerate(batch.rngs):
            assert torch.equal(fresh(i)[row], torch.from_numpy(rng.normals(f"step/{i}", (3, 16, 16))))
    assert torch.equal(sampling.fresh_noise(prior, batch, [2, 0, 2])(7), fresh(7)[[2, 0, 2]])
    assert len({row.numpy().tobytes() for i in (0, 7) for row in fresh(i)}) == 6
    assert not torch.equal(fresh(0), sampling.noise_batch(prior, batch))
