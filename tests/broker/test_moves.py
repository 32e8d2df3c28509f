"""The moves of a task, one by one, on every kind of store: what each leaves in Asynq's keys."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import md5
from itertools import count
from typing import Any

import pytest
from redis.asyncio import Redis

from asyncq import DuplicateTaskError, PayloadTooLargeError, Task, TaskIDConflictError
from asyncq.broker import keys
from asyncq.broker.broker import Answered, Broker, Request
from asyncq.broker.keys import queue_keys
from asyncq.client import Client
from asyncq.message import completed, failed, quarantined
from asyncq.outcome import Kind, Outcome
from asyncq.proto.asynq_pb2 import TaskMessage
from asyncq.server.in_flight import InFlight
from asyncq.server.loops.recoverer import Recoverer
from tests.golden.state import Connection, Key, State, state_of

SERVER = "00000000-0000-4000-8000-000000000001"
DAY_S = 86_400
TOTAL_MAX = 2**63 - 1
MARKS = 2**20
K = queue_keys("default")
LOCK = K.unique("t", md5(b"x").hexdigest())


@dataclass
class Queue:
    """The default queue of a store, with what clients and servers do to it."""

    redis: Connection
    broker: Broker
    client: Client
    _sequences: count[int] = field(default_factory=lambda: count(1))

    async def add(self, *ids: str, payload: bytes = b"x", **options: Any) -> None:
        """Enqueue tasks of type t, one after the other."""
        for task_id in ids:
            await self.client.enqueue(Task("t", payload), task_id=task_id, **options)

    async def take(self, want: int = 1, **given: Any) -> Answered:
        """Fetch as a server does."""
        return await self.pump(self.request(want=want, **given))

    async def end(self, taken: Answered, kind: Kind, **outcome: Any) -> Answered:
        """Save the outcome of everything that a fetch has brought."""
        request = self.request()
        for raw in taken.messages:
            message = TaskMessage.FromString(raw)
            ended = _outcome(kind, message, **outcome)
            request.save(message.id, taken.mark, message.unique_key, ended)
        return await self.pump(request)

    def request(self, **given: Any) -> Request:
        return Request("default", next(self._sequences), **given)

    async def pump(self, request: Request) -> Answered:
        (answer,) = await self.broker.pump(SERVER, [request])
        assert isinstance(answer, Answered), answer
        return answer

    async def state(self) -> State:
        """All of Asynq's keys."""
        return await state_of(self.redis, time.time())

    async def keys(self) -> set[str]:
        """The names of all of Asynq's keys, with days as one."""
        day = f":{datetime.now(UTC):%Y-%m-%d}"
        return {key.removesuffix(day) for key in (await self.state()).keys} - {keys.QUEUES}

    async def pending(self) -> list[str]:
        """Ids from the next to the last."""
        return [i.decode() for i in reversed(await self.redis.lrange(K.pending, 0, -1))]

    async def hash(self, task_id: str) -> dict[str, Any]:
        """The hash of a task; its message by field names, in numbers and text."""
        fields = await self.redis.hgetall(K.task(task_id))
        decoded = {name.decode(): raw.decode("utf-8", "replace") for name, raw in fields.items()}
        if b"msg" in fields:
            decoded["msg"] = TaskMessage.FromString(fields[b"msg"])
        return decoded

    async def ids(self, zset: str) -> dict[str, float]:
        pairs = await self.redis.zrange(zset, 0, -1, withscores=True)
        return {member.decode(): score for member, score in pairs}

    async def counted(self) -> dict[str, int]:
        """All counters that exist, those of a day under their name with " today"."""
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        names = {
            "processed": K.processed,
            "failed": K.failed,
            "processed today": f"{K.processed}:{today}",
            "failed today": f"{K.failed}:{today}",
        }
        values = await self.redis.mget(list(names.values()))
        return {name: int(v) for name, v in zip(names, values, strict=True) if v is not None}


def _outcome(
    kind: Kind,
    message: TaskMessage,
    *,
    at: int = 0,
    error: str = "boom",
    result: bytes | None = None,
) -> Outcome:
    """What a server makes of a run, at this moment."""
    now = int(time.time())
    match kind:
        case "done" | "requeue":
            return Outcome(kind)
        case "complete":
            return Outcome(kind, at, completed(message, now), result)
        case "retry" | "retry_uncounted":
            return Outcome(kind, at, failed(message, error, now, retried=kind == "retry"))
        case "archive":
            return Outcome(kind, 0, failed(message, error, now, retried=False))
        case "snooze":
            return Outcome(kind, at, message.SerializeToString())
        case "quarantine":
            return Outcome(kind, 0, quarantined(message.id, message.queue, b"?", error, now))


@pytest.fixture
async def queue(each_store_url: str) -> AsyncIterator[Queue]:
    broker = Broker(each_store_url)
    await broker.open()
    async with Client(each_store_url) as client, Redis.from_url(each_store_url) as redis:
        yield Queue(redis, broker, client)
    await broker.close()


SUCCEEDED = {"processed": 1, "processed today": 1}
FAILED = SUCCEEDED | {"failed": 1, "failed today": 1}


