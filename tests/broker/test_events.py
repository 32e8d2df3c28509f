"""What Redis tells unasked: changes of what was read, messages, and the loss of the connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from redis.asyncio import Redis

from asyncq import BrokerError, BrokerUnavailableError, Client, Task
from asyncq.broker import keys
from asyncq.broker.connection import Pool
from asyncq.broker.events import Listener
from tests.chaos.live import Queue, eventually
from tests.stores import Database, StoreServer


class Heard:
    """A listener, and all that it told."""

    def __init__(self, url: str) -> None:
        self.pool = Pool(url)
        self.changes: list[str | None] = []
        self.messages: list[tuple[str, str]] = []
        self.listener = Listener(
            self.pool,
            self.changes.append,
            lambda channel, text: self.messages.append((channel, text)),
            ("one", "two"),
        )
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Heard:
        await self.pool.open()
        self._running = asyncio.create_task(self.listener.run())
        await asyncio.wait_for(self.listener.connected.wait(), 5)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._running is not None
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.pool.close()


@pytest.fixture
async def heard(each_store: Database) -> AsyncIterator[Heard]:
    async with Heard(each_store.url) as heard:
        yield heard


async def test_a_push_is_told_once_after_each_read(
    heard: Heard, redis: Redis, each_store: Database
) -> None:
    pending = Queue(redis).keys.pending
    assert await heard.listener.oldest_pending(["default"]) == [[]]
    heard.changes.clear()
    async with Client(each_store.url) as client:
        await client.enqueue(Task("t"))
        await eventually(lambda: heard.changes == [pending])
        await client.enqueue(Task("t"))
        assert len((await heard.listener.oldest_pending(["default"]))[0]) == 2
        assert heard.changes == [pending]


async def test_a_paused_queue_has_nothing_pending(heard: Heard, redis: Redis) -> None:
    k = Queue(redis).keys
    await redis.lpush(k.pending, "a")
    await redis.set(k.paused, "1")
    assert await heard.listener.oldest_pending(["default", "other"]) == [[], []]
    await redis.delete(k.paused)
    await eventually(lambda: k.paused in heard.changes)
    assert await heard.listener.oldest_pending(["default", "other"]) == [[b"a"], []]


async def test_the_two_oldest_are_told_and_the_oldest_first(heard: Heard, redis: Redis) -> None:
    for name in ("a", "b", "c"):
        await redis.lpush(Queue(redis).keys.pending, name)
    assert await heard.listener.oldest_pending(["default"]) == [[b"a", b"b"]]


async def test_servers_are_counted_while_their_records_last(heard: Heard, redis: Redis) -> None:
    assert await heard.listener.servers(1000.5) == 0
    await redis.zadd(keys.SERVERS, {"dead": 999, "a": 1001, "b": 1010})
    assert await heard.listener.servers(1000.5) == 2
    await redis.set(keys.SERVERS, "spoiled")
    assert await heard.listener.servers(1000.5) is None


async def test_a_spoiled_queue_does_not_hide_the_others(heard: Heard, redis: Redis) -> None:
    await redis.set(Queue(redis, "bad").keys.pending, "x")
    await redis.lpush(Queue(redis, "good").keys.pending, "a")
    assert await heard.listener.oldest_pending(["bad", "good"]) == [[], [b"a"]]
    await redis.set(Queue(redis, "bad").keys.scheduled, "x")
    await redis.zadd(Queue(redis, "good").keys.retry, {"a": 1})
    assert (await heard.listener.next_due_in_s(["bad", "good"]))[1] == 0


async def test_messages_arrive_in_order_whatever_is_read_meanwhile(
    heard: Heard, redis: Redis
) -> None:
    async def read() -> None:
        for _ in range(50):
            await heard.listener.oldest_pending(["default"])

    async def publish() -> None:
        await asyncio.sleep(0)
        for i in range(500):
            await redis.publish("one", str(i))

    await eventually(lambda: _subscribed(redis))
    await asyncio.gather(read(), read(), publish())
    await eventually(lambda: len(heard.messages) == 500)
    assert heard.messages == [("one", str(i)) for i in range(500)]


async def test_connected_means_that_no_message_is_missed(
    each_store: Database, redis: Redis
) -> None:
    for i in range(20):
        async with Heard(each_store.url) as heard:
            await redis.publish("two", str(i))
            await eventually(lambda h=heard: h.messages, within_s=2)  # type: ignore[misc]


async def test_a_flush_means_that_anything_may_have_changed(heard: Heard, redis: Redis) -> None:
    await heard.listener.oldest_pending(["default"])
    heard.changes.clear()
    await redis.flushdb()
    await eventually(lambda: None in heard.changes)


async def test_a_cut_connection_is_told_and_made_again(heard: Heard, redis: Redis) -> None:
    for _ in range(5):
        heard.changes.clear()
        await redis.client_kill_filter(_type="pubsub")
        await eventually(lambda: heard.changes.count(None) == 2)  # gone, and back
        await eventually(lambda: _subscribed(redis))
    await redis.publish("two", "still there")
    await eventually(lambda: heard.messages == [("two", "still there")])
    assert await heard.listener.oldest_pending(["default"]) == [[]]


async def test_a_reader_gets_an_error_when_the_connection_is_cut(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server()
    async with Heard(server.url) as heard:
        server.pause()
        reading = asyncio.create_task(heard.listener.oldest_pending(["default"]))
        await asyncio.sleep(0.05)
        server.kill()
        with pytest.raises(BrokerUnavailableError):
            await asyncio.wait_for(reading, 5)
        await eventually(lambda: not heard.listener.connected.is_set())
        with pytest.raises(BrokerUnavailableError):
            await heard.listener.oldest_pending(["default"])
        server.start()
        await asyncio.wait_for(heard.listener.connected.wait(), 10)
        assert await heard.listener.oldest_pending(["default"]) == [[]]


async def test_a_cancelled_reader_does_not_confuse_the_next(heard: Heard, redis: Redis) -> None:
    for i in range(100):
        cancelled = asyncio.create_task(heard.listener.oldest_pending(["a", "b", "c"]))
        await asyncio.sleep(0)
        cancelled.cancel()
        await redis.lpush(Queue(redis, f"q{i}").keys.pending, "a")
        found = await heard.listener.oldest_pending([f"q{i}", "none"])
        assert found == [[b"a"], []]


async def test_a_refused_subscription_is_told_and_not_waited_for(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server()
    async with Redis.from_url(server.url) as admin:
        rules = ("on", ">secret", "~*", "+@all", "resetchannels")
        await admin.execute_command("ACL", "SETUSER", "deaf", *rules)
    pool = Pool(f"unix://deaf:secret@{server.socket}")
    await pool.open()
    listener = Listener(pool, lambda key: None, channels=("one",))
    with pytest.raises(BrokerError, match="permi"):
        await asyncio.wait_for(listener.run(), 5)
    await pool.close()


async def test_an_error_in_what_hears_is_raised_and_not_hidden(each_store: Database) -> None:
    def broken(key: str | None) -> None:
        if key is not None:
            raise ZeroDivisionError

    pool = Pool(each_store.url)
    await pool.open()
    listener = Listener(pool, broken)
    running = asyncio.create_task(listener.run())
    await asyncio.wait_for(listener.connected.wait(), 5)
    await listener.oldest_pending(["default"])
    async with Client(each_store.url) as client:
        await client.enqueue(Task("t"))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(running, 5)
    await pool.close()


async def _subscribed(redis: Redis) -> bool:
    return (await redis.pubsub_numsub("two"))[0][1] == 1
