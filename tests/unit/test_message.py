from __future__ import annotations

import pytest

from asyncq.message import TaskMessage, encode
from asyncq.options import Plan

PLANS = {
    "the defaults": Plan(),
    "everything": Plan(
        queue="low",
        max_retry=3,
        timeout_s=60,
        deadline_unix=2_000_000_000,
        retention_s=3600,
        group="g",
        headers={"a": "1", "ü": "é"},
    ),
    "nothing": Plan(max_retry=0, timeout_s=0),
    "a group only": Plan(group="g"),
    "headers only": Plan(headers={"a": "1"}),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("lock", [None, "asynq:{default}:unique:t:x"])
@pytest.mark.parametrize("task_id", ["a", "é", "x" * 127, "x" * 128, "x" * 20_000])
def test_a_new_message_is_written_as_protobuf_writes_it(
    task_id: str, lock: str | None, plan: Plan
) -> None:
    message = TaskMessage(
        type="email:welcome",
        payload=b"{}",
        id=task_id,
        queue=plan.queue,
        retry=plan.max_retry,
        timeout=plan.timeout_s,
        deadline=plan.deadline_unix,
        unique_key=lock or "",
        retention=plan.retention_s,
        group_key=plan.group or "",
        headers=plan.headers,
    )
    written = encode("email:welcome", b"{}", task_id, plan, lock)
    assert TaskMessage.FromString(written) == message
    if len(plan.headers) <= 1:  # several have no order
        assert written == message.SerializeToString()


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_payloads_of_any_length_are_written_as_protobuf_writes_them(length: int) -> None:
    message = TaskMessage(
        type="t", payload=b"x" * length, id="1", queue="default", retry=25, timeout=1800
    )
    assert encode("t", b"x" * length, "1", Plan()) == message.SerializeToString()


def test_no_payload_is_an_empty_one() -> None:
    assert encode("t", None, "1", Plan()) == encode("t", b"", "1", Plan())


def test_one_task_says_nothing_of_the_next() -> None:
    plain = encode("t", b"", "1", Plan())
    encode("t", b"", "1", Plan(group="g", headers={"a": "1"}), "lock")
    assert encode("t", b"", "1", Plan()) == plain
