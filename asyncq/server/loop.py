"""The contract of every loop: `run` says when, `tick` does one pass and says how much it did."""

from __future__ import annotations

import asyncio
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from asyncq.errors import BrokerError

log = logging.getLogger("asyncq.server")

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
SAY_AGAIN_S: Final = 60.0


class Loop(ABC):
    """A loop that does one pass every `interval_s` seconds, and goes on when Redis is away."""

    name = "loop"

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.woken = asyncio.Event()
        self._trouble = Trouble(self.name)

    @abstractmethod
    async def tick(self) -> int:
        """Do one pass and return how much was done."""

    async def run(self) -> None:
        """Tick until cancelled; what a tick needs of Redis is tried again after a pause."""
        # Spread, so that servers started together do not ask Redis in the same instant.
        await self.sleep(random.uniform(0, min(1.0, self.interval_s)))
        while True:
            try:
                await self.tick()
                self._trouble.over()
            except BrokerError as error:
                # Not `sleep`: what wakes a loop does not bring Redis back.
                await asyncio.sleep(self._trouble.pause_s(error))
            else:
                await self.sleep(self.interval_s)

    async def sleep(self, pause_s: float) -> None:
        """Wait until woken, or until `pause_s` seconds have passed."""
        try:
            async with asyncio.timeout(pause_s):
                await self.woken.wait()
        except TimeoutError:
            pass
        self.woken.clear()


async def each(queues: Iterable[str], do: Callable[[str], Awaitable[int]]) -> int:
    """Do something for every queue and return the sum; one that fails does not stop the others.

    Raises:
        BrokerError: the last failure, when all have had their turn.
    """
    total, failure = 0, None
    for queue in queues:
        try:
            total += await do(queue)
        except BrokerError as error:
            failure = error
    if failure is not None:
        raise failure
    return total


class Backoff:
    """How long to pause after failures in a row: 0.1 s at first, doubling up to 5.

    Each pause is cut by up to a half at random, so that many servers do not come back as one.
    """

    def __init__(self) -> None:
        self._pause_s = FIRST_PAUSE_S

    def next_s(self) -> float:
        """Note a failure and return the seconds to wait."""
        pause_s = self._pause_s
        self._pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1)

    def over(self) -> None:
        """Note a success."""
        self._pause_s = FIRST_PAUSE_S


class Trouble:
    """Redis is away: says so once, and again each minute, and how long to pause."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._backoff = Backoff()
        self._said_at: float | None = None

    def pause_s(self, error: Exception) -> float:
        """Note a failure and return the seconds to wait, see `Backoff`."""
        self.say(error)
        return self._backoff.next_s()

    def say(self, error: Exception) -> None:
        """Note a failure of one that has a `Backoff` of its own."""
        now = asyncio.get_running_loop().time()
        if self._said_at is None or now - self._said_at >= SAY_AGAIN_S:
            self._said_at = now
            log.warning("%s: %s; trying again until it works", self._who, error)

    def over(self) -> None:
        """Note a success."""
        if self._said_at is not None:
            log.info("%s: Redis answers again", self._who)
        self._backoff.over()
        self._said_at = None
