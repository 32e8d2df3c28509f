"""A task that fails in one language is told as such in the other."""

from __future__ import annotations

import asyncio

import pytest

from asyncq import Client, Mux, Server, Task, TaskFailedError
from tests.interop.gopeer import GoInspector, GoServer, GoTask, go_enqueue
from tests.interop.pyworker import PyWorker

pytestmark = pytest.mark.usefixtures("go_peer")

GO_ERRORS = {
    "skip": "skip: skip retry for the task",
    "fail": "fail failed on purpose",
    "panic": "panic error cause by: panic",
    "notfound": 'handler not found for task "notfound"',
}
GONE = "it was revoked or deleted"


async def test_a_handle_raises_what_a_task_failed_with_in_go(store_url: str) -> None:
    async with Client(store_url) as client, GoServer(store_url, task_check_s=0.05) as server:
        revoked = await client.enqueue(Task("block"), retention=60)
        last = asyncio.create_task(revoked.result(timeout=20))
        texts = {}
        for mode in GO_ERRORS:
            handle = await client.enqueue(Task(mode), retention=60, max_retry=0)
            with pytest.raises(TaskFailedError) as failed:
                await handle.result(timeout=20)
            texts[mode] = failed.value.error[: len(GO_ERRORS[mode])]
        assert texts == GO_ERRORS
        # By now `last` has seen its task: it asked first, on the same connection.
        server.release(revoked.id, "revoke")
        with pytest.raises(TaskFailedError, match=GONE):
            await last


async def test_a_handle_hears_that_go_deleted_its_task(store_url: str) -> None:
    async with Client(store_url) as client, GoInspector(store_url) as inspector:
        deleted, archived = [await client.enqueue(Task("t"), retention=60) for _ in range(2)]
        last = asyncio.create_task(deleted.result(timeout=20))
        await inspector.archive_task("default", archived.id)
        with pytest.raises(TaskFailedError, match="archived"):
            await archived.result(timeout=20)
        await inspector.delete_task("default", deleted.id)
        with pytest.raises(TaskFailedError, match=GONE):
            await last


async def test_go_reads_what_a_task_failed_with_in_python(store_url: str) -> None:
    modes = {
        "skip": ("archived", 0, "skip failed for good"),
        "fail:0ms": ("archived", 2, "fail:0ms failed on purpose"),
        "fail:3600000ms": ("retry", 1, "fail:3600000ms failed on purpose"),
    }
    answers = await go_enqueue(store_url, [GoTask(type=mode, max_retry=2) for mode in modes])
    (revoked,) = await go_enqueue(store_url, [GoTask(type="revoke", retention_s=60)])
    async with PyWorker(store_url) as worker:
        await worker.wait_ended(6)
    async with GoInspector(store_url) as inspector:
        infos = [await inspector.task_info("default", answer.id) for answer in answers]
        seen = {i.type: (i.state, i.retried, i.last_err) for i in infos}
        assert seen == modes
        counters = await inspector.queue_info("default")
        assert (counters.processed, counters.failed, counters.size) == (6, 5, 3)
        assert revoked.id not in {info.id for info in infos}


async def test_an_unknown_type_fails_with_the_same_words_in_both(store_url: str) -> None:
    # Go's peer answers `notfound` as its mux answers a type that it does not know.
    names = ["notfound", "notfound:é", "notfound:<b> & co"]
    async with Client(store_url) as client:
        mine = [await client.enqueue(Task(name), max_retry=0) for name in names]
        async with Server(store_url).running(Mux()) as server:
            await server.drain()
        theirs = [await client.enqueue(Task(name), max_retry=0) for name in names]
        async with GoServer(store_url, task_check_s=0.05) as go:
            await go.wait_ended(len(names))
        for python, other in zip(mine, theirs, strict=True):
            assert (await python.info()).last_error == (await other.info()).last_error
