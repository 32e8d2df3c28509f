"""Many workers in one process: each a `Server` with its own connections, thread and records.

    python -m benchmarks.fleet URL --servers 10 --queues 1

It writes "ready" when all of them take tasks, and ends at SIGTERM. To Redis, worker i is the client
`worker-<pid>-<i>`. One process a worker would be nearer to life, but a hundred of them do not fit
on a small machine.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
from contextlib import AsyncExitStack

from asyncq import Server
from benchmarks.adapter import queue_names, uvloop_factory
from benchmarks.adapters.ours import handlers
from benchmarks.ledger import Ledger


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Many workers in one process.")
    parser.add_argument("url")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--queues", type=int, default=1)
    options = parser.parse_args()
    ledger = Ledger.from_environment()
    if ledger is None:
        raise SystemExit("BENCH_LEDGER must name the ledger's file")
    logging.basicConfig(level=logging.WARNING)
    with asyncio.Runner(loop_factory=uvloop_factory()) as runner:
        runner.run(_serve(options.url, options.servers, options.queues, ledger))


async def _serve(url: str, servers: int, queues: int, ledger: Ledger) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    weights = dict.fromkeys(queue_names(queues), 1)
    named = f"{url}{'&' if '?' in url else '?'}client_name=worker-{os.getpid()}"
    async with AsyncExitStack() as stack:
        for i in range(servers):
            server = Server(f"{named}-{i}", queues=weights)
            await stack.enter_async_context(server.running(handlers(ledger)))
        print("ready", flush=True)
        await ended.wait()


if __name__ == "__main__":
    main()
