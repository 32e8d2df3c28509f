"""One connection under many calls: answers in step, and what a loss does to which of them."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hiredis
import pytest
import uvloop
from redis.asyncio import ConnectionPool, Redis

from asyncq.broker import pipeline as module
from asyncq.broker.connection import Pool
from asyncq.broker.pipeline import Pipeline
from asyncq.broker.resp import pack
from tests.chaos.live import eventually
from tests.stores import Database, StoreServer

MIB = 2**20


async def connected(url: str, **options: Any) -> Pipeline:
    """A connection that redis-py opened, taken over."""
    connection: Any = ConnectionPool.from_url(url, protocol=2, **options).make_connection()
    await connection.connect()
    return Pipeline(connection)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Pipeline]:
    pipeline = await connected(url, **options)
    try:
        yield pipeline
    finally:
        pipeline.close()
        await asyncio.sleep(0)  # the event loop closes the socket


def send(pipeline: Pipeline, *commands: Sequence[str | bytes | int]) -> asyncio.Future[list[Any]]:
    return pipeline.call(b"".join(pack(command) for command in commands), len(commands))


Answer = Callable[[list[bytes]], bytes | None]


class Script:
    """A server that answers what the test says; it greets a new connection as Redis would."""

    def __init__(self, answer: Answer, folder: str) -> None:
        self.url = f"unix://{folder}/s"
        self.got: list[list[bytes]] = []
        self.writers: list[asyncio.StreamWriter] = []
        self._answer = answer
        self._path = f"{folder}/s"
        self._server: asyncio.Server | None = None
        self._came = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.gather(*(w.wait_closed() for w in self.writers), return_exceptions=True)

    async def has_got(self, number: int) -> None:
        """Wait until so many commands have come."""
        async with asyncio.timeout(10):
            while len(self.got) < number:
                self._came.clear()
                await self._came.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        commands: Any = hiredis.Reader(notEnoughData=None)
        while data := await reader.read(2**16):
            commands.feed(data)
            while (command := commands.gets()) is not None:
                if command[0] == b"CLIENT":
                    writer.write(b"+OK\r\n")
                    continue
                self.got.append(command)
                self._came.set()
                if (answer := self._answer(command)) is not None:
                    writer.write(answer)


@asynccontextmanager
async def scripted(answer: Answer) -> AsyncIterator[Script]:
    folder = tempfile.mkdtemp(prefix="asyncq-")  # the path of a socket must be short
    server = Script(answer, folder)
    await server.start()
    try:
        yield server
    finally:
        await server.close()
        shutil.rmtree(folder)


def nothing(command: list[bytes]) -> bytes | None:
    return None


def echo(command: list[bytes]) -> bytes | None:
    """Answer "echo" commands only."""
    return b"+%b\r\n" % command[1] if command[0] == b"echo" else None


# In step


async def test_many_calls_through_one_connection_get_each_their_own_answers(
    each_store_url: str,
) -> None:
    async with opened(each_store_url) as pipeline:
        calls = [
            send(pipeline, *(["ECHO", f"{i}.{part}" + "x" * (i % 97) ** 2] for part in range(n)))
            for i in range(500)
            for n in [1 + i % 5]
        ]
        for i, answers in enumerate(await asyncio.gather(*calls)):
            expected = [f"{i}.{part}" + "x" * (i % 97) ** 2 for part in range(1 + i % 5)]
            assert answers == [one.encode() for one in expected]
        assert pipeline.ready()


@pytest.mark.parametrize("size", [MIB, 20 * MIB])
async def test_large_answers_among_small_ones(size: int, store_url: str) -> None:
    large = b"\r\n" + bytes(range(256)) * (size // 256)
    async with opened(store_url) as pipeline:
        calls = [
            send(pipeline, ["SET", "large", large], ["GET", "large"]),
            send(pipeline, ["ECHO", "small"]),
            send(pipeline, ["GET", "large"], ["GET", "none"], ["GET", "large"]),
            send(pipeline, ["ECHO", "last"]),
        ]
        assert await asyncio.gather(*calls) == [
            [b"OK", large],
            [b"small"],
            [large, None, large],
            [b"last"],
        ]


async def test_refusals_stand_where_the_answers_would(store_url: str) -> None:
    async with opened(store_url) as pipeline:
        first = send(pipeline, ["SET", "a", "1"], ["LPUSH", "a", "x"], ["GET", "a"])
        nested = send(pipeline, ["EVAL", "return {1, {err='WRONG x'}, 2}", 0], ["NOSUCH"])
        ok, refused, value = await first
        assert (ok, value) == (b"OK", b"1")
        assert isinstance(refused, hiredis.ReplyError)
        (one, inside, two), unknown = await nested
        assert (one, str(inside), two) == (1, "WRONG x", 2)
        assert isinstance(inside, hiredis.ReplyError)
        assert isinstance(unknown, hiredis.ReplyError)
        assert await send(pipeline, ["PING"]) == [b"PONG"]


async def test_cancelled_calls_leave_the_connection_in_step(store_url: str) -> None:
    async with opened(store_url) as pipeline:
        kept: dict[int, asyncio.Future[list[Any]]] = {}
        for i in range(200):
            call = send(pipeline, *(["ECHO", str(i)] for _ in range(1 + i % 3)))
            if i % 3 == 1:
                call.cancel()
            else:
                kept[i] = call
            if i % 5 == 0:
                await asyncio.sleep(0)
            if i % 10 == 2:
                call.cancel()  # answered already, or not
                kept.pop(i, None)
        for i, kept_call in kept.items():
            assert await kept_call == [str(i).encode()] * (1 + i % 3)
        assert await send(pipeline, ["ECHO", "after"]) == [b"after"]


async def test_an_answer_may_come_in_pieces() -> None:
    async with scripted(nothing) as server, opened(server.url) as pipeline:
        calls = [send(pipeline, ["a"]), send(pipeline, ["b"], ["c"])]
        await server.has_got(3)
        for byte in b"$5\r\nfi\r\ns\r\n*2\r\n:1\r\n$-1\r\n+OK\r\n":
            server.writers[0].write(bytes([byte]))
            await server.writers[0].drain()
            await asyncio.sleep(0)
        assert await asyncio.gather(*calls) == [[b"fi\r\ns"], [[1, None], b"OK"]]


# Lost


async def test_a_lost_connection_fails_the_calls_that_are_not_wholly_answered() -> None:
    async with scripted(echo) as server, opened(server.url) as pipeline:
        whole = send(pipeline, ["echo", "a"], ["echo", "b"])
        half = send(pipeline, ["echo", "a"], ["silent"])
        cancelled = send(pipeline, ["silent"])
        none = send(pipeline, ["silent"])
        cancelled.cancel()
        await server.has_got(6)
        assert await whole == [b"a", b"b"]
        assert not half.done()
        server.writers[0].close()
        for call in (half, none):
            with pytest.raises(ConnectionError, match="closed the connection"):
                await call
        assert pipeline.closed
        assert not pipeline.ready()
        with pytest.raises(ConnectionError):
            await send(pipeline, ["echo", "late"])
        assert len(server.got) == 6


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 400 Bad Request\r\n", b"\x00\r\n", b"+x\r\n+y\r\n"])
async def test_what_is_no_answer_fails_all_that_follows(garbage: bytes) -> None:
    """As a wrong port, a program in between, or an answer too many."""
    async with scripted(echo) as server, opened(server.url) as pipeline:
        first = send(pipeline, ["echo", "a"])
        last = send(pipeline, ["silent"])
        await server.has_got(2)
        assert await first == [b"a"]
        server.writers[0].write(garbage)
        if garbage.startswith(b"+x"):
            assert await last == [b"x"]
            await eventually(lambda: pipeline.closed)
        else:
            with pytest.raises(ConnectionError, match="not an answer"):
                await last
        assert not pipeline.ready()
        with pytest.raises(ConnectionError):
            await send(pipeline, ["echo", "late"])


async def test_a_call_without_an_answer_ends_and_takes_those_behind_it_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CALL_TIMEOUT_S", 0.05)
    async with scripted(echo) as server, opened(server.url) as pipeline:
        answered = send(pipeline, ["echo", "a"])
        assert await answered == [b"a"]
        calls = [send(pipeline, ["silent"]), send(pipeline, ["silent"])]
        for call in calls:
            with pytest.raises(TimeoutError):
                await call
        assert not pipeline.ready()
        with pytest.raises(ConnectionError):
            await send(pipeline, ["echo", "late"])


async def test_the_time_of_one_call_is_not_that_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CALL_TIMEOUT_S", 0.05)
    async with scripted(echo) as server, opened(server.url) as pipeline:
        assert await send(pipeline, ["echo", "a"]) == [b"a"]
        monkeypatch.setattr(module, "CALL_TIMEOUT_S", 60)
        patient = send(pipeline, ["silent"])
        await asyncio.sleep(0.2)  # the time of the first has long passed
        assert not patient.done()
        server.writers[0].write(b"+late\r\n")
        assert await patient == [b"late"]


async def test_closing_fails_the_calls_under_way() -> None:
    async with scripted(nothing) as server, opened(server.url) as pipeline:
        assert pipeline.ready()
        call = send(pipeline, ["silent"])
        assert pipeline.ready()  # more may follow it
        pipeline.close()
        pipeline.close()
        with pytest.raises(ConnectionError):
            await call
        assert not pipeline.ready()


async def test_an_idle_connection_that_was_closed_is_seen_before_it_is_used(
    redis_server: Callable[..., StoreServer],
) -> None:
    server = redis_server()
    async with opened(server.url) as pipeline:
        assert await send(pipeline, ["PING"]) == [b"PONG"]
        assert pipeline.ready()
        server.kill()  # without a turn of the event loop
        assert not pipeline.closed
        assert not pipeline.ready()


async def test_nothing_is_left_open(store_url: str) -> None:
    """Warnings are errors here: a transport or stream that nobody closed would tell."""
    async with Redis.from_url(store_url) as redis:
        before = len(await redis.client_list())
        for _ in range(5):
            async with opened(store_url) as pipeline:
                await send(pipeline, ["PING"])

        async def closed() -> bool:
            return len(await redis.client_list()) <= before

        await eventually(closed)


# In a pool


async def test_a_pool_that_is_asked_nothing_answers_nothing(store_url: str) -> None:
    pool = Pool(store_url)
    await pool.open()
    async with asyncio.timeout(5):
        assert await pool.call() == []
    await pool.close()


async def test_a_pool_replaces_what_was_lost_and_keeps_what_was_not() -> None:
    async with scripted(echo) as server:
        pool = Pool(server.url, size=2)
        pool._open = True  # the server here knows no INFO
        both = [asyncio.create_task(pool.call([what, "x"])) for what in ("silent", "echo")]
        assert await both[1] == [b"x"]
        await server.has_got(2)
        server.writers[[command[0] for command in server.got].index(b"silent")].close()
        with pytest.raises(OSError, match="closed the connection") as caught:
            try:
                await both[0]
            except Exception as error:
                raise error.__cause__ or error from None
        assert isinstance(caught.value, ConnectionError)
        assert await asyncio.gather(*(pool.call(["echo", str(i)]) for i in range(20))) == [
            [str(i).encode()] for i in range(20)
        ]
        assert len(server.writers) == 3
        await pool.close()


# Over TLS, and on another event loop


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of its own for localhost, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl on this machine, to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(path), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


class Terminator:
    """Speaks TLS to the client and hands on to a store."""

    def __init__(self, store: Database, certificate: Path) -> None:
        self._store = store
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificate)
        self._server: asyncio.Server | None = None
        self._pipes: set[asyncio.Task[None]] = set()
        self.url = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"rediss://localhost:{port}/{self._store.number}"

    async def cut(self) -> None:
        """Drop every connection."""
        for pipe in list(self._pipes):
            pipe.cancel()
        await asyncio.gather(*self._pipes, return_exceptions=True)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = asyncio.current_task()
        assert pipe is not None
        self._pipes.add(pipe)
        up_reader, up_writer = await asyncio.open_unix_connection(self._store.server.socket)
        both = [
            asyncio.create_task(_copy(reader, up_writer)),
            asyncio.create_task(_copy(up_reader, writer)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # cut
        finally:
            for half in both:
                half.cancel()
            for end in (writer, up_writer):
                end.transport.abort()
            await asyncio.gather(
                *both, writer.wait_closed(), up_writer.wait_closed(), return_exceptions=True
            )
            self._pipes.discard(pipe)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def terminated(store: Database, certificate: Path) -> AsyncIterator[Terminator]:
    terminator = Terminator(store, certificate)
    await terminator.start()
    try:
        yield terminator
    finally:
        await terminator.close()


async def test_calls_over_tls(store: Database, certificate: Path) -> None:
    large = bytes(range(256)) * (MIB // 256)
    async with (
        terminated(store, certificate) as tls,
        opened(tls.url, ssl_ca_certs=str(certificate)) as pipeline,
    ):
        calls = [send(pipeline, ["ECHO", str(i)], ["ECHO", large]) for i in range(10)]
        calls[3].cancel()
        calls[7].cancel()
        for i, call in enumerate(calls):
            if not call.cancelled():
                assert await call == [str(i).encode(), large]
        assert pipeline.ready()
        assert await send(pipeline, ["ECHO", "x"]) == [b"x"]
        waiting = send(pipeline, ["BLPOP", "none", 0])
        await tls.cut()
        with pytest.raises(ConnectionError):
            await waiting
        assert not pipeline.ready()


async def test_a_pool_over_tls(store: Database, certificate: Path) -> None:
    async with terminated(store, certificate) as tls:
        pool = Pool(f"{tls.url}?ssl_ca_certs={certificate}")
        await pool.open()
        await pool.call(["SET", "key", "value"])
        await tls.cut()
        answers = await asyncio.gather(*(pool.call(["ECHO", str(i)]) for i in range(50)))
        assert answers == [[str(i).encode()] for i in range(50)]
        assert await pool.call(["GET", "key"]) == [b"value"]
        await pool.close()


def test_calls_on_uvloop(store: Database, certificate: Path) -> None:
    """All of it again, as far as it is the event loop's."""

    def with_(test: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        async def run() -> None:
            await test(*arguments)

        uvloop.run(run())

    with_(test_many_calls_through_one_connection_get_each_their_own_answers, store.url)
    with_(test_large_answers_among_small_ones, MIB, store.url)
    with_(test_cancelled_calls_leave_the_connection_in_step, store.url)
    with_(test_a_lost_connection_fails_the_calls_that_are_not_wholly_answered)
    with_(test_closing_fails_the_calls_under_way)
    with_(test_nothing_is_left_open, store.url)
    with_(test_calls_over_tls, store, certificate)
    with_(test_a_pool_over_tls, store, certificate)


async def test_one_timer_serves_all_calls() -> None:
    """A call has none of its own, and none is left when the connection is closed."""
    async with scripted(echo) as server, opened(server.url) as pipeline:
        loop = asyncio.get_running_loop()
        before = time.monotonic()
        for i in range(100):
            assert await send(pipeline, ["echo", str(i)]) == [str(i).encode()]
        scheduled: Any = loop
        ours = [t for t in scheduled._scheduled if not t.cancelled() and t.when() > before + 5]
        assert len(ours) <= 1
        pipeline.close()
        assert not [t for t in scheduled._scheduled if not t.cancelled() and t.when() > before + 5]
