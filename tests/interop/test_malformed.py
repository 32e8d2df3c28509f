"""What is no task message is quarantined by a Python worker, where Go's tools can deal with it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from asyncq import Client, Task
from asyncq.broker.keys import queue_keys
from asyncq.proto.asynq_pb2 import TaskMessage
from tests.interop import held
from tests.interop.gopeer import GoInspector, GoPeerError, GoServer, GoTask, go_enqueue
from tests.interop.pyworker import PyWorker

pytestmark = pytest.mark.usefixtures("go_peer")

KEYS = queue_keys("default")
LONG = b"\xff" * 200_000

MALFORMED = {
    "no-protobuf": b"\xff\xfe no protobuf \x00",
    "cut:é": TaskMessage(type="t", id="cut:é", queue="default").SerializeToString()[:-3],
    "empty": b"",
    "of-another-task": TaskMessage(type="t", id="x", queue="default").SerializeToString(),
    "of-another-queue": TaskMessage(type="t", id="of-another-queue", queue="q").SerializeToString(),
    "no-utf-8": b"\x0a\x02\xff\xfe",  # the type
    "long": LONG,
}


@pytest.fixture
async def redis(store_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(store_url) as redis:
        yield redis


async def _put(redis: Redis, task_id: str, raw: bytes) -> None:
    """Leave a task as a broken program might."""
    await redis.sadd("asynq:queues", "default")
    await redis.hset(KEYS.task(task_id), mapping={"msg": raw, "state": "pending"})
    await redis.lpush(KEYS.pending, task_id)


async def test_malformed_tasks_are_quarantined_for_gos_inspector(
    store_url: str, redis: Redis
) -> None:
    for task_id, raw in MALFORMED.items():
        await _put(redis, task_id, raw)
    await redis.lpush(KEYS.pending, "only-an-id")
    async with (
        Client(store_url) as client,
        PyWorker(store_url) as worker,
    ):
        await client.enqueue(Task("echo:good"))
        await worker.wait_ended(1)
    assert [event.type for event in worker.started] == ["echo:good"]

    async with GoInspector(store_url) as inspector:
        info = await inspector.queue_info("default")
        assert (info.archived, info.size) == (len(MALFORMED), len(MALFORMED))
        assert (info.processed, info.failed) == (len(MALFORMED) + 1, len(MALFORMED))
        listed = {task.id: task for task in await inspector.list_tasks("default", "archived")}
        assert listed.keys() == MALFORMED.keys()
        for task_id, task in listed.items():
            assert (task.type, task.state) == ("asyncq:malformed", "archived")
            assert "quarantined" in task.last_err
            assert MALFORMED[task_id].startswith(task.payload), "for a look at it"
            assert await redis.hget(KEYS.task(task_id), "raw") == MALFORMED[task_id]
            await inspector.delete_task("default", task_id)
        assert await inspector.list_tasks("default", "archived") == []
        await inspector.delete_queue("default")
    left = await held.keys(redis, "asynq:{default}:*")
    assert [key for key in left if not key.startswith((KEYS.processed, KEYS.failed))] == []


async def test_python_frees_what_a_malformed_task_has_blocked_in_go(
    store_url: str, redis: Redis
) -> None:
    # Go takes it, cannot read it, and leaves it in active; its recoverer then stops at it, so
    # that tasks of dead workers are never recovered either.
    async with GoServer(store_url, task_check_s=0.05) as server:
        await _put(redis, "bad", b"\xff\xff")
        (lost,) = await go_enqueue(store_url, [GoTask(type="block:x", retention_s=60)])
        await server.wait_started(1)
        await server.kill()
    assert (await held.scores(redis, KEYS.lease)).keys() == {"bad", lost.id}
    await redis.zadd(KEYS.lease, dict.fromkeys(("bad", lost.id), 1_000_000_000))
    async with GoInspector(store_url) as inspector:
        with pytest.raises(GoPeerError):
            await inspector.list_tasks("default", "active")

        async with PyWorker(store_url) as worker:
            (run,) = await worker.wait_started(1)
            worker.release(run.id)
            await worker.wait_ended(1)
        assert (run.id, run.retry_count) == (lost.id, 1)
        assert (await inspector.task_info("default", lost.id)).state == "completed"
        (bad,) = await inspector.list_tasks("default", "archived")
        assert bad.id == "bad"
        assert await redis.hget(KEYS.task("bad"), "raw") == b"\xff\xff"
        assert (await inspector.queue_info("default")).active == 0
