"""repid with its Redis broker: a stream, and a coroutine for each message.

It has no scheduled tasks, and no retries but to put a failed message behind the others at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, cast

import orjson
from redis.asyncio import Redis
from redis.exceptions import ResponseError
from repid import RedisServer, Repid, Router

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_coroutines
from benchmarks.ledger import Ledger

CHANNEL = "default"
CLAIM_EVERY_S = 60.0  # as long as a message must be idle by default
# For short handlers, and faster: one coroutine less for a message that would say it still runs,
# and one less that would end it after five minutes.
SHORT: dict[str, Any] = {"channel": CHANNEL, "keep_alive": False, "timeout": float("inf")}

# None outside a measurement, where no handler runs
ledger = cast(Ledger, Ledger.from_environment())
router = Router()


class Failed(Exception):
    """What the first run of a task that fails once raises."""


@router.actor(**SHORT)
async def noop(user_id: int, template: str) -> None:
    """Do nothing."""
    ledger.ran(user_id)


@router.actor(**SHORT)
async def sleep(user_id: int, template: str) -> None:
    """Wait as a call to another service does."""
    ledger.started(user_id)
    await asyncio.sleep(SLEEP_S)
    ledger.ended(user_id)


@router.actor(**SHORT, on_error="reject")
async def fails_once(user_id: int, template: str) -> None:
    """Fail in the first run."""
    if ledger.ran(user_id) == 1:
        raise Failed


async def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue all."""
    app = _app(sending.url)
    headers = {"topic": sending.handler}

    async def enqueue(i: int, due: float | None) -> None:
        await app.send_message_json(
            channel=CHANNEL, payload={"user_id": i, "template": "default"}, headers=headers
        )

    async with app.servers.default.connection():
        # A connection for each caller
        await asyncio.gather(
            *(app.send_message(channel="warm-up", payload=b"") for _ in range(sending.in_flight))
        )
        return await sent_by_coroutines(sending, ledger, enqueue)


async def work(working: Working) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    app = _app(working.url)
    app.include_router(router)
    async with app.servers.default.connection():
        await app.run_worker(tasks_limit=working.concurrency)


async def left(url: str) -> int:
    """Count the messages that no worker acknowledged."""
    stream = f"repid:{CHANNEL}"
    async with Redis.from_url(url) as redis:
        try:
            groups = await redis.xinfo_groups(stream)
        except ResponseError:  # no stream yet
            return 0
        # Acknowledged messages stay in the stream for good, so its length says nothing once a
        # worker was there.
        if not groups:
            return int(await redis.xlen(stream))
        return sum(group["pending"] + group["lag"] for group in groups)


def _app(url: str) -> Any:
    app = Repid(default_serializer=orjson.dumps)
    # Without an interval no worker ever claims what a dead one left.
    server = RedisServer(url, claim_interval=CLAIM_EVERY_S)
    app.servers.register_server("default", server, is_default=True)
    return app


if __name__ == "__main__":
    main(sys.modules[__name__])
