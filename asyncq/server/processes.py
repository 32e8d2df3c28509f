"""Child processes that run handlers, as the server sees them; `child` is their own side."""

from __future__ import annotations

import asyncio
import atexit
import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any, Final, Literal

from asyncq.context import Context, Run, current
from asyncq.errors import AsyncqError, ProcessDiedError
from asyncq.handler import name_of
from asyncq.server.child import ContextGoesHere, Request, find, portable, serve
from asyncq.server.threads import Threads

__all__ = ["Processes"]

END_S: Final = 1.0
"""How long a child that is done may take to end by itself before it is killed."""


class Processes:
    """At most `limit` child processes, kept for the next call.

    anyio.to_process has no way back for progress while a call runs, and sends what a handler
    logs to /dev/null; concurrent.futures cannot kill one call without breaking its whole pool.
    """

    def __init__(self, limit: int) -> None:
        # Each call holds a thread, which talks to the child: that is all that limits children.
        self._threads = Threads(limit, "asyncq-process")
        self._calls: set[_Call] = set()
        self._idle: list[_Child] = []

    async def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        call = _Call(function, arguments, self._idle)
        self._calls.add(call)
        try:
            return await self._threads.run(call, stop=call.kill)
        finally:
            self._calls.discard(call)

    async def close(self, *, wait: bool) -> None:
        if not wait:
            for call in self._calls:
                call.kill()
        await self._threads.close(wait=wait)
        children, self._idle[:] = self._idle[:], []
        if children:
            await asyncio.to_thread(_end_all, children)


class _Call:
    """One call of a handler in a child, made in a thread, killed from the loop."""

    def __init__(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], idle: list[_Child]
    ) -> None:
        self._function = function
        self._name = name_of(function)
        self._arguments = arguments
        context = current.get(None)
        self._run: Run | None = (
            None if context is None else context._run  # pyright: ignore[reportPrivateUsage]
        )
        self._idle = idle
        self._lock = threading.Lock()  # a kill must not hit a child that has the next call already
        self._child: _Child | None = None
        self._killed = False

    def kill(self) -> None:
        with self._lock:
            self._killed = True
            if self._child is not None:
                self._child.kill()

    def __call__(self) -> Any:
        request = self._request()
        while (answer := self._send(self._take(), request)) is None:
            pass  # that child had died before it got the request: another one is as good
        kind, value = answer
        if kind == "error":
            raise pickle.loads(value)
        return value

    def _send(self, child: _Child, request: bytes) -> tuple[str, Any] | None:
        with self._lock:
            self._child = child
            if self._killed:  # meanwhile
                child.kill()
        usable = False
        try:
            answer = child.call(request, self._run)
            usable = True
            return answer
        except (EOFError, OSError):
            if child.phase == "idle" and not self._killed:
                return None
            raise ProcessDiedError(self._name, child.phase, child.bury()) from None
        finally:
            with self._lock:
                self._child = None
                usable = usable and not self._killed
                if usable:
                    self._idle.append(child)
            if not usable:
                child.end()

    def _request(self) -> bytes:
        run, module, qualname = self._run, self._function.__module__, self._function.__qualname__
        if inspect.unwrap(find(module, qualname)) is not inspect.unwrap(self._function):
            raise TypeError(
                f"handler {self._name} cannot run in another process, which imports it by its "
                "name: this name means something else now"
            )
        request = Request(
            module,
            qualname,
            tuple(ContextGoesHere if isinstance(a, Context) else a for a in self._arguments),
            None if run is None else run.message.SerializeToString(),
            0.0 if run is None else run.deadline_at,
        )
        try:
            return pickle.dumps(request)
        except Exception as error:
            raise TypeError(
                f"what handler {self._name} takes cannot be sent to its process: {error}"
            ) from error

    def _take(self) -> _Child:
        try:
            return self._idle.pop()
        except IndexError:
            return _Child()


class _Child:
    """A child process that runs one handler at a time."""

    def __init__(self) -> None:
        # Never fork: the child would have copies of the event loop and of its connections.
        spawn = multiprocessing.get_context("spawn")
        self._channel, theirs = spawn.Pipe()
        # A daemon could not start processes of its own. Since one that is none is waited for when
        # the interpreter ends, and without end if its handler is stuck, it is killed before.
        self._process = spawn.Process(
            target=serve, args=(theirs, _levels()), name="asyncq-process", daemon=False
        )
        self._process.start()
        theirs.close()
        self.phase: Literal["starting", "idle", "running"] = "starting"
        atexit.register(self.kill)

    def call(self, request: bytes, run: Run | None) -> tuple[str, Any]:
        """Return what the call ended with; raises EOFError or OSError when the child is gone."""
        self._channel.send_bytes(request)
        while True:
            kind, value = self._channel.recv()
            match kind:
                case "begun":
                    self.phase = "running"
                case "log":
                    _log(value)
                case "report":
                    self._channel.send_bytes(_report(run, *value))
                case _:
                    self.phase = "idle"
                    return kind, value

    def kill(self) -> None:
        """Kill the process and those that it started."""
        if self._process.is_alive():  # its number may be another's else
            self._kill_group()

    def leave(self) -> None:
        """Let the process end."""
        self._channel.close()

    def end(self) -> int | None:
        """Let the process end, or else kill it, and return its exit code; may be repeated."""
        self.leave()
        self._process.join(END_S)
        self.kill()
        self._process.join()
        atexit.unregister(self.kill)
        return self._process.exitcode

    def bury(self) -> int | None:
        """Kill what the process started, which died this instant, and return its exit code."""
        self._kill_group()  # nobody has waited for it yet, so its number is still its own
        return self.end()

    def _kill_group(self) -> None:
        assert self._process.pid is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has no group of its own yet
            self._process.kill()


def _end_all(children: list[_Child]) -> None:
    for child in children:
        child.leave()
    for child in children:
        child.end()


def _report(run: Run | None, name: str, arguments: tuple[Any, ...]) -> bytes:
    """Do what a child asks for, and return the error or None, pickled."""
    try:
        if run is None:
            raise AsyncqError("this call has no run to report to")
        run.sync_call(run.write_result if name == "result" else run.write_progress, *arguments)
    except BaseException as error:
        return portable(error)
    return pickle.dumps(None)


def _levels() -> dict[str, int]:
    loggers = logging.root.manager.loggerDict.items()
    levels = {name: one.level for name, one in loggers if isinstance(one, logging.Logger)}
    return {name: level for name, level in levels.items() if level} | {"": logging.root.level}


def _log(record: logging.LogRecord) -> None:
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
