"""The pump saves outcomes and takes new tasks, in one script call a queue."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from functools import partial
from typing import Final

from asyncq.broker.broker import BATCH, Answered, Broker, Request
from asyncq.broker.connection import EndWait
from asyncq.errors import BrokerError, BrokerUnavailableError, MalformedMessageError
from asyncq.message import decode, quarantined
from asyncq.outcome import Ended, Outcome
from asyncq.server.dealing import dealt
from asyncq.server.execution import Execution
from asyncq.server.in_flight import LEASE_LOST, InFlight, Lane
from asyncq.server.loop import Backoff, Trouble

log = logging.getLogger("asyncq.server")

RUN_LATER_S: Final = 1.0
HURRIED_PAUSE_S: Final = 0.1  # between two tries to save outcomes while the server stops

HANDS: Final = 3  # with four, the calls are smaller, and no place is filled sooner
HANDS_IN_A_SPRINT: Final = 2  # while no handler waits: smaller calls cost more than they bring
WORTH_OVERLAPPING: Final = 16  # tasks; for fewer another call costs more than it gains


class Hand:
    """One that works the pump: it has at most one call to Redis under way.

    `name` is that under which the scripts keep its last answer. `wanted` is set while it is to
    help. `unanswered`: requests whose answer has not come, to be sent again as they are. `backoff`
    is its own: were it shared, one outage would count as many as there are calls under way.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.wanted = asyncio.Event()
        self.backoff = Backoff()
        self.unanswered: dict[Lane, Request] = {}


