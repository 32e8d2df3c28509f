"""A thousand tasks from a Go client, handled by a Python worker, read by Go's Inspector."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.interop import mix
from tests.interop.compare import Between, assert_same
from tests.interop.gopeer import Enqueued, GoInspector, GoTask, go_enqueue
from tests.interop.process import TaskEvent, read_record
from tests.interop.pyworker import PyWorker

pytestmark = pytest.mark.usefixtures("go_peer")


async def test_a_thousand_go_tasks_are_handled_by_a_python_worker(each_store_url: str) -> None:
    began = time.time()
    tasks = mix.thousand_tasks()
    async with PyWorker(each_store_url, queues=mix.QUEUES, concurrency=50) as worker:
        answers = await go_enqueue(each_store_url, tasks, concurrency=20)
        assert [answer for answer in answers if answer.error] == []
        flaky = sum(task["type"] == mix.FLAKY for task in tasks)
        starts = await worker.wait_started(len(tasks) + flaky, timeout=60)
        ends = await worker.wait_ended(len(tasks) + flaky)
    enqueued = list(zip(tasks, answers, strict=True))

    runs = mix.by_run(starts)
    assert_same(
        {
            mix.run_name(answer.id, n): _expected_run(
                task, answer, n, runs.get(mix.run_name(answer.id, n))
            )
            for task, answer in enqueued
            for n in range(2 if task["type"] == mix.FLAKY else 1)
        },
        runs,
    )
    failures = {mix.run_name(e.id, e.retry_count): e.err for e in ends if e.err}
    assert failures == {
        mix.run_name(a.id, 0): f"Retry: {mix.FLAKY_ERROR}"
        for t, a in enqueued
        if t["type"] == mix.FLAKY
    }

    async with GoInspector(each_store_url) as inspector:
        assert await inspector.queues() == sorted(mix.QUEUES)
        completed = [
            task
            for queue in mix.QUEUES
            for task in await inspector.list_tasks(queue, "completed", size=0)
        ]
        assert_same(
            {answer.id: _expected_info(task, began) for task, answer in enqueued},
            {info.id: info for info in completed},
        )
        assert_same(
            {
                answer.id: mix.expected_result("python", answer.id, task)
                for task, answer in enqueued
            },
            {info.id: read_record(mix.Result, json.loads(info.result)) for info in completed},
        )
        for queue, count, failed in mix.count_by_queue(tasks):
            info = await inspector.queue_info(queue)
            assert (info.size, info.completed) == (count, count), queue
            assert (info.processed, info.failed) == (count + failed, failed), queue
            assert (info.processed_total, info.failed_total) == (count + failed, failed), queue
    async with Redis.from_url(each_store_url) as redis:
        assert await redis.keys("*:unique:*") == [], "locks are released with the success"


def _expected_run(
    task: GoTask, answer: Enqueued, retry_count: int, start: TaskEvent | None
) -> dict[str, Any]:
    # The stored instant is Go's, cut to whole seconds.
    earliest = max(answer.at_ns / 1e9, math.floor(mix.due_at(task, answer.at_ns / 1e9)))
    started = start.at_ns / 1e9 if start else math.inf
    return mix.facts(task) | {
        "retry_count": retry_count,
        "at_ns": Between(earliest * 1e9, math.inf),
        "deadline_unix": mix.deadline_of_run(task, earliest, started),
    }


def _expected_info(task: GoTask, began: float) -> dict[str, object]:
    flaky = task["type"] == mix.FLAKY
    stored = mix.stored(task)
    return mix.facts(task) | {
        "state": "completed",
        "retried": int(flaky),
        "last_err": mix.FLAKY_ERROR if flaky else "",
        "last_failed_at": Between(int(began), time.time()) if flaky else None,
        "timeout_s": stored["timeout_s"],
        "deadline": stored["deadline_unix"] or None,
        "retention_s": stored["retention_s"],
        "completed_at": Between(int(began), time.time()),
        "next_process_at": None,
        "group": "",
        "is_orphaned": False,
    }
