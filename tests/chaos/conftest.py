"""Fixtures over an empty store: a Redis client to look with, and a client to enqueue with."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from asyncq import Client
from tests.chaos.live import Queue


@pytest.fixture
async def redis(store_url: str) -> AsyncIterator[Redis]:
    """Redis itself, to look and to spoil."""
    async with Redis.from_url(store_url) as redis:
        yield redis


@pytest.fixture
async def client(store_url: str) -> AsyncIterator[Client]:
    """A client of the store."""
    async with Client(store_url) as client:
        yield client


@pytest.fixture
def queue(redis: Redis) -> Queue:
    """The queue "default" as it stands in Redis."""
    return Queue(redis)
