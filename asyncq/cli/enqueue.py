"""`asyncq enqueue`: puts one task on a queue, and waits for its result if asked to."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from base64 import b64encode
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, cast

import typer
from typer.core import TyperCommand

from asyncq import AsyncqError, Client, OptionError, Task, TaskHandle, TaskOptions
from asyncq.cli.options import RedisUrl, duration, instant, is_duration
from asyncq.cli.terminal import json_text, printable, say
from asyncq.settings import ClientSettings

__all__ = ["EnqueueCommand", "enqueue"]

WAIT: Final = "--wait"
FOREVER: Final = "forever"

RETENTION_S: Final = 600
"""What a task that is waited for is kept if nothing else is said: its result must be there."""

STDIN: Final = "-"


class EnqueueCommand(TyperCommand):
    """A command whose `--wait` may stand alone or with a duration, which typer has no word for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a `--wait` that stands alone its value."""
        return super().parse_args(ctx, complete_wait(args))


def complete_wait(args: Sequence[str]) -> list[str]:
    """Return arguments in which each `--wait` has a value."""
    options = args[: args.index("--")] if "--" in args else args
    completed = list(args)
    for i, arg in enumerate(options):
        if arg == WAIT and not is_duration("".join(options[i + 1 : i + 2])):
            completed[i] = f"{WAIT}={FOREVER}"
    return completed


def enqueue(
    type: Annotated[
        str, typer.Argument(metavar="TYPE", help="The type of the task, as in email:welcome.")
    ],
    payload: Annotated[
        str | None,
        typer.Argument(
            metavar="PAYLOAD",
            help="The payload as JSON; - reads it from stdin. Default: no payload.",
        ),
    ] = None,
    redis: RedisUrl = None,
    queue: Annotated[
        str | None, typer.Option("--queue", "-q", metavar="NAME", help="Default: default.")
    ] = None,
    max_retry: Annotated[
        int | None, typer.Option(metavar="N", help="How often it is tried again. Default: 25.")
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="DURATION", help="How long a run may take. Default: 30m.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="When it is too late to run.")
    ] = None,
    process_in: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Run it later, counted from now.")
    ] = None,
    process_at: Annotated[
        str | None, typer.Option(metavar="INSTANT", help="Run it later, at an instant.")
    ] = None,
    unique: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="Refuse it while one with the same payload holds this lock."
        ),
    ] = None,
    unique_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="With --unique: stands for the payload in the lock."),
    ] = None,
    task_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Refuse it if the id is in use. Default: new.")
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION", help="How long it is kept after success. Default: 0; 10m to wait."
        ),
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="NAME", help="Aggregate it with others of the group.")
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option("--header", "-H", metavar="KEY=VALUE", help="A header; may be repeated."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the payload's bytes as they are, JSON or not.")
    ] = False,
    wait: Annotated[
        str | None,
        typer.Option(
            WAIT,
            metavar="[DURATION]",
            help="Wait for the end, and write the result as JSON. Default: however long it takes.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object: id, queue, type, result.")
    ] = False,
) -> None:
    """Put a task on a queue, for a Python or a Go worker.

    A DURATION is 90, 1.5s, 10m, 2h or 1d; an INSTANT is 2026-01-31T18:00Z.

    \b
    Examples:
      asyncq enqueue email:welcome '{"user_id": 1}'
      asyncq enqueue report --queue low --process-in 10m --max-retry 3
      asyncq enqueue resize - --raw --wait 30s < photo.jpg
      asyncq enqueue sync '{"shop": 7}' --unique 1h --header trace=abc --json

    Exit codes: 0 enqueued (with --wait: done), 1 refused, failed, not done in time, or no
    Redis; 2 wrong usage, 130 ended by Ctrl-C.
    """
    options = {
        "queue": queue,
        "max_retry": max_retry,
        "timeout": duration(timeout, "--timeout"),
        "deadline": instant(deadline, "--deadline"),
        "process_in": duration(process_in, "--process-in"),
        "process_at": instant(process_at, "--process-at"),
        "unique": duration(unique, "--unique"),
        "unique_key": unique_key,
        "task_id": task_id,
        "retention": duration(retention, "--retention"),
        "group": group,
        "headers": headers_of(header or ()),
    }
    given = {name: value for name, value in options.items() if value is not None}
    wait_s = math.inf if wait == FOREVER else duration(wait, WAIT)
    if wait_s is not None:
        given.setdefault("retention", RETENTION_S)
    task = Task(type, payload_of(payload, raw=raw), **cast(TaskOptions, given))
    url = ClientSettings.load({"redis_url": redis}).redis_url
    asyncio.run(send(url, task, wait_s, as_json=as_json))


async def send(url: str, task: Task[Any], wait_s: float | None, *, as_json: bool) -> None:
    """Enqueue a task, wait `wait_s` seconds for its result (None: not at all), and tell.

    Raises:
        AsyncqError: it was refused, it failed, or it did not end in time.
    """
    async with Client(url) as client:
        handle = await client.enqueue(task)
        told: dict[str, object] = {"id": handle.id, "queue": handle.queue, "type": task.type}
        if not as_json:
            sentence = f"enqueued {task.type!r} in queue {handle.queue!r} as {handle.id!r}"
            typer.echo(printable(sentence), err=wait_s is not None)
        if wait_s is not None:
            result = _shown(await result_of(handle, wait_s))
            if not as_json:
                say(json_text(next(iter(result.values()))))
            told |= result
        if as_json:
            say(json_text(told))


async def result_of(handle: TaskHandle[Any], wait_s: float) -> Any:
    """Wait `wait_s` seconds for the end of a task and return its result.

    Raises:
        AsyncqError: it failed, or did not end in time.
    """
    try:
        return await handle.result(timeout=None if math.isinf(wait_s) else wait_s)
    except TimeoutError:
        raise AsyncqError(
            f"task {handle.id!r} of queue {handle.queue!r} has not ended after {wait_s:g} s; it "
            "goes on by itself"
        ) from None


def payload_of(text: str | None, *, raw: bool) -> object:
    """Return what a payload argument stands for: bytes with `raw`, else what its JSON says.

    Raises:
        OptionError: it is no JSON.
    """
    if text is None:
        return None
    data = sys.stdin.buffer.read() if text == STDIN else os.fsencode(text)
    if raw:
        return data
    try:
        value: object = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise OptionError("the payload is nested too deeply") from None
    except ValueError as error:
        raise OptionError(
            f"the payload {_start_of(data)} is no JSON: {error}. Quote it for the shell, as "
            """'{"user_id": 1}', or send it as it is with --raw"""
        ) from None
    return b"null" if value is None else value  # None would be no payload


def headers_of(pairs: Iterable[str]) -> dict[str, str] | None:
    """Return headers of `KEY=VALUE` pairs; None for no pair.

    Raises:
        OptionError: a pair has no `=`, or a key comes twice.
    """
    headers: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise OptionError(f"--header: {pair!r} is not of the form KEY=VALUE")
        if key in headers:
            raise OptionError(f"--header: {key!r} is given twice")
        headers[key] = value
    return headers or None


def _shown(result: object) -> dict[str, object]:
    """The result as JSON can say it: bytes that are no JSON, as text or else in base64."""
    if not isinstance(result, bytes):
        return {"result": result}
    try:
        return {"result": result.decode()}
    except UnicodeDecodeError:
        return {"result_base64": b64encode(result).decode()}


def _start_of(data: bytes) -> str:
    text = data[:60].decode(errors="replace")
    return repr(text + ("..." if len(data) > len(text) else ""))


def _refuse_constant(name: str) -> object:
    raise ValueError(f"JSON has no {name}")