def in_an_hour_ms() -> int:
    return int((time.time() + 3600) * 1000)


# Enqueue


async def test_new_tasks_enter_at_the_head_and_leave_at_the_tail(queue: Queue) -> None:
    await queue.add("a", "b", "c")

    assert await queue.redis.lrange(K.pending, 0, -1) == [b"c", b"b", b"a"]
    assert (await queue.take(2)).ids == ["a", "b"]


async def test_a_batch_keeps_its_order_and_refuses_one_by_one(queue: Queue) -> None:
    await queue.add("7", unique=60)
    tasks = [Task("t", b"x", task_id=str(i)) for i in range(600)]
    tasks[9] = Task("t", b"x", task_id="9", unique=60)

    results = await queue.client.enqueue_many(tasks, return_exceptions=True)

    assert isinstance(results[7], TaskIDConflictError)
    assert isinstance(results[9], DuplicateTaskError)
    assert await queue.pending() == ["7", *(str(i) for i in range(600) if i not in (7, 9))]


async def test_every_enqueue_lists_its_queue_again(queue: Queue) -> None:
    await queue.add("a")
    await queue.redis.srem(keys.QUEUES, "default")

    await queue.add("b")

    assert await queue.redis.smembers(keys.QUEUES) == {b"default"}


async def test_a_conflict_changes_nothing_and_takes_no_lock(queue: Queue) -> None:
    await queue.add("a", payload=b"other")
    before = await queue.state()

    tries: list[dict[str, Any]] = [
        {},
        {"unique": 60},
        {"process_in": 60, "unique": 60},
        {"group": "g", "unique": 60},
    ]
    for options in tries:
        with pytest.raises(TaskIDConflictError):
            await queue.add("a", **options)

    assert (await queue.state()).keys == before.keys


async def test_a_duplicate_is_told_who_holds_the_lock_and_changes_nothing(queue: Queue) -> None:
    await queue.add("a", unique=60)
    before = await queue.state()

    tries: list[dict[str, Any]] = [{}, {"process_in": 60}, {"group": "g"}]
    for options in tries:
        with pytest.raises(DuplicateTaskError) as refusal:
            await queue.add("b", unique=60, **options)
        assert (refusal.value.holder_id, refusal.value.lock) == ("a", LOCK)

    assert _without_ttls(await queue.state()) == _without_ttls(before)


async def test_the_holder_of_a_lock_is_a_duplicate_of_itself(queue: Queue) -> None:
    """Asynq looks at the lock first, so the same call again is a duplicate and no conflict."""
    await queue.add("a", unique=60)

    with pytest.raises(DuplicateTaskError):
        await queue.add("a", unique=60)


async def test_a_task_takes_over_a_lock_that_it_left_itself(queue: Queue) -> None:
    await queue.add("a", unique=60)
    await queue.redis.delete(K.task("a"), K.pending)  # as Asynq's inspector deletes all pending

    await queue.add("a", unique=3600)

    assert await queue.pending() == ["a"]
    assert 3500 < await queue.redis.ttl(LOCK) <= 3600


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Task("t", b"y"), {}),
        (Task("u", b"x"), {}),
        (Task("t"), {}),
        (Task("t", b""), {}),
        (Task("t", b"x"), {"queue": "other"}),
        (Task("t", b"x"), {"unique_key": "k"}),
    ],
)
async def test_a_lock_is_of_one_queue_type_and_payload(
    queue: Queue, task: Task, options: dict[str, Any]
) -> None:
    await queue.add("a", unique=60)

    await queue.client.enqueue(task, task_id="b", unique=60, **options)

    with pytest.raises(DuplicateTaskError):  # whatever its id, headers and options are
        await queue.client.enqueue(
            task, task_id="c", unique=60, max_retry=1, headers={"a": "b"}, **options
        )


async def test_the_lock_of_a_nil_payload_ends_with_its_colon(queue: Queue) -> None:
    await queue.client.enqueue(Task("t"), task_id="a", unique=60)

    assert await queue.redis.get("asynq:{default}:unique:t:") == b"a"


async def ttl_s(queue: Queue, key: str) -> float:
    left_ms = await queue.redis.pttl(key)
    assert left_ms > 0
    return float(left_ms / 1000)


async def test_a_lock_lasts_whole_seconds(queue: Queue) -> None:
    await queue.add("a", unique=2.5)

    assert await ttl_s(queue, LOCK) == pytest.approx(2, abs=0.5)


async def test_the_lock_of_a_scheduled_task_lasts_from_when_it_is_due(queue: Queue) -> None:
    began = time.time()
    await queue.add("a", unique=60, process_in=100.5)

    left_s = await ttl_s(queue, LOCK)
    assert left_s == pytest.approx(161 - (time.time() - began), abs=0.5)


async def test_a_lock_that_ran_out_is_free_again(queue: Queue) -> None:
    await queue.add("a", unique=60)
    await queue.redis.pexpire(LOCK, 0)

    await queue.add("b", unique=60)

    assert await queue.redis.get(LOCK) == b"b"


