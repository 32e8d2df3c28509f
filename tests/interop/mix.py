"""A thousand tasks with every option that Go and Python have in common, for both directions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from asyncq import Task, TaskOptions
from tests.interop.compare import Between
from tests.interop.gopeer import GoTask
from tests.interop.process import TaskEvent

QUEUES = {"critical": 6, "default": 3, "low": 1}
DEFAULT_TIMEOUT_S = 1800
FLAKY = "flaky:0ms"
FLAKY_ERROR = f"{FLAKY} failed on purpose"


def thousand_tasks() -> list[GoTask]:
    """Make the tasks, all with a retention; every twentieth fails once.

    Fractions of a second are among them, which both sides cut in the message.
    """
    now = int(time.time())
    return [_task(i, now) for i in range(1000)]


def _task(i: int, now: int) -> GoTask:
    task = GoTask(type=FLAKY if i % 20 == 7 else f"echo:{i % 7}", retention_s=3600 + i / 4)
    if i % 5 != 4:  # else a nil payload
        task["payload"] = _payload(i)
    if i % 3 != 1:  # else the default queue
        task["queue"] = ("critical", "default", "low")[i % 3]
    if i % 4:
        task["max_retry"] = i % 7 + 1
    elif i % 8:
        task["max_retry"] = -1  # which means none
    if i % 6 == 0:
        task["unique_s"] = 300
        task["payload"] = json.dumps({"unique": i}).encode()
    if i % 4 == 1:
        task["id"] = f"task:{i} é"
    if i % 3 == 0:
        task["headers"] = {"trace": str(i), "größe": "<&> \u2028", "empty": ""}
    _set_times(task, i, now)
    return task


def _set_times(task: GoTask, i: int, now: int) -> None:
    if i % 3 == 1:
        task["timeout_s"] = 30 + i % 90
    elif i % 9 == 2:
        task["timeout_s"] = 0.5  # cut to none, and not replaced by the default
    if i % 5 == 2:
        task["deadline_unix"] = now + 60 + i + 0.75
    if i % 10 == 3:
        task["process_in_s"] = 1 + i % 50 / 100
    if i % 10 == 8:
        task["process_at_unix"] = now + 2.25  # still ahead when a slow machine gets to it


def _payload(i: int) -> bytes:
    return [
        json.dumps({"user_id": i, "name": "José <x> & \u2028"}, ensure_ascii=False).encode(),
        bytes(range(256)),
        b"",
        b"%d" % i * 1000,
    ][i % 5]


def python_task(task: GoTask) -> Task[Any]:
    """Make the same task for the Python client."""
    options = TaskOptions()
    if "queue" in task:
        options["queue"] = task["queue"]
    if "max_retry" in task:
        options["max_retry"] = task["max_retry"]
    if "timeout_s" in task:
        options["timeout"] = task["timeout_s"]
    if "deadline_unix" in task:
        options["deadline"] = datetime.fromtimestamp(task["deadline_unix"], UTC)
    if "unique_s" in task:
        options["unique"] = task["unique_s"]
    if "id" in task:
        options["task_id"] = task["id"]
    if "process_in_s" in task:
        options["process_in"] = task["process_in_s"]
    if "process_at_unix" in task:
        options["process_at"] = datetime.fromtimestamp(task["process_at_unix"], UTC)
    if "retention_s" in task:
        options["retention"] = task["retention_s"]
    if "headers" in task:
        options["headers"] = task["headers"]
    return Task(task["type"], task.get("payload"), **options)


def run_name(id: str, retry_count: int) -> str:
    """Name one run of a task."""
    return f"{id}, run {retry_count}"


def by_run(events: Sequence[TaskEvent]) -> dict[str, TaskEvent]:
    """Sort events by run; no run may have started twice."""
    found = {run_name(event.id, event.retry_count): event for event in events}
    assert len(found) == len(events), "a run started twice"
    return found


def due_at(task: GoTask, enqueued_at: float) -> float:
    """The Unix time before which a task must not start; Asynq cuts it to whole seconds."""
    if "process_in_s" in task:
        return enqueued_at + task["process_in_s"]
    return task.get("process_at_unix", 0)


def facts(task: GoTask) -> dict[str, object]:
    """What everybody must see of a task: its handlers, inspectors and handles."""
    return {
        "type": task["type"],
        "queue": task.get("queue", "default"),
        "payload": task.get("payload", b""),
        "max_retry": max(0, task.get("max_retry", 25)),
        "headers": task.get("headers", {}),
    }


def stored(task: GoTask) -> dict[str, int]:
    """The whole seconds that the message holds, 0 for none, by the option they are cut from."""
    # Asynq's default is for neither timeout nor deadline given, whatever they are cut to.
    default = 0 if "deadline_unix" in task else DEFAULT_TIMEOUT_S
    return {
        "timeout_s": int(task.get("timeout_s", default)),
        "deadline_unix": int(task.get("deadline_unix", 0)),
        "retention_s": int(task.get("retention_s", 0)),
    }


def deadline_of_run(task: GoTask, earliest_start: float, started: float) -> Between:
    """When a run ends that was taken between these Unix times; Go cuts to whole seconds."""
    deadline = stored(task)["deadline_unix"] or math.inf
    timeout_s: float = stored(task)["timeout_s"]
    if not timeout_s:
        timeout_s = DEFAULT_TIMEOUT_S if deadline == math.inf else math.inf
    earliest = earliest_start + timeout_s
    return Between(
        min(math.floor(earliest) if earliest < math.inf else earliest, deadline),
        min(started + timeout_s, deadline),
    )


@dataclass(frozen=True)
class Result:
    """What the handlers of either side leave."""

    by: str
    id: str
    payload: bytes


def expected_result(by: str, id: str, task: GoTask) -> dict[str, object]:
    """The attributes of the `Result` of a task."""
    return {"by": by, "id": id, "payload": task.get("payload", b"")}


def count_by_queue(tasks: list[GoTask]) -> Iterator[tuple[str, int, int]]:
    """For each queue: its name, how many tasks there are, and how many of them fail once."""
    for queue in QUEUES:
        here = [task for task in tasks if task.get("queue", "default") == queue]
        yield queue, len(here), sum(task["type"] == FLAKY for task in here)
