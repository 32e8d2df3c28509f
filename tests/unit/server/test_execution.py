"""What a run ends with: one message through the mux, to an outcome, without any Redis."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from asyncq import Context, Mux, Retry, RevokeTask, SkipRetry, Snooze, Task, current_context
from asyncq.handler import Next
from asyncq.message import TaskMessage
from asyncq.outcome import Outcome
from asyncq.server.execution import WRITE_OFF_S, Execution, error_text
from asyncq.server.executors import Executors
from asyncq.server.in_flight import CANCELED, DEADLINE, LEASE_LOST, SHUTDOWN, InFlight, Lane, Run

NOW = 1_800_000_000.0


class Payload(BaseModel):
    user_id: int


class World:
    """An execution of one mux, and the lane it takes messages from."""

    def __init__(self, mux: Mux, **options: Any) -> None:
        self.in_flight = InFlight({"default": 1}, 10, self._annotate)
        self.in_flight.clock_offset = NOW - time.time()
        self.lane: Lane = self.in_flight.lanes["default"]
        self.execution = Execution(self.in_flight, **options)
        self.execution.routes = mux.compile(Executors(10).run)

    async def _annotate(self, queue: str, task_id: str, mark: int, name: str, value: bytes) -> bool:
        return True

    def start(self, now: float = NOW, **fields: Any) -> Run:
        """Begin a run of a message."""
        defaults = {"id": "a", "type": "t", "queue": "default", "retry": 25, "timeout": 1800}
        message = TaskMessage(**{**defaults, **fields})
        self.execution.start(self.lane, message, 7, now)
        return self.lane.runs[message.id]

    async def outcome(self, **fields: Any) -> Outcome:
        """Run a message to its end and return its outcome."""
        self.start(**fields)
        return await self.end()

    async def end(self) -> Outcome:
        """Wait until nothing runs and return the only outcome."""
        async with asyncio.timeout(2):
            await self.in_flight.idle()
        ((task_id, mark, _, outcome),) = self.lane.ended
        assert (task_id, mark) == ("a", 7)
        self.lane.ended.clear()
        return outcome


def of(handler: Callable[..., Any], **options: Any) -> World:
    """A world with one handler, for the type "t"."""
    mux = Mux()
    mux.task("t")(handler)
    return World(mux, **options)


def raising(error: BaseException, **options: Any) -> World:
    async def handler(ctx: Context) -> None:
        raise error

    return of(handler, **options)


def message_of(outcome: Outcome) -> TaskMessage:
    return TaskMessage.FromString(outcome.message)


async def waiting(world: World, **fields: Any) -> Run:
    """Start a run and let its handler begin."""
    run = world.start(**fields)
    for _ in range(3):  # its first step, and the handler's
        await asyncio.sleep(0)
    assert run.begun
    return run


async def forever(ctx: Context) -> None:
    await asyncio.Event().wait()


# Success


async def test_a_handled_task_without_retention_is_done() -> None:
    async def handler(ctx: Context) -> str:
        return "unread"

    assert (await of(handler).outcome()).kind == "done"


async def test_a_handled_task_with_retention_is_complete_with_its_result() -> None:
    async def handler(ctx: Context) -> dict[str, int]:
        return {"n": 1}

    outcome = await of(handler).outcome(retention=60)

    assert (outcome.kind, outcome.result) == ("complete", b'{"n":1}')
    assert NOW + 60 <= outcome.at <= NOW + 62
    assert message_of(outcome).completed_at >= NOW


# Failure


async def test_an_exception_is_retried_with_its_type_and_text() -> None:
    outcome = await raising(ValueError("too bad")).outcome(retried=2)

    assert outcome.kind == "retry"
    assert message_of(outcome).error_msg == "ValueError: too bad"
    assert message_of(outcome).retried == 3
    assert message_of(outcome).last_failed_at >= NOW


@pytest.mark.parametrize(("retry", "retried"), [(0, 0), (3, 3), (3, 4), (-1, 0)])
async def test_a_failure_without_retries_left_is_archived(retry: int, retried: int) -> None:
    outcome = await raising(ValueError()).outcome(retry=retry, retried=retried)

    assert outcome.kind == "archive"
    assert message_of(outcome).retried == retried


async def test_skip_retry_archives_at_once() -> None:
    outcome = await raising(SkipRetry("hopeless")).outcome()

    assert (outcome.kind, message_of(outcome).error_msg) == ("archive", "hopeless")


async def test_a_revoked_task_is_dropped_even_without_retries_left() -> None:
    assert (await raising(RevokeTask()).outcome(retry=0)).kind == "done"


async def test_retry_has_its_own_delay() -> None:
    outcome = await raising(Retry(timedelta(minutes=2), "later")).outcome()

    assert outcome.kind == "retry"
    assert (NOW + 120) * 1000 <= outcome.at <= (NOW + 122) * 1000
    assert message_of(outcome).error_msg == "later"


async def test_snooze_counts_nothing() -> None:
    outcome = await raising(Snooze(10)).outcome(retry=0)

    assert outcome.kind == "snooze"
    assert (NOW + 10) * 1000 <= outcome.at <= (NOW + 12) * 1000
    assert not message_of(outcome).retried
    assert not message_of(outcome).error_msg


async def test_a_failure_that_is_none_does_not_count() -> None:
    world = raising(ConnectionError(), is_failure=lambda e: not isinstance(e, ConnectionError))
    outcome = await world.outcome()

    assert outcome.kind == "retry_uncounted"
    assert message_of(outcome).retried == 0


async def test_a_handlers_own_policy_wins_over_the_servers() -> None:
    mux = Mux()

    @mux.task("t", retry_delay=5, is_failure=lambda error: False)
    async def handler(ctx: Context) -> None:
        raise ValueError

    outcome = await World(mux, retry_delay=lambda *_: 500, is_failure=lambda _: True).outcome()

    assert outcome.kind == "retry_uncounted"
    assert (NOW + 5) * 1000 <= outcome.at <= (NOW + 7) * 1000


@pytest.mark.parametrize("delay", [None, "soon", math.nan, math.inf, -math.inf, 1e300])
async def test_a_retry_policy_that_gives_nonsense_does_not_lose_the_task(delay: Any) -> None:
    outcome = await raising(ValueError(), retry_delay=lambda *_: delay).outcome()

    assert outcome.kind == "retry"
    assert NOW * 1000 <= outcome.at < 2**63


@pytest.mark.parametrize("callback", ["retry_delay", "is_failure", "error_handler"])
async def test_a_callback_that_fails_itself_does_not_lose_the_task(
    callback: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("broken")

    assert (await raising(ValueError(), **{callback: fail}).outcome()).kind == "retry"
    assert "failed" in caplog.text


@pytest.fixture
def silent() -> Iterator[None]:
    """Log nothing: these errors cannot be carried to where reports are made."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("silent")