async def test_an_instant_that_is_over_is_now(queue: Queue) -> None:
    await queue.add("a", process_at=datetime.now(UTC) - timedelta(seconds=1))

    assert await queue.pending() == ["a"]


async def test_a_scheduled_task_is_due_at_the_next_whole_second(queue: Queue) -> None:
    at = datetime(2033, 5, 18, 3, 33, 20, 123_456, UTC)
    await queue.add("a", process_at=at)

    assert await queue.ids(K.scheduled) == {"a": 2_000_000_001}
    assert await queue.ids(K.due) == {"a": 2_000_000_000_124}
    assert (await queue.hash("a")).keys() == {"msg", "state"}
    assert await queue.keys() == {K.scheduled, K.task("a")}


async def test_a_group_task_waits_in_its_group(queue: Queue) -> None:
    began = int(time.time())
    await queue.add("a", group="g:1")

    waiting = await queue.ids(K.group("g:1"))
    assert began <= waiting["a"] <= time.time()
    assert await queue.redis.smembers(K.groups) == {b"g:1"}
    told = await queue.hash("a")
    assert told.keys() == {"msg", "state", "group"}
    assert (told["state"], told["group"]) == ("aggregating", "g:1")
    assert await queue.keys() == {K.group("g:1"), K.groups, K.task("a")}


async def test_a_unique_group_task_names_its_lock(queue: Queue) -> None:
    await queue.add("a", group="g", unique=60)

    assert (await queue.hash("a"))["unique_key"] == LOCK
    assert await queue.redis.get(LOCK) == b"a"


async def test_a_scheduled_group_task_names_its_group(queue: Queue) -> None:
    await queue.add("a", group="g", process_in=60)

    assert (await queue.hash("a"))["group"] == "g"
    assert await queue.keys() == {K.scheduled, K.task("a")}


@pytest.mark.parametrize("name", ["ü", "a}b", "a b", "a\x00b", '"\\', "😀"])
async def test_names_of_queues_and_groups_are_taken_as_they_are(queue: Queue, name: str) -> None:
    await queue.client.enqueue(Task("t"), task_id=name, queue=name, group=name, unique=60)

    k = queue_keys(name)
    assert await queue.ids(k.group(name)) == {name: pytest.approx(time.time(), abs=5)}
    assert await queue.redis.hget(k.task(name), "group") == name.encode()
    assert await queue.redis.get(k.unique("t", "")) == name.encode()


async def test_a_payload_over_the_limit_is_refused(queue: Queue) -> None:
    with pytest.raises(PayloadTooLargeError):
        await queue.add("a", payload=bytes(1024 * 1024 + 1))
    assert await queue.keys() == set()

    await queue.add("a", payload=bytes(1024 * 1024))


async def test_a_pending_task_waits_for_no_instant(queue: Queue) -> None:
    await queue.add("a")

    assert (await queue.client.handle("a").info()).next_process_at is None


# Fetch


async def test_a_fetched_task_is_active_and_leased(queue: Queue) -> None:
    await queue.add("a", "b", "c")
    before = await queue.hash("a")

    taken = await queue.take(2)

    assert await queue.redis.lrange(K.active, 0, -1) == [b"b", b"a"]
    assert await queue.pending() == ["c"]
    assert await queue.hash("a") == {"msg": before["msg"], "state": "active"}
    assert (await queue.ids(K.lease)).keys() == {"a", "b"}
    assert [TaskMessage.FromString(raw).id for raw in taken.messages] == ["a", "b"]


async def test_a_lease_ends_after_31_whole_seconds_and_carries_the_mark(queue: Queue) -> None:
    await queue.add("a", "b")
    first, second = await queue.take(), await queue.take()

    leases = await queue.ids(K.lease)
    for taken in (first, second):
        score = leases[taken.ids[0]]
        assert math.floor(score) == math.floor(taken.now) + 31
        assert (score - math.floor(score)) * MARKS == taken.mark > 0
    assert first.mark != second.mark


async def test_a_mark_comes_round_without_ever_being_zero(queue: Queue) -> None:
    await queue.redis.set(K.mark, MARKS - 3)
    await queue.add("a", "b", "c")

    marks = [(await queue.take()).mark for _ in range(3)]

    assert marks == [MARKS - 1, 1, 2]


async def test_a_paused_queue_gives_nothing_and_takes_outcomes(queue: Queue) -> None:
    await queue.add("a", "b")
    taken = await queue.take()
    await queue.redis.set(K.paused, 1)

    request = queue.request(want=5)
    request.save("a", taken.mark, "", Outcome("done"))
    answer = await queue.pump(request)

    assert answer.ids == answer.refused == []
    assert await queue.counted() == SUCCEEDED
    assert await queue.pending() == ["b"]


async def test_an_id_without_a_task_is_dropped(queue: Queue) -> None:
    await queue.redis.hset(K.task("stub"), "state", "active")
    await queue.redis.lpush(K.pending, "gone", "stub")
    await queue.add("a")

    taken = await queue.take(5)

    assert (taken.ids, taken.ghosts) == (["a"], ["gone", "stub"])
    assert await queue.keys() == {K.active, K.lease, K.task("a")}


