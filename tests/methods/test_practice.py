"""Entropy guidance against a literal one-image reference, arithmetic by hand, its identities, costs and settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError

from rayexpand.classifier.classifier import Classifier
from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.protocols import Batch, Calls, Tools
from rayexpand.contract.schema import Reason
from rayexpand.data.seeds import DataConfig, build_index, digits_split
from rayexpand.diffusion import energy
from rayexpand.diffusion.process import Point, Prediction, Schedule, prediction
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import TrainingSet
from rayexpand.methods import load_method
from rayexpand.methods._guided import Guided
from rayexpand.methods.practice import Practice
from rayexpand.models.guides import ClassifierGuide
from rayexpand.models.prior import load_prior
from rayexpand.reports.guided import plain_twin
from rayexpand.studies.demo import settings
from tests.diffusion.gaussian import sd_scheduler
from tests.methods import references
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.references import Exploding, Fixed, MeanGuide, ToyPrior, Watched

torch.set_num_threads(1)
ROWS = [("a", 0, 0), ("b", 1, 0), ("a", 0, 1), ("c", 2, 0)]
QUICK: dict[str, Any] = {"steps": 10, "every": 2, "strength": 0.5}
FROM_NOISE = {"strength": None, "guidance_scale": 2.0}
SCORE = {"convention": "score", "omega": 3.0}


def watched(method: Any, batch: Batch, tools: Tools) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Expansion, and the latents and pixels of its last decode."""
    prior = Watched(tools.prior)
    made = method.expand(batch, replace(tools, prior=prior))
    return made, *prior.decoded[-1]


@pytest.mark.parametrize("settings", [
    {}, SCORE, {"criterion": "loss"}, {**SCORE, "criterion": "loss"}, {**FROM_NOISE, "every": 5},
    {**FROM_NOISE, **SCORE, "from_step": 4}, {"direction": "random"}, {**SCORE, "direction": "random"},
    {**SCORE, "guide_batch": 3}, {"recompute": True}], ids=str)
@pytest.mark.fast_cases(3)
def test_batched_equals_one_image_at_a_time(tools: Tools, settings: dict[str, Any]) -> None:
    method = Practice(**{**QUICK, **settings})
    batch = batch_of(method, CLASSES, ROWS)
    made, latent, pixels = watched(method, batch, tools)
    plain = watched(method.unguided(), batch, tools)[1]
    assert made.reasons == [None] * len(ROWS)
    for i, draw in enumerate(batch.draws):
        one = references.practice(
            references.Sampler(tools.prior, method.steps, method.guidance_scale), tools.guide, batch.images[i],
            draw.prompt, draw.target_label, batch.rngs[i], executed=draw.steps_run,
            from_noise=method.strength is None, guided=range(method.from_step - 1, draw.steps_run, method.every),
            omega=method.omega, unit=method.convention == "unit", loss=method.criterion == "loss",
            random=method.direction == "random")
        torch.testing.assert_close(latent[i : i + 1], one.latent, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pixels[i : i + 1], one.pixels, atol=1e-5, rtol=1e-5)
        assert made.scores[f"{method.criterion}_before"][i] == pytest.approx(one.energy, rel=1e-5)
        assert float((latent[i] - plain[i]).abs().max()) > 1e-3, "a comparison that would see nothing"


@pytest.mark.parametrize("fields", [{"strength": 0.5}, {"strength": None}, {"strength": 0.5, "solver": "dpmpp_2m"},
                                    {"strength": None, "solver": "unipc"}], ids=str)
