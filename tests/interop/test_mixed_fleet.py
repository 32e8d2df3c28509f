"""A Go server and a Python worker on the same queues share the work, and no task runs twice."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from asyncq import Client, Task
from tests.interop.gopeer import GoInspector, GoServer, GoTask, go_enqueue
from tests.interop.process import ServerProcess
from tests.interop.pyworker import PyWorker

pytestmark = pytest.mark.usefixtures("go_peer")

QUEUES = {"critical": 3, "default": 1}
FROM_EACH = 2500
EACH_AT_LEAST = 500


async def test_go_and_python_share_5000_tasks_and_each_runs_once(store_url: str) -> None:
    go_tasks = [GoTask(type="sleep:5ms", queue=list(QUEUES)[i % 2]) for i in range(FROM_EACH)]
    tasks = [Task("sleep:5ms", queue=list(QUEUES)[i % 2]) for i in range(FROM_EACH)]
    async with (
        GoInspector(store_url) as inspector,
        GoServer(store_url, queues=QUEUES, concurrency=10, task_check_s=0.05) as go,
        PyWorker(store_url, queues=QUEUES, concurrency=10) as python,
        Client(store_url) as client,
    ):
        # Enqueued while both work: neither may be ahead because the other polls.
        answers, handles = await asyncio.gather(
            go_enqueue(store_url, go_tasks, concurrency=10), client.enqueue_many(tasks)
        )
        ids = {answer.id for answer in answers} | {handle.id for handle in handles}
        assert len(ids) == 2 * FROM_EACH

        await _wait_ended(len(ids), go, python)
        await asyncio.gather(go.stop(), python.stop())

        starts = Counter(event.id for event in [*go.started, *python.started])
        assert {id: n for id, n in starts.items() if n != 1 or id not in ids} == {}
        assert starts.keys() == ids
        assert [event for event in [*go.ended, *python.ended] if event.err] == []
        shares = {"go": len(go.started), "python": len(python.started)}
        assert min(shares.values()) >= EACH_AT_LEAST, shares
        for queue in QUEUES:
            info = await inspector.queue_info(queue)
            assert (info.processed, info.failed, info.size) == (FROM_EACH, 0, 0), queue


async def _wait_ended(n: int, *sides: ServerProcess) -> None:
    """Wait until the sides together have ended `n` tasks."""
    while sum(len(side.ended) for side in sides) < n:
        waits = [
            asyncio.create_task(side.wait_ended(len(side.ended) + 1, timeout=30)) for side in sides
        ]
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for wait in done:
            wait.result()  # raises if a side is gone, or nothing happens any more
