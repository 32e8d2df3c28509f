"""The machine that a run is on: a Redis of its own, and what processes cost it.

What is read from /proc is None on a machine that has none.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

PROC = Path("/proc")
START_WITHIN_S = 10.0
PORT_TRIES = 5  # another process may take a port between our finding it free and Redis


class NoRedisError(Exception):
    """There is no Redis to measure with; the text says why."""


class Store:
    """A Redis whose database is emptied."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._redis: Any = Redis.from_url(url)

    @property
    def version(self) -> str:
        """Such as "redis 7.0.15"."""
        info = self._redis.info("server")
        name = info.get("server_name", "redis")
        return f"{name} {info.get('valkey_version', info['redis_version'])}"

    def flush(self) -> None:
        """Empty the database."""
        self._redis.flushdb()

    def cpu_s(self) -> float:
        """Seconds of CPU that Redis has used so far, user and system."""
        info = self._redis.info("cpu")
        return float(info["used_cpu_user"] + info["used_cpu_sys"])

    def commands(self) -> int:
        """Commands so far, those inside scripts among them; INFO, with which we ask, excluded."""
        stats = self._redis.info("commandstats")
        return sum(int(row["calls"]) for name, row in stats.items() if name != "cmdstat_info")

    def memory_bytes(self) -> int:
        """Bytes that Redis has in use."""
        return int(self._redis.info("memory")["used_memory"])

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()


@contextmanager
def store(url: str | None) -> Iterator[Store]:
    """Connect to the Redis of a URL, or to a private one (`None`) that was just started.

    What is measured in an old one depends on what it held before: after a million tasks its
    memory is scattered, and a pickup took 9 % longer.

    Raises:
        NoRedisError: it does not start.
    """
    with ExitStack() as stack:
        opened = Store(url or stack.enter_context(_private_redis()))
        stack.callback(opened.close)
        yield opened


@contextmanager
def _private_redis() -> Iterator[str]:
    """Run a Redis on a free port of 127.0.0.1 that keeps nothing; give its URL.

    It is the machine's redis-server, else the Valkey of the extra `embedded`.
    """
    program = shutil.which("redis-server")
    if program is None:
        from asyncq.broker.embedded import server_binary

        program = str(server_binary())
    with tempfile.TemporaryDirectory(prefix="asyncq-bench-") as folder:
        for _ in range(PORT_TRIES):
            port = _free_port()
            # In a session of its own, or Ctrl-C would end it before the results are written.
            server = subprocess.Popen(
                [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder,
                 "--save", "", "--appendonly", "no", "--logfile", f"{folder}/log"],
                start_new_session=True,
            )  # fmt: skip
            try:
                if _answers(server, port):
                    yield f"redis://127.0.0.1:{port}/0"
                    return
            finally:
                server.terminate()
                server.wait()
        raise NoRedisError(f"{program} does not start: {Path(folder, 'log').read_text()[-500:]}")


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_WITHIN_S
    with Redis(host="127.0.0.1", port=port) as redis:
        while server.poll() is None and time.monotonic() < deadline:
            try:
                return int(redis.info("server")["process_id"]) == server.pid
            except RedisError:
                time.sleep(0.02)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Processes


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a process tree, in bytes; pss counts a page that n processes share as 1/n."""

    rss: int
    pss: int
    processes: int


def tree(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for parent in found:
        for children in PROC.glob(f"{parent}/task/*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # it has ended
    return found


def session(leader: int) -> list[int]:
    """Return the processes of a session, those whose parents have ended among them."""
    pids = (int(path.name) for path in PROC.glob("[0-9]*"))
    return [pid for pid in pids if (fields := _stat(pid)) and fields[3] == str(leader)]


def born(pid: int) -> str | None:
    """Return when a process was started, in ticks; None when it has ended.

    With its id this names a process for good: an id alone may be given to another one.
    """
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else fields[19]


def cpu_s(pid: int) -> float | None:
    """Seconds of CPU of a process tree so far, its dead children included."""
    if not PROC.joinpath(str(pid), "schedstat").exists():
        return None
    return sum(_own_cpu_s(each) for each in tree(pid))


def memory(pid: int) -> Memory | None:
    """Measure the memory of a process tree."""
    if not PROC.joinpath(str(pid), "smaps_rollup").exists():
        return None
    pids = tree(pid)
    sums = {"Rss:": 0, "Pss:": 0}
    for each in pids:
        try:
            lines = PROC.joinpath(str(each), "smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        for name, *rest in map(str.split, lines):
            if name in sums:
                sums[name] += int(rest[0]) * 1024
    return Memory(sums["Rss:"], sums["Pss:"], len(pids))


def _own_cpu_s(pid: int) -> float:
    """CPU of the threads that live, to the nanosecond, and of children that have ended."""
    try:
        nanoseconds = sum(
            int(path.read_text().split()[0]) for path in PROC.glob(f"{pid}/task/*/schedstat")
        )
    except OSError:
        return 0.0  # it has ended
    fields = _stat(pid)
    ended_ticks = 0 if fields is None else int(fields[13]) + int(fields[14])  # cutime, cstime
    return nanoseconds / 1e9 + ended_ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str] | None:
    """Return the fields behind the name, the state first; None when there is no such process."""
    try:
        return PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


# Facts


def facts() -> dict[str, str]:
    """Describe the machine, for whoever reads the numbers."""
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = PROC.joinpath("cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
