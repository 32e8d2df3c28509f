"""Reads `Enqueue(...)` as the golden files print it, so that the same call can be made here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from asyncq import DuplicateTaskError, OptionError, TaskIDConflictError

ERRORS: dict[str, type[Exception]] = {
    "task ID conflicts with another task": TaskIDConflictError,
    "task already exists": DuplicateTaskError,
    "task typename cannot be empty": OptionError,
    "queue name must contain one or more characters": OptionError,
    "task ID cannot be empty": OptionError,
    "Unique TTL cannot be less than 1s": OptionError,
    "group key cannot be empty": OptionError,
    "task cannot be nil": TypeError,  # no option, but no task at all
}
"""Each error of Asynq's client, and ours for it."""

STRING = r'"(?:[^"\\]|\\.)*"'
CALL = re.compile(
    rf"Enqueue\(type=(?P<type>{STRING}) payload=(?P<payload>nil|{STRING})"
    r"(?: headers=(?P<headers>\{.*?\}))? options=\[(?P<options>.*)\]\)"
)
OPTION = re.compile(rf"(?P<name>\w+)\((?P<value>{STRING}|[^()]*)\)(?:, |$)")

NAMES = {
    "TaskID": "task_id",
    "Queue": "queue",
    "MaxRetry": "max_retry",
    "Timeout": "timeout",
    "Deadline": "deadline",
    "Unique": "unique",
    "ProcessAt": "process_at",
    "ProcessIn": "process_in",
    "Retention": "retention",
    "Group": "group",
}

NUMBER = r"(\d+(?:\.\d+)?)"
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


@dataclass(frozen=True)
class Enqueue:
    """One call of Asynq's client, in our words; `type` is `None` for a nil task."""

    type: str | None
    payload: bytes | None
    options: dict[str, Any]

    @classmethod
    def read(cls, text: str) -> Enqueue:
        """Read a call as it was printed."""
        if text == "Enqueue(nil task)":
            return cls(None, None, {})
        match = CALL.fullmatch(text)
        assert match, f"no call that can be read: {text}"
        payload = None if match["payload"] == "nil" else unquoted(match["payload"])
        options = dict(_options(match["options"]))
        if match["headers"]:
            options["headers"] = json.loads(match["headers"])
        return cls(unquoted(match["type"]).decode(), payload, options)


def unquoted(literal: str) -> bytes:
    """Return the bytes of a string as Go quotes it."""
    parts = re.split(r"(\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|.))", literal[1:-1])
    return b"".join(map(_bytes_of, parts))


def _bytes_of(part: str) -> bytes:
    if not part.startswith("\\"):
        return part.encode()
    kind, digits = part[1], part[2:]
    if kind == "x":
        return bytes.fromhex(digits)
    if kind in "uU":
        return chr(int(digits, 16)).encode()
    return {"a": b"\a", "b": b"\b", "t": b"\t", "n": b"\n", "v": b"\v", "f": b"\f", "r": b"\r"}.get(
        kind, kind.encode()
    )


def _options(text: str) -> list[tuple[str, Any]]:
    found = list(OPTION.finditer(text))
    assert "".join(match[0] for match in found) == text, f"no options that can be read: {text}"
    return [(NAMES[match["name"]], _value(match["value"])) for match in found]


def _value(text: str) -> Any:
    if text.startswith('"'):
        return unquoted(text).decode()
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(rf"(?:{NUMBER}(?:h|m|s|ms|us|µs|ns))+", text):
        pairs = re.findall(rf"{NUMBER}(h|ms|us|µs|ns|m|s)", text)
        return timedelta(seconds=sum(float(number) * UNITS[unit] for number, unit in pairs))
    return datetime.strptime(text, "%a %b %d %H:%M:%S UTC %Y").replace(tzinfo=UTC)
