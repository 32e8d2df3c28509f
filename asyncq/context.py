"""What a handler is given about its run, and how code below it finds that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from datetime import datetime
from types import MappingProxyType
from typing import Any, Generic, Protocol, cast

from typing_extensions import TypeVar

from asyncq.clock import from_unix
from asyncq.errors import AsyncqError, OptionError
from asyncq.payload import encode
from asyncq.proto.asynq_pb2 import TaskMessage
from asyncq.task import Producer, Task

__all__ = ["Context", "Run", "SyncContext", "TaskLog", "current", "current_context"]

S = TypeVar("S", default=Any)

_logger = logging.getLogger("asyncq.task")


class Run(Protocol):
    """One execution of a task, as the server keeps it; a Context is a view of it."""

    message: TaskMessage
    deadline_at: float
    """Unix seconds."""
    cancel_reason: str | None
    state: Any
    client: Any

    @property
    def lease_lost(self) -> asyncio.Event:
        """Set when another worker may have the task."""
        ...

    async def write_result(self, data: bytes) -> None:
        """Store a result; raises LeaseExpiredError."""
        ...

    async def write_progress(self, fraction: float, note: str) -> None:
        """Store the progress; raises LeaseExpiredError."""
        ...

    def sync_call(self, function: Callable[..., Awaitable[None]], /, *args: Any) -> None:
        """Run one of the two from another thread or process, and wait for it."""
        ...


class Context(Generic[S]):
    """What a handler knows of its run: the task's facts, the server's state, ways to report."""

    # One is made for every task, used or not: everything is looked up when asked for.
    __slots__ = ("_run", "_task")

    def __init__(self, run: Run) -> None:
        self._run = run
        self._task: Task[Any] | None = None

    @property
    def task_id(self) -> str:
        """The id of the task."""
        return self._run.message.id

    @property
    def task_type(self) -> str:
        """The name of its type."""
        return self._run.message.type

    @property
    def queue(self) -> str:
        """The queue it was taken from."""
        return self._run.message.queue

    @property
    def retry_count(self) -> int:
        """How often it has failed before; 0 in the first run."""
        return self._run.message.retried

    @property
    def max_retry(self) -> int:
        """How often it may be retried."""
        return self._run.message.retry

    @property
    def deadline(self) -> datetime:
        """When this run is cancelled (UTC), by the task's timeout or its deadline."""
        return from_unix(self._run.deadline_at)

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the task."""
        return MappingProxyType(dict(self._run.message.headers))

    @property
    def task(self) -> Task[Any]:
        """The whole task: type, raw payload, headers, and the options it was enqueued with.

        Its identity is left out (`task_id`, `unique`), so that enqueueing it makes a new task.
        """
        if self._task is None:
            self._task = _task_of(self._run.message)
        return self._task

    @property
    def state(self) -> S:
        """What the lifespan of the mux yielded; None without a lifespan."""
        return cast(S, self._run.state)

    @property
    def client(self) -> Producer:
        """The client of the server, to enqueue more tasks with."""
        return cast(Producer, self._run.client)

    @property
    def log(self) -> TaskLog:
        """A logger that adds `task_id`, `task_type` and `queue` to every record."""
        message = self._run.message
        return TaskLog(
            _logger,
            {
                "task_id": _printable(message.id),
                "task_type": _printable(message.type),
                "queue": _printable(message.queue),
            },
        )

    @property
    def lease_lost(self) -> asyncio.Event:
        """Set when the lease could not be kept, so that another worker may run the task, too."""
        return self._run.lease_lost

    @property
    def cancel_reason(self) -> str | None:
        """Why the run is being cancelled; None: it is not."""
        return self._run.cancel_reason

    @property
    def sync(self) -> SyncContext:
        """The reporting methods for a plain `def` handler in its thread or process."""
        return SyncContext(self._run)

    async def progress(self, fraction: float, note: str = "") -> None:
        """Report how far the run is, as a fraction of 0 to 1 with an optional note.

        Raises:
            OptionError: `fraction` is outside 0 to 1.
            LeaseExpiredError: the task belongs to another worker now.
        """
        await self._run.write_progress(*_checked_progress(fraction, note))

    async def write_result(self, value: object) -> None:
        """Store a result before the handler returns one; the last one written stays.

        Bytes are stored as they are, None as no result, anything else as JSON.

        Raises:
            PayloadError: `value` cannot be written as JSON.
            LeaseExpiredError: the task belongs to another worker now.
        """
        await self._run.write_result(encode(value) or b"")

    def __repr__(self) -> str:
        return f"<Context of task {self.task_id!r} ({self.task_type!r})>"


class SyncContext:
    """The reporting methods of a Context for code outside the event loop; each waits."""

    __slots__ = ("_run",)

    def __init__(self, run: Run) -> None:
        self._run = run

    def progress(self, fraction: float, note: str = "") -> None:
        """Report how far the run is; like `Context.progress`."""
        run = self._run
        run.sync_call(run.write_progress, *_checked_progress(fraction, note))

    def write_result(self, value: object) -> None:
        """Store a result before the handler returns one; like `Context.write_result`."""
        run = self._run
        run.sync_call(run.write_result, encode(value) or b"")


class TaskLog(logging.LoggerAdapter[logging.Logger]):
    """A logger that knows its task; a caller's own `extra` is kept beside the task's fields."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the task's fields to a record."""
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


current: ContextVar[Context[Any]] = ContextVar("asyncq_context")
"""The context of the task that runs here; execution sets it before it calls the handler."""


def current_context() -> Context[Any]:
    """Return the context of the running task, from anywhere below its handler.

    Raises:
        AsyncqError: no handler is running here.
    """
    context = current.get(None)
    if context is None:
        raise AsyncqError(
            "there is no current task: current_context() works in code that a handler calls, "
            "and in threads only where the caller's contextvars were copied (asyncio.to_thread)"
        )
    return context


def _task_of(message: TaskMessage) -> Task[Any]:
    options: dict[str, Any] = {"queue": message.queue, "max_retry": message.retry}
    if message.timeout:
        options["timeout"] = message.timeout
    if message.deadline:
        options["deadline"] = from_unix(message.deadline)
    if message.retention:
        options["retention"] = message.retention
    if message.group_key:
        options["group"] = message.group_key
    if message.headers:
        options["headers"] = dict(message.headers)
    return Task.assemble(message.type, message.payload or None, options)


def _checked_progress(fraction: object, note: str) -> tuple[float, str]:
    if (
        not isinstance(fraction, int | float)
        or isinstance(fraction, bool)
        or not 0 <= fraction <= 1  # refuses NaN, too
    ):
        raise OptionError(f"progress must be a fraction of 0 to 1, not {fraction!r}")
    return float(fraction), note


def _printable(text: str) -> str:
    """Escape what could forge a log line: the text comes from whoever wrote the task."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
