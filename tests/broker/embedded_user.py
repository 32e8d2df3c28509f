"""Users of an embedded store in processes of their own, for `test_embedded.py`.

`hold PATH` holds the store until its standard input ends. `forked PATH` does so in a child that
was forked with the store open, and whose parent has closed it and waits to be killed. `crowd PATH
COUNT` sends users in small waves: each pushes numbers to a list of its own and counts, in the
file `acks-N`, those that the server confirmed; two in five are killed at a random instant.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from asyncq.broker.embedded import open_store
from asyncq.errors import BrokerUnavailableError

WAVE = 12
LIFE_S = 0.15
PUSHES = 20


def hold(path: str) -> None:
    with suppress(KeyboardInterrupt), open_store(path) as store:
        print(store.socket, flush=True)
        sys.stdin.read()


def forked(path: str) -> None:
    store = open_store(path)
    closed, close = os.pipe()
    if os.fork():
        store.close()
        os.write(close, b".")
        signal.pause()
    os.read(closed, 1)
    print(os.getppid(), flush=True)
    sys.stdin.read()
    store.close()


def crowd(path: str, count: int) -> None:
    # Forked, since an interpreter with all imports takes longer than the life of these users.
    # This process itself holds nothing.
    for start in range(0, count, WAVE):
        users = [_fork_user(path, n) for n in range(start, min(start + WAVE, count))]
        for user in users:
            status = os.waitstatus_to_exitcode(os.waitpid(user, 0)[1])
            assert status in (0, -signal.SIGKILL), f"a user failed with {status}"


def _fork_user(path: str, n: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _live(path, n)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def _live(path: str, n: int) -> None:
    chance = random.Random()
    if n % 5 < 2:
        doom = (os.getpid(), signal.SIGKILL)
        threading.Timer(chance.uniform(0, LIFE_S), os.kill, doom).start()
    else:
        time.sleep(chance.uniform(0, LIFE_S / 3))
    pushed = 0
    while pushed < PUSHES:
        # Keepers and servers may be killed under us: then we come again.
        with suppress(RedisConnectionError, BrokerUnavailableError), open_store(path) as store:
            redis = Redis(unix_socket_path=store.socket, retry=Retry(NoBackoff(), 0))
            with open(store.path / f"acks-{n}", "ab", buffering=0) as acks:
                while pushed < PUSHES:
                    redis.rpush(f"user:{n}", pushed)
                    acks.write(b".")
                    pushed += 1
                    time.sleep(0.002)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["hold", path]:
            hold(path)
        case ["forked", path]:
            forked(path)
        case ["crowd", path, count]:
            crowd(path, int(count))
        case _:
            sys.exit(__doc__)
