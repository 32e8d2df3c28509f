"""Handlers that `test_executors.py` runs in child processes, which import them by their name."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from asyncq.context import Context, current_context
from asyncq.errors import DuplicateTaskError, LeaseExpiredError, QueueNotFoundError
from asyncq.mux import Mux
from asyncq.retry import Retry, RevokeTask, SkipRetry, Snooze
from asyncq.task import Task

mux = Mux()
log = logging.getLogger("tests.process_handlers")


class Numbers(BaseModel):
    values: list[int]


class QuotaError(Exception):
    """Takes other arguments than it leaves in `args`."""

    def __init__(self, user: str, *, left: int) -> None:
        super().__init__(f"{user} has {left} left")
        self.user = user
        self.left = left


class LockedError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("it is locked")
        self.lock = threading.Lock()


@mux.task("sum", executor="process")
def add_up(payload: Numbers) -> Numbers:
    return Numbers(values=[sum(payload.values)])


@mux.task("pid", executor="process")
def pid() -> int:
    return os.getpid()


@mux.task("facts", executor="process")
def facts(ctx: Context) -> dict[str, Any]:
    return {
        "task_id": ctx.task_id,
        "task_type": ctx.task_type,
        "queue": ctx.queue,
        "retry_count": ctx.retry_count,
        "max_retry": ctx.max_retry,
        "deadline": ctx.deadline,
        "headers": dict(ctx.headers),
        "cancel_reason": ctx.cancel_reason,
        "task": ctx.task,
        "current": current_context() is ctx,
    }


@mux.task("whole", executor="process")
def whole(task: Task[Any]) -> str:
    return f"{task.type} {task.payload!r} {current_context().task_id}"


@mux.task("ask", executor="process")
def ask(name: str, ctx: Context) -> Any:
    return getattr(ctx, name)


@mux.task("report", executor="process")
def report(steps: int, ctx: Context) -> str:
    for step in range(steps):
        ctx.sync.progress(step / steps, f"step {step}")
    ctx.sync.write_result({"steps": steps})
    return "reported"


@mux.task("report too late", executor="process")
def report_too_late(ctx: Context) -> str:
    try:
        ctx.sync.progress(0.5)
    except LeaseExpiredError as error:
        return f"caught: {error}"
    return "not raised"


@mux.task("leave a thread", executor="process")
def leave_a_thread(path: str, ctx: Context) -> None:
    def go_on() -> None:
        while not Path(path).exists():
            time.sleep(0.005)
        try:
            ctx.sync.progress(1)
        except Exception as error:
            Path(path).write_text(str(error))

    threading.Thread(target=go_on, daemon=True).start()


@mux.task("wait for text", executor="process")
def wait_for_text(path: str) -> str:
    Path(path).touch()
    while not (text := Path(path).read_text()):
        time.sleep(0.005)
    return text


@mux.task("log", executor="process")
def say(ctx: Context) -> None:
    print("this goes to the terminal", flush=True)
    log.debug("too detailed")
    try:
        raise ValueError("no")
    except ValueError:
        log.exception("it %s", "failed")
    ctx.log.info("from the context", extra={"step": 3})


ERRORS: dict[str, Callable[[], BaseException]] = {
    "retry": lambda: Retry(7, "busy"),
    "skip": lambda: SkipRetry("useless"),
    "revoke": lambda: RevokeTask("gone"),
    "snooze": lambda: Snooze(3),
    "value": lambda: ValueError("bad", 1),
    "os": lambda: FileNotFoundError(2, "no such file", "x.txt"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    "own": lambda: DuplicateTaskError("mail", "low", "id-1", "asynq:{low}:unique:x"),
    "queue": lambda: QueueNotFoundError("low"),
    "quota": lambda: QuotaError("ann", left=3),
    "locked": LockedError,
    "exit": lambda: SystemExit(4),
    "stop": StopIteration,
}


@mux.task("fail", executor="process")
def fail(name: str) -> None:
    raise ERRORS[name]()


@mux.task("unsendable", executor="process")
def unsendable() -> Any:
    return threading.Lock()


@mux.task("end", executor="process")
def end(how: str) -> None:
    match how:
        case "exit":
            os._exit(3)
        case "segv":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            ctypes.string_at(0)
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


@mux.task("leave a program", executor="process")
def leave_a_program(path: str) -> None:
    os.system(f"sleep 60 & echo $! >'{path}'")
    os._exit(4)


@mux.task("sleep", executor="process")
def sleep(path: str) -> None:
    """Start a program, say both process ids, and never return."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = Path(path)
    started.with_suffix(".new").write_text(f"{os.getpid()} {program.pid}")
    started.with_suffix(".new").rename(started)
    time.sleep(60)


@mux.task("fork", executor="process")
def fork() -> tuple[int, int]:
    """Return how a forked process ended that was sent SIGTERM, and one that logged."""
    log.warning("before")
    begun, says = os.pipe()
    if (stopped := os.fork()) == 0:
        os.write(says, b".")
        time.sleep(60)
    os.read(begun, 1)
    os.kill(stopped, signal.SIGTERM)
    if (logging_one := os.fork()) == 0:
        logging.getLogger().handlers.append(logging.NullHandler())
        log.warning("from the forked process")
        os._exit(5)
    ended = [os.waitpid(one, 0)[1] for one in (stopped, logging_one)]
    return os.WTERMSIG(ended[0]), os.waitstatus_to_exitcode(ended[1])


@mux.task("signals", executor="process")
def signals() -> str:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    return "alive"


def traced(function: Callable[[int], int]) -> Callable[[int], int]:
    @functools.wraps(function)
    def call(number: int) -> int:
        return 10 * function(number)

    return call


@mux.task("decorated", executor="process")
@traced
def decorated(number: int) -> int:
    return number + 1


def _make(text: str) -> Callable[[], str]:
    def same_name() -> str:
        return text

    same_name.__qualname__ = "same_name"
    return same_name


same_name = mux.task("first", executor="process")(_make("first"))
same_name = mux.task("second", executor="process")(_make("second"))
