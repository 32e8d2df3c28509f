"""Sets logging up for a worker process; a library leaves that to its program, and this is one."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from asyncq.cli.terminal import json_text, printable, printable_lines

__all__ = ["JsonFormatter", "TextFormatter", "set_up"]

TASK_FIELDS: Final = ("task_id", "task_type", "queue")

INDENT: Final = "    "
"""Before every line of a record but its first, so that no message can pass for a record."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "taskName"}


def set_up(level: str, form: str, process: int | None = None) -> None:
    """Log to stderr from `level` up, as `text` or as `json`.

    Each line names the `process`, if it is one of several.

    It comes before the user's modules are imported: what they log then is seen, and what they set
    up by themselves wins.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


class TextFormatter(logging.Formatter):
    """A line for people: local time, level, process, logger, message, and the task that logged."""

    default_msec_format = "%s.%03d"

    def __init__(self, process: int | None = None) -> None:
        super().__init__()
        self._process = () if process is None else (f"[{process}]",)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, with the lines of a traceback indented below it."""
        first, *rest = record.getMessage().split("\n")
        line = " ".join(
            (
                self.formatTime(record),
                f"{record.levelname:<8}",
                *self._process,
                f"{printable(record.name)}:",
                printable(first.expandtabs()),
                *_task_of(record),
            )
        )
        below = "\n".join((*rest, *_details(self, record)))
        return f"{line}\n{INDENT}{printable_lines(below, INDENT)}" if below else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the record's extra fields."""

    def __init__(self, process: int | None = None) -> None:
        super().__init__()
        self._process = {} if process is None else {"process": process}

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of JSON."""
        time = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, Any] = {
            "time": time.isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            **self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if details := "\n".join(_details(self, record)):
            fields["exception"] = details
        for name, value in vars(record).items():
            if name not in _STANDARD:
                fields.setdefault(name, _plain(value))
        return json_text(fields)


def _task_of(record: logging.LogRecord) -> Iterable[str]:
    for name in TASK_FIELDS:
        if (value := getattr(record, name, None)) is not None:
            yield f"{name}={printable(str(value))}"


def _details(formatter: logging.Formatter, record: logging.LogRecord) -> Iterable[str]:
    if record.exc_info:
        yield formatter.formatException(record.exc_info)
    elif record.exc_text:  # another process made it: a traceback cannot be sent
        yield record.exc_text
    if record.stack_info:
        yield formatter.formatStack(record.stack_info)


def _plain(value: object) -> object:
    """What JSON can say stays, anything else becomes text: a log line must not fail."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value
