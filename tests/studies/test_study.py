"""Studies: what the YAML means, which classifiers follow from it, and what is refused before anything is made."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayexpand.artifacts.columns import open_image_features
from rayexpand.contract.errors import ConfigError, DigestMismatch, SeedDataError, UsageError
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.data.subsets import ids_hash, shared_images
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import TrainingSet
from rayexpand.reports.study import write_study_report
from rayexpand.runs import run as runs
from rayexpand.runs.config import parse as runs_config
from rayexpand.storage.tables import parquet_bytes, read_json
from rayexpand.studies.config import parse_study, study_preflight
from rayexpand.studies.expansions import pending_runs
from rayexpand.studies.parts import Study, Trial, read_result
from rayexpand.studies.results import read_study, runs_of
from rayexpand.studies.study import prepare_study
from rayexpand.studies.summary import summarised, summary
from rayexpand.studies.trial import open_work, run_trials
from rayexpand.studies.trials import _fitting_seconds, make_trials, pending_trials
from tests.commands import rewrite_json
from tests.tiny import tiny_pipeline

SMALL = {"preset": "digits", "updates": 6, "epochs": 2, "batch": 8, "backbone_args": {"width": 4}}


def raw_study(out: Path | str, **changes: Any) -> dict[str, Any]:
    return {"name": "small", "out": str(out), "data": {"source": "digits"},
            "test": {"source": "digits", "split": "test", "per_class": 3}, "subset": {"kind": "per_class", "n": 2},
            "seeds": [0, 1], "recipe": SMALL,
            "expansions": {"flips": {"method": {"name": "classical", "policy": "randaugment", "ratio": 3}}},
            "arms": [{"name": "original"}, {"name": "flips", "use": "flips", "ratio": [1, 3]}], **changes}


def expanded(raw: dict[str, Any]) -> Study:
    study = prepare_study(parse_study(raw))
    for run in pending_runs(study):
        expander = runs.start(run)
        runs.drive(run, runs.in_process(expander), lambda run=run: runs.pending_jobs(run))  # type: ignore[misc]
        expander.close()
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return expanded(raw_study(tmp_path_factory.mktemp("study")))


def test_arms_and_their_controls(study: Study) -> None:
    trials = {(one.arm, one.seed): one for one in make_trials(study)}

    assert {arm for arm, _ in trials} == {"original", "flips 1x", "flips 3x", "original repeated 2x",
                                          "original repeated 4x"}
    assert len(trials) == 10
    assert trials["flips 3x", 0].ratio == 3
    assert trials["original repeated 4x", 1].control_of == "flips 3x"
    assert trials["flips 1x", 0].list_sha256 != trials["flips 3x", 0].list_sha256
    assert trials["original", 0].ids_sha256 != trials["original", 1].ids_sha256
    written = read_json(study.files, "trials/flips-3x-s1.json")
    assert written == {**vars(trials["flips 3x", 1]), "digest": trials["flips 3x", 1].digest}
    assert trials["flips 3x", 0].expansion_seconds == pytest.approx(3 * trials["flips 1x", 0].expansion_seconds)


def test_the_cost_of_an_expansion_has_what_was_fitted_for_it(tmp_path: Path) -> None:
    """Facts as this version writes them, as an earlier one did, and of a prior whose guide and pipeline are parts."""
    for name, facts in (("prototypes-1", {"process_seconds": 3.0, "seconds": 1.0}),
                        ("adapter-1", {"training_seconds": 7.0, "seconds": 9.0, "workers": 2}),
                        ("prior-1", {"process_seconds": 100.0, "workers": None})):
        for part in ("guide", "pipeline"):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "artifact.json").write_text(json.dumps(facts))
    (tmp_path / "linked").symlink_to("adapter-1")
    run = runs_config({"name": "run", "data": {"source": "digits"}, "method": {"name": "distdiff"},
                       "prior": {"weights": f"{tmp_path}/prior-1/pipeline"},
                       "guide": {"weights": f"{tmp_path}/prior-1/guide"},
                       "artifacts": {"prototypes": f"{tmp_path}/prototypes-1", "adapter": f"{tmp_path}/linked"}})
    assert _fitting_seconds(SimpleNamespace(config=run)) == 3 + 2 * 7 + 100  # type: ignore[arg-type]


@pytest.mark.parametrize(("arm", "rows", "epoch_rows"), [("original", 20, 20), ("flips 1x", 40, 40),
                                                         ("flips 3x", 80, 80), ("original repeated 4x", 20, 80)])
def test_the_control_shows_as_many_images_as_its_arm(study: Study, arm: str, rows: int, epoch_rows: int) -> None:
    trial = next(one for one in make_trials(study) if one.arm == arm)
    found = TrainingSet.load(Path(study.files.root) / trial.rows)

    assert (len(found), found.epoch_rows) == (rows, epoch_rows)


def test_expansion_and_training_see_the_same_seed_ids(study: Study) -> None:
    for trial in make_trials(study):
        listed = (Path(study.files.root) / f"subsets/{trial.seed}.txt").read_text().split()
        assert trial.ids_sha256 == ids_hash(listed)
        if trial.run:
            assert ids_hash(runs.open_run(trial.run).plan.index.seed_ids) == trial.ids_sha256


def test_a_second_pass_trains_nothing_and_a_change_trains_what_it_touches(study: Study) -> None:
    trials = make_trials(study)
    assert all(not problem for _, problem in run_trials(study.files, trials, study.config.training))
    assert pending_trials(study.trial_folder, make_trials(study)) == []

    arms = [{"name": "original"}, {"name": "flips", "use": "flips", "ratio": [1, 3], "recipe": {"lr": 0.02}}]
    changed = prepare_study(parse_study(raw_study(Path(study.config.out), arms=arms)))
    todo = {one.arm for one in pending_trials(changed.trial_folder, make_trials(changed))}

    assert todo == {"flips 1x", "flips 3x", "original repeated 2x (lr=0.02)", "original repeated 4x (lr=0.02)"}
    assert list(pending_runs(changed)) == []


def test_a_result_for_other_test_images_is_not_on_the_page(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, arms=[{"name": "original"}], seeds=[0])
    study = prepare_study(parse_study(raw))
    for _, problem in run_trials(study.files, make_trials(study), study.config.training):
        assert not problem
    assert len(summary(study.config.folder)["arms"]) == 1
    make_trials(prepare_study(parse_study({**raw, "test": {"source": "digits", "split": "test", "per_class": 5}})))

    assert summary(study.config.folder)["arms"] == []


def test_results_hold_what_the_page_needs(study: Study) -> None:
    trials = make_trials(study)
    for _, problem in run_trials(study.files, pending_trials(study.trial_folder, trials), study.config.training):
        assert not problem
    found = read_result(study.files, "flips-3x-s0")

    assert found is not None
    assert (found["rows"], found["real_rows"], found["synthetic_rows"]) == (80, 20, 60)
    assert (found["updates"], found["samples_seen"], found["starts"]) == (6, 48, [0])
    assert [point["step"] for point in found["history"]] == [3, 6]
    assert found["last"]["top1"] == found["history"][-1]["top1"]
    assert found["best"]["top1"] == max(point["top1"] for point in found["history"])


def test_real_rows_alone_and_synthetic_rows_alone(tmp_path: Path) -> None:
    arms = [{"name": "real"}, {"name": "synthetic", "use": "flips", "real": 0},
            {"name": "replaced", "use": "flips", "replace": 0.5, "control": True}]
    study = expanded(raw_study(tmp_path, arms=arms, seeds=[0]))
    lists = {one.arm: TrainingSet.load(tmp_path / "small" / one.rows) for one in make_trials(study)}

    assert {name: (rows.n_real, len(rows), rows.epoch_rows) for name, rows in lists.items()} == {
        "real": (20, 20, 20), "synthetic": (0, 60, 60), "replaced": (20, 80, 20), "original repeated 3x": (20, 20, 60)}


def test_the_page_shows_each_expansion_of_an_arm_of_several(tmp_path: Path) -> None:
    more = {"method": {"name": "classical", "policy": "cutout", "ratio": 1}}
    raw = raw_study(tmp_path, arms=[{"name": "original"}, {"name": "both", "use": ["flips", "more"]}])
    raw["expansions"]["more"] = more
    study = expanded(raw)
    assert [why for _, why in run_trials(study.files, make_trials(study), study.config.training) if why] == []
    view = read_study(study.config.folder)
    assert {len(runs_of(one)) for one in view.results if one["arm"] == "both"} == {2}
    assert "samples" in summarised(view)["notes"][0].partition(";")[0]
    page = Path(write_study_report(study.config.folder)).read_text()
    assert all(f"small/runs/{name}-0" in page for name in ("flips", "more"))


def test_an_arm_takes_samples_of_several_expansions(tmp_path: Path) -> None:
    classical = {name: {"method": {"name": "classical", "policy": name, "ratio": 2}}
                 for name in ("cutout", "randaugment")}
    arms = [{"name": name, "use": use, "control": False, **more} for name, use, more in (
        ("one", "cutout", {}), ("both", ["cutout", "randaugment"], {"control": True}),
        ("half", ["cutout", "randaugment"], {"ratio": 1, "real": 0}), ("mixed", ["cutout", "randaugment"], {
            "mix": {"pixel": 1.0}, "weight": 2}))]
    study = expanded(raw_study(tmp_path, arms=arms, seeds=[0], expansions=classical))
    trials = {one.arm: one for one in make_trials(study)}
    lists = {name: TrainingSet.load(tmp_path / "small" / one.rows) for name, one in trials.items()}

    assert {name: (rows.n_real, rows.n_synthetic, rows.epoch_rows) for name, rows in lists.items()} == {
        "one": (20, 40, 60), "both": (20, 80, 100), "half": (0, 40, 40), "mixed": (20, 80, 180),
        "original repeated 5x": (20, 0, 100)}
    assert trials["both"].group == "cutout + randaugment"
    assert (trials["one"].run.endswith("cutout-0"), trials["both"].run) == (True, "")
    assert [part.method["policy"] for part in lists["both"].parts[1:]] == ["cutout", "randaugment"]
    assert trials["both"].expansion_seconds > trials["one"].expansion_seconds


@pytest.mark.parametrize(("arm", "words"), [
    ({"use": ["flips"]}, "arms.a.use: a list names two expansions or more"),
    ({"use": []}, "arms.a.use: a list names two expansions or more"),
    ({"use": ["flips", "flips"]}, "arms.a.use: a list names two expansions or more"),
    ({"use": ["flips", "other"]}, "arms.a.use: 'other' is no expansion"),
    ({"use": ["flips", "more"], "fill": True}, "arms.a.fill: fills each class from one expansion"),
    ({"use": ["flips", "more"], "soft_label": {"gama": 1}}, "unknown, the soft label of classical and classical takes "
                                                            "no arguments"),
    ({"use": ["flips", "mixed"], "soft_label": {"gama": 1}}, "arms.a.soft_label.gama: did you mean 'gamma'?"),
    ({"use": ["flips", "mixed"], "soft_label": {"gamma": 1}}, "")])
def test_what_cannot_be_meant_by_several_expansions(tmp_path: Path, arm: dict[str, Any], words: str) -> None:
    flips = {"method": {"name": "classical", "policy": "randaugment", "ratio": 3}}
    mixed = {"method": {"name": "diffmix", "variant": "real_mix", "prompt": "a {name}"}}
    raw = raw_study(tmp_path, expansions={"flips": flips, "more": flips, "mixed": mixed}, arms=[{"name": "a", **arm}])
    if not words:
        assert parse_study(raw).arms[0].uses == ("flips", "mixed")
        assert "arms.a.use: `samples` compares what one expansion made" in "".join(study_preflight(parse_study({
            **raw, "samples": {}})))
        return
    with pytest.raises(ConfigError) as found:
        parse_study(raw)
    assert [one for one in found.value.problems if words in one], found.value.problems


def test_a_full_dataset_is_expanded_once_for_all_seeds(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, subset={"kind": "full"}, data={"source": "digits", "per_class": 2})
    shared, again = prepare_study(parse_study(raw)), prepare_study(parse_study({**raw, "resample": True}))

    assert len({one.folder for one in shared.expansions.values()}) == 1  # type: ignore[union-attr]
    assert len({one.folder for one in again.expansions.values()}) == 2  # type: ignore[union-attr]


def test_an_expansion_no_arm_uses_is_not_made(tmp_path: Path) -> None:
    study = prepare_study(parse_study(raw_study(tmp_path, arms=[{"name": "original"}])))
    assert list(pending_runs(study)) == []


def test_a_run_made_from_other_seeds_is_refused(study: Study, tmp_path: Path) -> None:
    folder = f"{study.config.folder}/runs/flips-0"
    raw = raw_study(tmp_path, expansions={"flips": {"run": folder}})
    with pytest.raises(UsageError, match=r"not the 20 real rows of study seed 1.*subsets/1\.txt"):
        prepare_study(parse_study(raw))
    by_seed = raw_study(tmp_path, expansions={"flips": {"run": f"{study.config.folder}/runs/flips-{{seed}}"}})
    assert len(make_trials(prepare_study(parse_study(by_seed)))) == 10


def test_training_images_among_the_test_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"test: \d+ of its images are training images of seed 0"):
        prepare_study(parse_study(raw_study(tmp_path, test={"source": "digits"})))


@pytest.mark.parametrize(("sections", "words"), [
    ({"test": {"split": "seeds", "digits_background": "all"}}, "test: 594 of its images are training images"),
    ({"data": {"digits_background": "correlated"}, "test": {"split": "seeds"}}, "test: 297 of its"),
    ({"validation": {"split": "seeds", "digits_background": "correlated"}}, "validation: 297 of its"),
    ({"extra_tests": {"split": "seeds", "digits_background": "all"}}, r"extra_tests\.other: 594 of its"),
    ({"extra_tests": {"split": "test", "digits_background": "all"}}, None)])
def test_a_digit_is_one_image_on_every_background(tmp_path: Path, sections: dict[str, Any], words: str | None) -> None:
    given = {name: {"source": "digits", **one} for name, one in {
        "data": {}, "test": {"split": "test"}, **sections}.items()}
    if "extra_tests" in given:
        given["extra_tests"] = {"other": {"data": given["extra_tests"]}}
    config = parse_study(raw_study(tmp_path, subset={"kind": "full"}, arms=[{"name": "original"}], **given))
    with pytest.raises(UsageError, match=words) if words else contextlib.nullcontext():
        prepare_study(config)


FITS = [  # method, what is fine-tuned, mistakes
    ({"name": "diffmix", "prompt": "a {token}"}, {"strategy": "db"}, [
        "recipe: the prompt has {token}, but it (strategy db) has no class tokens"]),
    ({"name": "diffmix", "prompt": "a {name}"}, {"strategy": "ti", "prompt": "a {token}"}, [
        "recipe: it (strategy ti) has class tokens and nothing else"]),
    ({"name": "diffmix", "prompt": "a {name}"}, {"prompt": "a {token}"}, []),
    ({"name": "realfake", "prompt": "photo of {name}"}, {"strategy": "db"}, [
        "recipe: it is trained with visual_token none, but method.visual_token is class_mean"]),
    ({"name": "realfake", "prompt": "photo of {name}", "visual_token": "none"}, {
        "strategy": "db", "visual_token": "class_mean"}, ["recipe: it is trained with visual_token class_mean"]),
    ({"name": "realfake", "prompt": "photo of {name}"}, {"strategy": "db", "visual_token": "class_mean"}, []),
    ({"name": "diffmix", "prompt": "a {name}"}, {"strategy": "full"}, [
        "recipe.strategy: full makes a whole generator"]),
    ({"name": "diffmix", "prompt": "a {name}"}, {"strategy": "db", "mmd_gamma": 0.05, "mmd_scope": "per_rank",
                                                  "mmd_images": 8}, [])]


def fitted(tmp_path: Path, method: dict[str, Any], recipe: dict[str, Any], **fields: Any) -> dict[str, Any]:
    fit = {"adapter": {"recipe": {"preset": "tiny", **recipe}, **fields}}
    return raw_study(tmp_path, expansions={"e": {"method": method, "fit": fit}}, arms=[{"name": "e", "use": "e"}])


@pytest.mark.parametrize(("method", "recipe", "problems"), FITS)
def test_an_adapter_that_does_not_fit_its_method_is_not_trained(
        tmp_path: Path, method: dict[str, Any], recipe: dict[str, Any], problems: list[str]) -> None:
    found: list[str] = []
    try:
        parse_study(fitted(tmp_path, method, recipe))
    except ConfigError as error:
        found = error.problems
    assert len(found) == len(problems), found
    for line, words in zip(found, problems, strict=True):
        assert line.startswith(f"expansions.e.fit.adapter.{words}")


@pytest.mark.parametrize("field", ["workers", "cpus_per_worker", "gpus_per_worker", "loaders"])
def test_a_study_fine_tunes_in_its_own_process(tmp_path: Path, field: str) -> None:
    words = rf"fit\.adapter\.{field}: a study fine-tunes in its own process.*`rayexpand fit` first.*artifacts\.adapter"
    with pytest.raises(ConfigError, match=words):
        parse_study(fitted(tmp_path, {"name": "diffmix", "prompt": "a {token}"}, {"prompt": "a {token}"}, **{field: 2}))


def test_what_is_wrong_with_a_fine_tuning_is_said_before_anything_is_made(tmp_path: Path) -> None:
    raw = fitted(tmp_path, {"name": "diffmix", "prompt": "a {token}"}, {"prompt": "a {token}", "init_token": 42170})
    with pytest.raises(ConfigError, match=r"expansions\.e\.fit\.adapter\.recipe\.init_token: 42170 is no id"):
        prepare_study(parse_study(raw))
    raw = fitted(tmp_path, {"name": "diffmix", "prompt": "a {token}"}, {"batch": 7, "accumulate": 2})
    with pytest.raises(ConfigError, match=r"fit\.adapter\.recipe: batch 7 cannot be"):
        parse_study(raw)


def test_a_part_of_fit_that_a_method_does_not_need_is_refused(tmp_path: Path) -> None:
    raw = fitted(tmp_path, {"name": "realfake", "finetuned": False, "prompt": "a {name}", "visual_token": "class_mean"},
                 {"strategy": "db"})
    with pytest.raises(ConfigError, match=r"fit\.adapter: has no effect on realfake"):
        parse_study(raw)
    raw = fitted(tmp_path, {"name": "distdiff"}, {"strategy": "db"})
    assert parse_study(raw).expansions["e"].fit is not None, "a guided method samples with an adapter that is fitted"
    raw["expansions"]["e"] |= {"fit": {}, "artifacts": {"prototypes": "artifacts/there", "adapter": "artifacts/there"}}
    with pytest.raises(ConfigError) as refused:
        parse_study(raw)
    for words in (r"artifacts\.prototypes: artifacts/there would not be read, for fit makes them",
                  r"artifacts\.adapter: artifacts/there has no adapter\.json"):
        assert any(re.match(rf"expansions\.e\.{words}", line) for line in refused.value.problems), words


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    raw = raw_study(
        tmp_path, recipe={"preset": "digts"}, baseline="none", seeds=[0, 0],
        expansions={"flips": {"method": {"name": "classical", "policy": "randaugment", "ratio": 3}, "name": "x"},
                    "both": {"run": "x", "config": {}}, "wrong": {"method": {"name": "img2img", "strenth": 0.5}}},
        arms=[{"name": "a", "use": "flip"}, {"name": "b", "real": 0}, {"name": "c", "ratio": 2},
              {"name": "d", "use": "both", "replace": 0.5, "real": 2}])
    with pytest.raises(ConfigError) as caught:
        parse_study(raw, "study.yaml")
    text = "\n".join(caught.value.problems)

    for part in ("arms.a.use: 'flip' is no expansion", "arms.b.real: 0 without `use`", "arms.c: ratio need `use`",
                 "arms.d.real: with replace", "baseline: 'none' is no arm", "seeds: a seed is given twice",
                 "did you mean digits", "expansions.flips: name come from the study",
                 "expansions.both: give a run configuration", "did you mean 'strength'?"):
        assert part in text, f"{part!r} is missing in:\n{text}"


@pytest.mark.parametrize(("changes", "words"), [
    ({"armz": []}, "did you mean 'arms'"),
    ({"recipe": {"lr": -1}}, "recipe.lr"),
    ({"arms": [{"name": "original", "recipe": {"epoch": 3}}]}, "arms.original.recipe.epoch: unknown field"),
    ({"subset": {"kind": "long_tail"}}, "imbalance_factor"),
])
def test_one_mistake(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_study(raw_study(tmp_path, **changes))


@pytest.mark.parametrize("section", ["data", "test", "validation"])
def test_a_dataset_that_is_not_there_is_said_before_anything_is_made(tmp_path: Path, section: str) -> None:
    config = parse_study(raw_study(tmp_path, **{section: {"source": "imagefolder", "path": "nowhere"}}))
    with pytest.raises(ConfigError, match=rf"{section}\.path"):
        prepare_study(config)
    assert list(tmp_path.iterdir()) == []


def test_half_a_file_of_a_model_is_said_before_anything_is_made(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "model")
    for file in (tmp_path / "model/unet/diffusion_pytorch_model.safetensors", tmp_path / "weights.safetensors"):
        content = (tmp_path / "model/vae/diffusion_pytorch_model.safetensors").read_bytes()
        file.write_bytes(content[:-8])
    sd = {"method": {"name": "img2img", "guidance_scale": 2}, "prior": {"weights": str(tmp_path / "model")}}
    config = parse_study(raw_study(tmp_path, expansions={"sd": sd}, arms=[{"name": "sd", "use": "sd"}],
                                   recipe={**SMALL, "checkpoint": str(tmp_path / "weights.safetensors")}))
    with pytest.raises(ConfigError) as error:
        prepare_study(config)
    assert not (tmp_path / "small").exists()
    lines = error.value.problems
    assert any("expansions.sd.prior.weights" in line and "it is cut off" in line for line in lines), lines
    assert any("recipe.checkpoint" in line and "it is cut off" in line for line in lines), lines


def test_names_that_become_one_file_are_refused(tmp_path: Path) -> None:
    study = prepare_study(parse_study(raw_study(tmp_path, arms=[{"name": "a b"}, {"name": "a-b"}])))
    with pytest.raises(ConfigError, match="rename one"):
        make_trials(study)


def test_study_json_names_every_trial(study: Study) -> None:
    names = [one.name for one in make_trials(study)]
    written = json.loads((Path(study.files.root) / "study.json").read_text())

    assert written["trials"] == names
    assert written["config"]["subset"]["n"] == 2


def folder_of(root: Path, colours: dict[str, int]) -> None:
    """Images named <split>/<class>/<name>, each of one grey."""
    for name, grey in colours.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(root / name)


@pytest.fixture(scope="module")
def greys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("greys")
    names = [f"{split}/{label}/{number}.png" for split in ("train", "test") for label in "ab" for number in range(2)]
    folder_of(root, {name: 10 * grey for grey, name in enumerate(names)})
    for number in range(2):  # the test images of train under other names
        shutil.copytree(root / "train" / "ab"[number], root / "copied" / "ab"[number])
        for file in list((root / "copied" / "ab"[number]).iterdir()):
            file.rename(file.with_name(f"other-{file.name}"))
    (root / "linked").symlink_to(root / "train")
    return root


@pytest.mark.parametrize(("sections", "words"), [
    ({"test": ("{}", "test")}, None),  # names are those of train, images are not
    ({"data": ("{}/train", None), "test": ("{}/test/", None)}, None),
    ({"test": ("{}/train/", None)}, "test: 4 of its images are training images of seed 0"),
    ({"data": ("{}/train", None), "test": ("{}/train/", None)}, "test: 4 of its"),
    ({"test": ("{}/linked", None)}, "test: 4 of its"),
    ({"test": ("{}", "copied")}, "test: 4 of its .*other-0"),
    ({"test": ("{}", "test"), "validation": ("{}", "copied")}, "validation: 4 of its images are training images"),
    ({"test": ("{}", "test"), "validation": ("{}/test", None)}, "validation: 4 of its images are test images"),
])
def test_images_in_two_sections_are_refused_whatever_they_are_called(
        tmp_path: Path, greys: Path, sections: dict[str, tuple[str, str | None]], words: str | None) -> None:
    given = {section: {"source": "imagefolder", "path": path.format(greys), "split": split}
             for section, (path, split) in {"data": ("{}", "train"), **sections}.items()}
    config = parse_study(raw_study(tmp_path, subset={"kind": "full"}, seeds=[0], arms=[{"name": "original"}], **given))
    if words is None:
        assert len(prepare_study(config).subsets[0][1]) == 4
    else:
        with pytest.raises(UsageError, match=words):
            prepare_study(config)


def test_large_datasets_are_compared_by_a_sample(greys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(split: str) -> list[str]:
        one, other = (DataConfig(source="imagefolder", path=path) for path in (f"{greys}/train", f"{greys}/{split}"))
        return shared_images((build_index(one), one), (build_index(other), other))

    shutil.copytree(greys / "train", greys / "again")
    monkeypatch.setattr("rayexpand.data.subsets._COMPARED", 4)
    assert len(shared("again")) == 2  # the same two of each side
    assert shared("test") == []


@pytest.mark.parametrize(("sections", "words"), [
    ({"data": {"path": "one"}}, "^data: has one class"),
    ({"test": {"path": "none"}}, r"^test\.path: the dataset has no class"),
    ({"test": {"path": "two", "ids": "bad.txt"}}, "^test: has no image"),
])
def test_a_dataset_nothing_can_be_learned_or_tested_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       sections: dict[str, dict[str, str]], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    tables: dict[str, list[str | None]] = {"one": ["a", "a"], "two": ["a", "b", None], "none": []}
    for name, labels in tables.items():
        columns = {"image": pa.array([b"x"] * len(labels), pa.binary()), "label": pa.array(labels, pa.string())}
        pq.write_table(pa.table(columns), f"{name}.parquet")
    Path("bad.txt").write_text("two/2\n")
    given = {section: {"source": "parquet", **one, "path": f"{one['path']}.parquet"}
             for section, one in {"data": {"path": "two"}, "test": {"path": "two"}, **sections}.items()}
    with pytest.raises((UsageError, SeedDataError), match=words):
        prepare_study(parse_study(raw_study(tmp_path, subset={"kind": "full"}, arms=[{"name": "original"}], **given)))


def test_a_control_repeats_what_a_selection_left(study: Study) -> None:
    for seed, kept in ((0, 11), (1, 17)):
        run = runs.open_run(f"{study.config.folder}/runs/flips-{seed}")
        ids = run.store.data(next(iter(run.store.receipts())), ["sample_id"])["sample_id"].to_pylist()
        table = pa.table({"sample_id": ids, "keep": np.arange(len(ids)) < kept})
        run.files.make_folder("selections")
        run.files.replace("selections/some.parquet", parquet_bytes(table, {}))
    arms = [{"name": "original"}, {"name": "all", "use": "flips", "ratio": 1},
            {"name": "some", "use": "flips", "selection": "some"}, {"name": "plain", "real": 2}]
    made = make_trials(prepare_study(parse_study(raw_study(Path(study.config.out), arms=arms))))
    trials = {(one.arm, one.seed): one for one in made}
    rows = {key: TrainingSet.load(Path(study.files.root) / one.rows).epoch_rows for key, one in trials.items()}

    assert {arm for arm, _ in trials} == {"original", "all", "some", "plain", "original repeated for some"}
    assert [rows["some", seed] for seed in (0, 1)] == [31, 37]
    assert [rows["original repeated for some", seed] for seed in (0, 1)] == [31, 37]
    assert trials["some", 0].ratio == pytest.approx(11 / 20)
    assert trials["original repeated for some", 1].control_of == "some"


def test_a_selection_that_is_not_there_is_asked_for(study: Study, tmp_path: Path) -> None:
    """Of a run that exists before anything is made; of a run of the study when it is complete, so can be decided."""
    arms = [{"name": "chosen", "use": "flips", "selection": "absent"}]
    made = prepare_study(parse_study(raw_study(Path(study.config.out), arms=arms)))
    with pytest.raises(UsageError, match=r"runs/flips-0 has no selection 'absent'.*`rayexpand select`.*name: absent"):
        make_trials(made)
    folder = f"{study.config.folder}/runs/flips-{{seed}}"
    raw = raw_study(tmp_path, arms=arms, expansions={"flips": {"run": folder}})
    with pytest.raises(ConfigError, match=r"arms\.chosen\.selection: .*runs/flips-1 has no selection 'absent'; make"):
        prepare_study(parse_study(raw))


def test_subsets_that_differ_cannot_share_samples(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resample: false .*subset\.seed"):
        prepare_study(parse_study(raw_study(tmp_path, resample=False)))
    same = prepare_study(parse_study(raw_study(tmp_path, resample=False, subset={"kind": "per_class", "n": 2,
                                                                                "seed": 3})))
    assert len({one.folder for one in same.expansions.values()}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("vary", "drawn", "trained", "said"), [
    ("all", [0, 1], [0, 1], "differ in real images, samples and classifier seed."),
    ("classifier", [0, 0], [0, 1], "differ in classifier seed; real images and samples: the same in all"),
    ("data", [0, 1], [0, 0], "differ in real images and samples; classifier seed: the same in all")])
def test_classifier_and_data_can_vary_alone(tmp_path: Path, vary: str, drawn: list[int], trained: list[int],
                                            said: str) -> None:
    study = expanded(raw_study(tmp_path, vary=vary, arms=[{"name": "flips", "use": "flips", "control": False}]))
    trials = make_trials(study)

    assert [one.run.endswith(f"flips-{seed}") for one, seed in zip(trials, drawn, strict=True)] == [True, True]
    assert [one.trained_by for one in trials] == trained
    assert len({one.list_sha256 for one in trials}) == len({one.ids_sha256 for one in trials}) == len(set(drawn))
    assert len({one.digest for one in trials}) == 2
    assert [problem for _, problem in run_trials(study.files, trials, study.config.training) if problem] == []
    results = [read_result(study.files, one.name) or {} for one in trials]
    assert [one.get("classifier_seed") for one in results] == ([None, None] if vary == "all" else trained)
    assert [one.get("data_seed") for one in results] == ([None, None] if vary == "all" else drawn)
    found = summary(str(study.files.root))
    assert any(said in line for line in found["notes"]), found["notes"]
    assert found["arms"][0]["seeds"] == [0, 1]


def test_the_same_samples_and_the_same_seed_give_the_same_classifier(tmp_path: Path) -> None:
    """What a study of one variance trains is what the whole study trains where both seeds agree."""
    arms = [{"name": "flips", "use": "flips", "control": False}]
    made = {vary: expanded(raw_study(tmp_path / vary, vary=vary, arms=arms)) for vary in ("all", "classifier", "data")}
    digests = {vary: [one.digest for one in make_trials(study)] for vary, study in made.items()}

    assert digests["all"][0] == digests["classifier"][0] == digests["data"][0]
    assert len({digests[vary][1] for vary in digests}) == 3


def test_one_generator_of_many_samples_varies_alone_with_one_subset(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, vary="data", subset={"kind": "per_class", "n": 2, "seed": 3})
    study = prepare_study(parse_study(raw))

    assert len({one.folder for one in study.expansions.values()}) == 2  # type: ignore[union-attr]
    assert len({ids_hash(index.seed_ids) for _, index in study.subsets.values()}) == 1


@pytest.mark.parametrize(("vary", "resample"), [("classifier", True), ("data", False)])
def test_seeds_that_contradict_each_other_are_refused(tmp_path: Path, vary: str, resample: bool) -> None:
    with pytest.raises(ConfigError, match=r"vary: .* contradict each other; take resample out"):
        parse_study(raw_study(tmp_path, vary=vary, resample=resample))


def test_a_run_of_other_images_is_not_trained_on(study: Study) -> None:
    crossed = dict.fromkeys(study.expansions, study.expansions["flips", 0])
    with pytest.raises(UsageError, match="flips-0 was made from other images than the real rows of study seed 1"):
        make_trials(replace(study, expansions=crossed))


ARM_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"use": "flips", "soft_label": {"gamma": 0.5}}, "soft_label.gamma: unknown, the soft label of classical takes no"),
    ({"use": "flips", "ratio": 0}, "ratio: 0 copies"),
    ({"use": "flips", "ratio": [-1, 2]}, "ratio: -1 copies"),
    ({"use": "flips", "ratio": [1, 1]}, r"ratio: \[1, 1\] gives a value twice"),
    ({"use": "flips", "ratio": []}, "ratio: an empty list"),
    ({"use": "flips", "replace": 0.5, "weight": 2}, "weight: with replace"),
    ({"use": "flips", "fill": True, "replace": 0.5}, "fill: counts rows of a union .* leave replace out"),
    ({"use": "flips", "fill": True, "weight": 2}, "fill: counts rows of a union .* leave weight out"),
    ({"fill": True}, "fill need `use`"),
    ({"mix": {}}, "mix.partner: real rows alone were made from no other image; set partner: class"),
    ({"use": "flips", "ratio": [2.5, 0.0]}, "ratio: 0 copies of each seed are none"),
    ({"use": "flips", "ratio": [2.5, 2.5]}, "gives a value twice"),
    ({"use": "flips", "draw": "own"}, "draw: says what replaces a real row"),
    ({"use": "flips", "draw": "inverse_freq"}, "draw: says what replaces a real row"),
    ({"use": "flips", "real": 0, "recipe": {"cmo": 0.5}}, "recipe.cmo: goes by the real images of each class"),
    ({"weight": 2, "draw": "inverse_freq", "soft_label": {"gamma": 1}}, "draw, soft_label, weight need `use`"),
    ({"name": "Original repeated 3x"}, "automatic controls"),
]


@pytest.mark.parametrize(("arm", "words"), [*ARM_MISTAKES, ({"use": "flips", "mix": {"pixl": 1}}, "mean 'pixel'")])
def test_mistakes_of_an_arm(tmp_path: Path, arm: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_study(raw_study(tmp_path, arms=[{"name": "a", **arm}]))


def test_mistakes_of_all_arms_at_once(tmp_path: Path) -> None:
    arms = [{"name": f"arm {number}", **arm} for number, (arm, _) in enumerate(ARM_MISTAKES)]
    with pytest.raises(ConfigError) as caught:
        parse_study(raw_study(tmp_path, arms=arms))
    for _, words in ARM_MISTAKES:
        assert re.search(words, str(caught.value)), words


def test_soft_labels_are_those_of_the_method(monkeypatch: pytest.MonkeyPatch, study: Study, tmp_path: Path) -> None:
    arm = {"name": "soft", "use": "flips", "soft_label": {"gama": 0.5}}
    made = raw_study(tmp_path, arms=[arm], expansions={"flips": {"run": f"{study.config.folder}/runs/flips-{{seed}}"}})
    with pytest.raises(ConfigError, match=r"arms.soft.soft_label.gama: unknown"):
        prepare_study(parse_study(made))

    def soft_label(self: Any, source: Any, target: Any, strength: Any, n_classes: int, gamma: float = 1.0,
                   **recipe: float) -> np.ndarray:
        return np.eye(n_classes, dtype=np.float32)[target] * gamma

    monkeypatch.setattr("rayexpand.methods.classical.Classical.soft_label", soft_label)
    with pytest.raises(ConfigError, match=r"soft_label.gama: did you mean 'gamma'\?"):
        parse_study(raw_study(tmp_path, arms=[arm]))
    parse_study(raw_study(tmp_path, arms=[{**arm, "soft_label": {"gamma": 0.5}}]))


@pytest.mark.parametrize("is_made", [False, True])
def test_more_copies_than_there_are(study: Study, tmp_path: Path, is_made: bool) -> None:
    made = {"expansions": {"flips": {"run": f"{study.config.folder}/runs/flips-{{seed}}"}}} if is_made else {}
    raw = raw_study(tmp_path, arms=[{"name": "many", "use": "flips", "ratio": [3, 4]}], **made)
    with pytest.raises(ConfigError, match=r"arms.many.ratio: 4 copies of each seed asked for, but .*flips-0 has 3 at"):
        prepare_study(parse_study(raw))


def test_an_arm_fills_every_class_up_to_the_largest(tmp_path: Path) -> None:
    counts = [4, 3, 1, 1, 1, 1, 1, 1, 1, 1]
    arms = [{"name": "original"}, {"name": "filled", "use": "flips", "fill": True}, {"name": "all", "use": "flips"}]
    study = expanded(raw_study(tmp_path, arms=arms, seeds=[0], subset={"kind": "counts", "counts": counts}))
    trials = {one.arm: one for one in make_trials(study)}
    lists = {arm: TrainingSet.load(Path(study.files.root) / one.rows) for arm, one in trials.items()}

    assert set(trials) == {"original", "filled", "all", "original repeated for filled", "original repeated 4x"}
    assert lists["filled"].counts().tolist() == [4] * 10
    assert np.bincount(lists["filled"].column("label")[:15]).tolist() == counts
    assert lists["original repeated for filled"].epoch_rows == lists["filled"].epoch_rows == 40
    assert trials["filled"].ratio == pytest.approx(25 / 15)
    more = raw_study(tmp_path / "more", arms=arms, seeds=[0], subset={"kind": "counts", "counts": [9, *[1] * 9]})
    with pytest.raises(UsageError, match=r"fill: 9 classes have fewer samples .*one has 3 of 8"):
        make_trials(expanded(more))


def test_arms_that_mix_and_their_controls(tmp_path: Path) -> None:
    """Controls are the real rows as they are; an arm of mixed real rows is no control."""
    arms = [{"name": "pixel alone", "mix": {"partner": "class", "pixel": 1.0}},
            {"name": "mixed", "use": "flips", "mix": {}, "ratio": [1.5, 3]},
            {"name": "samples", "use": "flips", "mix": {"probability": 0.5}, "real": 0, "ratio": 1},
            {"name": "own", "use": "flips", "replace": 0.5, "draw": "own", "recipe": {"cutmix": 1.0}}]
    study = expanded(raw_study(tmp_path, arms=arms, seeds=[0]))
    trials = {one.arm: one for one in make_trials(study)}
    lists = {arm: TrainingSet.load(Path(study.files.root) / one.rows) for arm, one in trials.items()}

    assert list(trials) == ["pixel alone", "mixed 1.5x", "mixed 3x", "samples", "own", "original repeated 2.5x",
                            "original repeated 4x", "original repeated 1x"]
    assert {arm: rows.epoch_rows for arm, rows in lists.items()} == {
        "pixel alone": 20, "mixed 1.5x": 50, "mixed 3x": 80, "samples": 20, "own": 20, "original repeated 2.5x": 50,
        "original repeated 4x": 80, "original repeated 1x": 20}
    assert all((rows.mix is None) == (arm == "own" or "repeated" in arm) for arm, rows in lists.items())
    trained = [one for arm, one in trials.items() if "repeated" not in arm]
    assert [text for _, text in run_trials(study.files, trained, study.config.training)] == [""] * 5
    results = {one.arm: read_result(study.files, one.name) or {} for one in trained}
    assert {arm: (found["real_rows"], found["synthetic_rows"], found["rows"]) for arm, found in results.items()
            } == {"pixel alone": (20, 0, 20), "mixed 1.5x": (20, 30, 50),
                                          "mixed 3x": (20, 60, 80), "samples": (0, 20, 20), "own": (20, 60, 80)}
    assert {arm for arm, found in results.items() if "mixing" in found} == {"pixel alone", "mixed 1.5x", "mixed 3x",
                                                                            "samples"}
    mixing = {arm: found["mixing"] for arm, found in results.items() if "mixing" in found}
    assert (mixing["pixel alone"]["mixed"], mixing["pixel alone"]["pixel"]) == (1, 1)
    assert mixing["mixed 3x"]["mixed"] == pytest.approx(0.75)
    assert mixing["samples"]["mixed"] == pytest.approx(0.5, abs=0.35)
    for one in mixing.values():
        assert one["real_pixels"] == pytest.approx(0.5, abs=0.3)
    again = {one.arm: one.digest for one in make_trials(prepare_study(parse_study(raw_study(tmp_path, seeds=[0], arms=[
        *arms[:1], {**arms[1], "mix": {"pixel": 0.25}}, *arms[2:]]))))}
    assert {arm for arm, one in trials.items() if one.digest != again[arm]} == {"mixed 1.5x", "mixed 3x"}


def test_everything_an_arm_can_say_goes_with_mixing(tmp_path: Path) -> None:
    """One arm for each field, and all of them with the recipe's own mixing; every batch can be made."""
    arms = [{"name": "weighted", "use": "flips", "weight": 2.5, "real": 0.5},
            {"name": "replaced", "use": "flips", "replace": 0.5},
            {"name": "own", "use": "flips", "replace": 0.5, "draw": "own"},
            {"name": "rare", "use": "flips", "replace": 0.5, "draw": "inverse_freq"},
            {"name": "filled", "use": "flips", "fill": True, "ratio": 2},
            {"name": "pasted", "use": "flips", "recipe": {"cmo": 1.0, "cmo_span": [0, 1], "cutmix": 0, "mixup": 0}},
            {"name": "compared", "use": "flips", "recipe": {"augment": "augmix", "jsd": 12, "cutmix": 0, "mixup": 0}}]
    made = raw_study(tmp_path, arms=[{**arm, "mix": {"partner": partner}, "name": f"{arm['name']} {partner}",
                                      "control": False} for arm in arms for partner in ("seed", "class")],
                     seeds=[0], recipe={**SMALL, "mixup": 0.4, "cutmix": 1.0, "gridmask": 0.8},
                     subset={"kind": "counts", "counts": [3, 2, 1, 2, 2, 2, 2, 2, 2, 2]})
    study = expanded(made)
    for trial in make_trials(study):
        feed = open_work(study.files, trial, study.config.training).feed
        mixed = [batch.x_BHWC for batch in feed.batches(0, 3)]
        plain = Loader(replace(feed.rows, mix=None), feed.recipe, trial.seed)
        assert any((one != other.x_BHWC).any() for one, other in zip(mixed, plain.batches(0, 3), strict=True))


