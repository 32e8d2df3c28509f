"""From a URL to connections: what goes out in one write, what comes back, and what went wrong."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis
import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from asyncq.broker.embedded import Store, open_store_async
from asyncq.broker.pipeline import CALL_TIMEOUT_S, Pipeline
from asyncq.broker.resp import Arg, pack, text
from asyncq.broker.scripts import Command
from asyncq.errors import BrokerError, BrokerFullError, BrokerUnavailableError, OptionError

OLDEST_REDIS: Final = (6, 2)  # RPOP with a count, ZMSCORE, ZADD GT, RESP3 tracking
CONNECT_TIMEOUT_S: Final = 5.0
POOL_SIZE: Final = 16
UNBLOCK_AGAIN_S: Final = 0.02
SOON_S: Final = 0.0002  # a Redis that answers within this is near

_TRANSIENT = ("LOADING", "BUSY ", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "NOREPLICAS",
              "MISCONF", "UNBLOCKED", "max number of clients")  # fmt: skip

_LOST = (exceptions.ConnectionError, exceptions.TimeoutError)

_URL_OPTIONS = {
    "client_name", "connection_class", "db", "host", "password", "path", "port", "username",
}  # fmt: skip

Answer = Any
"""What Redis answered: bytes, int, None or lists of these; a `BrokerError` where it refused."""

Waited: TypeAlias = "list[Answer] | ConnectionLostError"

EndWait: TypeAlias = Callable[[], Awaitable[None]]


class ConnectionLostError(BrokerUnavailableError):
    """The connection died; `sent` tells whether Redis may have carried the commands out."""

    def __init__(self, cause: BaseException, where: str, *, sent: bool) -> None:
        super().__init__(f"no connection to Redis at {where}: {cause}")
        self.sent = sent


def translate(error: exceptions.RedisError) -> BrokerError:
    """Turn an error of redis-py into ours: full, unavailable (try later), or refused."""
    text = str(error)
    if _is_refused_login(error):
        return _refused_login(text)
    if isinstance(error, exceptions.NoPermissionError):
        return _no_permission(text)
    if isinstance(error, exceptions.ReadOnlyError):
        return _read_only(text)
    if isinstance(error, _LOST):
        return _unavailable(text)
    return refusal(text)


def refusal(text: str) -> BrokerError:
    """Turn what Redis answered instead of a result into an error: full, try later, or refused."""
    code, _, rest = text.partition(" ")
    if code == "NOSCRIPT":
        return _NoScript(text)
    if code in ("NOAUTH", "WRONGPASS"):
        return _refused_login(rest)
    if "OOM command not allowed" in text:  # inside a script it is not the first word
        return BrokerFullError(
            f"Redis is at its memory limit and takes no new tasks ({text}): let workers drain "
            "the queues, or raise maxmemory"
        )
    if code == "NOPERM":
        return _no_permission(rest)
    if "READONLY" in text:
        return _read_only(text)
    return _unavailable(text) if text.startswith(_TRANSIENT) else BrokerError(text)


def _refused_login(text: str) -> BrokerError:
    return BrokerError(f"Redis refused the credentials: {text}")


def _no_permission(text: str) -> BrokerError:
    return _NoPermission(f"Redis does not permit the command: {text}")


def _read_only(text: str) -> BrokerError:
    return _ReadOnly(f"Redis is a replica, which takes no writes: {text}")


def _unavailable(text: str) -> BrokerError:
    return BrokerUnavailableError(f"Redis is not available: {text}")


def _is_refused_login(error: BaseException) -> bool:
    # redis-py wraps it in a ConnectionError while it connects, and one is a ConnectionError.
    cause = error.__cause__ or error.__context__
    return isinstance(error, exceptions.AuthenticationError) or isinstance(
        cause, exceptions.AuthenticationError
    )


async def _known_as(pipeline: Pipeline) -> tuple[str, str] | None:
    (info,) = await pipeline.call(pack(["CLIENT", "INFO"]), 1)
    found = re.match(rb"id=(\d+) addr=(\S+)", info) if isinstance(info, bytes) else None
    return None if found is None else (text(found[1]), text(found[2]))  # None: we may not ask


def _translated(answers: list[Any]) -> list[Answer]:
    for i, answer in enumerate(answers):
        if isinstance(answer, hiredis.ReplyError):
            answers[i] = refusal(str(answer))
    return answers


def _worth_repeating(answer: Answer) -> Answer:
    return _unavailable(str(answer)) if isinstance(answer, _NoScript) else answer


def _packed(command: Sequence[Arg] | bytes | Command) -> bytes:
    if isinstance(command, Command):
        return command.packed
    return command if isinstance(command, bytes) else pack(command)


class Pool:
    """Connections to one Redis, each used by one call at a time; no call is repeated by itself.

    redis-py's own retries are off: with them, two lost replies made one fetch lease 30 tasks
    and hand out 10, and an enqueue conflict with itself.
    """

    def __init__(self, url: str, *, size: int = POOL_SIZE) -> None:
        self.url = url
        self.where = _without_password(url)
        self._kwargs, self._embedded_path = _parse(url)
        self._store: Store | None = None
        self._free = asyncio.Semaphore(size)
        self._idle: list[Pipeline] = []  # the last used is taken first
        self._waiting: set[Pipeline] = set()  # in use by `wait`
        self._given_up: set[tuple[str, str]] = set()  # lost while calls were under way
        self._open = False
        self._took_s = math.inf  # the last call that was to be answered soon

    async def open(self) -> None:
        """Start the embedded store if the URL names one, and see that Redis answers.

        Raises:
            BrokerUnavailableError: nobody answers.
            BrokerError: Redis refuses us, or is older than 6.2.
        """
        if self._embedded_path is not None and self._store is None:
            self._store = await open_store_async(self._embedded_path)
            self._kwargs["path"] = self._store.socket
        self._open = True
        (info,) = await self.call(["INFO", "server"])
        if isinstance(info, _NoPermission):
            return  # a producer needs no right to INFO; a Redis that is too old shows otherwise
        if isinstance(info, BrokerError):
            raise info
        _check_version(info)

    async def call(
        self, *commands: Sequence[Arg] | bytes | Command, soon: bool = False
    ) -> list[Answer]:
        """Send commands in one write and return their answers in order, errors among them.

        A command may be packed already. `soon`: the caller does nothing else meanwhile, so that
        it is worth staying awake for an answer that comes at once.

        Raises:
            ConnectionLostError: no answer came; `sent` tells whether the commands may have run.
        """
        if not self._open:
            raise BrokerError("not connected: use it in 'async with', or await open() first")
        if not commands:
            return []
        async with self._free:
            pipeline = self._take() or await self._connect()
            try:
                await self._end_given_up(pipeline)
                answers = await self._call_on(pipeline, commands, soon)
            finally:
                self._give_back(pipeline)
            return answers

    def wait(
        self, *commands: Sequence[Arg] | Command, on_answers: Callable[[Waited], None]
    ) -> EndWait | None:
        """Send commands of which the first waits in Redis, less than `CALL_TIMEOUT_S`.

        Returns what ends the wait, so that the answers come, or None: no connection is free for
        it. `on_answers` is called with the answers as soon as they are read, or with a
        ConnectionLostError; a script that Redis lost is a BrokerUnavailableError among them. The
        wait takes none of the pool's turns, so the pool may come to one connection more than its
        size.
        """
        pipeline = self._take() if self._open and not self._given_up else None
        if pipeline is None:
            return None

        def answered(answers: list[Any] | Exception) -> None:
            self._waiting.discard(pipeline)
            self._give_back(pipeline)
            if isinstance(answers, Exception):
                self._give_up(pipeline)
                on_answers(ConnectionLostError(answers, self.where, sent=True))
            else:
                if any(isinstance(answer, _ReadOnly) for answer in _translated(answers)):
                    self._forget_primary()
                on_answers([_worth_repeating(answer) for answer in answers])

        async def end() -> None:
            while pipeline in self._waiting:
                if await self._unblock(pipeline):
                    return
                await asyncio.sleep(UNBLOCK_AGAIN_S)

        self._waiting.add(pipeline)
        pipeline.call_back(b"".join(map(_packed, commands)), len(commands), answered)
        return end

    async def _unblock(self, pipeline: Pipeline) -> bool:
        """End a wait; False if Redis has answered it, or has not read it yet.

        Only where Redis does not let us, by closing: what it has begun then stays half done.
        """
        answer: Answer = None
        if pipeline.known_as is not None:
            try:
                (answer,) = await self.call(["CLIENT", "UNBLOCK", pipeline.known_as[0]])
            except BrokerError as error:
                answer = error
        if isinstance(answer, int):
            return answer == 1
        if pipeline in self._waiting:
            pipeline.close()
        return True

    def _give_back(self, pipeline: Pipeline) -> None:
        if self._open:
            self._idle.append(pipeline)
        else:
            pipeline.close()

    async def _stay_awake(self, answered: asyncio.Future[list[Any]]) -> None:
        """Keep the event loop turning while the answer of a Redis that is near is on its way.

        A process that sleeps is woken in about the time that such a Redis takes to answer: with
        a loop that sleeps, one enqueue after the other took 110 µs each, with one that does not
        65, for the same CPU time. Nobody else waits: whatever is ready runs in between. Only
        while calls come back as quickly as that.
        """
        began = time.monotonic()
        if self._took_s < SOON_S:
            # An event would let the loop sleep.
            while not answered.done() and time.monotonic() - began < SOON_S:  # noqa: ASYNC110
                await asyncio.sleep(0)
        await answered
        self._took_s = time.monotonic() - began

    def _forget_primary(self) -> None:
        """After a failover the old primary is a replica: new connections find the new one."""
        for stale in self._idle:
            stale.close()

    async def ask(self, *commands: Sequence[Arg] | Command) -> list[Answer]:
        """Send commands that belong together, as `call`, and raise the first error of an answer.

        Raises:
            BrokerError: no answer came, or one command was refused; the others have run.
        """
        answers = await self.call(*commands)
        for answer in answers:
            if isinstance(answer, BrokerError):
                raise answer
        return answers

    def _take(self) -> Pipeline | None:
        while self._idle:
            pipeline = self._idle.pop()
            if pipeline.ready():
                return pipeline
            pipeline.close()
        return None

    async def _connect(self) -> Pipeline:
        connection = self._new(protocol=2)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):  # redis-py has none for the login
                await connection.connect()
        except exceptions.RedisError as error:
            if (
                isinstance(error, _LOST)
                and not isinstance(error, exceptions.BusyLoadingError)
                and not _is_refused_login(error)
            ):
                raise ConnectionLostError(error, self.where, sent=False) from error
            raise translate(error) from error
        except OSError as error:
            cause = error if str(error) else TimeoutError(f"no answer in {CALL_TIMEOUT_S:.0f} s")
            raise ConnectionLostError(cause, self.where, sent=False) from error
        finally:
            if not connection.is_connected:
                await connection.disconnect(nowait=True)
        pipeline = Pipeline(connection)
        try:
            pipeline.known_as = await _known_as(pipeline)
        except BaseException as error:
            pipeline.close()
            if isinstance(error, OSError):
                raise ConnectionLostError(error, self.where, sent=False) from error
            raise
        return pipeline

    async def _end_given_up(self, pipeline: Pipeline) -> None:
        """Have Redis end the connections that were given up, before anything is sent again.

        What the network still holds of them would be carried out when it comes, after its own
        repetition: a task would be put on its queue twice.
        """
        if not self._given_up:
            return
        given_up = set(self._given_up)
        # The address as well, for a Redis that was restarted counts its clients anew.
        kills = [pack(["CLIENT", "KILL", "ID", i, "ADDR", address]) for i, address in given_up]
        try:
            await pipeline.call(b"".join(kills), len(kills))  # who may not, goes without
        except OSError as error:
            raise ConnectionLostError(error, self.where, sent=False) from error
        self._given_up -= given_up  # not before: who comes meanwhile must not be faster

    def _give_up(self, pipeline: Pipeline) -> None:
        if pipeline.known_as is not None:
            self._given_up.add(pipeline.known_as)

    async def _call_on(
        self, pipeline: Pipeline, commands: Sequence[Sequence[Arg] | bytes | Command], soon: bool
    ) -> list[Answer]:
        packed = [_packed(command) for command in commands]
        answered = pipeline.call(b"".join(packed), len(packed))
        try:
            if soon:
                await self._stay_awake(answered)
            answers = _translated(await answered)
            for i, command in enumerate(commands):
                # A script that Redis lost is sent again, alone: its neighbours have run.
                if isinstance(answers[i], _NoScript) and isinstance(command, Command):
                    answers[i : i + 1] = _translated(await pipeline.call(pack(command.by_text), 1))
        except OSError as error:  # a TimeoutError, too
            self._give_up(pipeline)
            raise ConnectionLostError(error, self.where, sent=True) from error
        finally:
            answered.cancel()  # if it has not come, nobody waits for it any more
        if any(isinstance(answer, _ReadOnly) for answer in answers):
            self._forget_primary()
        return answers

    @asynccontextmanager
    async def dedicated(self) -> AsyncGenerator[aioredis.Connection]:
        """Give a RESP3 connection of its own, without a read timeout, closed at the end.

        Raises:
            BrokerUnavailableError: nobody answers.
        """
        if not self._open:
            raise BrokerUnavailableError("not connected, or closed")
        connection = self._new(protocol=3)
        try:
            try:
                await connection.connect()
            except exceptions.RedisError as error:
                raise translate(error) from error
            except OSError as error:
                raise ConnectionLostError(error, self.where, sent=False) from error
            yield connection
        finally:
            await connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Close every connection, and leave the embedded store; repeating it does nothing."""
        self._open = False
        for pipeline in (*self._idle, *self._waiting):
            pipeline.close()
        self._idle.clear()
        if self._store is not None:
            store, self._store = self._store, None
            await asyncio.to_thread(store.close)

    def _new(self, *, protocol: int) -> aioredis.Connection:
        options: dict[str, Any] = {
            "socket_timeout": None,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
            "health_check_interval": 0,
            "protocol": protocol,
        } | self._kwargs
        kind = options.pop("connection_class", aioredis.Connection)
        connection: aioredis.Connection = kind(**options)
        return connection


