"""Every error of asyncq, with the fields a caller needs so that nobody parses text."""

from __future__ import annotations

import json
import signal

__all__ = [
    "AsyncqError",
    "BrokerError",
    "BrokerFullError",
    "BrokerUnavailableError",
    "DuplicateTaskError",
    "EnqueueUncertainError",
    "HandlerNotFoundError",
    "InvalidPayloadError",
    "LeaseExpiredError",
    "MalformedMessageError",
    "OptionError",
    "PayloadError",
    "PayloadTooLargeError",
    "ProcessDiedError",
    "QueueNotEmptyError",
    "QueueNotFoundError",
    "ServerClosedError",
    "TaskFailedError",
    "TaskIDConflictError",
    "TaskNotFoundError",
]


class AsyncqError(Exception):
    """The base of every error that asyncq raises."""


class OptionError(AsyncqError, ValueError):
    """An option has a value that makes no sense; raised before Redis is touched."""


class PayloadError(AsyncqError, ValueError):
    """A payload or result does not fit its type, or cannot be written as JSON."""


class InvalidPayloadError(PayloadError):
    """The stored payload of a task does not validate: it can never succeed, so it is archived."""


class PayloadTooLargeError(PayloadError):
    """A payload is larger than the client allows."""

    def __init__(self, task_type: str, payload_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the payload of task {task_type!r} has {payload_bytes:,} bytes, the limit is "
            f"{limit_bytes:,}: keep the data elsewhere and send a reference, or raise "
            "max_payload_bytes"
        )
        self.task_type = task_type
        self.payload_bytes = payload_bytes
        self.limit_bytes = limit_bytes


class MalformedMessageError(AsyncqError):
    """Bytes found in Redis are no task message; the task is quarantined, never dropped."""


class TaskIDConflictError(AsyncqError):
    """A task with this id is already in the queue."""

    def __init__(self, task_id: str, queue: str) -> None:
        super().__init__(
            f"a task with id {task_id!r} is already in queue {queue!r}: choose another task_id, "
            "or wait until that task is gone"
        )
        self.task_id = task_id
        self.queue = queue


class DuplicateTaskError(AsyncqError):
    """Another task holds the uniqueness lock that this task asked for."""

    def __init__(self, task_type: str, queue: str, holder_id: str, lock: str) -> None:
        super().__init__(
            f"task {task_type!r} is a duplicate in queue {queue!r}: task {holder_id!r} holds "
            f"the lock {lock!r}"
        )
        self.task_type = task_type
        self.queue = queue
        self.holder_id = holder_id
        self.lock = lock


class QueueNotFoundError(AsyncqError):
    """No queue of this name was ever used."""

    def __init__(self, queue: str) -> None:
        super().__init__(f"queue {queue!r} does not exist")
        self.queue = queue


class QueueNotEmptyError(AsyncqError):
    """The queue still holds tasks, so it is not deleted without force."""

    def __init__(self, queue: str) -> None:
        super().__init__(f"queue {queue!r} is not empty: delete its tasks first, or use force")
        self.queue = queue


class TaskNotFoundError(AsyncqError):
    """There is no such task, or nothing of it is kept."""

    def __init__(self, task_id: str, queue: str, hint: str = "") -> None:
        super().__init__(
            f"task {task_id!r} is not in queue {queue!r}" + (f": {hint}" if hint else "")
        )
        self.task_id = task_id
        self.queue = queue


class TaskFailedError(AsyncqError):
    """A task whose result was awaited ended without one: archived, revoked or deleted."""

    def __init__(self, task_id: str, queue: str, error: str) -> None:
        super().__init__(f"task {task_id!r} of queue {queue!r} failed: {error}")
        self.task_id = task_id
        self.queue = queue
        self.error = error


class LeaseExpiredError(AsyncqError):
    """The run no longer holds the lease of its task, so it may not write to it.

    The text is Asynq's own for a recovered task (v0.26.0), which Go tools show.
    """

    def __init__(self, message: str = "asynq: task lease expired") -> None:
        super().__init__(message)


class ServerClosedError(AsyncqError):
    """The server was shut down and cannot be started again; make a new one."""


class HandlerNotFoundError(AsyncqError):
    """No handler is registered for the type of a task.

    The text is Asynq's own (v0.26.0), so that Go and Python workers report the same.
    """

    def __init__(self, task_type: str) -> None:
        quoted = json.dumps(task_type, ensure_ascii=False)  # nearly as Go quotes it
        super().__init__(f"handler not found for task {quoted}")
        self.task_type = task_type


class ProcessDiedError(AsyncqError):
    """The process of a handler died before the handler returned.

    `phase` is "starting" when it had not begun; `exit_code` is negative for a signal.
    """

    def __init__(self, handler: str, phase: str, exit_code: int | None) -> None:
        super().__init__(f"the process of handler {handler} {_how_it_died(phase, exit_code)}")
        self.handler = handler
        self.phase = phase
        self.exit_code = exit_code


class BrokerError(AsyncqError):
    """Redis refused a command; the text is Redis's own."""


class BrokerUnavailableError(BrokerError):
    """Redis cannot be reached, is loading, failing over or read-only: trying later may work."""


class BrokerFullError(BrokerError):
    """Redis is at its memory limit and takes no new tasks; workers still drain what is there."""


class EnqueueUncertainError(BrokerUnavailableError):
    """The connection died after the request had left: the task may or may not be in the queue.

    Enqueue it again with the same task id: if it had arrived, the second call succeeds too
    or raises TaskIDConflictError, and there is one task either way.
    """

    def __init__(self, task_id: str, queue: str, cause: str) -> None:
        super().__init__(
            f"the connection was lost while task {task_id!r} was sent to queue {queue!r} "
            f"({cause}): it is safe to enqueue it again with task_id={task_id!r}"
        )
        self.task_id = task_id
        self.queue = queue


def _how_it_died(phase: str, exit_code: int | None) -> str:
    when = "while it started" if phase == "starting" else "before the handler returned"
    if exit_code is None:
        return f"was lost {when}"
    if exit_code < 0:
        hint = " (as the kernel does when memory runs out)" if exit_code == -signal.SIGKILL else ""
        return f"was killed by {_signal_name(-exit_code)}{hint} {when}"
    hint = "stderr says why" if phase == "starting" else "it must not call os._exit()"
    return f"ended with exit code {exit_code} {when}: {hint}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
