"""`asyncq worker`: a process that runs the tasks of a mux until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from platform import python_version
from typing import Annotated, Any, Final, NoReturn

import typer

from asyncq import AsyncqError, BrokerError, Mux, OptionError, Server
from asyncq.cli import logs, reloader
from asyncq.cli.importer import ImportFromStringError, load
from asyncq.cli.options import RedisUrl, duration
from asyncq.cli.version import version
from asyncq.server.pool import WorkerPool, report_ready
from asyncq.settings import Settings, parse_queues

__all__ = ["worker"]

log = logging.getLogger("asyncq.worker")

LOOK_AGAIN_S: Final = 1.0
"""Between two looks at the queues of a burst while Redis is away."""

THREADS_GRACE_S: Final = 0.5
"""How long threads that a shutdown left behind may keep the process."""

TYPES_SHOWN: Final = 20

PROCESS_NUMBER: Final = "--process-number"
"""The option of a process of a pool: which one of them it is."""


class LoopKind(StrEnum):
    """The event loops to choose from; auto is uvloop where it is installed."""

    AUTO = "auto"
    ASYNCIO = "asyncio"
    UVLOOP = "uvloop"


def worker(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:MUX", help="Where the Mux is, as in shop.tasks:mux.")
    ],
    redis: RedisUrl = None,
    queue: Annotated[
        list[str] | None,
        typer.Option(
            "--queue",
            "-q",
            metavar="NAME[=WEIGHT]",
            help="A queue to serve, and its weight (1); may be repeated. "
            "Default: ASYNCQ_QUEUES (critical=6,low=1), else the queue default.",
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "-c",
            metavar="N",
            help="How many tasks run at once, in each process. Default: ASYNCQ_CONCURRENCY, "
            "else 100.",
        ),
    ] = None,
    prefetch: Annotated[
        int | None,
        typer.Option(
            "--prefetch",
            metavar="N",
            help="How many tasks more each process takes ahead, to begin when a place is free. "
            "Default: ASYNCQ_PREFETCH, else 0.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            metavar="N",
            help="How many worker processes run, each with that concurrency; one that dies is "
            "started again. Default: ASYNCQ_PROCESSES, else 1.",
        ),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict",
            help="Take tasks from a queue only when those of greater weight are empty. "
            "Default: ASYNCQ_STRICT_PRIORITY, else by weight.",
        ),
    ] = None,
    burst: Annotated[
        bool, typer.Option("--burst", help="End when nothing is pending, active or due.")
    ] = False,
    reload: Annotated[
        bool,
        typer.Option(
            "--reload",
            help="Start again when a Python file below this folder changes (needs "
            "the extra: reload). For development.",
        ),
    ] = False,
    shutdown_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="What running tasks get to end after SIGTERM or Ctrl-C, as 30 or 2m. "
            "Default: ASYNCQ_SHUTDOWN_TIMEOUT, else 8 s.",
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="debug, info, warning, error or critical. Default: ASYNCQ_LOG_LEVEL, else info.",
        ),
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="text, or json: an object a line. Default: ASYNCQ_LOG_FORMAT, else text.",
        ),
    ] = None,
    loop: Annotated[
        LoopKind, typer.Option(help="The event loop; auto is uvloop where it is installed.")
    ] = LoopKind.AUTO,
    parent_pipe: Annotated[int | None, typer.Option(reloader.PARENT_PIPE, hidden=True)] = None,
    process_number: Annotated[int | None, typer.Option(PROCESS_NUMBER, hidden=True)] = None,
) -> None:
    """Run a worker, which takes tasks from queues and handles them.

    SIGTERM or Ctrl-C ends it: running tasks get the shutdown timeout, the others go back to
    their queues; a second one cuts the time short. SIGTSTP: no new tasks. Without Redis it
    waits until there is one.

    \b
    Examples:
      asyncq worker shop.tasks:mux
      asyncq worker shop.tasks:mux -q critical=6 -q default=3 -q low -c 50
      asyncq worker shop.tasks:mux --strict -q high=2 -q low --log-format json
      asyncq worker shop.tasks:mux --processes 4
      asyncq worker shop.tasks:mux --burst     work off what is there, then end
      asyncq worker shop.tasks:mux --reload    while you write handlers

    Exit codes: 0 ended by a signal, or the burst is over; 1 it cannot work, or a part of it
    died; 2 wrong usage, or MODULE:MUX cannot be imported.
    """
    settings = Settings.load(
        {
            "redis_url": redis,
            "queues": parse_queues(queue) if queue else None,
            "strict_priority": strict,
            "concurrency": concurrency,
            "prefetch": prefetch,
            "processes": processes,
            "shutdown_timeout": duration(shutdown_timeout, "--shutdown-timeout"),
            "log_level": log_level,
            "log_format": log_format,
        }
    )
    if reload and burst:
        raise OptionError("--burst ends a worker and --reload starts it again: use one of them")
    logs.set_up(settings.log_level, settings.log_format, process_number)
    if reload:
        raise typer.Exit(reloader.run(Path.cwd()))
    if settings.processes > 1 and process_number is None:
        raise typer.Exit(asyncio.run(run_pool(settings, burst=burst, parent_pipe=parent_pipe)))
    make_loop = loop_factory(loop)
    mux = load_mux(target, Path.cwd())
    server = (BurstServer if burst else Server)(
        settings.redis_url,
        queues=settings.queues,
        strict_priority=settings.strict_priority,
        concurrency=settings.concurrency,
        prefetch=settings.prefetch,
        shutdown_timeout=settings.shutdown_timeout,
    )
    with asyncio.Runner(loop_factory=make_loop) as runner:
        if process_number in (None, 1):  # the others have nothing else to say
            introduce(target, mux, settings, type(runner.get_loop()), burst=burst)
        code = runner.run(serve(server, mux, parent_pipe, in_pool=process_number is not None))
    raise typer.Exit(code)


async def run_pool(settings: Settings, *, burst: bool, parent_pipe: int | None) -> int:
    """Run this very command in several processes and return the exit code."""
    # As it was started: the interpreter's own options, and a script or -m.
    command = (sys.executable, *sys.orig_argv[1:])

    def of_process(number: int, line: int) -> Sequence[str]:
        # Of an option that is given twice the later one counts: --reload has its own pipe.
        return (*command, PROCESS_NUMBER, str(number), reloader.PARENT_PIPE, str(line))

    pool = WorkerPool(
        of_process, settings.processes, shutdown_timeout_s=settings.shutdown_timeout, burst=burst
    )
    if parent_pipe is not None:
        reloader.end_with_parent(parent_pipe)
    log.info("asyncq %s runs %d worker processes", version(), settings.processes)
    return await pool.run()


class BurstServer(Server):
    """A server that shuts down by itself once its queues are empty."""

    _watch: asyncio.Task[None] | None = None

    async def start(self, mux: Mux[Any]) -> None:
        """Start, and from then on look whether anything is left to do."""
        await super().start(mux)
        self._watch = asyncio.create_task(self._end_when_empty(), name="asyncq-burst")

    async def shutdown(self) -> None:
        """Stop looking, and shut down."""
        if self._watch is not None:
            self._watch.cancel()
        await super().shutdown()

    async def _end_when_empty(self) -> None:
        while True:
            try:
                await self.drain()
            except BrokerError:  # the server's loops say so, and go on by themselves
                await asyncio.sleep(LOOK_AGAIN_S)
            else:
                break
        log.info("nothing is pending, active or due: the burst is over")
        self.request_shutdown()


def load_mux(target: str, directory: Path) -> Mux[Any]:
    """Import the mux that `target` names, from `directory` before other places.

    Raises:
        ImportFromStringError: there is no such module or attribute, the module fails, or what
            it holds is no Mux.
    """
    found = load(target, directory=directory)
    if isinstance(found, Mux):
        return found  # pyright: ignore[reportUnknownVariableType]  # of Any, says mypy
    module = sys.modules[target.partition(":")[0]]
    names = [name for name, value in vars(module).items() if isinstance(value, Mux)]
    hint = (
        f"did you mean {module.__name__}:{names[0]}?"
        if names
        else "name the object that your handlers are registered on"
    )
    raise ImportFromStringError(f"{target!r} is a {type(found).__name__} and no Mux: {hint}")


def loop_factory(kind: LoopKind) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop; None: asyncio does.

    Raises:
        OptionError: uvloop was asked for and is not installed.
    """
    if kind is LoopKind.ASYNCIO:
        return None
    if find_spec("uvloop") is None:
        if kind is LoopKind.UVLOOP:
            raise OptionError("--loop uvloop: it is not installed: pip install 'asyncq[uvloop]'")
        return None
    import uvloop

    return uvloop.new_event_loop


