from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from asyncq.clock import LONGEST_S, from_unix, seconds, to_unix
from asyncq.errors import OptionError


@pytest.mark.parametrize(
    ("given", "expected"),
    [(5, 5.0), (0.25, 0.25), (0, 0.0), (timedelta(minutes=2), 120.0), (LONGEST_S, LONGEST_S)],
)
def test_a_duration_is_a_number_of_seconds_or_a_timedelta(given: Any, expected: float) -> None:
    assert seconds(given, "timeout") == expected


@pytest.mark.parametrize(
    "given",
    [
        *(math.nan, math.inf, -math.inf, True, "5", None, -1, timedelta(seconds=-1)),
        *(10**400, 1e300, timedelta.max),
    ],
)
def test_what_is_no_duration_is_refused_by_its_name(given: Any) -> None:
    with pytest.raises(OptionError, match=r"^timeout must"):
        seconds(given, "timeout")


def test_a_negative_duration_is_taken_where_it_makes_sense() -> None:
    assert seconds(-3, "process_in", least=None) == -3.0


def test_an_instant_becomes_unix_seconds_whatever_its_zone() -> None:
    berlin = timezone(timedelta(hours=2))
    assert to_unix(datetime(2033, 5, 18, 5, 33, 20, tzinfo=berlin), "deadline") == 2_000_000_000


@pytest.mark.parametrize("given", [datetime(2033, 5, 18), "2033-05-18", 2_000_000_000, None])
def test_an_instant_without_a_zone_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="deadline must be a timezone-aware datetime"):
        to_unix(given, "deadline")


@pytest.mark.parametrize(
    ("unix_s", "expected"),
    [
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (1.5, datetime(1970, 1, 1, 0, 0, 1, 500_000, tzinfo=UTC)),
        (2**63 - 1, datetime.max.replace(tzinfo=UTC)),
        (253_402_300_800, datetime.max.replace(tzinfo=UTC)),
        (-(2**63), datetime.min.replace(tzinfo=UTC)),
        (-62_135_596_800, datetime.min.replace(tzinfo=UTC)),
    ],
)
def test_any_stored_number_is_an_instant(unix_s: float, expected: datetime) -> None:
    assert from_unix(unix_s) == expected
