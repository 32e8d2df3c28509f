"""Builds the loops of a worker, starts them, and stops them in order."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

from asyncq.broker.broker import Broker
from asyncq.broker.events import Listener
from asyncq.broker.inspection import queue_stats
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

CANCEL_GRACE_S: Final = 1.0  # how long cancelled handlers have to clean up
SUBSCRIBE_S: Final = 1.0  # how long a server waits for its listener before it takes tasks
DRAIN_LOOK_S: Final = 0.05  # between two looks at queues that other workers empty
DRAIN_S: Final = 1.0  # how long outcomes have to be saved, at the very end


class Server:
    """A worker: takes tasks from queues and runs them through a mux.

    `redis` is a URL (default: `ASYNCQ_REDIS_URL`). `queues` maps names to weights: with
    {"critical": 6, "default": 3, "low": 1} and all full, six of ten tasks come from critical;
    with `strict_priority`, none from a queue while a heavier one has tasks. `concurrency` is how
    many tasks run at once, `queue_concurrency` limits single queues. `shutdown_timeout` (seconds)
    is how long running handlers have after SIGTERM. `retry_delay`: seconds, or a policy of
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
        self._broker = Broker(self.url)
        self._client = Client(self.url)
        self._loops: dict[str, asyncio.Task[None]] = {}
        self._state = "new"
        self._died: BaseException | None = None
        self.abandoned = 0

    # Running

    async def run(self, mux: Mux[Any]) -> None:
        """Run until SIGTERM or SIGINT, then shut down; Redis may be away when it starts.

        Raises:
            AsyncqError: the server was started before, or one of its loops died.
        """
        self._check_new()
        with handled(self):
            try:
                await self.start(mux)
                await self._shutdown_wanted.wait()
            finally:
                await self.shutdown()
        if self._died is not None:
            raise AsyncqError(f"a loop of the server died: {self._died!r}") from self._died

    @asynccontextmanager
    async def running(self, mux: Mux[Any]) -> AsyncGenerator[Server]:
        """Run inside another program: started when entered, shut down at the end."""
        try:
            await self.start(mux)
            yield self
        finally:
            await self.shutdown()

    async def start(self, mux: Mux[Any]) -> None:
        """Start taking tasks; waits for Redis if it is away, and says so.

        Raises:
            AsyncqError: the server was started before.
            BrokerError: Redis refuses us: wrong credentials, too old.
        """
        self._check_new()
        self._state = "starting"
        self._stack = AsyncExitStack()
        if not await self._connected():
            return
        await self._build(mux)
        self._heartbeat.start()
        await self._heartbeat.first_beat()
        await self._start_loops()
        if self._state == "starting":
            self._state = "active"
        log.info(
            "server %s runs: %d at once, queues %s",
            self.server_id, self.config.concurrency, self.config.queues,
        )  # fmt: skip

    def stop(self) -> None:
        """Take no new tasks; those that run go on, and outcomes are saved."""
        if self._state in ("new", "closed"):
            return
        self._stopped = True
        if self._state == "active":
            self._state = "stopped"
        if hasattr(self, "_pump"):
            self._pump.stop_fetching()
            self._heartbeat.set_status("stopped")

    def request_shutdown(self) -> None:
        """Let `run` shut down; called again, the handlers lose the rest of their time."""
        if self._shutdown_wanted.is_set():
            self._forced.set()
        self._shutdown_wanted.set()

    async def drain(self) -> None:
        """Wait until the queues served here are empty: nothing pending, running, or due.

        Tasks that are due later do not count; those of other workers do.
        """
        while True:
            await self._in_flight.idle()
            if not await self._remaining():
                return
            await asyncio.sleep(DRAIN_LOOK_S)

    async def shutdown(self) -> None:
        """Stop in order: fetching, housekeeping, handlers, outcomes, cancelling, the lease.

        Handlers have `shutdown_timeout` to end; the others are cancelled and put back without
        spending a retry. Repeating it does nothing.
        """
        if self._state == "closed":
            return
        self.stop()
        state, self._state = self._state, "closed"
        if state != "new" and hasattr(self, "_pump"):
            self._heartbeat.set_status("closed")
            await self._end("forwarder", "recoverer", "janitor", "health check")
            await self._end_handlers()
            await self._save_outcomes()
            await self._end(*self._loops)
            await self._heartbeat.stop()
            await self._executors.close(wait=False)
        if state != "new":
            await self._stack.aclose()
        await self._client.close()
        await self._broker.close()
        log.info("server %s is closed", self.server_id)

    # How it is built

    def _check_new(self) -> None:
        if self._state == "closed":
            raise ServerClosedError("the server was shut down: make a new one")
        if self._state != "new":
            raise AsyncqError("the server is running already")
        self._stopped = False
        self._shutdown_wanted = asyncio.Event()
        self._forced = asyncio.Event()

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

    async def _build(self, mux: Mux[Any]) -> None:
        config = self.config
        if mux.client is None:
            mux.bind(self._client)
            self._stack.callback(mux.bind, None)
        self._executors = Executors(config.concurrency)
        self._in_flight = InFlight(
            config.queues, config.concurrency, self._broker.annotate, config.queue_concurrency
        )
        self._execution = Execution(
            self._in_flight,
            retry_delay=config.retry_delay,
            is_failure=config.is_failure,
            error_handler=config.error_handler,
            client=self._client,
        )
        self._execution.routes = mux.compile(self._executors.run)
        await self._stack.enter_async_context(self._execution.routes.lifespan_context())
        self._pump = Pump(
            self._broker,
            self._in_flight,
            self._execution,
            self.server_id,
            strict=config.strict_priority,
        )
        if self._stopped:
            self._pump.stop_fetching()
        self._heartbeat = Heartbeat(
            Broker(self.url),
            self._in_flight,
            Identity(self.server_id, config.concurrency, config.queues, config.strict_priority),
        )

    async def _start_loops(self) -> None:
        watcher, canceller = Watcher(self._in_flight), Canceller(self._in_flight)
        listener = Listener(self._broker.pool, watcher.on_change, canceller.on_message, CHANNELS)
        housekeeping: list[Loop] = [
            Overseer(self._execution),
            Forwarder(self._broker, self._in_flight),
            Recoverer(self._broker, self._in_flight, self._execution.counts),
            Janitor(self._broker, self._in_flight),
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
        self._start("pump", self._pump.run())
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
        """A server with a dead loop is half a server: stop it, loudly."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.critical("%s died, the server stops: %r", task.get_name(), error, exc_info=error)
        self._died = error
        self._shutdown_wanted.set()
        self.stop()

    # How it ends

    async def _end(self, *names: str) -> None:
        ending = [self._loops.pop(name) for name in names if name in self._loops]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _end_handlers(self) -> None:
        await self._wait_for_handlers(self.config.shutdown_timeout_s)
        runs = list(self._in_flight.runs())
        if not runs:
            return
        log.warning("%d tasks did not end in time: they are cancelled and put back", len(runs))
        for run in reversed(runs):  # the last to be put back is the next to be taken
            run.cancel(SHUTDOWN)
        await self._wait_for_handlers(CANCEL_GRACE_S, forcible=False)
        self.abandoned = self._execution.abandon()

    async def _wait_for_handlers(self, timeout_s: float, *, forcible: bool = True) -> None:
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(self._in_flight.idle())]
        if forcible:
            waits.append(asyncio.create_task(self._forced.wait()))
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _save_outcomes(self) -> None:
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._pump.drained()
        except TimeoutError:
            log.error(
                "%d outcomes could not be saved: their leases end within 31 s, then the tasks "
                "are recovered",
                self._in_flight.unsaved(),
            )

    async def _remaining(self) -> int:
        stats = await queue_stats(self._broker, list(self.config.queues))
        return self._in_flight.unsaved() + sum(
            queue.active + queue.due + (0 if queue.paused else queue.pending) for queue in stats
        )
