"""The forwarder moves delayed tasks to pending at the instant they are due."""

from __future__ import annotations

import asyncio

from asyncq.broker.broker import BATCH, Broker
from asyncq.server.in_flight import InFlight
from asyncq.server.loop import Loop, each


class Forwarder(Loop):
    """Sleeps until the next instant that Redis knows of, or a sooner one is told."""

    name = "forwarder"

    def __init__(self, broker: Broker, in_flight: InFlight, interval_s: float = 30.0) -> None:
        super().__init__(interval_s)
        self.woken = in_flight.due_changed
        self._broker = broker
        self._in_flight = in_flight
        self._look_everywhere_at = 0.0

    async def tick(self) -> int:
        """Forward what is due; every `interval_s` in all queues, told or not."""
        now = asyncio.get_running_loop().time()
        everywhere = now >= self._look_everywhere_at
        if everywhere:
            self._look_everywhere_at = now + self.interval_s
        due = [
            lane.queue
            for lane in self._in_flight.lanes.values()
            if everywhere or (lane.due_at is not None and lane.due_at <= now)
        ]
        return await each(due, self._forward)

    async def sleep(self, pause_s: float) -> None:
        """Wait until the next instant, though not longer than `pause_s`."""
        now = asyncio.get_running_loop().time()
        due = [lane.due_at - now for lane in self._in_flight.lanes.values() if lane.due_at]
        await super().sleep(max(0.0, min([pause_s, *due])))

    async def _forward(self, queue: str) -> int:
        lane = self._in_flight.lanes[queue]
        total = 0
        while True:
            moved, next_in_s = await self._broker.forward(lane.queue)
            total += moved
            if moved < BATCH:
                break
        now = asyncio.get_running_loop().time()
        lane.due_at = None if next_in_s is None else now + next_in_s
        return total
