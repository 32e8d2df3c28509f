"""The benchmarks of growth measure, and what they measured fills the page about scaling."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from benchmarks import capacity, scale
from benchmarks.workloads import WORKLOADS
from tests.e2e.program import ROOT, environment
from tests.stores import Database


async def measured(store: Database, *names: str) -> dict[str, dict[str, float]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.scale", *names, "--tasks", "0.05"),
        *("--redis", store.url),
        cwd=ROOT,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 0, errors.decode()
    found: dict[str, dict[str, float]] = {}
    for line in output.splitlines():
        found |= json.loads(line)
    return found


async def test_work_of_several_processes_is_measured(store: Database) -> None:
    numbers = (await measured(store, "processes-2"))["processes-2"]
    assert numbers["tasks"] == 2_000
    assert 100 < numbers["rate"] < 1e6
    assert 0 < numbers["redis_cpu_us"] < 1e4
    assert (numbers["once"], numbers["clean"]) == (1, 1)


async def test_an_unknown_workload_is_refused_with_the_names_there_are(store: Database) -> None:
    with pytest.raises(AssertionError, match="there is no fleet-7, only fleet-100"):
        await measured(store, "fleet-7")


def results(**values: float) -> dict[str, Any]:
    """Results in which each number that the page uses has the value 10, or another one."""
    entries: dict[str, dict[str, float]] = {}
    for one in capacity.MEASURED:
        entries.setdefault(one.workload, {})[one.number] = values.get(one.name, 10.0)
    return {
        "systems": {"ours": "1"},
        "measurements": [
            {"workload": workload, "system": "ours", "round": 1, "numbers": numbers}
            for workload, numbers in entries.items()
        ],
    }


def test_what_the_page_calculates_with_is_measured() -> None:
    assert {one.workload for one in capacity.MEASURED} <= WORKLOADS.keys()
    assert set(scale.NAMES) <= WORKLOADS.keys()


def test_the_page_is_filled_from_results() -> None:
    text = capacity.documented(capacity.DOCS.read_text(), results(ENQUEUE=25, RUN=10, WAITING=500))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    table = {row[0]: row[2:] for row in rows if len(row) == 5}
    assert table["cores of Redis"] == ["0.35", "3.5", "35"]
    assert table["Redis servers"] == ["1", "5", "50"]
    assert table["worker processes, handlers empty"] == ["1", "2", "15"]
    assert table["GB for ten minutes of backlog"] == ["3", "30", "300"]
    assert "| ENQUEUE | Redis CPU to enqueue, 50 callers | 25 µs |" in text
    assert "Not filled in yet" not in text
    assert capacity.documented(text, results(ENQUEUE=25, RUN=10, WAITING=500)) == text


def test_what_was_not_measured_is_said() -> None:
    text = capacity.documented(
        capacity.DOCS.read_text(), {"systems": {"ours": "1"}, "measurements": []}
    )
    assert "| RUN | Redis CPU to give a task out and save its end | not measured |" in text
