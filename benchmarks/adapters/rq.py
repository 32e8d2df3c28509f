"""rq: its pool of workers, each a process that runs one job after the other.

The workers are SimpleWorkers, which its notes on performance give to jobs of a few milliseconds:
the default, a fork a job, ran far fewer. Its scheduler looks once a second, for which there
is no option, and knows whole seconds only.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from redis import Redis
from rq import Queue, Retry

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_threads
from benchmarks.ledger import Ledger

# Jobs that wait 10 ms ran the fastest with 8 to 16 processes on two cores; more of them took more
# CPU, so that fewer jobs were done.
PROCESSES = 5 * (os.cpu_count() or 1)

JOBS_A_CALL = 1000

# A second attempt is what a failure needs, and a crash: a job whose worker died counts as failed.
# No result is stored.
OPTIONS: dict[str, Any] = {"retry": Retry(max=1), "result_ttl": 0}

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
    queue = _queue(sending.url, sending.in_flight)
    function = f"benchmarks.adapters.rq.{sending.handler}"
    pool = queue.connection.connection_pool
    for connection in [pool.get_connection() for _ in range(sending.in_flight)]:
        pool.release(connection)
    queue.get_redis_server_version()  # which it asks for before the first job

    if sending.how == "bulk":
        return _sent_as_many(sending, queue, function)

    def enqueue(i: int, due: float | None) -> None:
        payload = {"user_id": i, "template": "default"}
        if due is None:
            queue.enqueue(function, kwargs=payload, **OPTIONS)
        else:
            at = datetime.fromtimestamp(due, UTC)
            queue.enqueue_at(at, function, kwargs=payload, **OPTIONS)

    return sent_by_threads(sending, ledger, enqueue)


def _sent_as_many(sending: Sending, queue: Any, function: str) -> float:
    began = time.perf_counter()
    for first in range(0, sending.tasks, JOBS_A_CALL):
        queue.enqueue_many(
            [
                Queue.prepare_data(
                    function, kwargs={"user_id": i, "template": "default"}, **OPTIONS
                )
                for i in range(first, min(first + JOBS_A_CALL, sending.tasks))
            ]
        )
    return time.perf_counter() - began


def work(working: Working) -> None:
    """Become rq's pool of workers."""
    program = str(Path(sys.executable).with_name("rq"))
    os.execv(
        program,
        [
            program,
            "worker-pool",
            f"--url={working.url}",
            f"--num-workers={min(working.concurrency, PROCESSES)}",
            "--worker-class=rq.SimpleWorker",
            # A failed run is an error with a traceback here, and a debug message elsewhere
            "--logging-level=CRITICAL",
            "default",
        ],
    )


def left(url: str) -> int:
    """Count the jobs that are waiting, scheduled or running."""
    queue = _queue(url, 1)
    registries = (queue.scheduled_job_registry, queue.started_job_registry)
    return (
        queue.count
        + len(queue.intermediate_queue.get_job_ids())
        + sum(registry.get_job_count(cleanup=False) for registry in registries)
    )


def _queue(url: str, connections: int) -> Any:
    return Queue(connection=Redis.from_url(url, max_connections=connections))


if __name__ == "__main__":
    main(sys.modules[__name__])
