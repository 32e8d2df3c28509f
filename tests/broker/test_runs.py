"""What the end of a run leaves in Asynq's keys, through a real server, on every kind of store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from asyncq import Context, Mux, OptionError, Retry, RevokeTask, SkipRetry, Snooze, Task
from asyncq.broker.keys import queue_keys
from asyncq.client import Client
from asyncq.proto.asynq_pb2 import TaskMessage
from asyncq.server.server import Server
from tests.golden.state import Connection, state_of

HOUR_S = 3600
WITHIN_S = 10.0
K = queue_keys("default")


class Worker:
    """A store, a client and a server that runs one handler for tasks of type t."""

    def __init__(self, url: str, redis: Connection, client: Client) -> None:
        self.url = url
        self.redis = redis
        self.client = client
        self.mux: Mux = Mux()

    async def work(self, handler: Callable[..., Any] | None, **options: Any) -> None:
        """Serve until nothing is left to do; failures are retried after an hour."""
        if handler is not None:
            self.mux.handle("t", handler)
        server = Server(self.url, **{"retry_delay": HOUR_S, **options})
        async with server.running(self.mux), asyncio.timeout(WITHIN_S):
            await server.drain()

    async def message(self, task_id: str = "a") -> TaskMessage:
        raw = await self.redis.hget(K.task(task_id), "msg")
        assert raw is not None, f"task {task_id} is gone"
        return TaskMessage.FromString(raw)

    async def keys(self) -> set[str]:
        """The names of all of Asynq's keys of the default queue, with days as one."""
        day = f":{datetime.now(UTC):%Y-%m-%d}"
        names = (await state_of(self.redis, time.time())).keys
        return {name.removesuffix(day) for name in names} - {"asynq:queues"}


@pytest.fixture
async def worker(each_store_url: str) -> AsyncIterator[Worker]:
    async with Client(each_store_url) as client, Redis.from_url(each_store_url) as redis:
        yield Worker(each_store_url, redis, client)


def raising(error: BaseException) -> Callable[..., Any]:
    async def handler() -> None:
        raise error

    return handler


async def hang() -> None:
    await asyncio.Event().wait()


COUNTED = {K.processed, K.failed}


# Failures


async def test_a_non_failure_is_retried_and_not_counted(worker: Worker) -> None:
    await worker.client.enqueue(Task("t"), task_id="a")

    await worker.work(raising(ValueError("busy")), is_failure=lambda error: False)

    message = await worker.message()
    assert (message.retried, message.error_msg) == (0, "ValueError: busy")
    assert message.last_failed_at == pytest.approx(time.time(), abs=5)
    assert await worker.keys() == {K.retry, K.task("a")}


async def test_a_non_failure_is_archived_when_its_retries_are_used_up(worker: Worker) -> None:
    await worker.client.enqueue(Task("t"), task_id="a", max_retry=0)

    await worker.work(raising(ValueError("busy")), is_failure=lambda error: False)

    assert await worker.keys() == {K.archived, K.task("a"), *COUNTED}
    assert await worker.redis.mget(K.processed, K.failed) == [b"1", b"1"]


async def test_a_task_is_archived_after_its_last_retry(worker: Worker) -> None:
    await worker.client.enqueue(Task("t"), task_id="a", max_retry=2)

    await worker.work(raising(ValueError("no")), retry_delay=0)

    assert (await worker.message()).retried == 2
    assert await worker.keys() == {K.archived, K.task("a"), *COUNTED}
    assert await worker.redis.mget(K.processed, K.failed) == [b"3", b"3"]


