from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any, get_type_hints

import pytest

from asyncq.errors import AsyncqError, OptionError
from asyncq.handler import FOR_HANDLER, FOR_RUN, HandlerOptions, RunOptions
from asyncq.options import (
    FOR_TASK,
    FOR_TYPE,
    Plan,
    TaskOptions,
    TypeOptions,
    check_options,
    resolve,
)
from asyncq.task import Task, TaskType

NOW = 1_800_000_000.25
LATER = datetime(2033, 5, 18, 3, 33, 20, 500_000, tzinfo=UTC)  # unix 2,000,000,000.5


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("queue", ""),
        ("queue", "  "),
        ("queue", 1),
        ("queue", "\ud800"),
        ("max_retry", True),
        ("max_retry", 1.0),
        ("max_retry", 2**31),
        ("timeout", -1),
        ("timeout", math.nan),
        ("timeout", math.inf),
        ("timeout", False),
        ("timeout", "30"),
        ("timeout", 10**11),
        ("unique", 0.999),
        ("unique", timedelta(milliseconds=999)),
        ("retention", -0.5),
        ("group", ""),
        ("group", " "),
        ("headers", {"a": 1}),
        ("headers", {1: "a"}),
        ("headers", [("a", "b")]),
        ("headers", {"a": "\udfff"}),
        ("task_id", ""),
        ("task_id", " "),
        ("task_id", None),
        ("unique_key", ""),
        ("deadline", datetime(2033, 5, 18)),
        ("deadline", datetime(1970, 1, 1, tzinfo=UTC)),
        ("deadline", datetime(1969, 1, 1, tzinfo=UTC)),
        ("deadline", 2_000_000_000),
        ("deadline", None),
        ("process_at", datetime(2033, 5, 18)),
        ("process_at", None),
        ("process_in", math.nan),
        ("process_in", None),
        ("executor", "fiber"),
        ("retry_delay", -1),
        ("retry_delay", None),
        ("is_failure", True),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError):
        check_options({option: value}, FOR_TASK | FOR_RUN, "here")


def test_blank_names_are_told_in_asynqs_words() -> None:
    for option, text in {
        "queue": "queue name must contain one or more characters",
        "task_id": "task ID cannot be empty",
        "group": "group key cannot be empty",
    }.items():
        with pytest.raises(OptionError, match=f"^{text}$"):
            check_options({option: " "}, FOR_TASK, "here")
    with pytest.raises(OptionError, match=r"^task typename cannot be empty$"):
        Task("  ")


@pytest.mark.parametrize("option", ["timeout", "unique", "retention", "group"])
def test_none_is_taken_where_it_removes_a_default(option: str) -> None:
    assert check_options({option: None}, FOR_TASK, "here") == {option: None}


@pytest.mark.parametrize(
    ("option", "allowed", "advice"),
    [
        ("qeue", FOR_TASK, "did you mean 'queue'?"),
        ("zzz", FOR_TYPE, "there are group, headers, max_retry"),
        ("task_id", FOR_HANDLER, r"give it to \.new"),
        ("process_in", FOR_TYPE, r"give it to \.new"),
        ("queue", FOR_RUN, "give it to the TaskType"),
        ("executor", FOR_TASK, "give it to @mux.task"),
    ],
)
def test_an_option_in_the_wrong_place_is_told_the_right_one(
    option: str, allowed: frozenset[str], advice: str
) -> None:
    with pytest.raises(TypeError, match=advice) as caught:
        check_options({option: 1}, allowed, "this place")
    assert str(caught.value).startswith(f"this place: {'unknown option ' * (option in 'qeue zzz')}")
    assert not isinstance(caught.value, AsyncqError)


def test_one_layer_says_once_when_to_run() -> None:
    with pytest.raises(OptionError, match="process_at or process_in, not both"):
        check_options({"process_at": LATER, "process_in": 1}, FOR_TASK, "here")


# Merging


def test_nothing_given_is_asynqs_defaults() -> None:
    assert resolve({}, {}, now=NOW) == Plan(
        queue="default",
        max_retry=25,
        timeout_s=1800,
        deadline_unix=0,
        retention_s=0,
        process_at_s=None,
        unique_s=None,
        unique_key=None,
        group=None,
        headers={},
        task_id=None,
    )


