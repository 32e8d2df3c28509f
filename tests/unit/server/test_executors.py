"""Plain handlers in real threads and real processes; only the run around them is a stand-in."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from asyncq.context import Context, current, current_context
from asyncq.errors import (
    AsyncqError,
    DuplicateTaskError,
    LeaseExpiredError,
    ProcessDiedError,
    QueueNotFoundError,
    ServerClosedError,
)
from asyncq.handler import Entry
from asyncq.message import TaskMessage
from asyncq.mux import Mux
from asyncq.retry import Retry, RevokeTask, SkipRetry, Snooze
from asyncq.server.executors import Executors
from tests.unit.server import process_handlers

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


class StandInRun:
    """What a server keeps of a run, without a server: it notes what was reported."""

    def __init__(self, **fields: Any) -> None:
        defaults: dict[str, Any] = {"id": "task-1", "type": "t", "queue": "low"}
        self.message = TaskMessage(**defaults | fields)
        self.deadline_at = 1_800_000_000.5
        self.cancel_reason: str | None = None
        self.state: Any = {"a": "state"}
        self.client: Any = None
        self.lease_lost = asyncio.Event()
        self.reported: list[object] = []
        self.error: Exception | None = None
        self._loop = asyncio.get_running_loop()

    async def write_result(self, data: bytes) -> None:
        self._note(data)

    async def write_progress(self, fraction: float, note: str) -> None:
        self._note((fraction, note))

    def sync_call(self, function: Callable[..., Awaitable[None]], /, *args: Any) -> None:
        async def call() -> None:
            await function(*args)

        asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _note(self, what: object) -> None:
        assert asyncio.get_running_loop() is self._loop
        if self.error is not None:
            raise self.error
        self.reported.append(what)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def executors() -> AsyncIterator[Executors]:
    """Shared, since a process takes a while to start."""
    executors = Executors(8, processes=2)
    yield executors
    await executors.close(wait=False)


def entry_of(executors: Executors, function: Callable[..., Any]) -> Entry:
    mux = Mux()
    return Entry(mux.task("t")(function), executors.run)


async def call(
    executors: Executors, type: str, payload: bytes = b"", run: StandInRun | None = None
) -> Any:
    """Run a handler of `process_handlers` as a server does."""
    entry = Entry(process_handlers.mux.types[type], executors.run)
    context = Context[Any](run or StandInRun())
    current.set(context)
    return await entry.call(payload, context)


async def output(directory: Path, command: list[str]) -> tuple[int, str, str]:
    """Run Python to its end and return its exit code, output and errors."""

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=directory,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    done = await asyncio.to_thread(run)
    return done.returncode, done.stdout, done.stderr


async def exists(path: Path) -> None:
    await _until(path.exists)


async def gone(pid: int) -> None:
    await _until(lambda: not psutil.pid_exists(pid) or _is_zombie(pid))


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - no event crosses from another process
            await asyncio.sleep(0.005)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


# Threads


async def test_a_thread_handler_has_its_context_and_context_variables(
    executors: Executors,
) -> None:
    variable: ContextVar[str] = ContextVar("variable")

    def handler(ctx: Context) -> tuple[str, bool, bool]:
        result = variable.get(), current_context() is ctx, threading.main_thread().ident
        variable.set("changed by the handler")
        return (*result[:2], threading.get_ident() == result[2])

    variable.set("set by the caller")
    context = Context[Any](StandInRun())
    current.set(context)
    result = await entry_of(executors, handler).call(b"", context)
    assert result == ("set by the caller", True, False)
    assert variable.get() == "set by the caller"


@pytest.mark.parametrize(
    "error", [ValueError("bad"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()]
)
async def test_what_a_thread_handler_raises_is_raised(
    executors: Executors, error: BaseException
) -> None:
    def handler() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await executors.run(entry_of(executors, handler), ())
    assert caught.value is error


async def test_stop_iteration_of_a_thread_handler_is_a_runtime_error(
    executors: Executors,
) -> None:
    def handler() -> None:
        next(iter(()))

    with pytest.raises(RuntimeError, match="StopIteration"):
        await executors.run(entry_of(executors, handler), ())


async def test_as_many_threads_as_the_concurrency_run_at_once() -> None:
    executors = Executors(3)
    together = threading.Barrier(3, timeout=10)
    running: list[int] = []
    most = 0

    def handler() -> None:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        together.wait()
        running.pop()

    entry = entry_of(executors, handler)
    await asyncio.gather(*(executors.run(entry, ()) for _ in range(9)))
    assert most == 3
    await executors.close()


async def test_an_idle_thread_is_used_again_and_keeps_nothing_of_its_last_call(
    executors: Executors,
) -> None:
    class Payload:
        pass

    def handler(payload: Any) -> int:
        return threading.get_ident()

    entry = entry_of(executors, handler)
    payload = Payload()
    seen = weakref.ref(payload)
    first = await executors.run(entry, (payload,))
    del payload
    gc.collect()
    assert seen() is None
    assert {await executors.run(entry, (None,)) for _ in range(20)} == {first}


async def test_an_error_of_a_thread_makes_no_cycle_that_keeps_its_payload(
    executors: Executors,
) -> None:
    class Payload:
        pass

    def handler(payload: Any) -> None:
        raise ValueError

    async def fail(payload: Payload) -> None:
        with pytest.raises(ValueError, match=r"^$"):
            await executors.run(entry, (payload,))

    entry = entry_of(executors, handler)
    payload = Payload()
    seen = weakref.ref(payload)
    gc.disable()
    try:
        await fail(payload)
        del payload
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_thread_handler_holds_its_place_until_it_returns(fails: bool) -> None:
    executors = Executors(1)
    started, may_return = threading.Event(), threading.Event()

    def handler() -> str:
        started.set()
        may_return.wait(10)
        if fails:
            raise ValueError("too late")
        return "too late"

    def next_handler() -> bool:
        return may_return.is_set()

    running = asyncio.create_task(executors.run(entry_of(executors, handler), ()))
    await asyncio.to_thread(started.wait, 10)
    waiting = asyncio.create_task(executors.run(entry_of(executors, next_handler), ()))
    for reason in ("deadline", "again"):
        running.cancel(reason)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not running.done()
        assert not waiting.done()
    may_return.set()
    with pytest.raises(asyncio.CancelledError) as caught:
        await running
    assert caught.value.args == ("deadline",)
    assert await waiting is True
    await executors.close()


async def test_a_call_that_waits_for_a_thread_is_cancelled_at_once() -> None:
    executors = Executors(1)
    may_return = threading.Event()
    called: list[str] = []
    running = asyncio.create_task(
        executors.run(entry_of(executors, lambda: may_return.wait(10)), ())
    )
    waiting = asyncio.create_task(
        executors.run(entry_of(executors, lambda: called.append("called")), ())
    )
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    may_return.set()
    await running
    await executors.close()
    assert called == []


async def test_close_waits_for_threads_and_ends_them() -> None:
    executors = Executors(2)
    started, may_return = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def handler() -> str:
        threads.append(threading.current_thread())
        started.set()
        may_return.wait(10)
        return "done"

    entry = entry_of(executors, handler)
    running = asyncio.create_task(executors.run(entry, ()))
    await asyncio.to_thread(started.wait, 10)
    closing = asyncio.create_task(executors.close())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not closing.done()
    with pytest.raises(ServerClosedError):
        await executors.run(entry, ())
    may_return.set()
    assert await running == "done"
    await closing
    await asyncio.to_thread(threads[0].join, 10)
    assert not threads[0].is_alive()
    await executors.close()


async def test_close_without_waiting_leaves_a_stuck_thread_behind() -> None:
    executors = Executors(2)
    started, may_return = threading.Event(), threading.Event()

    def handler() -> None:
        started.set()
        may_return.wait(10)

    entry = entry_of(executors, handler)
    running = asyncio.create_task(executors.run(entry, ()))
    cancelled = asyncio.create_task(executors.run(entry, ()))
    await asyncio.to_thread(started.wait, 10)
    cancelled.cancel()
    await executors.close(wait=False)
    with pytest.raises(ServerClosedError):
        await running
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    may_return.set()
    await executors.close()


async def test_a_stuck_thread_does_not_keep_the_interpreter_alive(tmp_path: Path) -> None:
    assert await output(tmp_path, ["-c", STUCK]) == (0, "left\n", "")


STUCK = """
import asyncio, threading, time
from asyncq.handler import Entry
from asyncq.mux import Mux
from asyncq.server.executors import Executors

