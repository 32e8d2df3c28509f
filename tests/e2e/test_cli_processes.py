"""`asyncq worker --processes` for real: one command, several workers, and no way to lose them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from asyncq import Client, Task
from tests.chaos.live import eventually
from tests.e2e.command import Running, run

APP = """
    import asyncio, os
    from pathlib import Path
    from asyncq import Mux

    mux = Mux()
    here = Path(__file__).parent

    @mux.task("share")
    async def share(stage: str) -> int:
        "Do nothing before two processes have a task of this stage."
        (here / f"{stage} {os.getpid()}").touch()
        while len(list(here.glob(f"{stage} *"))) < 2:
            await asyncio.sleep(0.01)
        with (here / "ran").open("a") as file:
            file.write("x")
        return os.getpid()

    @mux.task("apart", executor="process")
    def apart() -> list[int]:
        return [os.getpid(), os.getppid()]

    @mux.task("wait")
    async def wait() -> None:
        (here / f"waits {os.getpid()}").touch()
        await asyncio.sleep(60)
"""
RUNS = " runs: "
"""The log of a worker that takes tasks."""

TWO = ("worker", "shop:mux", "--processes", "2", "--concurrency", "5")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the module `shop`."""
    (tmp_path / "shop.py").write_text(dedent(APP))
    return tmp_path


def pids(worker: Running) -> list[int]:
    """The processes that were started, in order."""
    return [int(pid) for pid in re.findall(r"\(pid (\d+)\) is started", worker.log)]


async def shared(client: Client, stage: str, count: int = 200) -> set[int]:
    """Let processes share tasks, and return those that took some."""
    tasks = [Task("share", stage, retention=60) for _ in range(count)]
    handles = await client.enqueue_many(tasks)
    return {await handle.result(timeout=20) for handle in handles}


async def gone(*pids: int) -> None:
    """Wait for the end of processes, which only the kernel tells of after their parent's."""
    await eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids))


async def test_processes_share_the_tasks_and_end_in_order(
    folder: Path, client: Client, store_url: str
) -> None:
    async with Running(*TWO, url=store_url, folder=folder) as worker:
        await worker.logged(RUNS, times=2)
        assert await shared(client, "first") == set(pids(worker))
        assert (folder / "ran").read_text() == "x" * 200
        # Ctrl-C in a terminal must not reach them beside the parent's word.
        assert all(os.getpgid(pid) == pid for pid in pids(worker))
        apart = await client.enqueue(Task("apart", retention=60))
        child, parent = await apart.result(timeout=20)
        assert parent in pids(worker)
        worker.send(signal.SIGTSTP)
        await worker.logged("SIGTSTP: no new tasks are taken", times=3)
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
    assert worker.log.count("SIGTERM: shutting down") == 2
    assert worker.log.count("is closed") == 2
    assert not any(psutil.pid_exists(pid) for pid in (child, *pids(worker)))
    assert worker.log.count("5 tasks at once in each of 2 processes") == 1
    for number in (1, 2):
        assert re.search(rf"INFO +\[{number}\] asyncq.server: server \S+ runs", worker.log)


async def test_a_killed_process_is_replaced_and_the_work_goes_on(
    folder: Path, client: Client, store_url: str
) -> None:
    async with Running(*TWO, url=store_url, folder=folder) as worker:
        await worker.logged(RUNS, times=2)
        first, second = pids(worker)
        os.kill(first, signal.SIGKILL)
        await worker.logged(f"process 1 (pid {first}) was killed by signal 9 (Killed)")
        await worker.logged("process 1 starts again in 0.")
        await worker.logged(RUNS, times=3)
        replacement = pids(worker)[2]
        assert replacement not in (first, second)
        assert await shared(client, "after") == {second, replacement}
        worker.send(signal.SIGINT)
        assert await worker.ended() == 0


async def test_a_second_signal_takes_the_rest_of_the_time_of_all(
    folder: Path, client: Client, store_url: str
) -> None:
    options = ("--processes", "2", "--concurrency", "1", "--shutdown-timeout", "60")
    handles = await client.enqueue_many([Task("wait"), Task("wait")])
    async with Running("worker", "shop:mux", *options, url=store_url, folder=folder) as worker:
        await eventually(lambda: len(list(folder.glob("waits *"))) == 2)
        worker.send(signal.SIGTERM)
        await worker.logged("SIGTERM: shutting down", times=2)
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0
    infos = [await handle.info() for handle in handles]
    assert [(info.state, info.retried) for info in infos] == [("pending", 0)] * 2


async def test_no_process_outlives_a_killed_parent(folder: Path, store_url: str) -> None:
    async with Running(*TWO, url=store_url, folder=folder) as worker:
        await worker.logged(RUNS, times=2)
        worker.send(signal.SIGKILL)
        await worker.ended()
        await gone(*pids(worker))
    assert worker.log.count("SIGTERM: shutting down") == 2
    assert worker.log.count("is closed") == 2


async def test_a_missing_module_is_told_once_and_as_without_processes(
    folder: Path, store_url: str
) -> None:
    alone, several = await asyncio.gather(
        run("worker", "shup:mux", url=store_url, folder=folder),
        run("worker", "shup:mux", "--processes", "3", url=store_url, folder=folder),
    )
    assert (several.code, several.out) == (alone.code, alone.out) == (2, "")
    said = alone.err.splitlines()[-1]
    assert "there is no module 'shup'" in said
    assert several.err.splitlines().count(said) == 1
    assert several.err.count("is started") == 1


async def test_a_burst_of_several_processes_ends_when_all_have(
    folder: Path, client: Client, store_url: str
) -> None:
    handles = await client.enqueue_many([Task("share", "a", retention=60) for _ in range(50)])
    options = ("--burst", "--log-format", "json")
    ended = await run(*TWO, *options, url=store_url, folder=folder)
    assert (ended.code, ended.out) == (0, ""), ended.err
    assert len({await handle.result(timeout=1) for handle in handles}) == 2
    records = [json.loads(line) for line in ended.err.splitlines()]
    over = [one["process"] for one in records if "the burst is over" in one["message"]]
    assert sorted(over) == [1, 2]
    named = {(one["logger"], one.get("process")) for one in records}
    assert {("asyncq.server", 1), ("asyncq.server", 2), ("asyncq.pool", None)} <= named
    assert not {("asyncq.server", None), ("asyncq.pool", 1)} & named


async def test_reload_starts_all_processes_again(
    folder: Path, client: Client, store_url: str
) -> None:
    async with Running(*TWO, "--reload", url=store_url, folder=folder) as worker:
        await worker.logged(RUNS, times=2)
        before = pids(worker)
        (folder / "shop.py").write_text(dedent(APP).replace("60)", "30)"))
        await worker.logged(RUNS, times=4)
        await gone(*before)
        assert await shared(client, "anew") == set(pids(worker)[2:])
        worker.send(signal.SIGKILL)
        await worker.ended()
        await gone(*pids(worker))
