"""`asyncq worker` as a process: from a module's name to handled tasks, and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from asyncq import Client, Task
from tests.e2e.command import Running, run
from tests.stores import StoreServer

APP = """
    import asyncio, logging, time
    from asyncq import Context, Mux

    mux = Mux()
    log = logging.getLogger("shop")

    @mux.task("double")
    async def double(number: int, ctx: Context) -> int:
        ctx.log.info("doubling %d", number)
        return number * 2

    @mux.task("thread")
    async def thread() -> None:
        log.info("it began")
        await asyncio.to_thread(time.sleep, 60)

    @mux.task("deaf")
    async def deaf() -> None:
        log.info("it began")
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass
"""
RUNS = " runs: "
"""The log of a worker that takes tasks."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the module `shop`."""
    (tmp_path / "shop.py").write_text(dedent(APP))
    return tmp_path


async def test_a_burst_handles_what_is_there_in_every_queue_and_ends(
    folder: Path, store_url: str
) -> None:
    async with Client(store_url) as client:
        tasks = [Task("double", n, queue=q, retention=60) for n in range(50) for q in ("a", "b")]
        handles = await client.enqueue_many(tasks)
        later = await client.enqueue(Task("double", 1, queue="a", process_in=3600))
        options = ("--queue", "a=2", "--queue", "b", "--concurrency", "5", "--log-format", "json")
        ended = await run("worker", "shop:mux", "--burst", *options, url=store_url, folder=folder)
        assert (ended.code, ended.out) == (0, ""), ended.err
        assert [await handle.result(timeout=1) for handle in handles] == [
            2 * n for n in range(50) for _ in "ab"
        ]
        assert (await later.info()).state == "scheduled"
    records = [json.loads(line) for line in ended.err.splitlines()]
    doubled = [record for record in records if record["message"] == "doubling 7"]
    assert {record["queue"] for record in doubled} == {"a", "b"}
    assert {record["task_type"] for record in doubled} == {"double"}
    assert {record["task_id"] for record in doubled} < {handle.id for handle in handles}
    started = " ".join(record["message"] for record in records[:5])
    for part in ("shop:mux", store_url, "a=2, b=1", "5 tasks at once", "double", "SIGTERM"):
        assert part in started


async def test_each_way_of_not_finding_the_mux_reads_differently(folder: Path) -> None:
    (folder / "broken.py").write_text(
        "import shop\n\ndef load():\n    return shop.prices\n\nload()"
    )
    module, attribute, failing = await asyncio.gather(
        *(
            run("worker", target, url="redis://127.0.0.1:1", folder=folder)
            for target in ("shup:mux", "shop:mix", "broken:mux")
        )
    )
    for ended, message in (
        (module, "there is no module 'shup'"),
        (attribute, "has no attribute 'mix': did you mean 'mux'?"),
    ):
        assert (ended.code, ended.out) == (2, "")
        assert message in ended.err
        assert "Traceback" not in ended.err
    assert (failing.code, failing.out) == (2, "")
    first, line, *_ = failing.err.splitlines()
    assert first.startswith("Traceback")
    assert line == f'  File "{folder / "broken.py"}", line 6, in <module>'
    assert "AttributeError: module 'shop' has no attribute 'prices'" in failing.err
    assert "module 'broken' was found, but failed while it was imported" in failing.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_worker_with_exit_code_0(
    folder: Path, store_url: str, number: signal.Signals
) -> None:
    loop = "asyncio" if number is signal.SIGINT else "uvloop"
    async with Running(
        "worker", "shop:mux", "--loop", loop, url=store_url, folder=folder
    ) as worker:
        await worker.logged(RUNS)
        worker.send(number)
        assert await worker.ended() == 0
    assert f"event loop {loop}" in worker.log
    assert "Traceback" not in worker.log


@pytest.mark.parametrize("stuck", ["thread", "deaf"])
async def test_what_does_not_end_is_left_behind_and_its_task_put_back(
    folder: Path, store_url: str, stuck: str
) -> None:
    async with Client(store_url) as client:
        handle = await client.enqueue(Task(stuck))
        async with Running(
            "worker", "shop:mux", "--shutdown-timeout", "100ms", url=store_url, folder=folder
        ) as worker:
            await worker.logged("it began")
            worker.send(signal.SIGTERM)
            assert await worker.ended() == 0
        assert "left behind" in worker.log
        info = await handle.info()
    assert (info.state, info.retried) == ("pending", 0)


async def test_without_redis_a_worker_waits_and_says_so_and_works_when_it_comes(
    folder: Path, redis_server: Callable[..., StoreServer]
) -> None:
    server = redis_server()
    server.stop()
    async with Running("worker", "shop:mux", url=server.url, folder=folder) as worker:
        await worker.logged("trying again until it works")
        server.start()
        await worker.logged(RUNS)
        async with Client(server.url) as client:
            handle = await client.enqueue(Task("double", 21, retention=60))
            assert await handle.result(timeout=10) == 42
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0


async def test_a_worker_that_still_waits_for_redis_ends_at_a_signal(folder: Path) -> None:
    async with Running(
        "worker", "shop:mux", "--burst", url="redis://127.0.0.1:1", folder=folder
    ) as worker:
        await worker.logged("trying again until it works")
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0


async def test_reload_starts_the_worker_again_when_a_file_changes(
    folder: Path, store_url: str
) -> None:
    async with (
        Client(store_url) as client,
        Running("worker", "shop:mux", "--reload", url=store_url, folder=folder) as worker,
    ):
        await worker.logged(RUNS)
        (folder / "notes.txt").write_text("no code")
        (folder / "shop.py").write_text("mux = None")
        await worker.logged("a change starts it again")  # nothing to run, so it waits
        (folder / "shop.py").write_text(dedent(APP).replace("number * 2", "number * 3"))
        await worker.logged(RUNS, times=2)
        handle = await client.enqueue(Task("double", 7, retention=60))
        assert await handle.result(timeout=10) == 21
        worker.send(signal.SIGINT)
        assert await worker.ended() == 0
    assert "notes.txt" not in worker.log


async def test_a_reloaded_worker_ends_when_its_parent_is_killed(
    folder: Path, store_url: str
) -> None:
    async with Running("worker", "shop:mux", "--reload", url=store_url, folder=folder) as worker:
        await worker.logged(RUNS)
        worker.send(signal.SIGKILL)
        await worker.ended()
    assert "SIGTERM: shutting down" in worker.log
    assert "is closed" in worker.log


async def test_a_worker_that_cannot_work_ends_with_exit_code_1_and_says_why(
    folder: Path, store_url: str
) -> None:
    (folder / "locked.py").write_text(
        dedent(
            """
            from contextlib import asynccontextmanager
            from asyncq import Mux

            @asynccontextmanager
            async def lifespan(mux):
                raise PermissionError("the till is locked")
                yield

            mux = Mux(lifespan=lifespan)
            """
        )
    )
    (folder / "broken.py").write_text(
        dedent(
            """
            from asyncq import Mux
            from asyncq.server.loops.overseer import Overseer

            async def tick(self):
                raise RuntimeError("the overseer fell asleep")

            Overseer.tick = tick
            mux = Mux()
            """
        )
    )
    lifespan, loop = await asyncio.gather(
        run("worker", "locked:mux", url=store_url, folder=folder),
        run("worker", "broken:mux", url=store_url, folder=folder),
    )
    assert lifespan.code == 1
    assert "the worker ends: PermissionError('the till is locked')" in lifespan.err
    assert loop.code == 1
    assert "the worker ends: a loop of the server died: RuntimeError('the overseer" in loop.err
