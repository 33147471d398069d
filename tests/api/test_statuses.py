"""`status` of every kind of folder, as other processes leave it behind at a moment of its life."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rayexpand import api
from rayexpand.api import driving
from rayexpand.api.results import Event
from rayexpand.contract.errors import DamagedFile, UsageError
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.heartbeats import SILENT_S, Beat
from rayexpand.storage.tables import replace_json
from tests.commands import rayexpand as command
from tests.runfolder import sample_run


def _raw(images: Path, ids: Path) -> dict[str, Any]:
    """Four classes: four images of each train, one is tested."""
    ids.mkdir()
    names = [f"{name}/{i}.png" for name in ("ant", "bee", "cat", "dog") for i in range(5)]
    for section, last in (("data", False), ("test", True)):
        (ids / f"{section}.txt").write_text("".join(f"{name}\n" for name in names if (name[-5] == "4") == last))
    data, test = ({"source": "imagefolder", "path": str(images), "ids": str(ids / f"{one}.txt")}
                  for one in ("data", "test"))
    return {"data": data, "test": test, "subset": {"kind": "per_class", "n": 2}, "seeds": [0, 1],
            "recipe": {"updates": 4, "epochs": 2, "batch": 8, "backbone_args": {"width": 4}},
            "expansions": {"noisy": {"method": {"name": "classical", "policy": "randaugment", "ratio": 1}}},
            "arms": [{"name": "original"}, {"name": "noisy", "use": "noisy"}]}


class Halt(Exception):
    """What a listener raises to stop a verb."""


@pytest.fixture(scope="module")
def study(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A study that was stopped when its second trial began, with what `status` said on the way."""
    root = tmp_path_factory.mktemp("study")
    said: dict[str, Any] = {}

    def hear(event: Event) -> None:
        stage = event.task.partition(" ")[0]
        said.setdefault(stage, api.status(root / "study").to_json())
        if stage == "training" and event.done == 1:
            said["second"] = api.status(root / "study").to_json()
            raise Halt

    with pytest.raises(Halt):
        api.train({"name": "study", "out": str(root), **_raw(image_folder, root / "ids")}, on=hear, same_process=True)
    return root / "study", said


def test_a_study_shows_its_stages_while_it_runs(study: tuple[Path, dict[str, Any]]) -> None:
    _, said = study
    first, trained = said["expanding"], said["training"]
    assert (first["kind"], first["trials"], first["trials_are_final"]) == ("study", 4, False)
    assert first["eta_seconds"] is None
    assert [one["name"] for one in first["runs"]] == ["noisy-0", "noisy-1"]
    assert [one["complete"] for one in trained["runs"]] == [True, True]
    assert trained["runs"][0]["status"]["kept"] == 8
    assert (trained["trials"], trained["trials_are_final"], trained["running"], trained["done"]) == (6, True, 0, 0)
    assert said["second"]["done"] == 1
    assert said["second"]["drivers"][0]["state"] == "running"


