"""Starts a peer, measures it, and kills it: 20 times, with everything that it started, and the same start again.

A start is a fork of this process, which has imported torch, diffusers and rayexpand before: importing them takes longer
than the samples do, and is nobody's difference. It leads a session of its own. Kills are SIGKILL to all of its
processes at once, at moments drawn before the first start: every other one some seconds after the first call of the
sampler, the others when a file appears in the output folder (inotify), which is when files that are written in place
are empty. After the last kill the peer runs until it ends by itself; one that ends with an error is started again, at
most `ERRORS` times in a row.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from tests.benchmarks.peers.judge import Output, Slots
from tests.benchmarks.peers.task import Task

ERRORS = 3
TIMEOUT_S = 1200.0  # of one start
POLL_S = 0.005
IN_CREATE, IN_MOVED_TO, IN_ISDIR = 0x100, 0x80, 0x40000000
RAY = {"RAY_prestart_worker_first_driver": "0"}  # a worker for each core would import for nothing
COUNTER = Path(__file__).parent / "counter"
ROOT = Path(__file__).parents[3]
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Peer:
    """One way to expand a folder of images. `source`: what its behaviour is taken from."""

    name: str
    source: str
    run: Callable[[Task, Path], None]  # in a process of its own; writes below the folder
    planned: Callable[[Task], Slots]
    read: Callable[[Path], Output]
    prepare: Callable[[Task, Path], None] = lambda task, out: out.mkdir(parents=True)


@dataclass(frozen=True)
class Kill:
    """Either seconds after the first call of the sampler, or the n-th file that appears in the output folder."""

    seconds: float | None = None
    file: int | None = None


@dataclass
class Attempt:
    """One start until it ended or was killed."""

    code: int | None  # None: killed
    wall_s: float = 0.0  # from the first call of the sampler to the end
    cpu_s: float = 0.0  # the same, of all processes
    start_cpu_s: float = 0.0  # before the first call
    files: int = 0  # that appeared in the output folder


def draw_kills(seed: int, kills: int, undisturbed: Attempt) -> list[Kill]:
    """Together they leave a peer that loses nothing about nine tenths of its work: then it is not done before the last
    kill."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    shares = rng.exponential(size=kills)
    seconds = 0.9 * undisturbed.wall_s * shares / shares.sum()
    files = 1 + np.floor(rng.random(kills) * 1.8 * undisturbed.files / kills).astype(int)
    return [Kill(seconds=float(seconds[i])) if i % 2 == 0 else Kill(file=int(files[i])) for i in range(kills)]


