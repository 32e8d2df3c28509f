"""A connection for calls: commands go out in one write, answers come back in their order."""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import hiredis
import redis.asyncio as aioredis

CALL_TIMEOUT_S: Final = 10.0  # a Redis that hangs longer is treated like one that is gone

_NOTHING_YET: Final = object()


class Pipeline(asyncio.Protocol):
    """Takes the transport over from a connection that redis-py opened.

    redis-py finds the server, speaks TLS, logs in and selects the database. From there on a
    call needs no task, no stream and no timer of its own, which together cost more than all
    that Redis does for a small call. An answer that nobody waits for any more is dropped when
    it comes, so a cancelled call leaves the connection in step.
    """

    def __init__(self, connection: aioredis.Connection) -> None:
        opened: Any = connection
        self._writer = opened._writer  # kept: it would close the transport when it is collected
        self._transport: Any = self._writer.transport
        opened._reader = opened._writer = None  # nor does redis-py close it any more
        self._reader: Any = hiredis.Reader(notEnoughData=_NOTHING_YET)
        self._calls: deque[_Call | _CallBack] = deque()
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None
        self.closed = False
        self.known_as: tuple[str, str] | None = None  # its id and address in Redis
        self._poll = select.poll()
        self._poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        self._transport.set_protocol(self)

    def ready(self) -> bool:
        """Whether calls may be sent.

        A connection without calls that has something to read was closed, or is out of step: the
        event loop has not come to tell us yet.
        """
        return not self.closed and (bool(self._calls) or not self._poll.poll(0))

    def call(self, packed: bytes, commands: int) -> asyncio.Future[list[Any]]:
        """Send packed commands; the future gives their answers, refusals as `hiredis.ReplyError`.

        Raises (the future):
            ConnectionError, TimeoutError: no answer came, though Redis may have got the commands.
        """
        call = _Call(self._loop, commands)
        self._send(packed, call)
        return call.answered

    def call_back(
        self, packed: bytes, commands: int, on_answers: Callable[[list[Any] | Exception], None]
    ) -> None:
        """Send packed commands; `on_answers` gets their answers as soon as they are read.

        Or what `call` raises: the event loop need not come round for either.
        """
        self._send(packed, _CallBack(self._loop, commands, on_answers))

    def _send(self, packed: bytes, call: _Call | _CallBack) -> None:
        self._calls.append(call)
        if self.closed:
            self._lose(ConnectionError("the connection was closed"))
        else:
            self._transport.write(packed)
            if self._watch is None:
                self._watch = self._loop.call_at(call.ends_at, self._look)

    def close(self) -> None:
        """Close the connection; calls under way fail."""
        self._lose(ConnectionError("the connection was closed"))

    def data_received(self, data: bytes) -> None:
        """Hand out what came, in the order of the calls."""
        reader, calls = self._reader, self._calls
        try:
            reader.feed(data)
            while (answer := reader.gets()) is not _NOTHING_YET:
                call = calls[0]
                call.answers.append(answer)
                if len(call.answers) == call.commands:
                    calls.popleft()
                    call.end()
        except (hiredis.ProtocolError, IndexError) as error:  # no Redis, or out of step
            self._lose(ConnectionError(f"not an answer of Redis: {error!r}"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the calls under way."""
        reason = f": {exc}" if exc is not None else ""
        self._lose(ConnectionError(f"Redis closed the connection{reason}"))

    def _look(self) -> None:
        """One timer for all calls: most are answered long before, and need none of their own."""
        self._watch = None
        if not self._calls:
            return
        ends_at = self._calls[0].ends_at
        if ends_at > self._loop.time():
            self._watch = self._loop.call_at(ends_at, self._look)
        else:
            self._lose(TimeoutError(f"no answer in {CALL_TIMEOUT_S:.0f} s"))

    def _lose(self, error: Exception) -> None:
        self.closed = True
        self._transport.abort()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._calls:
            self._calls.popleft().fail(error)


class _Call:
    __slots__ = ("answered", "answers", "commands", "ends_at")

    def __init__(self, loop: asyncio.AbstractEventLoop, commands: int) -> None:
        self.commands = commands
        self.answers: list[Any] = []
        self.answered: asyncio.Future[list[Any]] = loop.create_future()
        self.ends_at = loop.time() + CALL_TIMEOUT_S

    def end(self) -> None:
        if not self.answered.done():
            self.answered.set_result(self.answers)

    def fail(self, error: Exception) -> None:
        if not self.answered.done():
            self.answered.set_exception(error)


class _CallBack:
    __slots__ = ("_loop", "_on_answers", "answers", "commands", "ends_at")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        commands: int,
        on_answers: Callable[[list[Any] | Exception], None],
    ) -> None:
        self.commands = commands
        self.answers: list[Any] = []
        self.ends_at = loop.time() + CALL_TIMEOUT_S
        self._loop = loop
        self._on_answers = on_answers

    def end(self) -> None:
        self._tell(self.answers)

    def fail(self, error: Exception) -> None:
        self._tell(error)

    def _tell(self, answers: list[Any] | Exception) -> None:
        try:
            self._on_answers(answers)
        except Exception as error:  # that of a caller, for which the connection is not to be lost
            message = "what an answer of Redis was for has failed"
            self._loop.call_exception_handler({"message": message, "exception": error})
