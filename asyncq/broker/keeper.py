"""The keeper of an embedded store: starts its server, revives it, stops it after the last user.

`asyncq.broker.embedded` runs this file as a script (`python -I -S keeper.py DIRECTORY BINARY
SOCKET`) in a session of its own, where Ctrl-C reaches neither the keeper nor the server. It
imports nothing but the standard library, so that it starts in milliseconds and stays small.

Every lock is a flock on a file of the store's directory; the kernel drops it when its last
holder dies, however it dies.

| file | held by | says |
| --- | --- | --- |
| `users.lock` | each user, shared | somebody needs the server |
| `server.lock` | the server process, which inherits it from the keeper | a server lives |
| `keeper.lock` | the keeper | somebody will stop the server |
| `gate.lock` | whoever starts or stops one of them | a decision is being made |

Beside them lie `server.log` (of this start; `server.log.1` is of the one before), `socket`, a
link to the socket that the server listens on, and the server's append-only file.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Literal

USERS = "users.lock"
SERVER = "server.lock"
KEEPER = "keeper.lock"
GATE = "gate.lock"
SOCKET = "socket"
LOG = "server.log"
LOG_BEFORE = "server.log.1"

SERVER_OPTIONS = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "no",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "save": "",
    "maxmemory-policy": "noeviction",
}

# How long a server may take to end after SIGTERM, most of it for a slow disk, before SIGKILL.
STOP_WITHIN_S = 10.0

# A server that ends before it was ready may have been killed. One that does so this many times
# in a row has a reason.
STARTS = 3


def open_lock(path: str | os.PathLike[str]) -> int:
    """Open a lock file, making it where there is none; no process started later inherits it."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def open_log(path: str | os.PathLike[str]) -> int:
    """Open a log file to append to, making it where there is none."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def try_lock(fd: int, mode: int) -> bool:
    """Take a lock (`fcntl.LOCK_SH` or `LOCK_EX`) without waiting, and say whether it was free."""
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Drop a lock, also from a child that was forked while it was held.

    Closing would not do: another thread may have forked a process that still has the file open.
    """
    fcntl.flock(fd, fcntl.LOCK_UN)


def ping(address: str, timeout_s: float = 1.0) -> Literal["ready", "loading", "silent"]:
    """Ask the server on a unix socket whether it takes commands."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(address)
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
        except OSError:
            return "silent"
    if answer.startswith(b"-LOADING"):
        return "loading"
    # Any other refusal, such as "max number of clients reached", is told better to the client.
    return "ready" if answer else "silent"


def listener_pid(address: str) -> int | None:
    """The process that listens on a unix socket, from the kernel, even when it hangs."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(address)
            if sys.platform == "linux":
                packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                pid = int(struct.unpack("3i", packed)[0])
            else:
                pid = connection.getsockopt(0, 2)  # SOL_LOCAL, LOCAL_PEERPID of macOS
        except OSError:
            return None
    return pid or None  # 0: the process is in a container that this one does not see into


