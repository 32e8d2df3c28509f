"""Puts tasks on queues: concurrent calls travel together, each with its own answer."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from datetime import timedelta
from typing import Any, Final, Literal, TypeAlias, Unpack, cast, overload

from typing_extensions import TypeVar

from asyncq.broker.broker import BATCH, Broker, NewTask, batch_of
from asyncq.broker.inspection import StoredTask, find_task
from asyncq.broker.keys import queue_keys
from asyncq.clock import from_unix
from asyncq.ends import Ends
from asyncq.errors import (
    AsyncqError,
    MalformedMessageError,
    PayloadTooLargeError,
    TaskNotFoundError,
)
from asyncq.message import encode
from asyncq.options import DEFAULT_QUEUE, Plan, TaskOptions
from asyncq.settings import redis_url
from asyncq.task import Progress, Task, TaskHandle, TaskInfo, TaskState, TaskType

R = TypeVar("R")

MAX_PAYLOAD_BYTES: Final = 1024 * 1024
WORTH_SPLITTING: Final = 32  # callers that wait at a time; two calls for fewer cost more

EnqueueNext: TypeAlias = Callable[[Task[Any]], Awaitable[TaskHandle[Any]]]
"""What a middleware calls to go on: the next middleware, or the enqueue itself."""
EnqueueMiddleware: TypeAlias = Callable[[Task[Any], EnqueueNext], Awaitable[TaskHandle[Any]]]
"""`async def (task, call_next)`: adds headers by `task.with_options(headers=...)`, or spans."""
M = TypeVar("M", bound=EnqueueMiddleware)


class Client:
    """Puts tasks on queues, and looks after them by their handles.

    `redis` is a URL: redis://, rediss://, unix://, redis-socket:// or embedded://PATH (default:
    `ASYNCQ_REDIS_URL`, else redis://localhost:6379/0). A payload of more than
    `max_payload_bytes` (1 MiB) is refused. Use it in `async with`, or `open` and `close` it.

    Raises:
        OptionError: the URL makes no sense.
    """

    def __init__(
        self, redis: str | None = None, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES
    ) -> None:
        self._broker = Broker(redis_url() if redis is None else redis)
        self._max_payload_bytes = max_payload_bytes
        self._middleware: list[EnqueueMiddleware] = []
        self._waiting: dict[str, list[tuple[NewTask, asyncio.Future[AsyncqError | None]]]] = {}
        self._flushers: dict[str, set[asyncio.Task[None]]] = {}  # none: one who sends alone
        self._quiet = asyncio.Event()  # nothing is being sent
        self._ends = Ends(self._broker)

    async def open(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailableError: Redis does not answer.
            BrokerError: Redis refuses us, or is older than 6.2.
        """
        await self._broker.open()

    async def close(self) -> None:
        """Finish what is being sent, and disconnect; repeating it does nothing."""
        while self._flushers:
            self._quiet.clear()
            await self._quiet.wait()
        await self._ends.close()
        await self._broker.close()

    async def __aenter__(self) -> Client:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def use(self, middleware: M) -> M:
        """Wrap every enqueue; usable as a decorator. The first registered is the outermost."""
        self._middleware.append(middleware)
        return middleware

    # Enqueueing

    async def enqueue(self, task: Task[R], /, **options: Unpack[TaskOptions]) -> TaskHandle[R]:
        """Put a task into its queue; options given here win over the task's own.

        Calls that are made while another one is under way travel together, in one call of Redis.

        Raises:
            TypeError: an option is unknown.
            OptionError: the value of an option makes no sense.
            PayloadTooLargeError: the payload is over the limit.
            TaskIDConflictError: the id is in use.
            DuplicateTaskError: another task holds the uniqueness lock.
            BrokerFullError: Redis is at its memory limit.
            EnqueueUncertainError: the connection died after the request had left.
            BrokerError: Redis refused, or (BrokerUnavailableError) could not be reached.
        """
        if not isinstance(task, Task):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"enqueue takes a Task, not {task!r}")
        if self._middleware:
            return await self._through_middleware(task.with_options(**options) if options else task)
        return await self._enqueue(task, cast(dict[str, Any], options))

    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task[R]] | AsyncIterable[Task[R]],
        *,
        return_exceptions: Literal[False] = False,
    ) -> list[TaskHandle[R]]: ...
    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task[R]] | AsyncIterable[Task[R]],
        *,
        return_exceptions: Literal[True],
    ) -> list[TaskHandle[R] | AsyncqError]: ...
    async def enqueue_many(
        self,
        tasks: Iterable[Task[Any]] | AsyncIterable[Task[Any]],
        *,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Put many tasks into their queues, 250 a call, and return their handles in order.

        A refused task does not keep the others out. With `return_exceptions` its error stands
        in its place, else the first error is raised when all others are in.

        Raises:
            AsyncqError: as `enqueue` does.
        """
        results: list[TaskHandle[Any] | AsyncqError] = []
        async for chunk in _chunks(tasks):
            results += await self._enqueue_chunk(chunk)
        if not return_exceptions:
            for result in results:
                if isinstance(result, AsyncqError):
                    raise result
        return results

    async def _through_middleware(self, task: Task[Any]) -> TaskHandle[Any]:
        async def innermost(task: Task[Any]) -> TaskHandle[Any]:
            return await self._enqueue(task, None)

        following: EnqueueNext = innermost
        for middleware in reversed(self._middleware):
            following = _wrap(middleware, following)
        return await following(task)

    async def _enqueue(self, task: Task[Any], options: dict[str, Any] | None) -> TaskHandle[Any]:
        plan = task.plan(time.time(), options)
        new = self._new(task, plan)
        queue = plan.queue
        if queue in self._flushers:
            future = asyncio.get_running_loop().create_future()
            self._waiting[queue].append((new, future))
            error: AsyncqError | None = await future
        else:
            error = await self._send_alone(queue, new)
        if error is not None:
            raise error
        return TaskHandle(new.id, queue, self, task.result_codec)

    async def _send_alone(self, queue: str, new: NewTask) -> AsyncqError | None:
        """Send at once, as nobody is sending: those who come meanwhile leave it to a flusher.

        A flusher for this one as well would be a task more for each call.
        """
        self._waiting[queue] = []
        self._flushers[queue] = set()
        try:
            (error,) = await self._broker.enqueue(queue, [new], soon=True)
        finally:
            if any(not future.done() for _, future in self._waiting[queue]):
                self._start_flusher(queue)
            else:
                self._end_sending(queue)
        return error

    def _start_flusher(self, queue: str) -> None:
        flushers = self._flushers[queue]
        flushers.add(asyncio.create_task(self._flush(queue, flushers)))

    async def _flush(self, queue: str, flushers: set[asyncio.Task[None]]) -> None:
        """Send what waits; while one call is under way, the next batch gathers.

        Many callers who wait for one call would leave us idle while Redis works, and Redis while
        we hand its answers out. So they are split, and a second flusher takes the other half.
        """
        waiting = self._waiting[queue]
        try:
            while waiting:
                n = batch_of(len(new.message) for new, _ in waiting)
                if len(waiting) >= WORTH_SPLITTING and len(flushers) == 1:
                    n = min(n, len(waiting) // 2)
                    self._start_flusher(queue)
                batch = waiting[:n]
                del waiting[:n]
                try:
                    refused = await self._broker.enqueue(queue, [new for new, _ in batch])
                except BaseException as failure:
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(failure)
                    raise
                for (_, future), error in zip(batch, refused, strict=True):
                    if not future.done():
                        future.set_result(error)
        finally:
            self._end_flusher(queue, flushers)

    def _end_flusher(self, queue: str, flushers: set[asyncio.Task[None]]) -> None:
        flushers.remove(cast(asyncio.Task[None], asyncio.current_task()))
        if not flushers:
            self._end_sending(queue)

    def _end_sending(self, queue: str) -> None:
        del self._flushers[queue]
        for _, future in self._waiting.pop(queue):  # only after a failure is anybody left
            if not future.done():
                future.set_exception(AsyncqError("the enqueue was not sent: another one failed"))
        if not self._flushers:
            self._quiet.set()

    async def _enqueue_chunk(self, tasks: list[Task[Any]]) -> list[TaskHandle[Any] | AsyncqError]:
        if self._middleware:
            done = await asyncio.gather(
                *(self._through_middleware(task) for task in tasks), return_exceptions=True
            )
            return [_ours(result) for result in done]
        now = time.time()
        results: list[TaskHandle[Any] | AsyncqError] = []
        by_queue: dict[str, list[tuple[int, NewTask]]] = {}
        for task in tasks:
            try:
                plan = task.plan(now)
                new = self._new(task, plan)
            except AsyncqError as refusal:
                results.append(refusal)
                continue
            by_queue.setdefault(plan.queue, []).append((len(results), new))
            results.append(TaskHandle(new.id, plan.queue, self, task.result_codec))
        for queue, rows in by_queue.items():
            while rows:
                n = batch_of(len(new.message) for _, new in rows)
                refused = await self._broker.enqueue(queue, [new for _, new in rows[:n]])
                for (i, _), error in zip(rows[:n], refused, strict=True):
                    if error is not None:
                        results[i] = error
                del rows[:n]
        return results

    def _new(self, task: Task[Any], plan: Plan) -> NewTask:
        payload = task.payload
        if payload is not None and len(payload) > self._max_payload_bytes:
            raise PayloadTooLargeError(task.type, len(payload), self._max_payload_bytes)
        task_id = plan.task_id or _new_id()
        now = time.time()
        later = plan.process_at_s is not None and plan.process_at_s > now
        at_ms = math.ceil(plan.process_at_s * 1000) if later and plan.process_at_s else None
        lock, lock_s = None, 0
        if plan.unique_s is not None:
            lock = queue_keys(plan.queue).unique(task.type, _digest(payload, plan.unique_key))
            # Held from the time the task is due. Rounded up: Asynq cuts, up to 1 s short.
            wait_s = plan.process_at_s - now if later and plan.process_at_s else 0.0
            lock_s = math.ceil(plan.unique_s + wait_s)
        new_id = plan.task_id is None
        message = encode(task.type, payload, task_id, plan, lock)
        return NewTask(task_id, task.type, message, new_id, at_ms, plan.group, lock, lock_s)

    # By id

    @overload
    def handle(self, task_id: str, *, queue: str = DEFAULT_QUEUE) -> TaskHandle[Any]: ...
    @overload
    def handle(
        self, task_id: str, *, queue: str | None = None, of: TaskType[Any, R]
    ) -> TaskHandle[R]: ...
    def handle(
        self, task_id: str, *, queue: str | None = None, of: TaskType[Any, Any] | None = None
    ) -> TaskHandle[Any]:
        """Make a handle of an id; `of` gives the queue and the type of the result."""
        if of is not None:
            return TaskHandle(task_id, queue or of.plan.queue, self, of.result_codec)
        return TaskHandle(task_id, queue or DEFAULT_QUEUE, self)

    async def task_info(self, task_id: str, queue: str) -> TaskInfo:
        """Return what Redis holds of a task.

        Raises:
            TaskNotFoundError: it is not there, or not any more.
            MalformedMessageError: its bytes are no message, or its state is none of Asynq's.
            BrokerError: Redis refused, or could not be reached.
        """
        stored = await find_task(self._broker, queue, task_id)
        if stored is None:
            raise TaskNotFoundError(task_id, queue, "it may be done, and nothing of it was kept")
        return _info(stored)

    async def wait_result(self, task_id: str, queue: str, timeout_s: float | None) -> bytes:
        """Wait until a task has ended and return its result; see `TaskHandle.result`."""
        ended = await self._ends.look(task_id, queue)  # also for a timeout of 0
        if ended is not None:
            return ended
        async with asyncio.timeout(timeout_s):
            return await self._ends.wait(task_id, queue)

    async def cancel(self, task_id: str, queue: str, retry: bool) -> None:
        """Cancel a running task, wherever it runs; see `TaskHandle.cancel`."""
        await self._broker.cancel(task_id, retry=retry)


_END: Final = 2**48 - 1  # what stands behind the last hyphen of a UUID

_drawn: Final[deque[tuple[str, int]]] = deque()  # begins and ends of ids; threads share it
os.register_at_fork(after_in_child=_drawn.clear)  # else a child would have its parent's


def _new_id() -> str:
    """Return a UUID v4; `uuid.uuid4` takes more than twice as long.

    The time is mixed in, so that processes restored from one snapshot do not make the same ids.
    """
    try:
        begin, end = _drawn.popleft()
    except IndexError:
        (begin, end), *others = _draw()
        _drawn.extend(others)
    return "%s%012x" % (begin, end ^ time.time_ns() & _END)  # noqa: UP031 - a third of an f-string's time


def _draw() -> list[tuple[str, int]]:
    """Begin 64 ids at once: after a rest, the kernel takes 20 µs for one, and writing it 30."""
    ids: list[tuple[str, int]] = []
    drawn = os.urandom(64 * 16).hex()
    for i in range(0, len(drawn), 32):
        h = drawn[i : i + 32]
        variant = "89ab"[int(h[16], 16) & 3]
        ids.append((f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{variant}{h[17:20]}-", int(h[20:], 16)))
    return ids


def _digest(payload: bytes | None, unique_key: str | None) -> str:
    """What stands for the payload in a lock: Asynq's MD5, nothing for nil, or the caller's key."""
    if unique_key is not None:
        return unique_key
    return "" if payload is None else hashlib.md5(payload, usedforsecurity=False).hexdigest()


def _wrap(middleware: EnqueueMiddleware, following: EnqueueNext) -> EnqueueNext:
    return lambda task: middleware(task, following)


def _ours(result: TaskHandle[Any] | BaseException) -> TaskHandle[Any] | AsyncqError:
    if isinstance(result, BaseException) and not isinstance(result, AsyncqError):
        raise result
    return result


async def _chunks(
    tasks: Iterable[Task[Any]] | AsyncIterable[Task[Any]],
) -> AsyncIterator[list[Task[Any]]]:
    chunk: list[Task[Any]] = []
    if isinstance(tasks, AsyncIterable):
        async for task in tasks:
            chunk.append(task)
            if len(chunk) == BATCH:
                yield chunk
                chunk = []
    else:
        for task in tasks:
            chunk.append(task)
            if len(chunk) == BATCH:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _info(stored: StoredTask) -> TaskInfo:
    message = stored.message
    try:
        state = TaskState(stored.state)
    except ValueError:
        raise MalformedMessageError(
            f"task {message.id!r} of queue {message.queue!r} is in a state that there is not: "
            f"{stored.state!r}"
        ) from None
    return TaskInfo(
        id=message.id,
        queue=message.queue,
        type=message.type,
        payload=message.payload or None,
        state=state,
        max_retry=message.retry,
        retried=message.retried,
        last_error=message.error_msg,
        last_failed_at=from_unix(message.last_failed_at) if message.last_failed_at else None,
        timeout=timedelta(seconds=message.timeout) if message.timeout else None,
        deadline=from_unix(message.deadline) if message.deadline else None,
        group=message.group_key or None,
        next_process_at=None if stored.next_at is None else from_unix(stored.next_at),
        retention=timedelta(seconds=message.retention),
        completed_at=from_unix(message.completed_at) if message.completed_at else None,
        result=stored.result,
        headers=dict(message.headers),
        progress=_progress(stored.progress),
    )


def _progress(raw: bytes | None) -> Progress | None:
    if raw is None:
        return None
    try:
        fraction, note = json.loads(raw)
        return Progress(float(fraction), str(note))
    except (ValueError, TypeError):
        return None
