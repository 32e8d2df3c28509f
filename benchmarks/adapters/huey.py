"""huey: its consumer with greenlets, which its documentation advises for tasks that wait.

Its scheduler looks once a second, the most often that it can. Each task is enqueued by a call of
its own.
"""

from __future__ import annotations

import sys

if "work" in sys.argv[1:2]:
    # Before all other imports, as greenlets need it; senders are threads, as in a web server.
    from gevent import monkey

    monkey.patch_all()

import logging
import time
from typing import Any, cast

from huey import RedisHuey

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_threads
from benchmarks.ledger import Ledger

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
    huey, tasks = _huey(sending.url, sending.in_flight)
    task = tasks[sending.handler]

    def enqueue(i: int, due: float | None) -> None:
        payload = {"user_id": i, "template": "default"}
        if due is None:
            task(**payload)
        else:
            task.schedule(kwargs=payload, delay=due - time.time())

    pool = huey.storage.pool
    for connection in [pool.get_connection() for _ in range(sending.in_flight)]:
        pool.release(connection)
    return sent_by_threads(sending, ledger, enqueue)


def work(working: Working) -> None:
    """Serve until SIGTERM."""
    # A failed run is an error with a traceback here, and a debug message elsewhere
    logging.getLogger("huey").setLevel(logging.CRITICAL)
    # Each worker holds a connection while it waits, and so does the scheduler
    huey, _ = _huey(working.url, working.concurrency + 1)
    consumer = huey.create_consumer(
        workers=working.concurrency,
        worker_type="greenlet",
        scheduler_interval=1,
        periodic=False,
        check_worker_health=False,
        graceful_signal="TERM",
    )
    consumer.run()


def left(url: str) -> int:
    """Count the tasks that are waiting or scheduled; Redis knows nothing of running ones."""
    huey, _ = _huey(url, 1)
    return int(huey.pending_count() + huey.scheduled_count())


def _huey(url: str, connections: int) -> tuple[Any, dict[str, Any]]:
    huey = RedisHuey(url=f"{url}?max_connections={connections}", results=False)
    return huey, {
        "noop": huey.task()(noop),
        "sleep": huey.task()(sleep),
        "fails_once": huey.task(retries=1, retry_delay=0)(fails_once),
    }


if __name__ == "__main__":
    main(sys.modules[__name__])