def test_without_guidance_it_is_the_plain_method_to_the_bit(tools: Tools, fields: dict[str, Any]) -> None:
    """Also where a guidance that may move nothing goes through every guided step."""
    plain = load_method("img2img" if fields["strength"] else "text2img",
                        {"steps": 10, **{name: one for name, one in fields.items() if one is not None}})
    method = Practice(steps=10, every=2, omega=0, **fields)
    batch = batch_of(method, CLASSES, ROWS)
    _, latent, pixels = watched(plain, batch, tools)
    assert batch.draws == batch_of(plain, CLASSES, ROWS).draws
    for one in (method, Practice(steps=10, every=2, omega=1e-30, **fields),
                Practice(steps=10, every=2, omega=1e-30, convention="score", **fields)):
        made, same, same_pixels = watched(one, batch, tools)
        assert torch.equal(same, latent)
        assert torch.equal(same_pixels, pixels)
        assert made.scores.keys() == ({"entropy_before", "entropy_after"} if one.omega else set())


def test_without_guidance_no_guide_is_asked_for() -> None:
    assert Practice().needs() == Practice(direction="random").needs() == {"prior", "guide"}
    assert Practice(omega=0).needs() == {"prior"}
    assert Practice(omega=0, prompt="{caption}").needs() == {"prior", "captions"}
    assert plain_twin(Practice(every=3)) == Practice(every=3, omega=0)


# By hand -------------------------------------------------------------------------------------------------------------


class Halves(ToyPrior):
    """With a network of any kind of output, in any dtype."""

    kind = "epsilon"

    def predict(self, z_t: torch.Tensor, at: Point, cond: Any) -> Prediction:
        self.seen.append(z_t.detach())
        return prediction(self.kind, self.slope * torch.sin(z_t), z_t, at)  # type: ignore[arg-type]


def one_step(fields: dict[str, Any], slope: float = 0.0, seeds: int = 1, **streams: Any) -> tuple[Any, Any, Halves]:
    """Two steps from noise of 2 x 2 images, the first guided; abar is 0.25 and 0.5."""
    scheduler = DDIMScheduler(num_train_timesteps=2, trained_betas=[0.5, 0.5], clip_sample=False)
    prior, method = Halves(scheduler, slope), Practice(**{"steps": 2, "every": 2, **fields})
    batch = batch_of(method, CLASSES, [(f"s{i}", i % 3, 0) for i in range(seeds)], size=2)
    batch = replace(batch, rngs=tuple(Fixed(rng, streams) for rng in batch.rngs))
    made = method.expand(batch, Tools(CLASSES, prior, MeanGuide()))
    return made, prior.seen, prior


NOISE = np.float32([[[0.4, 0.2], [0.3, 0.3]], [[-0.1, 0.1], [0.0, 0.0]], [[0.5, 0.5], [-0.5, -0.1]]])


def test_entropy_and_gradient_by_hand() -> None:
    """Clean is 2 z; its channel means (0.6, 0, 0.2) are the logits. dH/dz is -p_c (ln p_c + H) 2 / 4 at each pixel."""
    p = np.exp([0.6, 0.0, 0.2])
    p /= p.sum()
    entropy = -(p * np.log(p)).sum()
    gradient = torch.from_numpy(-p * (np.log(p) + entropy) / 2).float()[None, :, None, None].expand(1, 3, 2, 2)
    z = torch.from_numpy(NOISE)[None]
    made, seen, _ = one_step({"convention": "score", "omega": 2.0}, noise=NOISE)
    assert made.scores["entropy_before"] == pytest.approx([entropy], rel=1e-5)
    noise = -2 * 0.75**0.5 * gradient  # of a prediction of no noise
    clean = (z - 0.75**0.5 * noise) / 0.5
    torch.testing.assert_close(seen[1], 0.5**0.5 * clean + 0.5**0.5 * noise)
    _, seen, _ = one_step({"omega": 0.1}, noise=NOISE)
    torch.testing.assert_close(seen[1], 0.5**0.5 * (z + 0.1 * z.norm() / gradient.norm() * gradient) / 0.5)
    made, _, _ = one_step({"criterion": "loss"}, noise=NOISE)
    assert made.scores["loss_before"] == pytest.approx([-np.log(p[0])], rel=1e-5)


