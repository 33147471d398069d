"""DiffCoRe-Mix: what is asked for, what is asked to stay away, how many, how guided, and the judge it brings."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.protocols import Tools
from rayexpand.contract.rng import PlanRng, RowRng
from rayexpand.contract.schema import ClassTable, Start, spoken_name
from rayexpand.diffusion.process import process_of, schedule
from rayexpand.methods.diffcoremix import PRESETS, DiffCoReMix, without_contradictions
from rayexpand.methods.text2img import Text2Img
from rayexpand.models.latent import StableDiffusionPrior
from rayexpand.models.texts import TextCond
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse, resolved
from rayexpand.runs.plan import make_plan
from tests.methods.conftest import CLASSES
from tests.methods.fakes import batch_of
from tests.methods.test_contract import index_of

BIRDS = ClassTable.of(["011", "n02"], ["011.Rusty_Blackbird", "{odd}_car"], [5, 4], ["bird", "vehicle"],
                      ["blackbird", "car"])
SD: dict[str, object] = {"name": "x", "data": {"source": "digits"}, "method": {"name": "diffcoremix"}}


def drawn(method, copy=0, label=0, classes=BIRDS, attempt=0, seed_id="s"):
    return method.draw(seed_id, label, copy, 0, classes, RowRng(0, "diffcoremix", seed_id, copy, attempt))


# -------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(("name", "said"), [
    ("011.Rusty_Blackbird", "Rusty Blackbird"), ("rain_boot", "rain boot"), ("747-400", "747-400"), ("2. one", "one"),
    ("12.", "")])
def test_numbers_before_a_name_are_not_said(name, said):
    assert spoken_name(name) == said


def test_prompts_say_class_and_scene_and_nothing_is_left_open():
    for preset in PRESETS:
        method = DiffCoReMix(preset=preset)
        found = [drawn(method, copy) for copy in range(300)]
        assert all("Rusty Blackbird" in one.prompt and not re.search(r"[{}]|011|_", one.prompt) for one in found)
        assert {next(c for c in method.contexts if c in one.prompt) for one in found} == {*method.contexts}
        assert {(one.start, one.strength, one.steps_run) for one in found} == {(Start.NOISE, 1.0, 50)}
    assert drawn(DiffCoReMix(strip_numbers=False)).prompt.startswith("a 011.Rusty Blackbird, ")
    assert "a {odd} car, " in drawn(DiffCoReMix(), label=1).prompt, "braces of a name are text"
    paper = DiffCoReMix(prompt="generate {context} to the {name}, a bird object", contexts=["heavy snow"])
    assert drawn(paper).prompt == "generate heavy snow to the Rusty Blackbird, a bird object"


def test_scenes_are_uniform_and_new_in_each_attempt():
    method = DiffCoReMix(preset="official_code")
    counts = Counter(drawn(method, copy).prompt for copy in range(16_000))
    assert len(counts) == 16
    chi = sum((count - 1000) ** 2 / 1000 for count in counts.values())
    assert chi < 37.7, "15 degrees of freedom, one in a thousand"
    assert drawn(method, 3) == drawn(method, 3)
    attempts = [drawn(method, 3, attempt=attempt).prompt for attempt in range(6)]
    assert len(set(attempts)) > 3


@pytest.mark.parametrize(("fields", "words"), [
    ({"prompt": "a bird, {context}"}, "does not say the class"), ({"prompt": "a {nam}, {context}"}, "unknown place"),
    ({"prompt": "a {name}"}, "which it does not have"), ({"contexts": []}, "there are none"),
    ({"contexts": ["in {light}"]}, "no scene"), ({"contexts": [" "]}, "no scene"),
    ({"preset": "code"}, "official_code"),
    ({"guidance_scale": -1}, "greater than or equal to 0"), ({"strength": 0.5}, "strength")])
def test_settings_that_cannot_be_meant(fields, words):
    with pytest.raises(ValidationError, match=words):
        DiffCoReMix(**fields)


def test_a_class_without_the_word_that_a_prompt_asks_for_is_named():
    with pytest.raises(UsageError, match=r"asks for \{metaclass\}, which class 'k' does not have"):
        drawn(DiffCoReMix(preset="official_code"), classes=ClassTable.of(["k"]))
    assert drawn(DiffCoReMix(), classes=ClassTable.of(["k"], ["12."])).prompt.startswith("a 12., "), "no other name"


@pytest.mark.parametrize(("said", "gone"), [
    (("sports car", ""), {"car"}), (("blackbird", "under a cloudless sky"), {"sky"}),
    (("blackbird", "before the skyline of a city"), {"sky", "cityscape"}), (("oak trees", ""), {"tree"}),
    (("a bus", "on paper"), {"bus", "newspaper", "paper texture"} - {"newspaper"}), (("TRAFFIC light", ""),
                                                                                     {"traffic", "traffic lights"}),
    (("cardinal", ""), {"car"}), (("it", "of a"), set()), (("", ""), set()), (("großer Hund", "é"), set())])
def test_terms_that_contradict_class_or_scene_are_left_out(said, gone):
    terms = PRESETS["official_code"]["negatives"]
    assert set(terms) - set(without_contradictions(terms, said)) == gone


def test_the_negative_prompt_never_asks_its_class_away():
    method = DiffCoReMix(preset="official_code")
    for copy in range(60):
        car = drawn(method, copy, label=1)
        assert "car" not in car.negative.split(", ")
        assert "human" in car.negative.split(", ")
        if "sky" in car.prompt:
            assert "sky" not in car.negative.split(", ")
    assert drawn(DiffCoReMix(negatives=[])).negative == ""


# ------------------------------------------------------------------------------------------------------------- guidance


class TwoTexts(StableDiffusionPrior):
    """A prior whose network says (1, 2) for a prompt and (0.5, -1) for its negative prompt."""

    def __init__(self):
        self.guidance, self.process = "cfg", process_of({"_class_name": "DDIMScheduler"})
        self.calls = 0

    def _network(self, z_in, at, texts, pooled, guidance_B):
        self.calls += len(z_in)
        return texts[:, 0, :2, None, None].expand(len(z_in), 2, 1, 1)


@pytest.mark.parametrize(("gamma", "expected"), [(0, (1, 2)), (1, (1.5, 5)), (11, (6.5, 35))])
def test_the_scale_of_guidance_is_one_more_than_gamma(gamma, expected):
    """Equation 4: (1 + gamma) e_c - gamma e_n. The scale 11 in place of gamma 11 would give (6, 32)."""
    prior, z = TwoTexts(), torch.zeros(1, 2, 1, 1)
    positive, negative = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.5, -1.0]]])
    at = type("At", (), {"a": 0.6, "s": 0.8, "label": 1.0, "__iter__": lambda self: iter((0.6, 0.8, 1.0))})()

    def noise(cond):
        return StableDiffusionPrior.predict(prior, z, at, cond).noise.flatten().tolist()

    found = noise(TextCond(positive, negative, torch.tensor([1.0 + gamma])))
    assert found == pytest.approx(expected)
    swapped = noise(TextCond(negative, positive, torch.tensor([1.0 + gamma])))
    assert swapped != pytest.approx(expected)
    if gamma == 11:
        assert noise(TextCond(positive, negative, torch.tensor([11.0]))) == pytest.approx((6, 32))
    if gamma == 0:
        prior.calls = 0
        noise(TextCond(positive, torch.full_like(negative, 99.0), torch.tensor([1.0])))
        assert prior.calls == 1, "the negative prompt is not read"


def test_cosxl_is_sampled_on_its_exponential_levels():
    """50 levels from 120 to 0.002, then 0; log(s / a) of a point is log of its level."""
    config = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0,
              "sigma_schedule": "exponential", "num_train_timesteps": 1000, "prediction_type": "v_prediction",
              "rho": 7.0}
    method = DiffCoReMix(preset="official_code")
    points = schedule(process_of(config), method.solver, method.steps, None, method.spacing).points
    sigmas = np.array([np.exp(-point.log_snr) for point in points[:-1]])
    assert len(sigmas) == 50
    assert points[-1].s == 0
    assert sigmas[[0, 1, 2, -1]] == pytest.approx([120.0, 95.87, 76.59, 0.002], rel=1e-4)
    assert sigmas[1:] / sigmas[:-1] == pytest.approx(0.7989, abs=1e-4)
    assert points[0].label == pytest.approx(0.25 * np.log(120.0), rel=1e-5)


def test_it_is_text_to_image_with_prompts_of_its_own(tools):
    """Byte for byte, from the same streams."""
    method = DiffCoReMix(steps=4, guidance_scale=5.0)
    batch = batch_of(method, CLASSES, [("s", 0, 0), ("s", 0, 1), ("t", 1, 0)])
    plain = Text2Img(steps=4, guidance_scale=5.0, prompt="")
    for image, same in zip(method.expand(batch, tools).images, plain.expand(batch, tools).images, strict=True):
        np.testing.assert_array_equal(image, same)


def test_an_empty_negative_prompt_is_ordinary_guidance(tools):
    with_none, with_terms = (DiffCoReMix(steps=4, negatives=terms) for terms in ((), ("sky", "blurry")))
    rows = [("s", 0, 0), ("t", 1, 0)]
    images = [method.expand(batch_of(method, CLASSES, rows), Tools(CLASSES, prior=tools.prior)).images
              for method in (with_none, with_terms)]
    assert not np.array_equal(images[0][0], images[1][0])


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("ratio", "expected"), [
    (0.1, [1, 1, 4, 6]), (0.5, [5, 8, 20, 34]), (1.0, [10, 16, 41, 68]), (1.5, [15, 24, 61, 102])])
def test_counts_are_floors_of_each_class(ratio, expected):
    sizes = [10, 16, 41, 68]
    index = index_of(np.repeat(np.arange(4) % 3, sizes))  # three classes there: the fourth is counted with the first
    index = type(index)(index.table.set_column(index.table.schema.get_field_index("label"), "label", [
        np.repeat(np.arange(4), sizes).astype(np.int32)]), ClassTable.of(list("abcd"), counts=sizes))
    counts = DiffCoReMix(ratio=ratio).copies(index, PlanRng(0, "diffcoremix"))
    assert np.bincount(index.labels, counts).tolist() == expected
    assert len(index) + int(counts.sum()) == 135 + sum(expected), "rows of real images and samples together"
    chosen = DiffCoReMix(ratio=ratio).copies(index, PlanRng(1, "diffcoremix"))
    assert ratio in (1.0,) or not np.array_equal(chosen, counts), "another random seed, other images"


def test_floors_are_safe_and_smaller_shares_lie_in_larger_ones():
    index = index_of([0] * 100 + [1] * 8144)
    counts = {p: DiffCoReMix(ratio=p).copies(index, PlanRng(0, "diffcoremix")) for p in (0.1, 0.29, 0.5)}
    assert np.bincount(index.labels, counts[0.29])[0] == 29, "int(0.29 * 100) is 28"
    assert (counts[0.1] <= counts[0.29]).all()
    assert (counts[0.29] <= counts[0.5]).all()


# ----------------------------------------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize(("method", "accept", "expected"), [
    ({}, None, ("cosine", "seed", "class", 5, "best")),
    ({"preset": "official_code"}, None, ("cosine", "seed", 0.6, 1, "reject")),
    ({}, {"attempts": 3}, ("cosine", "seed", "class", 3, "best")),
    ({}, {"exhausted": "reject", "to": "class"}, ("cosine", "class", "class", 5, "reject")),
    ({}, {"score": "confidence", "above": 0.5}, ("confidence", "class", 0.5, 5, "best")),
    ({"preset": "official_code"}, {"above": "class", "attempts": 2}, ("cosine", "seed", "class", 2, "reject"))])
def test_a_job_gets_the_judge_of_its_preset(method, accept, expected):
    raw = {**SD, "method": {"name": "diffcoremix", **method}, **({"accept": accept} if accept is not None else {})}
    config = parse(raw)
    found = config.accept
    assert (found.score, found.to, found.above, found.attempts, found.exhausted) == expected
    assert parse(resolved(config)) == config, "as run.json has it"


def test_the_judge_can_be_turned_off_by_the_method_alone():
    off = parse({**SD, "method": {"name": "diffcoremix", "filtration": False}})
    assert off.accept is None
    assert parse(resolved(off)).accept is None
    own = parse({**SD, "method": {"name": "diffcoremix", "filtration": False}, "accept": {"above": 0.5}})
    assert (own.accept.above, own.accept.exhausted) == (0.5, "reject"), "nothing of the preset"
    with pytest.raises(ConfigError, match="accept: null does not turn off the judge that diffcoremix brings"):
        parse({**SD, "accept": None})
    assert parse({**SD, "method": {"name": "text2img"}, "accept": None}).accept is None


def test_what_is_missing_is_said_at_once(image_folder):
    config = parse({**SD, "data": {"source": "imagefolder", "path": str(image_folder)}})
    problems = runs.preflight(config)
    for start in ("prior.weights: missing", "accept.guide.weights: missing", "artifacts.image_features: accept needs",
                  "artifacts.thresholds: accept needs"):
        assert any(one.startswith(start) for one in problems), (start, problems)


def test_a_redraw_has_another_scene_and_the_terms_that_go_with_it(image_folder):
    config = parse({**SD, "data": {"source": "imagefolder", "path": str(image_folder)}, "method": {
        "name": "diffcoremix", "contexts": ["in a clear sky", "on a road"], "negatives": ["sky", "road"]}})
    plan = make_plan(runs.seeds.build_index(config.data), config)
    draws = [draw for unit in plan.units(0) for draw in unit]
    again = [plan.redraw(draw) for draw in draws]
    for one in [*draws, *again]:
        assert one.negative == ("road" if "sky" in one.prompt else "sky")
    changed = sum(one.prompt != other.prompt for one, other in zip(draws, again, strict=True))
    assert 0 < changed < len(draws)
