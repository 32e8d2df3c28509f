"""Takes one message through the mux under its deadline, to an outcome; knows no broker."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from inspect import isawaitable
from typing import Any, Final, TypeAlias

from asyncq.clock import seconds
from asyncq.context import Context, current
from asyncq.errors import AsyncqError, InvalidPayloadError, LeaseExpiredError
from asyncq.handler import Entry
from asyncq.message import TaskMessage, completed, failed
from asyncq.mux import Routes
from asyncq.options import DEFAULT_TIMEOUT_S
from asyncq.outcome import DONE, REQUEUE, Outcome
from asyncq.payload import encode
from asyncq.retry import Retry, RetryDelay, RevokeTask, SkipRetry, Snooze, asynq_delay
from asyncq.server.in_flight import (
    CANCELED,
    DEADLINE,
    LEASE_LOST,
    SHUTDOWN,
    InFlight,
    Lane,
    Run,
)

log = logging.getLogger("asyncq.server")

ErrorHandler: TypeAlias = Callable[[Context[Any], BaseException], Awaitable[None] | None]
"""Called with the context and the error of every run that failed."""
IsFailure: TypeAlias = Callable[[BaseException], bool]

NEAR_S: Final = 2.0
"""A deadline nearer than this has its own timer; `watch` gives the others one when it is time.