def test_norms_are_those_of_each_row_and_random_ones_as_long() -> None:
    fields = {"omega": 0.1, "steps": 2}
    back = 0.5 / 0.5**0.5  # from the latent after a step to that before it, where no noise is predicted
    for direction in ("gradient", "random"):
        _, (z, there), _ = one_step({**fields, "direction": direction}, seeds=5)
        share = (back * there - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
        torch.testing.assert_close(share, torch.full((5,), 0.1))
    moved = [one_step({**fields, **SCORE, "direction": direction}, seeds=5)[1][1] - one_step(
        {**fields, **SCORE, "omega": 1e-30}, seeds=5)[1][1] for direction in ("gradient", "random")]
    climbed, drawn = (one.flatten(1) for one in moved)
    torch.testing.assert_close(climbed.norm(dim=1), drawn.norm(dim=1))
    assert (torch.cosine_similarity(climbed, drawn) < 0.99).all()


@pytest.mark.parametrize("convention", ["unit", "score"])
def test_latent_and_prediction_agree_after_guidance(convention: Any) -> None:
    """Solvers that take the latent (dpmpp_2m, unipc) and those that take the prediction alone go on from one place."""
    prior, at, method = Halves(sd_scheduler(), 0.8), Point(0.6, 0.8, 500.0), Practice(convention=convention, omega=0.5)
    batch, z_BCHW = batch_of(method, CLASSES, ROWS), torch.from_numpy(np.random.default_rng(3).standard_normal(
        (4, 3, 4, 4)))
    moved, p = method._guided(batch, Tools(CLASSES, prior, MeanGuide()), Guided(4), z_BCHW, at,
                              prior.embed(ROWS, ROWS, 1.0), 5)
    torch.testing.assert_close(at.mix(*p), moved)
    share = (moved - z_BCHW).flatten(1).norm(dim=1) / z_BCHW.flatten(1).norm(dim=1)
    torch.testing.assert_close(share, torch.full((4,), 0.5 if convention == "unit" else 0.0, dtype=torch.float64))


def test_a_random_direction_belongs_to_row_and_step(tools: Tools) -> None:
    method = Practice(**{**QUICK, "direction": "random"})
    batch = batch_of(method, CLASSES, ROWS)
    drawn = []
    rngs = tuple(_Told(rng, drawn) for rng in batch.rngs)
    first = method.expand(batch, tools).images
    method.expand(replace(batch, rngs=rngs), tools)
    asked = [(rng.seed_id, rng.copy, stream) for rng, stream in drawn if stream.startswith("direction")]
    assert asked == [(seed_id, copy, f"direction/{5 + n}") for n in (0, 2, 4) for seed_id, _, copy in ROWS]
    for image, again in zip(first, method.expand(batch, tools).images, strict=True):
        np.testing.assert_array_equal(image, again)


class _Told:
    def __init__(self, rng: Any, drawn: list[tuple[Any, str]]) -> None:
        self._rng, self._drawn = rng, drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rng, name)

    def normals(self, stream: str, shape: tuple[int, ...]) -> np.ndarray:
        self._drawn.append((self._rng, stream))
        return self._rng.normals(stream, shape)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "minus_v", "sample", "flow"])
