"""Our side of the load test: each measurement runs in a process of its own and prints JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from statistics import median
from typing import Any

import redis.asyncio as aioredis
from pydantic import BaseModel

from asyncq import Client, Context, Mux, Server, Task, TaskType
from tests.interop import gopeer


class Welcome(BaseModel):
    """The payload that Go's side uses, too."""

    user_id: int
    template: str = "default"


WELCOME = TaskType("email:welcome", Welcome)
Result = dict[str, Any]


async def sequential(url: str, n: int) -> Result:
    """One enqueue after the other, beside as many bare GETs of redis-py."""
    redis = aioredis.Redis.from_url(url)
    await redis.ping()
    began = time.perf_counter()
    for _ in range(n):
        await redis.get("nothing")
    bare_s = time.perf_counter() - began
    await redis.aclose()
    async with Client(url) as client:
        await client.enqueue(WELCOME.new(Welcome(user_id=0)), queue="sequential")
        began = time.perf_counter()
        for i in range(n):
            await client.enqueue(WELCOME.new(Welcome(user_id=i)), queue="sequential")
        took_s = time.perf_counter() - began
    return {"rate": n / took_s, "call_ms": took_s / n * 1e3, "round_trip_ms": bare_s / n * 1e3}


async def concurrent(url: str, n: int, *, in_flight: int, typed: bool) -> Result:
    """Many callers, each waiting for its own answer."""
    raw = [b'{"user_id":%d,"template":"default"}' % i for i in range(n)]
    numbers = iter(range(n))

    async with Client(url) as client:

        async def caller() -> None:
            for i in numbers:
                task = WELCOME.new(Welcome(user_id=i)) if typed else Task("email:welcome", raw[i])
                await client.enqueue(task)

        await client.enqueue(Task("warm:up"), queue="warm-up")
        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(in_flight)))
        took_s = time.perf_counter() - began
        cpu_s = time.process_time() - cpu
    await _expect(url, "LLEN", "asynq:{default}:pending", n)
    return {"rate": n / took_s, "cpu_us": cpu_s / n * 1e6}


async def bulk(url: str, n: int) -> Result:
    """One call with everything."""
    async with Client(url) as client:
        await client.enqueue(Task("warm:up"), queue="warm-up")
        began = time.perf_counter()
        await client.enqueue_many(WELCOME.new(Welcome(user_id=i)) for i in range(n))
        took_s = time.perf_counter() - began
    await _expect(url, "LLEN", "asynq:{default}:pending", n)
    return {"rate": n / took_s}


async def drain(url: str, n: int, *, concurrency: int) -> Result:
    """A server empties a queue of `n` typed no-op tasks, everything on as it ships.

    From the first handler's start to the last one's return, as Go's side counts it.
    """
    seen: set[int] = set()
    times: list[float] = []
    all_seen = asyncio.Event()
    mux = Mux()

    @mux.task("email:welcome")
    async def welcome(payload: Welcome) -> None:
        if not seen:
            times.append(time.perf_counter())
        seen.add(payload.user_id)
        if len(seen) == n:
            times.append(time.perf_counter())
            all_seen.set()

    redis = aioredis.Redis.from_url(url)
    redis_cpu = await _redis_cpu_s(redis)
    server = Server(url, concurrency=concurrency)
    cpu = time.process_time()
    async with server.running(mux):
        await all_seen.wait()
        await server.drain()
        cpu_s = time.process_time() - cpu
        redis_cpu_s = await _redis_cpu_s(redis) - redis_cpu
    await redis.aclose()
    await _expect(url, "GET", "asynq:{default}:processed", n)
    await _expect(url, "LLEN", "asynq:{default}:active", 0)
    await _expect(url, "ZCARD", "asynq:{default}:lease", 0)
    return {
        "rate": n / (times[1] - times[0]),
        "cpu_us": cpu_s / n * 1e6,
        "redis_cpu_us": redis_cpu_s / n * 1e6,
    }


async def pickup(url: str, n: int) -> Result:
    """From the enqueue's call to the handler's start, on a worker that is idle each time."""
    latencies: list[float] = []
    started = asyncio.Event()
    sent_at = 0.0
    mux = Mux()

    @mux.task("email:welcome")
    async def welcome(payload: Welcome) -> None:
        latencies.append((time.perf_counter() - sent_at) * 1e3)
        started.set()

    async with Client(url) as client, Server(url).running(mux):
        for i in range(n + 10):
            started.clear()
            sent_at = time.perf_counter()
            await client.enqueue(WELCOME.new(Welcome(user_id=i)))
            await started.wait()
            await asyncio.sleep(0.01)
    return _percentiles(latencies[10:])


async def lateness(url: str, n: int) -> Result:
    """How long after its instant a scheduled task starts; below 0 would be too early."""
    late_ms: list[float] = []
    all_ran = asyncio.Event()
    mux = Mux()

    @mux.task("at")
    async def at(payload: float) -> None:
        late_ms.append((time.time() - payload) * 1e3)
        if len(late_ms) == n:
            all_ran.set()

    async with Client(url) as client, Server(url).running(mux):
        first = time.time() + 0.5
        for i in range(n):
            instant = first + i * 0.0137
            await client.enqueue(at.new(instant), process_at=datetime.fromtimestamp(instant, UTC))
        await all_ran.wait()
    return _percentiles(late_ms) | {"min_ms": min(late_ms)}


