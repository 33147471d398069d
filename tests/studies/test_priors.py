"""Generators that a study trains itself: which are made, what is sampled from them, what is refused before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.contract.settings import differences, digest
from rayexpand.data.seeds import DataConfig
from rayexpand.fitting.config import FitConfig
from rayexpand.models import cost
from rayexpand.models.prior import inspect_prior
from rayexpand.runs import amounts
from rayexpand.runs import run as runs
from rayexpand.studies import sample_scores
from rayexpand.studies.config import load_study, parse_study, run_config
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.priors import PriorFit
from rayexpand.studies.sample_scores import gflop_per_image
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trials import make_trials
from tests.commands import ROOT
from tests.models.tiny.test_pretrain import TINY, ZERO_SNR
from tests.studies.test_study import expanded, raw_study
from tests.tiny import tiny_pipeline

POOL = {"source": "digits", "split": "pool", "per_class": 2}
PRIOR: dict[str, Any] = {**TINY, "data": POOL}
METHOD = {"name": "text2img", "ratio": 2, "prompt": "a photo of a {name}", "steps": 8, "guidance_scale": 1}


def raw(out: Path, expansions: dict[str, Any], **changes: Any) -> dict[str, Any]:
    arms = [{"name": "original"}, *({"name": name, "use": name} for name in expansions)]
    return raw_study(out, expansions=expansions, arms=arms, **changes)


def made(section: dict[str, Any], method: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"method": {**METHOD, **(method or {})}, "fit": {"pretrain": section}, **fields}


class Fit:
    """Makes a folder with random weights for each section, and keeps what it was asked for."""

    def __init__(self, out: Path) -> None:
        self.tasks: list[FitConfig] = []
        self._out = out

    def __call__(self, task: FitConfig, progress: Any) -> dict[str, Path]:
        self.tasks.append(task)
        folder = self._out / digest([task.fit.pretrain.model_dump(mode="json"), task.seed])[:8]
        if not folder.is_dir():
            tiny_pipeline(folder / "pipeline")
        return {"prior": folder}


def test_arms_with_one_section_share_a_generator(tmp_path: Path) -> None:
    """Two guidance scales of one generator, and one of another size. The guide stays that of the run."""
    unet = {**TINY["unet"], "channels": [16, 16]}
    study = prepare_study(parse_study(raw(tmp_path, {
        "plain": made(PRIOR), "guided": made(PRIOR, {"guidance_scale": 3}), "other": made({**PRIOR, "unet": unet})},
        seeds=[0])))
    fit = Fit(tmp_path / "made")
    found = {run.config.name: run.config for run in pending_runs(study, fit=fit)}

    assert found["plain-0"].prior.weights == found["guided-0"].prior.weights != found["other-0"].prior.weights
    assert {config.guide.weights for config in found.values()} == {"digits"}
    assert {task.out for task in fit.tasks} == {f"{tmp_path}/small/artifacts"}
    assert {(task.data.split, task.data.per_class) for task in fit.tasks} == {("pool", 2)}
    assert fit.tasks[0].fit == fit.tasks[1].fit
    assert fit.tasks[2].fit.pretrain.unet.channels == (16, 16)


def test_each_repetition_trains_its_own_where_that_is_said(tmp_path: Path) -> None:
    study = prepare_study(parse_study(raw(tmp_path, {
        "same": made({**PRIOR, "seed": 7}), "own": made({**PRIOR, "seed": None})}, seeds=[3, 4])))
    fit = Fit(tmp_path / "made")
    found = {run.config.name: run.config.prior.weights for run in pending_runs(study, fit=fit)}

    assert [(task.name, task.seed) for task in fit.tasks] == [("same-3", 7), ("same-4", 7), ("own-3", 3), ("own-4", 4)]
    assert found["same-3"] == found["same-4"]
    assert found["own-3"] != found["own-4"]


def test_a_generator_is_trained_and_sampled_and_paid_for(tmp_path: Path) -> None:
    """One of zero terminal SNR, in two steps, which the embedded default would be refused."""
    study = expanded(raw(tmp_path, {"few": made({**PRIOR, "unet": ZERO_SNR}, {"steps": 2, "ratio": 1})}, seeds=[0]))
    run = runs.open_run(f"{tmp_path}/small/runs/few-0")

    assert run.totals().kept == 20
    assert Path(run.config.prior.weights).parent.parent == tmp_path / "small/artifacts"
    assert inspect_prior(run.config.prior).ends_in_noise
    fitting = {one.arm: one.fitting_seconds for one in make_trials(study)}
    assert fitting["few"] > 0 == fitting["original"]
    assert list(pending_runs(prepare_study(study.config))) == []


def test_the_arithmetic_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance calls the network twice in each of eight steps, and two steps are a quarter of them."""
    counted = replace(cost.SD1, side=16)
    monkeypatch.setattr(sample_scores, "cost_of_run", lambda config: counted)
    monkeypatch.setattr(amounts, "cost_of_run", lambda config: counted)
    expansions = {"plain": made(PRIOR), "guided": made(PRIOR, {"guidance_scale": 3}),
                  "none": {"method": {"name": "classical", "ratio": 2}}}
    study = prepare_study(parse_study(raw(tmp_path, expansions, seeds=[0])))
    found = {run.config.name: gflop_per_image(run) for run in pending_runs(study, fit=Fit(tmp_path / "made"))}

    network, decode = (1000 * one.at(16) for one in (counted.network, counted.decode))
    assert found == {"plain-0": pytest.approx(8 * network + decode), "guided-0": pytest.approx(16 * network + decode),
                     "none-0": 0.0}


