"""A router for tasks: registers handlers and middleware, and finds the handler of a task type."""

from __future__ import annotations

import inspect
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import (
    Any,
    Concatenate,
    Generic,
    Literal,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypeAlias,
    Unpack,
    cast,
    overload,
)

from typing_extensions import TypeVar

from asyncq.context import Context
from asyncq.errors import HandlerNotFoundError, OptionError
from asyncq.handler import (
    FOR_HANDLER,
    FOR_RUN,
    Call,
    Entry,
    Handler,
    HandlerOptions,
    Next,
    RunOptions,
    RunSync,
    Signature,
    name_of,
)
from asyncq.options import FOR_TYPE, TypeOptions, check_options, merge_options
from asyncq.task import Enqueuer, Task, TaskType

__all__ = ["Entry", "Handler", "Middleware", "Mux", "Next", "Register", "RegisterFor", "Routes"]

P = TypeVar("P")
R = TypeVar("R")
S = TypeVar("S", default=Any)
C = TypeVar("C", bound=Context[Any])
A = ParamSpec("A")
Coro: TypeAlias = Coroutine[Any, Any, R]

Middleware: TypeAlias = Callable[[Task[Any], Context[Any], Next], Awaitable[Any]]
"""`async def (task, ctx, call_next)`: its result is the task's; `call_next(task, ctx)` goes on."""
M = TypeVar("M", bound=Middleware)
F = TypeVar("F", bound=Callable[..., Any])

AnyHandler: TypeAlias = Handler[Any, Any, ..., Any]

_RouteKind: TypeAlias = Literal["task type", "pattern", "fallback"]
_CACHED_PREFIX_TYPES = 1024  # types come from outside: what is remembered of them has a limit


class Register(Protocol):
    """What `mux.task("name")` returns: the decorator of a handler, which declares the type."""

    @overload
    def __call__(self, f: Callable[[], Coro[R]], /) -> Handler[None, R, [], Coro[R]]: ...
    @overload
    def __call__(self, f: Callable[[], R], /) -> Handler[None, R, [], R]: ...
    @overload
    def __call__(self, f: Callable[[C], Coro[R]], /) -> Handler[None, R, [C], Coro[R]]: ...
    @overload
    def __call__(self, f: Callable[[C], R], /) -> Handler[None, R, [C], R]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[P, A], Coro[R]], /
    ) -> Handler[P, R, Concatenate[P, A], Coro[R]]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[P, A], R], /
    ) -> Handler[P, R, Concatenate[P, A], R]: ...


class RegisterFor(Protocol[P, R]):
    """What `mux.task(TASK_TYPE)` returns: the decorator of a handler that fits the type."""

    @overload
    def __call__(
        self: RegisterFor[None, R], f: Callable[[], Coro[R]], /
    ) -> Handler[None, R, [], Coro[R]]: ...
    @overload
    def __call__(self: RegisterFor[None, R], f: Callable[[], R], /) -> Handler[None, R, [], R]: ...
    @overload
    def __call__(
        self: RegisterFor[None, R], f: Callable[[C], Coro[R]], /
    ) -> Handler[None, R, [C], Coro[R]]: ...
    @overload
    def __call__(
        self: RegisterFor[None, R], f: Callable[[C], R], /
    ) -> Handler[None, R, [C], R]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[P, A], Coro[R]], /
    ) -> Handler[P, R, Concatenate[P, A], Coro[R]]: ...
    @overload
    def __call__(
        self, f: Callable[Concatenate[P, A], R], /
    ) -> Handler[P, R, Concatenate[P, A], R]: ...


