"""`worker --reload`: runs the worker as a child process, and again when a Python file changes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from asyncq import OptionError

__all__ = ["PARENT_PIPE", "end_with_parent", "run"]

log = logging.getLogger("asyncq.reload")

RELOAD: Final = "--reload"
PARENT_PIPE: Final = "--parent-pipe"
"""The option of a child process: a pipe that closes when its parent is gone."""

FILES_NAMED: Final = 3

STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(directory: Path) -> int:
    """Run this very command without `--reload`, until a signal, and return its exit code.

    Raises:
        OptionError: watchfiles is not installed.
    """
    if find_spec("watchfiles") is None:
        raise OptionError("--reload needs watchfiles: pip install 'asyncq[reload]'")
    # As it was started: the interpreter's own options, and a script or -m.
    command = [sys.executable, *(part for part in sys.orig_argv[1:] if part != RELOAD)]
    return asyncio.run(Reloader(command, directory).run())


def end_with_parent(pipe: int) -> None:
    """Shut down when the other end of `pipe` closes: a parent may die without a word."""
    loop = asyncio.get_running_loop()

    def closed() -> None:
        loop.remove_reader(pipe)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(pipe, closed)


class Reloader:
    """Runs `command` as a child, and ends and starts it again after changes below `directory`."""

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        self._command = command
        self._directory = directory
        self._stopping = asyncio.Event()
        self._child: asyncio.subprocess.Process | None = None
        self._pipe = os.pipe()

    async def run(self) -> int:
        """Run until a signal, and return the exit code of the last child, 0 if it was killed."""
        loop = asyncio.get_running_loop()
        for number in STOPPING:
            loop.add_signal_handler(number, self._stop)
        log.info("watching the Python files below %s", self._directory)
        changes = self._changes()
        while True:
            # Before the child reads its files: it sees a change, or the change starts it again.
            change = asyncio.create_task(_next(changes))
            self._child = await self._start()
            ended = asyncio.create_task(self._child.wait())
            await asyncio.wait({change, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not self._stopping.is_set():
                log.warning(
                    "the worker ended with exit code %d, a change starts it again", ended.result()
                )
            if files := await change:
                log.info("%s changed: the worker starts again", files)
            self._terminate()
            code = await ended
            if not files or self._stopping.is_set():
                return max(code, 0)

    async def _start(self) -> asyncio.subprocess.Process:
        read, _ = self._pipe
        return await asyncio.create_subprocess_exec(
            *self._command,
            *(PARENT_PIPE, str(read)),
            pass_fds=(read,),
            # Ctrl-C goes to all processes of a session's foreground; a worker that got it from
            # the terminal and from here would take the second as an order to hurry.
            start_new_session=True,
        )

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._terminate()  # a second signal: the worker is told to hurry, too
        self._stopping.set()

    def _terminate(self) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.terminate()

    async def _changes(self) -> AsyncIterator[str]:
        # Its type names trio, which is not installed.
        from watchfiles import PythonFilter, awatch  # pyright: ignore[reportUnknownVariableType]

        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts changes at info
        watching = awatch(self._directory, watch_filter=PythonFilter(), stop_event=self._stopping)
        async for changes in watching:
            yield _named([path for _, path in changes], self._directory)


def _named(files: Iterable[str], directory: Path) -> str:
    names = sorted({os.path.relpath(file, directory) for file in files})
    return ", ".join(names[:FILES_NAMED]) + (" ..." if len(names) > FILES_NAMED else "")


async def _next(changes: AsyncIterator[str]) -> str:
    """The next change, empty at the end; a coroutine, since a task does not take `anext` itself."""
    return await anext(changes, "")