ALSO = {"data": {"source": "digits", "split": "test", "per_class": 2}}


@pytest.mark.parametrize(("also", "error", "words"), [
    ({"a b": ALSO}, ConfigError, "extra_tests.a b: a name is letters"),
    ({"other": {**ALSO, "group": "x.csv"}}, ConfigError, "did you mean 'groups'"),
    ({"other": {**ALSO, "groups": "x.csv"}}, ConfigError, r"extra_tests.other.groups: 'x.csv' does not exist"),
    ({"other": {"data": {"source": "imagefolder", "path": "nowhere"}}}, ConfigError, "extra_tests.other.data.path"),
    ({"other": {**ALSO, "group_of": "(low|high)"}}, UsageError,
     "extra_tests.other: 20 of its 20 images are in no group"),
    ({"other": {"data": {"source": "digits"}}}, UsageError,
     "extra_tests.other: 20 of its images are training images of seed"),
    ({"other": {"data": {"source": "imagefolder", "path": "{greys}/test"}}}, UsageError,
     "extra_tests.other: its classes 'a', 'b' are none of those that are trained"),
    ({"other": {**ALSO, "crop_border": 8}}, UsageError,
     r"extra_tests.other: test image .* has 16 x 16 pixels, and crop_border 8 leaves nothing of it"),
])
def test_further_test_sets_are_checked_before_anything_is_made(
        tmp_path: Path, greys: Path, also: dict[str, Any], error: type[Exception], words: str) -> None:
    text = json.dumps(also).replace("{greys}", str(greys))
    with pytest.raises(error, match=words):
        prepare_study(parse_study(raw_study(tmp_path, extra_tests=json.loads(text), arms=[{"name": "original"}])))


