"""Durations and instants as callers give them and as Redis stores them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from asyncq.errors import OptionError

__all__ = ["LONGEST_S", "Seconds", "from_unix", "seconds", "to_unix"]

Seconds: TypeAlias = float | timedelta
"""A duration: a number of seconds or a timedelta."""

LONGEST_S = 2**63 // 10**9
"""The longest duration in seconds (292 years): more overflows the nanoseconds of Go's readers."""

_EARLIEST = datetime.min.replace(tzinfo=UTC)
_LATEST = datetime.max.replace(tzinfo=UTC)
_EARLIEST_UNIX = _EARLIEST.timestamp()
_LATEST_UNIX = _LATEST.timestamp()


def seconds(value: Seconds, name: str, *, least: float | None = 0.0) -> float:
    """Return a duration in seconds; `name` is what the error calls it.

    Raises:
        OptionError: `value` is no duration, not finite, shorter than `least` (None: may be
            negative) or longer than 292 years.
    """
    number = _number_of(value)
    if number is None:
        raise OptionError(f"{name} must be a number of seconds or a timedelta, not {value!r}")
    if not math.isfinite(number):
        raise OptionError(f"{name} must be a finite number of seconds, not {value!r}")
    if least is not None and number < least:
        limit = "must not be negative" if least == 0 else f"must be at least {least:g} s"
        raise OptionError(f"{name} {limit}, not {value!r}")
    if abs(number) > LONGEST_S:
        raise OptionError(f"{name} must not be longer than 292 years, not {value!r}")
    return number


def to_unix(value: object, name: str) -> float:
    """Return an instant as unix seconds; `name` is what the error calls it.

    Raises:
        OptionError: `value` is no datetime, or has no time zone.
    """
    if not isinstance(value, datetime):
        raise OptionError(f"{name} must be a timezone-aware datetime, not {value!r}")
    if value.utcoffset() is None:
        raise OptionError(
            f"{name} must be a timezone-aware datetime, {value!r} has no time zone: "
            "use datetime.now(timezone.utc), or .astimezone() for local time"
        )
    return value.timestamp()


def from_unix(unix_s: float) -> datetime:
    """Return unix seconds as an aware datetime in UTC.

    What lies outside the years 1 to 9999 becomes the nearest end: other programs may store
    any 64-bit number, and reading a task must not fail for it.
    """
    if unix_s >= _LATEST_UNIX:
        return _LATEST
    if unix_s <= _EARLIEST_UNIX:
        return _EARLIEST
    return datetime.fromtimestamp(unix_s, UTC)


def _number_of(value: object) -> float | None:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf
