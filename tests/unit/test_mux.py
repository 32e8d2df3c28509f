from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic import BaseModel

from asyncq.context import Context
from asyncq.errors import AsyncqError, HandlerNotFoundError, InvalidPayloadError, OptionError
from asyncq.handler import Entry, Next
from asyncq.mux import Mux
from asyncq.retry import fixed
from asyncq.task import Task, TaskType
from tests.unit.test_context import MemoryRun
from tests.unit.test_task import Recorder


class Row(BaseModel):
    n: int


async def in_place(entry: Entry, arguments: tuple[Any, ...]) -> Any:
    """What a server does in a thread or process, done at once."""
    return entry.function(*arguments)


async def run(mux: Mux[Any], task_type: str, payload: bytes = b"") -> Any:
    """Run one task as a server does."""
    entry = mux.compile(in_place).find(task_type)
    return await entry.call(payload, Context(MemoryRun(type=task_type, payload=payload)))


def answering(text: str) -> Any:
    async def handler() -> str:
        return text

    return handler


# Finding the handler


async def test_a_type_finds_its_handler() -> None:
    mux = Mux()
    for name in ("a", "b", "a:b"):
        mux.task(name)(answering(name))
    assert [await run(mux, name) for name in ("a", "b", "a:b")] == ["a", "b", "a:b"]
    assert mux.compile(in_place).types == ("a", "a:b", "b")


async def test_the_longest_pattern_wins_after_the_exact_type() -> None:
    mux = Mux()
    for pattern in ("img:", "img:resize:", "i"):
        mux.handle(pattern, answering(pattern))
    mux.task("img:resize:small")(answering("exact"))
    found = {
        "img:resize:small": "exact",
        "img:resize:smaller": "img:resize:",
        "img:resize:": "img:resize:",
        "img:crop": "img:",
        "index": "i",
    }
    assert {name: await run(mux, name) for name in found} == found


async def test_a_task_type_is_no_pattern() -> None:
    mux = Mux()
    mux.task("img")(answering("exact"))
    with pytest.raises(HandlerNotFoundError):
        await run(mux, "img:crop")


async def test_an_unknown_type_is_an_error_in_asynqs_words() -> None:
    with pytest.raises(HandlerNotFoundError, match=r'^handler not found for task "nowhere"$'):
        await run(Mux(), "nowhere")


async def test_not_found_takes_what_nobody_takes() -> None:
    mux = Mux()

    @mux.not_found
    async def stray(task: Task[Any]) -> str:
        return f"stray {task.type}"

    mux.handle("img:", answering("img:"))
    assert [await run(mux, name) for name in ("x", "img:x", "")] == ["stray x", "img:", "stray "]
    with pytest.raises(ValueError, match=r"two not_found handlers: .*stray and .*handler"):
        mux.not_found(answering("second"))


def test_types_from_outside_fill_no_memory() -> None:
    mux = Mux()
    mux.handle("img:", answering("img"))
    routes = mux.compile(in_place)
    image, other = routes.find("img:1"), routes.find("nowhere")
    assert all(routes.find(f"img:{n}") is image for n in range(5000))
    assert all(routes.find(f"nowhere{n}") is other for n in range(5000))
    assert len(routes._by_prefix) <= 1024


def test_a_blank_name_is_refused() -> None:
    with pytest.raises(OptionError, match="task typename cannot be empty"):
        Mux(prefix="billing:").task(" ")
    with pytest.raises(OptionError, match="not_found"):
        Mux().handle("", answering("x"))


def test_a_decorator_without_its_name_says_so() -> None:
    with pytest.raises(TypeError, match=r'as in @mux\.task\("name"\)'):
        Mux().task(answering("x"))


# Registered twice


def first() -> None: ...
def second() -> None: ...


def test_a_type_registered_twice_names_both_functions() -> None:
    mux = Mux()
    mux.task("t")(first)
    with pytest.raises(ValueError, match=r"'t' is registered twice: by .*\.first and .*\.second"):
        mux.task("t")(second)
    mux.handle("t", first)
    with pytest.raises(ValueError, match="pattern 't' is registered twice"):
        mux.handle("t", second)
    assert mux.types["t"].function is first


def test_a_type_in_two_parts_is_refused_when_they_meet() -> None:
    mux, part = Mux(), Mux()
    mux.task("t")(first)
    part.task("t")(second)
    with pytest.raises(ValueError, match="registered twice"):
        mux.include(part)
    assert mux.types.keys() == {"t"}


def test_a_type_that_a_part_registers_later_is_refused_before_work_begins() -> None:
    mux, part = Mux(), Mux()
    mux.include(part)
    mux.task("t")(first)
    part.task("t")(second)
    with pytest.raises(ValueError, match="registered twice"):
        mux.compile(in_place)


def test_a_part_is_included_once_and_never_in_itself() -> None:
    mux, part, deeper = Mux(), Mux(), Mux()
    mux.include(part)
    part.include(deeper)
    for outer, inner in ((mux, part), (mux, deeper), (part, mux), (deeper, mux), (mux, mux)):
        with pytest.raises(ValueError, match="only once, and never in itself"):
            outer.include(inner)


