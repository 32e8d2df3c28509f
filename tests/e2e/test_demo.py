from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis

from tests.e2e.program import ROOT, environment

END_WITHIN_S = 60.0
NOTICED_WITHIN_S = 5.0


class Demo:
    """A run of the demo as `make demo` starts it, in a process group of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "examples.demo"],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.output = ""

    def until(self, pattern: str) -> str:
        """Read on until a line has what the pattern's group says, and return that."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output += line
            if found := re.search(pattern, line):
                return found[1]
        pytest.fail(f"the demo never said {pattern!r}: {self.output}")

    def begin(self) -> tuple[Path, int]:
        """Read on until labels are being printed; return the demo's folder, and its worker."""
        store = self.until(r"^Store:.* (\S+)$")
        worker = self.until(r"^Worker: process (\d+)")
        self.until(r"labels ([1-9]\S*) of")
        return (ROOT / store).parent, int(worker)

    def end(self) -> int:
        """Read what is left, and return the exit code."""
        rest, _ = self._process.communicate(timeout=END_WITHIN_S)
        self.output += rest
        return self._process.returncode

    def kill(self) -> None:
        """End it and its worker, however the test went; the store then ends by itself."""
        if self._process.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.communicate()


@pytest.fixture
def demo() -> Iterator[Demo]:
    demo = Demo()
    yield demo
    demo.kill()
    print(demo.output)


def assert_nothing_is_left(folder: Path, worker: int) -> None:
    assert not folder.exists()
    assert not psutil.pid_exists(worker)
    # The keeper has taken its socket away, and may need another moment to be gone.
    inside = [
        process
        for process in psutil.process_iter(["cwd"])
        if (process.info["cwd"] or "").startswith(str(folder))
    ]
    _, alive = psutil.wait_procs(inside, timeout=NOTICED_WITHIN_S)
    assert alive == []


def test_the_demo_ends_by_itself_and_leaves_nothing(demo: Demo) -> None:
    folder, worker = demo.begin()
    assert demo.end() == 0
    assert re.search(r"orders charged at once +26 +26 +ok", demo.output)
    assert re.search(r"runs on queue low +5,000, 0 failed +5,000, 0 failed +ok", demo.output)
    assert "wrong" not in demo.output.lower()
    assert_nothing_is_left(folder, worker)


def test_the_demo_fails_when_the_store_holds_something_else(demo: Demo) -> None:
    folder, worker = demo.begin()
    # Through the link itself the path could be too long for a socket.
    with Redis(unix_socket_path=os.readlink(folder / "store" / "socket")) as store:
        store.incr("asynq:{low}:processed")
    assert demo.end() == 1
    assert "Wrong: runs on queue low: 5,001, 0 failed, not 5,000, 0 failed" in demo.output
    assert_nothing_is_left(folder, worker)


def test_the_demo_fails_when_its_worker_is_killed(demo: Demo) -> None:
    folder, worker = demo.begin()
    os.kill(worker, signal.SIGKILL)
    killed_at = time.monotonic()
    assert demo.end() == 1
    assert time.monotonic() - killed_at < NOTICED_WITHIN_S
    assert "the worker was killed by SIGKILL in the middle of the work" in demo.output
    assert_nothing_is_left(folder, worker)


def test_ctrl_c_ends_the_demo_and_its_worker(demo: Demo) -> None:
    folder, worker = demo.begin()
    os.killpg(demo.pid, signal.SIGINT)  # a terminal sends it to the worker as well
    assert demo.end() == 128 + signal.SIGINT
    assert "Stopped by Ctrl-C" in demo.output
    assert "Traceback" not in demo.output
    assert_nothing_is_left(folder, worker)
