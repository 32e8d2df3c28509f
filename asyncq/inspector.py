"""Looks at queues from outside: how much waits, runs and has failed; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from asyncq.broker.broker import Broker
from asyncq.broker.inspection import QueueDetails, queue_details, queue_names
from asyncq.clock import from_unix
from asyncq.errors import QueueNotFoundError
from asyncq.settings import redis_url

__all__ = ["Inspector", "QueueInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueInfo:
    """What a queue held at one moment; `processed` and `failed` count attempts, both ends alike."""

    queue: str
    paused: bool
    size: int
    """Tasks in any state."""
    pending: int
    active: int
    scheduled: int
    retry: int
    archived: int
    completed: int
    aggregating: int
    groups: int
    latency: timedelta
    """How long the task that is next has waited; zero: none waits."""
    processed: int
    """Runs that ended today (UTC), failed ones too."""
    failed: int
    """Runs that failed today (UTC)."""
    processed_total: int
    failed_total: int
    timestamp: datetime
    """When, in UTC."""


class Inspector:
    """Looks at queues and tasks of one Redis, those of Go programs as well.

    `redis` is a URL as a `Client` takes it (default: `ASYNCQ_REDIS_URL`). Use it in `async with`,
    or `open` and `close` it.

    Raises:
        OptionError: the URL makes no sense.
    """

    def __init__(self, redis: str | None = None) -> None:
        self._broker = Broker(redis_url() if redis is None else redis)

    async def open(self) -> None:
        """Connect.

        Raises:
            BrokerUnavailableError: Redis does not answer.
            BrokerError: Redis refuses us, or is older than 6.2.
        """
        await self._broker.open()

    async def close(self) -> None:
        """Disconnect; repeating it does nothing."""
        await self._broker.close()

    async def __aenter__(self) -> Inspector:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def queues(self) -> list[str]:
        """Return the names of all queues ever used, sorted.

        Raises:
            BrokerError: Redis refused, or could not be reached.
        """
        return await queue_names(self._broker)

    async def queue_info(self, queue: str) -> QueueInfo:
        """Return what a queue holds.

        Raises:
            QueueNotFoundError: no queue of this name was ever used.
            BrokerError: Redis refused, or could not be reached.
        """
        if queue not in await self.queues():
            raise QueueNotFoundError(queue)
        (info,) = await self._infos([queue])
        return info

    async def queue_infos(self) -> list[QueueInfo]:
        """Return what all queues hold, sorted by name; the same few round trips for any number.

        Raises:
            BrokerError: Redis refused, or could not be reached.
        """
        return await self._infos(await self.queues())

    async def _infos(self, queues: Sequence[str]) -> list[QueueInfo]:
        return [_info(details) for details in await queue_details(self._broker, queues)]


def _info(details: QueueDetails) -> QueueInfo:
    stats = details.stats
    return QueueInfo(
        queue=stats.queue,
        paused=stats.paused,
        size=(
            stats.pending
            + stats.active
            + stats.scheduled
            + stats.retry
            + stats.archived
            + stats.completed
            + details.aggregating
        ),
        pending=stats.pending,
        active=stats.active,
        scheduled=stats.scheduled,
        retry=stats.retry,
        archived=stats.archived,
        completed=stats.completed,
        aggregating=details.aggregating,
        groups=details.groups,
        latency=timedelta(seconds=details.latency_s),
        processed=details.processed_today,
        failed=details.failed_today,
        processed_total=stats.processed,
        failed_total=stats.failed,
        timestamp=from_unix(details.read_at_s),
    )
