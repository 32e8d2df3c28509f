"""What a run ends with: decided by pure functions from the message and the error, then written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

Kind = Literal[
    "done", "complete", "retry", "retry_uncounted", "snooze", "archive", "quarantine", "requeue"
]
"""A move of broker/lua/lib/moves.lua, by the same name."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a task goes after a run.

    `at`: for retry and snooze the unix milliseconds when it is due, for complete the unix
    seconds until which it is kept. `message`: the bytes of its new message. `result`: what the
    handler returned, `None` for nothing.
    """

    kind: Kind
    at: int = 0
    message: bytes = b""
    result: bytes | None = None


class Ended(NamedTuple):
    """An outcome that waits to be saved; `lock` is the key of the task's unique lock, or empty."""

    task_id: str
    mark: int
    lock: str
    outcome: Outcome


DONE: Final = Outcome("done")
REQUEUE: Final = Outcome("requeue")
