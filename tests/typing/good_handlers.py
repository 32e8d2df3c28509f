"""What type-checks, and as what: handlers, task types, tasks and handles."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, assert_type

from pydantic import BaseModel, TypeAdapter

from asyncq import AsyncqError, Client, Context, Mux, Next, Task, TaskHandle, TaskType


class Welcome(BaseModel):
    user_id: int


@dataclass
class Deps:
    db: str


@asynccontextmanager
async def lifespan(mux: Mux[Deps]) -> AsyncGenerator[Deps, None]:
    yield Deps("x")


mux = Mux(lifespan=lifespan)
assert_type(mux, Mux[Deps])
plain = Mux()


@mux.task("a", queue="critical", max_retry=5, timeout=30, retention=3600)
async def welcome(payload: Welcome, ctx: Context[Deps]) -> str:
    await ctx.progress(0.5)
    return ctx.state.db


@mux.task("a0")
async def bare_ctx(payload: Welcome, ctx: Context) -> str:
    return str(ctx.state.foo)


@mux.task("b")
async def only_payload(payload: Welcome) -> None: ...


@mux.task("c", executor="process")
def convert(payload: Welcome) -> int:
    return 1


@mux.task("c2")
def convert_ctx(payload: Welcome, ctx: Context[Deps]) -> int:
    return 1


@mux.task("d")
async def raw(payload: bytes, ctx: Context[Deps]) -> bytes:
    return payload


@mux.task("e")
async def nightly() -> int:
    return 3


@mux.task("f")
async def nightly_ctx(ctx: Context[Deps]) -> int:
    return 3


@mux.task("f2")
def nightly_sync() -> int:
    return 3


@mux.task("g")
async def whole(task: Task[Any]) -> None: ...


@mux.task("h")
async def dct(payload: dict[str, list[int]]) -> list[int]:
    return payload["x"]


@mux.task("i")
async def opt(payload: Welcome, ctx: Context[Deps] | None = None) -> None: ...


WELCOME = TaskType("w", Welcome, result=str, queue="critical")
WELCOME_TOO = TaskType("w1", Welcome, result=str)
NORES = TaskType("w2", Welcome)
NOPAY = TaskType("w3", queue="x")
UNI = TaskType("w4", Welcome, result=list[str])
UNION: TypeAdapter[int | str] = TypeAdapter(int | str)
UN = TaskType("w5", UNION, result=UNION)


@mux.task(WELCOME)
async def w_impl(payload: Welcome, ctx: Context[Deps]) -> str:
    return ""


@mux.task(WELCOME_TOO, executor="thread")
def w_impl2(payload: Welcome) -> str:
    return ""


@mux.task(NORES)
async def nores_impl(payload: Welcome) -> None: ...


@mux.use
async def timing(task: Task[Any], ctx: Context[Any], call_next: Next) -> Any:
    return await call_next(task, ctx)


async def main(client: Client, ctx: Context[Deps]) -> None:
    one = Welcome(user_id=1)
    assert_type(await welcome(one, ctx), str)
    assert_type(await welcome(one, ctx=ctx), str)
    assert_type(welcome.new(one), Task[str])
    assert_type(
        await welcome.enqueue(one, task_id="x", process_in=timedelta(minutes=1)), TaskHandle[str]
    )
    assert_type(await (await welcome.enqueue(one)).result(timeout=5), str)
    assert_type(await bare_ctx.enqueue(one), TaskHandle[str])
    assert_type(await only_payload(one), None)
    assert_type(only_payload.new(one), Task[None])
    assert_type(convert(one), int)
    assert_type(convert.new(one), Task[int])
    assert_type(await convert.enqueue(one), TaskHandle[int])
    assert_type(convert_ctx(one, ctx), int)
    assert_type(await raw(b"", ctx), bytes)
    assert_type(raw.new(b""), Task[bytes])
    assert_type(await nightly(), int)
    assert_type(nightly.new(), Task[int])
    assert_type(await nightly.enqueue(process_in=4), TaskHandle[int])
    assert_type(await nightly_ctx(ctx), int)
    assert_type(nightly_ctx.new(), Task[int])
    assert_type(nightly_sync(), int)
    assert_type(nightly_sync.new(), Task[int])
    assert_type(dct.new({"x": [1]}), Task[list[int]])
    assert_type(opt.new(one), Task[None])
    assert_type(WELCOME, TaskType[Welcome, str])
    assert_type(NORES, TaskType[Welcome, None])
    assert_type(NOPAY, TaskType[None, None])
    assert_type(UNI, TaskType[Welcome, list[str]])
    assert_type(UN, TaskType[int | str, int | str])
    assert_type(UN.new("x"), Task[int | str])
    assert_type(WELCOME.new(one), Task[str])
    assert_type(NOPAY.new(), Task[None])
    assert_type(w_impl.new(one), Task[str])
    assert_type(await w_impl(one, ctx), str)
    assert_type(w_impl2(one), str)
    assert_type(await client.enqueue(welcome.new(one), unique=timedelta(hours=1)), TaskHandle[str])
    untyped = Task("x", {"user_id": 1}, queue="low")
    assert_type(untyped, Task[Any])
    assert_type(Task("x", {"user_id": 1}, result=str), Task[str])
    assert_type(await client.enqueue(untyped), TaskHandle[Any])
    assert_type(
        await client.enqueue_many(welcome.new(Welcome(user_id=i)) for i in range(10)),
        list[TaskHandle[str]],
    )
    assert_type(
        await client.enqueue_many([welcome.new(one)], return_exceptions=True),
        list[TaskHandle[str] | AsyncqError],
    )
    # The checkers name the type of a mixed list differently; both let each handle be awaited.
    for handle in await client.enqueue_many([welcome.new(one), convert.new(one)]):
        await handle.result()
    assert_type(client.handle("x", queue="critical", of=welcome), TaskHandle[str])
    assert_type(client.handle("x"), TaskHandle[Any])
    wider: TaskHandle[object] = await welcome.enqueue(one)
    print(wider)
