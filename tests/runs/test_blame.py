from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rayexpand.contract.schema import Reason
from rayexpand.runs import run as runs
from rayexpand.runs.blame import (
    DEAD_ROWS,
    DEAD_SHARDS,
    DECODE,
    ENCODE,
    MANY_LOST,
    SHARD,
    Blame,
    ProcessFault,
    trace_folder,
)
from rayexpand.storage.files import LocalFiles, process_token
from tests.chaos.test_kill import exit_code, in_child
from tests.conftest import MakeConfig

HERE = process_token().split("~")[0]
CRASH, TIMEOUT = "Fatal Python error: Segmentation fault\n", "Timeout (0:10:00)!\n"


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    files = LocalFiles(tmp_path)
    files.make_folder("blame")
    return files


def dead(files: LocalFiles, call: int, row: str = "all", number: int = 0, trace: str = "") -> None:
    """Leaves the marker of a process of this host that is gone, and the trace it left."""
    token = f"{HERE}~{999_999_000 + number}~1"
    files.mark(f"blame/s0g0@{call}@{row}@1@{token}")
    if trace:
        (trace_folder(files) / f"{token}.trace").write_text(trace)


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


def test_machines_that_are_lost_blame_nothing_until_there_are_many(files: LocalFiles) -> None:
    """A shard that takes its machines down is told by their number, and what it died at counts again then."""
    def lost(tokens: set[str]) -> set[str]:
        return {one for one in tokens if one.startswith("spot")}

    def verdicts() -> tuple[bool, int, frozenset[int]]:
        found = Blame(files, process_token(), 2, lost).verdicts("s0g0")
        return found.careful, found.unexplained, found.calls

    for number in range(MANY_LOST - 1):
        files.mark(f"blame/s0g0@{SHARD}@all@1@spot~{number}~1")
        files.mark(f"blame/s0g0@3@all@1@spot~{number}~1")
    assert verdicts() == (False, 0, frozenset())
    assert Blame(files, process_token(), 2).verdicts("s0g0").calls == {3}
    files.mark(f"blame/s0g0@3@all@1@spot~{MANY_LOST}~1")

    assert verdicts()[2] == {3}


def test_a_process_that_leaves_takes_its_markers_with_it(files: LocalFiles) -> None:
    leaving, others = Blame(files, "spot~7~1", 1), Blame(files, "spot~8~1", 1)
    for blame in (leaving, others):
        files.mark(blame._marker("s0g0", 3, "all"))
        files.mark(blame._marker("s1g0", SHARD, "all"))
    leaving.clear_suspect("s0g0", 3, (7, 0))
    leaving.withdraw()

    assert sorted(files.list("blame")) == ["s0g0@3@7.0.sound@1@spot~7~1", "s0g0@3@all@1@spot~8~1",
                                           "s1g0@-1@all@1@spot~8~1"]


def rows(files: LocalFiles) -> dict[tuple[int, int], Reason]:
    return Blame(files, process_token(), 2).verdicts("s0g0").rows


@pytest.mark.parametrize(("traces", "reason"), [
    ((CRASH, CRASH), Reason.ACTOR_DIED), ((CRASH, TIMEOUT), Reason.TIMEOUT), (("ProcessFault: x", CRASH),
                                                                             Reason.ACTOR_DIED)])
def test_two_seen_deaths_blame_and_one_does_not(files: LocalFiles, traces: tuple[str, str], reason: Reason) -> None:
    def calls() -> frozenset[int]:
        return Blame(files, process_token(), 2).verdicts("s0g0").calls

    dead(files, 3)
    assert calls() == frozenset()
    dead(files, 3, number=1)
    assert calls() == {3}
    dead(files, 3, "7.1.0", 2, traces[0])
    assert rows(files) == {}
    dead(files, 3, "7.1.0", 3, traces[1])
    assert rows(files) == {(7, 1): reason}


@pytest.mark.parametrize(("deaths", "counts"), [
    (["7.1.0"] * 20, False),  # always the first that its process made
    (["7.1"] * 20, False),  # as markers were written before
    (["7.1.3"] * 20, False),  # always at one place
    (["7.1.3", "7.1.0"], False), (["7.1.0", "7.1.3", "7.1.1"], True),
    (["7.1.0", "7.1.3", "7.1.1", "7.1.sound"], False)])  # made alone since
