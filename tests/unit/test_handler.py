from __future__ import annotations

import functools
import inspect
import re
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import pytest
from annotated_types import Gt
from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from asyncq.context import Context
from asyncq.errors import InvalidPayloadError
from asyncq.handler import Entry
from asyncq.mux import Mux
from asyncq.task import Task, TaskType
from tests.unit.test_context import MemoryRun

if TYPE_CHECKING:
    from decimal import Decimal


class Welcome(BaseModel):
    user_id: int


@dataclass
class Point:
    x: int


class Row(TypedDict):
    n: int


Positive = Annotated[int, Gt(0)]


async def in_place(entry: Entry, arguments: tuple[Any, ...]) -> Any:
    """What a server does in a thread or process, done at once."""
    return entry.function(*arguments)


async def call(function: Any, raw: bytes, *, ctx: Context[Any] | None = None) -> Any:
    mux = Mux()
    mux.task("t")(function)
    entry = mux.compile(in_place).find("t")
    return await entry.call(raw, ctx or Context(MemoryRun(payload=raw)))


# What the first parameter is


async def model(payload: Welcome) -> object:
    return payload


async def dataclass_(payload: Point) -> object:
    return payload


async def typed_dict(payload: Row) -> object:
    return payload


async def annotated(payload: Positive) -> object:
    return payload


async def builtin(payload: dict[str, list[int]]) -> object:
    return payload


async def anything(payload: Any) -> object:
    return payload


async def optional(payload: int | None) -> object:
    return payload


async def raw_bytes(payload: bytes) -> object:
    return payload


def in_thread(payload: Welcome) -> object:
    return payload


@pytest.mark.parametrize(
    ("function", "raw", "expected"),
    [
        (model, b'{"user_id":1}', Welcome(user_id=1)),
        (dataclass_, b'{"x":1}', Point(1)),
        (typed_dict, b'{"n":1}', {"n": 1}),
        (annotated, b"7", 7),
        (builtin, b'{"a":[1]}', {"a": [1]}),
        (anything, b'{"a":[1]}', {"a": [1]}),
        (optional, b"3", 3),
        (optional, b"", None),  # a nil payload
        (raw_bytes, b"\xff", b"\xff"),
        (raw_bytes, b"", b""),
        (in_thread, b'{"user_id":1}', Welcome(user_id=1)),
    ],
)
async def test_the_annotation_says_what_the_payload_becomes(
    function: Any, raw: bytes, expected: object
) -> None:
    assert await call(function, raw) == expected


async def test_a_handler_can_take_the_whole_task() -> None:
    async def whole(task: Task) -> object:
        return task

    async def whole_with_context(task: Task[Any], ctx: Context) -> object:
        return task, ctx

    ctx: Context[Any] = Context(MemoryRun(payload=b"raw", headers={"a": "b"}))
    assert await call(whole, b"raw", ctx=ctx) is ctx.task
    assert await call(whole_with_context, b"raw", ctx=ctx) == (ctx.task, ctx)
    assert (ctx.task.payload, ctx.task.headers) == (b"raw", {"a": "b"})


async def test_the_context_is_given_where_it_is_wanted() -> None:
    async def alone(ctx: Context) -> object:
        return ctx

    async def alone_or_not(ctx: Context[Any] | None = None) -> object:
        return ctx

    async def second(payload: bytes, ctx: Context[Any]) -> object:
        return payload, ctx

    async def second_or_not(payload: Welcome, ctx: Context | None = None) -> object:
        return payload.user_id, ctx

    async def second_unnamed(payload: Row, ctx) -> object:  # type: ignore[no-untyped-def]
        return payload["n"], ctx

    def in_thread_too(payload: Welcome, ctx: Context) -> object:
        return payload.user_id, ctx

    async def neither() -> object:
        return "nothing"

    ctx: Context[Any] = Context(MemoryRun())
    assert await call(alone, b"", ctx=ctx) is ctx
    assert await call(alone_or_not, b"", ctx=ctx) is ctx
    assert await call(second, b"x", ctx=ctx) == (b"x", ctx)
    assert await call(second_or_not, b'{"user_id":1}', ctx=ctx) == (1, ctx)
    assert await call(second_unnamed, b'{"n":1}', ctx=ctx) == (1, ctx)
    assert await call(in_thread_too, b'{"user_id":1}', ctx=ctx) == (1, ctx)
    assert await call(neither, b"ignored", ctx=ctx) == "nothing"


async def test_other_parameters_keep_their_defaults() -> None:
    async def more(payload: Welcome, retries: int = 3, *, fast: bool = True) -> object:
        return payload.user_id, retries, fast

    assert await call(more, b'{"user_id":1}') == (1, 3, True)


async def test_anything_callable_is_a_handler() -> None:
    class Mailer:
        async def __call__(self, payload: Welcome) -> int:
            return payload.user_id

        async def send(self, payload: Welcome) -> int:
            return payload.user_id + 1

    async def scaled(factor: int, payload: Welcome) -> int:
        return factor * payload.user_id

    @functools.wraps(model)
    def wrapped(*args: Any) -> Coroutine[Any, Any, object]:
        return model(*args)

    raw = b'{"user_id":2}'
    assert await call(Mailer(), raw) == 2
    assert await call(Mailer().send, raw) == 3
    assert await call(functools.partial(scaled, 10), raw) == 20
    assert await call(wrapped, raw) == Welcome(user_id=2)