started = threading.Event()

def stuck():
    started.set()
    time.sleep(60)

async def main():
    executors = Executors(2)
    running = asyncio.create_task(executors.run(Entry(Mux().task("t")(stuck), executors.run), ()))
    await asyncio.to_thread(started.wait)
    running.cancel()
    await executors.close(wait=False)

asyncio.run(main())
print("left")
"""


# Processes


async def test_a_process_handler_gets_its_payload_and_returns_its_result(
    executors: Executors,
) -> None:
    result = await call(executors, "sum", b'{"values": [1, 2, 3]}')
    assert result == process_handlers.Numbers(values=[6])
    assert await call(executors, "decorated", b"4") == 50


async def test_a_process_is_used_again_and_no_more_are_started_than_allowed(
    executors: Executors,
) -> None:
    first = await call(executors, "pid")
    assert first != os.getpid()
    assert await call(executors, "pid") == first
    many = await asyncio.gather(*(call(executors, "pid") for _ in range(12)))
    assert len(set(many)) == 2
    assert first in many


async def test_a_process_handler_sees_the_facts_of_its_task(executors: Executors) -> None:
    run = StandInRun(
        type="facts", payload=b"{}", retried=2, retry=7, timeout=30, headers={"trace": "1"}
    )
    facts = await call(executors, "facts", run=run)
    assert facts.pop("task") == Context[Any](run).task
    assert facts == {
        "task_id": "task-1",
        "task_type": "facts",
        "queue": "low",
        "retry_count": 2,
        "max_retry": 7,
        "deadline": datetime.fromtimestamp(1_800_000_000.5, UTC),
        "headers": {"trace": "1"},
        "cancel_reason": None,
        "current": True,
    }
    run = StandInRun(type="whole", payload=b"raw")
    assert await call(executors, "whole", run=run) == "whole b'raw' task-1"


@pytest.mark.parametrize("name", ["state", "client", "lease_lost"])
async def test_what_stays_in_the_server_says_so(executors: Executors, name: str) -> None:
    with pytest.raises(AsyncqError, match=rf"ctx\.{name} stays in the server's process"):
        await call(executors, "ask", f'"{name}"'.encode())


async def test_a_process_handler_reports_through_the_server(executors: Executors) -> None:
    run = StandInRun()
    assert await call(executors, "report", b"2", run) == "reported"
    assert run.reported == [(0.0, "step 0"), (0.5, "step 1"), b'{"steps":2}']


async def test_a_lost_lease_is_raised_where_a_process_handler_reports(
    executors: Executors,
) -> None:
    run = StandInRun()
    run.error = LeaseExpiredError()
    assert await call(executors, "report too late", run=run) == "caught: asynq: task lease expired"
    with pytest.raises(LeaseExpiredError):
        await call(executors, "report", b"1", run)


async def test_a_thread_that_outlives_its_handler_cannot_report_to_the_next_task(
    executors: Executors, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    first, second = StandInRun(id="first"), StandInRun(id="second")
    await call(executors, "leave a thread", f'"{path}"'.encode(), first)
    said = await call(executors, "wait for text", f'"{path}"'.encode(), second)
    assert said == "the run of task 'first' is over"
    assert (first.reported, second.reported) == ([], [])


async def test_a_process_handler_logs_through_the_server(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    # A child takes the levels over when it starts.
    caplog.set_level(logging.WARNING, "tests.process_handlers")
    caplog.set_level(logging.INFO)
    executors = Executors(1)
    await call(executors, "log", run=StandInRun(type="log"))
    failed, said = caplog.records
    assert (failed.name, failed.levelname) == ("tests.process_handlers", "ERROR")
    assert failed.getMessage().startswith("it failed\nTraceback")
    assert (said.getMessage(), said.__dict__["task_id"], said.__dict__["step"]) == (
        "from the context",
        "task-1",
        3,
    )
    assert said.process != os.getpid()
    out, err = capfd.readouterr()
    assert (out, err) == ("this goes to the terminal\n", "")
    await executors.close()


async def fail(executors: Executors, name: str) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        await call(executors, "fail", f'"{name}"'.encode())
    return caught.value


@pytest.mark.parametrize(
    "expected",
    [
        ("retry", Retry(7, "busy"), {"delay_s": 7}),
        ("skip", SkipRetry("useless"), {}),
        ("revoke", RevokeTask("gone"), {}),
        ("snooze", Snooze(3), {"delay_s": 3}),
        ("value", ValueError("bad", 1), {}),
        ("os", FileNotFoundError(2, "no such file", "x.txt"), {"errno": 2, "filename": "x.txt"}),
        ("unicode", UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), {"object": b"\xff"}),
        (
            "own",
            DuplicateTaskError("mail", "low", "id-1", "asynq:{low}:unique:x"),
            {"holder_id": "id-1"},
        ),
        ("queue", QueueNotFoundError("low"), {"queue": "low"}),
        ("quota", process_handlers.QuotaError("ann", left=3), {"user": "ann", "left": 3}),
        ("exit", SystemExit(4), {"code": 4}),
    ],
    ids=lambda expected: expected[0],
)
async def test_what_a_process_handler_raises_arrives_with_its_fields(
    executors: Executors, expected: tuple[str, BaseException, dict[str, object]]
) -> None:
    name, error, fields = expected
    raised = await fail(executors, name)
    assert (type(raised), str(raised), raised.args) == (type(error), str(error), error.args)
    assert {field: getattr(raised, field) for field in fields} == fields


async def test_an_error_of_a_process_brings_its_traceback(executors: Executors) -> None:
    error = await fail(executors, "value")
    note = "".join(error.__notes__)
    assert "raise ERRORS[name]()" in note
    assert "In process" in note


async def test_an_error_that_cannot_be_pickled_is_told_by_another(executors: Executors) -> None:
    error = await fail(executors, "locked")
    assert type(error) is RuntimeError
    assert str(error).endswith("process_handlers.LockedError: it is locked")
    assert "raise ERRORS[name]()" in "".join(error.__notes__)
    error = await fail(executors, "stop")
    assert (type(error), str(error)) == (RuntimeError, "coroutine raised StopIteration")


async def test_what_cannot_be_sent_is_named(executors: Executors) -> None:
    with pytest.raises(TypeError, match=r"what handler .*unsendable returned cannot be sent"):
        await call(executors, "unsendable")
    entry = Entry(process_handlers.mux.types["ask"], executors.run)
    with pytest.raises(TypeError, match=r"what handler .*ask takes cannot be sent"):
        await executors.run(entry, (threading.Lock(), None))


async def test_a_name_that_means_another_function_is_refused(executors: Executors) -> None:
    with pytest.raises(TypeError, match="same_name cannot run in another process"):
        await call(executors, "first")
    assert await call(executors, "second") == "second"


@pytest.mark.parametrize(
    ("how", "exit_code", "text"),
    [
        ("exit", 3, "ended with exit code 3 before the handler returned"),
        ("segv", -11, "was killed by SIGSEGV before the handler returned"),
        ("kill", -9, r"was killed by SIGKILL \(as the kernel does when memory runs out\)"),
    ],
)
async def test_a_process_that_dies_fails_its_task_only(
    executors: Executors, how: str, exit_code: int, text: str
) -> None:
    dying = asyncio.create_task(call(executors, "end", f'"{how}"'.encode()))
    other = asyncio.create_task(call(executors, "pid"))
    with pytest.raises(ProcessDiedError, match=rf"process_handlers\.end {text}") as caught:
        await dying
    assert caught.value.exit_code == exit_code
    assert await other
    assert await call(executors, "decorated", b"4") == 50


async def test_a_process_that_dies_takes_along_what_it_started(
    executors: Executors, tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    with pytest.raises(ProcessDiedError, match="exit code 4"):
        await call(executors, "leave a program", f'"{path}"'.encode())
    await gone(int(path.read_text()))


async def test_a_process_that_dies_while_it_is_idle_is_replaced(executors: Executors) -> None:
    first = await call(executors, "pid")
    psutil.Process(first).kill()
    await gone(first)
    assert await call(executors, "pid") != first


async def test_a_cancelled_process_handler_is_killed_with_what_it_started(
    executors: Executors, tmp_path: Path
) -> None:
    path = tmp_path / "pids"
    running = asyncio.create_task(call(executors, "sleep", f'"{path}"'.encode()))
    await exists(path)
    pid, program = map(int, path.read_text().split())
    assert pid in children()
    running.cancel("deadline")
    with pytest.raises(asyncio.CancelledError, match="deadline"):
        await running
    assert pid not in children()
    await gone(program)
    assert await call(executors, "pid") != pid


async def test_a_process_handler_is_cancelled_before_it_has_begun(executors: Executors) -> None:
    for pause_s in (0, 0, 0.02, 0.1):
        running = asyncio.create_task(call(executors, "end", b'"exit"'))
        await asyncio.sleep(pause_s)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert await call(executors, "decorated", b"1") == 20


async def test_close_ends_idle_processes_and_kills_running_ones(tmp_path: Path) -> None:
    executors = Executors(4, processes=2)
    path = tmp_path / "pids"
    running = asyncio.create_task(call(executors, "sleep", f'"{path}"'.encode()))
    idle = await call(executors, "pid")
    await exists(path)
    busy, program = map(int, path.read_text().split())
    await executors.close(wait=False)
    with pytest.raises(ServerClosedError):
        await running
    with pytest.raises(ServerClosedError):
        await call(executors, "pid")
    for pid in (idle, busy, program):
        await gone(pid)
    await executors.close()


async def test_close_waits_for_a_running_process(tmp_path: Path) -> None:
    executors = Executors(4, processes=2)
    path = tmp_path / "text"
    running = asyncio.create_task(call(executors, "wait for text", f'"{path}"'.encode()))
    await exists(path)
    closing = asyncio.create_task(executors.close())
    await asyncio.sleep(0.02)
    assert not closing.done()
    path.write_text("go on")
    assert await running == "go on"
    await closing


async def test_signals_for_the_service_do_not_end_a_process_but_those_it_forked(
    executors: Executors, caplog: pytest.LogCaptureFixture
) -> None:
    assert await call(executors, "signals") == "alive"
    assert await call(executors, "fork") == (15, 5)
    assert await call(executors, "signals") == "alive"
    assert [record.getMessage() for record in caplog.records] == ["before"]


PROGRAM = """
import asyncio, os, sys, time
from pathlib import Path
from asyncq.context import Context
from asyncq.handler import Entry
from asyncq.mux import Mux
from asyncq.server.executors import Executors

