"""A parent of several processes: when it starts them, again, never again, and how it ends them."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any, cast

import pytest

from asyncq.server.pool import WorkerPool
from tests.chaos.live import eventually

CHILD = """
import os, signal, sys
line, number, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def note(what):
    "Leave a file, and tell whether it was there already."
    path = os.path.join(folder, f"{number} {what}")
    there = os.path.exists(path)
    open(path, "w").close()
    return there

def ready():
    os.write(line, b"r")

def wait():
    "Until the parent is gone."
    os.read(line, 1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Pool:
    """A pool whose processes run a piece of Python, and what it logged."""

    def __init__(
        self, caplog: pytest.LogCaptureFixture, folder: Path, code: str, count: int, **options: Any
    ) -> None:
        options = {"shutdown_timeout_s": 5, "restart_delay_s": 0.01, **options}
        code = CHILD + dedent(code)
        self.pool = WorkerPool(
            # Without `site` and the environment they start at once.
            lambda number, line: (
                *(sys.executable, "-ISc", code),
                *(str(line), str(number), str(folder)),
            ),
            count,
            **options,
        )
        self._caplog = caplog
        self._folder = folder

    def times(self, text: str) -> int:
        """How many lines hold a text."""
        return sum(text in message for message in self._caplog.messages)

    async def logged(self, text: str, times: int = 1) -> None:
        """Wait until so many lines hold a text."""
        await eventually(lambda: self.times(text) >= times)

    async def noted(self, *names: str) -> None:
        """Wait until processes have left their files."""
        await eventually(lambda: set(names) <= {path.name for path in self._folder.iterdir()})

    def delays(self) -> list[float]:
        """The seconds before each restart."""
        records = [one for one in self._caplog.records if "starts again in" in one.msg]
        return [pause_s for _, pause_s in (cast(tuple[int, float], one.args) for one in records)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[int]]:
        """Run it, and end it with the test."""
        run = asyncio.create_task(self.pool.run())
        try:
            yield run
        finally:
            self.pool.request_shutdown()
            self.pool.request_shutdown()
            await run


@pytest.fixture
def pool(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> Any:
    """`pool(code, count, **options)` makes a pool."""
    caplog.set_level(logging.INFO, "asyncq.pool")
    return lambda code, count=2, **options: Pool(caplog, tmp_path, code, count, **options)


async def test_the_others_start_when_the_first_is_ready(pool: Any, tmp_path: Path) -> None:
    # The first dies before it is ready once, so nobody may follow it then.
    made = pool(
        """
        if number == 1 and not note("began"):
            sys.exit(1)
        if number > 1 and not os.path.exists(os.path.join(folder, "1 ready")):
            note("too early")
        if number == 1:
            note("ready")
        ready()
        note("waits")
        wait()
        """,
        3,
    )
    async with made.running() as run:
        await made.noted("1 waits", "2 waits", "3 waits")
        assert not list(tmp_path.glob("*too early"))
        made.pool.request_shutdown()
        assert await run == 0
    assert made.times("is started") == 4
    assert made.times("ended with exit code 1") == 1


async def test_a_first_process_that_was_used_wrongly_ends_everything_with_its_code(
    pool: Any,
) -> None:
    made = pool("sys.exit(2)", 5)
    async with made.running() as run:
        assert await run == 2
    assert made.times("is started") == 1


async def test_a_later_wrong_usage_is_a_death_like_others(pool: Any) -> None:
    # The program on the disk changed under a pool that works.
    made = pool(
        """
        if number == 2 and not note("began"):
            sys.exit(2)
        ready()
        note("waits")
        wait()
        """
    )
    async with made.running() as run:
        await made.noted("1 waits", "2 waits")
        made.pool.request_shutdown()
        assert await run == 0
    assert made.times("process 2 starts again") == 1


async def test_pauses_double_while_a_process_keeps_dying(pool: Any) -> None:
    made = pool("ready(); die()", 1)
    async with made.running():
        await made.logged("was killed by signal 9 (Killed)", 4)
    for n, delay_s in enumerate(made.delays()[:4]):
        assert 0.5 <= delay_s / (0.01 * 2**n) <= 1


async def test_a_process_that_lived_long_enough_starts_again_after_the_first_pause(
    pool: Any,
) -> None:
    made = pool("ready(); die()", 1, settled_s=0)
    async with made.running():
        await made.logged("starts again", 5)
    assert all(0.005 <= delay_s <= 0.01 for delay_s in made.delays())


async def test_a_process_that_cannot_be_started_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    commands = iter([("/nowhere/python",), (sys.executable, "-ISc", "pass")])
    pool = WorkerPool(
        lambda number, line: next(commands),
        1,
        shutdown_timeout_s=5,
        burst=True,
        restart_delay_s=0.01,
    )
    assert await pool.run() == 0
    assert any("cannot be started: [Errno 2]" in message for message in caplog.messages)


async def test_what_does_not_end_in_time_is_killed_and_the_exit_code_tells(pool: Any) -> None:
    made = pool(
        """
        if number == 2:
            signal.signal(signal.SIGTERM, lambda *_: note("ignores it"))
        ready()
        note("waits")
        wait()
        """,
        shutdown_timeout_s=0.1,
        kill_grace_s=0.1,
    )
    async with made.running() as run:
        await made.noted("1 waits", "2 waits")
        made.pool.request_shutdown()
        await made.noted("2 ignores it")
        assert await run == 1
    assert made.times("did not end within 0.2 s: it is killed") == 1


async def test_a_failure_at_the_end_makes_exit_code_1(pool: Any) -> None:
    made = pool(
        """
        signal.signal(signal.SIGTERM, lambda *_: os._exit(number - 1))
        ready()
        note("waits")
        wait()
        """
    )
    async with made.running() as run:
        await made.noted("1 waits", "2 waits")
        made.pool.request_shutdown()
        assert await run == 1
    assert made.times("ended with exit code 1") == 1


async def test_each_signal_is_passed_on_once(pool: Any) -> None:
    made = pool(
        """
        signals = []
        def heard(*_):
            signals.append(1)
            note(f"heard {len(signals)}")
            if len(signals) == 2:
                os._exit(0)
        signal.signal(signal.SIGTERM, heard)
        ready()
        note("waits")
        wait()
        """
    )
    async with made.running() as run:
        await made.noted("1 waits", "2 waits")
        signal.raise_signal(signal.SIGINT)
        await made.noted("1 heard 1", "2 heard 1")
        assert not run.done()
        signal.raise_signal(signal.SIGTERM)
        assert await run == 0


async def test_without_new_tasks_nothing_that_dies_starts_again(pool: Any) -> None:
    made = pool(
        """
        def quiet(*_):
            note("is quiet")
            if number == 2:
                die()
        signal.signal(signal.SIGTSTP, quiet)
        ready()
        note("waits")
        wait()
        """
    )
    async with made.running() as run:
        await made.noted("1 waits", "2 waits")
        signal.raise_signal(signal.SIGTSTP)
        await made.noted("1 is quiet", "2 is quiet")
        await made.logged("process 2 does not start again")
        assert not run.done()
        signal.raise_signal(signal.SIGTERM)
        assert await run == 0
    assert made.times("is started") == 2


async def test_a_process_that_cannot_hear_that_no_tasks_are_wanted_ends(pool: Any) -> None:
    made = pool("note('waits'); wait()", 2)  # as one does that still imports its module
    async with made.running() as run:
        await made.noted("1 waits")
        made.pool.stop()
        await made.logged("process 1 does not start again")
        made.pool.request_shutdown()
        assert await run == 0
    assert made.times("is started") == 1


async def test_a_burst_starts_again_only_what_was_killed(pool: Any) -> None:
    made = pool(
        """
        ready()
        if number == 2 and not note("began"):
            die()
        """,
        burst=True,
    )
    async with made.running() as run:
        assert await run == 0
    assert made.times("is started") == 3


@pytest.mark.parametrize(
    ("code", "started"), [("ready(); sys.exit(number - 1)", 2), ("sys.exit(1)", 1)]
)
async def test_a_burst_in_which_a_process_gave_up_ends_with_exit_code_1(
    pool: Any, code: str, started: int
) -> None:
    made = pool(code, burst=True)
    async with made.running() as run:
        assert await run == 1
    assert made.times("is started") == started
