"""What a server can be told, checked when it is made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from asyncq.clock import Seconds, seconds
from asyncq.errors import OptionError
from asyncq.retry import RetryDelay, asynq_delay, delay_policy
from asyncq.server.execution import ErrorHandler
from asyncq.server.loops.health import HealthCheck

log = logging.getLogger("asyncq.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The options of a `Server`, which documents them; durations are seconds here."""

    concurrency: int = 100
    prefetch: int = 0
    queues: dict[str, int] = field(default_factory=lambda: {"default": 1})
    strict_priority: bool = False
    queue_concurrency: dict[str, int] = field(default_factory=dict[str, int])
    shutdown_timeout_s: float = 8.0
    retry_delay: RetryDelay = asynq_delay
    is_failure: Callable[[BaseException], bool] | None = None
    error_handler: ErrorHandler | None = None
    health_check: HealthCheck | None = None
    health_check_interval_s: float = 15.0

    @classmethod
    def checked(
        cls,
        *,
        concurrency: int,
        prefetch: int,
        queues: Mapping[str, int],
        strict_priority: bool,
        queue_concurrency: Mapping[str, int],
        shutdown_timeout: Seconds,
        retry_delay: Seconds | RetryDelay,
        is_failure: Callable[[BaseException], bool] | None,
        error_handler: ErrorHandler | None,
        health_check: HealthCheck | None,
        health_check_interval: Seconds,
    ) -> Config:
        """Make a config of what a caller gave.

        Raises:
            OptionError: a value makes no sense.
        """
        _check_count(concurrency, "concurrency")
        _check_count(prefetch, "prefetch", least=0)
        unknown = sorted(queue_concurrency.keys() - queues.keys())
        if unknown:
            raise OptionError(f"queue_concurrency names queues that are not served: {unknown}")
        for queue, limit in queue_concurrency.items():
            _check_count(limit, f"queue_concurrency of {queue!r}")
        return cls(
            concurrency=concurrency,
            prefetch=prefetch,
            queues=_served(queues),
            strict_priority=strict_priority,
            queue_concurrency=dict(queue_concurrency),
            shutdown_timeout_s=seconds(shutdown_timeout, "shutdown_timeout"),
            retry_delay=delay_policy(retry_delay),
            is_failure=is_failure,
            error_handler=error_handler,
            health_check=health_check,
            health_check_interval_s=seconds(
                health_check_interval, "health_check_interval", least=0.001
            ),
        )


def _served(queues: Mapping[str, int]) -> dict[str, int]:
    """Refuse what Asynq ignores in silence: a blank name and a weight below 1 serve nobody."""
    if not queues:
        raise OptionError('queues is empty: name at least one, as in {"default": 1}')
    for queue, weight in queues.items():
        if not queue.strip():
            raise OptionError("queue name must contain one or more characters")
        _check_count(weight, f"the weight of queue {queue!r}")
    return dict(queues)


def _check_count(value: object, name: str, least: int = 1) -> None:
    # An int32 holds it: that is what a server's record has for it.
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise OptionError(f"{name} must be a whole number of at least {least}, not {value!r}")
