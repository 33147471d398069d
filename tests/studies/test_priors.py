"""Generators that a study trains itself: which are made, what is sampled from them, what is refused before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.fitting.config import FitConfig
from rayexpand.runs import run as runs
from rayexpand.studies.config import parse_study
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trials import make_trials
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


def test_arms_with_one_section_share_a_generator(tmp_path: Path) -> None:
    """Two guidance scales of one generator and a third one of zero terminal SNR, which samples in two steps."""
    study = expanded(raw(tmp_path, {
        "plain": made(PRIOR), "guided": made(PRIOR, {"guidance_scale": 3}),
        "few": made({**PRIOR, "unet": ZERO_SNR}, {"steps": 2})}, seeds=[0]))
    found = {name: runs.open_run(study.expansions[name, 0].folder) for name in ("plain", "guided", "few")}  # type: ignore[union-attr]
    weights = {name: run.config.prior.weights for name, run in found.items()}

    assert weights["plain"] == weights["guided"] != weights["few"]
    assert all(Path(one).parent.parent == tmp_path / "small/artifacts" for one in weights.values())
    assert {run.config.guide.weights for run in found.values()} == {"digits"}
    assert {run.totals().kept for run in found.values()} == {40}
    fitting = {one.arm: one.fitting_seconds for one in make_trials(study) if not one.control_of}
    assert fitting["original"] == 0
    assert fitting["plain"] == fitting["guided"] > 0
    assert len([*Path(tmp_path, "small/artifacts").glob("prior-*[0-9a-f]/pipeline")]) == 2
    assert list(pending_runs(prepare_study(study.config))) == []


def test_each_repetition_trains_its_own_where_that_is_said(tmp_path: Path) -> None:
    tasks: list[FitConfig] = []
    pipeline = tiny_pipeline(tmp_path / "made/pipeline")

    def fit(task: FitConfig, progress: Any) -> dict[str, Path]:
        tasks.append(task)
        return {"prior": pipeline.parent}

    study = prepare_study(parse_study(raw(tmp_path, {
        "same": made({**PRIOR, "seed": 7}), "own": made({**PRIOR, "seed": None})}, seeds=[3, 4])))
    found = list(pending_runs(study, fit=fit))

    assert [(task.name, task.seed) for task in tasks] == [("same-3", 7), ("same-4", 7), ("own-3", 3), ("own-4", 4)]
    assert {task.out for task in tasks} == {f"{tmp_path}/small/artifacts"}
    assert {(task.data.split, task.data.per_class) for task in tasks} == {("pool", 2)}
    assert {task.fit.pretrain.unet.steps for task in tasks} == {TINY["unet"]["steps"]}
    assert {run.config.prior.weights for run in found} == {str(pipeline)}


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
