"""A handler function: what its signature asks for, and how it is called with a stored payload."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import (
    Any,
    Generic,
    Literal,
    Never,
    NoReturn,
    ParamSpec,
    TypeAlias,
    TypedDict,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from typing_extensions import TypeVar

from asyncq.clock import Seconds
from asyncq.context import Context
from asyncq.errors import InvalidPayloadError, PayloadError
from asyncq.options import TypeOptions
from asyncq.retry import RetryDelay, delay_policy
from asyncq.task import Task, TaskType, codec_of

__all__ = [
    "FOR_HANDLER",
    "FOR_RUN",
    "Call",
    "Entry",
    "Handler",
    "HandlerOptions",
    "Kind",
    "Next",
    "RunOptions",
    "RunSync",
    "Signature",
    "name_of",
]

P = TypeVar("P")
R = TypeVar("R")
A = ParamSpec("A")
Out = TypeVar("Out")

Kind: TypeAlias = Literal["async", "thread", "process"]
Call: TypeAlias = Callable[[bytes, Context[Any]], Awaitable[Any]]
"""(the payload as stored, the context) -> the result."""
Next: TypeAlias = Callable[[Task[Any], Context[Any]], Awaitable[Any]]
"""What a middleware calls to go on: the next middleware, or the handler."""

_NOTHING = inspect.Parameter.empty


class RunOptions(TypedDict, total=False):
    """What only the worker needs to know of a type."""

    executor: Literal["thread", "process"]
    retry_delay: Seconds | Callable[[int, BaseException, Task], Seconds]
    is_failure: Callable[[BaseException], bool]


class HandlerOptions(TypeOptions, RunOptions, total=False):
    """What `@mux.task("name")` takes: it declares the type and its handler in one."""


FOR_RUN = frozenset(RunOptions.__optional_keys__)
FOR_HANDLER = frozenset(HandlerOptions.__optional_keys__)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a handler function takes and gives, read once from its annotations."""

    takes: Literal["nothing", "payload", "bytes", "task"]
    payload: Any
    """The annotation of the payload; None: it takes none."""
    wants_context: bool
    result: Any
    """The annotation of the result; None: it has none."""
    is_async: bool

    @classmethod
    def read(cls, function: Callable[..., Any], local_names: Mapping[str, Any]) -> Signature:
        """Read a function; `local_names` are those where it was decorated.

        Raises:
            TypeError: it cannot be called with a payload and a context, and why.
        """
        name = name_of(function)
        if _is_generator(function):
            raise TypeError(f"handler {name} is a generator: a handler returns its result")
        hints = _hints_of(function, local_names, name)
        positional = _positional(function, name)
        result = _result_of(hints.get("return"))
        _check_type(result, name, "result")
        is_async = inspect.iscoroutinefunction(_plain(function))

        first = positional[0] if positional else None
        if first is None or _is_context(hints.get(first.name)):
            _refuse_more(positional[1:], hints, name)
            return cls("nothing", None, first is not None, result, is_async)
        if first.name not in hints:
            raise TypeError(
                f"handler {name} does not say what {first.name!r} is: annotate it with a type of "
                "the payload (a pydantic model, dict, Any, ...), bytes, Task or Context"
            )
        payload = hints[first.name]
        takes = _takes(payload)
        if takes == "payload":
            _check_type(payload, name, "payload")
        second = positional[1] if len(positional) > 1 else None
        wants_context = second is not None and (
            _is_context(hints.get(second.name))
            or (second.name not in hints and second.default is _NOTHING)
        )
        _refuse_more(positional[2 if wants_context else 1 :], hints, name)
        return cls(takes, payload, wants_context, result, is_async)


class Handler(TaskType[P, R], Generic[P, R, A, Out]):
    """A registered handler: still the function it was, and the type of its tasks."""

    __name__: str

    def __init__(
        self,
        contract: TaskType[P, R],
        function: Callable[A, Out],
        signature: Signature,
        run_options: Mapping[str, Any],
    ) -> None:
        name = name_of(function)
        _check_contract(contract, signature, name)
        functools.update_wrapper(self, function)
        cast(Any, super()).__init__(
            contract.name, contract.payload, result=contract.result, **contract.options
        )
        self.function = function
        self.signature = signature
        self.run_options = run_options
        self.kind = _kind(function, signature, run_options, name)

    def __call__(self, *args: A.args, **kwargs: A.kwargs) -> Out:
        """Call the function itself, as a unit test does."""
        return self.function(*args, **kwargs)


