"""The operations of each scenario, done with the real client, server and handlers.

A scenario follows the calls of its golden file in order. One that only enqueues needs no
function here: its calls are read from the file.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from asyncq import Context, Mux, RevokeTask, SkipRetry, Task, TaskHandle, TaskInfo, TaskState
from asyncq.broker.broker import Broker
from asyncq.client import Client
from asyncq.server.in_flight import InFlight
from asyncq.server.loops.janitor import Janitor
from asyncq.server.loops.recoverer import Recoverer
from asyncq.server.server import Server
from tests.golden.calls import Enqueue
from tests.golden.files import Golden, Run, load
from tests.golden.state import Connection, State, state_of

HOUR_S = 3600
WITHIN_S = 20.0  # of anything that is waited for
LOOK_S = 0.002  # between two looks at what nobody tells

Handler = Callable[[bytes, Context], Awaitable[Any]]


class World:
    """One run of a scenario: a store, a client, and what was done and seen so far."""

    def __init__(self, golden: Golden, url: str, client: Client, redis: Connection) -> None:
        self.url = url
        self.client = client
        self.redis = redis
        self.began = time.time()
        self.calls: list[tuple[str, Any]] = []
        self.snapshots: dict[str, State] = {}
        self._to_do = [call for call, _ in golden.run.calls]
        self._served = False

    async def enqueue(self, **options: Any) -> None:
        """Make the next calls, as long as they are enqueues; `options` are given to each too."""
        while self._to_do and self._to_do[0].startswith("Enqueue("):
            call = Enqueue.read(self._to_do[0])
            self.did(self._to_do[0], await self._outcome(call, options))

    def did(self, call: str, result: Any = None) -> None:
        """Note that the next call was made, in whatever way, and what came of it."""
        assert self._to_do[:1] == [call], f"the next call is {self._to_do[:1]}, not {call!r}"
        self._to_do.pop(0)
        self.calls.append((call, result))

    async def snapshot(self, label: str) -> None:
        """Keep what stands in the store now."""
        self.snapshots[label] = await state_of(self.redis, self.began)

    async def run(self) -> Run:
        """Return all that was done and seen, with what stands in the store at the end."""
        assert not self._to_do, f"the scenario leaves out {self._to_do}"
        return Run(self.calls, await state_of(self.redis, self.began), self.snapshots)

    @asynccontextmanager
    async def serving(self, handler: Handler | None, **options: Any) -> AsyncIterator[Server]:
        """Run a server that gives every task to `handler`, one at a time, and retries in 1 h."""
        mux: Mux = Mux()
        if handler is not None:
            mux.handle("email:welcome", handler)
        self._served = True
        server = Server(self.url, **{"retry_delay": HOUR_S, "concurrency": 1, **options})
        async with server.running(mux):
            yield server

    async def work(self, handler: Handler | None) -> None:
        """Serve until nothing is left to do."""
        async with self.serving(handler) as server, asyncio.timeout(WITHIN_S):
            await server.drain()

    async def until(self, look: Callable[[], Awaitable[Any]]) -> None:
        """Look until it is so."""
        async with asyncio.timeout(WITHIN_S):
            while not await look():  # noqa: ASYNC110  (nobody tells)
                await asyncio.sleep(LOOK_S)

    @asynccontextmanager
    async def housekeeping(self) -> AsyncIterator[tuple[Broker, InFlight]]:
        """Give what a loop of a server for the default queue needs, to tick it by hand."""
        broker = Broker(self.url)
        await broker.open()
        try:
            yield broker, InFlight({"default": 1}, 1, broker.annotate)
        finally:
            await broker.close()

    async def _outcome(self, call: Enqueue, options: dict[str, Any]) -> Any:
        try:
            task: Any = None if call.type is None else Task(call.type, call.payload)
            handle: TaskHandle = await self.client.enqueue(task, **(call.options | options))
        except Exception as error:
            return {"error": type(error).__name__}
        assert not self._served, "a task that runs may be gone before it is looked up"
        return _told(await handle.info())


def _told(info: TaskInfo) -> dict[str, Any]:
    told: dict[str, Any] = {
        "group": info.group or "",
        "id": info.id,
        "max_retry": info.max_retry,
        "queue": info.queue,
        "retention_s": int(info.retention.total_seconds()),
        "state": info.state.value,
        "timeout_s": int(info.timeout.total_seconds()) if info.timeout else 0,
    }
    if info.deadline is not None:
        told["deadline_unix"] = int(info.deadline.timestamp())
    if info.state == TaskState.SCHEDULED and info.next_process_at is not None:
        told["next_process_at_unix"] = int(info.next_process_at.timestamp())
    return told


# The scenarios, in the order of the index

Scenario = Callable[[World], Awaitable[None]]

SCENARIOS: dict[str, Scenario] = {}
"""Those that do more than enqueue."""

NEEDS_OWN_SERVER = {"syncer_retry"}
"""They change settings of the whole Redis."""


def scenario(function: Scenario) -> Scenario:
    """Register a scenario under the name of its function."""
    SCENARIOS[function.__name__] = function
    return function


@scenario
async def enqueue_max_retry_negative(world: World) -> None:
    await world.enqueue(max_retry=-3)  # Go prints the option with what it made of it, 0


@scenario
async def active_running(world: World) -> None:
    started, finish = asyncio.Event(), asyncio.Event()

    async def half_way(payload: bytes, ctx: Context) -> None:
        if ctx.task_id == "task-1":
            await ctx.write_result(b"half way")
            started.set()
            await finish.wait()

    async def shows_its_workers() -> bool:
        return [key async for key in world.redis.scan_iter("asynq:workers:*")] != []

    await world.enqueue()
    queues = {"default": 6, "low": 2}
    async with world.serving(half_way, queues=queues, strict_priority=True) as server:
        await started.wait()
        before, after = load("active_running").run.snapshots
        await world.snapshot(before)
        assert server._parts is not None
        server._parts.heartbeat.set_status("active")  # beats at once
        await world.until(shows_its_workers)
        servers = await world.redis.zcard("asynq:servers")
        (workers,) = [key async for key in world.redis.scan_iter("asynq:workers:*")]
        running = await world.redis.hlen(workers)
        world.did("Inspector.Servers()", f"{servers} server(s), {running} worker(s)")
        await world.snapshot(after)
        finish.set()
        await server.drain()


async def _succeed(payload: bytes, ctx: Context) -> None:
    pass


@scenario
async def done(world: World) -> None:
    await world.enqueue()
    await world.work(_succeed)


@scenario
async def done_unique(world: World) -> None:
    await world.enqueue()
    await world.snapshot("before")
    await world.work(_succeed)


@scenario
async def completed_with_result(world: World) -> None:
    async def answer(payload: bytes, ctx: Context) -> dict[str, bool]:
        return {"ok": True}

    await world.enqueue()
    await world.work(answer)


@scenario
async def completed_expired_deleted(world: World) -> None:
    await world.enqueue()
    await world.work(_succeed)
    await world.redis.zincrby("asynq:{default}:completed", -2, "task-1")  # as if 2 s had passed
    async with world.housekeeping() as (broker, in_flight):
        assert await Janitor(broker, in_flight).tick() == 1


@scenario
async def retry(world: World) -> None:
    async def fail(payload: bytes, ctx: Context) -> None:
        raise RuntimeError("connection refused")

    await world.enqueue()
    await world.work(fail)


@scenario
async def archived_exhausted(world: World) -> None:
    await retry(world)


@scenario
async def archived_skip_retry(world: World) -> None:
    async def skip(payload: bytes, ctx: Context) -> None:
        raise SkipRetry("bad input: skip retry for the task")

    await world.enqueue()
    await world.work(skip)


@scenario
async def revoked(world: World) -> None:
    async def revoke(payload: bytes, ctx: Context) -> None:
        raise RevokeTask("not wanted any more")

    await world.enqueue()
    await world.work(revoke)


@scenario
async def panic(world: World) -> None:
    async def fail(payload: bytes, ctx: Context) -> None:
        raise RuntimeError("kaboom")

    await world.enqueue()
    await world.work(fail)


@scenario
async def handler_not_found(world: World) -> None:
    await world.enqueue()
    await world.work(None)


@scenario
async def timed_out(world: World) -> None:
    async def hang(payload: bytes, ctx: Context) -> None:
        await asyncio.Event().wait()

    await world.enqueue()
    await world.work(hang)


@scenario
async def canceled(world: World) -> None:
    started = asyncio.Event()

    async def hang(payload: bytes, ctx: Context) -> None:
        started.set()
        await asyncio.Event().wait()

    async def is_heard() -> bool:
        ((_, listeners),) = await world.redis.pubsub_numsub("asynq:cancel")
        return bool(listeners)

    await world.enqueue()
    async with world.serving(hang) as server, asyncio.timeout(WITHIN_S):
        await started.wait()
        await world.until(is_heard)
        await world.client.handle("task-1").cancel()
        world.did("Inspector.CancelProcessing(task-1)")
        await server.drain()


@scenario
async def shutdown_requeue(world: World) -> None:
    started, over = asyncio.Event(), asyncio.Event()

    async def ignore_the_end(payload: bytes, ctx: Context) -> None:
        started.set()
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                pass

    await world.enqueue()
    async with world.serving(ignore_the_end, shutdown_timeout=0):
        await started.wait()
        await world.snapshot("active")
    over.set()
    oldest = (await world.redis.lrange("asynq:{default}:pending", -1, -1))[0]
    key = f"asynq:{{default}}:t:{oldest.decode()}"
    since = await world.redis.hget(key, "pending_since")
    world.did(
        "GetQueueInfo(default) latency in s (oldest pending has no pending_since)",
        int(time.time() - int(since) / 1e9) if since else 0,
    )


@scenario
async def lease_expired_recovered(world: World) -> None:
    await world.enqueue()
    expired = int(time.time()) - 100
    async with world.redis.pipeline() as pipeline:
        pipeline.lmove("asynq:{default}:pending", "asynq:{default}:active", "RIGHT", "LEFT")
        pipeline.zadd("asynq:{default}:lease", {"task-1": expired})
        pipeline.hset("asynq:{default}:t:task-1", "state", "active")
        pipeline.hdel("asynq:{default}:t:task-1", "pending_since")
        await pipeline.execute()
    world.did("(by hand) task-1 made active with a lease that ended 100 s ago")
    lease = await world.redis.zscore("asynq:{default}:lease", "task-1")
    world.did("ListActiveTasks: is_orphaned", lease is not None and lease <= time.time())
    await world.snapshot("orphaned")
    async with world.housekeeping() as (broker, in_flight):
        assert await Recoverer(broker, in_flight).tick() == 1


@scenario
async def dequeue_missing_hash(world: World) -> None:
    await world.enqueue()
    await world.redis.rpush("asynq:{default}:pending", "ghost")
    await world.work(_succeed)


@scenario
async def forward_scheduled(world: World) -> None:
    async def is_forwarded() -> bool:
        return not await world.redis.exists("asynq:{default}:scheduled")

    await world.enqueue()
    await world.redis.set("asynq:{default}:paused", int(time.time()))
    world.did("PauseQueue(default)")
    async with world.serving(_succeed):
        await world.until(is_forwarded)


@scenario
async def forward_group_scheduled(world: World) -> None:
    await forward_scheduled(world)


@scenario
async def archive_trim(world: World) -> None:
    async def fail(payload: bytes, ctx: Context) -> None:
        raise RuntimeError("x")

    archived, now = "asynq:{default}:archived", int(time.time())
    ancient = ["ancient-1", "ancient-2"]
    stored = {"msg": "", "state": "archived"}
    async with world.redis.pipeline() as pipeline:
        pipeline.zadd(archived, {f"old-{i:05d}": now - 20_000 + i for i in range(10_000)})
        pipeline.zadd(archived, dict.fromkeys(ancient, now - 91 * 86_400))
        for task_id in (*ancient, "old-00000", "old-00001", "old-00002", "old-00003"):
            pipeline.hset(f"asynq:{{default}}:t:{task_id}", mapping=stored)
        await pipeline.execute()
    world.did(
        "(by hand) 10000 archived ids old-00000... of the last hours, and ancient-1, ancient-2 "
        "91 days old; hashes for the ancient two and old-00000 to old-00003"
    )
    await world.enqueue()
    await world.work(fail)
    world.did("ZCARD archived", await world.redis.zcard(archived))
    first = await world.redis.zrange(archived, 0, 0)
    world.did("first archived id", [task_id.decode() for task_id in first])
    for task_id in ("ancient-1", "old-00000", "old-00001", "old-00002"):
        exists = await world.redis.exists(f"asynq:{{default}}:t:{task_id}")
        world.did(f"task hash exists: {task_id}", bool(exists))
    await world.redis.zremrangebyrank(archived, 0, -4)  # as was done before the golden dump


@scenario
async def syncer_retry(world: World) -> None:
    async def refuse_writes(payload: bytes, ctx: Context) -> None:
        await world.redis.config_set("min-replicas-to-write", 1)

    await world.enqueue()
    async with world.serving(refuse_writes, concurrency=2) as server, asyncio.timeout(WITHIN_S):

        async def has_refused_the_outcome() -> bool:
            assert server._parts is not None
            errors = await world.redis.info("errorstats")
            return "errorstat_NOREPLICAS" in errors and bool(server._parts.pump._under_way())

        await world.until(has_refused_the_outcome)
        await world.redis.config_set("min-replicas-to-write", 0)
        await server.drain()
        state = await world.redis.hget("asynq:{default}:t:task-1", "state")
        world.did("state 15 s after start", state.decode() if state else "done")
        await world.snapshot("15 s after start")


@scenario
async def queue_cache(world: World) -> None:
    await world.enqueue()
    # What deleting a queue with force leaves of this one: nothing, and it is not listed.
    await world.redis.delete("asynq:{default}:pending", "asynq:{default}:t:task-1")
    await world.redis.srem("asynq:queues", "default")
    world.did("DeleteQueue(default,true) by another client")
    await world.enqueue()
    queues = await world.redis.smembers("asynq:queues")
    world.did("Queues()", sorted(queue.decode() for queue in queues))
