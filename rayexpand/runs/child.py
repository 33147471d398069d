"""A process that drives runs for another one, which `driving.Child` starts: `python -m rayexpand.runs.child`.

One JSON line on stdin for each run: its configuration, its start, and whether failed rows are made again. JSON lines on
stdout: {"rows": n} after each sampler call, {"counts": ..., "receipt": ...} after each commit, and at the end
{"totals": ...} or an error as `contract.errors.packed` writes it. The end of stdin, also where the other process dies,
ends this one after its current call.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict, replace
from typing import IO, Any

from rayexpand.contract.errors import Interrupted, packed
from rayexpand.contract.schema import Receipt
from rayexpand.contract.secrets import masked_output
from rayexpand.runs.config import parse
from rayexpand.runs.driving import Here, stopped
from rayexpand.runs.run import reopen
from rayexpand.runs.store import Totals


def main() -> None:
    told: queue.Queue[str | None] = queue.Queue()
    wanted = threading.Event()
    wanted.set()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the lines

    def listen() -> None:
        for line in sys.stdin:
            told.put(line)
        wanted.clear()
        told.put(None)

    threading.Thread(target=listen, daemon=True).start()
    here = Here()
    with masked_output(sys.stdout, sys.stderr):
        while (line := told.get()) is not None:
            _drive(here, json.loads(line), wanted, out)


def _drive(here: Here, task: dict[str, Any], wanted: threading.Event, out: IO[str]) -> None:
    def say(said: dict[str, Any]) -> None:
        if not wanted.is_set():
            raise stopped()
        out.write(json.dumps(said) + "\n")
        out.flush()

    def committed(totals: Totals, receipt: Receipt) -> None:
        say({"counts": asdict(totals), "receipt": asdict(receipt)})

    try:
        run = replace(reopen(parse(task["config"])), attempt=task["attempt"])
        say({"totals": asdict(here.drive(run, lambda rows: say({"rows": rows}), committed, retry=task["retry"]))})
    except Interrupted as error:
        if wanted.is_set():
            out.write(packed(error) + "\n")
            out.flush()
    except Exception as error:
        out.write(packed(error) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is open any more; with torch, Python takes a second to end, which the other process waits for
