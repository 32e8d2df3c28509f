"""The table of queues, and its JSON."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from asyncq.cli.stats import as_plain, short, write
from asyncq.inspector import QueueInfo


def info(queue: str, **changes: Any) -> QueueInfo:
    counts = dict.fromkeys(
        ["size", "pending", "active", "scheduled", "retry", "archived", "completed", "aggregating",
         "groups", "processed", "failed", "processed_total", "failed_total"], 0
    )  # fmt: skip
    fields: dict[str, Any] = {
        "queue": queue,
        "paused": False,
        "latency": timedelta(),
        "timestamp": datetime(2026, 1, 31, tzinfo=UTC),
        **counts,
    }
    return QueueInfo(**{**fields, **changes})


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]


def test_the_table_has_a_row_a_queue_and_the_sums(capsys: pytest.CaptureFixture[str]) -> None:
    write(
        [
            info("critical", pending=2, latency=timedelta(seconds=75), processed=8, failed=1),
            info("low", pending=1_000_000, archived=3, processed=12, failed=4),
        ]
    )
    assert rows(capsys) == [
        ["queue", "pending", "active", "scheduled", "retry", "archived", "completed", "latency",
         "processed", "failed", "errors"],
        ["critical", "2", "0", "0", "0", "0", "0", "1m15s", "8", "1", "12.5%"],
        ["low", "1000000", "0", "0", "0", "3", "0", "0s", "12", "4", "33.3%"],
        ["total", "1000002", "0", "0", "0", "3", "0", "1m15s", "20", "5", "25.0%"],
    ]  # fmt: skip


def test_columns_that_would_be_empty_show_up_when_they_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write([info("a", paused=True, aggregating=5), info("b")])
    header, a, b, total = rows(capsys)
    assert header[1] == "paused"
    assert "aggregating" in header
    assert (a[1], b[1], total[1]) == ("yes", "0", "0")


def test_the_name_of_a_queue_is_shown_as_it_is_and_steers_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write([info("[red]a\x1b[2J\nb :smile:")])
    assert r"[red]a\x1b[2J\nb :smile:" in capsys.readouterr().out


def test_without_queues_the_table_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    write([])
    assert "no queues yet: enqueue a task" in capsys.readouterr().out


def test_json_has_numbers_and_the_sums() -> None:
    plain = as_plain([info("a", size=3, pending=3, processed=4, failed=1,
                           latency=timedelta(seconds=1.5)), info("b", size=1)])  # fmt: skip
    first, second = plain["queues"]
    assert (first["queue"], first["pending"], first["latency_s"]) == ("a", 3, 1.5)
    assert (first["error_rate"], second["error_rate"]) == (0.25, None)
    assert first["timestamp"] == "2026-01-31T00:00:00+00:00"
    totals = plain["totals"]
    assert (totals["size"], totals["processed"], totals["error_rate"]) == (4, 4, 0.25)
    assert totals["latency_s"] == 1.5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.24, "0.2s"), (42.9, "42s"), (185, "3m05s"), (7800, "2h10m"), (356400, "4d03h")],
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert short(timedelta(seconds=seconds)) == text
