"""What one sample is worth: the arms that follow from a study, and every case of what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.api.verbs import plan, validate
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.loader.training_set import TrainingSet
from rayexpand.reports.figure import read_figure
from rayexpand.reports.study import write_study_report
from rayexpand.storage.places import open_files
from rayexpand.studies.config import parse_study
from rayexpand.studies.parts import Study
from rayexpand.studies.study import prepare_study
from rayexpand.studies.summary import summary
from rayexpand.studies.trial import open_work
from rayexpand.studies.trials import make_trials
from rayexpand.studies.value_config import repeats_of, updates_of
from tests.classifier.test_statistics import rng_of
from tests.reports.test_study import section
from tests.studies.test_study import expanded, raw_study
from tests.studyfolder import StudyFolder

REAL = {0.25: 0.5, 0.5: 0.6, 1: 0.7, 2: 0.78, 4: 0.84}  # accuracy by size
CHECKS = {"held out": 0.78, "repeated": 0.70}


def valued(folder: Path, samples: dict[float, float], *, real: dict[float, float] = REAL,
           checks: dict[str, float] = CHECKS, alone: dict[float, float] | None = None, seeds: int = 3,
           images: int = 2000, config: dict[str, Any] | None = None, **fields: Any) -> StudyFolder:
    """A study of 100 real images whose arms have these accuracies, nearly the same images right in all."""
    study = StudyFolder(folder, {"arms": [{"name": "original"}], "seeds": list(range(seeds)), "value": {},
                                 **(config or {})})
    for seed in range(seeds):
        score = np.arange(images) + 8 * rng_of(seed).normal(size=images)
        order = score.argsort().argsort()

        def add(name: str, share: float, seed: int = seed, order: np.ndarray = order, **more: Any) -> None:
            study.add(name, seed, order < round(share * images), **more)

        add("original", real.get(1, 0.7))
        for size, share in real.items():
            add(f"value: real {size:g}x", share, real_rows=round(100 * size),
                value={"role": "real", "size": size, "use": None, "ratio": 0})
        for role, share in checks.items():
            add(f"value: {role}", share, real_rows=200, value={"role": role, "size": 2, "use": None, "ratio": 0})
        for role, by_ratio in (("samples", samples), ("alone", alone or {})):
            for ratio, share in by_ratio.items():
                add(f"value: {role} {ratio:g}x", share, real_rows=100 * (role == "samples"),
                    synthetic_rows=round(100 * ratio), ratio=ratio, group="img2img",
                    value={"role": role, "size": 1, "use": "img2img", "ratio": ratio}, **fields)
    return study


def test_worth_by_hand(tmp_path: Path) -> None:
    study = valued(tmp_path / "s", {1: 0.74, 2: 0.76})
    page = Path(write_study_report(study.finish())).read_text()
    found = summary(study.folder)["value"]
    one, two = found["arms"]

    assert (one["n_eq"], one["k"]) == pytest.approx((141.421, 0.41421), abs=1e-3)
    assert one["low"] < one["k"] < one["high"]
    assert two["k"] == pytest.approx((100 * 2 ** 0.75 - 100) / 200, abs=1e-3)
    assert two["marginal"]["k"] == pytest.approx((100 * 2 ** 0.75 - 100 * 2 ** 0.5) / 100, abs=1e-3)
    assert [check["passed"] for check in found["checks"]] == [True, True]
    assert [check["k"] for check in found["checks"]] == pytest.approx([1, 0], abs=1e-3)
    assert found["first"].startswith("One sample of img2img is worth 0.34 real images [")
    assert f"at 2x on top of 100; the third is worth less than {two['marginal']['high']:.2f}" in found["first"]
    assert "expect wide intervals" not in found["first"]
    assert section(page, "value").startswith("> What is one sample worth? " + found["first"])
    assert one["sentence"] in section(page, "value")
    assert page.index('id="value"') < page.index('id="answer"'), "it is the first sentence of the page"
    drawn = read_figure(open_files(study.folder), "value")
    assert [(one["n_eq"], one["k"]) for one in drawn["arms, top-1 in %, n_eq and k in real images"]] == [
        (line["n_eq"], line["k"]) for line in found["arms"]]
    assert [one["top1"] for one in drawn["curve, images and top-1 in %"]] == pytest.approx(
        [100 * share for share in REAL.values()])
    assert not [c for c in summary(study.folder)["comparisons"] if "value" in c["arm"]], "judged here and nowhere else"


@pytest.mark.parametrize(("share", "case", "bound", "words"), [
    (0.9, "above", 3.0, "is worth more than 3 real images [3.00, open] at 1x on top of 100"),
    (0.4, "below", -0.75, "is harmful, worth less than -0.75 real images [open, -0.75] at 1x on top of 100"),
    (0.65, "inside", None, "is worth -0.29 real images [-0.")])
def test_cases(tmp_path: Path, share: float, case: str, bound: float | None, words: str) -> None:
    (one,) = summary(valued(tmp_path / "s", {1: share}).finish())["value"]["arms"]

    assert (one["case"], one["bound"]) == (case, bound)
    assert words in one["sentence"]


def test_a_flat_curve_defines_no_worth(tmp_path: Path) -> None:
    study = valued(tmp_path / "s", {1: 0.74}, real={0.5: 0.6, 1: 0.7, 2: 0.7}, checks={})
    page = Path(write_study_report(study.finish())).read_text()
    found = summary(study.folder)["value"]

    assert found["flat"]
    assert found["first"].startswith("Flat: more real images do not measurably help this recipe either")
    assert "worth is not defined" in found["first"]
    (one,) = found["arms"]
    assert "k" not in one
    assert "difference in points +4.0 [+" in one["sentence"]
    assert one["sentence"] in section(page, "value")


@pytest.mark.parametrize(("checks", "words"), [
    ({"held out": 0.71, "repeated": 0.70}, "100 held-out real images are worth 0.0"),
    ({"held out": 0.78, "repeated": 0.75}, "the 100 real images, repeated, are worth 0."),
    ({"held out": 0.9, "repeated": 0.70}, "100 held-out real images are worth more than 3.00 [3.00, open] real")])
@pytest.mark.fast_cases(1)
def test_a_check_that_fails_leaves_nothing_but_why(tmp_path: Path, checks: dict[str, float], words: str) -> None:
    study = valued(tmp_path / "s", {1: 0.74}, checks=checks, alone={1: 0.6, 2: 0.65})
    page = Path(write_study_report(study.finish())).read_text()
    found = summary(study.folder)["value"]

    assert found["first"].startswith(f"No worth is printed: {words}")
    assert (found["arms"], found["crossovers"]) == ([], [])
    assert "One sample" not in section(page, "value")


@pytest.mark.parametrize(("images", "seeds", "words"), [
    (600, 3, "(600 test images, fewer than 1,000: expect wide intervals)."),
    (1200, 2, "(2 seeds, fewer than 3: expect wide intervals)."),
    (1200, 1, "(1 seed, fewer than 3: expect wide intervals)."),
    (1, 1, "is not known: one test image and one seed say nothing of what varies.")])
def test_too_few_images_or_seeds_are_said_in_the_first_line(tmp_path: Path, images: int, seeds: int,
                                                            words: str) -> None:
    study = valued(tmp_path / "s", {1: 0.74}, images=images, seeds=seeds)
    assert words in summary(study.finish())["value"]["first"]


def test_a_curve_without_checks_is_said_to_have_none(tmp_path: Path) -> None:
    found = summary(valued(tmp_path / "s", {1: 0.74}, checks={}).finish())["value"]
    assert found["first"].startswith("One sample of img2img is worth 0.41 real images [")
    assert "value.checks is off" in found["first"]


def test_samples_alone_and_where_they_reach_the_real_images(tmp_path: Path) -> None:
    study = valued(tmp_path / "s", {1: 0.74}, alone={1: 0.60, 2: 0.66, 4: 0.74})
    found = summary(study.finish())["value"]
    alone = {one["ratio"]: one for one in found["arms"] if one["role"] == "alone"}
    (crossing,) = found["crossovers"]

    assert alone[1]["k"] == pytest.approx(0.5, abs=1e-3), "50 real images reach it, of 100 samples"
    assert alone[4]["k"] == pytest.approx(1.41421 / 4, abs=1e-3)
    assert crossing["crossover"] == pytest.approx(200 * 2 ** 0.5, abs=0.5)
    assert "img2img alone reaches 100 real images with 283 samples [" in crossing["sentence"]


def test_real_images_that_are_not_reached(tmp_path: Path) -> None:
    real = {0.5: 0.729, 1: 0.796, 2: 0.85, 4: 0.9}
    study = valued(tmp_path / "s", {1: 0.82}, real=real, checks={},
                   alone={1: 0.709, 2: 0.729, 5: 0.745, 10: 0.760})
    (one,) = summary(study.finish())["value"]["crossovers"]

    assert one["crossover"] is None
    assert (one["best"], one["gap"]) == (1000, pytest.approx(0.036, abs=1e-3))
    assert "best with 1,000 samples, 3.6 points below; laws that fit as well say 5," in one["sentence"]
    assert "or never" in one["sentence"]


def test_prices_of_gif(tmp_path: Path) -> None:
    """800 for 10,000 real images, 40 for 10,000 samples."""
    study = valued(tmp_path / "s", {1: 0.74}, expansion_seconds=100 * 0.004 * 3600 / 2, fitting_seconds=0.0,
                   config={"price": {"gpu_hour": None, "cpu_hour": 2.0, "real_image": 0.08}})
    found = summary(study.finish())["value"]
    (one,) = found["arms"]

    assert one["price"]["sample"] == pytest.approx(0.004)
    assert one["price"]["break_even"] == pytest.approx(0.05)
    assert one["price"]["equivalent"] == pytest.approx(0.004 / one["k"])
    assert (one["price"]["low"], one["price"]["high"]) == pytest.approx((0.004 / one["high"], 0.004 / one["low"]))
    assert found["first"].endswith("; at your prices samples pay off above 0.05.")


def test_a_price_that_cannot_be_reckoned_is_said(tmp_path: Path) -> None:
    for name, price, seconds, words in (
            ("device", {"gpu_hour": 2.5, "real_image": 0.1}, 10.0,
             "trials ran on a CPU, and price.cpu_hour is not given"),
            ("seconds", {"cpu_hour": 2.5}, 0.0, "how long the samples took is not known")):
        study = valued(tmp_path / name, {1: 0.74}, expansion_seconds=seconds, fitting_seconds=0.0,
                       config={"price": {"gpu_hour": None, "cpu_hour": None, "real_image": None, **price}})
        found = summary(study.finish())["value"]
        assert [one["price"] for one in found["arms"]] == [None]
        assert f"No cost is printed: {words}." in found["first"]


def test_trainings_that_wait_are_named(tmp_path: Path) -> None:
    study = valued(tmp_path / "s", {1: 0.74})
    study.finish()
    (study.folder / "results/value:-real-4x-s1.json").unlink()
    found = summary(study.folder)["value"]

    assert "1 of its trainings are not finished ('value:-real-4x-s1')" in found["first"]


# ------------------------------------------------------------------------------------------------------------- planning


def raw_value(out: Path, n: int = 2, **changes: Any) -> dict[str, Any]:
    return raw_study(out, subset={"kind": "per_class", "n": n},
                     value={"real": [0.5, 1, 2, 4], "ratio": [1, 2], **changes})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return expanded(raw_value(tmp_path_factory.mktemp("value"), alone=True))


def test_value_becomes_ordinary_trials_of_equal_length(study: Study) -> None:
    trials = [one for one in make_trials(study) if one.seed == 0 and one.value]
    works = {one.arm: open_work(study.files, one, study.config.training) for one in trials}

    assert list(works) == [
        "value: real 0.5x", "value: real 1x", "value: real 2x", "value: real 4x",
        "value: real 1x and held-out real 1x", "value: real 1x repeated 2x", "value: real 1x and flips 1x",
        "value: real 1x and flips 2x", "value: flips 1x", "value: flips 2x"]
    assert {work.feed.total_steps for work in works.values()} == {6}
    assert {work.feed.batch for work in works.values()} == {8}
    counts = {arm: (work.feed.rows.n_real, work.feed.rows.n_synthetic) for arm, work in works.items()}
    assert counts["value: real 0.5x"] == (10, 0)
    assert counts["value: real 4x"] == (80, 0)
    assert counts["value: real 1x and held-out real 1x"] == (40, 0)
    assert counts["value: real 1x repeated 2x"] == (20, 0)
    assert works["value: real 1x repeated 2x"].feed.rows.epoch_rows == 40
    assert counts["value: real 1x and flips 2x"] == (20, 40)
    assert counts["value: flips 2x"] == (0, 40)
    assert {one.control_of for one in make_trials(study) if one.value} == {""}, "the checks are their controls"
    assert {"original repeated 2x", "original repeated 4x"} <= {one.arm for one in make_trials(study)}, "of other arms"


def test_sizes_lie_in_each_other_and_held_out_images_in_none(study: Study) -> None:
    ids = {key: set(index.seed_ids) for (seed, key), (_, index) in study.sizes.items() if seed == 1}
    base = set(study.subsets[1][1].seed_ids)

    assert ids["0.5"] < base < ids["2"] < ids["4"]
    assert base < ids["held out"]
    assert len(ids["held out"] - base) == 20
    assert not (ids["held out"] - base) & ids["4"]
    trials = {one.arm: one for one in make_trials(study) if one.seed == 1}
    rows = TrainingSet.load(Path(study.files.at(trials["value: real 1x and held-out real 1x"].rows)))
    assert rows.n_real == 40


def test_epochs_are_those_that_the_largest_arm_needs() -> None:
    rows = {"small": 10, "large": 400}
    assert updates_of(rows, 64, 5) == 5 * 6
    assert repeats_of(rows, 64) == {"small": 7, "large": 1}
    assert updates_of({"small": 10}, 64, 5) == 5


def test_sizes_without_images_are_left_out_and_below_twice_it_is_refused(tmp_path: Path) -> None:
    found = plan(raw_value(tmp_path, n=6)).to_dict()["arms"]
    assert "value: real 2x" in found
    assert "value: real 4x" not in found
    words = "every class needs 3 times its images in the subset, and one has 2.4 times"
    for ask in (plan, lambda raw: prepare_study(parse_study(raw))):
        with pytest.raises(UsageError, match=words):
            ask(raw_value(tmp_path, n=10))
    assert "value: real 2x" in plan(raw_value(tmp_path, n=10, checks=False)).to_dict()["arms"]
    with pytest.raises(UsageError, match="needs 2 times"):
        plan(raw_value(tmp_path, n=20, checks=False))
    assert any(words in line for line in validate(raw_value(tmp_path, n=10)).problems)


@pytest.mark.parametrize(("changes", "words"), [
    ({"value": {"real": [1, 0.5, 2]}}, "value.real: [1.0, 0.5, 2.0] must ascend"),
    ({"value": {"real": [0.5, 1]}}, "value.real: needs 1, the real images at hand, and 2 or more"),
    ({"value": {"ratio": [0]}}, "value.ratio: [0.0] must ascend from above 0"),
    ({"value": {"use": "flop"}}, "value.use: 'flop' is no expansion; known: flips"),
    ({"value": {}, "subset": {"kind": "full"}}, "value: all of data are the real images at hand"),
    ({"value": {}, "vary": "classifier"}, "vary: classifier trains on the real images of the first seed alone"),
    ({"value": {}, "expansions": {}, "arms": [{"name": "original"}]}, "value: there is no expansion"),
    ({"value": {}, "arms": [{"name": "value: real 1x"}]}, "the section value has an arm of this name"),
    ({"price": {"cpu_hour": 1}}, "price: says what samples cost beside what they are worth")])
@pytest.mark.fast_cases(3)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_study(raw_study(tmp_path, **changes))
    assert any(words in line for line in caught.value.problems), caught.value.problems


@pytest.mark.slow
def test_more_samples_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_study(parse_study(raw_value(tmp_path, ratio=[1, 5])))
    words = "value: real 1x and flips 5x.ratio: 5 copies of each seed asked for"
    assert any(words in line for line in caught.value.problems), caught.value.problems