def introduce(
    target: str, mux: Mux[Any], settings: Settings, loop: type[object], *, burst: bool
) -> None:
    """Log what starts here, and how to end it."""
    types = sorted(mux.types)
    shown = [*types[:TYPES_SHOWN], *(["..."] if len(types) > TYPES_SHOWN else [])]
    log.info(
        "asyncq %s runs %s on Python %s, event loop %s",
        *(version(), target, python_version(), loop.__module__.partition(".")[0]),
    )
    log.info("Redis: %s", without_password(settings.redis_url))
    log.info(
        "queues: %s, %s; %d tasks at once%s",
        ", ".join(f"{name}={weight}" for name, weight in settings.queues.items()),
        "by strict priority" if settings.strict_priority else "by weight",
        settings.concurrency,
        f" in each of {settings.processes} processes" if settings.processes > 1 else "",
    )
    log.info("%d task types: %s", len(types), ", ".join(shown) or "only patterns, or none")
    log.info(
        "%sCtrl-C or SIGTERM to stop: running tasks have %g s to end, after a second one none",
        "it stops when the queues are empty; " if burst else "",
        settings.shutdown_timeout,
    )


def without_password(url: str) -> str:
    """Return a URL that may be shown."""
    masked = re.sub(r"(://[^/@]*?):.*@", r"\1:***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", masked)


