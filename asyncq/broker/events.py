"""What Redis tells us unasked: keys that changed since we read them, and messages on channels."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

import hiredis
import redis.asyncio as aioredis

from asyncq.broker.connection import Answer, Pool
from asyncq.broker.keys import SERVERS, queue_keys
from asyncq.broker.pipeline import Pipeline
from asyncq.broker.refusal import ConnectionLostError, refusal
from asyncq.broker.resp import Arg, pack, text
from asyncq.errors import BrokerError, BrokerUnavailableError

log = logging.getLogger("asyncq.broker")

RECONNECT_S: Final = (0.05, 2.0)  # first and longest pause between attempts

_NOTHING_YET: Final = object()
_hiredis: Any = hiredis  # its stubs know no PushNotification


class Ear(Pipeline):
    """A pipeline on which Redis also tells things unasked, handed on as they come.

    What `on_push` raises ends the connection, and is `ended` then.
    """

    def __init__(self, connection: aioredis.Connection, on_push: Callable[[Any], None]) -> None:
        super().__init__(connection)
        self._reader = _hiredis.Reader(notEnoughData=_NOTHING_YET)
        self._on_push = on_push
        self.ended: asyncio.Future[Exception] = self._loop.create_future()

    def say(self, *command: Arg) -> None:
        """Send a command that is answered by what is told, as SUBSCRIBE is."""
        if not self.closed:
            self._transport.write(pack(command))

    def data_received(self, data: bytes) -> None:
        """Hand on what was told, and hand out answers, in the order in which they came."""
        reader, calls = self._reader, self._calls
        try:
            reader.feed(data)
            while (answer := reader.gets()) is not _NOTHING_YET:
                if isinstance(answer, _hiredis.PushNotification):
                    self._on_push(answer)
                elif calls:
                    call = calls[0]
                    call.answers.append(answer)
                    if len(call.answers) == call.commands:
                        calls.popleft()
                        call.end()
                elif isinstance(answer, hiredis.ReplyError):  # what was said is refused
                    raise refusal(str(answer))
                else:
                    raise ConnectionError(f"an answer that nobody asked for: {answer!r}")
        except hiredis.ProtocolError as error:
            self._lose(ConnectionError(f"not an answer of Redis: {error!r}"))
        except Exception as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        super()._lose(error)
        if not self.ended.done():
            self.ended.set_result(error)


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
        self._ear: Ear | None = None
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
                    await self._listen(Ear(connection, self._told))
            except (BrokerUnavailableError, OSError) as error:
                log.debug("listening stopped: %s", error)
            if self._was_connected:
                pause_s = RECONNECT_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, longest_s)

    async def _listen(self, ear: Ear) -> None:
        self._was_connected = False
        self._ear = ear
        try:
            for answer in await self.read(["CLIENT", "TRACKING", "ON"]):
                if isinstance(answer, BrokerError):
                    raise answer
            self._unconfirmed = len(self._channels)
            if self._channels:
                ear.say("SUBSCRIBE", *self._channels)
            else:
                self._is_connected()
            raise await ear.ended
        finally:
            self._ear = None
            ear.close()
            if self.connected.is_set():
                self.connected.clear()
                self._on_change(None)

    def _is_connected(self) -> None:
        self._was_connected = True
        self.connected.set()
        self._on_change(None)

    def _told(self, push: Sequence[Any]) -> None:
        match push[0]:
            case b"invalidate":
                for key in push[1] or [None]:  # no keys: the whole database was flushed
                    self._on_change(None if key is None else text(key))
            case b"subscribe":
                self._unconfirmed -= 1
                if not self._unconfirmed:
                    self._is_connected()
            case b"message" if self._on_message is not None:
                self._on_message(text(push[1]), text(push[2]))
            case _:
                pass

    async def read(self, *commands: Sequence[Arg]) -> list[Answer]:
        """Send reading commands and return their answers; the keys read are listened to.

        What Redis refuses is an error among the answers, so that one key does not hide others.

        Raises:
            BrokerUnavailableError: the connection is down, or was lost.
        """
        ear, where = self._ear, self._pool.where
        if ear is None:
            raise ConnectionLostError(ConnectionError("down"), where, sent=False)
        packed = b"".join([pack(command) for command in commands])
        try:
            answers = await ear.call(packed, len(commands))
        except Exception as error:
            raise ConnectionLostError(error, where, sent=True) from error
        return [
            refusal(str(answer)) if isinstance(answer, hiredis.ReplyError) else answer
            for answer in answers
        ]

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


def _next_due_in_s(firsts: Sequence[Answer], now_s: float) -> float | None:
    units = (1, 1, 1000)  # scheduled and retry hold seconds, due milliseconds
    due = [
        float(first[0][1]) / unit - now_s
        for first, unit in zip(firsts, units, strict=True)
        if first and not isinstance(first, BrokerError)
    ]
    return max(0.0, min(due)) if due else None
