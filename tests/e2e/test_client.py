"""A client on a real store: batches, errors one a task, results, and what closing means."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import (
    AsyncqError,
    BrokerError,
    BrokerFullError,
    Client,
    Context,
    DuplicateTaskError,
    MalformedMessageError,
    Mux,
    OptionError,
    PayloadTooLargeError,
    RevokeTask,
    Server,
    SkipRetry,
    Task,
    TaskFailedError,
    TaskHandle,
    TaskIDConflictError,
    TaskNotFoundError,
)
from tests.chaos.live import Queue, QueueState, calls_during, eventually
from tests.stores import StoreServer

# Batches


async def test_concurrent_enqueues_travel_together(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server()
    async with Client(server.url) as client, Redis.from_url(server.url) as redis:
        await client.enqueue(Task("t"))

        async def many() -> None:
            await asyncio.gather(*(client.enqueue(Task("t")) for _ in range(1000)))

        ran = await calls_during(redis, many())
        assert ran["exec"] <= 6  # 1, then 250 a call
        assert await redis.llen(Queue(redis).keys.pending) == 1001


async def test_each_call_has_its_own_answer(client: Client, queue: Queue) -> None:
    await client.enqueue(Task("t", task_id="taken"))
    results = await asyncio.gather(
        client.enqueue(Task("t", task_id="a")),
        client.enqueue(Task("t", task_id="taken")),
        client.enqueue(Task("t", unique=60, task_id="first")),
        client.enqueue(Task("t", unique=60, task_id="second")),
        client.enqueue(Task("t", b"x" * 2**21)),
        client.enqueue(Task("t", task_id="b")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [
        TaskHandle, TaskIDConflictError, TaskHandle, DuplicateTaskError, PayloadTooLargeError,
        TaskHandle,
    ]  # fmt: skip
    duplicate = results[3]
    assert isinstance(duplicate, DuplicateTaskError)
    assert duplicate.holder_id == "first"
    assert set(await queue.pending()) == {"taken", "a", "first", "b"}


async def test_a_cancelled_caller_does_not_break_the_others(client: Client, queue: Queue) -> None:
    calls = [asyncio.create_task(client.enqueue(Task("t", task_id=str(i)))) for i in range(600)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, TaskHandle) for result in results[1::2])
    assert {str(i) for i in range(1, 600, 2)} <= {*await queue.pending()}
    await client.enqueue(Task("t"))


async def test_closing_sends_what_waits(store_url: str, queue: Queue) -> None:
    client = Client(store_url)
    await client.open()
    calls = [asyncio.create_task(client.enqueue(Task("t"))) for _ in range(600)]
    await asyncio.sleep(0)
    await client.close()
    await client.close()
    assert all(isinstance(handle, TaskHandle) for handle in await asyncio.gather(*calls))
    assert len(await queue.pending()) == 600
    with pytest.raises(AsyncqError):
        await client.enqueue(Task("t"))


async def test_a_payload_over_the_limit_is_refused_before_redis(
    store_url: str, queue: Queue
) -> None:
    async with Client(store_url) as client:
        await client.enqueue(Task("t", b"x" * 1024 * 1024))
        with pytest.raises(PayloadTooLargeError, match="1,048,577 bytes") as caught:
            await client.enqueue(Task("t", b"x" * (1024 * 1024 + 1)))
    assert (caught.value.payload_bytes, caught.value.limit_bytes) == (1048577, 1048576)
    async with Client(store_url, max_payload_bytes=10) as client:
        with pytest.raises(PayloadTooLargeError):
            await client.enqueue(Task("t", b"x" * 11))
    assert len(await queue.pending()) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quue": "x"}, TypeError),
        ({"queue": ""}, OptionError),
        ({"queue": "  "}, OptionError),
        ({"process_at": datetime(2030, 1, 1)}, OptionError),
        ({"deadline": datetime(2030, 1, 1)}, OptionError),
        ({"task_id": ""}, OptionError),
        ({"timeout": -1}, OptionError),
        ({"max_retry": 1.5}, OptionError),
    ],
)
async def test_options_that_make_no_sense_never_reach_redis(
    options: dict[str, Any], error: type[Exception], client: Client, redis: Redis
) -> None:
    with pytest.raises(error):
        await client.enqueue(Task("t"), **options)
    assert await redis.dbsize() == 0


async def test_a_full_redis_is_its_own_error(redis_server: Callable[..., StoreServer]) -> None:
    server = redis_server("valkey", "--maxmemory", "1", "--maxmemory-policy", "noeviction")
    async with Client(server.url) as client:
        with pytest.raises(BrokerFullError, match="maxmemory"):
            await client.enqueue(Task("t"))


async def test_a_text_that_no_redis_can_hold_is_refused_and_hurts_nobody(client: Client) -> None:
    calls = [
        client.enqueue(Task("t"), task_id="\ud800"),
        client.enqueue(Task("t"), queue="\ud800"),
        client.enqueue(Task("t"), headers={"k": "\ud800"}),
        client.enqueue(Task("t"), unique=60, unique_key="\ud800"),
        client.enqueue(Task("t")),
    ]
    async with asyncio.timeout(5):
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(r, OptionError) for r in results] == [True] * 4 + [False]
    assert isinstance(results[4], TaskHandle)


# Many


async def test_many_go_in_order_through_iterables_of_both_kinds(
    client: Client, queue: Queue
) -> None:
    async def generated() -> AsyncIterator[Task[Any]]:
        for i in range(300):
            await asyncio.sleep(0)
            yield Task("t", task_id=f"a{i}")

    handles = await client.enqueue_many(Task("t", task_id=f"s{i}") for i in range(600))
    assert [handle.id for handle in handles] == [f"s{i}" for i in range(600)]
    handles = await client.enqueue_many(generated())
    assert [handle.id for handle in handles] == [f"a{i}" for i in range(300)]
    assert await queue.pending() == [f"s{i}" for i in range(600)] + [f"a{i}" for i in range(300)]
    assert await client.enqueue_many([]) == []


async def test_a_refused_task_among_many_stands_for_itself(client: Client, queue: Queue) -> None:
    ids = ["a", "b", "a", "c"]
    results = await client.enqueue_many((Task("t", task_id=i) for i in ids), return_exceptions=True)
    assert [isinstance(r, TaskIDConflictError) for r in results] == [False, False, True, False]
    with pytest.raises(TaskIDConflictError):
        await client.enqueue_many([Task("t", task_id="a"), Task("t", task_id="d")])
    assert await queue.pending() == ["a", "b", "c", "d"]


async def test_large_payloads_go_in_many_too(client: Client, queue: Queue) -> None:
    payload = os.urandom(512 * 1024)
    await client.enqueue_many(Task("t", payload) for _ in range(120))
    assert len(await queue.pending()) == 120


async def test_middleware_wraps_every_enqueue_in_its_order(client: Client) -> None:
    seen: list[str] = []

    @client.use
    async def outer(
        task: Task[Any], call_next: Callable[[Task[Any]], Awaitable[TaskHandle[Any]]]
    ) -> TaskHandle[Any]:
        seen.append("outer")
        return await call_next(task.with_options(headers={"request": "1"}))

    @client.use
    async def inner(
        task: Task[Any], call_next: Callable[[Task[Any]], Awaitable[TaskHandle[Any]]]
    ) -> TaskHandle[Any]:
        seen.append(f"inner {dict(task.headers)}")
        return await call_next(task)

    one = await client.enqueue(Task("t"), headers={"own": "2"})
    (other,) = await client.enqueue_many([Task("t")])
    assert seen == [
        "outer",
        "inner {'own': '2', 'request': '1'}",
        "outer",
        "inner {'request': '1'}",
    ]
    assert (await one.info()).headers == {"own": "2", "request": "1"}
    assert (await other.info()).headers == {"request": "1"}


# Results


async def test_a_hundred_waiters_get_each_their_own(store_url: str, client: Client) -> None:
    mux = Mux()
    go = asyncio.Event()

    @mux.task("t")
    async def handler(payload: int, ctx: Context) -> int:
        await go.wait()
        return payload * 2

    async with Server(store_url).running(mux):
        handles = await client.enqueue_many(Task("t", i, retention=60) for i in range(100))
        waiting = [asyncio.create_task(handle.result(timeout=10)) for handle in handles]
        await asyncio.sleep(0.1)
        go.set()
        assert await asyncio.gather(*waiting) == [i * 2 for i in range(100)]


async def test_the_result_of_what_does_not_succeed(
    store_url: str, client: Client, queue: Queue
) -> None:
    mux = Mux()
    go = asyncio.Event()

    @mux.task("t")
    async def handler(ctx: Context) -> None:
        await go.wait()
        if ctx.task_id == "revoked":
            raise RevokeTask
        raise SkipRetry(f"{ctx.task_id} cannot be")

    async with Server(store_url).running(mux):
        handles = [
            await client.enqueue(Task("t", task_id=i, retention=60)) for i in ("failed", "revoked")
        ]
        deleted = await client.enqueue(Task("t", task_id="deleted", retention=60), process_in=60)
        waiting = [asyncio.create_task(h.result(timeout=10)) for h in (*handles, deleted)]
        await asyncio.sleep(0.1)
        await queue.redis.delete(queue.keys.task("deleted"))
        go.set()
        failed, revoked, gone = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(failed, TaskFailedError)
    assert failed.error == "failed cannot be"
    assert isinstance(revoked, TaskFailedError)
    assert isinstance(gone, TaskFailedError)
    with pytest.raises(TaskFailedError, match="failed cannot be"):
        await handles[0].result(timeout=1)
    with pytest.raises(TaskNotFoundError):
        await handles[1].result(timeout=1)


async def test_nothing_to_wait_for_is_said_at_once(client: Client) -> None:
    handle = await client.enqueue(Task("t"))
    with pytest.raises(TaskNotFoundError, match="retention"):
        await handle.result(timeout=5)
    with pytest.raises(TaskNotFoundError):
        await client.handle("never was").result(timeout=5)


async def test_a_timeout_is_the_builtin_one(client: Client) -> None:
    handle = await client.enqueue(Task("t", retention=60))
    with pytest.raises(TimeoutError):
        await handle.result(timeout=0.05)


async def test_a_waiter_is_not_lost_when_its_connection_is(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server(appendonly=True)
    mux = Mux()

    @mux.task("t")
    async def handler(ctx: Context) -> str:
        return "done"

    async with Client(server.url) as client:
        handle = await client.enqueue(Task("t", retention=60))
        waiting = asyncio.create_task(handle.result(timeout=20))
        await asyncio.sleep(0.1)
        server.restart()
        async with Server(server.url).running(mux):
            assert await waiting == "done"


async def test_closing_ends_those_who_wait_with_an_error(store_url: str) -> None:
    client = Client(store_url)
    await client.open()
    handle = await client.enqueue(Task("t", retention=60))
    waiting = asyncio.create_task(handle.result())
    await asyncio.sleep(0.1)
    await client.close()
    async with asyncio.timeout(3):
        with pytest.raises(AsyncqError):
            await waiting


async def test_a_closed_client_is_no_place_to_wait(store_url: str) -> None:
    async with Client(store_url) as client:
        handle = await client.enqueue(Task("t", retention=60))
    async with asyncio.timeout(3):
        with pytest.raises(AsyncqError):
            await handle.result()


async def test_a_result_whose_task_was_spoiled_is_an_error(client: Client, queue: Queue) -> None:
    handle = await client.enqueue(Task("t", retention=60))
    await queue.redis.delete(queue.keys.task(handle.id))
    await queue.redis.set(queue.keys.task(handle.id), "x")
    with pytest.raises(BrokerError, match="WRONGTYPE"):
        await handle.result(timeout=3)
    other = await client.enqueue(Task("t", retention=60))
    with pytest.raises(TimeoutError):
        await other.result(timeout=0.05)


async def test_info_of_a_task_through_its_life(
    store_url: str, client: Client, queue: Queue
) -> None:
    mux = Mux()
    go = asyncio.Event()

    @mux.task("t")
    async def handler(ctx: Context) -> str:
        await ctx.progress(0.5, "half")
        await go.wait()
        return "done"

    handle = await client.enqueue(Task("t", {"a": 1}, retention=60, headers={"h": "1"}))
    assert (await handle.info()).state == "pending"
    async with Server(store_url).running(mux):
        await eventually(lambda: _progress(handle))
        info = await handle.info()
        assert (info.state, info.payload, info.headers) == ("active", b'{"a":1}', {"h": "1"})
        assert info.progress == (0.5, "half")
        go.set()
        assert await handle.result(timeout=5) == "done"
    info = await handle.info()
    assert (info.state, info.result) == ("completed", b'"done"')
    assert info.completed_at is not None
    assert await queue.state() == QueueState(completed=1, hashes=1)


async def test_a_task_in_a_state_of_another_program_is_told(client: Client, queue: Queue) -> None:
    handle = await client.enqueue(Task("t", task_id="a"))
    await queue.redis.hset(queue.keys.task("a"), "state", "dreaming")
    with pytest.raises(MalformedMessageError, match=r"'a'.*'dreaming'"):
        await handle.info()


async def _progress(handle: TaskHandle[Any]) -> bool:
    return (await handle.info()).progress is not None
