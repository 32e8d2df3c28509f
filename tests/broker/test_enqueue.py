"""What an enqueue leaves in Redis, and that a refusal leaves nothing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from asyncq import BrokerError, DuplicateTaskError, TaskIDConflictError
from asyncq.broker.broker import Broker, NewTask
from asyncq.broker.keys import queue_keys
from tests.broker.conftest import BrokerWithout
from tests.chaos.live import Queue, QueueState

LOCK = "asynq:{default}:unique:t:x"


async def put(broker: Broker, *tasks: NewTask) -> list[type[Exception] | None]:
    """Enqueue, and tell what was refused with which error."""
    return [
        None if error is None else type(error) for error in await broker.enqueue("default", tasks)
    ]


async def keys(queue: Queue) -> set[str]:
    return {key.decode() async for key in queue.redis.scan_iter()}


@pytest.mark.parametrize("new_id", [False, True])
async def test_a_task_is_pending_under_its_message(
    new_id: bool, broker: Broker, queue: Queue
) -> None:
    before = time.time()
    assert await put(broker, NewTask("a", "t", b"message", new_id)) == [None]
    fields = await queue.redis.hgetall(queue.keys.task("a"))
    since = int(fields.pop(b"pending_since"))
    assert fields == {b"msg": b"message", b"state": b"pending"}
    assert before - 1 < since / 1e9 < time.time() + 1
    assert await queue.redis.smembers("asynq:queues") == {b"default"}


@pytest.mark.parametrize(
    "special", [{"group": "g"}, {"at_ms": 1_900_000_000_000}, {"lock": LOCK, "lock_s": 60}]
)
async def test_a_new_id_does_not_make_a_special_task_pending(
    special: dict[str, Any], broker: Broker, queue: Queue
) -> None:
    tasks = [NewTask("a", "t", b"m", new_id=True), NewTask("b", "t", b"m", new_id=True, **special)]
    assert await put(broker, *tasks) == [None, None]
    fields = await queue.redis.hgetall(queue.keys.task("b"))
    assert fields.get(b"group") == (b"g" if "group" in special else None)
    assert fields.get(b"unique_key") == (LOCK.encode() if "lock" in special else None)
    assert await queue.in_state("b") == (
        "aggregating" if "group" in special else "scheduled" if "at_ms" in special else "pending"
    )


async def test_any_name_is_a_queue(broker: Broker, queue: Queue) -> None:
    name = "日本 100%d %b"
    assert await broker.enqueue(name, [NewTask("a", "t", b"50%b", new_id=True)]) == [None]
    k = queue_keys(name)
    assert await queue.redis.hget(k.task("a"), "msg") == b"50%b"
    assert await queue.redis.lrange(k.pending, 0, -1) == [b"a"]


async def test_a_delayed_task_has_a_whole_second_and_its_exact_instant(
    broker: Broker, queue: Queue
) -> None:
    at_ms = 1_900_000_000_123
    await put(broker, NewTask("a", "t", b"m", at_ms=at_ms))
    assert await queue.redis.zscore(queue.keys.scheduled, "a") == 1_900_000_001
    assert await queue.redis.zscore(queue.keys.due, "a") == at_ms
    assert await queue.in_state("a") == "scheduled"


async def test_a_task_in_a_group_waits_there(broker: Broker, queue: Queue) -> None:
    await put(broker, NewTask("a", "t", b"m", group="g:1"))
    assert await queue.redis.smembers(queue.keys.groups) == {b"g:1"}
    assert await queue.redis.zrange(queue.keys.group("g:1"), 0, -1) == [b"a"]
    assert await queue.in_state("a") == "aggregating"


async def test_a_lock_is_held_by_the_first(broker: Broker, queue: Queue) -> None:
    first, second = (NewTask(i, "t", b"m", lock=LOCK, lock_s=60) for i in "ab")
    assert await put(broker, first, second) == [None, DuplicateTaskError]
    assert await queue.redis.get(LOCK) == b"a"
    assert 55 < await queue.redis.ttl(LOCK) <= 60
    assert await queue.pending() == ["a"]


async def test_an_id_conflicts_within_a_batch_and_with_what_is_there(
    broker: Broker, queue: Queue
) -> None:
    assert await put(broker, NewTask("a", "t", b"1"), NewTask("a", "t", b"2")) == [
        None, TaskIDConflictError
    ]  # fmt: skip
    assert await put(broker, NewTask("a", "t", b"3")) == [TaskIDConflictError]
    assert await queue.redis.hget(queue.keys.task("a"), "msg") == b"1"


async def test_a_conflict_leaves_no_lock_behind(broker: Broker, queue: Queue) -> None:
    await put(broker, NewTask("a", "t", b"m"))
    refused = NewTask("a", "t", b"m", lock=LOCK, lock_s=60)
    assert await put(broker, refused) == [TaskIDConflictError]
    assert not await queue.redis.exists(LOCK)


async def test_a_duplicate_leaves_nothing_behind(broker: Broker, queue: Queue) -> None:
    await put(broker, NewTask("a", "t", b"m", lock=LOCK, lock_s=60))
    before = await keys(queue)
    for refused in (
        NewTask("b", "t", b"m", lock=LOCK, lock_s=60),
        NewTask("b", "t", b"m", at_ms=1_900_000_000_000, lock=LOCK, lock_s=60),
        NewTask("b", "t", b"m", group="g", lock=LOCK, lock_s=60),
    ):
        assert await put(broker, refused) == [DuplicateTaskError]
    assert await keys(queue) == before
    assert await queue.state() == QueueState(pending=1, hashes=1)


@pytest.mark.parametrize("spoiled", ["pending", "scheduled", "due", "groups", "group"])
async def test_a_refusal_by_redis_leaves_nothing_behind(
    spoiled: str, broker: Broker, queue: Queue
) -> None:
    key = queue.keys.group("g") if spoiled == "group" else getattr(queue.keys, spoiled)
    await queue.redis.set(key, "x")
    task = NewTask(
        "a",
        "t",
        b"m",
        at_ms=1_900_000_000_000 if spoiled in ("scheduled", "due") else None,
        group="g" if spoiled in ("groups", "group") else None,
        lock=LOCK,
        lock_s=60,
    )
    (error,) = await broker.enqueue("default", [task])
    assert isinstance(error, BrokerError)
    assert "WRONGTYPE" in str(error)
    assert await keys(queue) == {key, "asynq:queues"}


@pytest.mark.parametrize("new_id", [False, True])
async def test_a_pending_of_another_type_is_named_and_nothing_is_left(
    new_id: bool, broker: Broker, queue: Queue
) -> None:
    await queue.redis.set(queue.keys.pending, "x")
    tasks = [NewTask(i, "t", b"m", new_id) for i in "ab"]
    for error in await broker.enqueue("default", tasks):
        assert isinstance(error, BrokerError)
        assert str(error).startswith(f"WRONGTYPE {queue.keys.pending} is")
    assert await keys(queue) == {queue.keys.pending, "asynq:queues"}


async def test_tasks_with_and_without_an_id_of_their_own_keep_their_order(
    broker: Broker, queue: Queue
) -> None:
    await put(broker, NewTask("a", "t", b"m", new_id=True), NewTask("b", "t", b"m"))
    await put(broker, NewTask("c", "t", b"m", new_id=True), NewTask("d", "t", b"m", new_id=True))
    assert await queue.pending() == ["a", "b", "c", "d"]


async def test_a_user_without_transactions_can_enqueue(
    broker_without: BrokerWithout, queue: Queue
) -> None:
    broker = await broker_without("multi", "exec")
    assert await put(broker, NewTask("a", "t", b"m", new_id=True)) == [None]
    assert await queue.state() == QueueState(pending=1, hashes=1)


async def test_many_at_once_are_each_in_once(broker: Broker, queue: Queue) -> None:
    rows = [NewTask(f"{i % 300}", "t", b"m") for i in range(1000)]
    batches = [rows[n : n + 100] for n in range(0, 900, 50)]
    answers = await asyncio.gather(*(broker.enqueue("default", batch) for batch in batches))
    accepted = sum(error is None for batch in answers for error in batch)
    assert accepted == 300
    assert await queue.state() == QueueState(pending=300, hashes=300)


@pytest.mark.parametrize("task_id", ["a b", "a\nb", "é", "{x}", ":", "a" * 10_000, '"\\'])
async def test_any_text_is_an_id(task_id: str, broker: Broker, queue: Queue) -> None:
    assert await put(broker, NewTask(task_id, "t", b"\x00\xff\r\n")) == [None]
    assert await queue.pending() == [task_id]
