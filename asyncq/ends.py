"""Waits for the ends of tasks, and says what they ended with."""

from __future__ import annotations

import asyncio
from typing import Any

from asyncq.broker.broker import BATCH, Broker
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


class Ends:
    """Waits for the ends of tasks without polling: Redis tells when a task's hash changes."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._waiters: dict[tuple[str, str], set[asyncio.Future[bytes]]] = {}
        self._keys: dict[str, tuple[str, str]] = {}  # key of the hash → (queue, task id)
        self._seen: set[str] = set()  # keys that were there when they were read
        self._to_read: set[str] = set()
        self._changed = asyncio.Event()
        self._listener = Listener(broker.pool, self._on_change)
        self._running: asyncio.Future[Any] | None = None

    async def look(self, task_id: str, queue: str) -> bytes | None:
        """Return the result of a task, `None` if it has not ended; raises as `wait` does."""
        fields = ["HMGET", queue_keys(queue).task(task_id), "state", "msg", "result"]
        (answer,) = await self._broker.pool.call(fields)
        if isinstance(answer, BrokerError):
            raise answer
        ended = _end(task_id, queue, *answer, was_there=False)
        if isinstance(ended, AsyncqError):
            raise ended
        return ended

    async def wait(self, task_id: str, queue: str) -> bytes:
        """Return the result of a task once it has one; raises as `TaskHandle.result` does."""
        if self._running is None:
            self._running = asyncio.gather(self._listener.run(), self._read_changed())
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
            running, self._running = self._running, None
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

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
            await self._changed.wait()
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
            for key, (state, raw, result) in zip(keys, answers, strict=True):
                self._settle(key, state, raw, result)

    def _settle(
        self, key: str, state: bytes | None, raw: bytes | None, result: bytes | None
    ) -> None:
        if key not in self._keys:
            return  # nobody waits any more
        queue, task_id = self._keys[key]
        ended = _end(task_id, queue, state, raw, result, was_there=key in self._seen)
        self._seen.add(key)
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
        self._seen.discard(key)

    def _stopped(self, running: asyncio.Future[Any]) -> None:
        """Redis does not let us listen: whoever waits is told why."""
        self._running = None
        error = None if running.cancelled() else running.exception()
        for waiters in self._waiters.values():
            for future in waiters:
                if not future.done():
                    future.set_exception(error or AsyncqError("the client was closed"))


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