def test_what_is_tested_also_decides_the_digest_of_a_trial(tmp_path: Path) -> None:
    (tmp_path / "groups.csv").write_text("seed_id,group\n" + "".join(
        f"{one},{number % 2}\n" for number, one in enumerate(build_index(DataConfig(**ALSO["data"])).seed_ids)))
    grouped = {**ALSO, "groups": str(tmp_path / "groups.csv")}

    def trial() -> Trial:
        raw = raw_study(tmp_path, arms=[{"name": "original"}], seeds=[0], extra_tests={"one": grouped})
        return make_trials(prepare_study(parse_study(raw)))[0]

    first = trial()
    (tmp_path / "groups.csv").write_text((tmp_path / "groups.csv").read_text().replace(",0", ",zero"))
    one = first.also["one"]
    found = [first, trial(), replace(first, also={}), replace(first, also={"two": one}),
             replace(first, also={"one": {**one, "restrict": True}}),
             replace(first, also={"one": one, "two": one}),
             replace(first, frequency=[9, 9])]
    assert len({one.digest for one in found}) == len(found)
    assert replace(first, also={"one": {**one, "groups": "moved.csv"}}).digest == first.digest


def test_the_control_of_a_preset_is_named_after_it(study: Study) -> None:
    arms = [{"name": "flips", "use": "flips", "recipe": {"preset": "diffcoremix/cifar100", "lr": 0.5}}]
    config = parse_study(raw_study(Path(study.config.out), arms=arms))
    names = {one.arm: one.name for one in make_trials(prepare_study(config))}

    assert list(names) == ["flips", "original repeated 4x (preset diffcoremix/cifar100, lr=0.5)"]
    assert names["original repeated 4x (preset diffcoremix/cifar100, lr=0.5)"].startswith("original-repeated-4x-preset")


