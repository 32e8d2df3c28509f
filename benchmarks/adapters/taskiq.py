"""taskiq with the Redis broker that acknowledges: a stream, and a coroutine for each message.

The receiver is the one of `taskiq worker`. taskiq keeps scheduled tasks for a process of its own,
`taskiq scheduler`; its loop runs in the worker's process here, so that there is one to measure.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError
from taskiq import SimpleRetryMiddleware, TaskiqScheduler
from taskiq.api import run_scheduler_task
from taskiq.formatters.json_formatter import JSONFormatter
from taskiq.receiver import Receiver
from taskiq_redis import ListRedisScheduleSource, RedisStreamBroker

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_coroutines
from benchmarks.ledger import Ledger

QUEUE = "taskiq"
SCHEDULES = "schedule"
# The scheduler's loop turns on whole seconds. In each turn it is to read what is scheduled, which
# it does every minute by default; half a second is less than the time between any two turns.
SCHEDULER_TURNS_EVERY = timedelta(seconds=1)
SCHEDULER_READS_EVERY = timedelta(seconds=0.5)

# None outside a measurement, where no handler runs
ledger = cast(Ledger, Ledger.from_environment())


class Failed(Exception):
    """What the first run of a task that fails once raises."""


async def noop(user_id: int, template: str) -> None:
    """Do nothing."""
    ledger.ran(user_id)


async def sleep(user_id: int, template: str) -> None:
    """Wait as a call to another service does."""
    ledger.started(user_id)
    await asyncio.sleep(SLEEP_S)
    ledger.ended(user_id)


async def fails_once(user_id: int, template: str) -> None:
    """Fail in the first run."""
    if ledger.ran(user_id) == 1:
        raise Failed


async def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue all."""
    broker = _broker(sending.url)
    task = broker.find_task(sending.handler)
    source = ListRedisScheduleSource(sending.url, prefix=SCHEDULES)

    async def enqueue(i: int, due: float | None) -> None:
        if due is None:
            await task.kiq(user_id=i, template="default")
        else:
            at = datetime.fromtimestamp(due, UTC)
            await task.schedule_by_time(source, at, user_id=i, template="default")

    # Makes the consumer group too, without which a worker would start behind these messages.
    await broker.startup()
    # A connection for each caller
    async with Redis(connection_pool=broker.connection_pool) as redis:
        await asyncio.gather(*(redis.ping() for _ in range(sending.in_flight)))
    seconds = await sent_by_coroutines(sending, ledger, enqueue)
    await broker.shutdown()
    return seconds


async def work(working: Working) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("taskiq.receiver.receiver").addFilter(_is_not_a_failed_run)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    broker = _broker(working.url)
    broker.is_worker_process = True
    source = ListRedisScheduleSource(working.url, prefix=SCHEDULES)
    scheduler = asyncio.create_task(
        run_scheduler_task(
            TaskiqScheduler(broker, [source]),
            interval=SCHEDULER_READS_EVERY,
            loop_interval=SCHEDULER_TURNS_EVERY,
        )
    )
    receiver = Receiver(
        broker,
        max_async_tasks=working.concurrency,
        max_prefetch=working.prefetch,
        validate_params=False,
    )
    await receiver.listen(stop)
    scheduler.cancel()
    await broker.shutdown()


async def left(url: str) -> int:
    """Count the messages that no worker acknowledged, and the scheduled tasks."""
    async with Redis.from_url(url) as redis:
        scheduled = [key async for key in redis.scan_iter(f"{SCHEDULES}:data:*", count=1000)]
        try:
            groups = await redis.xinfo_groups(QUEUE)
        except ResponseError:  # no stream yet
            groups = []
        # Acknowledged messages stay in the stream for good, so its length says nothing.
        return len(scheduled) + sum(int(group["pending"] + group["lag"]) for group in groups)


def _broker(url: str) -> Any:
    # JSONFormatter: messages in one step by Pydantic, instead of a model's dictionary by `json`.
    broker = RedisStreamBroker(url, queue_name=QUEUE).with_formatter(JSONFormatter())
    broker.add_middlewares(SimpleRetryMiddleware())
    for handler in (noop, sleep):
        broker.register_task(handler, task_name=handler.__name__)
    broker.register_task(fails_once, task_name="fails_once", retry_on_error=True)
    return broker


def _is_not_a_failed_run(record: logging.LogRecord) -> bool:
    return record.msg != "Exception found while executing function."


if __name__ == "__main__":
    main(sys.modules[__name__])
