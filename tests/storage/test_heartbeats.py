from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rayexpand.api.live import FRESH_S
from rayexpand.contract.errors import EnvironmentFault, OverBudget
from rayexpand.reports.live import REFRESH_S
from rayexpand.storage import heartbeats
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.heartbeats import INTERVAL_S, SILENT_S, Beat, Heartbeat, drivers_in
from rayexpand.storage.tables import replace_json
from tests.commands import ROOT

ELSEWHERE = "another-host~7~99"

DRIVER = """
import sys, time
from rayexpand.storage.files import LocalFiles
from rayexpand.storage.heartbeats import Heartbeat
with Heartbeat(LocalFiles(sys.argv[1]), "expand", "birds") as heart:
    heart.say("expanding birds", 3, 10, {"kept": 2}, 1.5)
    print("here", flush=True)
    time.sleep(60)
"""


def _write(files: LocalFiles, **fields: object) -> Beat:
    for folder in ("heartbeats", ".tmp"):
        files.make_folder(folder)
    beat = replace(Beat("expand", "birds", "another-host", 7, ELSEWHERE, 3, 1000.0, 1100.0), **fields)  # type: ignore[arg-type]
    replace_json(files, f"heartbeats/{beat.verb}-{beat.name}~{beat.token}.json", asdict(beat))
    return beat


def test_a_driver_says_what_it_does_and_how_it_ended(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with Heartbeat(files, "train", "my study") as heart:
        (seen,) = drivers_in(files, [])
        assert (seen.state, seen.beat.verb, seen.beat.name, seen.beat.pid, seen.beat.attempt) == (
            "running", "train", "my study", os.getpid(), 1)
        heart.say("training my study", 3, 12, {"running": 2})
    (seen,) = drivers_in(files, [])
    assert (seen.state, seen.beat.exit_code, seen.task, seen.beat.facts) == (
        "ended", 0, "training my study: 3/12", {"running": 2})
    assert seen.words.endswith("done")


def test_the_next_start_counts_and_takes_the_ended_one_away(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with pytest.raises(OverBudget), Heartbeat(files, "fit", "a"):
        raise OverBudget("too many\nand more")
    (seen,) = drivers_in(files, [])
    assert (seen.beat.exit_code, seen.beat.said) == (3, "too many")
    assert "exit code 3: too many" in seen.words
    with Heartbeat(files, "fit", "a"), Heartbeat(files, "fit", "b"):
        assert [(one.beat.name, one.beat.attempt) for one in drivers_in(files, [])] in (
            [("b", 1), ("a", 2)], [("a", 2), ("b", 1)])


def test_beats_come_while_the_driver_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "INTERVAL_S", 0.05)
    monkeypatch.setattr(heartbeats, "GAP_S", 0.01)
    files = LocalFiles(tmp_path)
    with Heartbeat(files, "sweep", "a"):
        first = drivers_in(files, [])[0].beat.time
        deadline = time.monotonic() + 10
        while drivers_in(files, [])[0].beat.time <= first:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_lazy_one_leaves_nothing_before_its_first_word(tmp_path: Path) -> None:
    with Heartbeat(LocalFiles(tmp_path / "artifacts"), "fit", "a", lazily=True) as heart:
        assert not (tmp_path / "artifacts").exists()
        heart.say("fitting guide", 0, 1)
        assert drivers_in(LocalFiles(tmp_path / "artifacts"), [])[0].task == "fitting guide: 0/1"


def test_a_killed_driver_of_this_host_is_seen_at_once(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert driver.stdout is not None
    driver.stdout.readline()
    deadline = time.monotonic() + 20
    while (seen := drivers_in(LocalFiles(tmp_path), [])[0]).task != "expanding birds: 3/10":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert seen.state == "running"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    (seen,) = drivers_in(LocalFiles(tmp_path), [])
    assert seen.state == "silent"
    assert "no heartbeat since" in seen.words
    assert "its process is gone" in seen.words
    assert (seen.beat.facts, seen.beat.per_second) == ({"kept": 2}, 1.5)


@pytest.mark.parametrize(("age", "state"), [(0.0, "running"), (INTERVAL_S + 1, "running"), (SILENT_S + 1, "silent"),
                                            (-5.0, "running")])
def test_one_of_another_host_is_judged_by_its_age(tmp_path: Path, age: float, state: str) -> None:
    files = LocalFiles(tmp_path)
    _write(files)
    (seen,) = drivers_in(files, [], now=1100.0 + age)
    assert seen.state == state
    assert seen.age_seconds == max(0.0, age)
    assert ("no heartbeat since 1970-01-01 00:18:20 UTC on another-host" in seen.words) == (state == "silent")


def test_a_death_is_seen_within_thirty_seconds() -> None:
    assert SILENT_S + REFRESH_S + FRESH_S <= 30, "also on the page, of a driver that dies right after a beat"
    assert SILENT_S > 2 * INTERVAL_S, "one beat may be late"


def test_a_living_driver_keeps_its_file_when_another_starts(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    _write(files, time=time.time(), attempt=4)
    with Heartbeat(files, "expand", "birds"):
        assert sorted(one.beat.attempt or 0 for one in drivers_in(files, [])) == [4, 5]


def test_the_run_of_a_study_has_the_heartbeat_of_the_study(tmp_path: Path) -> None:
    study, run = LocalFiles(tmp_path / "study"), LocalFiles(tmp_path / "study/runs/a-0")
    with Heartbeat(study, "train", "study") as heart:
        with heart.also_in(run):
            assert drivers_in(run, [])[0].beat.verb == "train"
        assert drivers_in(run, []) == []


def test_a_heartbeat_on_its_way_does_not_outlive_the_run_of_a_study(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left behind, it would say for ever that the driver of this run went silent."""
    study, run = LocalFiles(tmp_path / "study"), LocalFiles(tmp_path / "study/runs/a-0")
    on_its_way, replace = threading.Event(), run.replace

    def slow(*arguments: Any, **more: Any) -> None:
        on_its_way.set()
        time.sleep(0.3)
        replace(*arguments, **more)

    with Heartbeat(study, "train", "study") as heart, heart.also_in(run):
        monkeypatch.setattr(run, "replace", slow)
        heart.say("expanding a-0", 0, 8)
        assert on_its_way.wait(30)
    assert drivers_in(run, []) == []


def test_damaged_files_are_said(tmp_path: Path) -> None:
    files, problems = LocalFiles(tmp_path), list[str]()
    _write(files)
    (tmp_path / "heartbeats/fit-a~x~1~2.json").write_text('{"verb": "fit"')
    (tmp_path / "heartbeats/fit-b~x~1~2.json").write_text('{"verb": "fit"}')
    assert len(drivers_in(files, problems)) == 1
    assert len(problems) == 2
    assert all("heartbeats/fit-" in line and "damaged" in line for line in problems)


def test_a_folder_that_takes_no_heartbeat_costs_a_warning_and_not_the_work(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise EnvironmentFault("the disk is full")

    files = LocalFiles(tmp_path)
    monkeypatch.setattr(files, "replace", refuse)
    with Heartbeat(files, "expand", "a") as heart:
        heart.say("a", 1, 2)
    assert [one.message for one in caplog.records if "the disk is full" in one.message] == [
        "no heartbeat can be written, so `rayexpand status` does not see this driver (the disk is full); the work goes "
        "on"]


def test_secrets_are_masked_in_what_ended_a_driver(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path)
    with pytest.raises(RuntimeError), Heartbeat(files, "expand", "a"):
        raise RuntimeError("https://user:secret@host/x")
    assert "secret" not in drivers_in(files, [])[0].beat.said
