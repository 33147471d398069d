"""The noise process of every family against closed forms, published grids and the steps of diffusers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from rayexpand.contract.errors import ModelError
from rayexpand.diffusion import process, sampling
from rayexpand.diffusion.process import Point, Prediction, Process, Schedule
from tests.diffusion.gaussian import STABLE_DIFFUSION
from tests.models.families import FAMILIES, FLOWS

Net = Callable[[torch.Tensor, float], torch.Tensor]


def family(name: str, published: bool = False, **overrides: Any) -> Process:
    """The process of a fixture, from the scheduler file of its published model."""
    if name in FLOWS:
        config: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FLOWS[name][2]}
    else:
        config = {"_class_name": FAMILIES[name].scheduler, **FAMILIES[name].noise}
    return process.process_of(config, overrides, published=published, even_sigmas=name == "flux")


SCHNELL = process.process_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0,
                              "num_train_timesteps": 1000, "use_dynamic_shifting": False}, even_sigmas=True)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def unit(a: float) -> Point:
    return Point(a, math.sqrt(1 - a * a), 0.0)


def flow(sigma: float) -> Point:
    r = math.hypot(1 - sigma, sigma)
    return Point((1 - sigma) / r, sigma / r, 1000 * sigma)


def sigma_of(point: Point) -> float:
    """Of a flow."""
    return point.s / (point.a + point.s)


def u_of(point: Point) -> float:
    return point.s / point.a


# --------------------------------------------------------------------------------------------------------- predictions


def test_flow_by_hand():
    here, there = flow(0.4), flow(0.3)
    assert (here.a, here.s, here.flow_scale) == pytest.approx((0.83205, 0.55470, 0.72111), abs=1e-5)
    p = process.prediction("flow", scalar(0.5), scalar(1.0) / here.flow_scale, here)
    assert (float(p.clean), float(p.noise)) == pytest.approx((0.8, 1.3))
    assert float(there.mix(*p) * there.flow_scale) == pytest.approx(0.95)


def test_v_by_hand():
    p = process.prediction("v_prediction", scalar(0.5), scalar(1.0), Point(0.8, 0.6, 0.0))
    assert (float(p.clean), float(p.noise)) == pytest.approx((0.5, 1.0))


def test_edm_by_hand_and_by_diffusers():
    sigma, data, x, out = 1.5, 0.5, 2.0, 0.5
    z = scalar(x / math.hypot(sigma, data))
    here = Point(data / math.hypot(sigma, data), sigma / math.hypot(sigma, data), 0.25 * math.log(sigma))
    p = process.prediction("minus_v", scalar(out), z, here)
    assert float(z) == pytest.approx(1.264911, abs=1e-6)
    assert (float(p.clean), float(p.noise)) == pytest.approx((0.874342, 1.041886), abs=1e-6)
    assert float(data * p.clean) == pytest.approx(0.437171, abs=1e-6)
    for kind, theirs in (("minus_v", "epsilon"), ("v_prediction", "v_prediction")):
        edm = diffusers.EDMEulerScheduler(sigma_data=data, prediction_type=theirs)
        expected = edm.precondition_outputs(scalar(x), scalar(out), scalar(sigma))
        ours = process.prediction(kind, scalar(out), z, here)
        assert float(data * ours.clean) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "minus_v", "sample", "flow"])
def test_clean_and_noise_make_the_latent_again(kind):
    z, out = torch.randn(2, 4, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for here in (unit(0.9), unit(0.1)):
        torch.testing.assert_close(here.mix(*process.prediction(kind, out, z, here)), z)


@pytest.mark.parametrize(("kind", "clean", "noise"), [
    ("v_prediction", -0.5, 1.0), ("minus_v", 0.5, 1.0), ("sample", 0.5, 1.0), ("flow", 0.5, 1.0)])
def test_at_pure_noise_nothing_is_divided_by_zero(kind, clean, noise):
    out = scalar(noise - clean) if kind == "flow" else scalar(0.5)
    p = process.prediction(kind, out, scalar(1.0), Point(0.0, 1.0, 999.0))
    assert (float(p.clean), float(p.noise)) == pytest.approx((clean, noise))


def test_a_noise_prediction_without_signal_is_refused():
    with pytest.raises(ModelError, match=r"rescale_betas_zero_snr"):
        process.prediction("epsilon", scalar(0.5), scalar(1.0), Point(0.0, 1.0, 999.0))


def test_guidance_may_be_applied_to_the_output():
    z, uncond, cond = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in ("epsilon", "v_prediction", "minus_v", "sample", "flow"):
        low, high = (process.prediction(kind, out, z, unit(0.6)) for out in (uncond, cond))
        guided = process.prediction(kind, uncond + 7 * (cond - uncond), z, unit(0.6))
        for one, w0, w1 in zip(guided, low, high, strict=True):
            torch.testing.assert_close(one, w0 + 7 * (w1 - w0), rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- steps


def plan(solver: str, *points: Point, kappa: tuple[float, ...] = ()) -> Schedule:
    return Schedule(solver, "shipped", points, 0, kappa or (0.0,) * (len(points) - 1))


def predicted(clean: float, z: float, at: Point) -> Prediction:
    return Prediction(scalar(clean), scalar((z - at.a * clean) / at.s))


@pytest.mark.parametrize(("solver", "expected"), [("ddim", 0.949653), ("dpmpp_2m", 0.986001)])
def test_one_step_by_hand(solver, expected):
    before, here, there = Point(0.6, 0.8, 2.0), Point(0.8, 0.6, 1.0), Point(0.9, math.sqrt(0.19), 0.0)
    step = sampling.stepper(plan(solver, before, here, there, process.CLEAN))
    step(scalar(1.0), predicted(0.4, 1.0, before), before, here)
    assert float(step(scalar(1.0), predicted(0.7, 1.0, here), here, there)) == pytest.approx(expected, abs=1e-6)


def test_the_predictor_of_unipc_is_2m():
    """With a prediction that does not change, its corrector does nothing."""
    points = (Point(0.6, 0.8, 2.0), Point(0.8, 0.6, 1.0), Point(0.9, math.sqrt(0.19), 0.0), process.CLEAN)
    ends = []
    for solver in ("dpmpp_2m", "unipc"):
        z, step = scalar(1.0), sampling.stepper(plan(solver, *points))
        for here, there in pairwise(points[:3]):
            z = step(z, predicted(0.7, float(z), here), here, there)
        ends.append(float(z))
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)


def test_an_ancestral_step_by_hand():
    here, there = Point(0.8, 0.6, 1.0), Point(0.9, math.sqrt(0.19), 0.0)
    kappa = process.ancestral_kappa(here, there)
    assert kappa == pytest.approx(0.763538, abs=1e-6)
    step = sampling.stepper(plan("ddim", here, there, process.CLEAN, kappa=(kappa, 0.0)), lambda i: scalar(1.0))
    assert float(step(scalar(1.0), predicted(0.7, 1.0, here), here, there)) == pytest.approx(1.169238, abs=1e-6)


def test_fresh_noise_keeps_the_variance_and_only_its_steps_ask():
    asked: list[int] = []

    def fresh(i: int) -> torch.Tensor:
        asked.append(i)
        return torch.randn(20000, generator=torch.Generator().manual_seed(i + 1))

    shipped = process.schedule(family("sdxlturbo"), "ddim", 4, 3)
    z, step = torch.randn(20000, generator=torch.Generator().manual_seed(0)), sampling.stepper(shipped, fresh)
    for here, there in shipped.steps[:-1]:
        z = step(z, Prediction(torch.zeros(()), z / here.s), here, there)
        assert float(z.std()) == pytest.approx(there.s, rel=0.03)
    step(z, Prediction(z, z), *shipped.steps[-1])
    assert asked == list(shipped.fresh_steps) == [1, 2]


def test_eta_one_of_ddim_is_ancestral():
    points = process.schedule(family("sd", published=True), "ddim", 20).points
    assert process.ancestral_kappa(points[7], points[8]) == pytest.approx(0.54431, abs=1e-5)


# --------------------------------------------------------------------------------------------------------------- grids


def test_grids_of_published_models():
    sd3 = [sigma_of(point) for point in process.schedule(family("sd3"), "ddim", 28).points]
    assert [sd3[i] for i in (0, 1, 2, 10, 26, 27, 28)] == pytest.approx(
        [1, 0.98738, 0.97411, 0.83672, 0.11091, 0.00893, 0], abs=6e-6)
    flux = process.schedule(family("flux"), "ddim", 28, latent=(16, 128, 128)).points
    assert [sigma_of(flux[i]) for i in (1, 13, 27)] == pytest.approx([0.98841, 0.78467, 0.10472], abs=6e-6)
    assert flux[13].label == pytest.approx(784.67, abs=6e-3)
    schnell = process.schedule(SCHNELL, "ddim", 4).points
    assert [sigma_of(point) for point in schnell] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(("side", "mu"), [(256, 0.5), (512, 0.63), (768, 0.84667), (1024, 1.15)])
def test_the_shift_of_flux_follows_the_size(side, mu):
    first = process.schedule(family("flux"), "ddim", 28, latent=(16, side // 8, side // 8)).points[1]
    plain = 27 / 28
    assert sigma_of(first) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / plain - 1), abs=1e-5)


def test_a_flow_whose_grid_follows_the_size_asks_for_it():
    with pytest.raises(ModelError, match="size of the image"):
        process.schedule(family("flux"), "ddim", 28)


def test_grids_of_the_relatives_of_sdxl():
    cosxl = process.schedule(family("cosxl"), "ddim", 20).points
    assert [cosxl[i].label for i in (0, 1, 10, 19)] == pytest.approx([1.1969, 1.0521, -0.2508, -1.5537], abs=5e-5)
    assert [u_of(cosxl[i]) for i in (0, 1, 10, 19, 20)] == pytest.approx([120, 67.2512, 0.3667, 0.002, 0], rel=2e-4)
    sdxl = process.schedule(family("sdxl"), "ddim", 50).points
    assert [point.label for point in sdxl[:-1]] == [981.0 - 20 * i for i in range(50)]
    assert u_of(sdxl[0]) == pytest.approx(13.1204, abs=5e-5)
    playground = process.schedule(family("playground"), "dpmpp_2m", 20).points
    assert u_of(playground[0]) == pytest.approx(160)  # sigma 80 in units of sigma_data 0.5
    assert playground[0].label == pytest.approx(0.25 * math.log(80), abs=1e-5)


@pytest.mark.parametrize(("name", "labels"), [
    ("sdturbo", [999, 749, 499, 249]), ("sdxlturbo", [999, 749, 499, 249]), ("lightning", [999, 749, 499, 249]),
    ("lcm", [999, 759, 499, 259]), ("hyper", [999, 759, 499, 259]), ("sd", [751, 501, 251, 1])])
def test_few_step_grids_are_those_of_the_shipped_scheduler(name, labels):
    points = process.schedule(family(name, published=True), "ddim", 4).points
    assert [point.label for point in points[:-1]] == labels


@pytest.mark.parametrize(("name", "clean"), [
    ("sd", False), ("sd2v", False), ("sdturbo", True), ("lcm", True), ("sdxl", True), ("sdxlturbo", True),
    ("lightning", True), ("hyper", False), ("cosxl", True), ("playground", True), ("sd3", True)])
def test_only_ddim_and_its_kin_end_at_the_first_timestep(name, clean):
    """Files of Euler schedulers carry `set_alpha_to_one: false` too, and their class does not read it."""
    end = process.schedule(family(name, published=True), "ddim", 4).points[-1]
    assert (end == process.CLEAN) is clean
    if not clean:
        assert end.a**2 == pytest.approx(0.99915, abs=1e-6)


@pytest.mark.parametrize(("name", "solver", "spacing"), [
    ("sd", "ddim", "leading"), ("sd", "unipc", "linspace"), ("sd2v", "dpmpp_2m", "linspace"),
    ("sdzsnr", "ddim", "shipped"),
    ("sdturbo", "ddim", "shipped"), ("sdturbo", "unipc", "shipped"), ("lcm", "ddim", "shipped")])
def test_the_grids_of_the_papers_are_those_of_folders_that_ship_ddim_or_pndm(name, solver, spacing):
    """A trailing grid that was shipped wins: a network of few steps has learned no other label."""
    made = process.schedule(family(name, published=True), solver, 10)
    assert made.spacing == spacing
    assert process.schedule(family(name, published=True), solver, 10, spacing="trailing").points[0].label == 999


def test_a_multistep_solver_runs_on_the_shipped_grid_of_another_class():
    multistep, euler = (process.schedule(family("sdxl"), solver, 10) for solver in ("dpmpp_2m", "ddim"))
    assert multistep.points == euler.points
    assert multistep.points[0].label == 901


def test_zero_snr_has_no_signal_at_the_last_timestep():
    first = process.schedule(family("sdzsnr"), "ddim", 10).points[0]
    assert (first.a, first.s, first.label) == (0.0, 1.0, 999.0)
    assert first.log_snr == -math.inf
    euler = process.process_of({"_class_name": "EulerDiscreteScheduler", **FAMILIES["sdzsnr"].noise})
    assert process.schedule(euler, "ddim", 10).points[0].a ** 2 == pytest.approx(5.96e-8, rel=1e-3)


@pytest.mark.parametrize("name", [*FAMILIES, *FLOWS])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_points_are_of_unit_variance_and_descend(name, steps):
    points = process.schedule(family(name), "ddim", steps, latent=(16, 64, 64)).points
    assert len(points) == steps + 1
    for here, there in pairwise(points):
        assert here.a**2 + here.s**2 == pytest.approx(1)
        assert here.log_snr < there.log_snr
        assert here.label > there.label or there is points[-1]


@pytest.mark.parametrize(("spacing", "label", "log_snr"), [
    (None, 481, -0.418), ("karras", 419, -0.215), ("exponential", 249, 0.365), ("beta", 847, -1.86)])
def test_half_of_the_steps_is_another_noise_on_another_grid(spacing, label, log_snr):
    first = process.schedule(family("sdxl"), "ddim", 50, 25, spacing).first
    assert first.label == pytest.approx(label, abs=0.6)
    assert first.log_snr == pytest.approx(log_snr, abs=5e-3)


@pytest.mark.parametrize(("name", "steps", "side", "log_snr"), [
    ("cosxl", 20, 128, 1.00), ("sd3", 28, 128, -1.03), ("flux", 28, 64, -0.63), ("flux", 28, 128, -1.15)])
def test_half_of_the_steps_is_another_noise_in_another_family(name, steps, side, log_snr):
    first = process.schedule(family(name), "ddim", steps, steps // 2, latent=(16, side, side)).first
    assert first.log_snr == pytest.approx(log_snr, abs=5e-3)


@pytest.mark.parametrize(("name", "steps", "side", "left"), [
    ("sd", 50, 64, 20), ("sd3", 28, 128, 8), ("sd3", 50, 128, 14), ("flux", 28, 64, 10), ("flux", 28, 128, 7),
    ("flux", 50, 128, 13)])
def test_the_noise_of_distdiff_lies_at_another_step_of_each_family(name, steps, side, left):
    """M = 20 of 50 on Stable Diffusion is log(a / s) = -0.090, a flow's sigma of 0.522."""
    whole = process.schedule(family(name, published=True), "ddim", steps, latent=(16, side, side))
    assert whole.nearest(-0.090) == left
    if name == "sd":
        assert whole.points[-1 - left].log_snr == pytest.approx(-0.090, abs=5e-4)