async def test_an_answer_that_was_lost_is_given_again(queue: Queue) -> None:
    await queue.add("a", "b", "c")
    taken = await queue.take()
    request = queue.request(want=1)
    request.save("a", taken.mark, "", Outcome("done"))

    lost, again = await queue.pump(request), await queue.pump(request)

    assert (again.ids, again.messages, again.mark) == (lost.ids, lost.messages, lost.mark)
    assert again.refused == []
    assert await queue.counted() == SUCCEEDED
    assert await queue.pending() == ["c"]


# Outcomes


async def test_done_leaves_only_its_count(queue: Queue) -> None:
    await queue.add("a")

    await queue.end(await queue.take(), "done")

    assert await queue.keys() == {K.processed}
    assert await queue.counted() == SUCCEEDED


async def test_done_and_completed_release_the_lock(queue: Queue) -> None:
    for kind in ("done", "complete"):
        await queue.add(kind, unique=60)
        await queue.end(await queue.take(), kind)
        assert not await queue.redis.exists(LOCK)


@pytest.mark.parametrize("kind", ["done", "complete"])
async def test_a_lock_that_another_task_has_taken_meanwhile_stays(queue: Queue, kind: Kind) -> None:
    await queue.add("a", unique=60)
    taken = await queue.take()
    await queue.redis.pexpire(LOCK, 0)
    await queue.add("b", unique=60)

    await queue.end(taken, kind)

    assert await queue.redis.get(LOCK) == b"b"


async def test_completed_keeps_the_task_with_its_result_and_fields(queue: Queue) -> None:
    await queue.add("a", unique=60, group="g", process_in=0.001, retention=60)
    await asyncio.sleep(0.002)
    await queue.broker.forward("default")
    await queue.redis.lpush(K.pending, "a")  # as the inspector runs it
    until = int(time.time()) + 60

    await queue.end(await queue.take(), "complete", at=until, result=b"")

    assert await queue.ids(K.completed) == {"a": until}
    told = await queue.hash("a")
    assert told.pop("msg").completed_at == pytest.approx(time.time(), abs=5)
    assert told == {"state": "completed", "result": "", "unique_key": LOCK, "group": "g"}
    assert await queue.counted() == SUCCEEDED


async def test_completed_without_a_result_keeps_the_one_written_before(queue: Queue) -> None:
    await queue.add("a", retention=60)
    taken = await queue.take()
    await queue.broker.annotate("default", "a", taken.mark, "result", b"early")

    await queue.end(taken, "complete", at=int(time.time()) + 60)

    assert (await queue.hash("a"))["result"] == "early"


async def test_requeued_tasks_are_next_and_have_spent_nothing(queue: Queue) -> None:
    await queue.add("a", unique=60)
    await queue.add("b")
    message = (await queue.hash("a"))["msg"]

    await queue.end(await queue.take(), "requeue")

    assert await queue.pending() == ["a", "b"]
    told = await queue.hash("a")
    assert (told["state"], told["msg"]) == ("pending", message)
    assert await queue.counted() == {}
    assert await queue.redis.get(LOCK) == b"a"
    assert await queue.keys() == {K.pending, K.task("a"), K.task("b"), LOCK}


async def test_a_requeued_task_has_an_age(queue: Queue) -> None:
    await queue.add("a")
    before = time.time_ns()

    await queue.end(await queue.take(), "requeue")

    since = (await queue.hash("a"))["pending_since"]
    assert before - 1_000_000 <= int(since) <= time.time_ns()


async def test_a_failure_that_counts_is_retried_and_counted(queue: Queue) -> None:
    await queue.add("a", unique=60)
    at_ms = in_an_hour_ms()

    await queue.end(await queue.take(), "retry", at=at_ms)

    assert await queue.ids(K.retry) == {"a": math.ceil(at_ms / 1000)}
    assert await queue.ids(K.due) == {"a": at_ms}
    told = await queue.hash("a")
    assert (told["msg"].retried, told["msg"].error_msg, told["state"]) == (1, "boom", "retry")
    assert await queue.redis.get(LOCK) == b"a"
    assert await queue.counted() == FAILED


async def test_a_failure_that_does_not_count_changes_no_counter(queue: Queue) -> None:
    await queue.add("a")

    await queue.end(await queue.take(), "retry_uncounted", at=in_an_hour_ms())

    message = (await queue.hash("a"))["msg"]
    assert (message.retried, message.error_msg) == (0, "boom")
    assert message.last_failed_at == pytest.approx(time.time(), abs=5)
    assert await queue.keys() == {K.retry, K.task("a")}


async def test_a_snoozed_task_is_scheduled_and_not_counted(queue: Queue) -> None:
    await queue.add("a")
    message = (await queue.hash("a"))["msg"]

    await queue.end(await queue.take(), "snooze", at=in_an_hour_ms())

    assert await queue.hash("a") == {"msg": message, "state": "scheduled"}
    assert await queue.keys() == {K.scheduled, K.task("a")}


