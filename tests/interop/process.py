"""A program that runs tasks in a process of its own, Go or Python, and says so in JSON lines."""

from __future__ import annotations

import asyncio
import json
import signal
from abc import ABC, abstractmethod
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import psutil

# A line holds a whole payload in base64, several times the limit of asyncio's streams.
MAX_LINE_BYTES = 64 * 1024 * 1024

T = TypeVar("T")


class ServerProcessError(RuntimeError):
    """A server process is gone, ended with an error, or was not started."""


@dataclass(frozen=True, slots=True)
class TaskEvent:
    """One start or end of a task; `err` is empty for success."""

    event: Literal["start", "end"]
    id: str
    at_ns: int
    type: str = ""
    queue: str = ""
    retry_count: int = 0
    max_retry: int = 0
    payload: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    deadline_unix: float = 0
    err: str = ""


def read_record(shape: type[T], raw: Mapping[str, Any]) -> T:
    """Make a record of a JSON object, whose `*_b64` members are bytes (null: empty)."""
    return shape(
        **{
            name.removesuffix("_b64"): b64decode(value or "") if name.endswith("_b64") else value
            for name, value in raw.items()
        }
    )


def json_line(value: Mapping[str, object]) -> str:
    """Return a value as a line; é stays é, since Go keeps escapes as they come."""
    return json.dumps(value, ensure_ascii=False) + "\n"


class ServerProcess(ABC):
    """A server in a process of its own, for `async with`.

    `started` and `ended` collect what its handlers report. Leaving the block stops it gracefully,
    and kills it after an exception. It also ends when its stdin does, so none outlives its test.
    """

    name: str
    """What errors call it."""

    def __init__(self, shutdown_timeout_s: float) -> None:
        self.started: list[TaskEvent] = []
        self.ended: list[TaskEvent] = []
        self._shutdown_timeout_s = shutdown_timeout_s
        self._life: set[str] = set()
        self._errors: deque[str] = deque(maxlen=1000)
        self._changed = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []

    @abstractmethod
    async def spawn(self) -> asyncio.subprocess.Process:
        """Start the process, with pipes to all of its streams and lines up to MAX_LINE_BYTES."""

    @abstractmethod
    async def ready(self) -> None:
        """Wait until the server is registered and hears cancelations."""

    async def __aenter__(self) -> Self:
        self._process = await self.spawn()
        self._readers = [
            asyncio.create_task(self._read_events(), name=f"events of {self.name}"),
            asyncio.create_task(self._read_errors(), name=f"errors of {self.name}"),
        ]
        try:
            await self.ready()
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            await self.kill()
            return
        await self.stop()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._running.pid

    @property
    def returncode(self) -> int | None:
        """The exit code: None while it runs, 0 after a graceful end, -9 after `kill`."""
        return self._running.returncode

    @property
    def errors(self) -> str:
        """The last 1,000 lines of what the server logged."""
        return "\n".join(self._errors)

    def reached(self, stage: str) -> bool:
        """Whether the server has reported this stage of its life, such as "ready"."""
        return stage in self._life

    async def wait_for(self, condition: Callable[[], bool], timeout: float = 10.0) -> None:
        """Wait until `condition`, asked again after each event and each line logged, is true.

        Raises `TimeoutError` after `timeout` seconds, `ServerProcessError` if the server ends
        before.
        """
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    self._check_alive()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TimeoutError(
                f"not within {timeout} s: {self.name} saw {len(self.started)} starts and"
                f" {len(self.ended)} ends. It logged: {self.errors or 'nothing'}"
            ) from None

    async def wait_started(self, n: int, timeout: float = 10.0) -> list[TaskEvent]:
        """Wait until `n` starts were reported and return them all; raises as `wait_for`."""
        await self.wait_for(lambda: len(self.started) >= n, timeout)
        return list(self.started)

    async def wait_ended(self, n: int, timeout: float = 10.0) -> list[TaskEvent]:
        """Wait until `n` ends were reported and return them all; raises as `wait_for`.

        A server acknowledges a task after its handler has returned: the state in Redis may follow.
        """
        await self.wait_for(lambda: len(self.ended) >= n, timeout)
        return list(self.ended)

    def release(self, task_id: str, mode: str = "echo") -> None:
        """Let a `block` task go on in another mode; before its start counts, too."""
        stdin = self._running.stdin
        assert stdin is not None
        stdin.write(json_line({"release": task_id, "mode": mode}).encode())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: SIGSTOP and SIGCONT freeze and thaw, SIGTSTP means no new tasks."""
        self._running.send_signal(number)

    async def freeze(self) -> None:
        """Send SIGSTOP and wait until nothing in the process runs any more."""
        self.signal(signal.SIGSTOP)
        async with asyncio.timeout(10):
            # A signal is only under way when `kill` returns, and nothing tells of its arrival.
            while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def thaw(self) -> None:
        """Send SIGCONT: the process goes on as if no time had passed."""
        self.signal(signal.SIGCONT)

    async def stop(self) -> None:
        """Shut down gracefully (SIGTERM) and wait for the end; nothing if it has ended.

        Raises `ServerProcessError` if the server does not end in time or not with exit code 0.
        """
        if not self._readers:
            return
        if self._running.returncode is None:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # a stopped process does not hear SIGTERM
        await self.wait_gone()

    async def wait_gone(self) -> None:
        """Wait for the end of a server that was told to end; raises as `stop`."""
        try:
            # Besides the tasks, Asynq waits for an idle fetcher's sleep, 1.5 s by default.
            await asyncio.wait_for(self._running.wait(), self._shutdown_timeout_s + 10)
        except TimeoutError:
            await self.kill()
            raise ServerProcessError(f"{self.name} ignored SIGTERM: {self.errors}") from None
        await self._end()
        if self._running.returncode != 0:
            raise ServerProcessError(f"{self.name} ended with {self.returncode}: {self.errors}")

    async def kill(self) -> None:
        """Kill the process (SIGKILL) and wait for its end."""
        if self._running.returncode is None:
            self._running.kill()
        await self._end()

    async def _end(self) -> None:
        await asyncio.gather(*self._readers)
        await self._running.wait()
        self._readers = []
        if self._running.stdin is not None:
            self._running.stdin.close()

    async def _read_events(self) -> None:
        assert self._running.stdout is not None
        async for line in self._running.stdout:
            try:
                self._note(json.loads(line))
            except (ValueError, KeyError, TypeError):
                self._errors.append(f"stdout is no event: {line!r}")
            self._changed.set()
        self._life.add("gone")
        self._changed.set()

    def _note(self, raw: Mapping[str, Any]) -> None:
        match raw["event"]:
            case "start":
                self.started.append(read_record(TaskEvent, raw))
            case "end":
                self.ended.append(read_record(TaskEvent, raw))
            case other:
                self._life.add(other)

    async def _read_errors(self) -> None:
        assert self._running.stderr is not None
        async for line in self._running.stderr:
            self._errors.append(line.decode(errors="replace").rstrip())
            self._changed.set()

    def _check_alive(self) -> None:
        if self.reached("gone"):
            raise ServerProcessError(f"{self.name} is gone: {self.errors or 'it logged nothing'}")

    @property
    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise ServerProcessError(f"{self.name} was not started: use `async with`")
        return self._process
