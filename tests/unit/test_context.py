from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel

from asyncq.context import Context, current, current_context
from asyncq.errors import AsyncqError, LeaseExpiredError, OptionError, PayloadError
from asyncq.proto.asynq_pb2 import TaskMessage
from asyncq.task import Task


class MemoryRun:
    """A run whose reports stay in memory."""

    def __init__(self, **message: Any) -> None:
        self.message = TaskMessage(**{"type": "t", "id": "1", "queue": "low", **message})
        self.deadline_at = 2_000_000_000.0
        self.cancel_reason: str | None = None
        self.state: Any = None
        self.client: Any = None
        self.lease_lost = asyncio.Event()
        self.held = True
        self.result: bytes | None = None
        self.progress: list[tuple[float, str]] = []
        self.loop: asyncio.AbstractEventLoop | None = None

    async def write_result(self, data: bytes) -> None:
        if not self.held:
            raise LeaseExpiredError
        self.result = data

    async def write_progress(self, fraction: float, note: str) -> None:
        if not self.held:
            raise LeaseExpiredError
        self.progress.append((fraction, note))

    def sync_call(self, function: Callable[..., Awaitable[None]], /, *args: Any) -> None:
        async def call() -> None:
            await function(*args)

        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)


def test_a_context_tells_the_facts_of_its_task() -> None:
    run = MemoryRun(retry=5, retried=2, headers={"trace": "abc"})
    run.state, run.client, run.cancel_reason = object(), object(), "why"
    ctx: Context[Any] = Context(run)
    assert (ctx.task_id, ctx.task_type, ctx.queue) == ("1", "t", "low")
    assert (ctx.retry_count, ctx.max_retry) == (2, 5)
    assert ctx.deadline == datetime(2033, 5, 18, 3, 33, 20, tzinfo=UTC)
    assert ctx.headers == {"trace": "abc"}
    assert ctx.state is run.state
    assert ctx.client is run.client
    assert ctx.cancel_reason == "why"
    assert ctx.lease_lost is run.lease_lost


def test_a_deadline_beyond_the_calendar_is_its_end() -> None:
    run = MemoryRun()
    run.deadline_at = float(2**63 - 1)
    assert Context[Any](run).deadline.year == 9999


def test_the_whole_task_describes_the_work_and_not_this_copy_of_it() -> None:
    run = MemoryRun(
        payload=b"raw",
        retry=3,
        timeout=60,
        deadline=2_000_000_000,
        retention=5,
        group_key="g",
        unique_key="asynq:{low}:unique:t:x",
        headers={"a": "b"},
    )
    ctx: Context[Any] = Context(run)
    expected = Task(
        "t",
        b"raw",
        queue="low",
        max_retry=3,
        timeout=60,
        deadline=datetime(2033, 5, 18, 3, 33, 20, tzinfo=UTC),
        retention=5,
        group="g",
        headers={"a": "b"},
    )
    assert ctx.task == expected
    assert ctx.task is ctx.task
    assert ctx.task.plan(0.0) == expected.plan(0.0)


def test_a_stored_payload_of_no_bytes_is_nil_as_go_reads_it() -> None:
    assert Context[Any](MemoryRun()).task.payload is None


def test_a_task_from_a_stranger_is_shown_however_odd_it_is() -> None:
    run = MemoryRun(type="", queue=" ", retry=-1, timeout=2**62, deadline=-(2**62), retention=-1)
    task = Context[Any](run).task
    assert (task.type, task.plan(0.0).queue) == ("", " ")


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
async def test_progress_is_a_fraction(fraction: float) -> None:
    run = MemoryRun()
    await Context[Any](run).progress(fraction, "half")
    assert run.progress == [(fraction, "half")]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 50, math.nan, True, "0.5", None])
async def test_progress_that_is_no_fraction_is_refused(fraction: Any) -> None:
    run = MemoryRun()
    with pytest.raises(OptionError, match="fraction of 0 to 1"):
        await Context[Any](run).progress(fraction)
    with pytest.raises(OptionError, match="fraction of 0 to 1"):
        Context[Any](run).sync.progress(fraction)
    assert run.progress == []


class Row(BaseModel):
    n: int


@pytest.mark.parametrize(
    ("value", "stored"),
    [(b"\xff", b"\xff"), (Row(n=1), b'{"n":1}'), ([1], b"[1]"), ("x", b'"x"'), (None, b"")],
)
async def test_a_result_can_be_written_early(value: object, stored: bytes) -> None:
    run = MemoryRun()
    await Context[Any](run).write_result(value)
    assert run.result == stored


async def test_a_result_that_is_no_json_is_refused() -> None:
    run = MemoryRun()
    with pytest.raises(PayloadError):
        await Context[Any](run).write_result(object())
    assert run.result is None


async def test_a_run_without_its_lease_can_report_nothing() -> None:
    run = MemoryRun()
    run.held = False
    with pytest.raises(LeaseExpiredError):
        await Context[Any](run).progress(0.5)
    with pytest.raises(LeaseExpiredError):
        await Context[Any](run).write_result(1)


async def test_a_thread_reports_through_sync() -> None:
    run = MemoryRun()
    run.loop = asyncio.get_running_loop()
    ctx: Context[Any] = Context(run)

    def work() -> None:
        ctx.sync.progress(0.25, "begun")
        ctx.sync.write_result(Row(n=2))
        run.held = False
        ctx.sync.progress(0.5)

    with pytest.raises(LeaseExpiredError):
        await asyncio.to_thread(work)
    assert (run.progress, run.result) == ([(0.25, "begun")], b'{"n":2}')


def test_log_records_name_their_task(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "asyncq"):
        Context[Any](MemoryRun()).log.info("sent %d", 3, extra={"mail": "m", "queue": "mine"})
    (record,) = caplog.records
    assert record.getMessage() == "sent 3"
    assert record.name == "asyncq.task"
    fields = {name: vars(record)[name] for name in ("task_id", "task_type", "queue", "mail")}
    assert fields == {"task_id": "1", "task_type": "t", "queue": "low", "mail": "m"}


def test_names_from_outside_cannot_forge_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    run = MemoryRun(type="a\nERROR forged\x1b[2J", id="\u2028", queue="grün")
    Context[Any](run).log.warning("x")
    (record,) = caplog.records
    fields = [vars(record)[name] for name in ("task_type", "task_id", "queue")]
    assert fields == [r"a\nERROR forged\x1b[2J", r"\u2028", "grün"]


async def test_the_current_context_is_found_from_below_the_handler() -> None:
    async def handler(name: str) -> list[str]:
        current.set(Context(MemoryRun(id=name)))
        await asyncio.sleep(0)
        inside = asyncio.create_task(asyncio.to_thread(lambda: current_context().task_id))
        return [current_context().task_id, await inside]

    found = await asyncio.gather(
        asyncio.create_task(handler("a")), asyncio.create_task(handler("b"))
    )
    assert list(found) == [["a", "a"], ["b", "b"]]
    with pytest.raises(AsyncqError, match="no current task"):
        current_context()