def test_file_names_keep_letters_and_stay_short(tmp_path: Path) -> None:
    arms = ["原始", "翻转", "é", "!", "?", "x" * 300, "x" * 301, "图" * 100]
    study = prepare_study(parse_study(raw_study(tmp_path, seeds=[0], arms=[{"name": name} for name in arms])))
    names = [one.name for one in make_trials(study)]

    assert names[:3] == ["原始-s0", "翻转-s0", "é-s0"]
    assert len(set(names)) == len(arms)
    assert max(len(name.encode()) for name in names) <= 83


def test_a_study_goes_on_from_another_directory(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(study.config.out)
    shutil.copytree(here, tmp_path / "one")
    monkeypatch.chdir(tmp_path / "one")
    relative = prepare_study(parse_study(raw_study(Path("."))))
    assert list(pending_runs(relative)) == []  # the run was made by its absolute path
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    again = prepare_study(parse_study(raw_study(Path("two"))))

    assert list(pending_runs(again)) == []
    assert {one.digest for one in make_trials(again)} == {one.digest for one in make_trials(study)}


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_run_knows_its_ids_when_their_file_is_gone(study: Study, tmp_path: Path, is_recorded: bool) -> None:
    shutil.copytree(f"{study.config.folder}/runs/flips-0", tmp_path / "flips-0")
    ids = tmp_path / "ids.txt"
    shutil.copy(Path(study.files.root) / "subsets/0.txt", ids)
    def change(facts: dict[str, Any]) -> None:
        facts["config"]["data"]["ids"] = str(tmp_path / "gone.txt")
        if not is_recorded:  # as runs were written before
            del facts["ids_sha256"]

    rewrite_json(tmp_path / "flips-0/run.json", change, is_old=not is_recorded)
    config = runs.open_run(str(tmp_path / "flips-0")).config

    same = config.model_copy(update={"data": config.data.model_copy(update={"ids": str(ids)})})
    assert runs.prepare(same).totals().pending == 0
    ids.write_text("".join(f"{one}\n" for one in ids.read_text().split()[1:]))
    with pytest.raises(DigestMismatch, match=r"data\.ids"):
        runs.prepare(same)


@pytest.mark.parametrize(("weight", "rows"), [(0.995, 20), (1.995, 40), (1.96, 39), (0.03, 1), (2.0, 40)])
def test_a_weight_that_rounds_to_whole_rows(study: Study, weight: float, rows: int) -> None:
    data, index = study.subsets[0]
    found = TrainingSet.of_seeds(index, data, weight)
    assert len(found.epoch(0, 0)) == found.epoch_rows == rows


def test_a_weight_that_leaves_no_row(study: Study) -> None:
    raw = raw_study(Path(study.config.out), arms=[{"name": "few", "use": "flips", "real": 0, "weight": 0.004}])
    with pytest.raises(UsageError, match=r"an epoch has no row, because 0\.004 x 60 rows round to 0"):
        make_trials(prepare_study(parse_study(raw)))


def test_a_generator_is_fine_tuned_on_the_rows_of_each_seed(tmp_path: Path) -> None:
    """Once for all expansions that ask for the same; a method that takes the weights as they are has no use for it."""
    text = "a photo of a {token} shape"
    fit = {"adapter": {"recipe": {"preset": "tiny", "strategy": "ti", "steps": 1, "batch": 4, "prompt": text},
                       "flips": False, "sheet": None, "tensorboard": False}}
    method = {"name": "diffmix", "ratio": 1, "strengths": [0.5], "steps": 2, "prompt": text}
    variants = {name: {"method": {**method, "variant": name}, "fit": fit} for name in ("diff_mix", "diff_gen")}
    raw = raw_study(tmp_path, expansions=variants, arms=[{"name": name, "use": name} for name in variants])
    made = list(pending_runs(prepare_study(parse_study(raw))))
    adapters = {(run.config.method.variant, run.config.seed): Path(str(run.config.artifacts["adapter"])).resolve()
                for run in made}

    assert adapters["diff_mix", 0] == adapters["diff_gen", 0] != adapters["diff_mix", 1] == adapters["diff_gen", 1]
    assert all(run.facts["models"]["adapter"] for run in made)
    vanilla = {"real": {"method": {"name": "diffmix", "variant": "real_mix", "prompt": "a {name}"}, "fit": fit}}
    with pytest.raises(ConfigError, match=r"expansions\.real\.fit\.adapter: has no effect on diffmix real_mix, which"):
        parse_study(raw_study(tmp_path, expansions=vanilla, arms=[{"name": "real", "use": "real"}]))


@pytest.mark.study
def test_what_a_judge_compares_with_is_made_of_the_rows_of_each_seed(tmp_path: Path) -> None:
    """For a method that brings its judge, and for one that is given one; the class means of both are made once."""
    own = {"method": {"name": "diffcoremix", "ratio": 1, "steps": 4, "prompt": "{context} {name}", "negatives": [],
                      "contexts": ["the digit"]}, "fit": {}}
    given = {"method": {"name": "img2img", "ratio": 1, "steps": 4}, "fit": {},
             "accept": {"to": "class", "deviations": 1.0}}
    raw = raw_study(tmp_path, expansions={"own": own, "given": given},
                    arms=[{"name": name, "use": name} for name in ("own", "given")])
    study = prepare_study(parse_study(raw))
    made = {(run.config.name, run.config.seed): run for run in pending_runs(study)}
    folders = {key: {kind: Path(folder).resolve() for kind, folder in run.config.artifacts.items()}
               for key, run in made.items()}
    assert {name: set(folders[f"{name}-0", 0]) for name in ("own", "given")} == {
        "own": {"image_features", "thresholds"}, "given": {"thresholds"}}
    for seed in (0, 1):
        features = open_image_features(folders[f"own-{seed}", seed]["image_features"])
        assert set(features.ids.to_pylist()) == set(study.subsets[seed][1].seed_ids)
        assert folders[f"own-{seed}", seed]["thresholds"] == folders[f"given-{seed}", seed]["thresholds"]
    assert folders["own-0", 0]["thresholds"] != folders["own-1", 1]["thresholds"]
    raw["expansions"]["given"].pop("fit")
    with pytest.raises(ConfigError, match=r"expansions\.given\.artifacts\.thresholds: accept needs scores of the real"):
        prepare_study(parse_study(raw))
