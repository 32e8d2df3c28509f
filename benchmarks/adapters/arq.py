"""arq: one loop that polls Redis for due jobs and starts a coroutine for each."""

from __future__ import annotations

import asyncio
import logging
import sys
from datetime import UTC, datetime
from typing import Any, cast

from arq import Retry, Worker, create_pool
from arq.connections import RedisSettings
from arq.constants import default_queue_name

from benchmarks.adapter import (
    SLEEP_S,
    Sending,
    Working,
    main,
    sent_by_coroutines,
    uvloop_factory,
)
from benchmarks.ledger import Ledger

# How long a worker rests between two looks at the queue; the default is 0.5 s. The documentation
# sets no lower limit, but without any rest an idle worker would keep a core busy.
POLL_S = 0.01

# None outside a measurement, where no handler runs
ledger = cast(Ledger, Ledger.from_environment())


async def noop(context: Any, user_id: int, template: str) -> None:
    """Do nothing."""
    ledger.ran(user_id)


async def sleep(context: Any, user_id: int, template: str) -> None:
    """Wait as a call to another service does."""
    ledger.started(user_id)
    await asyncio.sleep(SLEEP_S)
    ledger.ended(user_id)


async def fails_once(context: Any, user_id: int, template: str) -> None:
    """Fail in the first run, by the one exception that arq retries."""
    if ledger.ran(user_id) == 1:
        raise Retry


async def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue all."""
    pool = await create_pool(RedisSettings.from_dsn(sending.url))

    async def enqueue(i: int, due: float | None) -> None:
        job = await pool.enqueue_job(
            sending.handler,
            user_id=i,
            template="default",
            _defer_until=None if due is None else datetime.fromtimestamp(due, UTC),
        )
        if job is None:
            raise RuntimeError(f"task {i} was refused")

    # A connection for each caller
    await asyncio.gather(*(pool.ping() for _ in range(sending.in_flight)))
    seconds = await sent_by_coroutines(sending, ledger, enqueue)
    await pool.aclose()
    return seconds


def work(working: Working) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    new_event_loop = uvloop_factory() or asyncio.new_event_loop
    asyncio.set_event_loop(new_event_loop())
    worker = Worker(
        [noop, sleep, fails_once],
        redis_settings=RedisSettings.from_dsn(working.url),
        max_jobs=working.concurrency,
        poll_delay=POLL_S,
        keep_result=0,
        job_completion_wait=5,  # what runs may end; without it, it is cancelled
    )
    worker.run()


async def left(url: str) -> int:
    """Count the jobs that are waiting, deferred or running: all stay queued until they are done."""
    pool = await create_pool(RedisSettings.from_dsn(url))
    count = await pool.zcard(default_queue_name)
    await pool.aclose()
    return int(count)


if __name__ == "__main__":
    main(sys.modules[__name__])
