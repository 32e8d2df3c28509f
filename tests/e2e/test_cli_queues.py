"""`asyncq enqueue` and `asyncq stats` as processes, against a real store."""

from __future__ import annotations

import asyncio
import json
import signal
from datetime import timedelta
from pathlib import Path

from asyncq import Client, Mux, Server, Task
from tests.e2e.command import Running, run


async def test_an_enqueued_task_has_what_the_options_say_and_stats_count_it(
    tmp_path: Path, store_url: str
) -> None:
    options = [
        *("--queue", "low", "--max-retry", "3", "--timeout", "1m30s", "--retention", "1d"),
        *("--deadline", "2100-01-31T18:00Z", "--task-id", "one", "--unique", "1h"),
        *("--header", "trace=a=b", "--header", "x=é"),
    ]
    told = await run(
        *("enqueue", "mail", '{ "to": "é<" }', *options, "--json"), url=store_url, folder=tmp_path
    )
    assert (told.code, told.err) == (0, "")
    assert json.loads(told.out) == {"id": "one", "queue": "low", "type": "mail"}
    async with Client(store_url) as client:
        info = await client.handle("one", queue="low").info()
    assert info.payload == Task("mail", {"to": "é<"}).payload  # as every client writes it
    assert (info.max_retry, info.timeout, info.retention) == (
        3, timedelta(seconds=90), timedelta(days=1),
    )  # fmt: skip
    assert info.deadline is not None
    assert info.deadline.isoformat() == "2100-01-31T18:00:00+00:00"
    assert info.headers == {"trace": "a=b", "x": "é"}

    stats = await run("stats", "--json", url=store_url, folder=tmp_path)
    assert (stats.code, stats.err) == (0, "")
    (low,) = json.loads(stats.out)["queues"]
    assert (low["queue"], low["pending"], low["size"]) == ("low", 1, 1)
    assert json.loads(stats.out)["totals"]["pending"] == 1


async def test_waiting_gives_the_result_or_the_error(tmp_path: Path, store_url: str) -> None:
    mux = Mux()

    @mux.task("greet")
    async def greet(name: str) -> str:
        return f"Hello {name}"

    @mux.task("fail")
    async def fail() -> None:
        raise ValueError("the printer is on fire \x1b[31m")

    async with Server(store_url).running(mux):
        done, failed = await asyncio.gather(
            run("enqueue", "greet", '"Zoë"', "--wait", url=store_url, folder=tmp_path),
            run("enqueue", "fail", "--max-retry", "0", "--wait", "--json", url=store_url,
                folder=tmp_path),
        )  # fmt: skip
    assert (done.code, done.out) == (0, '"Hello Zoë"\n')
    assert done.err.startswith("enqueued 'greet'")
    assert (failed.code, failed.out) == (1, "")
    assert r"failed: ValueError: the printer is on fire \x1b[31m" in failed.err


async def test_ctrl_c_ends_a_wait_and_a_watch_without_a_traceback(
    tmp_path: Path, store_url: str
) -> None:
    wait = Running("enqueue", "greet", "--wait", url=store_url, folder=tmp_path)
    watch = Running(
        "stats", "--watch", "--json", "--interval", "100ms", url=store_url, folder=tmp_path
    )
    async with wait, watch:
        await wait.logged("enqueued 'greet'")
        await watch.logged('"pending": 1')
        await watch.logged('"pending": 1', times=3)
        wait.send(signal.SIGINT)
        watch.send(signal.SIGINT)
        assert (await wait.ended(), await watch.ended()) == (130, 0)
        assert "Traceback" not in wait.log + watch.log