Nearly all tasks end long before their deadline, so most runs never need a timer.
"""
SPRINT_S: Final = 0.005  # after so long the event loop gets its turn between two handlers
_UNSET: Final = object()
WRITE_OFF_S: Final = 5.0  # how long a cancelled handler may go on before its place is given away


class Execution:
    """Starts runs and turns what they end with into outcomes.

    Every run begins with the context variables of the moment in which this is made.
    """

    def __init__(
        self,
        in_flight: InFlight,
        routes: Routes,
        *,
        retry_delay: RetryDelay = asynq_delay,
        is_failure: IsFailure | None = None,
        error_handler: ErrorHandler | None = None,
        client: Any = None,
    ) -> None:
        self._in_flight = in_flight
        self._retry_delay = retry_delay
        self._is_failure = is_failure
        self._error_handler = error_handler
        self._client = client
        self._routes = routes
        self._loop = asyncio.get_running_loop()
        # Not later: what starts a run may be the answer of Redis, which comes in the context of
        # who opened the connection.
        self._context = copy_context()
        self._variables = tuple(self._context.items())
        self._batch: deque[Run] | None = None  # runs that begin when the event loop comes round
        self._next: asyncio.Future[deque[Run]] | None = None  # what a task that is made waits for
        self.handlers_wait = False  # one of the last batch did, and left others to begin after it

    def start(self, lane: Lane, message: TaskMessage, mark: int, now: float) -> None:
        """Begin a run, or let it wait for a place; `now`: unix seconds by Redis's clock."""
        run = Run(lane, message, mark)
        if self._in_flight.add(run):
            self._start(run, now)

    def make_ready(self) -> asyncio.Future[deque[Run]]:
        """Make the task of the next run ahead: after a rest the run would wait 30 µs for it.

        Returns what it waits for.
        """
        if self._next is None or self._next.done():  # cancelled with every task of the loop
            self._next = self._loop.create_future()
            self._create_task(self._sprint(self._next))
        return self._next

    def put_back_waiting(self) -> None:
        """Put back what was taken ahead and has not begun; the server takes no more."""
        if self._next is not None:
            self._next.cancel()
        for run in reversed(list(self._in_flight.waiting)):  # the last is the next to be taken
            self._in_flight.end(run, REQUEUE)

    def _start(self, run: Run, now: float) -> None:
        loop = self._loop
        run.client = self._client
        run.started_at = now
        run.deadline_at = deadline_at = _deadline(run.message, now)
        left_s = deadline_at - now
        run.ends_at = loop.time() + left_s
        if left_s <= 0:  # over before it began, so the handler is not called
            run.cancel(DEADLINE)
        elif left_s < NEAR_S:
            run.timer = loop.call_later(left_s, run.cancel, DEADLINE)
        if self._batch is not None:
            self._batch.append(run)
            return
        self._batch = batch = deque((run,))
        self._begin(batch)

    def _begin(self, batch: deque[Run]) -> None:
        self.make_ready().set_result(batch)
        self._next = None
        self._loop.call_soon(self._begun, batch)  # comes right after the task has begun with it

    def _create_task(self, run: Coroutine[Any, Any, None]) -> None:
        # The event loop holds a task until its first step, from then on its run does, or `_next`.
        self._loop.create_task(run, context=self._context.copy())

    async def _sprint(self, begins: asyncio.Future[deque[Run]]) -> None:
        """Do runs one after the other in this one task, as long as no handler waits.

        A task for each would cost more than all else that is done for a handler that never
        waits. From a handler that does wait on, the task is that run's own, and `_spread` gives
        each of the others one of theirs. So nothing passes from run to run: not a cancellation,
        and no context variable either, since a run that leaves one set is the last here.
        """
        batch = await begins
        self._batch = None
        task: Any = asyncio.current_task()
        ends_at = time.monotonic() + SPRINT_S
        while batch:
            await self._run(batch.popleft(), task)
            # One that was cancelled and uncancelled still raises at its next wait (_must_cancel).
            if task.cancelling() or task._must_cancel or not self._is_clean():
                self._spread(batch)
            elif batch and time.monotonic() >= ends_at:
                rest = deque(batch)
                batch.clear()
                self._begin(rest)

    def _begun(self, batch: deque[Run]) -> None:
        """Note whether a handler that waits ended the sprint's first turn, and start the rest."""
        self.handlers_wait = bool(batch)
        self._spread(batch)

    def _spread(self, batch: deque[Run]) -> None:
        """Start a task for each run of a batch that has not begun."""
        if self._batch is batch:  # its sprint was cancelled before it took the batch
            self._batch = None
        while batch:
            self._create_task(self._run(batch.popleft()))

    def _is_clean(self) -> bool:
        """Whether the last run here left every context variable as it was."""
        before = self._variables
        if len(copy_context()) != len(before):
            return False
        for variable, value in before:  # noqa: SIM110 - a generator costs more than all else here
            # By identity: what is equal may be another's, and comparing runs the user's code.
            if variable.get(_UNSET) is not value:
                return False
        return True

    async def _run(self, run: Run, task: asyncio.Task[None] | None = None) -> None:
        run.begun = True
        # Not before: a task cancelled before its first step never runs, and leaves no outcome.
        run.task = task or asyncio.current_task()
        entry = self._routes.find(run.message.type)
        context: Context[Any] = Context(run)
        token = current.set(context)
        run.state = entry.state
        run.holds_place = entry.kind == "thread"
        outcome: Outcome | None
        try:
            if run.cancel_reason is not None:  # before it began, so the handler is not called
                raise asyncio.CancelledError(run.cancel_reason)
            result = await entry.call(run.message.payload, context)
            outcome = self._succeeded(run, result)
        except BaseException as error:  # SystemExit from a handler must not end the server
            try:
                outcome = await self._failed(run, entry, context, error)
            except BaseException:  # a run that never ends would keep its place and lease for ever
                log.exception("the failure of task %r could not be dealt with", run.message.id)
                outcome = self._failure(run, entry, CancelledRun("the error cannot be shown"))
        current.reset(token)
        self._end(run, outcome)

    def _end(self, run: Run, outcome: Outcome | None) -> None:
        self._in_flight.end(run, outcome)
        while self._in_flight.waiting and (waiting := self._in_flight.next_waiting()) is not None:
            self._start(waiting, self._in_flight.now())

    def counts(self, task_type: str, error: BaseException) -> bool:
        """Whether an error of a task of this type is a failure that spends a retry."""
        return self._counts(self._routes.find(task_type), error)

    def watch(self) -> int:
        """Give near deadlines their timer and write off what ignores its cancellation.

        Returns the number of runs written off.
        """
        loop = self._loop
        now, written_off = loop.time(), 0
        for run in self._in_flight.runs():
            if run.cancelled_at is not None:
                if run.waits:  # for handlers that may take hours
                    self._end(run, self._interrupted(run, self._routes.find(run.message.type)))
                elif now - run.cancelled_at > WRITE_OFF_S and not run.holds_place:
                    self._write_off(run)
                    written_off += 1
            elif run.timer is None and run.ends_at - now < NEAR_S:
                run.timer = loop.call_at(run.ends_at, run.cancel, DEADLINE)
        return written_off

    def abandon(self) -> int:
        """Put back what still runs and cannot be waited for any longer; return how many."""
        runs = list(self._in_flight.runs())
        for run in reversed(runs):  # the last to be put back is the next to be taken
            self._end(run, REQUEUE)
        return len(runs)

    def _write_off(self, run: Run) -> None:
        message = run.message
        log.error(
            "task %r (%r) ignores its cancellation (%s): its place is given away, "
            "the handler may go on",
            message.id, message.type, run.cancel_reason,
        )  # fmt: skip
        self._end(run, self._interrupted(run, self._routes.find(message.type)))

    def _succeeded(self, run: Run, result: Any) -> Outcome | None:
        if run.cancel_reason is not None and run.cancel_reason != SHUTDOWN:
            raise asyncio.CancelledError(run.cancel_reason)  # it swallowed its cancellation
        message = run.message
        if not message.retention:
            return DONE
        now = self._in_flight.now()
        return Outcome(
            "complete",
            math.ceil(now) + message.retention,
            completed(message, int(now)),
            encode(result),
        )

    async def _failed(
        self, run: Run, entry: Entry, context: Context[Any], error: BaseException
    ) -> Outcome | None:
        if run.cancel_reason in (LEASE_LOST, SHUTDOWN):
            return self._interrupted(run, entry)
        if run.cancel_reason is not None:  # whatever else the handler raised on its way out
            error = CancelledRun(run.cancel_reason)
        elif isinstance(error, Snooze):
            return self._snoozed(run, error)
        await self._tell(context, error)
        return self._failure(run, entry, error)

    def _interrupted(self, run: Run, entry: Entry) -> Outcome | None:
        """The outcome of a run that its reason to be cancelled decides alone."""
        if run.cancel_reason == LEASE_LOST:
            log.warning(
                "task %r (%r) lost its lease: its outcome is dropped, another worker may have it",
                run.message.id, run.message.type,
            )  # fmt: skip
            return None
        if run.cancel_reason == SHUTDOWN:
            return REQUEUE
        return self._failure(run, entry, CancelledRun(run.cancel_reason or CANCELED))

    async def _tell(self, context: Context[Any], error: BaseException) -> None:
        if self._error_handler is None:
            return
        try:
            answer = self._error_handler(context, error)
            if isawaitable(answer):
                await answer
        except BaseException:  # the outcome of the task must not depend on it
            log.exception("the error handler failed for task %r", context.task_id)

    def _failure(self, run: Run, entry: Entry, error: BaseException) -> Outcome:
        message, text = run.message, error_text(error)
        now = self._in_flight.now()
        if isinstance(error, RevokeTask):
            return DONE
        if (
            run.final
            or message.retried >= message.retry
            or isinstance(error, SkipRetry | InvalidPayloadError)
        ):
            _log(logging.ERROR, message, text, "is archived", error)
            return Outcome("archive", 0, failed(message, text, int(now), retried=False))
        counts = self._counts(entry, error)
        delay_s = self._delay(entry, error, run)
        _log(logging.WARNING, message, text, f"is retried in {delay_s:.3g} s", error)
        return Outcome(
            "retry" if counts else "retry_uncounted",
            math.ceil((now + delay_s) * 1000),
            failed(message, text, int(now), retried=counts),
        )

    def _counts(self, entry: Entry, error: BaseException) -> bool:
        is_failure = entry.is_failure or self._is_failure
        if is_failure is None:
            return True
        try:
            return bool(is_failure(error))
        except BaseException:
            log.exception("is_failure itself failed, so the failure counts")
            return True

    def _delay(self, entry: Entry, error: BaseException, run: Run) -> float:
        if isinstance(error, Retry):
            return error.delay_s
        retried, task = run.message.retried, Context(run).task
        policy = entry.retry_delay or self._retry_delay
        try:
            delay = seconds(policy(retried, error, task), "the retry delay", least=None)
            return max(0.0, delay)
        except BaseException:
            log.exception("the retry delay policy itself failed: Asynq's delay is taken")
            return asynq_delay(retried, error, task)

    def _snoozed(self, run: Run, error: Snooze) -> Outcome:
        due_ms = math.ceil((self._in_flight.now() + error.delay_s) * 1000)
        return Outcome("snooze", due_ms, run.message.SerializeToString())


