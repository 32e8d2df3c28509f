"""Redis goes away, loses scripts, cuts connections or loses replies, under work."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import (
    BrokerUnavailableError,
    Client,
    Context,
    DuplicateTaskError,
    EnqueueUncertainError,
    Mux,
    Server,
    Task,
    TaskIDConflictError,
)
from asyncq.broker import pipeline
from asyncq.broker.keys import CANCEL
from asyncq.server.loops.heartbeat import Heartbeat
from tests.chaos.live import Queue, QueueState, calls_during, eventually
from tests.chaos.proxy import proxied
from tests.stores import Database, StoreServer

MakeServer = Callable[..., StoreServer]


class Ran:
    """A mux whose handlers note what ran; "held" ones wait until they are let go."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.began = asyncio.Event()
        self.let_go = asyncio.Event()
        self.cancelled: list[str] = []
        self.mux = Mux()

        @self.mux.task("quick")
        async def quick(ctx: Context) -> str:
            self.counts[ctx.task_id] += 1
            return "ran"

        @self.mux.task("held")
        async def held(ctx: Context) -> None:
            self.counts[ctx.task_id] += 1
            self.began.set()
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                self.cancelled.append(ctx.task_id)
                raise


async def test_without_redis_the_client_raises(redis_server: MakeServer) -> None:
    server = redis_server()
    server.stop()
    with pytest.raises(BrokerUnavailableError, match=server.socket):
        async with Client(server.url):
            pass


async def test_a_restart_while_nothing_is_under_way_is_not_noticed(
    redis_server: MakeServer,
) -> None:
    server = redis_server(appendonly=True)
    async with Client(server.url) as client:
        await asyncio.gather(*(client.enqueue(Task("t"), queue=f"q{i}") for i in range(5)))
        server.restart()
        await asyncio.sleep(0)  # the event loop has not even seen that the sockets are closed
        for i in range(5):
            await client.enqueue(Task("t"), queue=f"q{i}")