@pytest.mark.parametrize("criterion", ["entropy", "loss"])
def test_the_gradient_is_that_of_differences_in_float64(kind: str, criterion: str) -> None:
    """In z_t, through the clean prediction of any kind of network, the decoder and the guide."""
    prior, at = Halves(sd_scheduler(), 0.8), Point(0.6, 0.8, 500.0)
    prior.kind = kind
    method = Practice(criterion=criterion)
    batch, tools = batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior, MeanGuide(scale=2.0))
    z_BCHW = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 3, 4, 4)))
    h_B, g_BCHW, p = method._gradient(batch, tools, z_BCHW, at, prior.embed(ROWS, ROWS, 1.0))
    assert (h_B.dtype, g_BCHW.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(at.mix(*p), z_BCHW)
    for place in ((0, 0, 0, 0), (1, 2, 3, 1), (3, 1, 2, 2)):
        slope = []
        for step in (1e-5, -1e-5):
            moved = z_BCHW.clone()
            moved[place] += step
            clean_BCHW = prior.predict(moved, at, None).clean
            slope.append(float(_height(clean_BCHW, method, batch)[place[0]]))
        assert float(g_BCHW[place]) == pytest.approx((slope[0] - slope[1]) / 2e-5, rel=1e-6, abs=1e-10)


def _height(x_BCHW: torch.Tensor, method: Practice, batch: Batch) -> torch.Tensor:
    """Criterion of images, by numpy."""
    logits = 2.0 * x_BCHW.mean((2, 3)).numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = [draw.target_label for draw in batch.draws]
    return torch.from_numpy(-(p * np.log(p)).sum(1) if method.criterion == "entropy"
                            else -np.log(p[range(len(p)), labels]))


class _FromNoise(Halves):
    """Its grid begins where no signal is left."""

    kind = "v_prediction"

    def schedule(self, *args: Any, **rest: Any) -> Schedule:
        plan = super().schedule(*args, **rest)
        return replace(plan, points=(Point(0.0, 1.0, 999.0), *plan.points[1:]))


def test_a_step_from_pure_noise_is_not_guided() -> None:
    method = Practice(steps=4, every=4)
    batch = batch_of(method, CLASSES, ROWS, size=4)
    tools = Tools(CLASSES, _FromNoise(sd_scheduler(), 0.4), MeanGuide())
    for image, plain in zip(method.expand(batch, tools).images, method.unguided().expand(batch, tools).images,
                            strict=True):
        np.testing.assert_array_equal(image, plain)


# Costs and rows that go wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "predict", "decode", "guide", "graphs"), [
    ({"omega": 0}, 30, 1, 0, 0), ({}, 30, 7, 7, 6), ({"every": 1}, 30, 31, 31, 30), ({"from_step": 11}, 30, 5, 5, 4),
    ({"guide_batch": 3, "every": 10}, 33, 7, 8, 6), ({"strength": 0.5}, 15, 4, 4, 3),
    ({"direction": "random"}, 30, 7, 7, 6)], ids=str)
def test_calls_of_one_batch(settings: dict[str, Any], predict: int, decode: int, guide: int, graphs: int) -> None:
    prior, watched_guide, method = Watched(ToyPrior(sd_scheduler(), slope=0.1)), Watched(MeanGuide()), Practice(
        **settings)
    method.expand(batch_of(method, CLASSES, ROWS), Tools(CLASSES, prior, watched_guide))
    assert (prior.calls["predict"], prior.calls["decode"], watched_guide.calls.get("features", 0)) == (
        predict, decode, guide)
    assert prior.graphs["predict"] == graphs
    if method.guide_batch is None:
        plain = Calls(steps=predict, decodes=1)
        assert method.calls(plain, 4) == plain + Calls(steps_back=graphs, decodes=graphs, decodes_back=graphs)


def test_recomputation_and_small_chunks_keep_less(tools: Tools) -> None:
    batch = batch_of(Practice(**QUICK), CLASSES, ROWS)

    def kept(**settings: Any) -> int:
        method = Practice(**{**QUICK, **settings})
        return references.peak_saved(lambda: method.expand(batch, tools), tools.prior.unet, tools.prior.vae,
                                     tools.guide.model)

    whole = kept()
    assert kept(recompute=True) < 0.7 * whole
    assert kept(guide_batch=2) == pytest.approx(whole / 2, rel=0.05)