class Watch:
    """Counts files that appear below a folder."""

    def __init__(self, folder: Path) -> None:
        self.files, self._folders = 0, dict[int, Path]()
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for path in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
            self._add(path)

    def _add(self, folder: Path) -> None:
        number = _libc.inotify_add_watch(self._descriptor, os.fsencode(folder), IN_CREATE | IN_MOVED_TO)
        if number >= 0:
            self._folders[number] = folder

    def wait(self, seconds: float) -> None:
        """Returns after so long, or when something has appeared."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return
        content, at = os.read(self._descriptor, 1 << 16), 0
        while at < len(content):
            number, mask = (int.from_bytes(content[at + i:at + i + 4], sys.byteorder) for i in (0, 4))
            length = int.from_bytes(content[at + 12:at + 16], sys.byteorder)
            name = content[at + 16:at + 16 + length].rstrip(b"\0").decode()
            at += 16 + length
            if mask & IN_ISDIR:
                self._add(self._folders[number] / name)
            else:
                self.files += 1

    def close(self) -> None:
        os.close(self._descriptor)


class Bench:
    """Runs peers with one task below one folder."""

    def __init__(self, task: Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        self.adopt()

    @staticmethod
    def adopt() -> None:
        """Orphans of a killed peer become children of this process, so that none of them is missed."""
        _libc.prctl(36, 1, 0, 0, 0)

    def undisturbed(self, peer: Peer) -> tuple[Output, Attempt, int]:
        """What it makes, what that took, and how many rows its UNet had. A start that fails before it samples, as
        Ray's does where its daemons take more than 30 s, is made again."""
        for _ in range(ERRORS):
            out = self._prepared(peer, "calm")
            attempt = self._attempt(peer, out, None)
            if attempt.code == 0:
                return peer.read(out), attempt, self._rows(out)
            if (out.parent / "calls").exists():
                break
        raise RuntimeError(f"{peer.name} ended with {attempt.code}; see {out.parent / 'log'}")

    def killed(self, peer: Peer, kills: list[Kill], minutes: float = math.inf) -> tuple[Output, list[Attempt], int]:
        """After so many minutes it is killed no more."""
        out, attempts, errors = self._prepared(peer, "killed"), list[Attempt](), 0
        left, until = list(kills), time.monotonic() + 60 * minutes
        while errors < ERRORS:
            attempts.append(self._attempt(peer, out, left.pop(0) if left and time.monotonic() < until else None))
            if attempts[-1].code == 0:
                break
            errors = errors + 1 if attempts[-1].code is not None else 0
        return peer.read(out), attempts, self._rows(out)

    def _prepared(self, peer: Peer, kind: str) -> Path:
        out = self.folder / peer.run.__name__ / kind / "out"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir(parents=True)
        peer.prepare(self.task, out)
        return out

    @staticmethod
    def _rows(out: Path) -> int:
        return sum(map(int, (out.parent / "calls").read_text().split()))

    def _attempt(self, peer: Peer, out: Path, kill: Kill | None) -> Attempt:
        calls, watch = out.parent / "calls", Watch(out)
        before = calls.stat().st_size if calls.exists() else 0
        with _ray_folder() as ray:
            child = os.fork()
            if not child:
                _become(peer, self.task, out, ray)
            try:
                return _followed(child, calls, before, watch, kill)
            finally:
                _end(child)
                watch.close()


def _become(peer: Peer, task: Task, out: Path, ray: str) -> None:
    """The child: a peer with a session, an environment and a log of its own."""
    code = 70
    try:
        os.setsid()
        log = os.open(out.parent / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.environ.update(PEERS_CALLS=str(out.parent / "calls"), PEERS_RAY=ray, RAY_TMPDIR=ray, TMPDIR=ray,
                          OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(COUNTER), str(ROOT)]), **RAY)
        tempfile.tempdir = None
        os.chdir(ROOT)
        peer.run(task, out)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):  # a log that is full or closed
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _followed(child: int, calls: Path, before: int, watch: Watch, kill: Kill | None) -> Attempt:
    """Waits until the child ends, or until its moment has come."""
    tree, started, first, looked, start_cpu = Tree(child), time.monotonic(), 0.0, 0.0, 0.0
    while True:
        watch.wait(POLL_S)
        now = time.monotonic()
        if not first and calls.exists() and calls.stat().st_size > before:
            first, start_cpu = now, tree.cpu_s()
        if now - looked > 0.2:
            looked = now
            tree.cpu_s()
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return Attempt(code, now - (first or now), tree.cpu_s() - start_cpu, start_cpu, watch.files)
        is_due = kill is not None and (watch.files >= kill.file if kill.file else
                                       bool(first) and now - first >= (kill.seconds or 0.0))
        if is_due:
            return Attempt(None, now - (first or now), files=watch.files)
        if now - started > TIMEOUT_S:
            return Attempt(-signal.SIGALRM, now - (first or now), files=watch.files)


class Tree:
    """CPU seconds of a process and all that it started, those that have ended since included."""

    def __init__(self, root: int) -> None:
        self._root, self._seen = root, dict[tuple[int, float], float]()

    def cpu_s(self) -> float:
        for one in _tree(self._root):
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                self._seen[one.pid, one.create_time()] = times.user + times.system
        return sum(self._seen.values())


def _tree(root: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(root)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _end(child: int) -> None:
    """Nothing of an attempt is left: the child, what it started, and what had lost its parent."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    while True:
        below = psutil.Process().children(recursive=True)
        if not below:
            return
        for one in below:
            with contextlib.suppress(psutil.Error):
                one.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


@contextlib.contextmanager
def _ray_folder() -> Iterator[str]:
    """Short: a socket's path has 107 letters."""
    folder = tempfile.mkdtemp(prefix="rxp-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
