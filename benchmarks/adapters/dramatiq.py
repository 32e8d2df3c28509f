"""dramatiq: one worker process of its gevent program, which its documentation advises for I/O.

The broker has its default middleware and encoder. Each message is enqueued by a call of its own.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_threads
from benchmarks.ledger import Ledger

# Tells the worker program's process what no option of that program carries
URL = "BENCH_URL"

# A worker process asks Redis for messages only while it holds fewer than these, and sleeps for
# 5 ms and more while it holds as many. The default, twice the threads, holds up ten threads or so.
PREFETCH = 1000

# A consumer that finds nothing looks again after 5 ms, then after twice as long each time, up to
# this. The default is 1000. Worker threads wake as often, so that less than this costs an idle
# process a good part of a core.
LONGEST_WAIT_MS = 20

# None outside a measurement, where no handler runs
ledger = cast(Ledger, Ledger.from_environment())


class Failed(Exception):
    """What the first run of a task that fails once raises."""


def noop(user_id: int, template: str) -> None:
    """Do nothing."""
    ledger.ran(user_id)


def sleep(user_id: int, template: str) -> None:
    """Wait as a call to another service does."""
    ledger.started(user_id)
    time.sleep(SLEEP_S)
    ledger.ended(user_id)


def fails_once(user_id: int, template: str) -> None:
    """Fail in the first run."""
    if ledger.ran(user_id) == 1:
        raise Failed


def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue all."""
    broker = _broker(sending.url)
    actor: Any = broker.get_actor(sending.handler)

    def enqueue(i: int, due: float | None) -> None:
        payload = {"user_id": i, "template": "default"}
        if due is None:
            actor.send(**payload)
        else:
            delay_ms = max(0, round((due - time.time()) * 1000))
            actor.send_with_options(kwargs=payload, delay=delay_ms)

    pool = broker.client.connection_pool
    for connection in [pool.get_connection() for _ in range(sending.in_flight)]:
        pool.release(connection)
    # Loads the script, and asks Redis once a process for the size of its stack
    broker.do_qsize(actor.queue_name)
    return sent_by_threads(sending, ledger, enqueue)


def work(working: Working) -> None:
    """Become dramatiq's worker program."""
    os.environ[URL] = working.url
    os.environ["dramatiq_worker_timeout"] = str(LONGEST_WAIT_MS)  # noqa: SIM112
    prefetch = working.prefetch or max(PREFETCH, 2 * working.concurrency)
    os.environ["dramatiq_queue_prefetch"] = str(prefetch)  # noqa: SIM112
    program = str(Path(sys.executable).with_name("dramatiq-gevent"))
    # A process logs nothing under a warning if the program does not set logging up
    os.execv(
        program,
        [
            program,
            "--processes=1",
            f"--threads={working.concurrency}",
            "--skip-logging",
            "benchmarks.adapters.dramatiq:serve",
        ],
    )


def serve() -> None:
    """Make the broker of a worker process; the worker program calls this."""
    # A failed run is no more than a debug message elsewhere; here it is an error with a traceback
    logging.getLogger("dramatiq.worker.WorkerThread").setLevel(logging.CRITICAL)
    dramatiq.set_broker(_broker(os.environ[URL]))


def left(url: str) -> int:
    """Count the messages that are not acknowledged, waiting, scheduled or running."""
    redis = _broker(url).client
    return sum(redis.hlen(f"dramatiq:{queue}.msgs") for queue in ("default", "default.DQ"))


def _broker(url: str) -> Any:
    # Any number of connections, where redis-py allows 100: all threads may need one at a time
    broker = RedisBroker(url=f"{url}?max_connections=100000")
    dramatiq.actor(noop, broker=broker)
    dramatiq.actor(sleep, broker=broker)
    # The shortest delay of a retry, in ms; 0 stands for the default
    dramatiq.actor(fails_once, broker=broker, max_retries=3, min_backoff=1, max_backoff=1)
    return broker


if __name__ == "__main__":
    main(sys.modules[__name__])