# ---------------------------------------------------------------- samplers against those of diffusers, in their frame


def net(z: torch.Tensor, label: float) -> torch.Tensor:
    """An answer that depends on the latent and on the label."""
    return 0.7 * torch.sin(z + label / 500) + 0.3 * z


def noises(count: int) -> list[torch.Tensor]:
    return list(torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(5)))


def ours(made: Schedule, kind: str, z: torch.Tensor, fresh: list[torch.Tensor] | None = None) -> torch.Tensor:
    draws = iter(fresh or [])
    step = sampling.stepper(made, (lambda i: next(draws)) if fresh else None)
    for here, there in made.steps:
        r = here.flow_scale if kind == "flow" else 1.0
        z = step(z, process.prediction(kind, net(r * z, here.label), z, here), here, there)
    return z


def theirs(scheduler: Any, x: torch.Tensor, start: int = 0, **step: Any) -> torch.Tensor:
    """The end of diffusers' own sampler, from `x` in its own frame; its grid is set already."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    for t in scheduler.timesteps[start:]:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(given, float(t)), t, x, **step).prev_sample
    return x


def made_of(kind: Any, config: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers from a file of another class, as users make one."""
    return kind.from_config(dict(config))


def shipped(name: str, **changes: Any) -> Any:
    return made_of(getattr(diffusers, FAMILIES[name].scheduler), FAMILIES[name].noise | changes)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


START = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("start", [0, 9])
@pytest.mark.parametrize("name", ["sdxl", "sdturbo", "lightning"])
def test_first_order_steps_are_those_of_euler(name, start):
    reference = shipped(name)
    reference.set_timesteps(20)
    made = process.schedule(family(name), "ddim", 20, 20 - start)
    assert relative(ours(made, "epsilon", START), theirs(reference, START / made.first.a, start)) < 2e-6


@pytest.mark.parametrize("start", [0, 9])
def test_first_order_steps_are_those_of_euler_without_signal(start):
    """Euler begins at 2^-24 where DDIM begins at nothing."""
    reference = made_of(diffusers.EulerDiscreteScheduler, FAMILIES["sdzsnr"].noise)
    reference.set_timesteps(20)
    made = process.schedule(process.process_of({"_class_name": "EulerDiscreteScheduler",
                                                **FAMILIES["sdzsnr"].noise}), "ddim", 20, 20 - start)
    assert relative(ours(made, "v_prediction", START), theirs(reference, START / made.first.a, start)) < 5e-5


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("name", ["sd", "sd2v", "sdzsnr"])
def test_first_order_steps_are_those_of_ddim(name, start):
    reference = made_of(diffusers.DDIMScheduler, FAMILIES[name].noise)
    reference.set_timesteps(10)
    made = process.schedule(family(name, published=True), "ddim", 10, 10 - start)
    kind = family(name).kind
    assert relative(ours(made, kind, START), theirs(reference, START, start)) < 2e-6


