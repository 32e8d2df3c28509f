"""Go's Inspector, which its CLI and Asynqmon are built on, sees and steers Python workers."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable

import pytest

from asyncq import Client, Task, TaskState
from tests.interop.gopeer import GoInspector, GoServerInfo, GoTask, go_enqueue
from tests.interop.pyworker import PyWorker

pytestmark = pytest.mark.usefixtures("go_peer")


async def test_a_python_server_shows_with_what_it_runs_until_it_ends(store_url: str) -> None:
    began = time.time()
    tasks = [
        GoTask(type="block:a", queue="a", payload=b"\x00\xff", timeout_s=100),
        GoTask(type="block:b", queue="b", deadline_unix=int(began) + 500),
    ]
    async with GoInspector(store_url) as inspector:
        worker = PyWorker(store_url, queues={"a": 6, "b": 2}, strict=True, concurrency=7)
        async with worker:
            (idle,) = await inspector.servers()
            assert (idle.status, idle.active_workers) == ("active", ())
            answers = await go_enqueue(store_url, tasks)
            await worker.wait_started(2)
            busy = await _server_when(inspector, lambda server: len(server.active_workers) == 2)
            now = time.time()

            assert (busy.id, busy.started) == (idle.id, idle.started)
            assert busy.started is not None
            assert began - 1 <= busy.started <= now
            assert (busy.host, busy.pid) == (socket.gethostname(), worker.pid)
            assert (busy.concurrency, busy.queues) == (7, {"a": 6, "b": 2})
            assert (busy.strict_priority, busy.status) == (True, "active")
            running = {info.queue: info for info in busy.active_workers}
            for task, answer in zip(tasks, answers, strict=True):
                info = running[answer.queue]
                assert (info.task_id, info.task_type) == (answer.id, task["type"])
                assert info.payload == task.get("payload", b"")
                assert info.started is not None
                assert began - 1 <= info.started <= now
                deadline = task.get("deadline_unix", info.started + task.get("timeout_s", 0))
                assert info.deadline == pytest.approx(deadline, abs=0.001)

            worker.signal(signal.SIGTSTP)
            stopped = await _server_when(inspector, lambda server: server.status == "stopped")
            assert len(stopped.active_workers) == 2, "what runs goes on"
            for answer in answers:
                worker.release(answer.id)
            await worker.wait_ended(2)
        assert await inspector.servers() == []


async def test_a_paused_queue_is_left_alone_until_go_resumes_it(store_url: str) -> None:
    async with (
        Client(store_url) as client,
        GoInspector(store_url) as inspector,
        PyWorker(store_url, queues={"a": 1, "b": 1}) as worker,
    ):
        await client.enqueue(Task("echo:first"), queue="a")
        await worker.wait_ended(1)
        waits_s: list[float] = []
        for i in range(5):
            await inspector.pause("a")
            (go,) = await go_enqueue(store_url, [GoTask(type="echo:go", queue="a")])
            python = await client.enqueue(Task("echo:python"), queue="a")
            # One worker takes from both queues: had it taken from a, it had done so by now.
            await client.enqueue(Task("echo:other"), queue="b")
            await _handled(worker, "b", i + 1)
            assert _count(worker, "a") == 1 + 2 * i
            info = await inspector.queue_info("a")
            assert (info.paused, info.pending, info.active) == (True, 2, 0)
            assert (await python.info()).state is TaskState.PENDING

            resumed_at = time.time()
            await inspector.unpause("a")
            await _handled(worker, "a", 3 + 2 * i)
            runs = {event.id: event.at_ns / 1e9 - resumed_at for event in worker.ended}
            waits_s += [runs[go.id], runs[python.id]]
    # Five times in a row: a worker that looked every few seconds would be late once.
    assert max(waits_s) < 2, waits_s


async def test_tasks_of_python_wait_in_groups_that_go_lists(store_url: str) -> None:
    async with Client(store_url) as client, GoInspector(store_url) as inspector:
        handles = [
            await client.enqueue(
                Task("event", b"%d" % i, group=f"g:{i % 2}"), queue="q", unique=60, max_retry=i
            )
            for i in range(5)
        ]
        (later,) = await client.enqueue_many(
            [Task("event", b"later", queue="q", group="g:0", process_in=3600)]
        )
        info = await inspector.queue_info("q")
        assert (info.groups, info.aggregating, info.scheduled, info.size) == (2, 5, 1, 6)
        for g in range(2):
            listed = await inspector.list_tasks("q", "aggregating", group=f"g:{g}")
            assert {task.id: (task.payload, task.max_retry) for task in listed} == {
                handles[i].id: (b"%d" % i, i) for i in range(g, 5, 2)
            }
            assert {(task.state, task.group) for task in listed} == {("aggregating", f"g:{g}")}
        scheduled = await inspector.task_info("q", later.id)
        assert (scheduled.state, scheduled.group) == ("scheduled", "g:0")

        (go,) = await go_enqueue(store_url, [GoTask(type="event", queue="q", group="g:0")])
        seen = await client.handle(go.id, queue="q").info()
        assert (seen.state, seen.group) == (TaskState.AGGREGATING, "g:0")


async def test_go_runs_archives_and_deletes_tasks_of_python(store_url: str) -> None:
    async with Client(store_url) as client, GoInspector(store_url) as inspector:
        run, archived, deleted = [
            await client.enqueue(Task("echo", b"%d" % i), process_in=3600, unique=60, retention=60)
            for i in range(3)
        ]
        await inspector.run_task("default", run.id)
        await inspector.archive_task("default", archived.id)
        await inspector.delete_task("default", deleted.id)
        async with PyWorker(store_url) as worker:
            assert (await run.result(timeout=10))["id"] == run.id
        assert [event.id for event in worker.started] == [run.id]
        assert (await archived.info()).state is TaskState.ARCHIVED
        again = await client.enqueue(Task("echo", b"2"), unique=60)
        assert again.id != deleted.id, "the lock went with the task"


async def _server_when(
    inspector: GoInspector, condition: Callable[[GoServerInfo], bool]
) -> GoServerInfo:
    """Look until the only server is as it should be: its records are written every 5 s."""
    async with asyncio.timeout(10):
        while True:
            (server,) = await inspector.servers()
            if condition(server):
                return server
            await asyncio.sleep(0.02)


async def _handled(worker: PyWorker, queue: str, n: int) -> None:
    """Wait until the worker has handled `n` tasks of a queue."""
    await worker.wait_for(lambda: _count(worker, queue) == n)


def _count(worker: PyWorker, queue: str) -> int:
    return sum(event.queue == queue for event in worker.ended)