def _kind(
    function: Callable[..., Any], signature: Signature, run_options: Mapping[str, Any], name: str
) -> Kind:
    executor: Literal["thread", "process"] | None = run_options.get("executor")
    if not signature.is_async:
        if executor == "process":
            _check_importable(function, name)
        return executor or "thread"
    if executor is not None:
        raise TypeError(
            f"handler {name} is async and runs on the event loop: executor is for plain functions"
        )
    return "async"


RunSync: TypeAlias = "Callable[[Entry, tuple[Any, ...]], Awaitable[Any]]"
"""Runs `entry.function(*arguments)` outside the event loop, as `entry.kind` says."""


class Entry:
    """One handler as the server runs it."""

    __slots__ = (
        "arguments",
        "call",
        "function",
        "handler",
        "invoke",
        "is_failure",
        "kind",
        "result_codec",
        "retry_delay",
        "state",
    )

    call: Call
    """Decode the payload and run the handler, middleware included.

    Raises:
        InvalidPayloadError: the payload does not validate.
    """

    invoke: Next
    """The handler without middleware, on a task that a middleware may have changed."""

    arguments: Callable[[bytes, Context[Any]], tuple[Any, ...]]
    """Decode the payload into the arguments of `function`.

    Raises:
        InvalidPayloadError: the payload does not validate.
    """

    def __init__(self, handler: Handler[Any, Any, ..., Any], run_sync: RunSync) -> None:
        self.handler = handler
        self.kind = handler.kind
        self.function = handler.function
        self.result_codec = handler.result_codec
        delay = handler.run_options.get("retry_delay")
        self.retry_delay: RetryDelay | None = None if delay is None else delay_policy(delay)
        self.is_failure: Callable[[BaseException], bool] | None = handler.run_options.get(
            "is_failure"
        )
        self.state: Any = None
        """What the lifespan yielded; set while it runs."""
        signature = handler.signature
        decode = _decoder(signature)
        self.arguments = _caller(_pack, signature, decode)
        run = self.function if self.kind == "async" else self._outside(run_sync)
        self.call = _caller(run, signature, decode)
        self.invoke = _invoker(run, signature, self.call)

    def _outside(self, run_sync: RunSync) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def run(*arguments: Any) -> Any:
            result = await run_sync(self, arguments)
            # A plain wrapper around an async function gives a coroutine: it belongs on the loop.
            return await result if inspect.iscoroutine(result) else result

        return run

    def __repr__(self) -> str:
        return f"<Entry {self.handler.name!r}: {name_of(self.function)}>"


def _decoder(signature: Signature) -> Callable[[bytes], Any]:
    codec = codec_of(signature.payload) if signature.takes == "payload" else None
    if codec is None:
        return bytes
    decode = codec.decode

    def read(raw: bytes) -> Any:
        try:
            return decode(raw)
        except PayloadError as error:
            raise InvalidPayloadError(str(error)) from None

    return read


# Calling a function with a stored payload: one closure for each signature, made once, since
# this is the path of every task.


def _caller(
    run: Callable[..., Out], signature: Signature, decode: Callable[[bytes], Any]
) -> Callable[[bytes, Context[Any]], Out]:
    """Return `run` as a function of (stored payload, context)."""
    if signature.wants_context:
        match signature.takes:
            case "nothing":
                return lambda raw, ctx: run(ctx)
            case "bytes":
                return run
            case "task":
                return lambda raw, ctx: run(ctx.task, ctx)
            case "payload":
                return lambda raw, ctx: run(decode(raw), ctx)
    match signature.takes:
        case "nothing":
            return lambda raw, ctx: run()
        case "bytes":
            return lambda raw, ctx: run(raw)
        case "task":
            return lambda raw, ctx: run(ctx.task)
        case "payload":
            return lambda raw, ctx: run(decode(raw))


def _invoker(run: Callable[..., Awaitable[Any]], signature: Signature, call: Call) -> Next:
    """Return `run` as a function of (task, context)."""
    if signature.takes != "task":
        return lambda task, ctx: call(task.payload or b"", ctx)
    return run if signature.wants_context else (lambda task, ctx: run(task))


