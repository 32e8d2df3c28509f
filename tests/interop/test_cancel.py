"""A running task is cancelled by its id from the other language."""

from __future__ import annotations

import pytest

from asyncq import Client, Task, TaskState
from tests.interop.gopeer import GoInspector, GoServer, GoTask, go_enqueue
from tests.interop.pyworker import PyWorker

pytestmark = pytest.mark.usefixtures("go_peer")

CANCELED = "context canceled"


async def test_go_cancels_a_task_that_python_runs(store_url: str) -> None:
    async with GoInspector(store_url) as inspector:
        async with PyWorker(store_url) as worker:
            first, other = await go_enqueue(store_url, [GoTask(type="block:x")] * 2)
            await worker.wait_started(2)
            await inspector.cancel("no such task")
            await inspector.cancel(first.id)
            (end,) = await worker.wait_ended(1)
            worker.release(other.id)
            await worker.wait_ended(2)
        assert (end.id, end.err) == (first.id, CANCELED)
        assert [e.err for e in worker.ended if e.id == other.id] == [""]
        info = await inspector.task_info("default", first.id)
        assert (info.state, info.retried, info.last_err) == ("retry", 1, CANCELED)


async def test_go_cancels_a_last_try_and_python_archives_it(store_url: str) -> None:
    async with GoInspector(store_url) as inspector:
        async with PyWorker(store_url) as worker:
            (task,) = await go_enqueue(store_url, [GoTask(type="block:x", max_retry=0)])
            await worker.wait_started(1)
            await inspector.cancel(task.id)
            await worker.wait_ended(1)
        info = await inspector.task_info("default", task.id)
        assert (info.state, info.retried, info.last_err) == ("archived", 0, CANCELED)


async def test_python_cancels_a_task_that_go_runs(store_url: str) -> None:
    async with Client(store_url) as client:
        async with GoServer(store_url, task_check_s=0.05) as server:
            first, other = [await client.enqueue(Task("block:x")) for _ in range(2)]
            await server.wait_started(2)
            await client.handle("no such task").cancel()
            await client.handle(first.id).cancel()
            (end,) = await server.wait_ended(1)
            server.release(other.id)
            await server.wait_ended(2)
        assert (end.id, end.err) == (first.id, CANCELED)
        assert [e.err for e in server.ended if e.id == other.id] == [""]
        info = await first.info()
        assert (info.state, info.retried, info.last_error) == (TaskState.RETRY, 1, CANCELED)
