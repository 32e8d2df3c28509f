"""What type-checks beyond single handlers: parts, patterns, middleware, policies, payload kinds."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, assert_type

from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from asyncq import (
    Client,
    Context,
    Handler,
    Middleware,
    Mux,
    Next,
    RetryDelay,
    RevokeTask,
    SkipRetry,
    SyncClient,
    SyncTaskHandle,
    Task,
    TaskHandle,
    TaskInfo,
    TaskOptions,
    TaskState,
    TaskType,
    TypeOptions,
    current_context,
    exponential,
    fixed,
)


class Row(TypedDict):
    n: int


@dataclass
class Point:
    x: int


class Base(BaseModel):
    n: int


class Derived(Base):
    m: int = 0


@dataclass
class Deps:
    name: str


class State(TypedDict):
    name: str


@asynccontextmanager
async def dict_lifespan(mux: Mux[State]) -> AsyncGenerator[State, None]:
    yield {"name": "x"}


mux = Mux(lifespan=dict_lifespan, queue="low", headers={"from": "here"})
part = Mux(prefix="part:", timeout=timedelta(seconds=3), unique=None)
mux.include(part)
assert_type(mux, Mux[State])
assert_type(part, Mux[Any])


# Payloads


@part.task("row")
async def row(payload: Row, ctx: Context[State]) -> Row:
    ctx.log.info(ctx.state["name"])
    return payload


@part.task("point")
async def point(payload: Point) -> Point | None:
    return None


@part.task("limited")
async def limited(payload: Annotated[int, Field(gt=0)]) -> None: ...


@part.task("many")
def many(payload: Sequence[Base], ctx: Context | None = None) -> dict[str, int]:
    return {}


@part.task("either")
async def either(payload: int | None) -> None: ...


@part.task("anything")
async def anything(payload: dict[str, Any]) -> None: ...


@part.task("task")
async def whole(task: Task, ctx: Context) -> None:
    assert_type(task.payload, bytes | None)
    assert_type(ctx.task, Task[Any])


# Options of the worker


def only_timeouts(error: BaseException) -> bool:
    return not isinstance(error, TimeoutError)


def by_type(retried: int, error: BaseException, task: Task) -> timedelta:
    return timedelta(seconds=len(task.type))


policy: RetryDelay = by_type
policy = exponential(base=0.5, max=timedelta(hours=1))
policy = fixed(3)


@mux.task("policy", retry_delay=by_type, is_failure=only_timeouts)
async def with_policy() -> None:
    raise SkipRetry("no use")


@mux.task("policy2", retry_delay=exponential(), executor="thread")
def with_policy_too() -> None:
    raise RevokeTask


# Patterns and fallbacks


async def image(task: Task[Any], ctx: Context[State]) -> None: ...


mux.handle("image:", image)
mux.handle("audio:", with_policy, retry_delay=3)


@mux.not_found
async def stray(task: Task[Any]) -> None: ...


# Middleware


class Tracing:
    async def __call__(self, task: Task[Any], ctx: Context[Any], call_next: Next) -> Any:
        return await call_next(task, ctx)


def retrying(times: int) -> Middleware:
    async def middleware(task: Task, ctx: Context, call_next: Next) -> Any:
        assert_type(call_next(task, ctx), Awaitable[Any])
        return await call_next(task, ctx)

    return middleware


tracing = mux.use(Tracing())
assert_type(tracing, Tracing)
part.use(retrying(3))


# Contracts

POINT = TaskType("p", Point, result=Row, retention=timedelta(days=1))
DERIVED = TaskType("q", Derived)
NIGHTLY = TaskType("n")


@mux.task(POINT)
async def point_contract(payload: Point, ctx: Context[State] | None = None) -> Row:
    return {"n": payload.x}


@mux.task(DERIVED, retry_delay=3)
async def wider_than_needed(payload: Base) -> None: ...


@mux.task(NIGHTLY)
async def nightly() -> None: ...


async def main(client: Client) -> None:
    assert_type(row.new({"n": 1}), Task[Row])
    assert_type(point.new(Point(1)), Task[Point | None])
    assert_type(limited.new(3), Task[None])
    assert_type(many.new([Derived(n=1)]), Task[dict[str, int]])
    assert_type(many([Base(n=1)]), dict[str, int])
    assert_type(either.new(None), Task[None])
    assert_type(anything.new({"a": object()}), Task[None])
    assert_type(POINT.new(Point(1)), Task[Row])
    assert_type(point_contract.new(Point(1)), Task[Row])
    assert_type(await POINT.enqueue(Point(1), deadline=datetime.now()), TaskHandle[Row])
    assert_type(NIGHTLY.new(task_id="once", timeout=None), Task[None])
    assert_type(await nightly.enqueue(unique=60, unique_key="k"), TaskHandle[None])

    contract: TaskType[Point, Row] = point_contract
    contract.bind(client)
    mux.bind(client)
    part.bind(client)
    wider: Task[object] = row.new({"n": 1})
    several: Sequence[TaskHandle[object]] = await client.enqueue_many([row.new({"n": 1})])
    for handle in (*several, await client.enqueue(wider)):
        await handle.cancel(retry=False)
        info = await handle.info()
        assert_type(info, TaskInfo)
        assert_type(info.state, TaskState)
        assert_type(info.next_process_at, datetime | None)
        if info.progress:
            assert_type(info.progress.fraction, float)

    defaults: TypeOptions = {"queue": "low", "timeout": None}
    options: TaskOptions = {"process_in": 3}
    assert_type(TaskType("x", Row, result=int, **defaults), TaskType[Row, int])
    assert_type(await client.enqueue(row.new({"n": 1}), **options), TaskHandle[Row])
    ctx = current_context()
    assert_type(ctx, Context[Any])
    assert_type(await ctx.client.enqueue(row.new({"n": 1})), TaskHandle[Row])
    assert_type(await ctx.client.enqueue_many([row.new({"n": 1})]), list[TaskHandle[Row]])
    assert_type(ctx.client.handle("x", of=row), TaskHandle[Row])


def script(client: SyncClient) -> None:
    assert_type(client.enqueue(row.new({"n": 1}), process_in=3), SyncTaskHandle[Row])
    assert_type(client.enqueue(Task("x")).result(timeout=3), Any)
    assert_type(client.enqueue_many([row.new({"n": 1})]), list[SyncTaskHandle[Row]])


def takes_any_handler(handler: Handler[Any, Any, ..., Any]) -> str:
    return handler.name


takes_any_handler(row)
takes_any_handler(many)
takes_any_handler(nightly)