@pytest.mark.parametrize("curve", ["karras", "exponential", "beta"])
def test_curves_lie_between_the_ends_of_the_shipped_grid(curve):
    reference = made_of(diffusers.EulerDiscreteScheduler, FAMILIES["sdxl"].noise | {f"use_{curve}_sigmas": True})
    reference.set_timesteps(12)
    made = process.schedule(family("sdxl"), "ddim", 12, spacing=curve)
    assert relative(ours(made, "epsilon", START), theirs(reference, START / made.first.a)) < 2e-6


@pytest.mark.parametrize("name", ["cosxl", "playground"])
def test_first_order_steps_are_those_of_edm(name):
    reference = made_of(diffusers.EDMEulerScheduler, FAMILIES[name].noise)
    reference.set_timesteps(20)
    made, data = process.schedule(family(name), "ddim", 20), FAMILIES[name].noise["sigma_data"]
    expected = theirs(reference, START * data / made.first.a)
    assert relative(data * ours(made, family(name).kind, START), expected) < 2e-6


def test_the_multistep_solver_of_playground_is_that_of_its_file():
    reference = shipped("playground")
    reference.set_timesteps(20)
    made = process.schedule(family("playground"), "dpmpp_2m", 20)
    expected = theirs(reference, START * 0.5 / made.first.a)
    assert relative(0.5 * ours(made, "minus_v", START), expected) < 2e-6


