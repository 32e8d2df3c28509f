"""The health check tells a callback whether Redis answers."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import TypeAlias

from asyncq.broker.broker import Broker
from asyncq.errors import BrokerError
from asyncq.server.loop import Loop

log = logging.getLogger("asyncq.server")

HealthCheck: TypeAlias = Callable[[Exception | None], Awaitable[None] | None]
"""Called with `None` when Redis answers, else with the error."""


class Health(Loop):
    """Pings Redis every `interval_s` seconds."""

    name = "health check"

    def __init__(self, broker: Broker, callback: HealthCheck, interval_s: float) -> None:
        super().__init__(interval_s)
        self._broker = broker
        self._callback = callback

    async def tick(self) -> int:
        """Ping once, and tell."""
        problem: Exception | None = None
        try:
            await self._broker.ping()
        except BrokerError as error:
            problem = error
        try:
            answer = self._callback(problem)
            if isawaitable(answer):
                await answer
        except Exception:
            log.exception("the health check callback failed")
        return 1
