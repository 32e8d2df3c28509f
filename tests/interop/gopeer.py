"""Drives `peer`, the real Go Asynq side of the interop tests.

This module builds the program of `go/` and talks to it in JSON lines; README.md beside it lists
what each side says. It knows nothing of asyncq.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Required, Self, TypedDict

from tests.interop.process import (
    MAX_LINE_BYTES,
    ServerProcess,
    ServerProcessError,
    json_line,
    read_record,
)

SOURCES = Path(__file__).parent / "go"
CACHE = Path(__file__).parents[2] / ".cache" / "interop"
# Where Go's own installer puts it; a CI job's PATH often lacks it.
GO_INSTALL_DIR = "/usr/local/go/bin"


class GoPeerError(RuntimeError):
    """The Go program could not be built, ended with an error, or refused a command.

    `code` is one of duplicate, conflict, queue_not_found, queue_not_empty, task_not_found, usage,
    other, or empty where no single command failed.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


# Build


def find_go() -> str | None:
    """Return the path of the Go command, or None where Go is not installed."""
    return shutil.which("go", path=os.pathsep.join([os.environ.get("PATH", ""), GO_INSTALL_DIR]))


@functools.cache
def build() -> Path:
    """Build the Go program, unless these very sources were built before, and return its path.

    Safe to call from several processes at once. Raises `GoPeerError` if Go is missing or the build
    fails.
    """
    binary = CACHE / f"peer-{_fingerprint()}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            _compile(binary)
    return binary


def _compile(binary: Path) -> None:
    go = find_go()
    if go is None:
        raise GoPeerError(f"Go is not installed: it is neither on PATH nor in {GO_INSTALL_DIR}")
    unfinished = binary.with_suffix(".tmp")
    done = subprocess.run(
        # No git stamp: git refuses to look into a checkout that belongs to another user.
        [go, "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", unfinished, "."],
        cwd=SOURCES,
        env=os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise GoPeerError(f"go build failed:\n{done.stderr}")
    for old in CACHE.glob("peer-*"):
        if old != unfinished:
            old.unlink()
    unfinished.replace(binary)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.go"), *SOURCES.glob("go.*")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def go_url(url: str) -> str:
    """Return a redis-py URL in the spelling Asynq understands (`unix://` is `redis-socket://`).

    Raises `ValueError` for a scheme that Asynq does not have.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "unix":
        return f"redis-socket://{rest}"
    if scheme in {"redis", "rediss", "redis-socket", "redis-sentinel"}:
        return url
    raise ValueError(f"Asynq has no {scheme}:// URLs; pass the socket as unix://PATH?db=N")


# Records: what the program answers


@dataclass(frozen=True, slots=True)
class Enqueued:
    """What became of one task; `error` and `code` are empty for success.

    `at_ns` is when Go's client was called, `done_ns` when it returned (Unix nanoseconds).
    """

    index: int
    id: str
    at_ns: int
    done_ns: int
    queue: str = ""
    state: str = ""
    error: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class UniqueAnswer:
    """The bytes `json.Marshal` wrote for a struct, and whether they took the lock."""

    index: int
    payload: bytes
    locked: bool
    id: str = ""
    error: str = ""
    code: str = ""


@dataclass(frozen=True, slots=True)
class GoTaskInfo:
    """Asynq's `TaskInfo`; instants are Unix seconds, None for none."""

    id: str
    queue: str
    type: str
    payload: bytes
    headers: dict[str, str]
    state: str
    max_retry: int
    retried: int
    last_err: str
    last_failed_at: float | None
    timeout_s: float
    deadline: float | None
    group: str
    next_process_at: float | None
    is_orphaned: bool
    retention_s: float
    completed_at: float | None
    result: bytes


@dataclass(frozen=True, slots=True)
class GoQueueInfo:
    """Asynq's `QueueInfo`; `processed` and `failed` are those of today (UTC)."""

    queue: str
    memory_usage: int
    latency_s: float
    size: int
    groups: int
    pending: int
    active: int
    scheduled: int
    retry: int
    archived: int
    completed: int
    aggregating: int
    processed: int
    failed: int
    processed_total: int
    failed_total: int
    paused: bool


@dataclass(frozen=True, slots=True)
class GoWorkerInfo:
    """A task that a server is working on; instants are Unix seconds."""

    task_id: str
    task_type: str
    payload: bytes
    queue: str
    started: float | None
    deadline: float | None


@dataclass(frozen=True, slots=True)
class GoServerInfo:
    """A running server, Go or not; `started` is Unix seconds."""

    id: str
    host: str
    pid: int
    concurrency: int
    queues: dict[str, int]
    strict_priority: bool
    started: float | None
    status: str
    active_workers: tuple[GoWorkerInfo, ...]


@dataclass(frozen=True, slots=True)
class GoDay:
    """The counters of one UTC day, `date` as YYYY-MM-DD."""

    date: str
    processed: int
    failed: int


# One call of the program


class GoTask(TypedDict, total=False):
    """A task for `go_enqueue`. Without `payload` and `payload_json` the payload is nil.

    `payload_json` is written as Go's encoding/json writes it: compact, `<`, `>` and `&` escaped,
    members in the order given.
    """

    type: Required[str]
    payload: bytes
    payload_json: object
    id: str
    queue: str
    max_retry: int
    timeout_s: float
    deadline_unix: float
    unique_s: float
    process_in_s: float
    process_at_unix: float
    retention_s: float
    group: str
    headers: dict[str, str]


async def go_enqueue(
    url: str,
    tasks: Iterable[GoTask],
    concurrency: int = 1,
    *,
    interval_s: float = 0.0,
    timeout: float = 60.0,
) -> list[Enqueued]:
    """Enqueue tasks with Go's client, `concurrency` at once, and return their fates in order.

    `interval_s` is a pause after each, for measuring single pickups. With `concurrency` 1 they
    enter Redis in the order given. Raises `GoPeerError` if Redis does not answer.
    """
    flags = [f"-concurrency={concurrency}", f"-interval={_duration(interval_s)}"]
    lines = await _call("enqueue", url, flags, map(_task_line, tasks), timeout)
    return sorted((read_record(Enqueued, line) for line in lines), key=lambda answer: answer.index)


def _task_line(task: GoTask) -> dict[str, Any]:
    line: dict[str, Any] = {**task}
    if "payload" in task:
        line["payload_b64"] = b64encode(line.pop("payload")).decode()
    return line


async def go_struct_unique(
    url: str,
    values: Iterable[Mapping[str, object]],
    *,
    type: str = "order:place",
    queue: str = "default",
    unique_s: float = 60.0,
    timeout: float = 60.0,
) -> list[UniqueAnswer]:
    """Have Go marshal its fixed struct with these values, and enqueue each one unique.

    The struct is in README.md. Bytes are given in base64, as JSON has them.
    """
    flags = [f"-type={type}", f"-queue={queue}", f"-unique={_duration(unique_s)}"]
    lines = await _call("struct-unique", url, flags, values, timeout)
    return [read_record(UniqueAnswer, line) for line in lines]


async def _call(
    command: str,
    url: str,
    flags: Sequence[str],
    lines: Iterable[Mapping[str, object]],
    timeout: float,
) -> list[dict[str, Any]]:
    """Run one subcommand to its end and return its output lines."""
    process = await _spawn(command, url, flags)
    try:
        text = "".join(map(json_line, lines))
        out, err = await asyncio.wait_for(process.communicate(text.encode()), timeout)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise GoPeerError(f"peer {command} ended with {process.returncode}: {err.decode()}")
    return [json.loads(line) for line in out.splitlines()]


async def _spawn(command: str, url: str, flags: Sequence[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        build(),
        command,
        f"-redis={go_url(url)}",
        *flags,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        limit=MAX_LINE_BYTES,
    )


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1e9)}ns"