async def test_an_archived_task_keeps_its_lock_and_its_tries(queue: Queue) -> None:
    await queue.add("a", unique=60)
    began = int(time.time())

    await queue.end(await queue.take(), "archive")

    told = await queue.hash("a")
    assert began <= (await queue.ids(K.archived))["a"] <= time.time()
    assert (told["msg"].retried, told["msg"].error_msg, told["state"]) == (0, "boom", "archived")
    assert await queue.redis.get(LOCK) == b"a"
    assert await queue.counted() == FAILED


async def test_a_quarantined_task_keeps_the_bytes_that_were_found(queue: Queue) -> None:
    await queue.add("a")
    await queue.redis.hset(K.task("a"), "msg", b"\xff\xfe no message")
    request = queue.request()
    taken = await queue.take()

    request.save("a", taken.mark, "", _outcome("quarantine", TaskMessage(id="a", queue="default")))
    await queue.pump(request)

    assert await queue.redis.hget(K.task("a"), "raw") == b"\xff\xfe no message"
    assert (await queue.hash("a"))["msg"].error_msg == "asyncq: quarantined: boom"
    assert (await queue.ids(K.archived)).keys() == {"a"}
    assert await queue.counted() == FAILED


async def test_a_result_stays_over_a_retry(queue: Queue) -> None:
    await queue.add("a")
    taken = await queue.take()
    await queue.broker.annotate("default", "a", taken.mark, "result", b"half")
    await queue.end(taken, "retry", at=in_an_hour_ms())

    assert (await queue.hash("a"))["result"] == "half"


async def test_a_result_needs_the_lease(queue: Queue) -> None:
    await queue.add("a")
    taken = await queue.take()
    before = await queue.state()

    assert not await queue.broker.annotate("default", "a", taken.mark + 1, "result", b"x")
    assert not await queue.broker.annotate("default", "b", taken.mark, "result", b"x")

    assert (await queue.state()).keys == before.keys


OUTCOMES: Sequence[Kind] = (
    "done",
    "complete",
    "retry",
    "retry_uncounted",
    "snooze",
    "archive",
    "quarantine",
    "requeue",
)


@pytest.mark.parametrize("lease", ["another run's", "a Go worker's", "none"])
async def test_a_late_outcome_changes_nothing(queue: Queue, lease: str) -> None:
    await queue.add("a", unique=60)
    taken = await queue.take()
    match lease:
        case "another run's":
            await queue.redis.zincrby(K.lease, 1 / MARKS, "a")
        case "a Go worker's":
            await queue.redis.zadd(K.lease, {"a": int(time.time()) + 30})
        case _:
            await queue.redis.zrem(K.lease, "a")
    before = await queue.state()

    for kind in OUTCOMES:
        answer = await queue.end(taken, kind, at=in_an_hour_ms())
        assert answer.refused == ["a"], kind

    assert _without_ttls(await queue.state()) == _without_ttls(before)


async def test_one_call_saves_many_outcomes_and_takes_new_tasks(queue: Queue) -> None:
    await queue.add(*OUTCOMES, retention=60)
    taken = await queue.take(len(OUTCOMES))
    await queue.add("new")
    request = queue.request(want=1)
    for raw in taken.messages:
        message = TaskMessage.FromString(raw)
        kind = OUTCOMES[taken.ids.index(message.id)]
        request.save(message.id, taken.mark, "", _outcome(kind, message, at=in_an_hour_ms()))

    answer = await queue.pump(request)

    assert (answer.ids, answer.refused, answer.broken) == (["new"], [], [])
    assert await queue.redis.lrange(K.active, 0, -1) == [b"new"]
    assert (await queue.ids(K.lease)).keys() == {"new"}
    assert await queue.counted() == {
        "processed": 5, "processed today": 5, "failed": 3, "failed today": 3,
    }  # fmt: skip


# Counters


async def test_the_counters_of_a_day_end_90_days_after_their_first(queue: Queue) -> None:
    await queue.add("a", "b")
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    for _ in range(2):
        await queue.end(await queue.take(), "archive")
        for name in (K.processed, K.failed):
            assert await queue.redis.ttl(name) == -1
            assert 0 < await queue.redis.ttl(f"{name}:{today}") <= 90 * DAY_S
            await queue.redis.expire(f"{name}:{today}", 5)
    assert await queue.redis.ttl(f"{K.processed}:{today}") <= 5  # the second has not prolonged it


@pytest.mark.parametrize("full", [TOTAL_MAX, 2**63 - 512])  # both are 2^63 as doubles
async def test_a_full_total_starts_again_at_1(queue: Queue, full: int) -> None:
    await queue.redis.mset({K.processed: full, K.failed: full - 5})
    await queue.add("a", "b")

    await queue.end(await queue.take(), "done")
    assert (await queue.counted())["processed"] == 1
    assert (await queue.counted())["failed"] == full - 5

    await queue.redis.set(K.processed, full)
    await queue.end(await queue.take(), "archive")
    assert await queue.counted() == {
        "processed": 1, "failed": 1, "processed today": 2, "failed today": 1,
    }  # fmt: skip


