from __future__ import annotations

import math
import pickle
from datetime import timedelta
from typing import Any

import pytest

from asyncq.clock import LONGEST_S, seconds
from asyncq.errors import AsyncqError, OptionError
from asyncq.retry import (
    Retry,
    RevokeTask,
    SkipRetry,
    Snooze,
    asynq_delay,
    delay_policy,
    exponential,
    fixed,
)
from asyncq.task import Task

TASK = Task("email:welcome")
ERROR = RuntimeError("boom")

# The shortest and longest delays, in seconds, that Asynq v0.26.0 gave for n failures before.
ASYNQ_RANGES = {
    0: (15, 44),
    1: (16, 74),
    2: (31, 118),
    3: (96, 212),
    4: (271, 416),
    5: (640, 814),
    12: (20_751, 21_128),
    24: (331_791, 332_516),
}


@pytest.mark.parametrize(("retried", "limits"), ASYNQ_RANGES.items())
def test_the_default_delay_is_asynqs(retried: int, limits: tuple[int, int]) -> None:
    delays = {asynq_delay(retried, ERROR, TASK) for _ in range(2000)}
    assert (min(delays), max(delays)) == limits
    assert len(delays) == 30


def test_the_default_delay_has_an_end() -> None:
    assert asynq_delay(2**31 - 1, ERROR, TASK) == LONGEST_S


def test_exponential_grows_to_its_limit() -> None:
    delay = exponential(base=2, factor=3, max=timedelta(minutes=1), jitter=0)
    assert [delay(n, ERROR, TASK) for n in (0, 1, 2, 3, 4, 10_000)] == [2, 6, 18, 54, 60, 60]


def test_exponential_spreads_tasks_that_failed_together() -> None:
    delay = exponential(base=100, jitter=0.5)
    delays = [delay(0, ERROR, TASK) for _ in range(200)]
    assert all(50 <= seconds(one, "delay") <= 100 for one in delays)
    assert len(set(delays)) > 100


@pytest.mark.parametrize(
    "wrong",
    [{"base": -1}, {"max": math.nan}, {"factor": 0.5}, {"jitter": 2}, {"factor": math.nan}],
)
def test_exponential_refuses_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        exponential(**wrong)


def test_fixed_is_always_the_same() -> None:
    assert [fixed(timedelta(seconds=3))(n, ERROR, TASK) for n in (0, 9)] == [3, 3]


def test_a_policy_is_a_function_or_a_delay() -> None:
    assert delay_policy(asynq_delay) is asynq_delay
    assert delay_policy(7)(3, ERROR, TASK) == 7
    with pytest.raises(OptionError):
        delay_policy(-7)


@pytest.mark.parametrize("signal", [Retry, Snooze])
def test_a_signal_carries_its_delay(signal: type[Retry] | type[Snooze]) -> None:
    assert signal(2).delay_s == 2
    assert signal(timedelta(minutes=1)).delay_s == 60
    # A delay that was reckoned from an instant may have run out meanwhile.
    assert signal(-3).delay_s == 0
    assert str(signal(2, "rate limited")) == "rate limited"
    assert "2 s" in str(signal(2))
    with pytest.raises(OptionError):
        signal(math.nan)


@pytest.mark.parametrize(
    "signal", [Retry(2, "later"), Snooze(3), Retry(delay=4), SkipRetry("bad"), RevokeTask()]
)
def test_a_signal_survives_the_way_out_of_a_process(signal: Exception) -> None:
    copy = pickle.loads(pickle.dumps(signal))
    assert (type(copy), str(copy), vars(copy)) == (type(signal), str(signal), vars(signal))


@pytest.mark.parametrize("signal", [Retry, Snooze, SkipRetry, RevokeTask])
def test_a_signal_passes_an_except_for_our_errors(signal: type[Exception]) -> None:
    assert not issubclass(signal, AsyncqError)
