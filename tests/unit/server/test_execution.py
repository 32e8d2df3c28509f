"""What a run ends with: one message through the mux, to an outcome, without any Redis."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from pydantic import BaseModel

from asyncq import Context, Mux, Retry, RevokeTask, SkipRetry, Snooze, Task, current_context
from asyncq.handler import Next
from asyncq.message import TaskMessage
from asyncq.outcome import Outcome
from asyncq.server import execution
from asyncq.server.execution import SPRINT_S, WRITE_OFF_S, Execution, error_text
from asyncq.server.executors import Executors
from asyncq.server.in_flight import CANCELED, DEADLINE, LEASE_LOST, SHUTDOWN, InFlight, Lane, Run

NOW = 1_800_000_000.0


class Payload(BaseModel):
    user_id: int


class World:
    """An execution of one mux, and the lane it takes messages from."""

    def __init__(
        self, mux: Mux, *, concurrency: int = 10, prefetch: int = 0, **options: Any
    ) -> None:
        self.in_flight = InFlight({"default": 1}, concurrency, self._annotate, prefetch=prefetch)
        self.in_flight.clock_offset = NOW - time.time()
        self.lane: Lane = self.in_flight.lanes["default"]
        routes = mux.compile(Executors(10).run)
        self.execution = Execution(self.in_flight, routes, **options)

    async def _annotate(self, queue: str, task_id: str, mark: int, name: str, value: bytes) -> bool:
        return True

    def begin(self, now: float = NOW, **fields: Any) -> str:
        """Begin a run of a message, and return its id."""
        defaults = {"id": "a", "type": "t", "queue": "default", "retry": 25, "timeout": 1800}
        message = TaskMessage(**{**defaults, **fields})
        self.execution.start(self.lane, message, 7, now)
        return message.id

    def start(self, now: float = NOW, **fields: Any) -> Run:
        """Begin a run of a message."""
        return self.lane.runs[self.begin(now, **fields)]

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

    def batch(self, ids: str, **fields: Any) -> list[Run]:
        """Begin a run of a message for each letter, all before the event loop comes round."""
        return [self.start(id=task_id, **fields) for task_id in ids]

    async def kinds(self) -> dict[str, str]:
        """Wait until nothing runs and return what became of each task, in the order they ended."""
        async with asyncio.timeout(5):
            await self.in_flight.idle()
        return {task_id: outcome.kind for task_id, _, _, outcome in self.lane.ended}


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
    await turns()
    assert run.begun
    return run


async def forever(ctx: Context) -> None:
    await asyncio.Event().wait()


async def turns() -> None:
    """Let the event loop come round often enough for handlers to begin, and some to end."""
    for _ in range(10):
        await asyncio.sleep(0)


def this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


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


# Many runs begun at once


async def test_runs_that_never_wait_share_a_task_and_end_each_in_its_own_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "SPRINT_S", 60)  # however slow the machine is
    tasks: list[asyncio.Task[Any]] = []
    seen: list[str] = []
    raised: dict[str, Exception] = {"b": ValueError("b"), "c": SkipRetry(), "e": Snooze(1)}

    async def handler(ctx: Context) -> None:
        tasks.append(this_task())
        seen.append(ctx.task_id)
        if ctx.task_id in raised:
            raise raised[ctx.task_id]

    world = of(handler)
    world.batch("abcdef")
    kinds = await world.kinds()
    assert "".join(seen) == "abcdef"
    assert len(set(tasks)) == 1
    assert list(kinds.items()) == [
        ("a", "done"), ("b", "retry"), ("c", "archive"),
        ("d", "done"), ("e", "snooze"), ("f", "done"),
    ]  # fmt: skip
    assert message_of(world.lane.ended[1].outcome).error_msg == "ValueError: b"


@pytest.mark.parametrize("waiting_ids", ["a", "b", "bd", "abcdef", "f"])
async def test_a_handler_that_waits_keeps_its_task_for_itself(waiting_ids: str) -> None:
    """Once it has waited, no other run begins in its task, now or when it is over."""
    began: dict[str, asyncio.Task[Any]] = {}
    waited: list[str] = []
    go = asyncio.Event()

    async def handler(ctx: Context) -> None:
        assert this_task() not in [began[other] for other in waited]
        began[ctx.task_id] = this_task()
        if ctx.task_id in waiting_ids:
            waited.append(ctx.task_id)
            await go.wait()
            assert this_task() is began[ctx.task_id]
            assert current_context() is ctx

    world = of(handler)
    world.batch("abcdef")
    await turns()
    assert set(began) == set("abcdef")  # nobody waits for those that wait
    world.batch("gh")
    await turns()
    go.set()
    assert await world.kinds() == dict.fromkeys("abcdefgh", "done")
    world.batch("ij")
    assert set((await world.kinds()).values()) == {"done"}
    assert len({began[task_id] for task_id in waiting_ids}) == len(waiting_ids)


async def test_it_knows_whether_a_handler_of_the_last_batch_waited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution, "SPRINT_S", 60)  # however slow the machine is

    async def handler(ctx: Context) -> None:
        if ctx.task_id == "w":
            await asyncio.sleep(0)

    world = of(handler)
    for ids, waited in [("abc", False), ("awb", True), ("abc", False), ("wa", True)]:
        world.batch(ids)
        await world.kinds()
        assert world.execution.handlers_wait == waited, ids


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("concurrency", [1, 10])
async def test_a_context_variable_does_not_leak_within_a_batch(
    concurrency: int, waits: bool
) -> None:
    secret: ContextVar[str] = ContextVar("secret", default="none")
    seen: list[str] = []

    async def handler(ctx: Context) -> None:
        seen.append(secret.get())
        assert current_context() is ctx
        secret.set(ctx.task_id)
        if waits:
            await asyncio.sleep(0)
            assert secret.get() == ctx.task_id

    world = of(handler, concurrency=concurrency, prefetch=10)
    world.batch("abcd")
    await world.kinds()
    assert seen == ["none"] * 4


async def test_a_context_variable_of_an_error_handler_does_not_leak() -> None:
    secret: ContextVar[str] = ContextVar("secret", default="none")
    seen: list[str] = []

    async def note(ctx: Context[Any], error: BaseException) -> None:
        secret.set(ctx.task_id)

    async def handler(ctx: Context) -> None:
        seen.append(secret.get())
        raise ValueError

    world = of(handler, error_handler=note)
    world.batch("abc")
    await world.kinds()
    assert seen == ["none"] * 3


async def test_what_surrounds_the_start_is_seen_by_every_handler() -> None:
    """Such as what the lifespan set: that is no leak."""
    name: ContextVar[str] = ContextVar("name", default="none")
    seen: list[str] = []

    async def handler(ctx: Context) -> None:
        seen.append(name.get())
        name.set("mine")

    name.set("server")
    world = of(handler, concurrency=2, prefetch=10)
    name.set("whoever starts a run")
    world.batch("abcd")
    await world.kinds()
    assert seen == ["server"] * 4


async def test_a_context_variable_whose_values_cannot_be_compared_harms_nobody() -> None:
    class Unequal:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("as an array of numpy does")

        __hash__ = None  # type: ignore[assignment]

    value: ContextVar[Unequal] = ContextVar("value")
    value.set(Unequal())
    shouts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, said: shouts.append(said))

    async def handler(ctx: Context) -> None:
        value.set(Unequal())

    world = of(handler)
    world.batch("abc")
    assert await world.kinds() == dict.fromkeys("abc", "done")
    gc.collect()  # a task whose exception nobody sees says so when it goes
    assert not shouts


@pytest.mark.parametrize("again", ["", "uncancel", "raise", "error handler"])
async def test_a_handler_that_cancels_its_own_task_cancels_no_other(again: str) -> None:
    async def handler(ctx: Context) -> None:
        assert not this_task().cancelling()
        if ctx.task_id == "b":
            this_task().cancel()
            if again == "uncancel":
                this_task().uncancel()
            if again == "raise":
                raise ValueError
        else:
            await asyncio.sleep(0)

    async def note(ctx: Context[Any], error: BaseException) -> None:
        this_task().cancel()

    def fail(ctx: Context[Any], error: BaseException) -> None:
        this_task().cancel()

    world = of(handler, error_handler=fail if again == "error handler" else note)
    world.batch("bacd")
    kinds = await world.kinds()
    assert kinds.pop("b") == ("retry" if again == "raise" else "done")
    assert kinds == dict.fromkeys("acd", "done")


async def _timeout_unused() -> None:
    async with asyncio.timeout(60):  # noqa: ASYNC100 - it is not to wait
        pass


async def _timeout_over_at_once() -> None:
    async with asyncio.timeout(-1):  # noqa: ASYNC100 - it is not to wait
        pass


async def _timeout_hit() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(-1):
            await asyncio.sleep(60)


async def _timeout_not_caught() -> None:
    async with asyncio.timeout(0):
        await asyncio.sleep(60)


async def _group_unused() -> None:
    async with asyncio.TaskGroup():
        pass


async def _group_with_a_child_that_fails() -> None:
    async def fail() -> None:
        raise ValueError

    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
        await asyncio.sleep(60)


async def _group_left_by_an_error() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(60))
        raise ValueError


async def _scope_cancelled_unused() -> None:
    with anyio.CancelScope() as scope:  # noqa: ASYNC100 - it is not to wait
        scope.cancel()


async def _scope_cancelled() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.sleep(60)


async def _scope_over_at_once() -> None:
    with anyio.move_on_after(0):
        await anyio.sleep(60)


async def _scope_not_caught() -> None:
    with anyio.fail_after(0):
        await anyio.sleep(60)


async def _anyio_group_with_a_child_that_fails() -> None:
    async def fail() -> None:
        raise ValueError

    async with anyio.create_task_group() as group:
        group.start_soon(fail)


FAIL = (_timeout_not_caught, _group_with_a_child_that_fails, _group_left_by_an_error,
        _scope_not_caught, _anyio_group_with_a_child_that_fails)  # fmt: skip


@pytest.mark.parametrize(
    "scope",
    [
        _timeout_unused, _timeout_over_at_once, _timeout_hit, _group_unused,
        _scope_cancelled_unused, _scope_cancelled, _scope_over_at_once, *FAIL,
    ],
)  # fmt: skip
async def test_the_scopes_in_one_handler_end_with_it(scope: Callable[[], Awaitable[None]]) -> None:
    async def handler(ctx: Context) -> None:
        if ctx.task_id in "bd":
            await scope()
        else:
            assert not this_task().cancelling()
            await anyio.lowlevel.checkpoint()
            async with asyncio.timeout(60):
                await asyncio.sleep(0)

    world = of(handler)
    world.batch("abcd")
    world.batch("efgh")
    kinds = await world.kinds()
    failed = "retry" if scope in FAIL else "done"
    assert {kinds.pop("b"), kinds.pop("d")} == {failed}
    assert kinds == dict.fromkeys("acefgh", "done")


async def test_each_handler_and_its_children_find_their_own_context() -> None:
    children: list[asyncio.Task[None]] = []

    async def child(ctx: Context) -> None:
        for _ in range(3):
            assert current_context() is ctx
            await asyncio.sleep(0)

    async def handler(ctx: Context) -> None:
        assert current_context() is ctx
        children.append(asyncio.create_task(child(ctx)))
        if ctx.task_id in "bd":
            assert await asyncio.to_thread(current_context) is ctx
            await asyncio.gather(child(ctx), child(ctx))
        assert current_context() is ctx

    world = of(handler)
    world.batch("abcdef")
    assert await world.kinds() == dict.fromkeys("abcdef", "done")
    await asyncio.gather(*children)  # some outlive the run they belong to
    assert len(children) == 6


async def test_the_event_loop_gets_its_turn_between_handlers_that_compute() -> None:
    seen: list[str] = []

    async def handler(ctx: Context) -> None:
        if not seen:
            asyncio.get_running_loop().call_soon(seen.append, "the loop")
        seen.append(ctx.task_id)
        time.sleep(SPRINT_S)

    world = of(handler)
    world.batch("abcd")
    assert await world.kinds() == dict.fromkeys("abcd", "done")
    assert seen.index("the loop") < seen.index("d")
    seen.remove("the loop")
    assert "".join(seen) == "abcd"


async def test_a_run_cancelled_before_it_began_spares_the_rest_of_its_batch() -> None:
    called: list[str] = []

    async def handler(ctx: Context) -> None:
        called.append(ctx.task_id)
        if ctx.task_id == "a":
            runs[3].cancel(LEASE_LOST)  # by a run that is under way
            runs[0].cancel(SHUTDOWN)  # itself, and it goes on to its end

    world = of(handler)
    runs = world.batch("abcdef")
    runs[1].cancel(CANCELED)
    runs[4].cancel(SHUTDOWN)
    kinds = await world.kinds()
    assert "".join(sorted(called)) == "acf"
    assert kinds == {"a": "done", "b": "retry", "c": "done", "e": "requeue", "f": "done"}


async def test_a_cancellation_that_comes_too_late_hits_nobody() -> None:
    """Not even the run that has the task now which the run that is over had."""
    entered, go = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    async def handler(ctx: Context) -> None:
        tasks.append(this_task())
        if ctx.task_id == "b":
            entered.set()
            await go.wait()

    world = of(handler)
    over, running = world.batch("ab")
    await entered.wait()
    assert tasks[0] is tasks[1]
    for reason in (CANCELED, DEADLINE, SHUTDOWN, LEASE_LOST):
        over.cancel(reason)
    await asyncio.sleep(0)
    go.set()
    assert await world.kinds() == {"a": "done", "b": "done"}
    assert (over.cancel_reason, running.cancel_reason) == (None, None)


async def test_the_timer_of_a_run_that_is_over_hits_nobody() -> None:
    go = asyncio.Event()

    async def handler(ctx: Context) -> None:
        if ctx.task_id == "b":
            await go.wait()

    world = of(handler)
    near = world.start(id="a", timeout=1, now=NOW - 0.95)
    world.start(id="b")
    assert near.timer is not None
    await asyncio.sleep(0.1)
    go.set()
    assert await world.kinds() == {"a": "done", "b": "done"}


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
@pytest.mark.parametrize("waits", [False, True])
async def test_what_would_end_a_program_spares_the_rest_of_the_batch(
    waits: bool, error: BaseException
) -> None:
    async def handler(ctx: Context) -> None:
        if waits:
            await asyncio.sleep(0)
        if ctx.task_id == "b":
            raise error

    world = of(handler)
    world.batch("abcd")
    assert await world.kinds() == {"a": "done", "b": "retry", "c": "done", "d": "done"}


async def test_an_error_handler_that_waits_holds_up_only_its_own_run() -> None:
    go = asyncio.Event()

    async def handler(ctx: Context) -> None:
        if ctx.task_id in "bc":
            raise ValueError
        await asyncio.sleep(0)

    async def slow(ctx: Context[Any], error: BaseException) -> None:
        assert current_context() is ctx
        await go.wait()
        assert current_context() is ctx

    world = of(handler, error_handler=slow)
    world.batch("abcd")
    await turns()
    assert {run.message.id for run in world.in_flight.runs()} == {"b", "c"}
    go.set()
    assert await world.kinds() == {"a": "done", "d": "done", "b": "retry", "c": "retry"}


async def test_a_run_of_a_batch_that_was_written_off_ends_late_and_changes_nothing() -> None:
    over = asyncio.Event()

    async def handler(ctx: Context) -> None:
        while ctx.task_id == "b" and not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                pass

    world = of(handler, concurrency=3, prefetch=1)
    stubborn = world.batch("abcd")[1]
    await turns()
    assert [run.message.id for run in world.in_flight.runs()] == ["b"]
    task = stubborn.task
    assert task is not None
    stubborn.cancel(CANCELED)
    assert stubborn.cancelled_at is not None
    stubborn.cancelled_at -= WRITE_OFF_S + 1
    assert world.execution.watch() == 1
    assert await world.kinds() == {"a": "done", "c": "done", "d": "done", "b": "retry"}
    successor = world.start(id="b")
    over.set()
    await task
    await world.kinds()
    assert successor.over
    assert len(world.lane.ended) == 5
    assert world.in_flight.running == 0


async def test_whoever_cancels_every_task_there_is_stops_no_later_run() -> None:
    async def handler(ctx: Context) -> None:
        pass

    world = of(handler)
    world.batch("ab")
    for task in asyncio.all_tasks() - {this_task()}:
        task.cancel()
    await turns()
    world.batch("cd")
    assert {*await world.kinds()} >= {"c", "d"}


async def test_a_run_begins_in_the_task_that_was_made_ahead() -> None:
    began: list[asyncio.Task[Any]] = []

    async def handler(ctx: Context) -> None:
        began.append(this_task())

    world = of(handler)
    world.execution.make_ready()
    await turns()
    (ready,) = asyncio.all_tasks() - {this_task()}
    assert (await world.outcome()).kind == "done"
    assert began == [ready]
    assert (await world.outcome()).kind == "done"  # though none is ready now
    assert len(set(began)) == 2


@pytest.mark.parametrize("when", ["not begun", "waiting", "given a run"])
async def test_a_run_begins_though_the_task_made_ahead_was_cancelled(when: str) -> None:
    world = of(forever)
    world.execution.make_ready()
    (ready,) = asyncio.all_tasks() - {this_task()}
    if when != "not begun":
        await turns()
    if when != "given a run":
        ready.cancel()
    run = world.start()
    if when == "given a run":
        ready.cancel()
    await turns()
    assert run.begun
    assert run.task is not ready
    assert run.cancel_reason is None
    run.cancel(CANCELED)
    assert (await world.end()).kind == "retry"


async def test_a_server_that_takes_no_more_leaves_no_task_behind() -> None:
    world = of(forever)
    world.execution.make_ready()
    await turns()
    world.execution.put_back_waiting()
    await turns()
    assert asyncio.all_tasks() == {this_task()}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="there are no eager tasks before 3.12")
async def test_eager_tasks_change_nothing() -> None:
    loop: Any = asyncio.get_running_loop()
    factory: Any = asyncio
    loop.set_task_factory(factory.eager_task_factory)

    async def handler(ctx: Context) -> None:
        if ctx.task_id in "bd":
            await asyncio.sleep(0)

    world = of(handler, concurrency=2, prefetch=10)
    for task_id in "abcdef":
        world.begin(id=task_id)  # which may be over at once
    assert await world.kinds() == dict.fromkeys("abcdef", "done")


# Tasks that were taken ahead


async def test_what_waits_begins_in_its_order_when_a_place_is_free() -> None:
    began: list[str] = []
    go = {task_id: asyncio.Event() for task_id in "abcde"}

    async def handler(ctx: Context) -> None:
        began.append(ctx.task_id)
        await go[ctx.task_id].wait()

    world = of(handler, concurrency=2, prefetch=3)
    runs = world.batch("abcde")
    for ending, running in (("", "ab"), ("b", "abc"), ("a", "abcd"), ("d", "abcde")):
        if ending:
            go[ending].set()
        await turns()
        assert "".join(began) == running
        assert world.in_flight.running == 2
        assert [run.waits for run in runs] == [i >= len(running) for i in range(5)]
    for event in go.values():
        event.set()
    assert await world.kinds() == dict.fromkeys("badce", "done")


async def test_the_timeout_of_what_waits_counts_from_when_it_begins() -> None:
    deadlines: dict[str, float] = {}
    go = asyncio.Event()

    async def handler(ctx: Context) -> None:
        deadlines[ctx.task_id] = ctx.deadline.timestamp()
        await go.wait()

    world = of(handler, concurrency=1, prefetch=2)
    _, second, third = (world.start(id=task_id, timeout=10) for task_id in "abc")
    await turns()
    world.execution.watch()
    assert second.timer is None
    world.in_flight.clock_offset += 1000  # so long it waits
    go.set()
    assert await world.kinds() == dict.fromkeys("abc", "done")
    assert deadlines["a"] == NOW + 10
    assert deadlines["b"] >= NOW + 1010
    assert second.started_at >= NOW + 1000
    assert third.ends_at < asyncio.get_running_loop().time() + 11


async def test_a_deadline_may_pass_while_a_task_waits() -> None:
    called: list[str] = []

    async def handler(ctx: Context) -> None:
        called.append(ctx.task_id)
        world.in_flight.clock_offset += 100

    world = of(handler, concurrency=1, prefetch=1)
    world.start(id="a")
    world.start(id="b", timeout=0, deadline=int(NOW) + 50)
    assert await world.kinds() == {"a": "done", "b": "retry"}
    assert message_of(world.lane.ended[1].outcome).error_msg == DEADLINE
    assert called == ["a"]


@pytest.mark.parametrize(
    ("reason", "final", "kinds"),
    [
        (CANCELED, False, {"a": "done", "b": "retry", "c": "done"}),
        (CANCELED, True, {"a": "done", "b": "archive", "c": "done"}),
        (LEASE_LOST, False, {"a": "done", "c": "done"}),
    ],
)
async def test_what_is_cancelled_while_it_waits_is_not_called(
    reason: str, final: bool, kinds: dict[str, str]
) -> None:
    called: list[str] = []
    go = asyncio.Event()

    async def handler(ctx: Context) -> None:
        called.append(ctx.task_id)
        await go.wait()

    world = of(handler, concurrency=1, prefetch=2)
    _, run, _ = world.batch("abc")
    await turns()
    run.final = final
    run.cancel(reason)
    go.set()
    assert await world.kinds() == kinds
    assert called == ["a", "c"]
    assert world.in_flight.free == 3


@pytest.mark.parametrize("reason", [CANCELED, LEASE_LOST])
async def test_what_is_cancelled_while_it_waits_does_not_wait_for_its_place(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The handlers that run may take hours."""
    world = of(forever, concurrency=1, prefetch=1)
    running, run = world.batch("ab")
    await turns()
    run.cancel(reason)
    world.execution.watch()
    assert run.over
    assert [ended.outcome.kind for ended in world.lane.ended] == ["retry"] * (reason == CANCELED)
    assert "ignores its cancellation" not in caplog.text  # it was not called
    assert not running.over
    running.cancel(SHUTDOWN)
    await world.kinds()


