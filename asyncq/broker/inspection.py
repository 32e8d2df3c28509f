"""The inspector's side: reads what Redis holds of tasks and queues, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asyncq.broker import keys
from asyncq.broker.broker import Broker
from asyncq.broker.keys import queue_keys
from asyncq.broker.resp import Arg
from asyncq.clock import from_unix
from asyncq.message import TaskMessage, decode


@dataclass(frozen=True, slots=True)
class StoredTask:
    """A task as it stands in Redis; `next_at` is unix seconds, `None` if it waits for nothing."""

    message: TaskMessage
    state: str
    result: bytes | None
    progress: bytes | None
    next_at: float | None


@dataclass(frozen=True, slots=True)
class QueueStats:
    """How many tasks of a queue are in each state, and what was handled today (UTC) and ever."""

    queue: str
    paused: bool
    pending: int
    active: int
    scheduled: int
    retry: int
    archived: int
    completed: int
    due: int
    """Of scheduled and retry, what is due now."""
    processed: int
    failed: int


@dataclass(frozen=True, slots=True)
class QueueDetails:
    """What else is known of a queue; runs are counted since midnight (UTC)."""

    stats: QueueStats
    groups: int
    aggregating: int
    processed_today: int
    failed_today: int
    latency_s: float
    """How long the task that is next has waited; 0 if none waits, or Redis does not know."""
    read_at_s: float
    """Unix seconds by Redis's clock."""


async def find_task(broker: Broker, queue: str, task_id: str) -> StoredTask | None:
    """Read one task; `None` when there is none.

    Raises:
        MalformedMessageError: its bytes are no message.
    """
    k = queue_keys(queue)
    fields, scheduled, retry = await broker.pool.ask(
        ["HMGET", k.task(task_id), "msg", "state", "result", "progress"],
        ["ZSCORE", k.scheduled, task_id],
        ["ZSCORE", k.retry, task_id],
    )
    raw, state, result, progress = fields
    if raw is None:
        return None
    score = scheduled if scheduled is not None else retry
    return StoredTask(
        decode(task_id, queue, raw),
        (state or b"").decode(errors="replace"),
        result,
        progress,
        None if score is None else float(score),
    )


async def queue_names(broker: Broker) -> list[str]:
    """Return the names of all queues, sorted."""
    (names,) = await broker.pool.ask(["SMEMBERS", keys.QUEUES])
    return sorted(name.decode(errors="replace") for name in names)


async def queue_stats(broker: Broker, queues: Sequence[str]) -> list[QueueStats]:
    """Count the tasks of queues, in one round trip."""
    ((seconds, micros),) = await broker.pool.ask(["TIME"])
    now_s = seconds.decode()
    now_ms = f"{now_s}{int(micros) // 1000:03}"
    commands: list[Sequence[Arg]] = []
    for queue in queues:
        k = queue_keys(queue)
        commands += (
            ["EXISTS", k.paused],
            ["LLEN", k.pending],
            ["LLEN", k.active],
            ["ZCARD", k.scheduled],
            ["ZCARD", k.retry],
            ["ZCARD", k.archived],
            ["ZCARD", k.completed],
            ["ZCOUNT", k.scheduled, "-inf", now_s],
            ["ZCOUNT", k.retry, "-inf", now_s],
            ["ZCOUNT", k.due, "-inf", now_ms],  # ours, whose scores elsewhere are rounded up
            ["GET", k.processed],
            ["GET", k.failed],
        )
    answers = await broker.pool.ask(*commands)
    return [_stats(queue, answers[i * 12 : i * 12 + 12]) for i, queue in enumerate(queues)]


async def queue_details(broker: Broker, queues: Sequence[str]) -> list[QueueDetails]:
    """Count all that is known of queues; what groups hold is asked queue by queue."""
    if not queues:
        return []
    stats = await queue_stats(broker, queues)
    ((seconds, microseconds),) = await broker.pool.ask(["TIME"])
    now_s = int(seconds) + int(microseconds) / 1e6
    today = from_unix(now_s).date().isoformat()
    commands: list[Sequence[Arg]] = []
    for queue in queues:
        k = queue_keys(queue)
        commands += (
            ["GET", f"{k.processed}:{today}"],
            ["GET", f"{k.failed}:{today}"],
            ["SCARD", k.groups],
            ["LINDEX", k.pending, -1],
        )
    answers = await broker.pool.ask(*commands)
    processed, failed, groups, oldest = (answers[i::4] for i in range(4))
    lookups: list[Sequence[Arg]] = [
        ["HGET", queue_keys(queue).task("").encode() + (task_id or b""), "pending_since"]
        for queue, task_id in zip(queues, oldest, strict=True)
    ]
    since = await broker.pool.ask(*lookups)
    return [
        QueueDetails(
            stats=stats[i],
            groups=groups[i],
            aggregating=await _aggregating(broker, queue) if groups[i] else 0,
            processed_today=int(processed[i] or 0),
            failed_today=int(failed[i] or 0),
            latency_s=max(0.0, now_s - int(since[i]) / 1e9) if since[i] else 0.0,
            read_at_s=now_s,
        )
        for i, queue in enumerate(queues)
    ]


async def _aggregating(broker: Broker, queue: str) -> int:
    """Count the tasks in groups; one that SSCAN names twice while the set grows counts twice."""
    k = queue_keys(queue)
    total = 0
    cursor = b"0"
    while True:
        ((cursor, groups),) = await broker.pool.ask(["SSCAN", k.groups, cursor, "COUNT", 500])
        if groups:
            prefix = k.group("").encode()
            total += sum(await broker.pool.ask(*(["ZCARD", prefix + group] for group in groups)))
        if cursor == b"0":
            return total


def _stats(queue: str, answers: list[Any]) -> QueueStats:
    paused, pending, active, scheduled, retry, archived, completed, *rest = answers
    scheduled_due, retry_due, exactly_due, processed, failed = rest
    return QueueStats(
        queue=queue,
        paused=bool(paused),
        pending=pending,
        active=active,
        scheduled=scheduled,
        retry=retry,
        archived=archived,
        completed=completed,
        due=max(scheduled_due + retry_due, exactly_due),
        processed=int(processed or 0),
        failed=int(failed or 0),
    )
