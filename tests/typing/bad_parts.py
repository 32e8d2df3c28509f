"""Misuse of parts, contracts and options that both type checkers must reject."""

from __future__ import annotations

from asyncq import Client, Context, Mux, Next, Retry, SyncClient, Task, TaskHandle, TaskType
from tests.typing.good_parts import (
    DERIVED,
    NIGHTLY,
    POINT,
    Derived,
    Point,
    Row,
    State,
    either,
    mux,
    part,
    row,
)


async def tasks(client: Client, ctx: Context[State]) -> None:
    row.new({"n": "x"})  # E
    row.new({"m": 1})  # E
    row.new(None)  # E
    either.new()  # E
    POINT.new(Point(1), timeout="3s")  # E
    POINT.new(Point(1), task_id=None)  # E
    POINT.new(Point(1), headers={"a": 1})  # E
    POINT.new(Point(1), process_at=3)  # E
    Task("t", executor="thread")  # E
    Task()  # E
    TaskType("t", Point, result=int, task_id="x")  # E
    TaskType("t", 3)  # E
    narrow: TaskHandle[int] = await row.enqueue({"n": 1})  # E
    await client.enqueue(row)  # E
    await client.enqueue_many(row.new({"n": 1}))  # E
    client.handle("x", of="part:row")  # E
    ctx.state["nonsense"]  # E
    ctx.retry_count = 3  # E
    await ctx.progress("half")  # E
    Retry()  # E
    print(narrow)


def script(client: SyncClient) -> None:
    client.enqueue(row.new({"n": 1}), qeue="x")  # E
    narrow: int = client.enqueue(row.new({"n": 1})).result()  # E
    print(narrow)


async def not_a_middleware(task: Task) -> None: ...


mux.use(not_a_middleware)  # E
mux.include("part")  # E
mux.bind("client")  # E
mux.handle("x:", "handler")  # E
Mux(lifespan=3)  # E
Mux(task_id="x")  # E


@mux.task(POINT, queue="x")  # E
async def option_of_the_producer(payload: Point) -> Row:
    return {"n": 1}


@mux.task(NIGHTLY)  # E
async def payload_of_none(payload: int, ctx: Context) -> None: ...


@mux.task(DERIVED)  # E
async def wrong_result(payload: Derived) -> int:
    return 1


@part.task("x", executor="fiber")  # E
def wrong_executor(payload: int) -> None: ...


@part.task("y", retry_delay="3s")  # E
async def wrong_delay(payload: int) -> None: ...


@part.task("z", is_failure=lambda: True)  # E
async def wrong_is_failure(payload: int) -> None: ...


@mux.use  # E
async def middleware_of_another_shape(task: str, ctx: Context, call_next: Next) -> None: ...
