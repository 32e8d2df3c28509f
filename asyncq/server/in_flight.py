"""The tasks that run here and the outcomes not yet saved: the one place where the loops meet."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final

from asyncq.errors import AsyncqError, LeaseExpiredError
from asyncq.message import TaskMessage
from asyncq.outcome import REQUEUE, Ended, Outcome

Annotate = Callable[[str, str, int, str, bytes], Awaitable[bool]]
"""Writes (queue, task id, mark, field, value); False when the lease is no longer held."""

CANCELED: Final = "context canceled"  # Asynq's text for a task that was cancelled by id
DEADLINE: Final = "context deadline exceeded"  # Asynq's text for a timeout or deadline

PATIENCE: Final = 2
"""Changes in a row that brought a lane no task: from there on it looks before it asks."""

SPREAD_S: Final = 0.005
"""A server: what looks in vain, looks again after a random part of this times the servers."""

LONGEST_SPREAD_S: Final = 0.5

TO_OTHERS_S: Final = 0.003
"""How long a new task is left to the servers that were faster lately."""

SERVERS_UNKNOWN: Final = 20

SHUTDOWN: Final = "server shutdown"
LEASE_LOST: Final = "lease lost"


class Run:
    """One execution of a task; `mark` is the proof that the lease is this run's own."""

    # What most runs never change stands here: one run is made for every task.
    task: asyncio.Task[Any] | None = None  # while the handler runs; runs that never wait share one
    waits = False  # taken ahead of its turn (`prefetch`): it has no place yet
    begun = False
    over = False
    timer: asyncio.TimerHandle | None = None  # for a deadline that is near
    cancel_reason: str | None = None
    cancelled_at: float | None = None  # by the event loop's clock
    final = False  # cancelled with the wish that it is not retried
    holds_place = False  # in a thread, which cannot be stopped, so neither written off
    given_up = False  # so far past its deadline that its lease is left to end
    state: Any = None
    client: Any = None
    started_at = 0.0  # unix seconds, by Redis's clock
    deadline_at = math.inf  # likewise
    ends_at = math.inf  # the same instant, by the event loop's clock
    _lease_lost: asyncio.Event | None = None

    def __init__(self, lane: Lane, message: TaskMessage, mark: int) -> None:
        self.lane = lane
        self.message = message
        self.id = message.id  # a message makes a new string each time it is asked
        self.mark = mark
        self.extended_at = time.monotonic()  # when the lease was last known to be held

    @property
    def lease_lost(self) -> asyncio.Event:
        """Set when the lease could not be kept; made when somebody asks for it."""
        if self._lease_lost is None:
            self._lease_lost = asyncio.Event()
            if self.cancel_reason == LEASE_LOST:
                self._lease_lost.set()
        return self._lease_lost

    def cancel(self, reason: str) -> None:
        """Cancel the handler; the first reason counts, but for a lost lease, which always does."""
        if self.over:
            return
        if self.cancel_reason is None or (
            reason == LEASE_LOST and self.cancel_reason != LEASE_LOST
        ):
            self.cancel_reason = reason
            self.cancelled_at = self.cancelled_at or asyncio.get_running_loop().time()
            if reason == LEASE_LOST and self._lease_lost is not None:
                self._lease_lost.set()
            if self.task is not None:  # one that has not begun sees the reason when it does
                self.task.cancel(reason)

    async def write_result(self, data: bytes) -> None:
        """Store a result at once.

        Raises:
            LeaseExpiredError: the task belongs to another worker now.
        """
        await self._write("result", data)

    async def write_progress(self, fraction: float, note: str) -> None:
        """Store how far the run is.

        Raises:
            LeaseExpiredError: the task belongs to another worker now.
        """
        await self._write("progress", json.dumps([fraction, note]).encode())

    def sync_call(self, function: Callable[..., Awaitable[None]], /, *args: Any) -> None:
        """Run one of the two above from another thread, and wait for it."""
        task = self.task
        if task is None:
            raise LeaseExpiredError  # the run is over
        loop = task.get_loop()
        if loop is _running_loop():
            raise AsyncqError(
                "ctx.sync waits, which would block the event loop: in an async handler use "
                "await ctx.progress(...) and await ctx.write_result(...)"
            )

        async def call() -> None:
            await function(*args)

        asyncio.run_coroutine_threadsafe(call(), loop).result()

    async def _write(self, name: str, value: bytes) -> None:
        lane = self.lane
        written = await lane.in_flight.annotate(lane.queue, self.id, self.mark, name, value)
        if not written:
            raise LeaseExpiredError


