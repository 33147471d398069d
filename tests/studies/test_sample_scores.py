"""Samples beside real images: what is compared with what, once, and the table that it gives."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from rayexpand import api
from rayexpand.cli.main import app
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.data.pixels import decode
from rayexpand.evaluation import features as extractors
from rayexpand.evaluation.evaluate import EvaluateConfig
from rayexpand.evaluation.extraction import Found
from rayexpand.evaluation.measure import measure
from rayexpand.evaluation.sides import Side
from rayexpand.reports.study import write_study_report
from rayexpand.storage.tables import parquet_bytes, read_json
from rayexpand.studies import sample_scores
from rayexpand.studies.config import parse_study
from rayexpand.studies.parts import Study
from rayexpand.studies.sample_scores import score_samples
from rayexpand.studies.score_table import (
    _number,
    go_with_top1,
    said_of_samples_alone,
    said_of_top1,
    score_table,
)
from rayexpand.studies.spreads import spread
from rayexpand.studies.study import prepare_study
from rayexpand.studies.summary import summary
from rayexpand.studies.trial import run_trials
from rayexpand.studies.trials import make_trials
from tests.commands import rewrite_json
from tests.studies.test_study import expanded, raw_study
from tests.tiny import tiny_clip

METRICS = ["density_coverage", "kd"]
ARMS = [{"name": "original"}, {"name": "flips", "use": "flips", "ratio": [1, 3]},
        {"name": "alone", "use": "flips", "real": 0}]


class Extractor:
    """Pixels of the middle as features; keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[list[Side]] = []

    def __call__(self, config: EvaluateConfig, sha256: str, sides: Sequence[Side], on_rows: Any) -> list[Found]:
        self.calls.append(list(sides))
        return [Found(features_of(side), 0, 16) for side in sides]


def features_of(side: Side) -> np.ndarray:
    images = [image for chunk in side.chunks for image in side.read(chunk).images]
    return np.stack([decode(image)[0][4:12:2, 4:12:2, 0].reshape(-1) / 255 for image in images]).astype(np.float32)


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "extractor_hash", lambda *_: "0" * 64)


def raw(out: Path, **changes: Any) -> dict[str, Any]:
    samples = {"metrics": METRICS, "real": {"source": "digits", "split": "pool", "per_class": 5}}
    return raw_study(out, **{"arms": ARMS, "samples": samples, **changes})


def scored(raw: dict[str, Any]) -> tuple[Study, list[str], Extractor]:
    study, extractor = expanded(raw), Extractor()
    return study, score_samples(study, make_trials(study), extractor), extractor


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Trained and compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "extractor_hash", lambda *_: "0" * 64)
        study, failed, _ = scored(raw(tmp_path_factory.mktemp("scored")))
    assert failed == []
    for _, problem in run_trials(study.files, make_trials(study), study.config.training):
        assert not problem
    return study


def test_every_arm_is_compared_with_the_same_images_once(tmp_path: Path) -> None:
    """Two repetitions of one copy and of three, which two arms share, and as many other digits."""
    study, failed, extractor = scored(raw(tmp_path))
    (sides,) = extractor.calls

    assert failed == []
    assert [len(side) for side in sides] == [30, 20, 60, 20, 60, 20, 20]  # of 50 other digits none is left of 60
    expected = measure(METRICS, *(Found(features_of(side), 0, 16) for side in sides[1::-1]),
                       key=lambda statistic: f"{statistic}_digits")
    found = read_json(study.files, "scores/flips-1x-s0.json")
    assert found is not None
    assert found["scores"] == expected["scores"]
    assert (found["n_samples"], found["n_reference"], found["copies"]) == (20, 30, 1)
    assert found["extractor"]["name"] == "guide digits"
    whole, alone = (read_json(study.files, f"scores/{name}-s0.json") for name in ("flips-3x", "alone"))
    assert whole is not None
    assert alone is not None
    assert whole["scores"] == alone["scores"] != found["scores"]
    assert sorted(study.files.list("scores/real")) == ["20-0.json", "20-1.json"]
    assert not np.array_equal(features_of(sides[5]), features_of(sides[6]))


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    study, _, extractor = scored(raw(tmp_path))
    assert score_samples(study, make_trials(study), extractor) == []
    assert len(extractor.calls) == 1

    study.files.delete("scores/alone-s1.json")
    score_samples(study, make_trials(study), extractor)
    assert [len(side) for side in extractor.calls[1]] == [30, 60]
    other = prepare_study(parse_study(raw(tmp_path, samples={"metrics": ["kd"]})))
    score_samples(other, make_trials(other), extractor)
    assert [len(side) for side in extractor.calls[2]] == [30, 20, 60, 20, 60]


