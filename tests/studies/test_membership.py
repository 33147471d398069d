"""Shadow pipelines: who is in which, what they may not read, and the study that they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rayexpand.artifacts.store import publish
from rayexpand.contract.errors import UsageError
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.runs.config import ClusterConfig, parse
from rayexpand.studies.membership import (
    EXPANSION,
    Members,
    MembershipConfig,
    check,
    made_otherwise,
    refuse_shared,
    refuse_unreadable,
    refuse_unrelated,
    study_of,
)
from rayexpand.studies.study import prepare_study

DIGITS = {"source": "digits", "per_class": 4}


def section(**changes: Any) -> MembershipConfig:
    return MembershipConfig(**{
        "data": DIGITS, "test": {"source": "digits", "split": "test", "per_class": 3}, "shadows": 4,
        "stratified": True, "queries": ["identity"], "planted": 3,
        "expansion": {"method": {"name": "classical", "policy": "randaugment"}}, "recipe": {"preset": "digits"},
        **changes})


def problems(**changes: Any) -> str:
    return "\n".join(check(section(**changes)))


@pytest.mark.parametrize(("changes", "said"), [
    ({"shadows": 5}, "give an even number"), ({"variance": "per_example"}, "needs 32 shadows"),
    ({"attack": ["samples", "samples"]}, "names one twice"),
    ({"data": {**DIGITS, "repeats": {"a": 2}}}, "take it out")])
def test_what_does_not_agree_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        section(**changes)


def test_mistakes_have_the_names_of_the_section() -> None:
    assert not problems()
    assert problems(expansion={"method": {"name": "clasical"}}).startswith("expansion.method")
    assert problems(selection={"rule": {"kind": "nothing"}}).startswith("selection.rule.kind")
    assert problems(recipe={"presett": "digits"}).startswith("recipe.presett")
    rounds = {"method": {"name": "classical", "policy": "randaugment"}, "rounds": {"count": 2}}
    assert problems(expansion=rounds).startswith("expansion.rounds: a shadow makes its samples in one run")
    assert problems(test={"source": "digits", "split": "tests"}).startswith("test.split")


def test_nothing_made_of_other_images_is_read(tmp_path: Path) -> None:
    """Runs, artifacts, and models that were fitted on unknown images are refused before anything starts."""
    fitted = publish(str(tmp_path), "guide", {"x": 1}, lambda folder: {})
    generated = {"method": {"name": "img2img", "prompt": "a photo of a {name}"}}

    assert "expansion.run: a run that exists" in problems(expansion={"run": "runs/digits"})
    assert "expansion.artifacts.captions: runs/captions was made of other images" in problems(
        expansion={"method": {"name": "text2img", "prompt": "{caption}"}, "artifacts": {"captions": "runs/captions"}})
    assert "expansion.prior.weights" in problems(expansion={**generated, "prior": {"weights": str(fitted)}})
    assert "extractor.guide: missing" in problems(expansion={
        "method": {"name": "distdiff", "prompt": "a {name}"}, "fit": {"guide": {"kind": "classifier"}}})


def test_an_audit_of_a_run_makes_its_shadows_like_the_run() -> None:
    made = {"name": "run", "data": DIGITS, "method": {"name": "classical", "policy": "randaugment"}}
    same, other = (SimpleNamespace(config=parse({**made, **changed}), folder="runs/run") for changed in (
        {}, {"method": {"name": "classical", "policy": "randaugment", "ratio": 3}}))

    assert made_otherwise(section(), same, ClusterConfig()) == []  # type: ignore[arg-type]
    (line,) = made_otherwise(section(), other, ClusterConfig())  # type: ignore[arg-type]
    assert "runs/run was made otherwise (method.ratio: 3.0 -> 5.0)" in line
    tuned = SimpleNamespace(folder="runs/run", config=same.config.model_copy(update={"artifacts": {"adapter": "a"}}))
    (line,) = made_otherwise(section(), tuned, ClusterConfig())  # type: ignore[arg-type]
    assert "fit.adapter: there -> none" in line


def test_an_audit_in_a_run_is_of_its_seeds() -> None:
    run: Any = SimpleNamespace(folder="runs/run", plan=SimpleNamespace(index=build_index(DataConfig(**DIGITS))))

    refuse_unrelated(section(data={"source": "digits"}), run)
    with pytest.raises(UsageError, match="none of the 500 images is a seed of runs/run"):
        refuse_unrelated(section(data={"source": "digits", "split": "test"}), run)


def test_a_generator_trained_on_audited_images_is_refused() -> None:
    config = section(expansion={"method": {"name": "text2img", "prompt": "a {name}"},
                                "fit": {"pretrain": {"data": {"source": "digits"}}}})

    with pytest.raises(UsageError, match=r"expansion\.fit\.pretrain\.data: 40 of the audited images trained it"):
        refuse_shared(config, study_of(config, "runs", ClusterConfig()), build_index(config.data))
    pool = section(expansion={"method": {"name": "text2img", "prompt": "a {name}"},
                              "fit": {"pretrain": {"data": {"source": "digits", "split": "pool"}}}})
    refuse_shared(pool, study_of(pool, "runs", ClusterConfig()), build_index(pool.data))


def test_a_shadow_is_a_repetition_on_its_members_and_the_planted_image_is_listed_often(tmp_path: Path) -> None:
    config = section()
    members = Members(config, build_index(config.data))
    study = prepare_study(study_of(config, str(tmp_path), ClusterConfig()), members.subset)
    planted = members.ids[members.planted]

    assert study.config.training.keep == "weights"
    assert (members.member_SN.sum(axis=0) == 2).all()
    for shadow in range(4):
        data, index = study.subsets[shadow]
        held = {members.ids[n] for n in np.flatnonzero(members.member_SN[shadow])}
        listed = {f"{planted}~{n}" for n in (2, 3)} if planted in held else set()
        assert set(index.seed_ids) == held | listed
        assert study.expansions[EXPANSION, shadow].data == data  # type: ignore[union-attr]
    assert members.table()["member"].to_pylist() == members.member_SN.T.tolist()


def test_permuted_memberships_are_others_and_halve_too() -> None:
    config = section(data={"source": "digits"}, stratified=False)
    members = Members(config, build_index(config.data))

    assert (members.null_SN.sum(axis=0) == 2).all()
    assert 0.4 < (members.null_SN == members.member_SN).mean() < 0.6


def test_a_shadow_without_a_class_is_refused(tmp_path: Path) -> None:
    config = section(data={"source": "digits", "per_class": 2}, stratified=False)

    with pytest.raises(UsageError, match=r"shadow \d has no image of \d classes .*set stratified: true"):
        Members(config, build_index(config.data))
    Members(section(data={"source": "digits", "per_class": 2}), build_index(config.data))


def test_planted_and_members_are_keyed_by_the_seed_of_the_section() -> None:
    whole = build_index(DataConfig(**DIGITS))
    first, again, other = (Members(section(seed=seed), whole) for seed in (0, 0, 1))

    assert (first.member_SN == again.member_SN).all()
    assert (first.member_SN != other.member_SN).any()
    assert len({Members(section(seed=seed), whole).planted for seed in range(5)}) > 1


def test_an_image_that_cannot_be_decoded_is_refused_before_anything_is_made(image_folder: Path, tmp_path: Path) -> None:
    real = Path(shutil.copytree(image_folder, tmp_path / "real"))
    config = section(data={"source": "imagefolder", "path": str(real)})
    refuse_unreadable(config, build_index(config.data), lambda *_: None)
    (real / "cat/2.png").write_bytes(b"broken")

    with pytest.raises(UsageError, match=r"data: 1 of 20 images cannot be used \('cat/2.png'\).*give it as data\.ids"):
        refuse_unreadable(config, build_index(config.data), lambda *_: None)
