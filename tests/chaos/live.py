"""What the tests with real stores, servers and processes share: waiting, looking, starting."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from asyncq.broker.keys import queue_keys
from asyncq.message import TaskMessage
from asyncq.server.loops.heartbeat import LEASE_S
from asyncq.server.server import Server

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 15.0

Condition = Callable[[], object | Awaitable[object]]


async def eventually(condition: Condition, *, within_s: float = TIMEOUT_S) -> Any:
    """Wait until a condition holds, for what Redis or another process tells nobody of."""
    deadline = time.monotonic() + within_s
    while True:
        holds = condition()
        if isawaitable(holds):
            holds = await holds
        if holds:
            return holds
        assert time.monotonic() < deadline, f"it did not come to hold in {within_s} s"
        await asyncio.sleep(0.005)


@dataclass(frozen=True)
class QueueState:
    """How many tasks of a queue are in each state, and how many task hashes there are."""

    pending: int = 0
    active: int = 0
    lease: int = 0
    scheduled: int = 0
    retry: int = 0
    archived: int = 0
    completed: int = 0
    hashes: int = 0


class Queue:
    """One queue as it stands in Redis, read and spoiled by hand."""

    def __init__(self, redis: Redis, name: str = "default") -> None:
        self.redis: Any = redis  # whose types leave open what we know: that answers are bytes
        self.name = name
        self.keys = queue_keys(name)

    async def state(self) -> QueueState:
        """Count everything."""
        k = self.keys
        hashes = [key async for key in self.redis.scan_iter(match=k.task("*"), count=1000)]
        pipe = self.redis.pipeline(transaction=True)
        pipe.llen(k.pending).llen(k.active)
        for key in (k.lease, k.scheduled, k.retry, k.archived, k.completed):
            pipe.zcard(key)
        sizes: list[int] = await pipe.execute()
        return QueueState(*sizes, len(hashes))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    async def message(self, task_id: str) -> TaskMessage:
        """The message of a task, decoded."""
        raw = await self.redis.hget(self.keys.task(task_id), "msg")
        assert raw is not None, f"there is no task {task_id}"
        return TaskMessage.FromString(raw)

    async def in_state(self, task_id: str) -> str | None:
        """What a task's hash calls its state."""
        raw = await self.redis.hget(self.keys.task(task_id), "state")
        return None if raw is None else raw.decode()

    async def pending(self) -> list[str]:
        """The ids in pending, the next to be taken first."""
        ids = await self.redis.lrange(self.keys.pending, 0, -1)
        return [task_id.decode() for task_id in reversed(ids)]

    async def ids(self, name: str) -> set[str]:
        """The ids in one of the zsets, by its name in `QueueKeys`."""
        return {i.decode() for i in await self.redis.zrange(getattr(self.keys, name), 0, -1)}

    async def leases(self) -> dict[str, float]:
        """Every lease: the whole seconds are its end, the fraction is the mark."""
        found = await self.redis.zrange(self.keys.lease, 0, -1, withscores=True)
        return {task_id.decode(): score for task_id, score in found}

    async def age_leases(self, by_s: int = 3600) -> int:
        """End all leases now; the marks, which prove whose they are, stay. Return how many."""
        leases = await self.leases()
        if leases:
            aged = {task_id: score - by_s for task_id, score in leases.items()}
            await self.redis.zadd(self.keys.lease, aged, xx=True)
        return len(leases)

    async def handled(self) -> tuple[int, int]:
        """The counters: processed, failed."""
        processed, failed = await self.redis.mget(self.keys.processed, self.keys.failed)
        return int(processed or 0), int(failed or 0)


async def calls(redis: Redis) -> dict[str, int]:
    """How often each command has run, those inside scripts included."""
    stats = await redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()}


async def calls_during(redis: Redis, work: Awaitable[object]) -> dict[str, int]:
    """How often each command ran while `work` was done; what looks is left out."""
    before = await calls(redis)
    await work
    after = await calls(redis)
    ran = {name: after[name] - before.get(name, 0) for name in after if name != "info"}
    return {name: count for name, count in ran.items() if count}


@asynccontextmanager
async def leaving_nothing(server: Server) -> AsyncIterator[Server]:
    """Shut a server down at the end, whatever the test did."""
    try:
        yield server
    finally:
        await server.shutdown()


class Worker:
    """A worker process: `tests/chaos/worker.py`, which tells on a list in Redis what it does."""

    def __init__(self, url: str, *arguments: str) -> None:
        environment = {
            **os.environ,
            "ASYNCQ_REDIS_URL": url,
            "PYTHONPATH": str(ROOT),
            "PYTHONFAULTHANDLER": "1",
        }
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.worker", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return os.pread(self._log.fileno(), 2**20, 0).decode()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def ended(self, within_s: float) -> int:
        """Wait for its end and return its exit code."""
        return await asyncio.to_thread(self.process.wait, within_s)

    async def __aenter__(self) -> Worker:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            await self.ended(5)
        sys.stderr.write(self.log)  # pytest shows it when the test fails
        self._log.close()


async def told(redis: Any, count: int, *, key: str = "told", within_s: float = 30) -> list[str]:
    """Wait until workers have told `count` things, and return all of them."""

    async def enough() -> bool:
        return bool(await redis.llen(key) >= count)

    await eventually(enough, within_s=within_s)
    return [line.decode() for line in await redis.lrange(key, 0, -1)]


assert LEASE_S == 30.0  # what the bounds in these tests are made from