def test_everything_given_is_in_the_units_of_a_message() -> None:
    plan = Task(
        "t",
        queue="low",
        max_retry=3,
        timeout=timedelta(seconds=90.9),
        deadline=LATER,
        retention=3600.9,
        unique=2.5,
        unique_key="k",
        group="g",
        headers={"a": "b"},
        task_id="id",
        process_at=LATER,
    ).plan(NOW)
    assert plan == Plan(
        queue="low",
        max_retry=3,
        timeout_s=90,
        deadline_unix=2_000_000_000,
        retention_s=3600,
        process_at_s=2_000_000_000.5,
        unique_s=2,
        unique_key="k",
        group="g",
        headers={"a": "b"},
        task_id="id",
    )


@pytest.mark.parametrize(
    ("options", "timeout_s", "deadline_unix"),
    [
        ({}, 1800, 0),
        ({"timeout": None}, 1800, 0),
        ({"timeout": 0}, 1800, 0),
        ({"timeout": 0.5}, 0, 0),  # set, but cut: Asynq stores neither
        ({"timeout": 60.9}, 60, 0),
        ({"deadline": LATER}, 0, 2_000_000_000),
        ({"deadline": LATER, "timeout": 60}, 60, 2_000_000_000),
    ],
)
def test_the_default_timeout_is_for_tasks_without_timeout_and_deadline(
    options: dict[str, Any], timeout_s: int, deadline_unix: int
) -> None:
    plan = Task("t", **options).plan(NOW)
    assert (plan.timeout_s, plan.deadline_unix) == (timeout_s, deadline_unix)


def test_max_retry_below_zero_is_none_as_in_asynq() -> None:
    assert Task("t", max_retry=-3).plan(NOW).max_retry == 0


def test_the_later_layer_wins_and_headers_merge() -> None:
    kind = TaskType("t", queue="a", max_retry=1, timeout=9, headers={"x": "1", "y": "1"})
    task = kind.new(queue="b", headers={"y": "2", "z": "2"})
    plan = task.plan(NOW, {"queue": "c", "headers": {"z": "3"}})
    assert (plan.queue, plan.max_retry, plan.timeout_s) == ("c", 1, 9)
    assert plan.headers == {"x": "1", "y": "2", "z": "3"}
    assert task.plan(NOW).queue == "b"  # one enqueue changes nothing for the next
    assert kind.plan.headers == {"x": "1", "y": "1"}


def test_none_takes_a_default_away() -> None:
    kind = TaskType("t", timeout=9, unique=60, retention=60, group="g")
    plan = kind.new(timeout=None, unique=None, retention=None, group=None).plan(NOW)
    assert plan == Plan()


def test_the_later_instant_wins_whichever_way_it_is_given() -> None:
    assert Task("t", process_at=LATER).plan(NOW, {"process_in": 5}).process_at_s == NOW + 5
    assert Task("t", process_in=5).plan(NOW, {"process_at": LATER}).process_at_s == 2_000_000_000.5
    assert Task("t", process_in=5).plan(NOW, {"queue": "low"}).process_at_s == NOW + 5


def test_process_in_counts_from_each_enqueue() -> None:
    task = Task("t", process_in=timedelta(minutes=1))
    assert [task.plan(now).process_at_s for now in (100.0, 200.0)] == [160.0, 260.0]


def test_a_delay_that_ran_out_is_no_error() -> None:
    assert Task("t", process_in=-5).plan(NOW).process_at_s == NOW - 5


def test_a_unique_key_alone_is_refused_since_it_would_lock_nothing() -> None:
    task = Task("t", unique_key="k")
    with pytest.raises(OptionError, match="unique="):
        task.plan(NOW)
    assert task.plan(NOW, {"unique": 60}).unique_key == "k"


def test_a_unique_key_goes_with_the_lock_that_it_names() -> None:
    kind = TaskType("t", unique=60)
    plan = kind.new(unique_key="k").plan(NOW, {"unique": None})
    assert (plan.unique_s, plan.unique_key) == (None, None)


def test_tasks_without_own_options_share_one_plan() -> None:
    kind = TaskType("t", bytes, queue="low")
    assert kind.new(b"1").plan(NOW) is kind.new(b"2").plan(NOW, {}) is kind.plan


def test_headers_given_are_not_changed_later() -> None:
    headers = {"a": "1"}
    task = Task("t", headers=headers)
    headers["a"] = "2"
    assert task.plan(NOW).headers == {"a": "1"} == task.headers


@pytest.mark.parametrize("options", [TypeOptions, TaskOptions, RunOptions, HandlerOptions])
def test_the_types_of_options_can_be_read_at_run_time(options: Any) -> None:
    assert get_type_hints(options).keys() == options.__optional_keys__