def _weights(queues: Mapping[str, int] | None) -> str:
    return ",".join(f"{name}={weight}" for name, weight in (queues or {"default": 1}).items())


# Programs that go on running


class GoServer(ServerProcess):
    """A Go Asynq server in a process of its own, for `async with`.

    Inside the block it is registered and hears cancelations. `handler` names what every task does,
    or is "type": the part of the task type before the first colon decides (see README.md).
    Durations are seconds; None is Asynq's default, which for `retry_delay_s` is its formula.
    """

    name = "the Go server"

    def __init__(
        self,
        url: str,
        *,
        queues: Mapping[str, int] | None = None,
        strict: bool = False,
        concurrency: int = 10,
        handler: str = "type",
        sleep_s: float = 0.0,
        result: bool = True,
        ignore_cancel: bool = False,
        shutdown_timeout_s: float = 1.0,
        task_check_s: float | None = None,
        delayed_check_s: float | None = None,
        janitor_s: float | None = None,
        retry_delay_s: float | None = None,
        log_level: str = "error",
    ) -> None:
        super().__init__(shutdown_timeout_s)
        self._url = url
        self._flags = [
            "-stop-on-eof",
            f"-queues={_weights(queues)}",
            f"-strict={str(strict).lower()}",
            f"-concurrency={concurrency}",
            f"-shutdown-timeout={_duration(shutdown_timeout_s)}",
            f"-task-check={_duration(task_check_s or 0)}",
            f"-delayed-check={_duration(delayed_check_s or 0)}",
            f"-janitor={_duration(janitor_s or 0)}",
            f"-retry-delay={_duration(-1 if retry_delay_s is None else retry_delay_s)}",
            f"-log-level={log_level}",
            f"-handler={handler}",
            f"-sleep={_duration(sleep_s)}",
            f"-result={str(result).lower()}",
            f"-ignore-cancel={str(ignore_cancel).lower()}",
        ]

    async def spawn(self) -> asyncio.subprocess.Process:
        """Start `peer`."""
        return await _spawn("serve", self._url, self._flags)

    async def ready(self) -> None:
        """Wait until the server is registered and hears cancelations."""
        await self.wait_for(lambda: self.reached("ready"), timeout=30)

    async def stop_fetching(self, timeout: float = 10.0) -> None:
        """Send SIGTSTP and wait until the server takes no new tasks."""
        self.signal(signal.SIGTSTP)
        await self.wait_for(lambda: self.reached("stopped"), timeout)

    async def wait_gone(self) -> None:
        """Wait for the end, which the server must have reported; raises as `stop`."""
        await super().wait_gone()
        if not self.reached("closed"):
            raise ServerProcessError(f"the Go server ended without closing: {self.errors}")