@pytest.mark.parametrize(("expansion", "problem"), [
    ({"method": {"name": "classical"}, "fit": {"pretrain": PRIOR}},
     "fit.pretrain: classical samples without a generator; take it out"),
    (made(PRIOR, prior={"weights": "digits"}), "prior.weights: digits would not be read"),
    (made({**PRIOR, "unet": {**ZERO_SNR, "prediction_type": "epsilon"}}), "fit.pretrain.unet.prediction_type: epsilon"),
    (made({**PRIOR, "captions": ["an image"]}), "fit.pretrain.captions: "),
    (made({**PRIOR, "data": {"source": "imagefolder"}}), "fit.pretrain.data.path: missing"),
    (made(PRIOR, {"steps": 2}), "method.steps: 2 of 2 steps on the leading grid begin"),
    (made(PRIOR, image={"size": 12}), "image.size: an image of 12 px does not fit")])
def test_what_a_generator_to_come_would_not_do_is_refused_now(
        tmp_path: Path, expansion: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_study(parse_study(raw(tmp_path, {"e": expansion})))
    assert [line for line in caught.value.problems if line.startswith(f"expansions.e.{problem}")], caught.value.problems


def test_what_only_the_generator_to_come_does_is_no_mistake(tmp_path: Path) -> None:
    """24 pixels and two trailing steps, of which the embedded default could do neither without a word."""
    unet = {**ZERO_SNR, "channels": [16, 16, 16], "attention": [2]}
    prepare_study(parse_study(raw(tmp_path, {"e": made({**PRIOR, "size": 24, "unet": unet}, {"steps": 2})})))


def test_a_dataset_of_ones_own_needs_no_other_generator_named(tmp_path: Path, image_folder: Path) -> None:
    """prior.weights is missing, and is what fit.pretrain makes."""
    own = {"source": "imagefolder", "path": str(image_folder)}
    config = parse_study(raw(tmp_path, {"e": made({**PRIOR, "data": own})}, data=own, test=own,
                             subset={"kind": "full"}))
    with pytest.raises(UsageError, match="test: 20 of its images are training images of seed 0"):
        prepare_study(config)


@pytest.mark.parametrize("section", ["test", "validation", "extra_tests.other"])
def test_a_generator_trained_on_test_images_is_refused(tmp_path: Path, section: str) -> None:
    """Its data would be digits of the pool and of the test part alike."""
    tested = {"source": "digits", "split": "pool", "per_class": 1}
    name, _, inner = section.partition(".")
    config = parse_study(raw(tmp_path, {"e": made(PRIOR)}, **{name: {inner: {"data": tested}} if inner else tested}))
    with pytest.raises(UsageError, match=rf"{section}: \d+ of its images are training images of the generator of "
                                         "expansion e"):
        prepare_study(config)


def test_the_job_compares_generators_at_one_plan() -> None:
    """Each differs from the first in one thing; all have the same scales, and each of these is trained on twice."""
    config = load_study(ROOT / "jobs/digits/study-priors.yaml")
    priors: dict[str, list[float]] = {}
    plans, first = set(), PriorFit(data=DataConfig(source="digits", split="pool"), samples=0).model_dump()
    for name, one in config.expansions.items():
        assert one.fit is not None
        assert one.fit.pretrain is not None
        section = one.fit.pretrain.model_dump()
        method = run_config(config, name, one, 0, config.data).method.model_dump()
        priors.setdefault(str(differences(first, section)), []).append(method.pop("guidance_scale"))
        plans.add(str(method | {"steps": None}))
        assert [arm.real for arm in config.arms if arm.use == name] == [1, 0]
    assert len(plans) == 1
    assert all(scales == [1, 3, 7.5] for scales in priors.values())
    assert sorted(priors) == sorted(str(changes) for changes in (
        [], ["seed: 0 -> 1"], ["unet.prediction_type: 'v_prediction' -> 'epsilon'"],
        ["unet.rescale_betas_zero_snr: '(absent)' -> True", "unet.spacing: '(absent)' -> 'trailing'"],
        ["unet.channels: (32, 64) -> (16, 32)"]))
