"""The command line that every Python adapter shares, and how each of them sends.

    python -m benchmarks.adapters.saq send --url URL --handler noop --tasks 100 --how concurrent
    python -m benchmarks.adapters.saq work --url URL --concurrency 100
    python -m benchmarks.adapters.saq left --url URL

The clock of `send` runs in `sent_by_coroutines` and `sent_by_threads`, so that all systems are
timed alike. Imports the standard library only, for it runs in the environment of every system.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol, TypeVar, cast

from benchmarks.ledger import VARIABLE, Ledger

HANDLERS = ("noop", "sleep", "fails_once")
WAYS = ("sequential", "concurrent", "bulk", "paced", "scheduled", "raw")
SLEEP_S = 0.01

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sending:
    """What to enqueue: task i has the payload {"user_id": i, "template": "default"}.

    `how` is one of

    - sequential: one after the other
    - concurrent: `in_flight` callers, each waiting for its own answer; threads where the client
      is synchronous
    - bulk: the fastest call that the system offers for many
    - paced: sequential, one every `interval_s`
    - scheduled: task i is due `delay_s` + i * `interval_s` after the start
    - raw: concurrent, with payload bytes built before the clock starts
    """

    url: str
    handler: str
    tasks: int
    how: str
    in_flight: int = 50
    interval_s: float = 0.0
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Working:
    """How to serve: `concurrency` coroutines, threads or processes, whichever the system has.

    `prefetch` is 0 for the system's own default. One queue is the system's default queue; more
    have the names that `queue_names` gives.
    """

    url: str
    concurrency: int
    prefetch: int = 0
    queues: int = 1


class Adapter(Protocol):
    """The functions of an adapter's module; each may be a coroutine function."""

    def send(self, sending: Sending, ledger: Ledger) -> float | Awaitable[float]:
        """Enqueue all; return the seconds it took, connecting and warming up excluded.

        Raises anything if a task was refused.
        """
        ...

    def work(self, working: Working) -> Awaitable[None] | None:
        """Serve until SIGTERM; may replace this process by the system's own worker program."""
        ...

    def left(self, url: str) -> int | Awaitable[int]:
        """Count what Redis holds as not done: waiting, running, unacknowledged, scheduled."""
        ...


def main(module: ModuleType) -> None:
    """Run the command that the arguments name, with the adapter `module`."""
    adapter = cast(Adapter, module)
    options = vars(_parser().parse_args())
    command = options.pop("command")
    if command == "send":
        _send(adapter, Sending(**options))
    elif command == "work":
        _finished(adapter.work(Working(**options)))
    else:
        print(_finished(adapter.left(options["url"])))


async def sent_by_coroutines(
    sending: Sending, ledger: Ledger, send: Callable[[int, float | None], Awaitable[object]]
) -> float:
    """Enqueue by `send(i, due)` as `sending.how` says, bulk excepted; return the seconds it took.

    `due` is a Unix time in seconds, None where the task is not scheduled.
    """
    numbers = iter(range(sending.tasks))

    async def caller() -> None:
        for i in numbers:
            await send(i, None)

    began = time.perf_counter()
    if sending.how in ("concurrent", "raw"):
        await asyncio.gather(*(caller() for _ in range(sending.in_flight)))
    elif sending.how == "sequential":
        await caller()
    elif sending.how == "paced":
        for i in numbers:
            at_ns = time.time_ns()
            await send(i, None)
            ledger.sent(i, at_ns)  # afterwards: to write it is no part of the way to the handler
            await asyncio.sleep(_until(began, sending, i + 1))
    elif sending.how == "scheduled":
        first = time.time() + sending.delay_s
        for i in numbers:
            due = first + i * sending.interval_s
            ledger.sent(i, int(due * 1e9))
            await send(i, due)
    else:
        raise _unknown(sending)
    return time.perf_counter() - began


def sent_by_threads(
    sending: Sending, ledger: Ledger, send: Callable[[int, float | None], object]
) -> float:
    """Do what `sent_by_coroutines` does, with a synchronous client: callers are threads."""
    numbers = iter(range(sending.tasks))

    def caller(_: int = 0) -> None:
        for i in numbers:
            send(i, None)

    began = time.perf_counter()
    if sending.how in ("concurrent", "raw"):
        with ThreadPoolExecutor(sending.in_flight) as threads:
            list(threads.map(caller, range(sending.in_flight)))
    elif sending.how == "sequential":
        caller()
    elif sending.how == "paced":
        for i in numbers:
            at_ns = time.time_ns()
            send(i, None)
            ledger.sent(i, at_ns)  # afterwards: to write it is no part of the way to the handler
            time.sleep(_until(began, sending, i + 1))
    elif sending.how == "scheduled":
        first = time.time() + sending.delay_s
        for i in numbers:
            due = first + i * sending.interval_s
            ledger.sent(i, int(due * 1e9))
            send(i, due)
    else:
        raise _unknown(sending)
    return time.perf_counter() - began


def queue_names(queues: int) -> list[str]:
    """Name the queues that a worker of so many serves: default, or queue-0, queue-1 and so on."""
    return ["default"] if queues == 1 else [f"queue-{i}" for i in range(queues)]


def uvloop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes an event loop: uvloop's where it is installed, else None."""
    if find_spec("uvloop") is None:
        return None
    import uvloop

    return cast(Callable[[], asyncio.AbstractEventLoop], uvloop.new_event_loop)


def _send(adapter: Adapter, sending: Sending) -> None:
    ledger = Ledger.from_environment()
    if ledger is None:
        raise SystemExit(f"{VARIABLE} must name the ledger's file")
    cpu = time.process_time()
    seconds = _finished(adapter.send(sending, ledger))
    print(json.dumps({"seconds": seconds, "cpu_seconds": time.process_time() - cpu}))


def _finished(value: T | Awaitable[T]) -> T:
    if not inspect.isawaitable(value):
        return value
    with asyncio.Runner(loop_factory=uvloop_factory()) as runner:
        return runner.run(cast(Coroutine[Any, Any, T], value))


def _until(began: float, sending: Sending, i: int) -> float:
    return max(0.0, began + i * sending.interval_s - time.perf_counter())


def _unknown(sending: Sending) -> ValueError:
    return ValueError(f"this adapter cannot send {sending.how!r}; say so in systems.py")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)

    send = commands.add_parser("send", help="enqueue, and print how long it took as JSON")
    send.add_argument("--url", required=True)
    send.add_argument("--handler", choices=HANDLERS, default="noop")
    send.add_argument("--tasks", type=int, required=True)
    send.add_argument("--how", choices=WAYS, default="sequential")
    send.add_argument("--in-flight", type=int, default=50)
    send.add_argument("--interval-s", type=float, default=0.0)
    send.add_argument("--delay-s", type=float, default=0.0)

    work = commands.add_parser("work", help="serve until SIGTERM")
    work.add_argument("--url", required=True)
    work.add_argument("--concurrency", type=int, required=True)
    work.add_argument("--prefetch", type=int, default=0)
    work.add_argument("--queues", type=int, default=1)

    left = commands.add_parser("left", help="print how many tasks are not done")
    left.add_argument("--url", required=True)
    return parser