async def test_an_exception_that_cannot_be_shown_does_not_lose_the_task() -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    outcome = await raising(Unspeakable()).outcome()

    assert outcome.kind == "retry"
    assert "Unspeakable" in message_of(outcome).error_msg


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "text", ["\ud800", "nul \x00", "x" * 1_000_000], ids=["surrogate", "nul", "long"]
)
async def test_the_error_of_a_task_is_kept_whatever_it_holds(text: str) -> None:
    error_msg = message_of(await raising(ValueError(text)).outcome()).error_msg

    assert error_msg.startswith("ValueError: ")
    assert len(error_msg) < 100_000


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        StopIteration(),
    ],
)
async def test_what_would_end_a_program_only_fails_the_task(error: BaseException) -> None:
    outcome = await raising(error).outcome()

    assert outcome.kind == "retry"
    assert message_of(outcome).error_msg


async def test_a_result_that_cannot_be_written_fails_the_task() -> None:
    async def handler(ctx: Context) -> Any:
        return object()

    outcome = await of(handler).outcome(retention=60)

    assert outcome.kind == "retry"
    assert "object" in message_of(outcome).error_msg


async def test_a_payload_that_does_not_validate_is_archived_with_the_reason() -> None:
    async def handler(payload: Payload) -> None:
        raise AssertionError("it was called")

    outcome = await of(handler).outcome(payload=b'{"user_id": "x"}')

    assert outcome.kind == "archive"
    assert "user_id" in message_of(outcome).error_msg


async def test_an_unknown_type_is_retried_with_asynqs_text() -> None:
    outcome = await World(Mux()).outcome(type="nobody")

    assert outcome.kind == "retry"
    assert message_of(outcome).error_msg == 'handler not found for task "nobody"'


# Error handler


