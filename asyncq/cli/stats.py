"""`asyncq stats`: how many tasks of each queue wait, run and have failed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from asyncq import BrokerUnavailableError
from asyncq.cli.options import RedisUrl, duration
from asyncq.cli.terminal import complain, json_text, printable, say
from asyncq.inspector import Inspector, QueueInfo
from asyncq.settings import ClientSettings

__all__ = ["stats"]

STATES: Final = ("pending", "active", "scheduled", "retry", "archived", "completed", "aggregating")
TODAY: Final = ("latency", "processed", "failed", "errors")
COUNTED: Final = ("size", *STATES, "processed", "failed", "processed_total", "failed_total")

SHORTEST_PAUSE_S: Final = 0.1
WIDEST: Final = 10_000  # characters


def stats(
    redis: RedisUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one line of JSON.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again and again, until Ctrl-C.")
    ] = False,
    interval: Annotated[
        str, typer.Option(metavar="DURATION", help="How often --watch looks.")
    ] = "2s",
) -> None:
    """Show how many tasks of each queue are in which state.

    Counted as processed and failed are the runs that ended today (UTC); errors is their rate,
    latency how long the task that is next has waited.

    \b
    Examples:
      asyncq stats
      asyncq stats --redis redis://localhost:6379/1 --watch
      asyncq stats --json | jq '.totals.pending'

    Exit codes: 0 shown, 1 no Redis, 2 wrong usage.
    """
    url = ClientSettings.load({"redis_url": redis}).redis_url
    interval_s = duration(interval, "--interval") or 0.0
    try:
        asyncio.run(show(url, interval_s if watch else None, as_json=as_json))
    except KeyboardInterrupt:
        if not watch:
            raise  # Ctrl-C is how a watch ends, but not how an answer does


async def show(url: str, every_s: float | None, *, as_json: bool) -> None:
    """Write the state of all queues to stdout, once or every `every_s` seconds.

    Raises:
        BrokerError: Redis refused, or could not be reached; a watch goes on when it is back.
    """
    async with Inspector(url) as inspector:
        while True:
            try:
                queues = await inspector.queue_infos()
            except BrokerUnavailableError as error:
                if every_s is None:
                    raise
                complain(str(error))
            else:
                if as_json:
                    say(json_text(as_plain(queues)))
                else:
                    write(queues, clear=every_s is not None)
            if every_s is None:
                return
            await asyncio.sleep(max(SHORTEST_PAUSE_S, every_s))


def as_plain(queues: Sequence[QueueInfo]) -> dict[str, Any]:
    """Return the queues and their totals as JSON has it; `latency_s` and `error_rate` are numbers.

    The rate is that of today, None if nothing ran.
    """
    return {
        "queues": [_row(info) for info in queues],
        "totals": {
            **{name: sum(getattr(info, name) for info in queues) for name in COUNTED},
            "latency_s": max((info.latency.total_seconds() for info in queues), default=0.0),
            "error_rate": error_rate(queues),
        },
    }


def error_rate(queues: Sequence[QueueInfo]) -> float | None:
    """Return which part of the runs of today failed; None if there were none."""
    processed = sum(info.processed for info in queues)
    return sum(info.failed for info in queues) / processed if processed else None


def write(queues: Sequence[QueueInfo], *, clear: bool = False) -> None:
    """Write a table of the queues, on a cleared terminal if asked to."""
    console = Console(highlight=False)
    table = table_of(queues)
    # A line that is too long wraps and can still be read; a number cut short is wrong.
    needed = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    console.width = max(console.width, needed)
    with console:  # one write: a cleared screen is never seen
        if clear:
            console.clear()
        if queues:
            console.print(table)
        else:
            console.print("There are no queues yet: enqueue a task, or start a worker.")


def table_of(queues: Sequence[QueueInfo]) -> Table:
    """Return the queues as rows, and their sums; columns that would be empty are left out."""
    states = [
        state
        for state in STATES
        if state != "aggregating" or any(info.aggregating for info in queues)
    ]
    paused = any(info.paused for info in queues)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("queue", no_wrap=True)
    for name in (*(["paused"] if paused else []), *states, *TODAY):
        table.add_column(name, justify="right", no_wrap=True)

    def row(name: str, counted: Sequence[QueueInfo], is_paused: bool) -> list[str | Text]:
        counts = [sum(getattr(info, state) for info in counted) for state in states]
        latency = max((info.latency for info in counted), default=timedelta())
        rate = error_rate(counted)
        return [
            Text(name),  # no markup: the name of a queue comes from whoever made it
            *([("yes" if is_paused else "")] if paused else []),
            *(f"{count}" for count in counts),
            short(latency),
            f"{sum(info.processed for info in counted)}",
            f"{sum(info.failed for info in counted)}",
            "-" if rate is None else f"{rate:.1%}",
        ]

    for info in queues:
        table.add_row(*row(printable(info.queue), [info], info.paused))
    table.add_section()
    table.add_row(*row("total", queues, False))
    return table


def short(duration: timedelta) -> str:
    """Return a duration in its two largest units: 0.2s, 42s, 3m05s, 2h10m, 4d03h."""
    seconds = duration.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f}s" if seconds else "0s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _row(info: QueueInfo) -> dict[str, Any]:
    return {
        "queue": info.queue,
        "paused": info.paused,
        **{name: getattr(info, name) for name in COUNTED},
        "groups": info.groups,
        "latency_s": info.latency.total_seconds(),
        "error_rate": error_rate([info]),
        "timestamp": info.timestamp.isoformat(),
    }
