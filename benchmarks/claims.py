"""What the benchmarks are to show: each claim is a line, how it is measured, and its bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from benchmarks.floor import FLOOR
from benchmarks.measured import Results, Spread, ratio
from benchmarks.systems import ASYNQ, OURS, SYSTEMS, System

Value = Callable[[Results], Spread | None]
"""Takes a claim's value from results; None where they do not tell."""


@dataclass(frozen=True)
class Claim:
    """A line to be met: the median of `value` is at least, or at most, the bound."""

    title: str
    value: Value
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def met(self, value: Spread) -> bool:
        """Whether the median holds the bound."""
        enough = self.at_least is None or value.median >= self.at_least
        return enough and (self.at_most is None or value.median <= self.at_most)

    @property
    def bound(self) -> str:
        """The bound in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}{self.unit}"
        return f"at most {self.at_most:g}{self.unit}"


def own(workload: str, name: str) -> Value:
    """A number of ours by itself."""
    return lambda results: results.spread(workload, OURS.name, name)


def against(workload: str, other: System, *, name: str = "rate", theirs: str = "") -> Value:
    """Ours divided by another's, in the same workload or in `theirs`."""

    def value(results: Results) -> Spread | None:
        return ratio(
            results.values(workload, OURS.name, name),
            results.values(theirs or workload, other.name, name),
        )

    return value


def against_best(
    workload: str,
    fits: Callable[[System], bool],
    *,
    name: str = "rate",
    more_is_better: bool = True,
) -> Value:
    """Ours divided by that of the peer that fits and has the best median."""

    def value(results: Results) -> Spread | None:
        found = {
            peer.name: results.values(workload, peer.name, name)
            for peer in SYSTEMS.values()
            if peer is not OURS and fits(peer)
        }
        medians = {peer: median(values.values()) for peer, values in found.items() if values}
        if not medians:
            return None
        best = (max if more_is_better else min)(medians, key=medians.__getitem__)
        return ratio(results.values(workload, OURS.name, name), found[best])

    return value


def time_against(workload: str, theirs: str) -> Value:
    """The time that one of ours takes, divided by the time that one of the floor takes."""
    return lambda results: ratio(
        results.values(theirs, FLOOR.name, "rate"), results.values(workload, OURS.name, "rate")
    )


def any_peer(_: System) -> bool:
    """Every system but ours."""
    return True


def python_peer(system: System) -> bool:
    """The Python systems."""
    return system.language == "Python"


def careful_python_peer(system: System) -> bool:
    """The Python systems that acknowledge after running."""
    return python_peer(system) and system.acknowledges == "after"


CLAIMS = [
    Claim("Drain, concurrency 100: times Go Asynq", against("drain-100", ASYNQ), at_least=3),
    Claim(
        "Drain, concurrency 100: times the fastest Python system that acknowledges after running",
        against_best("drain-100", careful_python_peer),
        at_least=4.5,
    ),
    Claim("Drain, concurrency 10: times Go Asynq", against("drain-10", ASYNQ), at_least=1.5),
    Claim(
        "Drain, concurrency 100: share of the rate of the same scripts without handlers",
        against("drain-100", FLOOR, theirs="floor-drain"),
        at_least=0.6,
    ),
    Claim(
        "Drain, concurrency 100: Redis CPU a task, share of Go Asynq's",
        against("drain-100", ASYNQ, name="redis_cpu_us"),
        at_most=0.25,
    ),
    Claim(
        "10 ms of waiting a task: share of the rate of 100 bare coroutines",
        against("sleep-100", FLOOR, theirs="floor-sleep"),
        at_least=0.8,
    ),
    Claim(
        "10 ms of waiting a task, prefetch=20: share of the rate of 100 bare coroutines",
        against("sleep-100-prefetch", FLOOR, theirs="floor-sleep"),
        at_least=0.95,
    ),
    Claim("10 ms of waiting a task: times Go Asynq", against("sleep-100", ASYNQ), at_least=1),
    Claim("Enqueue, 50 in flight: times Go Asynq", against("enqueue-50", ASYNQ), at_least=1),
    Claim(
        "Enqueue, 50 in flight, bytes built beforehand: times Go Asynq",
        against("enqueue-50-raw", ASYNQ),
        at_least=1.2,
    ),
    Claim(
        "Enqueue, 50 in flight: times the fastest Python system",
        against_best("enqueue-50", python_peer),
        at_least=2.5,
    ),
    Claim(
        "Bulk enqueue: times the fastest peer that has one",
        against_best("enqueue-bulk", any_peer),
        at_least=5,
    ),
    Claim(
        "Sequential enqueue: time of a bare EVALSHA of redis-py with the same script and bytes",
        time_against("enqueue-sequential", "floor-evalsha"),
        at_most=1.15,
    ),
    Claim(
        "Sequential enqueue: times the fastest Python system",
        against_best("enqueue-sequential", python_peer),
        at_least=1,
    ),
    Claim("Pickup on an idle worker, p50", own("pickup", "p50_ms"), at_most=1, unit=" ms"),
    Claim("Pickup on an idle worker, p99", own("pickup", "p99_ms"), at_most=3, unit=" ms"),
    Claim(
        "Pickup on an idle worker, p50: share of the best peer's",
        against_best("pickup", any_peer, name="p50_ms", more_is_better=False),
        at_most=1,
    ),
    Claim(
        "Pickup on an idle worker, p99: share of the best peer's",
        against_best("pickup", any_peer, name="p99_ms", more_is_better=False),
        at_most=1,
    ),
    Claim("Scheduled tasks: late by, p99", own("lateness", "p99_ms"), at_most=10, unit=" ms"),
    Claim("Scheduled tasks: never early", own("lateness", "least_ms"), at_least=0, unit=" ms"),
]
"""In the order in which they are shown; other modules add theirs."""
