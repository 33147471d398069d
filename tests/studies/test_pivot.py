"""Trials of several studies as one table: fields, measures, cells, differences; and the file that asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.api import validate
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.studies.measures import Prices, measure
from rayexpand.studies.pivot import ALL, Pivot, pivot
from rayexpand.studies.pivot_config import parse_pivot
from rayexpand.studies.records import Record, Records, read_records
from tests.runfolder import Builder
from tests.studyfolder import StudyFolder


def record(source: str, arm: str, seed: int, top1: float, **fields: Any) -> Record:
    settings = fields.pop("settings", {})
    return Record(source, arm, seed, {"last": {"top1": top1 / 100}, **fields}, settings)


TRIALS = [record(source, arm, seed, top1) for source, arm, values in (
    ("cars", "original", (50, 52, 54)), ("cars", "ours", (60, 63, 66)), ("birds", "original", (70, 71, 75)),
    ("birds", "ours", (74, 75, 79)), ("birds", "theirs", (71, 70, 72))) for seed, top1 in enumerate(values)]


def of(records: list[Record], *names: str, **asked: Any) -> Pivot:
    return pivot(records, [measure(name) for name in names or ("top1",)], **asked)


def test_cells_have_mean_deviation_error_and_n() -> None:
    found = of(TRIALS, rows="arm", columns="source", against={"arm": "original"})
    cell = found.cells[ALL, "ours", "cars", "top1"]
    assert found.rows == ("original", "ours", "theirs")
    assert found.columns == ("cars", "birds")
    assert (cell.mean, cell.sd, cell.se, len(cell.values)) == pytest.approx((63, 3, 3 / 3 ** 0.5, 3))
    difference = found.differences[ALL, "ours", "cars", "top1"]
    assert difference.values == pytest.approx((10, 11, 12)), "paired by seed"
    assert difference.sd == pytest.approx(1)
    assert found.average(ALL, "ours", "top1") == pytest.approx((63 + 76) / 2)
    assert found.average(ALL, "ours", "top1", differences=True) == pytest.approx((11 + 4) / 2)
    assert found.average(ALL, "theirs", "top1") is None, "an average over other columns compares with nothing"


@pytest.mark.parametrize(("ddof", "sd"), [(0, (8 / 3) ** 0.5), (1, 2.0)])
def test_the_degrees_of_freedom_are_those_that_were_asked_for(ddof: int, sd: float) -> None:
    cell = of(TRIALS, rows="arm", columns="source", ddof=ddof).cells[ALL, "original", "cars", "top1"]
    assert cell.sd == pytest.approx(sd)
    assert cell.se == pytest.approx(2 / 3 ** 0.5), "the error of a mean has n - 1 always"


def test_what_is_kept_has_the_order_of_the_file() -> None:
    found = of(TRIALS, rows="arm", columns="source", keep={"arm": ["theirs", "original"], "source": ["birds"]})
    assert (found.rows, found.columns) == (("theirs", "original"), ("birds",))
    with pytest.raises(UsageError, match=r"keep\.arm: no trial has 'mine'; there are original, ours, theirs"):
        of(TRIALS, rows="arm", keep={"arm": ["mine"]})


def test_seeds_that_differ_are_compared_by_their_means() -> None:
    trials = [*TRIALS[:3], *(record("cars", "ours", seed, 60) for seed in (5, 6))]
    difference = of(trials, rows="arm", against={"arm": "original"}).differences[ALL, "ours", ALL, "top1"]
    assert (difference.mean, difference.sd, difference.se) == (pytest.approx(8), None, None)


def test_a_cell_of_several_arms_says_so() -> None:
    found = of(TRIALS, rows="source")
    assert found.pooled
    assert len(found.cells[ALL, "birds", ALL, "top1"].values) == 9
    assert not of(TRIALS, rows="arm", columns="source").pooled


def test_cells_are_compared_with_their_own_panel_and_column_and_never_with_another_source() -> None:
    def trial(source: str, arm: str, seed: int, top1: float, shots: int | None) -> Record:
        return record(source, arm, seed, top1, settings={"subset": {"n": shots}})

    trials = [trial("a", "original", 0, 50, 1), trial("a", "original", 0, 60, 5), trial("a", "ours", 0, 55, 1),
              trial("a", "ours", 0, 61, 5), trial("b", "ours", 0, 90, 1)]
    found = of(trials, rows="arm", columns="subset.n", panels="source", against={"arm": "original"})
    assert {place[:3]: cell.mean for place, cell in found.differences.items() if place[1] == "ours"} == {
        ("a", "ours", 1): pytest.approx(5), ("a", "ours", 5): pytest.approx(1)}
    swept = [record("sweep", "ours", 0, 58, settings={"method": {"strengths": [s]}}) for s in (0.5, 0.9)]
    found = of([*trials[:1], *swept], rows="method.strengths", columns="source",
               against={"source": "a", "arm": "original"})
    assert found.rows == (0.5, 0.9), "a list of one is its value; numbers rise"
    assert found.differences[ALL, 0.5, "sweep", "top1"].mean == pytest.approx(8)
    with pytest.raises(UsageError, match="against: no trial has arm 'none'"):
        of(trials, rows="arm", against={"arm": "none"})


@pytest.mark.parametrize(("name", "words"), [("recipe", "no field of a trial"), ("top1", "no field"),
                                             ("colour.x", "no field")])
def test_a_field_that_is_none_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TRIALS[0].field(name)


def test_a_measure_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="'top_1' is no measure, did you mean 'top1'"):
        measure("top_1")


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """A study whose arm is of a run that has score files, one of an older state of the run; and a bench."""
    out = tmp_path_factory.mktemp("records")
    study = StudyFolder(out / "s", {"arms": [{"name": "original"}, {"name": "made", "use": "x", "ratio": [1],
                                                                   "soft_label": {"gamma": 0.5}}],
                                    "subset": {"n": 2}})
    run = Builder(study.folder / "runs/x-0", shards=2).start()
    for shard in (0, 1):
        run.commit(shard)
    digest = json.loads((study.folder / "runs/x-0/run.json").read_text())["run_digest"]
    for name, of_run in (("far", digest), ("old", "0" * 64)):
        study.write(f"runs/x-0/scores/{name}.json", {"run_digest": of_run, "scores": {"fid": {"value": 12.5}, "n": 3}})
    study.write("../elsewhere.json", {"run_digest": digest, "name": "there", "scores": {"fid": 2.0, "kid": 0.5}})
    study.write("../other.json", {"run_digest": "1" * 64, "scores": {}})
    right = np.arange(10) < 7
    study.add("original", 0, right)
    study.add("made 1x", 0, right, group="x", ratio=1.0, synthetic_rows=18, run=str(study.folder / "runs/x-0"),
              expansion_seconds=36.0, fitting_seconds=3564.0, also={"v2": {"top1": 0.5, "by_group": {"worst": 0.25}}})
    study.write("bench-32.json", {"arms": [{"arm": "made 1x", "batch": 32, "overhead": 12.0, "loader_seconds": 0.1,
                                            "step_seconds": 0.3}]})
    study.write("bench-64.json", {"arms": [{"arm": "made 1x", "batch": 64, "overhead": 8.0, "loader_seconds": 0.2,
                                            "step_seconds": 0.4}]})
    return read_records({"s": [str(study.finish("late-s1"))]}, [str(out / "elsewhere.json"), str(out / "other.json")])


def test_trials_have_settings_of_their_arm_their_recipe_and_their_run(read: Records) -> None:
    original, made = read.trials
    assert [made.field(name) for name in ("arm", "line", "ratio", "arm.soft_label.gamma", "subset.n", "batch",
                                          "method.strength")] == ["made 1x", "made", 1.0, 0.5, 2, 32, 0.6]
    assert original.field("method.strength") is None
    assert any("1 trials of" in line and "late-s1" in line for line in read.problems)


def test_score_files_are_joined_by_run_digest(read: Records) -> None:
    made = read.trials[1]
    assert made.run is not None
    assert made.run.scores == {"far": {"fid": 12.5, "n": 3.0}, "there": {"fid": 2.0, "kid": 0.5}}
    assert measure("score.kid").of(made) == 0.5
    assert measure("score.far.fid").of(made) == 12.5
    assert measure("score.fid").of(read.trials[0]) is None
    with pytest.raises(UsageError, match=r"far, there of .* all have it; write score\.far\.fid"):
        measure("score.fid").of(made)
    assert any("other.json" in line or "other is of a run that no trial" in line for line in read.problems)


def test_measures_by_hand(read: Records) -> None:
    made = read.trials[1]
    prices = Prices(cpu_hour=0.5)
    assert {name: measure(name, prices).of(made) for name in (
        "top1", "also.v2.top1", "also.v2.worst", "images", "seconds_per_image", "hours", "price")} == {
        "top1": pytest.approx(70), "also.v2.top1": 50, "also.v2.worst": 25, "images": 18, "seconds_per_image": 2.0,
        "hours": 1.0, "price": 0.5}
    with pytest.raises(UsageError, match=r"prices\.cpu_hour is not given, and made 1x of s"):
        measure("price", Prices(gpu_hour=1)).of(made)


def test_a_bench_is_lines_of_its_own_and_the_overhead_of_the_trials_of_its_batch(read: Records) -> None:
    found = pivot(read.bench, [measure("overhead"), measure("batch_seconds")], rows="arm", columns="batch")
    assert found.columns == (32, 64)
    assert [found.cells[ALL, "made 1x", 64, name].mean for name in ("overhead", "batch_seconds")] == pytest.approx(
        [8.0, 0.6])
    assert [measure("overhead").of(one) for one in read.trials] == [None, 12.0], "its batch is 32"


def test_discarded_images_are_those_that_were_drawn_and_refused(read: Records) -> None:
    run = read.trials[1].run
    assert run is not None
    assert run.discarded_share is not None
    expected = 18 * run.discarded_share / (1 - run.discarded_share)
    assert measure("discarded").of(read.trials[1]) == pytest.approx(expected)


# The file -------------------------------------------------------------------------------------------------------------

FILE: dict[str, Any] = {"name": "tables", "sources": {"a": "runs/a"}, "figures": {"t": {"kind": "table"}}}


@pytest.mark.parametrize(("change", "words"), [
    ({"figures": {"t": {"kind": "bars"}}}, "bars needs columns"),
    ({"figures": {"t": {"kind": "table", "value": "top2"}}}, "figures.t.value: .*'top2' is no measure"),
    ({"figures": {"t": {"kind": "table", "rows": "who"}}}, "figures.t.rows: .*'who' is no field"),
    ({"figures": {"t": {"kind": "table", "keep": {"who": [1]}}}}, "figures.t.keep: .*'who' is no field"),
    ({"figures": {"t": {"kind": "scatter", "value": "top1"}}}, "scatter needs two measures"),
    ({"figures": {"t": {"kind": "heat", "columns": "ratio", "average": True}}}, "average: no effect on heat"),
    ({"figures": {"t": {"kind": "pie"}}}, "figures.t.kind"),
    ({"figures": {"T 1": {"kind": "table"}}}, "T 1: a name is small letters"),
    ({"source": {}}, "source: unknown")])
def test_mistakes_of_the_file_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_pivot({**FILE, **change})


def test_validate_says_which_folder_holds_nothing(tmp_path: Path) -> None:
    (problem,) = validate({**FILE, "sources": {"a": str(tmp_path)}}).problems
    assert problem.startswith(f"sources.a: {tmp_path} holds neither a study nor a sweep; run")