async def test_a_total_that_is_not_quite_full_goes_on(queue: Queue) -> None:
    await queue.redis.mset({K.processed: 2**63 - 513, K.failed: 7})
    await queue.add("a")

    await queue.end(await queue.take(), "retry", at=in_an_hour_ms())

    told = await queue.counted()
    assert (told["processed"], told["failed"]) == (2**63 - 512, 8)


# Archived trimming


async def fill_archive(queue: Queue, number: int, *, days_ago: float, name: str = "old") -> None:
    first = int(time.time() - days_ago * DAY_S) - number
    ids = [f"{name}-{i:05d}" for i in range(number)]
    async with queue.redis.pipeline(transaction=False) as pipeline:
        pipeline.zadd(K.archived, {task_id: first + i for i, task_id in enumerate(ids)})
        for task_id in ids[:5]:
            pipeline.hset(K.task(task_id), mapping={"msg": "", "state": "archived"})
        await pipeline.execute()


async def test_the_archive_keeps_the_newest_9999_and_no_hash_of_others(queue: Queue) -> None:
    await fill_archive(queue, 10_000, days_ago=1)
    await queue.redis.set("asynq:{default}:unique:t:old", "old-00000")
    await queue.add("a")

    await queue.end(await queue.take(), "archive")

    assert await queue.redis.zcard(K.archived) == 9_999
    assert await queue.redis.zrange(K.archived, 0, 0) == [b"old-00002"]
    assert [await queue.redis.exists(K.task(f"old-0000{i}")) for i in range(4)] == [0, 0, 1, 1]
    assert await queue.redis.exists("asynq:{default}:unique:t:old")


async def test_the_archive_keeps_9999_before_anything_is_trimmed(queue: Queue) -> None:
    await fill_archive(queue, 9_998, days_ago=1)
    await queue.add("a")

    await queue.end(await queue.take(), "archive")

    assert await queue.redis.zcard(K.archived) == 9_999


async def test_the_archive_forgets_after_90_days(queue: Queue) -> None:
    await fill_archive(queue, 2, days_ago=90.1, name="ancient")
    await fill_archive(queue, 2, days_ago=89.9)
    await queue.add("a")

    await queue.end(await queue.take(), "archive")

    assert (await queue.ids(K.archived)).keys() == {"old-00000", "old-00001", "a"}
    assert not await queue.redis.exists(K.task("ancient-00000"))


async def test_a_long_neglected_archive_is_trimmed_in_steps(queue: Queue) -> None:
    """Asynq's script fails for ever once some 8,000 are to go at a time."""
    await fill_archive(queue, 9_500, days_ago=91)
    await queue.add("a", "b")

    sizes = []
    for _ in range(2):
        await queue.end(await queue.take(), "archive")
        sizes.append(await queue.redis.zcard(K.archived))

    assert sizes == [8_501, 7_502]
    assert {"a", "b"} <= (await queue.ids(K.archived)).keys()


async def test_success_does_not_trim(queue: Queue) -> None:
    await fill_archive(queue, 2, days_ago=91)
    await queue.add("a")

    await queue.end(await queue.take(), "done")

    assert await queue.redis.zcard(K.archived) == 2


# Forward


async def schedule_as_go(queue: Queue, where: str, task_id: str, at: int) -> None:
    """Leave a delayed task as Go does: whole seconds, and none of our own keys."""
    state = where.rpartition(":")[2]
    message = TaskMessage(type="t", id=task_id, queue="default", retry=25, timeout=1800)
    fields = {"msg": message.SerializeToString(), "state": state}
    await queue.redis.hset(K.task(task_id), mapping=fields)
    await queue.redis.zadd(where, {task_id: at})


async def test_what_is_due_is_forwarded_in_order_scheduled_first(queue: Queue) -> None:
    now = int(time.time())
    await schedule_as_go(queue, K.retry, "r", now - 100)
    await schedule_as_go(queue, K.scheduled, "s2", now - 1)
    await schedule_as_go(queue, K.scheduled, "s1", now - 2)
    await schedule_as_go(queue, K.scheduled, "later", now + 100)
    await queue.add("p")
    before = time.time_ns()

    forwarded = await queue.broker.forward("default")

    assert forwarded.moved == 3
    assert await queue.pending() == ["p", "s1", "s2", "r"]
    told = await queue.hash("r")
    assert told["state"] == "pending"
    assert before - 1_000_000 <= int(told["pending_since"]) <= time.time_ns()
    assert forwarded.next_in_s == pytest.approx(now + 100 - time.time(), abs=1)


async def test_a_forward_moves_no_more_than_its_limit(queue: Queue) -> None:
    for i in range(3):
        await schedule_as_go(queue, K.scheduled, f"s{i}", 1)
        await schedule_as_go(queue, K.retry, f"r{i}", 1)

    assert [(await queue.broker.forward("default", 4)).moved for _ in range(3)] == [4, 2, 0]


