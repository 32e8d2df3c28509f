"""Fixtures that give tests a real store; the servers come from `tests/stores.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from redis.asyncio import Redis

from asyncq import Client
from tests.chaos.live import Queue
from tests.stores import KINDS, Database, Stores, StoreServer


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    """The servers of this test process (each xdist worker has its own)."""
    stores = Stores(tmp_path_factory.mktemp("stores"))
    yield stores
    stores.close()


@pytest.fixture
def store(stores: Stores) -> Database:
    """An empty database on Valkey, with its URL and its TCP address."""
    return stores.fresh()


@pytest.fixture
def store_url(store: Database) -> str:
    """The URL of an empty database on Valkey; of the same one as `store`."""
    return store.url


@pytest.fixture(params=KINDS)
def each_store(request: pytest.FixtureRequest, stores: Stores) -> Database:
    """An empty database on each kind of server in turn."""
    return stores.fresh(request.param)


@pytest.fixture
def each_store_url(each_store: Database) -> str:
    """The URL of an empty database on each kind of server; of the same one as `each_store`."""
    return each_store.url


@pytest.fixture
def redis_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., StoreServer]]:
    """Make servers that the test may stop, kill and pause.

    `redis_server(kind="valkey", *options, appendonly=False)` returns one that runs; options are
    those of the server's command line, such as `"--maxmemory", "4mb"`.
    """
    servers: list[StoreServer] = []

    def make(kind: str = "valkey", *options: str, appendonly: bool = False) -> StoreServer:
        directory = tmp_path_factory.mktemp("server")
        server = StoreServer(kind, directory, *options, appendonly=appendonly)
        server.start()
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.kill()


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
