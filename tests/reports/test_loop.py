"""The page of a loop, and its live page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rayexpand import api
from rayexpand.contract.errors import UsageError
from rayexpand.contract.schema import Receipt
from rayexpand.reports.figure import read_figure
from rayexpand.reports.live import LiveView, shown_run
from rayexpand.reports.loop import write_loop_report
from rayexpand.runs.joined import open_samples
from rayexpand.storage.tables import read_table
from rayexpand.studies.rounds.loop import Loop, open_loop
from rayexpand.studies.rounds.plan import plan_loop
from rayexpand.studies.rounds.status import read_loop_status
from rayexpand.studies.rounds.summary import _allowed, loop_summary
from tests.reports.test_live import text_of
from tests.studies.rounds.conftest import MakeLoop, finished
from tests.studies.rounds.conftest import make_loop as make_loop
from tests.studies.rounds.test_learning import LONGER, SCORES, digits_loop


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """Three rounds by loss, scored before rounds 2 and 3."""
    return finished(digits_loop(tmp_path_factory.mktemp("loop"), rounds={
        "count": 3, "rule": "loss", "scores": LONGER, "shares": [1, 1, 1, 1]}, ratio=8))[0]


def test_the_page_says_what_the_files_hold(scored: Loop) -> None:
    folder = scored.config.folder
    found, page = loop_summary(folder), Path(write_loop_report(folder)).read_text()
    said = text_of(page)

    assert (found["budget"], found["spent"], found["left"]) == (160, 120, 40)
    assert "40 of 160 samples are not spent" in said
    dealt = np.array(found["dealt"])  # of class by round
    labels = scored.index.labels
    for number, of_class in enumerate(dealt, 1):
        kept = [one for one in open_samples(folder).store.receipts() if f"rounds/{number:04d}/" in one.data_file]
        made = pc.value_counts(read_labels(scored, kept)).to_pylist()
        assert {one["values"]: one["counts"] for one in made} == {
            label: count for label, count in enumerate(of_class) if count}
    assert dealt.sum(axis=1).tolist() == [40, 40, 40]

    for line in found["accuracy"]:
        right = read_table(scored.files, f"scores/{line['after'] + 1:04d}.parquet")["margin"].to_numpy() > 0
        assert (line["right"], line["images"]) == (right.sum(), 20)
        assert line["low"] <= line["accuracy"] <= line["high"]
        assert f"{line['right']} of 20" in said
    assert [one["after"] for one in found["accuracy"]] == [1, 2]
    drawn = read_figure(scored.files, "accuracy-by-round")["panels"][0]["lines"][0]["points"]
    assert [one["mean"] for one in drawn] == [100 * one["accuracy"] for one in found["accuracy"]]
    assert "Nothing was scored after round 3" in said

    table = read_table(scored.files, "scores/0003.parquet")
    hardest = found["hardest"][0]
    mine = np.isin(table["seed_id"].to_pylist(), [one for one, label in zip(
        scored.index.seed_ids, labels, strict=True) if label == hardest["label"]])
    assert hardest["right"] == (table["margin"].to_numpy()[mine] > 0).sum() == min(
        one["right"] for one in found["hardest"])
    assert hardest["loss"] == pytest.approx(table["loss"].to_numpy()[mine].mean())
    assert found["rounds"][1]["scoring_seconds"] > 0 == found["rounds"][0]["scoring_seconds"]
    assert "http" not in re.sub(r"http://www\.w3\.org\S*", "", page)
    assert "<script" not in page


def read_labels(loop: Loop, receipts: Sequence[Receipt]) -> pa.Array:
    run = open_samples(loop.config.folder)
    return pa.concat_tables([run.store.data(one, ["label"]) for one in receipts])["label"].combine_chunks()


def test_words_say_what_an_interval_allows() -> None:
    line = {"after": 2, "on": "folds", "images": 50, "right": 40, "against": 1, "gained": 4, "lost": 2}
    said = _allowed({**line, "gain": 0.04, "gain_low": -0.03, "gain_high": 0.11})
    assert "no difference is shown, for the interval holds 0" in said
    assert "rules out a gain above 11.0 points and a loss above 3.0" in said
    assert "more are right, by 1.0 points at least" in _allowed({**line, "gain": 0.04, "gain_low": 0.01,
                                                                "gain_high": 0.07})
    assert "fewer are right, by 2.0 points at least" in _allowed({**line, "gain": -0.04, "gain_low": -0.06,
                                                                 "gain_high": -0.02})
    assert "nothing tells these rounds apart" in _allowed({**line, "gained": 0, "lost": 0, "gain": 0.0,
                                                          "gain_low": 0.0, "gain_high": 0.0})


def test_a_loop_that_has_just_begun_has_a_page_and_a_live_page(make_loop: MakeLoop) -> None:
    config = make_loop(rounds={"count": 2})
    open_loop(config)
    page = Path(api.LoopFolder(config.folder).report()).read_text()
    assert "No round is decided yet" in page
    assert "No seed was scored" in text_of(page)
    with pytest.raises(UsageError, match="no guided round"):
        write_loop_report(config.folder, strips=2)
    status = api.status(config.folder)
    assert shown_run(status) is None
    assert "deciding round 1" in text_of(LiveView().page(status))


def test_the_live_page_shows_the_round_in_work(scored: Loop, tmp_path: Path) -> None:
    folder = shutil.copytree(scored.config.folder, tmp_path / "loop")
    status = api.status(folder)
    assert shown_run(status) == f"{folder}/rounds/0003"
    (folder / "rounds/0002/data/train-000001.parquet").unlink()
    status = api.status(folder)
    assert shown_run(status) == f"{folder}/rounds/0002"
    said = text_of(LiveView().page(status))
    assert "loop, round 2" in said
    assert "20 of 40 decided" in said
    assert "40 not dealt" in said


def test_what_was_trained_before_a_loop_stopped_is_paid_for_and_the_rest_is_not_planned(tmp_path: Path) -> None:
    config = digits_loop(tmp_path, rounds={"count": 4, "scores": SCORES, "stop": {"min_gain": 300.0}}, ratio=4)
    _, end = finished(config)
    found = loop_summary(config.folder)
    assert (end.round, found["left"]) == (3, 40)
    assert found["further"]["scoring_seconds"] > 0
    said = text_of(Path(write_loop_report(config.folder)).read_text())
    assert "after the last" in said
    assert "The loop ended: no gain" in said
    assert [one.stage.name for one in plan_loop(config).costs.stages][-1] == "expand round 2"


@pytest.mark.slow
def test_a_guided_loop_may_move_and_shows_guided_samples_beside_plain_ones(tmp_path: Path) -> None:
    loop, _ = finished(digits_loop(tmp_path, method="practice", rounds={
        "count": 2, "guided_from": 2, "scores": SCORES}, ratio=4,
        prompt="a photo of a {name}", omega=4.0, strength=0.5, steps=4, sections={"guide": {}}))
    moved = api.LoopFolder(str(shutil.move(loop.config.folder, tmp_path / "elsewhere")))
    sample = next(one for one in moved.samples() if one["round"] == 2)
    assert moved.regen(sample["sample_id"])["equal"]
    assert moved.retry(same_process=True).last["made"] == 0
    page = Path(moved.report(strips=3)).read_text()
    assert page.count('class="strip"') == 3
    with pytest.raises(UsageError, match=r"is not a run folder"):
        api.open(loop.config.folder)


def test_scores_in_sample_are_said_to_be(tmp_path: Path) -> None:
    loop = finished(digits_loop(tmp_path, rounds={"count": 2, "rule": "loss", "scores": {**SCORES, "folds": 1}}))[0]
    said = text_of(Path(write_loop_report(loop.config.folder)).read_text())
    assert "Scores are in sample" in said
    assert "by classifiers trained on them" in said
    assert "trained without" not in said
    status = dict(read_loop_status(loop.config.folder).table())
    assert "rule loss, scores in sample" in status["round 2 of 2"]
    assert "in sample" not in status["round 1 of 2"]
