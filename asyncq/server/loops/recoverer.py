"""The recoverer carries on with tasks whose worker died: the lease ended, or is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from asyncq.broker.broker import Broker, Expired
from asyncq.errors import LeaseExpiredError, MalformedMessageError
from asyncq.message import decode, failed, quarantined
from asyncq.server.in_flight import InFlight
from asyncq.server.loop import Loop, each

log = logging.getLogger("asyncq.server")

INTERVAL_S: Final = 5.0
"""A crash is noticed within this after the lease's end; Asynq looks every 60 s."""


class Recoverer(Loop):
    """Recovery costs one retry, as in Asynq, but the task is due at once."""

    name = "recoverer"

    def __init__(
        self,
        broker: Broker,
        in_flight: InFlight,
        counts: Callable[[str, BaseException], bool] | None = None,
        interval_s: float = INTERVAL_S,
    ) -> None:
        super().__init__(interval_s)
        self._broker = broker
        self._in_flight = in_flight
        self._counts = counts  # (task type, error) -> whether it spends a retry; None: always

    async def tick(self) -> int:
        """Recover what can be in every queue."""
        return await each(self._in_flight.lanes, self._recover_all)

    async def _recover_all(self, queue: str) -> int:
        recovered = 0
        while found := await self._broker.expired(queue):
            moved = await self._recover(queue, found)
            recovered += moved
            if not moved:
                break
        return recovered

    async def _recover(self, queue: str, found: Sequence[Expired]) -> int:
        now_s = int(self._in_flight.now())
        moves = [self._move(queue, expired, now_s) for expired in found]
        moved = await self._broker.recover(queue, moves)
        if moved:
            log.warning("queue %r: recovered %d tasks whose worker was gone", queue, moved)
        return moved

    def _move(
        self, queue: str, found: Expired, now_s: int
    ) -> tuple[Expired, str, int | str, bytes]:
        if not found.message:
            return found, "forget", 0, b""
        if not found.score and found.state == b"pending":  # moved for a worker that was gone
            return found, "requeue", 0, b""
        try:
            message = decode(found.id, queue, found.message)
        except MalformedMessageError as error:
            raw = quarantined(found.id, queue, found.message, str(error), now_s)
            return found, "quarantine", 0, raw
        lost = LeaseExpiredError()
        if message.retried >= message.retry:
            return found, "archive", 0, failed(message, str(lost), now_s, retried=False)
        counts = self._counts is None or self._counts(message.type, lost)
        kind = "retry" if counts else "retry_uncounted"
        return found, kind, "now", failed(message, str(lost), now_s, retried=counts)
