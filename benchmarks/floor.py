"""The floor: what this machine, its Redis and its Python carry without a task queue.

Each function is a measurement in a process of its own, which prints its numbers as JSON:

    python -m benchmarks.floor NAME URL TASKS

This is the one part of the benchmarks that looks inside asyncq, to send the very same scripts.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import redis.asyncio as aioredis
from pydantic import BaseModel

from asyncq import Client, TaskType
from asyncq.broker.broker import Broker, Request
from asyncq.broker.scripts import Command
from asyncq.errors import BrokerError
from asyncq.outcome import DONE
from benchmarks.adapter import SLEEP_S
from benchmarks.ledger import Ledger
from benchmarks.machine import Store
from benchmarks.programs import answer_of, print_answer
from benchmarks.systems import OURS, System
from benchmarks.workloads import Bench, Measure, Numbers, fill, register

FLOOR = System(
    name="floor",
    title="no task queue",
    language="Python",
    distribution="redis",
    runs="",
    acknowledges="",
    acknowledging="",
)

PUMP_BATCH = 50
PUMPS = 2


class Welcome(BaseModel):
    """The one payload of the benchmarks."""

    user_id: int
    template: str


async def get(url: str, n: int) -> Numbers:
    """One GET of redis-py after the other: a bare round trip."""
    redis: Any = aioredis.Redis.from_url(url)
    await redis.get("nothing")
    began = time.perf_counter()
    for _ in range(n):
        await redis.get("nothing")
    rate = n / (time.perf_counter() - began)
    await redis.aclose()
    return {"tasks": n, "rate": rate}


async def evalsha(url: str, n: int) -> Numbers:
    """One EVALSHA of redis-py after the other, with the bytes of our sequential enqueue."""
    calls = await _enqueue_calls(n + 1)
    redis: Any = aioredis.Redis.from_url(url)
    await redis.script_load(calls[0].call.script.text)
    await redis.execute_command(*calls[0].by_digest)
    commands = [call.by_digest for call in calls[1:]]
    began = time.perf_counter()
    for command in commands:
        await redis.execute_command(*command)
    rate = n / (time.perf_counter() - began)
    there = await redis.llen("asynq:{default}:pending")
    await redis.aclose()
    if there != n + 1:
        raise SystemExit(f"{there} of {n + 1} tasks are in Redis: the script has changed")
    return {"tasks": n, "rate": rate}


async def sleep(url: str, n: int) -> Numbers:
    """A hundred coroutines that each await 10 ms and write to the ledger, over and over."""
    ledger = Ledger.from_environment()
    assert ledger is not None
    numbers = iter(range(n))

    async def sleeper() -> None:
        for i in numbers:
            ledger.started(i)
            await asyncio.sleep(SLEEP_S)
            ledger.ended(i)

    began = time.perf_counter()
    await asyncio.gather(*(sleeper() for _ in range(100)))
    return {"tasks": n, "rate": n / (time.perf_counter() - began)}


async def drain(url: str, n: int) -> Numbers:
    """Fetch and acknowledge by our scripts as fast as two connections go, running nothing."""
    store = Store(url)
    broker = Broker(url)
    await broker.open()
    redis_cpu, cpu, began = store.cpu_s(), time.process_time(), time.perf_counter()
    counts = await asyncio.gather(*(_pump(broker, f"floor-{i}") for i in range(PUMPS)))
    took_s = time.perf_counter() - began
    cpu, redis_cpu = time.process_time() - cpu, store.cpu_s() - redis_cpu
    await broker.close()
    store.close()
    if sum(counts) != n:
        raise SystemExit(f"{sum(counts)} of {n} tasks were fetched")
    return {
        "tasks": n,
        "rate": n / took_s,
        "worker_cpu_us": cpu / n * 1e6,
        "redis_cpu_us": redis_cpu / n * 1e6,
    }


async def _pump(broker: Broker, server_id: str) -> int:
    """Take tasks until none comes, each call acknowledging those of the one before."""
    sequences = itertools.count(1)
    request = Request("default", next(sequences), want=PUMP_BATCH)
    taken = 0
    while True:
        (answer,) = await broker.pump(server_id, [request])
        if isinstance(answer, BrokerError):
            raise answer
        if not answer.ids:
            return taken
        taken += len(answer.ids)
        request = Request("default", next(sequences), want=PUMP_BATCH)
        for task_id in answer.ids:
            request.save(task_id, answer.mark, "", DONE)


async def _enqueue_calls(n: int) -> list[Command]:
    """Let our client enqueue, and keep the script calls instead of sending them."""
    calls: list[Command] = []

    class Kept:
        async def call(self, *commands: bytes | Command, soon: bool = False) -> list[Any]:
            calls.extend(command for command in commands if isinstance(command, Command))
            return [[] if isinstance(command, Command) else 1 for command in commands]

    client: Any = Client("redis://nowhere")
    client._broker.pool = Kept()
    kind = TaskType("noop", Welcome)
    for i in range(n):
        # With an id of the caller's own, for else our client makes do without a script.
        task = kind.new(Welcome(user_id=i, template="default"), task_id=str(uuid.uuid4()))
        await client.enqueue(task)
    if len(calls) != n:
        raise SystemExit(f"{n} enqueues made {len(calls)} script calls: the client has changed")
    return calls


# The workloads


def floor(name: str, n: int, *, filled: bool = False) -> Measure:
    """Make a workload of a measurement in this module."""

    def measure(bench: Bench, system: System) -> Numbers:
        tasks = bench.tasks(n)
        bench.store.flush()
        with bench.ledger(tasks) as ledger:
            if filled:
                fill(bench, OURS, ledger, "noop")
            command = [sys.executable, "-m", "benchmarks.floor", name, bench.url, str(tasks)]
            numbers: Numbers = answer_of(command, ledger)
        return numbers

    return measure


MEASUREMENTS: dict[str, Callable[[str, int], Awaitable[Numbers]]] = {
    "get": get,
    "evalsha": evalsha,
    "sleep": sleep,
    "drain": drain,
}
_ONLY = {FLOOR.name}

register(
    "floor-get", "bare GET of redis-py", floor("get", 2_000),
    only=_ONLY, beside="enqueue-sequential",
)  # fmt: skip
register(
    "floor-evalsha", "bare EVALSHA of redis-py, our script and bytes", floor("evalsha", 2_000),
    only=_ONLY, beside="enqueue-sequential",
)  # fmt: skip
register(
    "floor-sleep", "100 bare coroutines", floor("sleep", 10_000),
    only=_ONLY, beside="sleep-100",
)  # fmt: skip
register(
    "floor-drain",
    f"our scripts without handlers, {PUMP_BATCH} tasks a call, {PUMPS} connections",
    floor("drain", 20_000, filled=True),
    only=_ONLY,
    beside="drain-100",
)


def main() -> None:
    """Run one measurement: NAME URL TASKS."""
    print_answer(MEASUREMENTS)


if __name__ == "__main__":
    main()