async def test_a_place_that_is_given_away_goes_to_what_waits() -> None:
    over = asyncio.Event()
    began = asyncio.Event()

    async def handler(ctx: Context) -> None:
        if ctx.task_id == "b":
            began.set()
        while ctx.task_id == "a" and not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                pass

    world = of(handler, concurrency=1, prefetch=1)
    stubborn, _ = world.batch("ab")
    await turns()
    task = stubborn.task
    assert task is not None
    stubborn.cancel(DEADLINE)
    assert stubborn.cancelled_at is not None
    stubborn.cancelled_at -= WRITE_OFF_S + 1
    world.execution.watch()
    await asyncio.wait_for(began.wait(), 5)
    over.set()
    await task
    assert await world.kinds() == {"a": "retry", "b": "done"}


async def test_what_waits_is_put_back_unrun_the_next_to_be_taken_last() -> None:
    called: list[str] = []
    go = asyncio.Event()

    async def handler(ctx: Context) -> None:
        called.append(ctx.task_id)
        await go.wait()

    world = of(handler, concurrency=2, prefetch=3)
    runs = world.batch("abcde")
    await turns()
    world.execution.put_back_waiting()
    world.execution.put_back_waiting()
    assert [(ended.task_id, ended.outcome.kind) for ended in world.lane.ended] == [
        ("e", "requeue"), ("d", "requeue"), ("c", "requeue")
    ]  # fmt: skip
    assert (world.in_flight.running, world.in_flight.free) == (2, 3)
    runs[2].cancel(CANCELED)  # it is not ours any more
    go.set()
    assert list(await world.kinds()) == ["e", "d", "c", "a", "b"]
    assert called == ["a", "b"]


async def test_a_long_line_of_what_waits_is_no_deep_recursion() -> None:
    async def handler(ctx: Context) -> None:
        pass

    number = sys.getrecursionlimit() + 100
    world = of(handler, concurrency=1, prefetch=number)
    for i in range(number):
        world.start(id=str(i))
    kinds = await world.kinds()
    assert list(kinds) == [str(i) for i in range(number)]
