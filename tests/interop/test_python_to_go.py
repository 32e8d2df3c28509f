"""A thousand tasks from a Python client, handled by a Go server, waited for and read in Python."""

from __future__ import annotations

import asyncio
import math
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from asyncq import Client
from tests.interop import mix
from tests.interop.compare import Between, assert_same
from tests.interop.gopeer import GoInspector, GoServer, GoTask
from tests.interop.process import TaskEvent, read_record

pytestmark = pytest.mark.usefixtures("go_peer")

# They wait in Redis until Go is ready, which their time must not depend on.
WAITS = {"process_in_s", "process_at_unix"}


async def test_a_thousand_python_tasks_are_handled_by_a_go_server(each_store_url: str) -> None:
    tasks = mix.thousand_tasks()
    async with Client(each_store_url) as client:
        began = time.time()
        singles, bulk = tasks[::2], tasks[1::2]
        handles = await asyncio.gather(*(client.enqueue(mix.python_task(t)) for t in singles))
        handles += await client.enqueue_many(map(mix.python_task, bulk))
        enqueued_by = time.time()
        enqueued = list(zip([*singles, *bulk], handles, strict=True))

        waiting = await asyncio.gather(*(handle.info() for handle in handles))
        assert_same(
            {h.id: _expected_waiting(t, began, enqueued_by) for t, h in enqueued},
            {info.id: info for info in waiting},
        )
        async with GoInspector(each_store_url) as inspector:
            for state in ("pending", "scheduled"):
                assert_same(
                    {h.id: _go_waiting(t) for t, h in enqueued if _state(t) == state},
                    {
                        info.id: info
                        for queue in mix.QUEUES
                        for info in await inspector.list_tasks(queue, state, size=0)
                    },
                )

        waits = [asyncio.create_task(handle.result(timeout=60)) for handle in handles]
        async with GoServer(
            each_store_url,
            queues=mix.QUEUES,
            concurrency=50,
            task_check_s=0.05,
            delayed_check_s=0.1,
            retry_delay_s=0,
        ) as server:
            results = await asyncio.gather(*waits)
        assert_same(
            {h.id: mix.expected_result("go", h.id, t) for t, h in enqueued},
            {
                h.id: read_record(mix.Result, result)
                for h, result in zip(handles, results, strict=True)
            },
        )
        runs = mix.by_run(server.started)
        assert_same(
            {
                mix.run_name(h.id, n): _expected_run(t, n, began, runs.get(mix.run_name(h.id, n)))
                for t, h in enqueued
                for n in range(2 if t["type"] == mix.FLAKY else 1)
            },
            runs,
        )
        infos = await asyncio.gather(*(handle.info() for handle in handles))
        assert_same(
            {h.id: _expected_completed(t, began) for t, h in enqueued},
            {info.id: info for info in infos},
        )

    async with GoInspector(each_store_url) as inspector:
        for queue, count, failed in mix.count_by_queue(tasks):
            info = await inspector.queue_info(queue)
            assert (info.size, info.completed) == (count, count), queue
            assert (info.processed, info.failed) == (count + failed, failed), queue


def _state(task: GoTask) -> str:
    return "scheduled" if WAITS & task.keys() else "pending"


def _facts(task: GoTask) -> dict[str, object]:
    """What `TaskInfo` says of a task in every state."""
    stored = mix.stored(task)
    timeout_s, deadline = stored["timeout_s"], stored["deadline_unix"]
    return mix.facts(task) | {
        "payload": task.get("payload") or None,
        "timeout": timedelta(seconds=timeout_s) if timeout_s else None,
        "deadline": datetime.fromtimestamp(deadline, UTC) if deadline else None,
        "retention": timedelta(seconds=stored["retention_s"]),
        "group": None,
        "progress": None,
    }


def _expected_waiting(task: GoTask, began: float, enqueued_by: float) -> dict[str, object]:
    due: object = None
    if _state(task) == "scheduled":
        # Go reads whole seconds: rounded up, so that Go does not start it early.
        earliest, latest = (math.ceil(mix.due_at(task, at)) for at in (began, enqueued_by))
        due = Between(datetime.fromtimestamp(earliest, UTC), datetime.fromtimestamp(latest, UTC))
    return _facts(task) | {
        "state": _state(task),
        "next_process_at": due,
        "retried": 0,
        "last_error": "",
        "last_failed_at": None,
        "completed_at": None,
        "result": None,
    }


def _go_waiting(task: GoTask) -> dict[str, object]:
    stored = mix.stored(task)
    return mix.facts(task) | {
        "state": _state(task),
        "timeout_s": stored["timeout_s"],
        "deadline": stored["deadline_unix"] or None,
        "retention_s": stored["retention_s"],
        "retried": 0,
        "group": "",
    }


def _expected_run(
    task: GoTask, retry_count: int, began: float, start: TaskEvent | None
) -> dict[str, Any]:
    earliest = mix.due_at(task, began)
    started = start.at_ns / 1e9 if start else math.inf
    return mix.facts(task) | {
        "retry_count": retry_count,
        "at_ns": Between(earliest * 1e9, math.inf),
        "deadline_unix": mix.deadline_of_run(task, max(earliest, began), started),
    }


def _expected_completed(task: GoTask, began: float) -> dict[str, object]:
    flaky = task["type"] == mix.FLAKY
    ended = Between(datetime.fromtimestamp(int(began), UTC), datetime.now(UTC))
    return _facts(task) | {
        "state": "completed",
        "next_process_at": None,
        "retried": int(flaky),
        "last_error": mix.FLAKY_ERROR if flaky else "",
        "last_failed_at": ended if flaky else None,
        "completed_at": ended,
    }
