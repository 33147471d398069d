"""The same YAML as a job on a local or remote Ray cluster, through the Jobs API.

What a job gets: one zip with the files of the working directory, this package and the YAML (package.py), and a shell
line that runs `python -m rayexpand VERB FILE`. A job of Ray runs once, so trying again is done here: a job that was
preempted, starved or lost with its node is submitted again under the next number, `<run>-1`, `<run>-2`, and the run
goes on where it was.
Secrets never travel: `--env NAME` only asks that the cluster has NAME, `--env NAME=value` is for what anyone may see.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rayexpand.contract.errors import (
    EXIT_DIGEST,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_FAULT,
    EXIT_OVER_BUDGET,
    EXIT_RESUMABLE,
    EXIT_USAGE,
    ConfigError,
    Interrupted,
    Stopped,
    UsageError,
)
from rayexpand.on_ray.job import JobOrder, checked, entrypoint, environment_of, unsent_problems
from rayexpand.on_ray.package import LARGE_BYTES, write_package

LOCAL = "http://127.0.0.1:8265"
OURS = (EXIT_DONE, EXIT_FAILURE, EXIT_USAGE, EXIT_OVER_BUDGET, EXIT_DIGEST, EXIT_FAULT, EXIT_RESUMABLE)
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED", "LOST")
NODE_LOSS = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE", "JOB_SUPERVISOR_ACTOR_START_FAILURE",
             "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE")

QUIET_S = 60.0  # silence in a log after which the job is asked how it is
PATIENCE_S = 300.0  # how long the cluster may be out of reach before the job counts as lost


@dataclass(frozen=True)
class Ended:
    """How a job ended, or stands where it was not waited for."""

    submission_id: str
    status: str  # of Ray, or LOST
    exit_code: int
    message: str = ""
    attempts: int = 1


@dataclass(frozen=True)
class Submission:
    """Everything one attempt needs."""

    run: str
    verb: str
    folder: str  # that it works on
    entrypoint: str
    env: Mapping[str, str]
    num_cpus: float = 0.0  # the entrypoint only waits for its actors
    resources: Mapping[str, float] | None = None


def submit(job: JobOrder, *, address: str | None = None, working_dir: str = ".", wait: bool = True, retries: int = 3,
           backoff_s: float = 30.0, env: Sequence[str] = (), num_cpus: float = 0.0,
           resources: Mapping[str, float] | None = None, python: str | None = None,
           on_log: Callable[[str], None] = lambda text: None, say: Callable[[str], None] = lambda line: None) -> Ended:
    """Runs a verb on the cluster at `address` (an http(s) URL) and says how it ended.

    Follows the log with `on_log` and submits again after exit code 75 or a lost node, up to `retries` times with
    doubling pauses; with `wait=False` it returns once the job is accepted. Raises UsageError for anything that can be
    known to be wrong before the job runs, and Interrupted if this process is stopped while the job goes on.
    """
    url, asked = _url(address), checked(job)
    run, folder = asked.name_and_folder()
    with tempfile.TemporaryDirectory() as scratch:
        package, root = Path(scratch) / "package.zip", Path(working_dir)
        inside, left_out = write_package(package, root, asked.files)
        if left_out:
            say(f"not sent, larger than {LARGE_BYTES >> 20} MB: {', '.join(left_out[:5])}"
                + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""))
        if problems := unsent_problems(asked, _sent(package), root):
            raise ConfigError(asked.target, problems)
        references, settings = environment_of(env)
        line = entrypoint(asked.arguments(inside.get(asked.target, asked.target), inside.get(asked.machine or "")),
                          references, python=python, here=_loopback(url))
        sending = Submission(run, asked.verb, folder, line, settings, num_cpus, resources)
        client = connect(url)
        _refuse_twin(client, sending)
        if not wait:
            return Ended(_send(client, sending, package), "PENDING", EXIT_DONE)

        def attempt(before: Ended | None) -> Ended:
            client = _client(url)
            if before is not None and before.status == "LOST" and _goes_on(client, before.submission_id):
                submission_id = before.submission_id  # only this machine was cut off
            else:
                submission_id = _send(client, sending, package)
                say(f"submitted {submission_id}")
            return follow(client, submission_id, on_log)

        return keep_trying(attempt, retries=retries, backoff_s=backoff_s, say=say)


def _sent(package: Path) -> set[str]:
    """Files and folders of what is sent."""
    with zipfile.ZipFile(package) as archive:
        return {parent for name in archive.namelist() for parent in (name, *map(str, Path(name).parents))}


def keep_trying(attempt: Callable[[Ended | None], Ended], *, retries: int, backoff_s: float,
                say: Callable[[str], None]) -> Ended:
    """Calls `attempt` with the end of the one before until a job ends in a way that another cannot change."""
    before: Ended | None = None
    for number in range(1, retries + 2):
        if before is not None:
            pause = min(backoff_s * 2 ** (number - 2), 600.0)
            say(f"{before.submission_id or 'job'}: {(before.message or before.status).splitlines()[0]}; "
                f"again in {pause:.0f} s ({number - 1} of {retries})")
            time.sleep(pause)
        try:
            before = replace(attempt(before), attempts=number)
        except OSError as error:
            known = before.submission_id if before else ""
            before = Ended(known, "LOST", EXIT_RESUMABLE, f"the cluster does not answer: {error}", number)
        if before.exit_code != EXIT_RESUMABLE or before.status == "STOPPED":
            break
    assert before is not None
    return before


def follow(client: Any, submission_id: str, on_log: Callable[[str], None], *, poll_s: float = 1.0,
           patience_s: float = PATIENCE_S) -> Ended:
    """Passes the log of a job on until it ends. A cluster out of reach for `patience_s` makes the job LOST."""
    seen, last_answer = [0], time.monotonic()
    try:
        while True:
            with contextlib.suppress(OSError, RuntimeError):  # the node of the log can be gone, the job is asked below
                _tail(client, submission_id, seen, on_log)
            try:
                with _refusals():
                    details = client.get_job_info(submission_id)
            except (OSError, RuntimeError) as error:
                if "does not exist" in str(error):  # another cluster answers at this address now
                    return Ended(submission_id, "LOST", EXIT_RESUMABLE, f"the cluster no longer knows {submission_id}")
                if time.monotonic() - last_answer > patience_s:
                    return Ended(submission_id, "LOST", EXIT_RESUMABLE, f"the cluster does not answer: {error}")
            else:
                last_answer = time.monotonic()
                if str(details.status) in TERMINAL:
                    _rest(client, submission_id, seen, on_log)
                    return outcome(submission_id, details)
            time.sleep(poll_s)
    except (KeyboardInterrupt, Stopped) as stopped:
        raise Interrupted(f"no longer following {submission_id}; it goes on. `rayexpand submit --logs {submission_id}` "
                          f"follows it again, `rayexpand submit --stop {submission_id}` ends it.") from stopped


def outcome(submission_id: str, details: Any) -> Ended:
    """Our exit code for the end of a job.

    A failed job whose command was never heard of again died with its node, or by a signal: both can be resumed.
    """
    status, message, code = str(details.status), details.message or "", details.driver_exit_code
    if status == "SUCCEEDED":
        return Ended(submission_id, status, EXIT_DONE)
    if status == "STOPPED":
        return Ended(submission_id, status, EXIT_RESUMABLE, "stopped; the same command continues")
    if code is None:
        kind = str(getattr(details.error_type, "value", details.error_type or ""))
        lost = any(name in f"{kind} {message}" for name in NODE_LOSS) or not kind
        return Ended(submission_id, status, EXIT_RESUMABLE if lost else EXIT_FAILURE, message or kind)
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        return Ended(submission_id, status, EXIT_RESUMABLE, f"killed by signal {number}")
    if code in OURS:
        return Ended(submission_id, status, code, f"exit code {code}")
    return Ended(submission_id, status, EXIT_FAILURE, f"exit code {code}, which is none of rayexpand: {message}")


def logs(submission_id: str, *, address: str | None, on_log: Callable[[str], None]) -> Ended:
    """Follows a job that was submitted before, from its first line."""
    client = connect(_url(address))
    _known(client, submission_id)
    return follow(client, submission_id, on_log)


def stop(submission_id: str, *, address: str | None, wait_s: float = 60.0) -> Ended:
    """Ends a job and waits until it has ended. What it committed is kept; the same command continues."""
    client = connect(_url(address))
    _known(client, submission_id)
    deadline = time.monotonic() + wait_s
    with _refusals():
        client.stop_job(submission_id)
        while str((details := client.get_job_info(submission_id)).status) not in TERMINAL:
            if time.monotonic() > deadline:
                raise Interrupted(f"{submission_id} has not ended {wait_s:.0f} s after it was told to; "
                                  f"`rayexpand submit --list` shows when it has")
            time.sleep(0.5)
    return outcome(submission_id, details)


def jobs(*, address: str | None) -> list[dict[str, Any]]:
    """The jobs of this package on a cluster, oldest first."""
    client = connect(_url(address))
    with _refusals():
        found = [one for one in client.list_jobs() if "rayexpand" in (one.metadata or {})]
    return [_described(one) for one in sorted(found, key=lambda one: one.start_time or 0)]


def _described(details: Any) -> dict[str, Any]:
    status = str(details.status)
    code = outcome(details.submission_id, details).exit_code if status in TERMINAL else None
    return {"submission_id": details.submission_id, "run": details.metadata["run"],
            "verb": details.metadata["rayexpand"], "folder": details.metadata.get("folder", ""), "status": status,
            "exit_code": code,
            "started": details.start_time and details.start_time / 1000,
            "ended": details.end_time and details.end_time / 1000}


def connect(url: str) -> Any:
    """A JobSubmissionClient. Raises UsageError if nobody answers at `url` or the token is refused."""
    try:
        return _client(url)
    except OSError as error:
        raise UsageError(
            f"no Ray cluster answers at {url} ({error}). Start one (`ray start --head`, cluster/README.md), or forward "
            "port 8265 of one to this machine, or give --address http://host:8265.") from error


def _client(url: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray lets this variable win over the argument
    token = _token(url)
    with _refusals():
        return JobSubmissionClient(url, headers={"Authorization": f"Bearer {token}"} if token else None)


def _token(url: str) -> str | None:
    """Ray's own token, from where Ray looks for it; sent to another machine only where RAY_AUTH_MODE=token says so."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled" or (not mode and not _loopback(url)):
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "AuthenticationError":
            raise
        raise UsageError(
            f"the cluster refuses this client's token ({str(error).splitlines()[0]}). Set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to a file with the cluster's token (or RAY_AUTH_TOKEN); on the head node it is in "
            "~/.ray/auth_token, on Kubernetes in the secret of the cluster.") from error


