"""The timestep grids of the papers, one step against closed forms and diffusers, the loop against an exact prior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler

from rayexpand.contract.errors import ModelError
from rayexpand.contract.schema import ClassTable, Reason
from rayexpand.diffusion import sampling
from tests.diffusion.gaussian import STABLE_DIFFUSION, FakeCond, GaussianPrior, sd_scheduler
from tests.methods.fakes import NoiseStart, batch_of


@pytest.mark.parametrize(("strength", "steps", "run"), [
    (0.5, 50, 25), (0.2, 50, 10), (0.9, 50, 45), (0.8, 50, 40), (0.58, 50, 29), (0.29, 100, 29), (1.0, 50, 50),
    (0.75, 30, 22), (0.1, 25, 2), (0.5, 25, 12), (0.75, 25, 18), (0.9, 25, 22), (0.02, 50, 1)])
def test_steps_run_floors_without_the_float_trap(strength, steps, run):
    assert sampling.steps_run(strength, steps) == run


def test_a_strength_that_runs_no_step_is_refused_with_both_remedies():
    with pytest.raises(ValueError, match=r"strength 0\.03 \* steps 30 .* raise strength to 0\.0333 or steps to 34"):
        sampling.steps_run(0.03, 30)


def test_ddim_leading_grid_and_abar_of_stable_diffusion():
    schedule = sampling.schedule(sd_scheduler(), "ddim", 50)
    assert schedule.timesteps == tuple(981 - 20 * k for k in range(50))
    oracle = {181: 0.782654, 361: 0.488180, 381: 0.455239, 481: 0.302296, 501: 0.274999, 881: 0.017185,
              901: 0.014005, 981: 0.005776}
    for t, abar in oracle.items():
        assert schedule.abar_at(t) == pytest.approx(abar, abs=1e-5)
    assert schedule.abar_at(sampling.FINAL) == pytest.approx(0.99915, abs=1e-6)


@pytest.mark.parametrize(("run", "first"), [(25, 481), (10, 181), (45, 881)])
def test_ddim_start(run, first):
    schedule = sampling.schedule(sd_scheduler(), "ddim", 50, run)
    assert len(schedule.timesteps) == run
    assert schedule.timesteps[0] == first
    assert schedule.pairs[0] == (first, first - 20)
    assert schedule.pairs[-1] == (1, sampling.FINAL)


@pytest.mark.parametrize(("run", "linspace", "signal", "noise", "leading"), [
    (2, 80, 0.9583, 0.2858, 77), (6, 240, 0.8307, 0.5567, 229), (7, 280, 0.7900, 0.6131, 267),
    (12, 480, 0.5511, 0.8344, 457), (17, 679, 0.3098, 0.9508, 647), (18, 719, 0.2676, 0.9635, 685),
    (22, 879, 0.1324, 0.9912, 837), (25, 999, 0.0683, 0.9977, 951)])
def test_dpmpp_grid_of_25_steps(run, linspace, signal, noise, leading):
    schedule = sampling.schedule(sd_scheduler(), "dpmpp_2m", 25, run)
    one, zero = torch.ones(()), torch.zeros(())
    assert schedule.timesteps == tuple(int(np.rint(999 * k / 25)) for k in range(run, 0, -1))
    assert schedule.timesteps[0] == linspace
    assert float(schedule.noise_to(one, zero, linspace)) == pytest.approx(signal, abs=1e-4)
    assert float(schedule.noise_to(zero, one, linspace)) == pytest.approx(noise, abs=1e-4)
    assert sampling.schedule(sd_scheduler(), "dpmpp_2m", 25, run, "leading").timesteps[0] == leading


def test_unipc_grid_of_30_steps():
    schedule = sampling.schedule(sd_scheduler(), "unipc", 30, 22)
    assert schedule.grid[:10] == (999, 966, 932, 899, 866, 832, 799, 766, 733, 699)
    assert schedule.grid[-1] == 33
    assert schedule.timesteps[0] == 733
    assert schedule.abar_at(733) ** 0.5 == pytest.approx(0.2535, abs=1e-4)
    assert sampling.schedule(sd_scheduler(), "unipc", 30, 22, "leading").timesteps[0] == 705


def test_trailing_grid_starts_at_the_last_timestep():
    grid = sampling.schedule(sd_scheduler(), "ddim", 10, spacing="trailing").grid
    assert grid == tuple(range(999, 0, -100))


@pytest.mark.parametrize("config_spacing", ["leading", "trailing", "linspace"])
def test_spacing_of_the_weights_config_never_leaks_in(config_spacing):
    scheduler = sd_scheduler(timestep_spacing=config_spacing)
    assert sampling.schedule(scheduler, "ddim", 50).grid[0] == 981
    assert sampling.schedule(scheduler, "unipc", 30).grid[0] == 999


def test_noise_process_comes_from_the_weights_not_from_a_bare_scheduler():
    assert sampling.schedule(sd_scheduler(steps_offset=0), "ddim", 50).grid[0] == 980
    other = sampling.schedule(sd_scheduler(beta_end=0.02), "ddim", 50)
    assert abs(other.abar_at(481) - 0.302296) > 0.01
    assert sampling.schedule(sd_scheduler(set_alpha_to_one=True), "ddim", 50).final_abar == 1.0
    pndm = sampling.schedule(PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True), "ddim", 50)
    assert pndm.grid[0] == 981
    assert pndm.abar_at(481) == pytest.approx(0.302296, abs=1e-5)


def test_a_scheduler_without_a_usable_noise_process_is_refused():
    with pytest.raises(ModelError, match="rescale_betas_zero_snr"):
        sampling.schedule(sd_scheduler(rescale_betas_zero_snr=True), "ddim", 50)
    from diffusers import FlowMatchEulerDiscreteScheduler
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler has no beta_start"):
        sampling.schedule(FlowMatchEulerDiscreteScheduler(), "ddim", 50)


def test_one_ddim_step_by_hand():
    schedule = sampling.schedule(sd_scheduler(), "ddim", 50)
    z, eps = torch.ones(()), torch.tensor(0.5)
    assert float(schedule.clean_prediction(z, eps, 381)) == pytest.approx(0.93515, abs=1e-5)
    assert float(schedule.ddim_step(z, eps, 381, 361)) == pytest.approx(1.01110, abs=1e-5)


@pytest.mark.parametrize("final_one", [False, True])
def test_ddim_equals_diffusers(final_one):
    reference = sd_scheduler(set_alpha_to_one=final_one)
    reference.set_timesteps(50)
    schedule = sampling.schedule(reference, "ddim", 50, 25)
    z = expected = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t, t_prev in schedule.pairs:
        eps = torch.sin(z)
        z = schedule.ddim_step(z, eps, t, t_prev)
        expected = reference.step(torch.sin(expected), t, expected).prev_sample
        torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("solver", "cls", "pinned"), [
    ("dpmpp_2m", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    ("unipc", UniPCMultistepScheduler, {})])
def test_multistep_equals_diffusers_as_its_pipelines_use_it(solver, cls, pinned):
    prior = GaussianPrior(sd_scheduler())
    reference = cls.from_config(prior.scheduler.config, timestep_spacing="linspace", **pinned)
    reference.set_timesteps(25)
    reference.set_begin_index(7)
    cond = FakeCond(torch.zeros(2, 1, 1))
    z_t = expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for t in reference.timesteps[7:]:
        expected = reference.step(prior.predict(expected, int(t), cond, 0.0), t, expected).prev_sample
    schedule = sampling.schedule(prior.scheduler, solver, 25, 18)
    z = sampling.denoise(prior, z_t, schedule, cond, 0.0)
    torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(z, sampling.denoise(prior, z_t, schedule, cond, 0.0))  # no history left behind


def test_multistep_takes_eps_even_when_the_weights_predict_v():
    z_t, cond = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1)), FakeCond(torch.zeros(1, 1, 1))
    out = [sampling.denoise(prior, z_t, sampling.schedule(prior.scheduler, "dpmpp_2m", 10), cond, 0.0)
           for prior in (GaussianPrior(sd_scheduler(prediction_type=p)) for p in ("epsilon", "v_prediction"))]
    assert torch.equal(*out)


def exact(prior, z_t, abar, abar_end):
    """End of the exact sampling path: the standardised latent is constant."""
    def moments(a):
        return a**0.5 * prior.mean, (a * prior.std**2 + 1 - a) ** 0.5
    (m_t, s_t), (m_0, s_0) = moments(abar), moments(abar_end)
    return m_0 + s_0 * (z_t - m_t) / s_t


def error(solver, steps, first_order=False):
    """Largest distance to the exact path from halfway down to the last grid point before the clean latent."""
    prior, cond = GaussianPrior(sd_scheduler(), std=0.8), FakeCond(torch.zeros(2, 1, 1))
    schedule = sampling.schedule(prior.scheduler, solver, steps, steps // 2)
    step = schedule.ddim_step if first_order else schedule.stepper()
    z = z_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for t, t_prev in schedule.pairs[:-1]:
        z = step(z, prior.predict(z, t, cond, 0.0), t, t_prev)
    expected = exact(prior, z_t, schedule.abar_at(schedule.timesteps[0]), schedule.abar_at(t_prev))
    return float((z - expected).abs().max())


def test_ddim_reaches_the_exact_answer_at_first_order():
    coarse, fine = error("ddim", 20), error("ddim", 160)
    assert fine < 0.03
    assert 5 < coarse / fine < 12


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
def test_multistep_solvers_beat_ddim_on_their_own_grid(solver):
    assert error(solver, 20) < 0.2 * error(solver, 20, first_order=True)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
def test_denoise_asks_once_per_executed_timestep_and_ends_at_the_data(solver):
    prior = GaussianPrior(sd_scheduler())
    schedule = sampling.schedule(prior.scheduler, solver, 50, 40)
    z_t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    z = sampling.denoise(prior, z_t, schedule, FakeCond(torch.zeros(2, 1, 1)), 0.0)
    assert prior.timesteps == list(schedule.timesteps)
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
    schedule = sampling.schedule(sd_scheduler(), "ddim", 50)
    z = torch.ones(1, 1, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(schedule.ddim_step(z, 0.5 * z, 381, 361).sum(), z)
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
