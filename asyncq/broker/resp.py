"""Redis's protocol: how a command is written, and how what any program may have written is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import hiredis

_hiredis: Any = hiredis  # its stubs know no tuples of several items

Arg: TypeAlias = str | bytes | int

PART: Final = b"$%d\r\n%b\r\n"
"""One part of a command, to be filled with its length and itself."""


def pack(command: Sequence[Arg]) -> bytes:
    """Write a command as Redis reads it (redis-py's asyncio connections do it in Python)."""
    packed: bytes
    try:
        packed = _hiredis.pack_command(tuple(command))
    except UnicodeEncodeError:  # an id that was read from Redis and is no UTF-8, see `text`
        packed = _hiredis.pack_command(
            tuple(
                part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
                for part in command
            )
        )
    return packed


def form(*parts: bytes | None) -> bytes:
    """Write a command once, to be filled by `%` for each call.

    Each None takes two values: a length, and so many bytes.
    """
    written = [
        PART if part is None else PART % (len(part), part.replace(b"%", b"%%")) for part in parts
    ]
    return b"*%d\r\n" % len(parts) + b"".join(written)


def text(raw: bytes) -> str:
    """Decode what any program may have written, such as an id; `pack` gives the same bytes back."""
    return raw.decode("utf-8", "surrogateescape")
