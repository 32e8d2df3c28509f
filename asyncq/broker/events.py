"""What Redis tells us unasked: keys that changed since we read them, and messages on channels."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis.asyncio as aioredis
from redis import exceptions

from asyncq.broker.connection import (
    Answer,
    ConnectionLostError,
    Pool,
    pack,
    text,
    translate,
)
from asyncq.broker.keys import SERVERS, queue_keys
from asyncq.broker.scripts import Arg
from asyncq.errors import BrokerError, BrokerUnavailableError

log = logging.getLogger("asyncq.broker")

ANSWER_TIMEOUT_S: Final = 10.0
RECONNECT_S: Final = (0.05, 2.0)  # first and longest pause between attempts

_PUSHED: Final = object()


class Listener:
    """One connection that reads with CLIENT TRACKING, so that Redis says when a key changes.

    A key is told once after each read, so a reader reads again to go on listening. When the
    connection is lost nothing is told, so `on_change(None)` then means: anything may have
    changed. `on_message` gets what arrives on `channels`; messages sent while the connection
    is down are lost, as with any pub/sub.
    """

    def __init__(
        self,
        pool: Pool,
        on_change: Callable[[str | None], None],
        on_message: Callable[[str, str], None] | None = None,
        channels: Sequence[str] = (),
    ) -> None:
        self._pool = pool
        self._on_change = on_change
        self._on_message = on_message
        self._channels = channels
        self._connection: aioredis.Connection | None = None
        self._answers: deque[asyncio.Future[Answer]] = deque()
        self.connected = asyncio.Event()
        self._was_connected = False
        self._unconfirmed = 0  # channels whose subscription Redis has not confirmed

    async def run(self) -> None:
        """Listen until cancelled, connecting again whenever the connection is lost.

        Raises:
            BrokerError: Redis does not let us listen (no RESP3, no right to CLIENT TRACKING).
        """
        pause_s, longest_s = RECONNECT_S
        while True:
            try:
                async with self._pool.dedicated() as connection:
                    await self._listen(connection)
            except (BrokerUnavailableError, OSError) as error:
                log.debug("listening stopped: %s", error)
            finally:
                self._disconnected()
            if self._was_connected:
                pause_s = RECONNECT_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, longest_s)

    async def _listen(self, connection: aioredis.Connection) -> None:
        self._was_connected = False
        parser: Any = connection._parser  # pyright: ignore[reportPrivateUsage]
        parser.invalidation_push_handler_func = self._invalidated
        parser.pubsub_push_handler_func = self._published
        try:
            await connection.send_command("CLIENT", "TRACKING", "ON")
            await connection.read_response()
            self._connection = connection
            self._unconfirmed = len(self._channels)
            if self._channels:
                await connection.send_command("SUBSCRIBE", *self._channels)
            else:
                self._is_connected()
            while True:
                answer = await self._next_answer(connection)
                if answer is not _PUSHED and self._answers:
                    future = self._answers.popleft()
                    if not future.done():
                        future.set_result(answer)
        except exceptions.RedisError as error:
            raise translate(error) from error

    def _is_connected(self) -> None:
        self._was_connected = True
        self.connected.set()
        self._on_change(None)

    async def _next_answer(self, connection: Any) -> Answer:
        try:
            return await connection.read_response(push_request=True)
        except exceptions.ResponseError as error:
            return translate(error)

    def _disconnected(self) -> None:
        self._connection = None
        if self.connected.is_set():
            self.connected.clear()
            self._on_change(None)
        while self._answers:
            future = self._answers.popleft()
            if not future.done():
                future.set_result(
                    ConnectionLostError(ConnectionError("closed"), self._pool.where, sent=True)
                )

    async def read(self, *commands: Sequence[Arg]) -> list[Answer]:
        """Send reading commands and return their answers; the keys read are listened to.

        What Redis refuses is an error among the answers, so that one key does not hide others.

        Raises:
            BrokerUnavailableError: the connection is down, or was lost.
        """
        connection = self._connection
        if connection is None:
            raise ConnectionLostError(ConnectionError("down"), self._pool.where, sent=False)
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in commands]
        self._answers += futures
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await connection.send_packed_command(
                    [pack(command) for command in commands], check_health=False
                )
                answers = [await future for future in futures]
        except (TimeoutError, OSError, exceptions.RedisError) as error:
            await connection.disconnect(nowait=True)  # ends the reading loop, which reconnects
            raise ConnectionLostError(error, self._pool.where, sent=True) from error
        if lost := next((a for a in answers if isinstance(a, ConnectionLostError)), None):
            raise lost
        return answers

    async def oldest_pending(self, queues: Sequence[str]) -> list[list[bytes]]:
        """Return the ids that each queue gives next, two at most, and listen for changes of that.

        The oldest is first; a paused queue gives none.

        Raises:
            BrokerUnavailableError: the connection is down, or was lost.
        """
        commands: list[Sequence[Arg]] = []
        for queue in queues:
            k = queue_keys(queue)
            commands += (["LRANGE", k.pending, -2, -1], ["EXISTS", k.paused])
        answers = await self.read(*commands)
        return [
            [] if isinstance(pending, BrokerError) or paused else pending[::-1]
            for pending, paused in zip(answers[::2], answers[1::2], strict=True)
        ]

    async def servers(self, now: float) -> int | None:
        """Count the servers whose records end after `now` (unix seconds); `None`: not told.

        Raises:
            BrokerUnavailableError: the connection is down, or was lost.
        """
        (count,) = await self.read(["ZCOUNT", SERVERS, int(now), "+inf"])
        return None if isinstance(count, BrokerError) else int(count)

    async def next_due_in_s(self, queues: Sequence[str]) -> list[float | None]:
        """Tell in how many seconds each queue's next delayed task is due, and listen likewise.

        `None`: none is delayed.

        Raises:
            BrokerUnavailableError: the connection is down, or was lost.
        """
        commands: list[Sequence[Arg]] = [["TIME"]]
        for queue in queues:
            k = queue_keys(queue)
            commands += (
                ["ZRANGE", key, 0, 0, "WITHSCORES"] for key in (k.scheduled, k.retry, k.due)
            )
        (seconds, micros), *answers = await self.read(*commands)
        now_s = int(seconds) + int(micros) / 1e6
        return [_next_due_in_s(answers[i : i + 3], now_s) for i in range(0, len(answers), 3)]

    async def _invalidated(self, push: Any) -> object:
        for key in push[1] or [None]:  # no keys: the whole database was flushed
            self._on_change(None if key is None else text(key))
        return _PUSHED

    async def _published(self, push: Any) -> object:
        if push[0] == b"subscribe":
            self._unconfirmed -= 1
            if not self._unconfirmed:
                self._is_connected()
        elif push[0] == b"message" and self._on_message is not None:
            self._on_message(text(push[1]), text(push[2]))
        return _PUSHED


def _next_due_in_s(firsts: Sequence[Answer], now_s: float) -> float | None:
    units = (1, 1, 1000)  # scheduled and retry hold seconds, due milliseconds
    due = [
        float(first[0][1]) / unit - now_s
        for first, unit in zip(firsts, units, strict=True)
        if first and not isinstance(first, BrokerError)
    ]
    return max(0.0, min(due)) if due else None