class Keeper:
    """Keeps the server of the current directory running while the store has users.

    Two threads wait, each for a lock: `run` for the last user to go, `_keep_running` for the
    server to die. What they do then they do under the gate, each with its own file of it, since
    a flock does not keep apart two threads with the same open file.
    """

    def __init__(self, binary: str, address: str, keeper_lock: int) -> None:
        self._binary = binary
        self._keeper_lock = keeper_lock
        self._users = open_lock(USERS)
        self._server = open_lock(SERVER)
        # Guarded by the gate:
        self._address = address
        self._child: int | None = None

    def run(self) -> None:
        """Start the server, wait until the last user is gone, stop the server and exit."""
        self._join_orphan()
        threading.Thread(target=self._keep_running, daemon=True).start()
        gate = open_lock(GATE)
        while True:
            fcntl.flock(self._users, fcntl.LOCK_EX)
            unlock(self._users)
            with _held(gate):
                # A user may have come since. One that comes now waits at the gate.
                if try_lock(self._users, fcntl.LOCK_EX):
                    self._stop_server()
                    # Whoever passes the gate next must see that no keeper is left. The gate is
                    # left to the kernel: opened earlier, the other thread would start a server.
                    os.close(self._keeper_lock)
                    os._exit(0)

    def _join_orphan(self) -> None:
        """Find the server of a keeper that was killed; its socket may not be where ours would."""
        if self._server_lives():
            with suppress(OSError):
                self._address = os.readlink(SOCKET)

    def _keep_running(self) -> None:
        try:
            gate, server = open_lock(GATE), open_lock(SERVER)
            failures = 0
            while failures < STARTS:
                fcntl.flock(server, fcntl.LOCK_SH)
                unlock(server)
                with _held(gate):
                    self._reap()
                    self._start_server()
                failures = 0 if self._gets_ready(gate) else failures + 1
        except BaseException:
            traceback.print_exc()
        finally:
            # Nothing is tried for ever. The next user tries again, and shows the log's end.
            os._exit(1)

    def _start_server(self) -> None:
        self._fresh_log()
        os.makedirs(os.path.dirname(self._address), mode=0o700, exist_ok=True)
        _link(self._address, SOCKET)
        options = SERVER_OPTIONS | {"unixsocket": self._address, "dir": os.getcwd()}
        command = [self._binary]
        for name, value in options.items():
            command += [f"--{name}", value]
        lock = open_lock(SERVER)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.set_inheritable(lock, True)
            # The mask is set, since a user thread that blocked SIGTERM would hand that down.
            self._child = os.posix_spawn(self._binary, command, os.environ, setsigmask=[])
        finally:
            os.close(lock)

    def _gets_ready(self, gate: int) -> bool:
        pause_s = 0.005
        while ping(self._address) != "ready":
            with _held(gate):
                if self._reap():
                    return False
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, 0.25)
        return True

    def _stop_server(self) -> None:
        pid = self._child or listener_pid(self._address)
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            if self._server_ends():
                break
        if self._child is not None:
            os.waitpid(self._child, 0)
        for leftover in (self._address, SOCKET):  # a server that was killed leaves its socket
            with suppress(OSError):
                os.unlink(leftover)

    def _server_ends(self) -> bool:
        deadline = time.monotonic() + STOP_WITHIN_S
        while self._server_lives():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def _server_lives(self) -> bool:
        # Shared, so that it does not collide with the other thread, which waits the same way.
        if not try_lock(self._server, fcntl.LOCK_SH):
            return True
        unlock(self._server)
        return False

    def _reap(self) -> bool:
        """Take leave of a server that ended, so that it is no zombie, and say whether it did."""
        if self._child is None or os.waitpid(self._child, os.WNOHANG) == (0, 0):
            return False
        self._child = None
        return True

    def _fresh_log(self) -> None:
        """Send what this process and the server say to a new log.

        The log before is kept, since it tells why a server died that had to be revived.
        """
        with suppress(FileNotFoundError):
            os.replace(LOG, LOG_BEFORE)
        log = open_log(LOG)
        for output in (1, 2):
            os.dup2(log, output)
        os.close(log)


@contextmanager
def _held(lock: int) -> Generator[None]:
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        unlock(lock)


def _link(target: str, name: str) -> None:
    """Point a symbolic link elsewhere in one step, so that a reader never finds it missing."""
    with suppress(FileNotFoundError):
        os.unlink(f"{name}.new")
    os.symlink(target, f"{name}.new")
    os.replace(f"{name}.new", name)


def main() -> None:
    """Become the keeper of a directory in the background, unless it has one.

    The process that was started ends as soon as the keeper holds its lock, so that the user
    who started it has nothing to wait for later and no zombie.
    """
    directory, binary, address = sys.argv[1:]
    os.chdir(directory)  # and not only for the names: no other directory is kept in use
    os.umask(0o077)  # tasks may be private, and the directory may have been there before
    keeper_lock = open_lock(KEEPER)
    if not try_lock(keeper_lock, fcntl.LOCK_EX) or os.fork():
        os._exit(0)
    Keeper(binary, address, keeper_lock).run()


if __name__ == "__main__":
    main()
