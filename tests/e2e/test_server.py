"""A whole server on a real store: which task comes next, what becomes of it, start and stop."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import partialmethod
from typing import Any

import psutil
import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from asyncq import (
    AsyncqError,
    Client,
    Context,
    Mux,
    Retry,
    RevokeTask,
    Server,
    ServerClosedError,
    SkipRetry,
    Snooze,
    Task,
)
from asyncq.proto.asynq_pb2 import ServerInfo
from asyncq.server.loops.heartbeat import Heartbeat
from tests.chaos.live import Queue, QueueState, eventually
from tests.stores import StoreServer

WEIGHTS = {"high": 6, "middle": 3, "low": 1}


def mux_of(handler: Callable[..., Any], **options: Any) -> Mux:
    mux = Mux()
    mux.task("t", **options)(handler)
    return mux


async def no_op(ctx: Context) -> None:
    pass


# Which task comes next


@pytest.mark.parametrize(("concurrency", "prefetch"), [(1, 0), (100, 0), (1, 9), (10, 100)])
async def test_full_queues_are_served_by_weight(
    concurrency: int, prefetch: int, store_url: str, client: Client
) -> None:
    """60, 30 and 10 % of 10,000 tasks, within two points."""
    counts: Counter[str] = Counter()
    enough = asyncio.Event()
    total = 10_000

    async def handler(ctx: Context) -> None:
        if counts.total() < total:
            counts[ctx.queue] += 1
        else:
            enough.set()

    per_queue = {"high": 6800, "middle": 3800, "low": 1800}  # none runs empty before the end
    for queue, number in per_queue.items():
        await client.enqueue_many(Task("t", queue=queue) for _ in range(number))
    server = Server(store_url, queues=WEIGHTS, concurrency=concurrency, prefetch=prefetch)
    async with server.running(mux_of(handler)):
        async with asyncio.timeout(60):
            await enough.wait()
    shares = {queue: counts[queue] / total for queue in WEIGHTS}
    assert shares == {q: pytest.approx(weight / 10, abs=0.02) for q, weight in WEIGHTS.items()}


@pytest.mark.parametrize("concurrency", [1, 10])
async def test_strict_priority_lets_few_lower_tasks_before_a_higher_one(
    concurrency: int, store_url: str, client: Client
) -> None:
    started: list[str] = []

    async def handler(ctx: Context) -> None:
        started.append(ctx.queue)
        await asyncio.sleep(0)

    await client.enqueue_many(Task("t", queue="low") for _ in range(20_000))
    server = Server(
        store_url, queues={"high": 2, "low": 1}, strict_priority=True, concurrency=concurrency
    )
    async with server.running(mux_of(handler)):
        for i in range(10):
            at = len(started)
            await eventually(lambda at=at: len(started) > at)  # type: ignore[misc]
            await client.enqueue(Task("t", queue="high"))
            before = len(started)
            await eventually(lambda i=i: started.count("high") > i)  # type: ignore[misc]
            at = [n for n, queue in enumerate(started) if queue == "high"][i]
            assert at - before <= concurrency


async def test_strictly_a_lower_queue_is_served_only_when_the_higher_are_empty(
    store_url: str, client: Client
) -> None:
    started: list[str] = []

    async def handler(ctx: Context) -> None:
        started.append(ctx.queue)

    for queue in ("low", "high", "middle"):
        await client.enqueue_many(Task("t", queue=queue) for _ in range(30))
    server = Server(store_url, queues=WEIGHTS, strict_priority=True, concurrency=1)
    async with server.running(mux_of(handler)):
        await eventually(lambda: len(started) == 90)
    assert started == ["high"] * 30 + ["middle"] * 30 + ["low"] * 30


async def test_a_limited_queue_runs_no_more_at_once_and_leaves_room(
    store_url: str, client: Client
) -> None:
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    done: Counter[str] = Counter()

    async def handler(ctx: Context) -> None:
        running[ctx.queue] += 1
        most[ctx.queue] = max(most[ctx.queue], running[ctx.queue])
        await asyncio.sleep(0.005)
        running[ctx.queue] -= 1
        done[ctx.queue] += 1

    for queue in ("slow", "default"):
        await client.enqueue_many(Task("t", queue=queue) for _ in range(60))
    server = Server(
        store_url,
        queues={"slow": 5, "default": 1},
        queue_concurrency={"slow": 2},
        concurrency=10,
    )
    async with server.running(mux_of(handler)):
        await eventually(lambda: done == {"slow": 60, "default": 60})
    assert most["slow"] == 2
    assert most["default"] >= 8


@pytest.mark.parametrize("prefetch", [0, 100])
async def test_a_limited_queue_is_limited_with_several_calls_under_way(
    prefetch: int, store_url: str, client: Client, redis: Redis
) -> None:
    """All calls may ask the same queue, and what waits for a place counts as well."""
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    done: Counter[str] = Counter()
    taken = 0

    async def handler(ctx: Context) -> None:
        nonlocal taken
        running[ctx.queue] += 1
        most[ctx.queue] = max(most[ctx.queue], running[ctx.queue])
        if ctx.queue == "slow":
            taken = max(taken, await redis.llen(Queue(redis, "slow").keys.active))
        running[ctx.queue] -= 1
        done[ctx.queue] += 1

    await client.enqueue_many(Task("t", queue="slow") for _ in range(300))
    await client.enqueue_many(Task("t", queue="default") for _ in range(10_000))
    server = Server(
        store_url,
        queues={"slow": 1, "default": 1},
        queue_concurrency={"slow": 2},
        concurrency=64,
        prefetch=prefetch,
    )
    async with server.running(mux_of(handler)):
        await eventually(lambda: done == {"slow": 300, "default": 10_000}, within_s=60)
    assert most["slow"] == 2
    assert taken <= 4  # two that run, and two whose outcomes are on their way


async def test_a_paused_queue_waits_and_is_woken(
    store_url: str, client: Client, queue: Queue
) -> None:
    ran: list[str] = []

    async def handler(ctx: Context) -> None:
        ran.append(ctx.task_id)

    async with Server(store_url).running(mux_of(handler)):
        await client.enqueue(Task("t", task_id="a"))
        await eventually(lambda: ran)
        await queue.redis.set(queue.keys.paused, "1")
        await client.enqueue(Task("t", task_id="b"))
        await asyncio.sleep(0.2)
        assert await queue.pending() == ["b"]
        began = time.monotonic()
        await queue.redis.delete(queue.keys.paused)
        await eventually(lambda: ran == ["a", "b"])
        assert time.monotonic() - began < 1


# What becomes of it


async def test_a_task_that_is_due_later_starts_then_and_not_before(
    store_url: str, client: Client
) -> None:
    late: list[float] = []

    async def handler(payload: float, ctx: Context) -> None:
        late.append(time.time() - payload)

    async with Server(store_url).running(mux_of(handler)):
        await asyncio.sleep(1.1)  # the forwarder has looked once, and sleeps
        for delay in (0.7, 0.3, 0.5):
            at = datetime.now(UTC) + timedelta(seconds=delay)
            await client.enqueue(Task("t", at.timestamp()), process_at=at)
        await eventually(lambda: len(late) == 3)
    assert all(0 <= seconds < 0.25 for seconds in late)


async def test_retry_snooze_revoke_and_skip(
    store_url: str, client: Client, queue: Queue, redis: Redis
) -> None:
    tries: Counter[str] = Counter()
    signals: dict[str, Exception] = {
        "retry": Retry(0.1),
        "snooze": Snooze(0.1),
        "revoke": RevokeTask(),
        "skip": SkipRetry("no use"),
    }

    async def handler(ctx: Context) -> None:
        tries[ctx.task_id] += 1
        if tries[ctx.task_id] == 1:
            raise signals[ctx.task_id]
        assert ctx.retry_count == (1 if ctx.task_id == "retry" else 0)

    async with Server(store_url).running(mux_of(handler)):
        await client.enqueue_many(Task("t", task_id=i, unique=60, unique_key=i) for i in signals)
        await eventually(lambda: tries == {"retry": 2, "snooze": 2, "revoke": 1, "skip": 1})
        await eventually(lambda: _is(queue, QueueState(archived=1, hashes=1)))
    assert await queue.ids("archived") == {"skip"}
    locks = [key async for key in redis.scan_iter(match="asynq:*:unique:*")]
    assert locks == [queue.keys.unique("t", "skip").encode()]


async def test_a_completed_task_is_kept_as_long_as_its_retention_says(
    store_url: str, client: Client, queue: Queue
) -> None:
    async def handler(ctx: Context) -> str:
        return "done"

    server = Server(store_url)
    async with server.running(mux_of(handler)):
        kept = await client.enqueue(Task("t", retention=3600))
        short = await client.enqueue(Task("t", retention=1))
        assert await kept.result(timeout=5) == await short.result(timeout=5) == "done"
        assert await queue.ids("completed") == {kept.id, short.id}
        await queue.redis.zadd(queue.keys.completed, {short.id: 1000})  # long ago
        # The janitor of a server that starts looks within its first second.
        async with Server(store_url).running(mux_of(handler)):
            await eventually(lambda: _is(queue, QueueState(completed=1, hashes=1)))


async def test_cancelling_reaches_a_running_handler_at_once(
    store_url: str, client: Client, queue: Queue
) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def handler(ctx: Context) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with Server(store_url).running(mux_of(handler)):
        for retry, kept_in in ((True, "retry"), (False, "archived")):
            began.clear()
            cancelled.clear()
            handle = await client.enqueue(Task("t"))
            await asyncio.wait_for(began.wait(), 5)
            asked_at = time.monotonic()
            await handle.cancel(retry=retry)
            await asyncio.wait_for(cancelled.wait(), 5)
            assert time.monotonic() - asked_at < 1  # 0.1 s where nothing else runs
            await eventually(lambda k=kept_in, h=handle: _has(queue, k, h.id))  # type: ignore[misc]
            assert (await queue.message(handle.id)).error_msg == "context canceled"
        await client.handle("runs nowhere").cancel()
        await client.handle("runs nowhere").cancel(retry=False)


async def test_a_handler_cannot_be_cancelled_before_the_server_listens(
    store_url: str, client: Client, queue: Queue
) -> None:
    """The first task starts only when cancelations arrive."""
    for i in range(20):
        began = asyncio.Event()

        async def handler(ctx: Context, began: asyncio.Event = began) -> None:
            began.set()
            await asyncio.Event().wait()

        handle = await client.enqueue(Task("t", max_retry=0))
        async with Server(store_url, shutdown_timeout=0).running(mux_of(handler)):
            await began.wait()
            await handle.cancel()
            await eventually(lambda i=i: _archived(queue, i + 1), within_s=3)  # type: ignore[misc]


async def test_a_timeout_is_kept(store_url: str, client: Client, queue: Queue) -> None:
    async def handler(ctx: Context) -> None:
        await asyncio.Event().wait()

    async with Server(store_url).running(mux_of(handler)):
        await client.enqueue(Task("t", task_id="a", timeout=1, max_retry=0))
        await eventually(lambda: queue.ids("archived"))
    assert (await queue.message("a")).error_msg == "context deadline exceeded"


async def test_the_lifespan_surrounds_the_server_and_its_state_reaches_handlers(
    store_url: str, client: Client
) -> None:
    events: list[str] = []

    @asynccontextmanager
    async def lifespan(mux: Mux[dict[str, str]]) -> AsyncIterator[dict[str, str]]:
        events.append("up")
        yield {"name": "state"}
        events.append("down")

    mux: Mux[dict[str, str]] = Mux(lifespan=lifespan)

    @mux.task("t")
    async def handler(ctx: Context[dict[str, str]]) -> None:
        events.append(ctx.state["name"])

    async with Server(store_url).running(mux):
        await client.enqueue(Task("t"))
        await eventually(lambda: len(events) == 2)
    assert events == ["up", "state", "down"]


@pytest.mark.parametrize("waits", [True, False])
async def test_handlers_see_the_context_variables_that_the_lifespan_set(
    waits: bool, store_url: str, client: Client
) -> None:
    variable: ContextVar[str] = ContextVar("variable", default="not set")
    seen: list[str] = []

    @asynccontextmanager
    async def lifespan(mux: Mux[None]) -> AsyncIterator[None]:
        token = variable.set("by the lifespan")
        yield
        variable.reset(token)  # as it may only be in the context in which it was set

    mux: Mux[None] = Mux(lifespan=lifespan)

    @mux.task("t")
    async def handler(ctx: Context[None]) -> None:
        seen.append(variable.get())

    server = Server(store_url)
    if not waits:
        await client.enqueue(Task("t"))
    async with server.running(mux):
        if waits:
            parts = server._parts
            assert parts is not None
            await eventually(lambda: parts.pump._end_wait is not None)
            await client.enqueue(Task("t"))
        await eventually(lambda: seen)
    assert seen == ["by the lifespan"]


async def test_a_lifespan_that_fails_stops_the_start_and_leaves_nothing(store_url: str) -> None:
    @asynccontextmanager
    async def lifespan(mux: Mux[None]) -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="no database"):
        async with Server(store_url).running(Mux(lifespan=lifespan)):
            pass
    assert not [n for n in _new_threads(before) if n.startswith("asyncq")]


async def test_the_health_check_tells_of_redis(redis_server: Callable[..., StoreServer]) -> None:
    server = redis_server(appendonly=True)
    seen: list[bool] = []
    health: Any = lambda error: seen.append(error is None)  # noqa: E731
    async with Server(server.url, health_check=health, health_check_interval=0.05).running(
        mux_of(no_op)
    ):
        await eventually(lambda: True in seen)
        server.stop()
        await eventually(lambda: False in seen)
        seen.clear()
        server.start()
        await eventually(lambda: True in seen)


async def test_a_tasks_own_middleware_and_client(store_url: str, client: Client) -> None:
    ran: list[str] = []
    mux = Mux()

    @mux.task("parent")
    async def parent(ctx: Context) -> None:
        await ctx.client.enqueue(Task("child", headers={"from": ctx.task_id}))

    @mux.task("child")
    async def child(ctx: Context) -> None:
        ran.append(ctx.headers["from"])

    async with Server(store_url).running(mux):
        await client.enqueue(Task("parent", task_id="p"))
        await eventually(lambda: ran == ["p"])


# Start and stop


async def test_starting_and_stopping_often_leaves_nothing_behind(store_url: str) -> None:
    process = psutil.Process()
    mux = mux_of(no_op)

    async def once(action: int) -> None:
        server = Server(store_url, shutdown_timeout=0.1)
        match action % 3:
            case 0:
                async with server.running(mux):
                    pass
            case 1:
                server.stop()
                await server.start(mux)
                server.stop()
                server.stop()
                await server.shutdown()
                await server.shutdown()
            case _:
                await server.start(mux)
                await asyncio.gather(server.shutdown(), server.shutdown())

    await asyncio.gather(*(once(i) for i in range(3)))  # what is made once is there from here on
    gc.collect()
    threads, fds = {t.name for t in threading.enumerate()}, process.num_fds()
    tasks = len(asyncio.all_tasks())
    for i in range(30):
        await once(i)
    gc.collect()
    assert not [n for n in _new_threads(threads) if n.startswith("asyncq")]
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    assert process.num_fds() <= fds


async def test_a_server_is_started_once(store_url: str) -> None:
    server = Server(store_url)
    async with server.running(mux_of(no_op)):
        with pytest.raises(AsyncqError, match="running already"):
            await server.start(mux_of(no_op))
    with pytest.raises(ServerClosedError):
        await server.start(mux_of(no_op))


async def test_stop_lets_what_runs_end_and_takes_nothing_new(
    store_url: str, client: Client, queue: Queue
) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def handler(ctx: Context) -> None:
        began.set()
        await go.wait()

    server = Server(store_url)
    async with server.running(mux_of(handler)):
        await client.enqueue(Task("t", task_id="a"))
        await asyncio.wait_for(began.wait(), 5)
        server.stop()
        await client.enqueue(Task("t", task_id="b"))
        go.set()
        await eventually(lambda: _is(queue, QueueState(pending=1, hashes=1)))
    assert await queue.pending() == ["b"]


async def test_drain_waits_for_all_that_is_there(
    store_url: str, client: Client, queue: Queue
) -> None:
    await client.enqueue_many(Task("t") for _ in range(500))
    await client.enqueue(Task("t"), process_in=3600)
    server = Server(store_url, concurrency=10)
    async with server.running(mux_of(no_op)), asyncio.timeout(10):
        await asyncio.gather(server.drain(), server.drain())
        assert await queue.state() == QueueState(scheduled=1, hashes=1)


async def test_shutting_down_a_server_that_waits_for_redis(
    redis_server: Callable[..., StoreServer],
) -> None:
    redis = redis_server()
    redis.stop()
    server = Server(redis.url)
    starting = asyncio.create_task(server.start(mux_of(no_op)))
    await asyncio.sleep(0.2)
    await asyncio.wait_for(server.shutdown(), 3)
    await asyncio.wait([starting], timeout=3)
    assert starting.done()
    starting.exception()


async def test_shutting_down_while_redis_is_away_has_a_bound(
    redis_server: Callable[..., StoreServer],
) -> None:
    redis = redis_server()
    began = asyncio.Event()

    async def handler(ctx: Context) -> None:
        began.set()
        await asyncio.Event().wait()

    server = Server(redis.url, shutdown_timeout=0.2)
    async with Client(redis.url) as client:
        await server.start(mux_of(handler))
        await client.enqueue(Task("t"))
        await asyncio.wait_for(began.wait(), 5)
        redis.pause()  # worse than a refusal: nothing answers
        started_at = time.monotonic()
        await server.shutdown()
        assert time.monotonic() - started_at < 0.2 + 6
        redis.resume()


async def test_a_mux_that_was_bound_before_stays_bound(store_url: str, client: Client) -> None:
    mux = Mux()

    @mux.task("t")
    async def handler(ctx: Context) -> None:
        pass

    mux.bind(client)
    for _ in range(2):
        async with Server(store_url).running(mux):
            pass
    await handler.enqueue()


async def test_a_loop_that_dies_stops_the_server_loudly(
    store_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def die(self: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("asyncq.server.loops.janitor.Janitor.tick", die)
    with pytest.raises(AsyncqError, match="a bug"):
        async with asyncio.timeout(10):
            await Server(store_url).run(mux_of(no_op))
    assert "asyncq-janitor died" in caplog.text


async def test_signals_are_given_back(store_url: str) -> None:
    import signal

    before = signal.getsignal(signal.SIGTERM)
    server = Server(store_url)
    running = asyncio.create_task(server.run(mux_of(no_op)))
    await eventually(lambda: signal.getsignal(signal.SIGTERM) != before)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 10)
    assert signal.getsignal(signal.SIGTERM) == before


# Tasks that are taken ahead


class Held:
    """A mux whose handlers wait until they are let go, one by one or all."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.cancelled: list[str] = []
        self.all = asyncio.Event()
        self.mux = mux_of(self._handle)
        self._go: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)

    async def _handle(self, ctx: Context) -> None:
        self.began.append(ctx.task_id)
        waits = [asyncio.create_task(e.wait()) for e in (self._go[ctx.task_id], self.all)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self.cancelled.append(ctx.task_id)
            raise
        finally:
            for wait in waits:
                wait.cancel()

    def let_go(self, task_id: str) -> None:
        self._go[task_id].set()


async def test_no_more_run_than_there_are_places_and_a_few_more_are_leased(
    store_url: str, client: Client, queue: Queue, redis: Redis
) -> None:
    held = Held()
    ids = [f"t{i}" for i in range(10)]
    await client.enqueue_many(Task("t", task_id=i) for i in ids)
    async with Server(store_url, concurrency=2, prefetch=3).running(held.mux):
        await eventually(lambda: _has_taken(queue, 5))
        assert await queue.pending() == ids[5:]
        assert (await queue.leases()).keys() == set(ids[:5])
        assert held.began == ids[:2]
        for i in range(2, 7):
            held.let_go(ids[i - 2])
            await eventually(lambda i=i: held.began == ids[: i + 1])  # type: ignore[misc]
            await eventually(lambda: _has_taken(queue, 5))
        held.all.set()
        await eventually(lambda: _is(queue, QueueState()))
    assert held.began == ids
    assert await queue.handled() == (10, 0)


async def test_what_waits_keeps_its_lease_and_is_not_shown_as_running(
    store_url: str,
    client: Client,
    queue: Queue,
    redis: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Heartbeat, "__init__", partialmethod(Heartbeat.__init__, interval_s=0.1))
    held = Held()
    await client.enqueue_many(Task("t", task_id=i) for i in "abc")
    async with Server(store_url, concurrency=1, prefetch=2).running(held.mux):
        await eventually(lambda: held.began)
        before = await queue.leases()
        await redis.zadd(queue.keys.lease, {i: score - 20 for i, score in before.items()}, xx=True)

        async def extended() -> bool:
            leases = await queue.leases()
            return leases.keys() == before.keys() and all(
                leases[task_id] >= score for task_id, score in before.items()
            )

        await eventually(extended)
        (key,) = await redis.zrange("asynq:workers", 0, -1)
        (server,) = await redis.zrange("asynq:servers", 0, -1)

        async def shown() -> bool:
            return [i.decode() for i in await redis.hkeys(key)] == ["a"]

        await eventually(shown)
        info = ServerInfo.FromString(await redis.get(server))
        assert (info.active_worker_count, info.concurrency) == (1, 1)
        held.let_go("a")
        await eventually(lambda: held.began == ["a", "b"])
        held.all.set()
        await eventually(lambda: _is(queue, QueueState()))


async def test_what_waits_and_lost_its_lease_is_not_run_here(
    store_url: str, client: Client, queue: Queue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Heartbeat, "__init__", partialmethod(Heartbeat.__init__, interval_s=0.1))
    held = Held()
    server = Server(store_url, concurrency=1, prefetch=2)
    await client.enqueue_many(Task("t", task_id=i) for i in "abc")
    async with server.running(held.mux):
        await eventually(lambda: held.began)
        # As another worker has it, whose lease will not end while we look.
        await redis.zadd(queue.keys.lease, {"b": 4_000_000_000}, xx=True)
        assert server._parts is not None
        (waiting,) = server._parts.in_flight.find("b")
        await eventually(lambda: waiting.cancel_reason == "lease lost")
        held.all.set()
        await eventually(lambda: held.began == ["a", "c"])
        await eventually(lambda: _is(queue, QueueState(active=1, lease=1, hashes=1)))
    assert held.began == ["a", "c"]
    assert (await queue.leases()) == {"b": 4_000_000_000}
    assert (await queue.message("b")).retried == 0
    assert await queue.handled() == (2, 0)


async def test_what_waits_behind_a_blocked_event_loop_is_left_to_other_workers(
    store_url: str, client: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As is what runs there, once it is far past its deadline."""
    beats, tick = threading.Semaphore(0), Heartbeat.tick

    async def counted(heartbeat: Heartbeat) -> int:
        extended = await tick(heartbeat)
        beats.release()
        return extended

    monkeypatch.setattr(Heartbeat, "__init__", partialmethod(Heartbeat.__init__, interval_s=0.05))
    monkeypatch.setattr(Heartbeat, "tick", counted)
    held = Held()
    await client.enqueue_many(Task("t", task_id=i) for i in "ab")
    server = Server(store_url, concurrency=1, prefetch=1)
    looking: Any
    async with server.running(held.mux):
        await eventually(lambda: _has_taken(queue, 2))
        await eventually(lambda: held.began)
        assert server._parts is not None
        (running,) = server._parts.in_flight.find("a")
        with BlockingRedis.from_url(store_url) as looking:  # from here on the loop is blocked
            running.ends_at -= 10_000
            for _ in range(2):  # the beat that is under way has seen the deadline as it was
                assert beats.acquire(timeout=10)
            lease = queue.keys.lease
            aged = {i: score - 5 for i, score in looking.zrange(lease, 0, -1, withscores=True)}
            looking.zadd(lease, aged)
            while beats.acquire(blocking=False):
                pass
            for _ in range(3):
                assert beats.acquire(timeout=10)
            assert dict(looking.zrange(lease, 0, -1, withscores=True)) == aged
        held.all.set()
        await eventually(lambda: _is(queue, QueueState()))
    assert held.began == ["a", "b"]


@pytest.mark.parametrize("how", ["stop", "shutdown"])
async def test_what_waits_is_put_back_at_once_in_its_order(
    how: str, store_url: str, client: Client, queue: Queue
) -> None:
    held = Held()
    ids = [f"t{i}" for i in range(40)]
    await client.enqueue_many(Task("t", task_id=i) for i in ids)
    server = Server(store_url, concurrency=2, prefetch=30)
    async with server.running(held.mux):
        await eventually(lambda: _has_taken(queue, 32))
        assert await queue.pending() == ids[32:]
        closing = asyncio.create_task(server.shutdown()) if how == "shutdown" else None
        server.stop()
        await eventually(lambda: _has_taken(queue, 2))  # the two that run, which go on
        assert await queue.pending() == ids[2:]
        for task_id in ids[2:]:
            message = await queue.message(task_id)
            assert (message.retried, message.error_msg) == (0, "")
            assert await queue.in_state(task_id) == "pending"
        held.let_go("t0")
        await eventually(lambda: _has_taken(queue, 1))
        held.all.set()
        if closing is not None:
            await closing
    assert held.began == ids[:2]
    assert await queue.pending() == ids[2:]
    assert await queue.handled() == (2, 0)


async def test_what_runs_and_what_waits_are_put_back_in_their_order(
    store_url: str, client: Client, queue: Queue
) -> None:
    held = Held()
    ids = [f"t{i}" for i in range(40)]
    await client.enqueue_many(Task("t", task_id=i) for i in ids)
    server = Server(store_url, concurrency=5, prefetch=30, shutdown_timeout=0)
    async with server.running(held.mux):
        await eventually(lambda: _has_taken(queue, 35))
        for i in (0, 1):
            held.let_go(ids[i])
        await eventually(lambda: len(held.began) == 7)
    assert await queue.pending() == ids[2:]
    assert await queue.handled() == (2, 0)
    assert sorted(held.cancelled) == sorted(ids[2:7])


@pytest.mark.parametrize(("retry", "kept_in"), [(True, "retry"), (False, "archived")])
async def test_cancelling_reaches_what_waits(
    retry: bool, kept_in: str, store_url: str, client: Client, queue: Queue
) -> None:
    held = Held()
    async with Server(store_url, concurrency=1, prefetch=2).running(held.mux):
        handles = await client.enqueue_many(Task("t", task_id=i) for i in "abc")
        await eventually(lambda: _has_taken(queue, 3))
        await handles[1].cancel(retry=retry)
        # What runs may take hours: it is not waited for.
        await eventually(lambda: _has(queue, kept_in, "b"), within_s=4)
        assert (await queue.message("b")).error_msg == "context canceled"
        held.all.set()
        await eventually(lambda: held.began == ["a", "c"])


async def test_strictly_no_more_lower_tasks_go_first_than_are_taken_ahead(
    store_url: str, client: Client, queue: Queue
) -> None:
    held = Held()
    await client.enqueue_many(Task("t", queue="low", task_id=f"l{i}") for i in range(20))
    server = Server(
        store_url,
        queues={"high": 2, "low": 1},
        strict_priority=True,
        concurrency=1,
        prefetch=3,
    )
    async with server.running(held.mux):
        low = Queue(queue.redis, "low")
        await eventually(lambda: _has_taken(low, 4))
        await client.enqueue(Task("t", queue="high", task_id="h"))
        for i in range(4):
            held.let_go(f"l{i}")
        await eventually(lambda: "h" in held.began)
        held.all.set()
        await eventually(lambda: len(held.began) == 21)
    assert held.began[:5] == ["l0", "l1", "l2", "l3", "h"]


async def test_the_timeout_of_what_waits_begins_with_its_run(
    store_url: str, client: Client, queue: Queue
) -> None:
    held = Held()
    async with Server(store_url, concurrency=1, prefetch=1).running(held.mux):
        await client.enqueue(Task("t", task_id="a"))
        await client.enqueue(Task("t", task_id="b", timeout=1))
        await eventually(lambda: _has_taken(queue, 2))
        await asyncio.sleep(1.5)  # longer than it may run
        held.let_go("a")
        await eventually(lambda: held.began == ["a", "b"])
        held.let_go("b")
        await eventually(lambda: _is(queue, QueueState()))
    assert not held.cancelled
    assert await queue.handled() == (2, 0)


async def test_draining_waits_for_what_was_taken_ahead(
    store_url: str, client: Client, queue: Queue
) -> None:
    await client.enqueue_many(Task("t") for _ in range(500))
    server = Server(store_url, concurrency=3, prefetch=50)
    async with server.running(mux_of(no_op)), asyncio.timeout(10):
        await server.drain()
        assert await queue.state() == QueueState()


def _new_threads(before: set[str]) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name not in before]


async def _is(queue: Queue, state: QueueState) -> bool:
    return await queue.state() == state


async def _has_taken(queue: Queue, count: int) -> bool:
    state = await queue.state()
    return (state.active, state.lease) == (count, count)


async def _has(queue: Queue, zset: str, task_id: str) -> bool:
    return task_id in await queue.ids(zset)


async def _archived(queue: Queue, count: int) -> bool:
    return (await queue.state()).archived == count
