"""What a server can be told, and what it refuses."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from asyncq import OptionError, Server


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": -1}, "concurrency"),
        ({"concurrency": 1.5}, "concurrency"),
        ({"concurrency": "10"}, "concurrency"),
        ({"concurrency": True}, "concurrency"),
        ({"concurrency": 2**31}, "concurrency"),
        ({"prefetch": -1}, "prefetch must be a whole number of at least 0"),
        ({"prefetch": 1.5}, "prefetch"),
        ({"prefetch": "10"}, "prefetch"),
        ({"prefetch": True}, "prefetch"),
        ({"prefetch": None}, "prefetch"),
        ({"prefetch": 2**31}, "prefetch"),
        ({"queues": {}}, "name at least one"),
        ({"queues": {" ": 1}}, "queue name"),
        ({"queues": {"": 1}}, "queue name"),
        ({"queues": {"a": 0}}, "weight"),
        ({"queues": {"a": -1}}, "weight"),
        ({"queues": {"a": 1.5}}, "weight"),
        ({"queues": {"a": True}}, "weight"),
        ({"queues": {"a": 2**31}}, "weight"),
        ({"queue_concurrency": {"default": 0}}, "queue_concurrency"),
        ({"queue_concurrency": {"default": "2"}}, "queue_concurrency"),
        ({"queue_concurrency": {"defualt": 1}}, "defualt"),
        ({"shutdown_timeout": -1}, "shutdown_timeout"),
        ({"shutdown_timeout": float("nan")}, "shutdown_timeout"),
        ({"health_check_interval": 0}, "health_check_interval"),
        ({"retry_delay": "soon"}, "delay"),
        ({"retry_delay": -1}, "delay"),
        ({"redis": "http://localhost"}, "unknown scheme"),
        ({"redis": "localhost:6379"}, "scheme"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Server(**{"redis": "redis://localhost", **options})


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="concurency"):
        Server("redis://localhost", concurency=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_nothing_is_taken_ahead_unless_told() -> None:
    assert Server("redis://localhost").config.prefetch == 0
    assert Server("redis://localhost", prefetch=0).config.prefetch == 0
    assert Server("redis://localhost", prefetch=200).config.prefetch == 200


def test_durations_are_seconds_or_a_timedelta() -> None:
    server = Server("redis://localhost", shutdown_timeout=timedelta(minutes=1))
    assert server.config.shutdown_timeout_s == 60


def test_a_url_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCQ_REDIS_URL", "redis://elsewhere:1234/5")
    assert Server().url == "redis://elsewhere:1234/5"
