"""The demo with its acceptance numbers, with a third of its optimiser steps; as users meet it, for every method, it
runs by hand (-m study)."""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.methods import load_method, names
from rayexpand.models.tiny import digits
from rayexpand.runs import run as runs
from rayexpand.runs.config import load
from rayexpand.studies import demo
from rayexpand.studies.config import StudyConfig, load_study, parse_study
from rayexpand.studies.demo import ARMS, CONTROL, PLAIN, RANDOM, REPEATED, SAMPLER, UNGUIDED, settings, study_of
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.study import prepare_study
from rayexpand.studies.trials import make_trials
from tests.commands import ROOT, process, rayexpand
from tests.conftest import hashes

# Without those of fine-tuned generators, which the demo does not have.
JOBS = [path for path in sorted((ROOT / "jobs/digits").glob("expand-*.yaml"))
        if "adapter" not in load(path).method.needs()]
CONTROLS = {"img2img": {CONTROL}, "text2img": {CONTROL, PLAIN}, "classical": set(),
            "distdiff": {CONTROL, PLAIN, RANDOM}, "gif": {CONTROL, PLAIN, RANDOM}, "lecf": {CONTROL, PLAIN},
            "diffmix": {CONTROL, PLAIN}, "realguidance": {CONTROL, PLAIN}, "diffcoremix": {CONTROL, PLAIN},
            "vae": {CONTROL, PLAIN}, "practice": {CONTROL, PLAIN, RANDOM},
            **{name: {UNGUIDED, PLAIN, RANDOM} for name in demo.VARIANTS}}
REFUSED = {"dafusion": "no adapter for dafusion"}
FITTED = {"distdiff": {"prototypes"}, "diffcoremix": {"image_features", "thresholds"}, "practice": {"classifier"}}
SHOWN = [name for name in (*names(), *demo.VARIANTS) if name not in REFUSED]


UPDATES = 60  # of the 200 that users get, and one test instead of five: the gates hold all the same


def quick_study(out: Path, method: str = "img2img") -> StudyConfig:
    """The study of the demo with fewer steps and subsets; the arms that no gate asks about take just a few."""
    raw = study_of(out, method).model_dump(mode="json")
    raw |= {"recipe": {**raw["recipe"], "updates": UPDATES, "epochs": 1}, "seeds": raw["seeds"][:2]}
    for arm in raw["arms"]:
        if arm["name"] in (ARMS[1], ARMS[3]):
            arm["recipe"] |= {"updates": 2}
    return parse_study(raw)


