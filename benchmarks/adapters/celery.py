"""Celery: its worker program with the pool of threads, acknowledging after the run.

Of its pools, threads ran tasks that wait the fastest, with the least CPU; gevent was slower. So was
prefork, with 8 or 20 processes on two cores, save for tasks that do nothing, where it did as much.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from celery import Celery

from benchmarks.adapter import SLEEP_S, Sending, Working, main, sent_by_threads
from benchmarks.ledger import Ledger

# Tells the worker program's process what no option of that program carries
URL = "BENCH_URL"
PREFETCH = "BENCH_PREFETCH"

# More than any workload uses; the default is 10 of each, for which threads would have to wait
CONNECTIONS = 1000

# None outside a measurement, where no handler runs
ledger = cast(Ledger, Ledger.from_environment())

app = Celery(broker=os.environ.get(URL))
app.conf.update(
    # By default a task leaves Redis before it runs, and is lost with the worker's process.
    task_acks_late=True,
    task_ignore_result=True,
    # Its guide to optimizing says 64 or 128 for many short tasks; the default is 4.
    worker_prefetch_multiplier=int(os.environ.get(PREFETCH) or 128),
    # In seconds; what its documentation says for tasks that are to start at their instant
    worker_timer_precision=0.1,
    broker_pool_limit=CONNECTIONS,
    broker_transport_options={"max_connections": CONNECTIONS},
)


class Failed(Exception):
    """What the first run of a task that fails once raises."""


@app.task(name="noop")
def noop(user_id: int, template: str) -> None:
    """Do nothing."""
    ledger.ran(user_id)


@app.task(name="sleep")
def sleep(user_id: int, template: str) -> None:
    """Wait as a call to another service does."""
    ledger.started(user_id)
    time.sleep(SLEEP_S)
    ledger.ended(user_id)


@app.task(name="fails_once", autoretry_for=(Failed,), default_retry_delay=0)
def fails_once(user_id: int, template: str) -> None:
    """Fail in the first run."""
    if ledger.ran(user_id) == 1:
        raise Failed


def send(sending: Sending, ledger: Ledger) -> float:
    """Enqueue all."""
    app.conf.broker_url = sending.url
    task: Any = app.tasks[sending.handler]
    producers = [app.producer_pool.acquire() for _ in range(sending.in_flight)]
    for producer in producers:
        producer.channel.client.ping()
        producer.release()

    if sending.how == "bulk":
        return _sent_as_batch(sending, task)

    def enqueue(i: int, due: float | None) -> None:
        payload = {"user_id": i, "template": "default"}
        if due is None:
            task.delay(**payload)
        else:
            task.apply_async(kwargs=payload, eta=datetime.fromtimestamp(due, UTC))

    return sent_by_threads(sending, ledger, enqueue)


def _sent_as_batch(sending: Sending, task: Any) -> float:
    # The messages go out in pipelines of 1000, its default. A group sends one by one.
    began = time.perf_counter()
    with app.producer_pool.acquire() as producer, producer.batch():
        for i in range(sending.tasks):
            task.apply_async(kwargs={"user_id": i, "template": "default"}, producer=producer)
    return time.perf_counter() - began


def work(working: Working) -> None:
    """Become Celery's worker program."""
    os.environ[URL] = working.url
    if working.prefetch:
        os.environ[PREFETCH] = str(working.prefetch)
    program = str(Path(sys.executable).with_name("celery"))
    os.execv(
        program,
        [
            program,
            "--app=benchmarks.adapters.celery",
            "--quiet",
            "worker",
            "--pool=threads",
            f"--concurrency={working.concurrency}",
            "--loglevel=WARNING",
            # What workers tell each other, and what is told to a monitor
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
        ],
    )


def left(url: str) -> int:
    """Count the messages that are waiting, and those that a worker has not acknowledged."""
    with app.connection_for_write(url) as connection:
        redis = connection.default_channel.client
        return int(redis.llen("celery") + redis.hlen("unacked"))


if __name__ == "__main__":
    main(sys.modules[__name__])
