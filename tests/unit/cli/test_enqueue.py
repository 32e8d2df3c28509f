"""What `asyncq enqueue` puts on a queue, and what it says when it may not."""

from __future__ import annotations

import pytest

from asyncq import SyncClient, TaskInfo
from tests.unit.cli.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "stdin", "payload"),
    [
        ([], b"", None),
        (["null"], b"", b"null"),
        (['{ "a": [1, 2.5], "b": "<" }'], b"", b'{"a":[1,2.5],"b":"\\u003c"}'),
        (["-"], b'\n"\xc3\xa9"\n', '"é"'.encode()),
        (["not json", "--raw"], b"", b"not json"),
        (["-", "--raw"], b"\xff\x00 {", b"\xff\x00 {"),
        (["--raw", "--", "-1"], b"", b"-1"),
    ],
)
def test_the_payload_is_compact_json_or_the_bytes_as_they_are(
    run: Run, store_url: str, arguments: list[str], stdin: bytes, payload: bytes | None
) -> None:
    ended = run("enqueue", "--redis", store_url, "--task-id", "1", "t", *arguments, stdin=stdin)
    assert (ended.code, ended.err) == (0, "")
    assert info_of("1", store_url).payload == payload


def test_a_task_that_is_waited_for_is_kept_and_one_that_is_not_is_not(
    run: Run, store_url: str
) -> None:
    kept = run("enqueue", "t", "--redis", store_url, "--task-id", "1", "--wait", "0.01")
    run("enqueue", "t", "--redis", store_url, "--task-id", "2")
    assert kept.code == 1
    assert "task '1' of queue 'default' has not ended after 0.01 s" in kept.err
    assert info_of("1", store_url).retention.total_seconds() == 600
    assert not info_of("2", store_url).retention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task-id", "1"], "a task with id '1' is already in queue 'default'"),
        (["--unique", "1h"], "is a duplicate in queue 'default': task '1' holds the lock"),
        (["--unique", "1h", "--unique-key", "k"], None),
    ],
)
def test_a_refused_task_is_told_with_exit_code_1(
    run: Run, store_url: str, options: list[str], message: str | None
) -> None:
    run("enqueue", "t", "--redis", store_url, "--task-id", "1", "--unique", "1h")
    ended = run("enqueue", "t", "--redis", store_url, *options)
    assert ended.code == (0 if message is None else 1)
    assert (message or "") in ended.err
    assert bool(ended.out) == (message is None)


def test_what_names_hold_steers_no_terminal(run: Run, store_url: str) -> None:
    ended = run("enqueue", "t\x1b[2J", "--redis", store_url, "--queue", "a\nb")
    assert ended.code == 0
    assert ended.out.count("\n") == 1
    assert ended.out.rstrip("\n").isprintable()


def test_a_task_for_later_is_scheduled_and_stats_show_it(run: Run, store_url: str) -> None:
    ended = run("enqueue", "t", "--redis", store_url, "--process-in", "1h", "--task-id", "1")
    assert ended.out == "enqueued 't' in queue 'default' as '1'\n"
    assert info_of("1", store_url).state == "scheduled"
    table = run("stats", "--redis", store_url)
    assert (table.code, table.err) == (0, "")
    rows = [line.split() for line in table.out.splitlines() if line.strip(" ─")]
    assert rows[0][:4] == ["queue", "pending", "active", "scheduled"]
    assert [row[:4] for row in rows[1:]] == [["default", "0", "0", "1"], ["total", "0", "0", "1"]]


def info_of(task_id: str, url: str) -> TaskInfo:
    with SyncClient(url) as client:
        return client.handle(task_id).info()
