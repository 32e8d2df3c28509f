"""The workloads: each is a function that lets one system do one thing, and returns its numbers.

Numbers have the unit in their names: `rate` is tasks a second, `..._us` microseconds a task,
`once`, `acked` and `clean` are 1.0 for yes. A workload that fails raises `MeasurementError`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import machine
from benchmarks.adapter import Sending, Working
from benchmarks.ledger import Ledger
from benchmarks.machine import Store
from benchmarks.programs import (
    MeasurementError,
    Worker,
    left,
    paused,
    send,
    stopped,
    wait_until,
    working,
)
from benchmarks.systems import ASYNQ, OURS, System

Numbers = dict[str, float]

DONE_WITHIN_S = 90.0
ACKED_WITHIN_S = 10.0
SETTLE_S = 0.5  # after a worker's first task, so that its start is over
IDLE_S = 10.0
SLOW_BACKLOG = 0.25  # of its share, for a system that would take long to fill a backlog
FEWEST = 20  # tasks of a measurement, whatever it is scaled by


@dataclass(frozen=True)
class Bench:
    """What a measurement needs: a Redis, a folder, and the share of the tasks wanted."""

    store: Store
    folder: Path
    factor: float = 1.0

    @property
    def url(self) -> str:
        """The URL of the Redis."""
        return self.store.url

    def tasks(self, n: int, share: float = 1.0) -> int:
        """Scale a number of tasks."""
        return max(FEWEST, round(n * share * self.factor))

    @contextmanager
    def ledger(self, tasks: int) -> Iterator[Ledger]:
        """Make the ledger of a measurement, in memory where the machine has such a folder."""
        shared = Path("/dev/shm")
        with tempfile.NamedTemporaryFile(
            prefix="asyncq-bench-", dir=shared if shared.is_dir() else self.folder
        ) as file:
            ledger = Ledger.create(file.name, tasks)
            try:
                yield ledger
            finally:
                ledger.close()


Measure = Callable[[Bench, System], Numbers]


@dataclass(frozen=True)
class Workload:
    """A row of the registry.

    `needs`: what a system must not lack (`System.lacks`). `only`: the systems it is for, all by
    default. `rounds`: in how many rounds it is measured at most, `peer_rounds` for the peers, for
    what is slow and steady.
    `beside`: the workload next to which it is measured, and in whose table it is a row.
    """

    name: str
    title: str
    measure: Measure
    needs: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    rounds: int | None = None
    peer_rounds: int | None = None
    beside: str | None = None

    def in_round(self, number: int, system: System) -> bool:
        """Whether a system is measured in this round; the first is 1."""
        most = self.rounds if not system.is_peer else self.peer_rounds or self.rounds
        return most is None or number <= most

    def fits(self, system: System) -> bool:
        """Whether the system can do it, and is to do it."""
        if self.only is None:
            return not system.is_floor and not (self.needs | {self.name}) & system.lacks
        return system.name in self.only and not self.needs & system.lacks


WORKLOADS: dict[str, Workload] = {}
"""All workloads by name; other modules add theirs."""


def register(
    name: str,
    title: str,
    measure: Measure,
    *,
    needs: Collection[str] = (),
    only: Collection[str] | None = None,
    rounds: int | None = None,
    peer_rounds: int | None = None,
    beside: str | None = None,
) -> None:
    """Add a workload; for the arguments see `Workload`.

    Raises `ValueError` if there is one of that name, or none that it is to stand beside.
    """
    if name in WORKLOADS:
        raise ValueError(f"there is a workload {name!r} already")
    if beside is not None and (beside not in WORKLOADS or WORKLOADS[beside].beside is not None):
        raise ValueError(f"{name!r} cannot stand beside {beside!r}, which has no table")
    able = None if only is None else frozenset(only)
    WORKLOADS[name] = Workload(
        name, title, measure, frozenset(needs), able, rounds, peer_rounds, beside
    )


def groups() -> list[list[Workload]]:
    """Return the workloads in the order in which they are measured, with those beside them."""
    return [
        [first, *(each for each in WORKLOADS.values() if each.beside == first.name)]
        for first in WORKLOADS.values()
        if first.beside is None
    ]


# Enqueueing


def enqueue(n: int, how: str, in_flight: int = 1) -> Measure:
    """Make a workload that only enqueues."""

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n, system.scale)
        bench.store.flush()
        with bench.ledger(tasks) as ledger:
            redis_cpu = bench.store.cpu_s()
            sent = send(system, Sending(bench.url, "noop", tasks, how, in_flight), ledger)
            redis_cpu = bench.store.cpu_s() - redis_cpu
            there = left(system, bench.url, ledger)
        if there < tasks:
            raise MeasurementError(f"only {there} of {tasks} tasks are in Redis")
        return {
            "tasks": tasks,
            "rate": tasks / sent.seconds,
            "worker_cpu_us": sent.cpu_s / tasks * 1e6,
            "redis_cpu_us": redis_cpu / tasks * 1e6,
        }

    return measure


# Draining


def drain(
    n: int,
    concurrency: int,
    *,
    handler: str = "noop",
    runs: int = 1,
    workers: int = 1,
    prefetch: int = 0,
) -> Measure:
    """Make a workload that empties a queue filled before; `runs` is how often each task runs."""

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n, system.scale)
        how = Working(bench.url, concurrency, prefetch)
        bench.store.flush()
        with bench.ledger(tasks) as ledger:
            if workers == 1:
                fill(bench, system, ledger, handler)
            with working(system, how, ledger, bench.folder, workers=workers) as started:
                if workers > 1:  # or the first would be done before the others are there
                    warm_up(bench, system, ledger, started)
                    with paused(started):
                        fill(bench, system, ledger, handler)
                cost = _until_done(bench, ledger, started, tasks, runs)
                acked = _nothing_left(bench, system, ledger)
                clean = stopped(started)
            numbers = _rate(ledger, tasks, runs)
            return numbers | cost | _checks(ledger, runs, acked=acked, clean=clean)

    return measure


def drain_backlog(n: int, part: int, concurrency: int) -> Measure:
    """Make a workload that runs the first `part` of `n` waiting tasks."""

    def measure(bench: Bench, system: System) -> Numbers:
        fills_slowly = system.language == "Python" and "bulk" in system.lacks
        share = system.scale * (SLOW_BACKLOG if fills_slowly else 1)
        tasks, wanted = bench.tasks(n, share), bench.tasks(part, share)
        bench.store.flush()
        with bench.ledger(tasks) as ledger:
            before = bench.store.memory_bytes()
            fill(bench, system, ledger, "noop")
            waiting_bytes = (bench.store.memory_bytes() - before) / tasks
            how = Working(bench.url, concurrency)
            with working(system, how, ledger, bench.folder) as started:
                cost = _until_done(bench, ledger, started, wanted, 1)
                clean = stopped(started)
            # What was not run must wait still: nothing is lost by the stop.
            there = left(system, bench.url, ledger)
            acked = there == tasks - ledger.done()
            once = all(row.runs <= 1 for row in ledger.rows())
            numbers = _rate(ledger, wanted, 1) | cost
            return numbers | {
                "waiting": tasks,
                "bytes_a_task": waiting_bytes,
                "once": float(once),
                "acked": float(acked),
                "clean": float(clean),
            }

    return measure


def fill(bench: Bench, system: System, ledger: Ledger, handler: str) -> None:
    """Enqueue by the fastest way that the system has."""
    how = "concurrent" if "bulk" in system.lacks else "bulk"
    send(system, Sending(bench.url, handler, ledger.tasks, how), ledger)


def _until_done(
    bench: Bench, ledger: Ledger, workers: list[Worker], wanted: int, runs: int
) -> Numbers:
    """Wait until so many tasks are done; return what they cost from the first seen on."""
    wait_until(ledger.done, "no task was run", DONE_WITHIN_S, workers)
    seen, spent = ledger.done(runs), _spent(bench, workers)
    wait_until(
        lambda: ledger.done(runs) >= wanted,
        f"not all of {wanted} tasks were done",
        DONE_WITHIN_S,
        workers,
    )
    now = _spent(bench, workers)
    # With few tasks, or long pauses between two looks, all may be done at the first one.
    return _cost(spent, now, ledger.done(runs) - seen)


def _spent(bench: Bench, workers: list[Worker]) -> tuple[float | None, float]:
    each = [machine.cpu_s(worker.pid) for worker in workers]
    known = [cpu_s for cpu_s in each if cpu_s is not None]
    return sum(known) if known else None, bench.store.cpu_s()


def _cost(
    before: tuple[float | None, float], after: tuple[float | None, float], tasks: int
) -> Numbers:
    if tasks < FEWEST / 2:
        return {}
    cost = {"redis_cpu_us": (after[1] - before[1]) / tasks * 1e6}
    if before[0] is not None and after[0] is not None:
        cost["worker_cpu_us"] = (after[0] - before[0]) / tasks * 1e6
    return cost


def _nothing_left(bench: Bench, system: System, ledger: Ledger) -> bool:
    """Whether Redis comes to hold none of the tasks as not done."""
    deadline = time.monotonic() + ACKED_WITHIN_S
    while left(system, bench.url, ledger):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _rate(ledger: Ledger, wanted: int, runs: int) -> Numbers:
    """Runs a second, from the first start to the end of the last task wanted."""
    ended = sorted(row.ended_ns for row in ledger.rows() if row.ended_ns)[:wanted]
    began = min(row.started_ns for row in ledger.rows() if row.started_ns)
    return {"tasks": wanted, "rate": wanted * runs / max(ended[-1] - began, 1) * 1e9}


def _checks(ledger: Ledger, runs: int, *, acked: bool, clean: bool) -> Numbers:
    return {
        "once": float(not ledger.wrong(runs)),
        "acked": float(acked),
        "clean": float(clean),
    }


# Waiting


def pickup(n: int, *, sender: System | None = None) -> Measure:
    """Make a workload that sends to a worker which is idle each time."""

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n)
        sending = Sending(bench.url, "noop", tasks, "paced", interval_s=system.pace_s)
        return _sent_to_idle(bench, system, sender or system, sending)

    return measure


def lateness(n: int, *, sender: System | None = None, whole_seconds: bool = False) -> Measure:
    """Make a workload of tasks due at their instants; `whole_seconds`: as Asynq stores them."""

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n)
        sending = Sending(bench.url, "noop", tasks, "scheduled", interval_s=0.01, delay_s=1.0)
        return _sent_to_idle(bench, system, sender or system, sending, cut=whole_seconds)

    return measure


def _sent_to_idle(
    bench: Bench, system: System, sender: System, sending: Sending, *, cut: bool = False
) -> Numbers:
    bench.store.flush()
    with (
        bench.ledger(sending.tasks) as ledger,
        working(system, Working(bench.url, 100), ledger, bench.folder) as started,
    ):
        warm_up(bench, system, ledger, started)
        send(sender, sending, ledger)
        wait_until(
            lambda: ledger.done() == sending.tasks,
            f"not all of {sending.tasks} tasks were done",
            DONE_WITHIN_S,
            started,
            poll_s=0.05,
        )
        acked = _nothing_left(bench, system, ledger)
        clean = stopped(started)
        waits = [
            row.started_ns - (row.sent_ns // 10**9 * 10**9 if cut else row.sent_ns)
            for row in ledger.rows()
        ]
        numbers: Numbers = {"tasks": sending.tasks}
        return (
            numbers
            | percentiles([wait / 1e6 for wait in waits])
            | _checks(ledger, 1, acked=acked, clean=clean)
        )


def warm_up(bench: Bench, system: System, ledger: Ledger, workers: list[Worker]) -> None:
    """Let a worker run a task, and settle; the ledger is empty again after it."""
    send(system, Sending(bench.url, "noop", 1, "sequential"), ledger)
    wait_until(ledger.done, "the worker took no task", DONE_WITHIN_S, workers)
    time.sleep(SETTLE_S)
    ledger.clear()


def percentiles(values_ms: list[float]) -> Numbers:
    """Sum up latencies in milliseconds."""
    ordered = sorted(values_ms)
    return {
        "p50_ms": median(ordered),
        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "least_ms": ordered[0],
        "max_ms": ordered[-1],
    }


# Cost of being there


def idle(n: int) -> Measure:
    """Make a workload that looks at an idle worker, then at its memory after a drain of `n`."""

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n, system.scale)
        idle_s = max(1.0, IDLE_S * min(bench.factor, 1.0))
        bench.store.flush()
        with (
            bench.ledger(tasks) as ledger,
            working(system, Working(bench.url, 100), ledger, bench.folder) as started,
        ):
            warm_up(bench, system, ledger, started)
            before = bench.store.commands(), _spent(bench, started)
            time.sleep(idle_s)
            after = bench.store.commands(), _spent(bench, started)
            numbers = {"commands_a_s": (after[0] - before[0]) / idle_s}
            numbers["redis_cpu_percent"] = (after[1][1] - before[1][1]) / idle_s * 100
            if after[1][0] is not None and before[1][0] is not None:
                numbers["worker_cpu_percent"] = (after[1][0] - before[1][0]) / idle_s * 100
            numbers |= _memory(started[0], "idle")
            fill(bench, system, ledger, "noop")
            _until_done(bench, ledger, started, tasks, 1)
            numbers |= _memory(started[0], "drained")
            clean = stopped(started)
        return numbers | {"tasks": tasks, "clean": float(clean)}

    return measure


def _memory(worker: Worker, when: str) -> Numbers:
    found = machine.memory(worker.pid)
    if found is None:
        return {}
    return {
        f"{when}_rss_mb": found.rss / 1e6,
        f"{when}_pss_mb": found.pss / 1e6,
        "processes": found.processes,
    }


# The registry

_GO_TOO = {OURS.name, ASYNQ.name}

register("enqueue-sequential", "Sequential enqueue", enqueue(2_000, "sequential"))
register("enqueue-50", "Enqueue, 50 in flight", enqueue(20_000, "concurrent", 50))
register(
    "enqueue-200", "Enqueue, 200 in flight", enqueue(20_000, "concurrent", 200),
    peer_rounds=3,
)  # fmt: skip
register(
    "enqueue-50-raw",
    "Enqueue, 50 in flight, payload bytes built beforehand",
    enqueue(20_000, "raw", 50),
    only=_GO_TOO,
)
register("enqueue-bulk", "Bulk enqueue", enqueue(20_000, "bulk"), needs={"bulk"})
register("drain-10", "Drain, concurrency 10", drain(20_000, 10))
register("drain-100", "Drain, concurrency 100", drain(20_000, 100))
register("drain-500", "Drain, concurrency 500", drain(20_000, 500), peer_rounds=3)
register(
    "sleep-100", "Drain, 10 ms of waiting a task, concurrency 100",
    drain(10_000, 100, handler="sleep"),
)  # fmt: skip
register(
    "sleep-100-prefetch",
    "asyncq with prefetch=20",
    drain(10_000, 100, handler="sleep", prefetch=20),
    only={OURS.name},
    beside="sleep-100",
)
register("pickup", "Pickup on an idle worker", pickup(200))
register(
    "lateness", "Scheduled tasks, start after the instant", lateness(200),
    needs={"scheduled"}, peer_rounds=3,
)  # fmt: skip
register(
    "retries",
    "A storm of retries: every task fails once; runs a second",
    drain(5_000, 100, handler="fails_once", runs=2),
    needs={"retries"},
    peer_rounds=3,
)
register(
    "waiting-200k",
    "The first tenth of 200,000 waiting tasks, concurrency 100",
    drain_backlog(200_000, 20_000, 100),
    peer_rounds=2,
)
register(
    "two-processes",
    "Drain, two worker processes at concurrency 100",
    drain(20_000, 100, workers=2),
    peer_rounds=2,
)
register("idle", "An idle worker, and its memory", idle(20_000), rounds=3, peer_rounds=1)