@pytest.mark.parametrize("is_async", [True, False])
async def test_the_error_handler_is_told_before_the_task_moves(is_async: bool) -> None:
    seen: list[tuple[str, str]] = []

    def note(ctx: Context[Any], error: BaseException) -> None:
        seen.append((ctx.task_id, str(error)))

    async def note_later(ctx: Context[Any], error: BaseException) -> None:
        await asyncio.sleep(0)
        note(ctx, error)

    handler = note_later if is_async else note
    await raising(ValueError("x"), error_handler=handler).outcome()

    assert seen == [("a", "x")]


async def test_the_error_handler_is_not_told_of_a_snooze() -> None:
    seen: list[BaseException] = []
    await raising(Snooze(1), error_handler=lambda _, error: seen.append(error)).outcome()
    assert not seen


# Deadlines


async def test_a_timeout_fails_the_task_with_asynqs_text() -> None:
    outcome = await of(forever).outcome(timeout=1, now=NOW - 0.95)

    assert (outcome.kind, message_of(outcome).error_msg) == ("retry", DEADLINE)


async def test_the_nearer_of_timeout_and_deadline_counts() -> None:
    world = of(forever)
    by_deadline = world.start(id="d", timeout=100, deadline=int(NOW) + 50)
    by_timeout = world.start(id="t", timeout=10, deadline=int(NOW) + 50)
    by_default = world.start(id="n", timeout=0, deadline=0)
    assert by_deadline.deadline_at == NOW + 50
    assert by_timeout.deadline_at == NOW + 10
    assert by_default.deadline_at == NOW + 1800
    for run in (by_deadline, by_timeout, by_default):
        run.cancel(SHUTDOWN)
    await world.in_flight.idle()


async def test_a_deadline_that_is_over_does_not_call_the_handler() -> None:
    called: list[str] = []

    async def handler(ctx: Context) -> None:
        called.append(ctx.task_id)

    outcome = await of(handler).outcome(timeout=0, deadline=int(NOW) - 1)

    assert (outcome.kind, message_of(outcome).error_msg) == ("retry", DEADLINE)
    assert not called


async def test_a_far_deadline_gets_its_timer_when_it_is_near() -> None:
    world = of(forever)
    run = world.start(timeout=10)
    assert run.timer is None
    run.ends_at = asyncio.get_running_loop().time() + 0.05
    world.execution.watch()
    assert message_of(await world.end()).error_msg == DEADLINE


@pytest.mark.parametrize("unix_s", [2**31, 2**40, 2**62])
async def test_an_absurd_deadline_is_only_far_away(unix_s: int) -> None:
    async def handler(ctx: Context) -> None:
        assert ctx.deadline.year > 2037

    assert (await of(handler).outcome(timeout=0, deadline=unix_s)).kind == "done"
    assert (await of(handler).outcome(timeout=unix_s, deadline=0)).kind == "done"


# Cancelling


async def test_a_cancelled_run_is_a_failure_with_asynqs_text() -> None:
    world = of(forever)
    (await waiting(world)).cancel(CANCELED)
    outcome = await world.end()
    assert (outcome.kind, message_of(outcome).error_msg) == ("retry", CANCELED)


async def test_a_run_cancelled_for_good_is_archived() -> None:
    world = of(forever)
    run = await waiting(world)
    run.final = True
    run.cancel(CANCELED)
    assert (await world.end()).kind == "archive"


async def test_a_run_cancelled_before_its_first_step_does_not_call_the_handler() -> None:
    called: list[str] = []

    async def handler(ctx: Context) -> None:
        called.append(ctx.task_id)

    world = of(handler)
    world.start().cancel(CANCELED)
    outcome = await world.end()
    assert (outcome.kind, message_of(outcome).error_msg) == ("retry", CANCELED)
    assert not called


async def test_a_handler_that_swallows_its_cancellation_has_failed_all_the_same() -> None:
    async def handler(ctx: Context) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return "as if nothing had been"

    world = of(handler)
    (await waiting(world, retention=60)).cancel(CANCELED)
    assert message_of(await world.end()).error_msg == CANCELED


async def test_an_interrupted_run_is_put_back_whatever_its_handler_raises() -> None:
    async def handler(ctx: Context) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise SkipRetry("on the way out")

    world = of(handler)
    (await waiting(world)).cancel(SHUTDOWN)
    assert (await world.end()).kind == "requeue"


async def test_a_run_that_ends_well_during_shutdown_is_done() -> None:
    async def handler(ctx: Context) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass

    world = of(handler)
    (await waiting(world)).cancel(SHUTDOWN)
    assert (await world.end()).kind == "done"