def _pack(*arguments: Any) -> tuple[Any, ...]:
    return arguments


# Reading a signature


def name_of(function: Callable[..., Any]) -> str:
    """Return what messages call a function: `module.qualified_name`."""
    inner = _unwrap_partial(function)
    qualname: str = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return f"{inner.__module__}.{qualname}"


def _unwrap_partial(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that does the work of a partial or of a callable object."""
    inner = _unwrap_partial(function)
    return inner if inspect.isroutine(inner) else type(inner).__call__


def _hints_of(
    function: Callable[..., Any], local_names: Mapping[str, Any], name: str
) -> dict[str, Any]:
    plain = _plain(function)
    # The names of the decorating function are this handler's own only if it was defined there.
    is_local = "<locals>" in getattr(plain, "__qualname__", "")
    try:
        return get_type_hints(
            plain, localns=dict(local_names) if is_local else None, include_extras=True
        )
    except Exception as error:
        raise TypeError(
            f"the annotations of handler {name} cannot be resolved ({error}): the types of its "
            "payload and result must be importable at run time, not only under TYPE_CHECKING"
        ) from error


def _positional(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is _NOTHING:
            raise TypeError(
                f"handler {name} requires the keyword {parameter.name!r}: a handler is called "
                "with its payload and its context by position"
            )
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _refuse_more(rest: list[inspect.Parameter], hints: Mapping[str, Any], name: str) -> None:
    for parameter in rest:
        if parameter.default is not _NOTHING:
            continue
        hint = hints.get(parameter.name)
        advice = (
            "the payload comes first, the context second"
            if _is_context(hint) or len(rest) == 1
            else "put what else it needs into the payload, or into the state of the lifespan"
        )
        raise TypeError(
            f"handler {name} requires {parameter.name!r}, but a handler is called with a payload "
            f"and a Context, each optional: {advice}"
        )


def _is_context(hint: Any) -> bool:
    if get_origin(hint) in (Union, UnionType):
        return any(_is_context(arm) for arm in get_args(hint))
    cls = get_origin(hint) or hint
    return isinstance(cls, type) and issubclass(cls, Context)


def _takes(payload: Any) -> Literal["payload", "bytes", "task"]:
    if payload is bytes:
        return "bytes"
    return "task" if (get_origin(payload) or payload) is Task else "payload"


def _result_of(hint: Any) -> Any:
    if hint in (NoReturn, Never):
        return None
    # A plain function that hands on a coroutine: the result is what that gives.
    return get_args(hint)[-1] if get_origin(hint) in (Awaitable, Coroutine) else hint


def _is_generator(function: Callable[..., Any]) -> bool:
    plain = _plain(function)
    return inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain)


def _check_type(hint: Any, name: str, what: str) -> None:
    try:
        codec_of(None if hint is type(None) else hint)
    except TypeError as error:
        raise TypeError(f"the {what} of handler {name}: {error}") from error


def _check_contract(contract: TaskType[Any, Any], signature: Signature, name: str) -> None:
    """Refuse a handler that cannot take what a TaskType sends; the type checker sees more."""
    if signature.takes != "payload":
        return
    if contract.payload is None:
        raise TypeError(
            f"handler {name} takes a payload, but tasks of type {contract.name!r} have none"
        )
    ours, theirs = signature.payload, contract.payload
    if _is_plain_class(ours) and _is_plain_class(theirs) and not _fits(theirs, ours):
        raise TypeError(
            f"handler {name} takes {ours.__name__}, but tasks of type {contract.name!r} carry "
            f"{theirs.__name__}"
        )


def _is_plain_class(hint: Any) -> bool:
    # Any is a class to Python 3.11; a TypedDict fits every other of the same keys.
    return hint is not Any and inspect.isclass(hint) and not is_typeddict(hint)


def _fits(given: type, wanted: type) -> bool:
    return wanted in given.__mro__ or given in wanted.__mro__ or (given, wanted) == (int, float)


def _check_importable(function: Callable[..., Any], name: str) -> None:
    if not inspect.isfunction(function) or "<" in function.__qualname__:
        raise TypeError(
            f"handler {name} cannot run in another process, which imports it by its name: "
            'executor="process" needs a function at the top of a module'
        )
