"""The pump: what it takes, what it saves, and what it must leave alone."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

from asyncq import BrokerError, Client, Task
from asyncq.broker.broker import Answered, Broker, Request
from asyncq.message import TaskMessage, completed, failed, quarantined
from asyncq.outcome import DONE, REQUEUE, Kind, Outcome
from tests.chaos.live import Queue, QueueState
from tests.chaos.proxy import proxied
from tests.stores import Database

sequences = itertools.count(1)


async def pump(broker: Broker, request: Request, server: str = "s1") -> Answered:
    (answer,) = await broker.pump(server, [request])
    if isinstance(answer, BrokerError):
        raise answer
    return answer


def take(want: int) -> Request:
    return Request("default", next(sequences), want)


def save(task_id: str, mark: int, outcome: Outcome, lock: str = "") -> Request:
    request = take(0)
    request.save(task_id, mark, lock, outcome)
    return request


async def add(client: Client, *ids: str) -> None:
    for task_id in ids:
        await client.enqueue(Task("t", task_id=task_id))


def outcome_of(kind: Kind, message: TaskMessage) -> Outcome:
    """An outcome of this kind as the server would make it."""
    again = TaskMessage.FromString(message.SerializeToString())
    match kind:
        case "done" | "requeue":
            return Outcome(kind)
        case "complete":
            return Outcome(kind, 4_000_000_000, completed(again, 1), b"result")
        case "archive":
            return Outcome(kind, 0, failed(again, "late", 1, retried=False))
        case "quarantine":
            return Outcome(kind, 0, quarantined(again.id, again.queue, b"", "late", 1))
        case _:
            return Outcome(kind, 4_000_000_000_000, failed(again, "late", 1, retried=True))


KINDS: list[Kind] = [
    "done", "complete", "retry", "retry_uncounted", "snooze", "archive", "quarantine", "requeue"
]  # fmt: skip


async def test_tasks_are_taken_oldest_first_and_not_more_than_wanted(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b", "c")
    answer = await pump(broker, take(2))
    assert answer.ids == ["a", "b"]
    assert await queue.pending() == ["c"]
    assert (await queue.leases()).keys() == {"a", "b"}
    assert await queue.in_state("a") == "active"


async def test_a_lease_lasts_30_to_31_s_and_carries_the_mark(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a")
    answer = await pump(broker, take(1))
    lease = (await queue.leases())["a"]
    assert 30 <= lease - answer.now <= 32
    assert (lease % 1) * 2**20 == answer.mark


async def test_a_paused_queue_gives_nothing_and_still_saves(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b")
    first = await pump(broker, take(1))
    await queue.redis.set(queue.keys.paused, "1")
    request = take(5)
    request.save("a", first.mark, "", DONE)
    assert (await pump(broker, request)).ids == []
    assert await queue.state() == QueueState(pending=1, hashes=1)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_fence_keeps_a_late_outcome_off_the_next_run(
    kind: Kind, broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a")
    first = await pump(broker, take(1))
    message = TaskMessage.FromString(first.messages[0])
    await pump(broker, save("a", first.mark, REQUEUE))
    second = await pump(broker, take(1), "s2")
    assert second.mark != first.mark
    before = await dump(queue)

    answer = await pump(broker, save("a", first.mark, outcome_of(kind, message)))

    assert answer.refused == ["a"]
    assert await dump(queue) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_the_fence_keeps_a_late_outcome_off_a_run_of_go(
    kind: Kind, broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a")
    first = await pump(broker, take(1))
    message = TaskMessage.FromString(first.messages[0])
    await queue.redis.zadd(queue.keys.lease, {"a": 4_000_000_000})  # whole seconds, as Go's are
    before = await dump(queue)

    answer = await pump(broker, save("a", first.mark, outcome_of(kind, message)))

    assert answer.refused == ["a"]
    assert await dump(queue) == before


@pytest.mark.parametrize("kind", KINDS)
async def test_saving_the_same_outcome_twice_counts_it_once(
    kind: Kind, broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a")
    first = await pump(broker, take(1))
    outcome = outcome_of(kind, TaskMessage.FromString(first.messages[0]))
    assert (await pump(broker, save("a", first.mark, outcome))).refused == []
    before = await dump(queue)

    assert (await pump(broker, save("a", first.mark, outcome))).refused == ["a"]

    assert await dump(queue) == before


async def test_an_extension_keeps_the_mark_and_is_refused_to_others(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b")
    answer = await pump(broker, take(2))
    await queue.age_leases(20)
    before = await queue.leases()
    lost = await broker.extend("default", [("a", answer.mark), ("b", answer.mark + 1), ("c", 1)])
    after = await queue.leases()
    assert lost == ["b", "c"]
    assert after["a"] - before["a"] >= 19
    assert after["a"] % 1 == before["a"] % 1
    assert after["b"] == before["b"]


async def test_a_result_is_refused_without_the_lease(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a")
    answer = await pump(broker, take(1))
    assert await broker.annotate("default", "a", answer.mark, "result", b"mine")
    assert not await broker.annotate("default", "a", answer.mark + 1, "result", b"not mine")
    assert await queue.redis.hget(queue.keys.task("a"), "result") == b"mine"


async def test_the_same_sequence_again_returns_the_same_tasks(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b", "c")
    request = take(2)
    first = await pump(broker, request)
    again = await pump(broker, request)
    assert (again.ids, again.mark, again.messages) == (first.ids, first.mark, first.messages)
    assert await queue.pending() == ["c"]


async def test_the_same_sequence_again_leaves_out_what_was_lost_meanwhile(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b")
    request = take(2)
    await pump(broker, request)
    await queue.redis.zrem(queue.keys.lease, "a")
    assert (await pump(broker, request)).ids == ["b"]


async def test_another_server_is_not_given_the_answer_of_the_first(
    broker: Broker, client: Client
) -> None:
    await add(client, "a", "b")
    first = take(1)
    same = replace(first)
    assert (await pump(broker, first, "s1")).ids == ["a"]
    assert (await pump(broker, same, "s2")).ids == ["b"]


async def test_a_lost_answer_counts_nothing_twice(
    each_store: Database, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b", "c")
    async with proxied(each_store) as proxy:
        broker = Broker(proxy.url)
        await broker.open()
        first = await pump(broker, take(1))
        request = take(1)
        request.save("a", first.mark, "", DONE)
        proxy.lose_reply("pump")
        with pytest.raises(BrokerError):
            await pump(broker, request)
        assert proxy.lost == 1
        again = await pump(broker, request)
        await broker.close()
    assert (again.ids, again.refused) == (["b"], [])
    assert await queue.handled() == (1, 0)
    assert await queue.state() == QueueState(pending=1, active=1, lease=1, hashes=2)


async def test_an_id_without_its_task_is_dropped_and_named(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b")
    await queue.redis.delete(queue.keys.task("a"))
    answer = await pump(broker, take(2))
    assert (answer.ids, answer.ghosts) == (["b"], ["a"])
    assert not await queue.redis.exists(queue.keys.task("a"))
    assert (await queue.state()).active == 1


@pytest.mark.parametrize("key", ["pending", "active", "lease"])
async def test_a_key_of_the_wrong_type_is_an_error_and_nothing_changes(
    key: str, broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b")
    first = await pump(broker, take(1))
    await queue.redis.delete(getattr(queue.keys, key))
    await queue.redis.set(getattr(queue.keys, key), "x")
    before = await dump(queue)
    request = take(1)
    request.save("a", first.mark, "", DONE)
    with pytest.raises(BrokerError, match=f"WRONGTYPE.*{key}"):
        await pump(broker, request)
    assert await dump(queue) == before


WRITTEN: list[tuple[str, Kind]] = [
    ("retry", "retry"),
    ("retry", "retry_uncounted"),
    ("scheduled", "snooze"),
    ("due", "retry"),
    ("due", "snooze"),
    ("archived", "archive"),
    ("archived", "quarantine"),
    ("completed", "complete"),
]


@pytest.mark.parametrize(("key", "kind"), WRITTEN)
async def test_an_outcome_that_cannot_be_saved_leaves_the_task_with_its_lease(
    key: str, kind: Kind, broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a", "b")
    first = await pump(broker, take(2))
    await queue.redis.set(getattr(queue.keys, key), "x")
    message = TaskMessage.FromString(first.messages[0])
    request = save("a", first.mark, outcome_of(kind, message))
    request.save("b", first.mark, "", DONE)

    answer = await pump(broker, request)

    assert [task_id for task_id, _ in answer.broken] == ["a"]
    assert (await queue.leases()).keys() == {"a"}  # so that it is recovered, once it can be
    assert await queue.redis.lrange(queue.keys.active, 0, -1) == [b"a"]


@pytest.mark.parametrize("key", ["mark", "last"])
async def test_a_key_of_our_own_that_was_spoiled_loses_no_task(
    key: str, broker: Broker, client: Client, queue: Queue
) -> None:
    await add(client, "a")
    spoiled = queue.keys.mark if key == "mark" else queue.keys.last("s1")
    await queue.redis.rpush(spoiled, "not what it was")
    with pytest.raises(BrokerError):
        await pump(broker, take(1))
    assert await queue.pending() == ["a"]


async def test_what_is_put_back_is_next(broker: Broker, client: Client, queue: Queue) -> None:
    await add(client, "a", "b", "c")
    answer = await pump(broker, take(2))
    request = take(0)
    for task_id in answer.ids:
        request.save(task_id, answer.mark, "", REQUEUE)
    await pump(broker, request)
    assert set((await queue.pending())[:2]) == {"a", "b"}
    assert (await queue.pending())[2] == "c"


async def test_a_lock_is_released_only_by_its_holder(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await client.enqueue(Task("t", task_id="a", unique=60, unique_key="x"))
    await client.enqueue(Task("t", task_id="b", unique=60, unique_key="y"))
    answer = await pump(broker, take(2))
    lock_a, lock_b = queue.keys.unique("t", "x"), queue.keys.unique("t", "y")
    await queue.redis.set(lock_b, "somebody else")
    request = take(0)
    request.save("a", answer.mark, lock_a, DONE)
    request.save("b", answer.mark, lock_b, DONE)
    await pump(broker, request)
    assert await queue.redis.exists(lock_a) == 0
    assert await queue.redis.get(lock_b) == b"somebody else"


async def test_servers_that_take_at_once_get_each_task_once(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await client.enqueue_many(Task("t", task_id=str(i)) for i in range(500))
    answers = await asyncio.gather(*(pump(broker, take(40), f"s{i}") for i in range(20)))
    taken = [task_id for answer in answers for task_id in answer.ids]
    assert len(taken) == len(set(taken)) == 500
    assert (await queue.state()) == QueueState(active=500, lease=500, hashes=500)


async def test_a_full_redis_is_still_drained(broker: Broker, client: Client, queue: Queue) -> None:
    await add(client, "a", "b")
    try:
        await queue.redis.config_set("maxmemory", "1")
        answer = await pump(broker, take(2))
        assert answer.ids == ["a", "b"]
        assert await broker.extend("default", [("a", answer.mark)]) == []
        request = take(0)
        for task_id in answer.ids:
            request.save(task_id, answer.mark, "", DONE)
        await pump(broker, request)
    finally:
        await queue.redis.config_set("maxmemory", "0")
    assert await queue.state() == QueueState()


async def dump(queue: Queue) -> dict[bytes, bytes | None]:
    """Every key of Asynq's in the queue, bit for bit."""
    found = [key async for key in queue.redis.scan_iter(match="asynq:*")]
    return {key: await queue.redis.dump(key) for key in sorted(found)}