def test_a_study_that_does_not_ask_compares_nothing(tmp_path: Path) -> None:
    study, failed, extractor = scored(raw(tmp_path, samples=None))
    assert (failed, extractor.calls, study.files.list("scores")) == ([], [], [])
    assert "samples" not in study.config.model_dump()
    found = summary(study.config.folder)
    assert found["samples"] is None
    assert score_table(found) is None


def test_a_selection_decides_what_is_compared_and_too_few_are_said(tmp_path: Path) -> None:
    arms = [{"name": "original"}, {"name": "chosen", "use": "flips", "selection": "few"}]
    study = expanded(raw(tmp_path, seeds=[0], arms=arms))
    run = study.opened.run(f"{study.config.folder}/runs/flips-0")
    ids = [one for receipt in run.store.receipts() for one in run.store.data(receipt, ["sample_id"])[
        "sample_id"].to_pylist()]
    run.files.make_folder("selections")
    failed: list[str] = []
    for kept in (8, 1):
        run.files.replace("selections/few.parquet", parquet_bytes(
            pa.table({"sample_id": ids, "keep": [n < kept for n in range(len(ids))]}), {}))
        extractor = Extractor()
        failed += score_samples(study, make_trials(study), extractor)
        assert len(extractor.calls[0][1]) == kept
    assert failed == ["samples of scores/chosen-s0: 1 images cannot be compared; at least 2 are needed"]


def test_the_table_has_accuracy_coverage_distance_and_cost(finished: Study) -> None:
    found = summary(finished.config.folder)
    table = score_table(found)
    assert table is not None
    heads, rows = table
    lines = {row[0]: dict(zip(heads, row, strict=True)) for row in rows}

    assert heads[4:] == ("coverage_k5", "density_k5", "kd_digits", "images", "GFLOP/image", "s/image",
                         "s fitting")
    assert list(lines) == ["original", "flips 1x", "flips 3x", "alone", "20 other real images"]
    assert set(lines["original"].values()) >= {"no samples", "baseline"}
    assert lines["20 other real images"]["top-1 %"] == "no classifier"
    arm = next(one for one in found["arms"] if one["arm"] == "flips 3x")
    values = [json.loads(Path(finished.files.root, f"scores/flips-3x-s{seed}.json").read_text())["scores"][
        "coverage_k5"]["value"] for seed in (0, 1)]
    assert arm["samples"]["scores"]["coverage_k5"]["values"] == values
    assert float(lines["flips 3x"]["coverage_k5"].partition(" ")[0]) == pytest.approx(np.mean(values), abs=0.1)
    assert (lines["flips 3x"]["images"], lines["flips 3x"]["GFLOP/image"]) == ("60", "0")
    spent = [json.loads(Path(finished.files.root, f"results/flips-3x-s{seed}.json").read_text())["expansion_seconds"]
             for seed in (0, 1)]
    assert arm["seconds_per_image"]["mean"] == pytest.approx(sum(spent) / 120)
    assert found["samples"]["reference"] == 30
    assert [one["images"] for one in found["samples"]["real"]] == [20]
    assert all("" not in row for row in rows)


def an_arm(real_rows: int, top1: Sequence[float], seeds: Sequence[int] = (0, 1), **scores: Sequence[float]) -> Any:
    return {"real_rows": {"mean": real_rows}, "seeds": list(seeds), "last": {"top1": {"values": list(top1)}},
            "samples": {"scores": {name: {"values": list(one), "n": len(one)} for name, one in scores.items()}}}