class Lane:
    """One queue as this server sees it: what runs, what is to be saved, whether it is empty."""

    def __init__(self, in_flight: InFlight, queue: str, weight: int, limit: int | None) -> None:
        self.in_flight = in_flight
        self.queue = queue
        self.weight = weight
        self.limit = limit  # the most that may run at once, None: as many as there are places
        self.runs: dict[str, Run] = {}
        self.ended: deque[Ended] = deque()
        self.turn = 0.0  # tasks taken divided by the weight: the lowest is asked first
        self.empty = False  # nothing was pending, or it is paused: wait until told otherwise
        self.awaited = False  # a request waits in Redis for its next task, so none need be told
        self.awaitable = False  # one will, as soon as nothing runs here any more
        self.rejoins = False  # was empty, so its turn has fallen behind
        self.told = False  # the next request follows a change, see fruitless
        self.fruitless = 0  # changes in a row that brought no task: others were faster
        self.armed = False  # a change of pending or paused will be told
        self.arm_at = 0.0  # no look before this, by the event loop's clock
        self.left: bytes | None = None  # the task that the last look left to others
        self.due_known = False  # due_at holds, and a change of it will be told
        self.due_at: float | None = None  # when the next delayed task is due, likewise
        self.refused_until = 0.0  # Redis refuses requests for this queue: not before, likewise

    def found(self, tasks: int, wanted: int, now: float, *, more: bool = False) -> None:
        """Note what a request for up to `wanted` tasks brought, and whether `more` is pending.

        `now` is the event loop's clock.
        """
        self.turn -= (wanted - tasks) / self.weight
        if tasks:
            self.fruitless = 0
            self.told = False
            self.arm_at = now
        else:
            self._in_vain(now)
        self.empty = not more
        if self.empty:
            self.rejoins = True
            self.armed = False
            self.in_flight.unarmed.set()

    def wake(self) -> None:
        """Something may be pending: ask again."""
        self.armed = False
        self.told = True
        if self.empty:
            self.empty = False
            self.in_flight.changed.set()

    # Of a hundred idle servers that hear of one push, one gets the task. Were all to ask at
    # once, each push would cost Redis a hundred calls. So a lane that asked in vain a few times
    # leaves new tasks to those that were faster: it only looks, after a pause that grows with
    # the number of servers, and asks for what it finds left lying. It asks at once again when
    # it has got a task; so a few lanes serve a queue while they can, and others join as soon
    # as tasks wait.
    #
    # No change is lost by that. An empty lane is either armed, so that the next change is told,
    # or it will look at `arm_at`, and a look sees whatever changed before it, told or not; or a
    # request waits in Redis, or is about to.

    def is_to_be_armed(self) -> bool:
        """Whether a change of this lane would pass unnoticed."""
        if not self.empty or self.armed or self.awaited:
            return False
        return not (self.awaitable and not self.in_flight.running)

    def tell(self, now: float) -> None:
        """A change was told: ask again, or look in a moment. `now` is the event loop's clock."""
        if not self.armed:
            return  # an old change: it is asked for, or looked at, after this
        self.armed = False
        if self.awaited:
            return  # whoever waits longest gets the task
        if self.fruitless < PATIENCE:
            self.wake()
        else:
            self.told = True
            self.arm_at = max(self.arm_at, now + self._spread_s() / 10)
            self.in_flight.unarmed.set()

    def looked(self, oldest: Sequence[bytes], now: float) -> None:
        """Note the oldest ids in pending, two at most, none if the queue is paused."""
        if not self.empty:
            return  # it is asked anyway
        if not oldest:
            self._in_vain(now)
        elif self.fruitless >= PATIENCE and len(oldest) == 1 and oldest[0] != self.left:
            # New, so left to others; or another than the one left to them: they are at work.
            is_first = self.left is None
            self.left = oldest[0] if is_first else None
            self.armed = False
            self.arm_at = now + (TO_OTHERS_S if is_first else self._spread_s())
        else:
            self.wake()

    def _in_vain(self, now: float) -> None:
        self.left = None
        if self.told:
            self.told = False
            self.fruitless += 1
            if self.fruitless >= PATIENCE:
                self.arm_at = now + self._spread_s()

    def _spread_s(self) -> float:
        return random.uniform(0, min(SPREAD_S * self.in_flight.servers, LONGEST_SPREAD_S))

    def room(self, places: int, asked: int = 0) -> int:
        """How many of the free places this queue may take, when `asked` tasks are on their way."""
        if self.limit is None:
            return places
        return max(0, min(places, self.limit - len(self.runs) - asked))


