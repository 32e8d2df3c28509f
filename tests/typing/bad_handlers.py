"""Misuse that both type checkers must reject, at exactly the lines marked with an E."""

from __future__ import annotations

from asyncq import Client, Context
from tests.typing.good_handlers import (
    NOPAY,
    WELCOME,
    Deps,
    Welcome,
    convert,
    mux,
    nightly,
    welcome,
)


async def bad(client: Client, ctx: Context[Deps]) -> None:
    welcome.new(3)  # E
    welcome.new()  # E
    welcome.new(Welcome(user_id=1), nonsense=1)  # E
    welcome.new(Welcome(user_id=1), queue=1)  # E
    await welcome.enqueue("x")  # E
    await client.enqueue(welcome.new(Welcome(user_id=1)), qeue="x")  # E
    nightly.new(Welcome(user_id=1))  # E
    await convert(Welcome(user_id=1))  # E
    await welcome(Welcome(user_id=1))  # E
    WELCOME.new(3)  # E
    x: int = await (await welcome.enqueue(Welcome(user_id=1))).result()  # E
    NOPAY.new(3)  # E
    print(x)


@mux.task(WELCOME)  # E
async def wrong_payload(payload: int) -> str:
    return ""


@mux.task(WELCOME)  # E
async def wrong_result(payload: Welcome) -> int:
    return 1


@mux.task("zz", nonsense=1)  # E
async def unknown_option(payload: int) -> str:
    return ""


@mux.task("zz", task_id="x")  # E
async def option_of_one_task(payload: int) -> str:
    return ""
