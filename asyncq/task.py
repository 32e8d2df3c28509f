"""What a caller holds: tasks, task types, and handles of what was enqueued."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import (
    Any,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    TypeAlias,
    Unpack,
    cast,
    get_origin,
    overload,
)

from pydantic import TypeAdapter
from typing_extensions import TypeVar

from asyncq.clock import Seconds, seconds
from asyncq.errors import AsyncqError
from asyncq.options import (
    DEFAULT_PLAN,
    DEFAULT_QUEUE,
    FOR_TASK,
    FOR_TYPE,
    Plan,
    TaskOptions,
    TypeOptions,
    check_options,
    check_type_name,
    merge_options,
    resolve,
)
from asyncq.payload import Codec, encode

P = TypeVar("P")
Q = TypeVar("Q")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True, default=Any)

Shape: TypeAlias = type[R] | TypeAdapter[R]
"""How a type is named at run time: a class, or a TypeAdapter for unions, Annotated and the like."""


class Task(Generic[T_co]):
    """A unit of work: a type name, a payload and options. Immutable, and free to be enqueued again.

    The payload is encoded at once: bytes as they are, None as a nil payload, anything else as
    JSON. `result` names the type that `handle.result()` gives (default: whatever the JSON holds).

    Raises:
        TypeError: an option is unknown.
        OptionError: the type is blank, or the value of an option makes no sense.
        PayloadError: the payload cannot be written as JSON.
    """

    __slots__ = ("_options", "_payload", "_plan", "_result_codec", "_type")

    _type: str
    _payload: bytes | None
    _options: Mapping[str, Any]
    _plan: Plan | None
    _result_codec: Codec[Any] | None

    @overload
    def __init__(
        self: Task[Any], type: str, payload: object = None, **options: Unpack[TaskOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: Task[R],
        type: str,
        payload: object = None,
        *,
        result: Shape[R],
        **options: Unpack[TaskOptions],
    ) -> None: ...
    def __init__(
        self, type: str, payload: object = None, *, result: Any = None, **options: Any
    ) -> None:
        check_type_name(type)
        self._type = type
        self._payload = encode(payload)
        self._options = check_options(options, FOR_TASK, f"task {type!r}") if options else {}
        self._plan = None if options else DEFAULT_PLAN
        self._result_codec = codec_of(result)

    @classmethod
    def assemble(
        cls,
        type: str,
        payload: bytes | None,
        options: Mapping[str, Any],
        *,
        plan: Plan | None = None,
        result_codec: Codec[Any] | None = None,
    ) -> Task[Any]:
        """Make a task of parts that were checked before, or that come from a stored message."""
        task: Task[Any] = cls.__new__(cls)
        task._type = type
        task._payload = payload
        task._options = options
        task._plan = plan
        task._result_codec = result_codec
        return task

    @property
    def type(self) -> str:
        """The name that handlers are registered under."""
        return self._type

    @property
    def payload(self) -> bytes | None:
        """The encoded payload; None is nil, which Asynq tells apart from empty in unique locks."""
        return self._payload

    @property
    def options(self) -> Mapping[str, Any]:
        """The options as given, those of the task's type included."""
        return MappingProxyType(self._options)

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers among the options."""
        return MappingProxyType(self._options.get("headers", {}))

    @property
    def result_codec(self) -> Codec[Any] | None:
        """How a handle decodes the result; None: no type was declared."""
        return self._result_codec

    def with_options(self, **options: Unpack[TaskOptions]) -> Task[T_co]:
        """Return the same task with more options; they win over its own.

        Raises:
            TypeError: an option is unknown.
            OptionError: the value of an option makes no sense.
        """
        added = check_options(options, FOR_TASK, f"task {self._type!r}")
        return Task.assemble(
            self._type,
            self._payload,
            merge_options(self._options, added),
            result_codec=self._result_codec,
        )

    def plan(self, now: float, options: Mapping[str, Any] | None = None) -> Plan:
        """Merge the task's options with those of one `enqueue`; `now` is unix seconds.

        Raises:
            TypeError: an option is unknown.
            OptionError: the value of an option makes no sense.
        """
        if options:
            return resolve(self._options, check_options(options, FOR_TASK, "enqueue"), now=now)
        return self._plan or resolve(self._options, now=now)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Task):
            return NotImplemented
        return (
            self._type == other._type
            and self._payload == other._payload
            and self._options == other._options
        )

    def __hash__(self) -> int:
        return hash((self._type, self._payload))

    def __repr__(self) -> str:
        size = "nil" if self._payload is None else f"{len(self._payload)} bytes"
        return f"<Task {self._type!r} payload={size}>"


class TaskState(StrEnum):
    """Where a task stands; the values are Asynq's own."""

    ACTIVE = "active"
    PENDING = "pending"
    SCHEDULED = "scheduled"
    RETRY = "retry"
    ARCHIVED = "archived"
    COMPLETED = "completed"
    AGGREGATING = "aggregating"


