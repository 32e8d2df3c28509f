"""SAQ: coroutines that each wait on the queue in Redis with a connection of their own.

Scheduled jobs move to the queue once a second: `timers["schedule"]` counts whole seconds.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

import orjson
from saq import Queue, Worker

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_coroutines
from benchmarks.ledger import Ledger

# None outside a measurement, where no handler runs
ledger = cast(Ledger, Ledger.from_environment())


class Failed(Exception):
    """What the first run of a task that fails once raises."""


async def noop(context: Any, *, user_id: int, template: str) -> None:
    """Do nothing."""
    ledger.ran(user_id)


async def sleep(context: Any, *, user_id: int, template: str) -> None:
    """Wait as a call to another service does."""
    ledger.started(user_id)
    await asyncio.sleep(SLEEP_S)
    ledger.ended(user_id)


async def fails_once(context: Any, *, user_id: int, template: str) -> None:
    """Fail in the first run."""
    if ledger.ran(user_id) == 1:
        raise Failed


async def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue all."""
    queue = _queue(sending.url, sending.in_flight)

    async def enqueue(i: int, due: float | None) -> None:
        job = await queue.enqueue(
            sending.handler,
            user_id=i,
            template="default",
            scheduled=due or 0,
            # No result is stored. A second attempt is what a failure needs, and a crash: a job
            # whose worker died counts as one that failed.
            ttl=-1,
            retries=2,
        )
        if job is None:
            raise RuntimeError(f"task {i} was refused")

    await queue.connect()
    # A connection for each caller
    await asyncio.gather(*(queue.redis.ping() for _ in range(sending.in_flight)))
    seconds = await sent_by_coroutines(sending, ledger, enqueue)
    await queue.disconnect()
    return seconds


async def work(working: Working) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("saq").addFilter(_is_not_a_failed_run)
    queue = _queue(working.url, working.concurrency)
    worker = Worker(
        queue,
        functions=[noop, sleep, fails_once],
        concurrency=working.concurrency,
        shutdown_grace_period_s=1,  # what runs may end; without it, it is cancelled
    )
    await queue.connect()
    # A worker sweeps as soon as it starts, and takes jobs dequeued an instant ago for stuck ones.
    # Swept before there are any, the next sweep is a minute away.
    await queue.sweep()
    try:
        await worker.start()
    finally:
        await queue.disconnect()


async def left(url: str) -> int:
    """Count the jobs that are waiting, scheduled or running."""
    queue = _queue(url, 1)
    count = await queue.count("incomplete")
    await queue.disconnect()
    return int(count)


def _queue(url: str, operations: int) -> Any:
    # The default of 20 operations at a time would hold up more callers than that.
    return Queue.from_url(url, dump=orjson.dumps, load=orjson.loads, max_concurrent_ops=operations)


def _is_not_a_failed_run(record: logging.LogRecord) -> bool:
    return record.msg != "Error processing job %s"


if __name__ == "__main__":
    main(sys.modules[__name__])
