"""Several servers on the same queues: who hears of a push, who takes it, and who waits on what."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import Client, Mux, Server, Task
from asyncq.server.loops.watcher import REARM_S
from tests.chaos.live import calls_during, eventually

PROMPT_S = REARM_S / 2  # what took no longer was told, and not found by reading everything again


class Ran:
    """When each task was sent and where it ran; the handler waits for `gate`."""

    def __init__(self) -> None:
        self.sent_at: dict[int, float] = {}
        self.took_s: dict[int, float] = {}
        self.on: list[tuple[int, int]] = []  # (task, server)
        self.gate = asyncio.Event()
        self.gate.set()

    def mux(self, server: int) -> Mux:
        """The handlers of one server."""
        mux = Mux()

        @mux.task("t")
        async def handler(payload: int) -> None:
            self.on.append((payload, server))
            self.took_s[payload] = time.monotonic() - self.sent_at[payload]
            await self.gate.wait()

        return mux

    async def push(self, client: Client, number: int) -> None:
        """Enqueue the task `number`."""
        self.sent_at[number] = time.monotonic()
        await client.enqueue(Task("t", number))

    async def all_ran(self, count: int) -> None:
        """Wait until so many tasks have run, each once, and none late."""
        await eventually(lambda: len(self.on) >= count)
        assert Counter(number for number, _ in self.on) == dict.fromkeys(range(count), 1)
        assert max(self.took_s.values()) < PROMPT_S

    def servers(self, tasks: range) -> set[int]:
        """Which servers ran these tasks."""
        return {server for number, server in self.on if number in tasks}


@pytest.fixture(params=[1, 2], ids=["waiting-in-redis", "being-told"])
def queues(request: pytest.FixtureRequest) -> dict[str, int]:
    """One queue, for whose next task an idle server waits in Redis, or two, of which it is told."""
    return dict.fromkeys(["default", "other"][: request.param], 1)


@asynccontextmanager
async def fleet(url: str, ran: Ran, size: int, **options: Any) -> AsyncIterator[list[Server]]:
    """Start servers that know of each other, as they do after their first seconds."""
    servers = [Server(f"{url}&client_name=worker-{i}", **options) for i in range(size)]
    async with AsyncExitStack() as stack:
        for i, server in enumerate(servers):
            await stack.enter_async_context(server.running(ran.mux(i)))
        yield servers


async def test_a_worker_of_many_queues_has_one_connection_that_waits(
    store_url: str, client: Client, redis: Redis
) -> None:
    ran = Ran()
    queues = {f"q{i}": 1 for i in range(10)}
    async with fleet(store_url, ran, 5, queues=queues):
        for i in range(20):
            ran.sent_at[i] = time.monotonic()
            await client.enqueue(Task("t", i, queue=f"q{i % 10}"))
        await ran.all_ran(20)
        waiting = [one["name"] for one in await redis.client_list() if "t" in one["flags"]]
        assert sorted(waiting) == [f"worker-{i}" for i in range(5)]


async def test_each_pushed_task_runs_once_and_promptly(
    store_url: str, client: Client, queues: dict[str, int]
) -> None:
    ran = Ran()
    async with fleet(store_url, ran, 8, queues=queues):
        for i in range(200):
            await ran.push(client, i)
            await asyncio.sleep(0.003)
        await ran.all_ran(200)


async def test_a_push_does_not_make_all_servers_ask(
    store_url: str, client: Client, redis: Redis, queues: dict[str, int]
) -> None:
    ran = Ran()
    async with fleet(store_url, ran, 12, queues=queues):

        async def push(numbers: range) -> None:
            for i in numbers:
                await ran.push(client, i)
                await asyncio.sleep(0.01)
            await ran.all_ran(numbers.stop)

        await push(range(20))  # by now all but few know that others are faster
        scripts = (await calls_during(redis, push(range(20, 120))))["evalsha"]
    # Three a push do the work: enqueue, take, acknowledge. Were all to ask, there were 14.
    assert scripts / 100 < 6


async def test_those_that_held_back_take_over_from_one_that_is_full(
    store_url: str, client: Client, queues: dict[str, int]
) -> None:
    ran = Ran()
    async with fleet(store_url, ran, 3, queues=queues, concurrency=2):
        for i in range(30):
            await ran.push(client, i)
            await asyncio.sleep(0.01)
        await ran.all_ran(30)
        ran.gate.clear()  # from now on a task keeps its place
        for i in range(30, 36):
            await ran.push(client, i)
            await asyncio.sleep(0.01)
        await ran.all_ran(36)
        assert Counter(server for number, server in ran.on if number >= 30) == {0: 2, 1: 2, 2: 2}
        ran.gate.set()


async def test_those_that_held_back_take_over_from_one_that_stops(
    store_url: str, client: Client, queues: dict[str, int]
) -> None:
    ran = Ran()
    async with fleet(store_url, ran, 4, queues=queues) as servers:
        sent = 0
        for remaining in (3, 2, 1):
            for _ in range(30):
                await ran.push(client, sent)
                sent += 1
                await asyncio.sleep(0.005)
            await ran.all_ran(sent)
            busiest = ran.on[-1][1]
            servers[busiest].stop()
            before = sent
            for _ in range(10):
                await ran.push(client, sent)
                sent += 1
            await ran.all_ran(sent)
            assert busiest not in ran.servers(range(before, sent)), f"{remaining} are left"


async def test_no_push_is_missed_however_it_meets_the_waiting(
    store_url: str, client: Client, queues: dict[str, int]
) -> None:
    """Pushes fall into every moment of taking, looking and listening again."""
    ran = Ran()
    async with fleet(store_url, ran, 4, queues=queues, concurrency=3):
        for i in range(500):
            await ran.push(client, i)
            if random.random() < 0.7:
                await asyncio.sleep(random.choice([0, 0, 0.0005, 0.001, 0.002, 0.004]))
            if i % 50 == 49:
                await ran.all_ran(i + 1)  # nobody pushes any more: what was missed would lie here
        await ran.all_ran(500)
