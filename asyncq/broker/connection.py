"""Connections to one Redis: what goes out in one write, and what comes back."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import hiredis
import redis.asyncio as aioredis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from asyncq.broker.embedded import Store, open_store_async
from asyncq.broker.pipeline import CALL_TIMEOUT_S, Pipeline
from asyncq.broker.refusal import (
    ConnectionLostError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    is_lost,
    refusal,
    translate,
)
from asyncq.broker.resp import Arg, pack, text
from asyncq.broker.scripts import Command
from asyncq.broker.url import parsed, without_password
from asyncq.errors import BrokerError, BrokerUnavailableError

OLDEST_REDIS: Final = (6, 2)  # RPOP with a count, ZMSCORE, ZADD GT, RESP3 tracking
CONNECT_TIMEOUT_S: Final = 5.0
POOL_SIZE: Final = 16
UNBLOCK_AGAIN_S: Final = 0.02
SOON_S: Final = 0.0002  # a Redis that answers within this is near

Answer = Any
"""What Redis answered: bytes, int, None or lists of these; a `BrokerError` where it refused."""

Waited: TypeAlias = "list[Answer] | ConnectionLostError"

EndWait: TypeAlias = Callable[[], Awaitable[None]]


class Pool:
    """Connections to one Redis, each used by one call at a time; no call is repeated by itself.

    redis-py's own retries are off: with them, two lost replies made one fetch lease 30 tasks
    and hand out 10, and an enqueue conflict with itself.
    """

    def __init__(self, url: str, *, size: int = POOL_SIZE) -> None:
        self.url = url
        self.where = without_password(url)
        self._kwargs, self._embedded_path = parsed(url)
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
        if isinstance(info, NoPermissionError):
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
                if self._given_up:
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
            elif _translated(answers):
                if any(isinstance(answer, ReadOnlyError) for answer in answers):
                    self._forget_primary()
                on_answers([_worth_repeating(answer) for answer in answers])
            else:
                on_answers(answers)

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

    async def _stay_awake(self, answered: asyncio.Future[list[Any]], began: float) -> None:
        """Keep the event loop turning while the answer of a Redis that is near is on its way.

        A process that sleeps is woken in about the time that such a Redis takes to answer: with
        a loop that sleeps, one enqueue after the other took 110 µs each, with one that does not
        65, for the same CPU time. Nobody else waits: whatever is ready runs in between. Only
        while calls come back as quickly as that, counted from before the write, since Redis may
        answer before that returns. Otherwise a turn of ours may be what the worker waits for,
        which Redis wakes on our processor: a pickup took a tenth longer. To yield the processor
        each turn does not help, and beside busy neighbours it cost up to nine tenths of the rate.
        """
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
            if is_lost(error):
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
        began = time.monotonic()
        answered = pipeline.call(b"".join(packed), len(packed))
        try:
            if soon:
                await self._stay_awake(answered, began)
            answers = await answered
            if not _translated(answers):
                return answers
            for i, command in enumerate(commands):
                # A script that Redis lost is sent again, alone: its neighbours have run.
                if isinstance(answers[i], NoScriptError) and isinstance(command, Command):
                    again = await pipeline.call(pack(command.by_text), 1)
                    _translated(again)
                    answers[i : i + 1] = again
        except OSError as error:  # a TimeoutError, too
            self._give_up(pipeline)
            raise ConnectionLostError(error, self.where, sent=True) from error
        finally:
            answered.cancel()  # if it has not come, nobody waits for it any more
        if any(isinstance(answer, ReadOnlyError) for answer in answers):
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


async def _known_as(pipeline: Pipeline) -> tuple[str, str] | None:
    (info,) = await pipeline.call(pack(["CLIENT", "INFO"]), 1)
    found = re.match(rb"id=(\d+) addr=(\S+)", info) if isinstance(info, bytes) else None
    return None if found is None else (text(found[1]), text(found[2]))  # None: we may not ask


def _translated(answers: list[Any]) -> bool:
    """Make what Redis refused errors of ours, in place; False if it refused nothing."""
    if hiredis.ReplyError not in map(type, answers):  # nearly always, so no loop of Python's
        return False
    for i, answer in enumerate(answers):
        if isinstance(answer, hiredis.ReplyError):
            answers[i] = refusal(str(answer))
    return True


def _worth_repeating(answer: Answer) -> Answer:
    if isinstance(answer, NoScriptError):
        return BrokerUnavailableError(f"Redis lost the script: {answer}")
    return answer


def _packed(command: Sequence[Arg] | bytes | Command) -> bytes:
    if isinstance(command, Command):
        return command.packed
    return command if isinstance(command, bytes) else pack(command)


def _check_version(info: bytes) -> None:
    fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
    version = fields.get("redis_version", "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_REDIS:
        raise BrokerError(f"Redis {version} is too old: asyncq needs Redis 6.2 or newer, or Valkey")
