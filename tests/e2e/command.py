"""Runs `python -m asyncq` as a user does: a process of its own, its output, its exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parents[2]

END_WITHIN_S = 30.0
LOG_WITHIN_S = 15.0


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


async def run(*arguments: str, url: str, folder: Path, stdin: bytes = b"") -> Ended:
    """Run a command to its end."""
    process = await _start(arguments, url, folder, stdin=PIPE)
    try:
        async with asyncio.timeout(END_WITHIN_S):
            out, err = await process.communicate(stdin)
    except BaseException:
        process.kill()
        await process.communicate()
        raise
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


class Running:
    """A command that runs until it is stopped, for `async with`; killed when the block ends.

    `lines` is what it wrote so far, to stdout and stderr.
    """

    def __init__(self, *arguments: str, url: str, folder: Path) -> None:
        self._arguments = arguments
        self._url = url
        self._folder = folder
        self._changed = asyncio.Event()
        self._process: asyncio.subprocess.Process
        self._readers: list[asyncio.Task[None]]
        self._children: list[psutil.Process] = []
        self.lines: list[str] = []

    async def __aenter__(self) -> Self:
        self._process = process = await _start(
            self._arguments, self._url, self._folder, stdin=DEVNULL
        )
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(stream)) for stream in (process.stdout, process.stderr)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._note_children()
        if self._process.returncode is None:
            self._process.kill()
        for child in self._children:  # of --reload: its own session, and a test may fail
            with suppress(psutil.NoSuchProcess):
                child.kill()
        await self.ended()

    @property
    def log(self) -> str:
        """All that it wrote."""
        return "\n".join(self.lines)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self._note_children()
        self._process.send_signal(number)

    async def logged(self, text: str, times: int = 1) -> None:
        """Wait until so many lines have held `text`."""
        try:
            async with asyncio.timeout(LOG_WITHIN_S):
                while sum(text in line for line in self.lines) < times:
                    assert not all(reader.done() for reader in self._readers), "it has ended"
                    self._changed.clear()
                    await self._changed.wait()
        except (TimeoutError, AssertionError) as error:
            raise AssertionError(f"{text!r} was not logged: {self.log}") from error

    async def ended(self) -> int:
        """Wait for the end of its output, and of the process, and return the exit code.

        What it started shares its output, so with `--reload` the worker has ended by then, too.
        """
        async with asyncio.timeout(END_WITHIN_S):
            await asyncio.gather(*self._readers)
            return await self._process.wait()

    def _note_children(self) -> None:
        """Remember them while their parent lives: nobody could find them afterwards."""
        with suppress(psutil.NoSuchProcess):
            self._children += psutil.Process(self._process.pid).children(recursive=True)

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self.lines.append(line.decode().rstrip("\n"))
            self._changed.set()
        self._changed.set()


async def _start(
    arguments: tuple[str, ...], url: str, folder: Path, *, stdin: int
) -> asyncio.subprocess.Process:
    settings = {name: value for name, value in os.environ.items() if "ASYNCQ_" not in name}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "asyncq", *arguments),
        cwd=folder,
        env={**settings, "ASYNCQ_REDIS_URL": url, "PYTHONPATH": str(ROOT)},
        stdin=stdin,
        stdout=PIPE,
        stderr=PIPE,
    )
