from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rayexpand import api
from rayexpand.contract.metrics import stage_of
from rayexpand.runs import run as runs
from rayexpand.studies.rounds.loop import open_loop
from rayexpand.studies.rounds.status import read_loop_status
from tests.commands import rayexpand
from tests.studies.rounds.conftest import MakeLoop, finished
from tests.studies.rounds.test_learning import digits_loop


def test_status_of_a_loop_from_before_its_first_round_to_its_end(make_loop: MakeLoop) -> None:
    config = make_loop(rounds={"count": 2, "shares": [1, 2, 3]})
    open_loop(config)
    begun = read_loop_status(config.folder)
    assert (begun.stage, begun.rounds, begun.left, begun.complete) == ("deciding round 1", (), 120, False)

    finished(config)
    found = api.status(config.folder)
    assert (found.kind, found.complete, found.eta_seconds) == ("loop", True, 0.0)
    table = dict(found.table())
    assert table["round 1 of 2"] == ("20 of 20 decided (20 kept, 0 rejected, 0 failed); dealt by rule uniform: 1 to 1 "
                                     "copies of a seed; 5 to 5 of a class")
    assert table["now"] == "ended, count: 2 rounds are made; 60 of 120 samples are not spent"
    assert table["samples"] == "60 dealt (60 kept, 0 rejected, 0 failed, 0 pending), 60 left"
    assert [one["planned"] for one in found.to_json()["rounds"]] == [20, 40]

    Path(config.folder, "rounds/0002/data/train-000003.parquet").unlink()
    again = read_loop_status(config.folder)
    assert (again.stage, again.pending > 0, again.complete) == ("expanding round 2", True, False)
    shutil.rmtree(Path(config.folder, "rounds/0002"))
    assert read_loop_status(config.folder).eta_seconds is None, "decided, not begun"


def test_what_is_being_decided_is_told_by_its_trainings(tmp_path: Path) -> None:
    loop, _ = finished(digits_loop(tmp_path))
    for number in (2, 3):
        loop.files.delete(f"decisions/{number:04d}.json")
    shutil.rmtree(loop.files.at("rounds/0002"))
    loop.files.delete("results/r0002-fold1.json")
    assert read_loop_status(loop.config.folder).stage == "deciding round 2: 1 of 2 trainings done"


def test_a_damaged_decision_is_named_and_ends_nothing(make_loop: MakeLoop) -> None:
    config = make_loop(rounds={"count": 2})
    finished(config)
    Path(config.folder, "decisions/0002.json").write_text("{")
    found = read_loop_status(config.folder)
    assert "decisions/0002.json" in found.problems[0]


def test_retry_offers_the_failed_rows_of_every_round(make_loop: MakeLoop, image_folder: Path, tmp_path: Path) -> None:
    seeds: Any = shutil.copytree(image_folder, tmp_path / "mended")
    sound = (seeds / "bee/2.png").read_bytes()
    (seeds / "bee/2.png").write_bytes(b"no picture")
    config = make_loop(rounds={"count": 2}, data={"source": "imagefolder", "path": str(seeds)})
    finished(config)
    assert read_loop_status(config.folder).failed == 6
    (seeds / "bee/2.png").write_bytes(sound)
    found = rayexpand("retry", config.folder, "--no-ray", "--json")
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert (said["made"], said["failed"], said["kept"]) == (6, 0, 120)
    assert api.open(config.folder).verify().unseen == 6  # type: ignore[union-attr]
    assert [runs.open_run(one.folder).totals().failed for one in api.open(config.folder).rounds] == [0, 0]  # type: ignore[union-attr]


def test_a_loop_says_that_it_lives_and_counts_under_few_labels(tmp_path: Path) -> None:
    tasks = list[str]()
    raw = {"run": {"name": "loop", "out": str(tmp_path), "data": {"source": "digits", "per_class": 2},
                   "method": {"name": "classical", "policy": "randaugment", "ratio": 4}},
           "rounds": {"count": 2, "rule": "loss", "scores": {"folds": 2, "recipe": {"updates": 2, "batch": 8}}}}
    loop = api.expand(raw, on=lambda event: tasks.append(event.task), same_process=True)
    assert {"expanding loop, round 1", "expanding loop, round 2"} <= {*tasks}
    assert {stage_of(one) for one in tasks} == {"expand", "train"}
    (driver,) = api.status(loop.folder).drivers
    assert (driver.state, driver.beat.verb) == ("ended", "expand")
    assert Path(loop.page).is_file()
    assert Path(loop.folder, "README.md").is_file()
