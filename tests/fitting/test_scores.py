"""Scores as an artifact: found again by what they were made from, made by folds that go on, and dealt by."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest

import rayexpand
from rayexpand.classifier.classifier import Classifier
from rayexpand.contract.errors import ConfigError, UsageError
from rayexpand.data.seeds import DataConfig, build_index
from rayexpand.fitting.config import parse_fit
from rayexpand.fitting.fit import fit
from rayexpand.fitting.maker import World
from rayexpand.fitting.scores import ScoresFit, _made_from
from rayexpand.fitting.status import read_fits
from rayexpand.runs import run as runs
from rayexpand.runs.allocation import FACTS, FILE
from rayexpand.runs.status import read_status
from tests.conftest import complete
from tests.studies.test_study import SMALL


def raw_fit(out: Path, **scores: Any) -> dict[str, Any]:
    return {"name": "small", "out": str(out), "data": {"source": "digits", "per_class": 2}, "device": "cpu",
            "fit": {"scores": {"folds": 2, "recipe": SMALL, **scores}}}


def raw_run(out: Path, **sections: Any) -> dict[str, Any]:
    return {"name": "flips", "out": str(out), "data": {"source": "digits", "per_class": 2},
            "method": {"name": "classical", "policy": "randaugment", "ratio": 2}, "image": {"size": 16}, **sections}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def made(out: Path) -> Path:
    return Path(rayexpand.fit(raw_fit(out))["scores"].folder)


def test_scores_are_found_again_by_what_they_were_made_from(made: Path, out: Path) -> None:
    again, other = (rayexpand.fit(raw_fit(out, **changes))["scores"].folder for changes in ({}, {"folds": 3}))

    assert again == str(made)
    assert other != str(made)
    assert {file.name for file in made.iterdir()} == {FILE, "artifact.json"}
    assert (out / "small-scores").is_symlink()
    assert not list(out.glob("*.work"))
    assert pq.read_schema(made / FILE).names == ["seed_id", "fold", "p_label", "margin", "entropy", "speed", "loss"]
    facts = json.loads((made / "artifact.json").read_text())
    assert (facts["in_sample"], facts["folds"], facts["images"], facts["updates"]) == (False, 2, 20, 2 * 6)
    assert facts["process_seconds"] > 0
    assert facts["summary"] == [f"{facts['accuracy']:.1%} of 20 images named right by a classifier trained without "
                                "them and their samples, in 2 folds"]


def test_a_run_is_dealt_by_them(made: Path, out: Path, tmp_path: Path) -> None:
    raw = raw_run(tmp_path, allocate={"rule": "loss", "scores": str(made)})
    raw["method"]["ratio"] = 20
    run, totals = complete(runs.parse(raw))

    assert totals.kept == 400
    loss, copies = pq.read_table(made / FILE)["loss"].to_numpy(), run.plan.copies.astype(int)
    np.testing.assert_allclose(copies, 400 * loss / loss.sum(), atol=1)
    assert copies.std() > 0
    assert "in sample" not in dict(read_status(run.folder).table())["dealt"]


def test_scores_in_sample_are_called_so_wherever_they_are_dealt_by(out: Path, tmp_path: Path) -> None:
    made = rayexpand.fit(raw_fit(out, folds=1))["scores"]
    config = runs.parse(raw_run(tmp_path, allocate={"rule": "loss", "scores": made.folder}))

    assert made.facts["in_sample"]
    assert "by a classifier in sample" in made.facts["summary"][0]
    assert json.loads(pq.read_schema(Path(made.folder, FILE)).metadata[FACTS])["in_sample"]
    assert any("by rule loss, scores in sample: " in note for note in rayexpand.validate(config).notes)
    assert "scores in sample" in dict(read_status(complete(config)[0].folder).table())["dealt"]


def test_samples_of_a_run_are_trained_on_and_count(made: Path, out: Path, tmp_path: Path) -> None:
    run, _ = complete(runs.parse(raw_run(tmp_path)))
    more = Path(rayexpand.fit(raw_fit(out, runs=[str(run.folder)]))["scores"].folder)

    assert more != made
    assert pq.read_table(more / FILE)["fold"] == pq.read_table(made / FILE)["fold"]
    assert pq.read_table(more / FILE)["p_label"] != pq.read_table(made / FILE)["p_label"]


def test_scores_that_were_changed_are_refused(made: Path, tmp_path: Path) -> None:
    content = bytearray((made / FILE).read_bytes())
    content[100] ^= 1
    (tmp_path / FILE).write_bytes(content)
    config = runs.parse(raw_run(tmp_path, allocate={"rule": "loss", "scores": str(tmp_path)}))

    assert any("allocate.scores" in line and "damaged" in line for line in runs.preflight(config))


def killed_at_step_5(out: Path) -> None:
    """Trains the second fold up to there and says so, and is never done with that step."""
    update, begun = Classifier.update, list[int]()

    def stop(self: Classifier, batch: Any) -> float:
        begun.extend([0] * (self.step == 0))
        if self.step == 5 and len(begun) == 2:
            (out / "there").touch()
            signal.pause()
        return update(self, batch)

    Classifier.update = stop  # type: ignore[method-assign]
    rayexpand.fit(raw_fit(out))


def test_a_fit_killed_in_a_fold_goes_on_from_its_checkpoint(made: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    killed = multiprocessing.get_context("fork").Process(target=killed_at_step_5, args=(tmp_path,))
    killed.start()
    while not (tmp_path / "there").exists():
        assert killed.is_alive()
        time.sleep(0.005)
    killed.kill()
    killed.join()
    (work,) = tmp_path.glob(".scores-*.work")
    assert [one.name for one in (work / "checkpoints").iterdir()] == ["scores-fold1.pt"]
    (part,) = read_fits(tmp_path).parts
    assert (part.folder, part.task, part.total) == (work.name[1:-len(".work")], "training folds", 2)
    steps, update = list[int](), Classifier.update
    monkeypatch.setattr(Classifier, "update", lambda self, batch: (steps.append(self.step), update(self, batch))[1])

    again = Path(rayexpand.fit(raw_fit(tmp_path))["scores"].folder)

    assert steps == [3, 4, 5]
    assert (again / FILE).read_bytes() == (made / FILE).read_bytes()
    assert not work.exists()


def test_groups_make_other_scores(tmp_path: Path) -> None:
    raw, index = raw_fit(tmp_path), build_index(DataConfig(source="digits", per_class=2))
    (tmp_path / "g.csv").write_text("\n".join(["seed_id,group", *(f"{one},a{one}" for one in index.seed_ids)]))
    config, world = parse_fit(raw), cast("World", SimpleNamespace(index=index))
    facts = [_made_from(ScoresFit(folds=2, recipe=SMALL, group=group), config, world)
             for group in (None, str(tmp_path / "g.csv"))]
    assert [name for name in facts[0] if facts[0][name] != facts[1][name]] == ["folds_sha256"]


@pytest.mark.parametrize(("scores", "words"), [
    ({"folds": 0}, "fit.scores.folds"),
    ({"recipe": {"presett": "digits"}}, "fit.scores.recipe"),
    ({"recipe": {**SMALL, "checkpoint": "gone.safetensors"}}, "fit.scores.recipe.checkpoint: there is no file gone"),
    ({"group": "column"}, "fit.scores.group: data.source 'digits' has no columns"),
    ({"group": "gone.csv"}, "fit.scores.group: 'gone.csv' does not exist"),
    ({"folds": 1, "group": "gone.csv"}, "fit.scores.group: has no effect with folds: 1"),
    ({"training": {"keep": "weights"}}, "fit.scores.training.keep: has no effect"),
    ({"runs": ["gone", "./gone"]}, "fit.scores.runs: gone is named twice"),
    ({"runs": ["gone"]}, "fit.scores.runs: gone is not a run folder")])
def test_mistakes_are_told_before_anything_is_trained(tmp_path: Path, scores: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        rayexpand.fit(raw_fit(tmp_path, **scores))
    assert words in str(raised.value)


def test_no_class_of_two_images_is_refused(tmp_path: Path) -> None:
    raw = raw_fit(tmp_path)
    raw["data"]["per_class"] = 1
    with pytest.raises(UsageError, match="scores: no class has two images"):
        rayexpand.fit(raw)


def test_plan_counts_the_folds(tmp_path: Path) -> None:
    raw = raw_fit(tmp_path, folds=5, recipe={"backbone": "resnet50", "size": 224, "test_size": 224, "epochs": 10,
                                             "batch": 4, "updates": None})
    raw["device"] = "cuda"
    raw["data"] = {"source": "imagefolder", "path": str(tmp_path)}
    raw["estimate"] = {"seeds": 1000, "classes": 10}
    (stage,) = rayexpand.plan(raw).costs.stages

    assert stage.stage.name == "fit scores"
    assert stage.stage.what == "5 trainings of 2,000 steps, 1,000 images scored"
    assert (stage.stage.tasks, stage.stage.saves, stage.stage.unit) == (5, 10, "GPU")
    assert stage.ends


def test_where_trials_are_not_known_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="make scores with `rayexpand fit`"):
        fit(parse_fit(raw_fit(tmp_path)), lambda *_: None)
