"""Turns results into tables, and writes them into docs/benchmarks.md.

    python -m benchmarks.report benchmarks/results/results.json

writes the docs anew from results measured before.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table as RichTable

from benchmarks import features, plots, scale
from benchmarks.claims import CLAIMS
from benchmarks.measured import Results, Spread, ratio
from benchmarks.systems import OURS, ROOT, SYSTEMS
from benchmarks.workloads import WORKLOADS, Workload, groups

REGISTERED = (features, scale)  # imported for the workloads and claims that they add

DOCS = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Table:
    """A table, to be printed or to be written as Markdown."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list[str])

    def rich(self) -> RichTable:
        """Make what rich prints."""
        table = RichTable(
            title=_verbatim(self.title),
            caption=_verbatim("\n".join(self.notes)) or None,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for i, name in enumerate(self.header):
            justify: Literal["left", "right"] = "right" if self._is_numeric(i) else "left"
            table.add_column(name, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*map(_verbatim, row))
        return table

    def markdown(self) -> str:
        """Write it as Markdown, with its title as a heading."""
        lines = [f"### {self.title}", ""] if self.title else []
        lines.append(_line(self.header))
        numeric = map(self._is_numeric, range(len(self.header)))
        lines.append(_line(["---:" if each else "---" for each in numeric]))
        lines += [_line([_escaped(cell) for cell in row]) for row in self.rows]
        for note in self.notes:
            lines += ["", _escaped(note)]
        return "\n".join(lines)

    def _is_numeric(self, column: int) -> bool:
        return all(re.match(r"-?\d|-$", row[column]) for row in self.rows)


class Row(NamedTuple):
    """Where a row of a workload's table comes from."""

    title: str
    workload: str
    system: str


def tables(data: Mapping[str, Any]) -> list[Table]:
    """Make all tables of a run: one a workload, and the claims last."""
    results = Results(data)
    made = [workload_table(results, group) for group in groups()]
    return [table for table in [*made, claims_table(results)] if table.rows]


def claims_table(results: Results) -> Table:
    """Say what was to be shown and whether it was; what was not measured is left out."""
    rows: list[list[str]] = []
    for claim in CLAIMS:
        if (value := claim.value(results)) is not None:
            met = "met" if claim.met(value) else "NOT MET"
            rows.append([claim.title, claim.bound, _number(value.median), _span(value), met])
    header = ["Claim", "Bound", "Median", "Least to most", "Met?"]
    return Table("What it must show", header, rows)


def workload_table(results: Results, group: list[Workload]) -> Table:
    """Compare the systems in one workload, and what is measured beside it."""
    first, *others = group
    rows = [Row(SYSTEMS[name].title, first.name, name) for name in results.took_part(first.name)]
    for other in others:
        rows += [Row(other.title, other.name, name) for name in results.took_part(other.name)]
    columns = [column for column in COLUMNS if column.fits(results, rows)]
    notes: list[str] = []
    for row in rows:
        if errors := results.errors(row.workload, row.system):
            tried = len(errors) + results.rounds(row.workload, row.system)
            notes.append(f"{row.title} failed in {len(errors)} of {tried} rounds: {errors[0]}")
    unable = [
        SYSTEMS[name].title
        for name in results.systems
        if name in SYSTEMS and first.only is None and not first.fits(SYSTEMS[name])
    ]
    if unable:
        notes.append(f"Not measured, because they lack it: {', '.join(unable)}.")
    cells = [[row.title, *(column.cell(results, row) for column in columns)] for row in rows]
    return Table(first.title, ["", *(column.title for column in columns)], cells, notes)


# Columns


@dataclass(frozen=True)
class Column:
    """A column of a workload's table; it is there if a row has the number `name`."""

    name: str
    title: str
    show: Callable[[Spread], str]

    def fits(self, results: Results, rows: list[Row]) -> bool:
        """Whether there is anything to show."""
        return any(results.values(row.workload, row.system, self.name) for row in rows)

    def cell(self, results: Results, row: Row) -> str:
        """Fill a cell."""
        found = results.spread(row.workload, row.system, self.name)
        return "-" if found is None else self.show(found)


@dataclass(frozen=True)
class Compared(Column):
    """A column that sets ours against each other row, round by round."""

    more_is_better: bool = True

    def fits(self, results: Results, rows: list[Row]) -> bool:
        """Whether there are both sides."""
        sides = {row.system == OURS.name for row in rows}
        return len(sides) == 2 and super().fits(results, rows)

    def cell(self, results: Results, row: Row) -> str:
        """Say how many times better ours is; nothing for ours itself."""
        if row.system == OURS.name:
            return "-"
        table = _table_of(row.workload)
        ours = results.values(table, OURS.name, self.name)
        theirs = results.values(row.workload, row.system, self.name)
        found = ratio(ours, theirs) if self.more_is_better else ratio(theirs, ours)
        # What starts early by its median has no ratio that says anything.
        return "-" if found is None or found.least <= 0 else self.show(found)


def _table_of(workload: str) -> str:
    return WORKLOADS[workload].beside or workload


def _median(value: Spread) -> str:
    return _number(value.median)


def _span(value: Spread) -> str:
    if value.least == value.most:
        return "-"
    return f"{_number(value.least)} to {_number(value.most)}"


def _median_and_span(value: Spread) -> str:
    return _median(value) if value.least == value.most else f"{_median(value)} ({_span(value)})"


def _always(value: Spread) -> str:
    return "yes" if value.least == 1 else "NO"


COLUMNS = [
    Column("rate", "tasks/s", _median_and_span),
    Compared("rate", "ours / theirs", _median_and_span),
    Column("p50_ms", "p50 ms", _median_and_span),
    Column("p99_ms", "p99 ms", _median_and_span),
    Column("least_ms", "earliest ms", _median),
    Compared("p50_ms", "theirs / ours, p50", _median_and_span, more_is_better=False),
    Column("commands_a_s", "Redis commands/s", _median),
    Column("worker_cpu_percent", "worker CPU %", _median),
    Column("redis_cpu_percent", "Redis CPU %", _median),
    Column("connections", "connections a worker", _median),
    Column("most_waiting", "waiting connections, most", _median),
    Column("pump_calls_a_task", "pump calls a task", _median),
    Column("processes", "processes", _median),
    Column("idle_rss_mb", "RSS MB", _median),
    Column("idle_pss_mb", "PSS MB", _median),
    Column("drained_rss_mb", "RSS MB after a drain", _median),
    Column("drained_pss_mb", "PSS MB after a drain", _median),
    Column("worker_cpu_us", "CPU µs a task", _median),
    Column("redis_cpu_us", "Redis CPU µs a task", _median),
    Column("bytes_a_task", "Redis bytes a waiting task", _median),
    Column("waiting", "waiting tasks", _median),
    Column("tasks", "tasks", _median),
    Column("once", "once", _always),
    Column("acked", "acknowledged", _always),
    Column("clean", "clean stop", _always),
]


# Text


def brief(numbers: Mapping[str, float]) -> str:
    """Say the main number of a measurement in a few words."""
    if "rate" in numbers:
        text = f"{numbers['rate']:,.0f}/s"
    elif "p50_ms" in numbers:
        text = f"p50 {numbers['p50_ms']:.2f} ms, p99 {numbers['p99_ms']:.2f} ms"
    elif "commands_a_s" in numbers:
        text = f"{numbers['commands_a_s']:.1f} commands/s"
    else:
        text = ", ".join(f"{name} {_number(value)}" for name, value in numbers.items())
    wrong = [word for word in ("once", "acked", "clean") if numbers.get(word) == 0]
    return f"{text}{''.join(f', NOT {word}' for word in wrong)}"


def _number(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _verbatim(text: str) -> str:
    return text.replace("[", r"\[")


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return re.sub(r"([|\[\]<>*])", r"\\\1", " ".join(text.split()))


# The docs


def write_docs(data: Mapping[str, Any]) -> None:
    """Write the generated sections of docs/benchmarks.md, and its plots."""
    text = documented(DOCS.read_text("utf-8"), data)
    plots.plot(Results(data), PLOTS)
    DOCS.write_text(text, "utf-8")


def documented(text: str, data: Mapping[str, Any]) -> str:
    """Put results into the text of the docs. Raises `ValueError` if a section has no markers."""
    for name, content in sections(data).items():
        text = with_section(text, name, content)
    return text


def sections(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the generated sections by name."""
    results = Results(data)
    claims = claims_table(results)
    of_workloads = [table for group in groups() if (table := workload_table(results, group)).rows]
    return {
        "machine": _machine(data),
        "claims": Table("", claims.header, claims.rows).markdown(),
        "systems": systems_table(results).markdown(),
        "plots": "\n\n".join(
            f"![{title}](benchmarks/{name})" for name, title in plots.titles(results).items()
        ),
        "results": "\n\n".join(table.markdown() for table in of_workloads),
    }


def systems_table(results: Results) -> Table:
    """Say of each system what a fair reader has to know."""
    header = [
        "System",
        "Handlers are",
        "Acknowledges",
        "When a task leaves Redis; what else to know",
    ]
    rows: list[list[str]] = []
    for name, version in results.systems.items():
        if name in SYSTEMS:
            system = SYSTEMS[name]
            known = f"{system.acknowledging} {system.note}".strip()
            rows.append([f"{system.title} {version}", system.runs, system.acknowledges, known])
    return Table("", header, rows)


def with_section(text: str, name: str, content: str) -> str:
    """Put content between the markers of a section. Raises `ValueError` if it has none."""
    marked = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"docs/benchmarks.md has no markers of the section {name!r}")
    return marked.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def _machine(data: Mapping[str, Any]) -> str:
    machine = data["machine"]
    return (
        f"Measured on {data['at'][:10]} in {data['rounds']} rounds: {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['system']}, {data['redis']} on the same machine, Python "
        f"{machine['python']}."
    )


def main() -> None:
    """Write the docs from a file of results."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m benchmarks.report RESULTS.json")
    write_docs(json.loads(Path(sys.argv[1]).read_text("utf-8")))


if __name__ == "__main__":
    main()