@pytest.mark.parametrize("name", ["sd3", "schnell"])
def test_first_order_steps_are_those_of_a_flow(name):
    found = SCHNELL if name == "schnell" else family(name)
    reference = made_of(diffusers.FlowMatchEulerDiscreteScheduler, found.config)
    reference.set_timesteps(**({"sigmas": np.linspace(1, 0.05, 20)} if name == "schnell" else
                               {"num_inference_steps": 20}))
    made = process.schedule(found, "ddim", 20, 15)
    x = START * made.first.flow_scale
    assert relative(ours(made, "flow", START), theirs(reference, x, 5)) < 2e-6


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_flow_in_the_unit_frame_is_one_in_its_own(name, solver):
    """A solver sees a and s only, and neither the frame nor its factor: here it runs on y with 1 - sigma and sigma."""
    made = process.schedule(family(name), solver, 12, 10, latent=(16, 64, 64))
    points = tuple(Point(1 - sigma_of(p), sigma_of(p), p.label) for p in made.points)
    step = sampling.stepper(Schedule(solver, made.spacing, points, made.start, made.kappa))
    y = START * made.first.flow_scale
    for here, there in zip(points[made.start:-1], points[made.start + 1:], strict=True):
        out = net(y, here.label)
        y = step(y, Prediction(y - here.s * out, y + here.a * out), here, there)
    assert relative(ours(made, "flow", START), y) < 2e-6