async def test_a_retry_keeps_everything_that_the_task_came_with(worker: Worker) -> None:
    deadline = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    await worker.client.enqueue(
        Task("t", b"x"),
        task_id="a",
        headers={"trace": "1", "ü": ""},
        timeout=9,
        deadline=deadline,
        retention=60,
        max_retry=7,
        unique=60,
    )
    before = await worker.message()

    await worker.work(raising(ValueError("no")))

    after = await worker.message()
    assert (after.error_msg, after.retried) == ("ValueError: no", 1)
    for changed in ("error_msg", "retried", "last_failed_at"):
        after.ClearField(changed)
    assert after == before
    assert await worker.redis.get(before.unique_key) == b"a"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\nlines"), "ValueError: two\nlines"),
        (ValueError(), "ValueError"),
        (ValueError("lone \udc80"), "ValueError: lone \\udc80"),
        (ValueError("x" * 20_000), "ValueError: " + "x" * (16 * 1024 - 12)),
        (SystemExit(1), "SystemExit: 1"),
        (Retry(HOUR_S, "not yet"), "not yet"),
    ],
    ids=["lines", "no text", "no UTF-8", "long", "exit", "signal"],
)
async def test_an_error_is_kept_as_its_type_and_text(
    worker: Worker, error: BaseException, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # a report of pytest-xdist cannot hold a lone surrogate
    await worker.client.enqueue(Task("t"), task_id="a")

    await worker.work(raising(error))

    assert (await worker.message()).error_msg == text


@pytest.mark.parametrize(
    ("error", "text"),
    [(SkipRetry("bad input"), "bad input"), (SkipRetry(), "skip retry for the task")],
)
async def test_skip_retry_archives_whatever_retries_remain(
    worker: Worker, error: SkipRetry, text: str
) -> None:
    await worker.client.enqueue(Task("t"), task_id="a", unique=60)

    await worker.work(raising(error))

    message = await worker.message()
    assert (message.error_msg, message.retried) == (text, 0)
    assert await worker.keys() == {K.archived, K.task("a"), message.unique_key, *COUNTED}


async def test_a_revoked_task_is_gone_with_its_lock_and_counts_as_processed(worker: Worker) -> None:
    await worker.client.enqueue(Task("t"), task_id="a", unique=60, retention=60)
    told: list[BaseException] = []

    await worker.work(
        raising(RevokeTask("no")), error_handler=lambda ctx, error: told.append(error)
    )

    assert await worker.keys() == {K.processed}
    assert [type(error) for error in told] == [RevokeTask]


async def test_a_snoozed_task_waits_without_having_failed(worker: Worker) -> None:
    await worker.client.enqueue(Task("t"), task_id="a")
    before = await worker.message()

    await worker.work(raising(Snooze(HOUR_S)))

    assert await worker.message() == before
    assert await worker.keys() == {K.scheduled, K.task("a")}


class User(BaseModel):
    user_id: int


async def test_a_payload_that_does_not_validate_is_archived_at_once(worker: Worker) -> None:
    async def handler(payload: User) -> None:
        raise AssertionError("it must not be called")

    await worker.client.enqueue(Task("t", {"user_id": "x"}), task_id="a")

    await worker.work(handler)

    assert "user_id" in (await worker.message()).error_msg
    assert await worker.keys() == {K.archived, K.task("a"), *COUNTED}


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00 no message", b""])
async def test_bytes_that_are_no_message_are_archived_under_one_that_go_reads(
    worker: Worker, raw: bytes
) -> None:
    await worker.redis.hset(K.task("a"), mapping={"msg": raw, "state": "pending"})
    await worker.redis.lpush(K.pending, "a")

    await worker.work(hang)

    message = await worker.message()
    assert (message.id, message.queue, message.type) == ("a", "default", "asyncq:malformed")
    assert await worker.redis.hget(K.task("a"), "raw") == raw
    assert await worker.keys() == {K.archived, K.task("a"), *COUNTED}


async def test_a_type_that_nobody_handles_is_told_as_go_quotes_it(worker: Worker) -> None:
    await worker.client.enqueue(Task('say "hi"\\\n'), task_id="a")

    await worker.work(None)

    told = (await worker.message()).error_msg
    assert told == r'handler not found for task "say \"hi\"\\\n"'


# Time and cancelation


async def test_a_task_whose_deadline_is_over_is_not_run(worker: Worker) -> None:
    runs = []

    async def handler() -> None:
        runs.append(1)

    over = datetime.now(UTC) - timedelta(seconds=10)
    await worker.client.enqueue(Task("t"), task_id="a", deadline=over)

    await worker.work(handler)

    assert runs == []
    message = await worker.message()
    assert (message.error_msg, message.retried) == ("context deadline exceeded", 1)
    assert await worker.keys() == {K.retry, K.task("a"), *COUNTED}


@pytest.mark.parametrize(
    ("timeout", "deadline_in", "left_s"),
    [(100, 50, 50), (50, 100, 50), (None, 100, 100), (100, None, 100), (0.5, None, 1800)],
)
async def test_a_run_ends_with_its_timeout_or_its_deadline(
    worker: Worker, timeout: float | None, deadline_in: int | None, left_s: int
) -> None:
    left: list[float] = []

    async def handler(ctx: Context) -> None:
        left.append((ctx.deadline - datetime.now(UTC)).total_seconds())

    options: dict[str, Any] = {"timeout": timeout}
    if deadline_in is not None:
        options["deadline"] = datetime.now(UTC) + timedelta(seconds=deadline_in)
    await worker.client.enqueue(Task("t"), **options)

    await worker.work(handler)

    assert left == [pytest.approx(left_s, abs=2)]


async def end_quietly() -> None:
    try:
        await hang()
    except asyncio.CancelledError:
        pass


async def end_with_an_error_of_its_own() -> None:
    try:
        await hang()
    except asyncio.CancelledError:
        raise SkipRetry("cleaned up") from None


async def test_whatever_a_handler_does_after_its_time_it_has_failed_by_that(worker: Worker) -> None:
    for handler in (hang, end_quietly, end_with_an_error_of_its_own):
        worker.mux.handle(handler.__name__, handler)
        await worker.client.enqueue(Task(handler.__name__), task_id=handler.__name__, timeout=1)

    await worker.work(None)

    assert {key for key in await worker.keys() if ":t:" not in key} == {K.retry, *COUNTED}
    for handler in (hang, end_quietly, end_with_an_error_of_its_own):
        assert (await worker.message(handler.__name__)).error_msg == "context deadline exceeded"


@pytest.mark.parametrize(("retry", "where"), [(True, K.retry), (False, K.archived)])
async def test_a_cancelled_task_is_retried_unless_that_is_not_wanted(
    worker: Worker, retry: bool, where: str
) -> None:
    started = asyncio.Event()

    async def handler() -> None:
        started.set()
        await hang()

    handle = await worker.client.enqueue(Task("t"), task_id="a", unique=60)
    worker.mux.handle("t", handler)
    server = Server(worker.url, retry_delay=HOUR_S)
    async with server.running(worker.mux), asyncio.timeout(WITHIN_S):
        await started.wait()  # sent the moment it runs, though its server has just begun
        await handle.cancel(retry=retry)
        await server.drain()

    message = await worker.message()
    assert message.error_msg == "context canceled"
    assert await worker.keys() == {where, K.task("a"), message.unique_key, *COUNTED}


async def test_the_clock_of_a_workers_host_does_not_matter(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases: list[float] = []

    async def handler(ctx: Context) -> None:
        leases.append(await worker.redis.zscore(K.lease, ctx.task_id))
        if ctx.task_id == "fails":
            raise ValueError("no")

    for task_id in ("fails", "succeeds"):
        await worker.client.enqueue(Task("t"), task_id=task_id, retention=HOUR_S)
    right, skew_s = time.time, 5000
    monkeypatch.setattr(time, "time", lambda: right() + skew_s)

    await worker.work(handler)

    now = pytest.approx(right(), abs=5)
    assert [lease - 31 for lease in leases] == [now, now]
    assert await worker.redis.zscore(K.retry, "fails") - HOUR_S == now
    assert await worker.redis.zscore(K.completed, "succeeds") - HOUR_S == now
    assert (await worker.message("fails")).last_failed_at == now
    assert (await worker.message("succeeds")).completed_at == now


# Success


@pytest.mark.parametrize(
    ("returned", "stored"),
    [
        (None, None),
        (b"\xff", b"\xff"),
        ("ü", '"ü"'.encode()),
        ({"a": [1]}, b'{"a":[1]}'),
        (b"", b""),
    ],
)
async def test_what_a_handler_returns_is_the_result(
    worker: Worker, returned: Any, stored: bytes | None
) -> None:
    async def handler() -> Any:
        return returned

    await worker.client.enqueue(Task("t"), task_id="a", retention=60)

    await worker.work(handler)

    assert await worker.redis.hget(K.task("a"), "result") == stored
    assert await worker.keys() == {K.completed, K.task("a"), K.processed}


async def test_a_result_written_before_a_failure_stays(worker: Worker) -> None:
    async def handler(ctx: Context) -> None:
        await ctx.write_result(b"half")
        raise ValueError("no")

    await worker.client.enqueue(Task("t"), task_id="a")

    await worker.work(handler)

    assert await worker.redis.hget(K.task("a"), "result") == b"half"


async def test_a_retention_below_a_second_is_none(worker: Worker) -> None:
    async def handler() -> None:
        pass

    await worker.client.enqueue(Task("t"), task_id="a", retention=0.9)

    await worker.work(handler)

    assert await worker.keys() == {K.processed}


async def test_a_completed_task_is_kept_for_its_whole_retention(worker: Worker) -> None:
    async def handler() -> None:
        pass

    await worker.client.enqueue(Task("t"), task_id="a", retention=60)
    began = time.time()

    await worker.work(handler)

    until = await worker.redis.zscore(K.completed, "a")
    assert began + 60 <= until <= time.time() + 61
    assert until == int(until)
    assert (await worker.message()).completed_at == pytest.approx(time.time(), abs=5)


# Queues


async def test_a_paused_queue_is_not_worked_on_until_it_goes_on(worker: Worker) -> None:
    ran = asyncio.Event()

    async def handler() -> None:
        ran.set()

    await worker.redis.set(K.paused, int(time.time()))
    await worker.client.enqueue(Task("t"), task_id="a")
    await worker.work(handler)  # nothing to do: a paused queue is not waited for
    assert await worker.keys() == {K.paused, K.pending, K.task("a")}

    async with Server(worker.url).running(worker.mux), asyncio.timeout(WITHIN_S):
        await worker.redis.delete(K.paused)  # as Go does it
        await ran.wait()


async def test_a_server_lists_no_queue_that_nobody_used(worker: Worker) -> None:
    await worker.work(None, queues={"never-used": 1})

    assert not await worker.redis.exists("asynq:queues")


@pytest.mark.parametrize("queues", [{}, {" ": 1}, {"default": 0}, {"default": -1}])
def test_queues_that_would_serve_nobody_are_refused(queues: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        Server("redis://localhost", queues=queues)
