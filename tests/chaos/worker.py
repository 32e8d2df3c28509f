"""A worker process for the tests that kill, stop and signal one; it tells what it does on a list.

Its arguments are options of `Server`: `concurrency=5 shutdown_timeout=1`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from typing import Any

from redis.asyncio import Redis

from asyncq import Context, Mux, Server
from asyncq.settings import redis_url

mux = Mux()
redis = Redis.from_url(redis_url())


async def tell(what: str, ctx: Context) -> None:
    """Tell that something happened to a task."""
    await redis.rpush("told", f"{what} {ctx.task_id}")


@mux.task("quick")
async def quick(ctx: Context) -> None:
    await tell("ran", ctx)


@mux.task("nap")
async def nap(seconds: float, ctx: Context) -> None:
    await tell("began", ctx)
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        await tell("cancelled", ctx)
        raise
    await tell("ended", ctx)


@mux.task("doze")
async def doze(ctx: Context) -> None:
    """Sleep, and be gone at once when cancelled."""
    await tell("began", ctx)
    await asyncio.sleep(60)


@mux.task("stubborn")
async def stubborn(ctx: Context) -> None:
    """Ignore every cancellation."""
    await tell("began", ctx)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await tell("ignored", ctx)


@mux.task("stuck")
def stuck(ctx: Context) -> None:
    """Hold a thread for ever."""
    ctx.sync.progress(0.5, "stuck")
    threading.Event().wait()


async def run(options: dict[str, Any]) -> None:
    """Run until a signal says otherwise."""
    server = Server(**options)
    await server.run(mux)
    await redis.aclose()
    if server.abandoned:  # closing the event loop would wait for a handler that never ends
        os._exit(0)


def main() -> None:
    """Read the options and run."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    asyncio.run(run({name: json.loads(value) for name, value in options.items()}))


if __name__ == "__main__":
    main()
