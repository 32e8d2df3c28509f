"""streaQ: coroutines fed from a Redis stream that one loop reads ahead.

Scheduled and retried tasks move to the stream every 0.5 s, which cannot be set.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any, cast

# The optimized mode that streaQ's documentation advises: coredis reads it as it is imported.
os.environ["COREDIS_OPTIMIZED"] = "1"

from streaq import StreaqRetry, Worker

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_coroutines
from benchmarks.ledger import Ledger

AT_ONCE = 100  # tasks of a bulk call; faster than thousands, which it serializes side by side

# None outside a measurement, where no handler runs
ledger = cast(Ledger, Ledger.from_environment())


async def noop(user_id: int, template: str) -> None:
    """Do nothing."""
    ledger.ran(user_id)


async def sleep(user_id: int, template: str) -> None:
    """Wait as a call to another service does."""
    ledger.started(user_id)
    await asyncio.sleep(SLEEP_S)
    ledger.ended(user_id)


async def fails_once(user_id: int, template: str) -> None:
    """Fail in the first run, by the one exception that streaQ retries."""
    if ledger.ran(user_id) == 1:
        raise StreaqRetry(delay=0)


async def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue all."""
    worker = _worker(sending.url)
    task = worker.registry[sending.handler]

    async def enqueue(i: int, due: float | None) -> None:
        made = task.enqueue(user_id=i, template="default")
        if due is not None:
            made = made.start(schedule=datetime.fromtimestamp(due, UTC))
        await made

    async with worker:
        # As many connections as so many callers need
        await asyncio.gather(*(worker.redis.ping() for _ in range(sending.in_flight)))
        if sending.how != "bulk":
            return await sent_by_coroutines(sending, ledger, enqueue)
        began = time.perf_counter()
        for first in range(0, sending.tasks, AT_ONCE):
            part = range(first, min(first + AT_ONCE, sending.tasks))
            await worker.enqueue_many([task.enqueue(user_id=i, template="default") for i in part])
        return time.perf_counter() - began


def work(working: Working) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    worker = _worker(
        working.url,
        concurrency=working.concurrency,
        prefetch=working.prefetch or None,
        grace_period=5,  # seconds in which what runs may end; without it, it is cancelled
        anyio_kwargs={"use_uvloop": True},
    )
    worker.run_sync()


async def left(url: str) -> int:
    """Count the tasks that are waiting, scheduled or running: each is in the stream until done."""
    worker = _worker(url)
    async with worker:
        return int(await worker.queue_size())


def _worker(url: str, **settings: Any) -> Any:
    worker = Worker(redis_url=url, **settings)
    for handler in (noop, sleep, fails_once):
        # No result is stored, and no line logged for a task.
        worker.task(ttl=0, silent=True)(handler)
    return worker


if __name__ == "__main__":
    main(sys.modules[__name__])
