"""Several worker processes under one parent, which starts, restarts and stops them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Command", "WorkerPool", "report_ready"]

log = logging.getLogger("asyncq.pool")

Command = Callable[[int, int], Sequence[str]]
"""(number of the process, its line to the parent) -> the command that runs it."""

RESTART_DELAY_S: Final = 0.5
"""Before a process that died starts again; doubled each time, shortened by up to half."""

LONGEST_DELAY_S: Final = 30.0
SETTLED_S: Final = 60.0
"""A process that lived so long starts again after the first delay."""

KILL_GRACE_S: Final = 5.0
"""Beyond the shutdown timeout: a server puts tasks back, saves outcomes and closes lifespans."""

FAILED: Final = 1
WRONG_USAGE: Final = 2  # another start would only end in the same way

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


def report_ready(line: int) -> None:
    """Tell the parent that this process has what it needs, and handles signals."""
    try:
        os.write(line, b"r")
    except OSError:  # the parent is gone; that the line has ended tells the rest
        pass


class WorkerPool:
    """Keeps `count` worker processes alive until a signal, or until a burst is over.

    `command` makes what is run. Its process inherits a line, a file descriptor: it calls
    `report_ready` on it, and shuts down when it reads the end of it, for then the parent is gone,
    by kill -9 too. The first process goes ahead, so that one which cannot work says so once and
    not `count` times.

    After SIGTERM or SIGINT the processes have `shutdown_timeout_s` and `kill_grace_s` (5) seconds
    to end. One that died starts again after `restart_delay_s` (0.5) seconds, doubling up to 30
    until one lived for `settled_s` (60) seconds; in a `burst` only if a signal killed it.
    """

    def __init__(
        self,
        command: Command,
        count: int,
        *,
        shutdown_timeout_s: float,
        burst: bool = False,
        restart_delay_s: float = RESTART_DELAY_S,
        settled_s: float = SETTLED_S,
        kill_grace_s: float = KILL_GRACE_S,
    ) -> None:
        self._command = command
        self._count = count
        self._stop_within_s = shutdown_timeout_s + kill_grace_s
        self._burst = burst
        self._restart_delay_s = restart_delay_s
        self._settled_s = settled_s
        self._children: dict[int, _Child] = {}
        self._first_known = asyncio.Event()  # it works, or it does not and the pool stops
        self._proven = False
        self._quiet = False
        self._stopping = asyncio.Event()
        self._code = 0

    async def run(self) -> int:
        """Run to the end and return the exit code.

        That is 0 if the processes ended in order, 2 if the first one was started wrongly, and 1
        if one failed at the end or had to be killed.
        """
        loop = asyncio.get_running_loop()
        for number in STOPPING:
            loop.add_signal_handler(number, self._on_stopping, number)
        loop.add_signal_handler(signal.SIGTSTP, self._on_quiet)
        try:
            await asyncio.gather(*(self._keep(number + 1) for number in range(self._count)))
        finally:
            for number in (*STOPPING, signal.SIGTSTP):
                loop.remove_signal_handler(number)
        return self._code

    def stop(self) -> None:
        """Let no process take new tasks, and start none."""
        self._quiet = True
        for child in self._children.values():
            child.quiet()

    def request_shutdown(self) -> None:
        """Let the processes shut down; called again, their handlers lose the rest of their time."""
        if not self._stopping.is_set():
            asyncio.get_running_loop().call_later(self._stop_within_s, self._kill_late)
        self._end()
        for child in self._children.values():
            child.send(signal.SIGTERM)

    # One process

    async def _keep(self, number: int) -> None:
        if number > 1:
            await self._first_known.wait()
        delay_s = self._restart_delay_s
        while await self._may_start():
            started_at = time.monotonic()
            try:
                child = await self._start(number)
            except OSError as error:  # no memory, too many processes or files
                log.error("process %d cannot be started: %s", number, error)
            else:
                code = await child.process.wait()
                self._buried(child)
                if self._is_over(child, code):
                    return
            if time.monotonic() - started_at >= self._settled_s:
                delay_s = self._restart_delay_s
            await self._pause(number, delay_s * random.uniform(0.5, 1))
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)

    async def _may_start(self) -> bool:
        if self._quiet:  # it would take tasks before it could be told not to
            await self._stopping.wait()
        return not self._stopping.is_set()

    async def _start(self, number: int) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command(number, theirs.fileno()),
                    stdin=DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    # Ctrl-C goes to all processes of a session's foreground; a worker that got it
                    # from the terminal and from here would take the second as an order to hurry.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._children[number] = child = _Child(number, process, ours)
        asyncio.get_running_loop().add_reader(ours, self._on_line, child)
        log.info("%s is started", child)
        if self._stopping.is_set():  # meanwhile
            child.send(signal.SIGTERM)
        elif self._quiet:
            child.quiet()
        return child

    def _on_line(self, child: _Child) -> None:
        asyncio.get_running_loop().remove_reader(child.line)
        if child.line.recv(1):
            child.ready = True
            self._prove()

    def _prove(self) -> None:
        self._proven = True
        self._first_known.set()

    def _buried(self, child: _Child) -> None:
        asyncio.get_running_loop().remove_reader(child.line)
        child.line.close()
        del self._children[child.number]

    def _is_over(self, child: _Child, code: int) -> bool:
        """Say how a process ended, and tell whether that is its end for good."""
        stopping = self._stopping.is_set()
        # SIGTERM kills one that has not begun to handle signals, or has done so already.
        in_order = code == 0 or (stopping and code == -signal.SIGTERM)
        log.log(logging.INFO if in_order else logging.ERROR, "%s %s", child, _ending(code))
        if code == 0:
            self._prove()  # even if its end was heard before its line
        hopeless = code == WRONG_USAGE and not self._proven
        if not (stopping or hopeless or (self._burst and code >= 0)):
            return False
        if not in_order:
            self._code = WRONG_USAGE if hopeless else FAILED
        if not self._proven:
            self._end()
        return True

    async def _pause(self, number: int, pause_s: float) -> None:
        if self._quiet:
            log.warning("process %d does not start again: no new tasks are wanted", number)
            return
        log.warning("process %d starts again in %.1f s", number, pause_s)
        try:
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
        except TimeoutError:
            pass

    # All of them

    def _on_stopping(self, number: signal.Signals) -> None:
        log.info("%s: %d processes shut down", number.name, len(self._children))
        self.request_shutdown()

    def _on_quiet(self) -> None:
        log.info("SIGTSTP: no new tasks are taken; send SIGTERM to shut down")
        self.stop()

    def _end(self) -> None:
        self._stopping.set()
        self._first_known.set()

    def _kill_late(self) -> None:
        for child in self._children.values():
            log.error("%s did not end within %g s: it is killed", child, self._stop_within_s)
            child.send(signal.SIGKILL)


@dataclass(eq=False, slots=True)
class _Child:
    """One process, from its start to its end."""

    number: int
    process: Process
    line: socket.socket
    ready: bool = False

    def __str__(self) -> str:
        return f"process {self.number} (pid {self.process.pid})"

    def send(self, number: signal.Signals) -> None:
        # Not by `Process.send_signal`: up to Python 3.12 it may take the exit code away from
        # the thread that waits for it, which then reports 255.
        if self.process.returncode is None:
            try:
                os.kill(self.process.pid, number)
            except ProcessLookupError:
                pass

    def quiet(self) -> None:
        """Let it take no new tasks; one that does not handle signals yet would freeze: it ends."""
        self.send(signal.SIGTSTP if self.ready else signal.SIGTERM)


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"
