"""Worker processes that die: what they held runs again, and nothing is lost."""

from __future__ import annotations

import asyncio
import signal
import time

import pytest
from redis.asyncio import Redis

from asyncq import Client, Context, Mux, Server, Task
from tests.chaos.live import Queue, QueueState, Worker, eventually, told

FLEETING = [f"once-{i}" for i in range(10)]
PATIENT = [f"again-{i}" for i in range(90)]


def mux_of(ran: list[str]) -> Mux:
    mux = Mux()

    @mux.task("nap")
    async def nap(seconds: float, ctx: Context) -> None:
        ran.append(ctx.task_id)

    return mux


async def kill_with_100_in_flight(url: str, client: Client, redis: Redis, queue: Queue) -> None:
    await client.enqueue_many(Task("nap", 60, task_id=i, max_retry=0) for i in FLEETING)
    await client.enqueue_many(Task("nap", 60, task_id=i) for i in PATIENT)
    async with Worker(url, "concurrency=100") as worker:
        await told(redis, 100)
        worker.send(signal.SIGKILL)
        await worker.ended(5)
    assert await queue.state() == QueueState(active=100, lease=100, hashes=100)


async def check_recovered(queue: Queue, ran: list[str]) -> None:
    assert sorted(ran) == sorted(PATIENT)  # each once
    assert await queue.ids("archived") == {*FLEETING}
    assert await queue.state() == QueueState(archived=10, hashes=10)
    for task_id in FLEETING:
        assert (await queue.message(task_id)).error_msg == "asynq: task lease expired"
    assert await queue.handled() == (190, 100)


async def over(queue: Queue) -> bool:
    return await queue.state() == QueueState(archived=10, hashes=10)


async def test_what_a_killed_worker_held_runs_again_when_its_leases_end(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    await kill_with_100_in_flight(store_url, client, redis, queue)
    assert await queue.age_leases() == 100
    ran: list[str] = []
    async with Server(store_url).running(mux_of(ran)):
        await eventually(lambda: over(queue))
    await check_recovered(queue, ran)


@pytest.mark.timeout(150)
async def test_what_a_killed_worker_held_runs_again_within_90_s(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    """With the leases and intervals that ship, in real time: 35 to 40 s."""
    ran: list[str] = []
    await kill_with_100_in_flight(store_url, client, redis, queue)
    killed_at = time.monotonic()
    async with Server(store_url).running(mux_of(ran)):
        await eventually(lambda: over(queue), within_s=90)
    assert 25 < time.monotonic() - killed_at < 90
    await check_recovered(queue, ran)


async def test_a_worker_that_was_stopped_leaves_the_task_to_who_took_it_over(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    """SIGSTOP, the leases end, another worker takes over, SIGCONT: the first changes nothing."""
    await client.enqueue(Task("nap", 0.3, task_id="a", retention=3600))
    over = asyncio.Event()
    mux = Mux()

    @mux.task("nap")
    async def nap(seconds: float, ctx: Context) -> str:
        began.set()
        await over.wait()
        return "second"

    began = asyncio.Event()
    async with Worker(store_url, "shutdown_timeout=1") as worker:
        await told(redis, 1)
        worker.send(signal.SIGSTOP)
        assert await queue.age_leases() == 1
        async with Server(store_url).running(mux):
            await asyncio.wait_for(began.wait(), 15)
            held = await queue.leases()
            worker.send(signal.SIGCONT)
            await told(redis, 2)  # its handler ended, or was cancelled
            worker.send(signal.SIGTERM)  # all it has to save is saved before it ends
            assert await worker.ended(10) == 0
            assert await queue.in_state("a") == "active"
            assert (await queue.leases())["a"] % 1 == held["a"] % 1
            assert await queue.handled() == (1, 1)  # the recovery
            over.set()
            await eventually(lambda: queue.ids("completed"))
    assert await queue.redis.hget(queue.keys.task("a"), "result") == b'"second"'
    assert await queue.handled() == (2, 1)


async def test_an_active_task_without_a_lease_is_recovered(
    store_url: str, client: Client, queue: Queue
) -> None:
    await client.enqueue(Task("nap", 1, task_id="a"))
    await queue.redis.rpoplpush(queue.keys.pending, queue.keys.active)
    ran: list[str] = []
    async with Server(store_url).running(mux_of(ran)):
        await eventually(lambda: ran)
        await eventually(lambda: _is_empty(queue))


async def test_a_lease_of_go_gets_its_30_s_of_grace(
    store_url: str, client: Client, queue: Queue
) -> None:
    await client.enqueue_many(Task("nap", 1, task_id=i) for i in ("fresh", "old"))
    for _ in range(2):
        await queue.redis.rpoplpush(queue.keys.pending, queue.keys.active)
    now = int(time.time())
    await queue.redis.zadd(queue.keys.lease, {"fresh": now - 5, "old": now - 40})
    ran: list[str] = []
    async with Server(store_url).running(mux_of(ran)):
        await eventually(lambda: ran)
    assert ran == ["old"]
    assert await queue.leases() == {"fresh": now - 5}


async def _is_empty(queue: Queue) -> bool:
    return await queue.state() == QueueState()
