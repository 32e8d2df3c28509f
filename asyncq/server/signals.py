"""What signals ask of a server: TERM and INT stop it, a second one forces, TSTP stops fetching."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, Protocol

log = logging.getLogger("asyncq.server")

STOPPING: Final = (signal.SIGTERM, signal.SIGINT)


class Stoppable(Protocol):
    """What signals act on."""

    def stop(self) -> None:
        """Take no new tasks."""

    def request_shutdown(self) -> None:
        """Begin to shut down; a second call forces it."""


@contextmanager
def handled(server: Stoppable) -> Generator[None]:
    """Let signals act on `server`; the handlers that were there before come back at the end."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (*STOPPING, signal.SIGTSTP)}

    def stopping(number: signal.Signals) -> None:
        # At once, not when the shutdown gets its turn: nothing new starts after the signal.
        server.stop()
        log.info("%s: shutting down", number.name)
        server.request_shutdown()

    def quiet() -> None:
        server.stop()
        log.info("SIGTSTP: no new tasks are taken; send SIGTERM to shut down")

    for number in STOPPING:
        loop.add_signal_handler(number, stopping, number)
    loop.add_signal_handler(signal.SIGTSTP, quiet)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            if handler is not None:  # None: it was set outside Python, and cannot be set again
                signal.signal(number, handler)
