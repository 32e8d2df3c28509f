"""What other programs, or hands, left in Redis: it costs no other task and stops no other queue."""

from __future__ import annotations

import asyncio
import os
from functools import partialmethod

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from asyncq import BrokerError, Client, Context, Mux, Server, Task
from asyncq.message import MALFORMED_TYPE, TaskMessage
from asyncq.server.loops.heartbeat import Heartbeat
from tests.chaos.live import Queue, QueueState, calls_during, eventually

QUEUES = {"bad": 5, "default": 1}  # the bad one is asked first


class Order(BaseModel):
    number: int


class Ran:
    """A mux that notes what ran."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.let_go = asyncio.Event()
        self.mux = Mux()

        @self.mux.task("t")
        async def t(ctx: Context) -> None:
            self.ids.append(ctx.task_id)

        @self.mux.task("held")
        async def held(ctx: Context) -> None:
            self.ids.append(ctx.task_id)
            await self.let_go.wait()

        @self.mux.task("order")
        async def order(payload: Order, ctx: Context) -> None:
            self.ids.append(ctx.task_id)


@pytest.fixture
def ran() -> Ran:
    return Ran()


@pytest.fixture
def bad(redis: Redis) -> Queue:
    """The queue that is spoiled."""
    return Queue(redis, "bad")


async def replace(queue: Queue, key: str) -> None:
    """Make a string of a key."""
    await queue.redis.delete(key)
    await queue.redis.set(key, "x")


def message(**fields: object) -> bytes:
    defaults: dict[str, object] = {"id": "a", "type": "t", "queue": "default", "retry": 3}
    return TaskMessage(**{**defaults, **fields}).SerializeToString()  # type: ignore[arg-type]


MALFORMED = [
    b"",
    b"\xff" * 20,
    b"no protobuf at all",
    os.urandom(200),
    message()[:-3],
    message(id="other"),
    message(queue="other"),
    message().replace(b"\x01t", b"\x01\xff"),  # a type that is no UTF-8
    b"\xff" * 200_000,
]


@pytest.mark.parametrize("raw", MALFORMED, ids=range(len(MALFORMED)))
async def test_bytes_that_are_no_message_are_quarantined(
    raw: bytes, store_url: str, client: Client, queue: Queue, ran: Ran
) -> None:
    await client.enqueue(Task("t", task_id="a"))
    await client.enqueue(Task("t", task_id="b"))
    await queue.redis.hset(queue.keys.task("a"), "msg", raw)
    async with Server(store_url).running(ran.mux):
        await eventually(lambda: _is(queue, QueueState(archived=1, hashes=1)))
    assert ran.ids == ["b"]
    assert await queue.redis.hget(queue.keys.task("a"), "raw") == raw
    quarantined = await queue.message("a")
    assert (quarantined.id, quarantined.queue) == ("a", "default")
    assert quarantined.type == MALFORMED_TYPE
    assert quarantined.error_msg.startswith("asyncq: quarantined: ")
    assert await queue.in_state("a") == "archived"


async def test_an_expired_run_of_bytes_that_are_no_message_does_not_stop_the_recovery(
    store_url: str, client: Client, queue: Queue, ran: Ran
) -> None:
    for task_id in ("a", "b", "c"):
        await client.enqueue(Task("t", task_id=task_id))
        await queue.redis.rpoplpush(queue.keys.pending, queue.keys.active)
        await queue.redis.zadd(queue.keys.lease, {task_id: 1000})
    await queue.redis.hset(queue.keys.task("a"), "msg", b"nonsense")
    await replace(queue, queue.keys.task("b"))
    async with Server(store_url).running(ran.mux):
        await eventually(lambda: ran.ids == ["c"])
        await eventually(lambda: queue.ids("archived"))
        await eventually(lambda: _nothing_active(queue))
    assert await queue.redis.hget(queue.keys.task("a"), "raw") == b"nonsense"


async def test_ids_that_are_no_utf8_are_dealt_with(
    store_url: str, client: Client, queue: Queue, ran: Ran
) -> None:
    await queue.redis.rpush(queue.keys.pending, b"\xff\xfe", b"\x00\r\n")
    key = queue.keys.task("").encode() + b"\xff\xfe"
    await queue.redis.hset(key, mapping={"msg": b"nonsense"})
    await client.enqueue(Task("t", task_id="good"))
    async with Server(store_url).running(ran.mux):
        await eventually(lambda: ran.ids == ["good"])
        await eventually(lambda: _nothing_active(queue))
    assert await queue.redis.zrange(queue.keys.archived, 0, -1) == [b"\xff\xfe"]
    assert await queue.redis.hget(key, "raw") == b"nonsense"


async def test_an_id_whose_task_is_gone_is_dropped(
    store_url: str, client: Client, queue: Queue, ran: Ran, caplog: pytest.LogCaptureFixture
) -> None:
    await client.enqueue(Task("t", task_id="ghost"))
    await client.enqueue(Task("t", task_id="b"))
    await queue.redis.delete(queue.keys.task("ghost"))
    async with Server(store_url).running(ran.mux):
        await eventually(lambda: _is(queue, QueueState()))
    assert ran.ids == ["b"]
    assert "'ghost' of queue 'default' is gone" in caplog.text


async def test_a_payload_that_does_not_validate_is_archived_at_once(
    store_url: str, client: Client, queue: Queue, ran: Ran
) -> None:
    await client.enqueue(Task("order", {"number": "five"}, task_id="a"))
    await client.enqueue(Task("order", {"number": 5}, task_id="b"))
    async with Server(store_url).running(ran.mux):
        await eventually(lambda: queue.ids("archived"))
        await eventually(lambda: ran.ids == ["b"])
    stored = await queue.message("a")
    assert "number" in stored.error_msg
    assert "valid integer" in stored.error_msg
    assert stored.retried == 0


KEYS = ["pending", "active", "lease", "scheduled", "retry", "completed", "archived", "due", "mark"]


@pytest.mark.parametrize("concurrency", [1, 10])
@pytest.mark.parametrize("key", KEYS)
async def test_a_queue_that_was_spoiled_does_not_hold_up_another(
    key: str, concurrency: int, store_url: str, client: Client, bad: Queue, ran: Ran
) -> None:
    if key not in ("pending", "scheduled"):
        await client.enqueue(Task("t", task_id="bad", queue="bad"))
    await replace(bad, getattr(bad.keys, key))
    async with Server(store_url, queues=QUEUES, concurrency=concurrency).running(ran.mux):
        for i in range(3):
            await client.enqueue(Task("t", task_id=f"now-{i}"))
            await eventually(lambda i=i: f"now-{i}" in ran.ids, within_s=2)  # type: ignore[misc]
        await client.enqueue(Task("t", task_id="later"), process_in=0.2)
        await eventually(lambda: "later" in ran.ids, within_s=2)


@pytest.mark.parametrize("strict", [True, False])
async def test_a_spoiled_queue_does_not_slow_the_others_down(
    strict: bool, store_url: str, client: Client, bad: Queue, ran: Ran
) -> None:
    await replace(bad, bad.keys.pending)
    await client.enqueue_many(Task("t") for _ in range(2000))
    server = Server(store_url, queues=QUEUES, concurrency=10, strict_priority=strict)
    async with server.running(ran.mux):
        await eventually(lambda: len(ran.ids) == 2000, within_s=5)


async def test_a_task_that_was_spoiled_does_not_hold_up_those_due_after_it(
    store_url: str, client: Client, queue: Queue, ran: Ran
) -> None:
    for task_id in ("a", "b"):
        await client.enqueue(Task("t", task_id=task_id), process_in=0.2)
    await replace(queue, queue.keys.task("a"))
    async with Server(store_url).running(ran.mux):
        await eventually(lambda: ran.ids == ["b"], within_s=5)


async def test_a_spoiled_queue_is_not_asked_all_the_time(
    store_url: str, client: Client, redis: Redis, bad: Queue, ran: Ran
) -> None:
    for key in ("pending", "scheduled", "lease", "retry"):
        await replace(bad, getattr(bad.keys, key))
    async with Server(store_url, queues=QUEUES).running(ran.mux):
        await asyncio.sleep(1)
        asked = await calls_during(redis, asyncio.sleep(3))
    assert sum(asked.values()) < 3 * 2 * 20, asked


async def test_a_spoiled_queue_works_again_when_it_is_repaired(
    store_url: str, client: Client, bad: Queue, ran: Ran
) -> None:
    await replace(bad, bad.keys.pending)
    async with Server(store_url, queues=QUEUES).running(ran.mux):
        await client.enqueue(Task("t", task_id="good"))
        await eventually(lambda: ran.ids == ["good"], within_s=5)
        await bad.redis.delete(bad.keys.pending)
        await client.enqueue(Task("t", task_id="repaired", queue="bad"))
        await eventually(lambda: "repaired" in ran.ids, within_s=8)


async def test_one_queues_spoiled_leases_do_not_end_those_of_another(
    store_url: str,
    client: Client,
    queue: Queue,
    bad: Queue,
    ran: Ran,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Heartbeat, "__init__", partialmethod(Heartbeat.__init__, interval_s=0.1))
    await client.enqueue(Task("held", task_id="bad", queue="bad"))
    await client.enqueue(Task("held", task_id="good"))
    server = Server(store_url, queues=QUEUES, shutdown_timeout=0)
    async with server.running(ran.mux):
        await eventually(lambda: len(ran.ids) == 2)
        await replace(bad, bad.keys.lease)
        await queue.age_leases(15)
        aged = (await queue.leases())["good"]
        await eventually(lambda: _lease_after(queue, "good", aged + 10), within_s=3)


@pytest.mark.parametrize("key", ["pending", "scheduled"])
async def test_an_enqueue_into_a_spoiled_queue_leaves_nothing_behind(
    key: str, client: Client, queue: Queue
) -> None:
    await replace(queue, getattr(queue.keys, key))
    task = Task("t", task_id="a", unique=60)
    if key == "scheduled":
        task = task.with_options(process_in=60)
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        await client.enqueue(task)
    await queue.redis.delete(getattr(queue.keys, key))
    assert (await queue.state()).hashes == 0
    await client.enqueue(task)  # no conflict with what was refused, nor with its own lock


async def test_is_failure_that_fails_does_not_stop_the_recovery(
    store_url: str, client: Client, queue: Queue, ran: Ran
) -> None:
    await client.enqueue(Task("t", task_id="a"))
    await queue.redis.rpoplpush(queue.keys.pending, queue.keys.active)
    async with Server(store_url, is_failure=_fail).running(ran.mux):
        await eventually(lambda: ran.ids == ["a"], within_s=5)
        await client.enqueue(Task("t", task_id="b"))
        await eventually(lambda: ran.ids == ["a", "b"], within_s=5)


def _fail(error: BaseException) -> bool:
    raise ValueError("the callback is wrong")


async def _is(queue: Queue, state: QueueState) -> bool:
    return await queue.state() == state


async def _nothing_active(queue: Queue) -> bool:
    state = await queue.state()
    return state.active == state.lease == 0


async def _lease_after(queue: Queue, task_id: str, end: float) -> bool:
    return (await queue.leases()).get(task_id, 0) > end
