"""The canceller cancels runs by their task's id, on messages from anywhere."""

from __future__ import annotations

from typing import Final

from asyncq.broker.keys import CANCEL, CANCEL_FINALLY
from asyncq.server.in_flight import CANCELED, InFlight

CHANNELS: Final = (CANCEL, CANCEL_FINALLY)


class Canceller:
    """Hears of cancelations through the listener; an id that does not run here is not ours."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight

    def on_message(self, channel: str, task_id: str) -> None:
        """Cancel the runs of a task; through our own channel with the wish not to retry it."""
        for run in self._in_flight.find(task_id):
            if channel == CANCEL_FINALLY:
                run.final = True
            run.cancel(CANCELED)
