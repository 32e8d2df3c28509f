"""The janitor deletes completed tasks whose retention has ended."""

from __future__ import annotations

from asyncq.broker.broker import BATCH, Broker
from asyncq.server.in_flight import InFlight
from asyncq.server.loop import Loop, each


class Janitor(Loop):
    """Looks every 8 s, as Asynq does."""

    name = "janitor"

    def __init__(self, broker: Broker, in_flight: InFlight, interval_s: float = 8.0) -> None:
        super().__init__(interval_s)
        self._broker = broker
        self._queues = tuple(in_flight.lanes)

    async def tick(self) -> int:
        """Delete what is over in every queue, a batch at a time."""
        return await each(self._queues, self._expire)

    async def _expire(self, queue: str) -> int:
        total = 0
        while deleted := await self._broker.expire_completed(queue):
            total += deleted
            if deleted < BATCH:
                break
        return total
