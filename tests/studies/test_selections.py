"""Decisions that a study makes itself, and captions that it fits itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayexpand.contract.errors import ConfigError, DigestMismatch
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.loader.training_set import TrainingSet
from rayexpand.studies.config import parse_study, study_preflight
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.parts import Study
from rayexpand.studies.selections import make_selections
from rayexpand.studies.study import prepare_study
from rayexpand.studies.sweep.config import identity, parse_sweep, study_with
from rayexpand.studies.trials import make_trials
from tests.studies.test_study import expanded, raw_study

RULES = {"few": {"rule": {"kind": "random", "n": 1}}, "more": {"rule": {"kind": "random", "n": 2}}}
ARMS = [{"name": "all", "use": "flips", "control": False},
        *({"name": name, "use": "flips", "selection": name, "control": False} for name in RULES)]


def problems_of(raw: dict[str, Any]) -> list[str]:
    try:
        return study_preflight(parse_study(raw))
    except ConfigError as error:
        return list(error.problems)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = expanded(raw_study(tmp_path_factory.mktemp("study"), arms=ARMS, selections=RULES))
    make_selections(made)
    return made


def test_one_expansion_is_trained_on_at_several_decisions(study: Study) -> None:
    root = Path(study.files.root)
    sizes = {(one.arm, one.seed): len(TrainingSet.load(root / one.rows)) for one in make_trials(study)}
    assert sizes == {(arm, seed): 20 + kept for arm, kept in (("all", 60), ("few", 20), ("more", 40))
                     for seed in (0, 1)}


def test_a_decision_is_made_once_and_not_changed(study: Study) -> None:
    files = sorted(Path(study.files.root).glob("runs/*/selections/*.parquet"))
    before = [file.stat().st_mtime_ns for file in files]
    make_selections(study)

    assert [file.stem for file in files] == ["few", "more"] * 2
    assert [file.stat().st_mtime_ns for file in files] == before
    other = raw_study(study.config.out, arms=ARMS, selections={**RULES, "few": {"rule": {"kind": "random", "n": 3}}})
    with pytest.raises(DigestMismatch, match=r"few\.parquet is another decision"):
        make_selections(prepare_study(parse_study(other)))


def test_runs_that_exist_are_decided_about_too(study: Study, tmp_path: Path) -> None:
    arms = [{"name": "late", "use": "flips", "selection": "late", "control": False}]
    raw = raw_study(tmp_path, arms=arms, selections={"late": RULES["few"]},
                    expansions={"flips": {"run": f"{study.config.folder}/runs/flips-{{seed}}"}})
    other = prepare_study(parse_study(raw))
    make_selections(other)
    assert [one.ratio for one in make_trials(other)] == [1.0, 1.0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"selections": {"few": {"rule": {"kind": "randon", "n": 1}}}}, "selections.few.rule.kind: 'randon' is unknown"),
    ({"selections": {"few": {"rule": {"kind": "random"}, "run": "x"}}}, "selections.few: run come from the study"),
    ({"selections": {"few": {}}}, "selections.few.rule.kind: is missing"),
    ({"selections": RULES, "arms": ARMS[:2]}, "selections.more: no arm asks for it"),
    ({"selections": {"few": {"rule": {"kind": "random", "n": 1}, "gide": 1}}}, "selections.few.gide: unknown field"),
    ({"selections": {"few": {"rule": {"kind": "clip_confidence", "threshold": 0.5}}},
      "data": {"source": "imagefolder", "path": "."}},
     "selections.few.guide.weights: missing; the embedded default has seen digits only")])
def test_what_cannot_be_decided_is_refused_before_anything_starts(tmp_path: Path, changes: dict[str, Any],
                                                                  message: str) -> None:
    found = problems_of(raw_study(tmp_path, **{"arms": ARMS[:2], **changes}))
    assert any(line.startswith(message) for line in found), found


def test_a_study_without_them_is_written_as_it_was(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, expansions={"flips": {"method": {"name": "distdiff"}, "fit": {}}})
    written = parse_study(raw).model_dump(mode="json")
    assert "selections" not in written
    assert "captions" not in written["expansions"]["flips"]["fit"]


def test_a_sweep_makes_the_decision_of_its_arm_and_knows_it(tmp_path: Path) -> None:
    raw = {key: value for key, value in raw_study(tmp_path, arms=ARMS, selections=RULES).items()
           if key not in ("name", "out")}
    found = {}
    for n in (1, 2):
        raw["selections"] = {"few": {"rule": {"kind": "random", "n": n}}, "more": RULES["more"]}
        config = parse_sweep({"name": "s", "out": str(tmp_path), "study": raw, "arm": "few", "metric": "top1",
                              "space": {"recipe.lr": {"grid": [0.1, 0.2]}}, "search": "grid",
                              "score_on": "test"})
        study = study_with(config.study, config, {})
        assert list(study.selections) == ["few"]
        found[n] = identity(study)
    assert found[1] != found[2]


# Captions ------------------------------------------------------------------------------------------------------------


def cip(tmp_path: Path, **fit: Any) -> dict[str, Any]:
    arms = [{"name": "CiP", "use": "cip", "real": 0, "control": False}]
    return raw_study(tmp_path, seeds=[0], arms=arms, expansions={
        "cip": {"method": {"name": "text2img", "preset": "cip", "steps": 10}, "sampler": {"batch": 20}, **fit}})


def test_captions_are_fitted_by_the_study(tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({one: f"seen {one}" for one in build_index(DataConfig(source="digits")).seed_ids}))
    study = prepare_study(parse_study(cip(tmp_path, fit={"captions": {"file": str(file)}})))
    (run,) = pending_runs(study)

    (seed, *_) = run.plan.index.seed_ids
    drawn = run.plan.units(0)[0][0]
    assert drawn.prompt.startswith("a photo of a ")
    assert drawn.prompt.endswith(f"seen {drawn.seed_id}")
    assert seed in study.subsets[0][1].seed_ids


@pytest.mark.parametrize(("fit", "message"), [
    ({}, "expansions.cip.artifacts.captions: "),
    ({"fit": {"captions": {"file": "nowhere.json"}}}, "expansions.cip.fit.captions.file: there is nothing at"),
    ({"fit": {"captions": {}}}, "expansions.cip.fit.captions: takes exactly one of")])
def test_captions_that_are_not_there_are_refused(tmp_path: Path, fit: dict[str, Any], message: str) -> None:
    found = problems_of(cip(tmp_path, **fit))
    assert any(line.startswith(message) for line in found), found