def quick_trials(study: Study) -> list[Trial]:
    """Of the controls that repeat the originals it is only asked that they are there."""
    return [replace(one, recipe={**one.recipe, "updates": 2}) if one.control_of else one for one in make_trials(study)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo")
    with (mock.patch("rayexpand.studies.demo.study_of", quick_study),
          mock.patch("rayexpand.studies.demo.make_trials", quick_trials)):
        done = rayexpand("demo", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), out


def test_quick_changes_nothing_but_the_numbers_of_steps_and_subsets(tmp_path: Path) -> None:
    quick, whole = (study(tmp_path).model_dump(mode="json") for study in (quick_study, study_of))
    for study in (quick, whole):
        study.pop("seeds")
        for recipe in (study["recipe"], *(arm["recipe"] for arm in study["arms"])):
            for steps in ("updates", "epochs"):
                recipe.pop(steps, None)

    assert quick == whole


def test_the_embedded_default_meets_its_gates() -> None:
    measured = json.loads((digits.ensure() / "measured.json").read_text())

    assert measured["zero_shot"] >= 0.90
    assert measured["psnr_upright_db"] >= 29
    assert measured["psnr_rotated_db"] >= 27
    assert measured["samples_named_right"] >= 0.95


def test_the_gain_is_there_and_its_controls_are_shown(shown: tuple[dict[str, Any], Path]) -> None:
    result, _ = shown
    means = {name: arm["mean"] for name, arm in result["arms"].items()}

    assert set(means) == set(ARMS)
    assert all(len(arm["accuracies"]) == 2 for arm in result["arms"].values())
    assert result["gain"] >= 0.05
    assert result["gain"] == pytest.approx(means["expanded"] - means["original"])
    assert means["expanded"] >= 0.88
    assert result["controls"]["guide zero-shot"] >= 0.90
    assert result["controls"][CONTROL] < means["expanded"]
    assert set(result["controls"]) == {"guide zero-shot", CONTROL, REPEATED}
    assert result["fit_cpu_seconds"] == {}
    assert "does not show" in result["note"]


def test_its_report_is_one_file_with_the_table(shown: tuple[dict[str, Any], Path]) -> None:
    page = Path(shown[0]["report"]).read_text()

    assert all(arm in page for arm in ARMS)
    assert "guide zero-shot" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    folder = Path(shown[0]["report"]).parent
    links = set(re.findall(r'href="([^"#][^"]*)"', page))
    assert links == {f"runs/expanded-{seed}/report.html" for seed in range(2)}
    assert all((folder / link).exists() for link in links)
    assert page.split('id="samples"')[1].split("</section>")[0].count("<img") == 2 * 10 * 6


def expanded_once_more(out: Path) -> None:
    """The second subset, by a process that learns only the study."""
    study = prepare_study(parse_study({**study_of(out).model_dump(mode="json"), "seeds": [1]}))
    one = {("expanded", 1): study.expansions["expanded", 1]}
    demo._expand(replace(study, expansions=one), lambda *progress: None)
    assert runs.open_run(one["expanded", 1].folder).totals().kept == 100  # type: ignore[union-attr]


def test_the_same_run_again_gives_the_same_hashes(shown: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """In another process, a fork: what a new one makes of the same row is asked where the driver starts one."""
    first = runs.open_run(shown[0]["runs"][1])
    again = multiprocessing.get_context("fork").Process(target=expanded_once_more, args=(tmp_path / "again",))
    again.start()
    again.join()

    assert again.exitcode == 0
    assert hashes(runs.open_run(str(tmp_path / "again/runs/expanded-1"))) == hashes(first)


@pytest.mark.parametrize("method", SHOWN)
def test_every_method_has_a_demo(method: str, tmp_path: Path) -> None:
    study = study_of(tmp_path / "demo", method)
    controls = {arm.name: arm.use for arm in study.arms if arm.name not in ARMS}

    assert [arm.name for arm in study.arms][:4] == list(ARMS)
    assert set(controls) == CONTROLS.get(method, set(controls))
    fits = ["expanded", "random"] if method == "practice" else ["expanded"]  # whose random twin has a guide too
    assert [name for name, one in study.expansions.items() if one.fit] == fits * (method in FITTED)
    assert study.seeds == [0, 1, 2, 3, 4]


def test_each_subset_is_expanded_with_its_own_prototypes(tmp_path: Path) -> None:
    def expanded(name: str, seeds: list[int]) -> list[runs.Run]:
        raw = study_of(tmp_path / name, "distdiff").model_dump(mode="json")
        one = raw["expansions"]["expanded"]
        one["config"]["method"] |= {"ratio": 1, "steps": 3, "guide_step": 2, "measure": False}
        arms = [{"name": "expanded", "use": "expanded"}]
        study = prepare_study(parse_study({**raw, "seeds": seeds, "expansions": {"expanded": one}, "arms": arms}))
        demo._expand(study, lambda *progress: None)
        return [runs.open_run(f"{study.config.folder}/runs/expanded-{seed}") for seed in seeds]

    together, alone = expanded("together", [0, 1]), expanded("alone", [1])

    assert together[0].facts["models"]["prototypes"] != together[1].facts["models"]["prototypes"]
    assert demo._fitted([str(run.folder) for run in together]).keys() == {"prototypes"}
    assert hashes(together[1]) == hashes(alone[0])
    assert [run.totals().kept for run in together] == [20, 20]


@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_needs_a_fine_tuned_generator_is_refused_with_the_remedy(method: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{REFUSED[method]}.*`rayexpand fit`.*artifacts"):
        study_of(tmp_path, method)


def test_a_method_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="distdif"):
        study_of(tmp_path, "distdif")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_the_jobs_for_digits_have_the_settings_of_the_demo(path: Path) -> None:
    job = load(path)
    name = {"mae": "gif-mae", "unclip": "gif-dalle"}.get(getattr(job.method, "generator", ""), job.method.name)
    other = {"lecf": {"ratio": 10}, "expand-grow": {"ratio": 2}}  # half are filtered out; the job grows it
    fields = settings(name, **other.get(path.stem, other.get(name, {})))
    assert name not in demo.VARIANTS or job.prior.weights == demo.VARIANTS[name][1]

    assert job.method == load_method(fields.pop("name"), fields)
    assert job.method.name not in ("img2img", "distdiff", "gif", "practice") or job.sampler.model_dump() == SAMPLER


def test_the_guided_study_has_the_settings_of_the_jobs() -> None:
    study = load_study(ROOT / "jobs/digits/study-guided.yaml")
    made = {name: (one.config or {})["method"] for name, one in study.expansions.items()}

    for name, method in (("img2img", "img2img"), ("distdiff", "distdiff"), ("gif-sd", "gif"),
                         ("randaugment", "classical")):
        expected = settings(method)
        assert {key: made[name].get(key) for key in expected} == expected
    for name, twin in (("distdiff-random", "distdiff"), ("gif-random", "gif-sd")):
        assert made[name].pop("guidance") == "random"
        assert made[name].items() <= made[twin].items()
        assert made[twin].keys() - made[name].keys() <= {"rho", "measure"}
    assert [name for name, one in study.expansions.items() if one.fit] == ["distdiff"]
    assert len(study.seeds) >= 3


@pytest.mark.parametrize(("expansion", "words"), [
    ({"method": {"name": "distdiff"}}, "artifacts.prototypes"),
    ({"method": {"name": "img2img"}, "fit": {}}, "fit: img2img as it is set here needs nothing fitted"),
    ({"method": {"name": "distdiff", "guidance": "random"}, "fit": {}}, "needs nothing fitted"),
    ({"run": "gone", "fit": {}}, "fit: has no effect"),
    ({"method": {"name": "distdiff"}, "fit": {"groups": 0}}, "fit.groups"),
    ({"method": {"name": "distdiff"}, "fit": {"guide": {"kind": "both"}}}, "fit.guide.kind")])
def test_what_an_expansion_cannot_have_fitted(expansion: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare_study(parse_study({
            "name": "s", "out": str(tmp_path), "data": {"source": "digits"},
            "test": {"source": "digits", "split": "test"}, "expansions": {"one": expansion},
            "arms": [{"name": "a", "use": "one"}]}))


@pytest.mark.study
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", SHOWN)
def test_the_demo_of_every_method_as_users_meet_it(method: str, tmp_path: Path) -> None:
    done = process("demo", "--out", tmp_path / "demo", "--method", method, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)

    assert result["method"] == method
    assert CONTROLS.get(method, set()) <= result["controls"].keys()
    assert result["cpu_seconds"] <= 300
    assert set(result["fit_cpu_seconds"]) == FITTED.get(method, set())
    assert result["note"]
    if method in demo.VARIANTS:
        assert result["gain"] >= {"gif-mae": -0.01, "gif-dalle": 0.02}[method]
    if method == "img2img":
        assert result["gain"] >= 0.05
        assert result["arms"]["expanded"]["mean"] >= 0.88
