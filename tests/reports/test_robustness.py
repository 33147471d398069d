"""The page's tables and figures of corrupted images say what robustness/*.json says, and an altered number is seen."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayexpand.contract.errors import DamagedFile
from rayexpand.contract.rng import generator, row_key
from rayexpand.data.corruptions.tables import COMMON, SEVERITIES
from rayexpand.evaluation.robustness import corruption_scores
from rayexpand.reports.figure import read_figure
from rayexpand.reports.study import write_study_report
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.tables import read_json, replace_json
from rayexpand.studies.spreads import plus_minus, spread
from tests.studyfolder import StudyFolder, grid

TESTS = {"made": ("corrupted-v1", "14 types, without frost"), "published": ("ImageNet-C", "")}


def corrupted(study: StudyFolder) -> None:
    """Scores of every trial on two sets."""
    files = LocalFiles(study.folder)
    study.config["extra_tests"] = {name: {} for name in TESTS}
    for test, (called, note) in TESTS.items():
        files.make_folder(f"robustness/{test}")
        files.make_folder(".tmp")
        for trial in study.trials:
            drawn = generator(row_key(0, "page", trial, 0, 0, test)).random((15, 5))
            top1 = {(kind, severity): float(drawn[i, severity - 1]) for i, kind in enumerate(COMMON)
                    for severity in SEVERITIES if not (note and kind == "frost")}
            result = read_json(files, f"results/{trial}.json") or {}
            replace_json(files, f"robustness/{test}/{trial}.json", {
                "trial": trial, "trial_digest": result["digest"], "name": called, "note": note, "images": 100,
                "classes": 10, "restricted": False, "left_out": 0, "side": 16, "settings": {},
                **corruption_scores(top1, called)})


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalFiles, str, list[str]]:
    study = grid(tmp_path_factory.mktemp("page") / "study", expansions=["img2img"], ratios=[1, 5], images=60)
    corrupted(study)
    folder = study.finish()
    return LocalFiles(folder), Path(str(write_study_report(folder))).read_text(), study.trials


def of_arm(files: LocalFiles, trials: list[str], test: str, arm: str) -> list[dict[str, Any]]:
    found = [read_json(files, f"robustness/{test}/{one}.json") or {} for one in trials if
             (read_json(files, f"results/{one}.json") or {})["arm"] == arm]
    return sorted(found, key=lambda one: str(one["trial"]))


@pytest.mark.parametrize("test", TESTS)
def test_every_number_of_a_figure_follows_from_the_results(page: tuple[LocalFiles, str, list[str]], test: str) -> None:
    files, _, trials = page
    by_type, by_severity = (read_figure(files, f"corrupted-{test}-{name}") for name in ("types", "severities"))

    assert len(by_type["arms"]) == len(by_severity["arms"]) == 5
    for one, other in zip(by_type["arms"], by_severity["arms"], strict=True):
        known = of_arm(files, trials, test, one["arm"])
        assert one["arm"] == other["arm"]
        assert [point["name"] for point in one["types"]] == list(known[0]["error"])
        for point in one["types"]:
            values = [100 * np.mean(list(result["top1"][point["name"]].values())) for result in known]
            assert point["values"] == pytest.approx(values)
            assert point["mean"] == pytest.approx(np.mean(values))
            assert point["se"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(3))
        for point in other["severities"]:
            values = [100 * np.mean([line[point["name"]] for line in result["top1"].values()]) for result in known]
            assert point["values"] == pytest.approx(values)


def test_an_altered_number_is_seen(page: tuple[LocalFiles, str, list[str]], tmp_path: Path) -> None:
    files = page[0]
    for suffix in ("json", "svg"):
        place = Path(files.root, f"figures/corrupted-made-types.{suffix}")
        whole = place.read_bytes()
        place.write_bytes(whole.replace(b"snow", b"fog "))
        with pytest.raises(DamagedFile):
            read_figure(files, "corrupted-made-types")
        place.write_bytes(whole)
    assert read_figure(files, "corrupted-made-types")["kind"] == "corruptions"


def test_the_table_has_the_mean_that_it_names(page: tuple[LocalFiles, str, list[str]]) -> None:
    files, text, trials = page
    summary = read_json(files, "summary.json") or {}
    for test, (called, note) in TESTS.items():
        section = text.partition(f"<h2>Corrupted images: {test} ({called})</h2>")[2].partition("</section>")[0]
        assert f"mean of {note or '15 types'} %" in section
        assert ("mCE %" in section) == (called == "ImageNet-C")
        assert ("not comparable with published files" in section) == (called == "corrupted-v1")
        for arm in summary["arms"]:
            known = of_arm(files, trials, test, arm["arm"])
            cells = [html.escape(plus_minus(spread(one[name] for one in known) or {}))
                     for name in ("mean", *(["mce"] if called == "ImageNet-C" else []))]
            line = section.partition(f"<td>{arm['arm']}</td>")[2].partition("</tr>")[0]
            assert all(f">{cell}<" in line for cell in cells)


def test_a_study_without_them_has_no_section(tmp_path: Path) -> None:
    folder = grid(tmp_path / "study", expansions=["img2img"], ratios=[1], seeds=[0], images=40).finish()
    assert "Corrupted images" not in Path(str(write_study_report(folder))).read_text()
    assert not list(Path(folder, "figures").glob("corrupted-*"))
