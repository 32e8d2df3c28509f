"""Redis holds a request until there is a task: who gets it, and what becomes of a failed one."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from asyncq import BrokerError, BrokerUnavailableError, Client, Task
from asyncq.broker import broker as broker_module
from asyncq.broker.broker import BATCH, Answered, Broker, Request
from asyncq.broker.connection import EndWait
from asyncq.broker.scripts import SCRIPTS
from asyncq.server.in_flight import InFlight
from asyncq.server.loops.recoverer import Recoverer
from tests.broker.conftest import BrokerWithout
from tests.chaos.live import Queue, QueueState, eventually
from tests.chaos.proxy import proxied
from tests.stores import Database

sequences = itertools.count(1)


class Waiting:
    """A request that Redis holds, of the server `name`."""

    def __init__(self, broker: Broker, name: str = "s1") -> None:
        self.broker = broker
        self.name = name
        self.request = Request("default", next(sequences), 1)
        self.answer: asyncio.Future[tuple[Answered | BrokerError, bool]]
        self.end: EndWait

    async def begin(self) -> Waiting:
        """Wait until Redis holds it."""
        await self.broker.pool.call(["SCRIPT", "LOAD", SCRIPTS["receive"].text])
        self.answer = asyncio.get_running_loop().create_future()
        before = await self._blocked()
        end = self.broker.receive(self.name, self.request, self._answered)
        assert end is not None
        self.end = end
        await eventually(lambda: self._is_held(before))
        return self

    async def _is_held(self, before: int) -> bool:
        return self.answer.done() or await self._blocked() > before

    async def _blocked(self) -> int:
        (info,) = await self.broker.pool.ask(["INFO", "clients"])
        return int(info.split(b"blocked_clients:")[1].split()[0])

    def _answered(self, answer: Answered | BrokerError, in_vain: bool) -> None:
        self.answer.set_result((answer, in_vain))

    async def got(self) -> list[str]:
        """The ids that came, and that this was not in vain."""
        answer, in_vain = await self.answer
        assert isinstance(answer, Answered), answer
        assert in_vain is False
        return answer.ids

    async def again(self) -> Answered:
        """What comes when the answer was lost and the request is sent again."""
        (answer,) = await self.broker.pump(self.name, [self.request])
        assert isinstance(answer, Answered), answer
        return answer


async def moved_for_nobody(queue: Queue) -> None:
    """Do what is left of a request whose client dies between its two commands."""
    await queue.redis.lmove(queue.keys.pending, queue.keys.active, "RIGHT", "LEFT")


def is_whole(lease: float, answer: Answered) -> bool:
    """Whether a lease is new, and its mark that of the answer."""
    return 30 <= lease - answer.now <= 32 and (lease % 1) * 2**20 == answer.mark


async def test_a_task_comes_when_it_is_put_on_the_queue(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = await Waiting(broker).begin()
    await client.enqueue(Task("t", task_id="a"))
    assert await waiting.got() == ["a"]
    answer, _ = waiting.answer.result()
    assert isinstance(answer, Answered)
    assert answer.messages == [await queue.redis.hget(queue.keys.task("a"), "msg")]
    assert await queue.state() == QueueState(active=1, lease=1, hashes=1)
    assert is_whole((await queue.leases())["a"], answer)
    assert await queue.in_state("a") == "active"
    assert not await queue.redis.hexists(queue.keys.task("a"), "pending_since")


async def test_one_task_is_taken_and_more_may_be_pending(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = await Waiting(broker).begin()
    await client.enqueue_many(Task("t", task_id=i) for i in "abc")
    assert await waiting.got() == ["a"]
    answer, _ = waiting.answer.result()
    assert isinstance(answer, Answered)
    assert answer.more
    assert await queue.pending() == ["b", "c"]


async def test_each_of_those_who_wait_gets_a_task_of_its_own(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = [await Waiting(broker, f"s{i}").begin() for i in range(5)]
    await client.enqueue_many(Task("t", task_id=i) for i in "abcdefg")
    got = [await one.got() for one in waiting]
    assert sorted(itertools.chain(*got)) == [*"abcde"]
    assert [len(ids) for ids in got] == [1] * 5
    assert await queue.pending() == ["f", "g"]
    assert (await queue.leases()).keys() == {*"abcde"}


async def test_so_it_is_for_many_servers_that_are_served_in_one_moment(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = [await Waiting(broker, f"s{i}").begin() for i in range(120)]
    await client.enqueue_many(Task("t") for _ in range(120))
    got = [await one.got() for one in waiting]
    assert [len(ids) for ids in got] == [1] * 120
    assert len(await queue.leases()) == 120


async def test_one_task_goes_to_who_has_waited_longest(
    broker: Broker, client: Client, queue: Queue
) -> None:
    first, second = await Waiting(broker, "s1").begin(), await Waiting(broker, "s2").begin()
    await client.enqueue(Task("t", task_id="a"))
    assert await first.got() == ["a"]
    assert not second.answer.done()
    await client.enqueue(Task("t", task_id="b"))
    assert await second.got() == ["b"]


async def test_a_wait_without_a_task_ends_and_was_not_in_vain(
    broker: Broker, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "WAIT_S", 0.01)
    waiting = await Waiting(broker).begin()
    assert await waiting.got() == []
    assert await queue.state() == QueueState()


async def test_a_paused_queue_keeps_its_task_in_its_place(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = await Waiting(broker).begin()
    await queue.redis.set(queue.keys.paused, "1")
    await client.enqueue_many(Task("t", task_id=i) for i in "ab")
    answer, in_vain = await waiting.answer
    assert isinstance(answer, Answered)
    assert (answer.ids, answer.more, in_vain) == ([], False, True)
    assert await queue.pending() == ["a", "b"]
    assert await queue.state() == QueueState(pending=2, hashes=2)


async def test_a_paused_queue_whose_pending_was_spoiled_loses_no_task(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await client.enqueue(Task("t", task_id="a"))
    await moved_for_nobody(queue)
    await queue.redis.set(queue.keys.paused, "1")
    await queue.redis.set(queue.keys.pending, "of another program")
    waiting = await Waiting(broker).begin()
    answer, _ = await waiting.answer
    assert isinstance(answer, BrokerError)
    assert await queue.redis.lrange(queue.keys.active, 0, -1) == [b"a"]


@pytest.mark.parametrize("ghost", ["nothing", "a hash without a message", "a string"])
async def test_an_id_without_its_task_is_dropped_and_named(
    ghost: str, broker: Broker, queue: Queue
) -> None:
    key = queue.keys.task("ghost")
    if ghost == "a hash without a message":
        await queue.redis.hset(key, "state", "pending")
    elif ghost == "a string":
        await queue.redis.set(key, "of another program")
    waiting = await Waiting(broker).begin()
    await queue.redis.lpush(queue.keys.pending, "ghost")
    answer, in_vain = await waiting.answer
    assert isinstance(answer, Answered)
    assert (answer.ids, answer.ghosts, in_vain) == ([], ["ghost"], True)
    assert await queue.redis.exists(queue.keys.active, queue.keys.lease) == 0
    assert await queue.redis.exists(key) == (ghost == "a string")


async def test_what_has_lost_its_lease_is_left_to_the_recoverer(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await client.enqueue(Task("t", task_id="orphan"))
    await moved_for_nobody(queue)
    await queue.redis.hset(queue.keys.task("orphan"), "state", "active")
    waiting = await Waiting(broker).begin()
    await client.enqueue(Task("t", task_id="a"))
    assert await waiting.got() == ["a"]
    assert (await queue.leases()).keys() == {"a"}


async def test_what_has_a_lease_is_not_taken_whatever_its_hash_says(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await client.enqueue(Task("t", task_id="leased"))
    await moved_for_nobody(queue)
    await queue.redis.zadd(queue.keys.lease, {"leased": 4_000_000_000})
    waiting = await Waiting(broker).begin()
    await client.enqueue(Task("t", task_id="a"))
    assert await waiting.got() == ["a"]
    assert (await queue.leases())["leased"] == 4_000_000_000


async def test_a_key_that_is_no_list_is_waited_for_in_vain(broker: Broker, queue: Queue) -> None:
    await queue.redis.set(queue.keys.pending, "of another program")
    waiting = await Waiting(broker).begin()
    answer, in_vain = await waiting.answer
    assert isinstance(answer, Answered)
    assert (answer.ids, in_vain) == ([], True)


async def test_a_key_of_our_own_that_was_spoiled_is_an_error_and_loses_nothing(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await queue.redis.set(queue.keys.mark, "of another program")
    waiting = await Waiting(broker).begin()
    await client.enqueue(Task("t", task_id="a"))
    answer, in_vain = await waiting.answer
    assert isinstance(answer, BrokerError)
    assert not isinstance(answer, BrokerUnavailableError)
    assert in_vain
    await queue.redis.delete(queue.keys.mark)
    await Recoverer(broker, in_flight()).tick()
    assert await queue.pending() == ["a"]


async def test_a_request_whose_answer_was_lost_gets_the_same_task_again(
    each_store: Database, client: Client, queue: Queue
) -> None:
    async with proxied(each_store) as proxy:
        broker = Broker(proxy.url)
        await broker.open()
        proxy.lose_reply("receive")
        waiting = await Waiting(broker).begin()
        await client.enqueue_many(Task("t", task_id=i) for i in "ab")
        answer, _ = await waiting.answer
        assert isinstance(answer, BrokerUnavailableError)
        assert (await waiting.again()).ids == ["a"]
        assert await queue.pending() == ["b"]
        await broker.close()


async def test_a_script_that_redis_lost_meanwhile_still_gets_the_task(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = await Waiting(broker).begin()
    await queue.redis.script_flush()
    await client.enqueue_many(Task("t", task_id=i) for i in "ab")
    answer, _ = await waiting.answer
    assert isinstance(answer, BrokerUnavailableError)
    assert (await waiting.again()).ids == ["a"]
    assert (await queue.leases()).keys() == {"a"}


async def test_an_answer_that_is_lost_after_the_script_was_is_asked_for_again(
    each_store: Database, client: Client, queue: Queue
) -> None:
    async with proxied(each_store) as proxy:
        broker = Broker(proxy.url)
        await broker.open()
        waiting = await Waiting(broker).begin()
        await queue.redis.script_flush()
        await client.enqueue_many(Task("t", task_id=i) for i in "ab")
        await waiting.answer
        proxy.lose_reply("receive", by_text=True)
        with pytest.raises(BrokerUnavailableError):
            await waiting.again()
        assert proxy.lost == 1
        assert (await waiting.again()).ids == ["a"]
        assert await queue.pending() == ["b"]
        await broker.close()


async def test_an_answer_that_lay_there_for_long_is_not_believed(
    broker: Broker, client: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "TOO_LATE_S", 0)
    waiting = await Waiting(broker).begin()
    await client.enqueue_many(Task("t", task_id=i) for i in "ab")
    answer, _ = await waiting.answer
    assert isinstance(answer, BrokerUnavailableError)
    await queue.redis.zadd(queue.keys.lease, {"a": 4_000_000_000})  # another worker has it now
    assert (await waiting.again()).ids == []
    assert await queue.pending() == ["b"]


async def test_what_is_given_again_has_its_whole_lease(
    broker: Broker, client: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "TOO_LATE_S", 0)
    waiting = await Waiting(broker).begin()
    await client.enqueue(Task("t", task_id="a"))
    await waiting.answer
    lease = (await queue.leases())["a"]
    await queue.redis.zadd(queue.keys.lease, {"a": lease - 30})
    again = await waiting.again()
    assert again.ids == ["a"]
    assert is_whole((await queue.leases())["a"], again)


async def test_ghosts_do_not_keep_a_task_from_who_waits_for_it(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = await Waiting(broker).begin()
    await queue.redis.script_flush()  # so that the script runs later than the move
    await client.enqueue(Task("t", task_id="a"))
    await waiting.answer
    await queue.redis.lpush(queue.keys.active, "ghost")
    answer = await waiting.again()
    assert (answer.ids, answer.ghosts) == (["a"], ["ghost"])
    assert (await queue.leases()).keys() == {"a"}


async def test_nor_if_it_stands_behind_many_that_run(
    broker: Broker, client: Client, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "WAIT_S", 0.01)
    await client.enqueue(Task("t", task_id="a"))
    await moved_for_nobody(queue)
    running = [f"running{i}" for i in range(100)]
    await queue.redis.lpush(queue.keys.active, "ghost", *running)
    await queue.redis.zadd(queue.keys.lease, dict.fromkeys(running, 4_000_000_000))
    waiting = await Waiting(broker).begin()
    assert await waiting.got() == ["a"]


async def test_a_wait_that_is_ended_is_answered_and_takes_nothing_more(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = await Waiting(broker).begin()
    await waiting.end()
    assert await waiting.got() == []
    await client.enqueue(Task("t", task_id="a"))
    assert await queue.pending() == ["a"]


async def test_a_task_that_was_moved_for_a_client_that_was_gone_is_not_lost(
    broker: Broker, client: Client, queue: Queue
) -> None:
    """It spends no retry."""
    await client.enqueue(Task("t", task_id="a", max_retry=0))
    await moved_for_nobody(queue)
    assert await Recoverer(broker, in_flight()).tick() == 1
    assert await queue.pending() == ["a"]
    assert (await queue.message("a")).retried == 0
    assert await queue.state() == QueueState(pending=1, hashes=1)


async def test_such_a_task_is_found_before_and_behind_many_that_run(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await client.enqueue_many(Task("t", task_id=i) for i in "ab")
    running = [f"running{i}" for i in range(20 * BATCH)]
    await moved_for_nobody(queue)
    await queue.redis.lpush(queue.keys.active, *running)
    await queue.redis.zadd(queue.keys.lease, dict.fromkeys(running, 4_000_000_000))
    await moved_for_nobody(queue)
    assert await Recoverer(broker, in_flight()).tick() == 2
    assert sorted(await queue.pending()) == ["a", "b"]


@pytest.mark.parametrize("number", [BATCH - 1, BATCH, BATCH + 1, BATCH + 50, 2 * BATCH, 3 * BATCH])
async def test_each_that_is_found_is_found_once(number: int, broker: Broker, queue: Queue) -> None:
    ids = [f"task{i}" for i in range(number)]
    lost = {*ids[100:110], *ids[number // 2 : number // 2 + 10], ids[0], ids[-1]}
    await queue.redis.lpush(queue.keys.active, *ids)
    leased = [i for i in ids if i not in lost]
    await queue.redis.zadd(queue.keys.lease, dict.fromkeys(leased, 4_000_000_000))
    found = [expired.id for expired in await broker.expired("default")]
    assert sorted(found) == sorted(lost)


async def test_the_recoverer_leaves_alone_what_was_taken_or_done_meanwhile(
    broker: Broker, client: Client, queue: Queue
) -> None:
    await client.enqueue(Task("t", task_id="a"))
    await moved_for_nobody(queue)
    (found,) = await broker.expired("default")
    await queue.redis.delete(queue.keys.task("a"), queue.keys.active)  # received, run and done
    assert await broker.recover("default", [(found, "requeue", 0, b"")]) == 0
    assert await queue.state() == QueueState()


async def test_a_recovery_that_redis_does_not_permit_is_told(
    broker_without: BrokerWithout,
    client: Client,
    queue: Queue,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = await broker_without("lpos")
    await client.enqueue(Task("t", task_id="a"))
    await moved_for_nobody(queue)
    (found,) = await broker.expired("default")
    assert await broker.recover("default", [(found, "requeue", 0, b"")]) == 0
    assert "task 'a' of queue 'default' could not be recovered" in caplog.text
    assert await queue.redis.lrange(queue.keys.active, 0, -1) == [b"a"]


async def test_a_full_redis_still_gives_its_task(
    broker: Broker, client: Client, queue: Queue
) -> None:
    waiting = await Waiting(broker).begin()
    await queue.redis.script_flush()  # so that the script runs later than the move
    await client.enqueue(Task("t", task_id="a"))
    await waiting.answer
    try:
        await queue.redis.config_set("maxmemory", "1")
        assert (await waiting.again()).ids == ["a"]
    finally:
        await queue.redis.config_set("maxmemory", "0")
    assert (await queue.leases()).keys() == {"a"}


def in_flight() -> InFlight:
    async def annotate(queue: str, task_id: str, mark: int, name: str, value: bytes) -> bool:
        return True

    return InFlight({"default": 1}, 10, annotate)