mux = Mux()

@mux.task("name", executor="process")
def name() -> str:
    return __name__

@mux.task("pid", executor="process")
def pid() -> int:
    return os.getpid()

@mux.task("sleep", executor="process")
def sleep() -> None:
    Path("pid.new").write_text(str(os.getpid()))
    Path("pid.new").rename("pid")
    time.sleep(60)

async def main() -> None:
    executors = Executors(4)
    async def run(task_type: str) -> object:
        return await executors.run(Entry(mux.types[task_type], executors.run), ())
    print(await run("name"), flush=True)
    if "idle" in sys.argv:
        Path("pid").write_text(str(await run("pid")))
        return
    if "running" in sys.argv:
        await run("sleep")
    await executors.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["program.py"], "__mp_main__"),
        (["-c", "import asyncio, program; asyncio.run(program.main())"], "program"),
    ],
)
async def test_a_process_imports_the_program_as_the_server_did(
    tmp_path: Path, command: list[str], name: str
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    assert await output(tmp_path, command) == (0, f"{name}\n", "")


@pytest.mark.parametrize("child", ["idle", "running"])
async def test_no_process_outlives_its_server(tmp_path: Path, child: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    server = subprocess.Popen(
        [sys.executable, "program.py", child],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    )
    try:
        await exists(tmp_path / "pid")
        if child == "running":
            server.kill()
        await asyncio.to_thread(server.wait, 10)
        await gone(int((tmp_path / "pid").read_text()))
    finally:
        server.kill()
        server.wait()