def test_deaths_that_nobody_saw_count_where_only_the_row_explains_them(files: LocalFiles, deaths: list[str],
                                                                       counts: bool) -> None:
    for number, row in enumerate(deaths):
        dead(files, 3, row, number)

    assert rows(files) == ({(7, 1): Reason.ACTOR_DIED} if counts else {})


def test_a_suspect_is_tried_first_and_after_others(files: LocalFiles) -> None:
    """A process that is always ended after the same time meets another row there."""
    dead(files, 3, "4.0.2")  # died after others, never first
    dead(files, 3, "5.0.0", 1)
    dead(files, 3, "6.0.0", 2)
    dead(files, 3, "6.0.sound", 3)
    found = Blame(files, process_token(), 2).verdicts("s0g0")

    assert sorted(range(4, 9), key=lambda row: found.turn(3, (row, 0))) == [4, 7, 8, 6, 5]


def test_deaths_outside_calls_blame_seeds_and_rows(files: LocalFiles) -> None:
    for number, others in enumerate((0, 1, 2)):
        dead(files, DECODE, f"14.0.{others}", number)
        dead(files, ENCODE, "20.1.1", number)
        dead(files, DECODE, "15.0.0", number)
    found = Blame(files, process_token(), 2).verdicts("s0g0")

    assert found.seeds == {14: Reason.ACTOR_DIED}
    assert found.rows == {(20, 1): Reason.ACTOR_DIED}


def test_a_process_that_dies_at_any_row_first_is_unexplained(files: LocalFiles) -> None:
    """Each row explains one such death; then the shard is given up for now, and no row is refused."""
    for number in range(8):
        dead(files, SHARD, number=number)
        dead(files, 3, f"{number % 2}.0.0", number)
    found = Blame(files, process_token(), 2).verdicts("s0g0")

    assert (found.rows, found.unexplained) == ({}, 6)


def test_deaths_of_a_shard_are_unexplained_where_they_blame_no_call(files: LocalFiles) -> None:
    blame = Blame(files, process_token(), 2)
    for number in range(4):
        assert blame.verdicts("s0g0").careful is (number >= DEAD_SHARDS)
        dead(files, SHARD, number=number)
    dead(files, 3, number=0)
    dead(files, DECODE, "14.0.0", number=1)

    assert blame.verdicts("s0g0").unexplained == 2
    blame.clear_suspect("s0g0", DECODE, (14, 0))
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
    assert (trace_folder(files) / f"{process_token()}.trace").read_text() == "ProcessFault: sticky\n"


def _end(files: LocalFiles, how: Callable[[], None]) -> None:
    blame = Blame(files, process_token(), 1)
    with blame.supervised(), blame.mark("s0g0", DECODE, (7, 0)):
        how()


def _killed(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("how", "seen"), [
    (_killed(signal.SIGSEGV), True), (_killed(signal.SIGBUS), True), (os.abort, True), (_killed(signal.SIGKILL), False),
    (_killed(signal.SIGTERM), False), (_killed(signal.SIGHUP), False), (lambda: os._exit(11), False)])
@pytest.mark.fast_cases(3)
def test_which_deaths_are_seen(files: LocalFiles, how: Callable[[], None], seen: bool) -> None:
    for _ in range(DEAD_ROWS):
        assert exit_code(in_child(_end, files, how)) != 0

    assert Blame(files, process_token(), 2).verdicts("s0g0").seeds == ({7: Reason.ACTOR_DIED} if seen else {})


def test_supervision_leaves_the_handlers_of_others(files: LocalFiles) -> None:
    before = faulthandler.is_enabled()
    blame = Blame(files, process_token(), 1)
    with blame.supervised():
        assert faulthandler.is_enabled()
    blame.close()

    assert faulthandler.is_enabled() is before


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

    def noting(key: str, call: int, row: tuple[int, int] | None, deadline_s: float,  # type: ignore[no-untyped-def]
               others: int):
        seen.append(deadline_s)
        return watch(key, call, row, deadline_s, others)

    monkeypatch.setattr(expander.blame, "watch", noting)
    expander(0)
    expander(1)
    expander.close()

    assert seen == [50, 5]
