"""The watcher has Redis tell when an empty queue gets a task, or a delayed task comes sooner."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from asyncq.broker.events import Listener
from asyncq.broker.keys import queue_keys
from asyncq.errors import BrokerError
from asyncq.server.in_flight import SERVERS_UNKNOWN, InFlight, Lane

log = logging.getLogger("asyncq.server")

REARM_S: Final = 5.0
"""How often everything is read again: a slot that moved to another node tells nothing."""

BLIND_S: Final = 1.0
"""How often queues are asked while nothing can be told, because the connection is down."""

DUE_SPACING_S: Final = 0.005
"""Between two reads of what is due next: a storm of retries changes it with every one."""


class Watcher:
    """Reads what waits, so that Redis tells of changes; turns what it tells into wake-ups."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self._listener: Listener | None = None
        self._pending: dict[str, Lane] = {}
        self._delayed: dict[str, Lane] = {}
        for lane in in_flight.lanes.values():
            k = queue_keys(lane.queue)
            self._pending |= {k.pending: lane, k.paused: lane}
            self._delayed |= {k.scheduled: lane, k.retry: lane, k.due: lane}
        self._rearm_at = 0.0

    def on_change(self, key: str | None) -> None:
        """Take note that a key changed; `None`: the connection began or ended, so any may have."""
        if key is None:
            for lane in self._in_flight.lanes.values():
                lane.wake()
                lane.due_known = False
            self._in_flight.unarmed.set()
        elif key in self._pending:
            self._pending[key].tell(asyncio.get_running_loop().time())
        elif key in self._delayed:
            self._delayed[key].due_known = False
            self._in_flight.unarmed.set()

    async def run(self, listener: Listener) -> None:
        """Keep every empty lane armed until cancelled."""
        self._listener = listener
        loop = asyncio.get_running_loop()
        while True:
            self._in_flight.unarmed.clear()
            if not listener.connected.is_set():
                await self._ask_blindly(listener)
                continue
            try:
                if loop.time() >= self._rearm_at:
                    self._rearm_at = loop.time() + REARM_S
                    await self._start_over(listener)
                await self.tick()
            except BrokerError as error:
                log.debug("watcher: %s", error)
                await asyncio.sleep(0.05)  # the listener finds the connection lost
                continue
            await self._sleep(self._next_at() - loop.time())

    async def _start_over(self, listener: Listener) -> None:
        """Count the servers, and have everything read again."""
        servers = await listener.servers(self._in_flight.now())
        self._in_flight.servers = SERVERS_UNKNOWN if servers is None else max(servers, 1)
        for lane in self._in_flight.lanes.values():
            lane.armed = lane.due_known = False
        self._in_flight.changed.set()  # the pump looks again as well

    async def tick(self) -> int:
        """Arm the lanes that are empty and not armed; return how many."""
        assert self._listener is not None
        now = asyncio.get_running_loop().time()
        lanes = self._in_flight.lanes.values()
        unknown = [lane for lane in lanes if not lane.due_known]
        if unknown:
            await self._learn_due(self._listener, unknown)
        unarmed = [lane for lane in lanes if lane.is_to_be_armed() and lane.arm_at <= now]
        if unarmed:
            await self._arm(self._listener, unarmed)
        return len(unarmed)

    async def _arm(self, listener: Listener, lanes: list[Lane]) -> None:
        for lane in lanes:  # before the read: what is told while it is under way counts
            lane.armed = True
        pending = await listener.oldest_pending([lane.queue for lane in lanes])
        now = asyncio.get_running_loop().time()
        for lane, oldest in zip(lanes, pending, strict=True):
            lane.looked(oldest, now)

    async def _learn_due(self, listener: Listener, lanes: list[Lane]) -> None:
        for lane in lanes:
            lane.due_known = True
        due_in_s = await listener.next_due_in_s([lane.queue for lane in lanes])
        now = asyncio.get_running_loop().time()
        for lane, in_s in zip(lanes, due_in_s, strict=True):
            lane.due_at = None if in_s is None else now + in_s
        self._in_flight.due_changed.set()

    async def _ask_blindly(self, listener: Listener) -> None:
        try:
            async with asyncio.timeout(BLIND_S):
                await listener.connected.wait()
        except TimeoutError:
            now = asyncio.get_running_loop().time()
            for lane in self._in_flight.lanes.values():
                lane.wake()
                lane.due_at = now
            self._in_flight.due_changed.set()

    def _next_at(self) -> float:
        """When there is something to arm, by the event loop's clock."""
        lanes = self._in_flight.lanes.values()
        waiting = [lane.arm_at for lane in lanes if lane.is_to_be_armed()]
        return min([self._rearm_at, *waiting])

    async def _sleep(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(max(pause_s, 0)):
                await self._in_flight.unarmed.wait()
                if any(not lane.due_known for lane in self._in_flight.lanes.values()):
                    await asyncio.sleep(DUE_SPACING_S)
        except TimeoutError:
            pass
