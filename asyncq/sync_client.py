"""The client for code without an event loop: Django, Flask, scripts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Generic, Literal, Unpack, overload

from anyio.from_thread import BlockingPortal, start_blocking_portal
from typing_extensions import TypeVar

from asyncq.client import MAX_PAYLOAD_BYTES, Client
from asyncq.clock import Seconds
from asyncq.errors import AsyncqError
from asyncq.options import TaskOptions
from asyncq.task import Task, TaskHandle, TaskInfo, TaskType

R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True, default=Any)


class SyncTaskHandle(Generic[T_co]):
    """An enqueued task, known by its id and queue; each call waits for its answer."""

    __slots__ = ("_handle", "_portal", "id", "queue")

    def __init__(self, handle: TaskHandle[T_co], portal: BlockingPortal) -> None:
        self.id = handle.id
        self.queue = handle.queue
        self._handle = handle
        self._portal = portal

    def info(self) -> TaskInfo:
        """Return what Redis holds of the task; raises as `TaskHandle.info` does."""
        return self._portal.call(self._handle.info)

    def result(self, *, timeout: Seconds | None = None) -> T_co:
        """Wait for the task's result; raises as `TaskHandle.result` does."""

        async def result() -> T_co:
            return await self._handle.result(timeout=timeout)

        awaited: T_co = self._portal.call(result)
        return awaited

    def cancel(self, *, retry: bool = True) -> None:
        """Cancel the task; see `TaskHandle.cancel`."""

        async def cancel() -> None:
            await self._handle.cancel(retry=retry)

        self._portal.call(cancel)

    def __repr__(self) -> str:
        return f"<SyncTaskHandle {self.id!r} in {self.queue!r}>"


class SyncClient:
    """A `Client` on an event loop in a thread of its own; safe to be used by many threads.

    The options are those of `Client`. Use it in `with`, or `open` and `close` it. A process
    that forks opens it after the fork.

    Raises:
        OptionError: the URL makes no sense.
    """

    def __init__(
        self, redis: str | None = None, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        self._redis = redis
        self._max_payload_bytes = max_payload_bytes
        self._make()  # a URL that makes no sense is refused here, as by Client
        self._stack: ExitStack | None = None
        self._pid = os.getpid()
        self._portal: BlockingPortal
        self._client: Client

    def open(self) -> None:
        """Start the thread and connect; repeating it does nothing. Raises as `Client.open` does."""
        if self._stack is not None:
            return
        self._pid = os.getpid()
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal("asyncio"))
            self._client = self._portal.call(self._opened)
            stack.callback(self._portal.call, self._client.close)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Disconnect and end the thread; repeating it does nothing."""
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()

    def __enter__(self) -> SyncClient:
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def enqueue(self, task: Task[R], /, **options: Unpack[TaskOptions]) -> SyncTaskHandle[R]:
        """Put a task into its queue; raises as `Client.enqueue` does."""

        async def enqueue() -> TaskHandle[R]:
            return await self._client.enqueue(task, **options)

        return self._wrap(self._opened_portal().call(enqueue))

    @overload
    def enqueue_many(
        self, tasks: Iterable[Task[R]], *, return_exceptions: Literal[False] = False
    ) -> list[SyncTaskHandle[R]]: ...
    @overload
    def enqueue_many(
        self, tasks: Iterable[Task[R]], *, return_exceptions: Literal[True]
    ) -> list[SyncTaskHandle[R] | AsyncqError]: ...
    def enqueue_many(
        self, tasks: Iterable[Task[Any]], *, return_exceptions: bool = False
    ) -> list[Any]:
        """Put many tasks into their queues; see `Client.enqueue_many`."""

        async def enqueue_many() -> list[TaskHandle[Any] | AsyncqError]:
            return await self._client.enqueue_many(tasks, return_exceptions=True)

        results = self._opened_portal().call(enqueue_many)
        if not return_exceptions:
            for result in results:
                if isinstance(result, AsyncqError):
                    raise result
        return [
            self._wrap(result) if isinstance(result, TaskHandle) else result for result in results
        ]

    @overload
    def handle(self, task_id: str, *, queue: str = "default") -> SyncTaskHandle[Any]: ...
    @overload
    def handle(
        self, task_id: str, *, queue: str | None = None, of: TaskType[Any, R]
    ) -> SyncTaskHandle[R]: ...
    def handle(
        self, task_id: str, *, queue: str | None = None, of: TaskType[Any, Any] | None = None
    ) -> SyncTaskHandle[Any]:
        """Make a handle of an id; `of` gives the queue and the type of the result."""
        self._opened_portal()
        if of is not None:
            return self._wrap(self._client.handle(task_id, queue=queue, of=of))
        return self._wrap(self._client.handle(task_id, queue=queue or "default"))

    def _make(self) -> Client:
        return Client(self._redis, max_payload_bytes=self._max_payload_bytes)

    async def _opened(self) -> Client:
        client = self._make()
        await client.__aenter__()
        return client

    def _opened_portal(self) -> BlockingPortal:
        if self._stack is None:
            raise AsyncqError("not connected: use the client in 'with', or call open() first")
        if os.getpid() != self._pid:
            raise AsyncqError(
                "this client was opened before the process forked, and its thread did not come "
                "along: open it after the fork (in gunicorn's post_fork, for instance)"
            )
        return self._portal

    def _wrap(self, handle: TaskHandle[R]) -> SyncTaskHandle[R]:
        return SyncTaskHandle(handle, self._portal)