class Mux(Generic[S]):
    """A router for tasks; also a part of one, to be joined by `include`.

    `prefix` goes before the names and patterns registered here, `defaults` are options for the
    types declared here. `lifespan` is an async context manager function as in Starlette: it runs
    around the server's work, and what it yields is `ctx.state`.
    """

    def __init__(
        self,
        *,
        prefix: str = "",
        lifespan: Callable[[Mux[S]], AbstractAsyncContextManager[S]] | None = None,
        **defaults: Unpack[TypeOptions],
    ) -> None:
        self.prefix = prefix
        self._lifespan = lifespan
        self._defaults = check_options(defaults, FOR_TYPE, "Mux")
        self._types: dict[str, AnyHandler] = {}
        self._patterns: dict[str, AnyHandler] = {}
        self._not_found: AnyHandler | None = None
        self._middleware: list[Middleware] = []
        self._parts: list[Mux[Any]] = []
        self._client: Enqueuer | None = None

    @overload
    def task(self, type: str, /, **options: Unpack[HandlerOptions]) -> Register: ...
    @overload
    def task(self, type: TaskType[P, R], /, **options: Unpack[RunOptions]) -> RegisterFor[P, R]: ...
    def task(self, type: Any, /, **options: Any) -> Any:
        """Register the decorated function as the handler of a type: a name, or a TaskType.

        The annotation of its first parameter is the type of the payload (`bytes`: raw, `Task`:
        the whole task); a parameter annotated `Context` gets the context.

        Raises:
            TypeError: an option is unknown or not for this place, or the function cannot be a
                handler.
            OptionError: the value of an option makes no sense.
            ValueError: the type already has a handler.
        """
        declared: Any = type
        type_options: dict[str, Any] = {}
        if isinstance(type, str):
            if not type.strip():
                raise OptionError("task typename cannot be empty")
            checked = check_options(options, FOR_HANDLER, f"@mux.task({type!r})")
            run_options = {name: checked.pop(name) for name in FOR_RUN & checked.keys()}
            type_options = merge_options(self._defaults, checked)
        elif isinstance(type, TaskType):
            run_options = check_options(options, FOR_RUN, f"@mux.task({type.name!r})")
        else:
            raise TypeError(
                '@mux.task takes the name of a type or a TaskType, as in @mux.task("name"), '
                f"not {type!r}"
            )

        def register(function: Callable[..., Any]) -> AnyHandler:
            function = _function_of(function)
            signature = Signature.read(function, _caller_names())
            contract = declared
            if isinstance(declared, str):
                contract = _task_type(self.prefix + declared, signature, type_options)
            handler: AnyHandler = Handler(contract, function, signature, run_options)
            self._register("task type", handler)
            return handler

        return register

    def handle(
        self, pattern: str, handler: Callable[..., Any], /, **options: Unpack[RunOptions]
    ) -> None:
        """Register a handler for every type that starts with `pattern` and has no own handler.

        The longest pattern wins, as in Asynq.

        Raises:
            TypeError: an option is unknown, or the function cannot be a handler.
            OptionError: the pattern is blank, or the value of an option makes no sense.
            ValueError: the pattern already has a handler.
        """
        if not pattern.strip():
            raise OptionError("a blank pattern would match every task: use mux.not_found(handler)")
        run_options = check_options(options, FOR_RUN, f"mux.handle({pattern!r})")
        added = _untyped(self.prefix + pattern, handler, run_options, _caller_names())
        self._register("pattern", added)

    def not_found(self, handler: F) -> F:
        """Register the handler of all types that no other handler takes; usable as a decorator.

        Without one such a task fails with HandlerNotFoundError, and is retried. In a part it
        stands for the types that start with the part's prefix.

        Raises:
            TypeError: the function cannot be a handler.
            ValueError: there is one already.
        """
        added = _untyped("not_found", handler, {}, _caller_names())
        if self._not_found is not None:
            raise ValueError(
                f"this mux has two not_found handlers: {name_of(self._not_found.function)} and "
                f"{name_of(added.function)}"
            )
        self._not_found = added
        return handler

    def use(self, middleware: M) -> M:
        """Wrap every handler here and in included parts; usable as a decorator.

        The first registered is the outermost. A middleware sees tasks of unknown types, too.
        """
        self._middleware.append(middleware)
        return middleware

    def include(self, other: Mux[Any]) -> None:
        """Join a part: its handlers become reachable, those registered later as well.

        Its middleware wraps its own handlers, inside this mux's; its lifespan runs inside this
        one's, and without one its handlers see this one's state. Prefixes do not add up, since a
        handler's name is fixed where it is declared.

        Raises:
            ValueError: the part is included already, includes this mux, registers a type that is
                registered here, or does not have this mux's prefix.
        """
        if not other.prefix.startswith(self.prefix):
            raise ValueError(
                f"a mux with the prefix {self.prefix!r} cannot include one with the prefix "
                f"{other.prefix!r}: prefixes do not add up, write "
                f"Mux(prefix={self.prefix + other.prefix!r})"
            )
        if not set(self._tree()).isdisjoint(other._tree()):
            raise ValueError("a mux can be included only once, and never in itself")
        self._parts.append(other)
        try:
            self._check()
        except ValueError:
            self._parts.pop()
            raise
        if self._client is not None:
            other.bind(self._client)

    @property
    def client(self) -> Enqueuer | None:
        """The client that `bind` gave."""
        return self._client

    def bind(self, client: Enqueuer | None) -> None:
        """Let `enqueue` of every handler use this client, included and later ones too.

        A worker binds its own while it runs, unless another is bound. `None` takes it away.
        """
        self._client = client
        for handler in self._types.values():
            handler.bind(client)
        for part in self._parts:
            part.bind(client)

    @property
    def types(self) -> Mapping[str, AnyHandler]:
        """The handlers by the name of their type, those of included parts too."""
        return {r.name: r.handler for r in self._routes() if r.kind == "task type"}

    def compile(self, run_sync: RunSync) -> Routes:
        """Build what a server looks handlers up in; what is registered later is not in it.

        `run_sync(entry, arguments)` runs a plain function in its thread or process.

        Raises:
            ValueError: two parts register the same type or pattern.
        """
        self._check()
        return Routes(self, self._routes(), run_sync)

    @asynccontextmanager
    async def lifespan_context(self) -> AsyncGenerator[Mapping[Mux[Any], Any]]:
        """Run all lifespans, a part's inside its parent's; gives the state that each part sees."""
        states: dict[Mux[Any], Any] = {}
        async with AsyncExitStack() as stack:
            await self._enter(stack, None, states)
            yield states

    async def _enter(
        self, stack: AsyncExitStack, inherited: Any, states: dict[Mux[Any], Any]
    ) -> None:
        state = inherited
        if self._lifespan is not None:
            state = await stack.enter_async_context(self._lifespan(self))
        states[self] = state
        for part in self._parts:
            await part._enter(stack, state, states)

    def _tree(self) -> Iterator[Mux[Any]]:
        yield self
        for part in self._parts:
            yield from part._tree()

    def _routes(self, outer: tuple[Middleware, ...] = (), depth: int = 0) -> Iterator[_Route]:
        middleware = (*outer, *self._middleware)
        for name, handler in self._types.items():
            yield _Route("task type", name, handler, middleware, self)
        for name, handler in self._patterns.items():
            yield _Route("pattern", name, handler, middleware, self)
        if self._not_found is not None:
            prefix = self.prefix if depth else ""
            yield _Route("fallback", prefix, self._not_found, middleware, self)
        elif not depth:
            yield _Route("fallback", "", _NOT_FOUND, middleware, self)
        for part in self._parts:
            yield from part._routes(middleware, depth + 1)

    def _check(self, added: _Route | None = None) -> None:
        """Refuse what has two handlers, also in parts that got theirs after they were included."""
        routes = self._routes() if added is None else (*self._routes(), added)
        found: dict[tuple[str, str], AnyHandler] = {}
        for route in routes:
            key = route.kind, route.name
            if key in found:
                raise ValueError(
                    f"{route.kind} {route.name!r} is registered twice: by "
                    f"{name_of(found[key].function)} and {name_of(route.handler.function)}"
                )
            found[key] = route.handler

    def _register(self, kind: _RouteKind, handler: AnyHandler) -> None:
        self._check(_Route(kind, handler.name, handler, (), self))
        (self._types if kind == "task type" else self._patterns)[handler.name] = handler
        if self._client is not None:
            handler.bind(self._client)