# Parts


async def test_a_part_brings_its_prefix_and_defaults() -> None:
    part = Mux(prefix="billing:", queue="low", headers={"from": "billing"})
    mux = Mux(queue="unused")
    mux.include(part)  # before there is anything in it

    @part.task("invoice", max_retry=3, headers={"kind": "invoice"})
    async def invoice(payload: Row) -> int:
        return payload.n

    @part.task("urgent", queue="critical")
    async def urgent() -> None: ...

    part.handle("old:", answering("old"))
    assert invoice.name == "billing:invoice"
    plan = invoice.new(Row(n=1)).plan(0.0)
    assert (plan.queue, plan.max_retry) == ("low", 3)
    assert plan.headers == {"from": "billing", "kind": "invoice"}
    assert urgent.plan.queue == "critical"
    assert await run(mux, "billing:invoice", b'{"n":7}') == 7
    assert await run(mux, "billing:old:x") == "old"


async def test_a_contract_keeps_its_own_name_and_options_in_a_part() -> None:
    part = Mux(prefix="billing:", queue="low")
    contract = TaskType("invoice", Row, result=int, queue="critical")

    @part.task(contract, retry_delay=3)
    async def invoice(payload: Row) -> int:
        return payload.n

    assert (invoice.name, invoice.plan) == ("invoice", contract.plan)
    assert await run(part, "invoice", b'{"n":7}') == 7
    with pytest.raises(TypeError, match="'queue' belongs to the producer"):
        part.task(contract, queue="x")  # type: ignore[call-overload]


def test_prefixes_do_not_add_up_silently() -> None:
    with pytest.raises(ValueError, match=r"Mux\(prefix='eu:billing:'\)"):
        Mux(prefix="eu:").include(Mux(prefix="billing:"))


async def test_a_part_answers_for_unknown_types_under_its_prefix() -> None:
    mux, part = Mux(), Mux(prefix="billing:")
    mux.include(part)
    part.not_found(answering("billing"))
    mux.not_found(answering("all"))
    assert [await run(mux, name) for name in ("billing:x", "x")] == ["billing", "all"]


def test_two_fallbacks_for_everything_are_refused() -> None:
    mux, part = Mux(), Mux()
    mux.not_found(first)
    part.not_found(second)
    with pytest.raises(ValueError, match="registered twice"):
        mux.include(part)


# Options of the worker


async def test_what_only_the_worker_needs_is_at_the_entry() -> None:
    mux = Mux()

    def harmless(error: BaseException) -> bool:
        return not isinstance(error, KeyError)

    policy = fixed(3)
    mux.task("fixed", retry_delay=7, is_failure=harmless)(first)
    mux.task("policy", retry_delay=policy, executor="process")(second)
    mux.handle("img:", answering("x"), retry_delay=2)
    routes = mux.compile(in_place)
    by_number, by_policy = routes.find("fixed"), routes.find("policy")
    assert by_number.retry_delay is not None
    assert by_number.retry_delay(0, KeyError(), Task("t")) == 7
    assert (by_number.is_failure, by_number.kind) == (harmless, "thread")
    assert (by_policy.retry_delay, by_policy.kind) == (policy, "process")
    assert (by_policy.is_failure, routes.find("nowhere").retry_delay) == (None, None)
    assert routes.find("img:1").retry_delay is not None


async def test_a_plain_function_runs_where_the_server_says() -> None:
    mux = Mux()
    asked: list[tuple[Entry, tuple[Any, ...]]] = []

    @mux.task("t")
    def plain(payload: Row, ctx: Context) -> int:
        return payload.n

    async def elsewhere(entry: Entry, arguments: tuple[Any, ...]) -> Any:
        asked.append((entry, arguments))
        return entry.function(*arguments)

    entry = mux.compile(elsewhere).find("t")
    ctx: Context[Any] = Context(MemoryRun())
    assert await entry.call(b'{"n":2}', ctx) == 2
    assert asked == [(entry, (Row(n=2), ctx))]
    assert entry.arguments(b'{"n":3}', ctx) == (Row(n=3), ctx)


# Middleware


def tracing(trace: list[str], name: str) -> Any:
    async def middleware(task: Task[Any], ctx: Context, call_next: Next) -> Any:
        trace.append(f"{name} in")
        try:
            return await call_next(task, ctx)
        finally:
            trace.append(f"{name} out")

    return middleware


async def test_middleware_wraps_in_the_order_of_registration() -> None:
    mux, part, trace = Mux(), Mux(), list[str]()
    mux.include(part)
    part.use(tracing(trace, "part"))
    mux.use(tracing(trace, "outer"))
    mux.use(tracing(trace, "inner"))
    mux.task("t")(answering("t"))
    part.task("p")(answering("p"))
    assert await run(mux, "t") == "t"
    assert trace == ["outer in", "inner in", "inner out", "outer out"]
    trace.clear()
    assert await run(mux, "p") == "p"
    assert trace[:3] == ["outer in", "inner in", "part in"]