class CancelledRun(AsyncqError):
    """What a run failed with that was cancelled: by its deadline, or by its id."""


def error_text(error: BaseException) -> str:
    """Return what is kept as a task's error: the type and text, or Asynq's own text."""
    try:
        text = str(error)
    except Exception:
        text = "its text cannot be shown"
    if isinstance(error, SkipRetry):
        return text or "skip retry for the task"
    if isinstance(error, RevokeTask):
        return text or "revoke task"
    if isinstance(error, AsyncqError | Retry):
        return text
    if isinstance(error, asyncio.CancelledError):
        return CANCELED
    name = type(error).__name__
    return f"{name}: {text}" if text else name


def _deadline(message: TaskMessage, now: float) -> float:
    if message.timeout > 0 and message.deadline > 0:
        return min(now + message.timeout, float(message.deadline))
    if message.deadline > 0:
        return float(message.deadline)
    return now + (message.timeout if message.timeout > 0 else DEFAULT_TIMEOUT_S)


def _log(level: int, message: TaskMessage, text: str, then: str, error: BaseException) -> None:
    expected = isinstance(error, CancelledRun | LeaseExpiredError | AsyncqError | Retry | SkipRetry)
    log.log(
        level,
        "task %r (%r) of queue %r failed and %s: %s",
        message.id, message.type, message.queue, then, ascii(text)[1:-1],
        exc_info=None if expected else error,
        extra={"task_id": message.id, "task_type": message.type, "queue": message.queue},
    )  # fmt: skip