class Pump:
    """Batches by pressure, not by timer: while one round trip is under way the next batch gathers.

    A task is taken only when a place is free. Places are dealt by weight to the queues not
    known to be empty; with `strict`, the queues are asked one after the other, highest first.

    While there is a backlog a second hand helps, each taking its share of the places: so the tasks
    of one run here while Redis works for the other, and neither waits for the other's end. While
    handlers wait, places become free at any time, and a third has them filled without waiting
    for an answer to the others.
    """

    def __init__(
        self,
        broker: Broker,
        in_flight: InFlight,
        execution: Execution,
        server_id: str,
        *,
        strict: bool = False,
    ) -> None:
        self._broker = broker
        self._in_flight = in_flight
        self._execution = execution
        self._strict = strict
        self._capacity = in_flight.concurrency + in_flight.prefetch
        # Strictly, a second call would take lower tasks while the first asks higher up.
        hands = 1 if strict else max(1, min(HANDS, self._capacity // WORTH_OVERLAPPING))
        self._first, *self._others = self._hands = [
            Hand(server_id), *(Hand(f"{server_id}.{i}") for i in range(2, hands + 1))
        ]  # fmt: skip
        self._sharing = self._hands[:1]  # those that share the work at present
        self._waiter = Hand(f"{server_id}.0")  # has Redis wait while the others rest
        self._all = (*self._hands, self._waiter)
        self._lanes = sorted(in_flight.lanes.values(), key=lambda lane: -lane.weight)
        self._may_wait = len(self._lanes) == 1
        self._lanes[0].awaitable = self._may_wait
        self._sequences = itertools.count(1)
        self._trouble = Trouble("pump")
        self._refusals: dict[Lane, Trouble] = {}
        self._stopping = asyncio.Event()  # what a fetch under way brings is put back
        self._quiet = asyncio.Event()  # the last tick found nothing to do
        self._end_wait: EndWait | None = None  # of the request that Redis holds
        self._ending: asyncio.Future[None] | None = None  # that, at the stop
        self._failed: BaseException | None = None  # what `_received` raised
        self._ended = False  # `run`, so that nothing is saved any more

    def stop_fetching(self) -> None:
        """Take no more tasks, and put back what was taken ahead; outcomes are still saved."""
        self._stopping.set()
        self._share_among(1)
        self._execution.put_back_waiting()
        self._in_flight.changed.set()
        if self._end_wait is not None and self._ending is None:
            # Beside the hands: its connection may be dead, and they have outcomes to save.
            self._ending = asyncio.ensure_future(self._end_wait())

    async def run(self) -> None:
        """Pump until cancelled. A fetch under way must not be: await `drained` first."""
        try:
            async with asyncio.TaskGroup() as hands:
                hands.create_task(self._work())
                for other in self._others:
                    hands.create_task(self._help(other))
        finally:
            self._ended = True
            self._quiet.set()

    async def _work(self) -> None:
        while True:
            await _let_begin()
            self._in_flight.changed.clear()
            if not await self.tick():
                if not self._under_way():
                    self._quiet.set()
                    await self._wait()
                await self._in_flight.changed.wait()
                if self._failed is not None:
                    raise self._failed

    async def _wait(self) -> None:
        """While nothing runs here, have Redis hold a request until there is a task.

        Only for a server of one queue, since each would need a connection. Not while a handler
        runs: one that blocks the event loop would hold up a task that another server could run.
        """
        lane = self._lanes[0]
        if not self._is_to_wait(lane) or self._hold(lane):
            return
        try:
            await self._broker.ping()  # opens a connection, if all were in use
            self._answers(self._first)
        except BrokerUnavailableError as error:
            await self._pause(self._first, error)
        except BrokerError:  # refused
            lane.awaitable = False
            self._in_flight.unarmed.set()
        self._in_flight.changed.set()  # whatever came meanwhile may have woken another hand only

    def _is_to_wait(self, lane: Lane) -> bool:
        if not (lane.empty and lane.awaitable) or lane.awaited or self._in_flight.running:
            return False
        if self._refused(lane):
            lane.awaitable = False
            self._in_flight.unarmed.set()
        return lane.awaitable and not self._stopping.is_set()

    def _hold(self, lane: Lane) -> bool:
        request = Request(lane.queue, next(self._sequences), want=1, held=True)
        self._end_wait = self._broker.receive(
            self._waiter.name, request, partial(self._received, lane, request)
        )
        if self._end_wait is None:
            return False
        self._waiter.unanswered[lane] = request
        lane.turn += request.want / lane.weight
        lane.awaited = True
        self._execution.make_ready()
        return True

    def _received(
        self, lane: Lane, request: Request, answer: Answered | BrokerError, in_vain: bool
    ) -> None:
        """Start the task first: it is waited for, and what is to be noted is not."""
        try:
            if isinstance(answer, Answered):
                self._start(lane, answer)
        except BaseException as error:  # no task of ours would end by it
            self._failed = error
        asyncio.get_running_loop().call_soon(self._settle, lane, request, answer, in_vain)

    def _settle(
        self, lane: Lane, request: Request, answer: Answered | BrokerError, in_vain: bool
    ) -> None:
        self._end_wait = None
        lane.awaited = request.held = False
        lane.awaitable = not in_vain  # until it has a task again
        if not isinstance(answer, BrokerUnavailableError):  # else it is sent again
            del self._waiter.unanswered[lane]
        try:
            if isinstance(answer, Answered):
                self._note(lane, request, answer)
            elif not isinstance(answer, BrokerUnavailableError):
                self._put_off(lane, request, answer)
        except BaseException as error:
            self._failed = error
        self._in_flight.changed.set()

    async def _help(self, hand: Hand) -> None:
        """Work as well while there is a backlog, and a share of it for this hand.

        When it stops asking, it wakes the first: what is left is for that one to ask for, or to
        wait for, and the change that told of it may have woken this hand only.
        """
        brought = False
        while True:
            if not hand.unanswered:
                await hand.wanted.wait()
            await _let_begin()
            self._in_flight.changed.clear()
            if await self._turn(hand):
                brought = True
                if self._stopping.is_set() or not hand.wanted.is_set():
                    self._in_flight.changed.set()
            elif brought:
                brought = False
                self._in_flight.changed.set()
            else:
                await self._in_flight.changed.wait()

    def owes(self) -> bool:
        """Whether there is more than a lost request for one task: it is worth waiting for."""
        held = any(request.held for request in self._waiter.unanswered.values())
        return held or any(hand.unanswered for hand in self._hands) or self.unsaved() > 0

    def unsaved(self) -> int:
        """How many outcomes Redis has not confirmed, those on their way included."""
        sent = sum(len(request.outcomes) for request in self._unanswered())
        return sent + self._in_flight.unsaved()

    async def drained(self) -> None:
        """Wait until no request is unanswered and every outcome is saved, or `run` has ended."""
        self._in_flight.changed.set()
        while not self._ended and (self._unanswered() or self._in_flight.unsaved()):
            self._quiet.clear()
            await self._quiet.wait()

    async def tick(self) -> int:
        """Do one round trip for every queue that needs one; return the number of requests."""
        again = {lane: one for lane, one in self._waiter.unanswered.items() if not one.held}
        if again:
            await self._send(self._waiter, again)
        asked = await (self._one_after_the_other() if self._strict else self._turn(self._first))
        return len(again) + asked

    async def _turn(self, hand: Hand) -> int:
        requests = self._requests(hand)
        await self._send(hand, requests)
        return len(requests)

    async def _one_after_the_other(self) -> int:
        """Ask each queue only when those above it have been asked in this round.

        A queue above that is known to be empty is asked as well: whoever enqueued there a
        moment ago may have had the answer before we were told.
        """
        sent = 0
        last = max((i for i, lane in enumerate(self._lanes) if not lane.empty), default=-1)
        for i, lane in enumerate(self._lanes):
            want = self._room(lane, self._places()) if i <= last else 0
            requests = self._request(self._first, lane, min(want, BATCH))
            await self._send(self._first, requests)
            sent += len(requests)
        return sent

    def _requests(self, hand: Hand) -> dict[Lane, Request]:
        places = self._part(self._places(), self._capacity // len(self._sharing))
        worth = places + self._in_flight.unsaved() >= WORTH_OVERLAPPING
        if hand is not self._first and not hand.unanswered and not worth:
            return {}
        wants = self._share(hand, places)
        requests: dict[Lane, Request] = {}
        for lane in self._lanes:
            requests |= self._request(hand, lane, wants.get(lane, 0))
        return requests

    def _request(self, hand: Hand, lane: Lane, want: int) -> dict[Lane, Request]:
        """What to ask of one queue, if anything; an unanswered request goes first, as it is."""
        if again := hand.unanswered.get(lane):
            return {lane: again}
        if (not want and not lane.ended) or self._refused(lane):
            return {}
        if self._stopping.is_set() and lane.ended:
            if self._under_way():  # what it brings goes back before
                return {}
            _last_taken_first(lane.ended)
        request = Request(lane.queue, next(self._sequences), want)
        request.save_from(lane.ended, self._part(len(lane.ended), BATCH))
        lane.turn += want / lane.weight
        return {lane: request}

    def _part(self, n: int, most: int) -> int:
        """What a hand takes of `n`: all, or a part for each that is free while hands share it.

        A part is not less than is worth a call, if there is so much, and `most` at most.
        """
        if len(self._sharing) == 1:
            return n
        free = sum(not hand.unanswered for hand in self._sharing) or 1
        return min(n, most, max(WORTH_OVERLAPPING, -(-n // free)))

    def _share_among(self, hands: int) -> None:
        """Have so many hands share the work, as far as there are so many."""
        self._sharing = self._hands[:hands]
        for hand in self._others:
            if hand in self._sharing:
                hand.wanted.set()
            else:
                hand.wanted.clear()

    def _unanswered(self) -> list[Request]:
        return [request for hand in self._all for request in hand.unanswered.values()]

    def _under_way(self) -> list[Request]:
        return [request for request in self._unanswered() if not request.held]

    def _refused(self, lane: Lane) -> bool:
        return lane.refused_until > asyncio.get_running_loop().time()

    def _places(self) -> int:
        if self._stopping.is_set():
            return 0
        asked = sum(request.want for request in self._unanswered())
        return max(0, self._in_flight.free - asked)

    def _room(self, lane: Lane, places: int) -> int:
        asked = [hand.unanswered[lane] for hand in self._all if lane in hand.unanswered]
        return lane.room(places, sum(request.want for request in asked))

    def _share(self, hand: Hand, places: int) -> dict[Lane, int]:
        """Deal places to the queues that this hand may ask."""
        rooms = {
            lane: min(room, BATCH)
            for lane in self._lanes
            if not lane.empty
            and lane not in hand.unanswered
            and not self._refused(lane)
            and (room := self._room(lane, places)) > 0
        }
        return rooms if len(rooms) <= 1 else dealt(places, rooms)

    async def _send(self, hand: Hand, requests: dict[Lane, Request]) -> None:
        if not requests:
            return
        hand.unanswered |= requests
        try:
            answers = await self._broker.pump(hand.name, list(requests.values()))
        except BrokerUnavailableError as error:
            await self._pause(hand, error)
            return
        except BrokerError as error:  # refused before any queue was asked
            answers = [error] * len(requests)
        self._answers(hand)
        for (lane, request), answer in zip(list(requests.items()), answers, strict=True):
            if not isinstance(answer, BrokerUnavailableError):  # else it is sent again, as it is
                self._answer(hand, lane, request, answer)
        if unavailable := next((a for a in answers if isinstance(a, BrokerUnavailableError)), None):
            await self._pause(hand, unavailable)

    def _answer(
        self, hand: Hand, lane: Lane, request: Request, answer: Answered | BrokerError
    ) -> None:
        del hand.unanswered[lane]
        if isinstance(answer, BrokerError):
            self._put_off(lane, request, answer)
        else:
            self._start(lane, answer)
            self._note(lane, request, answer)

    def _answers(self, hand: Hand) -> None:
        self._trouble.over()
        hand.backoff.over()

    async def _pause(self, hand: Hand, error: BrokerUnavailableError) -> None:
        self._trouble.say(error)
        pause_s = hand.backoff.next_s()
        try:
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()
        except TimeoutError:
            pass
        else:
            await asyncio.sleep(min(pause_s, HURRIED_PAUSE_S))

    def _put_off(self, lane: Lane, request: Request, error: BrokerError) -> None:
        """Redis refused one queue, and changed nothing: the others go on meanwhile."""
        trouble = self._refusals.setdefault(lane, Trouble(f"queue {lane.queue!r}"))
        pause_s = trouble.pause_s(error)
        loop = asyncio.get_running_loop()
        lane.refused_until = loop.time() + pause_s
        lane.turn -= request.want / lane.weight
        lane.ended.extendleft(reversed(request.outcomes))
        self._in_flight.unarmed.set()
        loop.call_later(pause_s + 0.001, self._in_flight.changed.set)

    def _start(self, lane: Lane, answer: Answered) -> None:
        """Start the tasks that came; put them back if the server stops."""
        self._in_flight.clock_offset = answer.now - time.time()
        stopping = self._stopping.is_set()
        ids, messages = answer.ids, answer.messages
        if stopping:  # the last to be put back is the next to be taken
            ids, messages = ids[::-1], messages[::-1]
        for task_id, raw in zip(ids, messages, strict=True):
            try:
                message = decode(task_id, lane.queue, raw)
            except MalformedMessageError as error:
                self._quarantine(lane, task_id, answer.mark, raw, error)
                continue
            if stopping:
                self._in_flight.put_back(lane, task_id, answer.mark)
            elif task_id in lane.runs:
                self._run_later(lane, task_id, answer, raw)
            else:
                self._execution.start(lane, message, answer.mark, answer.now)

    def _note(self, lane: Lane, request: Request, answer: Answered) -> None:
        """Note what an answer tells of its queue."""
        if trouble := self._refusals.pop(lane, None):
            trouble.over()
        _report(lane.queue, answer)
        if request.want:
            got = len(answer.ids) + len(answer.ghosts)
            now = asyncio.get_running_loop().time()
            lane.found(got, request.want, now, more=answer.more)
            if got:
                lane.awaitable = self._may_wait
            if lane.empty and all(lane.empty for lane in self._lanes):
                self._share_among(1)
            elif got >= WORTH_OVERLAPPING and not self._stopping.is_set():
                handlers_wait = self._execution.handlers_wait
                self._share_among(HANDS if handlers_wait else HANDS_IN_A_SPRINT)

    def _run_later(self, lane: Lane, task_id: str, answer: Answered, raw: bytes) -> None:
        """An earlier run that lost its lease has not ended: two at a time would be worse."""
        lane.runs[task_id].cancel(LEASE_LOST)
        at_ms = int((answer.now + RUN_LATER_S) * 1000)
        lane.ended.append(Ended(task_id, answer.mark, "", Outcome("snooze", at_ms, raw)))
        self._in_flight.changed.set()

    def _quarantine(
        self, lane: Lane, task_id: str, mark: int, raw: bytes, error: MalformedMessageError
    ) -> None:
        log.error(
            "task %r of queue %r is quarantined in archived, its bytes are kept: %s",
            task_id, lane.queue, error,
        )  # fmt: skip
        message = quarantined(task_id, lane.queue, raw, str(error), int(self._in_flight.now()))
        lane.ended.append(Ended(task_id, mark, "", Outcome("quarantine", 0, message)))
        self._in_flight.changed.set()


async def _let_begin() -> None:
    """Let runs that can begin do so first: to send means to wake Redis, which can take longer.

    In the first turn of the event loop a sprint begins, in the second those that it did not do.
    """
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def _last_taken_first(ended: deque[Ended]) -> None:
    """Put in order what is put back: each goes in front of the one before."""
    ordered = sorted(ended, key=lambda one: -one.mark)
    ended.clear()
    ended.extend(ordered)


def _report(queue: str, answer: Answered) -> None:
    for task_id in answer.refused:
        log.warning(
            "task %r of queue %r: the lease was lost before its outcome was saved; another "
            "worker has the task, and the outcome is dropped",
            task_id, queue,
        )  # fmt: skip
    for task_id, error in answer.broken:
        log.error(
            "queue %r: Redis could not carry on with task %r: %s", queue, task_id or "-", error
        )
    for task_id in answer.ghosts:
        log.warning("task %r of queue %r is gone: only its id was pending", task_id, queue)
