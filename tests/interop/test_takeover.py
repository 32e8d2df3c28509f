"""A frozen worker wakes when its task belongs to another run, and can no longer touch it.

The lease of the frozen worker is aged by hand, so that recoverers find it at once: Go's takes what
ended 30 s ago.
"""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import Client, Task, TaskFailedError, TaskHandle, TaskOptions, TaskState
from asyncq.broker.keys import queue_keys
from tests.interop import held
from tests.interop.gopeer import GoServer
from tests.interop.process import ServerProcess, TaskEvent
from tests.interop.pyworker import PyWorker
from tests.stores import StoreServer

pytestmark = pytest.mark.usefixtures("go_peer")

KEYS = queue_keys("default")
REFUSED = "the lease was lost before its outcome was saved"
LEASE_LOST = "lease lost"
LEASE_EXPIRED = "LeaseExpiredError: asynq: task lease expired"


@dataclass(frozen=True)
class Late:
    """What the woken worker tries, with the options of its task and what its handler ends with."""

    mode: str = ""
    """In which the handler goes on; empty: it does not."""
    options: TaskOptions = field(default_factory=TaskOptions)
    ended_with: tuple[str, ...] = ("",)
    logs: str = REFUSED
    terminated: bool = False
    needs_redis: bool = False


KEPT = TaskOptions(unique=600, retention=600)
LATE = {
    "done": Late("echo"),
    "done with a lock": Late("echo", TaskOptions(unique=600)),
    "complete": Late("echo", KEPT),
    "retry": Late("fail", KEPT, ("RuntimeError: block failed on purpose",)),
    "archive": Late("skip", KEPT, ("SkipRetry: block failed for good",)),
    "requeue": Late("", KEPT, ("server shutdown",), terminated=True),
    # Its heartbeat, when one is due, may tell it before the answer does.
    "result": Late("write", KEPT, (LEASE_EXPIRED, LEASE_LOST), "lease", needs_redis=True),
    "extension": Late("", KEPT, (LEASE_LOST,), "lost its lease", needs_redis=True),
}


@pytest.fixture
def server(redis_server: Callable[..., StoreServer]) -> StoreServer:
    """A Redis of its own, which the test pauses."""
    return redis_server()


@pytest.fixture
async def redis(server: StoreServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url) as redis:
        yield redis


@pytest.fixture
async def client(server: StoreServer) -> AsyncIterator[Client]:
    async with Client(server.url) as client:
        yield client


@pytest.mark.parametrize("by", ["go", "python"])
@pytest.mark.parametrize("late", LATE.values(), ids=LATE.keys())
async def test_a_woken_worker_changes_nothing_of_the_run_that_took_over(
    server: StoreServer, redis: Redis, client: Client, late: Late, by: str
) -> None:
    handle = await client.enqueue(Task("block"), **late.options)
    async with PyWorker(server.url, shutdown_timeout_s=0 if late.terminated else 1) as frozen:
        await frozen.wait_started(1)
        await frozen.freeze()
        await _age_leases(redis)
        async with _taker(by, server.url) as taker:
            (run,) = await taker.wait_started(1, timeout=20)
            assert (run.id, run.retry_count) == (handle.id, 1)
            before, lease = await held.all_but_leases(redis, KEYS), await _lease(redis, handle)
            end = await _wake(frozen, handle, server, late)
            await (frozen.wait_gone() if late.terminated else frozen.stop())
            assert await held.all_but_leases(redis, KEYS) == before
            assert (await _lease(redis, handle)).is_of_the_run_of(lease)
            assert end.err in late.ended_with
            assert late.logs in frozen.errors, "it has tried nothing"
            await _ends_well(taker, handle, redis, by, before)


@pytest.mark.parametrize("by", ["go", "python"])
async def test_a_woken_worker_leaves_a_task_archived_that_had_no_try_left(
    server: StoreServer, redis: Redis, client: Client, by: str
) -> None:
    handle = await client.enqueue(Task("block"), max_retry=0, retention=600)
    async with PyWorker(server.url) as frozen:
        await frozen.wait_started(1)
        await frozen.freeze()
        await _age_leases(redis)
        async with _taker(by, server.url):
            with pytest.raises(TaskFailedError, match="asynq: task lease expired"):
                await handle.result(timeout=20)
            before = await held.all_but_leases(redis, KEYS)
            await _wake(frozen, handle, server, LATE["complete"])
            await frozen.stop()
            assert await held.all_but_leases(redis, KEYS) == before
            assert REFUSED in frozen.errors, "it has tried nothing"
    assert (await handle.info()).state is TaskState.ARCHIVED


async def _wake(
    frozen: PyWorker, handle: TaskHandle[Any], server: StoreServer, late: Late
) -> TaskEvent:
    """Let the worker go on and its handler end, and return that."""
    if not late.needs_redis:
        # Or a heartbeat could tell the worker before its handler has ended, and it would try
        # nothing.
        server.pause()
    try:
        if late.terminated:
            frozen.signal(signal.SIGTERM)
        if late.mode:
            frozen.release(handle.id, late.mode)
        frozen.thaw()
        (end,) = await frozen.wait_ended(1)
        return end
    finally:
        server.resume()


def _taker(by: str, url: str) -> ServerProcess:
    if by == "python":
        return PyWorker(url)
    return GoServer(url, task_check_s=0.05, delayed_check_s=0.05, retry_delay_s=0)


async def _age_leases(redis: Redis) -> None:
    """Let all leases have ended a day ago; the fraction, which says whose they are, stays."""
    for id, score in (await held.scores(redis, KEYS.lease)).items():
        assert score % 1, "the lease names no run"
        await redis.zadd(KEYS.lease, {id: score - 86400}, xx=True)


@dataclass(frozen=True)
class Lease:
    """A lease as found: the fraction is the mark of a Python run, zero for a Go run."""

    mark: float
    ends: int
    found_at: float

    def is_of_the_run_of(self, before: Lease) -> bool:
        """Whether only that run's own heartbeat can have written it since `before`."""
        return self.mark == before.mark and before.ends <= self.ends <= self.found_at + 31


async def _lease(redis: Redis, handle: TaskHandle[Any]) -> Lease:
    ((id, score),) = (await held.scores(redis, KEYS.lease)).items()
    assert id == handle.id
    return Lease(score % 1, int(score), time.time())


async def _ends_well(
    taker: ServerProcess,
    handle: TaskHandle[Any],
    redis: Redis,
    by: str,
    before: dict[str, Any],
) -> None:
    """Let the run that took over end: it counts once, and what it leaves is its own."""
    kept = (await handle.info()).retention
    taker.release(handle.id)
    await taker.wait_ended(1)
    await taker.stop()
    assert await held.number(redis, KEYS.processed) == int(before[KEYS.processed]) + 1
    assert await held.number(redis, KEYS.failed) == 1, "the run that was lost"
    assert await redis.exists(KEYS.active, KEYS.lease, KEYS.pending, KEYS.retry) == 0
    assert await held.keys(redis, "*:unique:*") == []
    if not kept:
        assert await redis.exists(KEYS.task(handle.id)) == 0
        return
    info = await handle.info()
    assert (info.state, info.retried) == (TaskState.COMPLETED, 1)
    assert (await handle.result())["by"] == by
