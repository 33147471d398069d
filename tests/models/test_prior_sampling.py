"""How a method will sample a generator: what is refused, what is told, and what keeps runs apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rayexpand.methods import load_method
from rayexpand.models.prior import inspect_prior
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.prior_files import PriorFacts
from rayexpand.models.prior_sampling import (
    plan_of,
    sampler_revision,
    sampling_notes,
    sampling_problems,
    starting_points,
)
from tests.tiny import tiny_pipeline

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
         "steps_offset": 1}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def facts_with(sound: Path, tmp_path: Path) -> Any:
    """Facts of the folder with another scheduler file, and overrides of its process."""
    def facts(noise: dict[str, Any] | None = None, **process: Any) -> PriorFacts:
        folder = Path(shutil.copytree(sound, tmp_path / "model", dirs_exist_ok=True))
        file = folder / "scheduler/scheduler_config.json"
        settings = json.loads((sound / "scheduler/scheduler_config.json").read_text())
        file.write_text(json.dumps({**settings, **(noise or {})}))
        return inspect_prior(PriorModel(weights=str(folder), process=process))

    return facts


# -------------------------------------------------------------------------------------------------------- the revision


TOKENLESS = {"prompt": "a {name}"}
AS_BEFORE: list[tuple[str, dict[str, Any]]] = [
    ("img2img", {}), ("img2img", {"spacing": "trailing"}), ("text2img", {}), ("gif", {}),
    ("realfake", {"solver": "ddim", "finetuned": False, **TOKENLESS}),
    ("diffmix", {"solver": "ddim", "variant": "real_mix", **TOKENLESS}), ("distdiff", {"lookahead": 1}),
    ("distdiff", {"guidance": "direct"}), ("distdiff", {"guidance": "random"}), ("classical", {})]
OTHERWISE: list[tuple[str, dict[str, Any]]] = [
    ("img2img", {"solver": "dpmpp_2m"}), ("img2img", {"solver": "unipc"}), ("text2img", {"solver": "unipc"}),
    ("realfake", {"finetuned": False, **TOKENLESS}), ("diffmix", {"variant": "real_mix", **TOKENLESS}),
    ("distdiff", {}), ("distdiff", {"lookahead": 3})]


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize(("name", "fields", "revision"),
                         [(*one, 1) for one in AS_BEFORE] + [(*one, 2) for one in OTHERWISE], ids=str)
def test_only_first_order_steps_without_a_deep_gradient_are_as_they_were(
        facts_with: Any, scheduler: str, name: str, fields: dict[str, Any], revision: int) -> None:
    assert sampler_revision(facts_with({"_class_name": scheduler}), load_method(name, fields)) == revision


@pytest.mark.parametrize(("noise", "process"), [
    ({"prediction_type": "v_prediction"}, {}), ({"prediction_type": "sample"}, {}),
    ({"_class_name": "EulerDiscreteScheduler"}, {}), ({"_class_name": "LCMScheduler"}, {}), ({}, {"kappa": 1.0}),
    ({}, {"kappa": "ancestral"}), ({}, {"prediction_type": "v_prediction"}), ({}, {"spacing": "trailing"})], ids=str)
def test_other_weights_are_sampled_otherwise(facts_with: Any, noise: dict[str, Any], process: dict[str, Any]) -> None:
    facts = facts_with(noise, **process)
    assert sampler_revision(facts, load_method("img2img", {})) == 2
    assert sampler_revision(facts, load_method("classical", {})) == 1


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_grid_of_the_files_that_was_not_taken_before_is_another_sampler(facts_with: Any, spacing: str) -> None:
    facts = facts_with({"timestep_spacing": spacing})
    assert sampler_revision(facts, load_method("img2img", {})) == 2
    assert sampler_revision(facts, load_method("gif", {})) == 2
    assert sampler_revision(facts, load_method("img2img", {"spacing": "leading"})) == 1


# ------------------------------------------------------------------------------------------------------ starting points


def test_the_noise_at_the_start_is_known_by_strength(facts_with: Any) -> None:
    facts = facts_with()
    assert starting_points(facts, load_method("img2img", {})) == {"0.5": pytest.approx(-0.418, abs=5e-4)}
    mixed = load_method("diffmix", {"variant": "real_mix", "solver": "ddim", "strengths": [0.9, 0.5], "steps": 50,
                                    **TOKENLESS})
    found = starting_points(facts, mixed)
    assert found == {"0.9": pytest.approx(-2.023, abs=5e-4), "0.5": pytest.approx(-0.418, abs=5e-4)}
    for name, fields in (("text2img", {}), ("classical", {}), ("diffmix", {"variant": "real_gen", **TOKENLESS}),
                         ("realfake", {"finetuned": False, "latent_prior": False, **TOKENLESS})):
        assert starting_points(facts, load_method(name, fields)) == {}


def test_what_is_told_of_the_grid(facts_with: Any) -> None:
    method = load_method("img2img", {})
    assert sampling_notes(facts_with(), method) == [
        "strength 0.5: 25 of 50 steps, from log(a/s) -0.418 (label 481) on the leading grid of DDIMScheduler"]
    assert sampling_notes(facts_with({"timestep_spacing": "trailing"}), method) == [
        "strength 0.5: 25 of 50 steps, from log(a/s) -0.478 (label 499) on the shipped grid of DDIMScheduler"]
    assert sampling_notes(facts_with(), load_method("text2img", {})) == [
        "pure noise: 50 of 50 steps, from log(a/s) -2.574 (label 981) on the leading grid of DDIMScheduler"]
    assert sampling_notes(facts_with(), load_method("classical", {})) == []


def test_consistency_models_are_told_that_their_grid_is_cut(facts_with: Any) -> None:
    facts = facts_with({"_class_name": "LCMScheduler", "original_inference_steps": 50})
    cut, whole = (load_method("img2img", {"steps": 4, "strength": strength}) for strength in (0.5, 1.0))
    assert sampling_notes(facts, cut)[1] == ("strength 0.5 cuts the grid to 2 steps here; the image-to-image pipeline "
                                             "of LCM stretches it and runs all 4")
    assert len(sampling_notes(facts, whole)) == 1


def test_guidance_on_very_few_steps_is_told(facts_with: Any) -> None:
    few, enough = (load_method("distdiff", {"steps": steps, "guide_step": 2}) for steps in (6, 8))
    assert "fewer than 4 steps are executed" in sampling_notes(facts_with(), few)[1]
    assert len(sampling_notes(facts_with(), enough)) == 1


# ------------------------------------------------------------------------------------------------------- guided methods


@pytest.mark.parametrize(("fields", "words"), [
    ({"guide_at": -0.42}, "-0.42 is not on the way that is run, which goes from log(a/s) -0.418 to 3.187"),
    ({"guide_at": 3.2}, "is not on the way that is run"),
    ({"guide_at": 3.1}, "1 steps are left at the nearest step, fewer than lookahead 2"),
    ({"guide_at": -1.0, "guidance": "direct"}, "is not on the way that is run"),
    ({"guide_at": -0.09, "steps": 4}, "which goes from log(a/s) 0.359"),
    ({"guide_at": -0.09}, ""), ({"guide_at": 3.1, "lookahead": 1}, ""), ({"guide_at": -2.0, "strength": 0.9}, ""),
    ({"guide_at": -9.0, "guidance": "random"}, ""),
    ({"guide_at": -0.418}, ""), ({"guide_at": 3.187, "lookahead": 1}, "")], ids=str)  # the ends as they are told
def test_a_guided_step_outside_of_the_way_is_refused(facts_with: Any, fields: dict[str, Any], words: str) -> None:
    problems = sampling_problems(facts_with(), load_method("distdiff", fields))
    assert len(problems) == bool(words)
    assert words in "".join(problems)


def test_guidance_in_the_one_step_from_pure_noise_is_refused(facts_with: Any) -> None:
    facts = facts_with({"timestep_spacing": "trailing"})
    for fields in ({"guide_step": 1, "lookahead": 1}, {"guide_at": -2.6, "lookahead": 1}):
        (problem,) = sampling_problems(facts, load_method("distdiff", {"steps": 1, "strength": 1.0, **fields}))
        assert "the one step runs from pure noise" in problem


@pytest.mark.parametrize(("fields", "refused"), [
    ({"steps": 5}, True), ({"steps": 5, "strength": 1.0}, True), ({"steps": 1, "every": 1}, True),
    ({"steps": 6}, False), ({"steps": 5, "every": 4}, False), ({"steps": 5, "from_step": 2}, False),
    ({"steps": 5, "strength": 0.6}, False), ({"steps": 5, "omega": 0}, False)], ids=str)
def test_entropy_guidance_of_pure_noise_alone_is_refused(facts_with: Any, fields: dict[str, Any],
                                                         refused: bool) -> None:
    """Where the first step has no signal; one of Stable Diffusion has some."""
    method = load_method("practice", fields)
    zero = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    problems = [one for one in sampling_problems(facts_with(zero), method) if "pure noise, where there is no" in one]
    assert len(problems) == refused
    assert [one for one in sampling_problems(facts_with({"timestep_spacing": "trailing"}), method)
            if "pure noise, where there is no" in one] == []


def test_one_step_of_the_leading_grid_from_noise_is_refused_with_a_strength_that_is_null(facts_with: Any) -> None:
    for name in ("practice", "lecf"):
        (problem,) = sampling_problems(facts_with(), load_method(name, {"steps": 1}))
        assert "samples begin as pure noise" in problem


def test_a_noise_level_is_another_step_of_another_grid(facts_with: Any) -> None:
    method = load_method("distdiff", {"guide_at": -0.09})
    steps = {name: plan_of(facts_with(noise), method, 25).nearest(-0.09) for name, noise in (
        ("leading", {}), ("trailing", {"timestep_spacing": "trailing"}))}
    assert steps == {"leading": 20, "trailing": 19}
