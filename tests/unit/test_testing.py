from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

import pytest
from pydantic import BaseModel

from asyncq import (
    AsyncqError,
    Client,
    Context,
    LeaseExpiredError,
    Mux,
    OptionError,
    Progress,
    Server,
    SyncClient,
    Task,
    TaskState,
)
from asyncq.testing import RecordingContext, asyncq_url, make_context

__all__ = ["asyncq_url"]  # a fixture for the tests below

ROOT = Path(__file__).parents[2]


class Welcome(BaseModel):
    user_id: int


@dataclass
class Deps:
    greeting: str


@asynccontextmanager
async def lifespan(mux: Mux[Deps]) -> AsyncGenerator[Deps]:
    yield Deps("hello")


mux = Mux(lifespan=lifespan)


@mux.task("email:welcome", retention=60)
async def welcome(payload: Welcome, ctx: Context[Deps]) -> str:
    await ctx.progress(0.5, "rendered")
    await ctx.write_result({"user": payload.user_id})
    return f"{ctx.state.greeting} {payload.user_id} (try {ctx.retry_count + 1})"


@mux.task("email:count")
def count(ctx: Context) -> None:
    ctx.sync.progress(1, "counted")
    ctx.sync.write_result(b"raw")


@mux.task("email:all")
async def welcome_all(ctx: Context) -> list[str]:
    tasks = [welcome.new(Welcome(user_id=n)) for n in range(3)]
    return [handle.id for handle in await ctx.client.enqueue_many(tasks)]


# Contexts


async def test_a_handler_is_called_with_a_context_and_its_reports_are_read() -> None:
    ctx = make_context(state=Deps("hello"), retry_count=1)
    assert await welcome(Welcome(user_id=1), ctx) == "hello 1 (try 2)"
    assert ctx.reports == [(0.5, "rendered")]
    assert ctx.written == b'{"user":1}'


def test_a_context_has_the_facts_it_was_given() -> None:
    deadline = datetime(2033, 5, 18, 3, 33, 20, tzinfo=UTC)
    ctx = make_context(
        task_id="1",
        task_type="email:welcome",
        payload={"user_id": 1},
        queue="low",
        retry_count=2,
        max_retry=5,
        deadline=deadline,
        headers={"trace": "abc"},
        cancel_reason="why",
    )
    assert (ctx.task_id, ctx.task_type, ctx.queue) == ("1", "email:welcome", "low")
    assert (ctx.retry_count, ctx.max_retry, ctx.cancel_reason) == (2, 5, "why")
    assert (ctx.deadline, ctx.headers) == (deadline, {"trace": "abc"})
    assert ctx.task == Task(
        "email:welcome",
        {"user_id": 1},
        queue="low",
        max_retry=5,
        deadline=deadline,
        headers={"trace": "abc"},
    )


def test_a_context_of_nothing_is_like_that_of_a_plain_task() -> None:
    ctx = make_context()
    assert (ctx.queue, ctx.retry_count, ctx.max_retry) == ("default", 0, 25)
    assert (ctx.headers, ctx.state, ctx.cancel_reason) == ({}, None, None)
    assert not ctx.lease_lost.is_set()
    assert timedelta(minutes=29) < ctx.deadline - datetime.now(UTC) <= timedelta(minutes=30)
    assert (ctx.reports, ctx.written) == ([], None)


def test_types_follow_the_state() -> None:
    assert_type(make_context(state=Deps("x")), RecordingContext[Deps])
    assert_type(make_context(), RecordingContext[Any])
    assert_type(make_context().reports, list[Progress])


def test_a_plain_function_reports_without_an_event_loop() -> None:
    ctx = make_context()
    count(ctx)
    assert (ctx.reports, ctx.written) == ([(1.0, "counted")], b"raw")


async def test_a_plain_function_reports_inside_an_event_loop() -> None:
    ctx = make_context()
    count(ctx)
    assert ctx.reports == [(1.0, "counted")]


async def test_after_a_lost_lease_reporting_fails() -> None:
    ctx = make_context(state=Deps("hello"))
    ctx.lease_lost.set()
    with pytest.raises(LeaseExpiredError):
        await welcome(Welcome(user_id=1), ctx)
    assert ctx.reports == []


async def test_a_report_is_checked_as_in_a_worker() -> None:
    with pytest.raises(OptionError, match="fraction"):
        await make_context().progress(2)


@pytest.mark.parametrize(
    "facts",
    [
        {"queue": " "},
        {"task_id": ""},
        {"task_type": ""},
        {"retry_count": -1},
        {"deadline": datetime(2033, 5, 18)},
        {"headers": {"trace": 1}},
    ],
)
def test_facts_that_make_no_sense_are_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        make_context(**facts)


def test_a_log_record_names_the_task(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_context(task_id="7").log.info("hello")
    assert caplog.records[0].__dict__["task_id"] == "7"


def test_without_a_client_the_error_tells_what_to_do() -> None:
    with pytest.raises(AsyncqError, match="make_context\\(client="):
        _ = make_context().client


# The store


async def test_a_handler_enqueues_into_the_store_of_the_test(asyncq_url: str) -> None:
    async with Client(asyncq_url) as client:
        for id in await welcome_all(make_context(client=client)):
            info = await client.handle(id, of=welcome).info()
            assert info.state == TaskState.PENDING


async def test_a_worker_runs_on_the_store_of_the_test(asyncq_url: str) -> None:
    async with Client(asyncq_url) as client, Server(asyncq_url).running(mux):
        handle = await client.enqueue(welcome.new(Welcome(user_id=1)))
        assert await handle.result(timeout=10) == "hello 1 (try 1)"


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_has_an_empty_store(asyncq_url: str, turn: int) -> None:
    with SyncClient(asyncq_url) as client:
        client.enqueue(Task("t"), task_id="the same")  # a conflict, if the store were shared


def test_the_fixture_comes_with_one_line_in_conftest(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "from asyncq.testing import make_context\n"
        'pytest_plugins = ["asyncq.testing"]\n'
        "context = make_context()\n"
    )
    (tmp_path / "test_it.py").write_text(
        "from asyncq import SyncClient, Task\n"
        "\n"
        "def test_it(asyncq_url, monkeypatch):\n"
        '    monkeypatch.setenv("ASYNCQ_REDIS_URL", asyncq_url)\n'
        "    with SyncClient() as client:\n"
        '        assert client.enqueue(Task("t", {"a": 1})).info().payload == b\'{"a":1}\'\n'
    )
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:asyncio", "test_it.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1 passed" in ended.stdout


def test_the_written_result_is_what_the_store_would_hold() -> None:
    ctx = make_context()
    ctx.sync.write_result(["<é>"])
    assert ctx.written is not None
    assert json.loads(ctx.written) == ["<é>"]
    ctx.sync.write_result(None)
    assert ctx.written == b""