class InFlight:
    """All lanes of a server, and the places that tasks run in."""

    def __init__(
        self,
        queues: dict[str, int],
        concurrency: int,
        annotate: Annotate,
        limits: dict[str, int] | None = None,
        prefetch: int = 0,
    ) -> None:
        self.concurrency = concurrency
        self.prefetch = prefetch
        self.annotate = annotate
        limits = limits or {}
        self.lanes = {
            queue: Lane(self, queue, weight, limits.get(queue)) for queue, weight in queues.items()
        }
        self.running = 0
        self.servers = SERVERS_UNKNOWN  # all that Redis knows of, this one among them
        self.waiting: deque[Run] = deque()  # taken ahead, each for the next place that is free
        self.clock_offset = 0.0  # Redis's clock minus ours, from the last answer
        self.changed = asyncio.Event()  # an outcome, a free place, or a queue to ask again
        self.unarmed = asyncio.Event()  # there are lanes whose changes would not be told
        self.due_changed = asyncio.Event()  # a lane's due_at is new
        self._idle: asyncio.Event | None = None  # made when somebody waits

    @property
    def free(self) -> int:
        """How many more tasks may be taken now."""
        return self.concurrency + self.prefetch - self.running - len(self.waiting)

    def now(self) -> float:
        """Unix seconds by Redis's clock, as near as the last answer tells."""
        return time.time() + self.clock_offset

    def runs(self) -> Iterator[Run]:
        """Every run, in the order of lanes."""
        for lane in self.lanes.values():
            # A copy in one step: the heartbeat reads from its own thread.
            yield from list(lane.runs.values())

    def find(self, task_id: str) -> list[Run]:
        """The runs of tasks with this id; ids are unique only within a queue."""
        return [lane.runs[task_id] for lane in self.lanes.values() if task_id in lane.runs]

    def add(self, run: Run) -> bool:
        """Give a run a place, or let it wait for one; return whether it may begin."""
        run.lane.runs[run.id] = run
        if self.running < self.concurrency:
            self.running += 1
            return True
        run.waits = True
        self.waiting.append(run)
        return False

    def next_waiting(self) -> Run | None:
        """Give the next run that waits a free place, if there are both."""
        if not self.waiting or self.running >= self.concurrency:
            return None
        run = self.waiting.popleft()
        run.waits = False
        self.running += 1
        return run

    def end(self, run: Run, outcome: Outcome | None) -> None:
        """Give the place back and leave the outcome (`None`: nothing to save) to the pump."""
        lane = run.lane
        if lane.runs.get(run.id) is not run:
            return  # written off before
        del lane.runs[run.id]
        run.over = True
        run.task = None
        if run.waits:
            self.waiting.remove(run)
        else:
            self.running -= 1
        if not self.running and self._idle is not None:
            self._idle.set()
        if run.timer is not None:
            run.timer.cancel()
        if outcome is not None:
            lane.ended.append(Ended(run.id, run.mark, run.message.unique_key, outcome))
        self.changed.set()

    def put_back(self, lane: Lane, task_id: str, mark: int) -> None:
        """Leave a task that was taken but not started to the pump, to be put back."""
        lane.ended.append(Ended(task_id, mark, "", REQUEUE))
        self.changed.set()

    async def idle(self) -> None:
        """Wait until nothing runs."""
        while self.running:
            if self._idle is None or self._idle.is_set():
                self._idle = asyncio.Event()
            await self._idle.wait()

    def unsaved(self) -> int:
        """How many outcomes wait to be saved."""
        return sum(len(lane.ended) for lane in self.lanes.values())


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
