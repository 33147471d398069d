"""Rows without an expansion: what they answer, what they are refused for, and how tables mark them."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rayexpand.classifier.classifier import TrainBatch, distillation
from rayexpand.classifier.recipe import make_recipe
from rayexpand.contract.errors import ConfigError, ModelError, UsageError
from rayexpand.data.seeds import digits_split
from rayexpand.loader.images import ImageReader
from rayexpand.loader.loader import Loader
from rayexpand.loader.training_set import TrainingSet
from rayexpand.models.guides import ClipGuide, load_guide
from rayexpand.models.tiny import digits
from rayexpand.reports.study import write_study_report
from rayexpand.storage.tables import read_json
from rayexpand.studies.baseline_models import ClipNetwork, class_texts, fit_linear, guide_of, teacher
from rayexpand.studies.baselines import NOTE, Baseline, problems, recipe_of
from rayexpand.studies.config import parse_study, study_preflight
from rayexpand.studies.parts import Study, Trial
from rayexpand.studies.results import read_study
from rayexpand.studies.study import prepare_study
from rayexpand.studies.summary import summary
from rayexpand.studies.trial import check_recipes, run_trials
from rayexpand.studies.trials import make_trials, pending_trials
from tests.studies.test_study import SMALL, raw_study

ALL = ["clip_zero_shot", "clip_linear", "clip_finetune", "clip_distill"]


def plain(out: Path, **changes: Any) -> dict[str, Any]:
    return raw_study(out, **{"seeds": [0, 1], "expansions": {}, "arms": [{"name": "original"}], **changes})


@pytest.fixture(scope="module")
def guide() -> ClipGuide:
    found = load_guide("digits", None, digits.CLASS_NAMES, device="cpu")
    assert isinstance(found, ClipGuide)
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Trial]]:
    study = prepare_study(parse_study(plain(tmp_path_factory.mktemp("baselines"), baselines=ALL)))
    trials = make_trials(study)
    check_recipes(trials, 10)
    assert [problem for _, problem in run_trials(study.files, trials, study.config.training) if problem] == []
    return study, trials


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.266217), (4.0, 0.328202)])
def test_distillation_is_that_of_the_specification(temperature: float, expected: float) -> None:
    teacher_13, student_13 = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])

    assert float(distillation(teacher_13, student_13, temperature)) == pytest.approx(expected, abs=2e-6)
    assert float(distillation(teacher_13.repeat(2, 1), student_13.repeat(2, 1), temperature)) == pytest.approx(
        expected, abs=2e-6)
    assert float(distillation(teacher_13, teacher_13, temperature)) == pytest.approx(0, abs=1e-6)


def test_they_have_results_and_predictions_that_pair_with_the_arms(done: tuple[Study, list[Trial]]) -> None:
    study, trials = done
    found = summary(str(study.files.root))
    against = {one["arm"]: one for one in found["comparisons"]}

    assert [arm["arm"] for arm in found["arms"]] == ["original", *sorted(ALL)]
    for kind in ALL:
        assert against[kind]["against"] == "original"
        assert (against[kind]["seeds"], against[kind]["images"]) == ([0, 1], 30)
        assert against[kind]["low"] is not None
    assert pending_trials(study.trial_folder, trials) == []


def test_zero_shot_says_what_the_guide_says_in_every_repetition(done: tuple[Study, list[Trial]],
                                                                guide: ClipGuide) -> None:
    view = read_study(str(done[0].files.root))
    first, second = (view.predicted(f"clip-zero-shot-s{seed}") for seed in (0, 1))
    results = [read_json(done[0].files, f"results/clip-zero-shot-s{seed}.json") or {} for seed in (0, 1)]

    assert np.array_equal(first.predicted, second.predicted)  # type: ignore[union-attr]
    images, labels = digits_split()["test"]
    own = guide.zero_shot(images) == labels
    assert results[0]["last"]["top1"] == pytest.approx(own.mean(), abs=0.1)  # of all, and of three of each class
    assert (results[0]["updates"], results[0]["samples_seen"]) == (0, 0)
    assert results[0]["baseline"]["templates"] == "one"


def test_each_is_marked_wherever_it_is_shown(done: tuple[Study, list[Trial]]) -> None:
    study, _ = done
    page = Path(str(write_study_report(str(study.files.root)))).read_text()
    found = summary(str(study.files.root))
    lines = list(csv.DictReader(io.StringIO((Path(study.files.root) / "summary.csv").read_text())))

    for kind in ALL:
        assert f"{kind} {NOTE}" in page
        assert sum(line.startswith(kind) for line in found["notes"]) == 1
    assert {line["arm"]: bool(line["note"]) for line in lines} == {"original": False, **dict.fromkeys(ALL, True)}


def test_a_study_without_them_says_and_digests_what_it_did(tmp_path: Path, done: tuple[Study, list[Trial]]) -> None:
    study = prepare_study(parse_study(plain(tmp_path)))
    (trial, *_) = make_trials(study)
    beside = next(one for one in done[1] if one.name == trial.name)

    assert "baselines" not in study.config.model_dump(mode="json")
    assert trial.digest == beside.digest
    assert trial.digest == replace(trial, baseline={}).digest != replace(trial, baseline={"kind": "x"}).digest
    assert [problem for _, problem in run_trials(study.files, [trial], study.config.training) if problem] == []
    assert not any(NOTE in line for line in summary(str(study.files.root)).get("notes", ()))
    write_study_report(str(study.files.root))


def test_a_study_reads_what_it_wrote(done: tuple[Study, list[Trial]]) -> None:
    config = done[0].config
    assert parse_study(config.model_dump(mode="json")) == config


def test_their_answers_depend_on_guide_and_settings_and_not_on_where_it_lies(done: tuple[Study, list[Trial]]) -> None:
    trial = next(one for one in done[1] if one.arm == "clip_distill")

    def changed(**fields: Any) -> Trial:
        return replace(trial, baseline={**trial.baseline, **fields})

    assert changed(guide={"weights": "elsewhere"}).digest == trial.digest
    assert len({trial.digest, *(changed(**one).digest for one in (
        {"sha256": "x"}, {"temperature": 1.0}, {"weight": 0.1}, {"view": "seed"}))}) == 5


def test_fine_tuning_starts_at_zero_shot(guide: ClipGuide) -> None:
    recipe = make_recipe({"preset": "digits", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)})
    x_BCHW = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (recipe.mean, recipe.std))
    own = load_guide("digits", None, digits.CLASS_NAMES, device="cpu")
    assert isinstance(own, ClipGuide)
    network = ClipNetwork(own, recipe)

    torch.testing.assert_close(network((x_BCHW - mean) / std), guide.logits(x_BCHW), rtol=1e-4, atol=1e-4)
    names = {name for name, one in network.named_parameters() if one.requires_grad}
    assert "head" in names
    assert all(name == "head" or name.startswith("visual.") for name in names)


def test_the_recipe_of_fine_tuning() -> None:
    study = {"preset": "digits", "updates": 50, "epochs": 5, "lr": 0.1, "warmup_epochs": 2}
    made = recipe_of(Baseline(kind="clip_finetune"), study)

    assert (made.optimiser, made.lr, made.weight_decay, made.schedule, made.warmup_epochs, made.updates) == (
        "adamw", 1e-5, 0.1, "cosine", 0.5, 50)
    assert recipe_of(Baseline(kind="clip_finetune", recipe={"warmup_epochs": 1, "lr": 0.5}), study).warmup_epochs == 1
    assert recipe_of(Baseline(kind="clip_distill"), study) == make_recipe(study)


@pytest.mark.parametrize("view", ["same", "seed"])
def test_the_teacher_is_shown_what_its_view_says(done: tuple[Study, list[Trial]], view: str) -> None:
    study, trials = done
    trial = next(one for one in trials if one.arm == "clip_distill")
    loader = Loader(TrainingSet.load(Path(study.files.root) / trial.rows), make_recipe(SMALL), trial.seed)
    guide = guide_of(trial.baseline, loader.rows.classes, "cpu")
    taught = teacher({**trial.baseline, "view": view}, loader, "cpu")
    (batch,) = loader.batches(3, 4)
    x_BCHW = torch.rand(len(batch.x_BHWC), 3, 16, 16, generator=torch.Generator().manual_seed(1))
    epoch, within = divmod(3, loader.epoch_steps)
    whole = np.stack(ImageReader(loader.rows).decoded(loader.slots(epoch).items[within]))

    expected = x_BCHW if view == "same" else torch.from_numpy(whole).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(taught.logits(batch, x_BCHW), guide.logits(expected), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(taught.logits(batch, x_BCHW), taught.logits(
        TrainBatch(batch.x_BHWC, batch.y_BK, 2), 1 - x_BCHW))


def test_texts_are_means_of_unit_length(guide: ClipGuide) -> None:
    both = class_texts(guide, ["one", "two"], ["a photo of a {name}", "a {name}"])
    mean = guide.texts(["a photo of a two", "a two"]).mean(axis=0)

    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(both[1], mean / np.linalg.norm(mean), atol=1e-6)
    assert class_texts(guide, ["one"], "openai").shape == class_texts(guide, ["one"], "simple").shape


# Logistic regression -------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 3], 20)
    return rng.standard_normal((60, 4)) + 1.5 * np.eye(4)[labels], np.eye(5, dtype=np.float32)[labels]


def test_the_linear_probe_is_scikit_learns(rows: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.linear_model import LogisticRegression

    h_ND, y_NK = rows
    strength, weight_KD, bias_K = fit_linear(h_ND, y_NK, None, None)
    own = LogisticRegression(C=0.316, max_iter=1000).fit(h_ND, y_NK.argmax(axis=1))
    logits_NK = h_ND @ weight_KD.T + bias_K

    assert strength == 0.316
    assert np.array_equal(logits_NK.argmax(axis=1), own.predict(h_ND))
    assert not {2, 4} & {*logits_NK.argmax(axis=1)}  # classes without images


def test_two_classes_have_two_logits(rows: tuple[np.ndarray, np.ndarray]) -> None:
    from sklearn.linear_model import LogisticRegression

    h_ND, y_N2 = rows[0][:40], rows[1][:40, :2]
    _, weight_KD, bias_K = fit_linear(h_ND, y_N2, 1.0, None)
    odds = np.exp(h_ND @ weight_KD.T + bias_K)

    expected = LogisticRegression(C=1.0, max_iter=1000).fit(h_ND, y_N2.argmax(axis=1)).predict_proba(h_ND)
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), expected, atol=1e-6)


def test_a_soft_label_counts_for_each_of_its_classes(rows: tuple[np.ndarray, np.ndarray]) -> None:
    h_ND, y_NK = rows[0], 0.75 * rows[1] + 0.25 * np.roll(rows[1], 1, axis=0)
    twice = np.concatenate([h_ND] * 4), np.concatenate([rows[1]] * 3 + [np.roll(rows[1], 1, axis=0)])

    for soft, hard in zip(fit_linear(h_ND, y_NK, 1.0, None)[1:], fit_linear(*twice, 0.25, None)[1:], strict=True):
        np.testing.assert_allclose(soft[[0, 1, 3]], hard[[0, 1, 3]], atol=2e-3)


def test_validation_images_choose_the_least_penalty_that_is_best(rows: tuple[np.ndarray, np.ndarray]) -> None:
    h_ND, y_NK = rows
    noisy = y_NK[np.random.default_rng(1).permutation(60)]
    chosen, *_ = fit_linear(h_ND, noisy, None, (h_ND, noisy.argmax(axis=1)))
    assert chosen > 0.1  # it may learn by heart
    assert fit_linear(h_ND, y_NK, None, (h_ND, np.full(60, 7)))[0] == pytest.approx(1e-6)  # none is right: the first


def test_the_study_s_validation_images_choose(tmp_path: Path) -> None:
    raw = plain(tmp_path, seeds=[0], validation={"source": "digits", "split": "pool", "per_class": 2},
                baselines=["clip_linear"])
    study = prepare_study(parse_study(raw))
    trial = next(one for one in make_trials(study) if one.arm == "clip_linear")

    assert trial.baseline["validation"]["split"] == "pool"
    assert trial.baseline["validation_sha256"]
    assert [problem for _, problem in run_trials(study.files, [trial], study.config.training) if problem] == []
    found = read_json(study.files, "results/clip-linear-s0.json")
    assert found is not None
    assert (found["baseline"]["C_by"], found["baseline"]["features"]) == (
        "validation images", "projected, not normalised")


def test_other_names_of_the_classes_make_another_baseline(tmp_path: Path) -> None:
    """The texts that CLIP is asked come from them; a linear probe asks none."""
    names = tmp_path / "names.csv"
    digests = []
    for word in ("digit", "numeral"):
        names.write_text("key,name\n" + "".join(f"{key},{word} {key}\n" for key in range(10)))
        raw = plain(tmp_path, baselines=ALL, data={"source": "digits", "classes": str(names)})
        digests.append({one.arm: one.digest for one in make_trials(prepare_study(parse_study(raw))) if one.seed == 0})
    assert {arm for arm in digests[0] if digests[0][arm] != digests[1][arm]} == set(ALL) - {"clip_linear"}


def test_validation_images_of_other_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other/ant").mkdir(parents=True)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "other/ant/0.png")
    raw = plain(tmp_path, validation={"source": "imagefolder", "path": str(tmp_path / "other")})
    with pytest.raises(UsageError, match="validation: its classes"):
        prepare_study(parse_study(raw))


def test_a_backbone_that_is_a_guide_s_is_refused_in_an_arm(tmp_path: Path) -> None:
    raw = plain(tmp_path, arms=[{"name": "original"}, {"name": "odd", "recipe": {"backbone": "clip"}}])
    with pytest.raises((ConfigError, ModelError), match="odd"):
        check_recipes(make_trials(prepare_study(parse_study(raw))), 10)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"baselines": ["clip_zeroshot"]}, r"baselines\.0\.kind: .*'clip_zero_shot'"),
    ({"baselines": [{"kind": "clip_zero_shot", "weight": 0.1}]}, "weight: no effect on clip_zero_shot"),
    ({"baselines": [{"kind": "clip_linear", "recipe": {"lr": 1}}]}, "recipe: no effect on clip_linear"),
    ({"baselines": [{"kind": "clip_zero_shot", "use": "flips"}]}, "clip_zero_shot trains on nothing"),
    ({"baselines": [{"kind": "clip_linear", "use": "flips"}]}, r"baselines\.clip_linear\.use: 'flips' is no expansion"),
    ({"baselines": ["clip_linear", "clip_linear"]}, r"baselines\.clip_linear: the name is given twice"),
    ({"baselines": [{"kind": "clip_linear", "name": "original"}]}, r"baselines\.original: the name is given twice"),
    ({"baselines": [{"kind": "clip_zero_shot", "templates": ["a photo"]}]}, "must have the placeholder {name}"),
    ({"baselines": [{"kind": "clip_zero_shot", "templates": []}]}, "is empty"),
    ({"baselines": [{"kind": "clip_finetune", "recipe": {"lr": 0}}]}, r"baselines\.clip_finetune\.recipe\.lr"),
    ({"baselines": [{"kind": "clip_finetune", "recipe": {"backbone": "resnet18"}}]}, "resnet18 would not be used"),
    ({"baselines": [{"kind": "clip_distill", "view": "seed", "recipe": {"mixup": 0.2}}]}, "mixup of the recipe mixes"),
    ({"baselines": [{"kind": "clip_distill", "recipe": {"loss": "bce"}}]}, "set loss: ce"),
    ({"baselines": [{"kind": "clip_distill", "guide": {"weights": "./none"}}]},
     r"baselines\.clip_distill\.guide\.weights"),
])
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path, changes: dict[str, Any],
                                                            message: str) -> None:
    try:
        found = study_preflight(parse_study(plain(tmp_path, **changes)))
    except ConfigError as error:
        found = list(error.problems)
    assert any(re.search(message, line) for line in found), found


def test_the_embedded_guide_must_be_meant(tmp_path: Path) -> None:
    one = Baseline(kind="clip_zero_shot")
    raw = plain(tmp_path, data={"source": "imagefolder", "path": str(tmp_path)})
    (problem,) = problems(one, make_recipe(SMALL), parse_study(raw).data)
    assert "the embedded default has seen digits only" in problem
