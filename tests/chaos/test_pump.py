"""Calls of the pump under way, or one held by Redis: what becomes of tasks if they go wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import AsyncqError, Client, Context, Mux, Server, SyncClient, Task
from asyncq.broker import broker as broker_module
from asyncq.broker import pipeline
from asyncq.broker.broker import Broker
from asyncq.server import server as server_module
from asyncq.server.loop import FIRST_PAUSE_S
from asyncq.server.loops.pump import Pump
from asyncq.server.loops.watcher import REARM_S
from tests.chaos.live import Queue, QueueState, eventually, leaving_nothing
from tests.chaos.proxy import proxied
from tests.stores import Database, StoreServer

MANY = 64  # places, so that three calls are worth their while


class Ran:
    """A mux of handlers that never wait, wait once, or for ever, and what they were called with."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.mux = Mux()

        @self.mux.task("quick")
        async def quick(ctx: Context) -> None:
            self.counts[ctx.task_id] += 1

        @self.mux.task("waiting")
        async def waiting(ctx: Context) -> None:
            self.counts[ctx.task_id] += 1
            await asyncio.sleep(0)

        @self.mux.task("held")
        async def held(ctx: Context) -> None:
            self.counts[ctx.task_id] += 1
            await asyncio.Event().wait()


def pump_of(server: Server) -> Pump:
    assert server._parts is not None
    return server._parts.pump


async def both_are_under_way(server: Server) -> None:
    """Wait until two calls are."""
    pump = pump_of(server)
    await eventually(lambda: len(pump._under_way()) > 1)  # of one queue, so each is a call


async def enqueued(client: Client, number: int, task_type: str = "quick", name: str = "q") -> Any:
    ids = [f"{name}{i}" for i in range(number)]
    await client.enqueue_many(Task(task_type, task_id=i) for i in ids)
    return ids


async def all_done(queue: Queue) -> bool:
    return await queue.state() == QueueState()


