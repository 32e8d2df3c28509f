"""What only asyncq is measured for: results, cancelling, and tasks that Go enqueued.

The first two are measurements in a process of their own, which prints its numbers as JSON:

    python -m benchmarks.features NAME URL TASKS
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable

from asyncq import Client, Mux, Server
from benchmarks.programs import answer_of, print_answer
from benchmarks.systems import ASYNQ, OURS, System
from benchmarks.workloads import (
    Bench,
    Measure,
    Numbers,
    lateness,
    percentiles,
    pickup,
    register,
)

WAITERS = 100


async def results(url: str, n: int) -> Numbers:
    """From a handler's return to its waiter, with 100 waiters on one client."""
    returned_at: dict[int, float] = {}
    latencies: list[float] = []
    mux = Mux()

    @mux.task("answer", retention=60)
    async def answer(payload: int) -> int:
        await asyncio.sleep(0.05)
        returned_at[payload] = time.perf_counter()
        return payload

    async with Client(url) as client, Server(url).running(mux):

        async def waiter(i: int) -> None:
            handle = await client.enqueue(answer.new(i))
            assert await handle.result(timeout=10) == i
            latencies.append((time.perf_counter() - returned_at[i]) * 1e3)

        await waiter(-1)
        latencies.clear()
        for first in range(0, n, WAITERS):
            await asyncio.gather(*(waiter(i) for i in range(first, min(first + WAITERS, n))))
    return {"tasks": n} | percentiles(latencies)


async def cancel(url: str, n: int) -> Numbers:
    """From the call that cancels a running task to its handler's CancelledError."""
    started = asyncio.Event()
    cancelled = asyncio.Event()
    latencies: list[float] = []
    sent_at = 0.0
    mux = Mux()

    @mux.task("endless", max_retry=0)
    async def endless() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            latencies.append((time.perf_counter() - sent_at) * 1e3)
            cancelled.set()

    async with Client(url) as client, Server(url).running(mux):
        for _ in range(n):
            started.clear()
            cancelled.clear()
            handle = await client.enqueue(endless.new())
            await started.wait()
            sent_at = time.perf_counter()
            await handle.cancel()
            await cancelled.wait()
    return {"tasks": n} | percentiles(latencies)


# The workloads


def feature(name: str, n: int) -> Measure:
    """Make a workload of a measurement in this module."""

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n)
        bench.store.flush()
        with bench.ledger(1) as ledger:
            command = [sys.executable, "-m", "benchmarks.features", name, bench.url, str(tasks)]
            numbers: Numbers = answer_of(command, ledger)
        return numbers

    return measure


MEASUREMENTS: dict[str, Callable[[str, int], Awaitable[Numbers]]] = {
    "results": results,
    "cancel": cancel,
}
_ONLY = {OURS.name}

register(
    "pickup-from-go", "asyncq, of tasks that Go enqueued", pickup(200, sender=ASYNQ),
    only=_ONLY, rounds=3, beside="pickup",
)  # fmt: skip
register(
    "lateness-from-go",
    "asyncq, of tasks that Go scheduled, after the second that Asynq stored",
    lateness(200, sender=ASYNQ, whole_seconds=True),
    only=_ONLY,
    rounds=3,
    beside="lateness",
)
register(
    "results", f"A result, from the return to its waiter, with {WAITERS} waiters",
    feature("results", 500), only=_ONLY, rounds=3,
)  # fmt: skip
register(
    "cancel", "Cancelling, from the call to the handler", feature("cancel", 100),
    only=_ONLY, rounds=3,
)  # fmt: skip


def main() -> None:
    """Run one measurement: NAME URL TASKS."""
    logging.basicConfig(level=logging.ERROR)
    print_answer(MEASUREMENTS)


if __name__ == "__main__":
    main()
