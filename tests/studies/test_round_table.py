"""Loops beside their controls in the tables of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rayexpand.reports.study import write_study_report
from rayexpand.studies.results import read_study
from rayexpand.studies.round_table import HEADS, cost_table, round_table
from rayexpand.studies.summary import summarised
from tests.studyfolder import StudyFolder


def loop_facts(spent: int = 60, ended: str = "budget: spent", **more: Any) -> dict[str, Any]:
    loop = {"loop": "guided-0", "rounds": spent // 20, "of": 3, "spent": spent, "planned": 60, "kept": spent,
            "stopped": spent < 60, "ended": ended}
    return {"loops": [loop], "scoring_seconds": 2.0, "guide_seconds": 3.0, **more}


def written(tmp_path: Path, spent: int = 60) -> Path:
    """An arm in rounds that is right more often than one control, and as often as another."""
    folder = StudyFolder(tmp_path, {"name": "rounds", "seeds": [0, 1, 2], "arms": [
        {"name": "original"}, {"name": "guided", "use": "guided"}]})
    draw = np.random.default_rng(0)
    for seed in range(3):
        plain = draw.random(400) < 0.5
        better = plain | (draw.random(400) < 0.2)
        same = np.where(draw.random(400) < 0.02, ~better, better)
        shared = {"synthetic_rows": spent, "ratio": spent / 20, "group": "guided", "expansion_seconds": 10.0}
        folder.add("original", seed, plain)
        folder.add("guided", seed, better, **shared, fitting_seconds=5.0, rounds=loop_facts(
            spent, controls={"uniform": "one-shot", "direction": "random"}, same=["targets"]))
        folder.add("one-shot", seed, plain, **shared, control_of="guided", rounds={"stands_for": "uniform"})
        folder.add("random", seed, same, **shared, control_of="guided", fitting_seconds=3.0,
                   rounds={"stands_for": "direction"})
    return folder.finish()


def test_each_loop_stands_beside_its_controls_with_intervals_and_words(tmp_path: Path) -> None:
    found = summarised(read_study(written(tmp_path)))
    table = round_table(found)
    assert table is not None
    heads, lines = table
    assert heads == HEADS
    assert [(line[0], line[2], line[6]) for line in lines] == [("guided", "one-shot", "better"),
                                                               ("guided", "random", "no difference")]
    judged = {one["stands_for"]: one for one in found["comparisons"] if one["kind"] == "rounds"}
    assert judged["direction"]["low"] < 0 < judged["direction"]["high"]
    assert judged["uniform"]["adjusted"]["of"] == 2, "a family of their own"
    assert judged["uniform"]["low"] > 0
    assert "no difference is shown" in judged["direction"]["sentence"]
    assert not any("No control" in line for line in found["warnings"] if "one-shot" in line)


def test_scoring_and_guides_are_in_the_cost(tmp_path: Path) -> None:
    table = cost_table(summarised(read_study(written(tmp_path))))
    assert table is not None
    lines = {line[0]: line[1:] for line in table[1]}
    assert lines["guided"] == ("3 of 3", "60 of 60", "60", "10", "2", "3", "3")
    assert lines["random"] == ("", "", "60", "10", "0", "3", "3")
    assert lines["one-shot"] == ("", "", "60", "10", "0", "0", "3")
    assert "original" not in lines


def test_both_budgets_are_printed_where_a_loop_stopped(tmp_path: Path) -> None:
    folder = written(tmp_path, spent=40)
    found = summarised(read_study(folder))
    notes = "\n".join(found["notes"])
    assert "guided: the loop ended early in 3 of 3 seeds, so 40 of 60 samples were spent" in notes
    assert "guided: random targets would be its own samples" in notes
    page = Path(write_study_report(folder)).read_text()
    assert "Rounds beside their controls" in page
    assert "40 of 60" in page
    assert "no difference" in page
    assert notes.splitlines()[-1] in page


def test_a_study_without_rounds_says_nothing_of_them(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, {"arms": [{"name": "original"}]})
    folder.add("original", 0, [True, False])
    found = summarised(read_study(folder.finish()))
    assert (round_table(found), cost_table(found)) == (None, None)
    assert "rounds" not in found["arms"][0]