async def test_ours_are_due_to_the_millisecond(queue: Queue) -> None:
    in_a_moment = datetime.now(UTC) + timedelta(milliseconds=80)
    await queue.add("a", process_at=in_a_moment)

    early = await queue.broker.forward("default")
    assert (early.moved, await queue.pending()) == (0, [])
    assert early.next_in_s is not None
    await asyncio.sleep(early.next_in_s)

    assert (await queue.broker.forward("default")).moved == 1
    assert time.time() >= in_a_moment.timestamp()


async def test_an_exact_instant_counts_only_while_the_set_says_the_same(queue: Queue) -> None:
    await queue.add("a", "b", process_in=3600)
    await queue.redis.zadd(K.due, {"a": 1, "b": 1})  # what an earlier life of these ids left
    await queue.redis.zrem(K.scheduled, "b")

    assert (await queue.broker.forward("default")).moved == 0

    assert (await queue.ids(K.scheduled)).keys() == {"a"}
    assert await queue.ids(K.due) == {}


async def test_a_delayed_group_task_reaches_its_group(queue: Queue) -> None:
    await queue.add("a", group="g", process_in=0.001)
    await asyncio.sleep(0.002)

    await queue.broker.forward("default")

    assert (await queue.ids(K.group("g"))).keys() == {"a"}
    assert await queue.redis.smembers(K.groups) == {b"g"}
    assert (await queue.hash("a"))["state"] == "aggregating"
    assert await queue.keys() == {K.group("g"), K.groups, K.task("a")}


async def test_a_retried_group_task_is_listed_with_its_group_again(queue: Queue) -> None:
    await schedule_as_go(queue, K.retry, "a", 1)
    await queue.redis.hset(K.task("a"), "group", "g")

    await queue.broker.forward("default")

    assert (await queue.ids(K.group("g"))).keys() == {"a"}
    assert await queue.redis.smembers(K.groups) == {b"g"}


async def test_a_delayed_id_without_a_task_is_dropped(queue: Queue) -> None:
    await queue.redis.zadd(K.scheduled, {"ghost": 1})

    await queue.broker.forward("default")

    assert await queue.keys() == set()


async def test_a_key_that_is_no_task_does_not_hold_up_the_others(queue: Queue) -> None:
    await queue.redis.set(K.task("odd"), "what another program wrote")
    await queue.redis.zadd(K.scheduled, {"odd": 1})
    await schedule_as_go(queue, K.scheduled, "a", 2)

    await queue.broker.forward("default")

    assert await queue.pending() == ["a"]


# Leases


async def test_an_extension_moves_the_second_and_keeps_the_mark(queue: Queue) -> None:
    await queue.add("a")
    taken = await queue.take()
    await queue.redis.zincrby(K.lease, -20, "a")

    assert await queue.broker.extend("default", [("a", taken.mark)]) == []

    score = (await queue.ids(K.lease))["a"]
    assert math.floor(score) == pytest.approx(time.time() + 31, abs=2)
    assert (score - math.floor(score)) * MARKS == taken.mark


async def test_an_extension_never_shortens_adds_or_takes_a_lease(queue: Queue) -> None:
    await queue.add("a", "b", "c")
    taken = await queue.take(3)
    await queue.redis.zincrby(K.lease, 100, "a")
    await queue.redis.zadd(K.lease, {"b": int(time.time()) + 30})
    await queue.redis.zrem(K.lease, "c")
    before = await queue.ids(K.lease)

    lost = await queue.broker.extend("default", [(task_id, taken.mark) for task_id in "abc"])

    assert lost == ["b", "c"]
    assert await queue.ids(K.lease) == before


async def run_as(queue: Queue, task_id: str, lease: float | None, **options: Any) -> None:
    """Leave a task active as a worker that died; `lease`: seconds from now, `None`: it has none."""
    await queue.add(task_id, **options)
    await queue.take()
    await queue.redis.zrem(K.lease, task_id)
    if lease is not None:
        await queue.redis.zadd(K.lease, {task_id: int(time.time()) + lease})


OURS = 7 / MARKS  # the fraction of a lease that we made


@pytest.mark.parametrize(
    ("lease", "expired"),
    [
        (-31, True),  # Go's, beyond the grace for skewed clocks
        (-28, False),
        (20, False),
        (-1 + OURS, True),  # ours, by Redis's own clock
        (2 + OURS, False),
        (None, True),
    ],
)
async def test_a_lease_ends_by_the_clock_that_made_it(
    queue: Queue, lease: float | None, expired: bool
) -> None:
    await run_as(queue, "a", lease)

    found = await queue.broker.expired("default")

    assert [task.id for task in found] == ["a"] * expired


async def test_expired_leases_are_found_behind_many_in_their_grace(queue: Queue) -> None:
    now = int(time.time())
    await queue.redis.zadd(K.lease, {f"go-{i:04d}": now - 20 for i in range(600)})
    await run_as(queue, "a", -5 + OURS)

    assert [task.id for task in await queue.broker.expired("default")] == ["a"]