def test_whether_scores_go_with_accuracy_by_hand() -> None:
    """Over four arms of samples alone, two repetitions: in the first as accuracy, in the second two arms exchanged."""
    arms = [an_arm(0, (0.1, 0.1), up=(1, 2), down=(4, 4), same=(1, 1)),
            an_arm(0, (0.2, 0.2), up=(2, 1), down=(3, 3), same=(1, 1)),
            an_arm(0, (0.3, 0.3), up=(3, 3), down=(2, 2), same=(1, 1)),
            an_arm(0, (0.4, 0.4), up=(4, 4), down=(1, 1), same=(1, 1)),
            an_arm(0, (0.9,), (0,), up=(0,), down=(9,), same=(1,)),
            an_arm(20, (0.9, 0.9), up=(0, 0), down=(0, 0), same=(1, 1))]
    (found,) = go_with_top1(arms)

    assert (found["arms"], found["n"]) == ("samples alone", 4)
    assert found["scores"]["up"]["values"] == pytest.approx([1.0, 0.8])  # 1 - 6 (1 + 1) / (4 (16 - 1))
    assert found["scores"]["down"]["values"] == pytest.approx([-1.0, -1.0])
    assert found["scores"]["same"] is None
    (line,) = said_of_top1({"samples": {"with_top1": [found]}})
    assert line == ("rank correlation with top-1 over 4 arms, samples alone: down -1, same none, all are equal, up "
                    "0.9 ± 0.1")
    assert go_with_top1(arms[2:]) == said_of_top1({"samples": None}) == []


@pytest.mark.parametrize(("values", "shown"), [
    ((0.45, 0.51, 0.42), "0.46 ± 0.03"), ((1.2, 1.3), "1.25 ± 0.05"), ((1200, 1300), "1,250 ± 50"), ((0.5,), "0.5"),
    ((0.8559431679999999, 0.8559431680000001, 0.8559431679999999), "0.8559"), ((0.0, 0.0), "0"), ((), "not measured")])
def test_numbers_end_where_their_error_begins(values: Sequence[float], shown: str) -> None:
    assert _number(spread(values)) == shown


def test_the_page_and_the_csv_have_the_table(finished: Study) -> None:
    page = Path(write_study_report(finished.config.folder)).read_text()
    section = page.split('id="compared"')[1].split("</section>")[0]
    assert "coverage_k5" in section
    assert "same 30 real images, in 16 features of guide digits" in section
    with open(Path(finished.files.root, "summary.csv"), newline="") as stream:
        row = next(row for row in csv.DictReader(stream) if row["arm"] == "alone")
    assert float(row["samples.scores.coverage_k5"]) >= 0
    assert row["samples.images_compared"] == "60.0"


@pytest.mark.slow
def test_an_arm_of_samples_alone_has_its_classifier_accuracy_score(finished: Study) -> None:
    """Beside real images alone at the same updates: its control, or that of an arm with as many rows."""
    found = summary(finished.config.folder)
    (line,) = said_of_samples_alone(found)
    arm = next(one for one in found["arms"] if one["arm"] == "alone")
    (gap,) = [one for one in found["comparisons"] if one["kind"] == "control" and one["arm"] == "alone"]
    against = next(one for one in found["arms"] if one["arm"] == gap["against"])

    share = 100 * arm["last"]["top1"]["mean"]
    assert line.startswith(f"Classifier accuracy score of alone, samples alone: {share:.1f}")
    assert f"{100 * gap['mean']:+.1f} points to {gap['against']}, real images alone at the same updates" in line
    assert against["updates"]["mean"] == arm["updates"]["mean"]
    assert (against["synthetic_rows"]["mean"], arm["real_rows"]["mean"]) == (0, 0)
    assert line in html.unescape(Path(write_study_report(finished.config.folder)).read_text())
    bare = {**found, "comparisons": []}
    assert said_of_samples_alone(bare)[0].endswith("no arm of real images alone has as many updates.")


