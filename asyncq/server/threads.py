"""Worker threads for an event loop, which outlive neither their use nor the interpreter."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from asyncq.errors import ServerClosedError

__all__ = ["Threads"]


class _Job:
    __slots__ = ("call", "error", "result", "state", "waiter")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.result: Any = None
        self.error: BaseException | None = None
        self.state = "running"
        self.waiter: asyncio.Future[None] | None = None

    def end(self, state: str) -> None:
        self.state = state
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Threads:
    """At most `limit` daemon threads for one event loop, kept for the next call.

    Those of concurrent.futures and of anyio are joined when the interpreter ends, so that one
    stuck handler would keep it alive; anyio's also do not wait through `Task.cancel`. With 100
    calls at a time these make three to four times as many a second as asyncio.to_thread.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._name = name
        self._places = asyncio.Semaphore(limit)
        self._threads = 0
        self._running: set[_Job] = set()
        self._quiet = asyncio.Event()  # nothing is running
        self._quiet.set()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop
        self._todo: SimpleQueue[_Job | None] = SimpleQueue()
        self._ended: deque[_Job] = deque()
        self._told = False  # the loop is about to look at what has ended

    async def run(self, call: Callable[[], Any], stop: Callable[[], None] | None = None) -> Any:
        """Run `call` in a thread; `stop` is called, on the loop, when this is cancelled."""
        async with self._places:
            if self._closed:
                raise ServerClosedError("the server is closed: its executors take no more calls")
            job = _Job(call)
            self._start(job)
            cancelled: asyncio.CancelledError | None = None
            while job.state == "running":
                job.waiter = self._loop.create_future()
                try:
                    await job.waiter
                except asyncio.CancelledError as error:
                    if cancelled is None:
                        cancelled = error
                        if stop is not None:
                            stop()
            try:
                if cancelled is not None:
                    raise cancelled
                if job.state == "abandoned":
                    raise ServerClosedError("the server closed while the handler was running")
                if job.error is not None:
                    raise job.error
                return job.result
            finally:
                del job, cancelled  # the traceback holds this frame: no cycle through it

    async def close(self, *, wait: bool) -> None:
        self._closed = True
        if wait:
            await self._quiet.wait()
        for job in self._running:
            job.end("abandoned")
        for _ in range(self._threads):
            self._todo.put(None)
        self._threads = 0

    def _start(self, job: _Job) -> None:
        if len(self._running) == self._threads:
            self._loop = asyncio.get_running_loop()
            name = f"{self._name}-{self._threads + 1}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
            self._threads += 1
        self._running.add(job)
        self._quiet.clear()
        self._todo.put(job)

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            try:
                job.result = job.call()
            except BaseException as error:
                job.error = error
            self._ended.append(job)
            del job  # an idle thread keeps nothing of its last call alive
            # One wake-up of the loop for all that end before it looks. It clears the mark before
            # it looks, and the job is in the queue before the mark is read: none is overlooked.
            if not self._told:
                self._told = True
                try:
                    self._loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:
                    return  # the loop is closed: the server left this thread behind

    def _deliver(self) -> None:
        self._told = False
        while self._ended:
            job = self._ended.popleft()
            self._running.discard(job)
            job.end("ended")
        if not self._running:
            self._quiet.set()