class _Route(NamedTuple):
    """One registration: which handler takes what, behind which middleware."""

    kind: _RouteKind
    name: str
    """A type, a pattern, or the prefix that a fallback stands for."""
    handler: AnyHandler
    middleware: tuple[Middleware, ...]
    part: Mux[Any]


class Routes:
    """The handlers of a mux as a server finds and runs them, middleware composed once."""

    def __init__(self, mux: Mux[Any], routes: Iterable[_Route], run_sync: RunSync) -> None:
        self._mux = mux
        self._exact: dict[str, Entry] = {}
        self._prefixes: list[tuple[str, Entry]] = []
        self._by_prefix: dict[str, Entry] = {}  # what a search found before
        self._parts: list[tuple[Mux[Any], Entry]] = []
        for route in routes:
            entry = Entry(route.handler, run_sync)
            if route.middleware:
                entry.call = _through(route.middleware, entry.invoke)
            if route.kind == "task type":
                self._exact[route.name] = entry
            else:
                self._prefixes.append((route.name, entry))
            self._parts.append((route.part, entry))
        # Stable: a pattern comes before the fallback of the same prefix.
        self._prefixes.sort(key=lambda item: len(item[0]), reverse=True)

    @property
    def types(self) -> tuple[str, ...]:
        """The names of the types that have a handler of their own, sorted."""
        return tuple(sorted(self._exact))

    def find(self, task_type: str) -> Entry:
        """Return the entry of a type: its own, else that of the longest pattern, else not found.

        Never raises: what is returned for an unknown type raises HandlerNotFoundError when called.
        """
        return self._exact.get(task_type) or self._find_by_prefix(task_type)

    @asynccontextmanager
    async def lifespan_context(self) -> AsyncGenerator[None]:
        """Run the lifespans of the mux and its parts; each entry's `state` is then what it sees."""
        async with self._mux.lifespan_context() as states:
            for part, entry in self._parts:
                entry.state = states.get(part)
            yield

    def _find_by_prefix(self, task_type: str) -> Entry:
        entry = self._by_prefix.get(task_type)
        if entry is None:
            entry = next(e for prefix, e in self._prefixes if task_type.startswith(prefix))
            if len(self._by_prefix) >= _CACHED_PREFIX_TYPES:
                self._by_prefix.clear()
            self._by_prefix[task_type] = entry
        return entry