class _ReadOnly(BrokerUnavailableError):
    """Redis is a replica now, or still."""


class _NoPermission(BrokerError):
    """The user that we are in Redis has no right to a command."""


class _NoScript(BrokerError):
    """Redis does not know the script: it was restarted, or its scripts were flushed."""


def _parse(url: str) -> tuple[dict[str, Any], str | None]:
    try:
        match urlsplit(url).scheme:
            case "embedded":
                path, _, query = url.removeprefix("embedded://").partition("?")
                kwargs = {"connection_class": aioredis.UnixDomainSocketConnection, "db": _db(query)}
                return kwargs, unquote(path)
            case "redis-socket":  # Asynq's name for unix://
                return _connection_options(_unix_url(url)), None
            case "redis" | "rediss" | "unix":
                return _connection_options(url), None
            case _:
                pass
    except (ValueError, TypeError) as error:
        raise OptionError(f"the Redis URL {_without_password(url)!r} is wrong: {error}") from None
    raise OptionError(
        f"the Redis URL {_without_password(url)!r} has an unknown scheme: use redis://, rediss://, "
        "unix://, redis-socket:// or embedded://"
    )


def _connection_options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(parse_url(url))
    for name in options:
        if name not in _URL_OPTIONS and not name.startswith("ssl_"):
            raise ValueError(f"there is no option {name!r}, only db, client_name and ssl_...")
    return options


def _unix_url(url: str) -> str:
    return "unix://" + url.removeprefix("redis-socket://")


def _db(query: str) -> int:
    return int(parse_qs(query).get("db", ["0"])[0])


def _without_password(url: str) -> str:
    masked = re.sub(r"(://[^/@]*?):.*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", masked)


def _check_version(info: bytes) -> None:
    fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    version = fields.get("redis_version", "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_REDIS:
        raise BrokerError(f"Redis {version} is too old: asyncq needs Redis 6.2 or newer, or Valkey")
