"""The command line in a process of its own (`process`), in a fork of this one (`forked`), or in this one without its
imports (`rayexpand`)."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from rayexpand.cli.main import main
from rayexpand.storage.tables import sealed, unsealed

ROOT = Path(__file__).parents[1]
Done = subprocess.CompletedProcess[str]


def _command(arguments: tuple[object, ...], on_ray: bool = False) -> list[str]:
    if arguments[0] in ("expand", "retry") and not on_ray and "--help" not in arguments:
        arguments = (*arguments, "--no-ray")
    return [str(one) for one in arguments]


def process(*arguments: object, cwd: Path | None = None) -> Done:
    return subprocess.run([sys.executable, "-m", "rayexpand", *_command(arguments)], capture_output=True, text=True,
                          cwd=cwd or ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(
                              Path(__file__).parents[1])})


def forked(*arguments: object, said: Path) -> multiprocessing.Process:
    """`main` started in a fork, with its own signals and exit code; what it writes goes to the file `said`."""
    def run() -> None:
        os.chdir(ROOT)
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        sys.argv = ["rayexpand", *_command(arguments)]
        main()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child  # type: ignore[return-value]


def rayexpand(*arguments: object, on_ray: bool = False) -> Done:
    """`main` with its exit code and what it writes; what C code writes to a descriptor only `process` sees."""
    command, stdout, stderr, code = ["rayexpand", *_command(arguments, on_ray)], io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with (mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(stdout),
          contextlib.redirect_stderr(stderr), contextlib.chdir(ROOT)):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), stderr.getvalue())


def rewrite_json(file: Path, change: Callable[[dict[str, Any]], Any], name: str = "", *, is_old: bool = False) -> None:
    """Changes the content of a JSON file of ours as whoever wrote it would have; `is_old`: without a seal. `name`: as
    the folder knows it, where that is not the name of the file alone."""
    found = unsealed(name or file.name, file.read_bytes(), file)
    change(found)
    file.write_bytes(json.dumps(found).encode() if is_old else sealed(name or file.name, found))
