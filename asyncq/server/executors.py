"""Runs plain `def` handlers outside the event loop: in worker threads or in child processes."""

from __future__ import annotations

import os
from contextvars import copy_context
from functools import partial
from typing import Any

from asyncq.handler import Entry
from asyncq.server.processes import Processes
from asyncq.server.threads import Threads

__all__ = ["Executors"]


class Executors:
    """The threads and child processes of a server, each made when it is first needed.

    Threads run at most `concurrency` handlers at a time, child processes at most `processes`
    (default: one for each core, but no more than `concurrency`); others wait for their turn.
    """

    def __init__(self, concurrency: int, *, processes: int | None = None) -> None:
        self._threads = Threads(concurrency, "asyncq-thread")
        self._processes = Processes(processes or min(concurrency, os.cpu_count() or 1))

    async def run(self, entry: Entry, arguments: tuple[Any, ...]) -> Any:
        """Call the function of `entry` and return what it returns, or raise what it raises.

        Cancelled, a process is killed with all processes that it started. A thread cannot be
        stopped: the cancellation is raised when it has returned, and wins over what it returned.

        Raises:
            ServerClosedError: these executors are closed.
            ProcessDiedError: the process died before the function returned.
            TypeError: the function cannot be found by its name in a child process, or an
                argument or the result cannot be pickled.
        """
        if entry.kind == "process":
            return await self._processes.run(entry.function, arguments)
        return await self._threads.run(partial(copy_context().run, entry.function, *arguments))

    async def close(self, *, wait: bool = True) -> None:
        """Refuse new calls and end the threads and processes; may be repeated.

        Calls under way are waited for. With `wait=False` their processes are killed, their
        threads left alone, and `run` raises at once; a thread that is stuck does not keep the
        interpreter from ending.
        """
        await self._threads.close(wait=wait)
        await self._processes.close(wait=wait)