class Progress(NamedTuple):
    """How far a handler said it was: a fraction of 0 to 1, and a note."""

    fraction: float
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """What Redis held of a task at one moment; instants are in UTC."""

    id: str
    queue: str
    type: str
    payload: bytes | None
    state: TaskState
    max_retry: int
    retried: int
    """Failures so far that counted."""
    last_error: str
    """Empty: it never failed."""
    last_failed_at: datetime | None
    timeout: timedelta | None
    deadline: datetime | None
    group: str | None
    next_process_at: datetime | None
    """When it is due; None in states that wait for nothing."""
    retention: timedelta
    """How long it is kept after success; zero: not at all."""
    completed_at: datetime | None
    result: bytes | None
    headers: Mapping[str, str]
    progress: Progress | None = None


class Enqueuer(Protocol):
    """What task types and handles need of a client."""

    async def enqueue(self, task: Task[R], /, **options: Unpack[TaskOptions]) -> TaskHandle[R]:
        """Put a task into its queue."""
        ...

    async def task_info(self, task_id: str, queue: str, /) -> TaskInfo:
        """Look a task up."""
        ...

    async def wait_result(self, task_id: str, queue: str, timeout_s: float | None, /) -> bytes:
        """Wait until a task has ended and return its result; empty: it had none."""
        ...

    async def cancel(self, task_id: str, queue: str, retry: bool, /) -> None:
        """Cancel a task; `retry` says what follows for one that is running."""
        ...


class Producer(Enqueuer, Protocol):
    """The client as a handler sees it in `ctx.client`."""

    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task[R]] | AsyncIterable[Task[R]],
        *,
        return_exceptions: Literal[False] = False,
    ) -> list[TaskHandle[R]]: ...
    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task[R]] | AsyncIterable[Task[R]],
        *,
        return_exceptions: Literal[True],
    ) -> list[TaskHandle[R] | AsyncqError]: ...

    @overload
    def handle(self, task_id: str, *, queue: str = DEFAULT_QUEUE) -> TaskHandle[Any]: ...
    @overload
    def handle(
        self, task_id: str, *, queue: str | None = None, of: TaskType[Any, R]
    ) -> TaskHandle[R]: ...


class TaskHandle(Generic[T_co]):
    """An enqueued task, known by its id and queue."""

    __slots__ = ("_client", "_codec", "id", "queue")

    id: str
    queue: str

    def __init__(
        self, id: str, queue: str, client: Enqueuer, codec: Codec[Any] | None = None
    ) -> None:
        self.id = id
        self.queue = queue
        self._client = client
        self._codec = codec

    async def info(self) -> TaskInfo:
        """Return what Redis holds of the task.

        Raises:
            TaskNotFoundError: it is not there any more.
            MalformedMessageError: another program has written what cannot be read.
        """
        return await self._client.task_info(self.id, self.queue)

    async def result(self, *, timeout: Seconds | None = None) -> T_co:
        """Wait until the task has ended and return its result; needs `retention` on the task.

        Raises:
            TimeoutError: it had not ended after `timeout` seconds (default: no limit).
            TaskFailedError: it was archived, revoked or cancelled.
            TaskNotFoundError: nothing of it is kept, so there is nothing to wait for.
            PayloadError: the result is not of the declared type.
        """
        timeout_s = None if timeout is None else seconds(timeout, "timeout")
        raw = await self._client.wait_result(self.id, self.queue, timeout_s)
        return cast(T_co, _decode_result(raw, self._codec))

    async def cancel(self, *, retry: bool = True) -> None:
        """Cancel the task: a running handler gets CancelledError.

        That counts as a failure and is retried; with `retry=False` the task is archived.
        """
        await self._client.cancel(self.id, self.queue, retry)

    def __repr__(self) -> str:
        return f"<TaskHandle {self.id!r} in {self.queue!r}>"


def _decode_result(raw: bytes, codec: Codec[Any] | None) -> Any:
    if codec is not None:
        return codec.decode(raw)
    if not raw:  # the handler returned None
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw


# The task type


class _Missing:
    """The payload that was not given; None is a payload."""


_MISSING = _Missing()


