"""From results to what it takes for a rate: fills the generated sections of docs/scaling.md.

    python -m benchmarks.capacity benchmarks/results/results.json

What is measured is divided and multiplied here and nowhere else, so that the page shows no number
that nobody measured or calculated.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import scale
from benchmarks.measured import Results
from benchmarks.report import Table, with_section
from benchmarks.systems import OURS, ROOT

assert scale  # adds its workloads to the registry

DOCS = ROOT / "docs" / "scaling.md"

BUSY: Final = 0.7  # share of a core that may be used, so that waiting for it stays short
BACKLOG_S: Final = 600
RATES: Final = (10_000, 100_000, 1_000_000)


@dataclass(frozen=True, slots=True)
class Measured:
    """A number that the arithmetic uses: its name on the page, and where it comes from."""

    name: str
    title: str
    unit: str
    workload: str
    number: str

    def value(self, results: Results) -> float | None:
        """Return the median; None if it was not measured."""
        found = results.spread(self.workload, OURS.name, self.number)
        return None if found is None else found.median


MEASURED: Final = [
    Measured(*row)
    for row in (
        ("ENQUEUE", "Redis CPU to enqueue, 50 callers", "µs", "enqueue-50", "redis_cpu_us"),
        ("BULK", "the same, in bulk", "µs", "enqueue-bulk", "redis_cpu_us"),
        ("RUN", "Redis CPU to give a task out and save its end", "µs", "drain-100", "redis_cpu_us"),
        ("ALONE", "Redis CPU of a task by itself, all of it", "µs", "fleet-100", "redis_cpu_us"),
        ("PRODUCER", "CPU of the producer, 50 callers", "µs", "enqueue-50", "worker_cpu_us"),
        ("WORKER", "CPU of the worker, handler empty", "µs", "drain-100", "worker_cpu_us"),
        ("RATE", "tasks a second of one process, handler empty", "", "drain-100", "rate"),
        ("WAITING", "memory of a small waiting task", "bytes", "backlog-1m", "bytes_a_task"),
        ("CONNECTIONS", "connections of an idle worker", "", "connections", "connections"),
        ("IDLE", "Redis CPU of an idle worker", "% of a core", "fleet-100", "redis_cpu_a_worker"),
        ("COMMANDS", "commands of an idle worker", "/s", "fleet-100", "commands_a_worker_s"),
    )
]


def measured_table(results: Results) -> Table:
    """Show what was measured, by the names that the arithmetic uses."""
    rows: list[list[str]] = []
    for one in MEASURED:
        value = one.value(results)
        shown = "not measured" if value is None else f"{_number(value)} {one.unit}".rstrip()
        rows.append([one.name, one.title, shown])
    return Table("", ["Name", "What", "Measured"], rows)


def arithmetic_table(results: Results) -> Table:
    """Show what a rate takes; "-" where what it takes to know was not measured."""
    known = {one.name: one.value(results) for one in MEASURED}
    rows: list[list[str]] = []
    for title, formula, take in _STEPS:
        cells = [take(rate, known) for rate in RATES]
        rows.append([title, formula, *("-" if cell is None else _number(cell) for cell in cells)])
    return Table("", ["", "Calculated as", *(f"{rate:,}/s" for rate in RATES)], rows)


Known = Mapping[str, float | None]


def _cores(rate: float, *costs_us: float | None) -> float | None:
    known = [cost for cost in costs_us if cost is not None]
    return rate * sum(known) / 1e6 if len(known) == len(costs_us) else None


def _rounded_up(cores: float | None) -> float | None:
    return None if cores is None else math.ceil(cores / BUSY)


def _redis_cores(rate: float, known: Known) -> float | None:
    return _cores(rate, known["ENQUEUE"], known["RUN"])


def _servers(rate: float, known: Known) -> float | None:
    return _rounded_up(_redis_cores(rate, known))


def _workers(rate: float, known: Known) -> float | None:
    return _rounded_up(_cores(rate, known["WORKER"]))


def _producers(rate: float, known: Known) -> float | None:
    return _rounded_up(_cores(rate, known["PRODUCER"]))


def _connections_at_one(rate: float, known: Known) -> float | None:
    workers, servers, each = _workers(rate, known), _servers(rate, known), known["CONNECTIONS"]
    if workers is None or servers is None or each is None:
        return None
    return math.ceil(workers / servers) * each


def _backlog_gb(rate: float, known: Known) -> float | None:
    each = known["WAITING"]
    return None if each is None else rate * BACKLOG_S * each / 1e9


_STEPS: Final = [
    ("cores of Redis", "rate * (ENQUEUE + RUN)", _redis_cores),
    ("Redis servers", f"that / {BUSY}, rounded up", _servers),
    ("worker processes, handlers empty", f"rate * WORKER / {BUSY}, rounded up", _workers),
    ("producer processes", f"rate * PRODUCER / {BUSY}, rounded up", _producers),
    ("connections of workers at a Redis", "workers / servers * CONNECTIONS", _connections_at_one),
    ("GB for ten minutes of backlog", "rate * 600 * WAITING", _backlog_gb),
]


def documented(text: str, data: Mapping[str, Any]) -> str:
    """Put results into the text of the docs. Raises `ValueError` if a section has no markers."""
    results = Results(data)
    text = with_section(text, "measured", measured_table(results).markdown())
    return with_section(text, "arithmetic", arithmetic_table(results).markdown())


def write_docs(data: Mapping[str, Any]) -> None:
    """Write the generated sections of docs/scaling.md."""
    DOCS.write_text(documented(DOCS.read_text("utf-8"), data), "utf-8")


def _number(value: float) -> str:
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    """Write the docs from a file of results."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m benchmarks.capacity RESULTS.json")
    write_docs(json.loads(Path(sys.argv[1]).read_text("utf-8")))


if __name__ == "__main__":
    main()
