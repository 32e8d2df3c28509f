"""Names that need care in keys, logs and JSON are the same on both sides."""

from __future__ import annotations

from typing import Any

import pytest

from asyncq import Client, Context, Mux, Server, Task
from tests.interop.gopeer import GoInspector, GoServer, GoTask, go_enqueue

pytestmark = pytest.mark.usefixtures("go_peer")

QUEUES = [" Mixed Case:ü ", "a:b", "{tag}", "日本"]
TYPE = "echo:ü <b>\n:x"
ID = 'id:ü "x" \t\n/ \u2028'


@pytest.mark.parametrize("queue", QUEUES)
async def test_odd_names_cross_from_go_to_python(store_url: str, queue: str) -> None:
    seen: list[tuple[str, str, str]] = []
    mux = Mux()

    @mux.not_found
    async def run(task: Task[Any], ctx: Context) -> None:
        seen.append((ctx.queue, ctx.task_type, ctx.task_id))

    task = GoTask(type=TYPE, id=ID, queue=queue, retention_s=60, unique_s=60)
    (answer,) = await go_enqueue(store_url, [task])
    assert answer.error == ""
    async with Server(store_url, queues={queue: 1}).running(mux) as server:
        await server.drain()
    assert seen == [(queue, TYPE, ID)]
    async with GoInspector(store_url) as inspector:
        assert await inspector.queues() == [queue]
        info = await inspector.task_info(queue, ID)
        assert (info.type, info.state) == (TYPE, "completed")


@pytest.mark.parametrize("queue", QUEUES)
async def test_odd_names_cross_from_python_to_go(store_url: str, queue: str) -> None:
    async with Client(store_url) as client:
        task = Task(TYPE, queue=queue, task_id=ID, retention=60, unique=60)
        handle = await client.enqueue(task)
        async with GoServer(store_url, queues={queue: 1}, task_check_s=0.05) as server:
            assert (await handle.result(timeout=10))["id"] == ID
        (run,) = server.started
        assert (run.queue, run.type, run.id) == (queue, TYPE, ID)
