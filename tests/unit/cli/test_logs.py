"""A worker's log lines, for people and for machines."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from asyncq.cli.logs import JsonFormatter, TextFormatter, set_up

TASK = {"task_id": "42", "task_type": "email", "queue": "low"}


def record(message: object, *args: object, **changes: Any) -> logging.LogRecord:
    made = logging.LogRecord("shop", logging.INFO, "shop.py", 1, message, args, None)
    vars(made).update(changes)
    return made


def failure() -> Any:
    try:
        raise ValueError("wrong\n2026-01-01 00:00:00.000 CRITICAL asyncq: forged \x1b[2J")
    except ValueError:
        return sys.exc_info()


def test_a_text_line_has_time_level_logger_message_and_task() -> None:
    line = TextFormatter().format(record("sent %d", 3, **TASK))
    time, rest = line[:23], line[23:]
    assert time[10] == " "
    assert time[19] == "."
    assert rest == " INFO     shop: sent 3 task_id=42 task_type=email queue=low"


def test_a_line_names_the_process_if_it_is_one_of_several() -> None:
    assert TextFormatter(2).format(record("sent")).endswith(" INFO     [2] shop: sent")
    assert json.loads(JsonFormatter(2).format(record("sent", process=7)))["process"] == 2


def test_no_message_or_traceback_can_forge_a_text_line_or_steer_the_terminal() -> None:
    text = TextFormatter().format(record("a\n2026-01-01 b\x1b[2J", exc_info=failure(), **TASK))
    first, *rest = text.split("\n")
    assert first.endswith("shop: a task_id=42 task_type=email queue=low")
    assert len(rest) > 3
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert "ValueError: wrong" in text


def test_a_json_line_has_every_field_of_the_record() -> None:
    line = JsonFormatter().format(record("sent %d", 3, **TASK, shop={"id": 7}))
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {"level": "info", "logger": "shop", "message": "sent 3", **TASK,
                      "shop": {"id": 7}}  # fmt: skip


def test_a_json_record_is_one_printable_line_whatever_it_holds() -> None:
    strange = {"when": object, "rate": float("nan"), "level": "mine"}
    line = JsonFormatter().format(record("a\nb\x1b\u2028", exc_info=failure(), **strange))
    assert line.isprintable()
    fields = json.loads(line)
    assert fields["message"] == "a\nb\x1b\u2028"
    assert fields["level"] == "info"
    assert fields["rate"] == "nan"
    assert fields["exception"].startswith("Traceback")


def test_a_traceback_made_by_another_process_is_kept() -> None:
    made = record("failed", exc_text="Traceback\nValueError: wrong")
    assert (
        TextFormatter().format(made).endswith("shop: failed\n    Traceback\n    ValueError: wrong")
    )
    assert json.loads(JsonFormatter().format(made))["exception"] == "Traceback\nValueError: wrong"


def test_set_up_logs_from_a_level_up_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        set_up("warning", "json")
        logging.getLogger("asyncq.server").info("hidden")
        logging.getLogger("shop").warning("shown")
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = handlers, level
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [json.loads(line)["message"] for line in captured.err.splitlines()] == ["shown"]
