"""What a handler raises to say how its task goes on, and how long a retry waits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from asyncq.clock import LONGEST_S, Seconds, seconds
from asyncq.errors import OptionError
from asyncq.task import Task

__all__ = [
    "Retry",
    "RetryDelay",
    "RevokeTask",
    "SkipRetry",
    "Snooze",
    "asynq_delay",
    "delay_policy",
    "exponential",
    "fixed",
]

RetryDelay: TypeAlias = Callable[[int, BaseException, Task], Seconds]
"""(failures before this one, the exception, the task) -> how long to wait, in seconds."""


# Signals: no AsyncqError, so that `except AsyncqError` around an enqueue lets them through


class SkipRetry(Exception):
    """Raised by a handler: the task failed and is archived at once, however many retries remain."""


class RevokeTask(Exception):
    """Raised by a handler: the task is dropped, neither retried nor archived."""


class _Delayed(Exception):
    def __init__(self, delay: Seconds, message: str = "") -> None:
        # Both go into `args`, from which a process executor makes the exception anew.
        super().__init__(delay, message)
        self.delay_s = max(0.0, seconds(delay, "delay", least=None))
        self.message = message


class Snooze(_Delayed):
    """Raised by a handler: run the task again after `delay` (seconds), without counting a failure.

    A negative delay means at once.
    """

    def __str__(self) -> str:
        return self.message or f"snoozed for {self.delay_s:g} s"


class Retry(_Delayed):
    """Raised by a handler: the task failed, and is tried again after `delay` (seconds).

    A negative delay means at once. It counts as a failure, so it ends with `max_retry`;
    `message` becomes the task's error.
    """

    def __str__(self) -> str:
        return self.message or f"retry in {self.delay_s:g} s"


# Policies


def asynq_delay(retried: int, error: BaseException, task: Task) -> float:
    """Wait n^4 + 15 + r * (n + 1) seconds, r random in 0 to 29: Asynq's default, and ours."""
    n = max(0, retried)
    return float(min(LONGEST_S, n**4 + 15 + random.randrange(30) * (n + 1)))


def exponential(
    base: Seconds = 1.0,
    factor: float = 2.0,
    max: Seconds = 3600.0,
    jitter: float = 0.1,
) -> RetryDelay:
    """Make a policy that waits `base` (1 s), then `factor` (2) times as long each time.

    No wait is longer than `max` (1 h). Each is shortened by a random part of up to `jitter`
    (0 to 1, default 0.1), so that tasks which failed together do not come back together.

    Raises:
        OptionError: a duration is negative, `factor` is below 1, `jitter` outside 0 to 1.
    """
    base_s, max_s = seconds(base, "base"), seconds(max, "max")
    if not factor >= 1:
        raise OptionError(f"factor must be at least 1, not {factor!r}")
    if not 0 <= jitter <= 1:
        raise OptionError(f"jitter must be a fraction of 0 to 1, not {jitter!r}")

    def delay(retried: int, error: BaseException, task: Task) -> float:
        try:
            wait_s = min(max_s, base_s * factor**retried)
        except OverflowError:
            wait_s = max_s
        return wait_s * (1 - jitter * random.random())

    return delay


def fixed(delay: Seconds) -> RetryDelay:
    """Make a policy that always waits `delay` seconds.

    Raises:
        OptionError: `delay` is negative or no duration.
    """
    delay_s = seconds(delay, "delay")

    def policy(retried: int, error: BaseException, task: Task) -> float:
        return delay_s

    return policy


def delay_policy(value: Seconds | RetryDelay) -> RetryDelay:
    """Return the policy that the option `retry_delay` names: a function, or a fixed delay.

    Raises:
        OptionError: it is neither.
    """
    return value if callable(value) else fixed(value)
