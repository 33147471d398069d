"""What `plan` and `validate` say of a study before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.stats import t as student

from rayexpand import api
from rayexpand.classifier.statistics import Noise
from rayexpand.studies.foresight import sight
from rayexpand.studies.summary import summary
from tests.classifier.test_statistics import equal_arms
from tests.studies.test_study import raw_study
from tests.studyfolder import StudyFolder


@pytest.mark.parametrize(("images", "seeds", "words"), [
    (2000, 3, "sees 2.4 points with 3 seeds and 2,000 test images; 1 point needs at least 9,"),
    (10_000, 3, "sees 1.2 points with 3 seeds and 10,000 test images; 1 point needs 8 seeds ("),
    (50_000, 3, "sees 0.8 points with 3 seeds and 50,000 test images (20 % of the test images answered"),
    (500, 1, "fewer than 3 seeds claim nothing")])
def test_what_a_study_can_see_in_words(images: int, seeds: int, words: str) -> None:
    assert words in sight(images, seeds)["sentence"]


def test_what_is_judged_together_is_seen_less() -> None:
    """Bonferroni's level: of ten, each at half a percent."""
    noise = Noise(0.2, 0.5, 0.003)
    found = sight(10_000, 5, noise, compared=10)
    v = 0.5 * 0.2 / 10_000 + 0.5 * 0.2 / 50_000 + 0.003 ** 2 / 5
    df = v ** 2 / ((0.5 * 0.2 / 50_000 + 0.003 ** 2 / 5) ** 2 / 4 + (0.1 / 10_000 + 0.1 / 50_000) ** 2 / 9_999
                   + (0.1 / 50_000) ** 2 / (4 * 9_999))

    assert found["together"] == pytest.approx(100 * (student.isf(0.0025, df) + student.ppf(0.8, df)) * v ** 0.5)
    assert f"in one comparison, {found['together']:.1f} in one of 10 that are judged together" in found["sentence"]


def test_seeds_that_differ_too_much_are_said() -> None:
    found = sight(10_000, 3, Noise(0.2, 0.5, 0.05))
    assert "1 point needs more than 10 seeds, on any number of test images" in found["sentence"]
    assert "5.0 points between seeds: measured" in found["sentence"]


def test_plan_and_validate_say_it_before_anything_is_made(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    found = api.plan(raw)
    words = "sees 23.3 points with 2 seeds and 30 test images in one comparison, "

    assert found.to_dict()["arms"] == ["original", "flips 1x", "flips 3x"]
    assert (found.to_dict()["trainings"], found.to_dict()["controls"]) == (6, 4)
    assert any(words in line for line in found.below())
    assert words in api.validate(raw).sees
    assert not any(tmp_path.iterdir())


def test_two_repetitions_are_measured(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    study = StudyFolder(tmp_path / "small", {"arms": [{"name": "original"}, {"name": "flips"}], "seeds": [0, 1]})
    correct = equal_arms(3, 2, 2, 30)
    for seed in range(2):
        study.add("original", seed, correct[0][seed])
        study.add("flips", seed, correct[1][seed], synthetic_rows=20)
    study.finish()
    found, page = api.plan(raw).to_dict()["sees"], summary(study.folder)["sees"]

    assert found["measured"]
    assert found["disagree"] == pytest.approx((correct[0] != correct[1]).mean(), abs=0.05)
    for one in (found, page):
        assert one.pop("together") >= one["points"]
        assert one.pop("compared") in (1, 4), "the page judges what is there"
        one.pop("sentence")
    assert found == page


def test_arms_without_a_difference_measure_nothing(tmp_path: Path) -> None:
    """Equal answers do not say that every difference would be seen, and one test image is no error of the page."""
    for images in (200, 1):
        study = StudyFolder(tmp_path / str(images))
        for seed in range(3):
            for arm in ("original", "flips"):
                study.add(arm, seed, equal_arms(3, 1, 1, images)[0][0] if images > 1 else [seed == 0])
        sees = summary(study.finish())["sees"]
        assert sees is None if images == 1 else not sees["measured"]


def test_a_study_of_values_alone_is_measured_by_them(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "small", {"arms": [{"name": "original"}], "seeds": [0, 1]})
    correct = equal_arms(4, 2, 2, 30)
    for seed in range(2):
        study.add("original", seed, correct[0][seed])
        study.add("value: real 2x", seed, correct[1][seed], value={"role": "real", "size": 2.0})
    study.finish()

    assert summary(study.folder)["sees"]["measured"]
