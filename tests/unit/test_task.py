from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from typing import Any, Unpack

import pytest
from pydantic import BaseModel, TypeAdapter

from asyncq.errors import AsyncqError, OptionError, PayloadError
from asyncq.options import (
    TaskOptions,
)
from asyncq.task import R, Task, TaskHandle, TaskInfo, TaskState, TaskType

NOW = 1_800_000_000.25
LATER = datetime(2033, 5, 18, 3, 33, 20, 500_000, tzinfo=UTC)  # unix 2,000,000,000.5


class Welcome(BaseModel):
    user_id: int
    template: str = "default"


class Recorder:
    """A client that keeps what it is asked for, and answers with what it was given."""

    def __init__(self, result: bytes = b"") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.stored = result

    async def enqueue(self, task: Task[R], /, **options: Unpack[TaskOptions]) -> TaskHandle[R]:
        plan = task.plan(NOW, options)
        self.calls.append(("enqueue", task))
        return TaskHandle(plan.task_id or "made-up", plan.queue, self, task.result_codec)

    async def task_info(self, task_id: str, queue: str, /) -> TaskInfo:
        self.calls.append(("task_info", task_id, queue))
        return INFO

    async def wait_result(self, task_id: str, queue: str, timeout_s: float | None, /) -> bytes:
        self.calls.append(("wait_result", task_id, queue, timeout_s))
        return self.stored

    async def cancel(self, task_id: str, queue: str, retry: bool, /) -> None:
        self.calls.append(("cancel", task_id, queue, retry))


INFO = TaskInfo(
    id="1",
    queue="low",
    type="t",
    payload=None,
    state=TaskState.PENDING,
    max_retry=25,
    retried=0,
    last_error="",
    last_failed_at=None,
    timeout=None,
    deadline=None,
    group=None,
    next_process_at=None,
    retention=timedelta(0),
    completed_at=None,
    result=None,
    headers={},
)


# Tasks


@pytest.mark.parametrize(
    ("payload", "stored"),
    [
        (None, None),
        (b"", b""),
        (b"\xff raw", b"\xff raw"),
        ({"user_id": 1}, b'{"user_id":1}'),
        (Welcome(user_id=1), b'{"user_id":1,"template":"default"}'),
        ("text", b'"text"'),
    ],
)
def test_a_payload_is_encoded_at_once(payload: object, stored: bytes | None) -> None:
    assert Task("t", payload).payload == stored


def test_a_task_cannot_be_changed() -> None:
    task = Task("t", queue="low")
    with pytest.raises(AttributeError):
        task.type = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        task.options["queue"] = "other"  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        task.plan(NOW).queue = "other"  # type: ignore[misc]


def test_tasks_are_equal_by_what_they_say() -> None:
    kind = TaskType("t", Welcome, queue="low")
    assert kind.new(Welcome(user_id=1)) == Task("t", Welcome(user_id=1), queue="low")
    assert kind.new(Welcome(user_id=1)) != kind.new(Welcome(user_id=2))
    assert kind.new(Welcome(user_id=1)) != kind.new(Welcome(user_id=1), queue="high")
    assert len({Task("t"), Task("t"), Task("u")}) == 2


def test_a_task_does_not_show_its_payload() -> None:
    shown = repr(Task("t\n", {"password": "secret"}, headers={"token": "secret"}))
    assert shown == r"<Task 't\n' payload=21 bytes>"


@pytest.mark.parametrize("name", [1, None, "\ud800"])
def test_a_type_name_is_a_string_that_go_can_read(name: Any) -> None:
    with pytest.raises(OptionError):
        Task(name)
    with pytest.raises(OptionError):
        TaskType(name)


# Task types


def test_a_payload_is_checked_against_its_type() -> None:
    kind = TaskType("t", Welcome)
    with pytest.raises(PayloadError):
        kind.new({"user_id": "x"})  # type: ignore[arg-type]


def test_a_payload_is_given_exactly_where_there_is_one() -> None:
    with pytest.raises(TypeError, match="takes a payload"):
        TaskType("t", Welcome).new()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes no payload"):
        TaskType("t").new(Welcome(user_id=1))  # type: ignore[call-overload]


def test_none_is_a_payload_where_the_type_has_it() -> None:
    optional: TypeAdapter[int | None] = TypeAdapter(int | None)
    assert TaskType("t", optional).new(None).payload == b"null"
    assert TaskType("t").new().payload is None


def test_what_belongs_to_one_task_is_refused_on_a_type() -> None:
    with pytest.raises(TypeError, match="task type 't': 'task_id' belongs to one task"):
        TaskType("t", task_id="x")  # type: ignore[call-overload]


async def test_a_bound_type_enqueues_itself() -> None:
    kind, client = TaskType("t", Welcome, queue="low"), Recorder()
    kind.bind(client)
    handle = await kind.enqueue(Welcome(user_id=1), task_id="one")
    assert (handle.id, handle.queue) == ("one", "low")
    assert client.calls == [("enqueue", kind.new(Welcome(user_id=1), task_id="one"))]


async def test_an_unbound_type_says_how_to_bind_it() -> None:
    with pytest.raises(AsyncqError, match=r"bind\(client\)"):
        await TaskType("t").enqueue()


# Handles


async def test_a_handle_asks_its_client() -> None:
    client = Recorder()
    handle: TaskHandle[Any] = TaskHandle("1", "low", client)
    assert await handle.info() is INFO
    await handle.result(timeout=timedelta(seconds=2))
    await handle.result()
    await handle.cancel()
    await handle.cancel(retry=False)
    assert client.calls == [
        ("task_info", "1", "low"),
        ("wait_result", "1", "low", 2.0),
        ("wait_result", "1", "low", None),
        ("cancel", "1", "low", True),
        ("cancel", "1", "low", False),
    ]


@pytest.mark.parametrize("timeout", [-1, math.nan, True])
async def test_waiting_for_a_senseless_time_is_refused(timeout: float) -> None:
    handle: TaskHandle[Any] = TaskHandle("1", "low", Recorder())
    with pytest.raises(OptionError, match="timeout"):
        await handle.result(timeout=timeout)


@pytest.mark.parametrize(
    ("result", "stored", "expected"),
    [
        (Welcome, b'{"user_id":1}', Welcome(user_id=1)),
        (bytes, b"\xff", b"\xff"),
        (bytes, b"", b""),
        (list[int], b"[1]", [1]),
        (TypeAdapter(int | None), b"", None),  # a handler that returned None stored nothing
    ],
)
async def test_a_result_is_of_the_declared_type(
    result: Any, stored: bytes, expected: object
) -> None:
    task: Task[Any] = Task("t", result=result)
    handle = await Recorder(stored).enqueue(task)
    assert await handle.result() == expected


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (b"", None),
        (b'{"a":1}', {"a": 1}),
        (b"\xff\x00", b"\xff\x00"),
        (b"plain", b"plain"),
        (b"[" * 100_000, b"[" * 100_000),
    ],
)
async def test_an_undeclared_result_is_json_or_else_bytes(stored: bytes, expected: object) -> None:
    handle = await Recorder(stored).enqueue(Task("t"))
    assert await handle.result() == expected


async def test_a_result_of_another_type_is_an_error() -> None:
    for stored in (json.dumps("text").encode(), b""):
        handle = await Recorder(stored).enqueue(Task("t", result=int))
        with pytest.raises(PayloadError):
            await handle.result()
