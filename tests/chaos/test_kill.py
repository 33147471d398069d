"""SIGKILL between two system calls, at every step of a run; the same command again must lose and double nothing.

A child process (forked, so each case takes a fraction of a second) runs the real driver loop and is killed at a
failpoint; a second child runs to the end. Every row of the crash table in docs/promise.md is a case here.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayexpand.contract.errors import EXIT_DONE, EXIT_RESUMABLE, RayexpandError
from rayexpand.contract.schema import Draw, Sample
from rayexpand.runs import expander as expanders
from rayexpand.runs import run as runs
from rayexpand.runs.blame import DEAD_CALLS, DEAD_ROWS, DEAD_SHARDS, DEAD_UNEXPLAINED
from rayexpand.runs.config import RunConfig
from rayexpand.runs.store import data_name
from rayexpand.runs.verify import verify
from tests.commands import ROOT
from tests.conftest import Accepting, MakeConfig, attempts, complete, hashes, refused, small_run
from tests.methods import fakes

BAD = "bee/2.png/1"
PREPARING = [f"{when}_{step}{part}" for step in ("index", "classes", "plan", "run")
             for when, part in (("before", ""), ("after", "_write"), ("after", "_link"), ("after", ""))]
GROWING = [f"{when}_{step}{part}" for step in ("parts", "grown")
           for when, part in (("before", ""), ("after", "_write"), ("after", "_link"), ("after", ""))]
LOOPING = [f"{when}_{step}{part}" for step in ("rounds", "scores", "dealt", "decision")
           for when, part in (("before", ""), ("after", "_write"), ("after", "_link"), ("after", ""))] + [
    "before_guide", "after_guide"]  # tests/chaos/test_loops.py
STARTING = ["before_attempt", "after_attempt_link"]
SAMPLING = ["before_call", "after_call"]
COMMITTING = ["before_side", "after_side_write", "after_side_link", "after_side", "before_data", "after_data_write",
              "after_data_link", "after_data", "before_receipt", "after_receipt"]
ENDING = ["before_rollup", "after_rollup_write", "after_rollup_link", "after_rollup"]
SHARD = 1  # holds BAD, so that it has a side file
UNSEEN_ROWS = DEAD_ROWS + 1  # deaths that nobody saw before a row is refused


def run_command(config: RunConfig) -> None:
    """What `rayexpand expand` does, ending with its exit code."""
    faulthandler.disable()  # pytest's would print the traces of deaths that are meant
    try:
        complete(config)
    except RayexpandError as error:
        os._exit(error.exit_code)
    os._exit(0)


def in_child(target: Callable[..., None], *args: object, failpoint: str = "") -> multiprocessing.Process:
    """`target` started in a forked process with a failpoint set."""
    os.environ["RAYEXPAND_FAILPOINT"] = failpoint
    try:
        child = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
        child.start()
    finally:
        del os.environ["RAYEXPAND_FAILPOINT"]
    return child  # type: ignore[return-value]


def exit_code(child: multiprocessing.Process) -> int:
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def codes_until_done(config: RunConfig, at_most: int) -> list[int]:
    """Exit codes of one start after the other, until one is done."""
    codes: list[int] = []
    while EXIT_DONE not in codes and len(codes) < at_most:
        codes.append(exit_code(in_child(run_command, config)))
    return codes


@contextmanager
def every_visible_file_opens(folder: Path) -> Iterator[None]:
    """Reads every data/*.parquet while the block runs, each again whenever it is another file or has other bytes."""
    stop, torn, seen = threading.Event(), [], set()

    def poll() -> None:
        while not stop.is_set():
            for path in folder.glob("data/*.parquet"):
                try:
                    now = path.stat()
                    if (found := (path.name, now.st_ino, now.st_size, now.st_mtime_ns)) not in seen:
                        pq.read_table(path)
                        seen.add(found)
                except (pa.ArrowException, OSError) as error:
                    torn.append(f"{path.name}: {error}")
            time.sleep(0.001)  # else the reader takes the CPU that the run needs

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not torn
    assert seen


@pytest.fixture(scope="module")
def reference(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str]]:
    run, _ = complete(small_run(image_folder, tmp_path_factory.mktemp("undisturbed"), "Failing", ratio=2, nan=BAD))
    return hashes(run), refused(run)


@pytest.fixture(scope="module")
def few(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of each class: the second of three shards holds BAD."""
    return shutil.copytree(image_folder, tmp_path_factory.mktemp("few") / "seeds",
                           ignore=shutil.ignore_patterns("3.png", "4.png"))


@pytest.fixture(scope="module")
def few_reference(few: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str]]:
    run, _ = complete(small_run(few, tmp_path_factory.mktemp("undisturbed"), "Failing", ratio=2, nan=BAD))
    assert [receipt.shard_id for receipt in run.store.receipts() if receipt.failed] == [SHARD]
    assert run.plan.n_shards == 3
    return hashes(run), refused(run)


@pytest.mark.parametrize("point", PREPARING + STARTING + [f"{p}@shard={SHARD}" for p in SAMPLING + COMMITTING] + ENDING)
@pytest.mark.fast_cases(12, "chaos")
def test_killed_anywhere_and_run_again(few: Path, few_reference: tuple, tmp_path: Path, point: str) -> None:
    config = small_run(few, tmp_path / "out", "Failing", ratio=2, nan=BAD)
    child = in_child(run_command, config, failpoint=f"{point}:kill")

    assert exit_code(child) == -signal.SIGKILL, "the failpoint was never reached"
    with every_visible_file_opens(Path(config.folder)):
        assert exit_code(in_child(run_command, config)) == 0
        time.sleep(0.05)
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == few_reference
    assert run.totals().pending == 0
    assert verify(run, pixels=True).problems == []
    assert run.files.list(".tmp") == [], "leftovers of the dead are swept at the next start"


@pytest.mark.parametrize("exhausted", ["reject", "best"])
@pytest.mark.parametrize("point", [f"{point}@shard={SHARD}" for point in SAMPLING + COMMITTING])
@pytest.mark.fast_cases(6, "chaos")
def test_killed_while_rows_are_drawn_again(few: Path, accept: Accepting, tmp_path: Path, point: str,
                                           exhausted: str) -> None:
    """No row in both files, none in neither, and each at the attempt it would have had."""
    config, undisturbed = (small_run(few, tmp_path / name, "Failing", ratio=2, nan=BAD, batch=4, sections={
        "accept": accept(exhausted=exhausted)}) for name in ("out", "undisturbed"))
    reference, _ = complete(undisturbed)
    assert exit_code(in_child(run_command, config, failpoint=f"{point}:kill")) == -signal.SIGKILL
    assert exit_code(in_child(run_command, config)) == 0

    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run), attempts(run)) == (hashes(reference), refused(reference), attempts(reference))
    assert hashes(run).keys().isdisjoint(refused(run))
    assert hashes(run).keys() | refused(run).keys() == {
        draw.sample_id for shard in range(3) for unit in run.plan.units(shard) for draw in unit}
    assert {0, 1} < set(attempts(run).values())
    assert verify(run, pixels=True).problems == []


@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.fast_cases(2, "chaos")
def test_killed_at_any_call_of_redraws(few: Path, accept: Accepting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       call: int) -> None:
    def config(name: str) -> RunConfig:
        return small_run(few, tmp_path / name, "Fake", ratio=2, batch=4, shard_images=24, sections={
            "accept": accept(above=0.6)})

    made, plain = 0, fakes.Fake.expand

    def dying(self: fakes.Fake, *arguments: Any) -> Any:
        nonlocal made
        made += any(draw.attempt for draw in arguments[0].draws)
        if made == call:
            os._exit(9)
        return plain(self, *arguments)

    reference, _ = complete(config("undisturbed"))
    monkeypatch.setattr(fakes.Fake, "expand", dying)
    assert exit_code(in_child(run_command, config("out"))) == 9
    monkeypatch.setattr(fakes.Fake, "expand", plain)
    assert exit_code(in_child(run_command, config("out"))) == 0

    run = runs.open_run(config("out").folder)
    assert (hashes(run), refused(run), attempts(run)) == (hashes(reference), refused(reference), attempts(reference))


def test_the_promise_lists_every_crash_window() -> None:
    page = (ROOT / "docs/promise.md").read_text()
    listed = set(re.findall(r"`((?:before|after)_[a-z_]+)`", page))

    assert listed == set(PREPARING + GROWING + LOOPING + STARTING + SAMPLING + COMMITTING + ENDING)


def test_killed_at_every_shard_in_turn(make_config: MakeConfig, reference: tuple) -> None:
    config = make_config("Failing", ratio=2, nan=BAD)
    shards = runs.prepare(config).plan.n_shards
    for shard in range(shards):
        point = COMMITTING[shard % len(COMMITTING)] if shard == SHARD else ("after_data", "before_receipt")[shard % 2]
        assert exit_code(in_child(run_command, config, failpoint=f"{point}@shard={shard}:kill")) == -signal.SIGKILL
    assert exit_code(in_child(run_command, config)) == 0

    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference


def test_a_full_disk_stops_the_run_resumably(make_config: MakeConfig, reference: tuple) -> None:
    config = make_config("Failing", ratio=2, nan=BAD)

    assert exit_code(in_child(run_command, config, failpoint="before_data:full")) == EXIT_RESUMABLE
    assert runs.open_run(config.folder).totals().shards == 0
    assert exit_code(in_child(run_command, config)) == 0
    assert hashes(runs.open_run(config.folder)) == reference[0]


def test_two_drivers_on_one_output(make_config: MakeConfig, reference: tuple) -> None:
    config = make_config("Failing", ratio=2, nan=BAD)
    children = [in_child(run_command, config) for _ in range(2)]

    assert [exit_code(child) for child in children] == [0, 0]
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference
    assert run.totals().pending == 0


@pytest.mark.parametrize("point", ["after_side", "after_data_write"])
def test_an_old_attempt_that_wakes_up_replaces_nothing(make_config: MakeConfig, reference: tuple, point: str) -> None:
    config = make_config("Failing", ratio=2, nan=BAD)
    sleeper = in_child(run_command, config, failpoint=f"{point}@shard={SHARD}:stop")
    assert os.waitpid(sleeper.pid, os.WUNTRACED)[0] == sleeper.pid  # type: ignore[arg-type]
    assert exit_code(in_child(run_command, config)) == 0
    data = {path: (path.stat().st_ino, path.read_bytes()) for path in Path(config.folder, "data").iterdir()}
    os.kill(sleeper.pid, signal.SIGCONT)  # type: ignore[arg-type]

    assert exit_code(sleeper) == 0
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in Path(config.folder, "data").iterdir()} == data
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference


def test_deleted_receipts_and_data_come_back(make_config: MakeConfig, reference: tuple) -> None:
    config = make_config("Failing", ratio=2, nan=BAD)
    run, before = complete(config)
    for path in (run.folder / "receipts").iterdir():
        path.unlink()
    findings = verify(run)
    assert findings.totals == before
    assert findings.rebuilt_receipts == run.plan.n_shards
    (run.folder / "data" / "train-000001.parquet").unlink()
    assert run.store.pending(run.plan.n_shards) == [1]
    complete(config)

    assert (hashes(run), refused(run)) == reference


@pytest.mark.parametrize(("method", "reason", "deaths"), [
    ("Segfault", "actor_died", 2), ("HardExit", "actor_died", 3), ("Hang", "timeout", 2)])
@pytest.mark.fast_cases(1, "chaos")
def test_a_row_that_ends_its_process_is_refused_alone(make_config: MakeConfig, method: str, reason: str,
                                                      deaths: int) -> None:
    """Two deaths blame the call, two more that are seen the row, or three that nobody saw; every other sample of its
    call is made."""
    limits = {"limits": {"max_failed": 1.0, "deadline_s": 1.0, "first_deadline_s": 1.0}}
    reference = hashes(complete(make_config(method, ratio=2, name="healthy", sections=limits))[0])
    config = make_config(method, ratio=2, bad=BAD, sections=limits)
    codes = codes_until_done(config, at_most=8)

    assert len(codes) == DEAD_CALLS + deaths + 1
    run = runs.open_run(config.folder)
    assert refused(run) == {BAD: reason}
    assert hashes(run) == {k: v for k, v in reference.items() if k != BAD}
    assert run.files.list("blame") == [], "the dead of a committed shard are forgotten"


def test_a_retry_offers_a_row_that_ended_processes(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("HardExit", ratio=2, bad=BAD)
    codes_until_done(config, at_most=8)
    assert refused(runs.open_run(config.folder)) == {BAD: "actor_died"}
    monkeypatch.setattr(fakes.HardExit, "misbehave", lambda self: None)

    assert exit_code(in_child(_retry_command, config.folder)) == EXIT_DONE
    assert BAD in hashes(runs.open_run(config.folder))


def test_a_row_that_has_its_call_for_itself_can_be_blamed(make_config: MakeConfig) -> None:
    """There is no other row to be made before it; a call without rows shows that the sampler works."""
    config = make_config("HardExit", ratio=2, bad=BAD, batch=1)

    assert codes_until_done(config, at_most=8) == [11] * (DEAD_CALLS + UNSEEN_ROWS) + [EXIT_DONE]
    assert refused(runs.open_run(config.folder)) == {BAD: "actor_died"}


def test_a_call_of_deadly_rows_ends(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies of a seed, so that the call has no row that could be made before."""
    monkeypatch.setattr(fakes, "has", lambda batch, seed_id: any(
        draw.seed_id == seed_id and not absent for draw, absent in zip(batch.draws, batch.filler, strict=True)))
    config = make_config("HardExit", ratio=2, bad="bee/2.png", batch=2)
    codes = codes_until_done(config, at_most=20)

    assert codes == [11] * (len(codes) - 1) + [EXIT_DONE]
    assert refused(runs.open_run(config.folder)) == {f"bee/2.png/{copy}": "actor_died" for copy in range(2)}


def test_a_deadly_redraw_costs_its_row_alone(make_config: MakeConfig, accept: Accepting) -> None:
    sections = {"accept": accept(exhausted="best")}
    healthy, _ = complete(make_config("DeadlyRedraw", ratio=2, name="healthy", sections=sections))
    bad = next(sample_id for sample_id, tries in attempts(healthy).items() if tries)
    config = make_config("DeadlyRedraw", ratio=2, bad=bad, sections=sections)

    assert codes_until_done(config, at_most=8) == [11] * (DEAD_CALLS + UNSEEN_ROWS) + [EXIT_DONE]
    run = runs.open_run(config.folder)
    assert refused(run) == {bad: "actor_died"}
    assert hashes(run) == {k: v for k, v in hashes(healthy).items() if k != bad}


@pytest.mark.parametrize("shard_images", [100, 8])
@pytest.mark.fast_cases(1, "chaos")
def test_a_seed_that_ends_its_decoder_blames_no_other_row(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch,
                                                          image_folder: Path, shard_images: int) -> None:
    """It is decoded while another call runs, so at first the dead blame that call."""
    def config(name: str) -> RunConfig:
        return make_config("Sleeping", ratio=2, batch=4, shard_images=shard_images, seconds=0.005, name=name)

    reference = hashes(complete(config("healthy"))[0])
    deadly_image, plain = (image_folder / "bee/2.png").read_bytes(), expanders.decode

    def deadly(image: bytes, **limits: int) -> tuple[np.ndarray, str]:
        if image == deadly_image:
            time.sleep(0.01)
            os._exit(9)
        return plain(image, **limits)

    monkeypatch.setattr(expanders, "decode", deadly)
    codes = codes_until_done(config("run"), at_most=8)

    assert codes == [9] * (DEAD_SHARDS + UNSEEN_ROWS) + [EXIT_DONE]
    run = runs.open_run(config("run").folder)
    lost = {f"bee/2.png/{copy}": "actor_died" for copy in range(2)}
    assert refused(run) == lost
    assert hashes(run) == {k: v for k, v in reference.items() if k not in lost}
    assert run.files.list("blame") == []


def test_a_row_that_ends_its_encoder_is_refused_alone(make_config: MakeConfig,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> RunConfig:
        return make_config("Sleeping", ratio=2, batch=4, shard_images=100, seconds=0.005, name=name)

    reference = hashes(complete(config("healthy"))[0])
    plain = expanders.Expander._finish

    def deadly(self: expanders.Expander, draw: Draw, image: np.ndarray | None, *rest: object) -> Sample:
        if draw.sample_id == BAD and image is not None:
            time.sleep(0.01)
            os._exit(9)
        return plain(self, draw, image, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(expanders.Expander, "_finish", deadly)
    codes = codes_until_done(config("run"), at_most=8)

    assert codes == [9] * (DEAD_SHARDS + UNSEEN_ROWS) + [EXIT_DONE]
    run = runs.open_run(config("run").folder)
    assert refused(run) == {BAD: "actor_died"}
    assert hashes(run) == {k: v for k, v in reference.items() if k != BAD}
    assert run.files.list("blame") == []


def test_deaths_that_blame_no_row_end_resumably(make_config: MakeConfig, reference: tuple) -> None:
    """Six processes die at the commit of a shard: the next one leaves it, makes the others and says so."""
    config = make_config("Failing", ratio=2, nan=BAD)
    codes: list[int] = []
    while EXIT_RESUMABLE not in codes and len(codes) < 9:
        codes.append(exit_code(in_child(run_command, config, failpoint=f"before_data@shard={SHARD}:kill")))

    assert codes == [-signal.SIGKILL] * DEAD_UNEXPLAINED + [EXIT_RESUMABLE]
    run = runs.open_run(config.folder)
    assert run.store.pending(run.plan.n_shards) == [SHARD]
    assert exit_code(in_child(run_command, config)) == EXIT_DONE, "repaired, it is made as if nothing had been"
    assert (hashes(run), refused(run)) == reference


@pytest.mark.parametrize("point", ["before_receipt", "before_data", "before_side"])
@pytest.mark.fast_cases(1, "chaos")
def test_a_full_disk_ends_resumably_and_loses_nothing(make_config: MakeConfig, reference: tuple, point: str) -> None:
    config = make_config("Failing", ratio=2, nan=BAD)

    assert exit_code(in_child(run_command, config, failpoint=f"{point}:full")) in (EXIT_DONE, EXIT_RESUMABLE)
    assert exit_code(in_child(run_command, config)) == EXIT_DONE
    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference
    assert run.totals().pending == 0


@pytest.fixture
def broken(image_folder: Path, tmp_path: Path) -> Path:
    """The image folder with seeds of three classes that cannot be read."""
    folder = tmp_path / "broken"
    shutil.copytree(image_folder, folder)
    for name in ("ant/1.png", "bee/2.png", "dog/0.png"):
        (folder / name).write_bytes(b"")
    return folder


def test_the_receipt_of_a_lost_file_changes_no_count(make_config: MakeConfig, broken: Path,
                                                     image_folder: Path) -> None:
    """Its data file is deleted, made again with another outcome, and the process dies before the new receipt."""
    config = make_config("Fake", ratio=3, data={"source": "imagefolder", "path": str(broken)})
    run, totals = complete(config)
    assert totals.failed == 9
    shard = next(receipt.shard_id for receipt in run.store.receipts() if receipt.failed)
    shutil.copytree(image_folder, broken, dirs_exist_ok=True)
    (run.folder / "data" / data_name(shard)).unlink()
    killed = in_child(run_command, config, failpoint=f"after_data@shard={shard}:kill")
    assert exit_code(killed) == -signal.SIGKILL
    run, totals = complete(config)

    assert totals.kept == len(hashes(run)) == 54


def _retry_command(folder: str) -> None:
    try:
        run = runs.open_run(folder, check_models=True)
        runs.drive(run, runs.in_process(runs.start(run)), runs.retry_jobs(run), to_the_end=True)
    except RayexpandError as error:
        os._exit(error.exit_code)
    os._exit(0)


def test_three_retries_at_once_make_each_row_once(make_config: MakeConfig, broken: Path, image_folder: Path) -> None:
    config = make_config("Fake", ratio=3, data={"source": "imagefolder", "path": str(broken)})
    complete(config)
    shutil.copytree(image_folder, broken, dirs_exist_ok=True)
    children = [in_child(_retry_command, config.folder) for _ in range(3)]

    assert [exit_code(child) for child in children] == [EXIT_DONE] * 3
    run = runs.open_run(config.folder)
    assert len(hashes(run)) == run.totals().kept == 60
    assert verify(run, pixels=True).problems == []


def test_random_kills_never_poison_a_row(make_config: MakeConfig, reference: tuple) -> None:
    """Spot losses: one kill at each of many calls, no row refused for it."""
    config = make_config("Failing", ratio=2, nan=BAD)
    for shard in range(runs.prepare(config).plan.n_shards):
        in_child(run_command, config, failpoint=f"after_call@shard={shard}:kill").join()
    assert exit_code(in_child(run_command, config)) == 0

    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference


@pytest.mark.parametrize("point", ["before_call", "after_call"])
@pytest.mark.fast_cases(1, "chaos")
def test_kills_at_one_place_cost_no_row(make_config: MakeConfig, reference: tuple, point: str) -> None:
    """A job slot that always ends at the same place: however often, no row is refused for it."""
    config = make_config("Failing", ratio=2, nan=BAD)
    codes = [exit_code(in_child(run_command, config, failpoint=f"{point}@shard={SHARD}:kill")) for _ in range(10)]
    assert codes[:6] == [-signal.SIGKILL] * 6
    assert codes_until_done(config, at_most=2)[-1] == EXIT_DONE

    run = runs.open_run(config.folder)
    assert (hashes(run), refused(run)) == reference


def test_a_broken_sampler_exits_resumably_without_refusing_rows(make_config: MakeConfig) -> None:
    config = make_config("BrokenAfterFirst", ratio=2, batch=4, shard_images=40)

    assert exit_code(in_child(run_command, config)) == EXIT_RESUMABLE
    assert runs.open_run(config.folder).totals().failed == 0
