"""Uniqueness locks and task ids hold between Go and Python clients, whoever comes first."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from asyncq import (
    Client,
    Context,
    DuplicateTaskError,
    Mux,
    RevokeTask,
    Server,
    SkipRetry,
    Task,
    TaskIDConflictError,
    TaskType,
)
from asyncq.broker.keys import queue_keys
from tests.interop import held
from tests.interop.gopeer import GoServer, GoTask, go_enqueue, go_struct_unique

pytestmark = pytest.mark.usefixtures("go_peer")


class Address(BaseModel):
    city: str
    zip: int
    billed: bool
    note: str | None


class Order(BaseModel):
    """The struct of Go's peer, field by field."""

    user_id: int
    template: str = "default"
    name: str
    data: bytes
    tags: list[str]
    address: Address


PLACE = TaskType("order:place", Order, unique=60)

HOME = Address(city="Zürich", zip=8001, billed=True, note=None)
ORDERS = {
    "plain": Order(user_id=1, name="Ada", data=b"x", tags=["a"], address=HOME),
    "accents and markup": Order(
        user_id=2,
        name='José <b>&amp;</b> "q" \\ / \u00e9 e\u0301 日本 🎉',
        data=b"<&>",
        tags=["é", "<", ">", "&", ""],
        address=HOME.model_copy(update={"note": "\u2028 and \u2029"}),
    ),
    "control characters": Order(
        user_id=3,
        name="".join(map(chr, range(0x20))) + "\x7f\x80\xa0\ufeff\ufffd",
        data=bytes(range(256)),
        tags=["\t", "\b\f", "\n\r"],
        address=HOME,
    ),
    "bytes of every padding": Order(
        user_id=-1, template="", name="", data=b"\xff\xfe", tags=["x" * 300], address=HOME
    ),
    "empty": Order(
        user_id=0,
        name="",
        data=b"",
        tags=[],
        address=Address(city="", zip=0, billed=False, note=""),
    ),
    "large numbers": Order(
        user_id=2**63 - 1,
        template="other",
        name="n",
        data=b"abc",
        tags=["1"],
        address=HOME.model_copy(update={"zip": -(2**63)}),
    ),
}


def _go_fields(order: Order) -> dict[str, object]:
    """What Go gets to fill its struct with: values, not the bytes that it shall write."""
    fields: dict[str, Any] = order.model_dump()
    fields["data"] = b64encode(order.data).decode()
    if order.template == "default":
        del fields["template"]  # each side has its own default
    return fields


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
async def test_a_model_gives_the_bytes_and_the_lock_of_the_same_struct(
    store_url: str, order: Order
) -> None:
    async with Client(store_url) as client, Redis.from_url(store_url) as redis:
        (first,) = await go_struct_unique(store_url, [_go_fields(order)])
        assert first.locked, first.error
        assert PLACE.new(order).payload == first.payload
        with pytest.raises(DuplicateTaskError) as refused:
            await client.enqueue(PLACE.new(order))
        assert refused.value.holder_id == first.id
        assert await redis.get(refused.value.lock) == first.id.encode()

        await redis.flushdb()
        handle = await client.enqueue(PLACE.new(order))
        (second,) = await go_struct_unique(store_url, [_go_fields(order)])
        assert (second.locked, second.code) == (False, "duplicate")
        assert await redis.get(refused.value.lock) == handle.id.encode()
        assert await held.keys(redis, "*:t:*") == [queue_keys("default").task(handle.id)]


async def test_a_lock_is_for_one_type_queue_and_payload(store_url: str) -> None:
    payloads = {"nil": None, "empty": b"", "json": b"{}"}
    async with Client(store_url) as client:
        others = await go_enqueue(
            store_url,
            [
                _unique("job", payload, queue)
                for payload in payloads.values()
                for queue in ("a", "b")
            ],
        )
        assert [answer.error for answer in others] == [""] * 6
        for payload in payloads.values():
            for queue in ("a", "b"):
                with pytest.raises(DuplicateTaskError):
                    await client.enqueue(Task("job", payload), queue=queue, unique=60)
                await client.enqueue(Task("job:other", payload), queue=queue, unique=60)
            await client.enqueue(Task("job", payload), queue="c", unique=60)
        mine = [
            _unique(type, payload, queue)
            for payload in payloads.values()
            for type, queue in (("job:other", "a"), ("job:other", "b"), ("job", "c"))
        ]
        answers = await go_enqueue(store_url, mine)
        assert [answer.code for answer in answers] == ["duplicate"] * 9