async def serve(
    server: Server, mux: Mux[Any], parent_pipe: int | None = None, *, in_pool: bool = False
) -> int:
    """Run the server to its end and return the exit code of the process.

    Whatever a handler left running keeps the process for half a second at most.
    """
    if parent_pipe is not None:
        reloader.end_with_parent(parent_pipe)
        if in_pool:  # in the loop's next turn: `run` handles signals by then
            asyncio.get_running_loop().call_soon(report_ready, parent_pipe)
    code = 0
    try:
        await server.run(mux)
    except AsyncqError as error:
        log.critical("the worker ends: %s", error)
        code = 1
    except Exception as error:  # of a lifespan
        log.critical("the worker ends: %r", error, exc_info=error)
        code = 1
    if server.abandoned:
        # Closing the event loop would wait for handlers that ignore their cancellation.
        log.warning("%d handlers did not end: they are left behind", server.abandoned)
        leave(code)
    threading.Thread(target=_leave_threads_behind, args=(code,), daemon=True).start()
    return code


def leave(code: int) -> NoReturn:
    """End the process now, whatever still runs in it."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more
            pass
    os._exit(code)


def _leave_threads_behind(code: int) -> None:
    """End a process that its threads keep: Python and asyncio both wait for them without end.

    They are of `asyncio.to_thread` for instance, whose calls go on when a handler is cancelled.
    """
    time.sleep(THREADS_GRACE_S)
    main = threading.main_thread()
    stuck = [one.name for one in threading.enumerate() if one is not main and not one.daemon]
    if stuck:
        log.warning("%d threads did not end, they are left behind: %s", len(stuck), stuck)
        leave(code)
