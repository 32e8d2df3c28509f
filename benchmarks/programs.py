"""Runs the programs of a system: its sender, its workers, and the count of what is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.adapter import Sending, Working, uvloop_factory
from benchmarks.ledger import VARIABLE, Ledger
from benchmarks.systems import ROOT, System

SEND_WITHIN_S = 90.0
LEFT_WITHIN_S = 20.0
STOP_WITHIN_S = 15.0
CHILDREN_END_WITHIN_S = 1.0


class MeasurementError(RuntimeError):
    """A measurement has no number, for the reason in its text; the run goes on."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What a sender needed, connecting and warming up excluded from `seconds`."""

    seconds: float
    cpu_s: float


def send(system: System, sending: Sending, ledger: Ledger) -> Sent:
    """Enqueue; raises `MeasurementError` if the system refused a task, or took too long."""
    flags = {
        "url": sending.url,
        "handler": sending.handler,
        "tasks": sending.tasks,
        "how": sending.how,
        "in-flight": sending.in_flight,
        "interval-s": sending.interval_s,
        "delay-s": sending.delay_s,
    }
    answer = json.loads(_run([*system.program, "send", *_given(flags)], ledger, SEND_WITHIN_S))
    return Sent(answer["seconds"], answer["cpu_seconds"])


def left(system: System, url: str, ledger: Ledger) -> int:
    """Count the tasks that Redis holds as not done, by the system's own reckoning."""
    return int(_run([*system.program, "left", "--url", url], ledger, LEFT_WITHIN_S))


def answer_of(program: list[str], ledger: Ledger, within_s: float = SEND_WITHIN_S) -> Any:
    """Run a program of ours that prints one line of JSON, and return that."""
    return json.loads(_run(program, ledger, within_s))


def print_answer(measurements: Mapping[str, Callable[[str, int], Awaitable[Any]]]) -> None:
    """Be such a program: make the measurement that the arguments name, NAME URL TASKS."""
    name, url, n = sys.argv[1], sys.argv[2], int(sys.argv[3])

    async def measured() -> Any:
        return await measurements[name](url, n)

    with asyncio.Runner(loop_factory=uvloop_factory()) as runner:
        print(json.dumps(runner.run(measured())))


class Worker:
    """A worker of a system, from its start to its end."""

    def __init__(self, system: System, working: Working, ledger: Ledger, log: Path) -> None:
        flags = {
            "url": working.url,
            "concurrency": working.concurrency,
            "prefetch": working.prefetch,
            "queues": working.queues,
        }
        self._log = log
        self._asked: dict[int, str | None] = {}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*system.program, "work", *_given(flags)],
                cwd=ROOT,
                env=_environment(ledger),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us, and we end it
            )
        self.pid = self._process.pid

    def check(self) -> None:
        """Raise `MeasurementError` if it has ended, with the last it said."""
        if self._process.poll() is not None:
            raise MeasurementError(
                f"the worker ended with exit code {self._process.returncode}: {self.said()}"
            )

    def said(self) -> str:
        """Return the end of what it wrote."""
        return _end_of(self._log.read_text(errors="replace"))

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for pid in _alive(self._family()):
            os.kill(pid, number)

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        self._asked = self._family()
        self._process.terminate()

    def ended_cleanly(self) -> bool:
        """Wait for its end; False if it had to be killed, or left processes behind."""
        try:
            self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        deadline = time.monotonic() + CHILDREN_END_WITHIN_S
        while (alive := _alive(self._asked)) and time.monotonic() < deadline:
            time.sleep(0.01)
        self._kill(alive)
        return not alive

    def kill(self) -> None:
        """End it and all its processes at once."""
        self._kill(self._family())

    def _family(self) -> dict[int, str | None]:
        pids = {*machine.tree(self.pid), *machine.session(self.pid)}
        return {pid: machine.born(pid) for pid in pids}

    def _kill(self, family: dict[int, str | None]) -> None:
        for pid in _alive(family):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self._process.poll() is None:
            self._process.kill()  # also where there is no /proc to tell of it
        self._process.wait()


@contextmanager
def working(
    system: System, how: Working, ledger: Ledger, folder: Path, *, workers: int = 1
) -> Iterator[list[Worker]]:
    """Run workers; whatever happens, none of them outlives the block."""
    started: list[Worker] = []
    try:
        for i in range(workers):
            started.append(Worker(system, how, ledger, folder / f"worker-{i}.log"))
        yield started
    finally:
        for worker in started:
            worker.kill()


def _alive(family: dict[int, str | None]) -> dict[int, str | None]:
    """Return those that still run; an id that another process was given since is not one."""
    return {pid: born for pid, born in family.items() if born and machine.born(pid) == born}


@contextmanager
def paused(workers: list[Worker]) -> Iterator[None]:
    """Hold workers still, so that they all begin at the same instant."""
    for worker in workers:
        worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGCONT)


def stopped(workers: list[Worker]) -> bool:
    """Stop workers, all at once; False if one did not end as it should."""
    for worker in workers:
        worker.ask_to_stop()
    return not [worker for worker in workers if not worker.ended_cleanly()]


def _run(command: list[str], ledger: Ledger, within_s: float) -> str:
    """Run a program and return the last line it prints."""
    what = " ".join([Path(command[0]).name, *command[1:4]])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(ledger),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        raise MeasurementError(f"{what} did not end within {within_s:g} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode or not output.strip():
        raise MeasurementError(f"{what} failed: {_end_of(errors or output)}")
    return output.strip().splitlines()[-1]


def _environment(ledger: Ledger) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ASYNCQ_")}
    return ours | {VARIABLE: str(ledger.path)}


def _given(flags: dict[str, object]) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def _end_of(text: str) -> str:
    """Return the last line, which is where a traceback says what it is about."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:500] if lines else "it said nothing"


def wait_until(
    ready: Callable[[], object],
    what: str,
    within_s: float,
    workers: list[Worker],
    poll_s: float = 0.005,
) -> None:
    """Wait until `ready()`, looking often, but never using more than a twentieth of a core."""
    deadline = time.monotonic() + within_s
    while True:
        began = time.monotonic()
        if ready():
            return
        for worker in workers:
            worker.check()
        now = time.monotonic()
        if now > deadline:
            said = "; ".join(worker.said() for worker in workers)
            raise MeasurementError(f"{what} within {within_s:g} s; the worker said: {said}")
        time.sleep(max(poll_s, 20 * (now - began)))
