"""Every error this package raises on purpose, and the exit code each one maps to.

    RayexpandError                  exit 1
    ├── UsageError                  exit 2   what the user gave cannot work; says what, where, why and what to do next
    │   ├── ConfigError             exit 2   all mistakes of one configuration at once
    │   ├── SeedDataError           exit 2   the seed dataset as a whole (no label column, empty class, ...)
    │   ├── Diverged                exit 2   a training whose loss or answers are not finite
    │   ├── ModelError              exit 2   a model folder that cannot be loaded
    │   └── StorageError            exit 2   an output place that cannot hold a run
    │       └── DamagedFile         exit 2   a file of ours does not hold what was written
    ├── OverBudget                  exit 3   more rows failed than the budget allows; outputs are kept
    ├── DigestMismatch              exit 4   the output belongs to another plan, configuration or model
    ├── Interrupted                 exit 75  stopped or starved; the same command continues
    │   ├── EnvironmentFault        exit 75  disk full, storage refused, model gone, out of memory at batch 1
    │   └── Preempted               exit 75  its machine will be taken away; what it has is kept
    ├── ProgramFault                exit 70  a fault of this package, in another process
    └── RowFault                    (never leaves a shard) one row cannot become a sample; carries a Reason

    Stopped (a BaseException)       exit 75  a signal told this process to end

Only `cli/` turns these into messages and exit codes.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Sequence
from typing import Any

from rayexpand.contract.secrets import masked

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_OVER_BUDGET = 3
EXIT_DIGEST = 4
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h: a fault of this package
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h


class RayexpandError(Exception):
    """Its text holds no password or token."""

    exit_code = EXIT_FAILURE

    def __init__(self, *args: object) -> None:
        super().__init__(*(masked(one) if isinstance(one, str) else one for one in args))


class UsageError(RayexpandError):
    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """All mistakes of one configuration. `problems` holds one line each: `field: what, why, next step`."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.where, self.problems = masked(where), [masked(one) for one in problems]
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__("\n  ".join([f"{where}: {count}", *problems]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.problems)  # as Ray sends it


class SeedDataError(UsageError):
    pass


class ModelError(UsageError):
    pass


class StorageError(UsageError):
    pass


class DamagedFile(StorageError):
    """A file that this package wrote does not hold what was written, or is another one. The message names the file."""


class Diverged(UsageError):
    """A training whose numbers are no longer finite: it would end so again."""


class OverBudget(RayexpandError):
    exit_code = EXIT_OVER_BUDGET
    result: Any = None  # of the API: what was made


class DigestMismatch(RayexpandError):
    exit_code = EXIT_DIGEST


class Stopped(BaseException):
    """A signal told this process to end. It is no Exception, because it comes anywhere: whoever turns exceptions into
    faults of what was being done (an image that cannot be decoded, a trial that failed) must not take it for one."""

    exit_code = EXIT_RESUMABLE


class Interrupted(RayexpandError):
    exit_code = EXIT_RESUMABLE


class EnvironmentFault(Interrupted):
    pass


class Preempted(Interrupted):
    """This process left a machine that will be taken away, behind a checkpoint. Its work goes on elsewhere."""


class ProgramFault(RayexpandError):
    exit_code = EXIT_FAULT


class RowFault(RayexpandError):
    """One row is refused. `reason` is a member of `schema.Reason`; `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, masked(detail)
        super().__init__(f"{reason}: {detail}" if detail else str(reason))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


_OF_THIS_PACKAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError,
                    RecursionError, TypeError)  # what code does wrong, not a disk, a device or a file


def few(names: Sequence[str], most: int = 5) -> str:
    """"'a', 'b' and 3 more": a list of names as a message shows it."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def looked_at(path: str | os.PathLike[str]) -> str:
    """" (looked at /work/birds)" for a relative path, for where it leads depends on where a command starts."""
    name = os.path.expanduser(path)
    return "" if os.path.isabs(name) or "://" in name or "::" in name else f" (looked at {os.path.abspath(name)})"


def three_digits(value: float) -> str:
    """0.0123, 18.9, 1,499: a rate as a message, a table and a page show it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def packed(error: Exception, where: str = "") -> str:
    """An error as one JSON line for another process, `where` added to its text. What is not raised on purpose is a
    ProgramFault where code is at fault, else a fault of the place."""
    place = f" ({where})" if where else ""
    if isinstance(error, ConfigError):
        return json.dumps({"error": "ConfigError", "where": f"{error.where}{place}", "problems": error.problems})
    if isinstance(error, _OF_THIS_PACKAGE):
        lines = "".join(traceback.format_exception(error))
        text = (f"{type(error).__name__}: {error}{place}. This should have been a clear message and is a fault of "
                f"rayexpand:\n{lines}")
        return json.dumps({"error": ProgramFault.__name__, "text": masked(text)})
    kind = type(error) if isinstance(error, RayexpandError) and not isinstance(error, RowFault) else EnvironmentFault
    text = str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"
    return json.dumps({"error": kind.__name__, "text": masked(f"{text}{place}")})


def unpacked(line: str | bytes) -> RayexpandError:
    """The error of a line that `packed` made, with its class."""
    said = json.loads(line)
    if said["error"] == "ConfigError":
        return ConfigError(said["where"], said["problems"])
    kinds = {kind.__name__: kind for kind in _descendants(RayexpandError)}
    return kinds.get(said["error"], RayexpandError)(said["text"])


def _descendants(kind: type[RayexpandError]) -> Sequence[type[RayexpandError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in _descendants(child))]
