"""What runs in a child process: takes a handler call, makes it, and answers."""

from __future__ import annotations

import asyncio
import importlib
import logging
import logging.handlers
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import attrgetter
from types import FrameType
from typing import Any, NoReturn, cast

from asyncq.context import Context, current
from asyncq.errors import AsyncqError
from asyncq.handler import Handler
from asyncq.message import TaskMessage

__all__ = ["ContextGoesHere", "Request", "find", "portable", "serve"]


class ContextGoesHere:
    """Stands for the Context among the arguments."""


@dataclass(frozen=True, slots=True)
class Request:
    module: str
    qualname: str
    arguments: tuple[Any, ...]
    message: bytes | None
    deadline_at: float


def find(module: str, qualname: str) -> Any:
    return attrgetter(qualname)(importlib.import_module(module))


def portable(error: BaseException) -> bytes:
    """Pickle an error with its traceback as a note; one that cannot be is told by another."""
    error.add_note(f"In process {os.getpid()}:\n{''.join(traceback.format_exception(error))}")
    for form in (error, _WithoutInit(error)):
        try:
            packed = pickle.dumps(form)
            copy = pickle.loads(packed)
            if type(copy) is type(error) and str(copy) == str(error):
                return packed
        except Exception:
            continue
    summary = RuntimeError(traceback.format_exception_only(error)[0].strip())
    summary.__notes__ = error.__notes__
    return pickle.dumps(summary)


class _WithoutInit:
    """Pickles an error whose `__init__` takes something else than it left in `args`."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_again, (type(self._error), self._error.args, self._error.__dict__)


def _make_again(
    cls: type[BaseException], args: tuple[Any, ...], state: Mapping[str, Any]
) -> BaseException:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


def serve(channel: Connection, levels: Mapping[str, int]) -> None:
    """Answer one request after the other until the server closes the channel."""
    line = _Line(channel)
    _settle(line, levels)
    while True:
        try:
            request = channel.recv_bytes()
        except (EOFError, OSError):
            return
        with line.lock:
            channel.send(("begun", None))
        copy_context().run(_answer, line, request)


def _settle(line: _Line, levels: Mapping[str, int]) -> None:
    # In a session of its own it can be killed with all that it starts, and Ctrl-C does not reach
    # it: like SIGTERM to all processes of a service, that is the server's to act on.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave_to_the_server)  # SIG_IGN would pass on to programs it starts
    os.set_inheritable(line.channel.fileno(), False)  # lest one of these keeps it open
    os.register_at_fork(after_in_child=line.forked)
    threading.Thread(target=_die_with_the_server, daemon=True).start()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _leave_to_the_server(number: int, frame: FrameType | None) -> None:
    pass


def _die_with_the_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os.killpg(os.getpid(), signal.SIGKILL)


class _Line:
    """The child's end of the channel, which all threads of a handler share."""

    def __init__(self, channel: Connection) -> None:
        self.channel = channel
        self.lock = threading.RLock()  # reentrant: what is sent may log when it is pickled
        # Of a queue it wants put_nowait() only.
        self._forwarder = logging.handlers.QueueHandler(cast(Any, self))

    def forward_logs(self) -> None:
        """Log through the server, unless the program configured logging for this process, too."""
        if not logging.root.handlers:
            logging.root.addHandler(self._forwarder)

    def put_nowait(self, record: logging.LogRecord) -> None:
        with self.lock:
            self.channel.send(("log", record))

    def forked(self) -> None:
        """Give the channel up in a process that a handler forked: it belongs to the parent."""
        self.channel.close()
        self.lock = threading.RLock()
        logging.root.removeHandler(self._forwarder)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is _leave_to_the_server:
                signal.signal(number, signal.SIG_DFL)


class _ChildRun:
    """A run as its child process knows it: the facts, and a way to report to the server."""

    state: Any
    client: Any
    lease_lost: asyncio.Event

    def __init__(self, line: _Line, message: TaskMessage, deadline_at: float) -> None:
        self._line = line
        self.message = message
        self.deadline_at = deadline_at
        self.cancel_reason: str | None = None
        self.over = False

    def __getattr__(self, name: str) -> NoReturn:
        raise AsyncqError(
            f'ctx.{name} stays in the server\'s process: a handler with executor="process" '
            "gets what it needs in its payload, or makes it in its own process"
        )

    async def write_result(self, data: bytes) -> None:
        self._report("result", data)

    async def write_progress(self, fraction: float, note: str) -> None:
        self._report("progress", fraction, note)

    def sync_call(self, function: Callable[..., Awaitable[None]], /, *args: Any) -> None:
        for _ in function(*args).__await__():  # one of the two above: neither suspends
            pass

    def _report(self, name: str, *arguments: Any) -> None:
        with self._line.lock:
            if self.over:  # said by a thread that outlives its handler
                raise AsyncqError(f"the run of task {self.message.id!r} is over")
            self._line.channel.send(("report", (name, arguments)))
            error = pickle.loads(self._line.channel.recv_bytes())
        if error is not None:
            raise error


def _answer(line: _Line, packed: bytes) -> None:
    run: _ChildRun | None = None
    try:
        request: Request = pickle.loads(packed)
        function = _imported(request.module, request.qualname)
        line.forward_logs()
        arguments = request.arguments
        if request.message is not None:
            run = _ChildRun(line, TaskMessage.FromString(request.message), request.deadline_at)
            context = Context[Any](run)
            current.set(context)
            arguments = tuple(context if a is ContextGoesHere else a for a in arguments)
        reply = _packed_result(function(*arguments), f"{request.module}.{request.qualname}")
    except BaseException as error:  # SystemExit, too: it is the task that failed
        reply = pickle.dumps(("error", portable(error)))
    with line.lock:
        if run is not None:
            run.over = True
        line.channel.send_bytes(reply)


def _imported(module: str, qualname: str) -> Callable[..., Any]:
    try:
        found = find(module, qualname)
    except Exception as error:
        raise TypeError(
            f"handler {module}.{qualname} cannot be imported in its process: "
            f"{type(error).__name__}: {error}"
        ) from error
    return found.function if isinstance(found, Handler) else found


def _packed_result(result: Any, name: str) -> bytes:
    try:
        return pickle.dumps(("result", result))
    except Exception as error:
        raise TypeError(
            f"what handler {name} returned cannot be sent to the server: {error}"
        ) from error
