"""Signals to a worker process under load."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import Client, Task
from asyncq.proto.asynq_pb2 import ServerInfo
from tests.chaos.live import Queue, QueueState, Worker, eventually, told
from tests.stores import StoreServer

SLACK_S = 2.0


async def status(redis: Any) -> str | None:
    """What the one server there is calls its state."""
    for key in await redis.zrange("asynq:servers", 0, -1):
        if raw := await redis.get(key):
            return ServerInfo.FromString(raw).status
    return None


async def ends(worker: Worker, within_s: float) -> None:
    began = time.monotonic()
    assert await worker.ended(within_s + 10) == 0
    assert time.monotonic() - began < within_s


async def test_sigterm_under_load(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    running = [Task("nap", 0.6 if i % 2 else 60, task_id=f"r{i}") for i in range(10)]
    await client.enqueue_many(running)
    await client.enqueue_many(Task("quick", task_id=f"w{i}") for i in range(300))
    async with Worker(store_url, "concurrency=10", "shutdown_timeout=1.5") as worker:
        await told(redis, 10)
        worker.send(signal.SIGTERM)
        await ends(worker, 1.5 + SLACK_S)

    happened = await told(redis, 0)
    assert [line for line in happened if line.startswith("ran ")] == []
    assert {line for line in happened if line.startswith("ended ")} == {
        f"ended r{i}" for i in range(1, 10, 2)
    }
    pending = await queue.pending()
    put_back = {f"r{i}" for i in range(0, 10, 2)}
    assert set(pending[:5]) == put_back  # next to be taken
    assert pending[5:] == [f"w{i}" for i in range(300)]
    assert await queue.state() == QueueState(pending=305, hashes=305)
    for task_id in put_back:
        message = await queue.message(task_id)
        assert (message.retried, message.error_msg) == (0, "")
    assert await queue.handled() == (5, 0)
    assert await redis.zcard("asynq:servers") == await redis.zcard("asynq:workers") == 0


async def test_what_was_put_back_runs_in_the_order_it_had(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    ids = [f"r{i}" for i in range(8)]
    await client.enqueue_many(Task("doze", task_id=i) for i in ids)
    async with Worker(store_url, "concurrency=8", "shutdown_timeout=0") as worker:
        await told(redis, 8)
        worker.send(signal.SIGTERM)
        await ends(worker, SLACK_S)
    assert await queue.pending() == ids


@pytest.mark.parametrize("prefetch", [0, 100])
async def test_sigterm_while_two_calls_bring_tasks(
    prefetch: int, store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    """All that was taken and not begun goes back to where it was, each task of it once."""
    ids = [f"q{i}" for i in range(20_000)]
    await client.enqueue_many(Task("quick", task_id=i) for i in ids)
    async with Worker(store_url, "concurrency=64", f"prefetch={prefetch}") as worker:
        await told(redis, 300)
        worker.send(signal.SIGTERM)
        await ends(worker, 8 + SLACK_S)
    ran = [line.removeprefix("ran ") for line in await told(redis, 0)]
    assert 300 <= len(ran) == len(set(ran)) < len(ids)
    left = set(ids) - set(ran)
    assert await queue.pending() == [i for i in ids if i in left]
    assert await queue.state() == QueueState(pending=len(left), hashes=len(left))
    assert await queue.handled() == (len(ran), 0)


async def test_a_second_signal_forces(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    await client.enqueue(Task("nap", 60, task_id="a"))
    async with Worker(store_url, "shutdown_timeout=60") as worker:
        await told(redis, 1)
        worker.send(signal.SIGTERM)
        await eventually(lambda: _has_status(redis, "closed"))
        assert worker.process.poll() is None
        worker.send(signal.SIGINT)
        await ends(worker, SLACK_S)
    assert await queue.pending() == ["a"]


async def test_sigtstp_only_stops_fetching(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    await client.enqueue(Task("nap", 0.5, task_id="a"))
    async with Worker(store_url) as worker:
        await told(redis, 1)
        worker.send(signal.SIGTSTP)
        await eventually(lambda: _has_status(redis, "stopped"))
        await client.enqueue(Task("quick", task_id="b"))
        assert await told(redis, 2) == ["began a", "ended a"]
        await eventually(lambda: _no_lease(queue))  # it is still saving
        assert worker.process.poll() is None
        worker.send(signal.SIGTERM)
        await ends(worker, SLACK_S)
    assert await queue.pending() == ["b"]


@pytest.mark.parametrize("task_type", ["stubborn", "stuck"])
async def test_a_handler_that_does_not_end_does_not_keep_the_process(
    task_type: str, store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    await client.enqueue(Task(task_type, task_id="a"))
    async with Worker(store_url, "shutdown_timeout=0.5") as worker:
        if task_type == "stuck":
            await eventually(lambda: redis.hexists(queue.keys.task("a"), "progress"))
        else:
            await told(redis, 1)
        worker.send(signal.SIGTERM)
        await ends(worker, 0.5 + SLACK_S)
    assert await queue.pending() == ["a"]
    assert (await queue.message("a")).retried == 0


async def test_a_worker_waits_for_redis_and_says_so_once(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server(appendonly=True)
    async with Client(server.url) as client:
        await client.enqueue(Task("quick", task_id="a"))
    server.stop()
    async with Worker(server.url) as worker:
        await eventually(lambda: "trying again" in worker.log)
        await asyncio.sleep(1)  # the fourth attempt, at least
        server.start()
        async with Redis.from_url(server.url) as redis:
            await told(redis, 1)
        worker.send(signal.SIGTERM)
        await ends(worker, SLACK_S)
        assert worker.log.count("trying again until it works") == 1
        assert "Redis answers again" in worker.log


async def test_sigterm_while_redis_is_away_at_the_start(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server()
    server.stop()
    async with Worker(server.url) as worker:
        await eventually(lambda: "trying again" in worker.log)
        worker.send(signal.SIGTERM)
        await ends(worker, SLACK_S)


async def test_sigterm_while_redis_is_away_under_load(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server(appendonly=True)
    async with Client(server.url) as client, Redis.from_url(server.url) as redis:
        await client.enqueue(Task("nap", 60))
        async with Worker(server.url, "shutdown_timeout=0.5") as worker:
            await told(redis, 1)
            server.kill()
            worker.send(signal.SIGTERM)
            await ends(worker, 0.5 + 5)  # outcomes get 1 s, so do the server's records


async def _has_status(redis: Redis, wanted: str) -> bool:
    return await status(redis) == wanted


async def _no_lease(queue: Queue) -> bool:
    return (await queue.state()).lease == 0
