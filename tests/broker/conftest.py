"""The broker is tested on each kind of server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeAlias

import pytest
from redis.asyncio import Redis

from asyncq import Client
from asyncq.broker.broker import Broker
from tests.stores import Database

BrokerWithout: TypeAlias = Callable[..., Awaitable[Broker]]


@pytest.fixture
async def redis(each_store: Database) -> AsyncIterator[Redis]:
    """Redis itself, to look and to spoil."""
    async with Redis.from_url(each_store.url) as redis:
        yield redis


@pytest.fixture
async def broker(each_store: Database) -> AsyncIterator[Broker]:
    """A broker that is open."""
    broker = Broker(each_store.url)
    await broker.open()
    yield broker
    await broker.close()


@pytest.fixture
async def client(each_store: Database) -> AsyncIterator[Client]:
    """A client of the store."""
    async with Client(each_store.url) as client:
        yield client


@pytest.fixture
async def broker_without(each_store: Database, redis: Redis) -> AsyncIterator[BrokerWithout]:
    """Open brokers whose user may do everything in Redis, but for the commands given."""
    async with AsyncExitStack() as stack:

        async def opened(*commands: str) -> Broker:
            name = f"u{each_store.number}-{'-'.join(commands)}"
            rights = ("on", ">p", "~*", "+@all", *(f"-{command}" for command in commands))
            await redis.execute_command("ACL", "SETUSER", name, *rights)
            stack.push_async_callback(redis.execute_command, "ACL", "DELUSER", name)
            broker = Broker(each_store.url.replace("unix://", f"unix://{name}:p@"))
            await broker.open()
            stack.push_async_callback(broker.close)
            return broker

        yield opened
