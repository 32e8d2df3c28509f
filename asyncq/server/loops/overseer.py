"""The overseer arms near deadlines and gives away the places of handlers that will not stop."""

from __future__ import annotations

from asyncq.server.execution import NEAR_S, Execution
from asyncq.server.loop import Loop


class Overseer(Loop):
    """Looks at every run once a second, so that a run needs no timer of its own."""

    name = "overseer"

    def __init__(self, execution: Execution, interval_s: float = NEAR_S / 2) -> None:
        super().__init__(interval_s)
        self._execution = execution

    async def tick(self) -> int:
        """Look at every run; return how many were written off."""
        return self._execution.watch()
