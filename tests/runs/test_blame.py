from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rayexpand.contract.schema import Reason
from rayexpand.runs import run as runs
from rayexpand.runs.blame import DEAD_ROWS, DEAD_SHARDS, DECODE, ENCODE, SHARD, Blame, ProcessFault
from rayexpand.storage.files import LocalFiles, process_token
from tests.chaos.test_kill import exit_code, in_child
from tests.conftest import MakeConfig

HERE = process_token().split("~")[0]


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    files = LocalFiles(tmp_path)
    files.make_folder("blame")
    return files


def dead(files: LocalFiles, call: int, row: str = "all", number: int = 0) -> None:
    """Leaves the marker of a process of this host that is gone."""
    files.mark(f"blame/s0g0@{call}@{row}@1@{HERE}~{999_999_000 + number}~1")


def test_markers_of_the_living_blame_nobody(files: LocalFiles) -> None:
    living = Blame(files, process_token(), 1)
    with living.mark("s0g0", SHARD, None), living.watch("s0g0", 3, None, 60), living.watch("s0g0", 3, (7, 0), 60):
        for attempt in range(5):
            files.mark(f"blame/s0g0@3@7.0@{attempt}@{process_token()}")
        found = Blame(files, "x~1~1", 2).verdicts("s0g0")
    living.close()

    assert (found.calls, found.rows, found.seeds) == (frozenset(), {}, {})
    assert (found.careful, found.unexplained) == (False, 0)


def test_markers_of_other_hosts_count_up_to_this_attempt(files: LocalFiles) -> None:
    for attempt in (1, 2, 9):
        files.mark(f"blame/s0g0@3@all@{attempt}@elsewhere~{attempt}~1")

    assert Blame(files, process_token(), 1).verdicts("s0g0").calls == frozenset()
    assert Blame(files, process_token(), 2).verdicts("s0g0").calls == {3}


def test_two_deaths_blame_and_one_does_not(files: LocalFiles) -> None:
    def now() -> tuple[frozenset[int], dict, dict]:
        found = Blame(files, process_token(), 2).verdicts("s0g0")
        return found.calls, found.rows, found.seeds

    dead(files, 3)
    assert now() == (frozenset(), {}, {})
    dead(files, 3, number=1)
    assert now() == ({3}, {}, {})
    for number in range(DEAD_ROWS):
        assert now() == ({3}, {}, {})
        dead(files, 3, "7.1", number)
    assert now() == ({3}, {(7, 1): Reason.ACTOR_DIED}, {})


def test_deaths_outside_calls_blame_seeds_and_rows(files: LocalFiles) -> None:
    for number in range(DEAD_ROWS):
        dead(files, DECODE, "14.0", number)
        dead(files, ENCODE, "20.1", number)
    found = Blame(files, process_token(), 2).verdicts("s0g0")

    assert found.seeds == {14: Reason.ACTOR_DIED}
    assert found.rows == {(20, 1): Reason.ACTOR_DIED}


def test_deaths_of_a_shard_are_unexplained_where_they_blame_no_call(files: LocalFiles) -> None:
    blame = Blame(files, process_token(), 2)
    for number in range(4):
        assert blame.verdicts("s0g0").careful is (number >= DEAD_SHARDS)
        dead(files, SHARD, number=number)
    dead(files, 3, number=0)
    dead(files, DECODE, "14.0", number=1)

    assert blame.verdicts("s0g0").unexplained == 2
    blame.clear("s0g0")
    assert files.list("blame") == []


def test_a_process_fault_keeps_its_marker_and_an_exception_does_not(files: LocalFiles) -> None:
    blame = Blame(files, process_token(), 1)
    with pytest.raises(ProcessFault), blame.watch("s0g0", 3, None, 60):
        raise ProcessFault("sticky")
    with pytest.raises(ValueError, match="plain"), blame.watch("s0g0", 4, None, 60):
        raise ValueError("plain")
    blame.close()

    assert [name.split("@")[1] for name in files.list("blame")] == ["3"]


def _calls(files: LocalFiles, lengths_s: list[float], pause_s: float) -> None:
    blame = Blame(files, process_token(), 1)
    for number, length_s in enumerate(lengths_s):
        with blame.watch("s0g0", number, None, 0.6):
            time.sleep(length_s)
        time.sleep(pause_s)
    os._exit(0)


@pytest.mark.parametrize(("lengths_s", "pause_s", "code"), [
    ([0.2] * 4, 0.0, 0),  # together they outlast the deadline of 0.6 s
    ([0.0, 0.0], 0.7, 0),  # time between calls does not count
    ([0.0, 0.0, 5.0], 0.0, 1)])  # armed again for a later call
def test_the_deadline_holds_for_each_call_alone(files: LocalFiles, lengths_s: list[float], pause_s: float,
                                                code: int) -> None:
    assert exit_code(in_child(_calls, files, lengths_s, pause_s)) == code


def test_the_first_call_of_a_process_has_a_longer_deadline(make_config: MakeConfig,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.prepare(make_config("Fake", sections={"limits": {"deadline_s": 5, "first_deadline_s": 50}}))
    expander = runs.start(run)
    seen: list[float] = []
    watch = expander.blame.watch

    def noting(key: str, call: int, row: tuple[int, int] | None, deadline_s: float):  # type: ignore[no-untyped-def]
        seen.append(deadline_s)
        return watch(key, call, row, deadline_s)

    monkeypatch.setattr(expander.blame, "watch", noting)
    expander(0)
    expander(1)
    expander.close()

    assert seen == [50, 5]
