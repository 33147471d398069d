"""Differences between arms: families that are judged together, and what the best epoch says beside the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.classifier.statistics import crossed, expected_maximum, holm
from rayexpand.reports.study import write_study_report
from rayexpand.studies.comparisons import best_minus_last
from rayexpand.studies.summary import summary
from tests.classifier.test_statistics import equal_arms
from tests.reports.test_study import arm_of, compared, section
from tests.studyfolder import StudyFolder

IMAGES, BETTER = 400, 24  # images that the good arm has right in all seeds, beside the baseline


def family(folder: Path, arms: int = 6, seeds: int = 3, gains: int = 1, **fields: Any) -> StudyFolder:
    """A baseline and arms that differ by chance from it, of which the first `gains` are better."""
    study, correct = StudyFolder(folder), equal_arms(5, arms + 1, seeds, IMAGES)
    for arm in range(1, gains + 1):
        wrong = np.flatnonzero(~correct[0].any(axis=0))[:BETTER]
        correct[arm] = correct[0]
        correct[arm][:, wrong] = True
    for seed in range(seeds):
        study.add("original", seed, correct[0][seed])
        for arm in range(1, arms + 1):
            study.add(f"arm {arm}", seed, correct[arm][seed], synthetic_rows=20, group="made", ratio=1.0, **fields)
    return study


def test_arms_are_judged_together(tmp_path: Path) -> None:
    study = family(tmp_path / "s")
    page = Path(write_study_report(study.finish())).read_text()
    found = summary(study.folder)
    raw = [one["p"] for one in found["comparisons"]]
    adjusted = [one["adjusted"] for one in found["comparisons"]]

    assert [one["by"] for one in adjusted] == ["max-t"] * 6
    assert [one["of"] for one in adjusted] == [6] * 6
    assert all(p <= one["p"] <= bound for p, one, bound in zip(raw, adjusted, holm(raw), strict=True))
    assert any(one["p"] < bound - 0.01 for one, bound in zip(adjusted, holm(raw), strict=True)), "sharper than Holm"
    assert [one["verdict"] for one in found["comparisons"]] == ["gain"] + ["open"] * 5
    for one in found["comparisons"]:
        assert one["adjusted"]["low"] < one["low"] < one["high"] < one["adjusted"]["high"]
    assert "+6.0 points, 95 % interval +" in section(page, "answer")
    assert "(one of 6, p " in section(page, "answer")
    assert "are one family" in section(page, "answer")


def test_a_raw_p_below_five_percent_is_no_verdict(tmp_path: Path) -> None:
    """Of many equal arms some one stands out by chance."""
    for number in range(40):
        correct = equal_arms(number, 9, 3, 200)
        if min(p := [crossed(correct[arm].astype(int) - correct[0]).p for arm in range(1, 9)]) < 0.04:
            break
    study = StudyFolder(tmp_path / "s")
    for seed in range(3):
        for arm in range(9):
            study.add(f"arm {arm}" if arm else "original", seed, correct[arm][seed])
    found = summary(study.finish())["comparisons"]

    assert sorted(one["p"] for one in found) == pytest.approx(sorted(p))
    assert {one["verdict"] for one in found} == {"open"}


def test_controls_are_a_family_of_their_own(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    correct = equal_arms(1, 4, 3, 100)
    for seed in range(3):
        study.add("original", seed, correct[0][seed])
        study.add("made", seed, correct[1][seed], synthetic_rows=20, group="made", ratio=1.0)
        study.add("original repeated 2x", seed, correct[2][seed], control_of="made")
    found = summary(study.finish())

    assert compared(found, "made", "control")["adjusted"]["of"] == 1
    assert compared(found, "made", "control")["adjusted"]["p"] == compared(found, "made", "control")["p"]
    assert compared(found, "made")["adjusted"]["of"] == 2


@pytest.mark.parametrize("lost", ["predictions", "trial"])
def test_holm_where_predictions_are_missing(tmp_path: Path, lost: str) -> None:
    study = family(tmp_path / "s", arms=4)
    study.finish()
    for name in ("predictions/arm-4-s1.parquet", *(("results/arm-4-s1.json",) if lost == "trial" else ())):
        (study.folder / name).unlink()
    found = summary(study.folder)["comparisons"]
    known = [one for one in found if one["p"] is not None]
    p = [one["p"] for one in known]

    assert len(known) == (3 if lost == "predictions" else 4)
    assert {one["adjusted"]["by"] for one in known} == {"Holm"}
    assert [one["adjusted"]["p"] for one in known] == holm([*p, *[1.0] * (4 - len(p))])[:len(p)]
    assert compared({"comparisons": found}, "arm 4")["verdict"] == ("none" if lost == "predictions" else "few")


def test_one_seed_is_images_alone_and_too_few(tmp_path: Path) -> None:
    study = family(tmp_path / "s", arms=1, seeds=1)
    (one,) = summary(study.finish())["comparisons"]

    assert one["verdict"] == "few"
    assert one["df"] == IMAGES - 1
    assert one["low"] > 0


# ------------------------------------------------------------------------------------------------------- best and last


def curve(*top1: float) -> list[dict[str, float]]:
    return [{"epoch": n, "step": n, "loss": 1.0, "top1": value} for n, value in enumerate(top1, 1)]


def test_best_minus_last_by_hand() -> None:
    last = {"top1": 0.60}
    trials = [{"history": curve(0.1, 0.5, 0.62, 0.58, 0.60), "best": {"top1": 0.62, "epoch": 3}, "last": last},
              {"history": curve(0.1, 0.5, 0.60, 0.64, 0.60), "best": {"top1": 0.64, "epoch": 4}, "last": last}]
    found = best_minus_last(trials)
    late = np.sqrt(np.mean([np.var([0.62, 0.58, 0.60], ddof=1), np.var([0.60, 0.64, 0.60], ddof=1)]))

    assert found is not None
    assert (found["mean"], found["epoch"]["mean"], found["tests"]) == (pytest.approx(0.03), 3.5, 5)
    assert found["interval"] == pytest.approx([0.03 - 12.7062 * 0.01, 0.03 + 12.7062 * 0.01], abs=1e-5)
    assert found["noise"] == pytest.approx(expected_maximum(5) * late)
    assert best_minus_last([{**trials[0], "history": trials[0]["history"][:1]}]) is None
    alone = best_minus_last(trials[:1])
    assert alone is not None
    assert (alone["interval"], alone["mean"]) == (None, pytest.approx(0.02))


def test_a_sign_that_depends_on_the_epoch_is_flagged(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in range(3):
        study.add("original", seed, np.arange(100) < 60, best={"top1": 0.70, "epoch": 3})
        study.add("made", seed, np.arange(100) < 62, best={"top1": 0.66, "epoch": 5}, synthetic_rows=20)
    page = Path(write_study_report(study.finish())).read_text()
    found = summary(study.folder)

    assert compared(found, "made")["flips"]
    words = "made against original: +2.0 points after the last epoch and -4.0 in the best one"
    assert any(words in line for line in found["warnings"])
    assert words in section(page, "answer")
    assert arm_of(found, "made")["best"]["minus_last"]["mean"] == pytest.approx(0.04)
    assert "+4.0" in section(page, "table")
