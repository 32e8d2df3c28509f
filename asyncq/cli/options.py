"""What the values of options mean where several commands take them: stores, durations, instants."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Final, TypeAlias

import typer

from asyncq import OptionError

__all__ = ["RedisUrl", "duration", "instant", "is_duration"]

RedisUrl: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        help="redis://, rediss://, unix:// or embedded://PATH. Default: ASYNCQ_REDIS_URL, else "
        "redis://localhost:6379/0. Other users see a password here, but not in the variable.",
    ),
]

_UNITS_S: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
_DURATION: Final = re.compile(rf"\d+(?:\.\d+)?|(?:{_PART.pattern})+", re.ASCII)


def is_duration(text: str) -> bool:
    """Tell whether `duration` takes the text."""
    return _DURATION.fullmatch(text) is not None


def duration(text: str | None, option: str) -> float | None:
    """Return the seconds of a duration: `90`, `1.5s`, `10m`, `1h30m`, `1d`; None stays None.

    Raises:
        OptionError: it is no duration; `option` is what the error calls it.
    """
    if text is None:
        return None
    if not is_duration(text):
        raise OptionError(f"{option}: {text!r} is no duration: write 90, 1.5s, 10m, 2h or 1d")
    parts = _PART.findall(text) or [(text, "")]
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def instant(text: str | None, option: str) -> datetime | None:
    """Return an instant of ISO 8601 with its time zone: `2026-01-31T18:00Z`; None stays None.

    Raises:
        OptionError: it is no instant; `option` is what the error calls it.
    """
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise OptionError(
            f"{option}: {text!r} is no instant: write 2026-01-31T18:00Z or 2026-01-31T18:00+01:00"
        ) from None
    if found.utcoffset() is None:
        raise OptionError(
            f"{option}: {text!r} has no time zone: add Z for UTC, or an offset such as +01:00"
        )
    return found
