"""From a URL to connections: what is refused, what is translated, what is never sent twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import BrokerError, BrokerUnavailableError, OptionError
from asyncq.broker import pipeline
from asyncq.broker.connection import SOON_S, EndWait, Pool, Waited
from asyncq.broker.pipeline import Pipeline
from asyncq.broker.refusal import ConnectionLostError
from asyncq.broker.scripts import SCRIPTS
from tests.chaos.proxy import proxied
from tests.stores import Database, StoreServer

PAUSED = SCRIPTS["annotate"]


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "http://x", "redis://host:port", "redis://host/notadb?db=x", "unix://x?db=y"],
)
def test_a_url_that_makes_no_sense_is_refused(url: str) -> None:
    with pytest.raises(OptionError):
        Pool(url)


def test_a_password_is_never_shown() -> None:
    assert "secret" not in Pool("redis://user:secret@host:1/2").where
    with pytest.raises(OptionError) as caught:
        Pool("redis://user:secret@host:notaport")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["unix", "redis-socket"])
async def test_both_names_of_a_unix_socket(scheme: str, each_store: Database) -> None:
    pool = Pool(each_store.url.replace("unix", scheme))
    await pool.open()
    assert await pool.call(["ECHO", "x"]) == [b"x"]
    await pool.close()


async def test_a_database_of_tcp(each_store: Database) -> None:
    pool = Pool(f"redis://{each_store.address}/{each_store.number}")
    await pool.open()
    await pool.call(["SET", "key", "value"])
    await pool.close()
    async with Redis.from_url(each_store.url) as redis:
        assert await redis.get("key") == b"value"


async def test_an_error_stands_among_the_answers(store_url: str) -> None:
    pool = Pool(store_url)
    await pool.open()
    answers = await pool.call(["SET", "a", "1"], ["LPUSH", "a", "x"], ["GET", "a"])
    assert answers[0] == b"OK"
    assert isinstance(answers[1], BrokerError)
    assert answers[2] == b"1"
    await pool.close()


async def test_a_script_that_redis_lost_is_sent_again_alone(store_url: str) -> None:
    pool = Pool(store_url)
    await pool.open()
    script = PAUSED.on({"lease": "l"})(task="t", id="i", mark=1, field="f", value=b"v")
    await pool.call(["SCRIPT", "FLUSH"])
    assert await pool.call(["INCR", "n"], script, ["INCR", "n"], script) == [1, 0, 2, 0]
    await pool.close()


async def test_a_closed_pool_says_so(store_url: str) -> None:
    pool = Pool(store_url)
    with pytest.raises(BrokerError, match="not connected"):
        await pool.call(["PING"])
    await pool.open()
    await pool.close()
    await pool.close()
    with pytest.raises(BrokerError, match="not connected"):
        await pool.call(["PING"])


async def test_more_calls_than_connections_wait_for_their_turn(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server()
    pool = Pool(server.url, size=3)
    await pool.open()
    answers = await asyncio.gather(*(pool.call(["ECHO", str(i)]) for i in range(200)))
    assert answers == [[str(i).encode()] for i in range(200)]
    async with Redis.from_url(server.url) as redis:
        assert len(await redis.client_list()) <= 3 + 1
    await pool.close()


async def test_a_cancelled_call_does_not_give_its_answer_to_the_next(store_url: str) -> None:
    pool = Pool(store_url, size=1)
    await pool.open()
    for i in range(100):
        cancelled = asyncio.create_task(pool.call(["ECHO", "wrong"]))
        for _ in range(i % 7):
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert await pool.call(["ECHO", str(i)]) == [str(i).encode()]
    await pool.close()


async def test_one_who_gives_up_waiting_for_a_near_redis_leaves_the_connection_in_step(
    store_url: str,
) -> None:
    pool = Pool(store_url)
    await pool.open()
    for i in range(100):
        for _ in range(2):  # the first shows that Redis is near
            await pool.call(["PING"], soon=True)
        cancelled = asyncio.create_task(pool.call(["ECHO", "wrong"], soon=True))
        for _ in range(i % 7):
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert await pool.call(["ECHO", str(i)], soon=True) == [str(i).encode()]
    await pool.close()


async def test_waiting_for_a_near_redis_lets_others_run(store_url: str) -> None:
    pool = Pool(store_url)
    await pool.open()
    steps = 0

    async def other() -> None:
        nonlocal steps
        while True:
            steps += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    for _ in range(50):
        before = steps
        await pool.call(["PING"], soon=True)
        assert steps > before
    task.cancel()
    await pool.close()


async def test_a_redis_that_answers_within_a_slow_write_is_not_near(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(store_url)
    await pool.open()
    call = Pipeline.call

    def slow(pipeline: Pipeline, packed: bytes, commands: int) -> asyncio.Future[list[Any]]:
        time.sleep(2 * SOON_S)
        return call(pipeline, packed, commands)

    monkeypatch.setattr(Pipeline, "call", slow)
    await pool.call(["PING"], soon=True)
    assert pool._took_s > 2 * SOON_S
    await pool.close()


SENT = PAUSED.on({"lease": "l"})(task="t", id="i", mark=1, field="f", value=b"v")


BLOCKED: list[str | bytes | int] = ["BLPOP", "list", 5]


async def waiting_pool(url: str) -> tuple[Pool, asyncio.Queue[Waited], EndWait]:
    """A pool that waits for an element of "list", with a script behind."""
    pool = Pool(url)
    await pool.open()
    answers: asyncio.Queue[Waited] = asyncio.Queue()
    end = pool.wait(BLOCKED, SENT, on_answers=answers.put_nowait)
    assert end is not None
    return pool, answers, end


async def test_a_wait_is_answered_beside_other_calls(store_url: str) -> None:
    pool = Pool(store_url)
    await pool.open()
    await pool.call(SENT)  # Redis knows the script from here on
    await pool.close()
    pool, answers, _ = await waiting_pool(store_url)
    assert await pool.call(["ECHO", "x"]) == [b"x"]
    assert answers.empty()
    await pool.call(["RPUSH", "list", "y"])
    assert await answers.get() == [[b"list", b"y"], 0]
    assert await pool.call(["ECHO", "x"]) == [b"x"]
    await pool.close()


async def test_a_wait_tells_that_redis_lost_the_script(store_url: str) -> None:
    pool, answers, _ = await waiting_pool(store_url)
    await pool.call(["SCRIPT", "FLUSH"], ["RPUSH", "list", "y"])
    told = await answers.get()
    assert isinstance(told, list)
    assert told[0] == [b"list", b"y"]
    assert isinstance(told[1], BrokerUnavailableError)
    assert await pool.call(SENT) == [0]
    await pool.close()


async def test_a_wait_that_is_ended_is_answered(store_url: str) -> None:
    pool, answers, end = await waiting_pool(store_url)
    await pool.call(SENT)
    await end()
    assert await answers.get() == [None, 0]
    await end()  # once more does no harm
    await pool.call(["RPUSH", "list", "y"])
    assert await pool.call(["LLEN", "list"]) == [1]
    await pool.close()


async def test_a_wait_that_may_not_be_ended_is_given_up(store_url: str) -> None:
    async with Redis.from_url(store_url) as redis:
        rights = ["-client", "+client|info", "+client|kill"]
        await redis.execute_command("ACL", "SETUSER", "default", *rights)
        try:
            pool, answers, end = await waiting_pool(store_url)
            await end()
            assert isinstance(await answers.get(), ConnectionLostError)
            await pool.call(["RPUSH", "list", "y"])
            assert await pool.call(["LLEN", "list"]) == [1]
            await pool.close()
        finally:
            await redis.execute_command("ACL", "SETUSER", "default", "+client")


async def test_the_end_of_a_wait_that_is_over_leaves_its_connection_to_others(
    store_url: str,
) -> None:
    pool, answers, end = await waiting_pool(store_url)
    await pool.call(["RPUSH", "list", "y"])
    await answers.get()
    calls = [asyncio.create_task(pool.call(["ECHO", "x"])) for _ in range(2)]
    await asyncio.sleep(0)
    await end()
    assert await asyncio.gather(*calls) == [[b"x"], [b"x"]]
    await pool.close()


async def test_there_is_no_wait_without_a_connection_that_is_free(store_url: str) -> None:
    pool = Pool(store_url)
    answers: asyncio.Queue[Waited] = asyncio.Queue()
    assert pool.wait(BLOCKED, on_answers=answers.put_nowait) is None
    await pool.open()
    assert pool.wait(BLOCKED, on_answers=answers.put_nowait)
    assert pool.wait(BLOCKED, on_answers=answers.put_nowait) is None
    await pool.close()
    assert pool.wait(BLOCKED, on_answers=answers.put_nowait) is None


async def test_a_wait_ends_with_the_pool(store_url: str) -> None:
    pool, answers, _ = await waiting_pool(store_url)
    await pool.close()
    assert isinstance(await answers.get(), ConnectionLostError)


async def test_a_call_whose_answer_is_lost_is_not_repeated(store: Database) -> None:
    async with proxied(store) as proxy, Redis.from_url(store.url) as redis:
        pool = Pool(proxy.url)
        await pool.open()
        script = PAUSED.on({"lease": "l"})(task="t", id="i", mark=1, field="f", value=b"v")
        await pool.call(script)
        proxy.lose_reply("annotate")
        with pytest.raises(ConnectionLostError) as caught:
            await pool.call(["INCR", "n"], script)
        assert caught.value.sent
        assert await redis.get("n") == b"1"
        assert await pool.call(["INCR", "n"]) == [2]
        await pool.close()


async def test_nobody_at_the_address_is_known_not_to_have_got_it(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server()
    server.stop()
    pool = Pool(server.url)
    with pytest.raises(ConnectionLostError) as caught:
        await pool.open()
    assert not caught.value.sent
    await pool.close()


async def test_a_redis_that_hangs_is_given_up(
    redis_server: Callable[..., StoreServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CALL_TIMEOUT_S", 0.3)
    server = redis_server()
    pool = Pool(server.url)
    await pool.open()
    server.pause()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError):
        await pool.call(["INCR", "n"])
    assert time.monotonic() - began < 2
    server.resume()
    assert await pool.call(["ECHO", "x"]) == [b"x"]  # not the answer of before
    await pool.close()


async def test_wrong_credentials_are_no_outage(redis_server: Callable[..., StoreServer]) -> None:
    server = redis_server("valkey", "--requirepass", "secret")
    for url in (server.url, server.url.replace("unix://", "unix://:wrong@")):
        with pytest.raises(BrokerError) as caught:
            await Pool(url).open()
        assert not isinstance(caught.value, BrokerUnavailableError)
        assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
