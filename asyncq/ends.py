"""Waits for the ends of tasks, and says what they ended with."""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

from asyncq.broker.broker import BATCH, Broker
from asyncq.broker.connection import Answer
from asyncq.broker.events import Listener
from asyncq.broker.keys import queue_keys
from asyncq.errors import (
    AsyncqError,
    BrokerError,
    BrokerUnavailableError,
    MalformedMessageError,
    TaskFailedError,
    TaskNotFoundError,
)
from asyncq.message import decode

READ_AGAIN_S: Final = 5.0


class Ends:
    """Waits for the ends of tasks without polling: Redis tells when a task's hash changes."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiters: dict[tuple[str, str], set[asyncio.Future[bytes]]] = {}
        self._keys: dict[str, tuple[str, str]] = {}  # key of the hash → (queue, task id)
        self._to_read: set[str] = set()
        self._changed = asyncio.Event()
        self._listener = Listener(broker.pool, self._on_change)
        self._running: asyncio.Task[None] | None = None

    async def look(self, task_id: str, queue: str) -> bytes | None:
        """Return the result of a task, `None` if it has not ended; raises as `wait` does."""
        fields = ["HMGET", queue_keys(queue).task(task_id), "state", "msg", "result"]
        (answer,) = await self._broker.pool.ask(fields)
        ended = _end(task_id, queue, *answer, was_there=False)
        if isinstance(ended, AsyncqError):
            raise ended
        return ended

    async def wait(self, task_id: str, queue: str) -> bytes:
        """Return the result of a task that `look` found unended, once it has one.

        Raises as `TaskHandle.result` does.
        """
        if self._running is None:
            self._running = asyncio.create_task(self._run())
            self._running.add_done_callback(self._stopped)
        key = queue_keys(queue).task(task_id)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._keys[key] = (queue, task_id)
        waiters = self._waiters.setdefault((queue, task_id), set())
        waiters.add(future)
        self._on_change(key)
        try:
            return await future
        finally:
            waiters.discard(future)
            if not waiters:
                self._forget(key)

    async def close(self) -> None:
        """Stop listening."""
        if self._running is not None:
            running = self._running
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listener.run())
            group.create_task(self._read_changed())

    def _on_change(self, key: str | None) -> None:
        if key is None:
            self._to_read |= self._keys.keys()
        elif key in self._keys:
            self._to_read.add(key)
        self._changed.set()

    async def _read_changed(self) -> None:
        """Read what changed, many tasks in one write."""
        while True:
            await self._listener.connected.wait()
            try:
                async with asyncio.timeout(READ_AGAIN_S):
                    await self._changed.wait()
            except TimeoutError:  # a connection that died without a word tells nothing either
                self._to_read |= self._keys.keys()
            self._changed.clear()
            keys = [key for key in self._to_read if key in self._keys][:BATCH]
            self._to_read -= set(keys)
            if not keys:
                self._to_read.clear()
                continue
            self._changed.set()  # there may be more
            try:
                answers = await self._listener.read(
                    *(["HMGET", key, "state", "msg", "result"] for key in keys)
                )
            except BrokerUnavailableError:
                self._to_read |= set(keys)
                await asyncio.sleep(0.02)  # the listener finds the connection lost
                continue
            for key, answer in zip(keys, answers, strict=True):
                self._settle(key, answer)

    def _settle(self, key: str, answer: Answer) -> None:
        if key not in self._keys:
            return  # nobody waits any more
        queue, task_id = self._keys[key]
        ended = (
            answer
            if isinstance(answer, BrokerError)
            else _end(task_id, queue, *answer, was_there=True)
        )
        if ended is None:
            return
        for future in self._waiters[queue, task_id]:
            if future.done():
                continue
            if isinstance(ended, AsyncqError):
                future.set_exception(ended)
            else:
                future.set_result(ended)

    def _forget(self, key: str) -> None:
        del self._waiters[self._keys.pop(key)]

    def _stopped(self, running: asyncio.Task[None]) -> None:
        """Redis does not let us listen, or the client is closed: whoever waits is told why."""
        self._running = None
        error = None if running.cancelled() else _first_cause(running.exception())
        for waiters in self._waiters.values():
            for future in waiters:
                if not future.done():
                    future.set_exception(error or AsyncqError("the client was closed"))


def _first_cause(error: Any) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        error = cast(BaseExceptionGroup[BaseException], error).exceptions[0]
    return cast(BaseException | None, error)


def _end(
    task_id: str,
    queue: str,
    state: bytes | None,
    raw: bytes | None,
    result: bytes | None,
    *,
    was_there: bool,
) -> bytes | AsyncqError | None:
    """Return the result of a task, or why there will be none; `None`: it has not ended."""
    if raw is None:
        if was_there:
            return TaskFailedError(task_id, queue, "it was revoked or deleted")
        return TaskNotFoundError(task_id, queue, "it may be done, and nothing of it was kept")
    if state == b"completed":
        return result or b""
    try:
        message = decode(task_id, queue, raw)
    except MalformedMessageError as error:
        return TaskFailedError(task_id, queue, str(error))
    if state == b"archived":
        return TaskFailedError(task_id, queue, message.error_msg or "archived")
    if not message.retention:
        return TaskNotFoundError(
            task_id, queue, "it keeps no result to wait for; enqueue it with retention=..."
        )
    return None
