from __future__ import annotations

import csv
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.api.folders import StudyFolder as StudyResult
from rayexpand.classifier.recipe import Recipe
from rayexpand.classifier.statistics import crossed
from rayexpand.contract.errors import UsageError
from rayexpand.reports import figures
from rayexpand.reports.drawing import FigurePoint
from rayexpand.reports.lines import Line, Panel, lines
from rayexpand.reports.run import write_report
from rayexpand.reports.study import write_study_report
from rayexpand.studies.spreads import points
from rayexpand.studies.summary import further_scores, summary
from tests.runfolder import Builder
from tests.studyfolder import StudyFolder, answers, grid

DEMO = {"note": "What it shows & what not.", "guide_zero_shot": 0.934, "controls": {"empty <b>": 0.61}, "rate": 12.3456,
        "gain": 0.11, "arms": {"original": {"mean": 0.5}}, "runs": ["a"]}


class Page(HTMLParser):
    """Tags, links and balance of a page."""

    VOID = frozenset({"meta", "img", "br", "path", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


def visible(text: str) -> str:
    body = re.sub(r"<style.*?</style>", "", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def section(page: str, name: str) -> str:
    return visible(page.split(f'id="{name}"')[1].split("</section>")[0])


def first(count: int, images: int = 10) -> np.ndarray:
    """Right on the first `count` of `images`."""
    return np.arange(images) < count


def compared(found: dict[str, Any], arm: str, kind: str = "baseline") -> dict[str, Any]:
    (one,) = [c for c in found["comparisons"] if c["arm"] == arm and c["kind"] == kind]
    return one


def arm_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in found["arms"] if arm["arm"] == name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    study = grid(tmp_path_factory.mktemp("study") / "digits", expansions=("img2img", "text2img"), images=200)
    study.write("runs/img2img-0/run.json", {})
    study.write("runs/img2img-0/scores/real-vs-samples.json",
                {"extractor": {"name": "digits guide"}, "n_samples": 400, "n_reference": 500,
                 "warnings": ["400 is few"], "created": 17.0,
                 "scores": {"fid": {"value": 12.34567}, "kid": {"value": -0.0012, "std": 0.1}}})
    study.write("runs/text2img-0/run.json", {})
    study.write("runs/text2img-0/scores/old.json", [])
    return study.folder, str(write_study_report(study.finish(), demo=DEMO))


def test_means_deviations_and_differences_by_hand(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed, right in enumerate((7, 8, 9)):
        study.add("original", seed, first(5), seconds=2.0 + seed)
        study.add("made", seed, first(right), group="made", ratio=5.0, synthetic_rows=100, rows=120,
                  expansion_seconds=30.0, fitting_seconds=60.0, workers=2, best={"top1": 0.9, "epoch": 3},
                  last={"top1": right / 10, "top5": 1.0, "ece": 0.1 * (seed + 1), "per_class": 0.5})
        study.add("original repeated 6x", seed, first(6), control_of="made")
    folder = study.finish()
    page = Path(write_study_report(folder)).read_text()
    found = json.loads((folder / "summary.json").read_text())
    assert found == summary(folder)
    made = arm_of(found, "made")
    assert made["last"]["top1"] == {"mean": pytest.approx(0.8), "se": pytest.approx(0.1 / 3 ** 0.5),
                                    "std": pytest.approx(0.1), "n": 3, "values": [0.7, 0.8, 0.9]}
    assert made["last"]["ece"]["mean"] == pytest.approx(0.2)
    assert made["best"]["top1"]["mean"] == pytest.approx(0.9)
    assert arm_of(found, "original")["cost"]["training"]["mean"] == pytest.approx(3.0)  # (2 + 3 + 4) / 3
    assert made["cost"] == {"unit": "CPU process", **{
        name: {"mean": mean, "se": 0, "std": 0, "n": 3, "values": [mean] * 3}
        for name, mean in (("training", 6.0), ("expansion", 90.0), ("fitting", 60.0), ("wall", 3.0))}}
    assert compared(found, "made")["mean"] == pytest.approx(0.3)
    assert compared(found, "made", "control")["mean"] == pytest.approx(0.2)
    assert compared(found, "original repeated 6x", "control to baseline")["mean"] == pytest.approx(0.1)
    expected = crossed(np.stack([first(n) for n in (7, 8, 9)]).astype(int) - first(5))
    assert [compared(found, "made")[name] for name in ("mean", "low", "high", "p")] == [
        expected.mean, *expected.interval(), expected.p]
    row = re.search(r"made 3 20 100 200 4,000 (.*?) original repeated 6x", section(page, "table"))
    assert row
    assert row[1].startswith("80.0 ± 5.8 90.0 ± 0.0 +10.0, +2.0 -14.8 to +34.8 epoch 3 100.0 ± 0.0 20.0 ± 5.8 "
                             "50.0 ± 0.0 +30.0 -")
    assert row[1].endswith("90 + 6")
    assert "80.0 ± 5.8" in section(page, "figures")
    assert "Highest mean ± standard error: made , 80.0 ± 5.8 % (n = 3)" in section(page, "answer")
    rows = {row[0]: row[1:] for row in StudyResult(str(folder)).table(found)[1]}
    assert rows["made"][:2] == ("80.0 ± 5.8", "3")
    (line,) = [one for one in csv.DictReader((folder / "summary.csv").open()) if one["arm"] == "made"]
    assert float(line["last.top1.se"]) == pytest.approx(0.1 / 3 ** 0.5)
    assert (line["last.top1.n"], line["seeds"]) == ("3", "3")
    assert "standard deviation" not in page


WATERBIRD = {"water on water": (642, 0.6383), "water on land": (642, 0.6324), "land on land": (2255, 0.7564),
             "land on water": (2255, 0.7436)}  # images, accuracy of Diff-Mix


def also(shift: float) -> dict[str, Any]:
    groups = {name: share + shift for name, (_, share) in WATERBIRD.items()}
    counts = {name: images for name, (images, _) in WATERBIRD.items()}
    average = sum(groups[name] * images for name, images in counts.items()) / 5794
    return {"top1": average, "top5": 0.9 + shift, "ece": 0.1, "per_class": 0.7, "images": 5794, "classes": 200,
            "restricted": False, "by_group": {"groups": groups, "counts": counts, "average": average,
                                              "mean": float(np.mean(list(groups.values()))),
                                              "worst": min(groups.values())}}


def test_groups_and_further_test_sets_are_on_the_page_and_in_the_tables(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s", {"frequency": [10, 30]})
    for seed, shift in enumerate((-0.01, 0.0, 0.01)):
        few = {"many": None, "medium": 0.5, "few": 0.2 + shift, "all": 0.4}
        study.add("original", seed, first(5), by_frequency=few)
        study.add("Diff-Mix", seed, first(7), synthetic_rows=100, by_frequency=few, also={
            "waterbird": also(shift), "imagenet-r": {**also(shift), "restricted": True, "by_group": None}})
    page = Path(write_study_report(study.finish())).read_text()
    arm = arm_of(json.loads((study.folder / "summary.json").read_text()), "Diff-Mix")
    lines = {line["arm"]: line for line in csv.DictReader((study.folder / "summary.csv").open())}

    assert Page(page).open == []
    assert arm["also"]["waterbird"]["average"]["mean"] == pytest.approx(0.7246, abs=5e-5)
    assert arm["also"]["waterbird"]["mean"]["mean"] == pytest.approx(0.6927, abs=5e-5)
    assert float(lines["Diff-Mix"]["also.waterbird.groups.water on land"]) == pytest.approx(0.6324)
    assert float(lines["Diff-Mix"]["also.waterbird.worst.std"]) == pytest.approx(0.01)
    assert lines["original"]["also.waterbird.worst"] == ""
    assert float(lines["original"]["by_frequency.few"]) == pytest.approx(0.2)
    assert further_scores(summary(study.folder)) == (
        ("arm", "n", "medium %", "few %", "waterbird %", "waterbird, worst group %", "imagenet-r %"),
        [("original", "3", "50.0 ± 0.0", "20.0 ± 0.6", "", "", ""),
         ("Diff-Mix", "3", "50.0 ± 0.0", "20.0 ± 0.6", "72.5 ± 0.6", "63.2 ± 0.6", "72.5 ± 0.6")])
    waterbird, restricted = page.split('class="also"')[1:]
    assert ("Diff-Mix 3 72.5 ± 0.6 90.0 ± 0.6 70.0 ± 0.0 63.8 ± 0.6 63.2 ± 0.6 75.6 ± 0.6 74.4 ± 0.6 69.3 ± 0.6 "
            "63.2 ± 0.6") in visible(waterbird)
    assert "5,794 images of 200 classes; the classifier chooses among all" in visible(waterbird)
    assert "among these classes only" in visible(restricted)
    assert "worst group" not in visible(restricted.split("</section>")[0])
    shown = section(page, "frequencies")
    assert "arm n, seeds medium, % few, % all, % original 3 50.0 ± 0.0 20.0 ± 0.6 40.0 ± 0.0" in shown
    assert "more than 30 (many), fewer than 10 (few)" in shown


def test_a_study_of_balanced_classes_has_no_table_of_frequencies(whole: tuple[Path, str]) -> None:
    page = Path(whole[1]).read_text()
    assert 'id="frequencies"' not in page
    assert 'class="also"' not in page
    assert further_scores(summary(whole[0])) is None


RIGHT, WRONG = first(10), first(0)
MIXED_A, MIXED_B = np.arange(40) % 3 == 0, np.arange(40) % 5 < 2  # 14 and 16 of 40


@pytest.mark.parametrize(("arm", "base", "seeds", "verdict", "words"), [
    (RIGHT, WRONG, 3, "gain", "+100.0 points, 95 % interval +100.0 to +100.0, 3 seeds, 10 test images: a gain."),
    (WRONG, RIGHT, 3, "loss", "-100.0 points, 95 % interval -100.0 to -100.0, 3 seeds, 10 test images: a loss."),
    (RIGHT, RIGHT, 3, "open", "+0.0 points, 95 % interval +0.0 to +0.0, 3 seeds, 10 test images: no difference is"),
    (MIXED_B, MIXED_A, 3, "open", "+5.0 points"),
    (RIGHT, WRONG, 2, "few", "2 seeds, 10 test images: with fewer than 3 seeds neither gain nor loss is claimed."),
    (RIGHT, WRONG, 1, "few", "1 seed, 10 test images: with fewer than 3 seeds"),
])
def test_a_difference_is_a_gain_only_if_its_interval_leaves_out_zero(
        tmp_path: Path, arm: np.ndarray, base: np.ndarray, seeds: int, verdict: str, words: str) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in range(seeds):
        study.add("original", seed, base)
        study.add("made", seed, arm, synthetic_rows=20, group="made", ratio=1.0)
    found = summary(study.finish())
    one = compared(found, "made")
    assert one["verdict"] == verdict
    assert words in one["sentence"]
    assert ("a gain" in one["sentence"]) == (verdict == "gain")
    few = "Fewer than 3 seeds, so no error bar is trustworthy: original, made."
    assert (few in found["warnings"]) == (seeds < 3)


def test_answers_are_paired_by_item_not_by_place(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in range(3):
        study.add("original", seed, answers("original", seed, 0.5, 60))
        study.add("made", seed, answers("made", seed, 0.7, 60), synthetic_rows=20)
    before = compared(summary(study.finish()), "made")
    place = study.folder / "predictions/made-s1.parquet"
    table = pq.read_table(place)
    pq.write_table(table.take(pa.array(np.argsort(np.sin(np.arange(60))))), place)
    assert compared(summary(study.folder), "made") == before


def _drop(study: StudyFolder) -> None:
    (study.folder / "predictions/made-s1.parquet").unlink()


def _other_items(study: StudyFolder) -> None:
    place = study.folder / "predictions/made-s1.parquet"
    pq.write_table(pq.read_table(place).set_column(0, "item", pa.array(np.arange(7, 17))), place)


def _other_answers(study: StudyFolder) -> None:
    study.add("made", 1, first(4), last={"top1": 0.9}, synthetic_rows=20)
    study.trials.pop()


def _garbage(study: StudyFolder) -> None:
    (study.folder / "predictions/made-s1.parquet").write_bytes(b"no parquet")


@pytest.mark.parametrize(("spoil", "why"), [
    (_drop, "predictions/made-s1.parquet is missing"),
    (_other_items, "predictions/made-s1.parquet has other test images than made-s0"),
    (_other_answers, "predictions/made-s1.parquet is right on 0.4000, but its result says 0.9000"),
    (_garbage, "predictions/made-s1.parquet cannot be read"),
])
def test_no_interval_without_predictions_that_fit(tmp_path: Path, spoil: Any, why: str) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in range(3):
        study.add("original", seed, first(5))
        study.add("made", seed, first(9), synthetic_rows=20)
    spoil(study)
    one = compared(summary(study.finish()), "made")
    assert (one["verdict"], one["low"]) == ("none", None)
    assert one["mean"] == pytest.approx(0.4)
    assert f"no interval, {why}" in one["sentence"]


def test_missing_failed_and_foreign_results_are_named(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in range(3):
        study.add("original", seed, first(5))
        study.add("made", seed, first(9), synthetic_rows=20)
    foreign = study.add("old arm", 0, first(9))
    study.trials.remove(foreign)
    study.write("results/broken-s0.json", "{")
    study.write("results/diverged-s0.json", {"arm": "diverged", "seed": 0, "last": {"top1": float("nan")}})
    study.write("results/crashed-s0.json", {"arm": "crashed", "seed": 0, "error": "out of <memory>"})
    study.write("trials/made-s2.json", {"arm": "made", "seed": 2, "list_sha256": "another"})
    study.add("made", 3, first(9), synthetic_rows=20, digest="of other frequency limits")
    study.write("trials/made-s3.json", {"arm": "made", "seed": 3, "digest": "now"})
    page = Path(write_study_report(study.finish("absent-s0", "broken-s0", "diverged-s0", "crashed-s0"))).read_text()
    words, found = section(page, "answer"), summary(study.folder)
    assert found["trials"] == {"done": 5, "expected": 11, "missing": ["made-s2", "made-s3", "absent-s0"],
                               "failed": {name: found["trials"]["failed"][name]
                                          for name in ("broken-s0", "crashed-s0", "diverged-s0")}}
    for piece in ("Not finished: made-s2, made-s3, absent-s0.",
                  "broken-s0: results/broken-s0.json: is damaged: it is not JSON",
                  "last.top1 is not a share in [0, 1]", "the trial failed: out of <memory>",
                  "results/made-s2.json was made with another training set",
                  "results/made-s3.json was made with another dataset, test set, further test set, pair of frequency "
                  "limits, starting weights,",
                  "results/old-arm-s0.json is not a trial of this study", "seed 2 left out, not finished in both",
                  "Fewer than 3 seeds, so no error bar is trustworthy: made."):
        assert piece in words, piece
    assert "5 of 11 trials" in visible(page)
    assert "old arm" not in [arm["arm"] for arm in found["arms"]]
    assert compared(found, "made")["seeds"] == [0, 1]


@pytest.mark.parametrize(("base", "made", "both"), [((0, 1, 2), (1, 2, 3), [1, 2]), ((0,), (1,), [])])
def test_only_common_seeds_are_compared(tmp_path: Path, base: tuple[int, ...], made: tuple[int, ...],
                                        both: list[int]) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in base:
        study.add("original", seed, first(5 if seed else 0))
    for seed in made:
        study.add("made", seed, first(10 if seed == 3 else 7))
    one = compared(summary(study.finish()), "made")
    assert one["seeds"] == both
    assert one["mean"] == (pytest.approx(0.2) if both else None)
    assert ("no seed in common" in one["sentence"]) == (not both)


def test_different_real_images_are_no_pair(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    study.add("original", 0, first(5))
    study.add("made", 0, first(9), ids_sha256="feed" * 16)
    (line,) = [line for line in summary(study.finish())["warnings"] if line.startswith("Seed 0")]
    assert "trained on different real images" in line
    assert "feedfeedfeed: made" in line


def test_a_control_serves_every_arm_it_fits(tmp_path: Path) -> None:
    mixed = Recipe(mixup=0.2).model_dump(mode="json")
    study = StudyFolder(tmp_path / "s", {"baseline": "original", "arms": [
        {"name": "original"}, {"name": "a", "use": "a", "ratio": [2, 5]}, {"name": "b", "use": "b", "ratio": [2, 5]},
        {"name": "twice", "use": "b", "real": 2.0}, {"name": "swap", "use": "b", "replace": 0.3}]})
    for seed in range(3):
        made = {"synthetic_rows": 40}
        study.add("original", seed, first(5))
        study.add("a 5x", seed, first(8), **made, ratio=5.0)
        study.add("b 5x", seed, first(8), **made, ratio=5.0)
        study.add("b 2x", seed, first(8), **made, ratio=2.0)
        study.add("twice", seed, first(8), **made, ratio=4.0)  # 2 + 4 rows for each real one, as 1 + 5
        study.add("mixed", seed, first(8), **made, ratio=5.0, recipe=mixed)
        study.add("swap", seed, first(8), **made, ratio=5.0)
        study.add("original repeated 6x", seed, first(6), control_of="a 5x")
    found = summary(study.finish())
    assert {arm["arm"]: arm["control"] for arm in found["arms"]} == {
        "original": None, "a 5x": "original repeated 6x", "original repeated 6x": None, "b 5x": "original repeated 6x",
        "b 2x": None, "twice": "original repeated 6x", "mixed": None, "swap": None}
    assert [arm["arm"] for arm in found["arms"]][:3] == ["original", "a 5x", "original repeated 6x"]
    (warning,) = [line for line in found["warnings"] if line.startswith("No control")]
    assert warning.endswith("alone: b 2x, mixed.")  # swap replaces rows and keeps their number


def test_a_control_outlives_the_result_it_was_made_for(tmp_path: Path) -> None:
    study = grid(tmp_path / "s", expansions=("a", "b"), ratios=(5,), images=20)
    for seed in range(3):
        (study.folder / f"results/a-5x-s{seed}.json").unlink()
    found = summary(study.finish())
    assert arm_of(found, "b 5x")["control"] == "original repeated 6x"


def test_page_is_whole_and_loads_nothing(whole: tuple[Path, str]) -> None:
    text = Path(whole[1]).read_text()
    page = Page(text)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "iframe", "object", "form"} & page.tags
    assert "http" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "#0102" not in text  # no placeholder colour is left
    assert "#0103" not in text
    assert "mathdefault" not in text


def test_sections_hold_what_was_asked(whole: tuple[Path, str]) -> None:
    text = Path(whole[1]).read_text()
    found = json.loads((whole[0] / "summary.json").read_text())
    assert re.findall(r'<section id="(\w+)"', text) == [
        "answer", "demo", "table", "samples", "figures", "curves", "classes", "scores", "made"]
    assert "gain 0.11" not in section(text, "demo")
    assert "mean" not in section(text, "demo")
    for comparison in found["comparisons"]:
        assert (comparison["sentence"] in section(text, "answer")) == (comparison["kind"] != "control to baseline")
    for arm in found["arms"]:
        top1 = arm["last"]["top1"]
        shown = f"{100 * top1['mean']:.1f} ± {100 * top1['std'] / 3 ** 0.5:.1f}"
        assert shown in section(text, "table")
        assert shown in section(text, "figures")
    for place, pieces in {
            "demo": ("What it shows & what not.", "guide zero shot 93.4 %", "empty <b> 61.0 %", "rate 12.35"),
            "table": ("selection on test", "cost, CPU process-s"),
            "figures": ("CPU process-seconds of one trial", "synthetic images per real image", "top-1, last epoch (%)",
                        "real images repeated to the same number of rows"),
            "curves": ("training loss", "optimiser steps", "test top-1 (%)"),
            "scores": ("img2img runs/img2img-0 real-vs-samples.json digits guide 400 500 12.35 -0.0012",
                       "runs/img2img-0, real-vs-samples.json: 400 is few", "text2img runs/text2img-0 cannot be read"),
            "made": ("seeds 0, 1, 2", "torch 2.15.0", f"rayexpand report {whole[0]}", "rayexpand train digits.yaml",
                     "39 done of 39, 0 missing, 0 failed", "ids of the real images, seed 0, sha256")}.items():
        for piece in pieces:
            assert piece in section(text, place), piece


def test_classes_and_confusions_by_hand(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    labels = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    for seed in range(3):  # wrong answers are the next class
        study.add("original", seed, [1, 1, 0, 0, 1, 1, 0, 0, 0, 0], labels=labels, classes=3)
        study.add("made", seed, [1, 1, 1, 0, 0, 1, 1, 1, 1, 0], labels=labels, classes=3, synthetic_rows=20)
    words = section(Path(write_study_report(study.finish())).read_text(), "classes")
    assert "class 1 2 100.0 50.0 -50.0 class 0 4 50.0 75.0 +25.0 class 2 4 0.0 75.0 +75.0" in words
    for line in ("class 0 class 1 50.0 25.0", "class 1 class 2 0.0 50.0", "class 2 class 0 100.0 25.0"):
        assert line in words
    assert "class 1 class 0" not in words


def test_recipe_shows_what_differs_and_where(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    study.add("original", 0, first(5), recipe=Recipe(epochs=3).model_dump(mode="json"))
    study.add("other", 0, first(5), recipe=Recipe(epochs=3, mixup=0.2).model_dump(mode="json"))
    words = section(Path(write_study_report(study.finish())).read_text(), "made")
    assert "epochs 1 3 mixup 0.0 0.0 all other arms 0.2 other" in words
    assert "cutmix 0" not in words


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "<script>$\\frac$&'\"#010203"
    study = StudyFolder(tmp_path / "s", {"name": evil, "data": {"path": evil}})
    for seed in range(3):
        study.add("original", seed, first(5), stack={evil: evil}, device=evil)
        trial = f"made-s{seed}"
        study.add("made", seed, first(9))
        result = json.loads((study.folder / f"results/{trial}.json").read_text())
        result |= {"arm": evil, "group": evil, "ratio": 1.0, "synthetic_rows": 20, "run": f"runs/{evil}"}
        study.write(f"results/{trial}.json", result)
    study.write("results/z.json", {"arm": "z", "seed": 0, "error": evil})
    text = Path(write_study_report(study.finish("z", evil), demo={**DEMO, "note": evil})).read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 12
    assert Page(text).open == []
    assert evil in section(text, "figures")


@pytest.mark.parametrize("arms", [0, 1])
def test_nothing_to_compare(tmp_path: Path, arms: int) -> None:
    study = StudyFolder(tmp_path / "s")
    for n in range(arms):
        study.add(f"arm {n}", 0, first(5), history=[], gpu_seconds=4.0, best=None, recipe=None, stack=None)
    text = Path(write_study_report(study.finish("later-s0"))).read_text()
    assert "There is nothing to compare yet." in section(text, "answer")
    assert Page(text).open == []
    assert ("No trial has finished, so there is nothing to compare yet." in visible(text)) == (arms == 0)
    assert 'id="cost"' not in text
    assert ("accuracy against ratio is not drawn" in visible(text)) == (arms == 1)


def test_no_study_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no study is here"):
        write_study_report(tmp_path)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(UsageError, match="is damaged: it holds no object"):
        summary(tmp_path)
    (tmp_path / "study.json").write_text("")
    with pytest.raises(UsageError, match=r"study\.json: is damaged: it is not JSON"):
        summary(tmp_path)


def test_results_alone_make_a_page_that_says_what_is_unknown(tmp_path: Path) -> None:
    study = grid(tmp_path / "s", expansions=("a",), ratios=(1,), images=20)
    found = summary(study.folder)
    assert found["baseline"] == "original"
    assert found["trials"]["expected"] is None
    assert "study.json is missing" in found["warnings"][0]


def test_labels_of_the_cost_figure_cover_nothing() -> None:
    rng = np.random.default_rng(0)
    crowd = [FigurePoint(f"an arm with a name {i}", 70 + float(rng.normal()), 0.4, 10 + float(rng.random()), i % 3,
                         emphasised=True) for i in range(12)]
    drawn, without = figures.costs(crowd, "CPU", "crowd")
    boxes = []
    texts = re.findall(r'<text style="([^"]*)" x="([^"]*)" y="([^"]*)"[^>]*>([^<]*)</text>', drawn.svg)
    for style, left, bottom, name in texts:
        if name.startswith("an arm"):
            assert "font-size: 10.5px" in style
            x, y = float(left), float(bottom)
            boxes.append((x, y - 8, x + 5.2 * len(name), y))
    assert len(boxes) + len(without) == 12
    assert len(boxes) >= 6
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]
                if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]
    assert overlaps == []


@pytest.mark.parametrize(("share", "words"), [(0.032, "+3.2"), (-0.5, "-50.0"), (0.0004, "+0.04"), (0.0, "+0.0"),
                                              (-0.00012, "-0.01")])
def test_a_small_difference_does_not_read_as_zero(share: float, words: str) -> None:
    assert points(share) == words


def test_figures_are_the_same_every_time() -> None:
    line = Line("a", (FigurePoint("a 1x", 50.0, 1.0, 1.0), FigurePoint("a 5x", 60.0, 2.0, 5.0)), 0)
    assert lines("r", [Panel("", "%", (line,))], "x", "r") == lines("r", [Panel("", "%", (line,))], "x", "r")


def colours(page: str, name: str) -> dict[str, str]:
    """Arm or line -> the colour of its mark in the legends of a section."""
    text = page.split(f'id="{name}"')[1].split("</section>")[0]
    found = re.findall(r'<li>(?:<i class="dot (\w+)"></i>|<svg class="key".*?var\(--(\w+)\).*?</svg>)([^<]*)</li>',
                       text)
    assert found
    return {words.strip(): dot or line for dot, line, words in found}


def test_an_arm_has_the_same_colour_in_every_figure_and_legend(whole: tuple[Path, str]) -> None:
    page = Path(whole[1]).read_text()
    bars = colours(page, "figures")
    assert (bars["img2img"], bars["text2img"], bars["real images only"]) == ("s0", "s1", "grey")
    shown = {"real images only": "grey", "img2img": "s0", "text2img": "s1"}
    panels = page.split('id="curves"')[1].split("</section>")[0].split("<figure>")[1:]
    assert len(panels) == len(shown)
    for panel, (title, colour) in zip(panels, shown.items(), strict=True):
        drawn = [dashes for dashes, stroke in re.findall(
            r'<path d="[^"]*" [^>]*style="fill: none(?:; stroke-dasharray: ([\d.,]+)[^;"]*)?[^"]*'
            r'stroke: var\(--(\w+)\)', panel) if stroke == colour]
        named = re.findall(r">((?:img2img|text2img|original)[^<]*)</text>", panel)
        assert f"<h3>{title}</h3>" in panel
        assert len(set(named)) == len(named) == len(set(drawn)) == len(drawn) / 3, "loss, accuracy and key"


def test_the_demo_page_has_pictures_and_leads_to_the_samples(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s", {"arms": [{"name": name} for name in (
        "original", "original + RandAugment", "expanded", "expanded + RandAugment", "empty-prompt expansion")]})
    run = Builder(study.folder / "runs/expanded-0", shards=2).start()
    for shard in (0, 1):
        run.commit(shard)
    for name in ("original", "original + RandAugment"):
        study.add(name, 0, first(5), augment="randaugment" if "+" in name else "none")
    for name in ("expanded", "expanded + RandAugment", "empty-prompt expansion"):
        study.add(name, 0, first(8), group=name.partition(" ")[0], synthetic_rows=20, ratio=5.0,
                  augment="randaugment" if "+" in name else "none",
                  run=f"/elsewhere/s/runs/{name.partition(' ')[0]}-0")
    arms = {name: {"accuracies": [0.5, 0.7], "mean": 0.6, "se": 0.1} for name in (
        "original", "original + RandAugment", "expanded", "expanded + RandAugment")}
    demo = {**DEMO, "arms": arms, "controls": {"guide zero-shot": 0.9, "empty-prompt expansion": 0.6},
            "control_arms": {"empty-prompt expansion": arms["original"]}, "gain_se": 0.1, "study": "s"}
    samples = write_report(run.folder, demo=demo).read_text()
    text = Path(write_study_report(study.finish(), demo=demo)).read_text()
    page, pictures = Page(text), text.split('id="samples"')[1].split("</section>")[0]
    assert [link for link in page.links if not link.startswith(("#", "data:image/"))] == [
        "runs/expanded-0/report.html"]
    assert (study.folder / "runs/expanded-0/report.html").exists()
    assert pictures.count("<img") == 10 * 5
    assert "rayexpand report /elsewhere/s/runs/empty-prompt-0" in visible(pictures)
    assert "No pictures, /elsewhere/s/runs/empty-prompt-0 cannot be read from here" in visible(pictures)
    assert "runs/expanded-0 cannot" not in visible(pictures)
    assert "../../report.html" in samples
    of_study = colours(text, "figures")
    bars = dict(re.findall(r"<td>([^<]*)</td>\s*<td class=\"wide\"><div class=\"track\"><div class=\"fill (\w+)",
                           samples))
    assert bars["expanded"] == of_study["expanded"] == "s0"
    assert bars["expanded + RandAugment"] == of_study["expanded + randaugment"] == "s1"
    assert bars["empty-prompt expansion"] == of_study["empty-prompt"] == "s2"
    assert bars["original"] == bars["original + RandAugment"] == of_study["real images only"] == "grey"
    assert "60.0 ± 10.0 2" in visible(samples.split('class="group"')[1].split("</table>")[0]), "a control has its n too"


def test_all_classes_are_there_where_only_the_ends_are_shown(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in range(3):
        study.add("original", seed, np.arange(60) < 20, classes=20)
        study.add("made", seed, np.arange(60) < 40, classes=20, synthetic_rows=20)
    text = Path(write_study_report(study.finish())).read_text().split('id="classes"')[1].split("</section>")[0]
    before, _, folded = text.partition("<details>")
    assert "All 20 classes" in folded
    assert len(set(re.findall(r'<td class="clip">(class \d+)</td><td class="n">3', folded))) == 20
    assert before.count('<td class="n">3</td>') == 16


def test_a_table_for_the_terminal_without_predictions_says_the_difference_alone(tmp_path: Path) -> None:
    study = StudyFolder(tmp_path / "s")
    for seed in range(3):
        study.add("original", seed, first(5), predictions=False)
        study.add("made", seed, first(9), predictions=False, synthetic_rows=20)
    rows = {row[0]: row for row in StudyResult(str(study.finish())).table()[1]}
    assert rows["made"] == ("made", "90.0 ± 0.0", "3", "+40.0", "+40.0")