@pytest.mark.parametrize("start", [0, 1])
def test_ancestral_steps_are_those_of_diffusers(start, monkeypatch):
    fresh = noises(8)
    _draw(monkeypatch, "euler_ancestral_discrete", fresh)
    reference = shipped("sdxlturbo")
    reference.set_timesteps(6)
    made = process.schedule(family("sdxlturbo"), "ddim", 6, 6 - start)
    expected = theirs(reference, START / made.first.a, start)
    assert relative(ours(made, "epsilon", START, fresh), expected) < 2e-6


def test_ddim_with_eta_1_is_that_of_diffusers():
    """But for the last step, in which ours takes no noise."""
    fresh = noises(9)
    reference = made_of(diffusers.DDIMScheduler, FAMILIES["sd"].noise)
    reference.set_timesteps(10)
    expected = START
    for t, noise in zip(reference.timesteps, fresh, strict=False):
        expected = reference.step(net(expected, float(t)), t, expected, eta=1.0, variance_noise=noise).prev_sample
    made = process.schedule(family("sd", published=True, kappa="ancestral"), "ddim", 10)
    step, z = sampling.stepper(made, lambda i: fresh[i]), START
    for here, there in made.steps[:-1]:
        z = step(z, process.prediction("epsilon", net(z, here.label), z, here), here, there)
    assert relative(z, expected) < 2e-6


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_consistency_steps_are_those_of_diffusers(steps, to_one, monkeypatch):
    """The last step gives the clean latent, whatever the file says of set_alpha_to_one."""
    fresh = noises(8)
    _draw(monkeypatch, "lcm", fresh)
    reference = shipped("lcm", set_alpha_to_one=to_one)
    reference.set_timesteps(steps)
    made = process.schedule(family("lcm", set_alpha_to_one=to_one), "ddim", steps)
    assert relative(ours(made, "epsilon", START, fresh), theirs(reference, START)) < 2e-6


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_trajectory_steps_are_those_of_diffusers(steps, to_one, monkeypatch):
    """The last step ends at the first timestep, whatever the file says of set_alpha_to_one."""
    fresh = noises(50)
    _draw(monkeypatch, "tcd", fresh)
    reference = shipped("hyper", set_alpha_to_one=to_one)
    reference.set_timesteps(steps)
    made = process.schedule(family("hyper", set_alpha_to_one=to_one), "ddim", steps)
    assert relative(ours(made, "epsilon", START, fresh), theirs(reference, START)) < 3e-5