async def test_middleware_sees_unknown_types_and_payloads_that_do_not_validate() -> None:
    mux = Mux()
    seen: list[str] = []

    @mux.use
    async def watch(task: Task[Any], ctx: Context, call_next: Next) -> Any:
        try:
            return await call_next(task, ctx)
        except AsyncqError as error:
            seen.append(f"{task.type}: {type(error).__name__}")
            raise

    @mux.task("t")
    async def typed(payload: Row) -> None: ...

    with pytest.raises(HandlerNotFoundError):
        await run(mux, "nowhere")
    with pytest.raises(InvalidPayloadError):
        await run(mux, "t", b"{}")
    assert seen == ["nowhere: HandlerNotFoundError", "t: InvalidPayloadError"]


async def test_middleware_can_change_the_task_and_the_result_or_answer_itself() -> None:
    mux = Mux()

    @mux.use
    async def double(task: Task[Any], ctx: Context, call_next: Next) -> Any:
        if task.payload is None:
            return "refused"
        return await call_next(Task(task.type, {"n": 21}), ctx) * 2

    @mux.task("async")
    async def by_loop(payload: Row) -> int:
        return payload.n

    @mux.task("thread")
    def by_thread(payload: Row) -> int:
        return payload.n

    @mux.task("task")
    async def by_task(task: Task[Any]) -> int:
        return len(task.payload or b"")

    @mux.task("task thread")
    def by_task_in_thread(task: Task[Any], ctx: Context) -> int:
        return len(task.payload or b"")

    results = [await run(mux, t, b'{"n":1}') for t in ("async", "thread", "task", "task thread")]
    assert results == [42, 42, 16, 16]
    assert await run(mux, "async") == "refused"


async def test_without_middleware_nothing_stands_between_server_and_handler() -> None:
    mux = Mux()

    @mux.task("t")
    async def raw(payload: bytes, ctx: Context) -> None: ...

    assert mux.compile(in_place).find("t").call is raw.function


# The client


async def test_bind_reaches_every_handler_whenever_it_comes() -> None:
    mux, part, late = Mux(), Mux(), Mux()
    early = mux.task("early")(answering("x"))
    included = part.task("included")(answering("x"))
    mux.include(part)
    client = Recorder()
    mux.bind(client)
    afterwards = part.task("afterwards")(answering("x"))
    in_late_part = late.task("late")(answering("x"))
    mux.include(late)
    for handler in (early, included, afterwards, in_late_part):
        await handler.enqueue()
    sent = [task.type for _, task in client.calls]
    assert sent == ["early", "included", "afterwards", "late"]


async def test_an_unbound_handler_says_how_to_bind_it() -> None:
    with pytest.raises(AsyncqError, match=r"mux\.bind\(client\)"):
        await Mux().task("t")(answering("x")).enqueue()


# The lifespan


def lifespan(trace: list[str], name: str) -> Any:
    @asynccontextmanager
    async def around(mux: Mux[str]) -> AsyncGenerator[str, None]:
        trace.append(f"{name} up")
        yield name
        trace.append(f"{name} down")

    return around


async def test_lifespans_nest_and_each_handler_sees_the_nearest_state() -> None:
    trace: list[str] = []
    mux, own, inherits = Mux(lifespan=lifespan(trace, "mux")), Mux(), Mux()
    own = Mux(lifespan=lifespan(trace, "own"))
    mux.include(own)
    own.include(inherits)
    plain = Mux()
    mux.include(plain)
    for name, part in {"mux": mux, "own": own, "inherits": inherits, "plain": plain}.items():
        part.task(name)(answering(name))
    mux.handle("pattern", answering("pattern"))
    routes = mux.compile(in_place)
    assert routes.find("mux").state is None
    async with routes.lifespan_context():
        types = ("mux", "own", "inherits", "plain", "pattern", "nowhere")
        states = [routes.find(name).state for name in types]
        assert states == ["mux", "own", "own", "mux", "mux", "mux"]
    assert trace == ["mux up", "own up", "own down", "mux down"]


async def test_a_lifespan_that_fails_takes_the_outer_ones_down() -> None:
    trace: list[str] = []

    @asynccontextmanager
    async def broken(mux: Mux[Any]) -> AsyncGenerator[None, None]:
        raise RuntimeError("no database")
        yield

    mux = Mux(lifespan=lifespan(trace, "mux"))
    mux.include(Mux(lifespan=broken))
    with pytest.raises(RuntimeError, match="no database"):
        async with mux.lifespan_context():
            raise AssertionError
    assert trace == ["mux up"]


async def test_a_lifespan_is_given_its_mux() -> None:
    given: list[Mux[Any]] = []

    @asynccontextmanager
    async def around(mux: Mux[Any]) -> AsyncGenerator[None, None]:
        given.append(mux)
        yield

    mux = Mux(lifespan=around)
    async with mux.lifespan_context() as states:
        assert states == {mux: None}
    assert given == [mux]
