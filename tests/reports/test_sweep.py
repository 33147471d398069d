"""The page of a sweep: how sure the winner is, in words, numbers and table alike. Trials are written, not trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.api.folders import SweepFolder
from rayexpand.classifier.statistics import crossed
from rayexpand.reports.sweep import write_sweep_report
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import replace_json
from rayexpand.studies.sweep.config import base_study, dimensions_of, parse_sweep
from rayexpand.studies.sweep.sweep import Sweep
from tests.reports.test_study import Page, section, visible
from tests.studyfolder import StudyFolder

RATES = {"aaaa0001": 0.1, "bbbb0002": 0.2, "cccc0003": 0.3, "dddd0004": 0.4}


def swept(tmp_path: Path, right: dict[str, list[int]], *, metric: str = "top1", seeds: int = 3, images: int = 100,
          predictions: bool = True) -> Sweep:
    """A sweep over the learning rate whose trials have so many right of `images`, one number for each seed."""
    config = parse_sweep({
        "name": "tuned", "out": str(tmp_path), "arm": "original", "score_on": "test", "samples": 4, "metric": metric,
        "space": {"recipe.lr": {"choice": list(RATES.values())}},
        "study": {"data": {"source": "digits"}, "test": {"source": "digits", "split": "test"},
                  "seeds": list(range(seeds)), "recipe": {"updates": 4}, "arms": [{"name": "original"}]}})
    folder = Path(config.folder)
    for number, (key, counts) in enumerate(right.items()):
        study = StudyFolder(folder / "studies" / key)
        for seed, count in enumerate(counts):
            study.add("original", seed, np.arange(images) < count, predictions=predictions)
        study.finish()
        scores = [count / images for count in counts]
        done = {"state": "finished", "scores": scores, "epochs": 2}
        study.write(f"../../trials/{key}.json", {
            "key": key, "number": number, "values": {"recipe.lr": RATES[key]}, "score": float(np.mean(scores)),
            "curve": [], "of_epochs": 2, "seconds": 1.0, **(done if len(counts) == seeds else {
                "state": "stopped", "epochs": 1})})
    (folder / ".tmp").mkdir()
    (folder / "sweep.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    return Sweep(config, LocalFiles(folder), base_study(config), dimensions_of(config))


def correct(counts: list[int]) -> np.ndarray:
    return np.stack([np.arange(100) < count for count in counts])


def test_a_configuration_without_a_result_is_named(tmp_path: Path) -> None:
    sweep = swept(tmp_path, {"aaaa0001": [83, 84, 82]})
    (tmp_path / "tuned/suggestions").mkdir()
    for number, key in enumerate(("aaaa0001", "bbbb0002")):
        replace_json(sweep.files, f"suggestions/{number:04d}.json", {"number": number, "values": {}, "key": key})
    found = write_sweep_report(sweep)

    assert found["without_result"] == ["bbbb0002"]
    assert "1 without a result, in work or with files that are gone: bbbb0002." in visible(
        Path(found["report"]).read_text())


def test_the_winner_has_its_interval_and_says_who_is_within_noise(tmp_path: Path) -> None:
    right = {"aaaa0001": [83, 84, 82], "bbbb0002": [84, 83, 85], "cccc0003": [40, 42, 38], "dddd0004": [30]}
    sweep = swept(tmp_path, right)
    found = write_sweep_report(sweep)
    page = Path(found["report"]).read_text()
    trials = {one["key"]: one for one in found["trials"]}

    assert json.loads((Path(found["folder"]) / "summary.json").read_text()) == found
    assert found["best"] == "bbbb0002"
    assert found["spread"] == {"mean": pytest.approx(0.84), "se": pytest.approx(0.01 / 3 ** 0.5),
                               "std": pytest.approx(0.01), "n": 3, "values": [0.84, 0.83, 0.85]}
    low, high = crossed(correct(right["bbbb0002"])).interval()
    assert found["interval"] == [low, high]
    close = crossed(correct(right["aaaa0001"]).astype(int) - correct(right["bbbb0002"]))
    assert trials["aaaa0001"]["against_best"] == {"mean": pytest.approx(close.mean), "within_noise": True,
                                                  "interval": list(close.interval()), "se": close.se}
    assert trials["cccc0003"]["against_best"]["within_noise"] is False
    assert trials["bbbb0002"]["against_best"] is trials["dddd0004"]["against_best"] is None
    assert found["within_noise"] == ["aaaa0001"]
    said = (f"84.00 ± 0.58 % (n = 3) on the test images, 95 % interval {100 * low:.2f} to {100 * high:.2f} %",
            "within noise: 1 of the 2 other finished configurations is not shown to be worse")
    for line in said:
        assert any(line in words for words in found["words"])
    far = crossed(correct(right["cccc0003"]).astype(int) - correct(right["bbbb0002"]))
    inflation = found["inflation"]
    assert (inflation["configurations"], inflation["factor"]) == (3, pytest.approx(0.8463, abs=1e-4))
    assert inflation["share"] == pytest.approx(0.8463 * ((close.se ** 2 + far.se ** 2) / 4) ** 0.5, rel=1e-3)
    assert "of 3 equal configurations the best looks 0.85 standard errors better than it is, here" in section(
        page, "best")
    assert found["fresh"] is None
    best = section(page, "best")
    assert "mean ± standard error over 3 seeds: 84.00 ± 0.58 % , 95 % interval" in best
    assert "Within noise: 1 of the 2 other" in best
    assert Page(page).open == []
    shown = section(page, "trials")
    assert re.search(r"0\.1 83\.00 ± 0\.58 3 -1\.0 [-+.\d]+ to [-+.\d]+, within noise", shown)
    assert re.search(r"0\.3 40\.00 ± 1\.15 3 -44\.0 -[.\d]+ to -[.\d]+ 40", shown)
    assert [row[1:] for row in SweepFolder(found["folder"]).table(found)[1]] == [
        ("83.00 ± 0.58", "3", "2/2", "finished, within noise"), ("84.00 ± 0.58", "3", "2/2", "best"),
        ("40.00 ± 1.15", "3", "2/2", "finished"), ("30.00", "", "1/2", "stopped")]


def test_a_clear_winner_says_so(tmp_path: Path) -> None:
    found = write_sweep_report(swept(tmp_path, {"aaaa0001": [90, 91, 92], "bbbb0002": [40, 41, 42]}))
    assert found["within_noise"] == []
    assert any("better than each of the 1 other finished" in line for line in found["words"])


@pytest.mark.parametrize(("metric", "seeds", "interval", "noise"), [
    ("top5", 3, True, False), ("top5", 1, False, True), ("top1", 1, True, False)])
def test_scores_without_answers_are_compared_over_seeds(tmp_path: Path, metric: str, seeds: int, interval: bool,
                                                        noise: bool) -> None:
    right = {"aaaa0001": [90, 91, 89][:seeds], "bbbb0002": [40, 42, 39][:seeds]}
    found = write_sweep_report(swept(tmp_path, right, metric=metric, seeds=seeds))
    other = found["trials"][1]["against_best"]
    assert (found["interval"] is not None) == (other["interval"] is not None) == interval
    assert other["within_noise"] == noise
    if metric == "top5" and interval:
        assert found["interval"] == pytest.approx([0.9 - 4.302653 * 0.01 / 3 ** 0.5, 0.9 + 4.302653 * 0.01 / 3 ** 0.5])
    assert ("no interval" in visible(Path(found["report"]).read_text())) == (not interval)


def test_no_printed_interval_leaves_what_an_accuracy_can_be(tmp_path: Path) -> None:
    """Over two seeds t is 12.7 standard errors on each side."""
    found = write_sweep_report(swept(tmp_path, {"aaaa0001": [90, 96]}, metric="top5", seeds=2))
    low, high = found["interval"]
    assert low < 1 < high, "the summary has it as it is"
    said = f"95 % interval {100 * low:.2f} to 100.00 % (cut at 0 and 100 %)"
    assert any(said in line for line in found["words"])
    assert said in visible(Path(found["report"]).read_text())


def test_answers_that_are_gone_leave_an_interval_over_seeds(tmp_path: Path) -> None:
    found = write_sweep_report(swept(tmp_path, {"aaaa0001": [90, 91, 89], "bbbb0002": [89, 91, 90]}, predictions=False))
    low, high = found["trials"][1]["against_best"]["interval"]
    assert low < 0 < high


def test_no_finished_trial(tmp_path: Path) -> None:
    found: dict[str, Any] = write_sweep_report(swept(tmp_path, {"dddd0004": [30]}))
    assert (found["best"], found["spread"], found["interval"], found["within_noise"]) == (None, None, None, [])
    assert "No trial finished" in section(Path(found["report"]).read_text(), "best")
