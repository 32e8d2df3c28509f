"""How the cost of a task grows: with idle workers, with queues, with processes, with a backlog.

Only asyncq is measured here. The workloads are part of `make bench`, and run by themselves:

    python -m benchmarks.scale                      # all of them, once
    python -m benchmarks.scale fleet-100 --redis URL
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from redis import Redis

from asyncq import Client, TaskType
from benchmarks import machine
from benchmarks.adapter import queue_names
from benchmarks.adapters.ours import Welcome
from benchmarks.claims import CLAIMS, Claim, against, own
from benchmarks.ledger import VARIABLE, Ledger
from benchmarks.programs import MeasurementError, wait_until
from benchmarks.systems import OURS, ROOT, System
from benchmarks.workloads import (
    WORKLOADS,
    Bench,
    Measure,
    Numbers,
    drain_backlog,
    percentiles,
    register,
)

SETTLE_S: Final = 2.0  # the loops of a worker begin spread over its first second
IDLE_S: Final = 10.0  # two heartbeats
DONE_WITHIN_S: Final = 120.0
STOP_WITHIN_S: Final = 30.0
CHUNK: Final = 10_000

NOOP = TaskType("noop", Welcome)


# Idle workers


def fleet(workers: int, processes: int, *, a_second: int, queues: int = 1) -> Measure:
    """Make a workload that sends to idle workers at a steady rate, for ten seconds.

    `redis_cpu_us` is all that Redis used meanwhile, divided by the tasks: the enqueue, the
    heartbeats of all workers and everything else included.
    """

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(10 * a_second)
        names = queue_names(queues)
        bench.store.flush()
        with (
            bench.ledger(tasks) as ledger,
            _fleet(bench.url, ledger, processes, workers // processes, queues) as started,
        ):
            time.sleep(SETTLE_S)
            idle = _Use(bench, started)
            time.sleep(IDLE_S)
            idle.end()
            busy = _Use(bench, started)
            asyncio.run(_push(bench.url, ledger, a_second, names))
            _wait_for(ledger, tasks)
            busy.end()
            clean = _stopped(started)
            waits_ms = [(row.started_ns - row.sent_ns) / 1e6 for row in ledger.rows()]
            once = not ledger.wrong()
        scripts = busy.scripts - idle.scripts / idle.seconds * busy.seconds
        numbers: Numbers = {"tasks": tasks, "workers": workers, "queues": queues}
        return (
            numbers
            | percentiles(waits_ms)
            | {
                "redis_cpu_us": busy.redis_cpu_s / tasks * 1e6,
                "pump_calls_a_task": scripts / tasks - 1,  # one script is the enqueue's
                "commands_a_s": idle.commands / idle.seconds,
                "redis_cpu_percent": idle.redis_cpu_s / idle.seconds * 100,
                "commands_a_worker_s": idle.commands / idle.seconds / workers,
                "redis_cpu_a_worker": idle.redis_cpu_s / idle.seconds * 100 / workers,
                "worker_cpu_percent": idle.workers_cpu_s / idle.seconds * 100,
                "busy_worker_cpu_percent": busy.workers_cpu_s / busy.seconds * 100,
                "once": float(once),
                "clean": float(clean),
            }
        )

    return measure


def connections(workers: int, processes: int, queues: int) -> Measure:
    """Make a workload that counts the connections of workers: those that wait, and all."""

    def measure(bench: Bench, system: System) -> Numbers:
        bench.store.flush()
        with (
            bench.ledger(1) as ledger,
            _fleet(bench.url, ledger, processes, workers // processes, queues) as started,
            Redis.from_url(bench.url) as redis,
        ):
            time.sleep(SETTLE_S)
            clients: Any = redis.client_list()
            clean = _stopped(started)
        ours = [client for client in clients if client["name"].startswith("worker-")]
        every = Counter(client["name"] for client in ours)
        waiting = Counter(client["name"] for client in ours if "t" in client["flags"])  # tracking
        return {
            "workers": len(every),
            "queues": queues,
            "least_waiting": min(waiting[name] for name in every),
            "most_waiting": max(waiting[name] for name in every),
            "connections": sum(every.values()) / len(every),
            "clean": float(clean),
        }

    return measure


# Work


def spread(n: int, *, queues: int = 1, processes: int = 1) -> Measure:
    """Make a workload that drains `n` tasks, dealt to `queues`, by `processes` at once.

    The queues are paused until every worker stands ready, so that none gets a start.
    """

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n)
        names = queue_names(queues)
        bench.store.flush()
        with bench.ledger(tasks) as ledger, Redis.from_url(bench.url) as redis:
            asyncio.run(_fill(bench.url, names, tasks))
            paused = [f"asynq:{{{name}}}:paused" for name in names]
            redis.mset(dict.fromkeys(paused, "1"))
            with _fleet(bench.url, ledger, processes, 1, queues) as started:
                time.sleep(SETTLE_S)
                use = _Use(bench, started)
                redis.delete(*paused)
                _wait_for(ledger, tasks)
                use.end()
                clean = _stopped(started)
            rows = list(ledger.rows())
            once = not ledger.wrong()
        took_ns = max(row.ended_ns for row in rows) - min(row.started_ns for row in rows)
        return {
            "tasks": tasks,
            "queues": queues,
            "workers": processes,
            "rate": tasks / took_ns * 1e9,
            "redis_cpu_us": use.redis_cpu_s / tasks * 1e6,
            "worker_cpu_us": use.workers_cpu_s / tasks * 1e6,
            "once": float(once),
            "clean": float(clean),
        }

    return measure


# What they are made of


class _Use:
    """What Redis and the workers use from now on until `end`."""

    def __init__(self, bench: Bench, workers: Sequence[subprocess.Popen[bytes]]) -> None:
        self._bench = bench
        self._workers = workers
        self.seconds = self.redis_cpu_s = self.workers_cpu_s = 0.0
        self.commands = self.scripts = 0.0
        self._before = self._look()

    def end(self) -> None:
        """Stop counting."""
        used = [now - then for now, then in zip(self._look(), self._before, strict=True)]
        self.seconds, self.redis_cpu_s, self.workers_cpu_s, self.commands, self.scripts = used

    def _look(self) -> tuple[float, ...]:
        with Redis.from_url(self._bench.url) as redis:
            stats: Any = redis.info("commandstats")
        return (
            time.monotonic(),
            self._bench.store.cpu_s(),
            sum(machine.cpu_s(worker.pid) or 0.0 for worker in self._workers),
            self._bench.store.commands(),
            stats.get("cmdstat_evalsha", {}).get("calls", 0),
        )


@contextmanager
def _fleet(
    url: str, ledger: Ledger, processes: int, servers: int, queues: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start processes with `servers` workers each; whatever happens, none outlives the block."""
    command = [sys.executable, "-m", "benchmarks.fleet", url]
    command += ["--servers", str(servers), "--queues", str(queues)]
    environment = {name: value for name, value in os.environ.items() if "ASYNCQ_" not in name}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(processes):
            started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | {VARIABLE: str(ledger.path)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for us, and we end them
                )
            )
        for process in started:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise MeasurementError("a process of the fleet did not start")
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def _stopped(started: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Stop them, all at once; False if one did not end as it should."""
    for process in started:
        process.terminate()
    try:
        codes = [process.wait(STOP_WITHIN_S) for process in started]
    except subprocess.TimeoutExpired:
        return False
    return not any(codes)


def _wait_for(ledger: Ledger, tasks: int) -> None:
    what = f"not all of {tasks} tasks were done"
    wait_until(lambda: ledger.done() == tasks, what, DONE_WITHIN_S, [])


async def _push(url: str, ledger: Ledger, a_second: int, queues: Sequence[str]) -> None:
    """Send a task for each row of the ledger, at even intervals however long the last one took."""
    loop = asyncio.get_running_loop()
    async with Client(url) as client, asyncio.TaskGroup() as pushes:

        async def push(i: int) -> None:
            ledger.sent(i, time.time_ns())
            await client.enqueue(NOOP.new(_payload(i)), queue=random.choice(queues))

        began = loop.time()
        for i in range(ledger.tasks):
            await asyncio.sleep(began + i / a_second - loop.time())
            pushes.create_task(push(i))


async def _fill(url: str, queues: Sequence[str], tasks: int) -> None:
    """Enqueue as many tasks, dealt to the queues in turn."""
    names = itertools.cycle(queues)
    async with Client(url) as client:
        for start in range(0, tasks, CHUNK):
            await client.enqueue_many(
                NOOP.new(_payload(i), queue=next(names))
                for i in range(start, min(start + CHUNK, tasks))
            )


def _payload(i: int) -> Welcome:
    return Welcome(user_id=i, template="default")


# The registry

_ONLY = {OURS.name}
_THERE_BEFORE = set(WORKLOADS)

register(
    "fleet-100", "300 pushes a second to 100 idle workers",
    fleet(100, 10, a_second=300), only=_ONLY,
)  # fmt: skip
register(
    "fleet-10", "to 10 workers", fleet(10, 2, a_second=300),
    only=_ONLY, rounds=3, beside="fleet-100",
)  # fmt: skip
register(
    "fleet-1", "to 1 worker", fleet(1, 1, a_second=300),
    only=_ONLY, rounds=3, beside="fleet-100",
)  # fmt: skip
register(
    "connections", "Connections of 100 workers on 10 queues", connections(100, 10, queues=10),
    only=_ONLY, rounds=1,
)  # fmt: skip
register(
    "backlog-1m", "asyncq, of 1,000,000 waiting", drain_backlog(1_000_000, 20_000, 100),
    only=_ONLY, beside="drain-100",
)  # fmt: skip
register("queues-1", "Drain of 1 queue", spread(20_000), only=_ONLY, rounds=3)
register(
    "queues-100", "of 100 queues", spread(20_000, queues=100),
    only=_ONLY, rounds=3, beside="queues-1",
)  # fmt: skip
register(
    "pickup-100-queues", "Pickup on an idle worker of 100 queues",
    fleet(1, 1, a_second=100, queues=100), only=_ONLY, rounds=3,
)  # fmt: skip
register("processes-1", "Drain by 1 process", spread(40_000), only=_ONLY, rounds=3)
register(
    "processes-2", "by 2 processes", spread(40_000, processes=2),
    only=_ONLY, rounds=3, beside="processes-1",
)  # fmt: skip
register(
    "processes-4", "by 4 processes", spread(40_000, processes=4),
    only=_ONLY, rounds=3, beside="processes-1",
)  # fmt: skip

NAMES: Final = [name for name in WORKLOADS if name not in _THERE_BEFORE]

CLAIMS += [
    Claim(
        "Drain with 1,000,000 waiting: share of the rate with 20,000",
        against("backlog-1m", OURS, theirs="drain-100"),
        at_least=0.85,
    ),
    Claim(
        "300 pushes a second to 100 idle workers: Redis CPU a push",
        own("fleet-100", "redis_cpu_us"),
        at_most=500,
        unit=" µs",
    ),
    Claim(
        "300 pushes a second to 100 idle workers: pickup, p99",
        own("fleet-100", "p99_ms"),
        at_most=20,
        unit=" ms",
    ),
    Claim(
        "100 workers on 10 queues: connections that wait, the most of a worker",
        own("connections", "most_waiting"),
        at_most=1,
    ),
]


def main() -> None:
    """Measure once, and print the numbers as JSON, a line a workload."""
    parser = argparse.ArgumentParser(description="How the cost of a task grows.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--tasks", type=float, default=1.0, metavar="SCALE", help="of the tasks")
    parser.add_argument("--redis", metavar="URL", help="this Redis, whose database is EMPTIED")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no {', '.join(unknown)}, only {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory(prefix="asyncq-bench-") as folder:
        for name in options.names or NAMES:
            with machine.store(options.redis) as store:
                bench = Bench(store, Path(folder), options.tasks)
                numbers = WORKLOADS[name].measure(bench, OURS)
            rounded = {key: round(value, 3) for key, value in numbers.items()}
            print(json.dumps({name: rounded}), flush=True)


if __name__ == "__main__":
    main()
