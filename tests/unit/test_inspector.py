"""The inspector's numbers of queues, compared with what was put there."""

from __future__ import annotations

import pytest
from redis import Redis

from asyncq import Client, Mux, QueueNotFoundError, Server, Task
from asyncq.inspector import Inspector


async def test_it_counts_each_state_and_the_runs_of_today(store_url: str) -> None:
    mux = Mux()

    @mux.task("work")
    async def work(fails: bool) -> None:
        if fails:
            raise ValueError

    async with Client(store_url) as client, Inspector(store_url) as inspector:
        await client.enqueue(Task("work", False))
        await client.enqueue(Task("work", False, retention=60))
        await client.enqueue(Task("work", True, max_retry=0))
        await client.enqueue(Task("work", True))
        async with Server(store_url).running(mux) as server:
            await server.drain()
        await client.enqueue(Task("work", False, process_in=60))
        await client.enqueue_many([Task("work", False, queue="low")] * 3)
        assert await inspector.queues() == ["default", "low"]
        default, low = await inspector.queue_infos()
    assert (default.completed, default.archived, default.retry, default.scheduled) == (1, 1, 1, 1)
    assert (default.size, default.pending, default.active) == (4, 0, 0)
    assert (default.processed, default.failed) == (4, 2)
    assert (default.processed_total, default.failed_total) == (4, 2)
    assert not default.latency
    assert (low.queue, low.size, low.pending, low.processed) == ("low", 3, 3, 0)
    assert 0 < low.latency.total_seconds() < 60


async def test_it_counts_the_tasks_in_groups_of_any_name_and_sees_a_pause(store_url: str) -> None:
    with Redis.from_url(store_url) as redis:
        redis.sadd("asynq:queues", "mail")
        redis.set("asynq:{mail}:paused", 1)
        names = [f"g{n}" for n in range(1200)]
        redis.sadd("asynq:{mail}:groups", b"\xff", *names)
        pipeline = redis.pipeline()
        for name in (b"\xff", *(name.encode() for name in names)):
            pipeline.zadd(b"asynq:{mail}:g:" + name, {"one": 1, "two": 2})
        pipeline.execute()
    async with Inspector(store_url) as inspector:
        info = await inspector.queue_info("mail")
    assert (info.paused, info.groups, info.aggregating, info.size) == (True, 1201, 2402, 2402)


async def test_an_id_in_pending_without_a_task_has_no_latency(store_url: str) -> None:
    with Redis.from_url(store_url) as redis:
        redis.sadd("asynq:queues", "mail")
        redis.lpush("asynq:{mail}:pending", "ghost")
    async with Inspector(store_url) as inspector:
        info = await inspector.queue_info("mail")
    assert info.pending == 1
    assert not info.latency


async def test_a_queue_that_was_never_used_is_an_error(store_url: str) -> None:
    async with Inspector(store_url) as inspector:
        assert await inspector.queues() == []
        assert await inspector.queue_infos() == []
        with pytest.raises(QueueNotFoundError, match="'mail'"):
            await inspector.queue_info("mail")
