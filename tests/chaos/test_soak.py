"""Kills from outside, over and over: signals to whole process groups and to Ray's actors, at calls, rows and commits.

A series is one seeded list of kills. It starts a run, kills it, starts it again, and so on; a run that ends before it
is killed is checked, and another one begun. At the end of a series its last run is continued to the end and checked:
the hashes of an undisturbed run, nothing lost or doubled, no healthy row refused.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing import Process
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml

from rayexpand import api
from rayexpand.cli.main import main
from rayexpand.contract.errors import EXIT_DONE, EXIT_RESUMABLE, Interrupted
from rayexpand.contract.settings import digest
from rayexpand.runs import run as runs
from rayexpand.runs.config import RunConfig, resolved
from rayexpand.runs.verify import verify
from rayexpand.storage.places import open_files
from tests.chaos.test_kill import BAD, COMMITTING, SAMPLING, SHARD, in_child
from tests.commands import ROOT
from tests.conftest import MakeConfig, complete, hashes, refused
from tests.s3server import Server

if TYPE_CHECKING:
    from tests.on_ray.conftest import Head

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
PATIENCE_S = 120.0
STARTS = 12  # of a run that nobody disturbs any more, before it counts as one that never ends
KINDS = [("command", "disk"), ("command", "s3"), ("notebook", "disk"), ("notebook", "s3"), ("ray", "disk"),
         ("ray", "s3")]


@pytest.fixture(scope="module")
def ray_head() -> Iterator[Callable[[], Head]]:
    """A Ray cluster, started by the first test that asks for it."""
    from tests.on_ray.conftest import start_head, stop_head

    started: list[Head] = []

    def head() -> Head:
        if not started:
            started.append(start_head(cpus=4))
        return started[0]

    yield head
    for one in started:
        stop_head(one)


class Soak:
    """Runs of one kind, and what ends them."""

    def __init__(self, driver: str, config: Callable[[], RunConfig], rng: random.Random, head: Head | None,
                 folder: Path) -> None:
        self.driver, self.make, self.rng, self.head, self.folder = driver, config, rng, head, folder
        self.kills: list[str] = []

    def series(self, kills: int, check: Callable[[RunConfig], None]) -> None:
        while len(self.kills) < kills:
            config = self.make()
            while len(self.kills) < kills and self.disturb(config):
                pass
            codes: list[int] = []
            while EXIT_DONE not in codes:
                codes.append(self.ended(self.start(config)))
                assert codes[-1] in (EXIT_DONE, EXIT_RESUMABLE), codes
                assert len(codes) < STARTS, f"undisturbed, it does not end: {codes} after {self.kills}"
            check(config)

    def start(self, config: RunConfig, failpoint: str = "") -> Process:
        return in_child(_drive, self.driver, config, self.head and self.head.address, self.folder, failpoint=failpoint)

    def ended(self, process: Process) -> int:
        process.join(PATIENCE_S)
        if process.exitcode is None:
            _signal_groups(process.pid or 0, signal.SIGKILL)
            pytest.fail(f"{process.pid} does not end: {self.kills}")
        return process.exitcode

    def disturb(self, config: RunConfig) -> bool:
        """One start and one kill; False where the run ended before."""
        point, wait_s = "", self.rng.uniform(0, 0.5)
        if self.driver != "ray" and self.rng.random() < 0.6:  # stopped between two system calls, then killed
            point = f"{self.rng.choice(('before_call', self.rng.choice(SAMPLING + COMMITTING)))}@shard={SHARD}"
        files = open_files(config.folder)
        before = set(files.list("blame"))
        process = self.start(config, f"{point}:stop" if point else "")
        assert process.pid is not None
        while process.is_alive() and not (_stopped(process.pid) if point else set(files.list("blame")) - before):
            time.sleep(0.005)
        time.sleep(0 if point else wait_s)
        number = self.rng.choice(SIGNALS)
        under_way = {name.split("@")[2] for name in set(files.list("blame")) - before}
        victims = self.rng.choice(["actors", "all"]) if self.driver == "ray" else "all"
        if not process.is_alive():
            assert self.ended(process) in (EXIT_DONE, EXIT_RESUMABLE), self.kills
            return False
        self.kills.append(f"{number.name} to {victims} at {point or f'{wait_s:.2f} s'}, {sorted(under_way)} under way")
        if self.head is not None:
            _signal_actors(self.head, number)
        if victims == "all":
            _signal_groups(process.pid, number)
            self.ended(process)
            return True
        return self.ended(process) != EXIT_DONE


def _drive(driver: str, config: RunConfig, address: str | None, folder: Path) -> None:
    """What a user starts, leading a process group of its own."""
    os.setsid()
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a soak in the background may ignore them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = open(folder / f"said-{os.getpid()}", "w", buffering=1)  # noqa: SIM115  (for the life of this process)
    sys.stdout = sys.stderr = said
    if driver == "notebook":
        with contextlib.suppress(Interrupted):
            api.expand(resolved(config))
            os._exit(EXIT_DONE)
        os._exit(EXIT_RESUMABLE)
    job = folder / f"{digest(resolved(config))[:8]}.yaml"
    job.write_text(yaml.safe_dump(resolved(config)))
    on_ray = ["--set", f"cluster.address={address}"] if address else ["--no-ray"]
    sys.argv = ["rayexpand", "expand", str(job), "--json", *on_ray]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    os._exit(code)


def _tree(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _stopped(pid: int) -> bool:
    for one in _tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.status() == psutil.STATUS_STOPPED:
                return True
    return False


def _signal_groups(pid: int, number: signal.Signals) -> None:
    """To the process group of a command, and to that of the sampler process it started."""
    groups = set()
    for one in _tree(pid):
        with contextlib.suppress(ProcessLookupError):
            groups.add(os.getpgid(one.pid))
    for group in groups - {os.getpgrp()}:
        for each in (number, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, each)


def _signal_actors(head: Head, number: signal.Signals) -> None:
    from tests.on_ray.conftest import processes_of

    for one in processes_of(head.folder):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("ExpandActor" in part for part in one.cmdline()):
                one.send_signal(number)


@pytest.fixture
def soak(make_config: MakeConfig, tmp_path: Path, object_stores: Server, ray_head: Callable[[], Head],
         monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    reference, _ = complete(make_config("Steady", ratio=2, nan=BAD, name="undisturbed"))
    expected = hashes(reference), refused(reference)
    assert len(expected[0]) == 39

    def check(config: RunConfig) -> None:
        run = runs.open_run(config.folder)
        assert (hashes(run), refused(run)) == expected
        totals = run.totals()
        assert (totals.planned, totals.kept, totals.rejected, totals.failed, totals.pending) == (40, 39, 0, 1, 0)
        assert verify(run, pixels=True).problems == []

    def series(driver: str, store: str, seed: int, kills: int) -> list[str]:
        head = ray_head() if driver == "ray" else None
        for name, value in (head.env if head else {}).items():
            if name.startswith(("RAY", "PYTHON")):
                monkeypatch.setenv(name, value)

        def make() -> RunConfig:
            name = f"run-{uuid.uuid4().hex[:8]}"
            return make_config("Steady", ratio=2, nan=BAD, seconds=0.03, batch=4, shard_images=16, name=name, sections={
                **({"out": "s3://runs/soak"} if store == "s3" else {}), "cluster": {"actors": 2}})

        one = Soak(driver, make, random.Random(seed), head, tmp_path)
        one.series(kills, check)
        return one.kills

    return series


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("driver", "store", "kills"), [
    ("command", "disk", 6), ("command", "s3", 6), ("notebook", "disk", 4), ("ray", "disk", 4)])
def test_twenty_kills(soak: Callable[..., list[str]], driver: str, store: str, kills: int) -> None:
    assert len(soak(driver, store, 1, kills)) == kills


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(20))
def test_two_hundred_kills(soak: Callable[..., list[str]], seed: int) -> None:
    driver, store = ([("command", "disk"), ("command", "s3")] * 2 + KINDS)[seed % 10]
    found = soak(driver, store, seed, 10)
    print(f"{driver} on {store}, seed {seed}:", *found, sep="\n  ")
    assert len(found) == 10