async def pickup_from_go(url: str, n: int) -> Result:
    """From the call of Go's enqueue to the Python handler's start, on an idle worker."""
    started_ns: dict[str, int] = {}
    all_ran = asyncio.Event()
    mux = Mux()

    @mux.task("from:go")
    async def from_go(ctx: Context) -> None:
        started_ns[ctx.task_id] = time.time_ns()
        if len(started_ns) == n + 10:
            all_ran.set()

    async with Server(url).running(mux):
        tasks = [gopeer.GoTask(type="from:go") for _ in range(n + 10)]
        sent = await _go_enqueue(url, tasks, interval_s=0.01)
        await all_ran.wait()
    return _percentiles([(started_ns[task.id] - task.at_ns) / 1e6 for task in sent[10:]])


async def lateness_from_go(url: str, n: int) -> Result:
    """How long after its stored score a task starts that Go scheduled: below 0 is too early."""
    late_ms: list[float] = []
    all_ran = asyncio.Event()
    scores: dict[str, float] = {}
    mux = Mux()

    @mux.task("from:go")
    async def from_go(ctx: Context) -> None:
        late_ms.append((time.time() - scores[ctx.task_id]) * 1e3)
        if len(late_ms) == n:
            all_ran.set()

    tasks = [
        gopeer.GoTask(type="from:go", process_at_unix=time.time() + 3 + i * 5 / n) for i in range(n)
    ]
    await _go_enqueue(url, tasks)
    redis: Any = aioredis.Redis.from_url(url)
    for task_id, score in await redis.zrange("asynq:{default}:scheduled", 0, -1, withscores=True):
        scores[task_id.decode()] = score
    await redis.aclose()
    async with Server(url).running(mux):
        await all_ran.wait()
    return _percentiles(late_ms) | {"min_ms": min(late_ms)}


async def results(url: str, n: int) -> Result:
    """From a handler's return to its waiter, with 100 waiters on one client."""
    returned_at: dict[int, float] = {}
    latencies: list[float] = []
    mux = Mux()

    @mux.task("answer", retention=60)
    async def answer(payload: int) -> int:
        await asyncio.sleep(0.05)
        returned_at[payload] = time.perf_counter()
        return payload

    async with Client(url) as client, Server(url).running(mux):

        async def waiter(i: int) -> None:
            handle = await client.enqueue(answer.new(i))
            assert await handle.result(timeout=10) == i
            latencies.append((time.perf_counter() - returned_at[i]) * 1e3)

        await waiter(-1)
        latencies.clear()
        for first in range(0, n, 100):
            await asyncio.gather(*(waiter(i) for i in range(first, first + 100)))
    return _percentiles(latencies)


async def cancel(url: str, n: int) -> Result:
    """From the call that cancels a running task to its handler's CancelledError."""
    started = asyncio.Event()
    latencies: list[float] = []
    sent_at = 0.0
    cancelled = asyncio.Event()
    mux = Mux()

    @mux.task("endless", max_retry=0)
    async def endless() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            latencies.append((time.perf_counter() - sent_at) * 1e3)
            cancelled.set()

    async with Client(url) as client, Server(url).running(mux):
        for _ in range(n):
            started.clear()
            cancelled.clear()
            handle = await client.enqueue(endless.new())
            await started.wait()
            sent_at = time.perf_counter()
            await handle.cancel()
            await cancelled.wait()
    return _percentiles(latencies)


MEASUREMENTS: dict[str, Callable[[str, int], Awaitable[Result]]] = {
    "sequential": sequential,
    "concurrent": lambda url, n: concurrent(url, n, in_flight=50, typed=True),
    "concurrent-raw": lambda url, n: concurrent(url, n, in_flight=50, typed=False),
    "bulk": bulk,
    "drain": lambda url, n: drain(url, n, concurrency=100),
    "drain-10": lambda url, n: drain(url, n, concurrency=10),
    "pickup": pickup,
    "pickup-go": pickup_from_go,
    "lateness": lateness,
    "lateness-go": lateness_from_go,
    "results": results,
    "cancel": cancel,
}


async def _go_enqueue(
    url: str, tasks: list[gopeer.GoTask], interval_s: float = 0.0
) -> list[gopeer.Enqueued]:
    # On an event loop of its own, so that feeding Go does not delay the handlers measured here.
    return await asyncio.to_thread(
        lambda: asyncio.run(gopeer.go_enqueue(url, tasks, interval_s=interval_s))
    )


def _percentiles(values_ms: list[float]) -> Result:
    ordered = sorted(values_ms)
    return {
        "p50_ms": median(ordered),
        "p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "max_ms": ordered[-1],
    }


async def _redis_cpu_s(redis: Any) -> float:
    info = await redis.info("cpu")
    return float(info["used_cpu_user"] + info["used_cpu_sys"])


async def _expect(url: str, command: str, key: str, n: int) -> None:
    redis: Any = aioredis.Redis.from_url(url)
    found = int(await redis.execute_command(command, key) or 0)
    await redis.aclose()
    if found != n:
        raise SystemExit(f"{command} {key} is {found}, not {n}: the measurement does not count")


def main() -> None:
    """Run one measurement: NAME URL N."""
    logging.basicConfig(level=logging.ERROR)
    name, url, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if find_spec("uvloop") is not None:
        import uvloop

        loop_factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        print(json.dumps(runner.run(_measured(name, url, n))))


async def _measured(name: str, url: str, n: int) -> Result:
    return await MEASUREMENTS[name](url, n)


if __name__ == "__main__":
    main()
