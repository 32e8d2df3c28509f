"""Delayed tasks cross between Go and Python, scheduled and retried, and never start early.

How late they start is measured by the benchmarks; here it is only told apart from a look every few
seconds.
"""

from __future__ import annotations

import asyncio
import math
import time
from datetime import UTC, datetime

import pytest
from redis.asyncio import Redis

from asyncq import Client, Task, TaskState
from asyncq.broker.keys import queue_keys
from tests.interop import held
from tests.interop.gopeer import GoServer, GoTask, go_enqueue
from tests.interop.pyworker import PyWorker

pytestmark = pytest.mark.usefixtures("go_peer")

KEYS = queue_keys("default")


async def test_a_sleeping_forwarder_hears_of_what_go_schedules(store_url: str) -> None:
    async with Client(store_url) as client, PyWorker(store_url) as worker:
        await client.enqueue(Task("echo:now"))
        await client.enqueue(Task("echo:in an hour"), process_in=3600)
        await worker.wait_ended(1)
        # Due over three seconds: a forwarder that looked every 5 s could not be within 2.5 s of
        # each, wherever its looks fell.
        first = int(time.time()) + 2
        at = [first + i * 0.4 for i in range(9)]
        answers = await go_enqueue(
            store_url, [GoTask(type="echo:go", process_at_unix=instant) for instant in at]
        )
        started = await worker.wait_started(1 + len(at), timeout=20)

    # Go stores whole seconds, cut.
    due = {answer.id: int(instant) for answer, instant in zip(answers, at, strict=True)}
    late_s = {e.id: e.at_ns / 1e9 - due[e.id] for e in started if e.type == "echo:go"}
    assert late_s.keys() == due.keys()
    assert {id: late for id, late in late_s.items() if not 0 <= late < 2.5} == {}


async def test_go_starts_what_python_schedules_not_before_its_time(store_url: str) -> None:
    async with (
        Client(store_url) as client,
        Redis.from_url(store_url) as redis,
        GoServer(store_url, task_check_s=0.05, delayed_check_s=0.05) as server,
    ):
        due_at: dict[str, float] = {}
        for i in range(10):
            at = time.time() + 0.3 + i / 7
            task = Task("echo:py", process_at=datetime.fromtimestamp(at, UTC))
            due_at[(await client.enqueue(task)).id] = at
        scores = await held.scores(redis, KEYS.scheduled)
        assert {id: math.ceil(at) for id, at in due_at.items() if id in scores} == scores
        started = await server.wait_started(10, timeout=20)
    early = {e.id: due_at[e.id] - e.at_ns / 1e9 for e in started if e.at_ns / 1e9 < due_at[e.id]}
    assert early == {}
    assert {e.id for e in started} == due_at.keys()


async def test_a_task_that_failed_in_go_is_retried_in_python(store_url: str) -> None:
    async with Client(store_url) as client, Redis.from_url(store_url) as redis:
        handle = await client.enqueue(Task("flaky", b"1", headers={"a": "b"}), retention=60)
        async with GoServer(store_url, task_check_s=0.05, retry_delay_s=2) as server:
            (failure,) = await server.wait_ended(1)
        assert failure.err == "flaky failed on purpose"
        info = await handle.info()
        assert (info.state, info.retried, info.last_error) == (TaskState.RETRY, 1, failure.err)
        score = await redis.zscore(KEYS.retry, handle.id)
        assert score is not None
        assert info.next_process_at == datetime.fromtimestamp(score, UTC)

        async with PyWorker(store_url) as worker:
            result = await handle.result(timeout=20)
        (run,) = worker.started
        assert (run.id, run.retry_count, run.headers) == (handle.id, 1, {"a": "b"})
        assert run.at_ns / 1e9 >= score
        assert result["by"] == "python"
        assert (await handle.info()).retried == 1


async def test_a_task_that_failed_in_python_is_retried_in_go(store_url: str) -> None:
    (task,) = await go_enqueue(
        store_url,
        [GoTask(type="flaky:700ms", payload=b"1", retention_s=60, headers={"a": "b"})],
    )
    async with Client(store_url) as client, Redis.from_url(store_url) as redis:
        handle = client.handle(task.id)
        async with PyWorker(store_url) as worker:
            (failure,) = await worker.wait_ended(1)
        info = await handle.info()
        assert (info.state, info.retried) == (TaskState.RETRY, 1)
        assert info.last_error == "flaky:700ms failed on purpose"
        score = await redis.zscore(KEYS.retry, task.id)
        assert score is not None
        assert score == int(score) >= failure.at_ns / 1e9 + 0.7

        async with GoServer(store_url, task_check_s=0.05, delayed_check_s=0.05) as server:
            result = await asyncio.wait_for(handle.result(), 20)
        (run,) = server.started
        assert (run.id, run.retry_count, run.headers) == (task.id, 1, {"a": "b"})
        assert run.at_ns / 1e9 >= failure.at_ns / 1e9 + 0.7
        assert result["by"] == "go"
