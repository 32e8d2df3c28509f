"""The Python side of the interop tests: a worker whose tasks do what those of Go's peer do.

`pyworker.py` runs it by the worker command. What a task does is told by the part of its type before
the first colon; README.md lists the modes. Each start and end is a line of JSON on stdout.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from base64 import b64encode
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from asyncq import Context, Mux, Retry, RevokeTask, SkipRetry, Task

Gates: TypeAlias = defaultdict[str, asyncio.Queue[str]]
"""Of each task in mode block: the mode that it shall go on in."""
Mode: TypeAlias = Callable[[Task[Any], Context[Gates]], Awaitable[object]]


@asynccontextmanager
async def lifespan(mux: Mux[Gates]) -> AsyncIterator[Gates]:
    """Read releases from stdin while the worker works; the end of stdin ends the worker."""
    gates: Gates = defaultdict(asyncio.Queue)
    releases = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(releases), sys.stdin
    )
    reading = asyncio.create_task(_read(releases, gates), name="releases")
    say(event="lifespan")
    try:
        yield gates
    finally:
        reading.cancel()
        transport.close()


async def _read(releases: asyncio.StreamReader, gates: Gates) -> None:
    async for line in releases:
        raw = json.loads(line)
        gates[raw["release"]].put_nowait(raw["mode"])
    os.kill(os.getpid(), signal.SIGTERM)


def say(**event: object) -> None:
    """Write one line at once: the process may be frozen or killed at any moment."""
    os.write(1, (json.dumps(event) + "\n").encode())


mux = Mux(lifespan=lifespan)


@mux.use
async def report(
    task: Task[Any],
    ctx: Context[Gates],
    call_next: Callable[[Task[Any], Context[Gates]], Awaitable[object]],
) -> object:
    """Say when a task starts and ends, and with what."""
    seen = {
        "id": ctx.task_id,
        "type": ctx.task_type,
        "queue": ctx.queue,
        "retry_count": ctx.retry_count,
        "max_retry": ctx.max_retry,
        "payload_b64": _base64(task.payload),
        "headers": dict(ctx.headers),
        "deadline_unix": ctx.deadline.timestamp(),
    }
    say(event="start", at_ns=time.time_ns(), **seen)
    err = ""
    try:
        return await call_next(task, ctx)
    except BaseException as error:
        err = ctx.cancel_reason or f"{type(error).__name__}: {error}"
        raise
    finally:
        say(event="end", at_ns=time.time_ns(), err=err, **seen)


@mux.not_found
async def run(task: Task[Any], ctx: Context[Gates]) -> object:
    """Run a task in the mode that its type names."""
    return await MODES.get(task.type.partition(":")[0], echo)(task, ctx)


async def echo(task: Task[Any], ctx: Context[Gates]) -> object:
    """Succeed with a result like Go's."""
    return {"by": "python", "id": ctx.task_id, "payload_b64": _base64(task.payload)}


async def sleep(task: Task[Any], ctx: Context[Gates]) -> object:
    """Succeed after the time in the type: `sleep:250ms`."""
    await asyncio.sleep(int(task.type.partition(":")[2].removesuffix("ms")) / 1000)
    return await echo(task, ctx)


async def fail(task: Task[Any], ctx: Context[Gates]) -> object:
    """Fail; the delay of the retry is the type's: `fail:250ms`, or the server's."""
    text = f"{task.type} failed on purpose"
    if delay := task.type.partition(":")[2].removesuffix("ms"):
        raise Retry(int(delay) / 1000, text)
    raise RuntimeError(text)


async def flaky(task: Task[Any], ctx: Context[Gates]) -> object:
    """Fail the first run; succeed from the first retry on."""
    return await (echo if ctx.retry_count else fail)(task, ctx)


async def skip(task: Task[Any], ctx: Context[Gates]) -> object:
    """Fail for good."""
    raise SkipRetry(f"{task.type} failed for good")


async def revoke(task: Task[Any], ctx: Context[Gates]) -> object:
    """Drop the task."""
    raise RevokeTask(f"{task.type} is revoked")


async def write(task: Task[Any], ctx: Context[Gates]) -> object:
    """Write a result at once, then succeed with the usual one."""
    await ctx.write_result(b"written early")
    return await echo(task, ctx)


async def block(task: Task[Any], ctx: Context[Gates]) -> object:
    """Wait to be released, and go on in the mode that the release names."""
    mode = await ctx.state[ctx.task_id].get()
    return await MODES[mode](task, ctx)


MODES: dict[str, Mode] = {
    "echo": echo,
    "sleep": sleep,
    "fail": fail,
    "flaky": flaky,
    "skip": skip,
    "revoke": revoke,
    "write": write,
    "block": block,
}


def _base64(raw: bytes | None) -> str:
    return b64encode(raw or b"").decode()
