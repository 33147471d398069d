"""Nodes that are taken away: what Ray says before it, and who pays for it afterwards.

A notice is Ray's draining state: `ray drain-node`, or an autoscaler that was told by its cloud. Ray starts nothing more
on such a node, and what runs there runs on until the node is gone. Work in one process keeps a checkpoint and leaves at
once, so that another node is asked for while this one is still up; Ray Train workers, who can only leave together, keep
one at the notice and one more shortly before the end.

The loss of a node, announced or not, is no failure of what ran there. Only deaths of a process on a node that lives are
counted. Ray counts the others too: of tasks nearly always, because it hears of the node after the process, and of
actors and Ray Train workers whenever nobody drained the node. So what is limited here has no retries of Ray's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from rayexpand.contract.errors import Preempted

NOTICE_S = 2.0  # between two looks; a node is taken away 30 s after the notice, or later
DEATH_S = 30.0  # Ray knows after so long that a node that stopped answering is gone
LOST_NODES = 100  # under one piece of work, before it is given up: whoever takes its nodes down must end, too


class Leaving:
    """Whether the node of this process will be taken away, as Ray said it at the last look."""

    def __init__(self) -> None:
        self.node = ray.get_runtime_context().get_node_id()
        self._asked = 0.0
        self._deadline: float | None = None

    def __call__(self) -> bool:
        return self.deadline() is not None

    def deadline(self) -> float | None:
        """When it will be gone (UNIX time; 0: Ray was told no time), None where it stays."""
        if (now := time.monotonic()) - self._asked > NOTICE_S:
            self._asked = now
            milliseconds = draining_nodes().get(self.node)
            self._deadline = None if milliseconds is None else milliseconds / 1000
        return self._deadline


class Deaths:
    """Deaths of the process of one piece of work, which is begun again after `most` of them (`raised`: also after as
    many of what the work itself raised). Losses of its node are none."""

    def __init__(self, most: int, *, raised: bool = False) -> None:
        self._most, self._raised, self._count, self._lost = most, raised, 0, 0

    def forgives(self, error: Exception) -> bool:
        """Whether what ended with `error` is begun again."""
        if is_lost(error):
            self._lost += 1
            return self._lost <= LOST_NODES
        if not self._raised and not isinstance(error, (WorkerCrashedError, OutOfMemoryError, ActorDiedError)):
            return False
        self._count += 1
        return self._count <= self._most


def lasting(attempt: Callable[[], Any], most: int) -> Any:
    """What `attempt` returns, which waits for a task with `max_retries=0`; it is called again when the task's process
    dies, up to `most` times, and whenever its node is lost. Raises the last error."""
    deaths = Deaths(most)
    while True:
        try:
            return attempt()
        except ray.exceptions.RayError as error:
            if not deaths.forgives(error):
                raise


def is_lost(error: Exception) -> bool:
    """Whether a task or actor ended because its node did, or will. An actor that cannot be reached counts as one, for
    Ray knows at once when a process died on a node that lives."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return isinstance(cause, Preempted) or (isinstance(cause, RayActorError) and is_lost(cause))
    if isinstance(error, ActorDiedError):
        return error.preempted or _died_with_node(error.actor_id)
    return isinstance(error, (NodeDiedError, ActorUnavailableError))


def _died_with_node(actor_id: str | None) -> bool:
    from ray._private.state import actors  # ray.util.state needs a dashboard

    cause: Any = actors(actor_id=actor_id).get("DeathCause") if actor_id else None
    return cause is not None and cause.actor_died_error_context.HasField("node_death_info")


def draining_nodes() -> dict[str, int]:
    """Nodes that will be taken away, with the time in milliseconds since the epoch (0: unknown)."""
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found


def staying_nodes() -> set[str]:
    """Nodes that are there and will not be taken away, as far as Ray was told."""
    return {one["NodeID"] for one in ray.nodes() if one["Alive"]} - draining_nodes().keys()


def any_lost(nodes: Sequence[str], within_s: float) -> bool:
    """Whether one of these nodes is gone, or will be; waits `within_s` for Ray to know."""
    until = time.monotonic() + within_s
    while True:
        if not staying_nodes().issuperset(nodes):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(1.0)