@pytest.mark.parametrize("settings", [{}, SCORE, {"direction": "random"}], ids=str)
def test_a_gradient_that_is_no_number_is_named_and_its_mates_keep_their_bytes(settings: dict[str, Any]) -> None:
    method = Practice(**{**QUICK, **settings})
    batch = batch_of(method, CLASSES, ROWS[:3])
    plain = method.expand(batch, Tools(CLASSES, ToyPrior(sd_scheduler(), 0.1), MeanGuide()))
    made = method.expand(batch, Tools(CLASSES, ToyPrior(sd_scheduler(), 0.1), Exploding(row=1)))
    assert made.reasons == [None, Reason.GUIDANCE_DIVERGED, None]
    assert made.images[1] is None
    for i in (0, 2):
        np.testing.assert_array_equal(made.images[i], plain.images[i])


def test_a_gradient_of_zeros_moves_nothing() -> None:
    """A guide that says the same of every image."""
    method = Practice(**QUICK)
    batch = batch_of(method, CLASSES, ROWS)
    tools = Tools(CLASSES, ToyPrior(sd_scheduler(), 0.1), MeanGuide(scale=0.0))
    made, plain = method.expand(batch, tools), method.unguided().expand(batch, tools)
    assert made.reasons == [None] * len(ROWS)
    for image, same in zip(made.images, plain.images, strict=True):
        np.testing.assert_array_equal(image, same)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "messages"), [
    ({"from_step": 31}, {"from_step": "30 steps are run"}),
    ({"strength": 0.5, "from_step": 16}, {"from_step": "15 steps are run"}),
    ({"strength": 0.01, "every": 0}, {"steps": "runs no step", "every": "greater than"}),
    ({"omega": -1, "convention": "paper", "criterion": "variance", "direction": "none"},
     {"omega": "greater than", "convention": "'unit'", "criterion": "'loss'", "direction": "'random'"}),
    ({"omega": float("inf")}, {"omega": "finite"})])
def test_settings_that_cannot_work_are_refused_all_at_once(fields: dict[str, Any], messages: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as error:
        Practice(**fields)
    found = {str(problem["loc"][0]): problem["msg"] for problem in error.value.errors()}
    assert found.keys() == messages.keys()
    assert all(message in found[field] for field, message in messages.items())


# On digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digit_tools() -> Tools:
    """The embedded generator, and a classifier that has learned a little of two digits per class."""
    data = DataConfig(source="digits", per_class=2)
    index, recipe = build_index(data), make_recipe({"preset": "digits", "updates": 30})
    feed = Loader(TrainingSet.of_seeds(index, data), recipe, 0)
    classifier = Classifier(recipe, 10, 0, feed.total_steps, device=torch.device("cpu"))
    for batch in feed.batches(0, feed.total_steps):
        classifier.update(batch)
    return Tools(index.classes, load_prior("digits", device="cpu"),
                 ClassifierGuide(classifier.module, recipe, torch.device("cpu")))


@pytest.mark.slow
def test_the_entropy_of_digits_rises_with_omega_and_not_by_chance(digit_tools: Tools) -> None:
    images, labels = digits_split()["seeds"]
    seeds = [int(np.flatnonzero(labels == label)[0]) for label in range(10)]
    entropies, judge = [], digit_tools.guide
    for fields in ({"omega": 0}, {"omega": 4}, {"omega": 16}, {"direction": "random"}):
        method = load_method("practice", {**settings("practice"), **fields})
        batch = replace(batch_of(method, digit_tools.classes, [(f"digit {i}", int(labels[i]), 0) for i in seeds]),
                        images=tuple(images[seeds]))
        made = np.stack(method.expand(batch, digit_tools).images)  # type: ignore[arg-type]
        with torch.no_grad():
            entropies.append(energy.entropy(judge.logits(torch.from_numpy(made).permute(0, 3, 1, 2) / 255)).numpy())
    plain, some, much, drawn = entropies
    assert plain.mean() + 0.1 < some.mean() < much.mean() - 0.05
    assert (much > plain).mean() > 0.9
    assert abs(drawn.mean() - plain.mean()) < 0.2 * (much.mean() - plain.mean())