def _draw(monkeypatch: pytest.MonkeyPatch, module: str, fresh: list[torch.Tensor]) -> None:
    """diffusers' scheduler takes these noises in their order."""
    draws = iter(fresh)
    path = f"diffusers.schedulers.scheduling_{module}.randn_tensor"
    monkeypatch.setattr(path, lambda shape, **_: next(draws))


MULTISTEP: Mapping[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"})}


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize(("spacing", "steps"), [
    ("linspace", 20), ("leading", 10), ("trailing", 16), ("karras", 12), ("exponential", 12), ("beta", 12)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_multistep_solvers_are_those_of_diffusers(solver, spacing, steps, start, kind):
    name, pinned = MULTISTEP[solver]
    grid = ({"timestep_spacing": spacing} if spacing in ("linspace", "leading", "trailing")
            else {f"use_{spacing}_sigmas": True})
    betas = {key: value for key, value in STABLE_DIFFUSION.items() if key != "set_alpha_to_one"}
    reference = getattr(diffusers, name)(**betas, **pinned, **grid, prediction_type=kind)
    reference.set_timesteps(steps)
    made = process.schedule(family("sd", published=True, prediction_type=kind), solver, steps, steps - start, spacing)
    assert relative(ours(made, kind, START), theirs(reference, START, start)) < 2e-6


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("start", [0, 3])
def test_multistep_solvers_start_without_signal(solver, start):
    """diffusers' own begin at the point beside it, with a signal of 2^-24; the trailing grid of zero-SNR weights."""
    name, pinned = MULTISTEP[solver]
    betas = {key: value for key, value in STABLE_DIFFUSION.items() if key != "set_alpha_to_one"}
    reference = getattr(diffusers, name)(**betas, **pinned, timestep_spacing="trailing", rescale_betas_zero_snr=True,
                                         prediction_type="v_prediction")
    reference.set_timesteps(10)
    made = process.schedule(family("sdzsnr"), solver, 10, 10 - start, "trailing")
    z = ours(made, "v_prediction", START)
    assert torch.isfinite(z).all()
    assert relative(z, theirs(reference, START, start)) < 5e-4


def test_overrides_of_the_process_count():
    assert family("sdzsnr", rescale_betas_zero_snr=False).config["rescale_betas_zero_snr"] is False
    assert process.schedule(family("sdzsnr", rescale_betas_zero_snr=False), "ddim", 10).points[0].a > 0.05
    assert family("sd", prediction_type="v_prediction").kind == "v_prediction"
    assert u_of(process.schedule(family("cosxl", sigma_max=80.0), "ddim", 20).points[0]) == pytest.approx(80)
    shifted = process.schedule(family("sd3", shift=1.0), "ddim", 28).points[14]
    assert sigma_of(shifted) < sigma_of(process.schedule(family("sd3"), "ddim", 28).points[14])
    leading = process.schedule(family("sdxl"), "ddim", 4).points[0].label
    assert (leading, process.schedule(family("sdxl", spacing="trailing"), "ddim", 4).points[0].label) == (751, 999)
    assert process.schedule(family("lcm", kappa=0.0), "ddim", 4).kappa == (0.0,) * 4
    assert np.allclose(process.schedule(family("sdxl", kappa=0.5), "ddim", 4).kappa, [0.5, 0.5, 0.5, 0.0])