class GoInspector:
    """Go Asynq's Inspector, for `async with`. A refused command raises `GoPeerError`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await _spawn("inspect", self._url, ())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        try:
            # Not None: Python 3.11 would leave stdin open, and the program would wait for its end.
            await asyncio.wait_for(self._process.communicate(b""), 10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def ask(self, cmd: str, *, timeout: float = 30.0, **fields: object) -> Any:
        """Send one command, with the fields of README.md, and return its value."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise GoPeerError("the Go inspector was not started: use `async with`")
        async with self._turn:
            try:
                process.stdin.write(json_line({"cmd": cmd, **fields}).encode())
                line = await asyncio.wait_for(process.stdout.readline(), timeout)
            except BaseException:
                process.kill()  # or the next command would read this one's reply
                raise
        if not line:
            raise GoPeerError("the Go inspector is gone")
        reply = json.loads(line)
        if not reply["ok"]:
            raise GoPeerError(reply["error"], reply["code"])
        return reply["value"]

    async def queues(self) -> list[str]:
        """Return the names of all queues, sorted."""
        names: list[str] = await self.ask("queues")
        return names

    async def queue_info(self, queue: str) -> GoQueueInfo:
        """Return the counters of a queue."""
        return read_record(GoQueueInfo, await self.ask("queue_info", queue=queue))

    async def task_info(self, queue: str, id: str) -> GoTaskInfo:
        """Return one task; code task_not_found if there is none."""
        return read_record(GoTaskInfo, await self.ask("task_info", queue=queue, id=id))

    async def list_tasks(
        self, queue: str, state: str, *, page: int = 1, size: int = 30, group: str = ""
    ) -> list[GoTaskInfo]:
        """Return one page of the tasks in a state; `size` 0 is all of them."""
        rows = await self.ask("list", queue=queue, state=state, page=page, size=size, group=group)
        return [read_record(GoTaskInfo, row) for row in rows]

    async def servers(self) -> list[GoServerInfo]:
        """Return the running servers with what they work on."""
        return [
            read_record(
                GoServerInfo,
                {
                    **row,
                    "active_workers": tuple(
                        read_record(GoWorkerInfo, worker) for worker in row["active_workers"]
                    ),
                },
            )
            for row in await self.ask("servers")
        ]

    async def history(self, queue: str, days: int) -> list[GoDay]:
        """Return the counters of the last days, today first."""
        return [
            read_record(GoDay, row) for row in await self.ask("history", queue=queue, days=days)
        ]

    async def delete_task(self, queue: str, id: str) -> None:
        """Delete a task that is not active."""
        await self.ask("delete_task", queue=queue, id=id)

    async def run_task(self, queue: str, id: str) -> None:
        """Make a scheduled, retry, archived, completed or aggregating task pending."""
        await self.ask("run_task", queue=queue, id=id)

    async def archive_task(self, queue: str, id: str) -> None:
        """Archive a task that is not active."""
        await self.ask("archive_task", queue=queue, id=id)

    async def cancel(self, id: str) -> None:
        """Send a cancelation, whether somebody runs the task or not."""
        await self.ask("cancel", id=id)

    async def pause(self, queue: str) -> None:
        """Pause a queue."""
        await self.ask("pause", queue=queue)

    async def unpause(self, queue: str) -> None:
        """Resume a paused queue."""
        await self.ask("unpause", queue=queue)

    async def delete_queue(self, queue: str, *, force: bool = False) -> None:
        """Delete a queue, with `force` also one that holds tasks."""
        await self.ask("delete_queue", queue=queue, force=force)
