"""The servers that the tests run on: fresh, apart from each other, and gone when the tests are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.stores import KINDS, Database, Stores, StoreServer

ROOT = Path(__file__).parents[2]

MakeServer = Callable[..., StoreServer]


def test_each_kind_of_server_is_what_it_says(each_store: Database) -> None:
    with Redis.from_url(each_store.url) as redis:
        server = redis.info("server")
    is_valkey = server.get("server_name") == "valkey"
    assert is_valkey == (each_store.server.kind == "valkey")
    if each_store.server.kind == "redis-6.2":
        assert str(server["redis_version"]).startswith("6.2.")


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_store_is_empty(attempt: int, store_url: str) -> None:
    with Redis.from_url(store_url) as redis:
        assert redis.dbsize() == 0
        redis.set("key", attempt)


def test_two_databases_know_nothing_of_each_other(stores: Stores) -> None:
    first, second = stores.fresh(), stores.fresh()
    with Redis.from_url(first.url) as one, Redis.from_url(second.url) as other:
        one.set("key", "1")
        assert other.get("key") is None


def test_the_tcp_address_leads_to_the_same_database(each_store: Database) -> None:
    host, _, port = each_store.address.partition(":")
    with (
        Redis.from_url(each_store.url) as by_socket,
        Redis(host=host, port=int(port), db=each_store.number) as by_port,
    ):
        by_socket.set("key", "1")
        assert by_port.get("key") == b"1"


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_keeps_its_data_and_addresses_over_a_crash(
    kind: str, redis_server: MakeServer
) -> None:
    server = redis_server(kind, appendonly=True)
    before = (server.url, server.address)
    with Redis.from_url(server.url) as redis:
        redis.set("key", "1")
        server.kill()
        with pytest.raises(RedisConnectionError):
            redis.get("key")
        server.start()
        assert redis.get("key") == b"1"
        server.restart()
        assert redis.get("key") == b"1"
    assert (server.url, server.address) == before


def test_a_paused_server_answers_nothing_until_it_resumes(redis_server: MakeServer) -> None:
    server = redis_server()
    with Redis.from_url(server.url, socket_timeout=0.05, retry=None) as redis:
        redis.ping()
        server.pause()
        with pytest.raises(RedisTimeoutError):
            redis.ping()
        server.resume()
    with Redis.from_url(server.url) as redis:
        assert redis.ping()
    server.pause()
    server.stop()  # a paused one, too


def test_a_server_takes_options(redis_server: MakeServer) -> None:
    server = redis_server("valkey", "--maxmemory", "5mb")
    with Redis.from_url(server.url) as redis:
        assert redis.config_get("maxmemory") == {"maxmemory": str(5 * 1024 * 1024)}


def test_a_server_that_cannot_start_shows_its_log(redis_server: MakeServer) -> None:
    with pytest.raises(pytest.fail.Exception, match="does not start"):
        redis_server("valkey", "--replicaof", "nonsense")


def test_no_server_outlives_tests_that_are_killed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from tests.stores import StoreServer\n"
        "server = StoreServer('valkey', pathlib.Path(sys.argv[1])); server.start()\n"
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "store"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        assert "valkey" in server.name()
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server is still there"
        time.sleep(0.005)