def _url(address: str | None) -> str:
    url = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or LOCAL).rstrip("/")
    if urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"--address {url}: jobs go to the dashboard of a cluster; give its URL, such as {LOCAL}")
    return url


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _refuse_twin(client: Any, job: Submission) -> None:
    with _refusals():
        found = client.list_jobs()
    for one in found:
        facts = one.metadata or {}
        is_same = facts.get("rayexpand") == job.verb and facts.get("folder") == job.folder
        if is_same and str(one.status) not in TERMINAL:
            raise UsageError(f"{one.submission_id} is {str(one.status).lower()} and does the same; follow it with "
                             f"`rayexpand submit --logs {one.submission_id}` or end it with --stop")


def _send(client: Any, job: Submission, package: Path) -> str:
    """Submits one attempt as `<run>-<n>`, with the next free n."""
    pattern = re.compile(re.escape(job.run) + r"-(\d+)")
    with _refusals():
        taken = [int(match[1]) for one in client.list_jobs()
                 if (match := pattern.fullmatch(one.submission_id or ""))]
        number = max(taken, default=0) + 1
        for number in range(number, number + 10):  # noqa: B020 - another submitter may take a number meanwhile
            with contextlib.suppress(_Taken):
                return _send_as(client, f"{job.run}-{number}", number, job, package)
    raise UsageError(f"no free submission id for {job.run} on this cluster; try again")