def test_a_distance_stands_beside_its_floor(finished: Study) -> None:
    found = summary(finished.config.folder)
    table = score_table(found)
    assert table is not None
    lines = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1]}
    floor = next(one for one in found["arms"] if one["arm"] == "alone")["samples"]["floors"]["kd_digits"]["mean"]

    assert lines["alone"]["kd_digits"].endswith(f", floor {floor:,.3g}")
    assert "floor" not in lines["alone"]["coverage_k5"]


def test_scores_that_are_missing_damaged_or_of_other_samples_are_said(tmp_path: Path) -> None:
    study, _, _ = scored(raw(tmp_path, seeds=[0]))
    for _, problem in run_trials(study.files, make_trials(study), study.config.training):
        assert not problem
    root = Path(study.files.root)
    (root / "scores/flips-1x-s0.json").unlink()
    (root / "scores/alone-s0.json").write_text("{")
    other = "scores/flips-3x-s0.json"
    rewrite_json(root / other, lambda one: one.update(list_sha256="of other rows"), other)
    found = summary(study.config.folder)
    table = score_table(found)
    assert table is not None

    cells = {row[0]: row[4:] for row in table[1]}
    for arm in ("flips 1x", "flips 3x", "alone"):
        assert cells[arm][0] == "not measured", arm
    lines = [line for line in found["warnings"] if line.startswith("scores/")]
    assert [line.partition(" ")[0].removesuffix(":") for line in lines] == [
        "scores/alone-s0.json", "scores/flips-3x-s0.json"]
    assert all("`rayexpand train` measures" in line for line in lines)


@pytest.mark.parametrize(("samples", "arms", "words"), [
    ({"extractor": {"timm": "no such model"}}, ARMS, r"samples\.extractor\.timm: 'no such model'"),
    ({"reference": {"source": "imagefolder"}}, ARMS, r"samples\.reference\.path: missing"),
    ({"metrics": ["coverage"]}, ARMS, r"samples\.metrics"),
    ({}, ARMS[:1], "samples: no arm uses an expansion")])
def test_mistakes_are_said_before_anything_is_made(tmp_path: Path, samples: dict[str, Any], arms: list[Any],
                                                   words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        prepare_study(parse_study(raw_study(tmp_path, samples=samples, arms=arms)))


def test_another_dataset_wants_an_extractor_named(tmp_path: Path, image_folder: Path) -> None:
    own = {"source": "imagefolder", "path": str(image_folder)}
    with pytest.raises(ConfigError, match=r"samples\.extractor\.guide: missing; the embedded default has seen digits"):
        prepare_study(parse_study(raw(tmp_path, data=own, test=own, samples={})))


def test_other_real_images_are_not_those_that_are_compared_with(tmp_path: Path) -> None:
    samples = {"real": {"source": "digits", "split": "test"}}
    with pytest.raises(UsageError, match=r"samples\.real: 30 of its images are those that the samples are compared"):
        prepare_study(parse_study(raw(tmp_path, samples=samples)))


@pytest.mark.slow
def test_train_compares_and_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the features of a guide, in this process."""
    monkeypatch.undo()
    guide = str(tiny_clip(tmp_path / "clip"))
    said = raw(tmp_path, seeds=[0], samples={"metrics": METRICS, "batch": 8, "extractor": {
        "guide": guide, "device": "cpu"}})
    found = api.train(said, same_process=True)
    numbers = found.summary()
    table = found.compared(numbers)

    assert found.failed == ()
    assert numbers["samples"]["extractor"] == f"guide {guide}"
    assert table is not None
    assert [row[-4] for row in table[1]] == ["no samples", "20", "60", "60"]
    assert "not measured" not in str(table)
    monkeypatch.setattr(sample_scores, "measure", lambda *_: 1 / 0)  # what is there is not measured again
    (tmp_path / "study.yaml").write_text(json.dumps(said))
    shown = CliRunner().invoke(app, ["train", str(tmp_path / "study.yaml"), "--no-ray"])
    assert shown.exit_code == 0, shown.output
    assert f"samples beside 30 real images, features of guide {guide}" in shown.stdout
    heads = next(line for line in shown.stdout.splitlines() if "coverage_k5" in line)
    assert heads.split()[-4:] == ["GFLOP/image", "s/image", "s", "fitting"], "a line is not folded in a pipe"
