"""asyncq, by its public names only, as a user would write it; everything on, as it ships."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from asyncq import Client, Inspector, Mux, Server, Task, TaskType
from benchmarks.adapter import (
    SLEEP_S,
    Sending,
    Working,
    main,
    queue_names,
    sent_by_coroutines,
)
from benchmarks.ledger import Ledger

WARM_UP = "warm-up"


class Welcome(BaseModel):
    """The one payload of the benchmarks."""

    user_id: int
    template: str


class FailedOnce(Exception):
    """What `fails_once` raises in its first run."""


async def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue by one client."""
    new_task = _raw(sending) if sending.how == "raw" else _typed(sending)
    async with Client(sending.url) as client:
        await client.enqueue(Task("warm:up"), queue=WARM_UP)

        async def one(i: int, due: float | None) -> None:
            if due is None:
                await client.enqueue(new_task(i))
            else:
                await client.enqueue(new_task(i), process_at=datetime.fromtimestamp(due, UTC))

        if sending.how != "bulk":
            return await sent_by_coroutines(sending, ledger, one)
        began = time.perf_counter()
        await client.enqueue_many(new_task(i) for i in range(sending.tasks))
        return time.perf_counter() - began


async def work(working: Working) -> None:
    """Serve by one server, whose retries are due at once."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("asyncq.server").addFilter(_is_not_a_failed_run)
    ledger = Ledger.from_environment()
    if ledger is None:
        raise SystemExit("BENCH_LEDGER must name the ledger's file")
    options: dict[str, Any] = {"prefetch": working.prefetch} if working.prefetch else {}
    server = Server(
        working.url,
        concurrency=working.concurrency,
        queues=dict.fromkeys(queue_names(working.queues), 1),
        retry_delay=0,
        **options,
    )
    await server.run(handlers(ledger))


async def left(url: str) -> int:
    """Count what is pending, running, scheduled or to be retried."""
    async with Inspector(url) as inspector:
        queues = [await inspector.queue_info(name) for name in await inspector.queues()]
    return sum(
        queue.pending + queue.active + queue.scheduled + queue.retry
        for queue in queues
        if queue.queue != WARM_UP
    )


def handlers(ledger: Ledger) -> Mux:
    """Make the mux with the handlers of the workloads."""
    mux = Mux()

    @mux.task("noop")
    async def noop(payload: Welcome) -> None:
        ledger.ran(payload.user_id)

    @mux.task("sleep")
    async def sleep(payload: Welcome) -> None:
        ledger.started(payload.user_id)
        await asyncio.sleep(SLEEP_S)
        ledger.ended(payload.user_id)

    @mux.task("fails_once")
    async def fails_once(payload: Welcome) -> None:
        if ledger.ran(payload.user_id) == 1:
            raise FailedOnce

    return mux


def _typed(sending: Sending) -> Callable[[int], Task[Any]]:
    kind = TaskType(sending.handler, Welcome)
    return lambda i: kind.new(Welcome(user_id=i, template="default"))


def _raw(sending: Sending) -> Callable[[int], Task[Any]]:
    payloads = [b'{"user_id":%d,"template":"default"}' % i for i in range(sending.tasks)]
    return lambda i: Task(sending.handler, payloads[i])


def _is_not_a_failed_run(record: logging.LogRecord) -> bool:
    # Nobody writes a line for each failed run, ours and the peers' alike.
    return record.exc_info is None or record.exc_info[0] is not FailedOnce


if __name__ == "__main__":
    main(sys.modules[__name__])