async def test_types_of_the_function_around_it_are_found() -> None:
    class Local(BaseModel):
        n: int

    mux = Mux()

    @mux.task("t")
    async def handler(payload: Local) -> object:
        return payload

    ctx: Context[Any] = Context(MemoryRun())
    assert await mux.compile(in_place).find("t").call(b'{"n":1}', ctx) == Local(n=1)


# What is refused at registration


def refused(function: Any) -> str:
    with pytest.raises(TypeError) as caught:
        Mux().task("t")(function)
    return str(caught.value)


def test_a_handler_with_too_many_parameters_is_refused() -> None:
    async def three(payload: Welcome, ctx: Context, db: object) -> None: ...
    async def two(payload: Welcome, db: str) -> None: ...
    async def turned(ctx: Context, payload: Welcome) -> None: ...
    async def keyword(payload: Welcome, *, ctx: Context) -> None: ...

    assert "requires 'db'" in refused(three)
    assert "requires 'db'" in refused(two)
    assert "the payload comes first, the context second" in refused(turned)
    assert "requires the keyword 'ctx'" in refused(keyword)
    assert "test_handler" in refused(three)


def test_a_payload_without_a_type_is_refused() -> None:
    async def untyped(payload):  # type: ignore[no-untyped-def]
        ...

    assert "annotate it" in refused(untyped)


def test_a_type_that_is_not_there_at_run_time_is_refused() -> None:
    async def later(payload: Decimal) -> None: ...

    message = refused(later)
    assert "name 'Decimal' is not defined" in message
    assert "TYPE_CHECKING" in message


class Opaque: ...


def test_a_type_that_cannot_be_json_is_refused_with_its_handler() -> None:
    async def opaque(payload: Opaque) -> None: ...
    async def opaque_result() -> Opaque:
        return Opaque()

    assert re.search("payload of handler .*opaque.*Opaque", refused(opaque))
    assert re.search("result of handler .*opaque_result.*Opaque", refused(opaque_result))


async def test_a_payload_that_does_not_validate_never_reaches_the_handler() -> None:
    async def unreached(payload: Welcome) -> None:
        raise AssertionError

    for raw in (b'{"user_id":"x"}', b"{", b"", b"\xff"):
        with pytest.raises(InvalidPayloadError):
            await call(unreached, raw)


def test_a_generator_is_refused() -> None:
    async def stream(payload: Welcome) -> AsyncIterator[int]:
        yield 1

    assert "generator" in refused(stream)


def test_an_executor_is_for_plain_functions() -> None:
    with pytest.raises(TypeError, match="is async"):
        Mux().task("t", executor="thread")(model)


def test_a_process_imports_its_handler_by_name() -> None:
    def local(payload: Welcome) -> None: ...

    mux = Mux()
    assert mux.task("top", executor="process")(in_thread).kind == "process"
    for function in (local, lambda: None, functools.partial(in_thread)):
        with pytest.raises(TypeError, match="top of a module"):
            mux.task("t", executor="process")(function)


# What a handler is


async def test_a_handler_is_still_the_function() -> None:
    @Mux().task("t")
    async def documented(payload: Welcome, ctx: Context | None = None) -> int:
        """Says so."""
        return payload.user_id

    assert await documented(Welcome(user_id=4)) == 4
    assert documented.__name__ == "documented"
    assert documented.__doc__ == "Says so."
    assert list(inspect.signature(documented).parameters) == ["payload", "ctx"]
    assert repr(documented) == "<Handler 't'>"


def test_a_handler_makes_tasks_of_its_type() -> None:
    @Mux().task("t", queue="low")
    async def typed(payload: Welcome) -> int:
        return 1

    @Mux().task("n")
    async def nothing() -> None: ...

    @Mux().task("w")
    async def whole(task: Task[Any]) -> None: ...

    assert typed.new(Welcome(user_id=1)) == Task("t", {"user_id": 1}, queue="low")
    assert nothing.new() == Task("n")
    assert whole.new(Task("other", b"x")).payload == b"x"


def test_the_result_annotation_decodes_results() -> None:
    mux = Mux()

    async def model_result() -> Welcome:
        return Welcome(user_id=1)

    def handed_on() -> Coroutine[Any, Any, Welcome]:
        return model_result()

    async def no_result() -> None: ...

    async def never() -> NoReturn:
        raise RuntimeError

    for name, function in {"a": model_result, "b": handed_on}.items():
        codec = mux.task(name)(function).result_codec
        assert codec is not None
        assert codec.decode(b'{"user_id":1}') == Welcome(user_id=1)
    assert mux.task("c")(no_result).result_codec is None
    assert mux.task("d")(never).result_codec is None


def test_the_type_of_a_contract_is_checked() -> None:
    mux = Mux()
    contract = TaskType("t", Welcome)
    with pytest.raises(TypeError, match="takes Point, but tasks of type 't' carry Welcome"):
        mux.task(contract)(dataclass_)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a payload, but tasks of type 'u' have none"):
        mux.task(TaskType("u"))(model)  # type: ignore[arg-type]
    assert mux.types == {}


@pytest.mark.parametrize(
    ("payload", "function"),
    [
        (Welcome, model),
        (Welcome, anything),
        (Welcome, raw_bytes),
        (Row, typed_dict),
        (int, annotated),
        (dict[str, list[int]], builtin),
        (TypeAdapter(int | None), optional),
    ],
)
def test_a_handler_may_take_less_exactly_what_a_contract_sends(payload: Any, function: Any) -> None:
    contract: Any = TaskType("t", payload)
    assert Mux().task(contract)(function).name == "t"