async def test_a_client_goes_on_when_redis_is_back(redis_server: MakeServer) -> None:
    server = redis_server(appendonly=True)
    async with Client(server.url) as client:
        await client.enqueue(Task("t", task_id="a"))
        server.stop()
        with pytest.raises(BrokerUnavailableError):
            await client.enqueue(Task("t", task_id="b"))
        server.start()
        await client.enqueue(Task("t", task_id="b"))
        async with Redis.from_url(server.url) as redis:
            assert await Queue(redis).pending() == ["a", "b"]


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_worker_goes_on_by_itself_when_redis_is_back(
    how: str, redis_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = redis_server(appendonly=True)
    ran = Ran()
    async with Client(server.url) as client:
        ids = [f"q{i}" for i in range(200)]
        async with Server(server.url, concurrency=10).running(ran.mux):
            await client.enqueue(Task("held", task_id="held"))
            await ran.began.wait()
            enqueueing = asyncio.create_task(_enqueue_all(client, ids))
            await eventually(lambda: len(ran.counts) > 20)
            getattr(server, how)()
            await asyncio.sleep(0.5)  # a while without Redis
            ran.let_go.set()  # its outcome has to wait
            server.start()
            await enqueueing
            async with Redis.from_url(server.url) as redis:
                queue = Queue(redis)
                await eventually(lambda: _all_done(queue, ran, ids))
                assert (await queue.handled())[0] == 201
    assert set(ran.counts) == {*ids, "held"}
    assert caplog.text.count("pump: ") <= 2  # "trying again", "answers again"


async def test_a_worker_without_redis_is_quiet_and_idle(
    redis_server: MakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = redis_server(appendonly=True)
    async with Client(server.url) as client:
        await client.enqueue(Task("quick", task_id="later"), process_in=0.6)
        ran = Ran()
        async with Server(server.url).running(ran.mux):
            server.stop()
            began = time.process_time()
            await asyncio.sleep(2)  # it comes due meanwhile
            assert time.process_time() - began < 0.5
            assert len([r for r in caplog.records if "trying again" in r.message]) <= 6
            server.start()
            await eventually(lambda: ran.counts["later"])


async def test_scripts_may_be_flushed_at_any_time(
    redis_server: MakeServer,
) -> None:
    server = redis_server()
    ran = Ran()
    ids = [f"q{i}" for i in range(1000)]
    worker = Server(server.url, concurrency=20)
    async with (
        Client(server.url) as client,
        Redis.from_url(server.url) as redis,
        worker.running(ran.mux),
    ):
        enqueueing = asyncio.create_task(_enqueue_all(client, ids, at_once=20))
        while not enqueueing.done():
            await redis.script_flush()
            await asyncio.sleep(0.002)
        await enqueueing
        await eventually(lambda: _all_done(Queue(redis), ran, ids))
    assert ran.counts == Counter(ids)


async def test_a_listener_that_was_cut_wakes_and_cancels_again(redis_server: MakeServer) -> None:
    server = redis_server()
    ran = Ran()
    async with (
        Client(server.url) as client,
        Redis.from_url(server.url) as redis,
        Server(server.url).running(ran.mux),
    ):
        held = await client.enqueue(Task("held", task_id="held"), max_retry=0)
        await ran.began.wait()
        for i in range(3):
            # "pubsub" are connections that subscribe: the server's listener.
            assert await redis.client_kill_filter(_type="pubsub") == 1
            await eventually(lambda: _subscribed(redis))
            await client.enqueue(Task("quick", task_id=f"q{i}"))
            await eventually(lambda i=i: ran.counts[f"q{i}"], within_s=3)  # type: ignore[misc]
        await held.cancel()
        await eventually(lambda: ran.cancelled == ["held"], within_s=2)


async def test_connections_may_be_cut_at_any_time(store: Database) -> None:
    ran = Ran()
    ids = [f"q{i}" for i in range(300)]
    async with (
        proxied(store) as proxy,
        Client(store.url) as client,
        Server(proxy.url, concurrency=10).running(ran.mux),
    ):
        enqueueing = asyncio.create_task(_enqueue_all(client, ids, pause_s=0.003))
        for _ in range(5):
            await asyncio.sleep(0.1)
            await proxy.cut()
            await proxy.start()
        await enqueueing
        async with Redis.from_url(store.url) as redis:
            await eventually(lambda: _all_done(Queue(redis), ran, ids), within_s=30)
            assert await Queue(redis).handled() == (300, 0)
    assert set(ran.counts) == set(ids)


async def test_lost_answers_of_the_pump_lose_nothing_and_run_nothing_twice(
    store: Database, client: Client, queue: Queue
) -> None:
    ran = Ran()
    ids = [f"q{i}" for i in range(40)]
    async with proxied(store) as proxy, Server(proxy.url, concurrency=5).running(ran.mux):
        await client.enqueue(Task("quick", task_id="first"))  # scripts are known from here on
        await eventually(lambda: ran.counts["first"])
        proxy.lose_reply("pump", times=3)
        await client.enqueue_many(Task("quick", task_id=i) for i in ids)
        await eventually(lambda: _all_done(queue, ran, ids))
        assert proxy.lost == 3
    assert ran.counts == Counter(["first", *ids])
    assert await queue.handled() == (41, 0)


async def test_an_enqueue_whose_answer_was_lost_is_uncertain_and_safe_to_repeat(
    store: Database, queue: Queue
) -> None:
    async with proxied(store) as proxy, Client(proxy.url) as client:
        await client.enqueue(Task("t", task_id="first"))
        proxy.lose_reply("enqueue", times=2)
        both = await asyncio.gather(
            client.enqueue(Task("t", task_id="a")),
            client.enqueue(Task("t", task_id="b", unique=60)),
            return_exceptions=True,
        )
        assert [type(error) for error in both] == [EnqueueUncertainError] * 2
        error = both[0]
        assert isinstance(error, EnqueueUncertainError)
        assert (error.task_id, error.queue) == ("a", "default")
        for task in (Task("t", task_id="a"), Task("t", task_id="b", unique=60)):
            try:
                await client.enqueue(task)
            except TaskIDConflictError:
                pass  # it had arrived
            except DuplicateTaskError:
                pass  # likewise, with its lock
    assert await queue.pending() == ["first", "a", "b"]


async def test_an_enqueue_with_an_id_of_its_own_is_uncertain_when_its_answer_was_lost(
    store: Database, queue: Queue
) -> None:
    async with proxied(store) as proxy, Client(proxy.url) as client:
        first = await client.enqueue(Task("t"))
        proxy.lose_reply("EXEC")
        with pytest.raises(EnqueueUncertainError) as caught:
            await client.enqueue(Task("t"))
        assert await queue.pending() == [first.id, caught.value.task_id]


async def test_an_enqueue_that_arrives_after_its_repetition_makes_no_second_task(
    store: Database, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CALL_TIMEOUT_S", 0.2)
    async with proxied(store) as proxy, Client(proxy.url) as client:
        proxy.hold_back("EXEC")
        with pytest.raises(EnqueueUncertainError) as caught:
            await client.enqueue(Task("t"))
        again = await client.enqueue(Task("t"), task_id=caught.value.task_id)
        await proxy.deliver()
        assert await queue.pending() == [again.id]


async def test_a_blocked_event_loop_keeps_its_leases(
    store_url: str, client: Client, redis: Redis, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leases are made to end within 3 s; the loop is blocked for longer than that."""
    monkeypatch.setattr(Heartbeat, "__init__", partialmethod(Heartbeat.__init__, interval_s=0.2))
    ran = Ran()
    ends: list[float] = []

    @ran.mux.task("block")
    async def block(ctx: Context) -> None:
        began.set()
        time.sleep(2.5)

    began = threading.Event()

    def age_and_look() -> None:
        import redis as sync

        began.wait(10)
        blocking: Any
        with sync.Redis.from_url(store_url) as blocking:
            lease = queue.keys.lease
            held = blocking.zrange(lease, 0, -1, withscores=True)
            blocking.zadd(lease, {task_id: score - 28 for task_id, score in held})
            time.sleep(1.5)
            ends.extend(score for _, score in blocking.zrange(lease, 0, -1, withscores=True))

    await client.enqueue(Task("held", task_id="held"))
    async with Server(store_url, shutdown_timeout=0.2).running(ran.mux):
        await ran.began.wait()
        looking = asyncio.create_task(asyncio.to_thread(age_and_look))
        await client.enqueue(Task("block", task_id="block"))
        await looking
        await eventually(lambda: _handled(queue, 1))
        assert len(ends) == 2
        assert all(end > time.time() + 20 for end in ends)
        assert ran.counts == {"held": 1}
        assert not ran.cancelled


async def test_idle_servers_ask_nothing(redis_server: MakeServer) -> None:
    server = redis_server()
    queues = {"a": 3, "b": 2, "paused": 1}
    async with Redis.from_url(server.url) as redis:
        await redis.set(Queue(redis, "paused").keys.paused, "1")
        async with Client(server.url) as client:
            await client.enqueue(Task("quick", queue="paused"))
            ran = Ran()
            async with Server(server.url, queues=queues).running(ran.mux):
                await client.enqueue(Task("quick", task_id="warm", queue="a"))
                await eventually(lambda: ran.counts["warm"])
                await asyncio.sleep(1)  # the first, spread look of every loop
                ran_commands = await calls_during(redis, asyncio.sleep(6))
            assert sum(ran_commands.values()) / 6 / len(queues) < 5, ran_commands
            assert ran.counts == {"warm": 1}


async def test_one_push_to_many_idle_servers_runs_once(redis_server: MakeServer) -> None:
    redis_ = redis_server()
    ran = Ran()
    servers = [Server(redis_.url) for _ in range(8)]
    try:
        async with Client(redis_.url) as client, Redis.from_url(redis_.url) as redis:
            await asyncio.gather(*(server.start(ran.mux) for server in servers))
            ids = [f"q{i}" for i in range(50)]
            for task_id in ids:
                await client.enqueue(Task("quick", task_id=task_id))
                await eventually(lambda i=task_id: ran.counts[i], within_s=2)  # type: ignore[misc]
            await eventually(lambda: _all_done(Queue(redis), ran, ids))
    finally:
        await asyncio.gather(*(server.shutdown() for server in servers))
    assert ran.counts == Counter(ids)


async def test_a_thousand_cancels_at_once(
    store_url: str, client: Client, redis: Redis, queue: Queue
) -> None:
    ran = Ran()
    ids = [f"h{i}" for i in range(200)]
    async with Server(store_url, concurrency=200).running(ran.mux):
        handles = await client.enqueue_many(Task("held", task_id=i, max_retry=0) for i in ids)
        await eventually(lambda: len(ran.counts) == 200)
        absent = [client.handle(f"absent-{i}") for i in range(800)]
        await asyncio.gather(*(handle.cancel() for handle in [*handles, *absent]))
        await eventually(lambda: _archived(queue, 200))
    assert sorted(ran.cancelled) == sorted(ids)
    assert (await queue.message("h0")).error_msg == "context canceled"
    assert await redis.publish(CANCEL, "nobody listens") == 0  # all servers have gone


async def _enqueue_all(
    client: Client, ids: list[str], *, at_once: int = 1, pause_s: float = 0.0
) -> None:
    """Enqueue each, again and again until it is in."""

    async def one(task_id: str) -> None:
        while True:
            try:
                await client.enqueue(Task("quick", task_id=task_id))
            except TaskIDConflictError:
                return
            except BrokerUnavailableError:
                await asyncio.sleep(0.05)
            else:
                return

    for i in range(0, len(ids), at_once):
        await asyncio.gather(*(one(task_id) for task_id in ids[i : i + at_once]))
        await asyncio.sleep(pause_s)


async def _all_done(queue: Queue, ran: Ran, ids: list[str]) -> bool:
    return {*ids} <= {*ran.counts} and await queue.state() == QueueState()


async def _handled(queue: Queue, count: int) -> bool:
    return (await queue.handled())[0] >= count


async def _archived(queue: Queue, count: int) -> bool:
    return (await queue.state()).archived == count


async def _subscribed(redis: Redis) -> bool:
    return (await redis.pubsub_numsub(CANCEL))[0][1] == 1
