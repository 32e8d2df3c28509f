"""The heartbeat extends leases and says what runs here, from a thread of its own.

In an asyncio program one handler that blocks the event loop stops every loop on it. Were the
heartbeat among them, all leases of the process would end and its tasks run twice. So it has
its own thread, event loop and connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from asyncq.broker import keys
from asyncq.broker.broker import SERVER_TTL_S, Broker
from asyncq.errors import BrokerError
from asyncq.proto.asynq_pb2 import ServerInfo, WorkerInfo
from asyncq.server.in_flight import LEASE_LOST, InFlight, Run
from asyncq.server.loop import Trouble, each

log = logging.getLogger("asyncq.server")

INTERVAL_S: Final = 5.0  # Asynq's
OVERDUE_S: Final = 15.0  # past its deadline, a run is cancelled and written off long before
SHOWN_BYTES: Final = 64 * 1024  # of a running task's payload; Asynq sends all of it each time
LEASE_S: Final = 30.0  # Asynq's; ours lasts up to a second longer in Redis


@dataclass(slots=True)
class Identity:
    """Who a server is, as the inspector shows it; `status` is active, stopped or closed."""

    server_id: str
    concurrency: int
    queues: dict[str, int]
    strict_priority: bool
    status: str = "active"
    host: str = field(default_factory=lambda: socket.gethostname() or "unknown-host")
    pid: int = field(default_factory=os.getpid)
    started_at: float = field(default_factory=time.time)

    @property
    def server_key(self) -> str:
        return keys.server(self.host, self.pid, self.server_id)

    @property
    def workers_key(self) -> str:
        return keys.workers(self.host, self.pid, self.server_id)


class Heartbeat:
    """Beats every 5 s; a run whose lease is lost, or could not be extended in time, is told."""

    def __init__(
        self,
        broker: Broker,
        in_flight: InFlight,
        identity: Identity,
        interval_s: float = INTERVAL_S,
        on_death: Callable[[BaseException], None] | None = None,
    ) -> None:
        self.identity = identity
        self._on_death = on_death  # called on the server's event loop
        self._broker = broker  # used by the heartbeat's own event loop only
        self._in_flight = in_flight
        self._interval_s = interval_s
        self._server_loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._main, name="asyncq-heartbeat", daemon=True)
        self._own_loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._beat_now: asyncio.Event | None = None
        self._beaten = threading.Event()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    async def first_beat(self) -> None:
        """Wait for the first beat, so that the server is seen before it takes a task."""
        await asyncio.to_thread(self._beaten.wait)

    def set_status(self, status: str) -> None:
        """Show another status at once: stopped or closed."""
        self.identity.status = status
        if self._beat_now is not None:
            self._call(self._beat_now.set)

    async def stop(self) -> None:
        """Remove the server's records and end the thread; waits at most 2 s for both."""
        if self._stopping is not None:
            self._call(self._stopping.set)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join, 2.0)

    def _call(self, function: Callable[[], object]) -> None:
        if self._own_loop is not None and not self._own_loop.is_closed():
            try:
                self._own_loop.call_soon_threadsafe(function)
            except RuntimeError:  # closed in between
                pass

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as error:
            log.exception("the heartbeat died: leases will end")
            self._beaten.set()
            if self._on_death is not None:
                self._call_server(self._on_death, error)

    async def _run(self) -> None:
        self._stopping = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._own_loop = asyncio.get_running_loop()
        overdue = asyncio.create_task(self._watch_overdue())
        trouble = Trouble("heartbeat")
        opened = False
        while not self._stopping.is_set():
            began = time.monotonic()
            pause_s = self._interval_s
            try:
                if not opened:
                    await self._broker.open()
                    opened = True
                await self.tick()
                trouble.over()
            except BrokerError as error:
                pause_s = min(pause_s, trouble.pause_s(error))
            self._beaten.set()
            await self._pause(max(0.0, pause_s - (time.monotonic() - began)))
        overdue.cancel()
        await self._withdraw()

    async def _pause(self, pause_s: float) -> None:
        assert self._stopping is not None
        assert self._beat_now is not None
        waits = [asyncio.create_task(event.wait()) for event in (self._stopping, self._beat_now)]
        await asyncio.wait(waits, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        self._beat_now.clear()

    async def tick(self) -> int:
        """Extend all leases, then write the records; return the number of runs."""
        runs = list(self._in_flight.runs())
        by_queue: dict[str, list[Run]] = {}
        alive = [run for run in runs if self._is_alive(run)]
        # What waits for a place would wait for ever behind a run that blocks the event loop.
        blocked = len(alive) < len(runs)
        for run in alive:
            if not (blocked and run.waits):
                by_queue.setdefault(run.lane.queue, []).append(run)
        try:
            await each(by_queue, lambda queue: self._extend(queue, by_queue[queue]))
        finally:
            await self._announce([run for run in runs if not run.waits])
        return len(runs)

    def _is_alive(self, run: Run) -> bool:
        """Whether a run is within its deadline, which only an event loop that turns can hold.

        A loop that is blocked for good would otherwise keep its tasks from everybody for ever.
        """
        if run.holds_place or time.monotonic() < run.ends_at + OVERDUE_S:
            return True
        if not run.given_up:
            run.given_up = True
            log.critical(
                "task %r (%r) is %.0f s past its deadline and could not be cancelled: its lease "
                "is left to end. Does a handler block the event loop?",
                run.message.id, run.message.type, OVERDUE_S,
            )  # fmt: skip
        return False

    async def _extend(self, queue: str, runs: list[Run]) -> int:
        before = time.monotonic()  # a slow answer must not count as lease
        marks = [(run.message.id, run.mark) for run in runs]
        lost = set(await self._broker.extend(queue, marks))
        for run in runs:
            if run.message.id in lost:
                self._lose(run)
            else:
                run.extended_at = before
        return len(runs)

    async def _watch_overdue(self) -> None:
        """Tell runs whose lease could not be extended, before somebody else may have it."""
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic()
            for run in self._in_flight.runs():
                if now - run.extended_at > LEASE_S - 1:
                    self._lose(run)

    def _lose(self, run: Run) -> None:
        # The run may have ended since it was listed, and cancelling it then does nothing.
        self._call_server(run.cancel, LEASE_LOST)

    def _call_server(self, function: Callable[..., object], *args: object) -> None:
        try:
            self._server_loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            pass  # the server's loop is closed

    async def _announce(self, runs: list[Run]) -> None:
        identity = self.identity
        info = ServerInfo(
            host=identity.host,
            pid=identity.pid,
            server_id=identity.server_id,
            concurrency=identity.concurrency,
            queues=identity.queues,
            strict_priority=identity.strict_priority,
            status=identity.status,
            start_time=_timestamp(identity.started_at),
            active_worker_count=len(runs),
        )
        await self._broker.announce(
            identity.server_key,
            identity.workers_key,
            int(self._in_flight.now()) + SERVER_TTL_S,
            info.SerializeToString(),
            {run.message.id: self._worker(run) for run in runs},
        )

    def _worker(self, run: Run) -> bytes:
        identity, message = self.identity, run.message
        return WorkerInfo(
            host=identity.host,
            pid=identity.pid,
            server_id=identity.server_id,
            task_id=message.id,
            task_type=message.type,
            task_payload=message.payload[:SHOWN_BYTES],
            queue=message.queue,
            start_time=_timestamp(run.started_at),
            deadline=_timestamp(run.deadline_at),
        ).SerializeToString()

    async def _withdraw(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._broker.withdraw(self.identity.server_key, self.identity.workers_key)
        except (BrokerError, TimeoutError) as error:
            log.debug("the server's records are left to expire: %s", error)
        finally:
            await self._broker.close()


def _timestamp(unix_s: float) -> Timestamp:
    # Always set: Asynqmon skips a record without its times. Bounded to what a Timestamp holds.
    unix_s = min(max(unix_s, -62135596800.0), 253402300799.0)
    seconds = int(unix_s // 1)
    return Timestamp(seconds=seconds, nanos=int((unix_s - seconds) * 1e9))