def test_a_study_shows_its_stages_after_it_was_stopped(study: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = study
    seen = api.status(folder)
    assert (seen.done, seen.running, seen.failed, seen.pending, seen.complete) == (1, 0, 0, 5, False)  # type: ignore[union-attr]
    assert seen.drivers[0].state == "ended"
    assert seen.drivers[0].beat.verb == "train"
    lines = dict(seen.table())
    assert lines["trials"] == "6: 1 done, 0 running, 0 failed, 5 pending"
    assert lines["run noisy-0"] == "8 of 8 decided (8 kept, 0 rejected, 0 failed)"
    assert json.loads(command("status", folder, "--json").stdout)["pending"] == 5


def test_pace_gives_the_time_left(study: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = shutil.copytree(study[0], tmp_path / "study", copy_function=shutil.copy2)
    (done,) = (copy / "results").iterdir()
    facts = json.loads((copy / "study.json").read_text())
    other = next(name for name in facts["trials"] if name != done.stem)
    for name, when in ((done.stem, 1000.0), (other, 1030.0)):
        shutil.copy(done, copy / f"results/{name}.json") if name != done.stem else None
        os.utime(copy / f"results/{name}.json", (when, when))
    seen = api.status(copy, clock=lambda: 1040.0)
    assert seen.last_result_age_seconds == 10.0  # type: ignore[union-attr]
    assert any(other in line for line in seen.problems), "a copy of another result is damaged"
    assert seen.eta_seconds == 5 * 30.0


def test_a_sweep_shows_trials_by_state_and_the_best(image_folder: Path, tmp_path: Path) -> None:
    raw = _raw(image_folder, tmp_path / "ids")
    said = []

    def hear(event: Event) -> None:
        if event.task.startswith("sweeping"):
            said.append(api.status(tmp_path / "sweep"))

    api.sweep({"name": "sweep", "out": str(tmp_path), "arm": "noisy", "samples": 2, "hold_out": 1,
               "score_on": "validation", "fresh_seeds": 0, "space": {"recipe.lr": {"choice": [0.01, 0.001]}},
               "study": {**raw, "seeds": [0]}}, on=hear)
    first, last = said[0], api.status(tmp_path / "sweep")
    assert (first.kind, first.suggestions, first.pending + first.running, first.best) == ("sweep", 2, 2, None)
    assert (last.trials["finished"], last.pending, last.complete) == (2, 0, True)  # type: ignore[union-attr]
    assert last.best["score"] == max(json.loads(one.read_text())["score"]  # type: ignore[index, union-attr]
                                     for one in (tmp_path / "sweep/trials").iterdir())
    assert dict(last.table())["best so far"].startswith(f"{last.best['score']:.4f} with lr=")  # type: ignore[index, union-attr]
    assert last.drivers[0].words.endswith("done")


def test_a_fit_shows_its_parts_with_step_and_loss(image_folder: Path, tmp_path: Path) -> None:
    said: list[Any] = []

    def hear(event: Event) -> None:
        if event.task == "training the guide" and event.done == 1:
            time.sleep(0.05)
        if event.task == "training the guide" and event.done >= 2:
            said.append(api.status(tmp_path / "artifacts"))

    api.fit({"name": "four", "out": str(tmp_path / "artifacts"), "data": {
        "source": "imagefolder", "path": str(image_folder)}, "fit": {"guide": {"kind": "classifier", "recipe": {
            "updates": 6, "epochs": 1, "batch": 4, "backbone_args": {"width": 4}}}}}, on=hear)
    (part,) = said[0].parts
    assert (part.done, part.task, part.step, part.total) == (False, "training the guide", 1, 6)
    assert part.numbers["loss"] > 0
    assert said[0].drivers[0].beat.verb == "fit"
    seen = api.status(tmp_path / "artifacts")
    assert [one.done for one in seen.parts] == [True]  # type: ignore[union-attr]
    assert seen.complete
    (folder,) = (tmp_path / "artifacts").glob("classifier-*")
    assert not (folder / "position.json").exists(), "it is no part of an artifact"


def test_an_audit_without_a_run_shows_its_sections(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    for folder in (".tmp", "heartbeats"):
        files.make_folder(folder)
    replace_json(files, "result.json", {"name": "release", "run": None, "membership": {"created": 1000.0}})
    replace_json(files, "heartbeats/audit-release~far~1~2.json", asdict(Beat(
        "audit", "release", "far", 1, "far~1~2", 1, 900.0, 1000.0, exit_code=0)))
    seen = api.status(tmp_path)
    assert (seen.kind, seen.complete, seen.drivers[0].state) == ("audit", True, "ended")
    assert dict(seen.table())["audit membership"] == "found 1970-01-01 00:16:40 UTC"


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run, study, sweep, audit or artifact is here"):
        api.status(tmp_path)


@pytest.mark.parametrize("harm", [
    lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"\x00\xff{" * 9),
    lambda file: file.write_bytes(file.read_bytes()[:-9]), lambda file: file.unlink()],
    ids=["empty", "other bytes", "cut", "gone"])
def test_no_file_of_a_run_can_crash_a_status(tmp_path: Path, harm: Callable[[Path], Any]) -> None:
    run = sample_run(tmp_path / "run")
    with driving.alive(driving.Relay(None), str(run.folder), "expand", "run"):
        pass
    whole = tmp_path / "whole"
    shutil.copytree(run.folder, whole)
    for file in sorted(one for one in whole.rglob("*") if one.is_file()):
        shutil.rmtree(run.folder)
        shutil.copytree(whole, run.folder)
        harm(run.folder / file.relative_to(whole))
        _says(run.folder)


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(b"{"), lambda file: file.unlink()],
                         ids=["cut", "gone"])
def test_no_file_of_a_study_can_crash_a_status(study: tuple[Path, dict[str, Any]], tmp_path: Path,
                                               harm: Callable[[Path], Any]) -> None:
    files = [one for one in sorted(study[0].rglob("*.json")) if "runs" not in one.parts]
    assert len(files) > 8
    for file in files:
        copy = shutil.copytree(study[0], tmp_path / "copy", copy_function=shutil.copy2)
        harm(copy / file.relative_to(study[0]))
        _says(copy)
        shutil.rmtree(copy)


def _says(folder: Path) -> None:
    """A status, or an error of ours that names a file."""
    try:
        seen = api.status(folder)
    except (UsageError, DamagedFile) as error:
        message = str(error)
    else:
        message = json.dumps(seen.to_json())
        assert seen.table()
    assert str(folder) in message or "data/" in message


def test_a_silent_driver_of_another_host_is_said_after_half_a_minute(tmp_path: Path) -> None:
    run, now = sample_run(tmp_path / "run"), 2e9
    run.store.files.make_folder("heartbeats")
    replace_json(run.store.files, "heartbeats/expand-run~far~1~2.json", asdict(Beat(
        "expand", "run", "far", 1, "far~1~2", 2, now - 500, now, "expanding run", 120, 180)))
    assert "running on far" in dict(api.status(run.folder, clock=lambda: now + 5).table())["driver"]
    lines = dict(api.status(run.folder, clock=lambda: now + SILENT_S + 1).table())
    assert lines["driver"] == "expand run, attempt 2: no heartbeat since 2033-05-18 03:33:20 UTC on far (pid 1)"
    assert lines["worked on"] == "expanding run: 120/180"