def _through(middleware: tuple[Middleware, ...], innermost: Next) -> Call:
    following = innermost
    for one in reversed(middleware):
        following = _wrap(one, following)
    first = following
    return lambda raw, ctx: first(ctx.task, ctx)


def _wrap(middleware: Middleware, following: Next) -> Next:
    return lambda task, ctx: middleware(task, ctx, following)


def _task_type(
    name: str, signature: Signature, options: Mapping[str, Any] | None = None
) -> TaskType[Any, Any]:
    # The overloads tell types apart that are only known at run time here.
    made: TaskType[Any, Any] = cast(Any, TaskType)(
        name, signature.payload, result=signature.result, **(options or {})
    )
    return made


def _untyped(
    name: str,
    function: Callable[..., Any],
    run_options: Mapping[str, Any],
    local_names: Mapping[str, Any],
) -> AnyHandler:
    """Make a handler that is not the handler of one type."""
    function = _function_of(function)
    signature = Signature.read(function, local_names)
    return Handler(_task_type(name, signature), function, signature, run_options)


def _function_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return cast(AnyHandler, function).function if isinstance(function, Handler) else function


def _caller_names() -> Mapping[str, Any]:
    """Return the local names where our caller was called: annotations may use them."""
    frame = inspect.currentframe()
    caller = frame and frame.f_back and frame.f_back.f_back
    return caller.f_locals if caller else {}


async def _handler_not_found(ctx: Context[Any]) -> None:
    raise HandlerNotFoundError(ctx.task_type)


_NOT_FOUND = _untyped("not_found", _handler_not_found, {}, {})