async def test_a_run_that_lost_its_lease_leaves_nothing_to_save() -> None:
    lost: list[bool] = []

    async def handler(ctx: Context) -> None:
        event = ctx.lease_lost
        try:
            await asyncio.Event().wait()
        finally:
            lost.append(event.is_set())

    world = of(handler)
    (await waiting(world)).cancel(LEASE_LOST)
    await world.in_flight.idle()
    assert not world.lane.ended
    assert lost == [True]


async def test_a_lost_lease_counts_over_an_earlier_reason() -> None:
    async def handler(ctx: Context) -> None:
        for _ in range(2):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

    world = of(handler)
    run = await waiting(world)
    run.cancel(CANCELED)
    await asyncio.sleep(0)
    run.cancel(LEASE_LOST)
    await world.in_flight.idle()
    assert not world.lane.ended


async def test_a_cancellation_during_the_error_handler_does_not_change_the_outcome() -> None:
    entered = asyncio.Event()

    async def slow(ctx: Context[Any], error: BaseException) -> None:
        entered.set()
        await asyncio.Event().wait()

    world = raising(ValueError("first"), error_handler=slow)
    run = world.start()
    await entered.wait()
    run.cancel(CANCELED)
    assert message_of(await world.end()).error_msg == "ValueError: first"


async def test_a_handler_that_ignores_its_cancellation_is_written_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    over = asyncio.Event()

    async def handler(ctx: Context) -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                pass

    world = of(handler)
    run = await waiting(world)
    task = run.task
    run.cancel(DEADLINE)
    assert world.execution.watch() == 0
    assert run.cancelled_at is not None
    run.cancelled_at -= WRITE_OFF_S + 1
    assert world.execution.watch() == 1
    assert world.in_flight.running == 0
    outcome = await world.end()
    assert (outcome.kind, message_of(outcome).error_msg) == ("retry", DEADLINE)
    assert "ignores its cancellation" in caplog.text
    over.set()
    assert task is not None
    await task
    assert not world.lane.ended  # its late end changes nothing
    assert world.in_flight.running == 0


async def test_a_write_off_survives_a_retry_policy_that_fails() -> None:
    over = asyncio.Event()

    async def handler(ctx: Context) -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                pass

    world = of(handler, retry_delay=lambda *_: math.inf)
    run = await waiting(world)
    run.cancel(DEADLINE)
    assert run.cancelled_at is not None
    run.cancelled_at -= WRITE_OFF_S + 1
    try:
        world.execution.watch()  # an exception here would stop the server
        assert (await world.end()).kind == "retry"
    finally:
        over.set()


async def test_abandoned_runs_are_put_back() -> None:
    world = of(forever)
    run = await waiting(world)
    assert world.execution.abandon() == 1
    assert (await world.end()).kind == "requeue"
    run.cancel(SHUTDOWN)


# What surrounds a handler


async def test_a_context_variable_does_not_leak_into_the_next_task() -> None:
    secret: ContextVar[str] = ContextVar("secret", default="none")
    seen: list[str] = []

    async def handler(ctx: Context) -> None:
        seen.append(secret.get())
        assert current_context() is ctx
        secret.set(ctx.task_id)

    world = of(handler)
    for task_id in "abc":
        world.start(id=task_id)
        await world.in_flight.idle()
    assert seen == ["none"] * 3


async def test_middleware_wraps_the_handler_and_sees_its_error() -> None:
    seen: list[str] = []
    mux = Mux()

    @mux.use
    async def watch(task: Task[Any], ctx: Context[Any], call_next: Next) -> Any:
        seen.append(f"before {task.type}")
        try:
            return await call_next(task, ctx)
        except ValueError:
            seen.append("failed")
            raise SkipRetry("as the middleware says") from None

    @mux.task("t")
    async def handler(ctx: Context) -> None:
        seen.append("handler")
        raise ValueError

    outcome = await World(mux).outcome()
    assert seen == ["before t", "handler", "failed"]
    assert (outcome.kind, message_of(outcome).error_msg) == ("archive", "as the middleware says")


def test_the_text_of_a_signal_without_words_says_what_it_is() -> None:
    assert error_text(SkipRetry()) == "skip retry for the task"
    assert error_text(RevokeTask()) == "revoke task"
    assert error_text(ValueError()) == "ValueError"
    assert error_text(asyncio.CancelledError()) == CANCELED