@pytest.mark.parametrize("where", ["pending", "scheduled"])
async def test_a_lock_ends_with_its_time_to_live(store_url: str, where: str) -> None:
    delay_s = 100 if where == "scheduled" else 0
    async with Client(store_url) as client, Redis.from_url(store_url) as redis:
        await client.enqueue(Task("py", b"1"), unique=60, process_in=delay_s)
        go = GoTask(type="go", payload=b"1", unique_s=60, process_in_s=delay_s)
        await go_enqueue(store_url, [go])
        locks = await held.keys(redis, "*:unique:*")
        theirs, ours = [await redis.ttl(lock) for lock in locks]
        assert 55 + delay_s <= theirs <= 60 + delay_s
        # Go cuts the wait, up to a second short; ours is rounded up.
        assert 0 <= ours - theirs <= 2


async def test_a_task_id_conflicts_whoever_has_it(store_url: str) -> None:
    # Also over the states: pending, scheduled, and a task that waits in a group.
    go_ids, python_ids = ["go-1", "go:é 2", "go-3"], ["py-1", "py:é 2", "py-3"]
    options: list[dict[str, Any]] = [{}, {"process_in": 3600}, {"group": "g"}]
    async with Client(store_url) as client:
        answers = await go_enqueue(
            store_url,
            [
                GoTask(type="t", id=go_ids[0]),
                GoTask(type="t", id=go_ids[1], process_in_s=3600),
                GoTask(type="t", id=go_ids[2], group="g"),
            ],
        )
        assert [answer.error for answer in answers] == [""] * 3
        for task_id in go_ids:
            for more in options:
                with pytest.raises(TaskIDConflictError):
                    await client.enqueue(Task("t", b"x", task_id=task_id), **more)
        (first, *refused) = await client.enqueue_many(
            [Task("t", task_id=id) for id in ("fresh", *go_ids)], return_exceptions=True
        )
        assert not isinstance(first, Exception)
        assert [type(error) for error in refused] == [TaskIDConflictError] * 3

        for task_id, more in zip(python_ids, options, strict=True):
            await client.enqueue(Task("t", task_id=task_id), **more)
        specs = [
            spec
            for task_id in python_ids
            for spec in (
                GoTask(type="t", id=task_id),
                GoTask(type="t", id=task_id, process_in_s=3600),
                GoTask(type="t", id=task_id, group="g"),
            )
        ]
        answers = await go_enqueue(store_url, specs)
        assert [answer.code for answer in answers] == ["conflict"] * 9
        (elsewhere,) = await go_enqueue(store_url, [GoTask(type="t", id="py-1", queue="other")])
        assert elsewhere.error == "", "an id is unique within its queue"


ENDS = {"echo": True, "revoke": True, "skip": False, "fail": False}
"""What a task ends as, and whether its lock goes with it: not with a retry or an archiving."""


async def test_go_releases_the_locks_of_python_tasks(store_url: str) -> None:
    async with Client(store_url) as client, Redis.from_url(store_url) as redis:
        for mode in ENDS:
            await client.enqueue(Task(mode, b"1"), unique=60)
            await client.enqueue(Task(mode, b"2"), unique=60, retention=60)
        async with GoServer(store_url, task_check_s=0.05) as server:
            await server.wait_ended(2 * len(ENDS))
        kept = await _locked_types(redis)
        assert kept == sorted(mode for mode, released in ENDS.items() for _ in "12" if not released)


async def test_python_releases_the_locks_of_go_tasks(store_url: str) -> None:
    mux = Mux()

    @mux.not_found
    async def run(task: Task[Any], ctx: Context) -> None:
        match task.type:
            case "revoke":
                raise RevokeTask
            case "skip":
                raise SkipRetry
            case "fail":
                raise RuntimeError("on purpose")
            case _:
                pass

    await go_enqueue(
        store_url,
        [
            GoTask(type=mode, payload=payload, unique_s=60, retention_s=retention_s)
            for mode in ENDS
            for payload, retention_s in ((b"1", 0), (b"2", 60))
        ],
    )
    async with Server(store_url).running(mux) as server:
        await server.drain()
    async with Redis.from_url(store_url) as redis:
        kept = await _locked_types(redis)
        assert kept == sorted(mode for mode, released in ENDS.items() for _ in "12" if not released)


def _unique(type: str, payload: bytes | None, queue: str) -> GoTask:
    task = GoTask(type=type, queue=queue, unique_s=60)
    if payload is not None:
        task["payload"] = payload
    return task


async def _locked_types(redis: Redis) -> list[str]:
    return sorted(key.split(":")[3] for key in await held.keys(redis, "*:unique:*"))