@pytest.mark.parametrize("prefetch", [0, 200])
async def test_two_calls_without_an_answer_lose_nothing_and_run_nothing_twice(
    prefetch: int, redis_server: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis hangs, is given up, and carries out what it had got when it goes on."""
    monkeypatch.setattr(pipeline, "CALL_TIMEOUT_S", 0.2)
    store = redis_server()
    ran = Ran()
    server = Server(store.url, concurrency=MANY, prefetch=prefetch)
    async with Client(store.url) as client, Redis.from_url(store.url) as redis:
        ids = await enqueued(client, 20_000)
        async with server.running(ran.mux):
            for _ in range(3):
                await both_are_under_way(server)
                store.pause()
                await asyncio.sleep(0.5)  # both are given up, and sent again in vain
                store.resume()
                count = ran.counts.total()
                await eventually(lambda count=count: ran.counts.total() > count)  # type: ignore[misc]
            await eventually(lambda: all_done(Queue(redis)), within_s=30)
            assert await Queue(redis).handled() == (len(ids), 0)
    assert ran.counts == Counter(ids)


async def test_the_lost_answers_of_two_calls_are_asked_for_again(
    store: Database, client: Client, queue: Queue
) -> None:
    ran = Ran()
    async with proxied(store) as proxy:
        server = Server(proxy.url, concurrency=MANY)
        ids = await enqueued(client, 5000)
        async with server.running(ran.mux):
            await both_are_under_way(server)
            proxy.lose_reply("pump", times=4)
            await eventually(lambda: all_done(queue), within_s=30)
            assert proxy.lost == 4
    assert ran.counts == Counter(ids)
    assert await queue.handled() == (len(ids), 0)


async def test_both_connections_may_be_cut_at_any_time(
    store: Database, client: Client, queue: Queue
) -> None:
    ran = Ran()
    async with proxied(store) as proxy:
        server = Server(proxy.url, concurrency=MANY, prefetch=50)
        ids = await enqueued(client, 10_000)
        async with server.running(ran.mux):
            for _ in range(4):
                await both_are_under_way(server)
                await proxy.cut()
                await proxy.start()
                count = ran.counts.total()
                await eventually(lambda count=count: ran.counts.total() > count)  # type: ignore[misc]
            await eventually(lambda: all_done(queue), within_s=30)
    assert ran.counts == Counter(ids)
    assert await queue.handled() == (len(ids), 0)


@pytest.mark.parametrize("prefetch", [0, 300])
async def test_what_two_calls_bring_too_late_goes_back_in_its_order(
    prefetch: int, store_url: str, client: Client, queue: Queue
) -> None:
    ran = Ran()
    ids = await enqueued(client, 20_000)
    for _ in range(6):
        server = Server(store_url, concurrency=200, prefetch=prefetch)
        async with server.running(ran.mux):
            await both_are_under_way(server)
            server.stop()
        assert set(ran.counts.values()) == {1}
        left = [i for i in ids if i not in ran.counts]
        assert await queue.pending() == left
        assert await queue.state() == QueueState(pending=len(left), hashes=len(left))
    assert await queue.handled() == (len(ran.counts), 0)


@pytest.mark.parametrize("prefetch", [0, 100])
async def test_more_than_one_call_carries_goes_back_in_its_order(
    prefetch: int, store_url: str, client: Client, queue: Queue
) -> None:
    ran = Ran()
    ids = await enqueued(client, 2000, "held")
    server = Server(store_url, concurrency=900, prefetch=prefetch, shutdown_timeout=0)
    async with server.running(ran.mux):
        await eventually(lambda: len(ran.counts) == 900)
    assert await queue.pending() == ids
    assert await queue.state() == QueueState(pending=2000, hashes=2000)
    assert (await queue.message(ids[0])).retried == 0


async def test_a_shutdown_outlives_an_outage_of_both_calls(
    redis_server: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CALL_TIMEOUT_S", 0.2)
    store = redis_server()
    ran = Ran()
    server = Server(store.url, concurrency=MANY, prefetch=100, shutdown_timeout=30)
    async with Client(store.url) as client, Redis.from_url(store.url) as redis:
        ids = await enqueued(client, 20_000)
        async with leaving_nothing(server):
            await server.start(ran.mux)
            await both_are_under_way(server)
            store.pause()
            closing = asyncio.create_task(server.shutdown())
            await asyncio.sleep(0.5)
            store.resume()
            await closing
        queue = Queue(redis)
        left = [i for i in ids if i not in ran.counts]
        assert await queue.pending() == left
        assert await queue.state() == QueueState(pending=len(left), hashes=len(left))
        assert await queue.handled() == (len(ran.counts), 0)
    assert set(ran.counts.values()) == {1}


async def test_draining_while_redis_is_away_does_not_spin(
    redis_server: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = redis_server()
    ran = Ran()
    server = Server(store.url, concurrency=MANY, prefetch=100, shutdown_timeout=1)
    turns: Counter[str] = Counter()
    turn = Pump._turn

    async def counted(pump: Pump, hand: Any) -> int:
        turns[hand.name] += 1
        return await turn(pump, hand)

    async with Client(store.url) as client:
        await enqueued(client, 20_000)
        async with leaving_nothing(server):
            await server.start(ran.mux)
            await both_are_under_way(server)
            store.kill()
            monkeypatch.setattr(Pump, "_turn", counted)
            await server.shutdown()
    assert turns.total() < 200, turns  # a tenth of a second between two tries, for each


async def test_a_burst_after_a_rest_is_taken_by_both_and_the_rest_by_one(
    store_url: str, client: Client, queue: Queue
) -> None:
    """The second call comes and goes, and leaves nobody asleep."""
    ran = Ran()
    server = Server(store_url, concurrency=MANY)
    async with server.running(ran.mux):
        for burst in range(5):
            ids = await enqueued(client, 1000, name=f"b{burst}.")
            await eventually(lambda ids=ids: {*ids} <= {*ran.counts})  # type: ignore[misc]
            for i in range(5):
                await enqueued(client, 1, name=f"s{burst}.{i}.")
                await eventually(lambda: all_done(queue))
    assert set(ran.counts.values()) == {1}
    assert await queue.handled() == (5 * 1005, 0)


def at_calls_under_way(
    monkeypatch: pytest.MonkeyPatch, do: Callable[[int, str], Awaitable[None]]
) -> None:
    """Before each call, do something with how many are then under way, and the name of the hand."""
    under_way, call = 0, Broker.pump

    async def counted(broker: Broker, hand: str, requests: Any) -> Any:
        nonlocal under_way
        under_way += 1
        try:
            await do(under_way, hand)
            return await call(broker, hand, requests)
        finally:
            under_way -= 1

    monkeypatch.setattr(Broker, "pump", counted)


@pytest.mark.parametrize(("task_type", "calls"), [("quick", 2), ("waiting", 3)])
async def test_a_third_call_is_made_only_while_handlers_wait(
    task_type: str, calls: int, store_url: str, client: Client, queue: Queue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ran = Ran()
    seen: set[int] = set()

    async def see(under_way: int, hand: str) -> None:
        seen.add(under_way)

    at_calls_under_way(monkeypatch, see)
    ids = await enqueued(client, 5000, task_type)
    async with Server(store_url, concurrency=MANY).running(ran.mux):
        await eventually(lambda: all_done(queue))
    assert max(seen) == calls
    assert ran.counts == Counter(ids)
    assert await queue.handled() == (len(ids), 0)


async def test_no_third_call_is_made_any_more_when_handlers_no_longer_wait(
    store_url: str, client: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Ran()
    had_run: list[int] = []  # at each of its calls

    async def see(under_way: int, hand: str) -> None:
        if hand.endswith(".3"):
            had_run.append(ran.counts.total())

    at_calls_under_way(monkeypatch, see)
    await enqueued(client, 2000, "waiting", name="w")
    await enqueued(client, 5000, "quick", name="q")
    async with Server(store_url, concurrency=MANY).running(ran.mux):
        await eventually(lambda: all_done(queue))
    assert had_run
    assert max(had_run) < 2000 + 10 * MANY


@pytest.mark.parametrize("trouble", ["stop", "cut"])
async def test_three_calls_that_go_wrong_lose_nothing(
    trouble: str, store: Database, client: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, went_wrong = Ran(), False
    ids = await enqueued(client, 3000, "waiting")
    async with proxied(store) as proxy:
        server = Server(proxy.url, concurrency=MANY)

        async def go_wrong(under_way: int, hand: str) -> None:
            nonlocal went_wrong
            if under_way < 3 or went_wrong:
                return
            went_wrong = True
            if trouble == "stop":
                server.stop()
            else:
                await proxy.cut()
                await proxy.start()

        at_calls_under_way(monkeypatch, go_wrong)
        async with server.running(ran.mux):
            if trouble == "cut":
                await eventually(lambda: all_done(queue))
            else:
                await eventually(lambda: went_wrong)
    assert went_wrong
    assert set(ran.counts.values()) == {1}
    left = [i for i in ids if i not in ran.counts]
    assert bool(left) == (trouble == "stop")
    assert await queue.pending() == left
    assert await queue.state() == QueueState(pending=len(left), hashes=len(left))
    assert await queue.handled() == (len(ran.counts), 0)


async def test_an_outage_counts_once_however_many_calls_were_under_way(
    redis_server: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the last to fail would pause longest, with the tasks that it had been given."""
    store, ran = redis_server(), Ran()
    pauses: dict[str, float] = {}
    pause = Pump._pause

    async def noted(pump: Pump, hand: Any, error: Any) -> None:
        pauses.setdefault(hand.name, hand.backoff._pause_s)
        await pause(pump, hand, error)

    async def kill(under_way: int, hand: str) -> None:
        if under_way == 3:
            store.kill()

    monkeypatch.setattr(Pump, "_pause", noted)
    at_calls_under_way(monkeypatch, kill)
    async with Client(store.url) as client:
        await enqueued(client, 3000, "waiting")
    server = Server(store.url, concurrency=MANY, shutdown_timeout=0)
    async with server.running(ran.mux):
        await eventually(lambda: len(pauses) == 3)
    assert set(pauses.values()) == {FIRST_PAUSE_S}


async def test_no_burst_is_left_lying_while_half_of_the_places_are_taken(
    store_url: str, client: Client, queue: Queue
) -> None:
    """The answers of the two calls may come in either order, and the last one tells of an end."""
    ran = Ran()
    server = Server(store_url, concurrency=MANY, shutdown_timeout=0)
    async with server.running(ran.mux):
        await enqueued(client, MANY // 2, "held", name="held")
        await eventually(lambda: ran.counts.total() == MANY // 2)
        for burst in range(60):
            ids = await enqueued(client, 16 + burst, name=f"b{burst}.")
            await eventually(lambda ids=ids: {*ids} <= {*ran.counts}, within_s=REARM_S / 2)  # type: ignore[misc]
    assert set(ran.counts.values()) == {1}


# A request that Redis holds for a server on which nothing runs


async def waits(server: Server) -> None:
    """Wait until Redis holds a request."""
    await eventually(lambda: pump_of(server)._end_wait is not None)


@pytest.mark.parametrize("trouble", ["answer lost", "script lost", "connection cut"])
async def test_a_request_that_was_held_in_vain_is_sent_again(
    trouble: str, store: Database, client: Client, redis: Redis, queue: Queue
) -> None:
    ran = Ran()
    async with proxied(store) as proxy:
        if trouble == "answer lost":
            proxy.lose_reply("receive")
        server = Server(proxy.url)
        async with server.running(ran.mux):
            await waits(server)
            if trouble == "script lost":
                await redis.script_flush()
            elif trouble == "connection cut":
                await proxy.cut()
                await proxy.start()
            await client.enqueue(Task("quick", task_id="a"))
            await eventually(lambda: all_done(queue))
            await client.enqueue(Task("quick", task_id="b"))
            await eventually(lambda: all_done(queue))
            assert pump_of(server)._under_way() == []
    assert ran.counts == Counter("ab")
    assert await queue.handled() == (2, 0)


async def test_a_server_that_stops_takes_nothing_by_the_request_that_redis_holds(
    store_url: str, client: Client, queue: Queue
) -> None:
    ran = Ran()
    server = Server(store_url)
    async with server.running(ran.mux):
        await waits(server)
        server.stop()
        await client.enqueue(Task("quick", task_id="a"))
    assert await queue.pending() == ["a"]
    assert not ran.counts


async def test_a_request_that_redis_reads_late_gives_its_task_back_at_the_stop(
    store: Database, client: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "DRAIN_S", 0.01)
    ran, asked = Ran(), 0

    async with proxied(store) as proxy:
        proxy.hold_back("receive")
        server = Server(proxy.url, shutdown_timeout=60)
        async with server.running(ran.mux), asyncio.timeout(30):
            await waits(server)
            await client.enqueue(Task("quick", task_id="a"))
            owes = pump_of(server).owes

            def counted() -> bool:
                nonlocal asked
                asked += 1
                return owes()

            monkeypatch.setattr(pump_of(server), "owes", counted)
            closing = asyncio.create_task(server.shutdown())
            await eventually(lambda: asked > 1)  # it is not given up for what it might bring
            assert await queue.pending() == ["a"]
            await proxy.deliver()
            await closing
    assert await queue.state() == QueueState(pending=1, hashes=1)
    assert not ran.counts


async def test_servers_that_stop_while_tasks_come_leave_each_task_in_one_place(
    store_url: str, client: Client, queue: Queue
) -> None:
    """The end of a hold and the task that it was for cross each other."""
    ran = Ran()
    ids = [f"q{i}" for i in range(300)]
    async with asyncio.timeout(60):
        enqueueing = asyncio.create_task(_enqueue_slowly(client, ids))
        while not enqueueing.done():
            servers = [Server(store_url, concurrency=1) for _ in range(3)]
            for server in servers:
                await server.start(ran.mux)
            await asyncio.sleep(0.01)
            for server in servers:
                await server.shutdown()
        await enqueueing
    left = await queue.pending()
    assert sorted([*ran.counts, *left]) == sorted(ids)
    assert set(ran.counts.values()) == {1}
    assert await queue.state() == QueueState(pending=len(left), hashes=len(left))


async def _enqueue_slowly(client: Client, ids: list[str]) -> None:
    for task_id in ids:
        await client.enqueue(Task("quick", task_id=task_id))
        await asyncio.sleep(0.001)


async def test_nothing_is_held_while_a_handler_runs_and_what_comes_then_is_told(
    store_url: str, client: Client
) -> None:
    ran = Ran()
    server = Server(store_url, concurrency=2, shutdown_timeout=0)
    async with server.running(ran.mux):
        for task_id in "ab":
            await client.enqueue(Task("held", task_id=task_id))
            await eventually(lambda task_id=task_id: ran.counts[task_id])  # type: ignore[misc]
            assert pump_of(server)._end_wait is None


async def test_a_queue_that_was_paused_while_redis_held_a_request_waits_for_its_end(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    ran = Ran()
    server = Server(store_url)
    async with server.running(ran.mux):
        await waits(server)
        await redis.set(queue.keys.paused, "1")
        await client.enqueue_many(Task("quick", task_id=i) for i in "ab")
        await eventually(lambda: pump_of(server)._end_wait is None)
        await eventually(lambda: pump_of(server)._lanes[0].armed)
        assert await queue.pending() == ["a", "b"]
        await redis.delete(queue.keys.paused)
        await eventually(lambda: all_done(queue))
    assert ran.counts == Counter("ab")


async def test_a_refused_request_leaves_the_queue_listened_to(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    ran = Ran()
    server = Server(store_url)
    async with server.running(ran.mux):
        await waits(server)
        await redis.set(queue.keys.mark, "of another program")
        await client.enqueue(Task("quick", task_id="a"))
        await eventually(lambda: pump_of(server)._end_wait is None)
        await eventually(lambda: pump_of(server)._lanes[0].armed, within_s=REARM_S / 2)
        await redis.delete(queue.keys.mark)
        await eventually(lambda: all_done(queue), within_s=30)
    assert ran.counts == Counter("a")


async def test_servers_whose_connections_were_lost_wait_in_redis_again(store: Database) -> None:
    async with proxied(store) as proxy, contextlib.AsyncExitStack() as stack:
        servers = [Server(proxy.url) for _ in range(3)]
        for server in servers:
            await stack.enter_async_context(server.running(Ran().mux))
            await waits(server)
        await proxy.cut()
        for server in servers:
            await eventually(lambda server=server: pump_of(server)._end_wait is None)  # type: ignore[misc]
        await proxy.start()
        for server in servers:
            await waits(server)


async def test_outcomes_that_were_on_their_way_are_told_of_when_redis_is_gone(
    redis_server: Callable[..., StoreServer], caplog: pytest.LogCaptureFixture
) -> None:
    store = redis_server()
    server = Server(store.url, shutdown_timeout=2)
    gate, mux, begun = asyncio.Event(), Mux(), Counter[str]()

    @mux.task("waits")
    async def handler(ctx: Context) -> None:
        begun[ctx.task_id] += 1
        await gate.wait()

    async with leaving_nothing(server):
        await server.start(mux)
        async with Client(store.url) as client:
            await enqueued(client, 5, "waits")
        await eventually(lambda: begun.total() == 5)
        store.kill()
        gate.set()
        await eventually(lambda: pump_of(server)._under_way())
        await server.shutdown()
    assert "5 outcomes could not be saved" in caplog.text


async def test_an_idle_server_ends_without_redis(
    redis_server: Callable[..., StoreServer], caplog: pytest.LogCaptureFixture
) -> None:
    store = redis_server()
    server = Server(store.url, shutdown_timeout=300)
    async with asyncio.timeout(60), leaving_nothing(server):
        await server.start(Ran().mux)
        await waits(server)
        store.kill()
        await server.shutdown()
    assert "could not be saved" not in caplog.text


async def test_of_many_servers_that_wait_each_gets_a_task(store_url: str, client: Client) -> None:
    ran = [Ran() for _ in range(10)]
    async with contextlib.AsyncExitStack() as stack:
        for one in ran:
            server = Server(store_url, shutdown_timeout=0)
            await stack.enter_async_context(server.running(one.mux))
            await waits(server)
        for i in range(10):
            await client.enqueue(Task("held", task_id=str(i)))
        await eventually(lambda: all(one.counts.total() == 1 for one in ran))


@pytest.mark.parametrize("queues", [{"low": 1, "high": 6}, {"high": 6, "low": 1}])
async def test_queues_that_get_tasks_in_the_same_moment_share_the_places_by_weight(
    queues: dict[str, int], store_url: str, client: Client
) -> None:
    ran = Ran()
    server = Server(store_url, concurrency=70, queues=queues, shutdown_timeout=0)
    async with server.running(ran.mux):
        await client.enqueue(Task("quick", task_id="first"), queue="low")
        await eventually(lambda: ran.counts["first"])
        await eventually(lambda: all(lane.armed for lane in pump_of(server)._lanes))
        with SyncClient(store_url) as blocking:  # the server hears of both at once
            for name in ("low", "high"):
                tasks = [Task("held", task_id=f"{name}{i}", queue=name) for i in range(100)]
                blocking.enqueue_many(tasks)
        await eventually(lambda: ran.counts.total() == 71)
    assert 8 <= sum(task_id.startswith("low") for task_id in ran.counts) <= 12


@pytest.mark.parametrize("part", ["_execution.start", "_start"])
async def test_a_defect_in_what_comes_from_a_held_request_stops_the_server(
    part: str, store_url: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("a defect")

    ran = Ran()
    server = Server(store_url)
    with pytest.raises(AsyncqError, match="died"):
        async with server.running(ran.mux):
            await waits(server)
            broken: Any = pump_of(server)
            *path, name = part.split(".")
            monkeypatch.setattr(broken._execution if path else broken, name, fails)
            await client.enqueue(Task("quick", task_id="first"))
            await eventually(server._shutdown_wanted.is_set)


async def test_a_dead_pump_is_not_waited_for_though_redis_holds_its_request(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails() -> int:
        raise RuntimeError("a defect")

    monkeypatch.setattr(broker_module, "WAIT_S", 9)
    server = Server(store_url, shutdown_timeout=300)
    with pytest.raises(AsyncqError, match="died"):
        async with asyncio.timeout(60), server.running(Ran().mux):
            await waits(server)
            monkeypatch.setattr(pump_of(server), "tick", fails)
            pump_of(server)._in_flight.changed.set()
            await eventually(lambda: pump_of(server)._end_wait is None, within_s=REARM_S / 2)
            pump_of(server)._in_flight.put_back(pump_of(server)._lanes[0], "nobody saves it", 1)