class TaskType(Generic[P, R]):
    """A contract between producer and worker: a name, a payload type, a result type, defaults.

    A module that both sides import holds it; the worker registers `@mux.task(WELCOME)`.

    Raises:
        TypeError: an option is unknown or belongs to one task, or a type cannot be JSON.
        OptionError: the name is blank, or the value of an option makes no sense.
    """

    @overload
    def __init__(
        self: TaskType[None, None], name: str, /, **options: Unpack[TypeOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: TaskType[Q, None], name: str, payload: Shape[Q], /, **options: Unpack[TypeOptions]
    ) -> None: ...
    @overload
    def __init__(
        self,
        name: str,
        payload: Shape[P],
        /,
        *,
        result: Shape[R],
        **options: Unpack[TypeOptions],
    ) -> None: ...
    def __init__(
        self, name: str, payload: Any = None, /, *, result: Any = None, **options: Any
    ) -> None:
        check_type_name(name)
        self.name = name
        self.payload = None if payload is type(None) else payload
        self.result = None if result is type(None) else result
        self.options: Mapping[str, Any] = MappingProxyType(
            check_options(options, FOR_TYPE, f"task type {name!r}")
        )
        self.plan = resolve(self.options, now=0.0)
        self.result_codec = codec_of(self.result)
        self._encode = _encoder_of(self.payload)
        self._client: Enqueuer | None = None

    @overload
    def new(self: TaskType[None, R], /, **options: Unpack[TaskOptions]) -> Task[R]: ...
    @overload
    def new(self, payload: P, /, **options: Unpack[TaskOptions]) -> Task[R]: ...
    def new(self, payload: Any = _MISSING, /, **options: Any) -> Task[Any]:
        """Make a task of this type.

        Raises:
            TypeError: an option is unknown, or the payload is missing or too much.
            OptionError: the value of an option makes no sense.
            PayloadError: the payload is not of the declared type.
        """
        if self._encode is None:
            if payload is not _MISSING:
                raise TypeError(f"task type {self.name!r} takes no payload: use .new()")
            data = None
        elif payload is _MISSING:
            raise TypeError(f"task type {self.name!r} takes a payload: use .new(payload)")
        else:
            data = self._encode(payload)
        if not options:
            return Task.assemble(
                self.name, data, self.options, plan=self.plan, result_codec=self.result_codec
            )
        own = check_options(options, FOR_TASK, f"task {self.name!r}")
        merged = merge_options(self.options, own)
        return Task.assemble(self.name, data, merged, result_codec=self.result_codec)

    @overload
    async def enqueue(
        self: TaskType[None, R], /, **options: Unpack[TaskOptions]
    ) -> TaskHandle[R]: ...
    @overload
    async def enqueue(self, payload: P, /, **options: Unpack[TaskOptions]) -> TaskHandle[R]: ...
    async def enqueue(self, payload: Any = _MISSING, /, **options: Any) -> TaskHandle[Any]:
        """Make a task and put it into its queue, through the client that `bind` gave.

        Raises:
            AsyncqError: no client is bound; and whatever `new` and `Client.enqueue` raise.
        """
        return await self.client.enqueue(cast(Any, self).new(payload, **options))

    def bind(self, client: Enqueuer | None) -> None:
        """Let `enqueue` use this client; `None` takes it away."""
        self._client = client

    @property
    def client(self) -> Enqueuer:
        """The client that `enqueue` uses.

        Raises:
            AsyncqError: none is bound.
        """
        if self._client is None:
            raise AsyncqError(
                f"no client is bound to task type {self.name!r}: call mux.bind(client) where it is "
                "registered on a mux, else its own bind(client)"
            )
        return self._client

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"


def _encoder_of(payload: Any) -> Callable[[Any], bytes | None] | None:
    if payload is None:
        return None
    if payload is Task or get_origin(payload) is Task:
        return _payload_of_task
    codec = codec_of(payload)
    assert codec is not None
    return codec.encode


def _payload_of_task(payload: object) -> bytes | None:
    """A handler that takes the whole task has no payload type of its own."""
    return payload.payload if isinstance(payload, Task) else encode(payload)


def codec_of(shape: Any) -> Codec[Any] | None:
    """Return the codec of a type, made once for each; None: no type."""
    if shape is None:
        return None
    try:
        return _cached_codec(shape)
    except TypeError:  # not hashable, or no type at all, which the codec tells better
        return Codec(shape)


@lru_cache(maxsize=1024)
def _cached_codec(shape: Any) -> Codec[Any]:
    return Codec(shape)
