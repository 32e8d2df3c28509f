"""Builds the loops of a worker, starts them, and stops them in order."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import Context as Variables
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from asyncq.broker.broker import Broker
from asyncq.broker.events import Listener
from asyncq.broker.inspection import QueueStats, queue_stats
from asyncq.client import Client
from asyncq.clock import Seconds
from asyncq.errors import AsyncqError, BrokerError, BrokerUnavailableError, ServerClosedError
from asyncq.mux import Mux
from asyncq.retry import RetryDelay, asynq_delay
from asyncq.server.config import Config
from asyncq.server.execution import ErrorHandler, Execution
from asyncq.server.executors import Executors
from asyncq.server.in_flight import SHUTDOWN, InFlight
from asyncq.server.loop import Loop, Trouble
from asyncq.server.loops.canceller import CHANNELS, Canceller
from asyncq.server.loops.forwarder import Forwarder
from asyncq.server.loops.health import Health, HealthCheck
from asyncq.server.loops.heartbeat import Heartbeat, Identity
from asyncq.server.loops.janitor import Janitor
from asyncq.server.loops.overseer import Overseer
from asyncq.server.loops.pump import Pump
from asyncq.server.loops.recoverer import Recoverer
from asyncq.server.loops.watcher import Watcher
from asyncq.server.signals import handled
from asyncq.settings import redis_url

log = logging.getLogger("asyncq.server")

State: TypeAlias = Literal["new", "starting", "active", "closed"]

CANCEL_GRACE_S: Final = 1.0  # how long cancelled handlers have to clean up
SUBSCRIBE_S: Final = 1.0  # how long a server waits for its listener before it takes tasks
DRAIN_LOOK_S: Final = 0.05  # between two looks at queues that other workers empty
DRAIN_S: Final = 1.0  # how long outcomes have to be saved, at the very end


class Server:
    """A worker: takes tasks from queues and runs them through a mux.

    `redis` is a URL (default: `ASYNCQ_REDIS_URL`). `queues` maps names to weights: with
    {"critical": 6, "default": 3, "low": 1} and all full, six of ten tasks come from critical;
    with `strict_priority`, none from a queue while a heavier one has tasks. `concurrency` is how
    many tasks run at once, `queue_concurrency` limits single queues. `prefetch` (default 0) is how
    many more are taken ahead of a free place: they are leased and count as active (and for
    `queue_concurrency`), wait here though another worker may be free, have their timeout from when
    they begin, go before heavier tasks that come later with `strict_priority`, and are put back at
    once when the server stops. `shutdown_timeout` (seconds) is how long running handlers have
    after SIGTERM. `retry_delay`: seconds, or a policy of
    `asyncq.retry` (default: Asynq's formula). `is_failure(error)` False means a retry that does
    not count. `error_handler(ctx, error)` is told of every failed run, `health_check(error)` of
    every ping of Redis, each `health_check_interval` seconds.

    Raises:
        OptionError: a value makes no sense.
    """

    def __init__(
        self,
        redis: str | None = None,
        *,
        concurrency: int = 100,
        prefetch: int = 0,
        queues: Mapping[str, int] = {"default": 1},
        strict_priority: bool = False,
        queue_concurrency: Mapping[str, int] = {},
        shutdown_timeout: Seconds = 8.0,
        retry_delay: Seconds | RetryDelay = asynq_delay,
        is_failure: Callable[[BaseException], bool] | None = None,
        error_handler: ErrorHandler | None = None,
        health_check: HealthCheck | None = None,
        health_check_interval: Seconds = 15.0,
    ) -> None:
        self.url = redis_url() if redis is None else redis
        self.config = Config.checked(
            concurrency=concurrency,
            prefetch=prefetch,
            queues=queues,
            strict_priority=strict_priority,
            queue_concurrency=queue_concurrency,
            shutdown_timeout=shutdown_timeout,
            retry_delay=retry_delay,
            is_failure=is_failure,
            error_handler=error_handler,
            health_check=health_check,
            health_check_interval=health_check_interval,
        )
        self.server_id = str(uuid.uuid4())
        self.abandoned = 0
        """Handlers that were still running when the server was closed."""
        self._broker = Broker(self.url)
        self._client = Client(self.url)
        self._state: State = "new"
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._parts: _Parts | None = None
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._stack = AsyncExitStack()  # what the mux was given for the time of the run
        self._context: Variables | None = None  # of start and end, so that a lifespan can reset
        self._stopped = False
        self._shutdown_wanted = asyncio.Event()
        self._forced = asyncio.Event()
        self._died: BaseException | None = None

    # Running

    async def run(self, mux: Mux[Any]) -> None:
        """Run until SIGTERM or SIGINT, then shut down; Redis may be away when it starts.

        Raises:
            AsyncqError: the server was started before, or one of its loops died.
        """
        with handled(self):
            wanted = asyncio.create_task(self._shutdown_wanted.wait())
            starting = asyncio.create_task(self.start(mux))
            try:
                # A signal also ends a start that takes long, in a lifespan for instance.
                await asyncio.wait({starting, wanted}, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                await wanted
            finally:
                wanted.cancel()
                await self.shutdown()
                await asyncio.gather(starting, return_exceptions=True)
        self._raise_if_died()

    @asynccontextmanager
    async def running(self, mux: Mux[Any]) -> AsyncGenerator[Server]:
        """Run inside another program: started when entered, shut down at the end.

        Raises:
            AsyncqError: the server was started before, or (at the end) one of its loops died.
        """
        try:
            await self.start(mux)
            yield self
        finally:
            await self.shutdown()
        self._raise_if_died()

    async def start(self, mux: Mux[Any]) -> None:
        """Start taking tasks; waits for Redis if it is away, and says so.

        Raises:
            AsyncqError: the server was started before.
            ServerClosedError: it was shut down, before or meanwhile.
            BrokerError: Redis refuses us: wrong credentials, too old.
        """
        if self._state == "closed":
            raise ServerClosedError("the server was shut down: make a new one")
        if self._state != "new":
            raise AsyncqError("the server is running already")
        self._state = "starting"
        self._context = copy_context()
        self._starting = asyncio.create_task(
            self._start_up(mux), name="asyncq-start", context=self._context
        )
        try:
            await self._starting
        except asyncio.CancelledError:
            if self._closing is not None and self._starting.cancelled():
                raise ServerClosedError("the server was shut down while it started") from None
            self._starting.cancel()
            raise

    def stop(self) -> None:
        """Take no new tasks; those that run go on, and outcomes are saved."""
        self._stopped = True
        if self._parts is not None and self._state != "closed":
            self._parts.pump.stop_fetching()
            self._parts.heartbeat.set_status("stopped")

    def request_shutdown(self) -> None:
        """Let `run` shut down; called again, the handlers lose the rest of their time."""
        if self._shutdown_wanted.is_set():
            self._forced.set()
        self._shutdown_wanted.set()

    async def drain(self) -> None:
        """Wait until the queues served here are empty: nothing pending, running, or due.

        Tasks that are due later do not count; those of other workers do.

        Raises:
            AsyncqError: the server was not started.
            BrokerError: Redis is away.
        """
        if self._parts is None:
            raise AsyncqError("the server is not running: start it before you drain it")
        in_flight = self._parts.in_flight
        while True:
            await in_flight.idle()
            stats = await queue_stats(self._broker, list(self.config.queues))
            if not in_flight.unsaved() and not any(_remaining(queue) for queue in stats):
                return
            await asyncio.sleep(DRAIN_LOOK_S)

    async def shutdown(self) -> None:
        """Stop in order: fetching, housekeeping, handlers, outcomes, cancelling, the lease.

        Handlers have `shutdown_timeout` to end; the others are cancelled and put back without
        spending a retry. Repeating it waits for the same end; cancelling it does not cut it off.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(
                self._shut_down(), name="asyncq-shutdown", context=self._context
            )
        await asyncio.shield(self._closing)

    # How it is built

    async def _start_up(self, mux: Mux[Any]) -> None:
        if not await self._connected():
            return
        self._parts = await self._build(mux)
        if self._stopped:
            self._parts.pump.stop_fetching()
        self._parts.heartbeat.start()
        await self._parts.heartbeat.first_beat()
        await self._start_loops(self._parts)
        self._state = "active"
        log.info(
            "server %s runs: %d at once, queues %s",
            self.server_id, self.config.concurrency, self.config.queues,
        )  # fmt: skip

    async def _connected(self) -> bool:
        """Wait for Redis; False when shutdown was wanted meanwhile."""
        trouble = Trouble("server")
        while not self._shutdown_wanted.is_set():
            try:
                await self._broker.open()
                await self._client.open()
            except BrokerUnavailableError as error:
                try:
                    async with asyncio.timeout(trouble.pause_s(error)):
                        await self._shutdown_wanted.wait()
                except TimeoutError:
                    pass
            else:
                trouble.over()
                return True
        return False

    async def _build(self, mux: Mux[Any]) -> _Parts:
        config = self.config
        if mux.client is None:
            mux.bind(self._client)
            self._stack.callback(mux.bind, None)
        executors = Executors(config.concurrency)
        in_flight = InFlight(
            config.queues,
            config.concurrency,
            self._broker.annotate,
            config.queue_concurrency,
            config.prefetch,
        )
        routes = mux.compile(executors.run)
        await self._stack.enter_async_context(routes.lifespan_context())
        execution = Execution(  # after the lifespan, whose context variables the runs begin with
            in_flight,
            routes,
            retry_delay=config.retry_delay,
            is_failure=config.is_failure,
            error_handler=config.error_handler,
            client=self._client,
        )
        pump = Pump(
            self._broker, in_flight, execution, self.server_id, strict=config.strict_priority
        )
        identity = Identity(
            self.server_id, config.concurrency, config.queues, config.strict_priority
        )
        heartbeat = Heartbeat(
            Broker(self.url),
            in_flight,
            identity,
            on_death=lambda error: self._part_died("heartbeat", error),
        )
        return _Parts(in_flight, execution, executors, pump, heartbeat)

    async def _start_loops(self, parts: _Parts) -> None:
        in_flight, execution = parts.in_flight, parts.execution
        watcher, canceller = Watcher(in_flight), Canceller(in_flight)
        listener = Listener(self._broker.pool, watcher.on_change, canceller.on_message, CHANNELS)
        housekeeping: list[Loop] = [
            Overseer(execution),
            Forwarder(self._broker, in_flight),
            Recoverer(self._broker, in_flight, execution.counts),
            Janitor(self._broker, in_flight),
        ]
        if self.config.health_check is not None:
            housekeeping.append(
                Health(self._broker, self.config.health_check, self.config.health_check_interval_s)
            )
        self._start("listener", self._listen(listener))
        self._start("watcher", watcher.run(listener))
        # A cancelation sent the moment a task runs is to be heard; if Redis has just gone,
        # there is nothing to run either.
        try:
            async with asyncio.timeout(SUBSCRIBE_S):
                await listener.connected.wait()
        except TimeoutError:
            pass
        self._start("pump", parts.pump.run())
        for loop in housekeeping:
            self._start(loop.name, loop.run())

    async def _listen(self, listener: Listener) -> None:
        try:
            await listener.run()
        except BrokerError as error:
            log.warning(
                "Redis does not let us listen (%s): queues are asked every second instead, and "
                "cancelations are not heard. It takes RESP3 and the commands CLIENT TRACKING and "
                "SUBSCRIBE",
                error,
            )
            await asyncio.Event().wait()  # the watcher asks blindly while nothing is connected

    def _start(self, name: str, run: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(run, name=f"asyncq-{name}")
        task.add_done_callback(self._loop_ended)
        self._loops[name] = task

    def _loop_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._part_died(task.get_name(), error)

    def _part_died(self, name: str, error: BaseException) -> None:
        """A server with a dead loop is half a server: stop it, loudly."""
        log.critical("%s died, the server stops: %r", name, error, exc_info=error)
        self._died = error
        self._shutdown_wanted.set()
        self.stop()

    def _raise_if_died(self) -> None:
        if self._died is not None:
            raise AsyncqError(f"a loop of the server died: {self._died!r}") from self._died

    # How it ends

    async def _shut_down(self) -> None:
        self.stop()
        self._shutdown_wanted.set()
        async with AsyncExitStack() as last:  # from the last to the first, whatever fails before
            last.push_async_callback(self._broker.close)
            last.push_async_callback(self._client.close)
            last.push_async_callback(self._stack.aclose)
            if self._starting is not None and not self._starting.done():
                self._starting.cancel()
                await asyncio.gather(self._starting, return_exceptions=True)
            self._state = "closed"
            if self._parts is not None:
                await self._stop_parts(self._parts, last)
        log.info("server %s is closed", self.server_id)

    async def _stop_parts(self, parts: _Parts, last: AsyncExitStack) -> None:
        last.push_async_callback(parts.executors.close, wait=False)
        last.push_async_callback(parts.heartbeat.stop)
        last.push_async_callback(self._end, "listener", "watcher", "pump", "overseer")
        parts.heartbeat.set_status("closed")
        ends_at = asyncio.get_running_loop().time() + self.config.shutdown_timeout_s
        await self._end("forwarder", "recoverer", "janitor", "health check")
        await self._end_handlers(parts, ends_at)
        await self._save_outcomes(parts, ends_at)

    async def _end(self, *names: str) -> None:
        ending = [self._loops.pop(name) for name in names if name in self._loops]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _end_handlers(self, parts: _Parts, ends_at: float) -> None:
        left_s = ends_at - asyncio.get_running_loop().time()
        await _first_of(parts.in_flight.idle(), self._forced.wait(), timeout_s=left_s)
        runs = list(parts.in_flight.runs())
        if not runs:
            return
        log.warning("%d tasks did not end in time: they are cancelled and put back", len(runs))
        for run in reversed(runs):  # the last to be put back is the next to be taken
            run.cancel(SHUTDOWN)
        await _first_of(parts.in_flight.idle(), timeout_s=CANCEL_GRACE_S)
        self.abandoned = parts.execution.abandon()

    async def _save_outcomes(self, parts: _Parts, ends_at: float) -> None:
        drained = await _drained(parts.pump, ends_at)
        if unsaved := parts.pump.unsaved():
            log.error(
                "%d outcomes could not be saved: their leases end within 31 s, then the tasks "
                "are recovered",
                unsaved,
            )
        elif not drained or parts.pump.owes():
            log.warning("Redis did not answer: what it may have sent is recovered within 37 s")


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a running server is made of, beside its loops."""

    in_flight: InFlight
    execution: Execution
    executors: Executors
    pump: Pump
    heartbeat: Heartbeat


async def _drained(pump: Pump, ends_at: float) -> bool:
    """Wait until the pump is, but after `DRAIN_S` only for what it owes, and until `ends_at`."""
    while True:
        try:
            async with asyncio.timeout(DRAIN_S):
                await pump.drained()
        except TimeoutError:
            if asyncio.get_running_loop().time() >= ends_at or not pump.owes():
                return False
        else:
            return True


async def _first_of(*waits: Coroutine[Any, Any, object], timeout_s: float) -> None:
    """Wait for the first of several things, though not for long."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def _remaining(queue: QueueStats) -> int:
    return queue.active + queue.due + (0 if queue.paused else queue.pending)
