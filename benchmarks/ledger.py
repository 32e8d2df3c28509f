"""The ledger of a measurement: memory that the harness, senders and workers of any system share.

One row a task says when it was sent, when it first started, when it last ended, and how often it
ran. A row costs a task a few hundred nanoseconds, the same for every system, and needs no lock:
only a task that runs twice at the same time has two writers, and that run is wrong anyway.

Imports the standard library only, for it runs in the environment of every system.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from time import time_ns
from typing import NamedTuple

VARIABLE = "BENCH_LEDGER"

# Little-endian, as adapters/go reads it
ROW = Struct("<4q")
_SENT = Struct("<q")
_RUN = Struct("<3q")
_ENDED_AT = 16


class Row(NamedTuple):
    """What the ledger says of one task; instants are Unix nanoseconds, 0 where it did not happen.

    `sent_ns` is the instant just before the enqueue, or the due instant of a scheduled task.
    """

    sent_ns: int
    started_ns: int
    ended_ns: int
    runs: int


class Ledger:
    """The rows of the tasks 0 to `tasks` - 1, in the file `path`.

    Works across threads, forks and processes. Raises `ValueError` if the file has another size.
    """

    def __init__(self, path: str | Path, tasks: int) -> None:
        self.path = Path(path)
        self.tasks = tasks
        with self.path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        if len(self._memory) != tasks * ROW.size:
            rows = len(self._memory) // ROW.size
            raise ValueError(f"the ledger {self.path} has {rows} rows, not {tasks}")

    @classmethod
    def create(cls, path: str | Path, tasks: int) -> Ledger:
        """Make the file anew, every row empty. Raises `ValueError` for less than one task."""
        if tasks < 1:
            raise ValueError(f"a ledger needs at least one task, not {tasks}")
        with Path(path).open("wb") as file:
            file.truncate(tasks * ROW.size)
        return cls(path, tasks)

    @classmethod
    def from_environment(cls) -> Ledger | None:
        """Open the ledger that BENCH_LEDGER names; None where it is not set."""
        path = os.environ.get(VARIABLE)
        if not path:
            return None
        return cls(path, Path(path).stat().st_size // ROW.size)

    # What adapters say

    def sent(self, i: int, at_ns: int) -> None:
        """Note that task `i` was sent at `at_ns`, or is due then."""
        _SENT.pack_into(self._memory, i * 32, at_ns)

    def ran(self, i: int) -> int:
        """Note that task `i` ran, with no time between start and end; return how often by now."""
        now = time_ns()
        at = i * 32 + 8
        started, _, runs = _RUN.unpack_from(self._memory, at)
        runs += 1
        _RUN.pack_into(self._memory, at, started or now, now, runs)
        return int(runs)

    def started(self, i: int) -> int:
        """Note that a run of task `i` starts; return how often it has run, this run included."""
        at = i * 32 + 8
        started, ended, runs = _RUN.unpack_from(self._memory, at)
        runs += 1
        _RUN.pack_into(self._memory, at, started or time_ns(), ended, runs)
        return int(runs)

    def ended(self, i: int) -> None:
        """Note that a run of task `i` ended."""
        _SENT.pack_into(self._memory, i * 32 + _ENDED_AT, time_ns())

    # What the harness asks

    def row(self, i: int) -> Row:
        """Return the row of task `i`."""
        return Row(*ROW.unpack_from(self._memory, i * ROW.size))

    def rows(self) -> Iterator[Row]:
        """Return all rows, in the order of the tasks."""
        with self._column(slice(None)) as cells:
            values = cells.tolist()
        return map(Row, values[0::4], values[1::4], values[2::4], values[3::4])

    def done(self, runs: int = 1) -> int:
        """Count the tasks that ended; with more than 1, those that started so often."""
        with self._column(slice(2 if runs == 1 else 3, None, 4)) as column:
            values = column.tolist()
        if runs == 1:
            return self.tasks - values.count(0)
        return sum(1 for value in values if value >= runs)

    def wrong(self, runs: int = 1) -> list[int]:
        """Return the tasks that did not run exactly this often, or did not end."""
        return [i for i, row in enumerate(self.rows()) if row.runs != runs or not row.ended_ns]

    def clear(self) -> None:
        """Empty every row."""
        self._memory[:] = bytes(len(self._memory))

    def close(self) -> None:
        """Let go of the memory; the file stays."""
        self._memory.close()

    @contextmanager
    def _column(self, cells: slice) -> Iterator[memoryview]:
        # A view that stays alive would keep the memory from being closed.
        with memoryview(self._memory) as view, view.cast("q") as whole, whole[cells] as column:
            yield column