class _Taken(Exception):
    pass


def _send_as(client: Any, submission_id: str, number: int, job: Submission, package: Path) -> str:
    runtime_env: dict[str, Any] = {"working_dir": str(package)}
    if job.env:
        runtime_env["env_vars"] = dict(job.env)
    try:
        return client.submit_job(
            entrypoint=job.entrypoint, submission_id=submission_id, runtime_env=runtime_env,
            metadata={"rayexpand": job.verb, "run": job.run, "folder": job.folder,
                      "attempt": str(number)},
            entrypoint_num_cpus=job.num_cpus, entrypoint_resources=dict(job.resources) if job.resources else None)
    except RuntimeError as error:
        if "already" in str(error) and submission_id in str(error):
            raise _Taken from error
        raise UsageError(f"the cluster does not accept the job: {error}") from error


def _goes_on(client: Any, submission_id: str) -> bool:
    return any(one.submission_id == submission_id and str(one.status) not in TERMINAL for one in client.list_jobs())


def _known(client: Any, submission_id: str) -> None:
    with _refusals():
        known = [one.submission_id for one in client.list_jobs() if one.submission_id]
    if submission_id not in known:
        raise UsageError(f"{submission_id} is no job of this cluster; known: {', '.join(known) or 'none'}")


def _tail(client: Any, submission_id: str, seen: list[int], on_log: Callable[[str], None]) -> None:
    """Passes on what the log has beyond seen[0] characters, until it ends or is silent for QUIET_S."""
    import aiohttp

    async def pump() -> None:
        position, lines = 0, client.tail_job_logs(submission_id)
        try:
            while True:
                text = await asyncio.wait_for(anext(lines), QUIET_S)
                if fresh := text[max(0, seen[0] - position):]:
                    on_log(fresh)
                position += len(text)
                seen[0] = max(seen[0], position)
        except (StopAsyncIteration, TimeoutError):
            return
        finally:
            await lines.aclose()

    try:
        asyncio.run(pump())
    except aiohttp.ClientError as error:
        raise ConnectionError(str(error)) from error


def _rest(client: Any, submission_id: str, seen: list[int], on_log: Callable[[str], None]) -> None:
    """Lines written between the last look at the log and the end of the job."""
    with contextlib.suppress(OSError, RuntimeError):  # the node with the log may be gone
        if fresh := client.get_job_logs(submission_id)[seen[0]:]:
            on_log(fresh)