async def test_a_recovered_task_is_due_at_once_and_costs_a_retry(queue: Queue) -> None:
    await run_as(queue, "a", -31, max_retry=3)

    assert await recover(queue) == 1

    told = await queue.hash("a")
    assert (told["state"], told["msg"].retried) == ("retry", 1)
    assert told["msg"].error_msg == "asynq: task lease expired"
    assert await queue.counted() == FAILED
    assert (await queue.broker.forward("default")).moved == 1
    assert await queue.pending() == ["a"]


async def test_a_task_without_retries_left_is_archived_by_recovery(queue: Queue) -> None:
    await run_as(queue, "a", -31, max_retry=0, unique=60)

    await recover(queue)

    assert (await queue.hash("a"))["msg"].error_msg == "asynq: task lease expired"
    assert await queue.keys() == {K.archived, K.processed, K.failed, K.task("a"), LOCK}


async def test_recovery_that_is_no_failure_is_not_counted(queue: Queue) -> None:
    await run_as(queue, "a", -31)

    await recover(queue, counts=lambda task_type, error: False)

    assert (await queue.hash("a"))["msg"].retried == 0
    assert await queue.keys() == {K.retry, K.task("a")}


async def test_an_active_task_without_a_lease_is_recovered(queue: Queue) -> None:
    await run_as(queue, "a", None)

    assert await recover(queue) == 1

    assert (await queue.ids(K.retry)).keys() == {"a"}
    assert not await queue.redis.exists(K.active)


async def test_a_leased_id_without_a_task_is_forgotten(queue: Queue) -> None:
    await queue.redis.hset(K.task("ghost"), "state", "active")
    await queue.redis.lpush(K.active, "ghost")
    await queue.redis.zadd(K.lease, {"ghost": 1})

    assert await recover(queue) == 1

    assert await queue.keys() == set()


async def test_a_leased_key_that_is_no_task_does_not_hold_up_the_others(queue: Queue) -> None:
    await queue.redis.set(K.task("odd"), "what another program wrote")
    await queue.redis.lpush(K.active, "odd")
    await queue.redis.zadd(K.lease, {"odd": 1})
    await run_as(queue, "a", -31)

    assert await recover(queue) == 2

    assert (await queue.ids(K.retry)).keys() == {"a"}


async def test_a_lease_that_was_extended_meanwhile_is_not_taken(queue: Queue) -> None:
    await run_as(queue, "a", -31)
    (found,) = await queue.broker.expired("default")
    await queue.redis.zadd(K.lease, {"a": int(time.time()) + 30})
    before = await queue.state()

    assert await queue.broker.recover("default", [(found, "archive", 0, found.message)]) == 0

    assert (await queue.state()).keys == before.keys


async def recover(queue: Queue, **options: Any) -> int:
    in_flight = InFlight({"default": 1}, 1, queue.broker.annotate)
    return await Recoverer(queue.broker, in_flight, **options).tick()


# The rest


async def test_completed_tasks_are_deleted_when_their_time_is_over(queue: Queue) -> None:
    now = int(time.time())
    for i, until in enumerate((now - 2, now - 1, now + 60)):
        await schedule_as_go(queue, K.completed, str(i), until)

    assert [await queue.broker.expire_completed("default", 1) for _ in range(3)] == [1, 1, 0]

    assert await queue.keys() == {K.completed, K.task("2")}


async def test_a_server_is_announced_and_withdrawn(queue: Queue) -> None:
    server, workers = keys.server("h", 1, SERVER), keys.workers("h", 1, SERVER)

    await queue.broker.announce(server, workers, 4_000_000_000, b"", {"a": b"", "b": b""})
    assert await queue.redis.zscore(keys.SERVERS, server) == 4_000_000_000
    assert await queue.redis.zscore(keys.WORKERS, workers) == 4_000_000_000
    assert await queue.redis.hkeys(workers) == [b"a", b"b"]
    assert 8_000 < await queue.redis.pttl(server) <= 10_000
    assert 8_000 < await queue.redis.pttl(workers) <= 10_000

    await queue.broker.announce(server, workers, 4_000_000_000, b"", {})
    assert not await queue.redis.exists(workers)

    await queue.broker.withdraw(server, workers)
    assert (await queue.state()).keys == {}


@pytest.mark.parametrize(
    ("retry", "channels"), [(True, ["asynq:cancel"]), (False, ["asyncq:cancel", "asynq:cancel"])]
)
async def test_a_cancelation_is_the_bare_id_on_the_channel(
    queue: Queue, retry: bool, channels: list[str]
) -> None:
    async with queue.redis.pubsub() as pubsub:
        await pubsub.subscribe(keys.CANCEL, keys.CANCEL_FINALLY)
        for _ in range(2):
            await pubsub.get_message(timeout=5)

        await queue.broker.cancel("a", retry=retry)

        heard = [await pubsub.get_message(timeout=5) for _ in channels]
    assert [(m["channel"].decode(), m["data"]) for m in heard] == [(c, b"a") for c in channels]


def _without_ttls(state: State) -> dict[str, Key]:
    stored = deepcopy(state.keys)
    for key in stored.values():
        key.ttl_ms = min(key.ttl_ms, 0)
    return stored
